"""The language tower of a model, and how its tensors answer to those of a text model: pure functions of headers.

A tower is a run of decoder layers `<prefix>layers.N.` with embeddings, final norm and head. Inside it names are
canonical: `layers.N.suffix`, `embed_tokens.weight`, `norm.weight`, `lm_head.weight`. No architecture is assumed and
transformers is not imported: a prefix is a candidate when its layers hold everything the donor's hold, in equal shapes.
Where names leave it open the error is `Unclear`, and `locate` asks the model's class.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, UsageError, closest, printable
from surgery.store.layout import read_json

Shapes = Mapping[str, Sequence[int]]

EMBED, NORM, HEAD = "embed_tokens.weight", "norm.weight", "lm_head.weight"
NORM_BIAS = "norm.bias"
_LAYER = re.compile(r"((?:.*?\.)?)layers\.(0|[1-9][0-9]{0,5})\.(.+)")
_NORMS = ("norm", "embedding_norm", "final_layernorm")
_CROSS = "cross_attn."
# Which key of the config decides a tensor's shape; the first that fits.
_FIELDS = (
    (r"self_attn\.(k|v)_proj", "num_key_value_heads"),
    (r"self_attn\.(q|o)_proj", "num_attention_heads"),
    (r"(q|k)_norm", "head_dim"),
    (r"mlp\.|feed_forward\.", "intermediate_size"),
    (r"norm", "hidden_size"),
)


class Unclear(Exception):
    """Names alone do not tell which tensors are the tower; the model's class may know."""


class SeveralTowers(Unclear, UsageError):
    """More than one prefix fits."""


class NoTower(Unclear, CheckpointError):
    """No run of layers has embeddings beside it."""


class OtherNames(Unclear, CheckpointError):
    """Layers are there, and their tensors have other names than the other model's."""


@dataclass(frozen=True)
class Tower:
    """One language tower. `layers` maps each layer's number to {suffix: full name}; `names` maps canonical names
    outside layers (embeddings, final norm, head) to full names."""

    prefix: str
    layers: Mapping[int, Mapping[str, str]]
    names: Mapping[str, str]

    @property
    def count(self) -> int:
        """How many decoder layers there are."""
        return len(self.layers)

    def canonical(self) -> dict[str, str]:
        """Canonical name -> full name of every tensor of the tower."""
        inner = {f"layers.{n}.{s}": name for n, layer in self.layers.items() for s, name in layer.items()}
        return {**inner, **self.names}


@dataclass(frozen=True)
class TowerMap:
    """Host and donor side by side. `layers` maps host layers to donor layers; `names` maps a canonical name (the
    host's layer number) to (name in the host, name in the donor). `host_only` and `donor_only` map the full names
    without a counterpart to their canonical ones, `cross_layers` are the host's layers that no text model has.
    `by_class`: the class that said where the host's tower is, "" where its names did."""

    host_prefix: str
    layers: Mapping[int, int]
    names: Mapping[str, tuple[str, str]]
    host_only: Mapping[str, str] = field(default_factory=dict)
    donor_only: Mapping[str, str] = field(default_factory=dict)
    cross_layers: tuple[int, ...] = ()
    host_count: int = 0
    by_class: str = ""


