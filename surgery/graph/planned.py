"""A checkpoint that a plan describes and that was never written: what the next step of a chain reads.

Its names, dtypes, shapes and configs are those of the folder that the plan would make; its tensors lead to the sources
that they would be made from. Its side files lie as links or small files in a temporary folder, so that every operation
plans on it as on any other.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, OutputError, SurgeryError
from surgery.graph.engine.work import Made, Source, join
from surgery.graph.lineage import make_record
from surgery.graph.op import Bytes, Compute, Entry, Given, Keep, Op, Plan, Trained, resolved_params
from surgery.graph.shards import index_json, plan_shards
from surgery.store.cache import Known
from surgery.store.checkpoint import Checkpoint
from surgery.store.layout import read_json, safe_relative
from surgery.store.tensors import Part, TensorRef


@dataclass(frozen=True)
class PlannedStep:
    """How a planned checkpoint would come to be; `key` names the work. `hashing`: whether its parents are digested."""

    op: Op
    plan: Plan
    parents: tuple[Checkpoint, ...]
    seed: int
    key: str
    hashing: bool = True


@dataclass(frozen=True)
class Planned(Checkpoint):
    """`made` says how it would be made; `sources` where its tensors' bytes come from, by file and then by name. A
    tensor that a trainer would make has none. `pending`: its tensors cannot be read yet, it serves for planning alone.
    `written`: it will be made in full, so its content counts and not the work; `known` is what it was when it was last
    made.
    """

    made: PlannedStep | None = None
    sources: Mapping[str, Mapping[str, Source]] = field(default_factory=dict)
    pending: bool = False
    written: bool = False
    known: Known | None = None

    @property
    def identified(self) -> bool:
        """Whether `identity` has an answer."""
        return self.known is not None if self.written else bool(self.step.key)

    @property
    def step(self) -> PlannedStep:
        """How it would be made."""
        assert self.made is not None
        return self.made

    def identity(self, *, hashing: bool = True) -> dict[str, str]:
        """The work that makes it stands for its content, which nobody has seen."""
        if self.known is not None:
            return {"digest": self.known.digest, "config": self.known.config}
        return {"derived": self.step.key}

    def file(self, name: str) -> Path | None:
        """As of any checkpoint; one that a run makes is made now. None where that fails: the run will say why."""
        self._complete()
        return super().file(name)

    def _complete(self) -> None:
        """Make the files that a run makes, here and in the steps before, which those here may be links to."""
        for step in planned_among([self]):
            for own in step.step.plan.files:
                if own.make is not None and not (step.root / own.relative).exists():
                    with suppress(SurgeryError):
                        (step.root / own.relative).write_bytes(own.make())

    def config_digest(self) -> str:
        """As of any checkpoint, of the files that there are."""
        self._complete()
        side = tuple(name for name in self.side_files if (self.root / name).is_file())
        return Checkpoint(self.name, self.path, self.root, self.layout, self.parts, side).config_digest()

    @property
    def digest_text(self) -> str:
        """As in a record: derived:<key>."""
        return f"derived:{self.step.key}"

    def parent_row(self, *, hashing: bool = True) -> dict[str, Any]:
        """As a record says it."""
        return {"digest": self.digest_text}

    @cached_property
    def tensor_digests(self) -> dict[str, str]:
        """Never known. Raises `CheckpointError`."""
        raise CheckpointError("not-made", f"{self.name}: has not been made yet", hint="give the step 'cache: true'")

    @cached_property
    def lineage(self) -> dict[str, Any]:
        """The record that it would have, without tensors and files."""
        step = self.step
        return make_record(
            op=step.op.name,
            version=step.op.version,
            params=resolved_params(step.op),
            seed=step.seed,
            key=step.key,
            parents=list(step.parents),
            plan=step.plan,
            tensors=None,
            files=[],
            environment={},  # that of the result, which the records of its steps are part of
            training={},
            hashing=step.hashing,
        )


def planned_checkpoint(
    name: str,
    made: PlannedStep,
    folder: Path,
    *,
    pending: bool = False,
    written: bool = False,
    known: Known | None = None,
) -> Planned:
    """What `made` would publish, with its side files in `folder`, which must not exist yet and is made when needed;
    those that a run makes are only made when they are asked for."""
    plan = made.plan
    _put_side_files(plan, folder)
    shards, indexes = plan_shards(plan, key=None)
    sizes = {e.full_name: s.file.places[e.name][1] for s in shards for e in s.entries} if indexes else {}
    for name, weight_map in indexes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(index_json(name, weight_map, sizes))
    sources: dict[str, dict[str, Source]] = {}
    tensors: dict[str, dict[str, TensorRef]] = {p.part: {} for p in plan.parts}
    files: dict[str, list[str]] = {p.part: [] for p in plan.parts}
    for shard in shards:
        path = f"{folder}/{shard.file.relative}"
        part = shard.entries[0].part if shard.entries else plan.parts[0].part
        files[part].append(path)
        refs = tensors[part]
        for entry in shard.entries:
            offset, count = shard.file.places[entry.name]
            refs[entry.name] = TensorRef(entry.name, entry.dtype, entry.shape, path, offset, count)
        if not written:
            found = sources_of(shard.entries, made.op, made.parents, made.seed)
            sources[path] = {e.name: s for e, s in zip(shard.entries, found, strict=True) if s is not None}
    copied = {f.relative for f in plan.files}
    side = tuple(sorted(n for n in copied if not n.endswith(".index.json")))
    own = {n.rpartition("/")[0]: n for n in (*copied, *indexes) if n.endswith(".safetensors.index.json")}
    parts = {}
    for names in plan.parts:
        config_file = f"{names.part}/config.json" if names.part else "config.json"
        config = read_json(folder / config_file) if config_file in side else None
        parts[names.part] = Part(
            names.part,
            names.base,
            tensors[names.part],
            config,
            config_file if config is not None else None,
            tuple(files[names.part]),
            index=own.get(names.part),
        )
    kind = "report" if plan.evaluates else "pipeline" if "model_index.json" in side else "hf"
    return Planned(
        name,
        folder,
        folder,
        kind,
        parts,
        side,
        made=made,
        sources=sources,
        pending=pending,
        written=written,
        known=known,
    )


def source_of(entry: Entry, op: Op, parents: Sequence[Checkpoint], seed: int) -> Source | None:
    """Where the bytes of an entry come from, looked up through parents that were never written; None for what is
    in memory already: a trainer's results, and what the plan gives."""
    if isinstance(entry, Keep):
        return _origin(parents[entry.parent], entry.ref)
    if isinstance(entry, Bytes):
        pieces = ((_origin(parents[entry.parent], ref), start, stop) for ref, start, stop in entry.pieces)
        return join(entry.dtype, entry.shape, entry.nbytes, tuple(pieces))
    if isinstance(entry, Compute):
        return Made(op, entry, tuple(_origin(parents[at], ref) for at, ref in entry.inputs), seed)
    assert isinstance(entry, Trained | Given)
    return None


