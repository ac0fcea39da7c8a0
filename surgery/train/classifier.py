"""Train the small classifier that image metrics take their features from.

A few seconds on one core for the 8x8 digits. Deterministic: equal images, settings and thread count give equal bits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from surgery.arch.classifier import ClassifierConfig, FeatureClassifier, build_classifier
from surgery.data.images import ImageSet, load_images
from surgery.errors import NonFiniteLoss, UsageError
from surgery.graph.op import Plan, TrainContext, TrainResult
from surgery.train.optim import BatchOrder, generator_for, learning_rate

if TYPE_CHECKING:
    from surgery.ops.train_classifier import TrainClassifier

Report = Callable[[str, Mapping[str, float]], None]


@dataclass(frozen=True)
class ClassifierSettings:
    """How to train: `steps` batches of `batch`, AdamW at `lr` with warm-up and cosine decay; `features` and
    `width` size the classifier. No augmentation: features taught to ignore shifts and noise would not measure them."""

    steps: int = 400
    batch: int = 64
    lr: float = 3e-3
    weight_decay: float = 1e-2
    features: int = 32
    width: int = 16
    seed: int = 0


@dataclass(frozen=True, eq=False)
class TrainedClassifier:
    """The outcome: configuration, weights, and the accuracy on the images that were held out from training."""

    config: ClassifierConfig
    state: dict[str, Tensor]
    accuracy: float


def train_classifier(
    images: ImageSet, settings: ClassifierSettings | None = None, report: Report | None = None
) -> TrainedClassifier:
    """Train on `images.train`, measure on `images.val`. Reports ("classifier", {step, steps, loss}).

    Raises UsageError for images that are not square or settings out of range, NonFiniteLoss when training diverges.
    """
    s = settings or ClassifierSettings()
    x, y = images.train
    _check(images, s)
    config = ClassifierConfig(x.shape[1], x.shape[2], images.n_classes, s.features, s.width)
    model = build_classifier(config)
    model.initialise(generator_for(s.seed, "classifier-weights", 0))
    optimiser = torch.optim.AdamW(model.parameters(), lr=s.lr, weight_decay=s.weight_decay)
    order = BatchOrder(len(x), s.batch, seed=s.seed)
    for step in range(s.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(
                step, peak=s.lr, steps=s.steps, warmup=min(20, s.steps), curve="cosine", floor=0.01
            )
        rows = order.indices(step)
        loss = functional.cross_entropy(model(x[rows]), y[rows])
        if not torch.isfinite(loss):
            raise NonFiniteLoss(
                "non-finite-loss", f"the classifier's loss became {loss.item()} at step {step}", hint="use a smaller lr"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if report is not None:
            report("classifier", {"step": step + 1, "steps": s.steps, "loss": float(loss.detach())})
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return TrainedClassifier(config, state, accuracy(model, *images.val))


@torch.no_grad()
def accuracy(model: FeatureClassifier, images: Tensor, labels: Tensor, *, batch: int = 512) -> float:
    """Fraction of images [n, C, S, S] whose largest logit is their label."""
    right = 0
    for start in range(0, len(images), batch):
        part = slice(start, start + batch)
        right += int((model(images[part]).argmax(1) == labels[part]).sum())
    return right / len(images)


def train(op: "TrainClassifier", ctx: TrainContext, plan: Plan) -> TrainResult:
    """The training half of `train classifier`; records the held-out accuracy."""
    images = load_images(op.data)
    settings = ClassifierSettings(op.steps, op.batch, op.lr, features=op.features, seed=ctx.seed)
    trained = train_classifier(images, settings, ctx.report)
    record = {
        "data": images.name,
        "data_digest": images.digest,
        "images": len(images.train.images),
        "accuracy": trained.accuracy,
    }
    return TrainResult(trained.state, record)


def _check(images: ImageSet, s: ClassifierSettings) -> None:
    height, width = images.images.shape[2:]
    if height != width or height < 4:
        raise UsageError(
            "image-size",
            f"{images.name} has {height}x{width} images; the classifier takes square ones of 4 pixels or more",
            hint="crop or pad the images",
        )
    if min(s.steps, s.batch, s.features, s.width) < 1 or not s.lr > 0 or s.weight_decay < 0:
        raise UsageError(
            "classifier-settings", f"{s} holds a value out of range", hint="steps, batch, lr must be positive"
        )
