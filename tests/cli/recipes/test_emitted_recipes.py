"""`--emit-recipe`: the command as a recipe of one step, which gives the same result."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize(
    "words",
    [
        ["cast", "--dtype", "bf16", "--except", "*.norm1.*", "dit-digits"],
        ["slice", "--layers", "0-2", "dit-digits", "--seed", "3"],
        ["rename", "dit-digits", "-r", r"/^(pos_embed)\.(.*)$/=\1.é'\"${x}.\2"],
        ["init", "dit-digits", "--seed", "5"],
    ],
    ids=lambda words: words[0],
)
def test_the_recipe_gives_what_the_command_gives(command: Run, tmp_path: Path, words: list[str]) -> None:
    emitted = command(*words, "-o", "by recipe", "--emit-recipe")
    assert emitted.code == 0 and sorted(tmp_path.iterdir()) == [], emitted.stderr
    (tmp_path / "r.yaml").write_text(emitted.stdout)
    assert command(*words, "-o", "by command").code == 0
    ended = command("run", "r.yaml", "-o", "by recipe", "--overwrite")
    assert ended.code == 0, ended.stderr
    one, two = (json.loads((tmp_path / f"by {n}" / "surgery.json").read_text()) for n in ("command", "recipe"))
    assert one["digest"] == two["digest"] and one["steps"][-1]["key"] == two["steps"][-1]["key"]
