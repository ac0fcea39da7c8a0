"""Carry out one operation: plan it, move and compute its bytes, record the lineage, publish.

Memory stays at a few tensors whatever the model's size: kept bytes never enter the process, computed tensors are
written as they come. Results do not depend on the number of workers.
"""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from surgery import __version__
from surgery.errors import CheckpointError, OutputError, ResourceError, UsageError, printable
from surgery.graph.lineage import encode, header_digest, make_record, node_key
from surgery.graph.op import (
    Bytes,
    Compute,
    Entry,
    Keep,
    Op,
    Plan,
    PlanContext,
    TrainContext,
    Trained,
    TrainResult,
    load_attribute,
    resolved_params,
)
from surgery.graph.shards import Shard, plan_shards
from surgery.store import digests
from surgery.store.checkpoint import Checkpoint
from surgery.store.layout import LINEAGE_FILE
from surgery.store.reader import open_reader
from surgery.store.record import read_record
from surgery.store.writer import PlannedFile, Workspace, check_target

Report = Callable[[str, Mapping[str, float]], None]
_Job = tuple[PlannedFile, Entry]


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
    resume: bool = False
    overwrite: bool = False
    offline: bool = False


@dataclass(frozen=True)
class RunResult:
    """Where the checkpoint lies, its lineage, and what was saved: `found` says that nothing had to be done."""

    path: Path
    record: Mapping[str, Any]
    found: bool = False
    reused: int = 0


def run_op(
    op: Op,
    parents: list[Checkpoint],
    out: Path | None,
    *,
    options: RunOptions | None = None,
    report: Report = silent,
    notice: Callable[[Plan], None] = lambda plan: None,
    reuse: bool = False,
) -> RunResult:
    """Apply `op` to `parents` and publish the result at `out` (default: ./<source>-<operation>-<8 hex of the key>).

    With the default name, or with `reuse`, an earlier result of the same work is found and returned. Raises the errors
    of the plan before anything is written; afterwards the target is absent or whole. `notice` sees the plan first.
    """
    options = options or RunOptions()
    check_device(options.device)
    plan = op.plan(PlanContext(options.seed, options.offline), *parents)
    check_plan(plan)
    if out is not None:
        check_place(out, parents)  # before the parents are hashed, which can take long
        if not reuse:
            check_target(out, overwrite=options.overwrite)
    key = plan_key(op, plan, parents, options)
    reuse = reuse or out is None
    out = out or default_target(op, parents, key)
    check_place(out, parents)
    found = find_result(out, key) if reuse and not options.overwrite else None
    if found is not None:
        return RunResult(out, found, found=True)
    check_target(out, overwrite=options.overwrite)
    notice(plan)
    measure = getattr(op, "measure", None)
    measured = measure(plan, options.seed, *parents) if measure is not None else {}
    shards, indexes = plan_shards(plan, key=key, shard_size=options.shard_size)
    with Workspace(out, key, resume=options.resume, overwrite=options.overwrite) as space:
        space.check_space(sum(s.file.size for s in shards))
        # Space is reserved for every file first: a full disk shows before any work is done.
        for shard in shards:
            space.begin_file(shard.file)
        _check_journal(space, shards)
        planned = {f"{s.file.relative}\0{e.name}" for s in shards for e in s.entries}
        done = {k: sha for k, sha in space.done.items() if k in planned}
        trained = _train(op, plan, parents, options, space, report)
        hashes = _write(op, plan, parents, shards, space, done, trained, options, report)
        files = [_weight_row(space, shard) for shard in shards]
        files += _side_files(space, plan, indexes, shards, trained.files)
        environment = {
            "surgery": __version__,
            "python": platform.python_version(),
            "torch": _version("torch"),
            "device": options.device,
            "threads": options.threads,
            "shard_size": options.shard_size,
        }
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
            measured=measured,
        )
        space.put_file(LINEAGE_FILE, encode(record))
        space.publish()
    for shard in shards:
        digests.remember(str(out / shard.file.relative), {e.name: hashes[e.full_name] for e in shard.entries})
    return RunResult(out, record, reused=len(done))


def plan_key(op: Op, plan: Plan, parents: list[Checkpoint], options: RunOptions) -> str:
    """The node's key; hashes parents whose digests are not known yet."""
    release = ".".join(_version("torch").split(".")[:2])
    return node_key(
        op=op.name,
        version=op.version,
        params=resolved_params(op),
        parents=parents,
        inputs=plan.inputs,
        seed=options.seed,
        device=options.device.split(":")[0],
        torch=release,
    )


def default_target(op: Op, parents: list[Checkpoint], key: str) -> Path:
    """./<source>-<operation>-<first 8 hex of the key>, as a path relative to the current folder."""
    source = parents[0].name.rstrip("/").rsplit("/", 1)[-1].replace(":", "-") if parents else ""
    source = source.removesuffix(".safetensors") or Path(parents[0].path).absolute().name if parents else ""
    return Path("-".join(piece for piece in (source.strip(".") or "checkpoint", op.name, key[:8]) if piece))


