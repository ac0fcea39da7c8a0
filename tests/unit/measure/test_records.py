"""Records of items: gone on with after a crash, never mixed, refused when damaged."""

import json
import os
from pathlib import Path

import pytest

from surgery.errors import Busy, CheckpointError, OutputError, UsageError
from surgery.evals.records import Records, fingerprint, read_records

SETTINGS = {"model": "sha256:a", "prompt": "direct", "limit": None}


def written(path: Path, n: int = 3) -> Path:
    with Records(path, "vqa", SETTINGS) as records:
        for i in range(n):
            records.append({"id": str(i), "response": f"é\n{i}", "correct": i % 2 == 0})
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    found = read_records(written(tmp_path / "new" / "r.jsonl"))
    assert (found.kind, found.settings) == ("vqa", SETTINGS)
    assert list(found.rows) == ["0", "1", "2"] and found.rows["1"]["response"] == "é\n1"


def test_a_run_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = written(tmp_path / "r.jsonl")
    with Records(path, "vqa", SETTINGS, resume=True) as records:
        assert set(records.done) == {"0", "1", "2"}
        records.append({"id": "3"})
        with pytest.raises(UsageError, match="twice"):
            records.append({"id": "1"})
    assert list(read_records(path).rows) == ["0", "1", "2", "3"]


def test_any_torn_end_is_dropped(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(len(whole) + 1):
        path = tmp_path / "torn.jsonl"
        path.write_bytes(whole[:cut])
        complete = whole[:cut].count(b"\n")
        with Records(path, "vqa", SETTINGS, resume=True) as records:
            assert len(records.done) == max(0, complete - 1)
            for i in range(len(records.done), 3):
                records.append(json.loads(lines[i + 1]))
        assert path.read_bytes() == whole


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    path = written(tmp_path / "r.jsonl")
    before = path.read_bytes()
    with pytest.raises(UsageError, match='prompt "direct", now "cot"; limit null, now 5') as caught:
        Records(path, "vqa", {**SETTINGS, "prompt": "cot", "limit": 5}, resume=True)
    assert caught.value.code == "usage.other-settings"
    with pytest.raises(UsageError, match="holds vqa, not mcq"):
        Records(path, "mcq", SETTINGS, resume=True)
    assert path.read_bytes() == before


def test_a_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = written(tmp_path / "r.jsonl")
    with pytest.raises(OutputError):
        Records(path, "vqa", SETTINGS)
    with Records(path, "vqa", {"other": 1}, overwrite=True) as records:
        assert records.done == {}
    assert read_records(path).settings == {"other": 1}
    (tmp_path / "link.jsonl").symlink_to(path)
    with pytest.raises(OutputError):
        Records(tmp_path / "link.jsonl", "vqa", SETTINGS, resume=True)


def test_two_runs_cannot_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with Records(path, "vqa", SETTINGS), pytest.raises(Busy):
        Records(path, "vqa", SETTINGS, resume=True)


@pytest.mark.parametrize(
    "line", [b"{}\n", b"no json\n", b"[1]\n", b'{"id": 3}\n', b'{"id": "0"}\n', b"[" * 90_000 + b"\n"]
)
def test_damage_is_an_error_that_names_the_line(tmp_path: Path, line: bytes) -> None:
    path = written(tmp_path / "r.jsonl", 1)
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(CheckpointError, match="line 3"):
        read_records(path)
    with pytest.raises(CheckpointError):
        Records(path, "vqa", SETTINGS, resume=True)


def test_other_files_are_not_records(tmp_path: Path) -> None:
    for content in (b"", b"{}\n", b'{"id": "0"}\n', b'{"surgery_records": 2, "settings": {}}\n'):
        (tmp_path / "x.jsonl").write_bytes(content)
        with pytest.raises(CheckpointError, match="not a file of records"):
            read_records(tmp_path / "x.jsonl")
    with pytest.raises(CheckpointError):
        read_records(tmp_path / "gone.jsonl")


def test_descriptors_are_let_go(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    path = written(tmp_path / "r.jsonl")
    with pytest.raises(UsageError):
        Records(path, "vqa", {}, resume=True)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_fingerprint_ignores_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1}) != fingerprint({"a": 1, "b": [3]})
