"""What tests of recipes get: an empty cache each, and the recipe of their module as a file."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def empty_cache(own_cache: Path) -> None:
    """For every test of this folder, whether it asks or not."""


@pytest.fixture
def recipe(request: pytest.FixtureRequest, tmp_path: Path, tiny_dit: Path) -> Path:
    """The module's RECIPE as a file, `tiny_dit` in the place of BASE."""
    path = tmp_path / "recipe.yaml"
    path.write_text(request.module.RECIPE.replace("BASE", str(tiny_dit)))
    return path