def sources_of(entries: Iterable[Entry], op: Op, parents: Sequence[Checkpoint], seed: int) -> list[Source | None]:
    """`source_of` each entry; quick, for plans that keep a hundred thousand tensors."""
    planned = [p.sources if isinstance(p, Planned) and not p.written else None for p in parents]
    found: list[Source | None] = []
    for entry in entries:
        if type(entry) is Keep:
            table, ref = planned[entry.parent], entry.ref
            found.append(ref if table is None else table[ref.file][ref.name])
        else:
            found.append(source_of(entry, op, parents, seed))
    return found


def _origin(parent: Checkpoint, ref: TensorRef) -> Source:
    fused = isinstance(parent, Planned) and not parent.written
    return parent.sources[ref.file][ref.name] if fused else ref  # type: ignore[attr-defined]


def roots(parents: "tuple[Checkpoint, ...] | list[Checkpoint]") -> list[Checkpoint]:
    """The checkpoints on disk that `parents` are or are planned from, each once."""
    return [parent for parent in _with_ancestors(parents) if not isinstance(parent, Planned)]


def planned_among(parents: "tuple[Checkpoint, ...] | list[Checkpoint]") -> list[Planned]:
    """The steps that `parents` are or are planned from, each once."""
    return [parent for parent in _with_ancestors(parents) if isinstance(parent, Planned)]


def _with_ancestors(parents: "tuple[Checkpoint, ...] | list[Checkpoint]") -> list[Checkpoint]:
    found: dict[int, Checkpoint] = {}
    waiting = list(parents)
    while waiting:
        parent = waiting.pop()
        if id(parent) in found:
            continue
        found[id(parent)] = parent
        if isinstance(parent, Planned):
            waiting.extend(parent.step.parents)
    return list(found.values())


def _put_side_files(plan: Plan, folder: Path) -> None:
    try:
        for file in plan.files:
            if not safe_relative(file.relative):
                raise OutputError("unsafe-path", f"{file.relative!r} would leave the folder", hint="a fault of ours")
            path = folder / file.relative
            path.parent.mkdir(parents=True, exist_ok=True)
            if file.content is not None:
                path.write_bytes(file.content)
            elif file.source is not None:
                os.symlink(os.path.abspath(file.source), path)
    except OSError as err:
        raise OutputError("not-writable", f"{folder}: {err.strerror}", hint="set TMPDIR to another folder") from None
