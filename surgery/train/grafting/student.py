"""One operator in stage 1: what it learns from, by which settings, and its training step by step.

AdamW, no weight decay, cosine to 1 % of the peak rate; the weights kept are those with the lowest held-out relative
error, mean((g-f)²) / var(f), which compares across blocks whatever the training loss.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from surgery.errors import CheckpointError, NonFiniteLoss, UsageError
from surgery.train.grafting.capture import DTYPES, Recorded, Tap
from surgery.train.grafting.operator_store import DistillResult
from surgery.train.optim import check_settings, learning_rate


@dataclass(frozen=True)
class Target:
    """One operator to train: `module` learns what the teacher's module at `tap.path` does.

    `module` takes u [B, N, D], and the tap's keywords by name, and returns [B, N, D]; it is copied, never changed.
    `loss` is used when the settings say "auto".
    """

    tap: Tap
    module: nn.Module
    loss: str = "l1"

    @property
    def path(self) -> str:
        """The teacher's module, the key of the results."""
        return self.tap.path


@dataclass(frozen=True)
class DistillSettings:
    """Defaults are the paper's (sections 3.2, 4.1): 8 000 samples, 200 epochs, batch 64, AdamW at 1e-4, no decay.

    `steps` replaces `epochs` when given. `loss`: auto, l1, l2 or huber[:delta]. `capture`: cache, online, or auto for a
    cache if it stays under `cache_limit` bytes. `val_samples` are held out. `gate_weighted` multiplies both sides by
    the block's gate: the error as the residual stream sees it. `workers` are processes for cached training; results do
    not depend on it. For online capture a sample costs nothing to keep: `samples = steps * batch` never repeats one.
    """

    samples: int = 8000
    epochs: int = 200
    steps: int | None = None
    batch: int = 64
    lr: float = 1e-4
    weight_decay: float = 0.0
    clip: float = 10.0
    loss: str = "auto"
    capture: str = "auto"
    cache_limit: int = 4 << 30
    cache_dtype: str = "float32"
    val_samples: int = 512
    label_dropout: float = 0.1
    gate_weighted: bool = False
    seed: int = 0
    workers: int = 1

    def __post_init__(self) -> None:
        checks = {
            "samples": self.samples >= 1,
            "epochs": self.epochs >= 1,
            "steps": self.steps is None or self.steps >= 1,
            "batch": self.batch >= 1,
            "lr": math.isfinite(self.lr) and self.lr > 0,
            "weight_decay": self.weight_decay >= 0,
            "clip": self.clip > 0,
            "capture": self.capture in ("auto", "online", "cache"),
            "cache_limit": self.cache_limit >= 0,
            "cache_dtype": self.cache_dtype in DTYPES,
            "val_samples": self.val_samples >= 1,
            "label_dropout": 0 <= self.label_dropout <= 1,
            "seed": self.seed >= 0,
            "workers": self.workers >= 1,
        }
        check_settings("distillation", self, checks)
        if self.loss != "auto":
            regression_loss(self.loss)

    @property
    def total_steps(self) -> int:
        """Optimiser steps per operator."""
        return self.steps if self.steps is not None else self.epochs * math.ceil(self.samples / self.batch)


def regression_loss(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss `l1`, `l2` or `huber[:delta]` (delta 1 by default), mean over all elements; UsageError otherwise."""
    kind, colon, text = name.partition(":")
    if kind == "huber":
        try:
            delta = float(text) if colon else 1.0
        except ValueError:
            delta = math.nan
        if math.isfinite(delta) and delta > 0:
            return lambda g, f: functional.huber_loss(g, f, delta=delta)
    elif not colon and kind in ("l1", "l2"):
        return functional.l1_loss if kind == "l1" else functional.mse_loss
    raise UsageError("bad-loss", f"there is no regression loss {name!r}", hint="auto, l1, l2, huber or huber:DELTA")


class Student:
    """One operator in training: its own copy of the module, optimiser, curve and best state."""

    def __init__(self, target: Target, settings: DistillSettings, device: torch.device) -> None:
        self.path, self.settings = target.path, settings
        self.module = deepcopy(target.module).to(device=device, dtype=torch.float32).train()
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        if not self.parameters:
            raise UsageError("nothing-to-train", f"the operator for {self.path} has no weights to train")
        self.loss = regression_loss(target.loss if settings.loss == "auto" else settings.loss)
        self.optimiser = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        self.best: dict[str, Tensor] = {}
        self.best_err, self.best_step = math.inf, 0
        self.history: list[dict[str, float]] = []
        self.since: list[float] = []
        self.sums = (0.0, 0.0, 0.0, 0)

    def _pair(self, batch: Recorded) -> tuple[Tensor, Tensor]:
        """Prediction and target of one batch, float32; multiplied by the gate when asked."""
        keywords = {k.removeprefix("keyword."): v for k, v in batch.items() if k.startswith("keyword.")}
        g, f = self.module(batch["u"].float(), **keywords), batch["y"].float()
        if g.shape != f.shape:
            raise CheckpointError(
                "bad-operator", f"the operator for {self.path} returns {list(g.shape)}, the original {list(f.shape)}"
            )
        if self.settings.gate_weighted:
            gate = batch["gate"].float()[:, None]
            g, f = g * gate, f * gate
        return g, f

    def step(self, step: int, batch: Recorded) -> None:
        """One optimiser step; raises NonFiniteLoss before it would spoil the weights."""
        settings = self.settings
        rate = learning_rate(step, peak=settings.lr, steps=settings.total_steps, warmup=0, curve="cosine", floor=0.01)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        loss = self.loss(*self._pair(batch))
        value = float(loss.detach())
        self.optimiser.zero_grad(set_to_none=True)
        if math.isfinite(value):
            loss.backward()
            norm = float(nn.utils.clip_grad_norm_(self.parameters, settings.clip))
        if not math.isfinite(value) or not math.isfinite(norm):
            raise NonFiniteLoss(
                "non-finite-loss",
                f"distilling {self.path} stopped at step {step + 1}: the loss is {value}; "
                f"its best weights, of step {self.best_step}, had relative error {self.best_err:.4g}",
                hint="lower the learning rate",
            )
        self.optimiser.step()
        self.since.append(value)

    @torch.no_grad()
    def see(self, batch: Recorded) -> None:
        """Add one held-out batch to the running evaluation, summed in float64."""
        g, f = (value.double() for value in self._pair(batch))
        error, first, second, count = self.sums
        self.sums = (
            error + float((g - f).square().sum()),
            first + float(f.sum()),
            second + float(f.square().sum()),
            count + f.numel(),
        )

    def evaluate(self, step: int) -> dict[str, float]:
        """Close the running evaluation: relative error mean((g-f)²)/var(f); keep the weights if it is the lowest."""
        error, first, second, count = self.sums
        self.sums = (0.0, 0.0, 0.0, 0)
        variance = second / count - (first / count) ** 2
        rel_err = error / count / variance if variance > 0 else (0.0 if error == 0 else math.inf)
        if rel_err < self.best_err or not self.best:
            self.best_err, self.best_step = rel_err, step
            self.best = {k: v.detach().cpu().clone() for k, v in self.module.state_dict().items()}
        record = {"step": float(step), "rel_err": rel_err}
        if self.since:
            record["loss"] = sum(self.since) / len(self.since)
            self.since = []
        self.history.append(record)
        return record

    def result(self) -> DistillResult:
        """The best weights so far."""
        return DistillResult(self.best, self.best_err, self.best_step, self.history)
