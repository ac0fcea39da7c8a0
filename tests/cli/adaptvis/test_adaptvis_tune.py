"""surgery adaptvis tune: from questions to numbers that attach and eval take."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

QUICK = ("--alphas", "0.5,1,2", "--threads", "1")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from surgery.data.spatial.make import make_scenes

    out = tmp_path_factory.mktemp("tune") / "scenes"
    make_scenes(out, groups=16, val=0.5, seed=3)
    return out


def test_tune_attach_eval(command: Callable, scenes: Path, tmp_path: Path) -> None:
    tuned = command("adaptvis", "tune", "llava-scenes", scenes / "val.jsonl", "-o", "t.json", *QUICK, "--folds", "4")
    assert (tuned.code, tuned.stdout) == (0, "t.json\n"), tuned.stderr
    assert "cross-fitted" in tuned.stderr and "surgery adaptvis attach llava-scenes --from t.json" in tuned.stderr
    found = json.loads((tmp_path / "t.json").read_text())
    assert found["alpha1"] in (0.5, 1.0, 2.0) and 0 <= found["beta"] <= 1.01
    assert found["tuned_on"]["validation"] == 32 and found["tuned_on"]["test"] == 0
    report = found["report"]["validation"]
    assert report["adapt"]["accuracy"] >= report["scaling"]["accuracy"] >= report["base"]["accuracy"]
    assert report["right"]["1"] == round(report["base"]["accuracy"] * 32)
    attached = command("adaptvis", "attach", "llava-scenes", "--from", "t.json", "-o", "av")
    assert attached.code == 0, attached.stderr
    spec = json.loads((tmp_path / "av/config.json").read_text())["adaptvis"]
    assert spec["beta"] == found["beta"] and spec["tuned_on"]["model"] == found["tuned_on"]["model"]
    assert command("adaptvis", "verify", "av").code == 0
    judged = command("adaptvis", "eval", "av", scenes / "val.jsonl", "--method", "base,scaling,adapt", "--json")
    methods = json.loads(judged.stdout)["methods"]
    assert {m: methods[m]["accuracy"] for m in methods} == {m: report[m]["accuracy"] for m in methods}


def test_a_share_of_the_groups_is_held_out(command: Callable, scenes: Path, tmp_path: Path) -> None:
    arguments = ("adaptvis", "tune", "llava-scenes", scenes / "val.jsonl", "-o", "t.json", *QUICK, "--folds", "2")
    tuned = command(*arguments, "--val-fraction", "0.5", "--objective", "balanced", "--answer", "closed-set", "--json")
    assert tuned.code == 0, tuned.stderr
    found = json.loads(tuned.stdout)
    assert len(found["tuned_on"]["validation"]) == found["tuned_on"]["test"] == 16
    assert found["report"]["verdict"] in ("gain", "loss", "no reliable gain")
    low, high = found["report"]["test"]["adapt_gain"]["interval"]
    assert low <= high and "balanced" in found["report"]["test"]["adapt"] and "held-out gain" in tuned.stderr


def test_a_killed_tuning_goes_on(command: Callable, scenes: Path, tmp_path: Path) -> None:
    base = ("adaptvis", "tune", "llava-scenes", scenes / "val.jsonl", *QUICK, "--batch", "4", "--records", "r.jsonl")
    whole = command(*base, "-o", "one.json")
    assert whole.code == 0, whole.stderr
    lines = (tmp_path / "r.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "r.jsonl").write_text("".join(lines[:9]))
    again = command(*base, "-o", "two.json", "--resume")
    assert again.code == 0, again.stderr
    assert (tmp_path / "r.jsonl").read_text().splitlines()[1:] == [s.rstrip("\n") for s in lines[1:]]
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    other = command(*base, "-o", "three.json", "--resume", "--confidence", "margin")
    assert other.code == 2 and "other settings" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["llava-scenes", "DATA", "-o", "t.txt"], 2, "-o t.json"),
        (["llava-scenes", "DATA", "-o", "taken.json"], 4, "taken.json"),
        (["llava-scenes", "DATA", "-o", "t.json", "--alphas", "0.5,2"], 2, "1 (the plain model)"),
        (["llava-scenes", "DATA", "-o", "t.json", "--alphas", "one"], 2, "not a list of numbers"),
        (["llava-scenes", "DATA", "-o", "t.json", "--alphas", "0,1", "--mode", "bias"], 2, "logarithm"),
        (["llava-scenes", "DATA", "-o", "t.json", "--objective", "recall"], 2, "balanced"),
        (["llava-scenes", "DATA", "-o", "t.json", "--confidence", "max"], 2, "max-prob"),
        (["llava-scenes", "DATA", "-o", "t.json", "--layers", "0-9"], 2, "valid: 0-2"),
        (["llava-scenes", "DATA", "-o", "t.json", "--match", "loose"], 2, "reference"),
        (["llava-scenes", "DATA", "-o", "t.json", "--resume"], 2, "--records"),
        (["llava-scenes", "DATA", "-o", "t.json", "--val-fraction", "2"], 2, "0 to 1"),
        (["llava-scenes", "nothing.jsonl", "-o", "t.json"], 2, "nothing.jsonl"),
        (["dit-digits", "DATA", "-o", "t.json"], 3, "no image token id"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input_ends_in_one_line_and_a_hint(
    command: Callable, scenes: Path, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    (tmp_path / "taken.json").write_text("{}")
    ended = command("adaptvis", "tune", *(str(scenes / "val.jsonl") if a == "DATA" else a for a in arguments))
    assert ended.code == code, ended.stderr
    lines = ended.stderr.strip().splitlines()
    assert lines[-2].startswith("error[") and lines[-1].startswith("hint:") and words in ended.stderr
    assert os.listdir(tmp_path) == ["taken.json"]
