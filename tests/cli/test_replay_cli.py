"""`surgery replay`: the same bits again, parents checked first, and what differs named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from surgery.ops.init import Init
from surgery.store.checkpoint import open_checkpoint

Run = Callable[..., Any]


@pytest.fixture
def made(command: Run, tiny_dit: Path, tmp_path: Path) -> Path:
    """A random graft `g` of `base`, a copy of the tiny model, in the current folder."""
    shutil.copytree(tiny_dit, tmp_path / "base")
    ended = command("graft", "-r", "attn=hyena", "base", "--init", "random", "--seed", "3", "-o", "g")
    assert ended.code == 0, ended.stderr
    return tmp_path / "g"


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "surgery.json").read_text())
    return found


def test_a_replay_gives_the_same_digests(command: Run, made: Path, tmp_path: Path) -> None:
    ended = command("replay", "g", "--to", "again")
    assert (ended.code, ended.stdout) == (0, "again\n"), ended.stderr
    count = len(open_checkpoint(made).tensors)
    assert f"the same: {count:,} tensors and every side file are as recorded" in ended.stderr
    one, two = record(made), record(tmp_path / "again")
    assert (one["digest"], one["record"], one["tensors"]) == (two["digest"], two["record"], two["tensors"])
    assert open_checkpoint(made).digest == open_checkpoint(tmp_path / "again").digest
    assert command("verify", "again").code == 0 and command("diff", "g", "again").code == 0


def test_a_replay_for_programs_is_one_object(command: Run, made: Path) -> None:
    shown = json.loads(command("replay", "g", "--to", "again", "--json", "--workers", "1").stdout)
    counts = {"tensors", "undigested", "assumed", "differing", "files", "reasons"}
    assert set(shown) == {"path", "equal", "digest", *counts} and (shown["undigested"], shown["assumed"]) == (0, [])
    assert (shown["path"], shown["equal"], shown["digest"]) == ("again", True, record(made)["digest"])
    assert (shown["differing"], shown["files"], shown["reasons"]) == ([], [], [])


def test_a_trained_graft_is_replayed_to_the_same_digests(command: Run, tiny_dit: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (12, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", arr_0=pixels, labels=np.arange(12) % 10)
    few = ("--data", "npz:few.npz", "--samples", "32", "--steps", "2", "--batch", "16")
    finetune = ("--finetune-steps", "2", "--finetune-batch", "4")
    assert command("graft", "-r", "attn=hyena@1", tiny_dit, *few, *finetune, "-o", "g").code == 0
    assert command("replay", "g", "--to", "again").code == 0
    assert record(tmp_path / "g")["record"] == record(tmp_path / "again")["record"]


def test_a_parent_that_has_changed_is_refused_and_nothing_is_written(command: Run, made: Path, tmp_path: Path) -> None:
    (weights,) = (tmp_path / "base").glob("*.safetensors")
    with open(weights, "r+b") as handle:
        handle.seek(-4, 2)
        handle.write(b"\x00\x00\x80\x3f")
    ended = command("replay", "g", "--to", "again")
    assert ended.code == 3 and ended.stdout == ""
    assert "error[checkpoint.changed-parent]" in ended.stderr and "holds other tensors" in ended.stderr
    assert "hint: say where it is: --parent" in ended.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "g"]


def test_a_parent_that_was_moved_is_named_by_the_user_and_checked(
    command: Run, made: Path, tiny_dit: Path, tmp_path: Path
) -> None:
    (name,) = record(made)["parents"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "base").rename(tmp_path / "elsewhere" / "moved")
    lost = command("replay", "g", "--to", "again")
    assert lost.code == 3 and "error[checkpoint.missing-parent]" in lost.stderr
    wrong = command("replay", "g", "--to", "again", "--parent", f"{name}=g")
    assert wrong.code == 3 and "error[checkpoint.changed-parent]" in wrong.stderr
    assert command("replay", "g", "--to", "again", "--parent", "nobody=g").code == 2
    assert command("replay", "g", "--to", "again", "--parent", name).code == 2
    assert not (tmp_path / "again").exists()
    assert command("replay", "g", "--to", "again", "--parent", f"{name}=elsewhere/moved").code == 0
    assert record(made)["record"] == record(tmp_path / "again")["record"]


def test_a_replay_that_comes_out_otherwise_names_the_tensors_and_exits_1(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("init", "dit-digits", "-o", "m").code == 0
    draw, touched = Init.run, {"pos_embed.proj.weight", "proj_out_2.weight"}

    def other(self: Init, task: Any, *rest: Any) -> Any:
        value = draw(self, task, *rest)
        return value + 1 if task.name in touched else value

    monkeypatch.setattr(Init, "run", other)
    ended = command("replay", "m", "--to", "again")
    assert ended.code == 1 and ended.stdout == "again\n"
    assert {line for line in ended.stderr.splitlines() if line.startswith("differs: ")} == {
        f"differs: {name}" for name in touched
    }
    assert "error[verify.replay]: again: 2 tensors are not as m records them: " in ended.stderr
    assert "hint: surgery diff m again" in ended.stderr
    shown = command("replay", "m", "--to", "again", "--overwrite", "--json")
    found = json.loads(shown.stdout)
    assert shown.code == 1 and not found["equal"] and set(found["differing"]) == touched and found["reasons"]
    # What was built is kept to be looked at, and is whole.
    assert command("verify", "again").code == 0 and command("diff", "m", "again").code == 1


def test_an_output_that_is_there_is_replaced_only_when_asked(command: Run, made: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "mine").write_text("keep")
    ended = command("replay", "g", "--to", "again")
    assert ended.code == 4 and ended.stdout == "" and "error[output.exists]" in ended.stderr
    assert command("replay", "g", "--to", "again", "--overwrite").code == 4  # not a thing of ours
    assert [p.name for p in (tmp_path / "again").iterdir()] == ["mine"]
    shutil.rmtree(tmp_path / "again")
    assert command("replay", "g", "--to", "again").code == 0
    assert command("replay", "g", "--to", "again").code == 4
    assert command("replay", "g", "--to", "again", "--overwrite").code == 0
    assert command("replay", "g", "--to", "g", "--overwrite").code == 4  # not over what is compared with


def test_what_has_no_record_or_an_altered_one_is_refused(command: Run, made: Path, tmp_path: Path) -> None:
    altered = record(made)
    altered["steps"][-1]["seed"] = 4
    (made / "surgery.json").write_text(json.dumps(altered))
    for place, code in (("g", "checkpoint.altered-record"), ("base", "checkpoint.no-lineage")):
        if place == "base":
            (tmp_path / "base" / "surgery.json").unlink(missing_ok=True)
        ended = command("replay", place, "--to", "again")
        assert ended.code == 3 and f"error[{code}]" in ended.stderr and not (tmp_path / "again").exists()
