"""A mixture of experts that the commands are tried on."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """qwen3-moe-tiny: random weights, one file. Read only."""
    from surgery.graph.run import run_op
    from surgery.ops.init import Init

    return run_op(Init("qwen3-moe-tiny"), [], tmp_path_factory.mktemp("moe") / "moe").path
