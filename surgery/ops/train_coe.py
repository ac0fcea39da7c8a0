"""Train-coe: train a Chain-of-Experts, and under the same budget the model that it was converted from.

Paper: Chain-of-Experts, arXiv 2506.18945, "Experimental details", for models from scratch; for converted ones routers
and gates first, then all weights or LoRA. Inputs: a chain (and, if wanted, another model to compare with), a plain
mixture of experts, or none with `arch`. Changes: values of tensors; names, shapes and files stay.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, ClassVar

from surgery.arch.carried import FLOATS, kept, part_names, side_files
from surgery.arch.moe import layouts
from surgery.arch.moe.families import chain_family, family_of, find_experts
from surgery.data.text import source_digest
from surgery.errors import UsageError, closest
from surgery.graph.op import Compute, Entry, Param, PartNames, Plan, PlanContext, SideFile, Trained, json_bytes
from surgery.store.checkpoint import Checkpoint


@dataclass(frozen=True)
class TrainCoe:
    """Train a Chain-of-Experts; the report always has the unconverted model under the same budget.

    Examples:

      surgery train coe coe --data stdlib --gate-steps 50 --steps 200 --lr 1e-3 -o out/trained

      surgery train coe coe --data notes.txt --gate-steps 300 --steps 1000 --lora 16 -o out/trained

      surgery train coe --arch coe-tiny --baseline qwen3-moe-tiny --steps 100 --lr 3e-3 -o out/scratch

    Stage A (--gate-steps) trains routers of further passes and the gates alpha and beta alone, without weight decay;
    stage B (--steps) all weights, or LoRA. A plain mixture of experts is trained as it is. Both stages run on
    Transformers' trainer, that is on accelerate.
    """

    data: Annotated[str, Param("stdlib (Python's sources), a text file, or a .json/.jsonl file of rows.")] = "stdlib"
    format_: Annotated[str, Param("Text of a row, by its fields.", (), "TEXT")] = (
        "query : {query} response : {response}"
    )
    tokenizer: Annotated[str | None, Param("Folder or hub id with a tokenizer [default: the model's, else bytes].")] = (
        None
    )
    arch: Annotated[str | None, Param("Train this architecture from scratch: coe-544m, coe-tiny, moe-544m.")] = None
    set_: Annotated[tuple[str, ...], Param("Another value of its config, repeatable.", (), "KEY=VALUE")] = ()
    baseline: Annotated[str | None, Param("Architecture to compare with, where --arch is a chain: moe-544m.")] = None
    gate_steps: Annotated[int, Param("Stage A: steps on routers and gates.")] = 0
    gate_lr: Annotated[float, Param("Stage A: learning rate.")] = 5e-4
    steps: Annotated[int, Param("Stage B: steps on all weights, or LoRA.")] = 0
    lr: Annotated[float, Param("Stage B: learning rate.")] = 1e-4
    lora: Annotated[int, Param("Stage B: rank of LoRA on linear layers; 0 trains all weights.")] = 0
    batch: Annotated[int, Param("Sequences of a step on the device.")] = 8
    accumulate: Annotated[int, Param("Batches added up in one step.")] = 1
    length: Annotated[int, Param("Tokens of a sequence.")] = 64
    warmup: Annotated[float, Param("Share of the steps with a rising learning rate; constant after.")] = 0.1
    decay: Annotated[float, Param("Weight decay of matrices; never of gates.")] = 0.01
    beta2: Annotated[float, Param("AdamW's second beta.")] = 0.95
    clip: Annotated[float, Param("Largest global gradient norm.")] = 1.0
    held_out: Annotated[int, Param("Sequences held out, on which losses are measured.")] = 100
    dtype: Annotated[str, Param("Weights while training: float32 (bfloat16 autocast on a GPU), bfloat16.")] = "float32"
    save_every: Annotated[int, Param("Steps between resumable states; 0 for none.")] = 500
    slow: Annotated[bool, Param("Train a large model on a CPU all the same.")] = False

    name: ClassVar[str] = "train-coe"
    version: ClassVar[int] = 1
    parents: ClassVar[tuple[int, int | None]] = (0, 2)
    trainer: ClassVar[str | None] = "surgery.train.coe.run:train"

    def plan(self, ctx: PlanContext, *parents: Checkpoint) -> Plan:
        """Every tensor of the model; those that no stage trains stay as they are."""
        self._check()
        if self.arch is not None:
            return self._from_scratch(parents)
        if self.set_ or self.baseline:
            raise UsageError(
                "arch", "--set and --baseline belong to --arch", hint="a model to compare with is a second MODEL"
            )
        if not parents:
            raise UsageError("parents", "train coe needs a model, or --arch", hint="surgery train coe --help")
        base, part = parents[0], parents[0].part()
        family = chain_family(base.config)
        if family is None:
            family_of(base.config, base.name)
        bad = next((n for n, r in part.tensors.items() if r.dtype not in FLOATS.values()), None)
        if bad is not None:
            raise UsageError("quantised", f"{base.name}: '{bad}' is quantised", hint="train the unquantised model")
        entries: list[Entry] = []
        for name, ref in part.tensors.items():
            if self.steps or (".coe_" in name if family else name.endswith(("gate.weight", "router.weight"))):
                entries.append(Trained(part=part.name, name=name, dtype=ref.dtype, shape=ref.shape))
            else:
                entries.append(kept(part, name, ref))
        plain = None if family else find_experts(base.config, part.tensors, base.name)
        report = {
            "parameters": sum(prod(r.shape) for r in part.tensors.values()),
            "chain": family is not None,
            "fused": plain.fused if plain else any(n.endswith(".experts.gate_up_proj") for n in part.tensors),
            "baseline": (parents[1].name if len(parents) > 1 else "the model inside the chain") if family else None,
            **self._budget(),
        }
        new_file = None if self.steps else "model-coe"
        return Plan(
            tuple(entries),
            part_names(base),
            side_files(base),
            report=report,
            inputs=source_digest(self.data),
            new_file=new_file,
        )

    def run(self, task: Compute, tensors: list[Any], generator: Any) -> Any:
        """Nothing is computed tensor by tensor."""
        raise AssertionError(task.name)

    def config(self) -> dict[str, Any] | None:
        """The config of `arch` with what --set changes; None without `arch`."""
        return layouts.set_fields(layouts.MODELS[self.arch], self.set_) if self.arch is not None else None

    def describe(self, plan: Plan) -> list[str]:
        """Lines of a dry run."""
        r = plan.report
        lines = [f"parameters {r['parameters']:,}", f"stage A    {r['gate_steps']:,} steps of routers and gates"]
        lines.append(f"stage B    {r['steps']:,} steps of {'LoRA' if self.lora else 'all weights'}")
        lines.append(f"each step  {r['tokens_per_step']:,} tokens")
        if r["baseline"]:
            lines.append(f"baseline   {r['baseline']}, the same steps")
        return lines

    def summary(self, training: Mapping[str, Any]) -> list[str]:
        """Losses of both models, for the reader of a finished run."""
        loss = training["val_loss"]
        lines = [f"held-out loss {loss['start']:.4f} -> {loss['end']:.4f} nats a token"]
        if "baseline" in training:
            other = training["baseline"]["val_loss"]
            word = "better" if training["gain"] > 0 else "worse"
            lines.append(
                f"unconverted, same budget {other['start']:.4f} -> {other['end']:.4f}: the chain is "
                f"{abs(training['gain']):.4f} {word}"
            )
        return lines

    def _from_scratch(self, parents: tuple[Checkpoint, ...]) -> Plan:
        if parents:
            raise UsageError("arch", "--arch trains from scratch and takes no model", hint="leave one of them out")
        known = list(layouts.MODELS)
        for option, value in (("--arch", self.arch), ("--baseline", self.baseline)):
            if value is not None and value not in known:
                raise UsageError("unknown-architecture", f"{option} {value}: unknown", hint=closest(value, known))
        if self.gate_steps:
            raise UsageError("arch", "--gate-steps: nothing is known yet besides gates", hint="use --steps with --arch")
        config = self.config()
        assert config is not None
        chain = chain_family(config) is not None
        if chain and self.baseline is None:
            raise UsageError(
                "no-baseline",
                f"--arch {self.arch}: a chain is reported beside a plain model under the same budget",
                hint="add --baseline moe-544m, or another mixture of experts",
            )
        values = layouts.initial_values(config)
        files = [SideFile("config.json", content=json_bytes({**config, "dtype": "float32"}))]
        files += [SideFile(n, content=text) for n, text in layouts.modeling_files(config).items()]
        report = {
            "parameters": sum(prod(v.shape) for v in values.values()),
            "chain": chain,
            "fused": False,
            "baseline": self.baseline,
            **self._budget(),
        }
        entries = tuple(Trained(name=n, dtype="F32", shape=v.shape) for n, v in values.items())
        parts = (PartNames("", "model"),)
        return Plan(entries, parts, tuple(files), report=report, inputs=source_digest(self.data))

    def _budget(self) -> dict[str, int]:
        tokens = self.batch * self.accumulate * self.length
        return {"gate_steps": self.gate_steps, "steps": self.steps, "tokens_per_step": tokens}

    def _check(self) -> None:
        processes = os.environ.get("WORLD_SIZE", "1")
        if processes not in ("", "1"):
            raise UsageError(
                "several-processes",
                f"train coe runs in one process, and this launch has {processes}",
                hint="start it without a launcher; a chain also trains in a script of yours with TRL or Transformers, "
                "which accelerate launch or torchrun may start many times",
            )
        ranges = {
            "0 or more": (("gate_steps", "steps", "lora", "decay", "save_every"), lambda v: v >= 0),
            "1 or more": (("batch", "accumulate", "held_out"), lambda v: v >= 1),
            "2 or more": (("length",), lambda v: v >= 2),
            "above 0": (("lr", "gate_lr", "clip"), lambda v: v > 0),
            "from 0 to below 1": (("warmup", "beta2"), lambda v: 0 <= v < 1),
        }
        for words, (names, fits) in ranges.items():
            for name in names:
                if not fits(getattr(self, name)):
                    flag = f"--{name.replace('_', '-')}"
                    raise UsageError("bad-option", f"{flag} {getattr(self, name)}: out of range", hint=words)
        if not self.steps and not self.gate_steps:
            raise UsageError("no-steps", "nothing to train: no --steps and no --gate-steps", hint="add --steps 200")
        if self.lora and not self.steps:
            raise UsageError("bad-option", "--lora belongs to stage B, which has no steps", hint="add --steps 200")
        if self.dtype not in ("float32", "bfloat16"):
            raise UsageError("dtype", f"--dtype {self.dtype}: unknown", hint="float32 or bfloat16")
