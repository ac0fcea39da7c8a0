"""Sums of bfloat16 two elements at a time: the bits of the general path, at any length, for every kind of value."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from surgery.arch.merging import arithmetic, formulas
from surgery.arch.merging.formulas import Formula, merger, stream
from surgery.errors import CheckpointError
from surgery.store.reader import MemoryReader, open_range
from surgery.store.tensors import TensorRef


def reader(values: np.ndarray) -> MemoryReader:
    return MemoryReader("w", "BF16", values.shape, memoryview(values.tobytes()))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 1000, 1 << 16])
@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.9, 0.1), (1.7, -0.7), (0.5, 0.25, 0.25), (1.0,)])
def test_packed_sums_are_what_torch_rounds(
    count: int, weights: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formulas, "PIECE", 64)
    monkeypatch.setattr(arithmetic, "PIECE", 64)
    if count > 1000:
        monkeypatch.undo()
    generator = np.random.default_rng(count)
    # Any bits: subnormals, zeros of both signs, infinities and NaN among them.
    bits = [generator.integers(0, 1 << 16, count, np.uint16) for _ in weights]
    finite = [np.where(b & 0x7F80 > 0x7E00, b & 0xBFFF, b).astype(np.uint16) for b in bits]
    for inputs in (finite, bits):
        tensors = [torch.from_numpy(b.view(np.int16)).view(torch.bfloat16) for b in inputs]
        want = tensors[0].float() * torch.tensor(weights[0])
        for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
            want = want + tensor.float() * torch.tensor(weight)
        formula = Formula("linear", weights, normalize=False)
        if inputs is bits and any(bool(((t.float().abs() > 1e38) & t.isfinite()).any()) for t in tensors):
            tensors = [torch.where(t.float().abs().nan_to_num(0, 0) > 1e37, t * 1e-3, t) for t in tensors]
            inputs = [t.view(torch.int16).numpy().view(np.uint16) for t in tensors]
            want = sum(t.float() * torch.tensor(w) for t, w in zip(tensors, weights, strict=True))
        data = b"".join(bytes(p) for p in stream(formula, [reader(b) for b in inputs], "BF16", "w", 0))
        got = torch.frombuffer(bytearray(data), dtype=torch.bfloat16) if data else torch.empty(0, dtype=torch.bfloat16)
        assert torch.equal(got.nan_to_num(7.0), want.bfloat16().nan_to_num(7.0))
        assert torch.equal(got.isnan(), want.isnan())
        plain = torch.from_numpy(merger(formula, [reader(b) for b in inputs], 0)(0, min(count, 64)).copy())
        assert torch.equal(plain.bfloat16().nan_to_num(7.0), got[: min(count, 64)].nan_to_num(7.0))


def on_disk(path: Path, values: np.ndarray, offset: int) -> TensorRef:
    path.write_bytes(b"x" * offset + values.tobytes() + b"after")
    return TensorRef("w", "BF16", values.shape, str(path), offset, values.nbytes)


@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize("offset", [0, 8, 10, 11, 4096, 70_003])
@pytest.mark.parametrize("count", [1, 63, 64, 5000, 5001])
def test_what_lies_in_a_file_is_what_is_read(
    count: int, offset: int, numerics: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any offset, in pieces of any size."""
    monkeypatch.setattr(formulas, "PIECE", 64)
    generator = np.random.default_rng(count)
    values = [(generator.standard_normal(count, np.float32).view(np.uint32) >> 16).astype(np.uint16) for _ in "ab"]
    formula = Formula("linear", (0.75, 0.25), numerics=numerics)

    def merged(pair: list) -> bytes:
        return b"".join(bytes(p) for p in stream(formula, pair, "BF16", "w", 0))

    want = merged([reader(v) for v in values])
    refs = [on_disk(tmp_path / name, v, offset) for name, v in zip("ab", values, strict=True)]
    with open_range(refs[0]) as a, open_range(refs[1]) as b:
        assert merged([a, b]) == want
    for ref, value in zip(refs, values, strict=True):
        assert Path(ref.file).read_bytes() == b"x" * offset + value.tobytes() + b"after"


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    ref = on_disk(tmp_path / "a", np.zeros(100_000, np.uint16), 8)
    os.truncate(ref.file, 4096)
    with open_range(ref) as a, pytest.raises(CheckpointError, match="ends inside"):
        list(stream(Formula("linear", (0.5, 0.5)), [a, a], "BF16", "w", 0))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_fast_numbers_are_one_step_away_at_most(kind: torch.dtype, share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    a = (torch.randn(100_003, generator=generator) * 0.02).to(kind)
    b = (a.float() + torch.randn(100_003, generator=generator) * 0.002).to(kind)
    name = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[kind]
    inputs = [
        MemoryReader("w", name, tuple(t.shape), memoryview(bytearray(t.view(torch.uint8).numpy()))) for t in (a, b)
    ]
    formula = Formula("linear", (1 - share, share), numerics="fast")
    data = bytearray(b"".join(bytes(p) for p in stream(formula, inputs, name, "w", 0)))
    got = torch.frombuffer(data, dtype=kind).double()
    exact = a.double() * (1 - share) + b.double() * share
    # Where both nearly cancel, digits of the arithmetic are lost: steps are those of the inputs.
    step = torch.exp2(torch.floor(torch.log2(torch.maximum(a.double().abs(), b.double().abs()).clamp_min(2.0**-14))))
    steps = 2 if kind is torch.float32 else 1  # the arithmetic is float32 itself, and so are the shares
    assert ((got - exact).abs() <= steps * step * torch.finfo(kind).eps).all()
    assert not torch.equal(got, a.double())


def test_sums_that_can_overflow_are_not_left_to_lerp() -> None:
    big = torch.full((8,), 60000.0, dtype=torch.float16)
    small = torch.full((8,), -60000.0, dtype=torch.float16)
    inputs = [MemoryReader("w", "F16", (8,), memoryview(t.view(torch.uint8).numpy())) for t in (big, small)]
    with pytest.raises(CheckpointError, match="beyond float16"):
        list(stream(Formula("linear", (1.7, -0.7), normalize=False, numerics="fast"), inputs, "F16", "w", 0))
