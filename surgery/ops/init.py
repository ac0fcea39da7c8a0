"""Init: a checkpoint of a known architecture with random weights, as its constructor would draw them.

Inputs: none. Each tensor is drawn from its own seeded generator and written as it comes; the model is never in memory.
"""

import json
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, ClassVar

from surgery.arch.architectures import ARCHITECTURES
from surgery.arch.dit.config import initial_values
from surgery.arch.sources import Source
from surgery.errors import UsageError, closest
from surgery.graph.op import Compute, Param, PartNames, Plan, PlanContext, SideFile
from surgery.store.header import DTYPE_BITS

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "fp32": "F32", "bf16": "BF16", "fp16": "F16"}


@dataclass(frozen=True)
class Init:
    """Make a checkpoint of a known architecture with random weights.

    For benchmarks, dry runs and training from scratch; the shape of the published model, none of its knowledge.

    Example:  surgery init dit-xl-2 -o big
    """

    arch: Annotated[str, Param(f"One of {', '.join(ARCHITECTURES)}.", positional=True, metavar="ALIAS")]
    dtype: Annotated[str, Param("float32, bfloat16 or float16.")] = "float32"

    name: ClassVar[str] = "init"
    version: ClassVar[int] = 1
    parents: ClassVar[int] = 0
    trainer: ClassVar[str | None] = None

    def plan(self, ctx: PlanContext) -> Plan:
        """All tensors of the architecture, each to be drawn."""
        known = ARCHITECTURES.get(self.arch)
        if known is None:
            raise UsageError(
                "unknown-architecture", f"no architecture '{self.arch}'", hint=closest(self.arch, list(ARCHITECTURES))
            )
        if self.dtype not in _DTYPES:
            raise UsageError("dtype", f"--dtype {self.dtype}: unknown", hint="float32, bfloat16 or float16")
        dtype = _DTYPES[self.dtype]
        values = initial_values(known.transformer)
        entries = tuple(
            Compute(
                name=n,
                dtype=dtype,
                shape=v.shape,
                how=v,
                random=v.random,
                scratch=prod(v.shape) * DTYPE_BITS["F32"] // 8,
            )
            for n, v in values.items()
        )
        files = (
            SideFile("config.json", content=_json(known.transformer)),
            SideFile("scheduler_config.json", content=_json(known.scheduler)),
        )
        total = sum(prod(v.shape) for v in values.values())
        report = {"architecture": self.arch, "parameters": total, "tensors": len(entries)}
        warning = f"{self.arch}: random weights; the shape of the model and nothing it knows"
        return Plan(entries, (PartNames("", "diffusion_pytorch_model"),), files, warnings=(warning,), report=report)

    def run(self, task: Compute, tensors: list[Any], generator: Any) -> Any:
        """Draw one tensor."""
        source: Source = task.how
        return source.evaluate({}, generator)

    def describe(self, plan: Plan) -> list[str]:
        """Lines of a dry run."""
        return [f"{plan.report['architecture']}   {plan.report['parameters']:,} parameters"]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
