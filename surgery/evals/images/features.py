"""Turn images into the feature rows that metrics compare: one function, three kinds of extractor.

classifier[:PATH]  a folder written by classifier training; without PATH the digits classifier shipped in the package
inception:PATH     a TorchScript file on this machine that maps images to pooled Inception features [n, 2048]
npz                no extractor runs: the features are already in the file, made elsewhere

An extractor's id holds a digest of its weights, so numbers from two different ones are never taken for comparable.
This module needs numpy; torch and safetensors are imported when an extractor is opened.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import CheckpointError, UsageError, closest
from surgery.evals.pictures import to_uint8

if TYPE_CHECKING:
    import torch

Report = Callable[[str, Mapping[str, float]], None]
Rows = NDArray[np.float64]

DIGITS_CLASSIFIER = Path(__file__).resolve().parents[2] / "assets" / "digits-classifier"
"""The classifier that ships with the package."""

INCEPTION_WIDTH = 2048


@dataclass(frozen=True)
class Extractor:
    """`run` maps uint8 pixels [B, H, W, C] to features [B, d] and class probabilities [B, K] or None.

    `id` names the kind and 16 hex digits of a sha256 over what decides the features: configuration and weights.
    """

    id: str
    run: Callable[[NDArray[np.uint8]], tuple[Rows, Rows | None]]


def open_extractor(spec: str) -> Extractor:
    """The extractor that `spec` names; see the top of this module.

    Raises UsageError for an unknown kind or a missing path, CheckpointError for files that are missing or unusable.
    """
    kind, _, path = spec.partition(":")
    if kind == "classifier":
        return _classifier(Path(path) if path else DIGITS_CLASSIFIER)
    if kind == "inception":
        if not path:
            raise UsageError(
                "no-inception",
                "the inception extractor needs a file",
                hint="write inception:PATH with a TorchScript file whose output is [n, 2048]; none is downloaded",
            )
        return _inception(Path(path))
    if kind == "npz":
        raise UsageError(
            "npz-extractor",
            "npz runs no extractor: the features come from the files that are compared",
            hint="name a classifier or an inception file",
        )
    known = ["classifier", "inception", "npz"]
    raise UsageError("unknown-extractor", f"unknown features {spec!r}", hint=closest(kind, known))


def extract(
    images: Any, extractor: str | Extractor, *, batch: int = 256, report: Report | None = None
) -> tuple[Rows, Rows | None]:
    """Features float64 [n, d] of images, and class probabilities [n, K] where the extractor has them.

    `images`: uint8 [n, H, W, C], or float [n, C, H, W] in [-1, 1], which is rounded to uint8 first, so that real and
    generated images lose the same. Reports ("features", {done, n}). Raises UsageError for other arrays or when the
    extractor takes other channels or another size, CheckpointError when features are not finite.
    """
    pixels = np.asarray(images)
    if np.issubdtype(pixels.dtype, np.floating):
        if pixels.ndim == 4 and not np.isfinite(pixels).all():
            raise UsageError(
                "non-finite-images", "the images hold NaN or infinite values", hint="sample again in float32"
            )
        pixels = to_uint8(pixels) if pixels.ndim == 4 else pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or len(pixels) == 0:
        raise UsageError(
            "bad-images",
            f"images are {pixels.dtype} {list(pixels.shape)}, not uint8 [n, H, W, C] or float [n, C, H, W]",
            hint="pass at least one image",
        )
    opened = open_extractor(extractor) if isinstance(extractor, str) else extractor
    features: list[Rows] = []
    probs: list[Rows] = []
    for start in range(0, len(pixels), batch):
        part, part_probs = opened.run(pixels[start : start + batch])
        features.append(part)
        if part_probs is not None:
            probs.append(part_probs)
        if report is not None:
            report("features", {"done": min(len(pixels), start + batch), "n": len(pixels)})
    out = np.concatenate(features)
    if not np.isfinite(out).all():
        raise CheckpointError(
            "non-finite-features", f"{opened.id} gives NaN or infinite features", hint="look at its weights"
        )
    return out, np.concatenate(probs) if probs else None


# --- classifier -------------------------------------------------------------------------------------------------------


def _classifier(folder: Path) -> Extractor:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    from surgery.arch.classifier import build_classifier

    try:
        config_bytes = (folder / "config.json").read_bytes()
        weights = (folder / "model.safetensors").read_bytes()
    except OSError as error:
        raise CheckpointError(
            "no-classifier",
            f"{folder} is not a classifier folder: {Path(str(error.filename)).name} cannot be read ({error.strerror})",
            hint="name a folder with config.json and model.safetensors, written by classifier training",
        ) from error
    try:
        config = json.loads(config_bytes)
        state = load(weights)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise CheckpointError(
            "bad-classifier", f"{folder}: {error}", hint="train it again: surgery train classifier"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(
            "bad-classifier",
            f"{folder / 'config.json'} is a {type(config).__name__}, not an object",
            hint="train it again: surgery train classifier",
        )
    model = build_classifier(config, where=str(folder / "config.json"))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise CheckpointError(
            "bad-classifier",
            f"{folder / 'model.safetensors'}: {lines[-1].strip()}",
            hint="train it again: surgery train classifier",
        ) from error
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode() + b"\0" + weights).hexdigest()[:16]
    want = (model.config.size, model.config.size, model.config.channels)

    @torch.no_grad()
    def run(pixels: NDArray[np.uint8]) -> tuple[Rows, Rows | None]:
        if pixels.shape[1:] != want:
            raise UsageError(
                "image-size",
                f"the classifier takes {want[0]}x{want[1]} images with {want[2]} channel(s), these are"
                f" {pixels.shape[1]}x{pixels.shape[2]} with {pixels.shape[3]}",
                hint="train a classifier on images like these",
            )
        x = _nchw(pixels).float() / 127.5 - 1
        hidden = model.features(x)
        return _rows(hidden), _rows(torch.softmax(model.to_logits(hidden).double(), 1))

    return Extractor(f"classifier:{digest}", run)


# --- inception --------------------------------------------------------------------------------------------------------


def _inception(path: Path) -> Extractor:
    """Convention of the file: forward takes pixels 0..255 [B, 3, H, W] as uint8, resizes them itself, and returns the
    features [B, 2048], or a pair of features and logits. Files whose forward has a `return_features` argument, as the
    widely used conversion of the 2015 graph has, are asked for features with it, and through `no_output_bias` for the
    class probabilities that the Inception score is defined on. Grey images are repeated on three channels."""
    import torch

    if not path.is_file():
        raise CheckpointError(
            "no-inception",
            f"the Inception file {path} does not exist",
            hint="put a TorchScript file there whose output is [n, 2048] pooled features; none is downloaded",
        )
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        module = torch.jit.load(str(path), map_location="cpu").eval()
    except (OSError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            "bad-inception",
            f"{path} is not a TorchScript file: {first}",
            hint="export the network with torch.jit.script or trace",
        ) from error
    names = {argument.name for argument in module.forward.schema.arguments}

    @torch.no_grad()
    def run(pixels: NDArray[np.uint8]) -> tuple[Rows, Rows | None]:
        x = _nchw(pixels)
        if x.shape[1] == 1:
            x = x.repeat(1, 3, 1, 1)
        try:
            output = module(x, return_features=True) if "return_features" in names else module(x)
            probs = module(x, no_output_bias=True) if {"return_features", "no_output_bias"} <= names else None
        except RuntimeError as error:
            last = str(error).strip().splitlines()[-1]
            raise CheckpointError(
                "bad-inception",
                f"{path} fails on images {list(x.shape)}: {last}",
                hint="the network must take [n, 3, H, W] images",
            ) from error
        if isinstance(output, tuple) and len(output) == 2:
            output, probs = output[0], torch.softmax(output[1].double(), 1)
        if not isinstance(output, torch.Tensor) or output.shape != (len(x), INCEPTION_WIDTH):
            what = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise CheckpointError(
                "bad-inception",
                f"{path} returns {what} for {len(x)} images, not pooled features [{len(x)}, {INCEPTION_WIDTH}]",
                hint="export the network without its last layer",
            )
        return _rows(output), None if probs is None else _rows(probs)

    return Extractor(f"inception:{digest}", run)


def _nchw(pixels: NDArray[np.uint8]) -> "torch.Tensor":
    import torch

    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def _rows(tensor: "torch.Tensor") -> Rows:
    return tensor.double().cpu().numpy()
