"""Pictures of samples and of training: grids with a row per class, models side by side, curves on a log axis.

Pillow and matplotlib are imported when a picture is made. Every file appears whole or not at all, and OutputError or
ResourceError says why it cannot be written.
"""

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import ResourceError, UsageError
from surgery.store.writer import atomic_write

_CELL = 48  # pixels a small image is enlarged to
_GAP = 4
_MARGIN = 16
_TEXT = 15
INK, PAPER, _EMPTY = (40, 40, 48), (255, 255, 255), (238, 238, 242)
# Distinguishable with the common colour deficiencies (Okabe and Ito), darkest first on a white page.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#8a8a00")
_DASHES = ("-", "--", ":", "-.")


def to_uint8(images: Any) -> NDArray[np.uint8]:
    """Float [n, C, H, W] in [-1, 1] to uint8 [n, H, W, C] by clamp(127.5 x + 128, 0, 255), as DiT saves its samples."""
    x = np.asarray(images, dtype=np.float32)
    return np.ascontiguousarray(np.clip(127.5 * x + 128.0, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


# --- grids ------------------------------------------------------------------------------------------------------------


def grid(
    images: Any,
    path: str | Path,
    *,
    labels: Sequence[int] | NDArray[np.integer] | None = None,
    columns: int | None = None,
    names: Mapping[int, str] | None = None,
    title: str = "",
    scale: int | None = None,
) -> Path:
    """A PNG of images, uint8 [n, H, W, C] or float [n, C, H, W] in [-1, 1], C 1 or 3.

    With `labels` there is a row per class, the class (or its name in `names`) at its left, and up to `columns` images
    (default 10) in it; without, `columns` defaults to a square. Small images are enlarged by a whole number, `scale`,
    so that their pixels stay visible. Raises UsageError for other arrays, ResourceError without Pillow.
    """
    pixels = _pixels(images)
    if labels is None:
        width = columns or math.ceil(math.sqrt(len(pixels)))
        return _sheet([(title, [pixels[i : i + width] for i in range(0, len(pixels), width)], width)], [], path, scale)
    rows, captions = _by_class(pixels, labels, columns or 10, names)
    width = max(len(row) for row in rows)
    return _sheet([(title, rows, width)], captions, path, scale)


def side_by_side(
    columns: Mapping[str, Any],
    path: str | Path,
    *,
    labels: Sequence[int] | NDArray[np.integer],
    per_class: int = 4,
    names: Mapping[int, str] | None = None,
    scale: int | None = None,
) -> Path:
    """A PNG with one titled column per entry of `columns` (title, several lines allowed -> images) and a row per class.

    All entries hold images of the same `labels`, so that equal places show what different models made of the same noise
    and class; `per_class` of each class are shown. Raises like `grid`.
    """
    if not columns:
        raise UsageError("no-images", "no columns to show side by side")
    sheets: list[tuple[str, list[NDArray[np.uint8]], int]] = []
    captions: list[str] = []
    for title, images in columns.items():
        rows, captions = _by_class(_pixels(images), labels, per_class, names)
        sheets.append((title, rows, per_class))
    return _sheet(sheets, captions, path, scale)


def _pixels(images: Any) -> NDArray[np.uint8]:
    out = np.asarray(images.detach().cpu() if hasattr(images, "detach") else images)
    if out.ndim == 4 and np.issubdtype(out.dtype, np.floating):
        out = to_uint8(np.nan_to_num(out))
    if out.dtype != np.uint8 or out.ndim != 4 or out.shape[3] not in (1, 3) or len(out) == 0:
        raise UsageError(
            "bad-images",
            f"a picture of {out.dtype} {list(out.shape)} cannot be made",
            hint="pass at least one image, uint8 [n, H, W, 1 or 3] or float [n, 1 or 3, H, W]",
        )
    return out


def _by_class(
    pixels: NDArray[np.uint8], labels: Any, columns: int, names: Mapping[int, str] | None
) -> tuple[list[NDArray[np.uint8]], list[str]]:
    y = np.asarray(labels)
    if y.shape != (len(pixels),):
        raise UsageError("label-count", f"{list(y.shape)} labels for {len(pixels)} images", hint="give one per image")
    classes = [int(c) for c in np.unique(y)]
    return [pixels[y == c][:columns] for c in classes], [(names or {}).get(c, str(c)) for c in classes]


def _sheet(
    sheets: Sequence[tuple[str, Sequence[NDArray[np.uint8]], int]],
    captions: Sequence[str],
    path: str | Path,
    scale: int | None,
) -> Path:
    """Lay out (title, rows of images, images in a row) from left to right; `captions` stand left of the rows."""
    image_module, draw_module, font_module = (need(f"PIL.{name}") for name in ("Image", "ImageDraw", "ImageFont"))
    height, width = sheets[0][1][0].shape[1:3]
    factor = scale or max(1, round(_CELL / max(height, width)))
    cell_h, cell_w = height * factor, width * factor
    font = font_module.load_default(size=_TEXT)
    ruler = draw_module.Draw(image_module.new("RGB", (1, 1)))

    def extent(text: str) -> tuple[int, int]:
        box = ruler.multiline_textbbox((0, 0), text, font=font, align="center") if text else (0, 0, 0, 0)
        return math.ceil(box[2]), math.ceil(box[3])

    n_rows = max(len(rows) for _, rows, _ in sheets)
    body_widths = [count * (cell_w + _GAP) - _GAP for _, _, count in sheets]
    widths = [max(body, extent(title)[0]) for body, (title, _, _) in zip(body_widths, sheets, strict=True)]
    top = max(extent(title)[1] for title, _, _ in sheets)
    top += _MARGIN // 2 if top else 0
    left = max((extent(text)[0] for text in captions), default=0)
    left += _MARGIN // 2 if left else 0
    page_w = 2 * _MARGIN + left + sum(widths) + 2 * _MARGIN * (len(sheets) - 1)
    page_h = 2 * _MARGIN + top + n_rows * (cell_h + _GAP) - _GAP
    page = image_module.new("RGB", (page_w, page_h), PAPER)
    draw = draw_module.Draw(page)
    for r, text in enumerate(captions):
        middle = _MARGIN + top + r * (cell_h + _GAP) + cell_h // 2
        draw.text((_MARGIN + left - _MARGIN // 2, middle), text, fill=INK, font=font, anchor="rm")
    x0 = _MARGIN + left
    for (title, rows, count), body, full in zip(sheets, body_widths, widths, strict=True):
        if title:
            corner = (x0 + (full - extent(title)[0]) / 2, _MARGIN)
            draw.multiline_text(corner, title, fill=INK, font=font, align="center")
        for r, row in enumerate(rows):
            for c in range(count):
                x = x0 + (full - body) // 2 + c * (cell_w + _GAP)
                y = _MARGIN + top + r * (cell_h + _GAP)
                if c >= len(row):  # a class with fewer images than the widest row
                    if captions:
                        draw.rectangle((x, y, x + cell_w - 1, y + cell_h - 1), fill=_EMPTY)
                    continue
                pixels = row[c].repeat(factor, axis=0).repeat(factor, axis=1)
                if pixels.shape[2] == 1:
                    pixels = pixels.repeat(3, axis=2)
                page.paste(image_module.fromarray(np.ascontiguousarray(pixels)), (x, y))
        x0 += full + 2 * _MARGIN
    buffer = BytesIO()
    page.save(buffer, format="PNG")
    return write(path, buffer)


# --- curves -----------------------------------------------------------------------------------------------------------


def curves(
    series: Mapping[str, Iterable[tuple[float, float]]],
    path: str | Path,
    *,
    x_label: str = "step",
    y_label: str = "loss",
    title: str = "",
    log_y: bool = True,
    bands: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
    whole_x: bool = False,
) -> Path:
    """A PNG of named (x, y) series, y on a log axis. Values that the axis cannot show (not finite, or not positive on a
    log axis) are left out. `bands` shades (x, low, high) behind the series of the same name; `whole_x` labels x at
    whole numbers only. Raises UsageError when nothing remains to show, ResourceError without matplotlib.
    """
    shown: dict[str, list[tuple[float, float]]] = {}
    for name, points in series.items():
        kept = [(float(x), float(y)) for x, y in points if math.isfinite(y) and (y > 0 or not log_y)]
        if kept:
            shown[name] = kept
    if not shown:
        raise UsageError("no-curves", f"none of the {len(series)} series has a value to show")
    figure_module, canvas_module, ticker = (
        need(f"matplotlib.{name}") for name in ("figure", "backends.backend_agg", "ticker")
    )
    beside = len(shown) > 6
    figure = figure_module.Figure(figsize=(8.4 if beside else 7.0, 4.2), dpi=120, layout="constrained")
    canvas_module.FigureCanvasAgg(figure)  # drawn without pyplot, which keeps global state and may want a display
    axes = figure.add_subplot()
    for i, (name, points) in enumerate(shown.items()):
        style, colour = _DASHES[i // len(COLOURS) % len(_DASHES)], COLOURS[i % len(COLOURS)]
        mark = "o" if len(points) <= 12 else None
        axes.plot(
            *zip(*points, strict=True), style, color=colour, label=name, linewidth=1.6, marker=mark, markersize=3.5
        )
        if bands is not None and name in bands:
            axes.fill_between(*zip(*bands[name], strict=True), color=colour, alpha=0.13, linewidth=0)
    if whole_x:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    if log_y:
        axes.set_yscale("log")
        ys = [y for points in shown.values() for _, y in points]
        if max(ys) / min(ys) < 30:  # within a decade or so the log axis would carry one label or none
            near = max(ys) / min(ys) < 4
            axes.yaxis.set_major_locator(ticker.MaxNLocator(6) if near else ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
            axes.yaxis.set_minor_locator(ticker.NullLocator())
            axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if title:
        axes.set_title(title, fontsize=11)
    axes.grid(which="major", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if beside:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8.5)
    else:
        axes.legend(frameon=False, fontsize=9)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return write(path, buffer)


# --- heat maps --------------------------------------------------------------------------------------------------------


def heat_map(
    matrices: Mapping[str, Sequence[Sequence[float]]],
    path: str | Path,
    *,
    x_label: str = "",
    y_label: str = "",
    y_ticks: Sequence[str] = (),
) -> Path:
    """A PNG of titled matrices, up to three in a row, each on its own scale from zero. `y_ticks` names the rows. Raises
    UsageError when there is nothing to show, ResourceError without matplotlib."""
    if not matrices or any(not rows or not rows[0] for rows in matrices.values()):
        raise UsageError("no-matrix", "no matrix to show")
    figure_module, canvas_module = (need(f"matplotlib.{name}") for name in ("figure", "backends.backend_agg"))
    across = min(3, len(matrices))
    down = math.ceil(len(matrices) / across)
    tall = max(len(rows) / len(rows[0]) for rows in matrices.values())
    wide = 8.4 if across == 1 else 4.2
    figure = figure_module.Figure(
        figsize=(wide * across, min(40.0, down * max(2.0, 0.9 * wide * min(1.5, tall)))), dpi=120, layout="constrained"
    )
    canvas_module.FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False)
    for axes, item in zip(panels.flat, [*matrices.items(), *[None] * (across * down - len(matrices))], strict=True):
        if item is None:
            axes.set_axis_off()
            continue
        title, rows = item
        values = np.asarray(rows, dtype=float)
        shown = axes.imshow(values, cmap="viridis", vmin=0, aspect="auto", interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(x_label, fontsize=8)
        axes.set_ylabel(y_label, fontsize=8)
        axes.tick_params(labelsize=7)
        if y_ticks and len(y_ticks) <= 64:
            axes.set_yticks(range(len(y_ticks)), labels=list(y_ticks))
        figure.colorbar(shown, ax=axes, shrink=0.9)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return write(path, buffer)


def write(path: str | Path, buffer: BytesIO) -> Path:
    """Put a picture on disk, whole or not at all."""
    atomic_write(Path(path), buffer.getvalue())
    return Path(path)


def need(module: str) -> Any:
    """Import a module of Pillow or matplotlib; ResourceError says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"PIL": "Pillow"}.get(module.split(".")[0], module.split(".")[0])
        raise ResourceError(
            "missing-package",
            f"pictures need {package}, which is not installed",
            hint="install surgery with its extra 'images'",
        ) from error
