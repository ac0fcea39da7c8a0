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
import tempfile
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from surgery.arch.dit.diffusion import NoiseSchedule, null_label
from surgery.data.images import ImageSet, check_fits
from surgery.errors import CheckpointError, NonFiniteLoss, UsageError
from surgery.train.grafting.capture import (
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
from surgery.train.grafting.operator_store import DistillResult, OperatorStore
from surgery.train.grafting.workers import run_jobs
from surgery.train.optim import BatchOrder, check_settings, learning_rate, weights_digest

LOSS_OF_KIND = {"attn": "l1", "mlp": "l2", "pair": "l1"}
"""What "auto" means for each kind of operator: the paper's table 1; block pairs as in its section 6."""

_FORMAT = 1
_EVALUATIONS = 10


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
        check_settings("distillation", self, checks)
        if self.loss != "auto":
            regression_loss(self.loss)

    @property
    def total_steps(self) -> int:
        """Optimiser steps per operator."""
        return self.steps if self.steps is not None else self.epochs * math.ceil(self.samples / self.batch)


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
        """The best weights so far."""
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
    runs of different blocks may share the folder. Recordings lie there too while they are needed. Neither `teacher`
    nor the targets' modules are changed; `teacher` is put in eval mode.

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
        store = OperatorStore(root / "operators")
        data_key = _data_key(teacher, images, schedule, settings)
        jobs = [_Job(target, _key(target, settings, data_key), settings) for target in targets]
        results = {job.path: found for job in jobs if (found := store.load(job.path, job.key)) is not None}
        todo = [job for job in jobs if job.path not in results]
        if todo:
            train, val = sources(
                images,
                schedule,
                seed=settings.seed,
                null=null_label(teacher.config),  # type: ignore[arg-type]
                label_dropout=settings.label_dropout,
            )
            if _use_cache(teacher, todo, train, settings, root):
                _cached(teacher, todo, train, val, settings, store, root / "recorded", data_key, report)
            else:
                _online(teacher, todo, train, val, settings, store, report)
            for job in todo:
                found = store.load(job.path, job.key)
                assert found is not None
                results[job.path] = found
    return {path: results[path] for path in paths}


@dataclass(frozen=True)
class _Job:
    """A target with the digest of all that decides its result."""

    target: Target
    key: str
    settings: DistillSettings

    @property
    def path(self) -> str:
        return self.target.path

    @property
    def tap(self) -> Tap:
        """The target's tap, without the gate where nobody will read it."""
        tap = self.target.tap
        return tap if self.settings.gate_weighted else Tap(tap.path, tap.output_path, None, tap.keywords)


def _data_key(teacher: nn.Module, images: ImageSet, schedule: NoiseSchedule, settings: DistillSettings) -> str:
    """Digest of what decides the recorded samples, except the operator they are recorded at."""
    names = ("samples", "val_samples", "batch", "label_dropout", "seed")
    described = {name: getattr(settings, name) for name in names}
    digest = hashlib.sha256(json.dumps([_FORMAT, described, images.digest, schedule.prediction]).encode())
    digest.update(schedule.betas_T.numpy().tobytes())
    digest.update(weights_digest(teacher).encode())
    return digest.hexdigest()


def _key(target: Target, settings: DistillSettings, data_key: str) -> str:
    # How samples are fed changes results in the last digits at most, unless the cache rounds them.
    ignored = ("capture", "cache_limit", "workers", "cache_dtype")
    described = {k: v for k, v in asdict(settings).items() if k not in ignored}
    rounded = settings.cache_dtype if settings.capture != "online" else "float32"
    parts = [data_key, described, rounded, asdict(target.tap), target.loss, repr(target.module)]
    return hashlib.sha256(json.dumps([*parts, weights_digest(target.module)]).encode()).hexdigest()


def _use_cache(
    teacher: nn.Module, todo: Sequence[_Job], train: SampleSource, settings: DistillSettings, root: Path
) -> bool:
    if settings.capture == "online":
        return False
    samples = settings.samples + settings.val_samples
    taps = [job.tap for job in todo]
    needed = estimate_bytes(teacher, taps, train, samples=samples, dtype=settings.cache_dtype)
    if settings.capture == "auto" and needed > settings.cache_limit:
        return False
    check_room(root, needed)
    return True


def _online(
    teacher: nn.Module,
    todo: Sequence[_Job],
    train: SampleSource,
    val: SampleSource,
    settings: DistillSettings,
    store: OperatorStore,
    report: Report | None,
) -> None:
    """One teacher pass per step feeds all operators."""
    device = next(teacher.parameters()).device
    students = [_Student(job.target, settings, device) for job in todo]
    taps = [job.tap for job in todo]
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
        for job, student in zip(todo, students, strict=True):
            store.save(job.path, job.key, student.result(), unfinished=True)
        raise
    for job, student in zip(todo, students, strict=True):
        store.save(job.path, job.key, student.result())


def _cached(
    teacher: nn.Module,
    todo: Sequence[_Job],
    train: SampleSource,
    val: SampleSource,
    settings: DistillSettings,
    store: OperatorStore,
    folder: Path,
    data_key: str,
    report: Report | None,
) -> None:
    """Record every operator to disk in one pass over the samples, then train each by itself."""
    caches = {}
    for job in todo:
        described = json.dumps([data_key, asdict(job.tap), settings.cache_dtype])
        key = hashlib.sha256(described.encode()).hexdigest()
        caches[job.path] = Cache(folder / f"{job.path}-{key[:16]}", key)
    missing = [job.tap for job in todo if not caches[job.path].complete]
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

    def task(job: _Job) -> Callable[[Report], None]:
        def train_one(tell: Report) -> None:
            _train_cached(job, caches[job.path], settings, store, device, tell)
            caches[job.path].delete()

        return train_one

    def tell(index: int, event: str, numbers: Mapping[str, float]) -> None:
        if report is not None:
            report(event, {"operator": index, "operators": len(todo), **numbers})

    run_jobs([task(job) for job in todo], workers=settings.workers, may_fork=device.type == "cpu", report=tell)


def _train_cached(
    job: _Job, cache: Cache, settings: DistillSettings, store: OperatorStore, device: torch.device, report: Report
) -> None:
    student = _Student(job.target, settings, device)
    order = BatchOrder(settings.samples, settings.batch, seed=settings.seed)
    marks = _evaluation_steps(settings)

    def evaluate(step: int) -> None:
        for batch in cached_batches(cache, "val", settings.val_samples, settings.batch):
            student.see(_moved(batch, device))
        report("stage1", {"steps": settings.total_steps, **student.evaluate(step)})

    evaluate(0)
    try:
        for step in range(settings.total_steps):
            student.step(step, _moved(cache.rows("train", order.indices(step)), device))
            if step + 1 in marks:
                evaluate(step + 1)
            elif (step + 1) % max(1, settings.total_steps // 100) == 0:
                report("stage1", {"step": step + 1, "steps": settings.total_steps})
    except NonFiniteLoss:
        store.save(job.path, job.key, student.result(), unfinished=True)
        raise
    store.save(job.path, job.key, student.result())


def _moved(batch: Recorded, device: torch.device) -> Recorded:
    return {name: value.to(device) for name, value in batch.items()}


def _evaluation_steps(settings: DistillSettings) -> set[int]:
    """Evenly spread steps, the last one among them; a held-out pass costs online capture teacher passes."""
    total = settings.total_steps
    count = min(_EVALUATIONS, total)
    return {round(total * (i + 1) / count) for i in range(count)}
