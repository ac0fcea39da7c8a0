"""Charts of an attention analysis and of a head profile: four panels a page, drawn by matplotlib."""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from surgery.evals.pictures import COLOURS, need, write


def analysis(result: Mapping[str, Any], path: str | Path, *, title: str = "") -> Path:
    """A PNG: image mass by layer, AUROC of overlap by layer, accuracy by confidence, knock-out by layer. Panels without
    data say so. Raises ResourceError without matplotlib, OutputError when it cannot be written."""
    figure_module, canvas_module = (need(f"matplotlib.{name}") for name in ("figure", "backends.backend_agg"))
    figure = figure_module.Figure(figsize=(10.5, 7.6), dpi=110, layout="constrained")
    canvas_module.FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    if title:
        figure.suptitle(title, fontsize=11)
    _mass(panels[0][0], result["layers"])
    _overlap(panels[0][1], result["layers"], result["with_boxes"])
    _reliability(panels[1][0], result["confidence"])
    _flow(panels[1][1], result["flow"])
    for axes in panels.flat:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(axis="y", color="#e4e4e8", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return write(path, buffer)


def heads(result: Mapping[str, Any], path: str | Path, *, title: str = "") -> Path:
    """A PNG of a head profile: how each head moves the right answer's probability, red down and blue up, with the
    number where there is room. Raises as `analysis`."""
    figure_module, canvas_module = (need(f"matplotlib.{name}") for name in ("figure", "backends.backend_agg"))
    change = result["change"]
    rows, cols = len(change), len(change[0])
    figure = figure_module.Figure(
        figsize=(min(16, 3.4 + 0.62 * cols), min(14, 2.2 + 0.46 * rows)), dpi=110, layout="constrained"
    )
    canvas_module.FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    top = max(1e-6, *(abs(v) for row in change for v in row))
    shown = axes.imshow(change, cmap="RdBu", vmin=-top, vmax=top, aspect="auto", interpolation="nearest")
    if rows * cols <= 200:
        for r, c in ((r, c) for r in range(rows) for c in range(cols)):
            dark = abs(change[r][c]) > 0.6 * top
            axes.text(
                c, r, f"{change[r][c]:+.3f}", ha="center", va="center", fontsize=8, color="white" if dark else "#333333"
            )
    axes.set_xticks(range(0, cols, max(1, cols // 16)))
    axes.set_yticks(range(0, rows, max(1, rows // 16)))
    axes.set(xlabel="head" if result["by"] == "head" else "whole layer", ylabel="layer")
    if result["by"] != "head":
        axes.set_xticks([])
    how = "knocked out" if result["mode"] == "knock-out" else f"alpha {result['alpha']:g}"
    axes.set_title(f"{title}: one at a time, {how}" if title else how, fontsize=10)
    figure.colorbar(shown, ax=axes, label="change of the right answer's probability")
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return write(path, buffer)


def _mass(axes: Any, layers: Any) -> None:
    x = [row["layer"] for row in layers]
    axes.plot(
        x, [row["image_mass"] for row in layers], "-o", color=COLOURS[0], markersize=4, label="attention on picture"
    )
    axes.plot(
        x, [row["entropy"] for row in layers], ":s", color=COLOURS[2], markersize=3.5, label="spread over it (1: even)"
    )
    share = layers[0]["image_share_of_tokens"]
    axes.axhline(share, color=COLOURS[1], linestyle="--", linewidth=1.3, label="picture's share of tokens")
    axes.set(xlabel="layer", ylim=(0, 1.02), title="How much the last row looks at the picture")
    _ticks(axes, x)
    axes.legend(frameon=False, fontsize=8)


def _overlap(axes: Any, layers: Any, boxed: int) -> None:
    axes.set(title="Does looking at the things go with right answers?", xlabel="layer", ylabel="AUROC")
    known = [row for row in layers if row["cosine_auroc"] is not None]
    if not known:
        why = "no item has boxes" if not boxed else "all answers are right, or all wrong"
        axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", color="#777777")
        return
    for score, label, colour, shift in (
        ("cosine", "cosine with the boxes", COLOURS[0], -0.04),
        ("inside", "share inside the boxes", COLOURS[1], 0.04),
    ):
        x = [row["layer"] + shift for row in known]
        y = [row[f"{score}_auroc"] for row in known]
        ends = [row[f"{score}_auroc_interval"] or (v, v) for row, v in zip(known, y, strict=True)]
        bars = [
            [max(0.0, v - low) for v, (low, _) in zip(y, ends, strict=True)],
            [max(0.0, high - v) for v, (_, high) in zip(y, ends, strict=True)],
        ]
        axes.errorbar(x, y, yerr=bars, fmt="-o", color=colour, markersize=4, capsize=2.5, linewidth=1.4, label=label)
    axes.axhline(0.5, color="#999999", linestyle="--", linewidth=1)
    _ticks(axes, [row["layer"] for row in known])
    axes.legend(frameon=False, fontsize=8)


def _reliability(axes: Any, confidence: Any) -> None:
    bins = [b for b in confidence["bins"] if b["n"]]
    x = [b["confidence"] for b in bins]
    y = [b["accuracy"] for b in bins]
    bars = [
        [max(0.0, v - b["interval"][0]) for v, b in zip(y, bins, strict=True)],
        [max(0.0, b["interval"][1] - v) for v, b in zip(y, bins, strict=True)],
    ]
    axes.plot([0, 1], [0, 1], color="#999999", linestyle="--", linewidth=1, label="perfectly calibrated")
    axes.errorbar(x, y, yerr=bars, fmt="o", color=COLOURS[0], markersize=5, capsize=3, label="accuracy (95 %)")
    for b, at_x, at_y in zip(bins, x, y, strict=True):
        axes.annotate(f"{b['n']}", (at_x, at_y), (6, -11), textcoords="offset points", fontsize=7.5, color="#666666")
    known = confidence["auroc"]
    shown = "n/a" if known is None else f"{known:.2f}"
    axes.set(xlabel="confidence of the first token", ylabel="accuracy", xlim=(0, 1.05), ylim=(0, 1.05))
    axes.set_title(f"Confidence against accuracy (AUROC {shown}, ECE {confidence['ece']:.3f})")
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _flow(axes: Any, flow: Any) -> None:
    axes.set(title="What is lost when rows do not see the picture", ylabel="drop of the right answer's probability")
    if not flow:
        axes.text(0.5, 0.5, "knock-out was left out", transform=axes.transAxes, ha="center", color="#777777")
        return
    windows = list(dict.fromkeys(tuple(row["layers"]) for row in flow))
    labels = {"last": "last row", "after-image": "all rows after it"}
    names = list(dict.fromkeys(row["rows"] for row in flow))
    wide = 0.8 / len(names)
    for i, name in enumerate(names):
        mine = [row for row in flow if row["rows"] == name]
        x = [k + (i - (len(names) - 1) / 2) * wide for k in range(len(mine))]
        y = [row["drop"] for row in mine]
        bars = [
            [max(0.0, row["drop"] - row["interval"][0]) for row in mine],
            [max(0.0, row["interval"][1] - row["drop"]) for row in mine],
        ]
        axes.bar(x, y, width=wide * 0.92, color=COLOURS[i], label=labels[name])
        axes.errorbar(x, y, yerr=bars, fmt="none", ecolor="#333333", capsize=2.5, linewidth=1)
    axes.axhline(0, color="#555555", linewidth=0.8)
    shown = [f"{a}" if a == b else f"{a}-{b}" for a, b in windows]
    axes.set_xticks(range(len(windows)), labels=shown, rotation=45 if len(windows) > 10 else 0)
    axes.set_xlabel("layers without sight")
    axes.legend(frameon=False, fontsize=8)


def _ticks(axes: Any, layers: Any) -> None:
    step = max(1, len(layers) // 16)
    axes.set_xticks(list(layers)[::step])
