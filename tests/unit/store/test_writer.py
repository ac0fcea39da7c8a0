"""The writer: modes, links, targets, locks, full disks, and the two ways to move bytes."""

import errno
import hashlib
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.errors import Busy, CheckpointError, OutputError, ResourceError
from surgery.graph.run import RunOptions, run_op
from surgery.ops.init import Init
from surgery.store.checkpoint import open_checkpoint
from surgery.store.journal import Journal, read_journal
from surgery.store.ranges import copy_range, start_writing
from surgery.store.writer import PlannedFile, Workspace, atomic_write

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


# Full disks


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


# Moving bytes


def fails(code: int) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


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


# The journal


def test_finished_tensors_are_read_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", KEY)
    journal.append([{"file": "f", "tensor": "a", "sha256": "1"}, {"file": "f", "tensor": "b\n", "sha256": "2"}])
    journal.close()
    assert read_journal(tmp_path / "j", KEY) == {"f\0a": "1", "f\0b\n": "2"}


def test_a_journal_of_other_work_counts_for_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", KEY)
    journal.append([{"file": "f", "tensor": "a", "sha256": "1"}])
    journal.close()
    assert read_journal(tmp_path / "j", OTHER) is None
    Journal(tmp_path / "j", OTHER).close()
    assert read_journal(tmp_path / "j", OTHER) == {} and read_journal(tmp_path / "j", KEY) is None


@pytest.mark.parametrize("torn", [b'{"file": "f", "tens', b'{"file": "f"}', b"\xff\xfe\x00\x00", b"[]", b"7"])
def test_a_torn_last_line_is_passed_over_and_swallows_nothing(tmp_path: Path, torn: bytes) -> None:
    journal = Journal(tmp_path / "j", KEY)
    journal.append([{"file": "f", "tensor": "a", "sha256": "1"}])
    journal.close()
    with open(tmp_path / "j", "ab") as handle:
        handle.write(torn)
    journal = Journal(tmp_path / "j", KEY)
    assert journal.done == {"f\0a": "1"}
    journal.append([{"file": "f", "tensor": "b", "sha256": "2"}])
    journal.close()
    assert read_journal(tmp_path / "j", KEY) == {"f\0a": "1", "f\0b": "2"}


def test_a_torn_first_line_starts_the_journal_anew(tmp_path: Path) -> None:
    (tmp_path / "j").write_text('{"surgery": 1, "ke')
    Journal(tmp_path / "j", KEY).close()
    assert read_journal(tmp_path / "j", KEY) == {}


