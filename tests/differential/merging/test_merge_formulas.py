"""Our merge formulas against naive float64 definitions, and against mergekit's kernels in float32."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from mergekit.merge_methods import merge_tensors

from surgery.arch.merging.numbers import arithmetic, formulas
from surgery.arch.merging.numbers.arithmetic import Bits
from surgery.arch.merging.numbers.formulas import Formula, stream
from surgery.errors import CheckpointError
from surgery.store.dtypes import as_bytes, name_of, torch_dtype
from surgery.store.reader import MemoryReader

KINDS = [torch.bfloat16, torch.float16, torch.float32]


def reader(tensor: torch.Tensor) -> MemoryReader:
    return MemoryReader("w", name_of(tensor.dtype), tuple(tensor.shape), memoryview(bytes(as_bytes(tensor))))


def made(formula: Formula, tensors: Sequence[torch.Tensor], *, kind: Any = None, seed: int = 0) -> torch.Tensor:
    kind = kind or tensors[0].dtype
    data = b"".join(bytes(p) for p in stream(formula, [reader(t) for t in tensors], name_of(kind), "w", seed))
    return torch.frombuffer(bytearray(data), dtype=torch_dtype(name_of(kind))).reshape(tensors[0].shape)


def trio(
    kind: torch.dtype = torch.float32, shape: tuple[int, ...] = (37, 53), apart: float = 0.3
) -> list[torch.Tensor]:
    """Host, donor, base."""
    g = torch.Generator().manual_seed(3)
    base = torch.randn(shape, generator=g) * 0.02
    return [(base + torch.randn(shape, generator=g) * 0.02 * apart * n).to(kind) for n in (1, 1, 0)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.9, 0.5, 0.13, 1.3])
def test_linear_has_the_bits_of_the_definition_in_float32(kind: torch.dtype, share: float) -> None:
    host, donor, _ = trio(kind)
    got = made(Formula("linear", (share, 1 - share), normalize=False), [host, donor])
    lam, mu = torch.tensor(share), torch.tensor(1 - share, dtype=torch.float64).float()
    want = (host.float() * lam + donor.float() * mu).to(kind)
    assert torch.equal(got, want)
    exact = host.double() * share + donor.double() * (1 - share)
    ulp = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-22}[kind]
    assert bool(((got.double() - exact).abs() <= exact.abs() * ulp + 1e-7).all())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_model_merged_with_itself_is_itself(kind: torch.dtype) -> None:
    host, _, _ = trio(kind)
    for share in (0.9, 0.3, 0.77):
        assert torch.equal(made(Formula("linear", (share, 1 - share), normalize=False), [host, host]), host)


@pytest.mark.parametrize(
    ("ours", "theirs", "parameters", "based"),
    [
        (Formula("linear", (0.7, 0.4)), "linear", {"weight": [0.7, 0.4]}, False),
        (Formula("slerp", (0.8, 0.2)), "slerp", {"t": 0.2}, False),
        (Formula("task-arithmetic", (0.7, 0.4), normalize=False), "task_arithmetic", {"weight": [0.7, 0.4]}, True),
        (Formula("ties", (0.7, 0.4), (0.3, 0.3)), "ties", {"weight": [0.7, 0.4], "density": 0.3}, True),
        (Formula("ties", (1.6, 0.2), (0.2, 0.2)), "ties", {"weight": [1.6, 0.2], "density": 0.2}, True),
        (Formula("ties", (1.0, 1.0)), "ties", {"weight": 1.0, "density": 1.0}, True),
        (
            Formula("ties", (0.7, 0.4), (0.3, 0.3), normalize=False, scale=0.5),
            "ties",
            {"weight": [0.7, 0.4], "density": 0.3, "normalize": False, "lambda": 0.5},
            True,
        ),
    ],
)  # fmt: skip
def test_formulas_agree_with_mergekit(ours: Formula, theirs: str, parameters: dict, based: bool) -> None:
    host, donor, base = trio()
    tensors = [host, donor, base] if based else [host, donor]
    base_index = 2 if based else 0 if theirs == "slerp" else None
    want = merge_tensors(tensors, theirs, parameters=parameters, base_index=base_index, dtype=torch.float32)
    assert (made(ours, tensors) - want).abs().max() <= 1e-6


def naive_ties(tensors: Sequence[torch.Tensor], weights: Sequence[float], density: float) -> torch.Tensor:
    """The reference code's TIES, section 2.3, written out in float64."""
    *inputs, base = [t.double() for t in tensors]
    taus = []
    for tensor in inputs:
        tau = (tensor - base).flatten()
        k = int(density * tau.numel())
        keep = torch.zeros_like(tau)
        keep[torch.argsort(tau.abs(), descending=True, stable=True)[:k]] = 1
        taus.append((tau * keep).reshape(base.shape))
    elected = torch.where(sum(taus) >= 0, 1.0, -1.0)
    agree = [torch.sign(t) == elected for t in taus]
    count = sum(a.double() for a in agree).clamp_min(1)
    return base + sum(w * t * a for w, t, a in zip(weights, taus, agree, strict=True)) / count


