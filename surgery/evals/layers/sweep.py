"""Merges of a donor into a host's language tower, measured without writing a checkpoint.

W(lam) = lam H + (1 - lam) D is formed in place from one loaded host and one donor, in the arithmetic of `surgery
merge`. The best lam is chosen on one part of the items and reported on the rest; a figure chosen and reported on the
same items would flatter itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.arch.language.load import Loaded
from surgery.arch.language.towers import NORM
from surgery.arch.layers import parse_layers
from surgery.errors import UsageError
from surgery.evals.layers.measures import Measure
from surgery.evals.layers.profile import difference, groups
from surgery.evals.layers.weights import OtherTower, kept, tower_of
from surgery.evals.vqa.rows import Item
from surgery.store.checkpoint import Checkpoint

Report = Callable[[str, Mapping[str, float]], None]


@dataclass(frozen=True)
class Selection:
    """Layers that are merged; with `all` of them the final norm is too, as in `surgery merge` without --layers."""

    label: str
    layers: tuple[int, ...]
    final_norm: bool


@dataclass(frozen=True)
class Sweep:
    """Values of every item, for the host and for each (selection, host share) in the order they were asked for."""

    metric: str
    host: Sequence[float]
    points: Mapping[tuple[str, float], Sequence[float]]


def selections(specs: Sequence[str], window: int | None, stride: int | None, count: int) -> list[Selection]:
    """The layers of each spec of `--layers`, then every window of so many layers; all layers if nothing is asked for.

    Raises UsageError for a spec or window that does not fit a tower of `count` layers.
    """
    out = []
    for spec in specs or (() if window else ("all",)):
        out.append(Selection(spec, parse_layers(spec, count), spec.strip() == "all"))
    if window is not None:
        if not 1 <= window <= count:
            raise UsageError("window", f"a window of {window} layers", hint=f"from 1 to the tower's {count}")
        for start in range(0, count - window + 1, stride or 1):
            stop = start + window
            label = f"{start}-{stop - 1}" if window > 1 else str(start)
            out.append(Selection(label, tuple(range(start, stop)), False))
    return list({s.label: s for s in out}.values())


def sweep_merge(
    loaded: Loaded,
    measure: Measure,
    metric: str,
    donor: Checkpoint,
    alphas: Sequence[float],
    chosen: Sequence[Selection],
    *,
    name: str = "the host",
    report: Report | None = None,
) -> Sweep:
    """Measure the host, and the merge of each selection at each host share; the weights end as they were, byte by byte.

    Raises UsageError for a share outside [0, 1], CheckpointError when the donor's tower does not fit.
    """
    for alpha in alphas:
        if not 0 <= alpha <= 1:
            raise UsageError("alpha", f"a host share of {alpha:g}", hint="from 0 (the donor) to 1 (the host)")
    tower = tower_of(loaded.model, name)
    theirs = OtherTower(tower, name, donor)
    host = measure.values()
    points: dict[tuple[str, float], Sequence[float]] = {}
    for selection in chosen:
        measure.start(min(selection.layers))
        mine = _parameters(tower, theirs, selection)
        donors = [theirs.read(n).to(p.device) for n, p in mine.items()]
        with kept(list(mine.values())), torch.no_grad():
            hosts = [p.detach().clone() for p in mine.values()]
            for alpha in alphas:
                for parameter, h, d in zip(mine.values(), hosts, donors, strict=True):
                    parameter.copy_(blend(h, d, alpha))
                points[selection.label, alpha] = host if alpha == 1 else measure.values()
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
    parts = {k: v for k, v in groups(items, field).items() if k != "all" or field is None}
    for places in parts.values():
        order = list(places)
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


def pick(sweep: Sweep, places: Sequence[int]) -> tuple[str, float]:
    """The best point on these items: most right answers, or smallest -log p; of equals the one nearest the host."""
    sign = 1 if sweep.metric == "acc" else -1

    def score(key: tuple[str, float]) -> tuple[float, float]:
        values = sweep.points[key]
        return sign * sum(values[i] for i in places) / len(places), key[1]

    return max(sweep.points, key=score)


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


def _parameters(tower: Any, theirs: OtherTower, selection: Selection) -> dict[str, nn.Parameter]:
    """What a merge of these layers changes: all of the donor's counterparts in them, and the final norm."""
    found: dict[str, nn.Parameter] = {}
    for layer in selection.layers:
        if layer in theirs.map.layers:
            found |= {n: p for n, p in tower.parameters(layer).items() if theirs.has(n)}
    if selection.final_norm and NORM in theirs.map.names:
        name = theirs.map.names[NORM][0]
        found[name] = tower.model.get_parameter(name)
    return dict(_once(found))


def _once(found: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, nn.Parameter]]:
    """Without names of one parameter twice: it must not be blended twice."""
    seen: set[int] = set()
    for name, parameter in found.items():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter
