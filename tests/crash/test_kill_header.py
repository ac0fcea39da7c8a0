"""kill -9 in a merge with --hash header: what was synced is not made again, though nothing of it has a digest."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vlm_pairs

from surgery.store.checkpoint import open_checkpoint
from surgery.store.header import read_header
from surgery.store.journal import read_journal

# The command itself, with a journal synced at once, killed when its seventh merged tensor begins and something of what
# came before is noted.
KILLED = """
import os, signal, time
from pathlib import Path
from surgery.cli.main import main
from surgery.arch.merging import tasks
from surgery.store import writer

writer._SYNC_SECONDS = 0.0
stream, calls = tasks.stream, []

def counted(*rest):
    calls.append(1)
    if len(calls) == 7:
        (journal,) = Path().glob(".out.surgery-*/journal.jsonl")
        while journal.read_bytes().count(b"\\n") < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return stream(*rest)

tasks.stream = counted
main()
"""


def killed(tmp_path: Path, words: list[Any]) -> Path:
    """The folder that a run leaves which is killed in its work; -o is "out"."""
    line = [sys.executable, "-c", KILLED, *map(str, words), "-o", "out"]
    assert subprocess.run(line, cwd=tmp_path, timeout=200).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (folder,) = tmp_path.glob(".out.surgery-*")
    return folder


def noted_in(folder: Path) -> dict[str, str | None]:
    """The tensors that the journal of a run names, with their digests."""
    path = folder / "journal.jsonl"
    found = read_journal(path, json.loads(path.read_bytes().split(b"\n")[0])["key"])
    assert found
    return {name.split("\0")[1]: sha for name, sha in found.items()}


def spoil(folder: Path, *, but: set[str]) -> None:
    """Change a bit of every tensor of an unfinished run that is not among those."""
    for file in (folder / "out").glob("*.safetensors"):
        header = read_header(file)
        raw = bytearray(file.read_bytes())
        for name, spec in header.tensors.items():
            if name not in but:
                raw[header.data_start + spec.start] ^= 1
        file.write_bytes(raw)


def same_files(one: Path, two: Path) -> bool:
    return all(f.name == "surgery.json" or (two / f.name).read_bytes() == f.read_bytes() for f in one.iterdir())


def merged_once(tmp_path: Path, command: Callable[..., Any]) -> list[Any]:
    """The words of a merge that was made in "whole". Its parents have digests, so the work has one key with and
    without."""
    pair = vlm_pairs.make_pair(tmp_path / "pair", "qwen2_vl", shards=3)
    assert all(open_checkpoint(model).digest for model in (pair.host, pair.donor))
    words = ["merge", pair.host, pair.donor, "--workers", "1"]
    assert command(*words, "-o", "whole").code == 0
    return words


@pytest.mark.parametrize("digested", [False, True], ids=["parents never digested", "parents digested"])
def test_tensors_without_digests_are_taken_once_they_are_synced(
    digested: bool, tmp_path: Path, command: Callable[..., Any]
) -> None:
    pair = vlm_pairs.make_pair(tmp_path / "pair", "qwen2_vl", shards=3)
    if digested:
        assert all(open_checkpoint(model).digest for model in (pair.host, pair.donor))
    words = ["merge", pair.host, pair.donor, "--hash", "header", "--workers", "1"]
    assert command(*words, "-o", "whole").code == 0
    folder = killed(tmp_path, words)
    noted = noted_in(folder)
    marked = {name for name, sha in noted.items() if sha is None}
    merged = {n for n in marked if ".layers." in n}
    assert merged and (marked == noted.keys()) is not digested
    spoil(folder, but=set(noted))  # whatever the journal does not name was never finished
    ended = command(*words, "-o", "out", "--resume")
    assert ended.code == 0, ended.stderr
    assert f"resumed: {len(noted)} tensors were reused" in ended.stderr
    assert same_files(tmp_path / "whole", tmp_path / "out")


def test_a_run_with_digests_trusts_nothing_that_has_none(tmp_path: Path, command: Callable[..., Any]) -> None:
    words = merged_once(tmp_path, command)
    folder = killed(tmp_path, [*words, "--hash", "header"])
    digested = {name for name, sha in noted_in(folder).items() if sha is not None}
    spoil(folder, but=digested)
    ended = command(*words, "-o", "out", "--resume")
    assert ended.code == 0 and same_files(tmp_path / "whole", tmp_path / "out"), ended.stderr
    assert command("verify", "out").code == 0 and "no digest" not in ended.stderr


def test_a_run_without_digests_goes_on_with_one_that_has_them(tmp_path: Path, command: Callable[..., Any]) -> None:
    words = merged_once(tmp_path, command)
    noted = noted_in(killed(tmp_path, words))
    ended = command(*words, "-o", "out", "--resume", "--hash", "header", "--json")
    shown = json.loads(ended.stdout)
    tensors = json.loads((tmp_path / "out" / "surgery.json").read_text())["tensors"]
    assert shown["reused"] == len(noted) > 0 and shown["undigested"] > 0
    assert all("sha256" in tensors[name] for name in noted)
    assert command("verify", "out").code == 0
    assert same_files(tmp_path / "whole", tmp_path / "out")
