"""Importing What's Up and VSR, on files made here in the form of the releases."""

import json
from pathlib import Path

import pytest

from surgery.data.spatial.whatsup import parse_prompt, read_vsr, read_whatsup
from surgery.errors import CheckpointError

FOUR = "Answer with left, right, on or under."


@pytest.mark.parametrize(
    ("prompt", "options", "subject", "other"),
    [
        (f"<image>\nUSER: Where is the mug in relation to the plate? {FOUR}\nASSISTANT:",
         ("left", "right", "on", "under"), "mug", "plate"),
        ("<image>\nUSER:  Where is the toilet in relation to the sink? Answer with left, right, above, or below.\n"
         "ASSISTANT:", ("left", "right", "above", "below"), "toilet", "sink"),
        ("<image>\nUSER: Where are the black trees in relation to the fence? \nAnswer with left, right, front, behind,"
         " above or below..\nASSISTANT:", ("left", "right", "front", "behind", "above", "below"), "black trees",
         "fence"),
        ("<image>\nUSER: Where is the purse in the photo? Answer with behind or front.\nASSISTANT:",
         ("behind", "front"), "purse", ""),
        ("<image>\nUSER: Where is a man in relation to a woman? Answer with left, right, above or below.\nOption A"
         " photo of a man\nASSISTANT:", ("left", "right", "above", "below"), "a man", "a woman"),
    ],
)  # fmt: skip
def test_prompts_are_taken_apart(prompt: str, options: tuple, subject: str, other: str) -> None:
    question, *rest = parse_prompt(prompt)
    assert rest == [options, subject, other]
    assert question.startswith("Where ") and "USER" not in question and "  " not in question


def release(folder: Path, names: list[str], answers: list[str]) -> tuple[Path, Path]:
    """A question file and its annotations; the pictures lie in `folder`/data."""
    rows = [
        {"id": i, "question": f"<image>\nUSER: Where is the mug in relation to the plate? {FOUR}\nASSISTANT:"}
        | {"answer": [a]}
        for i, a in enumerate(answers)
    ]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "a.json").write_text(json.dumps([{"image_path": f"data/set/{n}", "caption_options": []} for n in names]))
    (folder / "data" / "set").mkdir(parents=True)
    for name in names:
        (folder / "data" / "set" / name).write_bytes(b"x")
    return folder / "q.jsonl", folder / "a.json"


def test_controlled_pictures_form_sets_of_four(tmp_path: Path) -> None:
    names = ["mug_on_plate.jpeg", "mug_left_of_plate.jpeg", "mug_right_of_plate.jpeg", "mug_under_plate.jpeg"]
    files = release(tmp_path, names, ["On", "Left", "Right", "Under"])
    items = read_whatsup(*files, tmp_path)
    assert [i.answer for i in items] == ["on", "left", "right", "under"]
    assert {i.group for i in items} == {"mug|plate"} and items[1].images[0].name == names[1]


def test_files_in_another_order_are_refused(tmp_path: Path) -> None:
    files = release(tmp_path, ["mug_on_plate.jpeg", "mug_under_plate.jpeg"], ["Under", "On"])
    with pytest.raises(CheckpointError, match="line 1: the answer is 'under'"):
        read_whatsup(*files, tmp_path)


def test_files_of_different_length_are_refused(tmp_path: Path) -> None:
    files = release(tmp_path, ["mug_on_plate.jpeg"], ["On", "On"])
    with pytest.raises(CheckpointError, match="holds 2 questions"):
        read_whatsup(*files, tmp_path)


def test_pictures_of_coco_and_vg_are_found_by_their_number(tmp_path: Path) -> None:
    questions, annotations = release(tmp_path, ["x"], ["Left"])
    annotations.write_text(json.dumps([[139, "A mug to the left of a plate", "…"]]))
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017" / "000000000139.jpg").write_bytes(b"x")
    assert read_whatsup(questions, annotations, tmp_path)[0].images[0].name == "000000000139.jpg"


def test_pictures_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    questions, annotations = release(tmp_path / "in", ["mug_on_plate.jpeg"], ["On"])
    (tmp_path / "secret.jpg").write_bytes(b"x")
    annotations.write_text(json.dumps([{"image_path": "../secret.jpg"}]))
    with pytest.raises(CheckpointError, match="no picture"):
        read_whatsup(questions, annotations, tmp_path / "in")


def test_vsr_asks_whether_a_statement_is_right(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"x")
    row = {"image_link": "http://images.example/train2017/1.jpg", "caption": "The cat is on the mat.", "relation": "on"}
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row | {"label": v}) + "\n" for v in (1, 0)))
    yes, no = read_vsr(tmp_path / "t.jsonl", tmp_path)
    assert (yes.answer, no.answer, yes.options) == ("yes", "no", ("yes", "no"))
    assert '"The cat is on the mat."' in yes.question and yes.relation == "on"
    (tmp_path / "t.jsonl").write_text(json.dumps(row | {"label": "maybe"}) + "\n")
    with pytest.raises(CheckpointError, match="label 'maybe'"):
        read_vsr(tmp_path / "t.jsonl", tmp_path)
