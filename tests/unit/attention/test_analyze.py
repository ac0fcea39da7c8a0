"""The analysis against plain definitions, and its files."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from surgery.arch.language.load import Loaded, load
from surgery.data.spatial.items import Item, read_items
from surgery.data.spatial.make import make_scenes
from surgery.evals.attention.analyze import analyze, per_layer_csv
from surgery.evals.attention.charts import analysis
from surgery.evals.attention.geometry import Grid, Picture
from surgery.evals.attention.overlap import cosine, covered, inside_share
from surgery.evals.spatial.evaluate import Asking, encode_items
from surgery.store.names import open_named


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("analysis") / "s"
    make_scenes(folder, groups=4, val=0.25, seed=5)
    return folder / "test.jsonl"


@pytest.fixture(scope="module")
def items(data: Path) -> list[Item]:
    return read_items(data)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(open_named("llava-scenes"), attn="eager")


@pytest.fixture(scope="module")
def result(loaded: Loaded, items: list[Item]) -> dict:
    return analyze(loaded, items, Asking(batch=5), window=2)


@pytest.mark.parametrize("seed", range(4))
def test_coverage_equals_counting_fine_points(seed: int) -> None:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 30, (3, 2))
    boxes = [(x, y, x + w, y + h) for (x, y), (w, h) in zip(corners, rng.uniform(4, 20, (3, 2)), strict=True)]
    picture = Picture((40, 40), (Grid(np.arange(12).reshape(3, 4), (-4, 2, 44, 38), "g"),), (0, 0, 40, 40))
    fine = np.stack(np.meshgrid(np.arange(-4, 44, 0.05) + 0.025, np.arange(2, 38, 0.05) + 0.025), -1)
    inside = np.zeros(fine.shape[:2], dtype=bool)
    for left, top, right, bottom in boxes:
        inside |= (fine[..., 0] > left) & (fine[..., 0] < right) & (fine[..., 1] > top) & (fine[..., 1] < bottom)
    counted = [inside[r * 240 : (r + 1) * 240, c * 240 : (c + 1) * 240].mean() for r in range(3) for c in range(4)]
    np.testing.assert_allclose(covered(picture, boxes), counted, atol=0.01)


def test_scores_of_overlap_on_plain_numbers() -> None:
    cover = np.array([1.0, 0.5, 0.0, 0.0])
    assert inside_share(np.array([0.2, 0.2, 0.1, 0.0]), cover) == pytest.approx(0.3 / 0.5)
    assert cosine(cover * 3, cover) == pytest.approx(1) and cosine(np.zeros(4), cover) == 0 == inside_share(
        np.zeros(4), cover
    )


def test_mass_and_entropy_are_those_of_the_models_attention(loaded: Loaded, items: list[Item], result: dict) -> None:
    mass, entropy = np.zeros(3), np.zeros(3)
    for item in items:
        inputs = encode_items(loaded, [item])
        with torch.no_grad():
            attentions = loaded.model(**inputs, output_attentions=True).attentions
        image = inputs["input_ids"][0] == loaded.model.config.image_token_id
        for layer, weights in enumerate(attentions):
            on = weights[0, :, -1, image].double()
            mass[layer] += float(on.sum(-1).mean()) / len(items)
            p = on / on.sum(-1, keepdim=True)
            entropy[layer] += float(-(p * p.log()).sum(-1).mean()) / np.log(36) / len(items)
    for layer, row in enumerate(result["layers"]):
        assert row["image_mass"] == pytest.approx(mass[layer], abs=1e-5)
        assert row["entropy"] == pytest.approx(entropy[layer], abs=1e-5)
        assert row["image_share_of_tokens"] == pytest.approx(36 / 45)


def test_knocked_out_layers_see_no_picture(loaded: Loaded, items: list[Item], result: dict) -> None:
    """The last row's mask without the image, in the layers of the window, in a forward of our own."""
    window = next(row for row in result["flow"] if row["rows"] == "last" and row["layers"] == [0, 1])
    found = []
    for item in items:
        inputs = encode_items(loaded, [item])
        image = (inputs["input_ids"][0] == loaded.model.config.image_token_id).nonzero().flatten()
        hooks = []
        for layer in loaded.model.get_decoder().layers[:2]:

            def blind(module, args, kwargs, image=image):
                size = args[0].shape[1] if args else kwargs["hidden_states"].shape[1]
                mask = torch.full((size, size), torch.finfo(torch.float32).min).triu(1)
                mask[-1, image] = torch.finfo(torch.float32).min
                return args, kwargs | {"attention_mask": mask[None, None]}

            hooks.append(layer.self_attn.register_forward_pre_hook(blind, with_kwargs=True))
        with torch.no_grad():
            p = torch.softmax(loaded.model(**inputs).logits[0, -1], -1)
        for hook in hooks:
            hook.remove()
        found.append(float(p[loaded.tokenizer(item.answer)["input_ids"][0]]))
    assert window["after"] == pytest.approx(np.mean(found), abs=1e-5)
    assert window["drop"] == pytest.approx(window["before"] - window["after"])
    assert window["interval"][0] <= window["drop"] <= window["interval"][1]


def test_the_report_is_json_and_a_line_a_layer(result: dict, tmp_path: Path) -> None:
    assert json.loads(json.dumps(result)) == result and result["with_boxes"] == result["n"] == 12
    lines = per_layer_csv(result).splitlines()
    assert len(lines) == 4 and lines[0].startswith("layer,image_mass") and lines[1].startswith("0,")
    assert len({line.count(",") for line in lines}) == 1
    with Image.open(analysis(result, tmp_path / "r.png", title="t")) as made:
        assert made.size[0] > 1000


def test_items_without_boxes_leave_the_overlap_open(loaded: Loaded, items: list[Item], tmp_path: Path) -> None:
    from dataclasses import replace

    bare = [replace(item, boxes=()) for item in items[:3]]
    out = analyze(loaded, bare, Asking(batch=3), knock_out=False)
    assert out["with_boxes"] == 0 and out["flow"] == [] and out["layers"][0]["cosine"] is None
    analysis(out, tmp_path / "bare.png")
    assert per_layer_csv(out).count("\n") == 4


def test_the_command_writes_all_three_files(command: Callable, data: Path, tmp_path: Path) -> None:
    line = ("adaptvis", "analyze", "llava-scenes", data, "--limit", "6", "--csv", "l.csv", "--plot", "r.png", "-o")
    done = command(*line, "r.json")
    assert done.code == 0 and "without sight" in done.stdout, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"l.csv", "r.png", "r.json"}
    again = command(*line, "other.json")
    assert again.code == 4 and "l.csv: is already there" in again.stderr
