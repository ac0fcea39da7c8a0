"""Carry out one operation: plan it, move and compute its bytes, record the lineage, publish.

Memory stays at a few tensors whatever the model's size: kept bytes never enter the process, computed tensors are
written as they come. Results do not depend on the number of workers.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, OutputError, printable
from surgery.graph.engine.budget import memory_budget
from surgery.graph.engine.cluster import engine_named
from surgery.graph.engine.jobs import Jobs, Owner, plan_jobs
from surgery.graph.engine.local import Engine
from surgery.graph.engine.work import Job, Made, Resources, Source, Unit, load_torch, tensor_keys, uses_torch
from surgery.graph.evaluation import check_no_report
from surgery.graph.files import check_copied, file_digests, settled
from surgery.graph.known import Known, check_unchanged, identities, known_digests
from surgery.graph.lineage import encode, make_record, node_key
from surgery.graph.machine import check_device, installed, machine
from surgery.graph.op import (
    Given,
    Op,
    Plan,
    PlanContext,
    TrainContext,
    Trained,
    TrainResult,
    load_attribute,
    resolved_params,
)
from surgery.graph.planned import roots, source_of
from surgery.graph.shards import Shard, index_json, plan_shards
from surgery.store import cache, digests
from surgery.store.checkpoint import Checkpoint
from surgery.store.header import header_digest
from surgery.store.layout import LINEAGE_FILE
from surgery.store.record import read_record, undigested
from surgery.store.tensors import TensorRef, read_chunks
from surgery.store.writer import Workspace, check_target, raise_os

Report = Callable[[str, Mapping[str, float]], None]


def silent(event: str, numbers: Mapping[str, float]) -> None:
    """A `Report` that says nothing."""


@dataclass(frozen=True)
class RunOptions:
    """How to run, as against what: only `seed` and `device` (and `threads` in training) change the result."""

    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    workers: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    shard_size: int | None = None  # bytes; None: kept files stay as they are, new ones follow graph.shards
    max_memory: int | None = None  # bytes of the whole process; None: a share of what is available
    link: str = "copy"  # "hard": files of a parent that stay whole become hard links to it
    hash: str = "full"  # "header": nothing is hashed for the record alone; see store.unhashed
    engine: str = "local"  # or "ray": see engine.cluster
    resume: bool = False
    overwrite: bool = False
    offline: bool = False


@dataclass(frozen=True)
class RunResult:
    """Where the checkpoint lies, its lineage, and what was saved: `found` says that nothing had to be done, `reused`
    how many tensors an interrupted run had finished. `alone` are tensors larger than the memory allowed, made with
    nothing beside them: (name, bytes). `taken` counts tensors that earlier results had, `source` is the whole result
    that this one is a copy of."""

    path: Path
    record: Mapping[str, Any]
    found: bool = False
    reused: int = 0
    alone: tuple[tuple[str, int], ...] = ()
    taken: int = 0
    source: Path | None = None


def run_op(
    op: Op,
    parents: list[Checkpoint],
    out: Path | None,
    *,
    options: RunOptions | None = None,
    report: Report = silent,
    notice: Callable[[Plan], None] = lambda plan: None,
    reuse: bool = False,
    engine: Engine | None = None,
    plan: Plan | None = None,
    take: bool = False,
) -> RunResult:
    """Apply `op` to `parents` and publish the result at `out` (default: ./<source>-<operation>-<8 hex of the key>).

    With the default name, or with `reuse`, an earlier result of the same work is found and returned. Raises the errors
    of the plan before anything is written; afterwards the target is absent or whole. `notice` sees the plan first.
    Parents may be steps that were planned and never written: their tensors are made on the way. `plan` is the
    operation's own on these parents, if it was made before. With `take`, tensors that an earlier result has, made from
    the same inputs in the same way, are taken from there. `engine` is that of the options, unless one is at hand.
    """
    options = options or RunOptions()
    check_device(options.device)
    engine = engine or engine_named(options.engine, device=options.device)
    check_no_report(parents)
    plan = plan or op.plan(PlanContext(options.seed, options.offline), *parents)
    check_plan(plan)
    if out is not None:
        check_place(out, roots(parents))  # before the parents are hashed, which can take long
        if not reuse:
            check_target(out, overwrite=options.overwrite)
    hashing = is_hashing(plan, options)
    told = file_digests(op, plan, parents)
    key = plan_key(op, plan, parents, options, files=told)
    reuse = reuse or out is None
    out = out or default_target(op, parents, key)
    check_place(out, roots(parents))
    found = find_result(out, key, hashing=hashing) if reuse and not options.overwrite else None
    if found is not None:
        return RunResult(out, found, found=True)
    check_target(out, overwrite=options.overwrite)
    plan = settled(plan, parents)
    notice(plan)
    measure = getattr(op, "measure", None)
    measured = measure(plan, options.seed, *parents) if measure is not None else {}
    shards, indexes = plan_shards(plan, key=key, shard_size=options.shard_size)
    sources = {e.full_name: source_of(e, op, parents, options.seed) for e in plan.entries}
    known = known_digests(roots(parents), hashing=hashing)
    keys = tensor_keys(sources, known.sure, options.device) if take else {}
    pieces = cache.recall_tensors(keys.values()) if keys else {}
    made_before = {n: p for n, k in keys.items() if (p := pieces.get(k))}
    for name, piece in made_before.items():
        source = sources[name]
        assert isinstance(source, Made)
        ref = TensorRef(name, source.task.dtype, source.task.shape, piece.file, piece.offset, piece.nbytes)
        sources[name] = ref
        known.sure.setdefault(piece.file, {})[name] = piece.sha256
    before = identities(roots(parents))
    with Workspace(out, key, resume=options.resume, overwrite=options.overwrite, link=options.link) as space:
        space.check_space(sum(space.need(s.file) for s in shards))
        # Space is reserved for every file first: a full disk shows before any work is done.
        for shard in shards:
            space.begin_file(shard.file)
        if hashing:
            space.forget_undigested()  # of an earlier run with --hash header: here they are to have digests
        _check_journal(space, shards)
        planned = {f"{s.file.relative}\0{e.name}" for s in shards for e in s.entries}
        resumed = {k: sha for k, sha in space.done.items() if k in planned}
        done = resumed | _linked(space, shards, sources, known)
        trained = _train(op, plan, parents, options, space, report)
        work = plan_jobs(shards, sources, str(space.folder / "out"), done, hashing=hashing)
        hashes, alone = _write(
            work, shards, sources, known, parents, space, done, trained, options, report, engine, hashing
        )
        check_unchanged(before)
        side = _side_files(space, plan, indexes, shards, trained.files)
        check_copied(plan, parents, told, side)
        files = [_weight_row(space, shard) for shard in shards] + side
        check = getattr(op, "check", None)
        checked = check(space.folder / "out", plan, parents, report) if check is not None else {}
        environment = run_environment(options)
        claimed = {n for n, s in sources.items() if isinstance(s, TensorRef) and known.is_claimed(s)}
        record = make_record(
            op=op.name,
            version=op.version,
            params=resolved_params(op),
            seed=options.seed,
            key=key,
            parents=parents,
            plan=plan,
            tensors=hashes,
            files=files,
            environment=environment,
            training=trained.record,
            plugin=getattr(op, "plugin", None),
            measured={**measured, **checked},
            hashing=hashing,
            claimed=len(claimed),
        )
        space.put_file(LINEAGE_FILE, encode(record))
        space.publish()
    for shard in shards:
        rows = {e.name: hashes[n] for e in shard.entries if (n := e.full_name) in hashes and n not in claimed}
        if rows:
            digests.remember(str(out / shard.file.relative), rows)
    if keys:
        _keep_tensors(out, shards, keys, hashes)
    return RunResult(out, record, reused=len(resumed), alone=alone, taken=len(made_before))


def _keep_tensors(out: Path, shards: list[Shard], keys: Mapping[str, str], hashes: Mapping[str, str]) -> None:
    """Remember where computed tensors lie, for other work that would make the same."""
    rows = {}
    for shard in shards:
        file = str((out / shard.file.relative).absolute())
        identity = digests.identity(file)
        for entry in shard.entries:
            name = entry.full_name
            if name in keys and name in hashes:
                offset, count = shard.file.places[entry.name]
                rows[keys[name]] = cache.Piece(file, identity, offset, count, hashes[name])
    cache.keep_tensors(rows)


def run_environment(options: RunOptions) -> dict[str, Any]:
    """What a record says of the circumstances; it is no part of the record's digest."""
    return machine() | {"device": options.device, "threads": options.threads, "shard_size": options.shard_size}


