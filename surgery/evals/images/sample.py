"""Draw images from a class-conditional diffusion transformer, and keep them with the settings that made them.

The loop is ours because the stock DiT pipeline cannot run it: it drops the predicted variance before the scheduler that
needs it, and its null class is 1000 whatever the model's own is. The step rules are diffusers' schedulers. The grafting
paper samples with 250 ddpm steps, learned variance and guidance 1.5 (arXiv 2506.05340, section 4.1).

Shape legend: n samples, B samples of one batch, C channels, H and W height and width.
"""

import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surgery.arch.dit.diffusion import NoiseSchedule, call_model, null_label
from surgery.errors import CheckpointError, ResourceError, UsageError, closest
from surgery.evals.pictures import to_uint8
from surgery.store.writer import atomic_write

Report = Callable[[str, Mapping[str, float]], None]

SAMPLERS = {
    "ddpm": ("DDPMScheduler", "linspace"),
    "ddim": ("DDIMScheduler", "leading"),
    "dpm": ("DPMSolverMultistepScheduler", "linspace"),
}
"""Name of a sampler -> class of diffusers, and the spacing of timesteps it has unless the checkpoint says otherwise."""

SPACINGS = ("leading", "linspace", "trailing")


# --- timesteps and step rules -----------------------------------------------------------------------------------------


