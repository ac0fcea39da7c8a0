"""Will a merge work? Host and donor against their base, layer by layer and group by group.

With tau = W - base: how far each moved (|tau| / |base|), how far they are apart (|H - D| / |H|), whether they moved the
same way (cosine of the taus, share of elements that moved in opposite directions), and how much of a merge would arrive
after rounding. Where merges fail the two are far apart and their taus unrelated (DRIFT's diagnosis). Every element is
read, in pieces; sums are float64. numpy only.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

import numpy as np

from surgery.arch.language.locate import locate_towers
from surgery.arch.merging.numbers.arithmetic import FLOATS, PIECE, Source
from surgery.arch.merging.numbers.formulas import Formula, elements
from surgery.arch.merging.numbers.measure import Sums, by_formula, measure_tensor, ratio
from surgery.arch.merging.selection import NORMS, groups_of, layer_of
from surgery.errors import CheckpointError, printable
from surgery.store.checkpoint import Checkpoint
from surgery.store.reader import open_reader
from surgery.store.tensors import TensorRef

SHARE = 0.9  # of the host, in the merge whose transfer is predicted


@dataclass
class Moves:
    """Sums over elements of h - b, d - b and h - d, and of b and h."""

    hh: float = 0.0
    bb: float = 0.0
    host: float = 0.0
    donor: float = 0.0
    both: float = 0.0
    apart: float = 0.0
    moved: int = 0
    against: int = 0

    def add(self, h: Any, d: Any, b: Any) -> None:
        """One stretch of all three, in float64."""
        one, two, between = h - b, d - b, h - d
        self.hh, self.bb = self.hh + float(h @ h), self.bb + float(b @ b)
        self.host, self.donor = self.host + float(one @ one), self.donor + float(two @ two)
        self.both, self.apart = self.both + float(one @ two), self.apart + float(between @ between)
        product = np.sign(one) * np.sign(two)
        self.moved += int(np.count_nonzero(product))
        self.against += int(np.count_nonzero(product < 0))

    def row(self) -> dict[str, float | None]:
        """As ratios; None where there is nothing to divide by."""
        return {
            "host_moved": ratio(sqrt(self.host), sqrt(self.bb)),
            "donor_moved": ratio(sqrt(self.donor), sqrt(self.bb)),
            "donor_to_host": ratio(sqrt(self.donor), sqrt(self.host)),
            "apart": ratio(sqrt(self.apart), sqrt(self.hh)),
            "cosine": ratio(self.both, sqrt(self.host) * sqrt(self.donor)),
            "conflict": ratio(self.against, self.moved),
        }


def compare_towers(
    host: Checkpoint,
    donor: Checkpoint,
    base: Checkpoint,
    *,
    dtype: str | None = None,
    report: Callable[[str, Mapping[str, float]], None] = lambda event, numbers: None,
) -> dict[str, Any]:
    """{"prefix", "layers": rows, "groups": rows, "all": row}. Raises `CheckpointError` where towers do not fit."""
    maps = [locate_towers(host, other) for other in (donor, base)]
    names = [c for c in maps[0].names if c in maps[1].names and (layer_of(c) is not None or c in NORMS)]
    layers: dict[int | str, tuple[Moves, Sums]] = {}
    groups: dict[str, tuple[Moves, Sums]] = {}
    every = (Moves(), Sums())
    for done, canonical in enumerate(names, start=1):
        refs = (
            (host, host.tensors[maps[0].names[canonical][0]]),
            (donor, donor.tensors[maps[0].names[canonical][1]]),
            (base, base.tensors[maps[1].names[canonical][1]]),
        )
        report("compare", {"done": done, "total": len(names)})
        if any(ref.dtype not in FLOATS for _, ref in refs):
            continue
        layer = layer_of(canonical)
        into = [every, layers.setdefault("outside" if layer is None else layer, (Moves(), Sums()))]
        into += [groups.setdefault(g, (Moves(), Sums())) for g in sorted(groups_of(canonical))]
        with ExitStack() as opened:
            readers = [opened.enter_context(open_reader(c, ref)) for c, ref in refs]
            total = elements(readers[0].shape)
            sources = [Source(r, np.float64, min(PIECE, max(1, total))) for r in readers]
            for start in range(0, total, PIECE):
                h, d, b = (s.read(start, min(PIECE, total - start)) for s in sources)
                for moves, _ in into:
                    moves.add(h, d, b)
                if not isfinite(every[0].host + every[0].donor):
                    raise _not_finite(refs, (h, d, b))
            merge = by_formula(Formula("linear", (SHARE, 1 - SHARE)), seed=0)
            for _, sums in into:
                measure_tensor(sums, merge, readers[:2], dtype or readers[0].dtype, canonical)
    return {
        "host": host.name,
        "donor": donor.name,
        "base": base.name,
        "prefix": maps[0].host_prefix,
        "layers": [_row(k, *layers[k]) for k in sorted(layers, key=lambda k: (isinstance(k, str), k))],
        "groups": [_row(k, *groups[k]) for k in sorted(groups)],
        "all": _row("all", *every),
    }


def _row(label: int | str, moves: Moves, sums: Sums) -> dict[str, Any]:
    transfer = sums.row(label)["transfer"] if moves.apart else None  # nothing was to arrive
    return {"where": label, **moves.row(), "transfer": transfer}


def _not_finite(refs: Sequence[tuple[Checkpoint, TensorRef]], values: Sequence[Any]) -> CheckpointError:
    model, ref = next((r for r, v in zip(refs, values, strict=True) if not np.isfinite(v).all()), refs[0])
    return CheckpointError(
        "not-finite",
        f"{model.name}: '{printable(ref.name)}' holds values that are not finite numbers, or too large to compare",
        hint="nothing useful comes of merging it; get the file again, or a checkpoint from before it broke",
    )
