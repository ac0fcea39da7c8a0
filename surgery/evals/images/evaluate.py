"""Evaluate a file of generated images against real ones, and compare two such evaluations.

A number here never travels alone: the result carries the number of samples on both sides, digests of both, the
extractor and the sampling settings, and `compare` refuses results whose settings differ (arXiv 2506.05340, table 2,
reports 50 000 samples throughout; the Frechet distance of 1 000 is another quantity).
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.errors import UsageError

if TYPE_CHECKING:
    from surgery.evals.images.sample import Samples

Report = Callable[[str, Mapping[str, float]], None]

SETTINGS = ("sampler", "steps", "guidance", "cfg_channels", "spacing")
"""What sampling settings must agree before two results are set side by side, besides samples, reference, extractor."""

_WIDE = 512  # beyond this many features a bootstrap takes minutes and has to be asked for


def evaluate_images(
    samples: str | Path,
    ref: str = "digits",
    *,
    features: str = "classifier",
    split: str = "train",
    neighbours: int = 3,
    bootstrap: int | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Frechet distance (with a 95 % bootstrap interval), KID, Inception score, precision and recall of a sample file.

    ref        an .npz of images or features, or an image set such as "digits", of which `split` (train or val) is used
    features   "classifier", "classifier:PATH", "inception:PATH", or "npz" for features that both files hold already
    bootstrap  resamples of the interval, 0 for none; by default 200, and none beyond 512 features
    settings   sampling settings of a file made elsewhere, which records none; what the file records wins

    The result is plain data for JSON. `inception_score` is None without class probabilities; `notes` says what to be
    careful about. Raises UsageError when `ref` is a file that records other sampling settings than `samples`, and
    UsageError or CheckpointError as the readers, extractors and metrics do.
    """
    from surgery.evals.images import metrics
    from surgery.evals.images.sample import load_samples

    generated = load_samples(samples)
    against = load_samples(_npz_path(ref)) if features == "npz" or ref.endswith(".npz") else None
    if against is not None:
        _refuse_other_settings(samples, generated, ref, against)
    if features == "npz":
        assert against is not None
        gen, probs, gen_id = _stored(generated, samples)
        real, _, ref_id = _stored(against, ref)
        if gen_id != ref_id:
            raise UsageError(
                "extractors-differ",
                f"{samples} has features of {gen_id!r}, {ref} of {ref_id!r}",
                hint="extract both with the same extractor and name it in the entry 'extractor'",
            )
        extractor_id, ref_digest = f"npz:{gen_id}", _digest(real)
        name = ref
    else:
        from surgery.evals.images.features import extract, open_extractor

        if generated.images is None:
            raise UsageError("no-images", f"{samples} holds features but no images", hint="use the features npz")
        extractor = open_extractor(features)
        name, real_pixels = _reference(ref, split, against)
        gen, probs = extract(generated.images, extractor, report=report)
        real, _ = extract(real_pixels, extractor, report=report)
        extractor_id, ref_digest = extractor.id, _digest(real_pixels)
    frechet = metrics.frechet(real, gen)
    if bootstrap is None:
        bootstrap = 200 if gen.shape[1] <= _WIDE else 0
    balanced = _balanced(generated.labels)
    strata = generated.labels if balanced else None
    interval = metrics.bootstrap_frechet(real, gen, bootstrap, seed, strata=strata) if bootstrap else None
    score = None if probs is None else metrics.inception_score(probs)
    precision, recall = metrics.precision_recall(real, gen, neighbours)
    recorded = {**(settings or {}), **generated.settings}
    return {
        "frechet": frechet,
        "frechet_interval": None if interval is None else list(interval),
        "kid": metrics.kid_exact(real, gen),
        "inception_score": None if score is None else score[0],
        "precision": precision,
        "recall": recall,
        "n": len(gen),
        "n_ref": len(real),
        "reference": name,
        "reference_digest": ref_digest,
        "samples_digest": _digest(gen if generated.images is None else generated.images),
        "extractor": extractor_id,
        "model": recorded.get("model"),
        "seed": recorded.get("seed"),
        **{key: recorded.get(key) for key in SETTINGS},
        "notes": _notes(metrics.rank_note(real, gen), len(gen), len(real), balanced=balanced),
    }


