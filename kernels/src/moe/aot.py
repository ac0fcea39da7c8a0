"""Compile every shipped launch for GPUs that are not here, and read what the compiler made of it.

The launches are those that the host's code makes: it runs on tensors without memory while launches are recorded. This
proves that a configuration compiles, fits a block's shared memory and registers, and uses tensor cores. It proves
nothing about speed, races, or results: nothing is run.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .chain import Chain, Router, Workspace
from .experts import Experts
from .launch import Launch, recording
from .tiles import SIZES, table

# Shared memory that a block may have, and the tensor-core instruction that a product must become.
ARCHITECTURES = {80: ("sm80", 166912), 90: ("sm90", 232448), 100: ("sm100", 232448), 120: ("sm120", 101376)}
STACK_LIMIT = 64
PRODUCTS = ("up_swiglu", "rows_times_expert", "down_backward", "expert_weight_grad")
INSTRUCTIONS = {
    "HMMA": r"\bHMMA",
    "HGMMA": r"\bHGMMA",
    "UTCHMMA": r"\bUTC\w*MMA",
    "UTMALDG": r"\bUTMALDG",
    "STL": r"\bSTL",
}
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
_SIZES_OF_TILES = ("BM", "BN", "BK", "BT", "BH", "BL", "BR", "num_warps", "num_stages")
_SIZES_OF_ROUTING = ("TOP_K", "PAIRS", "BP", "BB", "USED")
_SHAPE = (2048, 1024, 64, 8)  # hidden, width, experts, experts a token: OLMoE


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture."""

    kernel: str
    arch: int
    dtype: str
    size: str
    tile: str
    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]
    ptx: str = field(repr=False, default="")
    failed: str = ""

    def faults(self) -> list[str]:
        """What breaks the gate: spilled stack, too much shared memory, a product without tensor cores."""
        if self.failed:
            return [self.failed]
        found = []
        limit = ARCHITECTURES[self.arch][1]
        if self.stack > STACK_LIMIT:
            found.append(f"stack {self.stack} B > {STACK_LIMIT} B")
        if self.shared > limit:
            found.append(f"shared memory {self.shared} B > {limit} B")
        if self.kernel.split("/")[0] in PRODUCTS and self.dtype == "bf16":
            # wgmma wants 64 rows; smaller tiles use the older instruction on purpose.
            wanted = ("HMMA", "HGMMA", "UTCHMMA")
            if self.arch == 90 and self.size in ("large", "medium"):
                wanted = ("HGMMA",)
            if not any(self.instructions[name] for name in wanted):
                found.append(f"no {' or '.join(wanted)}")
        return found


def launches(arch: int, *, everything: bool = False) -> Iterator[tuple[str, str, str, Launch]]:
    """(kernel, dtype, size class, launch) for an architecture.

    Every kernel with every tile of its table that bf16 uses; `everything` adds fp32, biases, gpt-oss's layout,
    inference without pre-activations, and whatever else makes another kernel of the same source.
    """
    seen: set[str] = set()
    for dtype in (torch.bfloat16, torch.float32) if everything else (torch.bfloat16,):
        for size, tokens in (("large", 1024), ("medium", 256), ("small", 64), ("decode", 4)):
            with recording(ARCHITECTURES[arch][0]) as found:
                _record(tokens, dtype, learning=size != "decode")
            for launch in found:
                name = launch.kernel.__name__ + ("/two" if launch.meta.get("TWO") else "")
                sort = launch.meta if everything else {k: v for k, v in launch.meta.items() if k in _SIZES_OF_TILES}
                key = f"{name} {dtype} {sorted((k, v) for k, v in sort.items() if k not in _SIZES_OF_ROUTING)}"
                if key not in seen:
                    seen.add(key)
                    yield name, _TYPES[dtype], _size(arch, dtype, launch), launch


def _size(arch: int, dtype: torch.dtype, launch: Launch) -> str:
    """The size class whose rows a tile has; "any" for kernels that do not work in such tiles."""
    sizes = table()[ARCHITECTURES[arch][0]]["32" if dtype == torch.float32 else "16"]
    rows = {sizes[name]["block_m"]: name for name, _ in SIZES}
    return rows.get(launch.meta.get("BM"), "any")


