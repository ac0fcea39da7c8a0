"""What a conversion to Chain-of-Experts decides: modes, how a list of K experts is shared out, and what it costs.

Arithmetic and words only (arXiv 2506.18945 and the function-preserving conversions); standard library.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import UsageError, closest

MODES = ("split", "append", "identity", "paper")


@dataclass(frozen=True)
class Chain:
    """Everything that a converted model's config says beyond its base's; see `carried/configuration_coe.py`."""

    mode: str
    iterations: int
    topk: tuple[int, ...]
    reselect: str
    routers: str
    gate: str
    shared: str
    aux: str
    aux_alpha: float
    inner: bool
    outer: bool
    layers: tuple[int, ...] | None  # None: all that have experts

    @property
    def route(self) -> str:
        """How the weights of the experts become those of the iterations, in the words of config.json."""
        return "append" if self.mode == "identity" else self.mode

    def knobs(self) -> dict[str, Any]:
        """The keys that go into config.json."""
        return {
            "coe_iterations": self.iterations,
            "coe_topk": list(self.topk),
            "coe_route": self.route,
            "coe_reselect": self.reselect,
            "coe_routers": "share" if self.routers == "share" else "own",
            "coe_gate": "none" if self.mode == "paper" else self.gate,
            "coe_shared": self.shared,
            "coe_layers": None if self.layers is None else list(self.layers),
            "coe_inner_residual": self.inner,
            "coe_outer_residual": self.outer,
            "coe_aux": self.aux,
            "coe_aux_alpha": self.aux_alpha,
        }

    def gates(self, width: int) -> dict[str, tuple[tuple[int, int], float, float]]:
        """Gate tensors of one layer: name -> (shape, value of row 0, value of the other rows); alpha [C-1, H or 1] and
        beta [C, H or 1], at values that keep the function (paper mode has none)."""
        if self.mode == "paper":
            return {}
        wide = 1 if self.gate == "scalar" else width
        alpha = 0.0 if self.mode == "split" else 1.0
        rest = 1.0 if self.mode == "split" else 0.0
        found = {"coe_alpha": ((self.iterations - 1, wide), alpha, alpha)} if self.iterations > 1 else {}
        return found | {"coe_beta": ((self.iterations, wide), 1.0, rest)}

    def function(self, *, has_shared: bool) -> str:
        """What the conversion does to the model's function: "bit-exact", "rounding" or "changed"."""
        if self.mode == "paper":
            return "changed"
        if self.iterations == 1:
            return "bit-exact"
        if self.mode == "append":  # its output is that of the first pass
            return "changed" if has_shared and self.shared == "split" else "bit-exact"
        kept = self.reselect == "forbid" and not self.routers.startswith("noise")
        return "rounding" if kept and not (has_shared and self.shared == "every") else "changed"


def share_out(total: int, parts: int) -> tuple[int, ...]:
    """`total` in `parts` whole numbers, the larger first: (8, 3) -> 3, 3, 2."""
    return tuple(total // parts + (i < total % parts) for i in range(parts))


def parse_topk(text: str) -> tuple[int, ...]:
    """4,4 -> (4, 4). Raises `UsageError`."""
    words = text.split(",")
    if not all(w.strip().isascii() and w.strip().isdecimal() and 0 < int(w) < 10_000 for w in words):
        raise UsageError("topk", f"--topk-per-iter {text}: not a list of numbers", hint="write 4,4")
    return tuple(int(w) for w in words)


def check_word(option: str, value: str, known: Sequence[str]) -> str:
    """`value` if it is known or is "name:number" with "name:" known; raises `UsageError` otherwise."""
    name, colon, number = value.partition(":")
    if value in known and not value.endswith(":"):
        return value
    if colon and f"{name}:" in known:
        try:
            if 0 <= float(number) < float("inf"):
                return value
        except ValueError:
            pass
        raise UsageError("bad-option", f"{option} {value}: no number 0 or more", hint=f"write {name}:0.01")
    words = [k if not k.endswith(":") else f"{k}0.01" for k in known]
    raise UsageError("bad-option", f"{option} {value}: unknown", hint=closest(value, words))


def costs(chain: Chain, count: int, topk: int) -> dict[str, Any]:
    """Against the base layer: routed FLOPs per token, and bytes of experts read to decode one token and 64. A batch of
    T reads N·(1 − (1 − k/N)^T) distinct experts on average in each pass."""

    def read(picked: int, batch: int) -> float:
        return count * (1 - (1 - min(picked, count) / count) ** batch)

    def ratio(batch: int) -> float:
        return round(sum(read(k, batch) for k in chain.topk) / read(topk, batch), 4)

    return {"routed_flops": round(sum(chain.topk) / topk, 4), "decode_bytes": {"1": ratio(1), "64": ratio(64)}}


def describe_chain(report: Mapping[str, Any]) -> list[str]:
    """The lines that people see before a conversion."""
    c = report["chain"]
    each = ",".join(map(str, c["topk"]))
    if len(set(c["topk"])) == 1:
        each = str(c["topk"][0])
    layers, cost = report["layers"], report["costs"]
    decode = cost["decode_bytes"]
    lines = [
        f"family     {report['family']}  {layers['converted']} of {layers['total']} layers converted"
        f"  ({layers['experts']} have experts)",
        f"chain      K={report['topk']} -> C={c['iterations']} k={each} N={report['experts']} "
        f"(={sum(c['topk'])} per layer)  mode {c['mode']}, routers {c['routers']}, gate {c['gate']}, "
        f"shared {c['shared']}, reselect {c['reselect']}",
        f"adds       {report['added']['tensors']:,} tensors, {report['added']['bytes']:,} bytes in one file",
        f"costs      routed FLOPs per token {cost['routed_flops']:.2f}x, bytes of experts per decoded token "
        f"{decode['1']:.2f}x (batch 1), {decode['64']:.2f}x (batch 64)",
        f"function   {report['function']}",
        "loads in   Transformers (trust_remote_code=True, or surgery.hf.register()); vLLM, SGLang and llama.cpp do not "
        "know these models",
    ]
    return lines
