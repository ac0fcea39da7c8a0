"""Run a model over text and note what its routers choose, in every layer and pass."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.errors import UsageError
from surgery.evals.routing.metrics import balance, co_activation, load, norm_ratio, reselection


@dataclass
class _Passes:
    """What was seen of one layer: per pass the choices, the first weights, and norms (sum of means, batches)."""

    index: list[list[torch.Tensor]] = field(default_factory=list)
    top: list[list[float]] = field(default_factory=list)
    norms: list[list[float]] = field(default_factory=list)

    def add(self, t: int, weights: torch.Tensor, index: torch.Tensor) -> None:
        while len(self.index) <= t:
            self.index.append([])
            self.top.append([])
            self.norms.append([])
        self.index[t].append(index.cpu())
        share = weights.float() / weights.float().sum(-1, keepdim=True).clamp_min(1e-20)
        self.top[t].append(float(share.max(-1).values.mean()))


@dataclass(frozen=True)
class PassReport:
    """One pass of one layer; `co_activation` is against the pass before, None for the first."""

    layer: int
    iteration: int
    load: torch.Tensor
    numbers: Mapping[str, float]
    co_activation: torch.Tensor | None


@torch.no_grad()
def record_routing(
    model: Any, ids: torch.Tensor, *, length: int, report: Callable[[str, Mapping[str, float]], None]
) -> list[PassReport]:
    """What the routers of `model` choose for the tokens `ids` [n], read in sequences of `length`, eight at a time.

    Plain mixtures of experts have one pass. Raises `UsageError` for a model without routers that we know.
    """
    seen: dict[int, _Passes] = {}
    sequences = ids[: len(ids) // length * length].view(-1, length)
    if not len(sequences):
        raise UsageError("text", f"{len(ids)} tokens are less than one sequence of {length}", hint="a longer text")
    with _watched(model, seen):
        batches = list(sequences.split(8))
        for done, batch in enumerate(batches, start=1):
            model(batch.to(model.device))
            report("routing", {"done": done, "total": len(batches)})
    experts = {number: _experts(block) for number, block in _blocks(model).items()}
    return [row for number, passes in sorted(seen.items()) for row in _rows(model, number, passes, experts[number])]


def _rows(model: Any, number: int, passes: _Passes, experts: int) -> Iterator[PassReport]:
    block = _blocks(model)[number]
    before: torch.Tensor | None = None
    for t, chosen in enumerate(passes.index):
        index = torch.cat(chosen)
        f = load(index, experts)
        numbers: dict[str, float] = {"k": index.shape[1], "tokens": len(index), **balance(f)}
        numbers["top1_weight"] = sum(passes.top[t]) / len(passes.top[t])
        pairs = None
        if before is not None:
            numbers["reselection"] = reselection(before, index, experts)
            pairs = co_activation(before, index, experts)
        if passes.norms[t]:
            numbers["m_over_n"] = sum(passes.norms[t]) / len(passes.norms[t])
        for name in ("alpha", "beta"):
            gates = getattr(block, f"coe_{name}", None)
            if gates is not None and t < len(gates):
                # A scalar gate stands for one of every channel.
                width = model.config.hidden_size / gates.shape[1]
                numbers[f"{name}_norm"] = float(gates[t].float().norm()) * width**0.5
        before = index
        yield PassReport(number, t, f, numbers, pairs)


def _blocks(model: Any) -> dict[int, Any]:
    """The blocks of experts by layer."""
    found: dict[int, Any] = {}
    for number, layer in enumerate(getattr(getattr(model, "model", model), "layers", ())):
        for child in layer.children():
            if hasattr(child, "experts") and _router(child) is not None:
                found[number] = child
    if not found:
        raise UsageError("no-experts", "no layer has experts with a router", hint="a mixture of experts is needed here")
    return found


def _router(block: Any) -> Any:
    router = getattr(block, "gate", None)
    return router if router is not None and hasattr(router, "top_k") else getattr(block, "router", None)


def _experts(block: Any) -> int:
    return int(_router(block).weight.shape[0])


@contextmanager
def _watched(model: Any, seen: dict[int, _Passes]) -> Iterator[None]:
    """Note choices and sizes while the model runs; everything is put back."""
    undo: list[Callable[[], None]] = []
    try:
        for number, block in _blocks(model).items():
            seen[number] = _Passes()
            undo += _watch_chain(block, seen[number]) if hasattr(block, "coe_count") else _watch(block, seen[number])
        yield
    finally:
        for step in undo:
            step()


def _watch(block: Any, passes: _Passes) -> list[Callable[[], None]]:
    def routed(module: Any, args: Any, out: Any) -> None:
        passes.add(0, out[1], out[2])

    def mixed(module: Any, args: Any, out: Any) -> None:
        passes.norms[0].append(norm_ratio(out, args[0]))

    return [_router(block).register_forward_hook(routed).remove, block.experts.register_forward_hook(mixed).remove]


def _watch_chain(block: Any, passes: _Passes) -> list[Callable[[], None]]:
    """A chain's lists are shared out after its routers, so its own methods are watched. A hook on each router keeps the
    chain from leaving passes out or running them together."""
    choose, mix = block.choose, block.mix
    start: list[torch.Tensor] = []

    def watched_choose(t: int, z: torch.Tensor, taken: list[torch.Tensor], batch: int) -> Any:
        if t == 0:
            start[:] = [z]
        weights, index = choose(t, z, taken, batch)
        passes.add(t, weights, index)
        return weights, index

    def watched_mix(group: list[int], z: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        m: torch.Tensor = mix(group, z, index, weights)
        passes.norms[group[0]].append(norm_ratio(m, start[0]))
        return m

    def put_back() -> None:
        del block.choose, block.mix

    block.choose, block.mix = watched_choose, watched_mix
    hooks = [router.register_forward_hook(lambda *_: None).remove for router in block.routers()]
    return [put_back, *hooks]
