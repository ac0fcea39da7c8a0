"""Sampling: noise per sample, guidance, modes, labels, refusals; and sample files."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from surgery.errors import CheckpointError, OutputError, ResourceError, UsageError
from surgery.evals.images import sample as S

CONFIG = {"in_channels": 1, "out_channels": 1, "sample_size": 4, "num_embeds_ada_norm": 5}
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}


class Spy(nn.Module):
    """A model of known output that keeps what it was called with."""

    def __init__(self, **config: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.config = {**CONFIG, **config}
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.modes: list[bool] = []

    def forward(self, x: torch.Tensor, *, timestep: torch.Tensor, class_labels: torch.Tensor) -> SimpleNamespace:
        self.calls.append((x.clone(), timestep.clone(), class_labels.clone()))
        self.modes.append(self.training)
        out = self.scale * x + 0.01 * class_labels[:, None, None, None] + 0.0001 * timestep[:, None, None, None]
        return SimpleNamespace(sample=out.repeat(1, self.config["out_channels"] // self.config["in_channels"], 1, 1))


@pytest.fixture(scope="module")
def tiny_dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=2,
        num_layers=2,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=5,
    )
    for parameter in model.parameters():  # zero-initialised gates would make every model the identity
        parameter.data += 0.05 * torch.randn_like(parameter)
    torch.set_rng_state(state)
    return model.eval()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_same_seed_and_batch_give_the_same_bits(one_thread: None, tiny_dit: nn.Module, sampler: str) -> None:
    options = {"n": 7, "steps": 4, "sampler": sampler, "guidance": 1.5, "batch": 3}
    first = S.sample(tiny_dit, LINEAR, seed=1, **options)
    assert first.shape == (7, 1, 4, 4)
    assert first.dtype == torch.float32
    assert float(first.abs().max()) <= 1
    assert torch.equal(first, S.sample(tiny_dit, LINEAR, seed=1, **options))
    assert not torch.equal(first, S.sample(tiny_dit, LINEAR, seed=2, **options))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_a_sample_does_not_depend_on_its_batch(tiny_dit: nn.Module, sampler: str) -> None:
    options = {"steps": 4, "sampler": sampler, "guidance": 1.5, "seed": 3}
    whole = S.sample(tiny_dit, LINEAR, n=6, batch=6, **options)
    assert torch.allclose(whole, S.sample(tiny_dit, LINEAR, n=6, batch=4, **options), atol=1e-5)
    assert torch.allclose(whole, S.sample(tiny_dit, LINEAR, n=6, batch=1, **options), atol=1e-5)
    assert torch.allclose(whole[:3], S.sample(tiny_dit, LINEAR, n=3, batch=64, **options), atol=1e-5)


def test_the_first_noise_is_exactly_equal_for_any_batch_size() -> None:
    seen = []
    for batch in (1, 2, 5):
        spy = Spy()
        S.sample(spy, LINEAR, n=5, steps=1, sampler="ddim", batch=batch)
        seen.append(torch.cat([x for x, _, _ in spy.calls]))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_the_noise_of_two_samples_never_shares_a_generator_seed() -> None:
    # the CPU generator keeps the low 32 bits of a seed
    a, b = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5 + 2**32)
    assert torch.equal(torch.randn(20, generator=a), torch.randn(20, generator=b))
    seeds = {g.initial_seed() for g in S.sample_generators(0, 0, 3000)}
    assert len(seeds) == 3000
    assert max(seeds) < 2**32
    assert not seeds & {g.initial_seed() for g in S.sample_generators(1, 0, 3000)}


def test_guidance_one_runs_one_pass_and_others_pair_with_the_null_class() -> None:
    spy = Spy()
    S.sample(spy, LINEAR, n=3, labels=[4, 0, 2], steps=2, sampler="ddim", guidance=1.0)
    assert [len(x) for x, _, _ in spy.calls] == [3, 3]
    spy = Spy()
    S.sample(spy, LINEAR, n=3, labels=[4, 0, 2], steps=2, sampler="ddim", guidance=1.5)
    x, t, y = spy.calls[0]
    assert torch.equal(x[:3], x[3:])
    assert y.tolist() == [4, 0, 2, 5, 5, 5]  # 5 classes: the null class is 5, not 1000
    assert len(set(t.tolist())) == 1


def test_guidance_mixes_all_or_the_first_three_channels() -> None:
    spy = Spy(in_channels=4, out_channels=8)
    x, t, y = torch.zeros(2, 4, 4, 4), torch.tensor(10), torch.tensor([1, 3])
    cond = 0.01 * y + 0.001
    for first, guided in ((4, [True] * 4), (3, [True] * 3 + [False])):
        out = S._predict(spy, x, t, y, guidance=3.0, first=first)
        assert out.shape == (2, 8, 4, 4)
        for channel in range(8):
            null = 0.01 * 5 + 0.001
            expected = null + 3 * (cond - null) if channel < 4 and guided[channel] else cond
            assert torch.allclose(out[:, channel, 0, 0], expected, atol=1e-6)


def test_the_model_samples_in_eval_mode_and_keeps_its_modes() -> None:
    spy = Spy()
    spy.inner = nn.Linear(1, 1)
    spy.train()
    spy.inner.eval()
    S.sample(spy, LINEAR, n=1, steps=2)
    assert spy.modes == [False, False]
    assert spy.training
    assert not spy.inner.training


def test_classes_are_balanced_or_given() -> None:
    assert S.balanced_labels(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert S.balanced_labels(3, [7, 9]).tolist() == [7, 9, 7]
    spy = Spy()
    S.sample(spy, LINEAR, n=4, classes=[2, 4], steps=1)
    assert spy.calls[0][2].tolist() == [2, 4, 2, 4]


def test_latents_are_not_clamped_and_decode_is_applied() -> None:
    latents = S.sample(Spy(in_channels=4, out_channels=4), LINEAR, n=2, steps=1, sampler="ddim")
    assert latents.shape == (2, 4, 4, 4)
    assert float(latents.abs().max()) > 1
    images = S.sample(
        Spy(in_channels=4, out_channels=4), LINEAR, n=2, steps=1, sampler="ddim", decode=lambda z: 9 * z[:, :3]
    )
    assert images.shape == (2, 3, 4, 4)
    assert float(images.abs().max()) == 1


def test_progress_is_reported() -> None:
    events: list[tuple[str, dict[str, float]]] = []
    S.sample(Spy(), LINEAR, n=3, batch=2, steps=2, report=lambda name, values: events.append((name, dict(values))))
    assert [name for name, _ in events] == ["sample"] * 4
    assert [(v["done"], v["step"]) for _, v in events] == [(0, 1), (2, 2), (2, 1), (3, 2)]


def test_nan_from_the_model_is_an_error_that_names_the_timestep() -> None:
    spy = Spy()
    spy.scale.data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="timestep 999"):
        S.sample(spy, LINEAR, n=2, steps=5)
    assert not torch.is_inference_mode_enabled()


def test_auto_spacing() -> None:
    assert S.resolve_spacing(LINEAR, "ddpm", 250) == "linspace"
    assert S.resolve_spacing({**LINEAR, "timestep_spacing": "leading"}, "ddpm", 250) == "linspace"
    assert S.resolve_spacing(LINEAR, "ddim", 20) == "leading"
    assert S.resolve_spacing(LINEAR, "ddim", 2) == "trailing"  # leading would start from timestep 500
    assert S.resolve_spacing(LINEAR, "ddim", 600) == "trailing"  # and from 599 here
    own = {**LINEAR, "_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}
    assert S.resolve_spacing(own, "ddim", 20) == "trailing"
    assert S.resolve_spacing(own, "dpm", 20) == "linspace"
    assert S.resolve_spacing(own, "ddim", 20, "leading") == "leading"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"n": 0}, "usage.bad-count"),
        ({"batch": 0}, "usage.bad-batch"),
        ({"steps": 0}, "usage.bad-steps"),
        ({"steps": 1001}, "usage.bad-steps"),
        ({"sampler": "euler"}, "usage.unknown-sampler"),
        ({"guidance": float("nan")}, "usage.bad-guidance"),
        ({"cfg_channels": "4"}, "usage.bad-cfg-channels"),
        ({"spacing": "even"}, "usage.bad-spacing"),
        ({"labels": [0, 5]}, "usage.bad-class"),
        ({"labels": [0, -1]}, "usage.bad-class"),
        ({"labels": [0]}, "usage.label-count"),
        ({"labels": [0, 1], "classes": [1]}, "usage.labels-and-classes"),
        ({"classes": []}, "usage.no-classes"),
        ({"device": "gramophone"}, "usage.bad-device"),
    ],
)
def test_bad_arguments_are_refused(options: dict, code: str) -> None:
    with pytest.raises(UsageError) as caught:
        S.sample(Spy(), LINEAR, **{"n": 2, "steps": 2, **options})
    assert caught.value.code == code
    assert caught.value.hint


def test_unusable_models_and_schedules_are_refused() -> None:
    with pytest.raises(UsageError, match="num_embeds_ada_norm"):
        S.sample(Spy(num_embeds_ada_norm=0), LINEAR, n=1, steps=1)
    with pytest.raises(CheckpointError, match="beta_schedule"):
        S.sample(Spy(), {**LINEAR, "beta_schedule": "wavy"}, n=1, steps=1)
    with pytest.raises(CheckpointError, match="returns"):
        S.sample(Spy(out_channels=3), LINEAR, n=1, steps=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_device_is_a_resource_error() -> None:
    with pytest.raises(ResourceError, match="cuda:0"):
        S.sample(Spy(), LINEAR, n=1, steps=1, device="cuda:0")


# --- sample files -----------------------------------------------------------------------------------------------------


def test_sample_files_round_trip_with_settings(tmp_path) -> None:
    images = torch.linspace(-1.2, 1.2, 2 * 16).reshape(2, 1, 4, 4)
    settings = S.sample_settings(LINEAR, model="abc", n=2, steps=20, guidance=1, sampler="ddim", seed=3)
    assert settings["spacing"] == "leading"
    path = tmp_path / "deep" / "a.npz"
    assert S.save_samples(path, images, [4, 1], settings) == path
    back = S.load_samples(path)
    assert back.settings == settings
    assert back.n == 2
    assert back.labels is not None and back.labels.tolist() == [4, 1]
    expected = (127.5 * images + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert back.images is not None and np.array_equal(back.images, expected)
    with np.load(path) as raw:
        assert json.loads(str(raw["settings"]))["guidance"] == 1.0
    assert [p.name for p in path.parent.iterdir()] == ["a.npz"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_saving_refuses_latents_wrong_labels_and_unwritable_places(tmp_path) -> None:
    with pytest.raises(UsageError) as caught:
        S.save_samples(tmp_path / "a.npz", torch.zeros(2, 4, 4, 4), [0, 1], {})
    assert caught.value.code == "usage.not-pixels"
    with pytest.raises(UsageError, match="labels"):
        S.save_samples(tmp_path / "a.npz", torch.zeros(2, 1, 4, 4), [0], {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError):
        S.save_samples(tmp_path / "folder", torch.zeros(2, 1, 4, 4), [0, 1], {})
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_loading_refuses_malformed_files(tmp_path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(CheckpointError, match="does not exist"):
        S.load_samples(path)
    good = {"arr_0": np.zeros((2, 4, 4, 1), np.uint8)}
    for broken, words in [
        ({"other": np.zeros(3)}, "neither"),
        ({"arr_0": np.zeros((2, 4, 4, 1))}, "not uint8"),
        ({"arr_0": np.zeros((2, 4, 4), np.uint8)}, "not uint8"),
        ({**good, "labels": np.zeros(3, np.int64)}, "labels"),
        ({**good, "settings": np.array("{")}, "not JSON"),
        ({**good, "settings": np.array("[1]")}, "not an object"),
        ({**good, "settings": np.array('{"n": 3}')}, "settings say 3"),
        ({"features": np.array(3.0)}, "features"),
    ]:
        np.savez(path, **broken)
        with pytest.raises(CheckpointError, match=words):
            S.load_samples(path)
    path.write_bytes(b"PK not a zip")
    with pytest.raises(CheckpointError, match="plain arrays"):
        S.load_samples(path)


def test_pickled_entries_are_never_executed(tmp_path) -> None:
    path = tmp_path / "evil.npz"

    class Boom:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    np.savez(path, arr_0=np.array([Boom()], dtype=object))
    with pytest.raises(CheckpointError):
        S.load_samples(path)
    assert not (tmp_path / "ran").exists()
