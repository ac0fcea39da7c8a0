"""Our sampling loop against DiT's respacing, formulas written out here, and diffusers' own DiT pipeline."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from surgery.arch.dit.diffusion import NoiseSchedule
from surgery.evals.images.sample import build_scheduler, sample, sample_generators

LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}
COSINE_V = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "num_train_timesteps": 1000}


def tiny_dit(**changes: int) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 4,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
    }
    before = torch.get_rng_state()
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**{**config, **changes}).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    torch.set_rng_state(before)
    return model


def respaced(total: int, count: int) -> list[int]:
    """DiT's respacing with one section: equal real strides from 0 to total-1, each rounded."""
    stride = (total - 1) / (count - 1)
    return [round(i * stride) for i in range(count)]


def test_ddpm_timesteps_are_those_of_dits_respacing() -> None:
    ours = build_scheduler(LINEAR, "ddpm", 250, learned_variance=True).timesteps.tolist()[::-1]
    assert ours == respaced(1000, 250)
    assert ours[:4] == [0, 4, 8, 12]
    assert ours[-2:] == [995, 999]
    leading = build_scheduler(LINEAR, "ddpm", 250, learned_variance=True, spacing="leading").timesteps.tolist()
    assert max(leading) == 996
    assert len(set(leading) & set(ours)) == 42


def test_one_ddpm_step_is_the_respaced_posterior_with_learned_variance() -> None:
    scheduler = build_scheduler(LINEAR, "ddpm", 250, learned_variance=True)
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    used = respaced(1000, 250)
    generator = torch.Generator().manual_seed(1)
    for place in (0, 1, 100, 249):
        t = used[place]
        x, out = torch.randn(2, 4, 3, 3, generator=generator), torch.randn(2, 8, 3, 3, generator=generator)
        noise = sample_generators(7, 0, 2)
        got = scheduler.step(out, torch.tensor(t), x, generator=sample_generators(7, 0, 2)).prev_sample
        # in float64, from the definitions: respaced beta, posterior, variance between log beta~ and log beta
        now, before = float(alphas[t]), float(alphas[used[place - 1]]) if place else 1.0
        beta = 1 - now / before
        eps, v = out.double().chunk(2, dim=1)
        x0 = (x.double() - math.sqrt(1 - now) * eps) / math.sqrt(now)
        mean = (
            math.sqrt(before) * beta / (1 - now) * x0 + math.sqrt(now / before) * (1 - before) / (1 - now) * x.double()
        )
        if place == 0:
            expected = mean
        else:
            low, high = math.log(beta * (1 - before) / (1 - now)), math.log(beta)
            z = torch.cat([torch.randn((1, 4, 3, 3), generator=g) for g in noise]).double()
            expected = mean + torch.exp(0.5 * ((v + 1) / 2 * high + (1 - v) / 2 * low)) * z
        assert float((got.double() - expected).abs().max()) < 2e-5 * float(expected.abs().max())


@pytest.mark.parametrize("schedule", [LINEAR, COSINE_V])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_is_the_naive_loop(schedule: dict, spacing: str) -> None:
    model = tiny_dit(num_embeds_ada_norm=10, out_channels=4)
    labels, g = torch.tensor([3, 0, 9]), 2.5
    ours = sample(model, schedule, n=3, labels=labels, steps=10, guidance=g, sampler="ddim", seed=5, spacing=spacing)
    alphas = NoiseSchedule.from_config(schedule).alphas_cumprod_T
    times = list(range(0, 1000, 100)) if spacing == "leading" else list(range(99, 1000, 100))
    x = torch.cat([torch.randn((1, 4, 4, 4), generator=r) for r in sample_generators(5, 0, 3)]).double()
    for t in reversed(times):
        a, s = math.sqrt(alphas[t]), math.sqrt(1 - alphas[t])
        last = alphas[t - 100] if t >= 100 else torch.tensor(1.0)
        with torch.no_grad():
            at = torch.full((3,), t)
            cond = model(x.float(), timestep=at, class_labels=labels).sample.double()
            null = model(x.float(), timestep=at, class_labels=torch.full((3,), 10)).sample.double()
        out = null + g * (cond - null)
        x0, eps = (a * x - s * out, a * out + s * x) if schedule is COSINE_V else ((x - s * out) / a, out)
        x = math.sqrt(last) * x0 + math.sqrt(1 - last) * eps
    assert float((ours.double() - x).abs().max()) < 1e-4 * max(1.0, float(x.abs().max()))


