"""What the model reads: styles, images in place, templates."""

from pathlib import Path

import pytest

import surgery
from surgery.errors import CheckpointError, UsageError
from surgery.evals.vqa.prompts import check_images, render, wording
from surgery.evals.vqa.rows import Item, Picture

PICTURE = Picture("row", None, "")
CHOICE = Item("1", "Which?", "A", (PICTURE,), ("red", "blue"), "choice")


def test_styles_differ_in_what_they_ask_for() -> None:
    assert wording(CHOICE, "bare") == "Which?"
    assert wording(CHOICE, "direct").splitlines()[:3] == ["Which?", "(A) red", "(B) blue"]
    assert "alone" in wording(CHOICE, "direct") and "step by step" in wording(CHOICE, "cot")
    assert "2 decimals" in wording(Item("1", "q", "1.25", answer_type="float", precision=2), "direct")
    with pytest.raises(UsageError, match="no prompt style"):
        wording(CHOICE, "fancy")


def test_images_stand_first_or_where_the_text_says(tiny_llava: Path) -> None:
    processor = surgery.load_processor(tiny_llava)
    two = (PICTURE, PICTURE)
    assert render(processor, Item("1", "sum", "3", two), "bare") == "<s><image><image>sum>"
    assert render(processor, Item("1", "a<image>b<image>c", "3", two), "bare") == "<s>a<image>b<image>c>"
    assert render(processor, Item("1", "3+4=", "7"), "bare") == "<s>3+4=>"
    assert render(processor, Item("1", "sum", "3", two), "bare", template="none") == "<image><image>sum"
    with pytest.raises(UsageError, match="names 1 images and has 2"):
        render(processor, Item("1", "a<image>", "3", two), "bare")


def test_text_models_get_text_and_no_images(tiny_llama: Path) -> None:
    tokenizer = surgery.load_processor(tiny_llama)
    assert render(tokenizer, Item("1", "3+4=", "7"), "bare") == "<s>3+4=>"
    with pytest.raises(UsageError, match="takes no images"):
        check_images([CHOICE], False, "llm")
    tokenizer.chat_template = None
    with pytest.raises(CheckpointError, match="no chat template"):
        render(tokenizer, Item("1", "3+4=", "7"), "bare")
    assert render(tokenizer, Item("1", "3+4=", "7"), "bare", template="none") == "3+4="
