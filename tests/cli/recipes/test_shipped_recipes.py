"""Every file in recipes/: it can be read and planned, and the cheap ones run as written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surgery.graph.recipes.recipe import read_recipe
from surgery.store.checkpoint import open_checkpoint

Run = Callable[..., Any]
RECIPES = Path(__file__).resolve().parents[3] / "recipes"
FILES = sorted(p.relative_to(RECIPES).as_posix() for p in RECIPES.rglob("*.y*ml"))
# Large models of the hub, which have to be fetched first; their plans on tiny ones are tested with their methods.
FETCHED = {name for name in FILES if name.startswith("vlm-merge/")} | {"adaptvis/llava15.yaml"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_is_read_and_planned(command: Run, tmp_path: Path, name: str) -> None:
    recipe = read_recipe(RECIPES / name)
    assert recipe.steps
    ended = command("plan", RECIPES / name, "--json", "--offline")
    if name in FETCHED:
        assert ended.code == 7 and "Traceback" not in ended.stderr, ended.stderr
        assert any(source in ended.stderr for source in recipe.inputs.values()), ended.stderr
    else:
        assert ended.code == 0, ended.stderr
        rows = json.loads(ended.stdout)["steps"]
        assert {row["name"] for row in rows} == {step.name for step in recipe.steps}
        assert all(row["state"] in ("run", "fused") for row in rows)
    assert not list(tmp_path.iterdir())


def test_the_edits_run_as_written(command: Run, tmp_path: Path) -> None:
    ended = command("run", RECIPES / "edits.yaml")
    assert (ended.code, ended.stdout) == (0, "out/deeper\n"), ended.stderr
    assert len({n.split(".")[1] for n in open_checkpoint(tmp_path / "out/deeper").tensors if "_blocks." in n}) == 8


def test_the_measured_cast_runs_as_written(command: Run, tmp_path: Path) -> None:
    small = ("before.samples=20", "after.samples=20", "before.steps=2", "after.steps=2")
    few = [word for change in small for word in ("--set", change)]
    ended = command("run", RECIPES / "measured_cast.yaml", "--json", *few)
    assert ended.code == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["half"]["digest"] == found["after"]["report"]["model"] != found["before"]["report"]["model"]
    assert found["before"]["report"]["frechet"] > 0
