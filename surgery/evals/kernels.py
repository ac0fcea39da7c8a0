"""How fast routed experts are: every backend on one shape, against what the machine can do at best.

Numbers are of this machine and this run. What cannot run here is named with its reason; nothing is estimated.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from surgery.kernels import moe
from surgery.kernels.moe.chain import Chain, Router, Workspace
from surgery.kernels.moe.experts import Experts
from surgery.kernels.moe.launch import interpreting
from surgery.kernels.moe.routed import BACKENDS as OURS
from surgery.kernels.moe.routed import compute, why_not

BACKENDS = ("loop", "grouped_mm", "batched_mm", "triton", "sonicmoe", "liger")
ASSIGNMENTS = ("balanced", "zipf", "router")
# Dense bf16 TFLOP/s and TB/s of memory, as their makers state them; other devices are measured.
PEAKS = {"H100 80GB HBM3": (989.4, 3.35), "H200": (989.4, 4.8), "A100-SXM4-80GB": (312.0, 2.039), "B200": (2250.0, 8.0)}
DECODE_TOKENS = 64


@dataclass(frozen=True)
class Shape:
    """T tokens, H channels, I columns an expert, N experts, K experts a token and layer, in C iterations."""

    tokens: int
    hidden: int
    width: int
    experts: int
    k: int
    iterations: int = 1

    @property
    def topk(self) -> tuple[int, ...]:
        """K over the iterations, the first ones first: 8 in 3 are 3, 3, 2."""
        each, more = divmod(self.k, self.iterations)
        return tuple(each + (t < more) for t in range(self.iterations))

    def words(self) -> str:
        """One line for the head of a table."""
        each = ",".join(map(str, self.topk))
        return (
            f"T={self.tokens} H={self.hidden} I={self.width} C={self.iterations} k={each} N={self.experts} "
            f"(={self.k} per layer)"
        )

    def flops(self, direction: str) -> float:
        """Forward: 6 T K H I; backward: twice that."""
        return (6.0 if direction == "forward" else 12.0) * self.tokens * self.k * self.hidden * self.width

    def bytes(self, item: int) -> float:
        """Least traffic of a forward pass: input and output, the weights of the experts that are expected to be chosen
        at least once in each iteration, and the rows between the products."""
        total = 0.0
        for k in self.topk:
            active = self.experts * (1 - (1 - k / self.experts) ** self.tokens)
            rows = 2 * self.tokens * k * (self.width + self.hidden)
            total += 2 * self.tokens * self.hidden + active * 3 * self.hidden * self.width + rows
        return item * total


@dataclass(frozen=True)
class Row:
    """One figure. `of_bmm`: percent of the speed of a plain batched product; `of_roof`: of the machine's limit."""

    backend: str
    what: str
    assignment: str
    direction: str
    ms: float
    spread: float
    cpu_ms: float | None
    tflops: float
    of_bmm: float
    of_roof: float
    peak_memory: int | None
    note: str = ""


