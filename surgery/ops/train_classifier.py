"""Train-classifier: the small network whose features compare generated with real images where Inception is out of
place. Inputs: images only. The result is a checkpoint like any other."""

import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from surgery.data.identity import data_digest
from surgery.errors import UsageError
from surgery.graph.op import Compute, Param, PartNames, Plan, PlanContext, SideFile, Trained


@dataclass(frozen=True)
class TrainClassifier:
    """Train the small classifier whose features compare images.

    Example:  surgery train classifier digits -o out/classifier
    """

    data: Annotated[str, Param("Images: digits, fashion, folder:PATH, npz:PATH.", positional=True)]
    steps: Annotated[int, Param("Optimiser steps.")] = 400
    batch: Annotated[int, Param("Images of a step.")] = 64
    lr: Annotated[float, Param("Peak learning rate.")] = 3e-3
    features: Annotated[int, Param("Width of the feature layer.")] = 32

    name: ClassVar[str] = "train-classifier"
    version: ClassVar[int] = 1
    parents: ClassVar[int] = 0
    trainer: ClassVar[str | None] = "surgery.train.classifier:train"

    def plan(self, ctx: PlanContext) -> Plan:
        """The classifier's tensors follow from the images' size and classes."""
        import torch

        from surgery.arch.classifier import ClassifierConfig, FeatureClassifier
        from surgery.data.images import load_images

        digest = data_digest(self.data)
        if min(self.steps, self.batch, self.features) < 1 or not self.lr > 0:
            raise UsageError("bad-setting", "steps, batch, features and lr must be positive", hint="see --help")
        images = load_images(self.data)
        config = ClassifierConfig(images.images.shape[1], images.images.shape[2], images.n_classes, self.features)
        with torch.device("meta"):
            shapes = {n: tuple(t.shape) for n, t in FeatureClassifier(config).state_dict().items()}
        entries = tuple(Trained(name=n, dtype="F32", shape=s) for n, s in shapes.items())
        content = (json.dumps(config.to_mapping(), indent=2, sort_keys=True) + "\n").encode()
        files = (SideFile("config.json", content=content),)
        return Plan(entries, (PartNames("", "model"),), files, report=config.to_mapping(), inputs={"data": digest})

    def run(self, task: Compute, tensors: list[Any], generator: Any) -> Any:
        """Nothing is computed tensor by tensor."""
        raise AssertionError("train-classifier plans no computed tensors")