def resolve_spacing(schedule: Mapping[str, Any], sampler: str, steps: int, spacing: str = "auto") -> str:
    """Which diffusers `timestep_spacing` a run uses; `spacing` itself unless it is "auto".

    auto: ddpm takes "linspace", whose 250 of 1000 timesteps are exactly those of DiT's own respacing (0, 4, 8, 12 ..
    995, 999), while "leading" shares 42 of them. ddim and dpm take what the checkpoint's own scheduler of that class
    says, else the class's default. "leading" starts at (steps-1)*(T//steps), which for few or for non-dividing steps
    lies far below the pure noise that sampling starts from; below three quarters of T auto takes "trailing" instead.
    """
    kind, default = _sampler(sampler)
    if spacing != "auto":
        if spacing not in SPACINGS:
            raise UsageError(
                "bad-spacing", f"unknown timestep spacing {spacing!r}", hint=closest(spacing, [*SPACINGS, "auto"])
            )
        return spacing
    if sampler == "ddpm":
        return default
    own = schedule.get("timestep_spacing") if schedule.get("_class_name") == kind else None
    chosen = str(own) if own in SPACINGS else default
    total = int(schedule.get("num_train_timesteps", 1000))
    if chosen == "leading" and (steps - 1) * (total // max(1, steps)) < 0.75 * total:
        return "trailing"
    return chosen


def build_scheduler(
    schedule: Mapping[str, Any], sampler: str, steps: int, *, learned_variance: bool = False, spacing: str = "auto"
) -> Any:
    """A diffusers scheduler of `sampler` for the noise process `schedule`, its `steps` timesteps set.

    `learned_variance` says that the model predicts variances too; only ddpm uses them. Samples are not clipped unless
    the checkpoint says so: diffusers' default would clip latents. Raises UsageError for an unknown sampler or a number
    of steps that is not in 1 .. num_train_timesteps, CheckpointError for a schedule that is not supported.
    """
    import diffusers

    kind, _ = _sampler(sampler)
    total = NoiseSchedule.from_config(schedule).steps  # refuses what training would not understand either
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= total:
        raise UsageError(
            "bad-steps", f"{steps} sampling steps are not in 1..{total}", hint="ddim and dpm give fair images from 20"
        )
    keys = ["num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type"]
    if sampler != "dpm":
        keys += ["clip_sample", "clip_sample_range"]
    options = {key: schedule[key] for key in keys if schedule.get(key) is not None}
    options["timestep_spacing"] = resolve_spacing(schedule, sampler, steps, spacing)
    if sampler == "dpm":
        # variance_type stays unset: when it is "learned_range" this class keeps channels 0..2 of any model's output.
        if schedule.get("beta_schedule") == "squaredcos_cap_v2":
            options["lambda_min_clipped"] = -5.1  # the cosine schedule's last steps are numerically unbounded in lambda
    else:
        options.setdefault("clip_sample", False)
    if sampler == "ddim":
        options["set_alpha_to_one"] = bool(schedule.get("set_alpha_to_one", True))
    if sampler == "ddpm":
        recorded = str(schedule.get("variance_type", "fixed_small"))
        fixed = "fixed_small" if recorded.startswith("learned") else recorded
        options["variance_type"] = "learned_range" if learned_variance else fixed
    scheduler = getattr(diffusers, kind)(**options)
    scheduler.set_timesteps(steps)
    return scheduler


def _sampler(name: str) -> tuple[str, str]:
    if name not in SAMPLERS:
        raise UsageError("unknown-sampler", f"unknown sampler {name!r}", hint=closest(name, list(SAMPLERS)))
    return SAMPLERS[name]


# --- sampling ---------------------------------------------------------------------------------------------------------


def balanced_labels(n: int, classes: Sequence[int] | int) -> Tensor:
    """Int64 [n]: the classes in turn, 0 1 2 .. 0 1 2 ..; a number stands for all classes below it."""
    wanted = list(range(classes)) if isinstance(classes, int) else list(classes)
    if not wanted:
        raise UsageError("no-classes", "no classes to sample", hint="name at least one class")
    return torch.tensor([wanted[i % len(wanted)] for i in range(n)], dtype=torch.int64)


def sample_generators(seed: int, start: int, stop: int) -> list[torch.Generator]:
    """One CPU generator for each sample start .. stop-1: its noise depends on `seed` and its index alone.

    torch's CPU generator keeps only 32 bits of a seed. Hashing every index into those would give two of 50 000 samples
    the same noise with probability 1/4, so a hash of `seed` is counted up instead: indices of one run never collide.
    """
    base = int.from_bytes(hashlib.sha256(f"surgery-sample/{seed}".encode()).digest()[:4], "big")
    return [torch.Generator().manual_seed((base + i) % 2**32) for i in range(start, stop)]


@torch.no_grad()
def sample(
    model: nn.Module,
    schedule: Mapping[str, Any],
    *,
    n: int,
    labels: Tensor | Sequence[int] | None = None,
    classes: Sequence[int] | None = None,
    steps: int = 250,
    guidance: float = 1.0,
    sampler: str = "ddpm",
    seed: int = 0,
    batch: int = 64,
    cfg_channels: str = "all",
    spacing: str = "auto",
    device: str | torch.device | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    report: Report | None = None,
) -> Tensor:
    """`n` images, float32 [n, C, H, W] on the CPU.

    model         a diffusers DiT, called with noised images, `timestep` and `class_labels`; left in the mode it was in
    schedule      the checkpoint's scheduler configuration
    labels        class of each image; without it `classes` in turn, without those all classes of the model in turn
    guidance      g of `uncond + g (cond - uncond)`; at 1 the unconditional pass is not made
    cfg_channels  "all", or "3": guidance on the first three channels only, as DiT's reference code has it
    spacing       "auto" (see `resolve_spacing`), "leading", "linspace" or "trailing"
    decode        applied to each batch at the end (a VAE's decoder); without it the model's own space is returned
    device        where the model is moved to and runs; where it is, if not given

    Pixels (1 or 3 channels at the end) are clamped to [-1, 1], latents left alone. Noise is drawn per sample on the
    CPU, so neither `batch` nor the device changes it; equal arguments and threads give equal bits.
    Reports ("sample", {done, n, step, steps}) after each step. Raises UsageError for arguments out of range,
    CheckpointError when the model returns values that are not finite or a wrong number of channels.
    """
    config = getattr(model, "config", {})
    wanted = _labels(config, n, labels, classes)
    if batch < 1:
        raise UsageError("bad-batch", f"a batch of {batch} samples is empty", hint="batch is 1 or more")
    if not math.isfinite(guidance):
        raise UsageError("bad-guidance", f"guidance is {guidance}", hint="1 turns guidance off; the paper uses 1.5")
    if cfg_channels not in ("all", "3"):
        raise UsageError("bad-cfg-channels", f"guidance on {cfg_channels!r} channels is not offered", hint="all or 3")
    where = _device(model, device)
    channels, size = config["in_channels"], config["sample_size"]
    learned = config.get("out_channels") == 2 * channels
    scheduler = build_scheduler(schedule, sampler, steps, learned_variance=learned, spacing=spacing)
    modes = [(m, m.training) for m in model.modules()]
    model.eval()  # in training mode every label table would drop labels at random
    out: list[Tensor] = []
    try:
        for start in range(0, n, batch):
            stop = min(n, start + batch)
            generators = sample_generators(seed, start, stop)
            x = torch.cat([torch.randn((1, channels, size, size), generator=g) for g in generators]).to(where)
            y = wanted[start:stop].to(where)
            scheduler.set_timesteps(steps)  # also forgets the last batch: dpm keeps earlier outputs
            x = x * scheduler.init_noise_sigma
            for i, t in enumerate(scheduler.timesteps):
                predicted = _predict(model, x, t, y, guidance=guidance, first=3 if cfg_channels == "3" else channels)
                if not bool(torch.isfinite(predicted).all()):
                    raise CheckpointError(
                        "non-finite-output",
                        f"the model returns NaN or infinite values at timestep {int(t)}, samples {start} to {stop - 1}",
                        hint="look at the checkpoint's weights for NaN, or sample in float32",
                    )
                # Only ddpm uses predicted variances, and it splits them off itself.
                mean = predicted if learned and sampler == "ddpm" else predicted[:, :channels]
                extra = {"generator": generators} if sampler == "ddpm" else {}
                x = scheduler.step(mean, t, x, **extra).prev_sample
                if report is not None:
                    report("sample", {"done": stop if i + 1 == steps else start, "n": n, "step": i + 1, "steps": steps})
            images = (decode(x) if decode is not None else x).float().cpu()
            out.append(images.clamp(-1, 1) if images.shape[1] in (1, 3) else images)
    finally:
        for module, training in modes:
            module.training = training
    return torch.cat(out)


def _predict(model: Any, x: Tensor, t: Tensor, y: Tensor, *, guidance: float, first: int) -> Tensor:
    """The guided output, float32 [B, C or 2C, H, W]; channels from `first` on are the conditional pass's."""
    dtype = next(model.parameters()).dtype
    if guidance == 1.0:
        output = call_model(model, x.to(dtype), t.to(x.device).expand(len(x)), y).float()
        _check_output(output, x)
        return output
    both, labels = torch.cat([x, x]), torch.cat([y, torch.full_like(y, null_label(model.config))])
    output = call_model(model, both.to(dtype), t.to(x.device).expand(len(both)), labels).float()
    _check_output(output, x)
    cond, uncond = output.chunk(2)
    guided = uncond[:, :first] + guidance * (cond[:, :first] - uncond[:, :first])
    return torch.cat([guided, cond[:, first:]], dim=1)


def _check_output(output: Tensor, x: Tensor) -> None:
    if output.shape[1] not in (x.shape[1], 2 * x.shape[1]) or output.shape[2:] != x.shape[2:]:
        given, made = list(x.shape[1:]), list(output.shape[1:])
        raise CheckpointError(
            "bad-output",
            f"the model returns {made} for images of {given}",
            hint="the config's channels and sample_size do not fit the weights",
        )


def _labels(config: Any, n: int, labels: Tensor | Sequence[int] | None, classes: Sequence[int] | None) -> Tensor:
    if isinstance(n, bool) or n < 1:
        raise UsageError("bad-count", f"{n} images cannot be sampled", hint="ask for at least one")
    missing = [key for key in ("in_channels", "sample_size", "num_embeds_ada_norm") if not config.get(key)]
    if missing:
        raise UsageError(
            "not-class-conditional",
            f"the model's configuration has no {missing[0]}; only class-conditional DiT models can be sampled here",
            hint="text-to-image models are sampled by their own diffusers pipeline",
        )
    if labels is not None and classes is not None:
        raise UsageError("labels-and-classes", "labels and classes are both given", hint="give one of them")
    count = null_label(config)
    if labels is None:
        wanted = balanced_labels(n, count if classes is None else classes)
    else:
        wanted = torch.as_tensor(labels, dtype=torch.int64).cpu()
        if wanted.shape != (n,):
            raise UsageError("label-count", f"{list(wanted.shape)} labels for {n} images", hint="give one per image")
    low, high = int(wanted.min()), int(wanted.max())
    if low < 0 or high >= count:
        wrong = low if low < 0 else high
        raise UsageError("bad-class", f"class {wrong} is not in 0..{count - 1}", hint=f"the model has {count} classes")
    return wanted


def _device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    here = next(model.parameters()).device
    if device is None:
        return here
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise UsageError("bad-device", f"unknown device {str(device)!r}", hint="for example cpu or cuda:0") from error
    try:
        model.to(wanted)
    except (RuntimeError, AssertionError) as error:
        raise ResourceError("no-device", f"device {str(device)!r} cannot be used: {error}", hint="use cpu") from error
    return wanted


# --- sample files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Samples:
    """The content of a sample file. `images` uint8 [n, H, W, C], `labels` int64 [n]; `features` [n, d] and `probs`
    [n, classes] where something else has extracted them, `extractor` naming what; `settings` as `sample_settings`."""

    images: np.ndarray | None
    labels: np.ndarray | None
    settings: dict[str, Any]
    features: np.ndarray | None = None
    probs: np.ndarray | None = None
    extractor: str | None = None

    @property
    def n(self) -> int:
        """How many samples, by images or else by features."""
        rows = self.images if self.images is not None else self.features
        return 0 if rows is None else len(rows)


def sample_settings(
    schedule: Mapping[str, Any],
    *,
    model: str,
    n: int,
    steps: int,
    guidance: float,
    sampler: str,
    seed: int,
    cfg_channels: str = "all",
    spacing: str = "auto",
    batch: int = 64,
) -> dict[str, Any]:
    """What a sample file records of a call of `sample` (same names), plus `model`, the digest of the checkpoint.

    Numbers measured on the samples may be set beside others only if these agree; `spacing` is recorded resolved.
    """
    return {
        "model": model,
        "n": n,
        "sampler": sampler,
        "steps": steps,
        "guidance": float(guidance),
        "seed": seed,
        "cfg_channels": cfg_channels,
        "spacing": resolve_spacing(schedule, sampler, steps, spacing),
        "batch": batch,
    }


def save_samples(path: str | Path, images: Tensor, labels: Tensor | Sequence[int], settings: Mapping[str, Any]) -> Path:
    """Write an .npz of `arr_0` uint8 [n, H, W, C] (clamp(127.5 x + 128)), `labels` int64 [n], `settings` (JSON text).

    `images` are float [n, C, H, W] in [-1, 1] with 1 or 3 channels. The file appears whole or not at all, replacing one
    of that name. Raises UsageError for latents or a wrong number of labels, OutputError when it cannot be written.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise UsageError(
            "not-pixels",
            f"images of shape {list(images.shape)} are not [n, 1 or 3, H, W] pixels",
            hint="decode latents with the VAE of the checkpoint first",
        )
    y = np.asarray(labels, dtype=np.int64)
    if y.shape != (len(images),):
        raise UsageError("label-count", f"{list(y.shape)} labels for {len(images)} images", hint="give one per image")
    pixels, text = to_uint8(images.detach().cpu().numpy()), json.dumps(dict(settings), sort_keys=True)
    buffer = BytesIO()
    np.savez(buffer, arr_0=pixels, labels=y, settings=np.array(text))
    atomic_write(Path(path), buffer.getvalue())
    return Path(path)


def load_samples(path: str | Path) -> Samples:
    """Read what `save_samples` wrote, or any .npz with `arr_0` uint8 [n, H, W, C] or `features` [n, d].

    Optional entries: `labels`, `probs`, `extractor` (text), `settings` (JSON text). Nothing is unpickled.
    Raises CheckpointError when the file is missing, malformed, or disagrees with itself.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            known = ("arr_0", "labels", "settings", "features", "probs", "extractor")
            entries = {key: file[key] for key in known if key in file.files}
    except FileNotFoundError as error:
        raise CheckpointError("no-samples", f"{path} does not exist", hint="make it with: surgery sample") from error
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            "bad-samples", f"{path} is not an .npz file of plain arrays", hint="make it with: surgery sample"
        ) from error
    images, features = entries.get("arr_0"), entries.get("features")
    if images is None and features is None:
        raise CheckpointError(
            "bad-samples", f"{path} holds neither images (arr_0) nor features", hint="make it with: surgery sample"
        )
    if images is not None and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3)):
        raise CheckpointError(
            "bad-samples",
            f"{path}: arr_0 is {images.dtype} {list(images.shape)}, not uint8 [n, H, W, 1 or 3]",
            hint="save pixels as numpy.uint8, channels last",
        )
    if features is not None and (not np.issubdtype(features.dtype, np.number) or features.ndim != 2):
        raise CheckpointError(
            "bad-samples",
            f"{path}: features are {features.dtype} {list(features.shape)}, not numbers [n, d]",
            hint="save one row of numbers for each image",
        )
    try:
        settings = json.loads(str(entries["settings"])) if "settings" in entries else {}
    except json.JSONDecodeError as error:
        raise CheckpointError(
            "bad-samples",
            f"{path}: settings are not JSON: {error}",
            hint="leave settings out, or write them as surgery sample does",
        ) from error
    if not isinstance(settings, dict):
        raise CheckpointError(
            "bad-samples",
            f"{path}: settings are a {type(settings).__name__}, not an object",
            hint="leave settings out, or write them as surgery sample does",
        )
    extractor = str(entries["extractor"]) if "extractor" in entries else None
    found = Samples(images, entries.get("labels"), settings, features, entries.get("probs"), extractor)
    for name, rows in (("labels", found.labels), ("features", features), ("probs", found.probs)):
        if rows is not None and (rows.ndim == 0 or len(rows) != found.n):
            raise CheckpointError(
                "bad-samples",
                f"{path}: {name} of shape {list(rows.shape)} for {found.n} samples",
                hint="give one row for each sample",
            )
    if settings.get("n", found.n) != found.n:
        raise CheckpointError(
            "bad-samples",
            f"{path}: settings say {settings['n']} samples, the file holds {found.n}",
            hint="the file was cut or joined after it was made: sample again",
        )
    return found
