"""Numbered blocks of any model, from the names of its tensors, and what its configuration says about their number.

A block list is a prefix such as `model.layers.` followed by the numbers 0 to n-1; its blocks hold sub-modules, which
tells them from a few layers in a row. The configuration's depth is the key with that number (`num_hidden_layers`,
`num_layers`, `n_layer`, …), at the top or in the object of the same tower (`text_config`, `vision_config`). Standard
library only; no architecture is known by name, but for what keys mean.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import CheckpointError, UsageError, closest, printable

# Keys that count blocks, by what they count: both stacks of a model, or the one whose prefix names it.
_DEPTH = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_blocks", "depth", "num_single_layers")
_STACKS = {"decoder": ("num_decoder_layers", "decoder_layers"), "encoder": ("num_encoder_layers", "encoder_layers")}
_TOWERS = {"vision": ("vision", "visual", "vit", "image"), "audio": ("audio", "speech")}
# Lists with one value a block, beside those whose name says so ("layer", "block").
_PER_BLOCK = {"num_query_heads", "num_kv_heads", "ffn_multipliers", "intermediate_size", "activation_sparsity_pattern"}
# Lists of block numbers.
_NUMBERS = {
    "mlp_only_layers",
    "cross_attention_layers",
    "moe_layers",
    "attn_layer_indices",
    "full_attn_idxs",
    "attn_layers",
}
# Rules that derive what a block is from its number: after an edit they mean other blocks.
_POSITIONAL = (
    "first_k_dense_replace", "max_window_layers", "sliding_window_pattern", "full_attention_interval",
    "decoder_sparse_step", "moe_layer_freq", "attn_layer_period", "attn_layer_offset", "expert_layer_period",
    "expert_layer_offset", "interleave_moe_layer_step", "no_rope_layer_interval", "out_indices",
    "deepstack_visual_indexes", "vision_feature_layer", "num_kv_shared_layers", "num_nextn_predict_layers",
)  # fmt: skip

_NUMBER = re.compile(r"(0|[1-9][0-9]{0,8})\.")
_FIRST_NUMBER = re.compile(r"(?:^|(?<=\.))" + _NUMBER.pattern)


@dataclass(frozen=True)
class BlockList:
    """Blocks `prefix`0. to `prefix`(count-1). ; `numbers` that are absent in between make it no list to cut."""

    prefix: str
    count: int
    missing: tuple[int, ...] = ()


@dataclass(frozen=True)
class DepthEdit:
    """A configuration for other blocks: the new value, and warnings about keys that were left as they are."""

    config: dict[str, Any]
    keys: tuple[str, ...]
    warnings: tuple[str, ...]


def split_block(name: str, prefix: str) -> tuple[int, str] | None:
    """("model.layers.3.mlp.up.weight", "model.layers.") -> (3, "mlp.up.weight"); None for a name outside the list."""
    if not name.startswith(prefix):
        return None
    match = _NUMBER.match(name, len(prefix))
    return (int(match[1]), name[match.end() :]) if match and match.end() < len(name) else None


def block_lists(names: Iterable[str]) -> list[BlockList]:
    """The outermost block lists of a model, in order of their names. Layers in a row, whose numbers hold tensors and no
    modules, are not listed."""
    found: dict[str, dict[int, bool]] = {}
    for name in names:
        match = _FIRST_NUMBER.search(name)
        if match:
            numbers = found.setdefault(name[: match.start(1)], {})
            number = int(match[1])
            numbers[number] = numbers.get(number, False) or "." in name[match.end() :]
    lists = []
    for prefix, numbers in sorted(found.items()):
        count = max(numbers) + 1
        if count == len(numbers) and sum(numbers.values()) * 2 > count:
            lists.append(BlockList(prefix, count))
    return lists


def find_blocks(names: Sequence[str], prefix: str | None, *, where: str) -> BlockList:
    """The list called `prefix`, or the only one. Raises `UsageError` that names the candidates."""
    lists = block_lists(names)
    shown = ", ".join(f"{printable(b.prefix)} ({b.count})" for b in lists[:12])
    if prefix is None:
        if len(lists) == 1:
            return lists[0]
        if not lists:
            raise UsageError("no-blocks", f"{where}: no numbered blocks in its names", hint="see surgery inspect")
        raise UsageError("prefix", f"{where}: several lists of blocks: {shown}", hint="choose one with --prefix")
    wanted = prefix if prefix.endswith(".") or not prefix else prefix + "."
    numbers = {found[0] for name in names if (found := split_block(name, wanted))}
    if not numbers:
        raise UsageError(
            "prefix",
            f"{where}: no blocks under '{printable(wanted)}'",
            hint=closest(wanted, [printable(b.prefix) for b in lists]) if lists else "see surgery inspect --tensors",
        )
    count = max(numbers) + 1
    if count != len(numbers):
        absent = next(i for i in range(count) if i not in numbers)
        raise CheckpointError(
            "missing-block",
            f"{where}: '{printable(wanted)}' has a block {count - 1} and no block {absent}",
            hint="a shard may be missing, or these numbers do not count blocks",
        )
    return BlockList(wanted, count)


def edit_depth(
    config: Mapping[str, Any],
    blocks: BlockList,
    kept: Sequence[int],
    *,
    others: Iterable[BlockList] = (),
    key: str | None = None,
    where: str,
) -> DepthEdit:
    """The configuration of the model whose blocks are `kept` (old numbers in the new order).

    `key` names the depth by its path ("text_config.num_hidden_layers"). Raises `UsageError` when the depth cannot be
    found or also counts one of the `others`, `CheckpointError` when it says another number than the weights.
    """
    if key is None:
        paths = _depth_paths(config, blocks, where)
        for other in others:
            shared = other.prefix != blocks.prefix and set(paths) & set(_matching(config, other))
            if shared:
                raise UsageError(
                    "depth-key",
                    f"{where}: {_shown(min(shared))} counts the blocks of {blocks.prefix} and of {other.prefix}",
                    hint="name the right one with --depth-key",
                )
    else:
        paths = [tuple(key.split("."))]
        value = _at(config, paths[0])
        if value != blocks.count or isinstance(value, bool):
            known = [_shown(p) for p, _ in _depths(config)]
            raise UsageError(
                "depth-key",
                f"{where}: {printable(key)} is {value!r}, and {blocks.prefix} has {blocks.count} blocks",
                hint=closest(key, known) if known else "see its config.json",
            )
    edited: dict[str, Any] = copy.deepcopy(dict(config))
    warnings: list[str] = []
    for path in paths:
        inner = _at(edited, path[:-1])
        inner[path[-1]] = len(kept)
        warnings += _edit_lists(inner, blocks.count, kept, where)
        warnings += _edit_grafts(inner, blocks, kept)
    return DepthEdit(edited, tuple(_shown(p) for p in paths), tuple(warnings))


def _depth_paths(config: Mapping[str, Any], blocks: BlockList, where: str) -> list[tuple[str, ...]]:
    paths = _matching(config, blocks)
    if paths:
        return paths
    known = _tower_depths(config, blocks)
    if known:
        said = ", ".join(f"{_shown(p)} is {n}" for p, n in known[:4])
        raise CheckpointError(
            "depth",
            f"{where}: {said}, and {blocks.prefix} has {blocks.count} blocks",
            hint="weights and config do not fit together, or --depth-key must name the right key",
        )
    raise UsageError(
        "depth-key",
        f"{where}: no key in its config that counts the {blocks.count} blocks of {blocks.prefix}",
        hint="name it with --depth-key, e.g. --depth-key text_config.num_hidden_layers",
    )


def _matching(config: Mapping[str, Any], blocks: BlockList) -> list[tuple[str, ...]]:
    """Paths of the depth keys that count `blocks`: of its tower, its number, and its stack when the model has two."""
    paths = [p for p, n in _tower_depths(config, blocks) if n == blocks.count]
    for stack, keys in _STACKS.items():
        if any(stack in piece for piece in blocks.prefix.split(".")):
            own = [p for p in paths if p[-1] in keys]
            # BART's num_hidden_layers repeats the encoder's number; T5's num_layers is the encoder's.
            general = [p for p in paths if p[-1] in _DEPTH]
            return own + (general if stack == "encoder" or not own else [])
    return [p for p in paths if p[-1] in _DEPTH]


def _tower_depths(config: Mapping[str, Any], blocks: BlockList) -> list[tuple[tuple[str, ...], int]]:
    """The depths of the tower that `blocks` belong to; a model that is one vision tower has its keys at the top."""
    tower = _tower(blocks.prefix.split("."))
    found = list(_depths(config))
    own = [(p, n) for p, n in found if _tower(p[:-1]) == tower]
    return own or [(p, n) for p, n in found if len(p) == 1]


def _depths(config: Mapping[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    """Every key that counts blocks, with its value, here and in nested objects."""
    named = (*_DEPTH, *(k for keys in _STACKS.values() for k in keys))
    for key, value in config.items():
        if isinstance(value, Mapping) and not key.endswith("quantization_config"):
            yield from _depths(value, (*at, key))
        elif key in named and isinstance(value, int) and not isinstance(value, bool):
            yield (*at, key), value


def _tower(pieces: Iterable[str]) -> str:
    """ "vision", "audio" or "" (the language model, or the only one), from pieces of a prefix or of a config path."""
    for tower, words in _TOWERS.items():
        if any(word in piece for piece in pieces for word in words):
            return tower
    return ""


def _edit_lists(inner: dict[str, Any], count: int, kept: Sequence[int], where: str) -> list[str]:
    warnings = []
    for key, value in inner.items():
        if key in _POSITIONAL and value not in (None, False, 0, []):
            warnings.append(f"{where}: {key} decides by the number of a block and was left at {value!r}: check it")
        elif not isinstance(value, list) or key == "surgery_grafts":
            continue
        elif key in _NUMBERS:
            inner[key] = [new for new, old in enumerate(kept) if old in value]
        elif len(value) == count:
            if key in _PER_BLOCK or "layer" in key or "block" in key:
                inner[key] = [copy.deepcopy(value[old]) for old in kept]
            elif count > 4:
                warnings.append(
                    f"{where}: {key} has {count} values, as many as there were blocks, and was left: check it"
                )
    return warnings


def _edit_grafts(inner: dict[str, Any], blocks: BlockList, kept: Sequence[int]) -> list[str]:
    """Grafted operators move with their block."""
    listed = inner.get("surgery_grafts")
    if not isinstance(listed, list) or blocks.prefix != "transformer_blocks.":
        return []
    inner["surgery_grafts"] = [
        {**entry, "block": new} for new, old in enumerate(kept) for entry in listed if _block_of(entry) == old
    ]
    return []


def _block_of(entry: Any) -> Any:
    return entry.get("block") if isinstance(entry, Mapping) else None


def _at(config: Any, path: Iterable[str]) -> Any:
    for key in path:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _shown(path: Sequence[str]) -> str:
    return ".".join(path)
