"""Stage 1 inputs: what each operator of the unmodified model receives and returns.

Grafting (arXiv 2506.05340, section 3.1, eq. 2) trains a new operator on pairs (u, y = f(u)) recorded while the frozen
teacher denoises *noised* images: u is the operator's input after modulation, y its raw output before the gate.

The recorded samples are a numbered list: sample i (image, label, timestep, noise) depends on the seed and i alone.
Reading them back from a cache on disk and running the teacher again therefore feed the same training.

Shape legend: B batch, N tokens, D width.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.arch.dit.diffusion import NoiseSchedule, call_model, drop_labels
from surgery.data.images import ImageSet, Split
from surgery.errors import CheckpointError, OutputError, ResourceError, UsageError
from surgery.train.optim import generator_for

Report = Callable[[str, Mapping[str, float]], None]
Recorded = dict[str, Tensor]
"""One batch of one operator: "u" and "y" [B, N, D]; "gate" [B, D] and "keyword.NAME" where the tap asks for them."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What a cache may hold. Not float16: its range ends at 65 504 and deep activations are what exceeds it."""

_SHARD_BYTES = 256 << 20
_FORMAT = 1


@dataclass(frozen=True)
class Tap:
    """Where to record one operator.

    `path`: the module whose first positional argument is u. `output_path`: the module whose output is y, the same one
    by default; another one for a span of blocks. `gate`: (module path, index) of the gate within that module's output
    tuple, e.g. ("transformer_blocks.3.norm1", 1) for attention in an adaLN-Zero block and 4 for the MLP. `keywords`:
    tensor arguments of the call to keep beside u, for modules that need them again.
    """

    path: str
    output_path: str | None = None
    gate: tuple[str, int] | None = None
    keywords: tuple[str, ...] = ()


@torch.no_grad()
def record(model: nn.Module, taps: Sequence[Tap], x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor) -> dict[str, Recorded]:
    """Run `model` once on noised images and return what every tap saw, by `tap.path`.

    Tensors stay on the model's device, in its dtype, and are copies. Raises UsageError when a path names no module, or
    a module is not called exactly once with a tensor in first place.
    """
    seen: dict[str, Recorded] = {tap.path: {} for tap in taps}
    handles = []

    def put(tap: Tap, name: str, value: object, part: int | None = None) -> None:
        if isinstance(value, tuple) and value:
            value = value[part or 0]
        if not isinstance(value, Tensor):
            raise UsageError("bad-tap", f"{tap.path} gives no tensor to record as {name!r}")
        if name in seen[tap.path]:
            raise UsageError(
                "bad-tap",
                f"{tap.path} runs more than once in one forward pass",
                hint="switch chunked feed-forward off",
            )
        seen[tap.path][name] = value.detach().clone()

    def on_input(tap: Tap) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            put(tap, "u", args[0] if args else None)
            for name in tap.keywords:
                put(tap, f"keyword.{name}", kwargs.get(name))

        return hook

    def on_output(tap: Tap, name: str, part: int | None = None) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: object) -> None:
            put(tap, name, output, part)

        return hook

    try:
        for tap in taps:
            handles.append(_module(model, tap.path).register_forward_pre_hook(on_input(tap), with_kwargs=True))
            handles.append(_module(model, tap.output_path or tap.path).register_forward_hook(on_output(tap, "y")))
            if tap.gate is not None:
                path, part = tap.gate
                handles.append(_module(model, path).register_forward_hook(on_output(tap, "gate", part)))
        call_model(model, x_BCHW, t_B, labels_B)
    finally:
        for handle in handles:
            handle.remove()
    for path, values in seen.items():
        if "u" not in values or "y" not in values:
            raise UsageError("bad-tap", f"{path} is not run by a forward pass of this model")
    return seen


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UsageError("no-module", f"the model has no module {path!r}") from error