def towers(shapes: Shapes) -> list[Tower]:
    """Every run of layers 0 to n-1 in a checkpoint, in order of first appearance; vision encoders are among them."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    for name in shapes:
        match = _LAYER.fullmatch(name)
        if match:
            found.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = name
    complete = [
        (prefix, dict(sorted(layers.items()))) for prefix, layers in found.items() if max(layers) + 1 == len(layers)
    ]
    return [Tower(prefix, layers, _outside(prefix, shapes)) for prefix, layers in complete]


def language_tower(shapes: Shapes, *, prefix: str | None = None, where: str = "the model") -> Tower:
    """The language tower of one model alone: the run of layers that has token embeddings beside it.

    `prefix` chooses among several. Raises `CheckpointError` when there is none, `UsageError` when it is not clear.
    """
    every = towers(shapes)
    if prefix is not None:
        return named_tower(every, prefix, where)
    fitting = [t for t in every if EMBED in t.names]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        known = ", ".join(printable(t.prefix) for t in every[:6]) or "none"
        raise NoTower(
            "no-tower",
            f"{where}: no language model in it: no layers with embed_tokens.weight beside them",
            hint=f"prefixes with numbered layers: {known}",
        )
    raise _ambiguous(fitting, where, hint="leave the copies out of the file, or give its folder with config.json")


def find_towers(
    host: Shapes,
    donor: Shapes,
    *,
    prefix: str | None = None,
    layer_map: Mapping[int, int] | None = None,
    ignore_extra: bool = False,
    host_name: str = "the host",
    donor_name: str = "the donor",
) -> TowerMap:
    """Map the host's language tower to the donor's layers.

    Exactly one prefix of the host may fit. Mllama's cross-attention layers have no counterpart: the donor's layers go
    to the others in order. `layer_map` (host to donor) replaces the mapping; layers outside it are left alone.
    Raises `CheckpointError` naming up to three tensors with both shapes, `UsageError` when several prefixes fit;
    both are `Unclear` where a class may know better.
    """
    theirs = language_tower(donor, where=donor_name)
    every = towers(host)
    if prefix is not None:
        every = [named_tower(every, prefix, host_name)]
    return match_towers(
        every, theirs, host, donor,
        layer_map=layer_map, ignore_extra=ignore_extra, host_name=host_name, donor_name=donor_name,
    )  # fmt: skip


def match_towers(
    every: Sequence[Tower],
    theirs: Tower,
    host: Shapes,
    donor: Shapes,
    *,
    layer_map: Mapping[int, int] | None = None,
    ignore_extra: bool = False,
    host_name: str = "the host",
    donor_name: str = "the donor",
) -> TowerMap:
    """The one of the host's towers that the donor's fits, mapped to it. Arguments and errors as `find_towers`."""
    for mine, other in (layer_map or {}).items():
        if other not in theirs.layers:
            raise UsageError(
                "layer-map",
                f"--layer-map {mine}:{other}: layer {other} is out of range, {donor_name} has {theirs.count} layers "
                f"(0-{theirs.count - 1})",
                hint="the host's layer stands first, the donor's second",
            )
    tried = [_Fit.of(tower, theirs, host, donor, layer_map, ignore_extra) for tower in every]
    fitting = [fit for fit in tried if not fit.faults]
    if len(fitting) > 1:
        with_tokens = [fit for fit in fitting if EMBED in fit.tower.names]
        fitting = with_tokens if len(with_tokens) == 1 else fitting
    if len(fitting) == 1:
        return fitting[0].mapping(theirs)
    if fitting:
        raise _ambiguous([fit.tower for fit in fitting], host_name, hint="choose one with --tower PREFIX")
    if not tried:
        raise NoTower(
            "no-tower", f"{host_name}: no numbered decoder layers in its names", hint="see surgery inspect --tensors"
        )
    nearest = min(tried, key=lambda fit: (EMBED not in fit.tower.names, fit.wrong, -fit.tower.count))
    kind = OtherNames if nearest.missing or EMBED not in nearest.tower.names else CheckpointError
    raise kind(
        "incompatible",
        f"{host_name} has no tower that {donor_name} fits; the nearest is '{printable(nearest.tower.prefix)}': "
        + "; ".join(nearest.faults[:3]),
        hint=nearest.hint or "host and donor must come from the same base model",
    )


@dataclass(frozen=True)
class _Fit:
    """One candidate prefix against the donor's layers; without `faults` it fits."""

    tower: Tower
    layers: Mapping[int, int]
    cross: tuple[int, ...]
    faults: tuple[str, ...]
    wrong: int  # how many tensors do not fit
    missing: int  # how many of them the host does not have at all
    hint: str

    @classmethod
    def of(
        cls,
        tower: Tower,
        theirs: Tower,
        host: Shapes,
        donor: Shapes,
        layer_map: Mapping[int, int] | None,
        ignore_extra: bool,
    ) -> "_Fit":
        # Where the donor has such layers too, both are models of one kind and layers answer one to one.
        cross = () if _cross_layers(theirs) else _cross_layers(tower)
        own = [n for n in tower.layers if n not in cross]
        faults: list[str] = []
        hint = ""
        if layer_map is not None:
            pairs = dict(sorted(layer_map.items()))
            for mine, other in pairs.items():
                if mine not in tower.layers:
                    faults.append(f"--layer-map {mine}:{other}: it has {tower.count} layers (0-{tower.count - 1})")
            pairs = {m: o for m, o in pairs.items() if m in tower.layers and o in theirs.layers}
        else:
            pairs = dict(zip(own, sorted(theirs.layers), strict=False))
            if len(own) != theirs.count:
                beside = f" beside {len(cross)} with cross-attention" if cross else ""
                faults.append(
                    f"num_hidden_layers: it has {len(own)} layers{beside}, the donor {theirs.count} (config field "
                    "num_hidden_layers)"
                )
                hint = "models of another depth have another base; --layer-map HOST:DONOR,... pairs layers by hand"
        wrong = missing = 0
        for mine, other in pairs.items():
            for suffix, name in theirs.layers[other].items():
                full = tower.layers[mine].get(suffix)
                if full is None:
                    if ignore_extra:
                        continue
                    wrong, missing = wrong + 1, missing + 1
                    if wrong <= 3:
                        faults.append(f"the host has no '{printable(suffix)}' in layer {mine}")
                        adapted = any(
                            s.startswith(suffix.rpartition(".")[0] + ".base_layer.") for s in tower.layers[mine]
                        )
                        hint = hint or (
                            "the host has adapters inside that were not merged: merge_and_unload of peft, or surgery "
                            "lora apply, puts them into its weights first"
                            if adapted
                            else "another architecture; --ignore-extra leaves out what only the donor has"
                        )
                elif tuple(host[full]) != tuple(donor[name]):
                    wrong += 1
                    if wrong <= 3:
                        field = explaining_field(suffix)
                        because = f" (config field {field})" if field else ""
                        faults.append(
                            f"'{printable(full)}' is {list(host[full])} and '{printable(name)}' {list(donor[name])}"
                            + because
                        )
        return cls(tower, pairs, cross, tuple(faults), wrong + 1000 * bool(faults and not pairs), missing, hint)

    def mapping(self, theirs: Tower) -> TowerMap:
        names: dict[str, tuple[str, str]] = {}
        host_only: dict[str, str] = {}
        donor_only: dict[str, str] = {}
        for mine, layer in self.tower.layers.items():
            other = theirs.layers[self.layers[mine]] if mine in self.layers else {}
            for suffix, full in layer.items():
                canonical = f"layers.{mine}.{suffix}"
                if suffix in other:
                    names[canonical] = (full, other[suffix])
                else:
                    host_only[full] = canonical
            donor_only |= {name: f"layers.{mine}.{suffix}" for suffix, name in other.items() if suffix not in layer}
        for canonical, full in self.tower.names.items():
            if canonical in theirs.names:
                names[canonical] = (full, theirs.names[canonical])
            else:
                host_only[full] = canonical
        donor_only |= {name: canonical for canonical, name in theirs.names.items() if canonical not in self.tower.names}
        return TowerMap(
            self.tower.prefix,
            self.layers,
            names,
            host_only,
            donor_only,
            self.cross,
            self.tower.count,
        )


