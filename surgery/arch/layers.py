"""Which blocks an edit touches: the `--layers` language.

Indices are 0-based and ranges include both ends. `50%` are the odd blocks and `75%` three of every four, the
interleavings of the grafting study (arXiv 2506.05340, section 4.1); `top-local` and `low-local` choose by the band-k
locality of a block's attention (Eq. 3 there). This module imports nothing of ours but the errors.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence

from surgery.errors import UsageError

# Every share keeps the smaller ones: 25 % is within 50 %, 50 % within 75 %. Block 0, which attends globally in the
# models studied, is touched by `all` only.
_SHARES: dict[int, Callable[[int], bool]] = {
    25: lambda block: block % 4 == 3,
    50: lambda block: block % 2 == 1,
    75: lambda block: block % 4 != 0,
    100: lambda block: True,
}
_FORMS = "all, 25%, 50%, 75%, 1,3,8-12, deep:n, top-local:n or low-local:n"


def parse_layers(spec: str, n_layers: int, *, scores: Sequence[float] | None = None) -> tuple[int, ...]:
    """The chosen block indices in ascending order.

    `spec` is `all`, a share (`25%`, `50%`, `75%`, `100%`), a list with inclusive ranges (`1,3,8-12`), `deep:n` (the
    last n), or `top-local:n` / `low-local:n` (the n blocks of highest / lowest score; among equals the earlier block).
    `scores` holds one locality score a block. Raises UsageError for anything else, for indices out of range, repeated
    ones, reversed ranges, and for an empty selection.
    """
    text = spec.strip()
    if text == "all":
        chosen: tuple[int, ...] = tuple(range(n_layers))
    elif match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text):
        chosen = _share(text, float(match[1]), n_layers)
    elif match := re.fullmatch(r"(deep|top-local|low-local):(.*)", text):
        chosen = _ranked(text, match[1], match[2], n_layers, scores)
    else:
        chosen = _listed(text, n_layers)
    if not chosen:
        raise UsageError(
            "bad-layers", f"layers {spec!r} select none of the model's {n_layers} blocks", hint=f"write {_FORMS}"
        )
    return chosen


def _share(text: str, percent: float, n_layers: int) -> tuple[int, ...]:
    """Blocks of one of the interleavings."""
    if percent not in _SHARES:
        raise UsageError(
            "bad-layers",
            f"layers {text!r}: only 25%, 50%, 75% and 100% name an interleaving",
            hint="list the blocks instead, e.g. 1,3,8-12",
        )
    return tuple(block for block in range(n_layers) if _SHARES[int(percent)](block))


def _ranked(text: str, kind: str, count: str, n_layers: int, scores: Sequence[float] | None) -> tuple[int, ...]:
    """Blocks of `deep:n`, `top-local:n`, `low-local:n`."""
    if not re.fullmatch(r"\d+", count.strip()) or not 1 <= int(count) <= n_layers:
        raise UsageError(
            "bad-layers",
            f"layers {text!r}: {kind} needs a number of blocks from 1 to {n_layers}",
            hint=f"for example {kind}:{max(1, n_layers // 2)}",
        )
    n = int(count)
    if kind == "deep":
        return tuple(range(n_layers - n, n_layers))
    if scores is None:
        raise UsageError(
            "bad-layers",
            f"layers {text!r}: choosing by locality needs the locality score of every block",
            hint="list the blocks, e.g. 1,3,8-12; their scores are known to callers from Python only",
        )
    if len(scores) != n_layers or not all(math.isfinite(score) for score in scores):
        raise UsageError(
            "bad-layers",
            f"layers {text!r}: {n_layers} finite locality scores are needed, one a block; {len(scores)} came",
            hint="measure the locality again on this model",
        )
    sign = -1.0 if kind == "top-local" else 1.0
    return tuple(sorted(sorted(range(n_layers), key=lambda block: (sign * scores[block], block))[:n]))


def parse_sequence(spec: str, n_layers: int) -> tuple[int, ...]:
    """The block indices of a list with inclusive ranges (`0-10,14-27`), in the order given; a block may stand twice.

    `all` is every block. Raises UsageError for anything else, indices out of range, reversed ranges, an empty list.
    """
    text = spec.strip()
    if text == "all":
        return tuple(range(n_layers))
    chosen = tuple(
        block
        for first, last in _items(text, n_layers, forms="for example 0-10,14-27")
        for block in range(first, last + 1)
    )
    if not chosen:
        raise UsageError("bad-layers", f"layers {spec!r} keep no block", hint="write for example 0-10,14-27")
    return chosen


def _listed(text: str, n_layers: int) -> tuple[int, ...]:
    """Blocks of an explicit list."""
    chosen: list[int] = []
    for first, last in _items(text, n_layers, forms=_FORMS):
        repeated = set(chosen) & set(range(first, last + 1))
        if repeated:
            raise UsageError(
                "bad-layers", f"layers {text!r}: block {min(repeated)} is named twice", hint="name every block once"
            )
        chosen.extend(range(first, last + 1))
    return tuple(sorted(chosen))


def _items(text: str, n_layers: int, *, forms: str) -> Iterator[tuple[int, int]]:
    """(first, last) of every item of a list."""
    for item in text.split(",") if text else []:
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", item)
        if match is None:
            raise UsageError(
                "bad-layers", f"layers {text!r}: {item.strip()!r} is not a block or a range", hint=f"write {forms}"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UsageError(
                "bad-layers", f"layers {text!r}: the range {item.strip()} runs backwards", hint=f"write {last}-{first}"
            )
        if last >= n_layers:
            raise UsageError(
                "bad-layers",
                f"layers {text!r}: block {first if first >= n_layers else last} does not exist",
                hint=f"the model has blocks 0-{n_layers - 1}",
            )
        yield first, last
