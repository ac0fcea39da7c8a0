"""float16 to float32 and back: the processor's instructions, numpy's way and torch's are one."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from surgery.kernels.merging import narrow, narrow_by_numpy, widen, widen_by_numpy

from surgery.arch.merging.numbers.formulas import Formula, stream
from surgery.errors import CheckpointError
from surgery.store.reader import MemoryReader

compiled = pytest.mark.skipif(
    widen is widen_by_numpy, reason="built without a compiler, or the processor has no instructions for float16"
)
WIDEN = [pytest.param(widen, marks=compiled, id="compiled"), pytest.param(widen_by_numpy, id="numpy")]
NARROW = [pytest.param(narrow, marks=compiled, id="compiled"), pytest.param(narrow_by_numpy, id="numpy")]
Convert = Callable[..., None]


@pytest.mark.parametrize("convert", WIDEN)
def test_every_half_is_widened_exactly(convert: Convert) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    out = np.empty(1 << 16, np.float32)
    convert(out, every)
    want = torch.from_numpy(every.view(np.int16)).view(torch.float16).float().numpy()
    assert np.array_equal(np.isnan(out), np.isnan(want)) and np.isnan(out).sum() == 2046
    numbers = ~np.isnan(want)
    assert np.array_equal(out[numbers].view(np.uint32), want[numbers].view(np.uint32))


@pytest.mark.parametrize("convert", NARROW)
def test_every_half_and_what_lies_between_is_rounded(convert: Convert) -> None:
    """Each half, the middles to its neighbours, and the float32 numbers next to these; then numbers of any size."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    middles = np.append((halves[1:] + halves[:-1]) / 2, 65520.0)
    near = np.concatenate([halves, middles]).astype(np.float32)
    near = np.concatenate([near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))])
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, np.uint32)
    some = bits.view(np.float32)[~np.isnan(bits.view(np.float32))]
    values = np.concatenate([near, -near, some, np.array([np.inf, -np.inf, np.nan], np.float32)])
    out = np.empty(len(values), np.float16)
    convert(out, values)
    want = torch.from_numpy(values).half().numpy()
    assert np.array_equal(out[:-1].view(np.uint16), want[:-1].view(np.uint16)) and np.isnan(out[-1])


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 31, 1000])
@pytest.mark.parametrize("shift", [0, 1, 4])
def test_any_number_of_elements_anywhere(count: int, shift: int) -> None:
    values = np.random.default_rng(count).standard_normal(count).astype(np.float16)
    for to_wide, to_half in ((widen, narrow), (widen_by_numpy, narrow_by_numpy)):
        source = memoryview(b"x" * shift + values.tobytes())[shift:]
        wide, back = bytearray(shift + 4 * count + 3), bytearray(shift + 2 * count + 3)
        to_wide(memoryview(wide)[shift : shift + 4 * count], source)
        to_half(memoryview(back)[shift : shift + 2 * count], memoryview(wide)[shift : shift + 4 * count])
        assert wide[shift : shift + 4 * count] == values.astype(np.float32).tobytes()
        assert back[shift : shift + 2 * count] == values.tobytes()
        assert not any(wide[:shift]) and not any(wide[-3:]) and not any(back[:shift]) and not any(back[-3:])


@pytest.mark.parametrize("convert", [*WIDEN, *NARROW])
def test_sizes_that_do_not_fit_are_refused(convert: Convert) -> None:
    for out, source in ((8, 8), (12, 4), (0, 4)):
        with pytest.raises(ValueError, match="as many elements"):
            convert(bytearray(out), bytes(source))
    for out, source in ((4, 3), (5, 4), (4, 1)):
        with pytest.raises(ValueError, match="element"):
            convert(bytearray(out), bytes(source))


def merged(values: list[np.ndarray], weights: tuple[float, ...]) -> torch.Tensor:
    readers = [MemoryReader("w", "F16", v.shape, memoryview(v.tobytes())) for v in values]
    data = b"".join(bytes(p) for p in stream(Formula("linear", weights, normalize=False), readers, "F16", "w", 0))
    return torch.frombuffer(bytearray(data), dtype=torch.float16)


def test_a_merge_of_float16_is_what_torch_rounds() -> None:
    generator = np.random.default_rng(5)
    values = [(generator.standard_normal(600_001) * 0.02).astype(np.float16) for _ in "ab"]
    a, b = (torch.from_numpy(v).float() for v in values)
    got = merged(values, (0.7, 0.3))
    assert torch.equal(got, (a * torch.tensor(0.7) + b * torch.tensor(0.3)).half())


def test_infinities_stay_and_finite_sums_that_become_infinite_are_an_error() -> None:
    ones = np.ones(9, np.float16)
    for value in (np.inf, -np.inf, np.nan):
        other = ones.copy()
        other[4] = value
        got = merged([ones, other], (0.5, 0.5))
        assert torch.equal(got.isfinite(), torch.tensor(other).isfinite())
    for sign in (1, -1):
        large = np.full(9, sign * 60000, np.float16)
        with pytest.raises(CheckpointError, match="beyond float16"):
            merged([large, large], (1.0, 1.0))
