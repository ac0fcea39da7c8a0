"""What docs/questions.md says of files and answers is so."""

import re
from pathlib import Path

from PIL import Image

from surgery.evals.vqa.answers import extract
from surgery.evals.vqa.rows import Item, read_items

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "questions.md").read_text()


def test_the_lines_shown_are_read(tmp_path: Path) -> None:
    lines = [line.strip() for line in PAGE.splitlines() if line.startswith("    {")]
    (tmp_path / "q.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "pics").mkdir()
    for name in ("pics/7.png", "a.png", "b.png"):
        Image.new("L", (4, 4)).save(tmp_path / name)
    rod, larger = read_items(tmp_path / "q.jsonl")
    assert (rod.answer_type, rod.precision, rod.groups["skills"]) == ("float", 1, ("reading",))
    assert (larger.answer, larger.answer_type, len(larger.images)) == ("B", "choice", 2)


def test_the_examples_of_each_type_are_read_as_answers() -> None:
    row = dict(re.findall(r"^\| (choice|integer, float) \| (.*?) \|", PAGE, re.MULTILINE))
    pets = Item("1", "?", "B", choices=("a cat", "a dog"), answer_type="choice")
    assert {extract(pets, said) for said in re.findall(r"`(.+?)`", row["choice"])} == {"B"}
    said = re.findall(r"`(.+?)`", row["integer, float"])
    number = Item("1", "?", "1", answer_type="float")
    read = ["1234", "7.5", "10", "1200", "3.5", "0.75", "3.46410161513775", "3"]
    assert [extract(number, text) for text in said] == read
    listed = Item("1", "?", "[1, 2]", answer_type="list")
    for text in ("[1, 2]", "(1, 2)", "The answer is 1 and 2"):
        assert extract(listed, text) == "[1, 2]"
