"""A diffusion transformer inside a checkpoint: which part it is, whether its tensors fit its config, its noise process,
and the module built from it. Imports torch only where the module is built."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.arch.dit.config import tensor_shapes
from surgery.errors import CheckpointError, UsageError, printable, wrong_tensors
from surgery.store.checkpoint import Checkpoint
from surgery.store.layout import read_json
from surgery.store.tensors import Part

if TYPE_CHECKING:
    import torch
    from torch import nn


def transformer_part(base: Checkpoint) -> tuple[Part, Mapping[str, Any]]:
    """The part that holds the transformer, and its config: the only part, or `transformer` of a pipeline."""
    if "" in base.parts:
        part = base.parts[""]
    elif "transformer" in base.parts:
        part = base.parts["transformer"]
    else:
        raise UsageError("part", f"{base.name}: no part 'transformer'", hint=f"parts: {', '.join(base.parts)}")
    if part.config is None:
        raise CheckpointError(
            "no-config", f"{base.name}: no config.json beside the weights", hint="name the folder of the whole model"
        )
    return part, part.config


def check_tensors(base: Checkpoint, part: Part, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless the part's tensors are exactly those of its config."""
    wanted = tensor_shapes(config, base.name)
    faults = [f"'{n}' is missing" for n in wanted if n not in part.tensors]
    faults += [f"'{printable(n)}' is not expected" for n in part.tensors if n not in wanted]
    faults += [
        f"'{n}' is {list(part.tensors[n].shape)}, the config asks for {list(s)}"
        for n, s in wanted.items()
        if n in part.tensors and part.tensors[n].shape != s
    ]
    if faults:
        raise wrong_tensors(base.name, faults)


def scheduler_file(base: Checkpoint) -> Path | None:
    """Where the noise process of the checkpoint is written down: beside the weights, in its pipeline's scheduler
    folder, or in that of the pipeline around it; None when it is nowhere."""
    names = ("scheduler_config.json", "scheduler/scheduler_config.json", "../scheduler/scheduler_config.json")
    return next((path for path in (base.root / name for name in names) if path.is_file()), None)


def scheduler_config(base: Checkpoint) -> Mapping[str, Any]:
    """The noise process the checkpoint was trained with, from its scheduler's config. Raises `CheckpointError` when
    there is none, or none that can be read."""
    path = scheduler_file(base)
    if path is None:
        raise CheckpointError(
            "no-scheduler",
            f"{base.name}: no scheduler_config.json, so the noise process is unknown",
            hint="put the scheduler's config beside the weights, or name the whole pipeline",
        )
    found = read_json(path)
    if not isinstance(found, dict):
        raise CheckpointError("malformed", f"{path}: not a JSON object", hint="fetch it again")
    return found


def load_model(base: Checkpoint) -> "nn.Module":
    """The transformer as a module in float32 or as stored, evaluation mode; grafted operators come from this package,
    no code from the folder is run. Raises `CheckpointError` when tensors and config do not match."""
    from surgery.arch.dit.build import model_from_state

    part, config = transformer_part(base)
    state = {name: base.read_ref(ref) for name, ref in part.tensors.items()}
    return model_from_state(config, state, where=base.name)


def load_decoder(base: Checkpoint, device: str) -> "Callable[[torch.Tensor], torch.Tensor] | None":
    """Latents [n, C, H, W] to pixels in [-1, 1] by the pipeline's VAE; None for a checkpoint without one."""
    if "vae" not in base.parts:
        return None
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(base.root / "vae", local_files_only=True).to(device).eval()
    return lambda z: vae.decode(z.to(device) / vae.config.scaling_factor).sample.clamp(-1, 1)
