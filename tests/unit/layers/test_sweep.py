"""Merges in memory: the arithmetic, what a selection covers, choosing on one part and reporting on another."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import surgery
from surgery.arch.language.load import Loaded, load
from surgery.errors import CheckpointError, UsageError
from surgery.evals.layers.measures import measure
from surgery.evals.layers.selections import selections
from surgery.evals.layers.sweep import Sweep, blend, pick, rows, split_items, sweep_merge
from surgery.evals.vqa.rows import Item


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_blend_is_the_definition_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    h, d = (torch.randn(4000).to(dtype) for _ in "hd")
    for alpha in (0.9, 0.5, 0.123):
        # Three float32 operations, each rounded, then one rounding to the stored type.
        one, two = h.float().numpy() * np.float32(alpha), d.float().numpy() * np.float32(1 - alpha)
        assert torch.equal(blend(h, d, alpha), torch.from_numpy(one + two).to(dtype))
        exact = h.double() * alpha + d.double() * (1 - alpha)
        assert torch.allclose(blend(h, d, alpha).double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert blend(h, d, 1.0) is h and torch.equal(blend(h, d, 0.0), d)
    assert torch.equal(blend(h, h, 0.7).to(torch.bfloat16), h.to(torch.bfloat16))


class Recorder:
    """A measure that keeps what the weights were."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.seen, self.starts = model, [], []

    def start(self, layer: int) -> None:
        self.starts.append(layer)

    def values(self) -> list[float]:
        self.seen.append({n: p.clone() for n, p in self.model.named_parameters()})
        return [float(len(self.seen))] * 4


def test_weights_at_each_point_are_those_of_the_definition(vlm: Loaded, tiny_llava: Path, tiny_llama: Path) -> None:
    donor = surgery.open(tiny_llama)
    recorder = Recorder(vlm.model)
    chosen, _ = selections(surgery.open(tiny_llava), donor, ["all", "2-3"], force=True)
    found = sweep_merge(vlm, recorder, "acc", donor, [1.0, 0.75, 0.0], chosen)
    host, *states, after = [*recorder.seen, dict(vlm.model.named_parameters())]
    assert list(found.points) == [(s, a) for s in ("all", "2-3") for a in (1.0, 0.75, 0.0)]
    assert recorder.starts == [0, 2] and len(states) == 4  # at share 1 nothing is measured again
    assert all(torch.equal(after[n], host[n]) for n in host)
    for state, alpha, layers, norm in zip(
        states, (0.75, 0.0) * 2, ((0, 1, 2, 3),) * 2 + ((2, 3),) * 2, (1, 1, 0, 0), strict=True
    ):
        for name, value in state.items():
            inside = any(name.startswith(f"model.language_model.layers.{n}.") for n in layers)
            if inside or (norm and name == "model.language_model.norm.weight"):
                wanted = blend(host[name], donor.read(name.replace("model.language_model", "model")), alpha)
                assert torch.equal(value, wanted), name
            else:
                assert torch.equal(value, host[name]), name


@pytest.mark.parametrize("metric", ["nll", "acc"])
def test_a_sweep_measures_what_the_written_merge_measures(
    vlm: Loaded, tiny_llava: Path, related: Path, questions: list[Item], tmp_path: Path, metric: str
) -> None:
    host, donor = surgery.open(tiny_llava), surgery.open(related)
    how: dict[str, Any] = {"prompt": "bare", "max_new_tokens": 3}
    chosen, _ = selections(host, donor, ["all", "1-2"])
    found = sweep_merge(vlm, measure(vlm, questions, metric, **how), metric, donor, [0.6], chosen)
    for label in ("all", "1-2"):
        fields = {} if label == "all" else {"layers": label}
        made = surgery.apply("merge", host, donor, out=tmp_path / label, alpha="0.6", **fields)
        values = measure(load(surgery.open(made.path)), questions, metric, **how).values()
        # The same bytes in the same batches; likelihoods go on from cached states, in other sums at most.
        assert found.points[label, 0.6] == pytest.approx(values, rel=1e-6)


