"""Stage 1: activation distillation. Every new operator is trained alone to return what the operator it replaces does.

Grafting (arXiv 2506.05340, section 3.1, eq. 2): minimise L(g(u), f(u)) over inputs u recorded from the unmodified
model; L1 for attention, whose activations have heavy tails, L2 for MLPs (table 1). No gradient crosses operators, so
they are independent: from a cache on disk each trains in its own process; online, one teacher pass per step feeds all.
Both see the same samples in the same order.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from surgery.arch.dit.diffusion import NoiseSchedule, null_label
from surgery.data.images import ImageSet, check_fits
from surgery.errors import NonFiniteLoss, UsageError
from surgery.train.grafting.capture import (
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
from surgery.train.grafting.student import DistillSettings, Student, Target
from surgery.train.grafting.workers import run_jobs
from surgery.train.optim import BatchOrder, weights_digest

LOSS_OF_KIND = {"attn": "l1", "mlp": "l2", "pair": "l1"}
"""What "auto" means for each kind of operator: the paper's table 1; block pairs as in its section 6."""

_FORMAT = 1
_EVALUATIONS = 10


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
    students = [Student(job.target, settings, device) for job in todo]
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
    student = Student(job.target, settings, device)
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
