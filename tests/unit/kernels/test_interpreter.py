"""The kernels in Triton's interpreter: each check of `interpreted.py`, all run by one process."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("interpreted.py")
CHECKS = [
    node.name
    for node in ast.parse(FILE.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton comes for Linux only")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong in each check."""
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "OMP_NUM_THREADS": "1",
    }
    ended = subprocess.run([sys.executable, FILE], env=env, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout)


@pytest.mark.parametrize("name", CHECKS)
def test_kernels_compute_what_the_definition_says(name: str, found: dict[str, str]) -> None:
    assert found[name] == "", found[name]
