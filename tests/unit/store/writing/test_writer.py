"""The writer: what a published folder looks like, small files, and whole operations."""

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest
from safetensors.torch import load_file
from written import KEY, fails, masked, modes, names, planned, tree, write_checkpoint

from surgery.errors import CheckpointError, OutputError, ResourceError
from surgery.graph.run import RunOptions, run_op
from surgery.ops.init import Init
from surgery.store.checkpoint import open_checkpoint
from surgery.store.writer import Workspace, atomic_write

# What a published folder looks like


def test_what_is_published_reads_back(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {n: t.tolist() for n, t in found.items()} == {f"t{i}": [i] * 4 for i in range(3)}


def test_nothing_is_left_beside_the_target(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_parents_of_the_target_are_made(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a" / "b" / "out")
    assert names(tmp_path / "a" / "b") == ["out"]


@pytest.mark.parametrize(
    ("mask", "file", "folder"), [(0o027, 0o640, 0o750), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_the_umask_is_honoured(tmp_path: Path, mask: int, file: int, folder: int) -> None:
    source = tmp_path / "closed"
    source.write_text("x")
    source.chmod(0o600)
    with masked(mask), Workspace(tmp_path / "out", KEY) as space:
        space.begin_file(planned())
        space.copy_file(source, "sub/copied.txt")
        space.put_file("surgery.json", b"{}")
        space.publish()
    assert modes(tmp_path / "out") == {oct(file)}
    for place in (tmp_path / "out", tmp_path / "out" / "sub"):
        assert stat.S_IMODE(place.stat().st_mode) == folder


def test_a_whole_operation_honours_the_umask(tmp_path: Path) -> None:
    with masked(0o027):
        run_op(Init("dit-digits"), [], tmp_path / "out")
    assert modes(tmp_path / "out") == {"0o640"}


def test_a_link_is_read_through_and_never_made(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("text")
    (tmp_path / "link").symlink_to("real")
    with Workspace(tmp_path / "out", KEY) as space:
        space.copy_file(tmp_path / "link", "file")
        space.publish()
    assert (tmp_path / "out" / "file").read_text() == "text" and not (tmp_path / "out" / "file").is_symlink()


def test_a_link_planted_in_the_working_folder_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    with Workspace(tmp_path / "out", KEY) as space:
        (space.folder / "out" / "model.safetensors").symlink_to(victim)
        with pytest.raises(OutputError):
            space.begin_file(planned())
        (space.folder / "out" / "config.json").symlink_to(victim)
        with pytest.raises(OutputError):
            space.put_file("config.json", b"{}")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", [".out.surgery.lock", f".out.surgery-{KEY[:12]}"])
def test_a_link_planted_where_the_run_works_is_not_followed(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    (tmp_path / name).symlink_to(victim / "file" if name.endswith("lock") else victim)
    if name.endswith("lock"):
        with pytest.raises(OutputError):
            write_checkpoint(tmp_path / "out")
    else:
        write_checkpoint(tmp_path / "out", resume=True)
    assert (victim / "file").read_text() == "precious" and names(victim) == ["file"]


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", "."])
def test_a_file_outside_the_output_is_refused(tmp_path: Path, name: str) -> None:
    with Workspace(tmp_path / "out", KEY) as space, pytest.raises(OutputError, match="would leave the output folder"):
        space.put_file(name, b"x")
    assert names(tmp_path) == []


def test_data_of_another_size_than_planned_is_refused(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", KEY) as space:
        file = planned()
        space.begin_file(file)
        with pytest.raises(OutputError, match="'t0' has 3 bytes where the plan has 4"):
            space.write(file, "t0", b"123")


def test_a_side_file_that_cannot_be_read_is_an_error_of_the_input(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", KEY) as space, pytest.raises(CheckpointError, match="no-such-file"):
        space.copy_file(tmp_path / "no-such-file", "x")


# Small files


def test_a_small_file_is_written_with_its_folder(tmp_path: Path) -> None:
    with masked(0o027):
        atomic_write(tmp_path / "a" / "b.csv", b"x")
    assert (tmp_path / "a" / "b.csv").read_bytes() == b"x" and modes(tmp_path) == {"0o640"}
    assert names(tmp_path / "a") == ["b.csv"]


def test_a_small_file_that_is_replaced_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    (tmp_path / "x").chmod(0o604)
    atomic_write(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_text() == "new" and modes(tmp_path) == {"0o604"}


def test_a_small_file_put_over_a_link_replaces_the_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("precious")
    (tmp_path / "x").symlink_to("real")
    atomic_write(tmp_path / "x", b"new")
    assert (tmp_path / "real").read_text() == "precious" and not (tmp_path / "x").is_symlink()


def test_a_small_file_on_a_full_disk_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(os, "pwrite", fails(errno.ENOSPC))
    with pytest.raises(ResourceError):
        atomic_write(tmp_path / "x", b"new")
    assert tree(tmp_path) == {"x": b"old"}


def test_a_small_file_below_a_file_is_an_error_of_the_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        atomic_write(tmp_path / "file" / "x", b"new")


# Through a whole operation


def test_workers_do_not_change_the_bytes(tmp_path: Path) -> None:
    for workers in (1, 3):
        run_op(Init("dit-digits"), [], tmp_path / str(workers), options=RunOptions(workers=workers))
    one, three = (tree(tmp_path / name) for name in ("1", "3"))
    assert one.keys() == three.keys() and all(one[n] == three[n] for n in one if n != "surgery.json")


def test_the_result_s_digests_are_known_without_hashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_op(Init("dit-digits"), [], tmp_path / "out")
    monkeypatch.setattr("surgery.store.checkpoint.Checkpoint.hash_tensor", lambda *_: pytest.fail("hashed again"))
    assert f"sha256:{open_checkpoint(tmp_path / 'out').digest}" == result.record["digest"]


def test_an_output_inside_or_above_a_parent_is_refused(
    tiny_dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery.ops.graft import Graft

    parent = shutil.copytree(tiny_dit, tmp_path / "a" / "parent")
    op = Graft(replace=("mlp=r3",), init="random")
    for out in (parent / "new", tmp_path / "a", parent):
        with pytest.raises(OutputError, match="inside or above"):
            run_op(op, [open_checkpoint(parent)], out)
    monkeypatch.chdir(parent)
    with pytest.raises(OutputError, match="inside or above"):
        run_op(op, [open_checkpoint(Path("."))], None)
    assert not [n for n in names(parent) if "graft" in n]
