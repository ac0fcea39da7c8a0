"""Disks that are full, or fill up, or cannot say."""

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from written import KEY, names, write_checkpoint

from surgery.errors import ResourceError
from surgery.graph.run import run_op
from surgery.ops.init import Init
from surgery.store.writer import PlannedFile, Workspace


def test_a_full_disk_shows_before_any_work_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="no space left, needs ") as caught:
        run_op(Init("dit-digits"), [], tmp_path / "out")
    assert caught.value.status == 5 and names(tmp_path) == []


def test_a_limit_on_file_sizes_is_a_full_disk(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ResourceError):
            run_op(Init("dit-digits"), [], tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounting a small file system needs root")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no right to mount here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_too_small_is_seen_before_any_work(small_disk: Path) -> None:
    with pytest.raises(ResourceError, match=r"needs 2,\d+,\d+ bytes and [\d,]+ are free"):
        run_op(Init("dit-digits"), [], small_disk / "out")
    assert names(small_disk) == []


def test_a_disk_that_fills_up_later_leaves_no_target(small_disk: Path) -> None:
    source = small_disk.parent / "big"
    source.write_bytes(bytes(2 << 20))
    with pytest.raises(ResourceError), Workspace(small_disk / "out", KEY) as space:
        space.copy_file(source, "big")
    assert names(small_disk) == []


def test_a_resumed_run_counts_the_space_that_it_holds_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = PlannedFile.plan("model.safetensors", [("t", "U8", (1 << 20,))], metadata={})
    with pytest.raises(KeyboardInterrupt), Workspace(tmp_path / "out", KEY) as space:
        space.begin_file(file)
        space.note(file.relative, "t", "0", 0)
        raise KeyboardInterrupt
    real = os.statvfs(tmp_path)
    nearly_full = os.statvfs_result((4096, 4096, real.f_blocks, 16, 16, *tuple(real)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: nearly_full)
    with Workspace(tmp_path / "out", KEY, resume=True) as space:
        space.check_space(file.size)
        with pytest.raises(ResourceError):
            space.check_space(file.size + (1 << 20))


def test_a_file_system_that_cannot_reserve_space_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    write_checkpoint(tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["t2"].tolist() == [2] * 4
