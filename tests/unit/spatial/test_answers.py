"""Reading answers: the strict rule and the reference's, on phrases where they part."""

import pytest

from surgery.evals.spatial.answers import matches_reference, parse_answer

A = ("left", "right", "on", "under")
B = ("left", "right", "front", "behind")


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("Left", A, "left"),
        ("On.", A, "on"),
        ("The mug is on the left side of the plate.", A, "left"),
        ("The mug is to the left of the plate", A, "left"),
        ("on the left", A, "left"),
        ("The mug is on top of the plate", A, "on"),
        ("The lemon is a person", A, None),
        ("under, not on the table", A, None),
        ("left, right, on or under", A, None),
        ("The mug is in front of the plate, right there", B, "front"),
        ("The plate is right, and the mug is behind the plate", B, "behind"),
        ("left of the plate or right of the plate", A, None),
        ("", A, None),
    ],
)
def test_the_strict_rule(text: str, options: tuple[str, ...], said: str | None) -> None:
    assert parse_answer(text, options, "plate") == said


def test_an_answer_comes_back_as_the_option_is_written() -> None:
    assert parse_answer("the LEFT side", ("Left", "Right")) == "Left"


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("The mug is on the left side", "On", True),  # the rule's false positives, kept on purpose
        ("a lemon", "On", True),
        ("left, right, on, under", "Under", True),
        ("on the front", "On", False),
        ("to the right", "left", False),
    ],
)
def test_the_rule_of_the_reference(text: str, gold: str, right: bool) -> None:
    assert matches_reference(text, gold) is right
