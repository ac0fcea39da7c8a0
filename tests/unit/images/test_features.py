"""Extractors, the classifier behind one of them, and evaluations that carry their settings."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from surgery.arch.classifier import KIND, ClassifierConfig, build_classifier
from surgery.data.images import ImageSet, load_images
from surgery.errors import CheckpointError, UsageError
from surgery.evals.images import evaluate, features, metrics
from surgery.evals.images.sample import save_samples
from surgery.evals.pictures import to_uint8
from surgery.train.classifier import ClassifierSettings, TrainedClassifier, train_classifier

SETTINGS = {"sampler": "ddim", "steps": 20, "guidance": 1.0, "cfg_channels": "all", "spacing": "leading", "model": "m"}


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    pytest.importorskip("sklearn")
    return load_images("digits")


def save_classifier(folder: Path, trained: TrainedClassifier) -> Path:
    folder.mkdir()
    save_file(trained.state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(trained.config.to_mapping()))
    return folder


@pytest.fixture(scope="module")
def trained(digits: ImageSet) -> TrainedClassifier:
    return train_classifier(digits, ClassifierSettings(steps=120))


@pytest.fixture(scope="module")
def folder(trained: TrainedClassifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("clf") / "digits", trained)


# --- the classifier ---------------------------------------------------------------------------------------------------


def test_training_is_deterministic_and_leaves_the_global_generator_alone(digits: ImageSet) -> None:
    before = torch.get_rng_state()
    settings = ClassifierSettings(steps=4, batch=8)
    first, again = train_classifier(digits, settings), train_classifier(digits, settings)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first.state[name], again.state[name]) for name in first.state)
    other = train_classifier(digits, replace(settings, seed=1))
    assert not torch.equal(first.state["to_logits.weight"], other.state["to_logits.weight"])


def test_a_short_training_already_separates_the_digits(trained: TrainedClassifier) -> None:
    assert trained.accuracy >= 0.93


@pytest.mark.slow
def test_the_default_training_reaches_97_percent_on_held_out_digits(digits: ImageSet) -> None:
    events: list[float] = []
    trained = train_classifier(digits, report=lambda _, values: events.append(values["loss"]))
    assert trained.accuracy >= 0.97
    assert len(events) == ClassifierSettings().steps
    assert events[-1] < events[0] / 10


def test_the_default_classifier_is_small_and_gives_32_features() -> None:
    model = build_classifier({"kind": KIND, "channels": 1, "size": 8, "classes": 10, "features": 32, "width": 16})
    assert sum(p.numel() for p in model.parameters()) * 4 < 250_000
    model.initialise(torch.Generator().manual_seed(0))
    x = torch.zeros(3, 1, 8, 8)
    assert model.features(x).shape == (3, 32)
    assert model(x).shape == (3, 10)
    assert not model.training


@pytest.mark.parametrize("size", [4, 7, 28, 32])
def test_other_image_sizes_and_colours_fit(size: int) -> None:
    model = build_classifier(ClassifierConfig(3, size, 4))
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 4)


@pytest.mark.parametrize(
    "change", [{"kind": "other"}, {"size": 2}, {"classes": True}, {"features": "32"}, {"extra": 1}, {"width": None}]
)
def test_bad_configurations_are_refused(change: dict) -> None:
    with pytest.raises(CheckpointError):
        build_classifier({**ClassifierConfig(1, 8, 10).to_mapping(), **change})


def test_bad_settings_and_oblong_images_are_refused(digits: ImageSet) -> None:
    with pytest.raises(UsageError):
        train_classifier(digits, ClassifierSettings(steps=0))
    with pytest.raises(UsageError, match="8x6"):
        train_classifier(replace(digits, images=digits.images[:, :, :, :6]))


# --- extraction -------------------------------------------------------------------------------------------------------


def test_classifier_features_do_not_depend_on_the_batch_and_floats_equal_their_pixels(
    digits: ImageSet, folder: Path
) -> None:
    x = digits.val.images[:50]
    whole, probs = features.extract(x, f"classifier:{folder}")
    assert whole.shape == (50, 32)
    assert whole.dtype == np.float64
    assert probs is not None
    assert np.allclose(probs.sum(axis=1), 1)
    assert (probs.argmax(axis=1) == digits.val.labels[:50].numpy()).mean() > 0.9
    assert np.allclose(whole, features.extract(x, f"classifier:{folder}", batch=7)[0], atol=1e-4)
    assert np.array_equal(whole, features.extract(to_uint8(x), f"classifier:{folder}")[0])


def test_the_id_follows_the_weights_and_not_the_place(folder: Path, trained: TrainedClassifier, tmp_path: Path) -> None:
    one = features.open_extractor(f"classifier:{folder}").id
    assert one == features.open_extractor(f"classifier:{save_classifier(tmp_path / 'copy', trained)}").id
    changed = {**trained.state, "to_logits.bias": trained.state["to_logits.bias"] + 1e-3}
    other = save_classifier(tmp_path / "other", replace(trained, state=changed))
    assert one != features.open_extractor(f"classifier:{other}").id


def test_unusable_classifier_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json"):
        features.open_extractor(f"classifier:{tmp_path}")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError):
        features.open_extractor(f"classifier:{tmp_path}")
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "classes": 9}))
    with pytest.raises(CheckpointError, match="to_logits"):
        features.open_extractor(f"classifier:{tmp_path}")


def test_unknown_extractors_and_bad_images_are_refused(folder: Path) -> None:
    for spec, code in [("clasifier", "unknown-extractor"), ("inception", "no-inception"), ("npz", "npz-extractor")]:
        with pytest.raises(UsageError) as caught:
            features.open_extractor(spec)
        assert caught.value.code == f"usage.{code}"
    for bad in (
        np.zeros((2, 8, 8)),
        np.zeros((0, 8, 8, 1), np.uint8),
        np.full((1, 1, 8, 8), np.nan),
        np.zeros((2, 8, 8, 1), int),
    ):
        with pytest.raises(UsageError):
            features.extract(bad, f"classifier:{folder}")
    with pytest.raises(UsageError, match="8x8 images with 1 channel"):
        features.extract(np.zeros((1, 16, 16, 3), np.uint8), f"classifier:{folder}")


class Pooled(nn.Module):
    """2048 features that are sums of pixels, and logits."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = x.float().mean(dim=[1, 2, 3])
        return mean[:, None] * torch.ones(2048), mean[:, None] * torch.arange(3.0)


