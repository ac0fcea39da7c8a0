"""A small convolutional classifier whose penultimate features measure how close generated images are to real ones.

It stands in for Inception on images that Inception was never made for, such as 8x8 digits; at that size it has 0.12 MB
of weights. It has no normalisation layers, so a sample's features do not depend on its batch, and draws no numbers by
itself: `initialise` takes a generator.

Shape legend: B batch, C channels, S image size, K classes, F features.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from surgery.errors import CheckpointError

KIND = "surgery-feature-classifier"
_BOUNDS = {"channels": (1, 64), "size": (4, 1024), "classes": (2, 100_000), "features": (1, 4096), "width": (1, 1024)}


@dataclass(frozen=True)
class ClassifierConfig:
    """What fixes the shape of a classifier: image channels and size, numbers of classes and features, layer width."""

    channels: int
    size: int
    classes: int
    features: int = 32
    width: int = 16

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any], where: str) -> "ClassifierConfig":
        """Read the `config.json` of a classifier folder.

        Raises CheckpointError naming `where` when it describes something else, a key is missing or unknown, or a number
        is out of range.
        """
        if config.get("kind") != KIND:
            raise CheckpointError(
                "not-a-classifier",
                f"{where} describes a {config.get('kind', config.get('_class_name', 'model of unknown kind'))!r}, not a"
                f" {KIND!r}",
                hint="name a folder that classifier training wrote",
            )
        names = set(cls.__dataclass_fields__)
        given = set(config) - {"kind"}
        if given != names:
            wrong = sorted(given ^ names)[0]
            how = "missing" if wrong in names else "unknown"
            raise CheckpointError(
                "classifier-config", f"{where}: key {wrong!r} is {how}", hint="train it again: surgery train classifier"
            )
        for name, (low, high) in _BOUNDS.items():
            value = config[name]
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise CheckpointError(
                    "classifier-config",
                    f"{where}: {name} is {value!r}, not a number {low} to {high}",
                    hint="train it again: surgery train classifier",
                )
        return cls(**{name: config[name] for name in names})

    def to_mapping(self) -> dict[str, Any]:
        """The content of `config.json`."""
        return {"kind": KIND, **asdict(self)}


class FeatureClassifier(nn.Module):
    """Images [B, C, S, S] in [-1, 1] to logits [B, K].

    One convolution at full size, one of stride 2 per halving until the side is 4 or less, one more there, then a linear
    layer to F features and one to the classes.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        width, side = config.width, config.size
        layers = [nn.Conv2d(config.channels, width, 3, padding=1)]
        while side > 4:
            layers.append(nn.Conv2d(layers[-1].out_channels, 2 * width, 3, stride=2, padding=1))
            side = (side + 1) // 2
        layers.append(nn.Conv2d(layers[-1].out_channels, 2 * width, 3, padding=1))
        self.convolutions = nn.ModuleList(layers)
        self.to_features = nn.Linear(2 * width * side * side, config.features)
        self.to_logits = nn.Linear(config.features, config.classes)

    def features(self, x_BCSS: Tensor) -> Tensor:
        """Penultimate features [B, F], after their ReLU, so never negative."""
        h = x_BCSS
        for convolution in self.convolutions:
            h = functional.relu(convolution(h))
        h_BF: Tensor = functional.relu(self.to_features(h.flatten(1)))
        return h_BF

    def forward(self, x_BCSS: Tensor) -> Tensor:
        """Logits [B, K] of images in -1 to 1."""
        logits_BK: Tensor = self.to_logits(self.features(x_BCSS))
        return logits_BK

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights: He-normal for layers followed by a ReLU, 1/sqrt(F) for the last; biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                gain = 1.0 if module is self.to_logits else math.sqrt(2.0)
                fan_in = module.weight[0].numel()
                module.weight.normal_(0.0, gain / math.sqrt(fan_in), generator=generator)
                if module.bias is not None:
                    module.bias.zero_()


def build_classifier(config: Mapping[str, Any] | ClassifierConfig, *, where: str = "config") -> FeatureClassifier:
    """The untrained module that `config` describes, its weights not yet drawn or loaded; in eval mode.

    Raises CheckpointError like `ClassifierConfig.from_mapping`.
    """
    checked = config if isinstance(config, ClassifierConfig) else ClassifierConfig.from_mapping(config, where)
    with torch.device("meta"):  # torch's own initialisation would draw from the global generator
        module = FeatureClassifier(checked)
    return module.to_empty(device="cpu").eval()
