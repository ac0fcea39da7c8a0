"""Images from a checkpoint into a file: what the command and the step of a recipe do."""

from pathlib import Path
from typing import Any

from surgery.errors import UsageError
from surgery.graph.machine import check_device


def sample_to_file(
    base: Any,
    out: Path,
    *,
    n: int,
    classes: list[int] | None,
    steps: int,
    guidance: float,
    sampler: str,
    seed: int,
    batch: int = 64,
    cfg_channels: str = "all",
    device: str = "cpu",
    threads: int | None = None,
    grid: Path | None = None,
    report: Any = None,
) -> dict[str, Any]:
    """Sample from a checkpoint into an npz (and a picture); returns the settings as recorded."""
    import torch

    from surgery.arch.dit.checkpoints import load_decoder, load_model, scheduler_config
    from surgery.evals.images.sample import balanced_labels, sample_settings, save_samples
    from surgery.evals.images.sample import sample as sample_images
    from surgery.evals.pictures import grid as draw_grid

    check_device(device)
    if threads:
        torch.set_num_threads(threads)
    _check_model(base)
    schedule = scheduler_config(base)
    model = load_model(base).float()
    decode = load_decoder(base, device)
    labels = balanced_labels(n, classes if classes is not None else int(model.config.num_embeds_ada_norm))
    images = sample_images(
        model,
        schedule,
        n=n,
        labels=labels,
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        seed=seed,
        batch=batch,
        cfg_channels=cfg_channels,
        device=device,
        decode=decode,
        report=report,
    )
    settings = sample_settings(
        schedule,
        model=f"sha256:{base.digest}",
        n=n,
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        seed=seed,
        cfg_channels=cfg_channels,
        batch=batch,
    )
    save_samples(out, images, labels, settings)
    if grid is not None:
        draw_grid(
            images, grid, labels=labels.numpy(), title=f"{base.name}   {sampler}, {steps} steps, guidance {guidance:g}"
        )
    return settings


def _check_model(base: Any) -> None:
    """Refuse what cannot be sampled to pictures, before its weights are read."""
    from surgery.arch.dit.checkpoints import transformer_part
    from surgery.arch.dit.config import Dims, family

    _, config = transformer_part(base)
    if family(config, base.name).name == "pixart":
        raise UsageError(
            "text-model", f"{base.name}: makes images from text, not from classes", hint="use its diffusers pipeline"
        )
    channels = Dims.from_config(config, base.name).in_channels
    if channels not in (1, 3) and "vae" not in base.parts:
        raise UsageError(
            "not-pixels",
            f"{base.name}: makes latents of {channels} channels, and has no VAE that decodes them",
            hint="name the whole pipeline folder",
        )