class NoVae(nn.Module):
    """Stands where the pipeline expects a VAE and keeps the latents that reach it."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(scaling_factor=1.0)
        self.latents = torch.empty(0)

    def decode(self, latents: torch.Tensor) -> SimpleNamespace:
        self.latents = latents.clone()
        return SimpleNamespace(sample=latents[:, :3])


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_ddim_agrees_with_the_diffusers_pipeline(guidance: float) -> None:
    from diffusers import DDIMScheduler, DiTPipeline

    model, vae = tiny_dit(), NoVae()
    pipeline = DiTPipeline(transformer=model, vae=vae, scheduler=DDIMScheduler(**LINEAR, clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    pipeline(
        class_labels=[5, 999],
        guidance_scale=guidance,
        num_inference_steps=8,
        generator=sample_generators(4, 0, 2),
        output_type="pt",
    )
    ours = sample(model, LINEAR, n=2, labels=[5, 999], steps=8, guidance=guidance, sampler="ddim", seed=4)
    assert torch.allclose(ours, vae.latents, rtol=1e-5, atol=1e-6)


def test_ddpm_agrees_with_a_loop_over_a_plain_diffusers_scheduler() -> None:
    from diffusers import DDPMScheduler

    model = tiny_dit(num_embeds_ada_norm=10)
    ours = sample(model, LINEAR, n=2, labels=[1, 2], steps=6, sampler="ddpm", seed=9, batch=2)
    scheduler = DDPMScheduler(**LINEAR, variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")
    scheduler.set_timesteps(6)
    generators = sample_generators(9, 0, 2)
    x = torch.cat([torch.randn((1, 4, 4, 4), generator=g) for g in generators])
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = model(x, timestep=t.expand(2), class_labels=torch.tensor([1, 2])).sample
            x = scheduler.step(out, t, x, generator=generators).prev_sample
    assert torch.equal(ours, x)


@pytest.mark.parametrize("channels", [1, 4])
def test_dpm_takes_the_mean_of_models_with_predicted_variances(channels: int) -> None:
    # with variance_type="learned_range" diffusers' class would keep channels 0..2 of the output
    model = tiny_dit(num_embeds_ada_norm=10, in_channels=channels, out_channels=2 * channels)
    schedule = {**LINEAR, "variance_type": "learned_range"}
    ours = sample(model, schedule, n=2, steps=6, sampler="dpm", seed=2)

    class MeanOnly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = model, {**model.config, "out_channels": channels}

        def forward(self, *args, **kwargs) -> SimpleNamespace:
            return SimpleNamespace(sample=self.inner(*args, **kwargs).sample[:, :channels])

    assert torch.equal(ours, sample(MeanOnly(), LINEAR, n=2, steps=6, sampler="dpm", seed=2))


@pytest.mark.parametrize(
    ("sampler", "schedule"), [("ddim", COSINE_V), ("dpm", COSINE_V), ("dpm", LINEAR), ("ddpm", LINEAR)]
)
def test_a_perfect_model_of_one_image_returns_that_image(sampler: str, schedule: dict) -> None:
    target = torch.linspace(-0.8, 0.8, 16).reshape(1, 1, 4, 4)
    noise = NoiseSchedule.from_config(schedule)

    class Perfect(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(()))
            self.config = {"in_channels": 1, "out_channels": 1, "sample_size": 4, "num_embeds_ada_norm": 3}

        def forward(self, x: torch.Tensor, *, timestep: torch.Tensor, class_labels: torch.Tensor) -> SimpleNamespace:
            a, s = noise.alpha_sigma(timestep, x)
            eps = (x - a * target) / s
            return SimpleNamespace(sample=eps if noise.prediction == "epsilon" else a * eps - s * target)

    out = sample(Perfect(), schedule, n=3, steps=20, sampler=sampler)
    assert float((out - target).abs().max()) < 0.02
