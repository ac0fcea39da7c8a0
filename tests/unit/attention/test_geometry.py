"""Where image tokens lie, against the real processors and models of each family.

A patch of the picture is painted over, and the picture goes through the family's own image processor and vision model,
whose attention is switched off so that a token depends on its own pixels alone. The tokens that change must be those
whose boxes hold the paint, and none that are far from it.
"""

import importlib
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_vlms import FAMILIES, IMAGE

from surgery.errors import CheckpointError, UsageError
from surgery.evals.attention.geometry import pictures

SQUARE = {"height": 16, "width": 16}
PINPOINTS = [[16, 16], [16, 32], [32, 16], [32, 32]]
QWEN = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 1}
CROPS = {
    "do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16, "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}  # fmt: skip
# family -> (package, class, settings of its image processor)
PROCESSORS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llava": ("clip", "CLIP", {"size": {"shortest_edge": 16}, "crop_size": SQUARE}),
    "llava_next": ("llava_next", "LlavaNext", {"size": {"shortest_edge": 16}, "crop_size": SQUARE,
                                               "image_grid_pinpoints": PINPOINTS}),
    "llava_onevision": ("llava_onevision", "LlavaOnevision", {"size": SQUARE, "image_grid_pinpoints": PINPOINTS}),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), ("qwen2_vl", "Qwen2VL",
                                                               {**QWEN, "min_pixels": 64, "max_pixels": 4096})),
    "glm4v": ("glm4v", "Glm4v", {**QWEN, "size": {"shortest_edge": 64, "longest_edge": 4096}}),
    "smolvlm": ("smolvlm", "SmolVLM", {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 16}}),
    "idefics3": ("idefics3", "Idefics3", {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 16}}),
    **dict.fromkeys(("internvl", "aya_vision"), ("got_ocr2", "GotOcr2",
                                                  {"size": SQUARE, "crop_to_patches": True, "max_patches": 6})),
    "gemma3": ("gemma3", "Gemma3", {"size": SQUARE, **CROPS}),
    "paligemma": ("siglip", "Siglip", {"size": SQUARE}),
    "mistral3": ("pixtral", "Pixtral", {"size": {"longest_edge": 64}, "patch_size": {"height": 8, "width": 8}}),
}  # fmt: skip
PASSED = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask")


@cache
def family(name: str) -> tuple[Any, Any]:
    """(model, image processor): one vision layer whose attention adds nothing."""
    kind, config_kind, settings, *_ = FAMILIES[name]
    values = settings()
    vision = {k: 1 if k in ("num_hidden_layers", "depth") else v for k, v in values["vision_config"].items()}
    values |= {"vision_config": vision}
    values |= {"vision_feature_layer": -1} if name in ("llava", "llava_next") else {}
    if name.startswith("llava_"):
        values["image_grid_pinpoints"] = PINPOINTS
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config_kind)(**values)).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            ends = ("out_proj.weight", "o_proj.weight", "attn.proj.weight", "attention.projection_layer.weight")
            if ("vision" in path or "visual" in path) and path.endswith(ends):
                parameter.zero_()
            if path.endswith("mm_input_projection_weight"):
                parameter.normal_()
    package, stem, options = PROCESSORS[name]
    module = importlib.import_module(f"transformers.models.{package}.image_processing_pil_{package}")
    return model, getattr(module, f"{stem}ImageProcessorPil")(**options)


@torch.no_grad()
def features(name: str, pixels: np.ndarray) -> tuple[torch.Tensor, Any]:
    """The vectors of all image tokens [n, D], in the order of the prompt, and what the processor made."""
    model, processor = family(name)
    made = processor(Image.fromarray(pixels), return_tensors="pt")
    found = model.get_image_features(**{k: v for k, v in made.items() if k in PASSED})
    found = getattr(found, "pooler_output", found)
    parts = found if isinstance(found, list | tuple) else [found]
    return torch.cat([p.reshape(-1, p.shape[-1]) for p in parts]), made


def located(name: str, made: Any, count: int, size: tuple[int, int]) -> Any:
    model, processor = family(name)
    inputs = {"input_ids": torch.tensor([[1, 2, *[IMAGE] * count, 3]]), **{k: made[k] for k in PASSED if k in made}}
    return pictures(model.config, processor, inputs, [size])[0]


@pytest.mark.parametrize("size", [(100, 60), (50, 90)], ids=["wide", "tall"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_tokens_that_see_a_patch_are_those_whose_boxes_hold_it(name: str, size: tuple[int, int]) -> None:
    width, height = size
    pixels = np.random.default_rng(0).integers(100, 156, (height, width, 3)).astype(np.uint8)
    before, made = features(name, pixels)
    picture = located(name, made, len(before), size)
    assert len(picture.keys) == len(set(picture.keys.tolist())) and picture.keys.min() >= 2
    for x, y in ((width * 0.15, height * 0.17), (width * 0.5, height * 0.5), (width * 0.85, height * 0.8)):
        painted = pixels.copy()
        painted[round(y) - 3 : round(y) + 3, round(x) - 3 : round(x) + 3] = 255
        after, _ = features(name, painted)
        changed = {2 + int(i) for i in (after - before).abs().amax(-1).gt(1e-6).nonzero()}
        left, top, right, bottom = picture.seen
        if left <= x < right and top <= y < bottom:
            assert changed & set(picture.keys.tolist())
        for grid in picture.grids:
            for r, c in np.ndindex(grid.keys.shape):
                l, t, rr, b = grid.cell(r, c)  # noqa: E741
                # Resizing spreads the paint over a neighbouring token, no further.
                far_x, far_y = 0.6 * (rr - l) + 6, 0.6 * (b - t) + 6
                key = int(grid.keys[r, c])
                if l <= x < rr and t <= y < b:
                    assert key in changed, (grid.label, r, c)
                elif not (l - far_x <= x < rr + far_x and t - far_y <= y < b + far_y):
                    assert key not in changed, (grid.label, r, c)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "internvl"])
def test_pictures_of_other_sizes_than_the_prompts_are_refused(name: str) -> None:
    pixels = np.zeros((60, 100, 3), dtype=np.uint8)
    _, made = features(name, pixels)
    with pytest.raises(UsageError, match="image tokens"):
        located(name, made, 3, (100, 60))


def test_two_pictures_of_a_prompt_take_their_own_tokens() -> None:
    model, processor = family("llava")
    inputs = {"input_ids": torch.tensor([[1, *[IMAGE] * 16, 2, *[IMAGE] * 16, 3]])}
    first, second = pictures(model.config, processor, inputs, [(100, 60), (60, 100)])
    assert (first.keys.tolist(), second.keys.tolist()) == (list(range(1, 17)), list(range(18, 34)))
    assert first.seen[0] > 0 == first.seen[1] and second.seen[1] > 0 == second.seen[0]


def test_families_that_are_not_known_are_refused() -> None:
    class Config:
        model_type = "janus"
        image_token_id = IMAGE

    with pytest.raises(CheckpointError, match="janus") as caught:
        pictures(Config(), None, {"input_ids": torch.tensor([[IMAGE]])}, [(10, 10)])
    assert "llava" in caught.value.hint
