"""Recipes as graphs: cached, copied, fused, resumed; an edit recomputes what depends on it and nothing else."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surgery.ops.cast import Cast
from surgery.store import cache
from surgery.store.checkpoint import open_checkpoint

Run = Callable[..., Any]
RECIPE = """\
surgery: 1
inputs: {base: BASE}
steps:
  half: {op: cast, from: base, with: {dtype: bfloat16, except: ["*.norm1.*"]}}
  deeper:
    op: slice
    from: half
    with: {layers: "0-3,2-5"}
outputs: {deeper: out/deeper}
"""
WEIGHTS = "diffusion_pytorch_model.safetensors"


def edited(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def steps(command: Run, path: Path, *words: str) -> dict[str, Any]:
    ended = command("plan", path, "--json", *words)
    assert ended.code == 0, ended.stderr
    return {row["name"]: row for row in json.loads(ended.stdout)["steps"]}


def casts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of tensors that are cast from now on."""
    seen: list[str] = []
    real = Cast.run
    monkeypatch.setattr(Cast, "run", lambda self, task, *rest: seen.append(task.name) or real(self, task, *rest))
    return seen


def nodes(own_cache: Path) -> list[Path]:
    return sorted(p for p in own_cache.glob("v1/nodes/??/*") if p.is_dir())


# Fused chains


def test_a_chain_is_made_on_the_way_to_the_bytes_of_its_single_steps(
    command: Run, recipe: Path, tiny_dit: Path, tmp_path: Path, own_cache: Path
) -> None:
    assert command("run", recipe).stdout == "out/deeper\n"
    assert nodes(own_cache) == [] and {p.name for p in tmp_path.iterdir()} == {"recipe.yaml", "out"}
    assert command("cast", "--dtype", "bf16", "--except", "*.norm1.*", tiny_dit, "-o", "a").code == 0
    assert command("slice", "--layers", "0-3,2-5", "a", "-o", "b").code == 0
    assert open_checkpoint(tmp_path / "b").digest == open_checkpoint(tmp_path / "out/deeper").digest
    assert (tmp_path / "b/config.json").read_bytes() == (tmp_path / "out/deeper/config.json").read_bytes()


def test_an_intermediate_that_is_asked_for_or_read_twice_is_written(
    command: Run, recipe: Path, own_cache: Path
) -> None:
    fused = open_checkpoint(Path(command("run", recipe).stdout.strip())).digest
    edited(recipe, "  deeper:\n", "  other: {op: slice, from: half, with: {layers: 0-2}}\n  deeper:\n")
    edited(recipe, "outputs: {", "outputs: {other: out/other, ")
    assert steps(command, recipe)["half"]["state"] == "run"
    assert command("run", recipe, "--overwrite").code == 0
    assert len(nodes(own_cache)) == 1
    assert open_checkpoint(recipe.parent / "out/deeper").digest == fused


def test_cache_true_writes_what_could_be_made_on_the_way(command: Run, recipe: Path, own_cache: Path) -> None:
    edited(recipe, "{op: cast,", "{op: cast, cache: true,")
    assert command("run", recipe).code == 0
    (node,) = nodes(own_cache)
    assert command("verify", node).code == 0
    assert all(not f.stat().st_mode & stat.S_IWUSR for f in node.rglob("*") if f.is_file())
    assert steps(command, recipe, "-o", "elsewhere")["half"]["state"] == "not needed"


def test_a_fused_result_is_replayed_to_the_same_bytes(command: Run, recipe: Path, tmp_path: Path) -> None:
    assert command("run", recipe).code == 0
    ended = command("replay", "out/deeper", "--to", "again")
    assert ended.code == 0, ended.stderr
    assert command("diff", "out/deeper", "again").code == 0
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out/deeper" / WEIGHTS).read_bytes()


