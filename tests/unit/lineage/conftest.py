"""Outputs whose records are looked at."""

import shutil
from pathlib import Path

import pytest
from graft_runs import graft


@pytest.fixture(scope="session")
def child(tiny_dit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graft of `tiny_dit`. Read only."""
    return graft(tiny_dit, tmp_path_factory.mktemp("child") / "child").path


@pytest.fixture(scope="session")
def pipeline_child(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graft of the whole pipeline. Read only."""
    return graft(tiny_pipeline, tmp_path_factory.mktemp("pipe") / "child").path


@pytest.fixture
def copy(child: Path, tmp_path: Path) -> Path:
    """A graft of `tiny_dit` to damage."""
    return shutil.copytree(child, tmp_path / "copy")