class Classic(nn.Module):
    """The calling convention of the widely used TorchScript conversion of the 2015 Inception graph."""

    def forward(self, x: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        mean = x.float().mean(dim=[1, 2, 3])
        if return_features:
            return mean[:, None] * torch.ones(2048)
        return torch.softmax(
            mean[:, None] * torch.ones(4) + (0.0 if no_output_bias else 1.0) * torch.arange(4.0), dim=1
        )


class Narrow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean(dim=[2, 3])


def test_inception_files_give_2048_features_and_grey_becomes_three_channels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size=(5, 6, 6, 1), dtype=np.uint8)
    for name, module, classes in (("pair", Pooled(), 3), ("classic", Classic(), 4)):
        path = tmp_path / f"{name}.pt"
        torch.jit.script(module).save(str(path))
        rows, probs = features.extract(pixels, f"inception:{path}", batch=2)
        assert rows.shape == (5, 2048)
        assert np.allclose(rows[:, 7], pixels.mean(axis=(1, 2, 3)), rtol=1e-5)
        assert probs is not None
        assert probs.shape == (5, classes)
        if name == "classic":
            assert np.allclose(probs, 0.25)  # asked for without the output bias
        assert features.open_extractor(f"inception:{path}").id.startswith("inception:")


def test_unusable_inception_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        features.open_extractor(f"inception:{tmp_path / 'none.pt'}")
    (tmp_path / "bad.pt").write_bytes(b"not a module")
    with pytest.raises(CheckpointError, match="not a TorchScript file"):
        features.open_extractor(f"inception:{tmp_path / 'bad.pt'}")
    torch.jit.script(Narrow()).save(str(tmp_path / "narrow.pt"))
    with pytest.raises(CheckpointError, match="2048"):
        features.extract(np.zeros((2, 4, 4, 3), np.uint8), f"inception:{tmp_path / 'narrow.pt'}")


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(digits: ImageSet, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    where = tmp_path_factory.mktemp("samples")
    generator = torch.Generator().manual_seed(0)
    x, y = digits.train.images[:200], digits.train.labels[:200]
    sets = {
        "real": x,
        "noisy": x + 0.5 * torch.randn(x.shape, generator=generator),
        "noise": torch.randn(x.shape, generator=generator),
    }
    out = {}
    for name, images_ in sets.items():
        path = save_samples(where / f"{name}.npz", images_, y, {**SETTINGS, "n": 200})
        out[name] = evaluate.evaluate_images(path, features=f"classifier:{folder}", bootstrap=40)
    return out


def test_the_metrics_order_real_noisy_and_noise(evaluated: dict[str, dict]) -> None:
    real, noisy, noise = (evaluated[name] for name in ("real", "noisy", "noise"))
    assert real["frechet"] < noisy["frechet"] < noise["frechet"]
    assert real["kid"] < noise["kid"]
    assert real["precision"] == 1.0  # they are reference images
    assert noise["recall"] < real["recall"]
    for result in (real, noisy, noise):
        low, high = result["frechet_interval"]
        assert low <= result["frechet"] <= high


def test_a_result_says_what_it_was_measured_on(evaluated: dict[str, dict], folder: Path) -> None:
    result = evaluated["real"]
    assert (result["n"], result["n_ref"], result["reference"]) == (200, 1500, "digits:train")
    assert result["extractor"].startswith("classifier:")
    assert {key: result[key] for key in SETTINGS} == SETTINGS
    assert len(result["reference_digest"]) == 64
    assert any("200 samples" in note for note in result["notes"])
    json.dumps(result)


def test_comparing_gives_differences_of_like_with_like(evaluated: dict[str, dict]) -> None:
    out = evaluate.compare(evaluated["real"], evaluated["noise"])
    assert out["frechet"]["difference"] == evaluated["noise"]["frechet"] - evaluated["real"]["frechet"]
    assert out["frechet"]["intervals_apart"]
    assert set(out) == {"frechet", "kid", "inception_score", "precision", "recall"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n", 1000),
        ("steps", 250),
        ("guidance", 1.5),
        ("sampler", "ddpm"),
        ("extractor", "inception:0"),
        ("reference_digest", "0" * 64),
        ("spacing", "trailing"),
        ("cfg_channels", "3"),
        ("steps", None),
    ],
)
def test_results_of_different_settings_are_not_compared(evaluated: dict[str, dict], key: str, value: object) -> None:
    with pytest.raises(UsageError, match=key):
        evaluate.compare(evaluated["real"], {**evaluated["noise"], key: value})


