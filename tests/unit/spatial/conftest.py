"""Scenes and the shipped model, made ready once."""

from pathlib import Path

import pytest

from surgery.arch.language.load import Loaded, load
from surgery.data.spatial.items import Item, read_items
from surgery.data.spatial.make import make_scenes
from surgery.store.names import open_named


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    """Twenty questions about two things or one. Read only."""
    folder: Path = tmp_path_factory.mktemp("drawn") / "scenes"
    make_scenes(folder, groups=6, questions="both", val=0.2, seed=1)
    return read_items(folder / "test.jsonl")


@pytest.fixture(scope="session")
def llava_scenes() -> Loaded:
    """The shipped model with its processor. Left as it is found."""
    return load(open_named("llava-scenes"))
