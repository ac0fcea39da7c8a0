"""Which heads or layers matter to an answer: what steering one of them alone does to the answer's probability.

After PASTA's profiling (arXiv 2311.02262, section 3.2), with the probability of the first answer token in place of a
task's accuracy: one run of each prompt, then one decoding step a head. What comes out is a patch, again as data.

Axes: L layers, H heads.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from surgery.errors import UsageError
from surgery.steering.generate import text_config
from surgery.steering.patch import PAPER, Patch
from surgery.steering.prefill import Prefill
from surgery.steering.session import refusals


@dataclass(frozen=True)
class Profile:
    """`size` [L][H] (or [L][1] by layer): mean |change of the answer's probability|; `change` the same with its sign;
    `n` prompts. `patch` and `alpha` are what was applied to one head or layer at a time."""

    by: str
    size: list[list[float]]
    change: list[list[float]]
    n: int
    patch: Patch
    alpha: float

    def ranked(self) -> list[tuple[int, int | None, float, float]]:
        """(layer, head or None, size, change), the largest first."""
        rows = [
            (layer, head if self.by == "head" else None, size, self.change[layer][head])
            for layer, row in enumerate(self.size)
            for head, size in enumerate(row)
        ]
        return sorted(rows, key=lambda r: -r[2])

    def best(self, count: int, *, sign: int = 0) -> Patch:
        """The patch on the `count` heads (or layers) that matter most: a rule that can be stored and applied elsewhere.
        With `sign` 1 or -1 only those that raise or lower the answer's probability. Raises UsageError for none."""
        rows = [r for r in self.ranked() if sign == 0 or r[3] * sign > 0][:count]
        if not rows:
            raise UsageError("profile", "no head changes the answer in that direction", hint="profile more prompts")
        if self.by == "layer":
            return replace(self.patch, layers=",".join(str(r[0]) for r in sorted(rows)), alpha=self.alpha)
        chosen: dict[int, list[int]] = {}
        for layer, head, _, _ in rows:
            chosen.setdefault(layer, []).append(int(head or 0))
        heads = " ".join(f"{layer}:{','.join(map(str, sorted(chosen[layer])))}" for layer in sorted(chosen))
        return replace(self.patch, heads=heads, alpha=self.alpha)


def profile(
    model: Any,
    prompts: Iterable[Mapping[str, Any]],
    *,
    alpha: float = 0.0,
    patch: Patch = PAPER,
    by: str = "head",
    targets: Iterable[Sequence[int]] | None = None,
    tokenizer: Any = None,
) -> Profile:
    """Apply `patch` under `alpha` to one head ("head") or layer ("layer") at a time, on batches of inputs.

    `targets` holds for every batch each sample's first answer token; without it that is the model's own likeliest one.
    Raises as `steer`, and UsageError without prompts or when `patch` chooses layers or heads itself.
    """
    if by not in ("head", "layer"):
        raise UsageError("profile", f"by '{by}': unknown", hint="head or layer")
    if patch.layers is not None or patch.heads is not None or patch.table is not None:
        raise UsageError("profile", "a profile goes through layers and heads by itself", hint="leave them out")
    with refusals():
        config = text_config(model)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    units = [(n, h) for n in range(layers) for h in range(heads if by == "head" else 1)]
    sums = torch.zeros(2, layers, heads if by == "head" else 1, dtype=torch.float64)
    count = 0
    given = iter(targets) if targets is not None else None
    for inputs in prompts:
        with Prefill(model, inputs, patch, tokenizer=tokenizer) as run:
            plain = torch.softmax(run.logits, -1)
            wanted = plain.argmax(-1) if given is None else torch.tensor(list(next(given)), device=plain.device)
            before = plain.gather(1, wanted[:, None])[:, 0]
            for layer, head in units:
                where = {"heads": f"{layer}:{head}"} if by == "head" else {"layers": str(layer)}
                after = torch.softmax(run.steered(alpha, replace(patch, **where)), -1).gather(1, wanted[:, None])[:, 0]
                change = (after - before).double().cpu()
                sums[0, layer, head] += change.abs().sum()
                sums[1, layer, head] += change.sum()
            count += run.batch
    if not count:
        raise UsageError("profile", "there are no prompts to profile on", hint="give at least one batch of inputs")
    size, signed = (sums / count).tolist()
    return Profile(by, size, signed, count, patch, alpha)
