"""Every file in examples/ runs as written."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def test_the_python_example_shows_an_exact_warm_start(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/graft_api.py"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    line = next(row for row in done.stdout.splitlines() if row.startswith("largest difference"))
    assert float(line.rsplit(" ", 1)[1]) < 1e-5
    assert "5,330,304 parameters" in done.stdout


def test_the_example_of_steering_leaves_a_rule_that_can_be_read(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/steer_attention.py"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "runs: {'prompt': 1, 'cheap': 4, 'full': 0, 'tokens': 0}" in done.stdout
    assert "heads that matter most" in done.stdout and "attention held to" in done.stdout
    assert (tmp_path / "out/rules.json").is_file()


def test_the_example_of_recipes_finds_and_takes_what_is_there(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/recipe_api.py"), str(tmp_path / "out")]
    env = {**ENV, "SURGERY_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "found again: True" in done.stdout and "the same by hand: True" in done.stdout
    assert "edited: 66 computed tensors taken" in done.stdout


@pytest.mark.slow
def test_the_shell_example_ends_with_a_verified_graft(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "examples/graft_digits.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("ok ")
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"hyena", "hyena.npz", "hyena.png", "dit-digits.png"}


def test_the_study_of_merging_runs_in_small(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """merge_digits.py and vlm_digits.py with a hundredth of the steps, their commands in this process."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import merge_digits

    ended = []
    monkeypatch.setattr(merge_digits, "surgery", lambda *words: ended.append(command(*words)))
    merge_digits.study(tmp_path / "out", 0, shorten=100, per_task=6, shares=(1, 0.5))
    assert [e.code for e in ended] == [0] * 7, ended[-1].stderr
    made = {p.name for p in (tmp_path / "out").iterdir()}
    assert made == {
        "base", "llm", "vlm", "merged", "pictures", "questions.jsonl", "vlm.jsonl", "merged.jsonl",
        *(f"{name}.{kind}" for name in ("profile", "curve", "windows") for kind in ("csv", "png")),
    }  # fmt: skip
    shown = merge_digits.table([tmp_path / "out"])
    assert len([line for line in shown if line.startswith(("1.00 / 0.00", "0.50 / 0.50", "0.50, layers"))]) == 9


@pytest.mark.slow
def test_the_study_of_merging_shows_what_it_says(tmp_path: Path) -> None:
    """merge_digits.py as written: reading falls as more is merged in, and early layers matter more than late ones."""
    import csv

    command = [sys.executable, str(ROOT / "examples/merge_digits.py"), str(tmp_path), "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    def read(name: str, **where: str) -> dict[tuple[str, float], float]:
        rows = csv.DictReader((tmp_path / "seed-0" / name).open())
        chosen = [r for r in rows if all(r[k] == v for k, v in where.items())]
        return {(r["layers"], float(r["alpha"])): float(r["value"]) for r in chosen}

    curve, sums = read("curve.csv", group="task=read"), read("curve.csv", group="task=sum")
    assert curve["all", 1.0] > 0.8 and curve["all", 0.9] > curve["all", 0.5] > curve["all", 0.0]
    assert sums["all", 0.0] > 0.9 > sums["all", 1.0]
    halves = read("windows.csv", group="task=read")
    assert halves["3-5", 0.5] > halves["0-2", 0.5]


@pytest.mark.slow
def test_the_coe_toy_begins_where_its_base_stands_and_trains(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/coe_toy.py"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "append: function bit-exact" in done.stdout and "split: function rounding" in done.stdout
    assert done.stdout.splitlines()[-1] == "collapsed: the same bytes"


@pytest.mark.slow
def test_the_control_gains_and_the_healthy_model_does_not(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "examples/adaptvis_control.sh"), str(tmp_path / "out"), "60"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    flat, healthy = (json.loads((tmp_path / "out" / f"{n}.json").read_text()) for n in ("flat", "llava-scenes"))
    assert flat["methods"]["scaling"]["gain"]["interval"][0] > 0.2
    assert healthy["methods"]["scaling"]["gain"]["interval"][0] <= 0.02
    assert done.stdout.splitlines()[-1].startswith("ok ")


def test_every_example_is_run_by_a_test() -> None:
    text = Path(__file__).read_text()
    missing = [p.name for p in (ROOT / "examples").iterdir() if p.suffix in (".py", ".sh") and p.name not in text]
    assert missing == []