@dataclass
class Report:
    """Everything that was measured, and what was not."""

    shape: Shape
    machine: dict[str, Any]
    roof: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    not_run: list[dict[str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "shape": asdict(self.shape) | {"topk": list(self.shape.topk), "words": self.shape.words()},
            "machine": self.machine,
            "roof": self.roof,
            "rows": [asdict(r) for r in self.rows],
            "not_run": self.not_run,
        }


def measure(
    shape: Shape,
    backends: Sequence[str],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    assignments: Sequence[str] = ASSIGNMENTS,
    backward: bool = False,
    seconds: float = 0.5,
    seed: int = 0,
    report: Callable[[str, Mapping[str, float]], None] | None = None,
) -> Report:
    """Time routed experts (K at once) under each assignment, and with C > 1 the whole layer, chained and plain.

    `seconds` is the least time that goes into one figure on a CPU; on CUDA triton's `do_bench` decides, which empties
    the L2 cache in between, and up to 64 tokens run as a CUDA graph. Inputs are drawn from `seed`.
    """
    clock = Clock(device, seconds, graph=shape.tokens <= DECODE_TOKENS)
    data = _Data(shape, device, dtype, seed)
    bound = _bmm_bound(shape, data, clock)
    roof = _roof(shape, data, clock, bound)
    found = Report(shape, machine(device, dtype), roof)
    refused = {name: _refusal(name, data) for name in backends}
    found.not_run += [{"backend": name, "why": why} for name, why in refused.items() if why]
    able = [name for name in backends if not refused[name]]
    directions = ("forward", "backward") if backward else ("forward",)
    layers = [name for name in able if name in OURS] if shape.iterations > 1 else []
    work: list[tuple[str, str, str, str]] = [
        (name, "experts", assignment, d) for assignment in assignments for name in able for d in directions
    ]
    work += [(name, what, "router", d) for name in layers for what in ("layer C=1", "layer") for d in directions]
    for done, (name, what, assignment, direction) in enumerate(work):
        if report:
            report("kernels", {"done": done, "total": len(work)})
        try:
            call = data.experts_call(name, assignment) if what == "experts" else data.layer_call(name, what == "layer")
            if direction == directions[0]:
                data.verify(call, data.experts_call("loop", assignment) if what == "experts" else None)
            found.rows.append(_row(name, what, assignment, direction, call, shape, clock, bound, roof))
        except Exception as err:
            # Others' code fails in ways of its own; ours may run out of memory or refuse, and nothing else.
            if name in OURS and not isinstance(err, RuntimeError | ValueError | MemoryError):
                raise
            why = " ".join(str(err).split())[:200] or type(err).__name__
            found.not_run.append({"backend": name, "why": f"{what}, {assignment}, {direction}: {why}"})
    if report:
        report("kernels", {"done": len(work), "total": len(work)})
    return found


@dataclass(frozen=True)
class Time:
    """Median wall ms, its spread (between the quartiles, as a share), and on a CPU the median CPU ms of all threads."""

    wall: float
    spread: float
    cpu: float | None

    @property
    def counted(self) -> float:
        """What ratios are made of: a CPU may be busy with other work, a GPU is taken to be ours."""
        return self.wall if self.cpu is None else self.cpu


class Clock:
    """Times a call."""

    def __init__(self, device: str, seconds: float, *, graph: bool) -> None:
        self.cuda = device.startswith("cuda")
        self.seconds, self.graph = seconds, graph

    def __call__(self, call: Callable[[], Any], *, graph: bool = True) -> Time:
        if self.cuda:
            return Time(*self._on_cuda(call, graph=graph and self.graph), None)
        call()
        walls, cpus, started = [], [], time.monotonic()
        # Three at least, but a call that is slow beyond measure is not waited for thrice.
        while not walls or (time.monotonic() - started < self.seconds * (1 if len(walls) >= 3 else 10)):
            if len(walls) == 200:
                break
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            cpus.append(time.process_time() - cpu)
            walls.append(time.perf_counter() - wall)
        middle = statistics.median(walls)
        quarter = statistics.quantiles(walls, n=4) if len(walls) > 1 else [middle] * 3
        return Time(middle * 1e3, (quarter[2] - quarter[0]) / middle, statistics.median(cpus) * 1e3)

    def _on_cuda(self, call: Callable[[], Any], *, graph: bool) -> tuple[float, float]:
        from triton.testing import do_bench, do_bench_cudagraph

        bench = do_bench_cudagraph if graph else do_bench
        low, middle, high = bench(call, quantiles=[0.25, 0.5, 0.75])
        return middle, (high - low) / middle


class _Data:
    """Inputs of one shape, made once."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype, seed: int) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self.generator = torch.Generator().manual_seed(seed)
        h, i, n = shape.hidden, shape.width, shape.experts
        self.x = self._random(shape.tokens, h)
        self.experts = Experts(self._random(n, 2 * i, h) / h**0.5, self._random(n, h, i) / i**0.5)
        self.routers = [self._random(n, h) / h**0.5 for _ in range(shape.iterations)]
        self.gates = torch.zeros(shape.iterations - 1, h, device=device), torch.ones(shape.iterations, h, device=device)
        self.workspace = Workspace()
        self.drawn: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def _random(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self.generator).to(self.device, self.dtype)

    def assigned(self, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        """`assign`, drawn once: every backend gets the same."""
        if kind not in self.drawn:
            self.drawn[kind] = self.assign(kind)
        return self.drawn[kind]

    def assign(self, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and weights [T, K]: every expert equally often; the r-th chosen in proportion to 1/r; or by a router."""
        t, n, k = self.shape.tokens, self.shape.experts, self.shape.k
        if kind == "router":
            weights, index = moe.route(self.x.float() @ self.routers[0].float().T, k, normalize=True)
            return index, weights
        if kind == "balanced":
            index = (torch.arange(t)[:, None] * k + torch.arange(k)) % n
        else:
            share = (1 / torch.arange(1, n + 1)).expand(t, n)
            index = torch.multinomial(share, k, generator=self.generator)
        return index.to(self.device), torch.full((t, k), 1 / k, device=self.device)

    def verify(self, call: "Call", definition: "Call | None") -> None:
        """A fast wrong answer is no figure: raises ValueError when the result is not that of the definition."""
        with torch.no_grad():
            got = call.function(*call.inputs).float()
            if not got.isfinite().all():
                raise ValueError("the result is not finite")
            if definition is not None:
                wanted = definition.function(*definition.inputs).float()
                error = ((got - wanted).abs().max() / wanted.abs().max()).item()
                if not error <= (1e-4 if self.dtype == torch.float32 else 3e-2):
                    raise ValueError(f"the result is off by {error:.2g} of the largest value")

    def experts_call(self, name: str, assignment: str) -> "Call":
        index, weights = self.assigned(assignment)
        e = self.experts
        if name == "liger":
            from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

            ids = index.to(torch.int32)
            return Call(lambda x, up, down: LigerFusedMoEFunction.apply(x, up, down, ids, weights), self)
        if name == "sonicmoe":
            return Call(_sonicmoe(index, weights), self)
        function = compute(name)
        return Call(lambda x, up, down: function(x, index, weights, Experts(up, down)), self, e)

    def layer_call(self, name: str, chained: bool) -> "Call":
        """The layer with its routers: split over C iterations, or K at once."""
        topk = self.shape.topk if chained else (self.shape.k,)
        alpha, beta = (self.gates[0], self.gates[1]) if chained else (None, self.gates[1][:1])
        cfg = Chain(topk, base_k=self.shape.k, normalize=True, reselect="forbid")
        routers = [Router(w) for w in self.routers[: len(topk)]]

        def layer(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
            pool = Experts(up, down)
            return moe.coe_layer(x, routers, pool, alpha, beta, cfg, backend=name, workspace=self.workspace)

        return Call(layer, self)


class Call:
    """Forward, or backward alone, of a function of (x, gate_up, down)."""

    def __init__(self, function: Callable[..., torch.Tensor], data: _Data, experts: Experts | None = None) -> None:
        experts = experts or data.experts
        self.function, self.inputs = function, (data.x, experts.gate_up_proj, experts.down_proj)

    def forward(self) -> Callable[[], Any]:
        """A call that computes without gradients."""

        def call() -> None:
            with torch.no_grad():
                self.function(*self.inputs)

        return call

    def backward(self) -> Callable[[], Any]:
        """A call that goes back through one forward pass, which is made here."""
        inputs = [t.detach().requires_grad_() for t in self.inputs]
        out = self.function(*inputs)
        grad = torch.ones_like(out)
        return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def _row(name, what, assignment, direction, call: Call, shape, clock: Clock, bound, roof) -> Row:
    run = call.forward() if direction == "forward" else call.backward()
    if clock.cuda:
        torch.cuda.reset_peak_memory_stats()
    graph = direction == "forward" and name in ("triton", "grouped_mm", "batched_mm")
    time_ = clock(run, graph=graph)
    peak = torch.cuda.max_memory_allocated() if clock.cuda else None
    return Row(
        name,
        what,
        assignment,
        direction,
        time_.wall,
        time_.spread,
        time_.cpu,
        shape.flops(direction) / time_.counted / 1e9,
        100 * bound[direction] / time_.counted,
        100 * roof[direction] / time_.counted,
        peak,
        "" if graph or not (clock.cuda and clock.graph) else "no CUDA graph",
    )


def _bmm_bound(shape: Shape, data: _Data, clock: Clock) -> dict[str, float]:
    """ms of the same products on balanced batches: no gather, no gate. Nothing practical is faster for many tokens."""
    rows = max(1, shape.tokens * shape.k // shape.experts)
    e, n = data.experts, shape.experts
    x = data._random(n, rows, shape.hidden)
    act = data._random(n, rows, shape.width)
    grad = data._random(n, rows, 2 * shape.width)
    up, down = e.gate_up_proj, e.down_proj

    def forward() -> None:
        torch.bmm(x, up.transpose(1, 2))
        torch.bmm(act, down.transpose(1, 2))

    def backward() -> None:
        torch.bmm(x, down)
        torch.bmm(grad, up)
        torch.bmm(grad.transpose(1, 2), x)
        torch.bmm(x.transpose(1, 2), act)

    with torch.no_grad():
        return {"forward": clock(forward, graph=False).counted, "backward": clock(backward, graph=False).counted}


def _roof(shape: Shape, data: _Data, clock: Clock, bound: Mapping[str, float]) -> dict[str, Any]:
    """The floor in ms by FLOPs and by bytes, from stated peaks or, without them, from what this machine did."""
    name = torch.cuda.get_device_name() if clock.cuda else ""
    stated = next((peak for key, peak in PEAKS.items() if key in name), None) if data.dtype != torch.float32 else None
    item = torch.empty(0, dtype=data.dtype).element_size()
    if stated:
        flops, memory, source = stated[0] * 1e12, stated[1] * 1e12, "stated by the maker"
    else:
        batch = max(1, shape.tokens * shape.k // shape.experts) * shape.experts
        flops = 6.0 * batch * shape.hidden * shape.width / (bound["forward"] / 1e3)
        block = torch.empty(16 * 2**20, dtype=torch.float32, device=data.device)
        other = torch.zeros_like(block)
        memory = 2 * block.numel() * 4 / (clock(lambda: block.copy_(other), graph=False).counted / 1e3)
        source = "measured here by a batched product and a copy of 64 MiB"
    by_flops = shape.flops("forward") / flops * 1e3
    by_bytes = shape.bytes(item) / memory * 1e3
    return {
        "source": source,
        "tflops": flops / 1e12,
        "tb_per_s": memory / 1e12,
        "forward": max(by_flops, by_bytes),
        "backward": 2 * by_flops,
        "bound": "compute" if by_flops >= by_bytes else "memory",
        "bmm_forward_ms": bound["forward"],
        "bmm_backward_ms": bound["backward"],
    }


def _refusal(name: str, data: _Data) -> str:
    """Why a backend cannot be timed here; empty when it can."""
    if name == "triton" and interpreting():
        return "TRITON_INTERPRET is set; how long the interpreter takes says nothing"
    if name in OURS:
        return why_not(name, data.experts)
    cuda = data.device.startswith("cuda")
    if name == "batched_mm":
        item = torch.empty(0, dtype=data.dtype).element_size()
        size = data.shape.tokens * data.shape.k * 3 * data.shape.hidden * data.shape.width * item
        room = torch.cuda.mem_get_info()[0] if cuda else _free_memory()
        return f"copies {size / 2**30:.1f} GiB of weights, a quarter of the memory is free" if size > room / 4 else ""
    if name == "liger":
        from importlib.util import find_spec

        if find_spec("liger_kernel") is None:
            return "liger-kernel is not installed"
        return "" if cuda else "runs on CUDA only"
    from transformers.integrations.sonicmoe import is_sonicmoe_loadable

    try:
        is_sonicmoe_loadable(raise_error=True)
    except ImportError as err:
        return str(err)
    return ""


def _sonicmoe(index: torch.Tensor, weights: torch.Tensor) -> Callable[..., torch.Tensor]:
    from types import SimpleNamespace

    from transformers.integrations.sonicmoe import sonicmoe_experts_forward

    def call(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        module = SimpleNamespace(
            gate_up_proj=up, down_proj=down, has_gate=True, has_bias=False, has_post_expert_norm=False,
            is_transposed=False, is_concatenated=True, num_experts=up.shape[0], _is_expert_parallel=False,
            config=SimpleNamespace(hidden_act="silu"), training=x.requires_grad,
        )  # fmt: skip
        return sonicmoe_experts_forward(module, x, index, weights)

    return call


def _free_memory() -> float:
    import os

    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def machine(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """What the figures belong to: device, versions, threads, clocks."""
    import importlib.metadata
    import platform
    import subprocess

    found: dict[str, Any] = {
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "machine": platform.machine(),
    }
    for package in ("torch", "triton", "transformers", "liger-kernel", "kernels"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if not device.startswith("cuda"):
        return found | {"threads": torch.get_num_threads()}
    found |= {"gpu": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    try:
        found["clocks"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()
    except OSError:
        found["clocks"] = None
    return found
