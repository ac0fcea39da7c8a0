"""Pictures of a checkpoint graph: what a recipe plans, or where a checkpoint comes from, as Graphviz text or SVG.

Standard library only. Boxes stand in layers, what is read above what reads it; within a layer they are ordered so that
lines cross little (the median of their neighbours, swept a few times).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from surgery.errors import printable
from surgery.store.record import params_text

_WIDTH, _LINE, _PAD, _GAP_X, _GAP_Y, _MARGIN = 212, 16, 10, 28, 46, 24
_CHARACTERS = 31  # of a line in a box
_SWEEPS = 6

# kind -> (fill, border): quiet colours that a printer keeps apart
_COLOURS: Mapping[str, tuple[str, str]] = {
    "input": ("#f1f3f5", "#868e96"),
    "done": ("#e6f4ea", "#2b8a3e"),
    "cached": ("#e6f4ea", "#2b8a3e"),
    "copy": ("#e3f2fd", "#1971c2"),
    "fused": ("#ffffff", "#adb5bd"),
    "not needed": ("#ffffff", "#ced4da"),
    "run": ("#fff4e0", "#e67700"),
    "made": ("#e3f2fd", "#1971c2"),
}
_LEGEND = {
    "input": "input",
    "run": "to be made",
    "fused": "made on the way",
    "copy": "copied",
    "cached": "at hand",
    "done": "at hand",
    "not needed": "not needed",
    "made": "made by surgery",
}


@dataclass(frozen=True)
class Box:
    """One checkpoint or step."""

    key: str
    title: str
    lines: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class Picture:
    """Boxes, and which is read by which: (key of what is read, key of the reader)."""

    boxes: tuple[Box, ...]
    edges: tuple[tuple[str, str], ...]


def recipe_picture(plans: Iterable[tuple[Mapping[str, str], Sequence[Mapping[str, Any]]]]) -> Picture:
    """The picture of planned recipes: (inputs by name, rows of `graph.recipes.estimate.node_report`) for each."""
    boxes: list[Box] = []
    edges: list[tuple[str, str]] = []
    for number, (inputs, rows) in enumerate(plans):
        read = {source for row in rows for source in row["from"]}
        for name, place in inputs.items():
            if name in read:
                boxes.append(Box(f"{number}/{name}", name, () if place == name else (place,), "input"))
        for row in rows:
            lines = [row["op"], _LEGEND[row["state"]] if row["state"] not in ("run",) else row["why"]]
            if row["state"] in ("run", "copy"):
                made = row["tensors"]["computed"] + row["tensors"]["trained"]
                lines.append(f"{made:,} made, {size(row['bytes']['written'])} written")
            boxes.append(Box(f"{number}/{row['name']}", row["name"], tuple(filter(None, lines)), row["state"]))
            edges += [(f"{number}/{source}", f"{number}/{row['name']}") for source in dict.fromkeys(row["from"])]
    return Picture(tuple(boxes), tuple(edges))


def lineage_picture(name: str, record: Mapping[str, Any]) -> Picture:
    """The picture of a checkpoint's record: every step back to the roots, each once."""
    boxes: dict[str, Box] = {}
    edges: dict[tuple[str, str], None] = {}
    ancestors = record["ancestors"]
    waiting = [(record["record"], name, record)]
    while waiting:
        key, title, own = waiting.pop()
        if key in boxes:
            continue
        step = own["steps"][-1]
        params = params_text(step)
        digest = "never written" if own["digest"].startswith("derived:") else own["digest"]
        boxes[key] = Box(
            key, title, tuple(filter(None, (f"{step['op']} v{step['version']}", params, digest[:19]))), "made"
        )
        for parent, row in own["parents"].items():
            parent_key = row["lineage"] or row["digest"]
            edges[parent_key, key] = None
            if row["lineage"] in ancestors:
                waiting.append((parent_key, parent, ancestors[row["lineage"]]))
            elif parent_key not in boxes:
                boxes[parent_key] = Box(parent_key, parent, (row["digest"][:19],), "input")
    return Picture(tuple(boxes.values()), tuple(edges))


def draw_dot(picture: Picture) -> str:
    """The graph in the language of Graphviz."""
    lines = ["digraph checkpoints {", '  rankdir=TB; node [shape=box, style="rounded,filled", fontname="sans-serif"];']
    numbers = {box.key: f"n{i}" for i, box in enumerate(picture.boxes)}
    for box in picture.boxes:
        label = "\\n".join(_dot(text) for text in (box.title, *box.lines))
        fill, border = _COLOURS[box.kind]
        lines.append(f'  {numbers[box.key]} [label="{label}", fillcolor="{fill}", color="{border}"];')
    lines += [f"  {numbers[a]} -> {numbers[b]};" for a, b in picture.edges]
    return "\n".join([*lines, "}"])


