"""Steering rules as data: which rows, keys, layers and heads, and what happens to their logits.

A patch is a small value that is stored as JSON, shared and put together with others; nothing here needs torch. The
paper's rule is `PAPER`: the last prompt row, the image's keys, every layer and head, logits times alpha, at the
prompt alone (arXiv 2503.01773, section 4). Other methods are other values:

What alpha does. Within the image it is a temperature 1/alpha, whatever constant all logits carry: above 1 sharpens,
below 1 smooths. How much the row looks at the image at all is another matter: with Z the sum of exp over its image
logits l, d log Z(alpha)/d alpha is the mean of l under the tempered weights, so mass grows with alpha only where that
mean is positive. With negative logits alpha above 1 looks away from the image. "mass-preserving" is the temperature
alone, "bias" the mass alone. Models whose keys carry biases (Qwen2) shift all logits: an alpha tuned on one family
means something else on another.

    PRESETS["scalingvis"]   the same with one alpha for every sample
    PRESETS["knock-out"]    the row does not see the image at all (attention knock-out, Geva et al. 2023)
    PRESETS["pai"]          alpha adds to positive and negative logits alike, at every answered token (arXiv 2407.21771)
    PRESETS["pasta"]        everything but a span of text is weighted down in chosen heads (arXiv 2311.02262)
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from surgery.errors import UsageError, closest

MODES = ("logit", "mass-preserving", "bias", "abs", "knock-out")
STEPS = ("first", "all")
KEYS_OF = {"id": "image", "id+video": "image+video", "span": "span"}  # --image-keys of a stored patch -> keys
CONFIDENCES = ("max-prob", "option-prob", "margin", "entropy")


@dataclass(frozen=True)
class Patch:
    """One rule.

    `mode`: what alpha does to a logit l of a chosen key: "logit" alpha·l; "mass-preserving" the same, shifted so that
    the row's mass on these keys stays; "bias" l + log alpha; "abs" l + (alpha - 1)·|l|; "knock-out" minus infinity.
    `layers` "11-22" or "0,3,8-11"; `heads` "8:3,7 9:1" (head numbers of a layer; layers not named are left alone);
    `table` {layer: {head: alpha}} gives heads alphas of their own (a profile). `keys`: "image", "image:2" (the second
    image, counted from 1), "image+video", "span" (first to last image token, markers included), or "text" with the
    phrases in `text`; `invert` turns them into all other keys. `rows`: "last", "last:N", "after-image", "all". `steps`:
    "first" (the prompt) or "all" (every decoded token too). `alpha` holds where the run gives none.
    """

    mode: str = "logit"
    layers: str | None = None
    heads: str | None = None
    table: Mapping[str, Mapping[str, float]] | None = None
    keys: str = "image"
    text: tuple[str, ...] = ()
    invert: bool = False
    rows: str = "last"
    steps: str = "first"
    alpha: float | None = None

    def __post_init__(self) -> None:
        for name, known in (("mode", MODES), ("steps", STEPS)):
            if getattr(self, name) not in known:
                raise UsageError(
                    f"{name}", f"{name} '{getattr(self, name)}': unknown", hint=f"one of {', '.join(known)}"
                )
        if not re.fullmatch(r"image(:[1-9]\d{0,3})?|image\+video|span|text", self.keys):
            raise UsageError("keys", f"keys '{self.keys}': unknown", hint="image, image:2, image+video, span or text")
        if (self.keys == "text") != bool(self.text):
            raise UsageError(
                "keys", "keys text needs phrases, and only that does", hint='"keys": "text", "text": ["…"]'
            )
        if not re.fullmatch(r"last(:[1-9]\d{0,5})?|after-image|all", self.rows):
            raise UsageError("rows", f"rows '{self.rows}': unknown", hint="last, last:3, after-image or all")
        if self.alpha is not None:
            check_alpha("alpha", self.alpha, self.mode)
        for row in (self.table or {}).values():
            for value in row.values():
                check_alpha("alpha in table", value, self.mode)
        if self.table is not None and self.heads is not None:
            raise UsageError("heads", "heads and table both choose heads", hint="leave out one of the two")

    def chosen_layers(self, count: int) -> tuple[int, ...] | None:
        """The layers of a model with `count` of them; None for all. Raises UsageError with the valid range."""
        return None if self.layers is None else parse_range(self.layers, count, "layer")

    def chosen_heads(self, layers: int, heads: int) -> dict[int, tuple[int, ...]] | None:
        """{layer: heads} of a model with so many layers and heads; None for all."""
        if self.heads is None:
            return None
        found: dict[int, tuple[int, ...]] = {}
        for item in re.findall(r"[^\s;]+", self.heads):
            layer, colon, listed = item.partition(":")
            if not colon:
                raise UsageError(
                    "heads", f"heads '{item}': a layer is missing", hint="write LAYER:HEADS, e.g. 8:3,7 9:1"
                )
            for number in parse_range(layer, layers, "layer"):
                found[number] = tuple(sorted({*found.get(number, ()), *parse_range(listed, heads, "head")}))
        if not found:
            raise UsageError("heads", "no heads are named", hint="write LAYER:HEADS, e.g. 8:3,7 9:1, or leave it out")
        return found

    def chosen_table(self, layers: int, heads: int) -> dict[int, dict[int, float]] | None:
        """`table` with numbers for names, checked against the model."""
        if self.table is None:
            return None
        out = {}
        for layer, row in self.table.items():
            for number in parse_range(str(layer), layers, "layer"):
                out[number] = {h: float(a) for k, a in row.items() for h in parse_range(str(k), heads, "head")}
        return out

    def as_json(self) -> dict[str, Any]:
        """The fields that differ from a plain patch, as JSON values."""
        plain = asdict(Patch())
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v != plain[k]}


def parse_range(text: str, count: int, what: str) -> tuple[int, ...]:
    """Numbers below `count` from "11-22" or "0,3,8-11", both ends included. Raises UsageError with the valid range."""
    found: set[int] = set()
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", item)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if match is None or last < first or last >= count:
            raise UsageError(
                f"{what}s",
                f"{what}s '{text}': {item.strip() or 'nothing'} is no {what} of the model",
                hint=f"valid: 0-{count - 1}, e.g. {0}-{max(0, count // 2)}",
            )
        found |= set(range(first, last + 1))
    return tuple(sorted(found))


def check_alpha(name: str, alpha: Any, mode: str = "logit") -> float:
    """`alpha` as a number. Raises UsageError unless it is finite and not negative, and positive for "bias"."""
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha) or alpha < 0:
        raise UsageError(
            "alpha", f"{name} {alpha}: not a number from 0 up", hint="0.5 smooths, 1 is nothing, 2 sharpens"
        )
    if alpha == 0 and mode == "bias":
        raise UsageError("alpha", f"{name} 0: mode bias takes its logarithm", hint="use mode knock-out instead")
    return float(alpha)


PAPER = Patch()
PRESETS: Mapping[str, Patch] = {
    "adaptvis": PAPER,
    "scalingvis": Patch(alpha=1.2),
    "knock-out": Patch(mode="knock-out", rows="after-image"),
    "pai": Patch(mode="abs", steps="all", alpha=1.5),
    "pasta": Patch(mode="bias", keys="text", text=("replace me",), invert=True, rows="all", steps="all", alpha=0.01),
}


def stored_rule(spec: Mapping[str, Any]) -> Patch:
    """The rule of what a config's `adaptvis` or a tuning holds, its policy aside."""
    given = {k: spec[k] for k in ("mode", "rows", "steps") if spec.get(k) is not None}
    keys = KEYS_OF.get(str(spec.get("image_keys", "id")), "image")
    return Patch(layers=layers_text(spec.get("layers")), heads=heads_text(spec.get("heads")), keys=keys, **given)


