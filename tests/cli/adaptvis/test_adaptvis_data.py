"""adaptvis data: scenes and imports as a user makes them."""

import json
from collections.abc import Callable
from pathlib import Path


def test_scenes_are_made_and_refused(command: Callable, tmp_path: Path) -> None:
    done = command("adaptvis", "data", "make", "-o", "scenes", "--groups", "5")
    assert (done.stdout, done.code) == ("scenes\n", 0) and "4 questions in scenes/val.jsonl" in done.stderr
    assert len((tmp_path / "scenes" / "test.jsonl").read_text().splitlines()) == 16
    again = command("adaptvis", "data", "make", "-o", "scenes")
    assert again.code == 4 and "error[output.exists]: scenes" in again.stderr and not again.stdout
    assert command("adaptvis", "data", "make", "-o", "x", "--objects", "many").code == 2
    assert command("adaptvis", "data", "make", "-o", "x", "--groups", "2").code == 2
    assert not (tmp_path / "x").exists()


def test_vsr_is_imported_and_split(command: Callable, tmp_path: Path) -> None:
    rows = [{"image": f"{i // 2}.jpg", "caption": "A cat is on a mat.", "label": i % 2} for i in range(20)]
    (tmp_path / "vsr.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for i in range(10):
        (tmp_path / f"{i}.jpg").write_bytes(b"x")
    line = ("adaptvis", "data", "import", "vsr", "vsr.jsonl", "--images", ".", "-o", "out.jsonl")
    assert command(*line).stdout == "out.jsonl\n"
    assert command(*line).code == 4
    done = command(*line, "--val-fraction", "0.3", "--json", "--overwrite")
    assert json.loads(done.stdout)["paths"] == {"out.val.jsonl": 6, "out.test.jsonl": 14}


def test_a_whole_import_names_what_is_missing(command: Callable, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"id": 0, "question": "x", "answer": ["Left"]}\n')
    done = command(
        "adaptvis", "data", "import", "whatsup", "q.jsonl", "--annotations", "a.json", "--images", ".", "-o", "o.jsonl"
    )
    assert done.code == 2 and "a.json does not exist" in done.stderr