def find_result(path: Path, key: str) -> dict[str, Any] | None:
    """The lineage of `path` when it is the whole result of the work `key`; None when there is nothing."""
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


def check_device(device: str) -> None:
    """Refuse a device that is not there; "cpu" costs no import."""
    if device == "cpu":
        return
    kind = device.split(":")[0]
    if kind not in ("cuda", "mps", "xpu"):
        raise UsageError("device", f"unknown device '{printable(device)}'", hint="cpu, cuda, cuda:0, mps")
    import torch

    backend = getattr(torch, kind, None) or getattr(torch.backends, kind)
    if not backend.is_available():
        raise ResourceError("no-device", f"no {kind} device is available here", hint="use --device cpu")


def _train(
    op: Op, plan: Plan, parents: list[Checkpoint], options: RunOptions, space: Workspace, report: Report
) -> TrainResult:
    if not any(isinstance(e, Trained) for e in plan.entries):
        return TrainResult({}, {})
    if op.trainer is None:
        raise CheckpointError(
            "bad-plan", f"{op.name}: trained tensors without a trainer", hint="a fault in the operation"
        )
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
    op: Op,
    plan: Plan,
    parents: list[Checkpoint],
    shards: list[Shard],
    space: Workspace,
    done: Mapping[str, str],
    trained: TrainResult,
    options: RunOptions,
    report: Report,
) -> dict[str, str]:
    """Move and compute every entry that is not journalled; returns sha256 by full name."""
    total, written = sum(s.file.size for s in shards), 0
    hashes: dict[str, str] = {}

    def finished(file: PlannedFile, entry: Entry, sha: str) -> None:
        nonlocal written
        hashes[entry.full_name] = sha
        space.note(file.relative, entry.name, sha, entry.nbytes)
        written += entry.nbytes
        report("write", {"done": written, "total": total})

    jobs: list[_Job] = []
    for shard in shards:
        moved: list[Entry] = []
        for entry in shard.entries:
            journalled = done.get(f"{shard.file.relative}\0{entry.name}")
            if journalled is not None:
                hashes[entry.full_name] = journalled
                written += entry.nbytes
            elif _is_range(entry):
                moved.append(entry)
            else:
                jobs.append((shard.file, entry))
        _copy_spans(space, shard.file, moved)
        for entry in moved:
            finished(shard.file, entry, _moved_digest(entry, parents))

    def make(job: _Job) -> str:
        file, entry = job
        if isinstance(entry, Compute) and entry.streamed:
            state, at = hashlib.sha256(), 0
            for piece in stream_bytes(op, entry, parents, options.seed):
                space.write_piece(file, entry.name, piece, at)
                state.update(piece)
                at += len(piece)
            return state.hexdigest()
        data = _entry_bytes(op, entry, parents, trained, options)
        space.write(file, entry.name, data)
        return hashlib.sha256(data).hexdigest()

    with ThreadPoolExecutor(max(1, options.workers)) as pool:
        for (file, entry), sha in _in_flight(pool, make, jobs, limit=max(1, options.workers)):
            finished(file, entry, sha)
    space.sync()
    return hashes


def _in_flight(
    pool: ThreadPoolExecutor, work: Callable[[_Job], str], jobs: list[_Job], *, limit: int
) -> Iterator[tuple[_Job, str]]:
    """Results as they finish, with at most `limit` jobs started at a time: memory is bounded by those."""
    running: dict[Future[str], _Job] = {}
    queue = iter(jobs)
    try:
        while True:
            while len(running) < limit and (job := next(queue, None)) is not None:
                running[pool.submit(work, job)] = job
            if not running:
                return
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield running.pop(future), future.result()
    finally:
        for future in running:
            future.cancel()


def _is_range(entry: Entry) -> bool:
    if isinstance(entry, Keep):
        return entry.ref.offset >= 0
    return isinstance(entry, Bytes) and all(ref.offset >= 0 for ref, _, _ in entry.pieces)


def _copy_spans(space: Workspace, file: PlannedFile, entries: list[Entry]) -> None:
    """Range copies, neighbours in source and target joined into one."""
    spans: list[list[Any]] = []  # [source file, source start, target start, count]
    for entry in sorted(entries, key=lambda e: file.places[e.name][0]):
        at = file.places[entry.name][0]
        pieces = ((entry.ref, 0, entry.nbytes),) if isinstance(entry, Keep) else entry.pieces  # type: ignore[attr-defined]
        for ref, start, stop in pieces:
            source, begin, count = ref.file, ref.offset + start, stop - start
            last = spans[-1] if spans else None
            if last and last[0] == source and last[1] + last[3] == begin and last[2] + last[3] == at:
                last[3] += count
            else:
                spans.append([source, begin, at, count])
            at += count
    opened: dict[str, int] = {}
    try:
        for source, begin, at, count in spans:
            if source not in opened:
                opened[source] = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            space.copy_range(file, at, opened[source], begin, count)
    finally:
        for fd in opened.values():
            os.close(fd)