def _cross_layers(tower: Tower) -> tuple[int, ...]:
    return tuple(n for n, layer in tower.layers.items() if any(s.startswith(_CROSS) for s in layer))


def explaining_field(suffix: str) -> str:
    """The config key that decides the shape of a tensor with this name; "" where none is known."""
    return next((field for pattern, field in _FIELDS if re.search(pattern, suffix)), "")


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, from a checkpoint's tensors."""
    return {name: tuple(ref.shape) for name, ref in tensors.items()}


def resolve_layer_map(text: str) -> str:
    """`--layer-map` in the form that is recorded: a JSON file of {host layer: donor layer} is read here, so that no
    path becomes part of what was done. Raises `UsageError` and `CheckpointError`."""
    if not text.endswith(".json"):
        parse_layer_map(text)
        return text
    document = read_json(Path(text))
    pairs = document.items() if isinstance(document, Mapping) else document if isinstance(document, list) else ()
    try:
        found = ",".join(f"{int(mine)}:{int(other)}" for mine, other in pairs)
    except (TypeError, ValueError):
        found = ""
    if not found:
        raise UsageError(
            "layer-map",
            f"--layer-map {printable(text)}: not pairs of layers",
            hint='write {"0": 0, "2": 1} or [[0, 0], [2, 1]], the host\'s layer first',
        )
    parse_layer_map(found)
    return found


def parse_layer_map(text: str) -> dict[int, int]:
    """`i:j,k:l` as {host layer: donor layer}. Raises `UsageError`."""
    found: dict[int, int] = {}
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*:\s*(\d{1,6})\s*", item)
        if match is None or int(match[1]) in found:
            raise UsageError(
                "layer-map", f"--layer-map {printable(text)}: '{printable(item)}' is no new pair", hint="write 0:0,1:2"
            )
        found[int(match[1])] = int(match[2])
    return found


def _outside(prefix: str, shapes: Shapes) -> dict[str, str]:
    """Canonical -> full name of what belongs to the tower at `prefix` outside its layers."""
    names: dict[str, str] = {}
    if f"{prefix}{EMBED}" in shapes:
        names[EMBED] = f"{prefix}{EMBED}"
    for norm in _NORMS:
        for canonical in (NORM, NORM_BIAS):
            if (name := f"{prefix}{norm}.{canonical.rpartition('.')[2]}") in shapes:
                names[canonical] = name
    above = prefix.removesuffix("model.") if prefix.endswith("model.") else prefix
    for start in dict.fromkeys(
        (prefix, above, above.removesuffix("model."), above.removesuffix("model.language_"), "")
    ):
        if f"{start}{HEAD}" in shapes and EMBED in names:
            names[HEAD] = f"{start}{HEAD}"
            break
    return names


def named_tower(every: Sequence[Tower], prefix: str, where: str) -> Tower:
    """The one with this prefix, with or without its last dot or `layers.`. Raises `UsageError`."""
    wanted = prefix.removesuffix("layers.").removesuffix(".")
    wanted = f"{wanted}." if wanted else ""
    for tower in every:
        if tower.prefix == wanted:
            return tower
    known = [printable(t.prefix) for t in every]
    raise UsageError(
        "tower",
        f"--tower {printable(prefix)}: {where} has no layers there",
        hint=closest(wanted, known) if known else "it has no numbered layers at all",
    )


def _ambiguous(fitting: list[Tower], where: str, *, hint: str) -> SeveralTowers:
    shown = ", ".join(f"{printable(t.prefix)} ({t.count} layers)" for t in fitting[:6])
    return SeveralTowers("tower", f"{where}: several towers fit: {shown}", hint=hint)
