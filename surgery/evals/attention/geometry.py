"""Which part of a picture each image token stands for, per family of models, in pixels of the original picture.

A processor resizes, crops, pads and tiles; a model then drops class tokens, merges neighbours and adds newline tokens.
Here both are followed backwards. Families differ in the layout of one picture's tokens, a short list of rectangular
grids in the order of the prompt; everything else is shared.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import CheckpointError, UsageError

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Part:
    """A grid of tokens in the order of the prompt: `skip` tokens that stand for no place, then rows x cols of them, a
    row-end token after each row if `newline`, and `after` more that stand for no place. `box` is what the grid covers
    of the original picture; it can reach over its edge, where the processor padded."""

    rows: int
    cols: int
    box: Box
    label: str = "picture"
    newline: bool = False
    skip: int = 0
    after: int = 0

    @property
    def tokens(self) -> int:
        """How many image tokens the part takes."""
        return self.skip + self.rows * (self.cols + self.newline) + self.after


@dataclass(frozen=True, eq=False)
class Grid:
    """A part with its positions in a prompt: `keys` [rows, cols]."""

    keys: NDArray[np.int64]
    box: Box
    label: str

    def cell(self, row: int, col: int) -> Box:
        """The box of one token."""
        left, top, right, bottom = self.box
        rows, cols = self.keys.shape
        w, h = (right - left) / cols, (bottom - top) / rows
        return (left + col * w, top + row * h, left + (col + 1) * w, top + (row + 1) * h)


@dataclass(frozen=True, eq=False)
class Picture:
    """Where one picture's tokens are: its `size` (width, height), its grids, and `seen`, the part of it that reaches
    the model at all (center crops leave out the edges)."""

    size: tuple[int, int]
    grids: tuple[Grid, ...]
    seen: Box

    @property
    def keys(self) -> NDArray[np.int64]:
        """All positions that stand for a place."""
        return np.concatenate([g.keys.reshape(-1) for g in self.grids])


def pictures(
    config: Any, processor: Any, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]], row: int = 0
) -> list[Picture]:
    """The pictures of one prompt: `inputs` are the model's (`input_ids` [B, S], prompt `row`), `sizes` the (width,
    height) of the original pictures of that prompt, in order. `config` is the model's, `processor` its processor or
    image processor. With several prompts in a batch each must hold equally many pictures.

    Raises CheckpointError for families that are not known, UsageError when the prompt holds other numbers of image
    tokens than the layout of these pictures.
    """
    images = getattr(processor, "image_processor", processor)
    where = (inputs["input_ids"][row].cpu() == config.image_token_id).nonzero().flatten().numpy()
    said = [k for k in ("image_grid_thw", "image_sizes") if k in inputs]
    found = []
    for i, size in enumerate(sizes, row * len(sizes)):
        found.append(layout(config, images, size, {k: inputs[k][i] for k in said}, alone=len(sizes) == 1))
    expected = sum(part.tokens for parts, _ in found for part in parts)
    if expected != len(where):
        shown = ", ".join(f"{w}x{h}" for w, h in sizes)
        raise UsageError(
            "geometry",
            f"the prompt has {len(where)} image tokens; pictures of {shown} make {expected}",
            hint="processor and model must belong together, and the pictures be those of the prompt",
        )
    out: list[Picture] = []
    at = 0
    for size, (parts, seen) in zip(sizes, found, strict=True):
        grids = []
        for part in parts:
            width = part.cols + part.newline
            start = at + part.skip
            keys = where[start : start + part.rows * width].reshape(part.rows, width)[:, : part.cols]
            grids.append(Grid(keys.astype(np.int64), part.box, part.label))
            at += part.tokens
        out.append(Picture(size, tuple(grids), seen))
    return out


def layout(
    config: Any, images: Any, size: tuple[int, int], entry: Mapping[str, Any], *, alone: bool = True
) -> tuple[list[Part], Box]:
    """(parts, what is seen) of one picture of `size` (width, height). `entry` holds what the processor said about it
    (`image_grid_thw`, `image_sizes`); `alone`: it is the only one of its prompt."""
    kind = config.model_type
    rule = _LAYOUTS.get(kind)
    if rule is None:
        raise CheckpointError(
            "geometry",
            f"{kind}: where its image tokens lie in a picture is not known",
            hint=f"known: {', '.join(sorted(_LAYOUTS))}",
        )
    whole = (0.0, 0.0, float(size[0]), float(size[1]))
    found = rule(config, images, size, entry, alone)
    return found if isinstance(found, tuple) else (found, whole)


def _pair(size: Any) -> tuple[int, int]:
    """(height, width) of a size given as a number, a pair or a mapping."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, Sequence):
        return int(size[0]), int(size[1])
    get = size.get if isinstance(size, Mapping) else lambda k, d=None: getattr(size, k, d)
    if get("height") is not None:
        return int(get("height")), int(get("width"))
    edge = get("shortest_edge") or get("longest_edge")
    return int(edge), int(edge)