def test_a_block_that_stands_twice_is_computed_once(
    command: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = casts(monkeypatch)
    assert command("run", recipe).code == 0
    assert len(seen) == len(set(seen)) > 50


# What is at hand


def test_a_second_place_is_filled_from_the_first(
    command: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("run", recipe).code == 0
    seen = casts(monkeypatch)
    rows = steps(command, recipe, "-o", "second")
    assert (rows["half"]["state"], rows["deeper"]["state"]) == ("not needed", "copy")
    ended = command("run", recipe, "-o", "second", "--json")
    row = json.loads(ended.stdout)["deeper"]
    assert row["found"] and row["source"] == str(tmp_path / "out/deeper") and not seen
    for file in (tmp_path / "second").iterdir():
        assert file.read_bytes() == (tmp_path / "out/deeper" / file.name).read_bytes()
    assert command("verify", "second").code == 0


def test_hard_links_are_made_on_request_alone(command: Run, recipe: Path, tmp_path: Path) -> None:
    assert command("run", recipe).code == 0
    assert (
        command("run", recipe, "-o", "copied").code == command("run", recipe, "-o", "hard", "--link", "hard").code == 0
    )
    count = [(tmp_path / name / WEIGHTS).stat().st_nlink for name in ("copied", "hard")]
    assert count == [1, 2]
    assert command("run", recipe, "-o", "x", "--link", "soft").code == 2


@pytest.mark.parametrize("damage", ["altered", "cut", "gone"])
def test_a_damaged_result_is_never_copied(command: Run, recipe: Path, tmp_path: Path, damage: str) -> None:
    assert command("run", recipe).code == 0
    file = tmp_path / "out/deeper" / WEIGHTS
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(raw if damage == "altered" else raw[:-1])
    ended = command("run", recipe, "-o", "second")
    assert ended.code == 0 and "is no longer what was made there" in ended.stderr, ended.stderr
    assert command("verify", "second").code == 0


@pytest.mark.parametrize("damage", ["altered", "cut", "record"])
def test_a_damaged_node_of_the_cache_is_dropped_with_a_warning_and_made_again(
    command: Run, recipe: Path, own_cache: Path, damage: str
) -> None:
    edited(recipe, "{op: cast,", "{op: cast, cache: true,")
    assert command("run", recipe).code == 0
    (node,) = nodes(own_cache)
    file = node / ("surgery.json" if damage == "record" else WEIGHTS)
    file.chmod(0o644)
    raw = bytearray(file.read_bytes())
    raw[-1 if damage == "altered" else 40] ^= 1
    file.write_bytes(raw[:-1] if damage == "cut" else raw)
    edited(recipe, "0-3,2-5", "0-4")
    ended = command("run", recipe, "--overwrite")
    assert ended.code == 0 and "made anew" in ended.stderr, ended.stderr
    (again,) = nodes(own_cache)
    assert again == node and command("verify", node).code == 0 and command("verify", "out/deeper").code == 0


def test_a_node_that_was_removed_is_not_made_again_for_an_output_that_is_there(
    command: Run, recipe: Path, own_cache: Path
) -> None:
    edited(recipe, "{op: cast,", "{op: cast, cache: true,")
    assert command("run", recipe).code == 0
    shutil.rmtree(own_cache / "v1/nodes")
    ended = command("run", recipe)
    assert "already the result" in ended.stderr and nodes(own_cache) == []


def test_a_parent_with_other_bytes_is_another_parent(
    command: Run, recipe: Path, tiny_dit: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(tiny_dit, tmp_path / "own")
    edited(recipe, str(tiny_dit), str(own))
    assert command("run", recipe).code == 0
    with open(own / WEIGHTS, "r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        handle.write(b"\x3f")
    rows = steps(command, recipe)
    assert rows["deeper"]["state"] == "run"
    assert command("run", recipe).code == 4  # the output is of the other parent
    assert command("run", recipe, "--overwrite").code == 0


# What an edit costs


def test_an_edited_recipe_computes_what_depends_on_the_edit_alone(
    command: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("run", recipe).code == 0
    seen = casts(monkeypatch)
    edited(recipe, "0-3,2-5", "1-5,1-2")
    ended = command("run", recipe, "-o", "a", "--json")
    assert json.loads(ended.stdout)["deeper"]["taken"] > 50 and seen == []
    edited(recipe, '["*.norm1.*"]', '["*.norm1.*", "*.ff.*"]')
    assert command("run", recipe, "-o", "b").code == 0 and seen == []
    edited(recipe, '["*.norm1.*", "*.ff.*"]', "[]")
    assert command("run", recipe, "-o", "c").code == 0
    assert seen and all(".norm1." in name for name in seen)
    edited(recipe, "bfloat16", "float16")
    assert command("run", recipe, "-o", "d").code == 0 and len(seen) > 80
    assert command("verify", "d").code == 0


def test_taken_tensors_give_the_bytes_of_an_undisturbed_run(
    command: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any
) -> None:
    assert command("run", recipe).code == 0
    edited(recipe, "0-3,2-5", "1-5,1-2")
    assert command("run", recipe, "-o", "taken").code == 0
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path_factory.mktemp("empty")))
    assert command("run", recipe, "-o", "fresh").code == 0
    taken, fresh = (json.loads((tmp_path / n / "surgery.json").read_text()) for n in ("taken", "fresh"))
    assert taken["record"] == fresh["record"]
    assert (tmp_path / "taken" / WEIGHTS).read_bytes() == (tmp_path / "fresh" / WEIGHTS).read_bytes()


def test_a_plan_says_why_a_step_is_made_again(command: Run, recipe: Path) -> None:
    assert steps(command, recipe)["deeper"]["why"] == "never made here"
    assert command("run", recipe).code == 0
    assert steps(command, edited(recipe, "0-3,2-5", "0-3"))["deeper"]["why"] == "layers was 0-3,2-5, is 0-3"
    edited(recipe, "bfloat16", "float16")
    assert "'half' is another" in steps(command, recipe)["deeper"]["why"]


# Words of a recipe


def test_set_changes_values_and_knows_its_places(command: Run, recipe: Path, tmp_path: Path) -> None:
    assert (
        command("run", recipe, "--set", "deeper.layers=0-2", "--set", "outputs.deeper=out/three").stdout
        == "out/three\n"
    )
    config = json.loads((tmp_path / "out/three/config.json").read_text())
    assert config["num_layers"] == 3
    for text, said in (("deper.layers=1", "no such place"), ("layers", "no KEY=VALUE"), ("deeper.layrs=1", "'layrs'")):
        ended = command("run", recipe, "--set", text)
        assert ended.code == 2 and said in ended.stderr, ended.stderr


def test_includes_are_stood_upon(command: Run, recipe: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.yaml"
    top.write_text("surgery: 1\ninclude: recipe.yaml\nsteps:\n  deeper: {op: slice, from: half, with: {layers: 0-1}}\n")
    assert command("run", top).code == 0
    assert json.loads((tmp_path / "out/deeper/config.json").read_text())["num_layers"] == 2
    edited(recipe, "layers:", "layrs:")
    top.write_text("surgery: 1\ninclude: [recipe.yaml]\n")
    ended = command("run", top)
    assert ended.code == 2 and "recipe.yaml:8: " in ended.stderr
    recipe.write_text("surgery: 1\ninclude: top.yaml\n")
    ended = command("run", top)
    assert ended.code == 2 and "recipe.yaml:2: top.yaml includes itself" in ended.stderr


def test_words_in_values_are_filled_in(
    command: Run, recipe: Path, tiny_dit: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    edited(recipe, '"0-3,2-5"', "'${env:LAYERS}'")
    edited(recipe, "out/deeper", "'${env:PLACE}/x'")
    ended = command("run", recipe)
    assert ended.code == 2 and "recipe.yaml:9: the environment has no variable 'PLACE'" in ended.stderr
    monkeypatch.setenv("LAYERS", "0-1")
    monkeypatch.setenv("PLACE", "there")
    assert command("run", recipe).stdout == "there/x\n"
    edited(recipe, "${env:PLACE}/x", "${bose}/x")
    ended = command("run", recipe)
    assert ended.code == 2 and "'${bose}' stands for nothing" in ended.stderr and "${base}" in ended.stderr


def test_the_schema_knows_every_operation_and_parameter(command: Run) -> None:
    schema = json.loads(command("schema").stdout)
    by_op = {s["properties"]["op"]["const"]: s for s in schema["properties"]["steps"]["additionalProperties"]["oneOf"]}
    assert {"graft", "cast", "slice", "train-diffusion"} <= set(by_op)
    assert by_op["cast"]["properties"]["with"]["required"] == ["dtype"]
    assert "except" in by_op["cast"]["properties"]["with"]["properties"]


# Bad surroundings


def test_an_unreadable_cache_only_costs_work(command: Run, recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv("SURGERY_CACHE", str(blocked))
    assert command("run", recipe).code == 0
    assert command("run", recipe).code == 0
    edited(recipe, "{op: cast,", "{op: cast, cache: true,")
    ended = command("run", recipe, "-o", "other")
    assert ended.code == 4 and str(blocked) in ended.stderr and "Traceback" not in ended.stderr


def test_a_table_that_is_no_database_is_replaced(command: Run, recipe: Path, own_cache: Path) -> None:
    (own_cache / "v1").mkdir()
    (own_cache / "v1/results.sqlite").write_bytes(b"rubbish" * 1000)
    assert command("run", recipe).code == 0
    assert command("run", recipe, "-o", "second", "--json").stdout.count('"found": true') == 1


def test_two_recipes_that_need_the_same_node_share_it(recipe: Path, tmp_path: Path, own_cache: Path) -> None:
    edited(recipe, "{op: cast,", "{op: cast, cache: true,")
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "surgery", "run", recipe, "-o", str(n)],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for n in range(2)
    ]
    ended = [(*p.communicate(timeout=120), p.returncode) for p in runs]
    assert [code for *_, code in ended] == [0, 0], ended
    assert len(nodes(own_cache)) == 1


def test_a_use_is_later_than_all_others_even_when_the_clock_was_put_back(own_cache: Path, monkeypatch: Any) -> None:
    cache.touch("a" * 64)
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000_000)
    cache.touch("b" * 64)
    first, second = ((own_cache / "v1/locks" / (c * 64)).stat().st_mtime_ns for c in "ab")
    assert second > first
