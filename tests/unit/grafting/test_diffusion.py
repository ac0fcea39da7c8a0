"""The noise process and its losses against definitions written out naively, and against diffusers' schedulers."""

import math

import pytest
import torch
from tiny_dits import COSINE_V, dit_config, fresh_dit

from surgery.arch.dit.diffusion import (
    NoiseSchedule,
    call_model,
    diffusion_loss,
    drop_labels,
    freeze_label_dropout,
    heldout_loss,
    loss_terms,
    null_label,
)
from surgery.errors import CheckpointError, UsageError

DIGITS = dit_config(layers=2, size=8, classes=10)
V = COSINE_V
EPS = NoiseSchedule.from_config({"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02})


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_target_equal_diffusers(name: str, prediction: str) -> None:
    from diffusers import DDPMScheduler

    config = {"beta_schedule": name, "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": prediction}
    ours, theirs = NoiseSchedule.from_config(config), DDPMScheduler(**config)
    x, eps = torch.randn(7, 3, 4, 4, generator=_generator()), torch.randn(7, 3, 4, 4, generator=_generator(1))
    t = torch.tensor([0, 1, 10, 500, 900, 998, 999])
    assert torch.allclose(ours.betas_T.float(), theirs.betas, rtol=1e-3, atol=1e-7)
    assert torch.allclose(ours.add_noise(x, eps, t), theirs.add_noise(x, eps, t), atol=1e-4)
    want = theirs.get_velocity(x, eps, t) if prediction == "v_prediction" else eps
    assert torch.allclose(ours.target(x, eps, t), want, atol=1e-4)


@pytest.mark.parametrize("schedule", [V, EPS])
def test_the_clean_image_comes_back_from_the_target(schedule: NoiseSchedule) -> None:
    x, eps = torch.randn(5, 1, 4, 4, generator=_generator()), torch.randn(5, 1, 4, 4, generator=_generator(1))
    t = torch.tensor([0, 3, 100, 400, 700])
    assert torch.allclose(schedule.to_x0(schedule.add_noise(x, eps, t), schedule.target(x, eps, t), t), x, atol=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "sigmoid"},
        {"prediction_type": "sample"},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": "many"},
        {"beta_start": 0.5, "beta_end": 0.1},
        {"beta_start": None},
        {"trained_betas": [0.1]},
        {"rescale_betas_zero_snr": True},
    ],
)
def test_an_unknown_schedule_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(CheckpointError):
        NoiseSchedule.from_config(config)


def _naive_vb(
    schedule: NoiseSchedule, mean: torch.Tensor, v: torch.Tensor, x: torch.Tensor, eps: torch.Tensor, t: int
) -> float:
    """vb of one sample, element by element, in Python floats."""
    betas = schedule.betas_T.tolist()
    bars = [1.0]
    for beta in betas:
        bars.append(bars[-1] * (1 - beta))
    bar, before, beta = bars[t + 1], bars[t], betas[t]
    first = t if t else 1
    low = math.log(betas[first] * (1 - bars[first]) / (1 - bars[first + 1]))
    a, s = math.sqrt(bar), math.sqrt(1 - bar)
    total = 0.0
    for xi, ei, mi, vi in zip(*(q.flatten().tolist() for q in (x, eps, mean, v)), strict=True):
        noised = a * xi + s * ei
        x0 = (noised - s * mi) / a if schedule.prediction == "epsilon" else a * noised - s * mi

        def posterior(clean: float, noised: float = noised) -> float:
            return (
                math.sqrt(before) * beta / (1 - bar) * clean + math.sqrt(1 - beta) * (1 - before) / (1 - bar) * noised
            )

        log_var = (vi + 1) / 2 * math.log(beta) + (1 - vi) / 2 * low
        if t > 0:
            gap = (posterior(xi) - posterior(x0)) ** 2
            total += 0.5 * (log_var - low + (math.exp(low) + gap) / math.exp(log_var) - 1)
        else:
            std = math.exp(log_var / 2)

            def cdf(z: float) -> float:
                return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

            m = posterior(x0)
            up = 1.0 if xi > 0.999 else cdf((xi + 1 / 255 - m) / std)
            down = 0.0 if xi < -0.999 else cdf((xi - 1 / 255 - m) / std)
            total -= math.log(max(up - down, 1e-12))
    return total / x.numel() / math.log(2)


@pytest.mark.parametrize("schedule", [V, EPS])
@pytest.mark.parametrize("t", [0, 1, 2, 250, 999])
def test_the_variational_bound_equals_its_naive_definition(schedule: NoiseSchedule, t: int) -> None:
    x = (torch.randint(0, 256, (1, 2, 3, 3), generator=_generator()) / 127.5 - 1).double()
    eps = torch.randn(x.shape, generator=_generator(1)).double()
    times = torch.tensor([t])
    near = schedule.target(x, eps, times) + 0.02 * torch.randn(x.shape, generator=_generator(2)).double()
    v = 2 * torch.rand(x.shape, generator=_generator(3)).double() - 1
    mse, vb = loss_terms(schedule, torch.cat([near, v], 1), x, eps, times)
    assert vb is not None and mse.shape == vb.shape == (1,)
    assert float(vb) == pytest.approx(_naive_vb(schedule, near, v, x, eps, t), rel=1e-5)


def test_the_bound_counts_at_t_0_and_is_small_for_large_t() -> None:
    """For a network that is about right: the share of vb in the loss falls from above one to a per cent."""
    x = torch.randint(0, 256, (64, 4, 8, 8), generator=_generator()) / 127.5 - 1
    eps = torch.randn(x.shape, generator=_generator(1))
    output = torch.cat([eps + torch.randn(x.shape, generator=_generator(2)), torch.zeros_like(x)], 1)
    shares = {}
    for t in (0, 250, 900):
        mse, vb = loss_terms(EPS, output, x, eps, torch.full((64,), t))
        assert vb is not None
        shares[t] = float((vb / mse).mean())
    assert shares[0] > 1 and 0 < shares[250] < 0.01 and 0 < shares[900] < 0.02


