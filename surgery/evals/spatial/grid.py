"""Answers under every alpha of a grid, from one run of each batch of prompts: what tuning needs.

A sample costs its prompt once, one decoding step an alpha, and the tokens of its answers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from surgery.arch.language.load import Loaded
from surgery.data.spatial.items import Item
from surgery.evals.spatial.evaluate import (
    Asking,
    Row,
    choose,
    encode_items,
    flat,
    grouped,
    over_options,
    read_answer,
    spellings,
    stop_tokens,
)
from surgery.evals.spatial.tuning import Trial
from surgery.steering.generate import Policy
from surgery.steering.prefill import Prefill

PLAIN = "base"


def grid(
    loaded: Loaded, asking: Asking, alphas: Sequence[float], policy: Policy
) -> Callable[[Sequence[Item]], Iterator[Row]]:
    """Asks a loaded model under each of `alphas`: the records of `evaluate`, with an answer an alpha (`name_of`).

    `policy` says how confidence is measured; `asking` how to ask, its methods being left aside.
    """

    def answer(items: Sequence[Item]) -> Iterator[Row]:
        for start in range(0, len(items), asking.batch):
            yield from _ask(loaded, items[start : start + asking.batch], asking, alphas, policy)

    return answer


def name_of(alpha: float) -> str:
    """What the answer under `alpha` is called in a record."""
    return PLAIN if alpha == 1.0 else f"alpha {alpha:g}"


def trials(records: Sequence[Mapping[str, Any]], alphas: Sequence[float], rule: str = "right") -> list[Trial]:
    """Records as the tuner takes them; `rule` is "right" (strict) or "reference"."""
    return [
        Trial(
            r["id"],
            float(r["confidence"]),
            tuple(bool(r["answers"][name_of(a)][rule]) for a in alphas),
            r["gold"],
            r.get("group", ""),
        )
        for r in records
    ]


def _ask(
    loaded: Loaded, items: Sequence[Item], asking: Asking, alphas: Sequence[float], policy: Policy
) -> Iterator[Row]:
    inputs = encode_items(loaded, items, template=asking.template)
    options = [[spellings(loaded.tokenizer, o) for o in item.options] for item in items]
    answers: list[dict[str, Row]] = [{} for _ in items]
    with Prefill(loaded.model, inputs, asking.patch, tokenizer=loaded.tokenizer) as run:
        sure = run.confidence(over_options(policy, options))
        for alpha in alphas:
            logits = run.steered(alpha)
            if asking.answer == "generate":
                said = run.answer(logits, tokens=asking.max_new_tokens, stop=stop_tokens(loaded))
                rows = [read_answer(loaded, item, ids) for item, ids in zip(items, said, strict=True)]
            else:
                rows = choose(run.option_scores(logits, [flat(o) for o in options]), options, items)
            for into, row in zip(answers, rows, strict=True):
                into[name_of(alpha)] = row
    for item, c, row in zip(items, sure, answers, strict=True):
        yield {"id": item.id, "gold": item.answer, "group": grouped(item), "confidence": c, "answers": row}
