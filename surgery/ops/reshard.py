"""Reshard: the same tensors in files of another size.

Inputs: one checkpoint of any kind. Changes: which file holds which tensor; the content's digest stays the same.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from surgery.arch.carried import keep_all, part_names, side_files
from surgery.graph.op import Compute, Param, Plan, PlanContext
from surgery.graph.shards import parse_size, plan_shards
from surgery.store.checkpoint import Checkpoint


@dataclass(frozen=True)
class Reshard:
    """Store a checkpoint in files of another size; its content and digest stay the same.

    Tensors are dealt out in the order of their names, 2 before 10. A tensor larger than the size has its own file.

    Example:  surgery reshard llama --shard-size 2GB -o out/llama-2gb
    """

    shard_size: Annotated[str, Param("Largest size of a weight file, e.g. 500MB, 2GiB.", (), "SIZE")] = "5GB"

    name: ClassVar[str] = "reshard"
    version: ClassVar[int] = 1
    parents: ClassVar[int] = 1
    trainer: ClassVar[str | None] = None

    def plan(self, ctx: PlanContext, base: Checkpoint) -> Plan:
        """Every tensor kept, all of them grouped anew."""
        size = parse_size(self.shard_size)
        entries, parts, files = tuple(keep_all(base)), part_names(base), side_files(base)
        shards, _ = plan_shards(Plan(entries, parts, regroup=size), key="")
        rows = [{"path": s.file.relative, "bytes": s.file.size, "tensors": len(s.entries)} for s in shards]
        before = sum(len(part.files) for part in base.parts.values())
        report = {"files": {"before": before, "after": len(rows)}, "shards": rows}
        return Plan(entries, parts, files, report=report, regroup=size)

    def run(self, task: Compute, tensors: list[Any], generator: Any) -> Any:
        """Nothing is ever computed."""
        raise AssertionError(task.name)

    def describe(self, plan: Plan) -> list[str]:
        """Lines of a dry run."""
        files = plan.report["files"]
        largest = max((row["bytes"] for row in plan.report["shards"]), default=0)
        return [f"files    {files['before']:,} -> {files['after']:,}, the largest of {largest:,} bytes"]
