"""Which tensors of a tower are merged, and with which share of the host: layers, groups, patterns, gradients.

Names are canonical (`layers.12.mlp.up_proj.weight`, `norm.weight`). The order is layers, then --exclude, then
--include; without --layers the final norm is chosen too, embeddings and head only when they are included.
Standard library only.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.arch.language.towers import EMBED, HEAD, NORM, NORM_BIAS
from surgery.arch.patterns import matcher, nearest
from surgery.errors import UsageError, printable

NORMS = (NORM, NORM_BIAS)  # the final norm
GROUPS = ("attn", "mlp", "norms", "final-norm", "embed", "head")
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_ATTENTION = ("self_attn.", "attn.", "attention.", "linear_attn.", "cross_attn.", "conv.")
_MLP = ("mlp.", "feed_forward.", "block_sparse_moe.")


def layer_of(canonical: str) -> int | None:
    """The number of the decoder layer that a canonical name belongs to."""
    match = _LAYER.match(canonical)
    return int(match[1]) if match else None


def groups_of(canonical: str) -> set[str]:
    """The groups that a canonical name belongs to; the norms inside attention count as both."""
    match = _LAYER.match(canonical)
    if match is None:
        return {{**dict.fromkeys(NORMS, "final-norm"), EMBED: "embed", HEAD: "head"}.get(canonical, "")} - {""}
    suffix = match[2]
    found = set()
    if suffix.startswith(_ATTENTION):
        found.add("attn")
    if suffix.startswith(_MLP):
        found.add("mlp")
    if "norm" in suffix.rsplit(".", 1)[0].rsplit(".", 1)[-1]:
        found.add("norms")
    return found


def select(
    names: Iterable[str],
    layers: Sequence[int],
    *,
    final_norm: bool,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> tuple[str, ...]:
    """The chosen canonical names in the order given. A group or pattern that fits nothing is a `UsageError`."""
    names = list(names)
    wanted = set(layers)
    chosen = {n for n in names if layer_of(n) in wanted or (final_norm and n in NORMS)}
    for option, patterns in (("exclude", exclude), ("include", include)):
        for pattern in patterns:
            fits = _fits(pattern)
            found = {n for n in names if fits(n)}
            if not found:
                if "," in pattern:
                    each = " ".join(f"--{option} {item}" for item in pattern.split(","))
                    raise UsageError(
                        "unmatched", f"--{option} {printable(pattern)}: one group or pattern at a time", hint=each
                    )
                raise UsageError(
                    "unmatched",
                    f"--{option} {printable(pattern)}: nothing in the tower has such a name",
                    hint=f"groups are {', '.join(GROUPS)}; {nearest(pattern, names)}",
                )
            chosen = chosen | found if option == "include" else chosen - found
    return tuple(n for n in names if n in chosen)


def _fits(pattern: str) -> Callable[[str], bool]:
    return (lambda name: pattern in groups_of(name)) if pattern in GROUPS else matcher(pattern)


@dataclass(frozen=True)
class Shares:
    """The host's share by layer: one number, a gradient over the selected layers, or numbers layer by layer.

    A gradient is piecewise linear in t = i/(n-1) over the selected layers in order (t = 1 for a single one); tensors
    outside layers take its first number, as in mergekit.
    """

    gradient: tuple[float, ...]
    by_layer: Mapping[int, float]

    def at(self, layer: int | None, layers: Sequence[int]) -> float:
        """The share of the host in `layer`; None: outside layers."""
        if layer in self.by_layer:
            return self.by_layer[layer]  # type: ignore[index]
        if layer is None or layer not in layers:
            return self.gradient[0]
        index = list(layers).index(layer)
        return interpolate(self.gradient, index / (len(layers) - 1) if len(layers) > 1 else 1.0)

    @property
    def every(self) -> tuple[float, ...]:
        """All numbers given."""
        return (*self.gradient, *self.by_layer.values())


def interpolate(values: Sequence[float], t: float) -> float:
    """Piecewise linear through `values` at equal distances over t in [0, 1]."""
    scaled = t * (len(values) - 1)
    low = int(scaled)
    high = min(len(values) - 1, low + 1)
    part = scaled - low
    return (1 - part) * values[low] + part * values[high]


def resolve_alpha(text: str) -> str:
    """`--alpha` in the form that is recorded: `@FILE` is read here, so that no path becomes part of what was done."""
    if not text.startswith("@"):
        parse_alpha(text)
        return text
    from surgery.graph.recipes.documents import load_documents, read_text

    path = Path(text[1:])
    ((document, _),) = load_documents(read_text(path), path, several=False)
    form = "layers: {12: 0.95, 13: 0.9} and, if you like, default: 0.9"
    if not isinstance(document, dict) or not set(document) <= {"layers", "default"} or "layers" not in document:
        raise UsageError("alpha", f"{path}: not a file of shares", hint=f"write {form}")
    try:
        by_layer = {str(int(k)): float(v) for k, v in document["layers"].items()}
        default = document.get("default", 0.9)
        default = [float(v) for v in default] if isinstance(default, list) else float(default)
    except (TypeError, ValueError, AttributeError):
        raise UsageError("alpha", f"{path}: a share is no number", hint=f"write {form}") from None
    resolved = json.dumps({"default": default, "layers": by_layer}, sort_keys=True, separators=(",", ":"))
    parse_alpha(resolved)
    return resolved


def parse_alpha(text: str) -> Shares:
    """Shares from `0.9`, `1.0,0.9,0.7`, or the JSON that `resolve_alpha` makes. Raises `UsageError`."""
    by_layer: dict[int, float] = {}
    values: Any = text.split(",")
    try:
        if text.startswith("{"):
            document = json.loads(text)
            by_layer = {int(k): float(v) for k, v in document.get("layers", {}).items()}
            values = document.get("default", 0.9)
            values = values if isinstance(values, list) else [values]
        gradient = tuple(float(v) for v in values)
    except (TypeError, ValueError):
        raise UsageError(
            "alpha", f"--alpha {printable(text)}: not a number", hint="write 0.9, or 1.0,0.9,0.7 for a gradient"
        ) from None
    return Shares(gradient, by_layer)


def check_layers(shares: Shares, count: int) -> None:
    """Raise `UsageError` for a share of a layer that a tower of `count` layers does not have."""
    for layer in shares.by_layer:
        if not 0 <= layer < count:
            raise UsageError(
                "alpha",
                f"--alpha: layer {layer} is out of range, the tower has {count} layers (0-{count - 1})",
                hint="layers are counted from 0",
            )


def check_shares(shares: Shares, *, force: bool) -> None:
    """Raise `UsageError` for a share that is not finite, or outside [0, 1] without `force`."""
    for value in shares.every:
        if value != value or value in (float("inf"), float("-inf")):
            raise UsageError("alpha", f"--alpha {value}: not a finite number", hint="write 0.9")
        if not 0 <= value <= 1 and not force:
            raise UsageError(
                "alpha",
                f"--alpha {value:g}: outside [0, 1], this extrapolates",
                hint="--force if that is what you want",
            )
