"""Labelled image sets for training and evaluating diffusion transformers, from packages and files on this machine.

One specification string names a set: `digits`, `fashion`, `folder:PATH`, `npz:PATH` or `latents:PATH`. Every set comes
back as float32 [n, C, H, W] with int64 labels and a fixed split into training and held-out samples. Nothing is ever
unpickled and nothing is fetched.
"""

import hashlib
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from surgery.data.identity import picture_files, split_spec
from surgery.errors import CheckpointError, ResourceError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's dataset-fashion-mnist puts its files; the variable SURGERY_FASHION names another folder."""

_AGAIN = "install dataset-fashion-mnist again"


class Split(NamedTuple):
    """One part of a set: float32 [n, C, H, W] and int64 [n]."""

    images: "torch.Tensor"
    labels: "torch.Tensor"


@dataclass(frozen=True, eq=False)
class ImageSet:
    """`images` float32 [n, C, H, W] (pixels in [-1, 1]; latents as stored), `labels` int64 [n] in 0 .. n_classes-1.

    `val_rows` int64: the rows held out from training, fixed for a given content. `digest` is the sha256 of images,
    labels and split: two sets with the same digest train the same model.
    """

    images: "torch.Tensor"
    labels: "torch.Tensor"
    n_classes: int
    name: str
    val_rows: "torch.Tensor"
    digest: str

    @property
    def train(self) -> Split:
        """The samples to train on, in order of their rows."""
        import torch

        keep = torch.ones(len(self.images), dtype=torch.bool)
        keep[self.val_rows] = False
        return Split(self.images[keep], self.labels[keep])

    @property
    def val(self) -> Split:
        """The held-out samples."""
        return Split(self.images[self.val_rows], self.labels[self.val_rows])


def load_images(spec: str, *, size: int | None = None, channels: int | None = None) -> ImageSet:
    """The set that `spec` names.

    digits       scikit-learn's 1 797 images 8x8, 10 classes, 1 500 to train on
    fashion      Fashion-MNIST, 70 000 images padded to 32x32, 10 classes, its own 60 000 / 10 000 split
    folder:PATH  one sub-folder of PNG or JPEG files per class; each image is cropped to its central square and resized
                 to `size` (without `size` they must agree); `channels` 1 or 3, by default 3 if any image has colour
    npz:PATH     arr_0 uint8 [n,H,W,C], [n,C,H,W] or [n,H,W], and labels or arr_1 integers [n]
    latents:PATH .npz or .safetensors with latents float [n,C,H,W] and labels integers [n]

    Files without a split of their own hold out a tenth, at least one. Raises UsageError for a bad `spec` or argument,
    ResourceError when a package that carries the data is not installed, CheckpointError for unusable files.
    """
    kind, where = split_spec(spec)
    if kind != "folder" and (size is not None or channels is not None):
        raise UsageError(
            "bad-data",
            f"a size or channel count can only be asked of folder:PATH, not of {spec!r}",
            hint="leave out size and channels",
        )
    if where is None:
        return _digits() if kind == "digits" else _fashion()
    if kind == "folder":
        return _folder(where, spec, size, channels)
    return _npz(where, spec) if kind == "npz" else _latents(where, spec)


def check_fits(images: ImageSet, config: Mapping[str, Any]) -> None:
    """Refuse images that a model of `config` (diffusers keys) cannot take: channels, size, label range.

    Raises UsageError naming both numbers.
    """
    channels, height, width = images.images.shape[1:]
    for key, have in (("in_channels", channels), ("sample_size", height), ("sample_size", width)):
        want = config.get(key)
        if want is not None and have != want:
            pictures = key == "in_channels" and want not in (1, 3) and channels in (1, 3)
            raise UsageError(
                "data-misfit",
                f"{images.name} is {channels}x{height}x{width}, but the model has {key} {want}",
                hint="it takes latents: encode the images with its VAE and give latents:PATH"
                if pictures
                else "give images of the model's own size; folder:PATH resizes pictures by itself",
            )
    classes = config.get("num_embeds_ada_norm")
    if classes is not None and len(images.labels):
        low, high = int(images.labels.min()), int(images.labels.max())
        if low < 0 or high >= classes:
            raise UsageError(
                "label-range",
                f"{images.name} has labels {low} to {high}, but the model has {classes} classes (0 to {classes - 1})",
                hint="number the classes from 0, or leave out those that the model does not know",
            )


def _held_out(n: int, count: int) -> "torch.Tensor":
    """`count` of n rows, sorted, chosen by hash: the same on every platform and library version."""
    import torch

    ranked = sorted(range(n), key=lambda i: hashlib.sha256(f"surgery-split/{i}".encode()).digest())
    return torch.tensor(sorted(ranked[:count]), dtype=torch.int64)