def test_what_is_forgotten_stays_forgotten(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", KEY)
    journal.append([{"file": f, "tensor": "a", "sha256": "1"} for f in ("f", "g")])
    journal.close()
    journal = Journal(tmp_path / "j", KEY)
    journal.forget("f")
    journal.close()
    assert journal.done == read_journal(tmp_path / "j", KEY) == {"g\0a": "1"}


def interrupt(target: Path, file: PlannedFile) -> None:
    """A run that ends after all tensors of `file` are journalled."""
    with pytest.raises(KeyboardInterrupt), Workspace(target, KEY, resume=True) as space:
        space.begin_file(file)
        fill(space, file)
        raise KeyboardInterrupt


def test_an_interrupted_run_journals_what_is_finished(tmp_path: Path) -> None:
    file = planned()
    with pytest.raises(KeyboardInterrupt), Workspace(tmp_path / "out", KEY) as space:
        space.begin_file(file)
        space.write(file, "t0", b"0000")
        space.note(file.relative, "t0", "x", 4)
        raise KeyboardInterrupt
    with Workspace(tmp_path / "out", KEY, resume=True) as space:
        assert space.begin_file(file) and space.done == {"model.safetensors\0t0": "x"}


def test_a_file_that_is_laid_out_anew_is_not_trusted_by_any_later_run(tmp_path: Path) -> None:
    interrupt(tmp_path / "out", planned(count=3))
    with pytest.raises(KeyboardInterrupt), Workspace(tmp_path / "out", KEY, resume=True) as space:
        assert not space.begin_file(planned(count=2))  # another shard size: the same name, another content
        space.note("other", "t", "x", 0)
        space._files["other"] = os.open(tmp_path, os.O_RDONLY)
        raise KeyboardInterrupt
    with Workspace(tmp_path / "out", KEY, resume=True) as space:
        assert space.begin_file(planned(count=2)) and list(space.done) == ["other\0t"]


def test_files_of_an_earlier_layout_do_not_become_part_of_the_result(tmp_path: Path) -> None:
    interrupt(tmp_path / "out", planned("old/model-00001-of-00002.safetensors"))
    write_checkpoint(tmp_path / "out", resume=True)
    assert list(tree(tmp_path / "out")) == ["model.safetensors", "sub/config.json", "surgery.json"]
    assert names(tmp_path / "out") == ["model.safetensors", "sub", "surgery.json"]


def test_a_new_run_without_resume_starts_over(tmp_path: Path) -> None:
    interrupt(tmp_path / "out", planned())
    with Workspace(tmp_path / "out", KEY) as space:
        assert space.done == {}


def test_resume_refuses_when_another_run_is_unfinished(tmp_path: Path) -> None:
    interrupt(tmp_path / "out", planned())
    with pytest.raises(OutputError, match="of another command or other parents"):
        write_checkpoint(tmp_path / "out", key=OTHER, resume=True)
    assert f".out.surgery-{KEY[:12]}" in names(tmp_path)


def test_resume_without_an_unfinished_run_is_a_plain_run(tmp_path: Path) -> None:
    (tmp_path / ".out.surgery-notes").mkdir()  # not the name of a run
    write_checkpoint(tmp_path / "out", resume=True)
    assert names(tmp_path) == [".out.surgery-notes", "out"]


def test_publishing_removes_unfinished_runs_of_the_same_target_only(tmp_path: Path) -> None:
    interrupt(tmp_path / "out", planned())
    interrupt(tmp_path / "out2", planned())
    write_checkpoint(tmp_path / "out", key=OTHER)
    assert names(tmp_path) == [f".out2.surgery-{KEY[:12]}", "out"]


def test_a_run_that_fails_before_any_work_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Workspace(tmp_path / "out", KEY) as space:
        space.begin_file(planned())
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_scratch_survives_a_crash_and_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Workspace(tmp_path / "out", KEY) as space:
        (space.scratch / "state").write_text("half")
        raise KeyboardInterrupt
    with Workspace(tmp_path / "out", KEY, resume=True) as space:
        assert (space.scratch / "state").read_text() == "half"
        space.put_file("surgery.json", b"{}")
        space.publish()
    assert names(tmp_path / "out") == ["surgery.json"]


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    write_checkpoint(tmp_path / "out")
    with pytest.raises(OutputError):
        write_checkpoint(tmp_path / "out")
    interrupt(tmp_path / "other", planned())
    assert len(os.listdir("/proc/self/fd")) == before


# What a power cut could lose


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The calls that make things last, in order, each with the name of its file or folder."""
    calls: list[tuple[str, str]] = []

    def watched(name: str) -> None:
        real = getattr(os, name)

        def call(first: int | Path, *rest: object) -> object:
            shown = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            calls.append((name, Path(shown).name))
            return real(first, *rest)

        monkeypatch.setattr(os, name, call)

    for name in ("write", "fsync", "fdatasync", "rename"):
        watched(name)
    return calls


def test_bytes_are_on_disk_before_the_journal_speaks_of_them(tmp_path: Path, disk: list[tuple[str, str]]) -> None:
    with Workspace(tmp_path / "out", KEY) as space:
        file = planned()
        space.begin_file(file)
        disk.clear()
        fill(space, file)
    assert disk == [("fdatasync", file.relative), ("write", "journal.jsonl"), ("fsync", "journal.jsonl")]


def test_all_files_and_folders_are_on_disk_before_the_rename_and_the_rename_after(
    tmp_path: Path, disk: list[tuple[str, str]]
) -> None:
    write_checkpoint(tmp_path / "out")
    at = disk.index(("rename", "out"))
    before = {name for call, name in disk[:at] if call == "fsync"}
    assert before >= {"model.safetensors", "surgery.json", "config.json", "sub", "out"}
    assert ("fsync", tmp_path.name) in disk[at:]


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
