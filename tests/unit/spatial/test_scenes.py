"""Drawn scenes: what is asked follows from the coordinates, and equal seeds give equal bytes."""

from pathlib import Path

import numpy as np
import pytest

from surgery.data.spatial.items import read_items
from surgery.data.spatial.make import make_scenes
from surgery.data.spatial.scenes import COLOURS, NOUNS, WORDS, Placed, SceneSettings, ask, draw, place
from surgery.errors import OutputError, UsageError


@pytest.mark.parametrize(
    ("dx", "dy", "answer"), [(-20, 3, "left"), (20, -3, "right"), (2, -30, "above"), (-4, 30, "below"), (20, 19, None)]
)
def test_the_answer_is_the_side_of_the_larger_distance(dx: float, dy: float, answer: str | None) -> None:
    question = ask(Placed(0, 48 + dx, 48 + dy, 8), Placed(1, 48, 48, 8), 96)
    assert (question.answer if question else None) == answer


def test_a_question_about_one_thing_is_about_the_picture() -> None:
    question = ask(Placed(2, 50, 90, 6), None, 96)
    assert question is not None and question.answer == "bottom" and question.text.endswith("the triangle?")


def test_things_do_not_overlap_and_lie_in_the_picture() -> None:
    settings = SceneSettings(objects=(4, 6))
    for seed in range(30):
        things = place(np.random.default_rng(seed), settings, first=(3, 5))
        assert [t.noun for t in things[:2]] == [3, 5] and len({t.noun for t in things}) == len(things) >= 4
        assert all(min(t.box) >= 0 and max(t.box) <= settings.size for t in things)
        for a in things:
            assert all(max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius for b in things if b is not a)


@pytest.mark.parametrize("noun", range(len(NOUNS)))
def test_a_thing_is_drawn_inside_its_box_in_its_colour(noun: int) -> None:
    thing = Placed(noun, 40.0, 60.0, 14.0)
    picture = draw([thing], SceneSettings(noise=0), np.random.default_rng(0)).astype(int)
    touched = np.argwhere((picture != 235).any(-1))
    left, top, right, bottom = thing.box
    assert touched[:, 1].min() >= left - 1 and touched[:, 1].max() <= right
    assert touched[:, 0].min() >= top - 1 and touched[:, 0].max() <= bottom
    assert (picture == COLOURS[noun]).all(-1).sum() > 150


def test_every_word_of_every_question_is_known() -> None:
    a, b = Placed(0, 10, 48, 5), Placed(1, 80, 48, 5)
    texts = [q.text for q in (ask(a, b, 96), ask(a, None, 96)) if q]
    assert {w for text in texts for w in text.lower().rstrip("?").split()} <= set(WORDS)


def test_equal_seeds_give_equal_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert make_scenes(tmp_path / name, groups=5, seed=3) == {"val": 4, "test": 16}
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len(files) == 20 + 3 and Path("img/0001.png") in files
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_groups_are_whole_and_on_one_side_of_the_split(tmp_path: Path) -> None:
    make_scenes(tmp_path / "s", groups=6, questions="both", val=0.34)
    held, tested = (read_items(tmp_path / "s" / f"{name}.jsonl") for name in ("val", "test"))
    assert {i.group for i in held} & {i.group for i in tested} == set()
    for group in {i.group for i in held + tested}:
        members = [i for i in held + tested if i.group == group]
        assert sorted(m.answer for m in members) == sorted(members[0].options)
        assert all(len(m.boxes) == (2 if m.object else 1) for m in members)


def test_a_folder_that_is_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(OutputError, match="already there"):
        make_scenes(tmp_path / "mine", groups=2, val=0.5, overwrite=True)
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]
    make_scenes(tmp_path / "s", groups=2, val=0.5)
    make_scenes(tmp_path / "s", groups=3, val=0.5, overwrite=True)
    assert len(list((tmp_path / "s" / "img").iterdir())) == 12
    assert {p.name for p in tmp_path.iterdir()} == {"mine", "s"}


@pytest.mark.parametrize("settings", [{"size": 4}, {"objects": (0, 2)}, {"objects": (2, 9)}, {"radius": (30, 40)}])
def test_scenes_that_cannot_be_drawn_are_refused(settings: dict) -> None:
    with pytest.raises(UsageError):
        SceneSettings(**settings)