def _build(
    name: str, images: "torch.Tensor", labels: "torch.Tensor", *, n_classes: int, val_rows: "torch.Tensor | None" = None
) -> ImageSet:
    import torch

    n = len(images)
    if n < 2:
        raise CheckpointError(
            "too-few-images", f"{name} holds {n} image(s); at least 2 are needed", hint="one of them is held out"
        )
    if val_rows is None:
        val_rows = _held_out(n, max(1, n // 10))
    images, labels = images.to(torch.float32).contiguous(), labels.to(torch.int64).contiguous()
    if not bool(torch.isfinite(images).all()):
        raise CheckpointError(
            "non-finite-images", f"{name} holds values that are not finite", hint="make the file again"
        )
    digest = hashlib.sha256(f"{tuple(images.shape)}/{n_classes}".encode())
    for tensor in (images, labels, val_rows):
        digest.update(tensor.numpy().data)
    return ImageSet(images, labels, n_classes, name, val_rows, digest.hexdigest())


def _digits() -> ImageSet:
    import torch

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ResourceError(
            "no-package", "the digits come with scikit-learn, which is not installed", hint="pip install scikit-learn"
        ) from error
    loaded = load_digits()
    images = torch.from_numpy(loaded.images).to(torch.float32)[:, None] / 8 - 1  # grey levels are 0 .. 16
    labels = torch.from_numpy(loaded.target)
    return _build("digits", images, labels, n_classes=10, val_rows=_held_out(len(images), len(images) - 1500))


def _fashion() -> ImageSet:
    import torch
    from torch.nn.functional import pad

    folder = Path(os.environ.get("SURGERY_FASHION") or FASHION_FOLDER)
    parts = []
    for part in ("train", "t10k"):
        pixels = _idx(folder / f"{part}-images-idx3-ubyte.gz", dims=3)
        classes = _idx(folder / f"{part}-labels-idx1-ubyte.gz", dims=1)
        if len(pixels) != len(classes) or pixels.shape[1:] != (28, 28):
            raise CheckpointError(
                "bad-idx", f"{folder} holds {pixels.shape} {part} images and {len(classes)} labels", hint=_AGAIN
            )
        parts.append((torch.from_numpy(pixels), torch.from_numpy(classes)))
    (train_x, train_y), (val_x, val_y) = parts
    images = torch.cat([train_x, val_x])[:, None].to(torch.float32) / 127.5 - 1
    labels = torch.cat([train_y, val_y]).to(torch.int64)
    if int(labels.max()) > 9:
        raise CheckpointError("bad-idx", f"{folder} holds a label above 9", hint=_AGAIN)
    val_rows = torch.arange(len(train_x), len(images))
    return _build("fashion", pad(images, (2, 2, 2, 2), value=-1.0), labels, n_classes=10, val_rows=val_rows)


def _idx(path: Path, *, dims: int) -> "np.ndarray":
    """The uint8 array of a gzipped idx file with `dims` dimensions."""
    import gzip

    import numpy as np

    if not path.is_file():
        raise ResourceError(
            "no-package",
            f"{path} is missing: Fashion-MNIST comes with the Debian package dataset-fashion-mnist",
            hint="apt-get install dataset-fashion-mnist, or set SURGERY_FASHION to a folder with its four .gz files",
        )
    try:
        with gzip.open(path) as handle:
            raw = handle.read()
    except (OSError, EOFError) as error:
        raise CheckpointError("bad-idx", f"{path} cannot be read: {error}", hint=_AGAIN) from error
    head = 4 + 4 * dims
    # Magic: two zero bytes, 8 for unsigned bytes, the number of dimensions; then the sizes, big-endian.
    if len(raw) < head or raw[:4] != bytes([0, 0, 8, dims]):
        raise CheckpointError("bad-idx", f"{path} is not an idx file of bytes with {dims} dimensions", hint=_AGAIN)
    shape = struct.unpack(f">{dims}I", raw[4:head])
    size = 1
    for length in shape:
        size *= length
    if len(raw) - head != size:
        raise CheckpointError("bad-idx", f"{path} holds {len(raw) - head} values, its header says {shape}", hint=_AGAIN)
    return np.frombuffer(raw, dtype=np.uint8, offset=head).reshape(shape).copy()


def _folder(where: Path, spec: str, size: int | None, channels: int | None) -> ImageSet:
    import numpy as np
    import torch

    try:
        from PIL import Image
    except ImportError as error:
        raise ResourceError("no-package", "reading pictures needs pillow", hint="pip install pillow") from error
    if size is not None and size < 1:
        raise UsageError("bad-size", f"images cannot be resized to {size}", hint="give a size of at least 1")
    if channels not in (None, 1, 3):
        raise UsageError(
            "bad-channels", f"pictures have 1 or 3 channels, not {channels}", hint="latents are given as latents:PATH"
        )
    classes = picture_files(where)
    files = [path for found in classes.values() for path in found]
    labels = [label for label, found in enumerate(classes.values()) for _ in found]
    pictures: list[Image.Image] = []
    for path in files:
        try:
            with Image.open(path) as opened:
                # 16-bit and palette modes go through RGB or L, so that every pixel is a byte.
                grey = opened.mode in ("1", "L", "LA")
                picture = opened.convert("L" if grey else "RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise CheckpointError(
                "bad-picture", f"{path} cannot be read as an image: {error}", hint="remove the file or save it again"
            ) from error
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
        if size is not None and side != size:
            picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        elif pictures and picture.size != pictures[0].size:
            raise CheckpointError(
                "mixed-sizes",
                f"{path} is {side} pixels wide, {files[0]} is {pictures[0].width}",
                hint="ask for one size, to which every image is resized",
            )
        pictures.append(picture)
    if channels is None:
        channels = 3 if any(p.mode == "RGB" for p in pictures) else 1
    mode = "RGB" if channels == 3 else "L"
    pixels = np.stack([np.asarray(p.convert(mode), dtype=np.uint8) for p in pictures])
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
    return _build(spec, images, torch.tensor(labels), n_classes=len(classes))


def _arrays(where: Path, names: tuple[str, ...]) -> dict[str, "np.ndarray"]:
    """Those of `names` that the .npz file holds; never unpickles."""
    import zipfile
    import zlib

    import numpy as np

    try:
        opened = np.load(where, allow_pickle=False)
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise CheckpointError(
                "bad-npz", f"{where} is one array, not an .npz archive", hint="save it with numpy.savez"
            )
        with opened as archive:
            return {name: archive[name] for name in names if name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(
            "bad-npz", f"{where} cannot be read as an .npz archive of plain arrays", hint="save it with numpy.savez"
        ) from error


def _checked_labels(labels: "np.ndarray | None", n: int, where: Path, wanted: str) -> "torch.Tensor":
    import numpy as np
    import torch

    if labels is None:
        raise CheckpointError("no-labels", f"{where} has no {wanted}: every image needs a class", hint=f"add {wanted}")
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (n,):
        raise CheckpointError(
            "bad-labels",
            f"the labels in {where} are {labels.dtype}{list(labels.shape)}, not {n} integers",
            hint="give every image the number of its class",
        )
    if labels.min() < 0 or labels.max() >= 2**31:
        raise CheckpointError(
            "bad-labels", f"{where} has labels from {labels.min()} to {labels.max()}", hint="number the classes from 0"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _npz(where: Path, spec: str) -> ImageSet:
    import numpy as np
    import torch

    arrays = _arrays(where, ("arr_0", "labels", "arr_1"))
    pixels = arrays.get("arr_0")
    if pixels is None:
        raise CheckpointError(
            "no-images", f"{where} has no array arr_0", hint="save the images as arr_0, as surgery sample does"
        )
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or 0 in pixels.shape:
        raise CheckpointError(
            "bad-images",
            f"arr_0 in {where} is {pixels.dtype}{list(pixels.shape)}, not bytes [n, height, width, channels]",
            hint="save pixels as numpy.uint8, 0 to 255",
        )
    if pixels.shape[3] in (1, 3):
        pixels = pixels.transpose(0, 3, 1, 2)
    elif pixels.shape[1] not in (1, 3):
        raise CheckpointError(
            "bad-images",
            f"arr_0 in {where} is {list(pixels.shape)}: neither the second nor the last axis is 1 or 3 channels",
            hint="latents are given as latents:PATH",
        )
    labels = _checked_labels(arrays.get("labels", arrays.get("arr_1")), len(pixels), where, "array labels or arr_1")
    images = torch.from_numpy(np.ascontiguousarray(pixels)).to(torch.float32) / 127.5 - 1
    return _build(spec, images, labels, n_classes=int(labels.max()) + 1)


def _latents(where: Path, spec: str) -> ImageSet:
    import numpy as np
    import torch

    if where.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(where)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                "bad-latents", f"{where} cannot be read as safetensors: {error}", hint="make the file again"
            ) from error
        latents = tensors.get("latents")
        labels = (
            tensors["labels"].numpy() if "labels" in tensors and tensors["labels"].dtype != torch.bfloat16 else None
        )
    else:
        arrays = _arrays(where, ("latents", "labels"))
        array = arrays.get("latents")
        if array is not None and not np.issubdtype(array.dtype, np.floating):
            raise CheckpointError(
                "bad-latents", f"latents in {where} are {array.dtype}, not floating point", hint="save them as float32"
            )
        latents = None if array is None else torch.from_numpy(array.astype(np.float32))
        labels = arrays.get("labels")
    if latents is None:
        raise CheckpointError(
            "no-images", f"{where} has no array called latents", hint="save latents and labels by these names"
        )
    if latents.dim() != 4 or not latents.is_floating_point() or 0 in latents.shape:
        raise CheckpointError(
            "bad-latents",
            f"latents in {where} are {latents.dtype}{list(latents.shape)}, not floats [n, channels, height, width]",
            hint="save them as the VAE gives them",
        )
    checked = _checked_labels(labels, len(latents), where, "array labels")
    return _build(spec, latents, checked, n_classes=int(checked.max()) + 1)
