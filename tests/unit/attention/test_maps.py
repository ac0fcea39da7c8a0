"""Maps: the traced attention is the model's own, heat lies on the token's pixels, pictures say what they show."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from surgery.arch.language.load import Loaded, load
from surgery.data.spatial.items import Item
from surgery.data.spatial.make import make_scenes
from surgery.errors import UsageError
from surgery.evals.attention.geometry import Grid, Picture, pictures
from surgery.evals.attention.maps import density, look, mass, rows
from surgery.evals.attention.overlay import Panel, blend, colours, draw, top_of
from surgery.evals.spatial.evaluate import encode_items
from surgery.steering.patch import Patch
from surgery.store.names import open_named


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(open_named("llava-scenes"), attn="eager")


@pytest.fixture(scope="module")
def item(tmp_path_factory: pytest.TempPathFactory) -> Item:
    from surgery.data.spatial.items import read_items

    folder = tmp_path_factory.mktemp("map") / "s"
    make_scenes(folder, groups=2, val=0.5)
    return read_items(folder / "test.jsonl")[0]


def test_at_alpha_1_the_rows_are_the_models_own_attention(loaded: Loaded, item: Item) -> None:
    inputs = encode_items(loaded, [item])
    found = rows(loaded, inputs, 1.0)
    with torch.no_grad():
        own = loaded.model(**inputs, output_attentions=True).attentions
    for layer, weights in enumerate(own):
        np.testing.assert_allclose(found[layer, 0], weights[0, :, -1].numpy(), atol=2e-6)


def test_layers_that_are_not_steered_are_shown_too(loaded: Loaded, item: Item) -> None:
    inputs = encode_items(loaded, [item])
    plain, steered = rows(loaded, inputs, 1.0), rows(loaded, inputs, 3.0, Patch(layers="1"))
    assert steered.shape == plain.shape
    np.testing.assert_allclose(steered[0], plain[0], atol=1e-6)
    assert np.abs(steered[1] - plain[1]).max() > 0.01


def test_looks_hold_answer_confidence_and_heads(loaded: Loaded, item: Item) -> None:
    inputs = encode_items(loaded, [item])
    plain, sharp = look(loaded, inputs, [1.0, 2.0])
    assert plain.answer in item.options and 0 < plain.confidence <= 1 and sharp.alpha == 2.0
    assert plain.heads(0).sum() == pytest.approx(1, abs=1e-5)
    assert (plain.heads(0, "max") >= plain.heads(0, "1")).all()
    with pytest.raises(UsageError, match="0-3"):
        plain.heads(0, "9")


def test_a_hot_token_lands_on_its_pixels_and_nowhere_else(loaded: Loaded, item: Item) -> None:
    """A wide picture is cropped in the middle: the 8th token is the second of the second row of what is left."""
    wide = (160, 96)
    inputs = encode_items(loaded, [item])
    where = pictures(loaded.model.config, loaded.processor, inputs, [wide])[0]
    weights = np.zeros(inputs["input_ids"].shape[1], dtype=np.float32)
    weights[7] = 1.0
    heat = density(where, weights)
    y, x = np.nonzero(np.nan_to_num(heat))
    assert (x.min(), x.max(), y.min(), y.max()) == (32 + 16, 32 + 31, 16, 31)
    assert np.nansum(heat) == pytest.approx(1.0)
    assert np.isnan(heat[:, :32]).all() and np.isnan(heat[:, 128:]).all() and not np.isnan(heat[:, 32:128]).any()
    smooth = density(where, weights, smooth=True)
    assert np.unravel_index(np.nanargmax(smooth), smooth.shape)[1] in range(32 + 16, 32 + 32)


def test_grids_that_overlap_add_up_to_the_mass() -> None:
    keys = np.arange(5)
    picture = Picture(
        (20, 10),
        (Grid(keys[:1].reshape(1, 1), (0, 0, 20, 10), "overview"), Grid(keys[1:].reshape(2, 2), (0, 0, 20, 10), "t")),
        (0, 0, 20, 10),
    )
    weights = np.array([0.2, 0.1, 0.0, 0.3, 0.0], dtype=np.float32)
    heat = density(picture, weights)
    assert heat.sum() == pytest.approx(0.6, abs=1e-6) and mass(weights, picture.keys) == pytest.approx(0.6)
    assert heat[0, 0] == pytest.approx(0.2 / 200 + 0.1 / 50) and heat[0, 15] == pytest.approx(0.2 / 200)


def test_colours_run_from_dark_to_light() -> None:
    ramp = colours(np.linspace(0, 1, 50)).sum(-1)
    assert (np.diff(ramp) > 0).all() and np.array_equal(colours(np.array([2.0])), colours(np.array([1.0])))


def test_what_is_not_seen_is_hatched_and_heat_is_bright() -> None:
    picture = np.full((40, 40, 3), 120, dtype=np.uint8)
    heat = np.zeros((40, 40))
    heat[:, :10] = np.nan
    heat[:, 30:] = 1.0
    out = blend(picture, heat, 1.0).astype(int)
    assert out[:, 30:].mean() > out[:, 10:30].mean() + 40
    assert len(np.unique(out[:, :10])) == 2 and len(np.unique(out[:, 10:30, 0])) == 1


def test_one_scale_holds_for_all_panels() -> None:
    panels = [Panel(np.full((2, 2), v), "") for v in (0.1, 0.4)]
    assert top_of(panels, "raw") == 0.4 and 0.1 < top_of(panels, "p99") <= 0.4
    assert top_of([Panel(np.full((2, 2), np.nan), "")], "raw") == 1.0
    with pytest.raises(UsageError):
        top_of(panels, "log")


def test_the_png_carries_what_it_shows(tmp_path: Path) -> None:
    path = draw(
        Image.new("RGB", (30, 20)), [[Panel(np.ones((20, 30)), "a")]], tmp_path / "x.png", title="Where? " * 40,
        boxes=[("cup", (1, 2, 9, 9))], spec={"alphas": [1.0]},
    )  # fmt: skip
    with Image.open(path) as made:
        assert json.loads(made.text["surgery"]) == {"alphas": [1.0]} and made.size[0] > 700


def test_the_command_draws_and_saves(command: Callable, item: Item, tmp_path: Path) -> None:
    line = ("adaptvis", "map", "llava-scenes", item.images[0], item.question, "-o", "heat.png")
    done = command(*line, "--side-by-side", "--npy", "raw.npy", "--layer", "all", "--json")
    assert done.code == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["alphas"] == [1.0, 0.5, 2.0] and out["layers"] == [0, 1, 2]
    raw = np.load(tmp_path / "raw.npy")
    assert raw.shape[:3] == (3, 3, 4) and raw[0].sum(-1) == pytest.approx(1, abs=1e-4)
    assert command(*line).code == 4
    blind = command(*line[:-1], "blind.png", "--side-by-side", "--mode", "knock-out", "-l", "0", "--json")
    plain, knocked = json.loads(blind.stdout)["looks"]
    assert plain["mass"][0] > 0.1 and knocked["mass"][0] < 1e-6 and knocked["shown"] == "without sight of it"
    for words, said in ((("--layer", "7"), "valid: 0-2"), (("--head", "x"), "not one"), (("--scale", "log"), "unknown"),
                        (("--alpha", "-2"), "--alpha -2"), (("--box", "cup:1,2"), "--box")):  # fmt: skip
        wrong = command(*line[:-1], "other.png", *words)
        assert wrong.code == 2 and said in wrong.stderr, wrong.stderr
    assert command(*line[:3], "none.png", "Where?", "-o", "other.png").code == 3
    assert not (tmp_path / "other.png").exists()
