"""Where the writer may write: targets that are there, and those that another run holds."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from written import KEY, OTHER, names, tree, write_checkpoint

from surgery.errors import Busy, OutputError
from surgery.store.writer import Workspace

# Targets


def test_a_target_that_is_there_is_refused_and_untouched(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="is already there"):
        write_checkpoint(tmp_path / "out")
    assert tree(tmp_path) == before and names(tmp_path) == ["out"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_checkpoint(tmp_path / "out")
    assert "model.safetensors" in names(tmp_path / "out")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_place_of_the_target_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(OutputError):
        write_checkpoint(tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_in_place_of_the_target_is_refused(tmp_path: Path, overwrite: bool) -> None:
    write_checkpoint(tmp_path / "real")
    (tmp_path / "out").symlink_to("real")
    with pytest.raises(OutputError, match="is a link"):
        write_checkpoint(tmp_path / "out", overwrite=overwrite)


def test_overwrite_replaces_what_surgery_made(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out")
    (tmp_path / "out" / "stale").write_text("x")
    write_checkpoint(tmp_path / "out", overwrite=True)
    assert names(tmp_path / "out") == ["model.safetensors", "sub", "surgery.json"] and names(tmp_path) == ["out"]


def test_overwrite_refuses_what_surgery_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match="only what surgery made"):
        write_checkpoint(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"


def test_overwrite_is_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is whole at every system call on the way."""
    write_checkpoint(tmp_path / "out")
    real = os.rename
    monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("two renames leave a moment without a target"))
    write_checkpoint(tmp_path / "out", overwrite=True)
    monkeypatch.setattr(os, "rename", real)
    assert "model.safetensors" in names(tmp_path / "out")


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel, or a file system, that cannot swap two folders."""

    class Libc:
        pass

    monkeypatch.setattr("surgery.store.writer.ctypes.CDLL", lambda *_, **__: Libc())


def test_overwrite_works_where_two_folders_cannot_be_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "out")
    (tmp_path / "out" / "stale").write_text("x")
    without_exchange(monkeypatch)
    write_checkpoint(tmp_path / "out", overwrite=True)
    assert "stale" not in names(tmp_path / "out") and names(tmp_path) == ["out"]


def test_a_swap_that_was_killed_half_way_is_repaired_at_the_next_start(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out")
    before = tree(tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / ".out.surgery-old")
    with Workspace(tmp_path / "out", KEY):
        assert tree(tmp_path / "out") == before
    assert names(tmp_path) == ["out"]


def test_what_is_left_of_a_finished_swap_is_removed_at_the_next_start(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / ".out.surgery-old")
    write_checkpoint(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["x" * 240, "x" * 300])
def test_a_name_too_long_for_the_disk_is_an_error_of_the_output(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError):
        write_checkpoint(tmp_path / name)


def test_a_parent_that_is_a_file_is_an_error_of_the_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        write_checkpoint(tmp_path / "file" / "out")


# Locks


HOLD = """
import sys
from pathlib import Path
from surgery.store.writer import Workspace

with Workspace(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes to the same target."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out"), OTHER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_told_who_writes(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(Busy, match=f"pid {holder.pid} on ") as caught:
        write_checkpoint(tmp_path / "out")
    assert caught.value.status == 6 and not (tmp_path / "out").exists()


def test_the_lock_of_a_dead_process_is_taken(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".out.surgery.lock").exists()
    write_checkpoint(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_two_targets_beside_each_other_do_not_wait(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    write_checkpoint(tmp_path / "other")
    assert "other" in names(tmp_path)


def test_a_second_run_in_one_process_is_busy_too(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", KEY), pytest.raises(Busy):
        write_checkpoint(tmp_path / "out")