def plan_key(
    op: Op, plan: Plan, parents: list[Checkpoint], options: RunOptions, *, files: Mapping[str, str] | None = None
) -> str:
    """The node's key; hashes parents whose digests are not known yet, unless the options say that headers do. `files`
    are their digests, if they were made before."""
    release = ".".join(installed("torch").split(".")[:2])
    return node_key(
        op=op.name,
        version=op.version,
        params=resolved_params(op),
        parents=parents,
        inputs=plan.inputs,
        files=file_digests(op, plan, parents) if files is None else files,
        seed=options.seed,
        device=options.device.split(":")[0],
        torch=release,
        plugin=getattr(op, "plugin", None),
        hashing=is_hashing(plan, options),
    )


def is_hashing(plan: Plan, options: RunOptions) -> bool:
    """Whether the record is to have every digest. An evaluation's has: what it measures is named by its digest."""
    return options.hash != "header" or plan.evaluates


def default_target(op: Op, parents: list[Checkpoint], key: str) -> Path:
    """./<source>-<operation>-<first 8 hex of the key>, as a path relative to the current folder."""
    source = parents[0].name.rstrip("/").rsplit("/", 1)[-1].replace(":", "-") if parents else ""
    source = source.removesuffix(".safetensors") or Path(parents[0].path).absolute().name if parents else ""
    return Path("-".join(piece for piece in (source.strip(".") or "checkpoint", op.name, key[:8]) if piece))


