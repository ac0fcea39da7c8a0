"""Routed experts against their targets: on a GPU where there is one, and what a CPU can show.

GPU targets, bf16: at least 75 % (forward) and 65 % (backward) of a plain batched product from 8192 tokens on, 70 % of
the memory's bandwidth up to 64 tokens, not slower than grouped_mm, 1.2 times Liger's fused experts, and a chain of two
within 1.15 times the mixture of as many experts. Each is a row when the device and the package are there; what is not
run is named on stderr. On a CPU: grouped_mm not slower than the loop, by CPU time, runs taking turns. What a
converted layer costs there beside the unconverted one is in coe.py.
"""

import sys
import time
from collections.abc import Callable

import torch
from measure import finish, row
from surgery.kernels import moe
from surgery.kernels.moe.chain import Chain, Router
from surgery.kernels.moe.experts import Experts
from surgery.kernels.moe.routed import choose

from surgery.evals.kernels import Report, Shape, measure

GPU_PREFILL = {
    "paper": Shape(32768, 1024, 704, 63, 8, 2),
    "OLMoE": Shape(32768, 2048, 1024, 64, 8, 2),
    "Qwen3-30B-A3B": Shape(32768, 2048, 768, 128, 8, 2),
}
GPU_DECODE = {"Qwen3-30B-A3B, 64 tokens": Shape(64, 2048, 768, 128, 8), "1 token": Shape(1, 2048, 768, 128, 8)}


def main() -> None:
    rows = _cpu()
    if torch.cuda.is_available():
        rows += _gpu()
    else:
        print(
            "not run: every GPU target (no CUDA device); triton kernels are interpreted and compiled only",
            file=sys.stderr,
        )
    finish("kernels", rows)


def _cpu() -> list[dict[str, object]]:
    """A layer of experts by both backends of a CPU, one thread, fp32."""
    torch.set_num_threads(1)
    rows = []
    for tokens in (256, 1024):
        h, i, n, k = 512, 256, 32, 4
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(*size, generator=generator)

        pool = Experts(draw(n, 2 * i, h) / h**0.5, draw(n, h, i) / i**0.5)
        x, router = draw(tokens, h), Router(draw(n, h) / h**0.5)
        assert choose("auto", x, pool) == "grouped_mm"
        plain = Chain((k,), normalize=True)

        def grouped(x=x, router=router, pool=pool, plain=plain) -> torch.Tensor:
            return moe.coe_layer(x, [router], pool, None, torch.ones(1, 1), plain)

        def loop(x=x, router=router, pool=pool, plain=plain) -> torch.Tensor:
            return moe.coe_layer(x, [router], pool, None, torch.ones(1, 1), plain, backend="loop")

        with torch.no_grad():
            a, b = _turns((grouped, loop))
        label = f"T={tokens} H={h} I={i} N={n} K={k}"
        rows.append(row(f"CPU, grouped_mm / loop, {label}", a / b, "x", 1.0, f"{b * 1e3:.1f} CPU ms by the loop"))
    return rows


def _turns(calls: tuple[Callable[[], object], ...], *, rounds: int = 15) -> list[float]:
    """Median CPU seconds of each call, one after the other in every round, so that all see the same machine."""
    found: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 2):
        for at, call in enumerate(calls):
            started = time.process_time()
            call()
            if number >= 2:
                found[at].append(time.process_time() - started)
    return [sorted(times)[rounds // 2] for times in found]


def _gpu() -> list[dict[str, object]]:
    rows = []
    names = ("triton", "grouped_mm", "liger", "sonicmoe")
    common = {"device": "cuda:0", "dtype": torch.bfloat16, "assignments": ("balanced",)}
    for label, shape in GPU_PREFILL.items():
        found = measure(shape, names, backward=True, **common)
        _say(label, found)
        ours, back = _ms(found, "triton", "forward"), _ms(found, "triton", "backward")
        rows.append(row(f"{label}, forward / batched product", ours / found.roof["bmm_forward_ms"], "x", 1 / 0.75))
        rows.append(row(f"{label}, backward / batched product", back / found.roof["bmm_backward_ms"], "x", 1 / 0.65))
        for other, limit in (("grouped_mm", 1.0), ("liger", 1 / 1.2)):
            if _has(found, other):
                both = _ms(found, other, "forward") + _ms(found, other, "backward")
                rows.append(row(f"{label}, triton / {other}, forward and backward", (ours + back) / both, "x", limit))
        chain = _ms(found, "triton", "forward", "layer") / _ms(found, "triton", "forward", "layer C=1")
        rows.append(row(f"{label}, chain of two / mixture", chain, "x", 1.15))
    for label, shape in GPU_DECODE.items():
        found = measure(shape, ("triton", "grouped_mm"), **common)
        _say(label, found)
        rows.append(
            row(f"{label}, forward / floor", _ms(found, "triton", "forward") / found.roof["forward"], "x", 1 / 0.7)
        )
    return rows


def _ms(found: Report, backend: str, direction: str, what: str = "experts") -> float:
    return next(r.ms for r in found.rows if (r.backend, r.direction, r.what) == (backend, direction, what))


def _has(found: Report, backend: str) -> bool:
    return {r.direction for r in found.rows if r.backend == backend and r.what == "experts"} == {"forward", "backward"}


def _say(label: str, found: Report) -> None:
    print(f"{label}: {found.shape.words()} on {found.machine}, {found.roof['source']}", file=sys.stderr)
    for line in found.not_run:
        print(f"not run: {label}: {line['backend']}: {line['why']}", file=sys.stderr)


if __name__ == "__main__":
    main()
