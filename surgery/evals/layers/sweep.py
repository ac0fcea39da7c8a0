"""Merges of a donor into a host's language tower, measured without writing a checkpoint.

W(lam) = lam H + (1 - lam) D is formed in place from one loaded host and one donor, in the arithmetic of `surgery
merge`. The best lam is chosen on one part of the items and reported on the rest; a figure chosen and reported on the
same items would flatter itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import nn

from surgery.arch.language.load import Loaded
from surgery.errors import CheckpointError, UsageError, printable
from surgery.evals.layers.measures import Kept, Measure
from surgery.evals.layers.profile import difference, groups
from surgery.evals.layers.selections import Selection
from surgery.evals.layers.weights import OtherTower, Tower, kept, tower_of
from surgery.evals.vqa.rows import Item, values_of
from surgery.store.checkpoint import Checkpoint

Report = Callable[[str, Mapping[str, float]], None]


@dataclass(frozen=True)
class Sweep:
    """Values of every item, for the host and for each (selection, host share) in the order they were asked for."""

    metric: str
    host: Sequence[float]
    points: Mapping[tuple[str, float], Sequence[float]]


def sweep_merge(
    loaded: Loaded,
    measure: Measure,
    metric: str,
    donor: Checkpoint,
    alphas: Sequence[float],
    chosen: Sequence[Selection],
    *,
    name: str = "the host",
    done: Kept | None = None,
    report: Report | None = None,
) -> Sweep:
    """Measure the host, and the merge of each selection at each host share; the weights end as they were, byte by byte.

    `done` holds what was measured before.
    Raises UsageError for a share outside [0, 1], CheckpointError when the donor's tower does not fit.
    """
    for alpha in alphas:
        if not 0 <= alpha <= 1:
            raise UsageError("alpha", f"a host share of {alpha:g}", hint="from 0 (the donor) to 1 (the host)")
    tower = tower_of(loaded.model, name)
    theirs = OtherTower(tower, name, donor)
    done = done if done is not None else Kept()
    host = done.get("host", measure.values)
    points: dict[tuple[str, float], Sequence[float]] = {}
    for selection in chosen:
        keys = {alpha: f"layers {selection.label}, alpha {alpha:g}" for alpha in alphas}
        if all(alpha == 1 or key in done for alpha, key in keys.items()):
            points |= {(selection.label, a): host if a == 1 else done.get(k, measure.values) for a, k in keys.items()}
            continue
        measure.start(selection.first)
        mine = _parameters(tower, theirs, selection)
        donors = [theirs.read(n).to(p.device) for n, p in mine.items()]
        with kept(list(mine.values())), torch.no_grad():
            hosts = [p.detach().clone() for p in mine.values()]
            for alpha in alphas:
                if keys[alpha] not in done:
                    for parameter, h, d in zip(mine.values(), hosts, donors, strict=True):
                        parameter.copy_(blend(h, d, alpha))
                points[selection.label, alpha] = host if alpha == 1 else done.get(keys[alpha], measure.values)
                if report is not None:
                    mean = sum(points[selection.label, alpha]) / len(host)
                    report(
                        "merges", {"done": len(points), "n": len(chosen) * len(alphas), "alpha": alpha, metric: mean}
                    )
    return Sweep(metric, host, points)


def blend(host: torch.Tensor, donor: torch.Tensor, alpha: float) -> torch.Tensor:
    """alpha H + (1 - alpha) D in three float32 operations, rounded once to the host's dtype; ends are copies."""
    if alpha in (0.0, 1.0):
        return host if alpha == 1.0 else donor.to(host.dtype)
    return host.float().mul(alpha).add(donor.float().mul(1 - alpha)).to(host.dtype)


def split_items(
    items: Sequence[Item], share: float, seed: int, field: str | None = None
) -> tuple[list[int], list[int]]:
    """Positions of the items to choose on and of those to report on, each group of `field` split alike.

    Raises UsageError when either would be empty.
    """
    import random

    dev: set[int] = set()
    parts: dict[str, list[int]] = {}
    for place, item in enumerate(items):  # one of several values tells enough: each item is drawn once
        parts.setdefault(values_of(item.groups, field)[0] if field is not None else "all", []).append(place)
    for order in parts.values():
        random.Random(seed).shuffle(order)
        dev |= set(order[: round(share * len(order))])
    rest = [i for i in range(len(items)) if i not in dev]
    if not dev or not rest:
        raise UsageError(
            "dev",
            f"a share of {share:g} leaves {len(dev)} items to choose on and {len(rest)} to report on",
            hint="see --dev",
        )
    return sorted(dev), rest


def pick(sweep: Sweep, places: Sequence[int]) -> tuple[str, float] | None:
    """The best point on these items: most right answers, or smallest -log p; of equals the one nearest the host. One
    whose values are not finite is no candidate; None where all are so."""
    sign = 1 if sweep.metric == "acc" else -1
    finite = [key for key, values in sweep.points.items() if all(isfinite(values[i]) for i in places)]

    def score(key: tuple[str, float]) -> tuple[float, float]:
        values = sweep.points[key]
        return sign * sum(values[i] for i in places) / len(places), key[1]

    return max(finite, key=score, default=None)


def rows(sweep: Sweep, items: Sequence[Item], places: Sequence[int], field: str | None = None) -> list[dict[str, Any]]:
    """One row a point and group on these items: mean, that of the host, difference, 95 % paired interval."""
    inside = set(places)
    out = []
    for (label, alpha), values in sweep.points.items():
        for group, members in groups(items, field).items():
            members = [i for i in members if i in inside]
            if members:
                before, after = ([v[i] for i in members] for v in (sweep.host, values))
                out.append({"layers": label, "alpha": alpha, "group": group, **difference(sweep.metric, before, after)})
    return out


def _parameters(tower: Tower, theirs: OtherTower, selection: Selection) -> dict[str, nn.Parameter]:
    """The parameters that a merge changes, by their names in the model; each once, however it is tied."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for canonical in selection.tensors:
        if canonical not in theirs.map.names:
            raise CheckpointError(
                "incompatible",
                f"'{printable(canonical)}' is put together from several tensors when the model is loaded",
                hint="write this merge with surgery merge and evaluate the folder",
            )
        name = theirs.map.names[canonical][0]
        parameter = tower.model.get_parameter(name)
        found.setdefault(id(parameter), (name, parameter))
    return dict(found.values())
