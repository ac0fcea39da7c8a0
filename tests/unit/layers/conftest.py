"""Questions and loaded models for tests of layers."""

from pathlib import Path

import pytest
from PIL import Image

import surgery
from surgery.arch.language.load import Loaded, load
from surgery.evals.vqa.rows import Item, Picture


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    """Twelve items of different lengths, half of them with one or two pictures, in two kinds."""
    root = tmp_path_factory.mktemp("questions")
    out = []
    for i in range(12):
        pictures = []
        for n in range((i % 2) * (1 + i % 3)):
            Image.new("L", (8, 8), (30 * i + 90 * n) % 256).save(root / f"{i}-{n}.png")
            pictures.append(Picture("row", root / f"{i}-{n}.png"))
        kind = "image" if pictures else "text"
        out.append(Item(str(i), "what " * (i % 4) + f"{i}?", str(i * 7), tuple(pictures), groups={"kind": kind}))
    return out


@pytest.fixture
def vlm(tiny_llava: Path) -> Loaded:
    """A fresh copy, since tests here change weights."""
    return load(surgery.open(tiny_llava))


@pytest.fixture
def texts(questions: list[Item]) -> list[Item]:
    return [item for item in questions if not item.images]


@pytest.fixture(scope="session")
def related(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model whose layers are those of `tiny_llava` with some noise, as a donor from the same base has them."""
    from tiny_language import save_relative

    return save_relative(tmp_path_factory.mktemp("related") / "llm", tiny_llava)
