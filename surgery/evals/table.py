"""Evaluations that can be steps of a recipe, by name, as "module:class", imported on first use."""

from collections.abc import Mapping

EVALS: Mapping[str, str] = {
    "eval-images": "surgery.evals.images.step:EvalImages",
    "eval-vqa": "surgery.evals.vqa.step:EvalVqa",
}
