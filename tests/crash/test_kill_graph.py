"""kill -9 at random points of a job of forty shards: nothing half-made is left, --resume finishes what was begun, and
the bytes are those of an undisturbed run. The same for a recipe, and locks of the dead."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

SHARDS = 40
SIZE = 64 << 10  # bytes of a shard of the result
# The command itself, with tensors that take their time and a journal that is synced at once.
SLOW = """
import sys, time
from surgery.cli.main import main
from surgery.ops.cast import Cast
from surgery.store import writer

writer._SYNC_SECONDS = 0.0
cast = Cast.run
Cast.run = lambda self, *rest: time.sleep(0.01) or cast(self, *rest)
main()
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 200 tensors: 40 shards of 5 once it is in bfloat16. Read only."""
    folder = tmp_path_factory.mktemp("big") / "big"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.{i}.w{j}.weight": torch.randn(80, 80, generator=generator) for i in range(40) for j in range(5)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"num_hidden_layers": 40}\n')
    return folder


WORDS = ("cast", "--dtype", "bf16", "--shard-size", "64300", "--workers", "2")


@pytest.fixture(scope="module")
def undisturbed(big: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    subprocess.run([sys.executable, "-m", "surgery", *WORDS, big, "-o", "x", "-q"], cwd=folder, check=True)
    files = weights(folder / "x")
    assert len([n for n in files if n.endswith(".safetensors")]) == SHARDS
    return files


def weights(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.name != "surgery.json"}


def journalled(folder: Path) -> int:
    return sum(max(0, j.read_bytes().count(b"\n") - 1) for j in folder.glob(".x.surgery-*/journal.jsonl"))


def killed_after(count: int, words: tuple[Any, ...], folder: Path) -> bool:
    """Start the command and kill it once `count` tensors are in the journal; False when it ended first."""
    process = subprocess.Popen([sys.executable, "-c", SLOW, *map(str, words)], cwd=folder, stderr=subprocess.DEVNULL)
    while process.poll() is None and journalled(folder) < count:
        time.sleep(0.002)
    process.kill()
    return process.wait() == -signal.SIGKILL


def points(count: int) -> list[int]:
    return sorted(random.Random(7).sample(range(1, 190), count))


def check_point(
    point: int, big: Path, folder: Path, undisturbed: dict[str, bytes], command: Callable[..., Any]
) -> None:
    assert killed_after(point, (*WORDS, big, "-o", "x"), folder)
    assert not (folder / "x").exists() and all(n.startswith(".x.surgery") for n in os.listdir(folder))
    ended = command(*WORDS, big, "-o", "x", "--resume")
    assert ended.code == 0 and ended.stdout == "x\n", ended.stderr
    reused = re.search(r"resumed: (\d+) tensors were reused", ended.stderr)
    assert reused and point <= int(reused[1]) < 200
    assert weights(folder / "x") == undisturbed and os.listdir(folder) == ["x"]


@pytest.mark.parametrize("point", points(10)[::4])
def test_killed_at_any_point_the_job_is_absent_and_resumes_to_the_same_bytes(
    point: int, big: Path, tmp_path: Path, undisturbed: dict[str, bytes], command: Callable[..., Any]
) -> None:
    check_point(point, big, tmp_path, undisturbed, command)


@pytest.mark.slow
@pytest.mark.parametrize("point", points(10))
def test_ten_random_points(
    point: int, big: Path, tmp_path: Path, undisturbed: dict[str, bytes], command: Callable[..., Any]
) -> None:
    check_point(point, big, tmp_path, undisturbed, command)


def test_a_recipe_that_was_killed_goes_on(
    big: Path, tmp_path: Path, undisturbed: dict[str, bytes], command: Callable[..., Any], monkeypatch: Any
) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"surgery: 1\ninputs: {{b: {big}}}\nsteps: {{h: {{op: cast, from: b, with: {{dtype: bf16}}}}}}\n")
    words = ("run", recipe, "-o", tmp_path / "sub" / "x")
    assert killed_after(60, words, tmp_path / "sub")
    ended = command(*words, "--resume")
    assert ended.code == 0 and int(re.search(r"h: resumed: (\d+)", ended.stderr)[1]) >= 60  # type: ignore[index]
    assert command("verify", tmp_path / "sub" / "x").code == 0


def test_the_lock_of_a_dead_process_does_not_stop_anybody(
    big: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    assert killed_after(5, (*WORDS, big, "-o", "x"), tmp_path)
    assert (tmp_path / ".x.surgery.lock").is_file()
    assert command(*WORDS, big, "-o", "x").code == 0 and os.listdir(tmp_path) == ["x"]


def test_a_second_run_on_one_output_is_refused_while_the_first_is_at_work(
    big: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    words = (*WORDS, big, "-o", "x")
    process = subprocess.Popen([sys.executable, "-c", SLOW, *map(str, words)], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        while journalled(tmp_path) < 3:
            assert process.poll() is None
            time.sleep(0.002)
        ended = command(*words)
        assert ended.code == 6 and f"pid {process.pid}" in ended.stderr
    finally:
        process.kill()
        process.wait()
