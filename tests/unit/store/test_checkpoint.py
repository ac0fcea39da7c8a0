"""Reading: tensors and rows equal those of safetensors, digests ignore the layout, the digest cache never lies."""

import os
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.errors import CheckpointError, UsageError
from surgery.store import digests
from surgery.store.checkpoint import Checkpoint, open_checkpoint
from surgery.store.tensors import TensorRef

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A lone file with the shapes that reading could get wrong."""
    tensors = {
        "matrix": torch.arange(12, dtype=torch.bfloat16).reshape(4, 3),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "hollow": torch.empty(3, 0, dtype=torch.int64),
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "cube": torch.arange(24.0).reshape(2, 3, 4),
    }
    save_file(tensors, tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def test_a_whole_read_equals_that_of_safetensors(small: Path) -> None:
    checkpoint = open_checkpoint(small)
    expected = load_file(small)
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        found = checkpoint.read(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)


@pytest.mark.parametrize("name", ["matrix", "empty", "hollow", "odd", "cube"])
@pytest.mark.parametrize("rows", [slice(0, 2), slice(1, None), slice(None), slice(-1, None), slice(2, 1), slice(9, 12)])
def test_rows_equal_those_of_safetensors(small: Path, name: str, rows: slice) -> None:
    assert torch.equal(open_checkpoint(small).read(name, rows=rows), load_file(small)[name][rows])


def test_a_row_read_reads_only_those_bytes(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, int]] = []
    real = os.preadv

    def watched(fd: int, buffers: list[memoryview], offset: int) -> int:
        taken.append((offset, len(buffers[0])))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", watched)
    checkpoint = open_checkpoint(small)
    ref = checkpoint.tensors["matrix"]
    checkpoint.read("matrix", rows=slice(1, 3))
    assert taken == [(ref.offset + 6, 12)]


def test_rows_of_a_scalar_are_refused(small: Path) -> None:
    with pytest.raises(UsageError, match="'scalar' is a scalar"):
        open_checkpoint(small).read("scalar", rows=slice(0, 1))


def test_rows_with_a_step_are_refused(small: Path) -> None:
    with pytest.raises(UsageError, match="contiguous"):
        open_checkpoint(small).read("matrix", rows=slice(0, 4, 2))


def test_rows_that_are_not_whole_bytes_are_refused(tmp_path: Path) -> None:
    from surgery.store.header import plan_header

    header, _ = plan_header([("a", "F4", (2, 3))], metadata={})
    (tmp_path / "x.safetensors").write_bytes(header + b"123")
    with pytest.raises(UsageError, match="not whole bytes"):
        open_checkpoint(tmp_path / "x.safetensors").read("a", rows=slice(0, 1))


def test_an_unknown_tensor_names_the_nearest(small: Path) -> None:
    with pytest.raises(UsageError) as caught:
        open_checkpoint(small).read("matrixx")
    assert "'matrix'" in caught.value.hint


def test_a_file_that_shrank_after_opening_is_an_error_that_names_the_tensor(small: Path) -> None:
    checkpoint = open_checkpoint(small)
    os.truncate(small, small.stat().st_size - 1)
    last = max(checkpoint.tensors.values(), key=lambda r: r.offset + r.nbytes)
    with pytest.raises(CheckpointError, match=f"ends inside '{last.name}'"):
        checkpoint.read(last.name)
    with pytest.raises(CheckpointError, match="ends inside"):
        _ = checkpoint.digest


def test_a_file_that_went_away_after_opening_is_an_error_of_the_checkpoint(small: Path) -> None:
    checkpoint = open_checkpoint(small)
    small.unlink()
    with pytest.raises(CheckpointError, match=r"small\.safetensors: No such file"):
        checkpoint.read("matrix")


def test_hashing_in_pieces_equals_hashing_at_once(small: Path) -> None:
    checkpoint = open_checkpoint(small)
    ref = checkpoint.tensors["cube"]
    whole = small.read_bytes()[ref.offset : ref.offset + ref.nbytes]
    for size in (1, 7, 96, 1 << 20):
        pieces = [bytes(piece) for piece in checkpoint.chunks(ref, size=size)]
        assert b"".join(pieces) == whole and all(len(p) <= size for p in pieces)


def test_one_file_and_shards_of_the_same_tensors_have_one_digest(tiny_dit: Path, sharded: Path) -> None:
    assert open_checkpoint(tiny_dit).digest == open_checkpoint(sharded).digest


def test_the_order_of_tensors_does_not_change_the_digest(tmp_path: Path) -> None:
    from surgery.store.header import plan_header

    rows = [("a", "U8", (3,)), ("b", "U8", (3,))]
    for name, order, data in (("x", rows, b"aaabbb"), ("y", rows[::-1], b"bbbaaa")):
        header, _ = plan_header(order, metadata={"made": name})
        (tmp_path / f"{name}.safetensors").write_bytes(header + data)
    assert len({open_checkpoint(tmp_path / f"{n}.safetensors").digest for n in "xy"}) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {"b": t["a"]},
        lambda t: {"a": t["a"].reshape(3, 2)},
        lambda t: {"a": t["a"].view(torch.int32)},
        lambda t: {"a": torch.where(t["a"] == 0, -0.0, t["a"])},
    ],
    ids=["name", "shape", "dtype", "one bit"],
)
def test_every_change_of_content_changes_the_digest(tmp_path: Path, change: object) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3)}
    save_file(tensors, tmp_path / "x.safetensors")
    save_file(change(tensors), tmp_path / "y.safetensors")  # type: ignore[operator]
    assert open_checkpoint(tmp_path / "x.safetensors").digest != open_checkpoint(tmp_path / "y.safetensors").digest


# The cache of digests


@pytest.fixture
def copy(tiny_dit: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_dit, tmp_path / "copy")


def flip(path: Path, offset: int, *, bit: int = 1) -> None:
    """Change one bit in place."""
    with open(path, "r+b") as handle:
        handle.seek(offset)
        byte = handle.read(1)[0]
        handle.seek(offset)
        handle.write(bytes([byte ^ bit]))


def refuse_to_hash(checkpoint: Checkpoint, ref: TensorRef) -> str:
    raise AssertionError(f"{ref.name} was hashed again")


def test_known_digests_are_not_computed_again(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_checkpoint(copy).digest
    monkeypatch.setattr(Checkpoint, "hash_tensor", refuse_to_hash)
    assert open_checkpoint(copy).digest == before


def test_a_file_changed_in_place_is_hashed_again(copy: Path) -> None:
    before = open_checkpoint(copy).digest
    stat = (copy / WEIGHTS).stat()
    flip(copy / WEIGHTS, stat.st_size - 1)
    os.utime(copy / WEIGHTS, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # clocks of file systems are coarse
    assert open_checkpoint(copy).digest != before


def test_a_file_put_in_place_of_another_is_hashed_again(copy: Path, sharded: Path) -> None:
    before = open_checkpoint(copy).digest
    stat = (copy / WEIGHTS).stat()
    shutil.copy(copy / WEIGHTS, copy / "new")
    flip(copy / "new", stat.st_size - 1)
    os.utime(copy / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(copy / "new", copy / WEIGHTS)
    assert open_checkpoint(copy).digest != before


def test_digests_of_a_file_that_changed_while_it_was_hashed_are_not_kept(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Checkpoint.hash_tensor

    def touching(checkpoint: Checkpoint, ref: TensorRef, **choice: int) -> str:
        found = real(checkpoint, ref, **choice)
        stat = os.stat(ref.file)
        os.utime(ref.file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "hash_tensor", touching)
        _ = open_checkpoint(copy).digest
    assert digests.lookup(str(copy / WEIGHTS)) is None


@pytest.mark.parametrize("kind", ["a file", "below a file", "damaged"])
def test_a_cache_that_cannot_be_used_is_harmless(
    copy: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = open_checkpoint(copy).digest
    folder = tmp_path / "cache"
    if kind == "damaged":
        (folder / "v1").mkdir(parents=True)
        (folder / "v1" / "digests.sqlite").write_bytes(b"this is no database" * 100)
    else:
        folder.write_text("in the way")
    monkeypatch.setenv("SURGERY_CACHE", str(folder if kind != "below a file" else folder / "deeper"))
    assert open_checkpoint(copy).digest == expected


def test_a_row_of_the_cache_that_is_no_mapping_is_passed_over(copy: Path) -> None:
    expected = open_checkpoint(copy).digest
    for value in ("[]", "nonsense", None):
        with sqlite3.connect(digests.cache_folder() / "digests.sqlite") as table:
            table.execute("UPDATE digests SET tensors=? WHERE ino=?", (value, (copy / WEIGHTS).stat().st_ino))
        assert open_checkpoint(copy).digest == expected


def test_the_cache_folder_is_ours_then_that_of_xdg_then_that_of_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("SURGERY_CACHE", "/ours")
    assert digests.cache_folder() == Path("/ours/v1")
    monkeypatch.delenv("SURGERY_CACHE")
    assert digests.cache_folder() == Path("/xdg/surgery/v1")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert digests.cache_folder() == Path("/home/x/.cache/surgery/v1")


def test_a_config_with_infinity_has_a_digest(copy: Path) -> None:
    before = open_checkpoint(copy).config_digest()
    (copy / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert open_checkpoint(copy).config_digest() != before


def test_the_list_of_parts_counts_towards_a_pipeline_s_config(tiny_pipeline: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_pipeline, tmp_path / "pipe")
    before = open_checkpoint(copy).config_digest()
    text = (copy / "model_index.json").read_text().replace("DDIMScheduler", "DDPMScheduler")
    (copy / "model_index.json").write_text(text)
    assert open_checkpoint(copy).config_digest() != before


def test_opening_a_checkpoint_reads_no_tensor(tiny_dit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(os, "preadv", fail)
    checkpoint = open_checkpoint(tiny_dit)
    assert len(checkpoint.tensors) == 120 and checkpoint.config["num_layers"] == 6
