"""The training half of `train diffusion`."""

from typing import TYPE_CHECKING

from surgery.arch.dit.build import model_from_state
from surgery.arch.dit.checkpoints import load_model, scheduler_config, transformer_part
from surgery.arch.dit.diffusion import NoiseSchedule, heldout_loss
from surgery.graph.op import Plan, TrainContext, TrainResult
from surgery.store.checkpoint import Checkpoint
from surgery.train.finetune import FinetuneSettings, finetune
from surgery.train.grafting.graft import images_for, refuse_non_finite

if TYPE_CHECKING:
    from surgery.ops.train_diffusion import TrainDiffusion


def train(op: "TrainDiffusion", ctx: TrainContext, plan: Plan, base: Checkpoint) -> TrainResult:
    """Train all parameters; returns the averaged weights, and the curve of held-out losses as record."""
    part, config = transformer_part(base)
    images = images_for(op.data, config)
    schedule = NoiseSchedule.from_config(scheduler_config(base))
    result = finetune(
        load_model(base).float().to(ctx.device),
        images,
        schedule,
        FinetuneSettings(
            steps=op.steps,
            batch=op.batch,
            lr=op.lr,
            warmup=op.warmup,
            schedule=op.schedule,
            weight_decay=op.weight_decay,
            clip=op.clip,
            ema=op.ema,
            label_dropout=op.label_dropout,
            seed=ctx.seed,
            val_every=op.val_every,
            save_every=max(1, op.steps // 10),
        ),
        report=ctx.report,
        resume_folder=ctx.scratch / "train",
    )
    loss = result.val
    if loss is None:
        # Without held-out losses on the way nobody has looked at the last weights yet.
        few = (rows[:64] for rows in images.train)
        loss = heldout_loss(model_from_state(config, result.ema), schedule, *few, seed=0, n_draws=1)[0]
    refuse_non_finite(result.ema, loss, "lower the learning rate or raise the warm-up")
    lead = f"{part.name}/" if part.name else ""
    curve = [
        {k: h[k] for k in ("step", "loss", "val") if k in h}
        for h in result.history
        if "val" in h or h["step"] == op.steps
    ]
    record = {
        "data": images.name,
        "data_digest": images.digest,
        "images": len(images.train.images),
        "val_loss": result.val,
        "curve": curve,
    }
    return TrainResult({lead + n: t for n, t in result.ema.items() if lead + n in _names(plan)}, record)


def _names(plan: Plan) -> set[str]:
    return {e.full_name for e in plan.entries}
