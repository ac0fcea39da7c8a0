"""A plug-in operation whose first task kills the process that it runs in, as a machine that goes down would."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from surgery.arch.carried import kept, part_names, side_files
from surgery.graph.op import Compute, Param, Plan, PlanContext
from surgery.store.checkpoint import Checkpoint


@dataclass(frozen=True)
class KilledOnce:
    """Copy a checkpoint by computing, and die once.

    Example:  surgery killed-once MODEL --mark FILE
    """

    mark: Annotated[str, Param("File that says who died; while it is not there, a task dies.")]

    name: ClassVar[str] = "killed-once"
    version: ClassVar[int] = 1
    parents: ClassVar[int] = 1
    trainer: ClassVar[str | None] = None

    def plan(self, ctx: PlanContext, base: Checkpoint) -> Plan:
        """The first tensor computed, the others kept."""
        (part,) = base.parts.values()
        names = list(part.tensors)
        first = part.tensors[names[0]]
        entries = [Compute(name=first.name, dtype=first.dtype, shape=first.shape, refs=(first,), how=self.mark)]
        return Plan(
            (*entries, *(kept(part, n, part.tensors[n]) for n in names[1:])), part_names(base), side_files(base)
        )

    def run(self, task: Compute, tensors: list[Any], generator: Any) -> Any:
        """The tensor as it is, unless nobody has died yet."""
        if not Path(task.how).exists():
            Path(task.how).write_text(str(os.getpid()))
            os._exit(1)
        return tensors[0]
