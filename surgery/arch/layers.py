"""Which blocks an edit touches: the `--layers` language.

Indices are 0-based and ranges include both ends. `50%` are the odd blocks and `75%` three of every four, the
interleavings of the grafting study (arXiv 2506.05340, section 4.1); `top-local` and `low-local` choose by the band-k
locality of a block's attention (Eq. 3 there). This module imports nothing of ours but the errors.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence

from surgery.errors import UsageError, printable

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


def parse_spans(spec: str, n_layers: int, *, option: str = "--layers", what: str = "tower") -> tuple[int, ...]:
    """The layers of a comma list of spans, in ascending order; what is named twice counts once.

    `a-b`, `a-` and `-b` include both ends; `a:b[:s]` is half-open as in Python and mergekit's layer_range, and there
    alone numbers may be negative; `a` is one layer; `all` is every one. Nothing is clipped: UsageError names the layer
    that is out of range and both readings that may have been meant, an empty span, a reversed one, a malformed one.
    """
    chosen: set[int] = set()
    text = spec.strip()
    if text == "all":
        return tuple(range(n_layers))
    for raw in text.split(","):
        item = raw.strip()
        if not item:
            shown = f"{option} '{printable(spec)}'"
            raise UsageError(
                "layers", f"{shown}: an empty item is not a layer or a span", hint="write 12-28, 12:28, 5 or all"
            )
        chosen |= set(_span(item, n_layers, f"{option} {item}", what))
    return tuple(sorted(chosen))


def _span(item: str, n_layers: int, shown: str, what: str) -> range:
    number = r"[0-9]{1,9}"
    if match := re.fullmatch(rf"(-?{number})?:(-?{number})?(?::({number}))?", item):
        first, last, step = (int(g) if g is not None else None for g in match.groups())
        for value, most in ((first, n_layers - 1), (last, n_layers)):
            if value is not None and not -n_layers <= value <= most:
                raise _out_of_range(shown, value, n_layers, what, "")
        if step == 0:
            raise UsageError("layers", f"{shown}: a step of 0", hint="write for example 0:28:2")
        found = range(n_layers)[slice(first, last, step)]
        if not found:
            raise UsageError("layers", f"{shown}: no layer between them", hint="a:b holds a and stops before b")
        return found
    match = re.fullmatch(rf"({number})?(-)?({number})?", item)
    if match is None or not any(match.groups()[::2]) or (match[2] is None and match[1] is None):
        raise UsageError("layers", f"{shown}: not a layer or a span", hint="write 12-28, 12:28, 12-, -11, 5 or all")
    first = int(match[1]) if match[1] is not None else 0
    last = first if match[2] is None else int(match[3]) if match[3] is not None else n_layers - 1
    if first >= n_layers:
        raise _out_of_range(shown, first, n_layers, what, "")
    if last >= n_layers:
        meant = f"; did you mean {first}-{n_layers - 1} or {first}:{n_layers}?" if match[2] else ""
        raise _out_of_range(shown, last, n_layers, what, meant)
    if last < first:
        raise UsageError("layers", f"{shown}: the span runs backwards", hint=f"write {last}-{first}")
    return range(first, last + 1)


def _out_of_range(shown: str, layer: int, n_layers: int, what: str, meant: str) -> UsageError:
    message = f"{shown}: layer {layer} is out of range, the {what} has {n_layers} layers (0-{n_layers - 1}){meant}"
    return UsageError("layers", message, hint=f"layers are counted from 0 to {n_layers - 1}")
