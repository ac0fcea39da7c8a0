"""Our header against the safetensors library, in both directions, over generated names, dtypes and shapes."""

import struct
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from surgery.errors import CheckpointError
from surgery.store.checkpoint import open_checkpoint
from surgery.store.dtypes import _TORCH, as_bytes, torch_dtype
from surgery.store.header import nbytes_of, plan_header, read_header

Tensors = dict[str, tuple[str, tuple[int, ...]]]

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
DTYPES = st.sampled_from(sorted(set(_TORCH) - {"F4", "F6_E2M3", "F6_E3M2"}))
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
CHECKPOINTS = st.dictionaries(NAMES, st.tuples(DTYPES, SHAPES), max_size=6)
METADATA = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6), st.text('aé\n"\\', max_size=6)
)


def filled(tensors: Tensors) -> dict[str, torch.Tensor]:
    """A tensor of each dtype and shape; its bytes count up (bools alternate: other bytes are no bools)."""
    found = {}
    for name, (dtype, shape) in tensors.items():
        raw = torch.arange(nbytes_of(dtype, shape)).remainder(2 if dtype == "BOOL" else 251).to(torch.uint8)
        kind = torch_dtype(dtype)
        assert kind is not None
        found[name] = raw.view(kind).reshape(shape)
    return found


@settings(max_examples=60, deadline=None)
@given(CHECKPOINTS)
def test_what_the_library_writes_we_read(tensors: Tensors) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        made = filled(tensors)
        save_file(made, path)
        checkpoint = open_checkpoint(path)
        assert {n: (r.dtype, r.shape) for n, r in checkpoint.tensors.items()} == tensors
        for name, tensor in made.items():
            read = checkpoint.read(name)
            assert read.dtype == tensor.dtype and read.shape == tensor.shape
            assert bytes(as_bytes(read)) == bytes(as_bytes(tensor))


@settings(max_examples=60, deadline=None)
@given(CHECKPOINTS, METADATA)
def test_what_we_write_the_library_reads(tensors: Tensors, metadata: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        made = filled(tensors)
        header, places = plan_header(((n, d, s) for n, (d, s) in tensors.items()), metadata=metadata)
        path.write_bytes(header + b"".join(bytes(as_bytes(t)) for t in made.values()))
        with safe_open(path, "pt") as found:
            assert (found.metadata() or {}) == metadata
        loaded = load_file(path)
        assert loaded.keys() == tensors.keys() == places.keys()
        for name, tensor in made.items():
            assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
            assert bytes(as_bytes(loaded[name])) == bytes(as_bytes(tensor))


@settings(max_examples=60, deadline=None)
@given(CHECKPOINTS, METADATA)
def test_a_planned_header_reads_back_as_it_was_planned(tensors: Tensors, metadata: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        header, places = plan_header(((n, d, s) for n, (d, s) in tensors.items()), metadata=metadata)
        path.write_bytes(header + bytes(sum(count for _, count in places.values())))
        found = read_header(path)
        assert {n: (s.dtype, s.shape) for n, s in found.tensors.items()} == tensors
        assert found.metadata == metadata and found.data_start == len(header) and not found.oddities
        starts = {n: (found.data_start + s.start, s.stop - s.start) for n, s in found.tensors.items()}
        assert starts == places


SEED_FILE = plan_header(
    [("a.weight", "F32", (2, 3)), ("b", "BF16", (4,)), ("é", "F4", (4,))], metadata={"format": "pt"}
)[0]
TOKENS = [
    b'"',
    b"{",
    b"}",
    b"[",
    b",",
    b":",
    b"0",
    b"-1",
    b"1e3",
    b"null",
    b"true",
    b"NaN",
    b"\xff",
    b"\\u0000",
    b"\\ud800",
]
EDITS = st.lists(
    st.tuples(
        st.integers(0, len(SEED_FILE) + 40), st.integers(0, 3), st.sampled_from([*TOKENS, b'"b":{', b"F16", b" "])
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=300, deadline=None)
@given(EDITS, st.booleans())
def test_a_damaged_file_is_refused_as_such_and_what_we_accept_the_library_accepts(
    edits: list[tuple[int, int, bytes]], repair_length: bool
) -> None:
    raw = SEED_FILE + bytes(range(34))
    for position, removed, inserted in edits:
        raw = raw[:position] + inserted + raw[position + removed :]
    if repair_length:  # so that most damage is met by the parser and not by the length
        raw = struct.pack("<Q", max(0, len(raw) - 8 - 34)) + raw[8:]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(raw)
        try:
            ours = read_header(path)
        except CheckpointError as err:
            assert str(path) in err.message and err.hint and err.code.startswith("checkpoint.")
            return
        with safe_open(path, "pt") as theirs:
            assert set(theirs.keys()) == ours.tensors.keys()
