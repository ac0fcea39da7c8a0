"""How much of the attention on a picture lies on the things that are asked about.

Axes: K tokens of one picture, in the order of `Picture.keys`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from surgery.evals.attention.geometry import Box, Picture

Array = NDArray[np.float64]


def covered(picture: Picture, boxes: Sequence[Box]) -> Array:
    """[K]: the share of each token's box that the union of `boxes` covers, exactly."""
    xs = np.unique([v for b in boxes for v in (b[0], b[2])])
    ys = np.unique([v for b in boxes for v in (b[1], b[3])])
    # The union as cells of the lines that all edges draw, each wholly inside or outside.
    inside = np.zeros((len(ys) - 1, len(xs) - 1), dtype=bool)
    for left, top, right, bottom in boxes:
        columns = (xs[:-1] >= left) & (xs[1:] <= right)
        lines = (ys[:-1] >= top) & (ys[1:] <= bottom)
        inside |= lines[:, None] & columns[None]
    found = []
    for grid in picture.grids:
        rows, cols = grid.keys.shape
        left, top, right, bottom = grid.box
        x, y = np.linspace(left, right, cols + 1), np.linspace(top, bottom, rows + 1)
        along_x, along_y = _shared(x, xs), _shared(y, ys)  # [cols, xs - 1], [rows, ys - 1]
        area = (right - left) * (bottom - top) / (rows * cols)
        found.append((along_y @ inside @ along_x.T / area).reshape(-1))
    return np.clip(np.concatenate(found), 0, 1)


def cosine(attention: Array, cover: Array) -> float:
    """The cosine of attention [K] and coverage [K]; 0 where one of them is nothing."""
    size = float(np.linalg.norm(attention) * np.linalg.norm(cover))
    return float(attention @ cover) / size if size > 0 else 0.0


def inside_share(attention: Array, cover: Array) -> float:
    """The share of the attention on the picture that lies on the covered area."""
    total = float(attention.sum())
    return float(attention @ cover) / total if total > 0 else 0.0


def _shared(edges: Array, others: Array) -> Array:
    """How long each interval of `edges` overlaps each of `others`: [n - 1, m - 1]."""
    low = np.maximum(edges[:-1, None], others[None, :-1])
    high = np.minimum(edges[1:, None], others[None, 1:])
    return np.clip(high - low, 0, None)