def layers_text(layers: Any) -> str | None:
    """Layers as a patch takes them, from text or a stored list of numbers."""
    return ",".join(map(str, layers)) if isinstance(layers, list | tuple) else layers


def heads_text(heads: Any) -> str | None:
    """Heads as a patch takes them, from text or a stored {layer: heads}."""
    if isinstance(heads, Mapping):
        return " ".join(f"{layer}:{','.join(map(str, row))}" for layer, row in heads.items())
    return heads if heads is None else str(heads)


def patch_from(values: Mapping[str, Any]) -> Patch:
    """A patch from JSON values; a `preset` key names where it starts from. Raises UsageError for unknown keys."""
    values = dict(values)
    start = PAPER
    if (preset := values.pop("preset", None)) is not None:
        if preset not in PRESETS:
            raise UsageError("preset", f"no preset '{preset}'", hint=closest(str(preset), list(PRESETS)))
        start = PRESETS[preset]
    known = [f.name for f in fields(Patch)]
    for name in values:
        if name not in known:
            raise UsageError("patch", f"a patch has no '{name}'", hint=closest(name, [*known, "preset"]))
    if isinstance(values.get("text"), str):
        values["text"] = (values["text"],)
    return replace(start, **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def read_patches(path: Path) -> tuple[Patch, ...]:
    """The patches of a JSON file: one object, or a list of them that follow one another."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise UsageError("patch", f"{path}: {err.strerror}", hint="name a JSON file with a patch") from None
    except ValueError:
        raise UsageError("patch", f"{path}: not JSON", hint='for example {"mode": "logit", "alpha": 0.5}') from None
    rows: Sequence[Any] = value if isinstance(value, list) else [value]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UsageError("patch", f"{path}: neither a patch nor a list of patches", hint='{"preset": "scalingvis"}')
    return tuple(patch_from(row) for row in rows)
