"""Warm starts: which tensors of a new operator can be taken from the operator that it replaces, and how.

Each function gets the fresh values of the new operator (name -> source, as its constructor would draw them) and the
shapes of the old one's tensors, both with names relative to the slot, and returns the same names with a source for
each. What has no counterpart keeps its fresh value, with a note. Standard library only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from surgery.arch.sources import Concat, Constant, Fresh, Rows, Same, Shape, Source, Take, Tap
from surgery.errors import UsageError

# The linear layers q, k, v, output of attention as the operators name them: diffusers' Attention, and our swa.
_ATTENTION_NAMES = (("to_q", "to_k", "to_v", "to_out.0"), ("q_proj", "k_proj", "v_proj", "out_proj"))


def fresh_only(fresh: Mapping[str, Fresh], old: Mapping[str, Shape]) -> dict[str, Source]:
    """Nothing of the old operator has a counterpart."""
    return {name: replace(value, note="the replaced operator has no counterpart") for name, value in fresh.items()}


def attention(fresh: Mapping[str, Fresh], old: Mapping[str, Shape]) -> dict[str, Source]:
    """mha and swa take q, k, v and output of any attention; swa with w ≥ N-1 is then the same function."""
    origin, target = _attention_linears(old), _attention_linears(fresh)
    plan = fresh_only(fresh, old)
    if origin is None or target is None:
        return plan
    for new, source in zip(target, origin, strict=True):
        plan[f"{new}.weight"] = _same_or_fresh(f"{source}.weight", old, fresh[f"{new}.weight"])
        plan[f"{new}.bias"] = _bias(f"{source}.bias", old, fresh[f"{new}.bias"])
    return plan


def hyena(fresh: Mapping[str, Fresh], old: Mapping[str, Shape], *, taps: Mapping[str, int]) -> dict[str, Source]:
    """in_proj ← [W_q; W_k; W_v], out_proj ← W_o, every filter the identity: y = W_o(q ⊙ k ⊙ v).

    From another gated convolution of the family: both projections, the filters again as the identity. `taps` gives the
    position of the current token in each filter that the operator has.
    """
    plan = fresh_only(fresh, old)
    dim = fresh["out_proj.weight"].shape[0]
    for name, tap in taps.items():
        plan[f"{name}.weight"] = Tap(fresh[f"{name}.weight"].shape, tap)
        plan[f"{name}.bias"] = Constant(fresh[f"{name}.bias"].shape, 0.0)
    origin = _attention_linears(old)
    if origin is not None and all(old[f"{part}.weight"] == (dim, dim) for part in origin):
        *qkv, out = origin
        plan["in_proj.weight"] = Concat(tuple(Rows(f"{part}.weight", 0, dim) for part in qkv))
        plan["in_proj.bias"] = Concat(
            tuple(Rows(f"{part}.bias", 0, dim) if f"{part}.bias" in old else Constant((dim,), 0.0) for part in qkv)
        )
        plan["out_proj.weight"] = Same(f"{out}.weight")
        plan["out_proj.bias"] = _bias(f"{out}.bias", old, fresh["out_proj.bias"])
    elif old.get("in_proj.weight") == (3 * dim, dim):
        for name in ("in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias"):
            plan[name] = _same_or_fresh(name, old, fresh[name])
    return plan


def feed_forward(
    fresh: Mapping[str, Fresh], old: Mapping[str, Shape], *, gated: bool, units: Sequence[int] | None
) -> dict[str, Source]:
    """mlp from an mlp of another width.

    Narrower: the hidden units named by `units`, or the first. Wider: all old units, and new ones with drawn input
    weights and output weights of exactly 0, so the function does not change. `gated` activations hold value rows, then
    gate rows. Raises UsageError when `units` is not one index into the old hidden layer for each new unit.
    """
    proj, out = "net.0.proj", "net.2"
    parts = 2 if gated else 1
    dim, new = fresh[f"{out}.weight"].shape
    rows = old.get(f"{proj}.weight", (0, 0))
    width = old.get(f"{out}.weight", (0, 0))[-1]
    # Other shapes: the old operator is no mlp, or only one of the two activations is gated.
    if rows != (parts * width, dim) or width == 0:
        return fresh_only(fresh, old)
    if units is not None:
        _check_units(units, new, width)
    plan: dict[str, Source] = {f"{out}.bias": _bias(f"{out}.bias", old, fresh[f"{out}.bias"])}
    if new == width and units is None:
        for name in (f"{proj}.weight", f"{proj}.bias", f"{out}.weight"):
            plan[name] = _same_or_fresh(name, old, fresh[name])
    elif new <= width:
        kept = tuple(units) if units is not None else tuple(range(new))
        for name in (f"{proj}.weight", f"{proj}.bias"):
            plan[name] = _select_rows(name, kept, width, parts)
        plan[f"{out}.weight"] = Take(f"{out}.weight", 1, kept)
    else:
        for name in (f"{proj}.weight", f"{proj}.bias"):
            drawn = fresh[name]
            added = replace(drawn, shape=(new - width, *drawn.shape[1:]))
            plan[name] = Concat(
                tuple(piece for i in range(parts) for piece in (Rows(name, i * width, (i + 1) * width), added))
            )
        plan[f"{out}.weight"] = Concat((Same(f"{out}.weight"), Constant((dim, new - width), 0.0)), axis=1)
    return plan


def _select_rows(name: str, kept: tuple[int, ...], width: int, parts: int) -> Source:
    """The rows of the kept hidden units; the first ones are a run of bytes."""
    if kept == tuple(range(len(kept))):
        runs = tuple(Rows(name, i * width, i * width + len(kept)) for i in range(parts))
        return runs[0] if parts == 1 else Concat(runs)
    return Take(name, 0, tuple(i * width + unit for i in range(parts) for unit in kept))


def _check_units(units: Sequence[int], new: int, width: int) -> None:
    if len(units) != new or len(set(units)) != len(units) or any(not 0 <= unit < width for unit in units):
        raise UsageError(
            "bad-units",
            f"{len(units)} hidden units were named to keep; {new} different ones of 0-{width - 1} are needed",
            hint="give one index for each hidden unit of the new mlp",
        )


def _attention_linears(names: Mapping[str, object]) -> tuple[str, ...] | None:
    for linears in _ATTENTION_NAMES:
        if all(f"{linear}.weight" in names for linear in linears):
            return linears
    return None


def _same_or_fresh(name: str, old: Mapping[str, Shape], value: Fresh) -> Source:
    if old.get(name) == value.shape:
        return Same(name)
    return replace(value, note=f"the replaced operator has no {name} of this shape")


def _bias(name: str, old: Mapping[str, Shape], value: Fresh) -> Source:
    """A linear layer without bias is one with bias 0."""
    return Constant(value.shape, 0.0) if name not in old else _same_or_fresh(name, old, value)
