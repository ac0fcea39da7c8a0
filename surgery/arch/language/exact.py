"""The language tower as the model's own class has it: slow, and exact for every layout that transformers loads.

The class is built without weights, from the config that lies beside them, and each name on disk is put through the
renamings that transformers applies when it loads. That part of transformers is private and may change with any version:
nothing but this module touches it. No code of the checkpoint is run and nothing is fetched. Importing transformers
takes seconds, so this is asked where names alone leave the tower open (`locate`), and never otherwise.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from surgery.arch.language.load import first_line, language_config, model_class, quiet_transformers
from surgery.arch.language.towers import EMBED, HEAD, NORM, NORM_BIAS, Tower
from surgery.errors import CheckpointError, ResourceError, printable
from surgery.store.checkpoint import Checkpoint

_DEEPEST = 10_000  # layers


def class_tower(base: Checkpoint) -> tuple[Tower, str]:
    """The language tower of a checkpoint, and the name of the class that was asked.

    Layers are those of `get_decoder()`, with suffixes as in memory; a tensor that the class does not know is not in it.
    Raises `CheckpointError` when there is no config, no class of the installed transformers, or no list of layers, and
    `ResourceError` when the class needs a package that is missing.
    """
    model = _without_weights(base)
    memory = _names_in_memory(model, base.tensors)
    paths = {id(module): path for path, module in model.named_modules()}
    where, layers, norm = _decoder(model, base.name)
    outside = {f"{norm}.weight": NORM, f"{norm}.bias": NORM_BIAS} if norm is not None else {}
    for module, canonical in ((model.get_input_embeddings(), EMBED), (model.get_output_embeddings(), HEAD)):
        if module is not None and id(module) in paths:
            outside[f"{paths[id(module)]}.weight"] = canonical
    found: dict[int, dict[str, str]] = {n: {} for n in range(layers)}
    names: dict[str, str] = {}
    inside = re.compile(re.escape(f"{where}.") + r"([0-9]{1,6})\.(.+)")
    for disk, name in memory.items():
        match = inside.fullmatch(name)
        if match and int(match[1]) in found:
            found[int(match[1])][match[2]] = disk
        elif name in outside:
            names[outside[name]] = disk
    return Tower(_prefix(found), found, names), type(model).__name__


def names_in_memory(base: Checkpoint) -> dict[str, str]:
    """Name on disk -> name in the model that transformers builds of it. Raises as `class_tower`."""
    return _names_in_memory(_without_weights(base), base.tensors)


def _without_weights(base: Checkpoint) -> Any:
    """The model of a checkpoint's class with tensors that have shapes and no content."""
    config = dict(language_config(base))
    _check_depth(config, base.name)
    kind = model_class(base)
    import torch

    with quiet_transformers(), torch.device("meta"):
        try:
            return kind(kind.config_class.from_dict(config))
        except ImportError as err:
            raise ResourceError("missing-package", f"{base.name}: {first_line(err)}", hint="install it") from err
        except Exception as err:  # a config can be wrong in any way
            raise CheckpointError(
                "not-loadable",
                f"{base.name}: {kind.__name__} cannot be built from its config.json: {first_line(err)}",
                hint="name the tower with --tower PREFIX",
            ) from err


def _check_depth(config: Mapping[str, Any], where: str) -> None:
    """Raise `CheckpointError` for a depth that no model has: modules are made one by one, with weights or without."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_depth(value, where)
        elif isinstance(value, int) and value > _DEEPEST and ("layer" in key or key in ("depth", "n_block")):
            raise CheckpointError(
                "not-loadable", f"{where}: config.json says {printable(key)} {value:,}", hint="no model is that deep"
            )


def _names_in_memory(model: Any, disk: Iterable[str]) -> dict[str, str]:
    """Name on disk -> name in the model, by the renamings of transformers' loader; what only changes values (fused or
    stacked tensors) is left under its own name. Raises `ResourceError` where transformers renames in another way."""
    import transformers

    known = model.state_dict()
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        steps = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
        around = {"base_model_prefix": model.base_model_prefix, "meta_state_dict": known}
        return {name: rename_source_key(name, steps, [], **around)[0] for name in disk}
    except (ImportError, TypeError, AttributeError):  # nobody promised that this stays
        raise ResourceError(
            "other-version",
            f"transformers {transformers.__version__} renames tensors in a way that is not known here",
            hint="name the tower with --tower PREFIX",
        ) from None


def _decoder(model: Any, where: str) -> tuple[str, int, str | None]:
    """(path of the list of decoder layers, how many there are, path of the norm after them)."""
    from torch import nn

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    start = next((path for path, module in model.named_modules() if module is decoder), None)
    lists = {}
    if decoder is not None and start is not None:
        count = getattr(getattr(decoder, "config", None), "num_hidden_layers", None)
        lists = {
            path: module
            for path, module in decoder.named_modules()
            if isinstance(module, nn.ModuleList) and (count is None or len(module) == count)
        }
    if not lists:
        raise CheckpointError(
            "no-tower",
            f"{where}: {type(model).__name__} has no list of decoder layers",
            hint="a language or vision-language model is needed",
        )
    assert decoder is not None
    inner = min(lists, key=lambda path: path.count("."))  # lists inside layers lie deeper
    owner, _, last = inner.rpartition(".")
    order = list(decoder.get_submodule(owner).named_children())
    at = [name for name, _ in order].index(last)
    # The final norm is made after the layers, except where it is made before them (OPT).
    norms = [name for name, module in (*order[at:], *reversed(order[:at])) if "Norm" in type(module).__name__]
    outer = ".".join(filter(None, (start, owner)))
    return (
        ".".join(filter(None, (start, inner))),
        len(lists[inner]),
        ".".join(filter(None, (outer, norms[0]))) if norms else None,
    )


def _prefix(layers: Mapping[int, Mapping[str, str]]) -> str:
    """What stands before `layers.` (or the model's word for it) in the names on disk, for people to read."""
    names = [name for layer in layers.values() for name in layer.values()]
    if not names:
        return ""
    common = names[0]
    for name in names[1:]:
        while not name.startswith(common):
            common = common[:-1]
    parts = common.split(".")[:-1]
    if parts and parts[-1].isdigit():  # a tower of one layer
        parts.pop()
    return "".join(f"{part}." for part in parts[:-1])
