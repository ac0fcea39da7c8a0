"""Which heads matter: steer one head, or one layer, at a time and see how the right answer's probability moves.

The profiling step of PASTA (arXiv 2311.02262) on the hook of AdaptVis: a batch of prompts is run once, and every head
costs one decoding step. Rules given as data (spans of text, knock-out, fixed alphas) are measured on the same items.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from surgery.arch.language.load import Loaded
from surgery.data.spatial.items import Item
from surgery.evals.intervals import paired_bootstrap, wilson
from surgery.evals.spatial.evaluate import Asking, encode_items, read_answer, spellings, stop_tokens
from surgery.evals.spatial.metrics import Answered
from surgery.evals.spatial.report import gain
from surgery.steering.patch import PAPER, Patch
from surgery.steering.prefill import Prefill

Report = Callable[[str, Mapping[str, float]], None]


def profile(
    loaded: Loaded,
    items: Sequence[Item],
    asking: Asking,
    *,
    alpha: float = 2.0,
    patch: Patch = PAPER,
    by: str = "head",
    report: Report = lambda event, numbers: None,
) -> dict[str, Any]:
    """For every layer and head (`by` "layer": every layer as a whole) the mean change of the right answer's probability
    and of its absolute value when that alone is steered by `alpha` (or knocked out, by the patch's mode).

    `change`, `moved` and `error` (the standard error of `change`) are [layers][heads]; `ranked` lists (layer, head)
    from the largest `moved` on. The patch's own layers and heads are set aside.
    """
    text = loaded.model.config.get_text_config(decoder=True)
    layers, heads = text.num_hidden_layers, text.num_attention_heads if by == "head" else 1
    places = [(layer, head) for layer in range(layers) for head in range(heads)]
    found = np.zeros((len(items), layers, heads))
    before = np.zeros(len(items))
    for start in range(0, len(items), asking.batch):
        batch = items[start : start + asking.batch]
        inputs = encode_items(loaded, batch, template=asking.template)
        gold = [[spellings(loaded.tokenizer, item.answer)[0]] for item in batch]
        stop = start + len(batch)
        with Prefill(loaded.model, inputs, replace(patch, layers=None, heads=None), tokenizer=loaded.tokenizer) as run:
            before[start:stop] = _p(run.option_scores(run.logits, gold))
            for layer, head in places:
                chosen = replace(patch, layers=str(layer), heads=f"{layer}:{head}" if by == "head" else None)
                found[start:stop, layer, head] = _p(run.option_scores(run.steered(alpha, chosen), gold))
        report("heads", {"done": stop, "n": len(items)})
    delta = found - before[:, None, None]
    moved = np.abs(delta).mean(0)
    error = delta.std(0, ddof=1) / math.sqrt(len(items)) if len(items) > 1 else np.full_like(moved, math.nan)
    ranked = sorted(places, key=lambda p: (-moved[p], p))
    return {
        "n": len(items),
        "by": by,
        "alpha": alpha,
        "mode": patch.mode,
        "before": float(before.mean()),
        "change": delta.mean(0).tolist(),
        "moved": moved.tolist(),
        "error": np.where(np.isnan(error), 0.0, error).tolist(),
        "ranked": [list(place) for place in ranked],
    }


def best_heads(result: Mapping[str, Any], count: int) -> str:
    """The `count` heads that move most, as patches write them: "0:1,3 2:0"."""
    chosen: dict[int, list[int]] = {}
    for layer, head in result["ranked"][:count]:
        chosen.setdefault(layer, []).append(head)
    return " ".join(f"{layer}:{','.join(map(str, sorted(row)))}" for layer, row in sorted(chosen.items()))


def measure_rules(
    loaded: Loaded,
    items: Sequence[Item],
    asking: Asking,
    rules: Sequence[Patch],
    *,
    seed: int = 0,
    report: Report = lambda event, numbers: None,
) -> dict[str, Any]:
    """What rules that act together do: accuracy before and after with the paired gain, and the change of the right
    answer's probability with its bootstrapped interval. Phrases of text must stand in every prompt."""
    before: list[Answered] = []
    after: list[Answered] = []
    moved: list[float] = []
    p: list[float] = []
    for start in range(0, len(items), asking.batch):
        batch = items[start : start + asking.batch]
        inputs = encode_items(loaded, batch, template=asking.template)
        gold = [[spellings(loaded.tokenizer, item.answer)[0]] for item in batch]
        plain = _answers(loaded, batch, inputs, asking, gold, ())
        steered = _answers(loaded, batch, inputs, asking, gold, rules)
        for old, new in zip(plain, steered, strict=True):
            before.append(old[0])
            after.append(new[0])
            p.append(old[1])
            moved.append(new[1] - old[1])
        report("rules", {"done": len(p), "n": len(items)})
    right = [sum(a.right for a in side) for side in (before, after)]
    return {
        "n": len(items),
        "rules": [rule.as_json() for rule in rules],
        "before": _side(right[0], len(items), float(np.mean(p))),
        "after": _side(right[1], len(items), float(np.mean(p) + np.mean(moved))),
        "gain": gain(before, after),
        "change": float(np.mean(moved)),
        "change_interval": list(paired_bootstrap(moved, samples=2000, seed=seed)),
    }


def _side(right: int, n: int, p: float) -> dict[str, Any]:
    return {"accuracy": right / n, "interval": list(wilson(right, n)), "p": p}


def _answers(
    loaded: Loaded,
    items: Sequence[Item],
    inputs: Mapping[str, Any],
    asking: Asking,
    gold: Sequence[Any],
    rules: Sequence[Patch],
) -> list[tuple[Answered, float]]:
    """Answer and probability of the right one of each sample, by rules at their own alphas (1 where they name none)."""
    with Prefill(loaded.model, inputs, rules or PAPER, tokenizer=loaded.tokenizer) as run:
        logits = run.steered(None) if rules else run.logits
        p = _p(run.option_scores(logits, gold))
        said = run.answer(logits, tokens=asking.max_new_tokens, stop=stop_tokens(loaded))
    found = []
    for item, ids, value in zip(items, said, p, strict=True):
        row = read_answer(loaded, item, ids)
        found.append((Answered(item.id, item.answer, row["said"], bool(row["right"])), value))
    return found


def _p(scores: Sequence[Sequence[float]]) -> list[float]:
    return [math.exp(row[0]) for row in scores]
