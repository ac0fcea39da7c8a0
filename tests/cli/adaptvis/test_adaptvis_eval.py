"""adaptvis eval as a user runs it, on the shipped model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from surgery.data.spatial.make import make_scenes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    make_scenes(folder, groups=5, seed=2)
    return folder / "test.jsonl"


NUMBERS = ("--alpha", "1.5", "--alpha1", "0.8", "--alpha2", "1.2", "--beta", "0.7")


def test_methods_stand_side_by_side(command: Callable, data: Path, tmp_path: Path) -> None:
    done = command("adaptvis", "eval", "llava-scenes", data, "--method", "base,scaling,adapt", *NUMBERS, "--json",
                   "-o", "r.jsonl")  # fmt: skip
    assert done.code == 0, done.stderr
    out = json.loads(done.stdout)
    assert list(out["methods"]) == ["base", "scaling", "adapt"] and out["n"] == 16
    assert out["policy"]["beta"] == 0.7 and out["methods"]["adapt"]["gain"]["interval"][0] <= 0
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 17
    again = command("adaptvis", "eval", "llava-scenes", data, "--method", "base,scaling,adapt", *NUMBERS, "--json",
                    "-o", "r.jsonl", "--resume")  # fmt: skip
    assert json.loads(again.stdout)["methods"] == out["methods"]


def test_a_table_says_what_was_said_and_no_more_than_the_intervals(command: Callable, data: Path) -> None:
    done = command("adaptvis", "eval", "llava-scenes", data, "--method", "base,scaling", "--alpha", "1.01", "--match",
                   "both")  # fmt: skip
    assert done.code == 0 and "what was said, by the right answer" in done.stdout and "reference" in done.stdout
    assert "no reliable gain" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--method", "scaling"), 2, "needs an alpha"),
        (("--method", "adapt"), 2, "needs two alphas"),
        (("--method", "adapt", "--alpha1", "0.5"), 2, "--alpha2 is missing"),
        (("--method", "adapt", "--alpha1", "0.5", "--alpha2", "1.5", "--beta", "2"), 2, "not in [0, 1.01]"),
        (("--method", "scaling", "--alpha", "-1"), 2, "-1"),
        (("--method", "scaling", "--alpha", "2", "--layers", "9"), 2, "valid: 0-2"),
        (("--method", "bse"), 2, "did you mean 'base'"),
        (("--match", "loose"), 2, "unknown"),
        (("--resume",), 2, "--resume needs"),
        (("-o", "r.txt"), 2, "written as .jsonl"),
        (("--from", "none.json"), 2, "none.json"),
    ],
)
def test_wrong_requests_end_in_one_line(command: Callable, data: Path, words: tuple, code: int, said: str) -> None:
    done = command("adaptvis", "eval", "llava-scenes", data, *words)
    assert done.code == code and said in done.stderr and not done.stdout, done.stderr


def test_what_is_no_image_text_model_is_refused(command: Callable, data: Path) -> None:
    done = command("adaptvis", "eval", "dit-digits", data)
    assert done.code == 3 and "hint:" in done.stderr


def test_a_dry_run_says_what_would_be_asked(command: Callable, data: Path) -> None:
    done = command("adaptvis", "eval", "llava-scenes", data, "--dry-run", "--json", "--limit", "3")
    assert json.loads(done.stdout)["items"] == 3
