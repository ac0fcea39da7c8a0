"""Build a checkpoint again from its lineage and see whether the same bytes come out.

The record says which operation with which parameters, seed, threads and device made it, and what its parents were
called. Parents are looked for where they were, beside the output, in the cache and by their hub commit; only one whose
digest is the recorded one is taken.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, SurgeryError, UsageError, closest, printable
from surgery.graph.op import Op, Plan, PlanContext, build_op, check_parents
from surgery.graph.planned import PlannedStep, planned_checkpoint
from surgery.graph.run import (
    Report,
    RunOptions,
    RunResult,
    check_place,
    plan_key,
    run_op,
    silent,
)
from surgery.store.checkpoint import Checkpoint, open_checkpoint
from surgery.store.digests import cache_folder
from surgery.store.layout import LINEAGE_FILE
from surgery.store.names import open_named
from surgery.store.record import is_intact, is_unhashed, undigested

_LEVELS = 4  # folders above the output in which a relative name is tried: where the command may have been typed


@dataclass(frozen=True)
class Replayed:
    """The result, and what is not as recorded: tensors by full name, files by path, and `reasons` that may explain.
    Of `undigested` tensors the record has no digest: they were compared with those that lie there now. `assumed` are
    parents that were never digested and that the user says are those of then."""

    result: RunResult
    tensors: tuple[str, ...]
    files: tuple[str, ...]
    reasons: tuple[str, ...]
    undigested: int = 0
    assumed: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether every tensor and every side file came out as recorded."""
        return not (self.tensors or self.files)


@dataclass(frozen=True)
class ReplayOptions:
    """`parents` maps a recorded parent's name to where it lies now. `deep` rebuilds those that are not found from their
    own records. `device` and `threads` replace the recorded ones; the rest is as for any run."""

    parents: Mapping[str, str]
    deep: bool = False
    device: str | None = None
    threads: int | None = None
    run: RunOptions = RunOptions(workers=1)


@dataclass(frozen=True)
class _Call:
    """What `replay` was called with, for every record on the way: `home` is the folder of the checkpoint, `folder`
    takes what is made on the way and not kept."""

    home: Path
    load_op: Callable[[str], Any]
    options: ReplayOptions
    report: Report
    notice: Callable[[Plan], None]
    folder: Path

    def for_parents(self) -> "_Call":
        """For the parents of a parent: the user named none of those, and what of them is there is left alone."""
        run = replace(self.options.run, overwrite=False, resume=False)
        return replace(self, options=replace(self.options, parents={}, run=run))


def replay(
    checkpoint: Checkpoint,
    to: Path,
    load_op: Callable[[str], Any],
    *,
    options: ReplayOptions,
    report: Report = silent,
    notice: Callable[[Plan], None] = lambda plan: None,
) -> Replayed:
    """Carry out at `to` what the record of `checkpoint` says, and compare the outcome with the record.

    Raises `CheckpointError` without an intact record, and when a parent is missing or has changed.
    """
    record = checkpoint.lineage
    if record is None:
        raise CheckpointError(
            "no-lineage", f"{checkpoint.name}: no {LINEAGE_FILE} beside the weights", hint="not made by surgery"
        )
    if not is_intact(record):
        raise CheckpointError(
            "altered-record",
            f"{checkpoint.name}: {LINEAGE_FILE} was altered after it was written",
            hint=f"surgery verify {checkpoint.name} says what else differs",
        )
    unknown = [name for name in options.parents if name not in record["parents"]]
    if unknown:
        known = list(record["parents"])
        raise UsageError(
            "parent",
            f"{checkpoint.name} has no parent '{printable(unknown[0])}'",
            hint=closest(unknown[0], known) if known else "it was made from nothing",
        )
    check_place(to, [checkpoint])
    with tempfile.TemporaryDirectory(prefix="surgery-replay-") as folder:
        call = _Call(checkpoint.root, load_op, options, report, notice, Path(folder))
        result, op = _rebuild(record, to, call, reuse=False)
        found = _compared(record, result, op, lying=checkpoint)
    return replace(found, assumed=tuple(n for n in options.parents if is_unhashed(record["parents"][n]["digest"])))


def _rebuild(record: Mapping[str, Any], to: Path, call: _Call, *, reuse: bool) -> tuple[RunResult, Op]:
    op, parents, run = _work(record, call)
    return run_op(op, parents, to, options=run, report=call.report, notice=call.notice, reuse=reuse), op


