"""Heat maps over pictures: panels side by side on one scale, with a colour bar, captions, and what the model does not
see hatched. Pillow alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import UsageError
from surgery.evals.pictures import INK, PAPER, need, write

SCALES = ("p99", "raw")
_SIDE = 384  # pixels that the longer side of a small picture is enlarged to
_LARGEST = 768
_MARGIN, _GAP, _FONT = 18, 14, 15
_MUTED = (110, 110, 120)
# A ramp of rising lightness, dark violet to pale yellow: order is seen without colour too.
_RAMP = np.array(
    [(13, 8, 60), (84, 15, 109), (146, 38, 103), (203, 65, 73), (240, 112, 32), (252, 176, 22), (250, 245, 165)],
    dtype=np.float64,
)  # fmt: skip
_BOX_COLOURS = ((0, 158, 115), (86, 180, 233), (204, 121, 167), (230, 159, 0))


@dataclass(frozen=True, eq=False)
class Panel:
    """One map, mass per pixel [height, width] (NaN: not seen), with a title and a line of numbers."""

    heat: NDArray[np.float64]
    title: str
    caption: str = ""


def colours(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """RGB [..., 3] of values in [0, 1]."""
    at = np.clip(np.nan_to_num(values), 0, 1) * (len(_RAMP) - 1)
    low = np.minimum(at.astype(int), len(_RAMP) - 2)
    part = (at - low)[..., None]
    return _RAMP[low] * (1 - part) + _RAMP[low + 1] * part


def top_of(panels: Sequence[Panel], scale: str) -> float:
    """The value that the last colour stands for: the 99th percentile of all that is shown ("p99"), or the largest
    ("raw"). Raises UsageError for another word."""
    if scale not in SCALES:
        raise UsageError("scale", f"--scale {scale}: unknown", hint=" or ".join(SCALES))
    seen = np.concatenate([p.heat[np.isfinite(p.heat)].reshape(-1) for p in panels])
    found = float(np.percentile(seen, 99) if scale == "p99" else seen.max()) if len(seen) else 0.0
    return found if found > 0 else 1.0


def blend(picture: NDArray[np.uint8], heat: NDArray[np.float64], top: float) -> NDArray[np.uint8]:
    """The picture in grey under its heat, uint8 [height, width, 3]; what is not seen is greyed out and hatched."""
    grey = picture.astype(np.float64).mean(-1, keepdims=True)
    level = np.clip(np.nan_to_num(heat) / top, 0, 1)
    # The picture is dimmed and weak attention leaves it visible; strong attention covers most of it.
    alpha = (0.25 + 0.6 * np.sqrt(level))[..., None]
    out = (1 - alpha) * 0.6 * grey + alpha * colours(level)
    unseen = ~np.isfinite(heat)
    y, x = np.indices(heat.shape)
    line = (x + y) % 12 < 2
    out[unseen] = 0.35 * grey[unseen] + 0.65 * 235
    out[unseen & line] = 150
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def draw(
    picture: Any,
    rows: Sequence[Sequence[Panel]],
    path: str | Path,
    *,
    title: str,
    boxes: Sequence[tuple[str, tuple[float, float, float, float]]] = (),
    scale: str = "p99",
    spec: Mapping[str, Any] | None = None,
) -> Path:
    """A PNG: the picture (with `boxes`) at the left of every row, then the row's panels, all on one colour scale.

    `picture` is a PIL image whose size is that of the heat maps; `spec` goes into the text chunk "surgery" as JSON.
    Raises UsageError for an unknown scale, ResourceError without Pillow, OutputError when it cannot be written.
    """
    image_module, draw_module, font_module, png = (
        need(f"PIL.{n}") for n in ("Image", "ImageDraw", "ImageFont", "PngImagePlugin")
    )
    top = top_of([p for row in rows for p in row], scale)
    factor, size = _enlarged(picture.size)
    small = font_module.load_default(size=_FONT - 1)
    font = font_module.load_default(size=_FONT)
    large = font_module.load_default(size=_FONT + 3)
    ruler = draw_module.Draw(image_module.new("RGB", (1, 1)))
    lines = _wrapped(ruler, title, large, size[0] * (1 + len(rows[0])))
    columns = 1 + max(len(row) for row in rows)
    head, below = _MARGIN + len(lines) * (_FONT + 9), 2 * (_FONT + 6) + 6
    width = 2 * _MARGIN + columns * size[0] + (columns - 1) * _GAP + 96
    page = image_module.new("RGB", (width, head + len(rows) * (size[1] + below + _GAP) + _MARGIN // 2), PAPER)
    pen = draw_module.Draw(page)
    for i, line in enumerate(lines):
        pen.text((_MARGIN, _MARGIN // 2 + i * (_FONT + 9)), line, fill=INK, font=large)
    pixels = np.asarray(picture.convert("RGB"))
    original = picture.convert("RGB").resize(size, image_module.Resampling.NEAREST if factor >= 2 else 1)
    for r, row in enumerate(rows):
        y = head + r * (size[1] + below + _GAP)
        shown = [(original, "picture", f"{picture.size[0]}x{picture.size[1]} pixels")]
        for panel in row:
            made = image_module.fromarray(blend(pixels, panel.heat, top))
            shown.append(
                (made.resize(size, image_module.Resampling.NEAREST if factor >= 2 else 1), panel.title, panel.caption)
            )
        for c, (tile, name, caption) in enumerate(shown):
            x = _MARGIN + c * (size[0] + _GAP)
            page.paste(tile, (x, y))
            for i, (label, box) in enumerate(boxes):
                colour = _BOX_COLOURS[i % len(_BOX_COLOURS)]
                corners = [x + box[0] * factor, y + box[1] * factor, x + box[2] * factor, y + box[3] * factor]
                pen.rectangle(corners, outline=colour, width=2)
                if c == 0:
                    _label(pen, label, corners, small, colour, (x, y, x + size[0], y + size[1]))
            pen.text((x, y + size[1] + 5), name, fill=INK, font=font)
            pen.text((x, y + size[1] + 5 + _FONT + 5), caption, fill=_MUTED, font=small)
        if r == 0:
            _bar(page, pen, small, (_MARGIN + columns * (size[0] + _GAP), y, size[1]), top, rows, scale)
    info = png.PngInfo()
    info.add_text("surgery", json.dumps(dict(spec or {}), sort_keys=True))
    buffer = BytesIO()
    page.save(buffer, format="PNG", pnginfo=info)
    return write(path, buffer)


def _enlarged(size: tuple[int, int]) -> tuple[float, tuple[int, int]]:
    """How much the picture is enlarged (a whole number) or shrunk, and its size then."""
    longer = max(size)
    factor: float = max(1, round(_SIDE / longer)) if longer <= _LARGEST else _LARGEST / longer
    return factor, (round(size[0] * factor), round(size[1] * factor))


def _label(pen: Any, text: str, corners: Sequence[float], font: Any, colour: Any, frame: Sequence[int]) -> None:
    """The name of a box beside it, inside the frame."""
    _, _, w, h = pen.textbbox((0, 0), text, font=font)
    x = min(max(corners[0], frame[0]), frame[2] - w - 4)
    y = corners[1] - h - 5 if corners[1] - h - 5 >= frame[1] else corners[3] + 2
    pen.rectangle((x, y, x + w + 5, y + h + 3), fill=colour)
    pen.text((x + 3, y), text, fill=(255, 255, 255), font=font)


def _bar(page: Any, pen: Any, font: Any, at: tuple[int, int, int], top: float, rows: Any, scale: str) -> None:
    """The colour bar: attention that a token's worth of area gets, in percent of the row."""
    image_module = need("PIL.Image")
    x, y, height = at
    ramp = colours(np.linspace(1, 0, height)[:, None].repeat(16, 1))
    page.paste(image_module.fromarray(np.rint(ramp).astype(np.uint8)), (x, y))
    area = rows[0][0].heat.size
    for share in (1.0, 0.5, 0.0):
        text = f"{top * share * area:.2g}x" + ("+" if share == 1.0 and scale == "p99" else "")
        pen.text((x + 22, y + round((1 - share) * (height - 1))), text, fill=INK, font=font, anchor="lm")
    pen.multiline_text((x, y + height + 14), "1x: all\nspread evenly", fill=_MUTED, font=font)


def _wrapped(ruler: Any, text: str, font: Any, width: int) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and ruler.textlength(longer, font=font) > width:
            lines.append(line)
            longer = word
        line = longer
    return [*lines, line]
