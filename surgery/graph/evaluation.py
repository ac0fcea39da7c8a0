"""Steps that measure: a node whose result is a report instead of a checkpoint.

An evaluation is declared like an operation, a frozen dataclass with `Param` fields, and says what it found as JSON
values. Its node has a key, is cached, found again, recorded, verified and replayed like any other; the folder holds
`report.json`, files that go with it, and the lineage.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from surgery.errors import UsageError
from surgery.graph.lineage import plain
from surgery.graph.op import Compute, Plan, PlanContext, SideFile, TrainContext, TrainResult
from surgery.store.checkpoint import Checkpoint
from surgery.store.layout import REPORT_FILE


@dataclass(frozen=True)
class Found:
    """What an evaluation found: JSON values, and files that go beside the report."""

    numbers: Mapping[str, Any]
    files: tuple[SideFile, ...] = ()


class Evaluation:
    """The base of evaluations; a subclass gives `name`, `version`, `inputs` and `evaluate`, and may give `parents`."""

    name: ClassVar[str]
    version: ClassVar[int]
    parents: ClassVar[int | tuple[int, int | None]] = 1
    trainer: ClassVar[str | None] = "surgery.graph.evaluation:carry_out"

    def inputs(self, ctx: PlanContext, *parents: Checkpoint) -> Mapping[str, str]:
        """Digests of all that is read beside the parents; without torch. Raises on bad parameters."""
        raise NotImplementedError

    def evaluate(self, ctx: TrainContext, *parents: Checkpoint) -> Found:
        """The work. Equal parents, parameters and seeds must give equal numbers."""
        raise NotImplementedError

    def plan(self, ctx: PlanContext, *parents: Checkpoint) -> Plan:
        """No tensors: what is written is the report."""
        return Plan((), (), inputs=self.inputs(ctx, *parents), evaluates=True)

    def run(self, task: Compute, tensors: list[Any], generator: Any) -> Any:
        """Nothing is ever computed tensor by tensor."""
        raise AssertionError(task.name)


def carry_out(op: Evaluation, ctx: TrainContext, plan: Plan, *parents: Checkpoint) -> TrainResult:
    """Evaluate; the numbers become `report.json`, with words for NaN and infinities."""
    found = op.evaluate(ctx, *parents)
    text = json.dumps(plain(found.numbers), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return TrainResult({}, {}, (SideFile(REPORT_FILE, content=text.encode()), *found.files))


def check_no_report(parents: "tuple[Checkpoint, ...] | list[Checkpoint]") -> None:
    """Refuse reports where checkpoints are read. Raises `UsageError`."""
    for parent in parents:
        if parent.layout == "report":
            raise UsageError(
                "report", f"{parent.name}: is a report of an evaluation, no checkpoint", hint="name what it is about"
            )
