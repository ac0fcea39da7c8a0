"""Train-diffusion: train a diffusion transformer with its own loss, from random weights or as it is.

Losses as in DiT (arXiv 2212.09748) and stage 2 of Grafting (arXiv 2506.05340, section 3.2). Inputs: one checkpoint.
Changes: every trained tensor; the weights kept are their moving average.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from surgery.arch.dit.checkpoints import check_tensors, scheduler_config, transformer_part
from surgery.arch.dit.config import family
from surgery.data.identity import data_digest
from surgery.errors import UsageError
from surgery.graph.op import Compute, Entry, Keep, Param, PartNames, Plan, PlanContext, SideFile, Trained
from surgery.store.checkpoint import Checkpoint


@dataclass(frozen=True)
class TrainDiffusion:
    """Train or finetune a diffusion transformer with its own loss.

    Example:  surgery train diffusion dit-digits --data digits --steps 200 --lr 3e-4 -o out/longer
    """

    data: Annotated[str, Param("Images: digits, fashion, folder:PATH, npz:PATH, latents:PATH.")]
    steps: Annotated[int, Param("Optimiser steps.")]
    batch: Annotated[int, Param("Images of a step.")] = 64
    lr: Annotated[float, Param("Peak learning rate.")] = 3e-4
    schedule: Annotated[str, Param("constant or cosine, after the warm-up.")] = "constant"
    warmup: Annotated[int, Param("Warm-up steps.")] = 20
    weight_decay: Annotated[float, Param("AdamW's decay.")] = 0.0
    clip: Annotated[float, Param("Largest global gradient norm.")] = 10.0
    ema: Annotated[float, Param("Decay of the weight average that is kept, warmed up on short runs.")] = 0.99
    label_dropout: Annotated[float, Param("Share of samples trained without their label.")] = 0.1
    val_every: Annotated[int, Param("Steps between held-out losses; 0 for none.")] = 100

    name: ClassVar[str] = "train-diffusion"
    version: ClassVar[int] = 1
    parents: ClassVar[int] = 1
    trainer: ClassVar[str | None] = "surgery.train.diffusion:train"

    def plan(self, ctx: PlanContext, base: Checkpoint) -> Plan:
        """Every tensor of the transformer is trained; other parts and files are kept."""
        part, config = transformer_part(base)
        if family(config, base.name).name == "pixart":
            raise UsageError(
                "text-model", f"{base.name}: needs text states, which --data does not hold", hint="use its own trainer"
            )
        if self.steps < 1:
            raise UsageError("steps", f"--steps {self.steps}: at least 1", hint="for example --steps 200")
        check_tensors(base, part, config)
        scheduler_config(base)
        entries: list[Entry] = []
        for other in base.parts.values():
            for name, ref in other.tensors.items():
                where = {"part": other.name, "name": name, "dtype": ref.dtype, "shape": ref.shape}
                entries.append(Trained(**where) if other is part else Keep(**where, ref=ref))
        files = tuple(SideFile(n, source=str(base.root / n)) for n in base.side_files)
        names = tuple(PartNames(p.name, p.base) for p in base.parts.values())
        report = {"steps": self.steps, "batch": self.batch, "lr": self.lr}
        return Plan(tuple(entries), names, files, report=report, inputs={"data": data_digest(self.data)})

    def run(self, task: Compute, tensors: list[Any], generator: Any) -> Any:
        """Nothing is computed tensor by tensor."""
        raise AssertionError("train-diffusion plans no computed tensors")
