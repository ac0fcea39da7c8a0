"""Which layers matter: change one layer at a time and see what it costs (arXiv 2505.05464, section on layers).

The study overwrites the projections of one module with a constant (`uniform`); `zero` takes the module out of the
residual stream, `base` and `donor` put another model's layer in its place. Every figure is a paired difference.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from surgery.arch.language.load import Loaded
from surgery.errors import UsageError
from surgery.evals.intervals import paired_bootstrap, paired_score
from surgery.evals.layers.measures import Kept, Measure
from surgery.evals.layers.weights import OtherTower, ablation, tower_of
from surgery.evals.vqa.rows import Item, values_of
from surgery.store.checkpoint import Checkpoint

Report = Callable[[str, Mapping[str, float]], None]


@dataclass(frozen=True)
class Profile:
    """Values of every item for the intact model, and with each of `layers` changed."""

    metric: str
    ablate: str
    module: str
    intact: Sequence[float]
    layers: Mapping[int, Sequence[float]]


def probe_layers(
    loaded: Loaded,
    measure: Measure,
    metric: str,
    layers: Sequence[int],
    *,
    ablate: str = "zero",
    module: str = "block",
    other: Checkpoint | None = None,
    name: str = "the model",
    kept: Kept | None = None,
    report: Report | None = None,
) -> Profile:
    """Measure the model intact and with each of `layers` (ascending) changed; its weights end as they were, byte by
    byte.
    `other` is the checkpoint that base and donor take layers from, `kept` what was measured before.
    Raises as `ablation` and `OtherTower` do.
    """
    tower = tower_of(loaded.model, name)
    if (ablate in ("base", "donor")) != (other is not None):
        raise UsageError(
            "ablate",
            f"ablation '{ablate}' " + ("needs another checkpoint" if other is None else "takes no other checkpoint"),
            hint="name it with --base or --donor, and say --ablate base or donor",
        )
    theirs = OtherTower(tower, name, other) if other is not None else None
    for layer in layers:  # what cannot be changed is refused before hours of measuring
        if ablate in ("zero", "uniform"):
            ablation(tower, layer, module, ablate)
    kept = kept if kept is not None else Kept()
    intact = kept.get("intact", measure.values)
    changed: dict[int, Sequence[float]] = {}
    for number, layer in enumerate(sorted(layers)):
        if (key := f"layer {layer}") in kept:
            changed[layer] = kept.get(key, measure.values)
            continue
        measure.start(layer)
        with ablation(tower, layer, module, ablate, theirs).applied():
            changed[layer] = kept.get(key, measure.values)
        if report is not None:
            mean = sum(changed[layer]) / len(intact)
            report("layers", {"done": number + 1, "n": len(layers), metric: mean})
    return Profile(metric, ablate, module, intact, changed)


def rows(profile: Profile, items: Sequence[Item], group_by: str | None = None) -> list[dict[str, Any]]:
    """One row a layer and group: the mean, that of the intact model, the difference and its 95 % paired interval.

    For `acc` the interval is Tango's score interval, which has a width even where nothing flips; for `nll` a bootstrap
    over items.
    """
    out = []
    for layer, values in profile.layers.items():
        for group, chosen in groups(items, group_by).items():
            before, after = ([v[i] for i in chosen] for v in (profile.intact, values))
            out.append({"layer": layer, "group": group, **difference(profile.metric, before, after)})
    return out


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def groups(items: Sequence[Item], field: str | None) -> dict[str, list[int]]:
    """Positions of items: all of them, then by each value of a field."""
    found: dict[str, list[int]] = {}
    if field is not None:
        for place, item in enumerate(items):
            for value in values_of(item.groups, field):
                found.setdefault(f"{field}={value}", []).append(place)
    return {"all": list(range(len(items))), **dict(sorted(found.items()))}


def difference(metric: str, before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Means of both, their difference and its 95 % interval, over the same items; None for what is not finite, as where
    a change makes a model overflow."""
    n = len(before)
    if not all(map(isfinite, (*before, *after))):
        means = (_finite(sum(values) / n) for values in (before, after))
        return dict(
            zip(("n", "intact", "value", "difference", "low", "high"), (n, *means, None, None, None), strict=True)
        )
    if metric == "acc":
        lost = sum(a < b for b, a in zip(before, after, strict=True))
        gained = sum(a > b for b, a in zip(before, after, strict=True))
        low, high = paired_score(lost, gained, n)
    else:
        low, high = paired_bootstrap([a - b for b, a in zip(before, after, strict=True)], samples=2000)
    means = sum(before) / n, sum(after) / n
    return {"n": n, "intact": means[0], "value": means[1], "difference": means[1] - means[0], "low": low, "high": high}