def find_result(path: Path, key: str, *, hashing: bool = True) -> dict[str, Any] | None:
    """The lineage of `path` when it is the whole result of the work `key`; None when there is nothing. With `hashing`
    one that lacks digests is refused (`OutputError`): it is what was asked for but for those."""
    if not path.exists():
        return None
    record = read_record(path / LINEAGE_FILE) if (path / LINEAGE_FILE).is_file() else None
    if record is None or record["steps"][-1]["key"] != f"sha256:{key}":
        return None
    for row in record["output"]["files"]:
        if not (path / row["path"]).is_file() or (path / row["path"]).stat().st_size != row["size"]:
            raise OutputError(
                "damaged",
                f"{path}: {row['path']} is missing or has another size",
                hint="remove the folder or pass --overwrite",
            )
    if hashing and (missing := undigested(record)):
        raise OutputError(
            "undigested",
            f"{path}: is this result, with {len(missing):,} tensors that were never digested",
            hint="--hash header takes it as it is, --overwrite makes it with digests",
        )
    return record


def check_plan(plan: Plan) -> None:
    """Every output name once, every part known: a fault here is a fault of the operation."""
    seen: set[tuple[str, str]] = set()
    parts = {p.part for p in plan.parts}
    for entry in plan.entries:
        if (entry.part, entry.name) in seen or entry.part not in parts:
            raise CheckpointError(
                "bad-plan",
                f"'{printable(entry.full_name)}' is planned twice or in no part",
                hint="a fault in the operation",
            )
        seen.add((entry.part, entry.name))


def check_place(out: Path, parents: list[Checkpoint]) -> None:
    """Refuse an output inside or above the folder of a parent."""
    target = out.absolute().resolve()
    for parent in parents:
        root = parent.path.resolve()
        if target == root or target.is_relative_to(root) or root.is_relative_to(target):
            raise OutputError(
                "inside-parent", f"{out}: lies inside or above {parent.name}, which is read", hint="name another -o"
            )


def _train(
    op: Op, plan: Plan, parents: list[Checkpoint], options: RunOptions, space: Workspace, report: Report
) -> TrainResult:
    if not plan.evaluates and not any(isinstance(e, Trained) for e in plan.entries):
        return TrainResult({}, {})
    if op.trainer is None:
        raise CheckpointError(
            "bad-plan", f"{op.name}: trained tensors without a trainer", hint="a fault in the operation"
        )
    load_torch()
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        ctx = TrainContext(options.seed, options.device, options.threads, options.workers, space.scratch, report)
        result: TrainResult = load_attribute(op.trainer)(op, ctx, plan, *parents)
    finally:
        torch.set_num_threads(before)
    for entry in plan.entries:
        if isinstance(entry, Trained):
            tensor = result.tensors.get(entry.full_name)
            if tensor is None or tuple(tensor.shape) != entry.shape:
                raise CheckpointError(
                    "bad-plan",
                    f"the trainer gave no '{printable(entry.full_name)}' of that shape",
                    hint="a fault in the operation",
                )
    return result


