"""Init: a checkpoint of a known architecture with random weights, as its constructor would draw them.

Inputs: none. Each tensor is drawn from its own seeded generator and written as it comes; the model is never in memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, ClassVar

from surgery.arch.architectures import ARCHITECTURES
from surgery.arch.dit.config import initial_values
from surgery.arch.moe import layouts
from surgery.arch.sources import Source
from surgery.errors import UsageError, closest
from surgery.graph.op import Compute, Param, PartNames, Plan, PlanContext, SideFile, json_bytes
from surgery.store.header import DTYPE_BITS

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_WORDS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Init:
    """Make a checkpoint of a known architecture with random weights.

    For benchmarks, dry runs and training from scratch; the shape of the published model, none of its knowledge.

    Examples:

      surgery init dit-xl-2 -o big

      surgery init qwen3-moe-tiny -o moe

      surgery init coe-544m --set coe_iterations=2 --set coe_topk=[8,8] --dry-run
    """

    arch: Annotated[
        str, Param(f"One of {', '.join((*ARCHITECTURES, *layouts.MODELS))}.", positional=True, metavar="ALIAS")
    ]
    dtype: Annotated[str, Param("float32, bfloat16 or float16.")] = "float32"
    set_: Annotated[
        tuple[str, ...], Param("Another value of a language model's config, repeatable.", (), "KEY=VALUE")
    ] = ()

    name: ClassVar[str] = "init"
    version: ClassVar[int] = 1
    parents: ClassVar[int] = 0
    trainer: ClassVar[str | None] = None

    def plan(self, ctx: PlanContext) -> Plan:
        """All tensors of the architecture, each to be drawn."""
        if self.dtype not in _DTYPES:
            raise UsageError("dtype", f"--dtype {self.dtype}: unknown", hint="float32, bfloat16 or float16")
        if self.arch in layouts.MODELS:
            return self._language_model()
        known = ARCHITECTURES.get(self.arch)
        if known is None:
            raise UsageError(
                "unknown-architecture",
                f"no architecture '{self.arch}'",
                hint=closest(self.arch, [*ARCHITECTURES, *layouts.MODELS]),
            )
        if self.set_:
            raise UsageError("set", f"--set {self.set_[0]}: {self.arch} has no fields to set", hint="leave it out")
        values = initial_values(known.transformer)
        files = (
            SideFile("config.json", content=json_bytes(known.transformer)),
            SideFile("scheduler_config.json", content=json_bytes(known.scheduler)),
        )
        return self._plan(values, files, "diffusion_pytorch_model", {})

    def _language_model(self) -> Plan:
        config = layouts.set_fields(layouts.MODELS[self.arch], self.set_)
        values = layouts.initial_values(config)
        files = [SideFile("config.json", content=json_bytes({**config, "dtype": _WORDS[_DTYPES[self.dtype]]}))]
        files += [SideFile(name, content=text) for name, text in layouts.modeling_files(config).items()]
        more = {"parameters_without_embeddings": layouts.without_embeddings(values)}
        return self._plan(values, tuple(files), "model", more)

    def _plan(
        self, values: Mapping[str, Source], files: tuple[SideFile, ...], base: str, more: Mapping[str, int]
    ) -> Plan:
        dtype = _DTYPES[self.dtype]
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
        total = sum(prod(v.shape) for v in values.values())
        report = {"architecture": self.arch, "parameters": total, "tensors": len(entries), **more}
        warning = f"{self.arch}: random weights; the shape of the model and nothing it knows"
        return Plan(entries, (PartNames("", base),), files, warnings=(warning,), report=report)

    def run(self, task: Compute, tensors: list[Any], generator: Any) -> Any:
        """Draw one tensor."""
        source: Source = task.how
        return source.evaluate({}, generator)

    def describe(self, plan: Plan) -> list[str]:
        """Lines of a dry run."""
        report = plan.report
        inner = report.get("parameters_without_embeddings")
        more = f", {inner:,} ({inner / 2**20:.2f} Mi) without embeddings" if inner is not None else ""
        return [f"{report['architecture']}   {report['parameters']:,} parameters{more}"]