def test_the_reference_can_be_held_out_images_or_a_file(digits: ImageSet, folder: Path, tmp_path: Path) -> None:
    x, y = digits.val
    path = save_samples(tmp_path / "val.npz", x, y, {})
    held_out = evaluate.evaluate_images(path, split="val", features=f"classifier:{folder}", bootstrap=0)
    assert held_out["reference"] == "digits:val"
    assert held_out["frechet"] == pytest.approx(0, abs=1e-6)
    assert held_out["frechet_interval"] is None
    from_file = evaluate.evaluate_images(path, str(path), features=f"classifier:{folder}", bootstrap=0)
    assert from_file["reference_digest"] == held_out["reference_digest"]
    assert from_file["sampler"] is None
    told = evaluate.evaluate_images(
        path, "npz:" + str(path), features=f"classifier:{folder}", bootstrap=0, settings=SETTINGS
    )
    assert told["sampler"] == "ddim"
    with pytest.raises(UsageError, match="split"):
        evaluate.evaluate_images(path, split="test", features=f"classifier:{folder}")


def test_stored_features_are_used_as_they_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ref, gen = rng.normal(size=(80, 5)), rng.normal(size=(60, 5)) + 1
    np.savez(tmp_path / "ref.npz", features=ref, extractor=np.array("x v1"))
    np.savez(tmp_path / "gen.npz", features=gen, probs=np.full((60, 2), 0.5), extractor=np.array("x v1"))
    result = evaluate.evaluate_images(tmp_path / "gen.npz", str(tmp_path / "ref.npz"), features="npz", bootstrap=0)
    assert result["frechet"] == metrics.frechet(ref, gen)
    assert result["inception_score"] == pytest.approx(1)
    assert result["extractor"] == "npz:x v1"
    np.savez(tmp_path / "other.npz", features=gen, extractor=np.array("x v2"))
    with pytest.raises(UsageError, match="x v2"):
        evaluate.evaluate_images(tmp_path / "other.npz", str(tmp_path / "ref.npz"), features="npz")
    np.savez(tmp_path / "anonymous.npz", features=gen)
    with pytest.raises(UsageError, match="extracted"):
        evaluate.evaluate_images(tmp_path / "anonymous.npz", str(tmp_path / "ref.npz"), features="npz")
    with pytest.raises(UsageError, match="no images"):
        evaluate.evaluate_images(tmp_path / "gen.npz", str(tmp_path / "ref.npz"))
