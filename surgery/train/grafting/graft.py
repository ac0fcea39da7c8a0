"""The training half of `graft`: stage 1 on every new operator, stage 2 on the whole model.

Called by the executor for an operation whose plan holds trained tensors; returns them all, and a record of losses.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.arch.dit import config as dit
from surgery.arch.dit.build import model_from_state
from surgery.arch.dit.checkpoints import load_model, scheduler_config, transformer_part
from surgery.arch.dit.diffusion import NoiseSchedule, heldout_loss
from surgery.arch.dit.grafts import parse_replacements
from surgery.arch.dit.operators import OPERATORS
from surgery.data.images import ImageSet, check_fits, load_images
from surgery.errors import NonFiniteLoss, UsageError
from surgery.graph.op import Plan, TrainContext, Trained, TrainResult
from surgery.store.checkpoint import Checkpoint
from surgery.train.finetune import FinetuneSettings, finetune
from surgery.train.grafting.capture import Tap
from surgery.train.grafting.distill import LOSS_OF_KIND, distill
from surgery.train.grafting.student import DistillSettings, Target
from surgery.train.optim import generator_for

if TYPE_CHECKING:
    from surgery.ops.graft import Graft

_GATES = {"attn": 1, "mlp": 4}  # place of gate_a and gate_m among the outputs of norm1 in an adaLN-Zero block


def train(op: "Graft", ctx: TrainContext, plan: Plan, base: Checkpoint) -> TrainResult:
    """Carry out the stages that `op` asks for; the record holds the settings after presets.

    Raises what the stages raise, and `NonFiniteLoss` when the result's held-out loss or weights are not finite.
    """
    part, config = transformer_part(base)
    settings = op.settings(plan.report["params"]["before"])
    images = images_for(str(op.data), config)
    schedule = NoiseSchedule.from_config(scheduler_config(base))
    teacher = load_model(base).float().to(ctx.device)
    entries = parse_replacements(op.replace, op.layers, config)
    operators = _start(op, base, entries, config, ctx.seed)
    record: dict[str, Any] = {"data": images.name, "data_digest": images.digest, "images": len(images.train.images)}
    record["settings"] = settings
    if op.distils:
        operators = _stage1(op, ctx, entries, operators, teacher, images, schedule, settings, record)
    state = {n: t for n, t in teacher.state_dict().items() if not _replaced(n, entries)}
    for entry, operator in zip(entries, operators, strict=True):
        prefix = dit.slot_prefix(entry.block, entry.slot)
        state |= {prefix + n: t.to(ctx.device) for n, t in operator.state_dict().items()}
    edited = dit.grafted_config(config, entries)
    if op.finetune_steps:
        state = _stage2(op, ctx, edited, state, teacher, images, schedule, settings, record)
    student = model_from_state(edited, {n: t.detach().clone() for n, t in state.items()}, where=base.name).to(
        ctx.device
    )
    x_val, y_val = images.val
    if len(x_val):
        record["val_loss"] = heldout_loss(student, schedule, x_val[:1024], y_val[:1024], seed=0)[0]
        record["val_loss_original"] = heldout_loss(teacher, schedule, x_val[:1024], y_val[:1024], seed=0)[0]
    refuse_non_finite(state, record.get("val_loss"), "lower the learning rate of the last stage")
    lead = f"{part.name}/" if part.name else ""
    wanted = {e.name for e in plan.entries if isinstance(e, Trained)}
    return TrainResult({lead + n: t.detach().cpu() for n, t in state.items() if n in wanted}, record)


def refuse_non_finite(state: Mapping[str, Tensor], loss: float | None, hint: str) -> None:
    """Raise `NonFiniteLoss` for weights that no step has seen fail: those after the last one."""
    if loss is not None and not math.isfinite(loss):
        raise NonFiniteLoss("non-finite-loss", f"the held-out loss after the last step is {loss}", hint=hint)
    bad = next((n for n, t in state.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())), None)
    if bad is not None:
        raise NonFiniteLoss("non-finite-weights", f"after the last step '{bad}' holds NaN or infinity", hint=hint)


def images_for(spec: str, config: Mapping[str, Any]) -> ImageSet:
    """The images that `spec` names, made to fit the model where they can be; raises UsageError where they cannot."""
    channels = config.get("in_channels")
    if spec.startswith("folder:") and channels not in (1, 3):
        raise UsageError(
            "data-misfit",
            f"{spec}: pictures have 1 or 3 channels, and the model takes latents of {channels}",
            hint="encode the images with its VAE and give latents:PATH",
        )
    if spec.startswith("folder:"):
        images = load_images(spec, size=config.get("sample_size"), channels=channels)
    else:
        images = load_images(spec)
    check_fits(images, config)
    return images


def _start(
    op: "Graft", base: Checkpoint, entries: Sequence[dit.Graft], config: Mapping[str, Any], seed: int
) -> list[nn.Module]:
    """Every new operator with its first weights, drawn or copied as `op` says."""
    part, _ = transformer_part(base)
    dims = dit.Dims.from_config(config)
    before = {(e.block, e.slot): (e.op, e.args) for e in dit.grafts(config)}
    made = []
    for entry in entries:
        prefix = dit.slot_prefix(entry.block, entry.slot)
        refs = {n.removeprefix(prefix): r for n, r in part.tensors.items() if n.startswith(prefix)}
        starts = op.starts(entry, {n: r.shape for n, r in refs.items()}, before.get((entry.block, entry.slot)), dims)
        generator = generator_for(seed, f"graft-{prefix}", 0)
        state: dict[str, Tensor] = {}
        for name, source in starts.items():
            inputs = {n: base.read_ref(refs[n]).float() for n in source.sources}
            state[name] = source.evaluate(inputs, generator).float()
        with torch.device("meta"):
            module = OPERATORS[entry.op].build(**dims.place, **entry.args)
        module.load_state_dict(state, strict=True, assign=True)
        made.append(module)
    return made


def _stage1(
    op: "Graft",
    ctx: TrainContext,
    entries: Sequence[dit.Graft],
    operators: Sequence[nn.Module],
    teacher: nn.Module,
    images: ImageSet,
    schedule: NoiseSchedule,
    settings: Mapping[str, Any],
    record: dict[str, Any],
) -> list[nn.Module]:
    targets = []
    trained = [i for i, o in enumerate(operators) if any(True for _ in o.parameters())]  # a no-op has nothing to learn
    for i in trained:
        entry = entries[i]
        norm = f"transformer_blocks.{entry.block}.norm1"
        tap = Tap(dit.slot_prefix(entry.block, entry.slot).rstrip("."), gate=(norm, _GATES[entry.slot]))
        targets.append(Target(tap, operators[i], LOSS_OF_KIND[entry.slot]))
    distilled = distill(
        teacher,
        targets,
        images,
        schedule,
        DistillSettings(
            samples=settings["samples"],
            steps=settings["steps"],
            batch=settings["batch"],
            lr=settings["lr"],
            loss=op.loss,
            capture=op.capture,
            val_samples=min(DistillSettings.val_samples, settings["samples"]),
            gate_weighted=op.gate_weighted,
            label_dropout=op.label_dropout,
            seed=ctx.seed,
            workers=ctx.workers,
        ),
        folder=ctx.scratch / "stage1",
        report=ctx.report,
    )
    results = list(operators)
    rows = []
    for i, result in zip(trained, distilled.values(), strict=True):
        results[i].load_state_dict(result.state_dict)
        entry = entries[i]
        curve = [{"step": h["step"], "rel_err": h["rel_err"]} for h in result.history]
        rows.append(
            {
                "block": entry.block,
                "slot": entry.slot,
                "op": entry.op,
                "rel_err": result.rel_err,
                "best_step": result.steps,
                "curve": curve,
            }
        )
    record["stage1"] = rows
    return results


def _stage2(
    op: "Graft",
    ctx: TrainContext,
    edited: Mapping[str, Any],
    state: Mapping[str, Tensor],
    teacher: nn.Module,
    images: ImageSet,
    schedule: NoiseSchedule,
    settings: Mapping[str, Any],
    record: dict[str, Any],
) -> dict[str, Tensor]:
    student = model_from_state(edited, {n: t.detach().clone() for n, t in state.items()}).to(ctx.device)
    result = finetune(
        student,
        images,
        schedule,
        FinetuneSettings(
            steps=op.finetune_steps,
            batch=settings["finetune_batch"],
            lr=settings["finetune_lr"],
            warmup=settings["warmup"],
            ema=settings["ema"],
            label_dropout=op.label_dropout,
            seed=ctx.seed,
            loss=op.finetune_loss,
            val_every=max(1, op.finetune_steps // 5),
            save_every=max(1, op.finetune_steps // 10),
        ),
        teacher=teacher if op.finetune_loss != "diffusion" else None,
        report=ctx.report,
        resume_folder=ctx.scratch / "stage2",
    )
    record["stage2"] = {
        "curve": [{k: h[k] for k in ("step", "loss", "val") if k in h} for h in result.history if "val" in h]
    }
    return result.ema


def _replaced(name: str, entries: Sequence[dit.Graft]) -> bool:
    return any(name.startswith(dit.slot_prefix(e.block, e.slot)) for e in entries)