def _get(size: Any, name: str) -> Any:
    return size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)


def _whole(size: tuple[int, int]) -> Box:
    return (0.0, 0.0, float(size[0]), float(size[1]))


def _llava(config: Any, images: Any, size: tuple[int, int], entry: Any, alone: bool) -> tuple[list[Part], Box]:
    """One square grid behind a resize and, for CLIP, a center crop; the class token is dropped or comes first."""
    vision = config.vision_config
    if vision.model_type == "pixtral":
        return _pixtral(config, images, size, entry, alone), _whole(size)
    width, height = size
    box = _whole(size)
    if images.do_center_crop and images.do_resize and _get(images.size, "shortest_edge"):
        edge = int(_get(images.size, "shortest_edge"))
        # The longer side is cut to a whole number of pixels, as the resize does.
        w, h = (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)
        crop_h, crop_w = _pair(images.crop_size)
        left, top = (w - crop_w) // 2, (h - crop_h) // 2
        box = tuple(  # type: ignore[assignment]
            v * scale
            for v, scale in zip(
                (left, top, left + crop_w, top + crop_h), (width / w, height / h, width / w, height / h), strict=True
            )
        )
    elif images.do_center_crop and not images.do_resize:
        crop_h, crop_w = _pair(images.crop_size)
        left, top = (width - crop_w) // 2, (height - crop_h) // 2
        box = (float(left), float(top), float(left + crop_w), float(top + crop_h))
    side_h, side_w = _pair(images.crop_size) if images.do_center_crop else _pair(images.size)
    skip = int(getattr(config, "vision_feature_select_strategy", "default") == "full" and "clip" in vision.model_type)
    parts = [Part(side_h // vision.patch_size, side_w // vision.patch_size, box, skip=skip)]
    return parts, (max(0.0, box[0]), max(0.0, box[1]), min(width, box[2]), min(height, box[3]))


def _anyres(config: Any, images: Any, size: tuple[int, int], entry: Any, alone: bool) -> list[Part]:
    """LLaVA-NeXT and OneVision: the whole picture squeezed into one grid, then a grid over all tiles without their
    padding, a newline token ending each of its rows."""
    from transformers.image_processing_utils import select_best_resolution

    patch, (tile, _) = config.vision_config.patch_size, _pair(images.size)
    side = tile // patch
    base = Part(side, side, _whole(size), "overview")
    onevision = config.model_type == "llava_onevision"
    if onevision and not alone:
        return [Part(side, side, _whole(size), "overview", after=1)]
    width, height = size
    best_h, best_w = select_best_resolution((height, width), images.image_grid_pinpoints)
    rows, cols = best_h // tile * side, best_w // tile * side
    scale = min(best_w / width, best_h / height)
    # The tiles' canvas holds the resized picture in its middle; rows and columns of padding alone are taken off.
    new_w, new_h = min(math.ceil(width * scale), best_w), min(math.ceil(height * scale), best_h)
    pad_rows = pad_cols = 0
    if width / height > cols / rows:
        pad_rows = (rows - int(round(height * (cols / width), 7))) // 2
    else:
        pad_cols = (cols - int(round(width * (rows / height), 7))) // 2
    at_x, at_y = (best_w - new_w) // 2, (best_h - new_h) // 2
    scale_x, scale_y = width / new_w, height / new_h
    box = (
        (pad_cols * patch - at_x) * scale_x,
        (pad_rows * patch - at_y) * scale_y,
        ((cols - pad_cols) * patch - at_x) * scale_x,
        ((rows - pad_rows) * patch - at_y) * scale_y,
    )
    rows, cols = rows - 2 * pad_rows, cols - 2 * pad_cols
    if onevision:
        most = int(str(getattr(config, "vision_aspect_ratio", "anyres_max_9")).removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * cols / (most * side**2))
        if ratio > 1.1:  # too many tokens: the model shrinks the grid
            rows, cols = int(rows // ratio), int(cols // ratio)
    return [base, Part(rows, cols, box, "tiles", newline=True)]


def _grid_thw(config: Any, images: Any, size: tuple[int, int], entry: Any, alone: bool) -> list[Part]:
    """Qwen-VL and GLM-4V: the picture resized without a crop, merged merge x merge."""
    _, rows, cols = (int(v) for v in entry["image_grid_thw"])
    merge = config.vision_config.spatial_merge_size
    return [Part(rows // merge, cols // merge, _whole(size))]


def _idefics(config: Any, images: Any, size: tuple[int, int], entry: Any, alone: bool) -> list[Part]:
    """Idefics3 and SmolVLM: tiles row by row, then the whole picture; each is side x side tokens."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size // config.scale_factor
    rows = cols = 0
    if images.do_image_splitting:
        _, rows, cols = images.get_number_of_image_patches(size[1], size[0])
    return [*_tiles(size, rows, cols, side), Part(side, side, _whole(size), "overview")]


def _canvas(config: Any, images: Any, size: tuple[int, int], entry: Any, alone: bool) -> list[Part]:
    """InternVL and Aya Vision: tiles row by row of the canvas of the nearest shape, then a thumbnail."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    vision = config.vision_config
    tile, patch = _pair(vision.image_size)[0], _pair(vision.patch_size)[0]
    shrink = config.downsample_ratio if hasattr(config, "downsample_ratio") else 1 / config.downsample_factor
    side = round(tile // patch * shrink)
    cols, rows = 1, 1
    if images.crop_to_patches:
        cols, rows = get_optimal_tiled_canvas(
            (size[1], size[0]), _pair(images.size), images.min_patches, images.max_patches
        )
    if rows * cols == 1:
        return [Part(side, side, _whole(size))]
    return [*_tiles(size, rows, cols, side), Part(side, side, _whole(size), "overview")]


def _tiles(size: tuple[int, int], rows: int, cols: int, side: int) -> list[Part]:
    w, h = size[0] / max(1, cols), size[1] / max(1, rows)
    return [
        Part(side, side, (c * w, r * h, (c + 1) * w, (r + 1) * h), f"tile {r + 1},{c + 1}")
        for r in range(rows)
        for c in range(cols)
    ]


def _gemma3(config: Any, images: Any, size: tuple[int, int], entry: Any, alone: bool) -> list[Part]:
    """The picture resized without a crop and pooled; crops of long pictures follow if pan-and-scan is on."""
    side = math.isqrt(config.mm_tokens_per_image)
    parts = [Part(side, side, _whole(size), "overview")]
    if images.do_pan_and_scan:
        width, height = size
        crops = images.pan_and_scan(
            np.zeros((1, height, width), dtype=np.uint8),
            images.pan_and_scan_min_crop_size,
            images.pan_and_scan_max_num_crops,
            images.pan_and_scan_min_ratio_to_activate,
        )
        long = max(width, height)
        step = math.ceil(long / max(1, len(crops)))
        for i in range(len(crops)):
            start, stop = i * step, min(long, (i + 1) * step)
            box = (start, 0, stop, height) if width >= height else (0, start, width, stop)
            parts.append(Part(side, side, tuple(map(float, box)), f"crop {i + 1}"))  # type: ignore[arg-type]
    return parts


def _paligemma(config: Any, images: Any, size: tuple[int, int], entry: Any, alone: bool) -> list[Part]:
    side_h, side_w = _pair(images.size)
    patch = config.vision_config.patch_size
    return [Part(side_h // patch, side_w // patch, _whole(size))]


def _pixtral(config: Any, images: Any, size: tuple[int, int], entry: Any, alone: bool) -> list[Part]:
    """Mistral 3: the picture resized without a crop; the tokens that end rows have another id and are no image tokens.

    A row of half a patch at the edge is dropped with the merge."""
    height, width = (int(v) for v in entry["image_sizes"])
    patch = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    rows, cols = height // patch, width // patch
    box = (0.0, 0.0, size[0] * cols * patch / width, size[1] * rows * patch / height)
    return [Part(rows, cols, box)]


_LAYOUTS = {
    "llava": _llava,
    "vipllava": _llava,
    "llava_next": _anyres,
    "llava_onevision": _anyres,
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"), _grid_thw),
    **dict.fromkeys(("idefics3", "smolvlm"), _idefics),
    **dict.fromkeys(("internvl", "aya_vision"), _canvas),
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "mistral3": _pixtral,
}
