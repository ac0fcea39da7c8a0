"""Measures of routing against their definitions, and what is recorded of a model against what its routers say."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_moe import SPLIT, blocks, chained, moe_model

from surgery.errors import UsageError
from surgery.evals.routing.metrics import balance, co_activation, load, norm_ratio, reselection
from surgery.evals.routing.record import record_routing
from surgery.evals.routing.report import table, write_report
from surgery.graph.run import silent

N = 6
FIRST = torch.tensor([[0, 1], [0, 2], [3, 1], [0, 5]])
SECOND = torch.tensor([[1, 2], [4, 3], [3, 1], [2, 4]])


def test_load_and_its_measures() -> None:
    f = load(FIRST, N)
    assert f.tolist() == [3 / 8, 2 / 8, 1 / 8, 1 / 8, 0, 1 / 8]
    found = balance(f)
    mean = 1 / N
    spread = math.sqrt(sum((x - mean) ** 2 for x in f.tolist()) / N)
    assert found["cv"] == pytest.approx(spread / mean)
    assert found["max_vio"] == pytest.approx(N * 3 / 8 - 1)
    assert found["entropy"] == pytest.approx(-sum(x * math.log(x) for x in f.tolist() if x) / math.log(N))
    even = balance(torch.full((N,), 1 / N, dtype=torch.float64))
    assert (
        even["cv"] == pytest.approx(0) and even["max_vio"] == pytest.approx(0) and even["entropy"] == pytest.approx(1)
    )


def test_co_activation_counts_tokens_and_reselection_shares_sets() -> None:
    found = co_activation(FIRST, SECOND, N)
    for i in range(N):
        for j in range(N):
            both = sum(i in a and j in b for a, b in zip(FIRST.tolist(), SECOND.tolist(), strict=True))
            assert found[i, j] == both
    shares = [len(set(a) & set(b)) / 2 for a, b in zip(FIRST.tolist(), SECOND.tolist(), strict=True)]
    assert reselection(FIRST, SECOND, N) == pytest.approx(sum(shares) / 4)
    assert norm_ratio(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])) == pytest.approx(2.5)


@pytest.fixture(scope="module")
def native() -> Any:
    return moe_model("qwen3_moe", vocab_size=256)


IDS = torch.randint(0, 256, (70,), generator=torch.Generator().manual_seed(0))


def test_a_split_shares_out_the_list_of_the_plain_model(native: Any) -> None:
    plain = record_routing(native, IDS, length=32, report=silent)
    chain = chained(native, iterations=2, topk=[2, 2], **SPLIT)
    rows = record_routing(chain, IDS, length=32, report=silent)
    assert [(r.layer, r.iteration) for r in plain] == [(0, 0), (1, 0)]
    assert [(r.layer, r.iteration) for r in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for layer in (0, 1):
        mine = [r for r in rows if r.layer == layer]
        assert torch.allclose((mine[0].load + mine[1].load) / 2, plain[layer].load, atol=0.02)
        assert mine[1].numbers["reselection"] == 0 and mine[0].numbers["k"] == 2 and plain[layer].numbers["k"] == 4
        assert mine[1].co_activation is not None and float(mine[1].co_activation.sum()) == 64 * 2 * 2
        assert mine[0].numbers["beta_norm"] == pytest.approx(32**0.5) and mine[0].numbers["alpha_norm"] == 0
        assert "alpha_norm" not in mine[1].numbers
    assert not any(router._forward_hooks for b in blocks(chain) for router in b.routers())
    assert all("choose" not in vars(b) and "mix" not in vars(b) for b in blocks(chain))


def test_appended_passes_take_the_same_experts_again(native: Any) -> None:
    rows = record_routing(chained(native, iterations=2), IDS, length=32, report=silent)
    assert all(0 < r.numbers["reselection"] <= 1 for r in rows if r.iteration)
    assert all(r.numbers["beta_norm"] == 0 for r in rows if r.iteration)


@pytest.mark.parametrize("kind", ["gpt_oss", "granitemoe", "deepseek_v2"])
def test_other_families_are_recorded_too(kind: str) -> None:
    model = moe_model(kind, vocab_size=256)
    rows = record_routing(model, IDS, length=32, report=silent)
    assert len(rows) == 2 and all(float(r.load.sum()) == pytest.approx(1) for r in rows)


def test_a_model_without_experts_is_refused(native: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(UsageError, match="no layer has experts"):
        record_routing(dense, IDS, length=32, report=silent)
    with pytest.raises(UsageError, match="less than one sequence"):
        record_routing(native, IDS, length=128, report=silent)


def test_the_report_holds_every_number_and_picture(native: Any, tmp_path: Path) -> None:
    rows = record_routing(chained(native, iterations=3), IDS, length=32, report=silent)
    files = write_report(rows, tmp_path / "out")
    names = {f.name for f in files}
    assert names >= {"routing.csv", "load.csv", "load.png", "coactivation.png"}
    assert {f"coactivation-layer-{x}-passes-{a}-{a + 1}.csv" for x in (0, 1) for a in (0, 1)} <= names
    with open(tmp_path / "out" / "routing.csv") as handle:
        read = list(csv.DictReader(handle))
    assert len(read) == 6
    for row, shown in zip(read, table(rows), strict=True):
        assert float(row["cv"]) == pytest.approx(shown["cv"], rel=1e-4)
        assert row["reselection"] == "" if shown["reselection"] is None else True
    for file in files:
        if file.suffix == ".png":
            assert file.read_bytes()[:4] == b"\x89PNG"