def test_the_bound_sends_no_gradient_into_the_mean_half() -> None:
    x, eps = torch.randn(3, 2, 4, 4, generator=_generator()), torch.randn(3, 2, 4, 4, generator=_generator(1))
    output = torch.randn(3, 4, 4, 4, generator=_generator(2)).requires_grad_()
    _, vb = loss_terms(EPS, output, x, eps, torch.tensor([0, 5, 500]))
    assert vb is not None
    (gradient,) = torch.autograd.grad(vb.sum(), output)
    assert (gradient[:, :2] == 0).all() and (gradient[:, 2:] != 0).any()


def test_a_model_without_variances_has_no_bound_and_an_odd_channel_count_is_refused() -> None:
    x = torch.zeros(2, 2, 4, 4)
    assert loss_terms(EPS, x, x, x, torch.tensor([0, 1]))[1] is None
    with pytest.raises(CheckpointError, match="3 channels"):
        loss_terms(EPS, torch.zeros(2, 3, 4, 4), x, x, torch.tensor([0, 1]))


def test_diffusion_loss_is_the_mean_of_mse_and_bound_on_given_noise() -> None:
    model = fresh_dit(DIGITS | {"out_channels": 2}, seed=0).eval()
    x, eps = torch.randn(4, 1, 8, 8, generator=_generator()), torch.randn(4, 1, 8, 8, generator=_generator(1))
    t, y = torch.tensor([0, 10, 300, 999]), torch.tensor([0, 1, 2, 10])
    mse, vb = loss_terms(EPS, call_model(model, EPS.add_noise(x, eps, t), t, y), x, eps, t)
    assert vb is not None
    assert torch.equal(diffusion_loss(model, EPS, x, y, t=t, noise=eps), (mse + vb).mean())
    with pytest.raises(UsageError):
        diffusion_loss(model, EPS, x, y)


def test_the_model_sees_noised_images_with_timesteps_and_labels_in_their_places() -> None:
    seen = {}

    class Spy:
        def __call__(self, x: torch.Tensor, *, timestep: torch.Tensor, class_labels: torch.Tensor) -> "Spy":
            seen.update(x=x, t=timestep, y=class_labels)
            self.sample = x
            return self

    x, labels = torch.zeros(256, 1, 2, 2), torch.full((256,), 7)
    diffusion_loss(Spy(), V, x, labels, generator=_generator())
    assert (seen["y"] == 7).all() and 0 <= int(seen["t"].min()) < 50 and 950 < int(seen["t"].max()) <= 999
    assert (seen["x"] != 0).all()


def test_labels_are_dropped_whole_and_at_the_asked_rate() -> None:
    labels = torch.arange(10).repeat(1000)
    dropped = drop_labels(labels, 0.1, 10, _generator())
    gone = dropped == 10
    assert 0.09 < float(gone.float().mean()) < 0.11 and torch.equal(dropped[~gone], labels[~gone])
    assert torch.equal(drop_labels(labels, 0.0, 10, _generator()), labels)


def test_every_block_of_a_training_model_sees_the_same_labels_once_its_own_dropout_is_off() -> None:
    from diffusers.models.embeddings import LabelEmbedding

    model = fresh_dit(DIGITS | {"num_layers": 4}, seed=0).train()
    assert freeze_label_dropout(model) == 4
    seen: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.embedding_table.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    labels = drop_labels(torch.arange(200) % 10, 0.5, 10, _generator())
    call_model(model, torch.zeros(200, 1, 8, 8), torch.zeros(200, dtype=torch.int64), labels)
    assert len(seen) == 5 and all(torch.equal(s, labels) for s in seen)
    assert model.transformer_blocks[0].training


def test_the_null_label_is_the_row_after_the_classes() -> None:
    model = fresh_dit(DIGITS, seed=0)
    assert null_label(model.config) == 10
    table = model.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
    assert table.num_embeddings == 11
    for config in ({}, {"num_embeds_ada_norm": None}, {"num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single"}):
        with pytest.raises(CheckpointError):
            null_label(config)


def test_heldout_loss_is_repeatable_leaves_modes_alone_and_does_not_depend_on_the_batch() -> None:
    model = fresh_dit(DIGITS, seed=0).train()
    freeze_label_dropout(model)
    modes = [m.training for m in model.modules()]
    x, y = torch.randn(20, 1, 8, 8, generator=_generator()), torch.arange(20) % 10
    mean, values = heldout_loss(model, V, x, y, seed=3, n_draws=2)
    again, other = heldout_loss(model, V, x, y, seed=3, n_draws=2, batch=7)
    assert values.shape == (20,) and mean == pytest.approx(float(values.mean()), rel=1e-6)
    assert torch.allclose(values, other, rtol=1e-4) and mean == pytest.approx(again, rel=1e-5)
    assert [m.training for m in model.modules()] == modes


def test_heldout_timesteps_are_stratified() -> None:
    times: list[int] = []

    class Spy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor, *, timestep: torch.Tensor, class_labels: torch.Tensor) -> "Spy":
            times.extend(timestep.tolist())
            self.sample = x
            return self

    heldout_loss(Spy(), V, torch.zeros(50, 1, 2, 2), torch.zeros(50, dtype=torch.int64), seed=0, n_draws=4)
    assert sorted(times) == [5 * k + 2 for k in range(200)]
    per_image = torch.tensor(times).view(4, 50)
    assert (per_image // 250 == torch.arange(4)[:, None]).all()
