"""`surgery diff --base`: how host and donor moved from their base."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vlm_pairs
from safetensors.torch import load_file, save_file


def test_the_statistics_are_their_definitions(command: Callable[..., Any], tmp_path: Path) -> None:
    pair = vlm_pairs.make_pair(tmp_path, "qwen2_vl")
    ended = command("diff", pair.host, pair.donor, "--base", pair.base, "--json")
    assert ended.code == 0, ended.stderr
    found = json.loads(ended.stdout)
    host, donor, base = (load_file(p / "model.safetensors") for p in (pair.host, pair.donor, pair.base))
    names = [n for n in base if n.startswith("model.layers.2.")]
    h, d, b = (torch.cat([t[n].double().flatten() for n in names]) for t in (host, donor, base))
    one, two = h - b, d - b
    row = found["layers"][2]
    assert row["where"] == 2
    want = {
        "host_moved": one.norm() / b.norm(), "donor_moved": two.norm() / b.norm(),
        "donor_to_host": two.norm() / one.norm(), "apart": (h - d).norm() / h.norm(),
        "cosine": one @ two / (one.norm() * two.norm()),
    }  # fmt: skip
    for key, value in want.items():
        assert row[key] == pytest.approx(float(value), rel=1e-4), key
    moved = (one != 0) & (two != 0)
    assert row["conflict"] == pytest.approx(float((one[moved] * two[moved] < 0).double().mean()), rel=1e-4)
    wish = 0.1 * (d - h)
    stored = (h.float() * torch.tensor(0.9) + d.float() * torch.tensor(1 - 0.9)).bfloat16().double() - h
    assert row["transfer"] == pytest.approx(float(stored @ wish / (wish @ wish)), abs=1e-3)
    assert [g["where"] for g in found["groups"]] == ["attn", "final-norm", "mlp", "norms"]
    table = command("diff", pair.host, pair.donor, "--base", pair.base)
    assert table.code == 0 and "opposed" in table.stdout and len(table.stdout.splitlines()) == 1 + 5 + 4 + 1


def test_the_dtype_that_is_asked_about_decides_what_arrives(command: Callable[..., Any], tmp_path: Path) -> None:
    pair = vlm_pairs.make_pair(tmp_path, "qwen2_vl")
    seen = {}
    for dtype in ("bf16", "float16", "float32"):
        ended = command("diff", pair.host, pair.donor, "--base", pair.base, "--dtype", dtype, "--json")
        norms = next(g for g in json.loads(ended.stdout)["groups"] if g["where"] == "norms")
        seen[dtype] = norms["transfer"]
    assert seen["bf16"] < 0.8 < seen["float16"] and seen["float32"] == pytest.approx(1, abs=1e-4)
    same = json.loads(command("diff", pair.host, pair.host, "--base", pair.base, "--json").stdout)
    assert same["all"]["transfer"] is None and same["all"]["apart"] == 0 and same["all"]["cosine"] == 1
    assert command("diff", pair.host, pair.donor, "--base", pair.base, "--dtype", "int3").code == 2
    assert command("diff", pair.host, pair.donor, "--dtype", "bf16").code == 2
    assert (
        "--stat does not go with --base" in command("diff", pair.host, pair.donor, "--base", pair.base, "--stat").stderr
    )


def test_values_that_are_not_finite_are_named(command: Callable[..., Any], tmp_path: Path) -> None:
    pair = vlm_pairs.make_pair(tmp_path, "llava")
    broken = load_file(pair.donor / "model.safetensors")
    broken["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(broken, pair.donor / "model.safetensors", metadata={"format": "pt"})
    ended = command("diff", pair.host, pair.donor, "--base", pair.base)
    assert ended.code == 3 and "'model.layers.1.mlp.up_proj.weight' holds values that are not finite" in ended.stderr
    plain = command("diff", pair.host, pair.base)
    assert plain.code == 1 and "--base MODEL compares the language towers" in plain.stderr


def test_towers_that_do_not_fit_are_one_line(command: Callable[..., Any], tmp_path: Path, tiny_dit: Path) -> None:
    pair = vlm_pairs.make_pair(tmp_path, "llava")
    ended = command("diff", pair.host, tiny_dit, "--base", pair.base)
    assert ended.code == 3 and "no language model" in ended.stderr
