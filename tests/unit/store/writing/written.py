"""A whole run of the writer in a few lines, and what lies in a folder afterwards."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from surgery.store.writer import PlannedFile, Workspace

KEY = "0123456789ab" + "c" * 52
OTHER = "ba9876543210" + "c" * 52


def planned(relative: str = "model.safetensors", count: int = 3) -> PlannedFile:
    return PlannedFile.plan(relative, ((f"t{i}", "U8", (4,)) for i in range(count)), metadata={"format": "pt"})


def fill(space: Workspace, file: PlannedFile) -> None:
    """Write and journal every tensor."""
    for i, name in enumerate(file.places):
        data = bytes([i]) * 4
        space.write(file, name, data)
        space.note(file.relative, name, hashlib.sha256(data).hexdigest(), 4)
    space.sync()


def write_checkpoint(target: Path, *, key: str = KEY, **choice: bool) -> None:
    """A whole run."""
    with Workspace(target, key, **choice) as space:
        file = planned()
        space.begin_file(file)
        fill(space, file)
        space.put_file("surgery.json", b"{}")
        space.put_file("sub/config.json", b"{}")
        space.publish()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@contextmanager
def masked(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder: Path) -> set[str]:
    return {oct(stat.S_IMODE(f.stat().st_mode)) for f in folder.rglob("*") if f.is_file()}


def interrupt(target: Path, file: PlannedFile) -> None:
    """A run that ends after all tensors of `file` are journalled."""
    with pytest.raises(KeyboardInterrupt), Workspace(target, KEY, resume=True) as space:
        space.begin_file(file)
        fill(space, file)
        raise KeyboardInterrupt


def fails(code: int) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail
