"""The step eval-images: sample from a checkpoint and compare with real images."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from surgery.data.identity import data_digest
from surgery.errors import UsageError
from surgery.graph.evaluation import Evaluation, Found
from surgery.graph.op import Param, PlanContext, TrainContext
from surgery.store import digests
from surgery.store.checkpoint import Checkpoint, open_checkpoint


@dataclass(frozen=True)
class EvalImages(Evaluation):
    """Sample images and measure them: Frechet distance, KID, Inception score, precision and recall.

    As surgery sample and surgery eval images do one after the other; the step's seed is that of the noise.
    """

    ref: Annotated[str, Param("What to compare with: digits, fashion, folder:PATH, npz:PATH.")] = "digits"
    samples: Annotated[int, Param("How many images.")] = 500
    steps: Annotated[int, Param("Sampling steps.")] = 50
    sampler: Annotated[str, Param("ddpm, ddim or dpm.")] = "ddim"
    guidance: Annotated[float, Param("Classifier-free guidance; 1 is none.")] = 1.0
    features: Annotated[str, Param("classifier[:PATH] or inception:PATH (TorchScript).")] = "classifier"
    split: Annotated[str, Param("Which images of a set: train or val.")] = "train"
    neighbours: Annotated[int, Param("Neighbours of precision and recall.")] = 3
    bootstrap: Annotated[int | None, Param("Resamples of the interval [default: 200].")] = None

    name: ClassVar[str] = "eval-images"
    version: ClassVar[int] = 1

    def inputs(self, ctx: PlanContext, *parents: Checkpoint) -> Mapping[str, str]:
        """Digests of the real images and of the extractor."""
        if self.samples < 2 or self.steps < 1:
            raise UsageError("eval-images", "samples and steps must be at least 2 and 1", hint="samples: 500")
        if self.sampler not in ("ddpm", "ddim", "dpm"):
            raise UsageError("eval-images", f"there is no sampler '{self.sampler}'", hint="ddpm, ddim or dpm")
        if self.split not in ("train", "val"):
            raise UsageError("eval-images", f"an image set has no split '{self.split}'", hint="train or val")
        return {"ref": data_digest(self.ref), "features": self._extractor()}

    def evaluate(self, ctx: TrainContext, *parents: Checkpoint) -> Found:
        """The result of `evaluate_images`, of images that are thrown away."""
        from surgery.evals.images.checkpoint import sample_to_file
        from surgery.evals.images.evaluate import evaluate_images

        file = ctx.scratch / "samples.npz"
        sample_to_file(
            parents[0],
            file,
            n=self.samples,
            classes=None,
            steps=self.steps,
            guidance=self.guidance,
            sampler=self.sampler,
            seed=ctx.seed,
            device=ctx.device,
            report=ctx.report,
        )
        numbers = evaluate_images(
            file,
            self.ref,
            features=self.features,
            split=self.split,
            neighbours=self.neighbours,
            bootstrap=self.bootstrap,
            report=ctx.report,
        )
        return Found(numbers)

    def _extractor(self) -> str:
        from surgery.evals.images.features import DIGITS_CLASSIFIER

        kind, _, path = self.features.partition(":")
        if kind == "classifier":
            return open_checkpoint(Path(path) if path else DIGITS_CLASSIFIER).digest
        if kind != "inception" or not Path(path).is_file():
            raise UsageError(
                "eval-images", f"features: {self.features} names no extractor", hint="classifier or inception:PATH"
            )
        return digests.file_digest(Path(path))
