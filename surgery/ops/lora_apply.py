"""Apply a LoRA: W + s B A for every weight that an adapter in PEFT's format names.

Inputs: a model and an adapter folder. Changes: the adapted weights, in the model's dtype and files; nothing else.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from surgery.arch.carried import indexes, part_names, side_files
from surgery.errors import UsageError
from surgery.graph.op import Compute, Entry, Keep, Param, Plan, PlanContext
from surgery.graph.planned import Planned
from surgery.store.checkpoint import Checkpoint


@dataclass(frozen=True)
class LoraApply:
    """Merge a LoRA adapter into its model, as PEFT's merge_and_unload does.

    Example:  surgery lora apply ./base-llm out/adapter -o out/merged
    """

    scale: Annotated[float, Param("Factor beside the adapter's own alpha / r.")] = 1.0

    name: ClassVar[str] = "lora-apply"
    version: ClassVar[int] = 1
    parents: ClassVar[int] = 2
    parent_names: ClassVar[tuple[str, ...]] = ("MODEL", "ADAPTER")
    trainer: ClassVar[str | None] = None

    def plan(self, ctx: PlanContext, model: Checkpoint, adapter: Checkpoint) -> Plan:
        """The adapted weights computed, everything else kept."""
        from surgery.arch.merging.adapters import open_adapter
        from surgery.arch.merging.numbers.formulas import Formula
        from surgery.arch.merging.pair import SCRATCH, Task, plain_model

        plain_model(model)
        found = open_adapter(adapter, model)
        if not self.scale:
            raise UsageError("scale", "--scale 0: nothing would change", hint="--scale 1")
        entries: list[Entry] = []
        for name, ref in model.tensors.items():
            if not found.touches(name):
                entries.append(Keep(name=name, dtype=ref.dtype, shape=ref.shape, ref=ref))
                continue
            a, b = found.factors(name)
            delta = (0, 1, self.scale * found.scale_of(name), found.transposed)
            task = Task(name, Formula("linear", (1.0,)), deltas=(delta,))
            entries.append(
                Compute(
                    name=name,
                    dtype=ref.dtype,
                    shape=ref.shape,
                    how=task,
                    refs=(ref, a, b),
                    sources=(0, 1, 1),
                    streamed=True,
                    scratch=SCRATCH + 2 * (a.nbytes + b.nbytes),
                )  # fmt: skip
            )
        mirrored = model.layout in ("hf", "file") and not isinstance(model, Planned)
        report = {"adapter": adapter.name, "weights": len(found.pairs), "rank": found.config.get("r")}
        return Plan(
            tuple(entries),
            part_names(model),
            (*side_files(model), *(indexes(model) if mirrored else ())),
            report=report,
            mirror=model if mirrored else None,
        )

    def stream(self, task: Compute, readers: list[Any], seed: int) -> Iterator[memoryview]:
        """One adapted weight, in pieces."""
        from surgery.arch.merging.tasks import stream_task

        return stream_task(task, readers, seed)

    def tensor_params(self, task: Compute) -> list[Any] | None:
        """What one tensor depends on beside its inputs."""
        from surgery.arch.merging.tasks import task_params

        return task_params(task)

    def run(self, task: Compute, tensors: list[Any], generator: Any) -> Any:
        """Weights are streamed."""
        raise AssertionError(task.name)

    def describe(self, plan: Plan) -> list[str]:
        """Lines of a dry run."""
        report = plan.report
        return [f"adapter  {report['adapter']}, rank {report['rank']}, {report['weights']:,} weights"]
