"""Scaling tensors: exactly the chosen ones, rounded once, and a record that replays."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from surgery.errors import UsageError
from surgery.graph.op import PlanContext
from surgery.graph.run import run_op
from surgery.ops.scale import Scale
from surgery.store.names import open_named

QUERIES = "*language_model*q_proj.weight"


def test_chosen_tensors_are_multiplied_and_the_rest_is_kept(tmp_path: Path) -> None:
    base = open_named("llava-scenes")
    out = run_op(Scale(0.3, (QUERIES,)), [base], tmp_path / "flat").path
    before, after = load_file(base.root / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {f"language_model.model.layers.{i}.self_attn.q_proj.weight" for i in range(3)}
    assert all(torch.equal(after[n], (before[n].double() * 0.3).float()) for n in changed)


def test_another_factor_is_another_tensor_to_the_cache() -> None:
    plan = Scale(0.3, (QUERIES,)).plan(PlanContext(), open_named("llava-scenes"))
    task = next(e for e in plan.entries if "q_proj" in e.name and "language" in e.name)
    assert Scale(0.3, (QUERIES,)).tensor_params(task) != Scale(0.5, (QUERIES,)).tensor_params(task)  # type: ignore[arg-type]


def test_a_half_and_its_double_are_the_identity(tmp_path: Path) -> None:
    half = run_op(Scale(0.5, ("*",)), [open_named("llava-scenes")], tmp_path / "half").path
    back = run_op(Scale(2.0, ("*",)), [open_named(str(half))], tmp_path / "back")
    assert back.record["digest"] == f"sha256:{open_named('llava-scenes').digest}"


def test_wrong_requests_are_refused(command: Callable, tmp_path: Path) -> None:
    for words, said in (
        (("--by", "nan", "--only", "*"), "nan"),
        (("--by", "2", "--only", "*.quqery"), "no float tensor"),
    ):
        done = command("scale", "llava-scenes", *words, "-o", "x")
        assert done.code == 2 and said in done.stderr and not (tmp_path / "x").exists()
    with pytest.raises(UsageError):
        Scale(float("inf"), ("*",)).plan(PlanContext(), open_named("llava-scenes"))
