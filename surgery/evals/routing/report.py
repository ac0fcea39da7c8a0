"""Routing as tables and pictures: one CSV of measures, one of loads, one for each pair of passes, and heat maps."""

import csv
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from surgery.evals.pictures import heat_map
from surgery.evals.routing.record import PassReport
from surgery.store.writer import atomic_write

COLUMNS = (
    "k", "tokens", "cv", "max_vio", "entropy", "top1_weight", "reselection", "m_over_n", "alpha_norm", "beta_norm",
)  # fmt: skip


def table(rows: Sequence[PassReport]) -> list[dict[str, Any]]:
    """A row for each layer and pass; measures that a pass does not have are None."""
    return [{"layer": r.layer, "iteration": r.iteration, **{c: r.numbers.get(c) for c in COLUMNS}} for r in rows]


def write_report(rows: Sequence[PassReport], folder: Path, *, pictures: bool = True) -> list[Path]:
    """Write routing.csv, load.csv, coactivation-layer-L-passes-A-B.csv and their heat maps into `folder`."""
    made = [_csv(folder / "routing.csv", ("layer", "iteration", *COLUMNS), [list(r.values()) for r in table(rows)])]
    experts = range(len(rows[0].load))
    loads = [[r.layer, r.iteration, *(f"{x:.6f}" for x in r.load.tolist())] for r in rows]
    made.append(_csv(folder / "load.csv", ("layer", "iteration", *(f"expert_{e}" for e in experts)), loads))
    for row in rows:
        if row.co_activation is not None:
            name = f"coactivation-layer-{row.layer}-passes-{row.iteration - 1}-{row.iteration}.csv"
            counts = [[int(x) for x in line] for line in row.co_activation.tolist()]
            made.append(_csv(folder / name, [f"expert_{e}" for e in experts], counts))
    if not pictures:
        return made
    chained = any(r.iteration for r in rows)
    labels = [f"layer {r.layer}" + (f" pass {r.iteration}" if chained else "") for r in rows]
    share = [[x * len(r.load) for x in r.load.tolist()] for r in rows]
    made.append(
        heat_map({"load of each expert (1 = even)": share}, folder / "load.png", x_label="expert", y_ticks=labels)
    )
    pairs = {
        f"layer {r.layer}, pass {r.iteration - 1} -> {r.iteration}": r.co_activation.tolist()
        for r in rows
        if r.co_activation is not None
    }
    if pairs:
        made.append(
            heat_map(pairs, folder / "coactivation.png", x_label="expert of the later pass", y_label="of the earlier")
        )
    return made


def _csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow(["" if x is None else f"{x:.6g}" if isinstance(x, float) else x for x in row])
    atomic_write(path, text.getvalue().encode())
    return path