def _work(record: Mapping[str, Any], call: _Call) -> tuple[Op, list[Checkpoint], RunOptions]:
    """The operation, parents and circumstances of a record."""
    if len(record["steps"]) != 1:
        raise CheckpointError(
            "many-steps", "the record holds several steps without what was between them", hint="run its recipe again"
        )
    (step,) = record["steps"]
    op: Op = build_op(call.load_op(step["op"]), step["params"])
    names = step.get("parents", list(record["parents"]))
    try:
        check_parents(op, len(names))
    except UsageError as err:
        hint = f"install surgery {record['environment'].get('surgery', 'of that time')}"
        raise CheckpointError("other-version", f"{printable(step['op'])}: {err.message} as then", hint=hint) from None
    parents = [_find_parent(record, name, call) for name in names]
    environment, options = record["environment"], call.options
    run = replace(
        options.run,
        seed=step["seed"],
        device=options.device or str(environment.get("device", "cpu")),
        threads=options.threads or _count(environment.get("threads")) or 1,
        shard_size=_count(environment.get("shard_size")),
    )
    return op, parents, run


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _find_parent(record: Mapping[str, Any], name: str, call: _Call) -> Checkpoint:
    """The parent with the recorded digest, from the first place that has it; one that was never written is planned
    again, and its tensors are made on the way as they were then."""
    options, home = call.options, call.home
    row = record["parents"][name]
    own = record["ancestors"].get(row["lineage"]) if row["lineage"] else None
    if own is not None and row["digest"].startswith("derived:") and name not in options.parents:
        inner = {**own, "ancestors": record["ancestors"], "environment": record["environment"]}
        op, parents, run = _work(inner, call.for_parents())
        plan = op.plan(PlanContext(run.seed, run.offline), *parents)
        key = plan_key(op, plan, parents, run)
        made = PlannedStep(op, plan, tuple(parents), run.seed, key)
        own_folder = call.folder / str(sum(1 for _ in call.folder.iterdir()))
        return planned_checkpoint(str(row.get("source") or name), made, own_folder)
    offline = options.run.offline
    changed: list[str] = []
    if name in options.parents:
        found = open_named(options.parents[name], offline=offline)
        if fault := _fault(found, row, named=True):
            raise CheckpointError(
                "changed-parent",
                f"parent '{printable(name)}': {found.name} {fault}",
                hint="name the one it was made from",
            )
        return _named(found, row, name)
    for place, from_hub in _places(row, name, home, own):
        try:
            # Only what came from the hub may be asked for there: a lost ./org/name must not become a download.
            found = open_named(place, offline=offline or not from_hub)
            fault = _fault(found, row)
        except SurgeryError:
            continue
        if fault is None:
            return _named(found, row, name)
        changed.append(f"{found.name} {fault}")
    if options.deep and own is not None:
        key = own["steps"][-1]["key"].removeprefix("sha256:")
        inner = {**own, "ancestors": record["ancestors"]}
        target = cache_folder() / "nodes" / key[:2] / key
        result, op = _rebuild(inner, target, call.for_parents(), reuse=True)
        found = open_checkpoint(result.path, name=str(row.get("source") or name))
        again = _compared(own, result, op)
        # What was never digested cannot be compared: the same work on the same parents has to do.
        fault = _fault(found, row) if not is_unhashed(row["digest"]) or again.tensors else None
        if fault is not None:
            reasons = "; ".join(again.reasons)
            raise CheckpointError(
                "changed-parent",
                f"parent '{printable(name)}' was rebuilt and {fault}: {reasons}",
                hint=_hint(name, False),
            )
        return found
    if changed:
        raise CheckpointError(
            "changed-parent", f"parent '{printable(name)}': {'; '.join(changed[:2])}", hint=_hint(name, own is not None)
        )
    raise CheckpointError(
        "missing-parent",
        f"parent '{printable(name)}' is not where it was: no {printable(str(row.get('source') or name))} "
        f"here or beside {home.name}",
        hint=_hint(name, own is not None),
    )


