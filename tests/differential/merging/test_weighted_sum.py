"""The compiled sum, numpy's and torch's are one: the same bits for every value, size, place in memory and number of
inputs. And a mapped input that is cut is an error, where the system has a signal for it."""

import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from surgery.kernels.merging import COMPILED, weighted_sum, weighted_sum_by_numpy

compiled = pytest.mark.skipif(not COMPILED, reason="this package was built without a compiler")
KINDS = [pytest.param(weighted_sum, marks=compiled, id="compiled"), pytest.param(weighted_sum_by_numpy, id="numpy")]
Sum = Callable[..., bool]
WEIGHTS = [(0.7, 0.3), (0.9, 0.1), (1.7, -0.7), (1.0,), (1 / 3, 1 / 3, 1 / 3), (1e-40, 1.0), (-0.0, 0.5)]


def by_torch(weights: tuple[float, ...], inputs: list[np.ndarray]) -> torch.Tensor:
    tensors = [torch.from_numpy(one.view(np.int16)).view(torch.bfloat16).float() for one in inputs]
    found = tensors[0] * torch.tensor(weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        found = found + tensor * torch.tensor(weight)
    return found.bfloat16()


def summed(kind: Sum, weights: tuple[float, ...], inputs: list[np.ndarray]) -> tuple[bool, torch.Tensor]:
    out = bytearray(2 * len(inputs[0]))
    finite = kind(out, weights, [one.tobytes() for one in inputs])
    return finite, torch.frombuffer(out, dtype=torch.bfloat16)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_value_of_the_format(kind: Sum, weights: tuple[float, ...]) -> None:
    """Each of the 65,536 meets others at random: subnormals, zeros of both signs, infinities and NaN among them."""
    generator = np.random.default_rng(1)
    every = np.arange(1 << 16, dtype=np.uint16)
    for _ in range(4):
        inputs = [every, *(generator.permutation(every) for _ in weights[1:])]
        finite, got = summed(kind, weights, inputs)
        want = by_torch(weights, inputs)
        assert not finite and not want.isfinite().all()
        assert torch.equal(got.isnan(), want.isnan())
        numbers = ~want.isnan()
        assert torch.equal(got[numbers].view(torch.int16), want[numbers].view(torch.int16))


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_that_tie_go_to_the_even_one(kind: Sum) -> None:
    """1 + k/256 with odd k lies halfway between two bfloat16 numbers: 0.5 x + 0.5 y for neighbours x and y."""
    first = np.arange(0x3F80, 0x4000, dtype=np.uint16)
    finite, got = summed(kind, (0.5, 0.5), [first, first + 1])
    assert finite and all(int(bits) % 2 == 0 for bits in got.view(torch.int16))
    assert torch.equal(got, by_torch((0.5, 0.5), [first, first + 1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("many", [1, 2, 3, 70])
def test_any_size_and_number_of_inputs(kind: Sum, many: int) -> None:
    generator = np.random.default_rng(many)
    weights = tuple(generator.standard_normal(many) / many)
    for count in (0, 1, 2, 3, 31, 32, 33, 127, 2047, 2048, 2049, 5000, 5001):
        inputs = [
            (generator.standard_normal(count, np.float32).view(np.uint32) >> 16).astype(np.uint16)
            for _ in range(many)
        ]  # fmt: skip
        finite, got = summed(kind, weights, inputs) if count else (kind(bytearray(), weights, [b""] * many), None)
        assert finite
        if got is not None:
            assert torch.equal(got.view(torch.int16), by_torch(weights, inputs).view(torch.int16)), count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [0, 1, 2, 3, 5])
def test_anywhere_in_memory(kind: Sum, shift: int) -> None:
    generator = np.random.default_rng(shift)
    inputs = [(generator.standard_normal(1001, np.float32).view(np.uint32) >> 16).astype(np.uint16) for _ in "ab"]
    places = [memoryview(b"x" * shift + one.tobytes())[shift:] for one in inputs]
    out = bytearray(b"x" * shift + bytes(2002) + b"after")
    assert kind(memoryview(out)[shift : shift + 2002], (0.25, 0.75), places)
    assert out[:shift] == b"x" * shift and out[shift + 2002 :] == b"after"
    got = torch.frombuffer(bytearray(out[shift : shift + 2002]), dtype=torch.int16)
    assert torch.equal(got, by_torch((0.25, 0.75), inputs).view(torch.int16))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [0, 1, 14, 15, 16])
@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFC1])
def test_one_value_that_is_not_finite_is_seen(kind: Sum, at: int, bits: int) -> None:
    ones = np.full(17, 0x3F80, np.uint16)
    other = ones.copy()
    other[at] = bits
    assert kind(bytearray(34), (0.5, 0.5), [ones.tobytes()] * 2)
    assert not kind(bytearray(34), (0.5, 0.5), [ones.tobytes(), other.tobytes()])
    largest = np.full(17, 0x7F7F, np.uint16)  # finite, and too large a sum
    assert not kind(bytearray(34), (1.0, 1.0), [largest.tobytes()] * 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("out", "weights", "inputs"),
    [
        (bytearray(4), (1.0,), [b"1234", b"1234"]),
        (bytearray(4), (0.5, 0.5), [b"1234", b"12"]),
        (bytearray(3), (1.0,), [b"123"]),
        (bytearray(4), (), []),
    ],
)
def test_sizes_that_differ_are_refused(
    kind: Sum, out: bytearray, weights: tuple[float, ...], inputs: list[bytes]
) -> None:
    with pytest.raises(ValueError, match="one weight an input"):
        kind(out, weights, inputs)