class SampleSource:
    """The numbered samples of one split: `batch(ids)` -> noised images, timesteps, labels.

    Classes take turns (the paper uses as many images of each class), the images of a class come in seeded order and
    again with other noise when there are more samples than images. A share `label_dropout` of the labels is replaced by
    the null class: guided sampling runs every operator on null-labelled inputs too, and this is the mix that the
    teacher was trained on.
    """

    def __init__(
        self, split: Split, schedule: NoiseSchedule, *, seed: int, purpose: str, null: int, label_dropout: float
    ) -> None:
        self.split, self.schedule, self.seed, self.purpose = split, schedule, seed, f"distill-{purpose}"
        self.null, self.label_dropout = null, label_dropout
        generator = generator_for(seed, self.purpose + "-rows", 0)
        self._rows = []
        for label in split.labels.unique().tolist():
            rows = torch.nonzero(split.labels == label).flatten()
            self._rows.append(rows[torch.randperm(len(rows), generator=generator)])

    def batch(self, ids: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """x_t [B, C, H, W], t [B], labels [B] of these samples, on the CPU."""
        images, noises, times, labels = [], [], [], []
        for i in ids:
            generator = generator_for(self.seed, self.purpose, i)
            rows = self._rows[i % len(self._rows)]
            row = rows[(i // len(self._rows)) % len(rows)]
            times.append(torch.randint(self.schedule.steps, (1,), generator=generator))
            labels.append(drop_labels(self.split.labels[row].view(1), self.label_dropout, self.null, generator))
            noises.append(torch.randn(self.split.images.shape[1:], generator=generator))
            images.append(self.split.images[row])
        t_B = torch.cat(times)
        return self.schedule.add_noise(torch.stack(images), torch.stack(noises), t_B), t_B, torch.cat(labels)


def sources(
    images: ImageSet, schedule: NoiseSchedule, *, seed: int, null: int, label_dropout: float
) -> tuple[SampleSource, SampleSource]:
    """The samples to train on and those held out."""
    make = {"seed": seed, "null": null, "label_dropout": label_dropout}
    return (
        SampleSource(images.train, schedule, purpose="train", **make),  # type: ignore[arg-type]
        SampleSource(images.val, schedule, purpose="val", **make),  # type: ignore[arg-type]
    )


def record_samples(
    model: nn.Module, taps: Sequence[Tap], source: SampleSource, ids: Sequence[int]
) -> dict[str, Recorded]:
    """`record` on samples `ids` of `source`, on the model's device."""
    device = next(model.parameters()).device
    x_t, t_B, labels_B = (value.to(device) for value in source.batch(ids))
    return record(model, taps, x_t.to(next(model.parameters()).dtype), t_B, labels_B)


def estimate_bytes(
    model: nn.Module, taps: Sequence[Tap], source: SampleSource, *, samples: int, dtype: str = "float32"
) -> int:
    """Size of a cache of `samples` samples of all taps, found by recording one. Leave none out: held-out ones count."""
    width = DTYPES[dtype].itemsize
    one = record_samples(model, taps, source, [0])
    return samples * sum(value.numel() * width for recorded in one.values() for value in recorded.values())


class Cache:
    """The recorded samples of one operator on disk: a folder of safetensors shards and an index written last.

    Shards hold tensors [rows, ...] named as in `Recorded`; they are mapped, not read, so a cache may exceed memory.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self._parts: dict[str, list[Recorded]] = {}

    @property
    def complete(self) -> bool:
        """Whether a finished recording with this key lies in the folder."""
        try:
            index = json.loads((self.folder / "index.json").read_text())
        except (OSError, ValueError):
            return False
        return isinstance(index, dict) and index.get("format") == _FORMAT and index.get("key") == self.key

    def parts(self, split: str) -> list[Recorded]:
        """The shards of "train" or "val", in order; raises CheckpointError when they cannot be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if split not in self._parts:
            try:
                names = json.loads((self.folder / "index.json").read_text())[split]
                self._parts[split] = [load_file(self.folder / name) for name in names]
            except (OSError, SafetensorError, KeyError, ValueError) as error:
                raise CheckpointError("bad-cache", f"{self.folder} is not a complete recording: {error}") from error
        return self._parts[split]

    def rows(self, split: str, ids: Tensor) -> Recorded:
        """Samples `ids` of a split in that order; numbers that are floating point as float32."""
        parts = self.parts(split)
        sizes = [len(part["u"]) for part in parts]
        if len(parts) == 1:
            return {name: _float(value[ids]) for name, value in parts[0].items()}
        ends = torch.tensor(sizes).cumsum(0)
        which = torch.searchsorted(ends, ids, right=True)
        found: Recorded = {}
        for k in which.unique().tolist():
            here = torch.nonzero(which == k).flatten()
            for name, value in parts[k].items():
                taken = _float(value[ids[here] - (ends[k] - sizes[k])])
                if name not in found:
                    found[name] = taken.new_empty(len(ids), *taken.shape[1:])
                found[name][here] = taken
        return found

    def delete(self) -> None:
        """Remove the shards; the operator they were for is finished."""
        self._parts.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


def fill(
    caches: Mapping[str, Cache],
    model: nn.Module,
    taps: Sequence[Tap],
    splits: Mapping[str, tuple[SampleSource, int]],
    *,
    batch: int,
    dtype: str,
    report: Report | None = None,
) -> None:
    """Record `splits` (name -> source and number of samples) for every tap into its cache, one teacher pass in all.

    Raises OutputError when the disk refuses, ResourceError when it has no room.
    """
    from safetensors.torch import save_file

    index: dict[str, dict[str, Any]] = {tap.path: {"format": _FORMAT, "key": caches[tap.path].key} for tap in taps}
    total, done = sum(count for _, count in splits.values()), 0
    try:
        for cache in caches.values():
            cache.delete()
            cache.folder.mkdir(parents=True)
        for split, (source, count) in splits.items():
            pending: dict[str, list[Recorded]] = {tap.path: [] for tap in taps}
            held = dict.fromkeys(pending, 0)
            for tap in taps:
                index[tap.path][split] = []
            for start in range(0, count, batch):
                ids = range(start, min(start + batch, count))
                for path, recorded in record_samples(model, taps, source, ids).items():
                    kept = {name: _storable(value, DTYPES[dtype]) for name, value in recorded.items()}
                    pending[path].append(kept)
                    held[path] += sum(value.nbytes for value in kept.values())
                    if held[path] >= _SHARD_BYTES or ids.stop == count:
                        name = f"{split}-{len(index[path][split]):05d}.safetensors"
                        joined = {k: torch.cat([part[k] for part in pending[path]]) for k in pending[path][0]}
                        save_file(joined, caches[path].folder / name)
                        index[path][split].append(name)
                        pending[path], held[path] = [], 0
                done += len(ids)
                if report is not None:
                    report("capture", {"step": done, "steps": total})
        for path, entry in index.items():
            partial = caches[path].folder / "index.partial"
            partial.write_text(json.dumps(entry))
            os.replace(partial, caches[path].folder / "index.json")
    except OSError as error:
        raise OutputError("not-writable", f"cannot write the stage 1 recording: {error}") from error


def _float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _storable(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(device="cpu", dtype=dtype if value.is_floating_point() else value.dtype).contiguous()


def check_room(folder: Path, needed: int) -> None:
    """Raises ResourceError, with the estimate, when the disk of `folder` has less than `needed` bytes free."""
    existing = next(p for p in [folder, *folder.parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ResourceError(
            "no-room",
            f"the stage 1 recording needs {needed / 1e9:.2f} GB in {folder}, which has {free / 1e9:.2f} GB free",
            hint="pass --capture online or fewer --samples, or name a roomier disk",
        )


def cached_batches(cache: Cache, split: str, count: int, batch: int) -> Iterator[Recorded]:
    """Samples 0 .. count-1 of a split, in the batches they were recorded in."""
    for start in range(0, count, batch):
        yield cache.rows(split, torch.arange(start, min(start + batch, count)))
