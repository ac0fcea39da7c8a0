"""Clamp: values held between two bounds. An operation of another package, complete: parameters, plan, run."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from surgery.arch.carried import full_name, kept, part_names, side_files
from surgery.arch.patterns import matcher, nearest
from surgery.errors import UsageError
from surgery.graph.op import Compute, Entry, Param, Plan, PlanContext
from surgery.store.checkpoint import Checkpoint

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Clamp:
    """Hold the values of floating-point tensors within a bound, outliers included.

    Example:  surgery clamp dit-digits --limit 0.5 --only '*.bias' -o out/clamped
    """

    limit: Annotated[float, Param("The largest size of a value.")]
    only: Annotated[str, Param("Names to change: a glob, or /regex/.", (), "PATTERN")] = "*"

    name: ClassVar[str] = "clamp"
    version: ClassVar[int] = 1
    parents: ClassVar[int] = 1
    trainer: ClassVar[str | None] = None
    row_wise: ClassVar[bool] = True

    def plan(self, ctx: PlanContext, base: Checkpoint) -> Plan:
        """Chosen tensors computed, all others kept."""
        if self.limit <= 0:
            raise UsageError("limit", f"clamp: limit is {self.limit:g}", hint="give a number above zero")
        chosen = matcher(self.only)
        entries: list[Entry] = []
        changed = 0
        for part in base.parts.values():
            for name, ref in part.tensors.items():
                if ref.dtype in FLOATS and chosen(full_name(part, name)):
                    changed += 1
                    shape = {"part": part.name, "name": name, "dtype": ref.dtype, "shape": ref.shape}
                    entries.append(Compute(**shape, refs=(ref,), how=self.limit))
                else:
                    entries.append(kept(part, name, ref))
        if not changed:
            raise UsageError("unmatched", f"'{self.only}' fits no tensor", hint=nearest(self.only, base.tensors))
        return Plan(tuple(entries), part_names(base), side_files(base), report={"clamped": changed})

    def run(self, task: Compute, tensors: list[Any], generator: Any) -> Any:
        """One tensor, in the precision in which it is stored."""
        return tensors[0].clamp(-task.how, task.how)

    def tensor_params(self, task: Compute) -> float:
        """All that one tensor depends on, beside its input: an edited recipe keeps the others."""
        return float(task.how)
