"""Train-scenes: a small LLaVA that answers where things are in drawn pictures.

Inputs: none; every step draws new scenes. The result has the classes, tensor names and files of a published LLaVA, so
whatever works on those can be tried on it in seconds.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from surgery.arch.tiny_llava import TinyLlava
from surgery.data.spatial.scenes import WORDS, SceneSettings
from surgery.errors import UsageError
from surgery.graph.op import Compute, Param, PartNames, Plan, PlanContext, SideFile, Trained


@dataclass(frozen=True)
class TrainScenes:
    """Train a small LLaVA to answer where things are in drawn scenes.

    Example:  surgery train scenes --steps 1600 -o out/llava-scenes
    """

    steps: Annotated[int, Param("Optimiser steps.")] = 1600
    batch: Annotated[int, Param("Scenes of a step.")] = 20
    lr: Annotated[float, Param("Peak learning rate, flat until 70 %, then falling to 2 %.")] = 1.5e-3
    warmup: Annotated[int, Param("Warm-up steps.")] = 100
    turns: Annotated[int, Param("Questions about each scene.")] = 4
    single: Annotated[float, Param("First share of the steps, which asks about one object only.")] = 0.35
    mixed: Annotated[float, Param("Share of questions about one object after that.")] = 0.4
    patches: Annotated[float, Param("Weight of the loss that names the thing on each patch.")] = 0.3
    clip: Annotated[float, Param("Largest global gradient norm.")] = 1.0
    noise: Annotated[float, Param("Standard deviation of the noise on pixels, of 255.")] = 10.0
    val_every: Annotated[int, Param("Steps between held-out accuracies of the curve; 0 for none.")] = 100
    held_out: Annotated[int, Param("Held-out questions of each kind behind the recorded accuracies.")] = 1000

    name: ClassVar[str] = "train-scenes"
    version: ClassVar[int] = 1
    parents: ClassVar[int] = 0
    trainer: ClassVar[str | None] = "surgery.train.scenes:train"

    def plan(self, ctx: PlanContext) -> Plan:
        """All tensors are trained; configuration, tokenizer and processor are written beside them."""
        if (
            min(self.steps, self.batch, self.turns, self.held_out) < 1
            or not self.lr > 0
            or min(self.warmup, self.val_every) < 0
        ):
            raise UsageError("bad-setting", "steps, batch, turns, lr and held-out must be positive", hint="see --help")
        if not (0 <= self.single <= 1 and 0 <= self.mixed <= 1 and self.patches >= 0 and self.clip > 0):
            raise UsageError("bad-setting", "single and mixed are shares, patches and clip not negative", hint="--help")
        self.scene()
        kind = self.architecture()
        entries = tuple(Trained(name=n, dtype="F32", shape=s) for n, s in kind.shapes().items())
        files = tuple(SideFile(n, content=c) for n, c in kind.files().items())
        report = {"steps": self.steps, "batch": self.batch, "tensors": len(entries), "image_tokens": kind.grid**2}
        return Plan(entries, (PartNames("", "model"),), files, report=report)

    def architecture(self) -> TinyLlava:
        """The model's shape."""
        return TinyLlava(WORDS)

    def scene(self) -> SceneSettings:
        """How the scenes look that it is trained on."""
        return SceneSettings(noise=self.noise)

    def run(self, task: Compute, tensors: list[Any], generator: Any) -> Any:
        """Nothing is computed tensor by tensor."""
        raise AssertionError("train-scenes plans no computed tensors")
