"""Linear merges of bfloat16: the bits of the general path at any length and place, for every kind of value, by the
compiled sum and by numpy's."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from surgery.kernels.merging import COMPILED, weighted_sum_by_numpy

from surgery.arch.merging.numbers import arithmetic, formulas, sums
from surgery.arch.merging.numbers.formulas import Formula, merger, stream
from surgery.errors import CheckpointError
from surgery.store.reader import MemoryReader, open_range
from surgery.store.tensors import TensorRef


@pytest.fixture(params=["compiled", "numpy"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which sum is used."""
    if request.param == "compiled" and not COMPILED:
        pytest.skip("this package was built without a compiler")
    if request.param == "numpy":
        monkeypatch.setattr(sums, "COMPILED", False)
        monkeypatch.setattr(sums, "weighted_sum", weighted_sum_by_numpy)
    return str(request.param)


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (formulas, arithmetic, sums):
        monkeypatch.setattr(module, "PIECE", 64)


def reader(values: np.ndarray) -> MemoryReader:
    return MemoryReader("w", "BF16", values.shape, memoryview(values.tobytes()))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 1000, 1 << 16])
@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.9, 0.1), (1.7, -0.7), (0.5, 0.25, 0.25), (1.0,)])
def test_sums_are_what_torch_rounds(
    count: int, weights: tuple[float, ...], kind: str, request: pytest.FixtureRequest
) -> None:
    if count <= 1000:
        request.getfixturevalue("short_pieces")
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
@pytest.mark.usefixtures("short_pieces", "kind")
def test_what_lies_in_a_file_is_what_is_read(count: int, offset: int, numerics: str, tmp_path: Path) -> None:
    """At any offset, in pieces of any size."""
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


@pytest.mark.usefixtures("kind")
def test_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    ref = on_disk(tmp_path / "a", np.zeros(100_000, np.uint16), 8)
    os.truncate(ref.file, 4096)
    with open_range(ref) as a, pytest.raises(CheckpointError, match="ends inside"):
        list(stream(Formula("linear", (0.5, 0.5)), [a, a], "BF16", "w", 0))


@pytest.mark.usefixtures("kind")
def test_a_file_that_is_cut_on_the_way_is_an_error(tmp_path: Path) -> None:
    """Its window is mapped by then: what is read from it is a signal, and that one says nothing."""
    refs = [on_disk(tmp_path / name, np.ones(1 << 20, np.uint16), 8) for name in "ab"]
    with open_range(refs[0]) as a, open_range(refs[1]) as b:
        pieces = stream(Formula("linear", (0.5, 0.5)), [a, b], "BF16", "w", 0)
        assert len(next(pieces))
        os.truncate(refs[1].file, 4096)
        with pytest.raises(CheckpointError, match="ends inside 'w'"):
            list(pieces)


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("offset", [8, 1 << 20, (4 << 20) - 2, 5_000_001])
def test_windows_of_a_large_file_follow_each_other(offset: int, tmp_path: Path) -> None:
    count = 5_300_001  # several windows, pieces that begin in one and end in the next
    values = (np.random.default_rng(offset).standard_normal(count, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    refs = [on_disk(tmp_path / "a", values, offset), on_disk(tmp_path / "b", values[::-1].copy(), 8)]
    formula = Formula("linear", (0.75, 0.25))
    with open_range(refs[0]) as a, open_range(refs[1]) as b:
        got = b"".join(bytes(p) for p in stream(formula, [a, b], "BF16", "w", 0))
    tensors = [torch.from_numpy(v.view(np.int16)).view(torch.bfloat16).float() for v in (values, values[::-1].copy())]
    want = (tensors[0] * 0.75 + tensors[1] * 0.25).bfloat16()
    assert torch.equal(torch.frombuffer(bytearray(got), dtype=torch.int16), want.view(torch.int16))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_fast_numbers_are_one_step_away_at_most(stored: torch.dtype, share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    a = (torch.randn(100_003, generator=generator) * 0.02).to(stored)
    b = (a.float() + torch.randn(100_003, generator=generator) * 0.002).to(stored)
    name = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[stored]
    inputs = [
        MemoryReader("w", name, tuple(t.shape), memoryview(bytearray(t.view(torch.uint8).numpy()))) for t in (a, b)
    ]
    formula = Formula("linear", (1 - share, share), numerics="fast")
    data = bytearray(b"".join(bytes(p) for p in stream(formula, inputs, name, "w", 0)))
    got = torch.frombuffer(data, dtype=stored).double()
    exact = a.double() * (1 - share) + b.double() * share
    # Where both nearly cancel, digits of the arithmetic are lost: steps are those of the inputs.
    step = torch.exp2(torch.floor(torch.log2(torch.maximum(a.double().abs(), b.double().abs()).clamp_min(2.0**-14))))
    steps = 2 if stored is torch.float32 else 1  # the arithmetic is float32 itself, and so are the shares
    assert ((got - exact).abs() <= steps * step * torch.finfo(stored).eps).all()
    assert not torch.equal(got, a.double())


def test_sums_that_can_overflow_are_not_left_to_lerp() -> None:
    big = torch.full((8,), 60000.0, dtype=torch.float16)
    small = torch.full((8,), -60000.0, dtype=torch.float16)
    inputs = [MemoryReader("w", "F16", (8,), memoryview(t.view(torch.uint8).numpy())) for t in (big, small)]
    with pytest.raises(CheckpointError, match="beyond float16"):
        list(stream(Formula("linear", (1.7, -0.7), normalize=False, numerics="fast"), inputs, "F16", "w", 0))
