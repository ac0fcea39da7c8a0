"""--hash header: nothing is hashed for the record alone, nothing is taken for digested that is not, and two models with
equal headers are never taken for each other."""

import hashlib
import json
import os
import pickle
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graft_runs import flip
from safetensors.torch import load_file, save_file

from surgery.errors import CheckpointError, OutputError
from surgery.graph.lineage import verify
from surgery.graph.run import RunOptions, RunResult, run_op
from surgery.ops.cast import Cast
from surgery.ops.graft import Graft
from surgery.ops.slice import Slice
from surgery.store import digests
from surgery.store.checkpoint import Checkpoint, open_checkpoint
from surgery.store.digests import cache_folder
from surgery.store.record import is_unhashed, undigested

pytestmark = pytest.mark.usefixtures("own_cache")
WEIGHTS = "diffusion_pytorch_model.safetensors"
CAST = Cast("bfloat16")
GRAFT = Graft(replace=("mlp=r3",), layers="1,3", init="random")


@pytest.fixture
def foreign(tiny_dit: Path, tmp_path: Path) -> Path:
    """A model that surgery did not make and has never seen."""
    folder = shutil.copytree(tiny_dit, tmp_path / "foreign")
    (folder / "surgery.json").unlink()
    return folder


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that went through sha256, in one number."""
    seen, real = [0], hashlib.sha256

    class Counted:
        def __init__(self, data: Any = b"") -> None:
            self._state = real()
            self.update(data)

        def update(self, data: Any) -> None:
            seen[0] += memoryview(data).nbytes
            self._state.update(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._state, name)

    monkeypatch.setattr(hashlib, "sha256", Counted)
    return seen


def run(op: Any, source: Path, out: Path | None, *, hash: str = "header", **options: Any) -> RunResult:
    how = RunOptions(workers=1, hash=hash, **options)
    return run_op(op, [open_checkpoint(source, name=str(source))], out, options=how)


def key(result: RunResult) -> str:
    return str(result.record["steps"][-1]["key"])


def values(folder: Path) -> dict[str, bytes]:
    return {n: t.view(torch.uint8).numpy().tobytes() for n, t in load_file(folder / WEIGHTS).items()}


def finetuned(source: Path, folder: Path, *, step: float = 1.0) -> Path:
    """Another model with the very header of `source`: what a finetune of it is."""
    shutil.copytree(source, folder)
    tensors = {n: t + step for n, t in load_file(source / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


# What is hashed, and what the record says


def test_nothing_is_hashed_for_the_record_alone(foreign: Path, tmp_path: Path, hashed: list[int]) -> None:
    size = (foreign / WEIGHTS).stat().st_size
    header = run(CAST, foreign, tmp_path / "a")
    assert 0 < hashed[0] < size / 10  # headers, names, JSON
    full = run(CAST, foreign, tmp_path / "b", hash="full")
    assert hashed[0] > size * 1.5  # the parent, and the half of it that was made
    assert values(tmp_path / "a") == values(tmp_path / "b")
    assert undigested(full.record) == [] and "undigested" not in full.record
    count = len(header.record["tensors"])
    assert header.record["undigested"] == {"tensors": count, "claimed": 0, "parents": ["foreign"]}
    assert all(set(row) == {"dtype", "shape"} for row in header.record["tensors"].values())


def test_the_digest_is_of_another_kind(foreign: Path, tmp_path: Path) -> None:
    result = run(CAST, foreign, tmp_path / "a")
    assert result.record["digest"] == "unhashed:" + key(result).removeprefix("sha256:")
    (parent,) = result.record["parents"].values()
    (file,) = parent["files"]
    assert is_unhashed(parent["digest"]) and (file["path"], file["size"]) == (
        WEIGHTS,
        (foreign / WEIGHTS).stat().st_size,
    )
    assert json.loads((tmp_path / "a" / "surgery.json").read_text()) == result.record


@pytest.mark.parametrize("op", [Slice("0-4,1-5"), Graft(replace=("attn=hyena",), init="copy")], ids=["kept", "joined"])
def test_ranges_that_move_are_not_hashed_either(op: Any, foreign: Path, tmp_path: Path, hashed: list[int]) -> None:
    result = run(op, foreign, tmp_path / "a")
    assert values(tmp_path / "a") == values(run(op, foreign, tmp_path / "b").path)
    assert hashed[0] < (foreign / WEIGHTS).stat().st_size / 10
    assert len(undigested(result.record)) == len(result.record["tensors"])


def test_kept_tensors_have_the_digests_that_are_known(foreign: Path, tmp_path: Path, hashed: list[int]) -> None:
    known = open_checkpoint(foreign).tensor_digests
    hashed[0] = 0
    result = run(GRAFT, foreign, tmp_path / "a")
    assert hashed[0] < (foreign / WEIGHTS).stat().st_size / 10
    rows = result.record["tensors"]
    new = {n for n in rows if n.split(".")[1:3] in (["1", "ff"], ["3", "ff"])}
    assert set(undigested(result.record)) == new
    assert {n: r["sha256"] for n, r in rows.items() if n not in new} == {n: known[n] for n in rows.keys() - new}
    (parent,) = result.record["parents"].values()
    assert parent["digest"] == f"sha256:{open_checkpoint(foreign).digest}"
    assert result.record["undigested"]["parents"] == [] and is_unhashed(result.record["digest"])


def test_where_all_is_known_the_record_is_that_of_full(foreign: Path, tmp_path: Path) -> None:
    assert open_checkpoint(foreign).digest
    one, two = (run(Slice("0-3"), foreign, tmp_path / how, hash=how).record for how in ("header", "full"))
    assert one["record"] == two["record"] and one["digest"].startswith("sha256:")


def test_side_files_have_their_digests(foreign: Path, tmp_path: Path) -> None:
    files = run(CAST, foreign, tmp_path / "a").record["output"]["files"]
    assert all("sha256" in row or "header" in row for row in files)


def test_linked_files_are_not_hashed(foreign: Path, tmp_path: Path, hashed: list[int]) -> None:
    result = run(Slice("0-5"), foreign, tmp_path / "a", link="hard")
    assert (tmp_path / "a" / WEIGHTS).stat().st_nlink == 2
    assert hashed[0] < (foreign / WEIGHTS).stat().st_size / 10
    assert len(undigested(result.record)) == len(result.record["tensors"])
    assert digests.lookup(str(foreign / WEIGHTS)) is None


# Who is who


def test_two_finetunes_with_equal_headers_are_two_parents(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = finetuned(foreign, tmp_path / "1" / "tuned"), finetuned(foreign, tmp_path / "2" / "tuned", step=2)
    raw = [(p / WEIGHTS).read_bytes() for p in (one, two)]
    start = open_checkpoint(one).tensors["proj_out_1.bias"].offset
    assert raw[0][:64] == raw[1][:64] and len(raw[0]) == len(raw[1]) and start and raw[0] != raw[1]
    monkeypatch.chdir(tmp_path)
    first, second = run(CAST, one, None), run(CAST, two, None)
    assert first.path != second.path and not second.found and values(first.path) != values(second.path)
    again = run(CAST, one, None)
    assert again.found and again.path == first.path


def test_a_file_that_was_written_again_is_another_parent(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = run(CAST, foreign, None)
    raw = bytearray((foreign / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (foreign / WEIGHTS).write_bytes(raw)
    second = run(CAST, foreign, None)
    assert not second.found and key(first) != key(second) and values(first.path) != values(second.path)


def test_a_config_counts_as_it_does_with_digests(foreign: Path, tmp_path: Path) -> None:
    first = run(CAST, foreign, tmp_path / "a")
    config = json.loads((foreign / "scheduler_config.json").read_text()) | {"steps_offset": 1}
    (foreign / "scheduler_config.json").write_text(json.dumps(config))
    assert key(run(CAST, foreign, tmp_path / "b")) != key(first)


def test_what_a_parent_is_known_by_travels_to_other_machines(foreign: Path) -> None:
    parent = open_checkpoint(foreign)
    told = parent.identity(hashing=False)
    sent = pickle.dumps(parent)
    os.utime(foreign / WEIGHTS, ns=(1, 1))  # elsewhere the same file may have other numbers
    assert pickle.loads(sent).identity(hashing=False) == told
    assert open_checkpoint(foreign).identity(hashing=False) != told


# What a record says of its own files


def elsewhere(folder: Path, to: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy with its times, where no digest is known."""
    monkeypatch.setenv("SURGERY_CACHE", str(to.parent / "other-cache"))
    return shutil.copytree(folder, to)


