"""Sums of bfloat16 two elements at a time: the bits of the general path, at any length, for every kind of value."""

import numpy as np
import pytest
import torch

from surgery.arch.merging import arithmetic, formulas
from surgery.arch.merging.formulas import Formula, merger, stream
from surgery.store.reader import MemoryReader


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
