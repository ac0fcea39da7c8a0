"""Scale: multiply chosen tensors by a number.

Inputs: one checkpoint of any kind. Changes: the values of the chosen float tensors. A damage of known size, for
controls: query weights times 0.3 flatten attention, and a method that sharpens it must repair part of that.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from surgery.arch.carried import full_name, kept, part_names, side_files
from surgery.arch.patterns import matcher, nearest
from surgery.errors import UsageError, printable
from surgery.graph.op import Compute, Entry, Param, Plan, PlanContext
from surgery.store.checkpoint import Checkpoint
from surgery.store.header import nbytes_of

_FLOATS = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True)
class Scale:
    """Multiply chosen tensors by a number; the rest stays byte for byte.

    Patterns are names with * (any text) and {n} (one piece), or /regex/. Products are rounded once, to the dtype that
    the tensor has.

    Example:  surgery scale llava-scenes --by 0.3 --only '*language_model*q_proj.weight' -o out/flat
    """

    by: Annotated[float, Param("The factor.")]
    only: Annotated[tuple[str, ...], Param("The tensors to multiply, repeatable.", (), "PATTERN")]

    name: ClassVar[str] = "scale"
    version: ClassVar[int] = 1
    parents: ClassVar[int] = 1
    trainer: ClassVar[str | None] = None
    row_wise: ClassVar[bool] = True

    def plan(self, ctx: PlanContext, base: Checkpoint) -> Plan:
        """Every tensor kept, but for those that a pattern names."""
        if not math.isfinite(self.by):
            raise UsageError("factor", f"--by {self.by}: not a number", hint="for example --by 0.3")
        matchers = {text: matcher(text) for text in self.only}
        found = dict.fromkeys(matchers, 0)
        entries: list[Entry] = []
        for part in base.parts.values():
            for name, ref in part.tensors.items():
                hits = [text for text, fits in matchers.items() if fits(full_name(part, name))]
                for text in hits:
                    found[text] += ref.dtype in _FLOATS
                if not hits or ref.dtype not in _FLOATS:
                    entries.append(kept(part, name, ref))
                    continue
                where = {"part": part.name, "name": name, "dtype": ref.dtype, "shape": ref.shape}
                entries.append(Compute(**where, how=self.by, refs=(ref,), scratch=2 * nbytes_of("F32", ref.shape)))
        for text, count in found.items():
            if not count:
                raise UsageError(
                    "pattern",
                    f"{base.name}: no float tensor is called {printable(text)}",
                    hint=nearest(text, base.tensors),
                )
        changed = sum(isinstance(e, Compute) for e in entries)
        report = {"by": self.by, "scaled": changed}
        return Plan(tuple(entries), part_names(base), side_files(base, {}), report=report)

    def run(self, task: Compute, tensors: list[Any], generator: Any) -> Any:
        """The product in float64, rounded to the tensor's dtype."""
        (tensor,) = tensors
        return (tensor.double() * task.how).to(tensor.dtype)

    def tensor_params(self, task: Compute) -> list[str]:
        """What a scaled tensor depends on beside its input: the factor."""
        return [self.by]

    def describe(self, plan: Plan) -> list[str]:
        """Lines of a dry run."""
        return [f"scale    {plan.report['scaled']:,} tensors by {plan.report['by']:g}"]