def test_weights_of_a_sweep_are_the_bytes_of_the_merge(
    vlm: Loaded, tiny_llava: Path, related: Path, tmp_path: Path
) -> None:
    host, donor = surgery.open(tiny_llava), surgery.open(related)
    recorder = Recorder(vlm.model)
    sweep_merge(vlm, recorder, "acc", donor, [0.9, 0.37], selections(host, donor)[0])
    for state, alpha in zip(recorder.seen[1:], ("0.9", "0.37"), strict=True):
        written = load(surgery.open(surgery.apply("merge", host, donor, out=tmp_path / alpha, alpha=alpha).path)).model
        assert all(torch.equal(p, state[n]) for n, p in written.named_parameters())


def test_selections_are_those_of_the_merge_command(tiny_llava: Path, related: Path) -> None:
    host, donor = surgery.open(tiny_llava), surgery.open(related)

    def shown(*args: Any) -> list[tuple[str, int, int]]:
        return [(s.label, s.first, len(s.tensors)) for s in selections(host, donor, *args)[0]]

    assert shown() == [("all", 0, 4 * 9 + 1)]  # with the final norm
    assert shown(["0,2"]) == [("0,2", 0, 18)]
    assert shown([], 2) == [("0-1", 0, 18), ("1-2", 1, 18), ("2-3", 2, 18)]
    assert shown(["all", "2:4"], 1, 2) == [("all", 0, 37), ("2:4", 2, 18), ("0", 0, 9), ("2", 2, 9)]
    for wrong in ((["9"],), ([], 5)):
        with pytest.raises(UsageError):
            selections(host, donor, *wrong)


def test_unrelated_donors_are_refused_as_merge_refuses_them(tiny_llava: Path, tiny_llama: Path) -> None:
    host, donor = surgery.open(tiny_llava), surgery.open(tiny_llama)
    with pytest.raises(CheckpointError, match="do not look related"):
        selections(host, donor)
    assert "do not look related" in " ".join(selections(host, donor, force=True)[1])


def items_of(count: int) -> list[Item]:
    return [Item(str(i), "q", "a", groups={"kind": "x" if i < count // 4 else "y"}) for i in range(count)]


def test_choosing_and_reporting_are_apart() -> None:
    items = items_of(80)
    dev, test = split_items(items, 0.5, 0, "kind")
    assert not set(dev) & set(test) and len(dev) + len(test) == 80
    assert sum(i < 20 for i in dev) == 10  # each group is split alike
    assert (dev, test) == split_items(items, 0.5, 0, "kind") != split_items(items, 0.5, 1, "kind")
    with pytest.raises(UsageError, match="0 items"):
        split_items(items[:1], 0.5, 0)
    good_on_dev = [1.0 if i in set(dev) else 0.0 for i in range(80)]
    sweep = Sweep("acc", [0.5] * 80, {("all", 0.9): [0.9] * 80, ("all", 0.5): good_on_dev, ("all", 0.7): [0.9] * 80})
    assert pick(sweep, dev) == ("all", 0.5) and pick(sweep, test) == ("all", 0.9)  # of equals the nearest to the host
    reported = rows(sweep, items, test, "kind")
    assert {r["n"] for r in reported if r["group"] == "all"} == {len(test)}
    assert next(r["value"] for r in reported if r["alpha"] == 0.5) == 0
    nll = Sweep("nll", [1.0] * 80, {("all", 0.9): [0.9] * 80, ("all", 0.5): [0.4] * 80})
    assert pick(nll, dev) == ("all", 0.5)


def test_shares_outside_the_line_are_refused(vlm: Loaded, tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match="host share"):
        sweep_merge(vlm, Recorder(vlm.model), "acc", surgery.open(tiny_llama), [1.2], [])
