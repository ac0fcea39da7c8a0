"""Configurations of the models that are known by name: published sizes, and the small ones we train ourselves.

Pure data. `transformer` is what `transformer/config.json` holds, `scheduler` what `scheduler/scheduler_config.json`
does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """A transformer's configuration and that of the noise process which it is made for."""

    transformer: Mapping[str, Any]
    scheduler: Mapping[str, Any]


# The noise process of DiT (arXiv 2212.09748) as its authors train and sample it: linear betas, epsilon, learned
# variance. "linspace" visits the timesteps of their own sampler (0, 4, 8, … 995, 999 with 250 steps); the diffusers
# default "leading" starts at 996 and shares few of them. It goes with DDPM, which looks up the timestep that follows;
# diffusers' DDIM takes the next one to be T/steps lower, which "linspace" does not keep to, so give that one
# "trailing".
_LATENT_NOISE = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "variance_type": "learned_range",
    "clip_sample": False,
    "steps_offset": 0,
    "timestep_spacing": "linspace",
}
# Small images in pixel space: v-prediction is defined at the last step of the cosine schedule, where nothing of the
# image is left and epsilon would say nothing about it. Sampling has to begin at that step, so the spacing is
# "trailing": with few steps "leading" begins well before it, at a noise level that pure noise does not have (arXiv
# 2305.08891, section 3.3); and its timesteps are T/steps apart, as diffusers' DDIM assumes. Nothing is clipped: from v
# the image follows without a division by a vanishing number.
_PIXEL_NOISE = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "variance_type": "fixed_small",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
}


def _dit(layers: int, heads: int, head_dim: int, **fields: Any) -> dict[str, Any]:
    """A class-conditional DiT with the fields of facebook/DiT-XL-2-256 unless said otherwise."""
    return {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": head_dim,
        "dropout": 0.0,
        "in_channels": 4,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": heads,
        "num_embeds_ada_norm": 1000,
        "num_layers": layers,
        "out_channels": 8,
        "patch_size": 2,
        "sample_size": 32,
        "upcast_attention": False,
        **fields,
    }


ARCHITECTURES: dict[str, Architecture] = {
    "dit-xl-2": Architecture(_dit(28, 16, 72), _LATENT_NOISE),
    "dit-xl-2-512": Architecture(_dit(28, 16, 72, sample_size=64), _LATENT_NOISE),
    "dit-l-2": Architecture(_dit(24, 16, 64), _LATENT_NOISE),
    "dit-b-2": Architecture(_dit(12, 12, 64), _LATENT_NOISE),
    "dit-s-2": Architecture(_dit(12, 6, 64), _LATENT_NOISE),
    # 8×8 handwritten digits: 16 tokens, 585 thousand parameters.
    "dit-digits": Architecture(
        _dit(6, 4, 16, in_channels=1, out_channels=1, sample_size=8, num_embeds_ada_norm=10), _PIXEL_NOISE
    ),
    # Fashion-MNIST padded to 32×32: 256 tokens, as many as DiT-XL/2 at 256².
    "dit-fashion": Architecture(
        _dit(6, 4, 32, in_channels=1, out_channels=1, sample_size=32, num_embeds_ada_norm=10), _PIXEL_NOISE
    ),
    # PixArt-Σ at 2048²: 16 384 tokens (arXiv 2403.04692).
    "pixart-sigma": Architecture(
        {
            **_dit(28, 16, 72, sample_size=256, norm_eps=1e-6),
            "_class_name": "PixArtTransformer2DModel",
            "attention_type": "default",
            "caption_channels": 4096,
            "cross_attention_dim": 1152,
            "interpolation_scale": 4,
            "norm_type": "ada_norm_single",
            "use_additional_conditions": False,
        },
        _LATENT_NOISE | {"_class_name": "DPMSolverMultistepScheduler"},
    ),
}
