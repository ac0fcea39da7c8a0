"""The same checkpoint in other people's harnesses: the exact command, what it needs, and whether it is installed.

A checkpoint of ours is a complete folder, so neither harness needs a patch. Both download their data sets, and most
benchmarks of the merging study (arXiv 2505.05464) are scored by a judge model behind an API. Names and options are
those of lmms-eval 0.7.3 and of VLMEvalKit as of ms-vlmeval 0.0.20.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from surgery.errors import ResourceError, UsageError, closest
from surgery.store.checkpoint import Checkpoint

BACKENDS = ("local", "lmms-eval", "vlmevalkit")

# transformers class -> lmms-eval's model; a class that is not listed goes to its generic one.
_LMMS = {
    "LlavaForConditionalGeneration": "llava_hf",
    "LlavaNextForConditionalGeneration": "llava_hf",
    "LlavaOnevisionForConditionalGeneration": "llava_hf",
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Idefics2ForConditionalGeneration": "idefics2",
    "InternVLForConditionalGeneration": "internvl_hf",
    "Gemma3ForConditionalGeneration": "gemma3",
    "MllamaForConditionalGeneration": "llama_vision",
    "Lfm2VlForConditionalGeneration": "lfm2_5_vl",
    "Mistral3ForConditionalGeneration": "mistral3_vl",
    "Glm4vForConditionalGeneration": "glm4v",
}
# transformers class -> class in vlmeval.vlm, which takes model_path.
_VLMEVALKIT = {
    "LlavaNextForConditionalGeneration": "LLaVA_Next",
    "LlavaOnevisionForConditionalGeneration": "LLaVA_OneVision_HF",
    "Qwen2VLForConditionalGeneration": "Qwen2VLChat",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2VLChat",
    "Qwen3VLForConditionalGeneration": "Qwen3VLChat",
    "Idefics2ForConditionalGeneration": "IDEFICS2",
    "Idefics3ForConditionalGeneration": "SmolVLM",
    "SmolVLMForConditionalGeneration": "SmolVLM2",
    "Gemma3ForConditionalGeneration": "Gemma3",
    "PaliGemmaForConditionalGeneration": "PaliGemma",
    "MllamaForConditionalGeneration": "llama_vision",
    "Lfm2VlForConditionalGeneration": "LFM2VL",
}
# The data set's official name, by which VLMEvalKit chooses how to score, begins with one of these -> its class.
_DATASETS = {
    "MathVista": "MathVista",
    "MathVerse": "MathVerse",
    "MathVision": "MathVision",
    "DynaMath": "Dynamath",
    "MM-Math": "MMMath",
    "MMStar": "ImageMCQDataset",
}
_JUDGED = ("mathvista", "mathverse", "mathvision", "dynamath", "mm-math")


@dataclass(frozen=True)
class Delegate:
    """A command of another harness, the files to write before it, and what has to be there for it to work."""

    command: tuple[str, ...]
    installed: bool
    install: str
    needs: tuple[str, ...]
    files: dict[Path, str] = field(default_factory=dict)


def delegate(
    backend: str,
    base: Checkpoint,
    tasks: Sequence[str],
    out: Path,
    *,
    batch: int = 1,
    limit: int | None = None,
    device: str = "cpu",
    checkout: Path | None = None,
) -> Delegate:
    """How `backend` evaluates the checkpoint on its own `tasks`, with results below `out`.

    `checkout` is a clone of VLMEvalKit, where it is not installed as a package. Raises UsageError for an unknown
    backend, no tasks, a checkpoint that is not a folder, or a class or data set that VLMEvalKit has no name for.
    """
    if not tasks:
        example = "mathvista_testmini_cot" if backend == "lmms-eval" else "MathVista_MINI"
        raise UsageError("tasks", f"{backend} chooses its data by name", hint=f"for example --tasks {example}")
    if not base.path.is_dir():
        raise UsageError("not-a-folder", f"{base.name}: other harnesses load folders", hint="name the model's folder")
    folder = str(base.path.resolve())
    kind = str((base.config.get("architectures") or ["?"])[0])
    downloads = f"a network, or a filled cache, for the data sets {', '.join(tasks)}"
    judged = [t for t in tasks if t.lower().startswith(_JUDGED)]
    judge = (f"a judge model behind an API for {', '.join(judged)}: set OPENAI_API_KEY",) if judged else ()
    if judged and os.environ.get("OPENAI_API_KEY"):
        judge = ()
    if backend == "lmms-eval":
        words = [sys.executable, "-m", "lmms_eval", "--model", _LMMS.get(kind, "huggingface")]
        words += ["--model_args", f"pretrained={folder}", "--tasks", ",".join(tasks), "--batch_size", str(batch)]
        words += ["--device", device, "--log_samples", "--output_path", str(out)]
        words += ["--limit", str(limit)] if limit is not None else []
        there = find_spec("lmms_eval") is not None
        return Delegate(tuple(words), there, "pip install lmms-eval", (downloads, *judge))
    if backend != "vlmevalkit":
        raise UsageError("backend", f"no backend '{backend}'", hint=closest(backend, list(BACKENDS)))
    if kind not in _VLMEVALKIT:
        raise UsageError(
            "backend", f"VLMEvalKit has no wrapper for {kind}", hint="use --backend lmms-eval, which takes any class"
        )
    if limit is not None:
        raise UsageError("backend", "VLMEvalKit evaluates whole data sets, without --limit", hint="leave it out")
    config = {
        "model": {base.path.resolve().name: {"class": _VLMEVALKIT[kind], "model_path": folder}},
        "data": {task: {"class": _dataset_class(task), "dataset": task} for task in tasks},
    }
    picked = [word for word in ("34b", "interleave") if kind.startswith("LlavaNext") and word in folder.lower()]
    if picked:
        judge = (*judge, f"another processor: VLMEvalKit chooses it by '{picked[0]}' in the path {folder}")
    file = out / "vlmevalkit.json"
    start = [str(checkout / "run.py")] if checkout is not None else ["-m", "vlmeval.run"]
    words = [sys.executable, *start, "--config", str(file), "--work-dir", str(out)]
    there = (checkout / "run.py").is_file() if checkout is not None else find_spec("vlmeval") is not None
    return Delegate(
        tuple(words),
        there,
        "clone open-compass/VLMEvalKit and name it with --checkout, or pip install ms-vlmeval (a fork)",
        (downloads, *judge),
        {file: json.dumps(config, indent=2) + "\n"},
    )


def run_delegate(plan: Delegate) -> int:
    """Write the plan's files and run its command, its output on stderr; the command's exit status. Raises ResourceError
    when the harness is not installed."""
    import subprocess

    from surgery.store.writer import atomic_write

    if not plan.installed:
        raise ResourceError("missing-package", f"{plan.command[2]} is not installed", hint=plan.install)
    for path, text in plan.files.items():
        atomic_write(path, text.encode())
    return subprocess.run(plan.command, stdout=sys.stderr, check=False).returncode


def _dataset_class(task: str) -> str:
    for prefix, name in _DATASETS.items():
        if task.startswith(prefix):
            return name
    raise UsageError(
        "tasks", f"no class of VLMEvalKit is known here for '{task}'", hint=f"known begin with {', '.join(_DATASETS)}"
    )
