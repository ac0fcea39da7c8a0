"""Evaluations as steps of a recipe: reports with a key, found again, verified, replayed; refused where weights go."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Run = Callable[..., Any]
RECIPE = """\
surgery: 1
inputs: {base: dit-digits}
steps:
  half: {op: cast, from: base, with: {dtype: bfloat16}}
  scores:
    op: eval-images
    from: half
    with: {samples: 20, ref: digits, steps: 2, bootstrap: 0}
outputs: {scores: out/scores}
"""


def state(command: Run, *more: str) -> dict[str, str]:
    rows = json.loads(command("plan", "r.yaml", "--json", *more).stdout)["steps"]
    return {row["name"]: row["state"] for row in rows}


def test_a_report_is_a_node_like_any_other(command: Run, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    assert state(command) == {"half": "run", "scores": "run"}
    ended = command("run", "r.yaml")
    assert (ended.code, ended.stdout) == (0, "out/scores\n"), ended.stderr
    assert sorted(p.name for p in (tmp_path / "out/scores").iterdir()) == ["report.json", "surgery.json"]
    assert state(command) == {"half": "not needed", "scores": "done"}
    again = json.loads(command("run", "r.yaml", "--json").stdout)["scores"]
    numbers = json.loads((tmp_path / "out/scores/report.json").read_text())
    assert again["found"] and again["report"] == numbers and numbers["n"] == 20 and numbers["steps"] == 2
    record = json.loads((tmp_path / "out/scores/surgery.json").read_text())
    assert record["steps"][-1]["params"]["samples"] == 20 and record["steps"][-1]["op"] == "eval-images"
    assert record["parents"]["half"]["digest"] == numbers["model"] and record["digest"] == again["digest"]
    # Elsewhere it is copied, an edit of the evaluation makes only the evaluation again, one of the model both.
    assert state(command, "-o", "else") == {"half": "not needed", "scores": "copy"}
    assert state(command, "--set", "scores.samples=30") == {"half": "cached", "scores": "run"}
    assert state(command, "--set", "half.dtype=float16") == {"half": "run", "scores": "run"}
    assert command("verify", "out/scores").code == 0
    assert "eval-images v1" in command("log", "out/scores").stdout
    assert command("replay", "out/scores", "--to", "again").code == 0
    assert (tmp_path / "again/report.json").read_bytes() == (tmp_path / "out/scores/report.json").read_bytes()
    assert json.loads(command("inspect", "out/scores", "--json").stdout)["digest"] == record["digest"]
    (tmp_path / "again/report.json").write_text(json.dumps(numbers | {"frechet": 0.0}))
    assert command("verify", "again").code == 1


def test_reports_are_no_checkpoints(command: Run, tmp_path: Path) -> None:
    more = "  next: {op: cast, from: scores, with: {dtype: bf16}}\n"
    (tmp_path / "r.yaml").write_text(RECIPE.replace("outputs: {scores", more + "outputs: {next"))
    for ended in (command("run", "r.yaml"), command("plan", "r.yaml")):
        assert ended.code == 2 and "is a report of an evaluation" in ended.stderr, ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("eval-images", "eval-image", "did you mean 'eval-images'"),
        ("samples: 20", "sample: 20", "samples"),
        ("samples: 20", "samples: many", "whole number"),
        ("samples: 20", "samples: 1", "at least 2"),
        ("ref: digits", "ref: digit", "digits"),
        ("bootstrap: 0", "features: other", "classifier"),
        ("bootstrap: 0", "split: test", "train or val"),
        ("bootstrap: 0", "sampler: euler", "ddpm, ddim or dpm"),
    ],
)
def test_bad_steps_end_before_any_work(command: Run, tmp_path: Path, old: str, new: str, word: str) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace(old, new))
    ended = command("run", "r.yaml")
    assert ended.code == 2 and word in ended.stderr and "Traceback" not in ended.stderr, ended.stderr
    assert not (tmp_path / "out").exists()


def test_questions_are_asked_once(command: Run, tmp_path: Path, tiny_llava: Path) -> None:
    Image.new("L", (8, 8), 90).save(tmp_path / "p.png")
    rows = [{"id": f"q{i}", "question": f"{i}+1=", "answer": i + 1, "kind": "text"} for i in range(3)]
    rows.append({"id": "p", "question": "read", "answer": "cat", "kind": "image", "image": "p.png"})
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "r.yaml").write_text(
        f"surgery: 1\ninputs: {{base: {tiny_llava}}}\nsteps:\n  scores: {{op: eval-vqa, from: base, with: "
        "{data: q.jsonl, prompt: bare, max_new_tokens: 2, group_by: kind}}\noutputs: {scores: out/scores}\n"
    )
    ended = command("run", "r.yaml", "--json")
    assert ended.code == 0, ended.stderr
    found = json.loads(ended.stdout)["scores"]["report"]
    assert found["n"] == 4 and set(found["groups"]["kind"]) == {"text", "image"}
    records = "out/scores/records.jsonl"
    assert command("eval", "compare", records, records, "--json").code == 0
    assert state(command) == {"scores": "done"}
    Image.new("L", (8, 8), 91).save(tmp_path / "p.png")  # another picture is another question
    assert state(command) == {"scores": "run"}
