"""`surgery probe routing` as people run it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


def test_it_prints_a_table_and_writes_csv_and_pictures(command: Run, moe: Path) -> None:
    command("coe", moe, "-o", "coe", "--verify", "none")
    ended = command("probe", "routing", "coe", "--tokens", "128", "--length", "64", "-o", "out", "--threads", "1")
    assert ended.code == 0, ended.stderr
    header, *rows = ended.stdout.splitlines()
    assert header.split()[:3] == ["layer", "pass", "k"] and len(rows) == 4
    assert {p.suffix for p in Path("out").iterdir()} == {".csv", ".png"}
    ended = command("probe", "routing", "coe", "--tokens", "128", "-o", "out")
    assert ended.code == 4 and "--overwrite" in ended.stderr


def test_json_holds_the_rows_of_a_text_of_ones_own(command: Run, moe: Path) -> None:
    Path("text.txt").write_text("the quick brown fox " * 20)
    ended = command("probe", "routing", moe, "--text", "text.txt", "--tokens", "128", "--json", "--threads", "1")
    rows = json.loads(ended.stdout)["rows"]
    assert len(rows) == 2 and rows[0]["tokens"] == 128 and rows[0]["reselection"] is None


@pytest.mark.parametrize(
    ("args", "code"),
    [(("--text", "no.txt"), 3), (("--tokens", "2"), 2), (("--device", "cuda"), 5), (("--dtype", "int8"), 2)],
)
def test_wrong_requests(args: tuple[str, ...], code: int, command: Run, moe: Path) -> None:
    ended = command("probe", "routing", moe, *args)
    assert ended.code == code and "Traceback" not in ended.stderr and ended.stdout == ""
