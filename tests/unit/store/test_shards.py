"""Which file each output tensor goes to: small parts in one, kept files as they were, new ones within their size."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from surgery.graph import shards as module
from surgery.graph.op import Bytes, Compute, Entry, Keep, PartNames, Plan
from surgery.graph.shards import Shard, plan_shards
from surgery.store.checkpoint import Checkpoint, open_checkpoint
from surgery.store.header import read_header

KEY = "0" * 64


@pytest.fixture(autouse=True)
def no_part_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL_PART", 0)


@pytest.fixture
def parent(tmp_path: Path) -> Checkpoint:
    """Two shards of two tensors of 16 bytes."""
    for number, names in ((1, ("a.0", "a.1")), (2, ("b.0", "b.1"))):
        file = tmp_path / f"model-{number:05d}-of-00002.safetensors"
        save_file({name: torch.ones(4) for name in names}, file, metadata={"format": "pt", "mark": str(number)})
    names = {f"{x}.{i}": f"model-{n:05d}-of-00002.safetensors" for n, x in ((1, "a"), (2, "b")) for i in (0, 1)}
    from json import dumps

    (tmp_path / "model.safetensors.index.json").write_text(dumps({"weight_map": names}))
    return open_checkpoint(tmp_path)


def kept(parent: Checkpoint, *names: str) -> list[Entry]:
    refs = (parent.tensors[name] for name in names)
    return [Keep(name=r.name, dtype=r.dtype, shape=r.shape, ref=r) for r in refs]


def new(*names: str, dtype: str = "F32", size: int = 4) -> list[Entry]:
    return [Compute(name=name, dtype=dtype, shape=(size,), how=None) for name in names]


def grouped(entries: list[Entry], *, size: int | None = None, part: str = "") -> dict[str, list[str]]:
    """File -> names in file order."""
    found, _ = plan_shards(plan(entries, part), key=KEY, shard_size=size)
    return {shard.file.relative: list(shard.file.places) for shard in found}


def plan(entries: list[Entry], part: str = "") -> Plan:
    return Plan(tuple(entries), (PartNames(part, "model"),))


def test_a_small_part_is_one_file(parent: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL_PART", 1000)
    assert list(grouped(kept(parent, "a.0", "b.0") + new("c"))) == ["model.safetensors"]


def test_a_small_part_that_is_larger_than_the_shard_size_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL_PART", 1000)
    assert len(grouped(new("a", "b", "c"), size=32)) == 2


def test_kept_tensors_stay_in_the_files_of_the_parent(parent: Checkpoint) -> None:
    found = grouped(kept(parent, "b.1", "a.1", "b.0", "a.0"))
    assert [sorted(names) for names in found.values()] == [["a.0", "a.1"], ["b.0", "b.1"]]


def test_an_untouched_file_keeps_its_header_and_moves_as_one_range(parent: Checkpoint) -> None:
    found, _ = plan_shards(plan(kept(parent, "a.0", "a.1", "b.0")), key=KEY)
    first, second = found
    source = Path(parent.tensors["a.0"].file)
    raw = source.read_bytes()
    assert first.file.size == len(raw) and raw.startswith(first.file.header)
    assert second.file.size < len(raw) and b'"surgery"' in second.file.header


def test_a_renamed_tensor_makes_a_new_header(parent: Checkpoint) -> None:
    refs = [parent.tensors[n] for n in ("a.0", "a.1")]
    entries: list[Entry] = [Keep(name=f"x.{r.name}", dtype=r.dtype, shape=r.shape, ref=r) for r in refs]
    (only, *_), _ = plan_shards(plan(entries), key=KEY)
    assert b'"surgery"' in only.file.header and list(only.file.places) == ["x.a.0", "x.a.1"]


def test_new_tensors_get_files_of_their_own(parent: Checkpoint) -> None:
    found = grouped(kept(parent, "a.0", "a.1") + new("c.0", "c.1"))
    assert list(found) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert found["model-00002-of-00002.safetensors"] == ["c.0", "c.1"]


def test_new_tensors_fill_files_in_natural_order() -> None:
    found = grouped(new(*(f"layers.{i}" for i in (10, 2, 1, 9, 3))), size=32)
    assert list(found.values()) == [["layers.1", "layers.2"], ["layers.3", "layers.9"], ["layers.10"]]


def test_a_tensor_larger_than_the_shard_size_stands_alone() -> None:
    found = grouped(new("a") + new("b", size=100) + new("c"), size=32)
    assert list(found.values()) == [["a"], ["b"], ["c"]]


def test_wide_dtypes_come_first_so_that_all_are_aligned() -> None:
    entries = new("a", dtype="U8", size=3) + new("b", dtype="F64") + new("c", dtype="BF16") + new("d", dtype="F32")
    (shard,), _ = plan_shards(plan(entries), key=KEY)
    widths = {"a": 1, "b": 8, "c": 2, "d": 4}
    assert list(shard.file.places) == ["b", "d", "c", "a"]
    assert all(offset % widths[name] == 0 for name, (offset, _) in shard.file.places.items())


def test_files_of_a_part_lie_in_its_folder_with_its_index() -> None:
    entries = [Compute(part="vae", name=n, dtype="F32", shape=(4,), how=None) for n in ("a", "b")]
    found, indexes = plan_shards(plan(entries, "vae"), key=KEY, shard_size=16)
    assert [s.file.relative for s in found] == [f"vae/model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert indexes == {
        "vae/model.safetensors.index.json": {
            f"{n}": f"model-0000{i}-of-00002.safetensors" for i, n in ((1, "a"), (2, "b"))
        }
    }


def test_one_file_needs_no_index() -> None:
    _, indexes = plan_shards(plan(new("a")), key=KEY)
    assert indexes == {}


def test_a_file_that_holds_less_than_the_parent_s_is_not_taken_whole(parent: Checkpoint) -> None:
    (shard,), _ = plan_shards(plan(kept(parent, "a.0")), key=KEY)
    assert shard.file.places.keys() == {"a.0"} and shard.file.size < Path(parent.tensors["a.0"].file).stat().st_size


def test_pieces_of_tensors_are_new_tensors(parent: Checkpoint) -> None:
    ref = parent.tensors["a.0"]
    piece = Bytes(name="half", dtype="F32", shape=(2,), pieces=((ref, 0, 8),))
    assert list(grouped([*kept(parent, "a.0", "a.1"), piece]).values()) == [["a.0", "a.1"], ["half"]]


def covers(found: list[Shard], entries: list[Entry]) -> None:
    """Every tensor once, in files without holes that our own reader accepts."""
    placed = [(s.file.relative, e.name) for s in found for e in s.entries]
    assert sorted(n for _, n in placed) == sorted(e.name for e in entries)
    for shard in found:
        assert shard.file.places.keys() == {e.name for e in shard.entries}
        assert sum(count for _, count in shard.file.places.values()) + len(shard.file.header) == shard.file.size


NAMES = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6), unique=True, max_size=12)


@settings(max_examples=50, deadline=None)
@given(NAMES.filter(lambda names: "__metadata__" not in names), st.integers(1, 200), st.data())
def test_any_set_of_tensors_is_covered_once(names: list[str], size: int, data: st.DataObject) -> None:
    dtypes = st.sampled_from(["U8", "BF16", "F32", "F64"])
    entries: list[Entry] = []
    for name in names:
        entries += new(name, dtype=data.draw(dtypes), size=data.draw(st.integers(0, 9)))
    found, indexes = plan_shards(plan(entries), key=KEY, shard_size=size)
    covers(found, entries)
    assert all(len(s.entries) == 1 or sum(e.nbytes for e in s.entries) <= size for s in found)
    again, _ = plan_shards(plan(entries[::-1]), key=KEY, shard_size=size)
    assert [s.file.header for s in again] == [s.file.header for s in found]
    if indexes:
        assert {n for m in indexes.values() for n in m} == set(names)


def test_a_planned_file_of_kept_tensors_is_read_by_our_reader(parent: Checkpoint, tmp_path: Path) -> None:
    (shard,), _ = plan_shards(plan(kept(parent, "a.1") + []), key=KEY)
    path = tmp_path / "x.safetensors"
    path.write_bytes(shard.file.header + bytes(16))
    assert list(read_header(path).tensors) == ["a.1"]