def _moved_digest(entry: Entry, parents: list[Checkpoint]) -> str:
    if isinstance(entry, Keep):
        return _known(parents[entry.parent], entry.ref.name, entry.ref.file)
    assert isinstance(entry, Bytes)
    state = hashlib.sha256()
    for ref, start, stop in entry.pieces:
        piece = ref._replace(offset=ref.offset + start, nbytes=stop - start)
        for chunk in parents[entry.parent].chunks(piece):
            state.update(chunk)
    return state.hexdigest()


def _known(parent: Checkpoint, name: str, file: str) -> str:
    if list(parent.parts) == [""]:
        return parent.tensor_digests[name]
    part = next(p for p in parent.parts.values() if file in p.files)
    return parent.tensor_digests[f"{part.name}/{name}" if part.name else name]


def _entry_bytes(op: Op, entry: Entry, parents: list[Checkpoint], trained: TrainResult, options: RunOptions) -> Any:
    from surgery.store.dtypes import as_bytes, torch_dtype

    if isinstance(entry, Keep):
        return as_bytes(parents[entry.parent].read_ref(entry.ref))
    if isinstance(entry, Bytes):
        parent = parents[entry.parent]
        return b"".join(bytes(as_bytes(parent.read_ref(ref)))[start:stop] for ref, start, stop in entry.pieces)
    if isinstance(entry, Trained):
        tensor = trained.tensors[entry.full_name]
    else:
        assert isinstance(entry, Compute)
        inputs = [parents[parent].read_ref(ref) for parent, ref in entry.inputs]
        tensor = op.run(entry, inputs, seeded(options.seed, op, entry.full_name) if entry.random else None)
        if tuple(tensor.shape) != entry.shape:
            raise CheckpointError(
                "bad-plan",
                f"'{printable(entry.full_name)}' came out as {list(tensor.shape)}",
                hint="a fault in the operation",
            )
    return as_bytes(tensor.to(torch_dtype(entry.dtype)))


def seeded(seed: int, op: Op, name: str) -> Any:
    """The generator of one output tensor: independent of order, workers and the other tensors."""
    import torch

    return torch.Generator().manual_seed(tensor_seed(seed, op, name))


def tensor_seed(seed: int, op: Op, name: str) -> int:
    """The seed of one output tensor, 63 bits."""
    text = f"{seed}\0{op.name}\0{op.version}\0{name}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def stream_bytes(op: Op, entry: Compute, parents: list[Checkpoint], seed: int) -> Iterator[memoryview]:
    """The bytes of a streamed entry in order, in pieces; a piece is valid until the next one is asked for."""
    count = 0
    with ExitStack() as opened:
        readers = [opened.enter_context(open_reader(parents[at], ref)) for at, ref in entry.inputs]
        for piece in op.stream(entry, readers, tensor_seed(seed, op, entry.full_name)):  # type: ignore[attr-defined]
            view = memoryview(piece).cast("B")
            count += len(view)
            yield view
    if count != entry.nbytes:
        raise CheckpointError(
            "bad-plan", f"'{printable(entry.full_name)}' came out as {count} bytes", hint="a fault in the operation"
        )


def _check_journal(space: Workspace, shards: list[Shard]) -> None:
    """Hash a sample of what an earlier run journalled; on any difference trust none of it."""
    rows = [(s, e, sha) for s in shards for e in s.entries if (sha := space.done.get(f"{s.file.relative}\0{e.name}"))]
    for shard, entry, sha in rows[:: max(1, len(rows) // 8)]:
        offset, count = shard.file.places[entry.name]
        with open(space.folder / "out" / shard.file.relative, "rb") as handle:
            handle.seek(offset)
            if hashlib.sha256(handle.read(count)).hexdigest() != sha:
                space.forget()
                return


def _weight_row(space: Workspace, shard: Shard) -> dict[str, Any]:
    path = space.folder / "out" / shard.file.relative
    return {"path": shard.file.relative, "size": shard.file.size, "header": header_digest(path)}


def _side_files(
    space: Workspace, plan: Plan, indexes: Mapping[str, Mapping[str, str]], shards: list[Shard], extra: tuple[Any, ...]
) -> list[dict[str, Any]]:
    sizes = {e.full_name: e.nbytes for s in shards for e in s.entries}
    contents = {name: _index_json(name, weight_map, sizes) for name, weight_map in indexes.items()}
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


def _index_json(name: str, weight_map: Mapping[str, str], sizes: Mapping[str, int]) -> bytes:
    prefix = f"{name.rsplit('/', 1)[0]}/" if "/" in name else ""
    total = sum(sizes[prefix + tensor] for tensor in weight_map)
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": dict(weight_map)}, indent=2) + "\n").encode()


def _version(package: str) -> str:
    try:
        return installed_version(package)
    except ModuleNotFoundError:
        return "not installed"
