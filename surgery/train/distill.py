"""Stage 1: activation distillation. Every new operator is trained alone to return what the operator it replaces does.

Grafting (arXiv 2506.05340, section 3.1, eq. 2): minimise L(g(u), f(u)) over inputs u recorded from the unmodified
model; L1 for attention, whose activations have heavy tails, L2 for MLPs (table 1). No gradient crosses operators, so
they are independent: from a cache on disk each trains in its own process; online, one teacher pass per step feeds all.
Both see the same samples in the same order.

AdamW, no weight decay, cosine to 1 % of the peak rate; the weights kept are those with the lowest held-out relative
error, mean((g-f)²) / var(f), which compares across blocks whatever the training loss.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from surgery.arch.diffusion import NoiseSchedule, null_label
from surgery.data.images import ImageSet, check_fits
from surgery.errors import CheckpointError, NonFiniteLoss, OutputError, UsageError
from surgery.train.capture import (
    DTYPES,
    Cache,
    Recorded,
    Report,
    SampleSource,
    Tap,
    cached_batches,
    check_room,
    estimate_bytes,
    fill,
    record_samples,
    sources,
)
from surgery.train.optim import BatchOrder, learning_rate, weights_digest
from surgery.train.workers import run_jobs

LOSS_OF_KIND = {"attn": "l1", "mlp": "l2", "pair": "l1"}
"""What "auto" means for each kind of operator: the paper's table 1; block pairs as in its section 6."""

_FORMAT = 1
_EVALUATIONS = 20


@dataclass(frozen=True)
class Target:
    """One operator to train: `module` learns what the teacher's module at `tap.path` does.

    `module` takes u [B, N, D], and the tap's keywords by name, and returns [B, N, D]; it is copied, never changed.
    `loss` is used when the settings say "auto".
    """

    tap: Tap
    module: nn.Module
    loss: str = "l1"

    @property
    def path(self) -> str:
        """The teacher's module, the key of the results."""
        return self.tap.path


@dataclass(frozen=True)
class DistillSettings:
    """Defaults are the paper's (sections 3.2, 4.1): 8 000 samples, 200 epochs, batch 64, AdamW at 1e-4, no decay.

    `steps` replaces `epochs` when given. `loss`: auto, l1, l2 or huber[:delta]. `capture`: cache, online, or auto for a
    cache if it stays under `cache_limit` bytes. `val_samples` are held out. `gate_weighted` multiplies both sides by
    the block's gate: the error as the residual stream sees it. `workers` are processes for cached training; results do
    not depend on it. For online capture a sample costs nothing to keep: `samples = steps * batch` never repeats one.
    """

    samples: int = 8000
    epochs: int = 200
    steps: int | None = None
    batch: int = 64
    lr: float = 1e-4
    weight_decay: float = 0.0
    clip: float = 10.0
    loss: str = "auto"
    capture: str = "auto"
    cache_limit: int = 4 << 30
    cache_dtype: str = "float32"
    val_samples: int = 512
    label_dropout: float = 0.1
    gate_weighted: bool = False
    seed: int = 0
    workers: int = 1

    def __post_init__(self) -> None:
        checks = {
            "samples": self.samples >= 1,
            "epochs": self.epochs >= 1,
            "steps": self.steps is None or self.steps >= 1,
            "batch": self.batch >= 1,
            "lr": math.isfinite(self.lr) and self.lr > 0,
            "weight_decay": self.weight_decay >= 0,
            "clip": self.clip > 0,
            "capture": self.capture in ("auto", "online", "cache"),
            "cache_limit": self.cache_limit >= 0,
            "cache_dtype": self.cache_dtype in DTYPES,
            "val_samples": self.val_samples >= 1,
            "label_dropout": 0 <= self.label_dropout <= 1,
            "seed": self.seed >= 0,
            "workers": self.workers >= 1,
        }
        for name, good in checks.items():
            if not good:
                raise UsageError("bad-setting", f"distillation with {name} = {getattr(self, name)!r} is not possible")
        if self.loss != "auto":
            regression_loss(self.loss)

    @property
    def total_steps(self) -> int:
        """Optimiser steps per operator."""
        return self.steps if self.steps is not None else self.epochs * math.ceil(self.samples / self.batch)


