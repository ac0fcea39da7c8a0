"""Stage 2: light finetuning of a whole grafted diffusion transformer, and training a small one from scratch.

Grafting (arXiv 2506.05340, section 3.2): after every new operator was distilled alone, the assembled model is finetuned
on a small part of the data with the ordinary diffusion loss. AdamW, weight decay 0, linear warm-up to a constant 1e-4,
label dropout 0.1, and an exponential moving average whose weights are the ones to use. `loss="distill"` regresses the
frozen original's outputs instead, "both" adds the two.

A run is a pure function of (weights, images, schedule, settings): killed and resumed it ends in the same bits.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.arch.dit.diffusion import (
    NoiseSchedule,
    call_model,
    draw,
    drop_labels,
    freeze_label_dropout,
    heldout_loss,
    loss_terms,
    null_label,
)
from surgery.errors import NonFiniteLoss, UsageError
from surgery.train.optim import BatchOrder, Ema, check_settings, generator_for, learning_rate, weights_digest
from surgery.train.state import TrainingState

if TYPE_CHECKING:
    from surgery.data.images import ImageSet

Report = Callable[[str, Mapping[str, float]], None]


@dataclass(frozen=True)
class FinetuneSettings:
    """Defaults are the paper's (section 3.2): AdamW, warm-up to a constant rate, no weight decay, EMA.

    schedule "constant" or "cosine" (to 0); loss "diffusion", "distill" or "both" (diffusion + distill_weight *
    distill). val_every, save_every: steps between held-out losses and between resumable states, 0 for none. val_images
    bounds the held-out images used, val_draws the timesteps of each.
    """

    steps: int
    batch: int = 256
    lr: float = 1e-4
    warmup: int = 1000
    schedule: str = "constant"
    weight_decay: float = 0.0
    clip: float = 10.0
    ema: float = 0.9999
    label_dropout: float = 0.1
    seed: int = 0
    loss: str = "diffusion"
    distill_weight: float = 1.0
    val_every: int = 0
    val_images: int = 1024
    val_draws: int = 4
    save_every: int = 0

    def __post_init__(self) -> None:
        checks = {
            "steps": self.steps >= 0,
            "batch": self.batch >= 1,
            "lr": math.isfinite(self.lr) and self.lr > 0,
            "warmup": self.warmup >= 0,
            "schedule": self.schedule in ("constant", "cosine"),
            "weight_decay": self.weight_decay >= 0,
            "clip": self.clip > 0,
            "ema": 0 <= self.ema < 1,
            "label_dropout": 0 <= self.label_dropout <= 1,
            "seed": self.seed >= 0,
            "loss": self.loss in ("diffusion", "distill", "both"),
            "distill_weight": self.distill_weight >= 0,
            "val_every": self.val_every >= 0,
            "val_images": self.val_images >= 1,
            "val_draws": self.val_draws >= 1,
            "save_every": self.save_every >= 0,
        }
        check_settings("finetuning", self, checks)


@dataclass(frozen=True)
class FinetuneResult:
    """`ema` are the weights to use and `raw` the last ones, both complete state dicts on the CPU.

    `history`: one record per report: step, loss (mean since the record before), lr, grad_norm, and val (held-out loss
    of the EMA) where it was measured. `val` is the last of those, None without validation.
    """

    ema: dict[str, Tensor]
    raw: dict[str, Tensor]
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def val(self) -> float | None:
        """The last held-out loss, if any was measured."""
        return next((h["val"] for h in reversed(self.history) if "val" in h), None)


def finetune(
    model: nn.Module,
    images: "ImageSet",
    schedule: NoiseSchedule,
    settings: FinetuneSettings,
    *,
    teacher: nn.Module | None = None,
    report: Report | None = None,
    resume_folder: Path | None = None,
) -> FinetuneResult:
    """Train all parameters of `model` in place on `images.train`; returns EMA and raw weights and the loss curve.

    Labels are dropped once per sample; the model's own label dropout is switched off. `model` ends in eval mode with
    the raw weights. With `resume_folder`, a state is kept there every `save_every` steps, and a run that finds one made
    with the same weights, images, schedule and settings goes on from it to the same bits. A state is written only after
    its weights gave a finite loss.

    Raises UsageError (settings, teacher missing), CheckpointError (labels or sizes do not fit; a state of another run
    in `resume_folder`), NonFiniteLoss (the last good state stays in `resume_folder`), OutputError (cannot write).
    """
    from surgery.data.images import check_fits

    if settings.loss != "diffusion" and teacher is None:
        raise UsageError("no-teacher", f"the {settings.loss!r} finetuning loss needs the original model as teacher")
    config: Mapping[str, Any] = model.config  # type: ignore[assignment]
    check_fits(images, config)
    null = null_label(config)
    device = next(model.parameters()).device
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    if any(p.dtype != torch.float32 for p in parameters):
        raise UsageError("bad-dtype", "finetuning needs float32 weights: smaller steps are lost in shorter types")
    optimiser = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.999), weight_decay=settings.weight_decay)
    ema = Ema(parameters, settings.ema)
    history: list[dict[str, float]] = []
    start = 0
    state = None
    if resume_folder is not None:
        key = _run_key(model, images, schedule, settings)
        state = TrainingState(resume_folder, key)
        start = state.load(named, optimiser, history, ema)
    x_train, y_train = images.train
    x_val, y_val = images.val
    x_val, y_val = x_val[: settings.val_images], y_val[: settings.val_images]
    order = BatchOrder(len(x_train), settings.batch, seed=settings.seed)
    model.train()
    freeze_label_dropout(model)
    if teacher is not None:
        teacher.eval()
    since = list(state.since) if state is not None else []
    log_every = max(1, settings.steps // 100)
    for step in range(start, settings.steps):
        rate = learning_rate(
            step, peak=settings.lr, steps=settings.steps, warmup=settings.warmup, curve=settings.schedule
        )
        for group in optimiser.param_groups:
            group["lr"] = rate
        rows = order.indices(step)
        generator = generator_for(settings.seed, "finetune", step)
        labels = drop_labels(y_train[rows], settings.label_dropout, null, generator).to(device)
        loss = _loss(model, teacher, schedule, settings, x_train[rows].to(device), labels, generator)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise _non_finite("loss", value, step, state)
        # Here the weights are proven good: this is the state that a later non-finite loss leaves behind.
        if state is not None and settings.save_every and step % settings.save_every == 0 and step > start:
            state.save(step, named, optimiser, history, since, ema)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(parameters, settings.clip))
        if not math.isfinite(norm):
            raise _non_finite("gradient", norm, step, state)
        optimiser.step()
        ema.update(parameters, step)
        since.append(value)
        done = step + 1
        validate = bool(settings.val_every) and (done % settings.val_every == 0 or done == settings.steps)
        if validate or done % log_every == 0 or done == settings.steps:
            record = {"step": float(done), "loss": sum(since) / len(since), "lr": rate, "grad_norm": norm}
            since = []
            if validate and len(x_val):
                with _swapped(parameters, ema.values):
                    record["val"] = heldout_loss(
                        model, schedule, x_val, y_val, seed=settings.seed, n_draws=settings.val_draws
                    )[0]
            history.append(record)
            if report is not None:
                report("stage2", {"steps": settings.steps, **record})
    model.eval()
    raw = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    averaged = dict(raw)
    averaged.update({name: value.cpu().clone() for (name, _), value in zip(named, ema.values, strict=True)})
    return FinetuneResult(averaged, raw, history)


def _loss(
    model: nn.Module,
    teacher: nn.Module | None,
    schedule: NoiseSchedule,
    settings: FinetuneSettings,
    x_BCHW: Tensor,
    labels_B: Tensor,
    generator: torch.Generator,
) -> Tensor:
    t_B, eps = draw(schedule, x_BCHW, generator)
    x_t = schedule.add_noise(x_BCHW, eps, t_B)
    output = call_model(model, x_t, t_B, labels_B)
    total = torch.zeros((), device=x_BCHW.device)
    if settings.loss != "distill":
        mse_B, vb_B = loss_terms(schedule, output, x_BCHW, eps, t_B)
        total = total + (mse_B if vb_B is None else mse_B + vb_B).mean()
    if settings.loss != "diffusion":
        assert teacher is not None
        with torch.no_grad():
            wanted = call_model(teacher, x_t, t_B, labels_B)
        weight = settings.distill_weight if settings.loss == "both" else 1.0
        total = total + weight * (output - wanted).square().mean()
    return total


def _non_finite(what: str, value: float, step: int, state: TrainingState | None) -> NonFiniteLoss:
    kept = state.saved_step if state is not None else None
    where = "no state was kept" if kept is None else f"the last good state, step {kept}, is kept"
    return NonFiniteLoss(
        "non-finite-loss",
        f"stage 2 stopped at step {step + 1}: the {what} is {value}; {where}",
        hint="lower the finetuning learning rate or raise the warm-up",
    )


class _swapped:
    """Parameters hold `values` inside the block and their own again after it."""

    def __init__(self, parameters: list[nn.Parameter], values: list[Tensor]) -> None:
        self.parameters, self.values = parameters, values

    def __enter__(self) -> None:
        self.own = [p.data for p in self.parameters]
        for p, value in zip(self.parameters, self.values, strict=True):
            p.data = value

    def __exit__(self, *_: object) -> None:
        for p, value in zip(self.parameters, self.own, strict=True):
            p.data = value


def _run_key(model: nn.Module, images: "ImageSet", schedule: NoiseSchedule, settings: FinetuneSettings) -> str:
    """Digest of everything that decides the result, except the teacher: it is the model the weights came from."""
    described = {k: v for k, v in asdict(settings).items() if k != "save_every"}
    digest = hashlib.sha256(json.dumps([described, images.digest, schedule.prediction], sort_keys=True).encode())
    digest.update(schedule.betas_T.numpy().tobytes())
    digest.update(weights_digest(model).encode())
    return digest.hexdigest()
