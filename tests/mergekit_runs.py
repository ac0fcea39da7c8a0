"""One mergekit document merged by us and by mergekit's own run, and how close two tensors must be."""

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

import surgery
from surgery.graph.recipes.mergekit_file import read_mergekit


def ours(document: dict[str, Any], root: Path, out: Path) -> dict[str, torch.Tensor]:
    file = root / f"{out.name}.yml"
    file.write_text(yaml.safe_dump(document))
    (step,) = read_mergekit(file).steps
    result = surgery.apply("merge", *step.sources, out=out, config=step.params["config"])
    return {n: t for f in sorted(result.path.glob("*.safetensors")) for n, t in load_file(f).items()}


def theirs(document: dict[str, Any], out: Path) -> dict[str, torch.Tensor]:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    with contextlib.redirect_stderr(io.StringIO()):
        options = MergeOptions(write_model_card=False, quiet=True, copy_tokenizer=False, random_seed=0)
        run_merge(MergeConfiguration.model_validate(document), str(out), options)
    return {n: t for f in sorted(out.glob("*.safetensors")) for n, t in load_file(f).items()}


def check(got: torch.Tensor, want: torch.Tensor, *inputs: torch.Tensor, name: str, steps: int) -> None:
    """Within `steps` of the dtype, at the size of the largest value that went in: where inputs cancel, last digits of
    float32 remain, and these are not the same with and without fused multiply-add."""
    assert got.dtype == want.dtype and got.shape == want.shape, name
    if not steps:
        assert torch.equal(got, want), name
        return
    large = torch.stack([t.float().abs() for t in (want, *inputs) if t.shape == want.shape]).amax(0)
    large = large if inputs else large.amax().expand_as(large)
    bits = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 22}[got.dtype]
    step = torch.exp2(torch.floor(torch.log2(large.clamp_min(1e-30))) - bits)
    assert float(((got.float() - want.float()).abs() / step).max()) <= steps, name
