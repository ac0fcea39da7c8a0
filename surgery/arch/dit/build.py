"""A DiT or PixArt model as a torch module, from a configuration and, where there are some, its tensors.

Grafted models are built from the installed package; no code from a checkpoint's folder is ever run. torch and diffusers
are imported at the top: import this file where a model is needed, not to plan.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import nn

from surgery.arch.dit import modeling
from surgery.arch.dit.config import Dims, family, grafts, initial_values
from surgery.errors import CheckpointError, printable, wrong_tensors


def build_model(
    config: Mapping[str, Any], *, generator: torch.Generator | None = None, where: str = "config.json"
) -> nn.Module:
    """The model in evaluation mode with fresh float32 tensors drawn from `generator` (seed 0 without one).

    The stock diffusers class, or ours where `surgery_grafts` lists operators. Under `torch.device("meta")` the tensors
    have shapes only. Raises CheckpointError for a configuration that is neither DiT nor PixArt.
    """
    if torch.get_default_device().type == "meta":
        return _on_meta(config, where).eval()
    draw = generator if generator is not None else torch.Generator().manual_seed(0)
    state = {name: value.evaluate({}, draw) for name, value in initial_values(config).items()}
    return model_from_state(config, state, where=where)


def model_from_state(
    config: Mapping[str, Any], state: Mapping[str, torch.Tensor], *, where: str = "config.json"
) -> nn.Module:
    """The model in evaluation mode around the tensors of `state`, which it takes over without copying.

    Raises CheckpointError unless `state` has exactly the tensors of the configuration.
    """
    model = _on_meta(config, where)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [f"{name} is missing" for name in wanted if name not in state]
    wrong += [f"{name} is not part of the model" for name in state if name not in wanted]
    wrong += [
        f"{name} has shape {tuple(state[name].shape)} instead of {shape}"
        for name, shape in wanted.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if wrong:
        raise wrong_tensors(where, wrong)
    model.load_state_dict(dict(state), strict=True, assign=True)
    _restore_position_table(model, config, where)
    return model.eval()


def _on_meta(config: Mapping[str, Any], where: str) -> nn.Module:
    """The module without data."""
    kind = family(config, where)
    listed = [graft.as_json() for graft in grafts(config, where)]
    if kind.grafted:
        model_class = getattr(modeling, kind.grafted_class)
        config = {**config, "surgery_grafts": listed}
    else:
        model_class = getattr(diffusers, kind.stock_class)
    known = inspect.signature(model_class.__init__).parameters
    fields = {name: value for name, value in config.items() if name in known}
    try:
        with torch.device("meta"):
            return model_class(**fields)
    except (TypeError, ValueError, NotImplementedError) as wrong:  # fields that decide no shape are checked there only
        reason = printable(str(wrong).split("\n")[0], limit=120)
        raise CheckpointError(
            "bad-config",
            f"{where}: {kind.stock_class} refuses this configuration: {reason}",
            hint="the config is damaged or of another model; fetch it again",
        ) from wrong


def _restore_position_table(model: nn.Module, config: Mapping[str, Any], where: str) -> None:
    """Compute the position table, the one buffer of these models, which is not part of a state dict."""
    dims = Dims.from_config(config, where)
    patches = model.pos_embed
    grid = dims.sample_size // dims.patch_size
    table = get_2d_sincos_pos_embed(
        dims.dim, grid, base_size=grid, interpolation_scale=patches.interpolation_scale, output_type="pt"
    )
    patches.register_buffer("pos_embed", table.float().unsqueeze(0), persistent=False)
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if lost:
        raise CheckpointError("wrong-tensors", f"{where}: this diffusers keeps {lost[0]} outside the state dict")