def test_compat_paper_is_the_reference_code_s_ties() -> None:
    tensors = trio()
    got = made(Formula("ties", (1.6, 0.2), (0.2, 0.2), compat="paper"), tensors)
    assert (got.double() - naive_ties(tensors, (1.6, 0.2), 0.2)).abs().max() < 1e-7
    ours = made(Formula("ties", (1.6, 0.2), (0.2, 0.2)), tensors)
    assert float(((ours - got).abs() > 1e-7).float().mean()) > 0.2  # the two definitions are far apart


def test_of_equal_sizes_the_first_in_the_tensor_are_kept() -> None:
    base = torch.zeros(10)
    host = torch.tensor([1.0, -2, 2, 2, -2, 1, 0, 2, 3, 1])
    got = made(Formula("ties", (1.0,), (0.4,)), [host, base])
    assert got.tolist() == [0, -2, 2, 2, 0, 0, 0, 0, 3, 0]


def test_ties_of_one_donor_with_everything_kept_is_the_donor() -> None:
    _, donor, base = trio(torch.bfloat16)
    got = made(Formula("ties", (1.0,), (1.0,)), [donor, base])
    assert torch.equal(got, donor)


def test_slerp_of_equal_inputs_is_the_input() -> None:
    host, _, _ = trio(torch.bfloat16)
    assert torch.equal(made(Formula("slerp", (0.3, 0.7)), [host, host]), host)


