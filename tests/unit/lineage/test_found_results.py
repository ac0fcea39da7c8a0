"""The same work is found again by its key, whole or not at all."""

from pathlib import Path

import pytest
from graft_runs import OP, graft

from surgery.errors import OutputError
from surgery.graph.run import find_result, run_op
from surgery.store.checkpoint import Checkpoint, open_checkpoint


def test_without_a_name_the_output_is_called_after_source_operation_and_key(
    tiny_dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = graft(tiny_dit, None)
    key = result.record["steps"][0]["key"].removeprefix("sha256:")
    assert result.path == Path(f"tiny-graft-{key[:8]}") and not result.found


def test_the_same_work_is_found_again_at_once(tiny_dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = graft(tiny_dit, None)
    monkeypatch.setattr("surgery.graph.run.Workspace", lambda *_, **__: pytest.fail("the work was begun"))
    again = graft(tiny_dit, None)
    assert again.found and again.path == first.path and again.record["record"] == first.record["record"]


def test_a_result_that_lost_a_file_is_not_taken_for_whole(
    tiny_dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = graft(tiny_dit, None).path
    (path / "config.json").unlink()
    with pytest.raises(OutputError, match=r"config\.json is missing"):
        graft(tiny_dit, None)
    assert not graft(tiny_dit, None, overwrite=True).found and (path / "config.json").exists()


def test_a_folder_of_that_name_with_other_work_is_not_the_result(child: Path) -> None:
    assert find_result(child, "0" * 64) is None


def test_a_name_with_a_part_gives_a_name_without_a_colon(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parent: Checkpoint = open_checkpoint(tiny_pipeline, part="transformer", name=f"{tiny_pipeline}:transformer")
    assert run_op(OP, [parent], None).path.name.startswith("pipe-transformer-graft-")
