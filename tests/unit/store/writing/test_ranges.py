"""The two ways to move bytes from file to file, and the hint to write them out."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from written import KEY, fails

from surgery.store.checkpoint import open_checkpoint
from surgery.store.ranges import copy_range, start_writing
from surgery.store.writer import PlannedFile, Workspace


@pytest.mark.parametrize(
    "kernel",
    [fails(errno.EXDEV), fails(errno.ENOSYS), fails(errno.EOPNOTSUPP), fails(errno.EINVAL), lambda *_: 0],
    ids=["other device", "missing", "unsupported", "invalid", "moves nothing"],
)
def test_the_slow_way_to_copy_gives_the_same_bytes(
    tmp_path: Path, kernel: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(5 << 20)
    (tmp_path / "source").write_bytes(data)
    monkeypatch.setattr(os, "copy_file_range", kernel)
    with open(tmp_path / "source", "rb") as source, open(tmp_path / "target", "w+b") as target:
        copy_range(source.fileno(), 17, target.fileno(), 3, len(data) - 40)
    assert (tmp_path / "target").read_bytes() == bytes(3) + data[17:-23]


def test_the_kernel_copies_where_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(b"0123456789")
    calls = []
    real = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda *a: calls.append(a) or real(*a))
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("bytes came into the process"))
    with open(tmp_path / "source", "rb") as source, open(tmp_path / "target", "w+b") as target:
        copy_range(source.fileno(), 2, target.fileno(), 0, 5)
    assert (tmp_path / "target").read_bytes() == b"23456" and len(calls) == 1


def test_a_source_that_shrinks_while_it_is_copied_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"0123456789")
    (tmp_path / "target").touch()
    source, target = (os.open(tmp_path / name, os.O_RDWR) for name in ("source", "target"))
    with pytest.raises(OSError, match="became shorter"):
        copy_range(source, 5, target, 0, 6)
    os.close(source)
    os.close(target)


def test_kept_tensors_of_a_lone_file_are_taken_as_they_are(tmp_path: Path) -> None:
    save_file({"a": torch.arange(4.0), "b": torch.arange(3, dtype=torch.int8)}, tmp_path / "x.safetensors")
    source = open_checkpoint(tmp_path / "x.safetensors")
    with Workspace(tmp_path / "out", KEY) as space, open(tmp_path / "x.safetensors", "rb") as handle:
        file = PlannedFile.plan("y.safetensors", [("b", "I8", (3,)), ("a", "F32", (4,))], metadata={})
        space.begin_file(file)
        for name, ref in source.tensors.items():
            space.copy_range(file, file.places[name][0], handle.fileno(), ref.offset, ref.nbytes)
        space.publish()
    found = open_checkpoint(tmp_path / "out" / "y.safetensors")
    assert found.digest == source.digest


def test_starting_to_write_never_fails(tmp_path: Path) -> None:
    """It is a hint: pipes and file systems that know nothing of it do without."""
    read, write = os.pipe()
    start_writing(write, 0, 10)
    start_writing(-1, 0, 10)
    for fd in (read, write):
        os.close(fd)
    with open(tmp_path / "f", "w+b") as file:
        file.write(b"abc")
        file.flush()
        start_writing(file.fileno(), 0, 3)
        start_writing(file.fileno(), 0, 0)
    assert (tmp_path / "f").read_bytes() == b"abc"
