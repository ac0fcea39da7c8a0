"""Every file in examples/ runs as written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def test_the_python_example_shows_an_exact_warm_start(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/graft_api.py"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    line = next(row for row in done.stdout.splitlines() if row.startswith("largest difference"))
    assert float(line.rsplit(" ", 1)[1]) < 1e-5
    assert "5,330,304 parameters" in done.stdout


@pytest.mark.slow
def test_the_shell_example_ends_with_a_verified_graft(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "examples/graft_digits.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("ok ")
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"hyena", "hyena.npz", "hyena.png", "dit-digits.png"}


def test_every_example_is_run_by_a_test() -> None:
    text = Path(__file__).read_text()
    missing = [p.name for p in (ROOT / "examples").iterdir() if p.suffix in (".py", ".sh") and p.name not in text]
    assert missing == []
