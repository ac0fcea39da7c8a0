"""Extraction and scoring: what the rules find in what models write, and what counts as right."""

import pytest

from surgery.evals.vqa.answers import extract, is_right
from surgery.evals.vqa.rows import Item

PETS = ("a cat", "a dog", "three birds", "none of them")


def item(kind: str, answer: str, *, choices: tuple[str, ...] = (), precision: int | None = None) -> Item:
    return Item("1", "?", answer, choices=choices, answer_type=kind, precision=precision)


CHOICES: dict[str, str | None] = {
    "B": "B",
    "b": "B",
    "(C)": "C",
    "C.": "C",
    "C) three birds": "C",
    "**D**": "D",
    "B: a dog": "B",
    "a dog": "B",
    "A dog.": "B",
    "Option D": "D",
    "The answer is C": "C",
    "The answer is (c).": "C",
    "Answer: B. a dog": "B",
    "the answer is a dog": "B",
    "The correct answer is option A.": "A",
    "I think A is wrong and B too. The answer is C.": "C",
    "The answer is A? No: wait. The answer is D.": "D",
    "So we get \\boxed{B}": "B",
    "\\boxed{A} was wrong, rather \\boxed{\\text{C}}": "C",
    "First (A) fails, then (B) fails, so (D)": "D",
    "A quick look shows three birds on a wire.": "C",
    "\\boxed{A} then \\boxed{ {B} } then \\boxed{D": "B",
    "I see nothing": None,
    "A thing is there": None,
    "": None,
    "E": None,
    "I am sure": None,
    "It is a cat or a dog": None,
    "<think>A or B</think>\nC": "C",
    "<answer>(B)</answer>": "B",
    "答案是B": "B",
    "A dog, not a cat.": "B",
}


@pytest.mark.parametrize("response", CHOICES)
def test_letters(response: str) -> None:
    assert extract(item("choice", "A", choices=PETS), response) == CHOICES[response]


NUMBERS: dict[str, str | None] = {
    "7": "7",
    "-7": "-7",
    "−7": "-7",
    "It is 7.": "7",
    "7.0": "7",
    "1,234": "1234",
    "1,234,567.5": "1234567.5",
    "2e3": "2000",
    "3 + 4 = 7": "7",
    "from 3 to 12 apples": "12",
    "3/4": "0.75",
    "\\frac{3}{4}": "0.75",
    "\\boxed{\\dfrac{-1}{2}}": "-0.5",
    "so $x=5$": "5",
    "The answer is 12 because 3*4 is 12 and not 13": "12",
    "The answer is 3 + 4 = 7.": "7",
    "The answer is 3 x 4 = 12": "12",
    "The answer is 3 times 4, that is 12": "12",
    "Answer: 12 (3 x 4)": "12",
    "\\boxed{3 \\times 4}": "12",
    "7 cm": "7",
    "7.5kg": "7.5",
    "10 m^2": "10",
    "5 m/s^2": "5",
    "\\boxed{5 \\, \\text{cm}^2}": "5",
    "90^{\\circ}": "90",
    "1.2 \\times 10^{3}": "1200",
    "1.2 x 10^-1": "0.12",
    "1\\,234": "1234",
    "\\boxed{1{,}234}": "1234",
    "3 1/2": "3.5",
    "3\\frac{1}{2}": "3.5",
    "\\frac12": "0.5",
    "so -\\frac{1}{2}": "-0.5",
    "\\boxed{x = -5}": "-5",
    "\\boxed{2\\sqrt{3}}": "3.46410161513775",
    "\\frac{\\sqrt{9}}{2}": "1.5",
    "\\sqrt[3]{27}": "3",
    "\\boxed{\\sqrt{-1}}": "-1",  # no number; the last digits are taken, and are wrong
    "2^{10}": "1024",
    "\\boxed{-2^2}": "-4",
    "\\boxed{(1+2)^2}": "9",
    "\\boxed{2\\pi^2}": "19.7392088021787",
    "\\boxed{\\sqrt{2}^2}": "2",
    "9^9^9^9": "387420489",
    "x_1 = 5": "5",
    "There are three dogs.": "3",
    "Twenty-one": "21",
    "about 2.5 million people": "2500000",
    "The answer is 3 thousand.": "3000",
    "three hundred": None,
    "two or three": None,
    "No one is there": None,
    "one": "1",
    "<think>7 or 8</think>9": "9",
    "<answer>5</answer> (of 6)": "5",
    "It is the 3D one": None,
    "The answer is 12.\nThree times 4.": "12",
    "Answer: 0.5 m": "0.5",
    "\\boxed{42} and 17": "42",
    "1/0": "0",
    "50%": "50",
    "v2": None,
    "none": None,
    "1e9999": None,
    "9" * 70: None,
}


@pytest.mark.parametrize("response", NUMBERS)
def test_numbers(response: str) -> None:
    assert extract(item("float", "1"), response) == NUMBERS[response]