@compiled
def test_what_is_not_a_buffer_is_refused() -> None:
    for out, weights, inputs in (
        (b"12", (1.0,), [b"12"]),
        (bytearray(2), (1.0,), [7]),
        (bytearray(2), ("x",), [b"12"]),
    ):
        with pytest.raises((TypeError, BufferError)):
            weighted_sum(out, weights, inputs)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        weighted_sum(bytearray(2), 1.0, [b"12"])  # type: ignore[arg-type]


def mapped(path: Path, size: int) -> memoryview:
    path.write_bytes(bytes(size))
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ))


@compiled
def test_a_mapped_input_that_is_cut_is_an_error_of_its_own_thread(tmp_path: Path) -> None:
    size = 1 << 20
    cut, whole = mapped(tmp_path / "cut", size), mapped(tmp_path / "whole", size)
    os.truncate(tmp_path / "cut", 4096)
    stop, failures = threading.Event(), []

    def go_on() -> None:
        while not stop.is_set():
            if not weighted_sum(bytearray(size), (0.5, 0.5), [whole, whole]):
                failures.append("not finite")

    other = threading.Thread(target=go_on)
    other.start()
    try:
        for inputs in ([whole, cut], [cut, whole], [cut], [whole, whole, cut]):
            with pytest.raises(OSError, match="Input/output error"):
                weighted_sum(bytearray(size), (0.5,) * len(inputs), inputs)
        assert weighted_sum(bytearray(4096), (1.0,), [cut[:4096]])  # what is left can be read
    finally:
        stop.set()
        other.join()
    assert not failures


@compiled
@pytest.mark.parametrize("handled", ["no", "before", "after"])
def test_other_bus_errors_meet_who_waits_for_them(handled: str, tmp_path: Path) -> None:
    """The signal is ours inside a sum only: elsewhere it ends the process, or is told of by faulthandler."""
    code = (
        "import faulthandler, mmap, os, sys\n"
        "from surgery.kernels.merging import weighted_sum\n"
        "path, handled = sys.argv[1:]\n"
        "file = open(path, 'rb')\n"
        "view = memoryview(mmap.mmap(file.fileno(), 8192, prot=mmap.PROT_READ))\n"
        "if handled == 'before': faulthandler.enable()\n"
        "assert weighted_sum(bytearray(8192), (1.0,), [view])\n"
        "if handled == 'after': faulthandler.enable()\n"
        "os.truncate(path, 0)\n"
        "try: weighted_sum(bytearray(8192), (1.0,), [view])\n"
        "except OSError: print('told', flush=True)\n"
        "view[5000]\n"
    )
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    done = subprocess.run([sys.executable, "-c", code, str(path), handled], capture_output=True, text=True)
    assert done.returncode == -7 and done.stdout == "told\n"
    assert ("Bus error" in done.stderr) == (handled != "no")
