"""Profiles of heads and rules as data, against steering each on its own."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from surgery.arch.language.load import Loaded, load
from surgery.data.spatial.items import Item, read_items
from surgery.data.spatial.make import make_scenes
from surgery.evals.attention.profile import best_heads, measure_rules, profile
from surgery.evals.spatial.evaluate import Asking, encode_items
from surgery.steering.patch import Patch
from surgery.steering.session import steer
from surgery.store.names import open_named


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    make_scenes(tmp_path_factory.mktemp("profile") / "s", groups=3, val=0.34, seed=5)
    return next(tmp_path_factory.getbasetemp().glob("profile*/s/test.jsonl"))


@pytest.fixture(scope="module")
def items(data: Path) -> list[Item]:
    return read_items(data)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(open_named("llava-scenes"))


def probabilities(loaded: Loaded, items: list[Item], patch: Patch | None, alpha: float) -> np.ndarray:
    """p of the right answer of each item, steered in a forward of its own."""
    inputs = encode_items(loaded, items)
    with torch.no_grad():
        if patch is None:
            logits = loaded.model(**inputs).logits
        else:
            with steer(loaded.model, patch, alpha=alpha, inputs=inputs):
                logits = loaded.model(**inputs).logits
    ids = [loaded.tokenizer(item.answer)["input_ids"][0] for item in items]
    return torch.softmax(logits[:, -1], -1)[range(len(items)), ids].numpy()


def test_each_head_moves_what_it_moves_alone(loaded: Loaded, items: list[Item]) -> None:
    out = profile(loaded, items, Asking(batch=3), alpha=3.0)
    plain = probabilities(loaded, items, None, 1.0)
    for layer, head in ((0, 0), (1, 3), (2, 2)):
        delta = probabilities(loaded, items, Patch(heads=f"{layer}:{head}"), 3.0) - plain
        assert out["change"][layer][head] == pytest.approx(delta.mean(), abs=1e-5)
        assert out["moved"][layer][head] == pytest.approx(np.abs(delta).mean(), abs=1e-5)
        assert out["error"][layer][head] == pytest.approx(delta.std(ddof=1) / np.sqrt(len(items)), abs=1e-5)
    moved = [out["moved"][layer][head] for layer, head in out["ranked"]]
    assert moved == sorted(moved, reverse=True) and len(moved) == 12
    assert json.loads(json.dumps(out)) == out


def test_layers_are_profiled_as_a_whole(loaded: Loaded, items: list[Item]) -> None:
    out = profile(loaded, items, Asking(batch=8), by="layer", patch=Patch(mode="knock-out"))
    delta = probabilities(loaded, items, Patch(mode="knock-out", layers="1"), 1.0) - probabilities(
        loaded, items, None, 1.0
    )
    assert out["change"][1] == [pytest.approx(delta.mean(), abs=1e-5)] and len(out["ranked"]) == 3


def test_the_best_heads_are_written_as_patches_take_them() -> None:
    ranked = {"ranked": [[2, 0], [0, 3], [0, 1], [1, 1]]}
    assert best_heads(ranked, 3) == "0:1,3 2:0"
    assert Patch(heads=best_heads(ranked, 3)).chosen_heads(3, 4) == {0: (1, 3), 2: (0,)}


def test_a_rule_that_changes_nothing_gains_nothing(loaded: Loaded, items: list[Item]) -> None:
    out = measure_rules(loaded, items, Asking(batch=8), [Patch(alpha=1.0)])
    assert out["gain"]["difference"] == out["change"] == 0 and out["before"] == out["after"]


def test_rules_act_by_their_own_alphas(loaded: Loaded, items: list[Item]) -> None:
    rules = [Patch(alpha=0.3, layers="0"), Patch(mode="bias", keys="text", text=("relation",), alpha=0.1)]
    out = measure_rules(loaded, items, Asking(batch=1), rules)
    found = []
    for item in items:
        inputs = encode_items(loaded, [item])
        with torch.no_grad(), steer(loaded.model, rules, inputs=inputs, tokenizer=loaded.tokenizer):
            p = torch.softmax(loaded.model(**inputs).logits[0, -1], -1)
        found.append(float(p[loaded.tokenizer(item.answer)["input_ids"][0]]))
    assert out["after"]["p"] == pytest.approx(np.mean(found), abs=1e-5)


def test_the_command_profiles_and_measures_its_own_rule(command: Callable, data: Path, tmp_path: Path) -> None:
    line = ("probe", "attention", "llava-scenes", data)
    done = command(*line, "--limit", "4", "--top", "2", "--plot", "h.png", "--best", "rule.json", "-o", "p.json")
    assert done.code == 0 and "moves it by" in done.stdout, done.stderr
    assert json.loads((tmp_path / "rule.json").read_text())["alpha"] == 2.0 and (tmp_path / "h.png").is_file()
    measured = command(*line, "--rules", "rule.json", "--json")
    assert json.loads(measured.stdout)["rules"][0]["alpha"] == 2.0
    wrong_lines = {
        "head or layer": ("--by", "neuron"),
        "none.json": ("--rules", "none.json"),
        "--alpha": ("--alpha", "-1"),
        "leave one out": ("--rules", "rule.json", "--plot", "x.png"),
    }
    for said, words in wrong_lines.items():
        wrong = command(*line, *words)
        assert wrong.code == 2 and said in wrong.stderr