def _record(tokens: int, dtype: torch.dtype, *, learning: bool) -> None:
    from .chain_kernels import infer, train
    from .function import triton_experts

    hidden, width, number, k = _SHAPE
    meta: dict[str, Any] = {"device": "meta", "dtype": dtype, "requires_grad": learning}
    experts = Experts(torch.empty(number, 2 * width, hidden, **meta), torch.empty(number, hidden, width, **meta))
    x = torch.empty(tokens, hidden, **meta)
    index = torch.empty(tokens, k, dtype=torch.int64, device="meta")
    weights = torch.empty(tokens, k, **meta)
    out = triton_experts(x, index, weights, experts)
    if not learning:
        return
    out.backward(out.detach())
    routers = [Router(torch.empty(number, hidden, **meta))] * 2
    gates = [torch.empty(hidden, dtype=torch.float32, device="meta", requires_grad=True) for _ in range(3)]
    cfg = Chain((k // 2, k // 2), base_k=k, normalize=True, reselect="forbid")
    train(x, routers, experts, gates[:1], gates[1:], cfg, None).sum().backward()
    with torch.no_grad():
        triton_experts(x, index, weights, experts)
        infer(x, routers, experts, gates[:1], gates[1:], cfg, None, Workspace())
    alike = {"device": "meta", "dtype": dtype, "requires_grad": True}
    turned = Experts(
        torch.empty(number, hidden, 2 * width, **alike), torch.empty(number, width, hidden, **alike),
        torch.empty(number, 2 * width, **alike), torch.empty(number, hidden, **alike),
        "swiglu_oai", is_transposed=True, is_concatenated=False,
    )  # fmt: skip
    out = triton_experts(x, index, weights, turned)
    out.backward(out.detach())


def _type(value: Any) -> str:
    """The type by which triton specialises an argument: pointers, integers by width, 1 and multiples of 16."""
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value == 1:
        return "constexpr"
    return ("i32" if -(2**31) <= value < 2**31 else "i64") + ("/16" if value % 16 == 0 else "")


def compile_launch(launch: Launch, arch: int) -> Any:
    """Triton's compiled kernel of a recorded launch. Raises what the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for at, (name, value) in enumerate(zip(names, launch.args, strict=False)):
        kind, _, aligned = _type(value).partition("/")
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = value
        elif aligned or kind.startswith("*"):
            attributes[(at,)] = [["tt.divisibility", 16]]
    for name in names[len(launch.args) :]:
        signature[name] = "constexpr"
        constants[name] = launch.meta[name]
    options = {name: value for name, value in launch.meta.items() if name not in names}
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def check(
    archs: Sequence[int],
    *,
    workers: int = 1,
    kernels: Sequence[str] = (),
    everything: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> list[Compiled]:
    """Compile everything shipped for `archs` (those `kernels` only, if named) and measure it; order is that of the
    launches. A kernel that does not compile is a row with `failed` set. Raises ValueError for an
    architecture that is not known."""
    unknown = [arch for arch in archs if arch not in ARCHITECTURES]
    if unknown:
        raise ValueError(f"architecture {unknown[0]} is none of {', '.join(map(str, ARCHITECTURES))}")
    work = [
        (arch, *row)
        for arch in archs
        for row in launches(arch, everything=everything)
        if not kernels or row[0].split("/")[0] in kernels
    ]
    done = []
    with ThreadPoolExecutor(workers) as pool:
        for row in pool.map(lambda item: _measure(*item), work):
            done.append(row)
            if report:
                report(len(done), len(work))
    return done


def _measure(arch: int, name: str, dtype: str, size: str, launch: Launch) -> Compiled:
    meta = launch.meta
    blocks = [f"{k}{meta[k]}" for k in ("BM", "BT", "BL", "BN", "BH", "BR", "BK", "BP", "BE", "BB") if k in meta]
    tile = (
        "x".join(blocks)
        + f" w{meta['num_warps']} s{meta.get('num_stages', 3)}"
        + ("" if meta.get("STORE_PRE", True) else " infer")
    )
    tile += " clamped" if meta.get("CLAMPED") else ""
    try:
        made = compile_launch(launch, arch)
    except Exception as err:  # the compiler's own errors have no common class
        lines = [line for line in str(err).splitlines() if line.strip()] or [type(err).__name__]
        return Compiled(name, arch, dtype, size, tile, 0, 0, 0, dict.fromkeys(INSTRUCTIONS, 0), failed=lines[-1][:200])
    registers, stack, sass = disassemble(made.asm["cubin"])
    counted = {key: len(re.findall(pattern, sass)) for key, pattern in INSTRUCTIONS.items()}
    return Compiled(name, arch, dtype, size, tile, registers, stack, made.metadata.shared, counted, made.asm["ptx"])


def disassemble(cubin: bytes) -> tuple[int, int, str]:
    """(registers a thread, stack bytes, SASS) of a compiled kernel, by the tools that come with triton."""
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if numbers is None:
        raise RuntimeError("cuobjdump says nothing about registers")
    return int(numbers[1]), int(numbers[2]), sass