@dataclass(frozen=True)
class DistillResult:
    """The best weights of one operator on the CPU, their held-out relative error, and how it got there.

    `history`: one record per evaluation: step, loss (training, mean since the record before), rel_err. The first has
    step 0: the untrained operator. `steps` is the step of the best one.
    """

    state_dict: dict[str, Tensor]
    rel_err: float
    steps: int
    history: list[dict[str, float]] = field(default_factory=list)


def regression_loss(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss `l1`, `l2` or `huber[:delta]` (delta 1 by default), mean over all elements; UsageError otherwise."""
    kind, colon, text = name.partition(":")
    if kind == "huber":
        try:
            delta = float(text) if colon else 1.0
        except ValueError:
            delta = math.nan
        if math.isfinite(delta) and delta > 0:
            return lambda g, f: functional.huber_loss(g, f, delta=delta)
    elif not colon and kind in ("l1", "l2"):
        return functional.l1_loss if kind == "l1" else functional.mse_loss
    raise UsageError("bad-loss", f"there is no regression loss {name!r}", hint="auto, l1, l2, huber or huber:DELTA")


class _Student:
    """One operator in training: its own copy of the module, optimiser, curve and best state."""

    def __init__(self, target: Target, settings: DistillSettings, device: torch.device) -> None:
        self.path, self.settings = target.path, settings
        self.module = deepcopy(target.module).to(device=device, dtype=torch.float32).train()
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        if not self.parameters:
            raise UsageError("nothing-to-train", f"the operator for {self.path} has no weights to train")
        self.loss = regression_loss(target.loss if settings.loss == "auto" else settings.loss)
        self.optimiser = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        self.best: dict[str, Tensor] = {}
        self.best_err, self.best_step = math.inf, 0
        self.history: list[dict[str, float]] = []
        self.since: list[float] = []
        self.sums = (0.0, 0.0, 0.0, 0)

    def _pair(self, batch: Recorded) -> tuple[Tensor, Tensor]:
        """Prediction and target of one batch, float32; multiplied by the gate when asked."""
        keywords = {k.removeprefix("keyword."): v for k, v in batch.items() if k.startswith("keyword.")}
        g, f = self.module(batch["u"].float(), **keywords), batch["y"].float()
        if g.shape != f.shape:
            raise CheckpointError(
                "bad-operator", f"the operator for {self.path} returns {list(g.shape)}, the original {list(f.shape)}"
            )
        if self.settings.gate_weighted:
            gate = batch["gate"].float()[:, None]
            g, f = g * gate, f * gate
        return g, f

    def step(self, step: int, batch: Recorded) -> None:
        """One optimiser step; raises NonFiniteLoss before it would spoil the weights."""
        settings = self.settings
        rate = learning_rate(step, peak=settings.lr, steps=settings.total_steps, warmup=0, curve="cosine", floor=0.01)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        loss = self.loss(*self._pair(batch))
        value = float(loss.detach())
        self.optimiser.zero_grad(set_to_none=True)
        if math.isfinite(value):
            loss.backward()
            norm = float(nn.utils.clip_grad_norm_(self.parameters, settings.clip))
        if not math.isfinite(value) or not math.isfinite(norm):
            raise NonFiniteLoss(
                "non-finite-loss",
                f"distilling {self.path} stopped at step {step + 1}: the loss is {value}; "
                f"its best weights, of step {self.best_step}, had relative error {self.best_err:.4g}",
                hint="lower the learning rate",
            )
        self.optimiser.step()
        self.since.append(value)

    @torch.no_grad()
    def see(self, batch: Recorded) -> None:
        """Add one held-out batch to the running evaluation, summed in float64."""
        g, f = (value.double() for value in self._pair(batch))
        error, first, second, count = self.sums
        self.sums = (
            error + float((g - f).square().sum()),
            first + float(f.sum()),
            second + float(f.square().sum()),
            count + f.numel(),
        )

    def evaluate(self, step: int) -> dict[str, float]:
        """Close the running evaluation: relative error mean((g-f)²)/var(f); keep the weights if it is the lowest."""
        error, first, second, count = self.sums
        self.sums = (0.0, 0.0, 0.0, 0)
        variance = second / count - (first / count) ** 2
        rel_err = error / count / variance if variance > 0 else (0.0 if error == 0 else math.inf)
        if rel_err < self.best_err or not self.best:
            self.best_err, self.best_step = rel_err, step
            self.best = {k: v.detach().cpu().clone() for k, v in self.module.state_dict().items()}
        record = {"step": float(step), "rel_err": rel_err}
        if self.since:
            record["loss"] = sum(self.since) / len(self.since)
            self.since = []
        self.history.append(record)
        return record

    def result(self) -> DistillResult:
        return DistillResult(self.best, self.best_err, self.best_step, self.history)


def distill(
    teacher: nn.Module,
    targets: Sequence[Target],
    images: ImageSet,
    schedule: NoiseSchedule,
    settings: DistillSettings,
    *,
    folder: Path | None = None,
    report: Report | None = None,
) -> dict[str, DistillResult]:
    """Train every target against `teacher`; results by `target.path`, in the order of `targets`.

    With `folder`, each finished operator is kept there under a digest of all that decides it (teacher, images, noise,
    settings, initial weights) and read back by a run that asks for the same: a stopped run goes on where it was, and
    several runs may share the folder. Recordings lie there too while they are needed. Neither `teacher` nor the
    targets' modules are changed; `teacher` is put in eval mode.

    Raises UsageError (settings, paths, labels), NonFiniteLoss (the best weights so far stay in `folder`),
    ResourceError (no room for the recording, a worker died), OutputError (cannot write).
    """
    paths = [target.path for target in targets]
    if len(set(paths)) != len(paths):
        raise UsageError("same-operator-twice", f"an operator is distilled twice: {', '.join(sorted(paths))}")
    if settings.gate_weighted and any(target.tap.gate is None for target in targets):
        raise UsageError("no-gate", "this model has no gate to weight the distillation loss with")
    check_fits(images, teacher.config)  # type: ignore[arg-type]
    teacher.eval()
    with tempfile.TemporaryDirectory(prefix="surgery-distill-") as scratch:
        root = folder if folder is not None else Path(scratch)
        store = _Finished(root / "operators", _data_key(teacher, images, schedule, settings), settings)
        results = {target.path: found for target in targets if (found := store.load(target)) is not None}
        todo = [target for target in targets if target.path not in results]
        if todo:
            train, val = sources(
                images,
                schedule,
                seed=settings.seed,
                null=null_label(teacher.config),  # type: ignore[arg-type]
                label_dropout=settings.label_dropout,
            )
            run = _cached if _use_cache(teacher, todo, train, settings, root) else _online
            run(teacher, todo, train, val, settings, store, root, report)
            for target in todo:
                found = store.load(target)
                assert found is not None
                results[target.path] = found
    return {path: results[path] for path in paths}


def _use_cache(
    teacher: nn.Module, todo: Sequence[Target], train: SampleSource, settings: DistillSettings, root: Path
) -> bool:
    if settings.capture == "online":
        return False
    samples = settings.samples + settings.val_samples
    taps = [_tap(target, settings) for target in todo]
    needed = estimate_bytes(teacher, taps, train, samples=samples, dtype=settings.cache_dtype)
    if settings.capture == "auto" and needed > settings.cache_limit:
        return False
    check_room(root, needed)
    return True


def _tap(target: Target, settings: DistillSettings) -> Tap:
    """The target's tap, without the gate where nobody will read it."""
    tap = target.tap
    return tap if settings.gate_weighted else Tap(tap.path, tap.output_path, None, tap.keywords)


def _online(
    teacher: nn.Module,
    todo: Sequence[Target],
    train: SampleSource,
    val: SampleSource,
    settings: DistillSettings,
    store: "_Finished",
    root: Path,
    report: Report | None,
) -> None:
    device = next(teacher.parameters()).device
    students = [_Student(target, settings, device) for target in todo]
    taps = [_tap(target, settings) for target in todo]
    order = BatchOrder(settings.samples, settings.batch, seed=settings.seed)
    marks = _evaluation_steps(settings)

    def evaluate(step: int) -> None:
        for start in range(0, settings.val_samples, settings.batch):
            ids = range(start, min(start + settings.batch, settings.val_samples))
            recorded = record_samples(teacher, taps, val, ids)
            for student in students:
                student.see(recorded[student.path])
        errors = [student.evaluate(step)["rel_err"] for student in students]
        if report is not None:
            report("stage1", {"step": step, "steps": settings.total_steps, "rel_err": sum(errors) / len(errors)})

    evaluate(0)
    try:
        for step in range(settings.total_steps):
            recorded = record_samples(teacher, taps, train, order.indices(step).tolist())
            for student in students:
                student.step(step, recorded[student.path])
            if step + 1 in marks:
                evaluate(step + 1)
            elif report is not None and (step + 1) % max(1, settings.total_steps // 100) == 0:
                report("stage1", {"step": step + 1, "steps": settings.total_steps})
    except NonFiniteLoss:
        for target, student in zip(todo, students, strict=True):
            store.save(target, student.result(), unfinished=True)
        raise
    for target, student in zip(todo, students, strict=True):
        store.save(target, student.result())


def _cached(
    teacher: nn.Module,
    todo: Sequence[Target],
    train: SampleSource,
    val: SampleSource,
    settings: DistillSettings,
    store: "_Finished",
    root: Path,
    report: Report | None,
) -> None:
    taps = [_tap(target, settings) for target in todo]
    caches = {tap.path: Cache(root / "recorded" / store.name(tap.path), store.recording_key(tap)) for tap in taps}
    missing = [tap for tap in taps if not caches[tap.path].complete]
    if missing:
        fill(
            {tap.path: caches[tap.path] for tap in missing},
            teacher,
            missing,
            {"train": (train, settings.samples), "val": (val, settings.val_samples)},
            batch=settings.batch,
            dtype=settings.cache_dtype,
            report=report,
        )
    device = next(teacher.parameters()).device

    def job(index: int) -> Callable[[Report], None]:
        target = todo[index]

        def train_one(tell: Report) -> None:
            _train_cached(target, caches[target.path], settings, store, device, tell)
            caches[target.path].delete()

        return train_one

    def tell(index: int, event: str, numbers: Mapping[str, float]) -> None:
        if report is not None:
            report(event, {"operator": index, "operators": len(todo), **numbers})

    run_jobs([job(i) for i in range(len(todo))], workers=settings.workers, may_fork=device.type == "cpu", report=tell)


def _train_cached(
    target: Target, cache: Cache, settings: DistillSettings, store: "_Finished", device: torch.device, report: Report
) -> None:
    student = _Student(target, settings, device)
    order = BatchOrder(settings.samples, settings.batch, seed=settings.seed)
    marks = _evaluation_steps(settings)

    def evaluate(step: int) -> None:
        for batch in _moved(cached_batches(cache, "val", settings.val_samples, settings.batch), device):
            student.see(batch)
        report("stage1", {"steps": settings.total_steps, **student.evaluate(step)})

    evaluate(0)
    try:
        for step in range(settings.total_steps):
            (batch,) = _moved([cache.rows("train", order.indices(step))], device)
            student.step(step, batch)
            if step + 1 in marks:
                evaluate(step + 1)
            elif (step + 1) % max(1, settings.total_steps // 100) == 0:
                report("stage1", {"step": step + 1, "steps": settings.total_steps})
    except NonFiniteLoss:
        store.save(target, student.result(), unfinished=True)
        raise
    store.save(target, student.result())


def _moved(batches: Iterable[Recorded], device: torch.device) -> Iterable[Recorded]:
    return ({name: value.to(device) for name, value in batch.items()} for batch in batches)


def _evaluation_steps(settings: DistillSettings) -> set[int]:
    """Twenty evenly spread steps, the last one among them."""
    total = settings.total_steps
    count = min(_EVALUATIONS, total)
    return {round(total * (i + 1) / count) for i in range(count)}


def _data_key(teacher: nn.Module, images: ImageSet, schedule: NoiseSchedule, settings: DistillSettings) -> str:
    """Digest of what decides the recorded samples, except the operator they are recorded at."""
    names = ("samples", "val_samples", "batch", "label_dropout", "seed")
    described = {name: getattr(settings, name) for name in names}
    digest = hashlib.sha256(json.dumps([_FORMAT, described, images.digest, schedule.prediction]).encode())
    digest.update(schedule.betas_T.numpy().tobytes())
    digest.update(weights_digest(teacher).encode())
    return digest.hexdigest()


class _Finished:
    """Finished operators on disk, one safetensors file each, named by module path and digest."""

    def __init__(self, folder: Path, data_key: str, settings: DistillSettings) -> None:
        self.folder, self.data_key, self.settings = folder, data_key, settings

    def recording_key(self, tap: Tap) -> str:
        return hashlib.sha256(json.dumps([self.data_key, asdict(tap), self.settings.cache_dtype]).encode()).hexdigest()

    def name(self, path: str) -> str:
        return f"{path}-{self.data_key[:12]}"

    def _key(self, target: Target) -> str:
        # How samples are fed changes results in the last digits at most, unless the cache rounds them.
        ignored = ("capture", "cache_limit", "workers", "cache_dtype")
        described = {k: v for k, v in asdict(self.settings).items() if k not in ignored}
        rounded = self.settings.cache_dtype if self.settings.capture != "online" else "float32"
        parts = [self.data_key, described, rounded, asdict(target.tap), target.loss, repr(target.module)]
        return hashlib.sha256(json.dumps([*parts, weights_digest(target.module)]).encode()).hexdigest()

    def _path(self, target: Target, key: str, *, unfinished: bool = False) -> Path:
        return self.folder / f"{target.path}-{key[:16]}{'.unfinished' if unfinished else ''}.safetensors"

    def save(self, target: Target, result: DistillResult, *, unfinished: bool = False) -> None:
        """Write a result whole or not at all; `unfinished` ones are never read back as finished."""
        from safetensors.torch import save_file

        key = self._key(target)
        path = self._path(target, key, unfinished=unfinished)
        note = {"key": key, "rel_err": result.rel_err, "steps": result.steps, "history": result.history}
        partial = path.with_suffix(".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tensors = {name: value.contiguous() for name, value in result.state_dict.items()}
            save_file(tensors, partial, metadata={"surgery": json.dumps(note)})
            with open(partial, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(partial, path)
        except OSError as error:
            raise OutputError("not-writable", f"cannot keep the distilled operator {path}: {error}") from error

    def load(self, target: Target) -> DistillResult | None:
        """The finished result for exactly this target, or None."""
        from safetensors import SafetensorError, safe_open

        key = self._key(target)
        path = self._path(target, key)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as handle:
                note = json.loads((handle.metadata() or {})["surgery"])
                if note["key"] != key:
                    return None
                # Cloned: what is read is mapped, and the scratch folder it lies in goes away.
                state = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118
                return DistillResult(state, float(note["rel_err"]), int(note["steps"]), list(note["history"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError("bad-operator", f"{path} is not a distilled operator: {error}") from error