@pytest.mark.parametrize("method", ["ties", "dare-linear", "dare-ties", "slerp", "linear", "task-arithmetic"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_results_do_not_depend_on_the_pieces(method: str, rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = trio(torch.bfloat16, (61, 97))
    tensors = tensors if method not in ("linear", "slerp") else tensors[:2]
    formula = Formula(method, (0.7, 0.3), (0.4, 0.4), rounding=rounding)
    whole = made(formula, tensors, seed=5)
    for piece in (48, 1024, 3200):
        for module in (formulas, arithmetic):
            monkeypatch.setattr(module, "PIECE", piece)
        again = made(formula, tensors, seed=5)
        # Sums of slerp are taken piece by piece: its angle may differ in the last digit, no other method's numbers.
        assert torch.equal(whole, again) or (method == "slerp" and (whole - again).abs().max() < 1e-3)


def test_the_histogram_finds_what_sorting_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (torch.bfloat16, torch.float32):  # halves tie in the hundreds
        tensors = trio(kind, (200, 301))
        for density in (0.2, 0.001, 0.77):
            formula = Formula("ties", (1.0, 0.5), (density, density))
            want = made(formula, tensors)
            with monkeypatch.context() as patched:
                patched.setattr(formulas, "_WHOLE", 10)
                assert torch.equal(made(formula, tensors), want)


def test_dare_is_the_dense_merge_on_average() -> None:
    host, donor, base = trio(shape=(8, 16))
    dense = base + 0.7 * (host - base) + 0.3 * (donor - base)
    formula = Formula("dare-linear", (0.7, 0.3), (0.2, 0.2), normalize=False)
    runs = torch.stack([made(formula, [host, donor, base], seed=s).double() for s in range(200)])
    error = (runs.mean(0) - dense).abs() / (runs.std(0) / 200**0.5 + 1e-12)
    assert float((error < 3).double().mean()) > 0.98 and float(error.max()) < 5
    assert not torch.equal(runs[0], runs[1])
    # The reference forgets to divide by the density: a fifth of the change arrives.
    paper = Formula("dare-linear", (0.7, 0.3), (0.2, 0.2), normalize=False, compat="paper")
    unscaled = torch.stack([made(paper, [host, donor, base], seed=s).double() for s in range(100)]).mean(0)
    delta = (dense - base).double().flatten()
    slope = float(delta @ (unscaled - base).flatten() / (delta @ delta))
    assert slope == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_right_on_average(kind: torch.dtype) -> None:
    host, donor, _ = trio(kind, (8, 32), apart=0.05)
    exact = host.double() * 0.9 + donor.double() * 0.1
    formula = Formula("linear", (0.9, 0.1), rounding="stochastic")
    runs = torch.stack([made(formula, [host, donor], seed=s).double() for s in range(200)])
    spread = runs.std(0)
    moved = spread > 0
    error = (runs.mean(0) - exact).abs()[moved] / (spread[moved] / 200**0.5)
    assert float((error < 3).double().mean()) > 0.97 and bool(moved.double().mean() > 0.5)
    assert torch.equal(runs[7], made(formula, [host, donor], seed=7).double())
    # Every value is one of the two neighbours.
    step = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[kind]
    assert bool(((runs - exact).abs() <= exact.abs() * step + 1e-7).all())


def test_random_bits_depend_on_the_element_and_not_on_the_stretch() -> None:
    bits = Bits(7, 1)
    whole, half = bits.sixteen(0, 5000), bits.below(0.3, 0, 5000)
    for start, count in ((0, 1), (1, 7), (13, 100), (999, 1000), (16, 3000)):
        assert np.array_equal(bits.sixteen(start, count), whole[start : start + count])
        assert np.array_equal(bits.below(0.3, start, count), half[start : start + count])
    assert abs(float(half.mean()) - 0.3) < 0.02 and not np.array_equal(Bits(7, 2).sixteen(0, 5000), whole)


def test_values_that_are_not_finite_come_through_and_overflow_is_named() -> None:
    nan, inf = float("nan"), float("inf")
    odd = torch.tensor([nan, inf, -inf, 1.0, 0.0]).to(torch.bfloat16)
    got = made(Formula("linear", (0.5, 0.5)), [odd, odd])
    assert torch.equal(got.view(torch.int16)[1:], odd.view(torch.int16)[1:]) and bool(got[0].isnan())
    large = torch.full((4,), 6e4, dtype=torch.float16)
    with pytest.raises(CheckpointError, match="'w' gets values up to 1.2e"):
        made(Formula("linear", (1.0, 1.0), normalize=False), [large, large])
    most = torch.full((4,), 3.3e38, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="beyond bfloat16"):
        made(Formula("linear", (1.0, 0.031), normalize=False), [most, most])


def test_mixed_dtypes_and_doubles() -> None:
    host, donor, _ = trio()
    got = made(Formula("linear", (0.9, 0.1)), [host.to(torch.bfloat16), donor.half()], kind=torch.float32)
    want = host.to(torch.bfloat16).float() * torch.tensor(0.9) + donor.half().float() * torch.tensor(0.1)
    assert torch.equal(got, want)
    exact = made(Formula("linear", (0.9, 0.1)), [host.double(), donor.to(torch.bfloat16)])
    assert torch.allclose(exact, host.double() * 0.9 + donor.to(torch.bfloat16).double() * 0.1, atol=0, rtol=1e-15)


@pytest.mark.parametrize("density", [0.2, 0.7])
@pytest.mark.parametrize("compat", ["none", "paper"])
def test_dare_is_its_formula_on_the_same_masks(density: float, compat: str) -> None:
    host, donor, base = trio()
    weights, taus = (0.7, 0.3), []
    for index, tensor in enumerate((host, donor)):
        kept = torch.from_numpy(Bits(5, index).below(density, 0, base.numel()).copy()).reshape(base.shape)
        assert abs(float(kept.double().mean()) - density) < 0.05
        taus.append((tensor.double() - base.double()) * kept / (1.0 if compat == "paper" else density))
    summed = sum(w * t for w, t in zip(weights, taus, strict=True))
    linear = Formula("dare-linear", weights, (density,) * 2, normalize=False, compat=compat)
    assert (made(linear, [host, donor, base], seed=5).double() - (base.double() + summed)).abs().max() < 1e-6
    # The sign is elected by what counts: weighted vectors, in the paper's code unweighted ones.
    votes = sum(taus) if compat == "paper" else summed
    agree = [torch.sign(t) == torch.where(votes >= 0, 1.0, -1.0) for t in taus]
    over = sum(a * (1.0 if compat == "paper" else w) for a, w in zip(agree, weights, strict=True))
    mixed = sum(w * t * a for w, t, a in zip(weights, taus, agree, strict=True)) / torch.where(over == 0, 1.0, over)
    ties = Formula("dare-ties", weights, (density,) * 2, compat=compat)
    assert (made(ties, [host, donor, base], seed=5).double() - (base.double() + mixed)).abs().max() < 1e-6