@pytest.mark.parametrize(
    ("kind", "answer", "precision", "said", "right"),
    [
        ("integer", "7", None, "7.0", True),
        ("integer", "7", None, "7.4", False),
        ("float", "0.33", 2, "0.335", True),  # half a unit of the last decimal, as the data sets define it
        ("float", "0.33", 2, "0.3351", False),
        ("float", "0.33", 2, "1/3", True),
        ("float", "2.5", 1, "2.55", True),
        ("float", "2.5", 1, "2.44", False),
        ("float", "100", 0, "1e2", True),
        ("string", "Red Car", None, "red  car.", True),
        ("string", "red car", None, "The answer is: Red Car", True),
        ("string", "red", None, "red car", False),
        ("string", "Paris", None, "The capital of France is Paris.", True),
        ("string", "Paris", None, "The capital of France is not Paris.", False),
        ("string", "dog", None, "It is a dog", True),
        ("string", "dog", None, "A dog.", True),
        ("string", "the", None, "the", True),
        ("string", "Oslo", None, "Oslo is it", False),
        ("string", "1000", None, "1,000", True),
        ("string", "07", None, "7", False),
        ("string", "07", None, "07", True),
        ("list", "[1, 2, 3]", None, "so [1,2,3]", True),
        ("list", "[1, 2, 3]", None, "(1, 2.0, 3)", True),
        ("list", "[1, 2, 3]", None, "[3, 2, 1]", False),
        ("list", "[1, 2]", None, "[1, 2, 3]", False),
        ("list", "['a', 'b']", None, "[a, B]", True),
        ("list", "[1, 2]", None, "The answer is 1, 2.", True),
        ("list", "[1, 2]", None, "1 and 2", True),
        ("list", "[1, 2]", None, "\\boxed{\\{1, 2\\}}", True),
        ("list", "[1, 2]", None, "Answer: [1, 2], since [3, 4] fails", True),
        ("list", "[[1, 2], [3, 4]]", None, "[[1,2],[3,4]]", True),
        ("list", "[[1, 2], [3, 4]]", None, "[[1,2,3],[4]]", False),
        ("list", "[0.5, 1]", None, "[\\frac{1}{2}, 1.0]", True),
        ("string", "yes", None, "Yes, it is red.", True),
        ("string", "yes", None, "No.", False),
        ("string", "St. Louis", None, "The answer is St. Louis. It is big.", True),
        ("string", "Paris", None, "I think it's Paris", True),
        ("string", "Paris", None, "It\u2019s \u201cParis\u201d.", True),
        ("string", "\\frac{1}{2}", None, "\\boxed{\\frac12}", True),
        ("string", "1/2", None, "0.5", True),
        ("string", "2\\sqrt{2}", None, "\\sqrt{8}", True),
        ("string", "5 cm", None, "5cm", True),
        ("string", "5 cm", None, "5", False),
        ("string", "7", None, "seven", True),
        ("integer", "-3", None, "\\boxed{-3}", True),
        ("integer", "1000", None, "1,000 people", True),
        ("float", "1.73", 2, "\\boxed{\\sqrt{3}}", True),
        ("float", "0.5", 1, "50%", False),
    ],
)
def test_what_counts_as_right(kind: str, answer: str, precision: int | None, said: str, right: bool) -> None:
    asked = item(kind, answer, precision=precision)
    assert is_right(asked, extract(asked, said)) is right


def test_an_equal_choice_under_another_letter_is_right() -> None:
    asked = item("choice", "A", choices=("red", "blue", "red"))
    assert is_right(asked, "C") and not is_right(asked, "B") and not is_right(asked, "Z")


def test_what_is_not_found_is_wrong() -> None:
    assert extract(item("string", "x"), "So, the answer is") is None
    assert not is_right(item("string", "None"), None)
    assert extract(item("list", "[1]"), "no list") is None


@pytest.mark.parametrize("kind", ["choice", "integer", "float", "string", "list"])
def test_what_a_model_writes_is_never_run(kind: str) -> None:
    import builtins
    import sys

    asked = item(kind, "A", choices=PETS if kind == "choice" else (), precision=0)
    seen: list[str] = []
    armed = [True]
    watched = {"exec", "compile", "os.system", "subprocess.Popen", "open", "import"}
    sys.addaudithook(lambda event, args: seen.append(event) if armed[0] and event in watched else None)
    extract(asked, "1")  # compiles its patterns once
    seen.clear()
    for text in ("__import__('os').system('touch ran')", "eval('1+1')", "[].__class__", "\\boxed{open('x','w')}"):
        is_right(asked, extract(asked, text))
    armed[0] = False
    assert set(seen) - {"compile"} == set() and builtins.eval is eval


def test_hostile_lengths_end_soon() -> None:
    import time

    start = time.process_time()
    for text in (
        "\\boxed{" * 20_000,
        "answer is " * 20_000,
        "(" * 100_000,
        "1," * 100_000,
        "[" * 100_000,
        " " * 99_999 + "x",
        "sqrt{" * 20_000,
        "frac{1+" * 20_000,
        "9^" * 40_000,
        "\\frac{1}{" * 10_000,
        "1 1/" * 30_000,
        "one " * 30_000,
        "<answer>" * 20_000,
        "x" * 100_000 + "=5",
    ):
        for kind in ("choice", "integer", "string", "list"):
            extract(item(kind, "A", choices=PETS if kind == "choice" else ()), text)
    assert time.process_time() - start < 5
