"""kill -9 in the middle of a merge: no output, inputs untouched, and --resume ends with the bytes of a quiet run."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vlm_pairs
import yaml

# The command itself, with merged tensors that take their time and a journal that is synced at once.
SLOW = """
import sys, time
from surgery.cli.main import main
from surgery.arch.merging import tasks
from surgery.store import writer

writer._SYNC_SECONDS = 0.0
stream = tasks.stream
tasks.stream = lambda *rest: time.sleep(0.02) or stream(*rest)
main()
"""


def journalled(folder: Path) -> int:
    return sum(max(0, j.read_bytes().count(b"\n") - 1) for j in folder.glob(".out.surgery-*/journal.jsonl"))


def document(pair: vlm_pairs.Pair, folder: Path) -> Path:
    models = [{"model": str(p), "parameters": {"weight": w}} for p, w in ((pair.host, 0.8), (pair.donor, 0.2))]
    (folder / "x.yml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    return folder / "x.yml"


@pytest.mark.parametrize(("method", "at"), [("linear", 5), ("ties", 21), ("document", 13)])
def test_a_killed_merge_goes_on_to_the_same_bytes(
    method: str, at: int, tmp_path: Path, command: Callable[..., Any]
) -> None:
    pair = vlm_pairs.make_pair(tmp_path / "pair", "qwen2_vl", shards=3)
    words = ["merge", pair.host, pair.donor, "-q", "--workers", "1"]
    words += ["--method", "ties", "--base", pair.base] if method == "ties" else []
    if method == "document":
        words[1:3] = ["--config", document(pair, tmp_path / "pair")]
    before = {p: p.read_bytes() for p in (tmp_path / "pair").rglob("*") if p.is_file()}
    assert command(*words, "-o", "whole").code == 0
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, words), "-o", "out"], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and journalled(tmp_path) < at:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert {n for n in os.listdir(tmp_path) if not n.startswith(".out.surgery")} == {"pair", "whole"}
    assert {p: p.read_bytes() for p in before} == before
    ended = command(*[w for w in words if w != "-q"], "-o", "out", "--resume")
    reused = re.search(r"resumed: (\d+) tensors were reused", ended.stderr)
    assert ended.code == 0 and reused and int(reused[1]) >= at, ended.stderr
    for file in (tmp_path / "whole").iterdir():
        assert file.name == "surgery.json" or (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("kind", ["pair", "document", "adapter"])
def test_a_full_disk_is_exit_5_and_leaves_nothing(
    kind: str, tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = vlm_pairs.make_pair(tmp_path / "pair", "qwen2_vl")
    words: list[Any] = ["merge", pair.host, pair.donor]
    if kind == "document":
        words = ["merge", "--config", document(pair, tmp_path / "pair")]
    if kind == "adapter":
        words = ["lora", "extract", pair.donor, pair.base]
    before = {p: p.read_bytes() for p in (tmp_path / "pair").rglob("*") if p.is_file()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        ended = command(*words, "-o", "out")
    assert ended.code == 5 and "error[resource.disk-full]" in ended.stderr and "Traceback" not in ended.stderr
    assert os.listdir(tmp_path) == ["pair"]
    assert {p: p.read_bytes() for p in before} == before
    assert command(*words, "-o", "out", "-q").code == 0