def _places(row: Mapping[str, Any], name: str, home: Path, own: Mapping[str, Any] | None) -> Iterator[tuple[str, bool]]:
    """Where a parent may be, most likely first, and whether asking the hub is right there."""
    source = str(row.get("source") or name)
    yield source, False
    home = home.absolute()
    if not source.startswith(("/", "~", "hub:")):
        for folder in list(home.parents)[:_LEVELS]:
            yield str(folder / source), False
    yield str(home.parent / Path(source).name), False
    if own is not None:
        key = own["steps"][-1]["key"].removeprefix("sha256:")
        yield str(cache_folder() / "nodes" / key[:2] / key), False
    if row.get("name") and row.get("commit"):
        part = f":{row['part']}" if row.get("part") else ""
        yield f"hub:{row['name']}@{row['commit']}{part}", True


def _fault(found: Checkpoint, row: Mapping[str, Any], *, named: bool = False) -> str | None:
    """Why `found` is not the recorded parent. One that was never digested is known by its very files, untouched since;
    where the user names it, equal headers and sizes will do."""
    if is_unhashed(row["digest"]):
        if [dict(file) for file in found.unhashed.files] != row.get("files"):
            return "has other files than it had (headers or sizes differ)"
        if not named and row["digest"] != f"unhashed:{found.unhashed.where}":
            return "was never digested and may be another: its files are not those of then, or were written to"
    elif f"sha256:{found.digest}" != row["digest"]:
        return f"holds other tensors (digest {found.digest[:12]}, recorded {row['digest'][7:19]})"
    if row.get("config") not in (None, f"sha256:{found.config_digest()}"):
        return "has another config than then"
    return None


def _named(found: Checkpoint, row: Mapping[str, Any], name: str) -> Checkpoint:
    """Under the name that it had, so that the new record reads like the old one."""
    return replace(found, name=str(row.get("source") or name))


def _hint(name: str, has_record: bool) -> str:
    rebuild = ", or --deep to rebuild it from its own record" if has_record else ""
    return f"say where it is: --parent {printable(name)}=PATH{rebuild}"


def _compared(record: Mapping[str, Any], result: RunResult, op: Op, *, lying: Checkpoint | None = None) -> Replayed:
    """What came out otherwise than recorded, and why that may be. Tensors without a digest are compared with those of
    the checkpoint `lying` there, if there is one; else by dtype and shape."""
    then, now = dict(record["tensors"]), dict(result.record["tensors"])
    missing = undigested(record)
    for name in missing:
        if lying is not None and name in lying.tensors:
            then[name] = {"sha256": lying.tensor_digests[name], **then[name]}
        elif lying is None and name in now:
            now[name] = {k: v for k, v in now[name].items() if k != "sha256"}
    tensors = tuple(n for n in dict.fromkeys((*then, *now)) if then.get(n) != now.get(n))
    old, new = (
        {row["path"]: row["sha256"] for row in r["output"]["files"] if "sha256" in row and not _is_index(row["path"])}
        for r in (record, result.record)
    )
    files = tuple(sorted(n for n in {*old, *new} if old.get(n) != new.get(n)))
    reasons = tuple(_reasons(record, result.record, op)) if tensors or files else ()
    if set(tensors) & set(missing):
        reasons = ("tensors that were never digested may have been altered since", *reasons)
    return Replayed(result, tensors, files, reasons, len(missing))


def _is_index(path: str) -> bool:
    return path.endswith(".safetensors.index.json")  # says which file holds what; sizes of files are no content


def _reasons(then: Mapping[str, Any], now: Mapping[str, Any], op: Op) -> Iterator[str]:
    before, after = then["environment"], now["environment"]
    found = False
    if then["steps"][-1]["version"] != op.version:
        found = True
        yield f"{op.name} was version {then['steps'][-1]['version']} then and is {op.version} now"
    for key in ("torch", "device", "threads", "processor", "python", "surgery"):
        if key in before and before[key] != after.get(key):
            found = True
            yield f"{key} was {printable(str(before[key]))} then and is {after.get(key)} now"
    records = (then, *then.get("ancestors", {}).values())
    unhashed = any(is_unhashed(row["digest"]) for record in records for row in record["parents"].values())
    if not found and not unhashed and then["steps"][-1]["key"] != now["steps"][-1]["key"]:
        found = True
        yield "the data that it reads beside its parents, or the files beside their weights, have changed"
    if not found:
        processor = "" if "processor" in before else "another processor (which, was not recorded), or "
        yield f"versions, device and threads are the same: {processor}work that is not deterministic"