def draw_svg(picture: Picture) -> str:
    """The graph as SVG, with a legend of the kinds that occur."""
    layers = _layers(picture)
    heights = [max(_height(box) for box in layer) for layer in layers]
    widest = max((len(layer) for layer in layers), default=1)
    width = max(2 * _MARGIN + widest * _WIDTH + (widest - 1) * _GAP_X, 420)
    height = 2 * _MARGIN + sum(heights) + _GAP_Y * max(0, len(layers) - 1) + 34
    places: dict[str, tuple[float, float]] = {}
    y = float(_MARGIN)
    for layer, tall in zip(layers, heights, strict=True):
        x = (width - (len(layer) * _WIDTH + (len(layer) - 1) * _GAP_X)) / 2
        for box in layer:
            places[box.key] = (x, y + (tall - _height(box)) / 2)
            x += _WIDTH + _GAP_X
        y += tall + _GAP_Y
    by_key = {box.key: box for box in picture.boxes}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#868e96"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for a, b in picture.edges:
        (ax, ay), (bx, by) = places[a], places[b]
        x1, y1, x2, y2 = ax + _WIDTH / 2, ay + _height(by_key[a]), bx + _WIDTH / 2, by - 1
        bend = max(18.0, (y2 - y1) / 2)
        parts.append(
            f'<path d="M{x1:.1f} {y1:.1f} C{x1:.1f} {y1 + bend:.1f} {x2:.1f} {y2 - bend:.1f} {x2:.1f} {y2:.1f}" '
            'fill="none" stroke="#868e96" stroke-width="1.3" marker-end="url(#tip)"/>'
        )
    for box in picture.boxes:
        parts += _svg_box(box, *places[box.key])
    parts += _svg_legend(picture, height)
    return "\n".join([*parts, "</svg>", ""])


def _svg_box(box: Box, x: float, y: float) -> list[str]:
    fill, border = _COLOURS[box.kind]
    dashed = ' stroke-dasharray="5 3"' if box.kind in ("fused", "not needed") else ""
    whole = escape(printable("\n".join((box.title, *box.lines)), limit=2000))
    parts = [
        f'<g><title>{whole}</title><rect x="{x:.1f}" y="{y:.1f}" width="{_WIDTH}" height="{_height(box)}" rx="7" '
        f'fill="{fill}" stroke="{border}" stroke-width="1.4"{dashed}/>'
    ]
    for i, text in enumerate((box.title, *box.lines)):
        style = 'font-weight="600" fill="#212529"' if i == 0 else 'fill="#495057" font-size="11"'
        at = y + _PAD + _LINE * (i + 0.72)
        parts.append(f'<text x="{x + _PAD:.1f}" y="{at:.1f}" {style}>{escape(_cut(text))}</text>')
    return [*parts, "</g>"]


def _svg_legend(picture: Picture, height: float) -> list[str]:
    parts: list[str] = []
    x = float(_MARGIN)
    told: set[str] = set()
    for kind in _COLOURS:
        label = _LEGEND[kind]
        if label in told or not any(box.kind == kind for box in picture.boxes):
            continue
        told.add(label)
        fill, border = _COLOURS[kind]
        dashed = ' stroke-dasharray="3 2"' if kind in ("fused", "not needed") else ""
        y = height - 22
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" rx="3" fill="{fill}" stroke="{border}"{dashed}/>')
        parts.append(f'<text x="{x + 18}" y="{y + 10}" fill="#495057" font-size="11">{label}</text>')
        x += 34 + 6.2 * len(label)
    return parts


def _layers(picture: Picture) -> list[list[Box]]:
    """Boxes by their distance from the inputs, ordered within each layer by the median of their neighbours."""
    reads: dict[str, list[str]] = {box.key: [] for box in picture.boxes}
    read_by: dict[str, list[str]] = {box.key: [] for box in picture.boxes}
    for a, b in picture.edges:
        reads[b].append(a)
        read_by[a].append(b)
    depth: dict[str, int] = {}
    ready = [key for key, sources in reads.items() if not sources]
    left = {key: len(sources) for key, sources in reads.items()}
    while ready:
        key = ready.pop()
        depth[key] = max((depth[s] + 1 for s in reads[key]), default=0)
        for reader in read_by[key]:
            left[reader] -= 1
            if not left[reader]:
                ready.append(reader)
    for key in reversed(sorted(depth, key=depth.__getitem__)):  # what is read late stands just above its reader
        if not reads[key] and read_by[key]:
            depth[key] = min(depth[r] for r in read_by[key]) - 1
    layers: list[list[Box]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for box in picture.boxes:
        layers[depth[box.key]].append(box)
    layers = [layer for layer in layers if layer]
    for sweep in range(_SWEEPS):
        neighbours = reads if sweep % 2 == 0 else read_by
        place = {box.key: i / max(1, len(layer)) for layer in layers for i, box in enumerate(layer)}
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            layer.sort(key=lambda box: _median([place[n] for n in neighbours[box.key]], place[box.key]))
            place.update({box.key: i / max(1, len(layer)) for i, box in enumerate(layer)})
    return layers


def _median(values: list[float], own: float) -> float:
    return sorted(values)[len(values) // 2] if values else own


def _height(box: Box) -> int:
    return 2 * _PAD + _LINE * (1 + len(box.lines)) - 2


def _cut(text: str) -> str:
    text = printable(text, limit=400)
    return text if len(text) <= _CHARACTERS else text[: _CHARACTERS - 1] + "…"


def _dot(text: str) -> str:
    return _cut(text).replace("\\", "\\\\").replace('"', '\\"')


def size(count: float) -> str:
    """Bytes as people write them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
