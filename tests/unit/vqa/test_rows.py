"""Reading questions: both forms, what they may leave out, and what is refused by row and field."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from surgery.errors import CheckpointError, SurgeryError, UsageError
from surgery.evals.vqa.rows import read_items


def png(colour: int = 7) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 3), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lines_with_paths_and_base64(tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "a.png").write_bytes(png(9))
    data = lines(
        tmp_path / "q.jsonl",
        {"id": "x", "image": "pics/a.png", "question": "How many?", "answer": 3, "category": "count", "level": 2},
        {"image": [text_of(png()), "data:image/png;base64," + text_of(png(8))], "question": "Same?", "answer": "no"},
        {"question": "3+4=", "answer": "7.50", "precision": 1.0},
        {"question": "Which?", "choices": ["red", "blue"], "answer": "blue"},
        {"question": "Which?", "choices": ["red", "blue"], "answer": "A"},
        {"question": "List", "answer": [1, 2]},
    )
    a, b, c, d, e, f = read_items(data)
    assert (a.id, a.answer, a.answer_type, dict(a.groups)) == ("x", "3", "integer", {"category": "count", "level": "2"})
    assert [p.open().getpixel((0, 0))[0] for p in (*a.images, *b.images)] == [9, 7, 8]
    assert (b.id, b.answer_type) == ("2", "string")
    assert (c.answer_type, c.precision) == ("float", 1)
    assert (d.answer, d.answer_type, e.answer) == ("B", "choice", "A")
    assert (f.answer, f.answer_type) == ("[1, 2]", "list")


def test_tables_of_benchmarks(tmp_path: Path) -> None:
    one, two = text_of(png(1)), text_of(png(2))
    path = tmp_path / "MathVista_MINI.tsv"
    path.write_text(
        "index\timage\tquestion\tchoices\tanswer\tanswer_option\tquestion_type\tanswer_type\tprecision\tcategory\n"
        f"1\t{one}\tHow many?\t\t2\t\tfree_form\tinteger\t\tmath-targeted-vqa\n"
        f"2\t1\tWhich?\t['Yes', \"It's no\"]\tYes\tA\tmulti_choice\ttext\t\tgeneral-vqa\n"
        f"3\t\"['{one}', '{two}']\"\tHow long?\t\t1.5\t\tfree_form\tfloat\t1.0\tgeneral-vqa\n"
    )
    a, b, c = read_items(path)
    assert (a.answer_type, a.groups["category"]) == ("integer", "math-targeted-vqa")
    assert (b.answer, b.choices, b.images[0].open().getpixel((0, 0))[0]) == ("A", ("Yes", "It's no"), 1)
    assert (c.precision, [p.open().getpixel((0, 0))[0] for p in c.images]) == (1, [1, 2])
    star = tmp_path / "MMStar.tsv"
    star.write_text(f"index\timage\tquestion\tA\tB\tC\tanswer\tcategory\n0\t{one}\tWhich?\tB\tA\tC\tB\tmath\n")
    (item,) = read_items(star)
    assert (item.answer, item.choices) == ("B", ("B", "A", "C"))  # with columns of letters the answer is a letter


def test_a_huge_cell_is_read(tmp_path: Path) -> None:
    path = tmp_path / "big.tsv"
    path.write_text(f"index\timage\tquestion\tanswer\n1\t{'A' * 400_000}\tq\ta\n")
    assert len(read_items(path)) == 1


def test_a_limit_draws_by_seed_and_grows(tmp_path: Path) -> None:
    data = lines(tmp_path / "q.jsonl", *({"question": "q", "answer": i} for i in range(50)))
    few, more = ([i.id for i in read_items(data, limit=n)] for n in (10, 20))
    assert set(few) < set(more) and more == sorted(more, key=int) and few != [str(i) for i in range(1, 11)]
    assert few == [i.id for i in read_items(data, limit=10)] != [i.id for i in read_items(data, limit=10, seed=1)]
    assert len(read_items(data, limit=99)) == 50


BAD = {
    "no question": ({"answer": "a"}, "no question"),
    "no answer": ({"question": "q"}, "no answer"),
    "empty answer": ({"question": "q", "answer": " "}, "no answer"),
    "not an object": ([1], "not a JSON object"),
    "unknown type": ({"question": "q", "answer": "a", "answer_type": "essay"}, "answer_type 'essay'"),
    "answer not a choice": ({"question": "q", "answer": "c", "choices": ["x", "y"]}, "none of the 2 choices"),
    "choices no list": ({"question": "q", "answer": "c", "choices": "x"}, "choices is not a list"),
    "choice without choices": ({"question": "q", "answer": "A", "answer_type": "choice"}, "0 choices"),
    "bad precision": ({"question": "q", "answer": "1.5", "precision": "two"}, "precision two"),
    "image a number": ({"question": "q", "answer": "a", "image": [3]}, "image is no path"),
    "image not there": ({"question": "q", "answer": "a", "image": "gone.png"}, "no file"),
    "answer not a number": ({"question": "q", "answer": float("nan")}, "the answer is nan"),
    "answer of another type": ({"question": "q", "answer": "red", "answer_type": "integer"}, "holds no number"),
    "id a list": ({"id": [1], "question": "q", "answer": "a"}, "the id is no text"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named(tmp_path: Path, case: str) -> None:
    row, said = BAD[case]
    with pytest.raises(CheckpointError, match="line 2") as caught:
        read_items(lines(tmp_path / "q.jsonl", {"question": "q", "answer": "a"}, row))
    assert said in caught.value.message and caught.value.hint


def test_ids_are_unique_and_files_are_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="twice"):
        read_items(lines(tmp_path / "q.jsonl", *({"id": "x", "question": "q", "answer": "a"} for _ in "ab")))
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "torn.tsv").write_text("index\tquestion\tanswer\n1\tq\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, kind in (
        ("empty.jsonl", CheckpointError), ("torn.tsv", CheckpointError), ("binary.jsonl", CheckpointError),
        ("gone.jsonl", CheckpointError), ("q.csv", UsageError),
    ):  # fmt: skip
        with pytest.raises(kind):
            read_items(tmp_path / name)


def test_a_json_file_holds_a_list(tmp_path: Path) -> None:
    rows = [{"id": None, "question": "q", "answer": "a"}, {"id": "", "question": "q", "answer": "b"}]
    (tmp_path / "q.json").write_text(json.dumps(rows, indent=1))
    assert [(i.id, i.answer) for i in read_items(tmp_path / "q.json")] == [("1", "a"), ("2", "b")]
    (tmp_path / "q.json").write_text(json.dumps([rows[0], 3]))
    with pytest.raises(CheckpointError, match="item 2: not a JSON object"):
        read_items(tmp_path / "q.json")


def test_a_list_puts_an_item_into_several_groups(tmp_path: Path) -> None:
    from surgery.evals.layers.profile import groups
    from surgery.evals.vqa.evaluate import judged, summary

    (tmp_path / "q.tsv").write_text(
        "index\tquestion\tanswer\tskills\tquestion_type\n1\tq\t1\t['algebra', 'statistics']\tfree_form\n"
        "2\tq\t2\t['algebra']\tfree_form\n3\tq\t3\t\tfree_form\n"
    )
    items = read_items(tmp_path / "q.tsv")
    assert items[0].groups == {"skills": ("algebra", "statistics"), "question_type": "free_form"}
    rows = json.loads(json.dumps([judged(item, "1") for item in items]))
    by_skill = summary(rows, ["skills"])["groups"]["skills"]
    assert {k: (v["n"], v["correct"]) for k, v in by_skill.items()} == {
        "-": (1, 0), "algebra": (2, 1), "statistics": (1, 1)
    }  # fmt: skip
    assert groups(items, "skills")["skills=algebra"] == [0, 1]


def test_pictures_that_are_none_are_refused_when_opened(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for image in ("text.png", "!" * 2000, text_of(b"no picture at all, only some text here")):
        (item,) = read_items(lines(tmp_path / "q.jsonl", {"question": "q", "answer": "a", "image": image}))
        with pytest.raises(SurgeryError) as caught:
            item.images[0].open()
        assert caught.value.code == "checkpoint.no-image" and "line 1" in caught.value.message
