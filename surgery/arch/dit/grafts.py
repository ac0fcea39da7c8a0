"""A graft as asked for: `SLOT=OP[:k=v,…][@LAYERS]` items made into entries, and what they cost.

Names, shapes and arithmetic only; nothing is read from disk and torch is not imported.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from surgery.arch.dit.config import Dims, Graft, resolve_graft, stock_operator
from surgery.arch.dit.operators import OPERATORS
from surgery.arch.layers import parse_layers
from surgery.errors import UsageError


def parse_replacements(replace: Sequence[str], layers: str, config: Mapping[str, Any]) -> list[Graft]:
    """The entries asked for, by block; `layers` serves the items without their own.

    Raises `UsageError`: unknown slot or operator, an operator of another slot, a slot of a block given twice, layers
    out of range, arguments that do not fit the model.
    """
    if not replace:
        raise UsageError("nothing-to-replace", "no --replace given", hint="for example --replace attn=hyena")
    dims = Dims.from_config(config)
    entries: dict[tuple[int, str], Graft] = {}
    for item in replace:
        slot, equals, rest = item.partition("=")
        if not equals or not rest:
            raise UsageError(
                "bad-replace", f"--replace {item}: not SLOT=OPERATOR", hint="for example attn=hyena, mlp=r3"
            )
        text, at, own_layers = rest.partition("@")
        if at and not own_layers.strip():
            raise UsageError(
                "bad-replace", f"--replace {item}: no blocks after @", hint="for example attn=hyena@1,3,8-12"
            )
        spec, args = resolve_graft(config, slot, text)
        for block in parse_layers(own_layers or layers, dims.n_layers):
            if (block, slot) in entries:
                raise UsageError(
                    "slot-twice",
                    f"--replace gives {slot} of block {block} twice",
                    hint="each slot of a block may stand once",
                )
            entries[block, slot] = Graft(block, slot, spec.name, args)
    return [entries[k] for k in sorted(entries)]


def flops(config: Mapping[str, Any], grafts: Iterable[Graft], slots: Iterable[str]) -> dict[str, int]:
    """FLOPs of one sample over all blocks in `slots`: what mixes ("core") and the projections ("features")."""
    dims = Dims.from_config(config)
    grafted = {(e.block, e.slot): e for e in grafts}
    core = features = 0
    for slot in slots:
        stock, stock_args = stock_operator(config, slot)
        own = stock.flops(**dims.place, **stock_args)
        for block in range(dims.n_layers):
            entry = grafted.get((block, slot))
            one, other = OPERATORS[entry.op].flops(**dims.place, **entry.args) if entry else own
            core, features = core + one, features + other
    return {"core": core, "features": features}


def flops_report(
    config: Mapping[str, Any], before: Sequence[Graft], after: Sequence[Graft], slots: Sequence[str]
) -> dict[str, Any]:
    """{"core": {"before", "after"}, "features": {…}}, the FLOPs of the touched slots (paper Tab. 4)."""
    old, new = flops(config, before, slots), flops(config, after, slots)
    return {kind: {"before": old[kind], "after": new[kind]} for kind in ("core", "features")}