def _write(
    work: Jobs,
    shards: list[Shard],
    sources: Mapping[str, Source | None],
    known: Known,
    parents: list[Checkpoint],
    space: Workspace,
    done: Mapping[str, str | None],
    trained: TrainResult,
    options: RunOptions,
    report: Report,
    engine: Engine,
    hashing: bool,
) -> tuple[dict[str, str], tuple[tuple[str, int], ...]]:
    """Move and make every tensor that is not in `done`; returns sha256 by full name, and what was made alone."""
    total = sum(s.file.size for s in shards)
    ready = [(e, done[k]) for s in shards for e in s.entries if (k := f"{s.file.relative}\0{e.name}") in done]
    hashes = {e.full_name: sha for e, sha in ready if sha is not None}
    written = sum(e.nbytes for e, _ in ready)

    def note(owner: Owner, sha: str | None) -> None:
        nonlocal written
        file, entry = owner
        count = file.places[entry.name][1]
        if sha is not None:
            hashes[entry.full_name] = sha
        elif hashing:
            raise CheckpointError(
                "bad-plan", f"'{printable(entry.full_name)}' was not digested", hint="a fault in the operation"
            )
        space.note(file.relative, entry.name, sha, count)
        written += count

    def finished(job: Job, result: dict[str, str]) -> None:
        own = result.get(job.name) if isinstance(job, Unit) else None
        for owner in work.owners[id(job)]:
            name = owner[1].full_name
            sha, source = own or result.get(name), sources[name]
            if sha is None and isinstance(source, TensorRef):
                sha = known.of(source)
            note(owner, sha)
        report("write", {"done": written, "total": total})

    for file, entry in work.trained:
        if isinstance(entry, Given):
            data = entry.data
        else:
            data = _trained_bytes(trained, entry.full_name, entry.dtype)
        space.write(file, entry.name, data)
        note((file, entry), hashlib.sha256(data).hexdigest() if hashing else None)
    if any(map(uses_torch, work.jobs)):
        load_torch()  # what is loaded by now counts as held, not as room for tensors

    budget = memory_budget(options.max_memory)
    pickles = {file: tensors for root in roots(parents) for file, tensors in root.pickles.items()}
    resources = Resources(max(1, options.workers), options.threads, budget, pickles)
    try:
        engine(work.jobs, finished, resources=resources)
    except OSError as err:
        raise_os(err, str(space.target))
    space.sync()
    return hashes, tuple((job.name, job.peak) for job in work.jobs if isinstance(job, Unit) and job.peak > budget)


def _linked(
    space: Workspace, shards: list[Shard], sources: Mapping[str, Source | None], known: Known
) -> dict[str, str | None]:
    """sha256 by "file\0tensor" of everything in files that are links to a parent's: nothing is left to do there."""
    found = {}
    for shard in shards:
        for entry in shard.entries if shard.file.relative in space.linked else ():
            ref = sources[entry.full_name]
            assert isinstance(ref, TensorRef)
            found[f"{shard.file.relative}\0{entry.name}"] = known.of(ref)
    return found


def _trained_bytes(trained: TrainResult, name: str, dtype: str) -> Any:
    from surgery.store.dtypes import as_bytes, torch_dtype

    return as_bytes(trained.tensors[name].to(torch_dtype(dtype)))


def _check_journal(space: Workspace, shards: list[Shard]) -> None:
    """Hash a sample of what an earlier run journalled; on any difference trust none of it."""
    rows = [(s, e, sha) for s in shards for e in s.entries if (sha := space.done.get(f"{s.file.relative}\0{e.name}"))]
    for shard, entry, sha in rows[:: max(1, len(rows) // 8)]:
        offset, count = shard.file.places[entry.name]
        ref = TensorRef(
            entry.name, entry.dtype, entry.shape, str(space.folder / "out" / shard.file.relative), offset, count
        )
        state = hashlib.sha256()
        for chunk in read_chunks(ref):
            state.update(chunk)
        if state.hexdigest() != sha:
            space.forget()
            return


def _weight_row(space: Workspace, shard: Shard) -> dict[str, Any]:
    path = space.folder / "out" / shard.file.relative
    return {"path": shard.file.relative, "size": shard.file.size, "header": header_digest(path)}


def _side_files(
    space: Workspace, plan: Plan, indexes: Mapping[str, Mapping[str, str]], shards: list[Shard], extra: tuple[Any, ...]
) -> list[dict[str, Any]]:
    sizes = {e.full_name: s.file.places[e.name][1] for s in shards for e in s.entries}
    contents = {name: index_json(name, weight_map, sizes) for name, weight_map in indexes.items()}
    for file in (*plan.files, *extra):
        if file.content is not None:
            contents[file.relative] = file.content
        else:
            space.copy_file(Path(file.source), file.relative)
    for name, content in contents.items():
        space.put_file(name, content)
    names = sorted({*contents, *(f.relative for f in (*plan.files, *extra))})
    out = space.folder / "out"
    return [{"path": n, "size": (out / n).stat().st_size, "sha256": digests.file_digest(out / n)} for n in names]
