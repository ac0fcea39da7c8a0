"""The journal: what a later run may trust, and what a power cut could lose."""

import os
from pathlib import Path

import pytest
from written import KEY, OTHER, fill, interrupt, names, planned, tree, write_checkpoint

from surgery.errors import OutputError
from surgery.store.journal import Journal, read_journal
from surgery.store.writer import Workspace

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


def test_a_tensor_without_a_digest_is_noted_as_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", KEY)
    rows: list[dict[str, str | None]] = [{"file": "f", "tensor": t, "sha256": s} for t, s in (("a", None), ("b", "2"))]
    journal.append(rows)
    journal.close()
    with open(tmp_path / "j", "ab") as handle:
        handle.write(b'{"file": "f", "tensor": "c"}\n{"file": "f", "tensor": "d", "sha256": 7}\n')  # neither says so
    assert read_journal(tmp_path / "j", KEY) == {"f\0a": None, "f\0b": "2"}
    journal = Journal(tmp_path / "j", KEY)
    journal.forget("g")
    assert journal.done == {"f\0a": None, "f\0b": "2"}
    journal.forget_undigested()
    assert journal.done == read_journal(tmp_path / "j", KEY) == {"f\0b": "2"}
    journal.append([{"file": "f", "tensor": "a", "sha256": "1"}])
    journal.close()
    assert read_journal(tmp_path / "j", KEY) == {"f\0a": "1", "f\0b": "2"}


@pytest.mark.parametrize("sha", [None, "x"])
def test_a_file_is_synced_before_its_tensor_is_noted(
    sha: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    real_sync, real_append = os.fdatasync, Journal.append

    def sync(fd: int) -> None:
        said.append(os.readlink(f"/proc/self/fd/{fd}").rsplit("/", 1)[-1])
        real_sync(fd)

    def append(self: Journal, rows: list[dict[str, str]]) -> None:
        said.append("journal")
        real_append(self, rows)

    monkeypatch.setattr(os, "fdatasync", sync)
    monkeypatch.setattr(Journal, "append", append)
    file = planned()
    with pytest.raises(KeyboardInterrupt), Workspace(tmp_path / "out", KEY) as space:
        space.begin_file(file)
        space.write(file, "t0", b"0000")
        space.note(file.relative, "t0", sha, 4)
        raise KeyboardInterrupt
    assert said == ["model.safetensors", "journal"]


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