def compare(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """How `other` differs from `base`, two results of `evaluate_images`: of each metric both values and the difference.

    `frechet` also says whether the bootstrap intervals are apart; overlapping ones leave the order open.
    Raises UsageError naming every difference when the results differ in samples, reference, extractor, sampler, steps,
    guidance or another setting that changes the numbers, or when one of them is not recorded.
    """
    differing, unknown = [], []
    for key in ("n", "n_ref", "reference_digest", "extractor", *SETTINGS):
        mine, theirs = base.get(key), other.get(key)
        if mine is None or theirs is None:
            unknown.append(key)
        elif mine != theirs:
            differing.append(f"{key} {_short(mine)} against {_short(theirs)}")
    if differing:
        raise UsageError(
            "settings-differ",
            f"these results cannot be compared: {', '.join(differing)}",
            hint="sample and evaluate both models with the same settings",
        )
    if unknown:
        raise UsageError(
            "settings-unknown",
            f"these results cannot be compared: {', '.join(unknown)} not recorded in both",
            hint="say with which settings the samples were made when evaluating them",
        )
    out: dict[str, Any] = {}
    for key in ("frechet", "kid", "inception_score", "precision", "recall"):
        mine, theirs = base.get(key), other.get(key)
        if mine is not None and theirs is not None:
            out[key] = {"base": mine, "other": theirs, "difference": theirs - mine}
    one, two = base.get("frechet_interval"), other.get("frechet_interval")
    if one and two:
        out["frechet"]["intervals_apart"] = bool(one[1] < two[0] or two[1] < one[0])
    return out


def _refuse_other_settings(samples: str | Path, generated: "Samples", ref: str, against: "Samples") -> None:
    """Raise UsageError when both files record how they were sampled and it was not the same way. A file that records
    nothing is one of real images, of which there may be any number."""
    mine, theirs = generated.settings, against.settings
    if not mine or not theirs:
        return
    differing = [
        f"{key} {mine[key]} against {theirs[key]}"
        for key in ("n", *SETTINGS)
        if key in mine and key in theirs and mine[key] != theirs[key]
    ]
    if differing:
        raise UsageError(
            "settings-differ",
            f"{samples} and {ref} were sampled in different ways: {', '.join(differing)}",
            hint="sample both with the same settings, or compare each with real images",
        )


def _reference(ref: str, split: str, against: "Samples | None") -> tuple[str, np.ndarray]:
    """Name and uint8 [n, H, W, C] pixels of the real images, or of the file that is read already."""
    from surgery.evals.pictures import to_uint8

    if against is not None:
        if against.images is None:
            raise UsageError("no-images", f"{ref} holds features but no images", hint="use the features npz")
        return ref, against.images
    from surgery.data.images import load_images

    if split not in ("train", "val"):
        raise UsageError("bad-split", f"an image set has no split {split!r}", hint="train or val (held out)")
    images = load_images(ref)
    part = images.train if split == "train" else images.val
    if part.images.shape[1] not in (1, 3):
        raise UsageError(
            "not-pixels",
            f"{ref} holds latents of {part.images.shape[1]} channels, not pixels",
            hint="name a set of pixels as reference",
        )
    return f"{images.name}:{split}", to_uint8(part.images.numpy())


def _npz_path(ref: str) -> str:
    return ref.removeprefix("npz:")


def _stored(found: Any, path: str | Path) -> tuple[np.ndarray, np.ndarray | None, str]:
    if found.features is None:
        raise UsageError("no-features", f"{path} holds no features", hint="name an extractor instead of npz")
    if found.extractor is None:
        raise UsageError(
            "unnamed-features",
            f"{path} does not say what extracted its features",
            hint="add a text entry 'extractor' that names the network and its version",
        )
    return np.asarray(found.features, dtype=np.float64), found.probs, found.extractor


def _digest(array: np.ndarray) -> str:
    content = np.ascontiguousarray(array)
    return hashlib.sha256(f"{content.dtype.str}{content.shape}".encode() + content.tobytes()).hexdigest()


def _short(value: Any) -> str:
    return value[:12] + ".." if isinstance(value, str) and len(value) == 64 else str(value)


def _balanced(labels: np.ndarray | None) -> bool:
    """Whether the images were made with (nearly) equal fixed numbers per class."""
    if labels is None or len(labels) < 2:
        return False
    counts = np.unique(labels, return_counts=True)[1]
    return len(counts) > 1 and int(counts.min()) > 1 and int(counts.max()) - int(counts.min()) <= 1


def _notes(rank: str | None, n: int, n_ref: int, *, balanced: bool) -> list[str]:
    notes = [] if rank is None else [rank]
    if balanced:
        notes.append("equal numbers per class: the interval keeps them fixed; KID, made for random classes, reads low")
    if n < 50_000:
        notes.append(f"measured on {n} samples: comparable only with results of as many")
    if n_ref < n:
        notes.append(f"the reference has fewer images ({n_ref}) than were generated ({n})")
    return notes
