"""The shape of an operation: parameters, a plan made from headers alone, and a pure function on tensors.

An operation is a frozen dataclass. Its fields, annotated with `Param`, become the command's options, the recipe's keys
and the lineage's `params`. `plan()` names every output tensor without torch; `run()` computes the ones that need it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, get_args, get_origin, get_type_hints

from surgery.errors import UsageError, closest
from surgery.store.checkpoint import Checkpoint
from surgery.store.header import nbytes_of
from surgery.store.tensors import TensorRef

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Param:
    """How one field is shown and given on the command line: help text, further flags such as "-r", a metavar, and
    whether it is a positional argument. A tuple field may be given several times."""

    help: str
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    positional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One output tensor: its part, name, dtype and shape. The subclass says where its bytes come from."""

    part: str = ""
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.dtype, self.shape)

    @property
    def full_name(self) -> str:
        return f"{self.part}/{self.name}" if self.part else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep(Entry):
    """The bytes of `ref`, unchanged, perhaps under another name. `parent` is the index of the checkpoint it lies in."""

    ref: TensorRef
    parent: int = 0

    @property
    def nbytes(self) -> int:
        """Known from the header: plans ask for it often."""
        return self.ref.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Bytes(Entry):
    """Pieces (ref, first byte, last byte) laid one after the other: slices and concatenations on axis 0."""

    pieces: tuple[tuple[TensorRef, int, int], ...]
    parent: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute(Entry):
    """`op.run` makes it from `refs`. `how` is the operation's own note of what to do; `random` asks for a seeded
    generator. `sources` says which parent each ref lies in, where that is not `parent` for all of them. `streamed`:
    `op.stream` makes it instead, in pieces, so that neither inputs nor output are ever whole in memory."""

    how: Any
    refs: tuple[TensorRef, ...] = ()
    parent: int = 0
    sources: tuple[int, ...] = ()
    scratch: int = 0
    random: bool = False
    streamed: bool = False

    @property
    def inputs(self) -> tuple[tuple[int, TensorRef], ...]:
        """(index of the parent, ref) of everything that is read."""
        return tuple(zip(self.sources or (self.parent,) * len(self.refs), self.refs, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Given(Entry):
    """Bytes that the plan knows already, such as constants."""

    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained(Entry):
    """The operation's trainer makes it, together with all other entries of this kind."""


@dataclass(frozen=True)
class SideFile:
    """A file beside the weights: copied from `source` (a path), `content` to be written, or what `make` returns when
    the run starts, for content that takes too long for a plan; where `make` raises a `SurgeryError` the file is left
    out, and the error is a warning. `digest` stands for the content in the node's key where that is not made yet, or
    names what the work does not depend on, such as paths."""

    relative: str
    source: str | None = None
    content: bytes | None = None
    make: Callable[[], bytes] | None = None
    digest: str | None = None


def json_bytes(value: Any) -> bytes:
    """A JSON side file as Hugging Face libraries write it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class PartNames:
    """Where the tensors of a part go: the stem of its weight files ("model", "diffusion_pytorch_model")."""

    part: str
    base: str


@dataclass(frozen=True)
class Plan:
    """Everything an operation will write, known before a byte is moved.

    `report` is what `--dry-run --json` prints (made of JSON values); `config_edits` are (path, old, new); `inputs` are
    digests of data that is read beside the parents, and part of the node's identity. `regroup` puts all tensors, kept
    ones too, into new files of at most so many bytes, in natural order of names. `mirror` is a parent whose files the
    output repeats: their names, the order in them and, where nothing but values changes, their headers. `new_file`
    leaves the parent's files whole, small ones too, and puts what is not in them into files of that stem ("" where
    there is nothing new). `evaluates`: the trainer makes a report, and there are no tensors (`graph.evaluation`).
    """

    entries: tuple[Entry, ...]
    parts: tuple[PartNames, ...]
    files: tuple[SideFile, ...] = ()
    dropped: tuple[str, ...] = ()
    config_edits: tuple[tuple[str, Any, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    regroup: int | None = None
    mirror: Checkpoint | None = None
    new_file: str | None = None
    evaluates: bool = False

    def bytes_report(self) -> dict[str, int]:
        """How many bytes are taken over from parents and how many are made."""
        kept = written = 0
        for entry in self.entries:
            if isinstance(entry, (Keep, Bytes)):  # noqa: UP038  a union is made anew for every entry
                kept += entry.nbytes
            else:
                written += entry.nbytes
        return {"kept": kept, "written": written}


@dataclass(frozen=True)
class PlanContext:
    """What a plan may know beside its parents."""

    seed: int = 0
    offline: bool = False


@dataclass(frozen=True)
class TrainContext:
    """What a trainer may use: a seed, a device, threads for one computation, workers for independent ones, a folder
    whose content survives a crash, and `report` for progress (event name and numbers)."""

    seed: int
    device: str
    threads: int
    workers: int
    scratch: Path
    report: Callable[[str, Mapping[str, float]], None]


@dataclass(frozen=True)
class TrainResult:
    """What a trainer hands back: tensors by full name, and a record for the lineage (losses, counts; JSON values)."""

    tensors: "Mapping[str, torch.Tensor]"
    record: Mapping[str, Any]
    files: tuple[SideFile, ...] = ()


class Op(Protocol):
    """The contract of an operation. `trainer` is "module:function" for operations whose entries include `Trained`;
    `parents` is how many checkpoints it takes, or (fewest, most), most being None where there is no limit. A class may
    say `row_wise = True`: each row (first axis) of a computed tensor comes from the same rows of its inputs, so that
    large ones are made in pieces."""

    name: ClassVar[str]
    version: ClassVar[int]
    parents: ClassVar[int | tuple[int, int | None]]
    trainer: ClassVar[str | None]

    def plan(self, ctx: PlanContext, *parents: Checkpoint) -> Plan:
        """Every output tensor once, from headers and configs; raises on bad input before anything is written."""
        ...

    def run(self, task: Compute, tensors: "list[torch.Tensor]", generator: "torch.Generator | None") -> "torch.Tensor":
        """One output tensor from its inputs; pure: equal inputs give equal bits.

        Some methods are optional. `stream(task, readers, seed)` yields the bytes of a `streamed` entry in order, as
        flat buffers that it may use again; `seed` is that of this tensor. `measure(plan, seed, *parents)` returns JSON
        values about the change, taken from the parents before anything is written; `check(folder, plan, parents,
        report)` looks at the finished folder before it is published, raises or returns more of them. The lineage keeps
        them beside what is hashed. `tensor_params(task)` returns JSON values that, with the inputs, the dtype and for
        drawn tensors seed and name, are all that this tensor depends on (None: nobody can say); an edited recipe keeps
        what it does not touch.
        """
        ...


def op_params(op: type | Any) -> dict[str, tuple[Any, Param, Any]]:
    """Field name -> (type, Param, default or MISSING) of an operation class, in the order of declaration. A field that
    is called like a word of Python ends in "_", and users know it without (`shown_name`)."""
    kind = op if isinstance(op, type) else type(op)
    hints = get_type_hints(kind, include_extras=True)
    found = {}
    for f in fields(kind):
        annotated = hints[f.name]
        if get_origin(annotated) is not Annotated:
            continue
        base, *extras = get_args(annotated)
        param = next(e for e in extras if isinstance(e, Param))
        default = (
            f.default
            if f.default is not MISSING
            else (f.default_factory() if f.default_factory is not MISSING else MISSING)
        )
        found[f.name] = (base, param, default)
    return found


def build_op(kind: Any, values: Mapping[str, Any]) -> Any:
    """Make an operation from named values; an unknown or missing one is a `UsageError` naming the nearest known."""
    known = op_params(kind)
    values = {n + "_" if n not in known and n + "_" in known else n: v for n, v in values.items()}
    for name in values:
        if name not in known:
            raise UsageError(
                "unknown-parameter",
                f"{kind.name}: no parameter '{name}'",
                hint=closest(name, [shown_name(k) for k in known]),
            )
    missing = [n for n, (_, _, default) in known.items() if default is MISSING and n not in values]
    if missing:
        raise UsageError("missing-parameter", f"{kind.name}: {', '.join(missing)} must be given", hint="see its --help")
    for name, value in values.items():
        if isinstance(value, float) and not isfinite(value):
            raise UsageError("not-finite", f"{kind.name}: {name} is {value}", hint="give a number")
    return kind(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})


def resolved_params(op: Op) -> dict[str, Any]:
    """All parameters after defaults, as JSON values; these are hashed and recorded."""
    return {shown_name(n): list(v) if isinstance(v := getattr(op, n), tuple) else v for n in op_params(op)}


def parent_range(op: Any) -> tuple[int, int | None]:
    """The fewest and the most checkpoints that an operation takes; None: any number."""
    parents: int | tuple[int, int | None] = op.parents
    return (parents, parents) if isinstance(parents, int) else parents


def check_parents(op: Any, count: int) -> None:
    """Raise `UsageError` unless the operation takes `count` checkpoints."""
    fewest, most = parent_range(op)
    if count < fewest or (most is not None and count > most):
        wanted = str(fewest) if fewest == most else f"{fewest} or more" if most is None else f"{fewest} to {most}"
        raise UsageError("parents", f"{op.name} takes {wanted} checkpoints, not {count}", hint="see its --help")


def shown_name(field_name: str) -> str:
    """What users call a field: `except_` is `except`."""
    return field_name.rstrip("_")


def load_attribute(target: str) -> Any:
    """Import "module:attribute" on first use."""
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)
