"""Files that stay whole: taken without their holes, as links where that is asked for, and never written through one."""

import hashlib
import os
from pathlib import Path

import pytest

from surgery.errors import OutputError
from surgery.store import digests
from surgery.store.checkpoint import open_checkpoint
from surgery.store.header import plan_header, read_header
from surgery.store.writer import PlannedFile, Workspace

SIZE = 8 << 20


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """Three tensors of 8 MB: data, a hole, and data only in the middle."""
    header, places = plan_header([(n, "U8", (SIZE,)) for n in "abc"], metadata={"format": "pt"})
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as handle:
        handle.write(header + os.urandom(SIZE))
        handle.truncate(len(header) + 3 * SIZE)
        handle.seek(places["c"][0] + SIZE // 2)
        handle.write(b"middle")
    return path


def planned(source: Path) -> PlannedFile:
    header = read_header(source)
    raw = source.read_bytes()[: header.data_start]
    places = {n: (header.data_start + s.start, s.stop - s.start) for n, s in header.tensors.items()}
    return PlannedFile("copy.safetensors", raw, places, header.file_size, str(source))


def test_the_digest_of_a_hole_is_that_of_its_zeros(sparse: Path) -> None:
    checkpoint = open_checkpoint(sparse)
    for name, ref in checkpoint.tensors.items():
        data = b"".join(bytes(c) for c in checkpoint.chunks(ref))
        assert checkpoint.hash_tensor(ref) == hashlib.sha256(data).hexdigest(), name
    assert digests.zeros_digest(12345) == hashlib.sha256(bytes(12345)).hexdigest()


def test_a_file_that_ends_early_is_no_hole(sparse: Path) -> None:
    checkpoint = open_checkpoint(sparse)
    os.truncate(sparse, sparse.stat().st_size - SIZE)
    with pytest.raises(Exception, match="ends inside 'c'"):
        checkpoint.hash_tensor(checkpoint.tensors["c"])


def test_a_copy_has_the_bytes_and_the_holes(sparse: Path, tmp_path: Path) -> None:
    file = planned(sparse)
    with Workspace(tmp_path / "out", "k" * 64) as space:
        space.check_space(space.need(file))
        space.begin_file(file)
        with open(sparse, "rb") as source:
            space.copy_range(file, 0, source.fileno(), 0, file.size)
        space.publish()
    made = tmp_path / "out" / "copy.safetensors"
    assert made.read_bytes() == sparse.read_bytes()
    assert made.stat().st_blocks * 512 < 2 * SIZE
    assert not os.path.samefile(made, sparse)


def test_a_link_is_the_file_itself_and_needs_no_room(sparse: Path, tmp_path: Path) -> None:
    file = planned(sparse)
    with Workspace(tmp_path / "out", "k" * 64, link="hard") as space:
        assert space.need(file) == 0
        space.begin_file(file)
        assert space.linked == {"copy.safetensors"}
        space.publish()
    assert os.path.samefile(tmp_path / "out" / "copy.safetensors", sparse)


def test_a_resumed_run_never_writes_through_a_link(sparse: Path, tmp_path: Path) -> None:
    file, before = planned(sparse), sparse.read_bytes()
    with pytest.raises(KeyboardInterrupt), Workspace(tmp_path / "out", "k" * 64, link="hard") as space:
        space.begin_file(file)
        (space.scratch / "state").touch()  # something that is worth keeping
        raise KeyboardInterrupt
    other = PlannedFile.plan("copy.safetensors", [("other", "U8", (16,))], metadata={})
    with Workspace(tmp_path / "out", "k" * 64, resume=True) as space:
        space.begin_file(other)
        space.write(other, "other", bytes(16))
        space.publish()
    assert sparse.read_bytes() == before


def test_a_link_across_disks_is_refused(sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OutputError, match="cannot be linked"), Workspace(tmp_path / "out", "k", link="hard") as space:
        space.begin_file(planned(sparse))
