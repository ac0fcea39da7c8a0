"""The file of questions: what is written reads back, and each fault names its line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from surgery.data.spatial.items import Item, items_digest, read_items, split_groups, write_items
from surgery.errors import CheckpointError, UsageError

GOOD = {"id": "a", "image": "p.png", "question": "Where?", "options": ["left", "right"], "answer": "left"}


def written(folder: Path, *rows: object) -> Path:
    (folder / "p.png").write_bytes(b"picture")
    path = folder / "q.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_items_read_back_as_they_were_written(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(b"x")
    item = Item(
        "7", (tmp_path / "p.png",), "Where?", ("Left", "right"), "Left", "left", "cup", "table", "g",
        (("cup", (1.0, 2.0, 3.5, 4.0)),), "test",
    )  # fmt: skip
    write_items(tmp_path / "q.jsonl", [item])
    assert read_items(tmp_path / "q.jsonl") == [item]
    assert json.loads((tmp_path / "q.jsonl").read_text())["image"] == "p.png"


def test_an_answer_is_one_of_the_options_whatever_its_case(tmp_path: Path) -> None:
    assert read_items(written(tmp_path, GOOD | {"answer": "LEFT", "id": 3}))[0].answer == "left"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "line 2 is not a JSON object"),
        ([1], "line 2 is not a JSON object"),
        (GOOD, "id 'a' is there twice"),
        (GOOD | {"id": "b", "anser": "left"}, "unknown key 'anser'"),
        (GOOD | {"id": "b", "answer": "up"}, "answer 'up' is not among left, right"),
        (GOOD | {"id": "b", "question": " "}, "'question' must be text"),
        (GOOD | {"id": "b", "options": ["left"]}, "'options' must list two or more"),
        (GOOD | {"id": "b", "image": []}, "'image' must be a path"),
        (GOOD | {"id": "b", "image": "none.png"}, "none.png does not exist"),
        (GOOD | {"id": "b", "boxes": [{"label": "x", "xyxy": [5, 0, 1, 1]}]}, "'boxes' must list"),
        (GOOD | {"id": "b", "group": 3}, "'group' must be text"),
    ],
)
def test_a_fault_names_its_line_and_key(tmp_path: Path, row: object, said: str) -> None:
    with pytest.raises(CheckpointError, match="line 2") as caught:
        read_items(written(tmp_path, GOOD, row))
    assert said in caught.value.message and caught.value.hint


def test_files_that_are_not_there_or_empty_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_items(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="is a folder") as caught:
        read_items(written(tmp_path, GOOD).parent)
    assert "q.jsonl" in caught.value.hint
    with pytest.raises(CheckpointError, match="holds no items"):
        read_items(written(tmp_path))


def test_splitting_keeps_groups_and_order(tmp_path: Path) -> None:
    items = [Item(str(i), (), "?", ("a", "b"), "a", group=f"g{i // 3}" if i < 30 else "") for i in range(40)]
    held, rest = split_groups(items, val=0.3, seed=1)
    assert {i.split for i in held} == {"val"} and {i.split for i in rest} == {"test"}
    assert sorted((replace(i, split="") for i in [*held, *rest]), key=lambda i: int(i.id)) == items
    assert {i.group for i in held if i.group} & {i.group for i in rest if i.group} == set()
    assert len({i.group or i.id for i in held}) == 6  # of ten groups and ten items without one
    assert split_groups(items, val=0.3, seed=1) == (held, rest) != split_groups(items, val=0.3, seed=2)


def test_the_digest_sees_pictures_and_questions(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    first = items_digest(read_items(path))
    (tmp_path / "p.png").write_bytes(b"another")
    assert items_digest(read_items(path)) != first
