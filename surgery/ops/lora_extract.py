"""Extract a LoRA: the difference of two models as an adapter of low rank, in PEFT's format.

For every weight matrix of the layers that differs, the best B A of the given rank for W - base (Eckart and Young 1936).
Inputs: the model and what it came from. Changes: nothing in them; the output is an adapter folder.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from surgery.arch.blocks import block_lists, split_block
from surgery.arch.language.families import family_of
from surgery.arch.merging.adapters import CONFIG, PREFIX, factorise
from surgery.arch.merging.card import short_name
from surgery.arch.patterns import matcher, nearest
from surgery.errors import CheckpointError, UsageError, printable
from surgery.graph.op import Compute, Entry, Param, PartNames, Plan, PlanContext, SideFile
from surgery.store.checkpoint import Checkpoint
from surgery.store.header import nbytes_of

_FLOATS = ("BF16", "F16", "F32", "F64")
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # Conv1D: weights lie [in, out]


@dataclass(frozen=True)
class LoraExtract:
    """Make a LoRA adapter of the difference between MODEL and BASE.

    The adapter holds the weight matrices of numbered layers whose bytes differ; PEFT loads it on BASE, and
    `surgery lora apply` or `model+adapter` in a mergekit file merge it.

    Example:  surgery lora extract ./math-llm ./base-llm --rank 32 -o out/adapter
    """

    rank: Annotated[int, Param("Rank of every product B A.", ("-r",))] = 16
    only: Annotated[tuple[str, ...], Param("These weights alone, repeatable: *q_proj*, /regex/.", (), "PATTERN")] = ()

    name: ClassVar[str] = "lora-extract"
    version: ClassVar[int] = 2
    parents: ClassVar[int] = 2
    parent_names: ClassVar[tuple[str, ...]] = ("MODEL", "BASE")
    trainer: ClassVar[str | None] = None

    def plan(self, ctx: PlanContext, model: Checkpoint, base: Checkpoint) -> Plan:
        """Two factors for every matrix that differs."""
        if self.rank < 1:
            raise UsageError("rank", f"--rank {self.rank}: at least 1", hint="--rank 16")
        chosen, warnings = self._chosen(model, base)
        config = model.part().config or {}
        seeing = family_of(config) is not None
        transposed = config.get("model_type") in _TRANSPOSED
        modules = _modules(model, chosen, seeing)
        entries: list[Entry] = []
        for name in chosen:
            one, two = model.tensors[name], base.tensors[name]
            rank = min(self.rank, *one.shape)
            rows, columns = one.shape[::-1] if transposed else one.shape
            for factor, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                entries.append(
                    Compute(
                        name=f"{PREFIX}{modules[name]}.lora_{factor}.weight",
                        dtype="F32",
                        shape=shape,
                        how=(factor, rank, transposed),
                        refs=(one, two),
                        sources=(0, 1),
                        scratch=4 * nbytes_of("F32", one.shape),
                    )  # fmt: skip
                )
        small = {modules[n]: min(model.tensors[n].shape) for n in chosen if min(model.tensors[n].shape) < self.rank}
        adapter = {
            "peft_type": "LORA", "task_type": None if seeing else "CAUSAL_LM", "r": self.rank, "lora_alpha": self.rank,
            "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": transposed, "inference_mode": True,
            "init_lora_weights": True, "base_model_name_or_path": short_name(base), "modules_to_save": None,
            "target_modules": sorted(modules.values()), "rank_pattern": small, "alpha_pattern": dict(small),
        }  # fmt: skip
        files = (SideFile(CONFIG, content=(json.dumps(adapter, indent=2) + "\n").encode()),)
        full = sum(nbytes_of(model.tensors[n].dtype, model.tensors[n].shape) for n in chosen)
        report = {"rank": self.rank, "matrices": len(chosen), "bytes_of_matrices": full}
        return Plan(tuple(entries), (PartNames("", "adapter_model"),), files, warnings=warnings, report=report)

    def run(self, task: Compute, tensors: list[Any], generator: Any) -> Any:
        """One factor; both are cut from the same decomposition, which is made for each."""
        one, two = tensors
        factor, rank, transposed = task.how
        delta = one.double() - two.double()
        a, b = factorise(delta.T if transposed else delta, rank, seed=0)
        return a if factor == "A" else b

    def describe(self, plan: Plan) -> list[str]:
        """Lines of a dry run."""
        report = plan.report
        return [
            f"adapter  rank {report['rank']}, {report['matrices']:,} matrices of {report['bytes_of_matrices']:,} bytes"
        ]

    def _chosen(self, model: Checkpoint, base: Checkpoint) -> tuple[list[str], tuple[str, ...]]:
        """Matrices of layers that both have and that differ; and what else differs, as a warning."""
        prefixes = [b.prefix for b in block_lists(model.part().tensors)]
        fits = [matcher(pattern) for pattern in self.only]
        names = [
            n
            for n, ref in model.part().tensors.items()
            if n.endswith(".weight")
            and len(ref.shape) == 2
            and ref.dtype in _FLOATS
            and any(split_block(n, p) for p in prefixes)
        ]
        wanted = [n for n in names if not fits or any(f(n) for f in fits)]
        if not wanted:
            hint = nearest(self.only[0], names) if self.only and names else "see surgery inspect --tensors"
            raise UsageError("unmatched", f"{model.name}: no weight matrix in its layers fits", hint=hint)
        for name in wanted:
            if name not in base.tensors or base.tensors[name].shape != model.tensors[name].shape:
                raise CheckpointError(
                    "incompatible",
                    f"{base.name} has no '{printable(name)}' of shape {list(model.tensors[name].shape)}",
                    hint="the base must be what the model came from",
                )
        known = model.tensor_digests, base.tensor_digests
        found = [n for n in wanted if known[0][n] != known[1][n] or model.tensors[n].dtype != base.tensors[n].dtype]
        if not found:
            raise CheckpointError("equal", f"{model.name} and {base.name} do not differ there", hint="name two models")
        if self.only:
            return found, ()
        rest = [n for n in model.tensors if n not in found and known[0][n] != known[1].get(n)]
        if not rest:
            return found, ()
        more = f" and {len(rest) - 1:,} more tensors" if len(rest) > 1 else ""
        said = f"'{printable(rest[0])}'{more} differ too and are not in the adapter, which holds matrices of layers"
        return found, (said,)


def _modules(model: Checkpoint, weights: Sequence[str], seeing: bool) -> dict[str, str]:
    """What PEFT calls the module of each weight: its name in memory, which in vision-language models is another one."""
    names: dict[str, str] = {}
    if seeing:
        from surgery.arch.language.exact import names_in_memory

        names = names_in_memory(model)
    return {weight: names.get(weight, weight).removesuffix(".weight") for weight in weights}
