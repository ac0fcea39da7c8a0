"""The noise process of a diffusion checkpoint and the training losses that follow from it.

A checkpoint's `scheduler_config.json` fixes the betas, what the network predicts and (through the number of its output
channels) whether it also predicts variances. Everything here is a pure function of tensors and of a generator that is
passed in; nothing knows about data sets, optimisers or files.

Shape legend: B batch, C channels, H and W height and width, T number of noise levels.

Papers: DDPM (arXiv 2006.11239), learned variances (arXiv 2102.09672, eq. 15), v-prediction (arXiv 2202.00512),
DiT (arXiv 2212.09748). Grafting (arXiv 2506.05340, eq. 2) draws its inputs from the same process.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import CheckpointError, UsageError, closest

_PREDICTIONS = ("epsilon", "v_prediction")
_BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """`x_t = alpha_t x + sigma_t eps` with `alpha_t² + sigma_t² = 1`, for t = 0 .. T-1.

    `betas_T` holds the forward variances in float64; the other tables follow from it. `prediction` is what the network
    is trained to return: "epsilon" (the noise) or "v_prediction" (`alpha_t eps - sigma_t x`).
    """

    betas_T: Tensor
    prediction: str = "epsilon"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """The schedule a diffusers `scheduler_config.json` describes.

        Raises CheckpointError for a schedule, a prediction type or an option that is not known here: a wrong guess
        would train silently on the wrong noise.
        """
        name = str(config.get("beta_schedule", "linear"))
        steps = config.get("num_train_timesteps", 1000)
        start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 1_000_000:
            raise CheckpointError(
                "bad-schedule",
                f"num_train_timesteps is {steps!r} in the scheduler configuration",
                hint="restore the scheduler config, or fetch it again",
            )
        if name not in _BETAS:
            raise CheckpointError(
                "bad-schedule", f"beta_schedule {name!r} is not supported", hint=closest(name, list(_BETAS))
            )
        for key in ("trained_betas", "rescale_betas_zero_snr"):
            if config.get(key):
                raise CheckpointError(
                    "bad-schedule",
                    f"the scheduler configuration sets {key}, which is not supported",
                    hint="train and sample such a model with its own pipeline",
                )
        if name == "squaredcos_cap_v2":
            edges = torch.arange(steps + 1, dtype=torch.float64) / steps
            level = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - level[1:] / level[:-1]).clamp(max=0.999)
        else:
            good = all(isinstance(b, int | float) and not isinstance(b, bool) for b in (start, end))
            if not good or not 0 < start <= end < 1:
                raise CheckpointError(
                    "bad-schedule",
                    f"beta_start {start!r} and beta_end {end!r} need 0 < start <= end < 1",
                    hint="restore the scheduler config, or fetch it again",
                )
            if name == "linear":
                betas = torch.linspace(start, end, steps, dtype=torch.float64)
            else:
                betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        prediction = str(config.get("prediction_type", "epsilon"))
        if prediction not in _PREDICTIONS:
            raise CheckpointError(
                "bad-schedule",
                f"prediction_type {prediction!r} is not supported",
                hint=closest(prediction, list(_PREDICTIONS)),
            )
        return cls(betas, prediction)

    @property
    def steps(self) -> int:
        """T, the number of noise levels."""
        return len(self.betas_T)

    @property
    def alphas_cumprod_T(self) -> Tensor:
        """`alpha_t²`, float64."""
        return torch.cumprod(1 - self.betas_T, 0)

    def alpha_sigma(self, t_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """`alpha_t`, `sigma_t` for each row, shaped [B, 1, ...] to multiply `like`, in its dtype."""
        level_B = self.alphas_cumprod_T[t_B.cpu()]
        return _rows(level_B.sqrt(), like), _rows((1 - level_B).sqrt(), like)

    def add_noise(self, x: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
        """`alpha_t x + sigma_t eps`; x, eps [B, C, H, W], t_B int64 in 0 .. T-1."""
        alpha, sigma = self.alpha_sigma(t_B, x)
        return alpha * x + sigma * eps

    def target(self, x: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
        """What the network should return at `add_noise(x, eps, t_B)`: `eps`, or `alpha_t eps - sigma_t x`."""
        if self.prediction == "epsilon":
            return eps
        alpha, sigma = self.alpha_sigma(t_B, x)
        return alpha * eps - sigma * x

    def to_x0(self, x_t: Tensor, predicted: Tensor, t_B: Tensor) -> Tensor:
        """The clean image that `predicted` stands for, given the noised `x_t`."""
        alpha, sigma = self.alpha_sigma(t_B, x_t)
        if self.prediction == "epsilon":
            return (x_t - sigma * predicted) / alpha
        return alpha * x_t - sigma * predicted

    def posterior(self, x0: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0), DDPM eq. 7."""
        bar_T = self.alphas_cumprod_T
        before_T = torch.cat([torch.ones(1, dtype=torch.float64), bar_T[:-1]])
        t = t_B.cpu()
        on_x0 = self.betas_T[t] * before_T[t].sqrt() / (1 - bar_T[t])
        on_xt = (1 - before_T[t]) * (1 - self.betas_T[t]).sqrt() / (1 - bar_T[t])
        return _rows(on_x0, x_t) * x0 + _rows(on_xt, x_t) * x_t

    def log_variance_range(self, t_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the smallest and largest variance a reverse step may have: the posterior's and beta_t.

        The posterior variance is 0 at t = 0; there its value at t = 1 stands in, as in arXiv 2102.09672.
        """
        bar_T = self.alphas_cumprod_T
        before_T = torch.cat([torch.ones(1, dtype=torch.float64), bar_T[:-1]])
        low_T = self.betas_T * (1 - before_T) / (1 - bar_T)
        low_T[0] = low_T[min(1, self.steps - 1)] if self.steps > 1 else self.betas_T[0]
        t = t_B.cpu()
        return _rows(low_T[t].log(), like), _rows(self.betas_T[t].log(), like)


def _rows(values_B: Tensor, like: Tensor) -> Tensor:
    return values_B.to(device=like.device, dtype=like.dtype).view(-1, *[1] * (like.dim() - 1))


def null_label(config: Mapping[str, Any]) -> int:
    """The label id that means "no class": the row after the last class of every label table.

    Raises CheckpointError for a model that takes no class labels (text-conditioned, or without a table).
    """
    classes = config.get("num_embeds_ada_norm")
    if str(config.get("norm_type", "")).endswith("ada_norm_single"):
        raise CheckpointError(
            "no-classes", "the model is conditioned on text: labelled images can neither train nor distil it"
        )
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
        raise CheckpointError("no-classes", f"num_embeds_ada_norm is {classes!r}: the model takes no class labels")
    return classes


def drop_labels(labels_B: Tensor, p: float, null: int, generator: torch.Generator) -> Tensor:
    """Labels with each *sample* replaced by `null` with probability p, one draw per sample.

    Every block of a diffusers DiT owns a label table that would draw its own mask in training mode, so that rows end up
    partly dropped and the unconditional branch is never trained. Draw here, once, and call `freeze_label_dropout`.
    """
    if p <= 0:
        return labels_B
    drop_B = torch.rand(len(labels_B), generator=generator) < p
    return torch.where(drop_B.to(labels_B.device), torch.full_like(labels_B, null), labels_B)


def freeze_label_dropout(model: nn.Module) -> int:
    """Put every diffusers `LabelEmbedding` in eval mode, so that it draws no mask; returns how many there are.

    `model.train()` undoes it: call this after every such call.
    """
    from diffusers.models.embeddings import LabelEmbedding

    found = [m for m in model.modules() if isinstance(m, LabelEmbedding)]
    for module in found:
        module.eval()
    return len(found)


def draw(
    schedule: NoiseSchedule,
    x_BCHW: Tensor,
    generator: torch.Generator,
    *,
    t: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Uniform timesteps [B] and Gaussian noise [B, C, H, W] for one batch, drawn on the CPU and moved to `x`'s device.

    Drawing on the CPU makes a run see the same noise on every device. What is given is not drawn.
    """
    if t is None:
        t = torch.randint(schedule.steps, (len(x_BCHW),), generator=generator)
    if noise is None:
        noise = torch.randn(x_BCHW.shape, generator=generator, dtype=torch.float32)
    return t.to(x_BCHW.device), noise.to(device=x_BCHW.device, dtype=x_BCHW.dtype)


def loss_terms(
    schedule: NoiseSchedule, output: Tensor, x_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Per-sample (mse [B], vb [B] or None) of a network output at `add_noise(x, noise, t)`.

    mse is the squared error of the prediction, averaged over elements. When the output has twice the image's channels,
    its second half v in [-1, 1] chooses the variance, `log var = (v+1)/2 log beta_t + (1-v)/2 log beta~_t`, and vb is
    the variational bound in bits per dimension: KL(q(x_{t-1}|x_t,x_0) || p) for t > 0, and for t = 0 the negative log
    likelihood of x quantised to 256 levels of [-1, 1]. The mean half is detached in vb (arXiv 2102.09672 section 3.1).
    Raises CheckpointError for any other channel count.
    """
    channels = x_BCHW.shape[1]
    if output.shape[1] not in (channels, 2 * channels):
        raise CheckpointError(
            "bad-output",
            f"the model returns {output.shape[1]} channels for {channels}: expected {channels} or {2 * channels}",
        )
    mean, variance = output[:, :channels], output[:, channels:]
    mse_B = (mean - schedule.target(x_BCHW, noise_BCHW, t_B)).square().flatten(1).mean(1)
    if not variance.shape[1]:
        return mse_B, None
    x_t = schedule.add_noise(x_BCHW, noise_BCHW, t_B)
    low, high = schedule.log_variance_range(t_B, x_t)
    log_var = (variance + 1) / 2 * high + (1 - variance) / 2 * low
    x0 = schedule.to_x0(x_t, mean.detach(), t_B)
    model_mean = schedule.posterior(x0, x_t, t_B)
    true_mean = schedule.posterior(x_BCHW, x_t, t_B)
    # KL of two Gaussians, in nats: ½ (log s2 - log s1 + (s1 + (m1-m2)²)/s2 - 1)
    kl = 0.5 * (log_var - low - 1 + (low - log_var).exp() + (true_mean - model_mean).square() * (-log_var).exp())
    nats = torch.where(_rows(t_B == 0, x_t) > 0, -_log_likelihood_256(x_BCHW, model_mean, log_var / 2), kl)
    return mse_B, nats.flatten(1).mean(1) / math.log(2)


def _log_likelihood_256(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log of the Gaussian mass of the bin around x, 255 bins of width 2/255 on [-1, 1], the outer ones open-ended.

    The normal CDF is DiT's own tanh approximation, so that continued training optimises the loss it was trained with.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    centred, scale = x - mean, (-log_std).exp()
    upper, lower = cdf(scale * (centred + 1 / 255)), cdf(scale * (centred - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def call_model(model: Callable[..., Any], x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor) -> Tensor:
    """The network's output for a batch, named arguments throughout: t and the labels are both small integers, and a
    swapped pair would go unnoticed."""
    output: Tensor = model(x_BCHW, timestep=t_B, class_labels=labels_B).sample
    return output


def diffusion_loss(
    model: Callable[..., Any],
    schedule: NoiseSchedule,
    x_BCHW: Tensor,
    labels_B: Tensor,
    *,
    generator: torch.Generator | None = None,
    t: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """DiT's training loss, mean over the batch: mse, plus the unscaled vb where the model predicts variances.

    t uniform on 0 .. T-1 and noise N(0, 1) are drawn from `generator` unless given.
    """
    if generator is None:
        if t is None or noise is None:
            raise UsageError("no-generator", "diffusion_loss needs a generator, or both t and noise")
        generator = torch.Generator()
    t_B, eps = draw(schedule, x_BCHW, generator, t=t, noise=noise)
    output = call_model(model, schedule.add_noise(x_BCHW, eps, t_B), t_B, labels_B)
    mse_B, vb_B = loss_terms(schedule, output, x_BCHW, eps, t_B)
    return (mse_B if vb_B is None else mse_B + vb_B).mean()


@torch.no_grad()
def heldout_loss(
    model: nn.Module,
    schedule: NoiseSchedule,
    x_NCHW: Tensor,
    labels_N: Tensor,
    *,
    seed: int,
    n_draws: int = 4,
    batch: int = 256,
) -> tuple[float, Tensor]:
    """The diffusion loss of held-out images: (mean, per-image means [N] float32), the same noise for every model.

    Low-variance and paired: the N * n_draws timesteps are the midpoints of that many equal strata of 0 .. T-1; each
    image gets one from each of n_draws equal ranges, and which one depends on `seed` alone, as does the noise. Two
    models are compared on identical (image, t, noise) triples. The model is evaluated in eval mode and left as it was;
    images go to its device batch by batch.
    """
    n = len(x_NCHW)
    if n < 1 or n_draws < 1 or batch < 1:
        raise UsageError("empty-data", f"held-out loss needs images, draws and a batch; got {n}, {n_draws}, {batch}")
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    total = torch.zeros(n, dtype=torch.float64)
    try:
        for draw_index in range(n_draws):
            rank = torch.randperm(n, generator=generator)
            place = (draw_index + (rank.double() + 0.5) / n) / n_draws
            t_N = (place * schedule.steps).long().clamp(max=schedule.steps - 1)
            eps_NCHW = torch.randn(x_NCHW.shape, generator=generator)  # in one piece: independent of `batch`
            for start in range(0, n, batch):
                part = slice(start, min(start + batch, n))
                x = x_NCHW[part].to(device)
                t_B, eps = draw(schedule, x, generator, t=t_N[part], noise=eps_NCHW[part])
                output = call_model(model, schedule.add_noise(x, eps, t_B), t_B, labels_N[part].to(device))
                mse_B, vb_B = loss_terms(schedule, output, x, eps, t_B)
                total[part] += (mse_B if vb_B is None else mse_B + vb_B).double().cpu()
    finally:
        for module, training in modes:
            module.training = training
    values = total / n_draws
    return float(values.mean()), values.float()