def test_a_record_is_believed_and_its_digests_are_passed_on_but_not_kept(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[int]
) -> None:
    made = run(GRAFT, foreign, tmp_path / "made", hash="full")
    copy = elsewhere(made.path, tmp_path / "copy", monkeypatch)
    hashed[0] = 0
    result = run(Slice("0-4"), copy, tmp_path / "out")
    assert hashed[0] < (copy / WEIGHTS).stat().st_size / 10
    rows = result.record["tensors"]
    assert {n: r["sha256"] for n, r in rows.items()} == {n: made.record["tensors"][n]["sha256"] for n in rows}
    (parent,) = result.record["parents"].values()
    assert (parent["digest"], parent["digested_by"]) == (made.record["digest"], "its own record")
    assert result.record["undigested"] == {"tensors": 0, "claimed": len(rows), "parents": []}
    assert digests.lookup(str(tmp_path / "out" / WEIGHTS)) is None  # nobody here has hashed it
    assert verify(open_checkpoint(tmp_path / "out")) == []


def test_a_record_is_not_believed_of_files_that_are_newer(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run(GRAFT, foreign, tmp_path / "made", hash="full")
    copy = elsewhere(made.path, tmp_path / "copy", monkeypatch)
    before = open_checkpoint(copy).identity(hashing=False)
    raw = bytearray((copy / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (copy / WEIGHTS).write_bytes(raw)
    after = open_checkpoint(copy).identity(hashing=False)
    assert "digest" in before and "digest" not in after and "unhashed" in after


def test_a_record_is_not_believed_of_files_of_another_size_or_header(foreign: Path, tmp_path: Path) -> None:
    made = run(GRAFT, foreign, tmp_path / "made", hash="full").path
    shutil.rmtree(cache_folder())
    stat = (made / WEIGHTS).stat()
    raw = (made / WEIGHTS).read_bytes().replace(b'"format":"pt"', b'"format":"pu"')
    (made / WEIGHTS).write_bytes(raw)
    os.utime(made / WEIGHTS, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "unhashed" in open_checkpoint(made).identity(hashing=False)


def test_two_folders_with_one_record_never_have_one_key(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run(CAST, foreign, tmp_path / "made", hash="full").path
    copy = elsewhere(made, tmp_path / "copy", monkeypatch)
    raw = bytearray((copy / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (copy / WEIGHTS).write_bytes(raw)
    shutil.copy(made / "surgery.json", copy / "surgery.json")  # a record that is newer than the lie
    told = [open_checkpoint(p).identity(hashing=False) for p in (made, copy)]
    assert told[0]["digest"] == told[1]["digest"] and told[0]["files"] != told[1]["files"]
    one, two = run(Cast("float16"), made, tmp_path / "x"), run(Cast("float16"), copy, tmp_path / "y")
    assert key(one) != key(two)


def test_a_part_of_a_pipeline_is_believed_by_the_pipeline_s_record(tiny_pipeline: Path, tmp_path: Path) -> None:
    made = run(GRAFT, tiny_pipeline, tmp_path / "made", hash="full")
    shutil.rmtree(cache_folder())
    part = open_checkpoint(made.path, part="transformer")
    assert part.unhashed.claimed == {
        n.removeprefix("transformer/"): r["sha256"]
        for n, r in made.record["tensors"].items()
        if n.startswith("transformer/")
    }


# Found again, verified, read by others


def test_with_digests_a_result_without_is_not_taken(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_checkpoint(foreign).digest  # known: the keys are equal
    monkeypatch.chdir(tmp_path)
    first = run(CAST, foreign, None)
    with pytest.raises(OutputError, match="never digested") as caught:
        run(CAST, foreign, None, hash="full")
    assert caught.value.code == "output.undigested" and "--overwrite" in caught.value.hint
    assert run(CAST, foreign, None).found
    full = run(CAST, foreign, None, hash="full", overwrite=True)
    assert full.path == first.path and undigested(full.record) == []
    assert run(CAST, foreign, None).record["record"] == full.record["record"]


@pytest.fixture
def bare(foreign: Path, tmp_path: Path) -> Path:
    """A result without digests."""
    return run(CAST, foreign, tmp_path / "bare").path


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a side file": (lambda p: flip(p / "scheduler_config.json", -1), "scheduler_config.json: altered"),
    "the size": (lambda p: os.truncate(p / WEIGHTS, (p / WEIGHTS).stat().st_size - 2), ""),
    "the header": (
        lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes().replace(b'"format":"pt"', b'"format":"pu"')),
        f"{WEIGHTS}: its header was altered",
    ),
    "a file more": (lambda p: (p / "notes.txt").write_text("x"), "notes.txt: not in the record"),
    "the record": (
        lambda p: (p / "surgery.json").write_text((p / "surgery.json").read_text().replace('"seed": 0', '"seed": 1')),
        "surgery.json: the record was altered",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_verify_checks_all_that_can_be(bare: Path, what: str) -> None:
    assert verify(open_checkpoint(bare)) == []
    change, fault = DAMAGE[what]
    change(bare)
    if not fault:
        with pytest.raises(CheckpointError):
            open_checkpoint(bare)
        return
    assert verify(open_checkpoint(bare)) == [fault]


def test_verify_finds_a_bit_of_a_tensor_that_has_a_digest(foreign: Path, tmp_path: Path) -> None:
    assert open_checkpoint(foreign).digest
    out = run(GRAFT, foreign, tmp_path / "out").path
    refs = open_checkpoint(out).tensors
    flip(out / WEIGHTS, refs["proj_out_1.bias"].offset)
    assert verify(open_checkpoint(out)) == ["tensor proj_out_1.bias: altered"]


def test_a_tensor_cannot_lose_its_digest_in_a_record_that_has_one(foreign: Path, tmp_path: Path) -> None:
    out = run(CAST, foreign, tmp_path / "out", hash="full").path
    record = json.loads((out / "surgery.json").read_text())
    next(iter(record["tensors"].values())).pop("sha256")
    (out / "surgery.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="damaged: tensors"):
        _ = open_checkpoint(out).lineage


def test_as_a_parent_it_is_hashed_as_any_other_and_remembered(bare: Path, tmp_path: Path, hashed: list[int]) -> None:
    child = run(Slice("0-3"), bare, tmp_path / "child", hash="full")
    (parent,) = child.record["parents"].values()
    assert parent["digest"] == f"sha256:{open_checkpoint(bare).digest}" and undigested(child.record) == []
    assert parent["lineage"] == json.loads((bare / "surgery.json").read_text())["record"]
    hashed[0] = 0
    later = run(Slice("0-2"), bare, tmp_path / "later")
    assert hashed[0] < (bare / WEIGHTS).stat().st_size / 10 and undigested(later.record) == []
    assert verify(open_checkpoint(tmp_path / "child")) == []


def test_digests_of_some_tensors_of_a_file_are_kept_and_the_rest_made_when_needed(
    foreign: Path, tmp_path: Path, hashed: list[int]
) -> None:
    assert open_checkpoint(foreign).digest
    out = run(GRAFT, foreign, tmp_path / "out")
    checkpoint = open_checkpoint(out.path)
    rest = sum(checkpoint.tensors[n].nbytes for n in undigested(out.record))
    hashed[0] = 0
    found = checkpoint.tensor_digests
    assert rest <= hashed[0] < rest * 1.1 + 1000
    assert found == {n: checkpoint.hash_tensor(r) for n, r in checkpoint.tensors.items()}


def test_a_checkpoint_without_any_digest_cache_still_works(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr(sqlite3, "connect", refuse)
    assert open_checkpoint(foreign).unhashed.known == {}
    parent: Checkpoint = open_checkpoint(foreign)
    assert parent.digest and parent.identity(hashing=False) == parent.identity()
    run(CAST, foreign, tmp_path / "a")


def test_a_pickle_is_its_file(tmp_path: Path, foreign: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(foreign / "config.json", folder)
    torch.save(load_file(foreign / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    result = run(CAST, folder, tmp_path / "out")
    (parent,) = result.record["parents"].values()
    assert is_unhashed(parent["digest"]) and parent["files"][0]["path"] == "diffusion_pytorch_model.bin"
    assert values(tmp_path / "out") == values(run(CAST, foreign, tmp_path / "same").path)
