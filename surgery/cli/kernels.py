"""The commands around the kernels: compile them for GPUs that are not here, and time them where they run."""

import os
from typing import Annotated, Any

import typer

from surgery.cli import flags, output
from surgery.errors import Mismatch, ResourceError, UsageError, closest

_DTYPES = {"fp32": "float32", "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16"}


def check(
    arch: Annotated[str, typer.Option("--arch", help="Compute capabilities: 80, 90, 100, 120.")] = "80,90,100,120",
    kernels: Annotated[str, typer.Option("--kernels", help="Only these, e.g. up_swiglu,combine.")] = "",
    everything: Annotated[
        bool, typer.Option("--all", help="Also fp32, biases, gpt-oss's layout: about four times as many.")
    ] = False,
    workers: Annotated[int, typer.Option("--workers", help="Compilations at a time; 0: one per core.")] = 0,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
) -> None:
    """Compile every shipped kernel configuration ahead of time; no GPU is needed and none is used.

    Shows registers, stack, shared memory, and how many tensor-core and spill (STL) instructions each became. Exit 1
    when one does not compile, spills more than 64 bytes of stack, needs more shared memory than the architecture has,
    or multiplies without tensor cores. A second call is quick: triton keeps what it compiled.

    Example:  surgery kernels check --arch 80,90,100
    """
    output.Talk.quiet = quiet
    archs = [_number("--arch", a) for a in arch.split(",") if a.strip()]
    if not archs:
        raise UsageError("arch", "--arch names no architecture", hint="for example --arch 90")
    aot = _aot()
    unknown = [a for a in archs if a not in aot.ARCHITECTURES]
    if unknown:
        known = ", ".join(map(str, aot.ARCHITECTURES))
        raise UsageError("arch", f"--arch {unknown[0]}: no configurations are shipped for it", hint=f"known: {known}")
    names = [k.strip() for k in kernels.split(",") if k.strip()]
    there = sorted({row[0].split("/")[0] for row in aot.launches(archs[0])})
    for name in names:
        if name not in there:
            raise UsageError("kernel", f"--kernels {name}: no such kernel", hint=closest(name, there))
    with output.Progress() as report:
        rows = aot.check(
            archs,
            workers=workers or os.cpu_count() or 1,
            kernels=names,
            everything=everything,
            report=lambda done, total: report("compiling", {"done": done, "total": total}),
        )
    failed = [r for r in rows if r.faults()]
    if as_json:
        output.data_json({"compiled": [_compiled(r) for r in rows], "run": False, "ok": not failed})
    else:
        header = ("kernel", "sm", "dtype", "size", "tile", "regs", "stack", "smem", "tensor", "spills", "gate")
        output.table(header, [_columns(r) for r in rows])
    output.note(f"{len(rows)} kernels compiled, none run: this says nothing about speed or results")
    if failed:
        first = failed[0]
        raise Mismatch(
            "kernels", f"{len(failed)} of {len(rows)} fail: {first.kernel} on sm{first.arch}: {first.faults()[0]}",
            hint="change its entry in the table of tiles, kernels/src/moe/tiles.json",
        )  # fmt: skip


def _aot() -> Any:
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UsageError("interpret", "TRITON_INTERPRET is set, and the interpreter compiles nothing", hint="unset it")
    try:
        import triton  # noqa: F401
    except ImportError:
        raise ResourceError("triton", "triton is not installed", hint="pip install triton (Linux)") from None
    from surgery.kernels.moe import aot

    return aot


def _tensor(row: Any) -> str:
    return " ".join(f"{n} {k}" for k, n in row.instructions.items() if n and k not in ("STL", "UTMALDG")) or "-"


def _columns(row: Any) -> tuple[Any, ...]:
    gate = "; ".join(row.faults()) or "ok"
    size = (row.kernel, row.arch, row.dtype, row.size, row.tile)
    return (*size, row.registers, row.stack, row.shared, _tensor(row), row.instructions["STL"], gate)


def _compiled(row: Any) -> dict[str, Any]:
    return {
        "kernel": row.kernel,
        "arch": row.arch,
        "dtype": row.dtype,
        "size": row.size,
        "tile": row.tile,
        "registers": row.registers,
        "stack": row.stack,
        "shared_memory": row.shared,
        "instructions": row.instructions,
        "faults": row.faults(),
    }


def bench(
    shape: Annotated[str, typer.Option("--shape", metavar="T,H,I,N,K[,C]", help="K experts a token, in C iterations.")],
    backends: Annotated[str, typer.Option("--backends", help="Which to time.")] = (
        "loop,grouped_mm,batched_mm,triton,sonicmoe,liger"
    ),
    device: Annotated[str, typer.Option("--device", help="cpu or cuda:0; the GPU if there is one.")] = "",
    dtype: Annotated[str, typer.Option("--dtype", help="fp32, bf16, fp16; bf16 on a GPU, fp32 on a CPU.")] = "",
    assign: Annotated[str, typer.Option("--assign", help="How tokens meet experts.")] = "balanced,zipf,router",
    backward: Annotated[bool, typer.Option("--backward", help="Time the backward pass too.")] = False,
    seconds: Annotated[float, typer.Option("--seconds", help="Least time for one figure on a CPU.")] = 0.5,
    seed: Annotated[int, typer.Option("--seed", help="Of the inputs.")] = 0,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
) -> None:
    """Time routed experts by every backend that runs here, against a plain batched product and the machine's limit.

    With C > 1 the whole layer is timed too: K experts at once (layer C=1), and K spread over C iterations (layer).
    What does not run here is named with its reason. Figures are of this machine in this run.

    Example:  surgery kernels bench --shape 1024,512,256,16,4,2 --backends loop,grouped_mm
    """
    output.Talk.quiet = quiet
    numbers = _shape(shape)
    if not (0 < seconds < 3600):
        raise UsageError("seconds", f"--seconds {seconds:g} is no time to measure for", hint="for example 0.5")
    if dtype and dtype not in _DTYPES:
        raise UsageError("dtype", f"--dtype {dtype}: not a precision to time", hint=closest(dtype, list(_DTYPES)))
    import torch

    from surgery.evals.kernels import ASSIGNMENTS, BACKENDS, Shape, measure

    names = _words("--backends", backends, BACKENDS)
    kinds = _words("--assign", assign, ASSIGNMENTS)
    place = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    if place.startswith("cuda") and not torch.cuda.is_available():
        raise ResourceError("device", f"--device {place}: there is no CUDA device", hint="leave it out to use the CPU")
    if not place.startswith("cuda") and place != "cpu":
        raise UsageError("device", f"--device {place} is neither cpu nor cuda", hint="for example --device cuda:0")
    precision = getattr(torch, _DTYPES[dtype] if dtype else ("bfloat16" if place != "cpu" else "float32"))
    with output.Progress() as report:
        found = measure(
            Shape(*numbers), names, device=place, dtype=precision, assignments=kinds, backward=backward,
            seconds=seconds, seed=seed, report=report,
        )  # fmt: skip
    if as_json:
        output.data_json(found.to_json())
    else:
        _print(found)


def _print(found: Any) -> None:
    roof, host = found.roof, found.machine
    where = host.get("gpu") or f"CPU, {host['threads']} threads"
    output.data(f"{found.shape.words()}  {host['dtype']} on {where}, torch {host['torch']}")
    output.data(
        f"floor {roof['forward']:.4g} ms forward, {roof['bound']}-bound at {roof['tflops']:.3g} TFLOP/s and "
        f"{roof['tb_per_s']:.3g} TB/s ({roof['source']}); batched product {roof['bmm_forward_ms']:.4g} ms"
    )
    output.data("")
    header = ("what", "assignment", "pass", "backend", "ms", "spread", "CPU ms", "TFLOP/s", "% bmm", "% roof", "memory")
    rows = []
    for r in found.rows:
        memory = "-" if r.peak_memory is None else output.count(r.peak_memory, "B")
        speed = ("-" if r.cpu_ms is None else r.cpu_ms, r.tflops, f"{r.of_bmm:.1f}%", f"{r.of_roof:.1f}%", memory)
        rows.append((r.what, r.assignment, r.direction, r.backend, r.ms, f"{100 * r.spread:.0f}%", *speed))
    output.table(header, rows)
    if host.get("threads"):
        output.note(
            "TFLOP/s and percentages are of CPU time, over all threads: other work on the machine does not count"
        )
    if found.not_run:
        output.data("")
        for line in found.not_run:
            output.data(f"not run: {line['backend']}: {line['why']}")


def _shape(text: str) -> list[int]:
    parts = [_number("--shape", p) for p in text.split(",")]
    if len(parts) not in (5, 6) or min(parts) < 1:
        raise UsageError(
            "shape", f"--shape {text}: need T,H,I,N,K or T,H,I,N,K,C", hint="for example 1024,512,256,16,4,2"
        )
    experts, k, iterations = parts[3], parts[4], (parts + [1])[5]
    if k > experts:
        raise UsageError("shape", f"--shape {text}: K={k} experts a token of N={experts}", hint="K is at most N")
    if iterations > k:
        problem = f"--shape {text}: K={k} cannot be split in C={iterations}"
        raise UsageError("shape", problem, hint="C is at most K")
    return parts


def _number(option: str, text: str) -> int:
    if not text.strip().isdecimal() or len(text) > 12:
        raise UsageError("number", f"{option}: '{text}' is no whole number", hint=f"numbers with commas, see {option}")
    return int(text)


def _words(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    words = [w.strip() for w in text.split(",") if w.strip()]
    for word in words:
        if word not in known:
            raise UsageError("name", f"{option} {word}: no such name", hint=closest(word, list(known)))
    if not words:
        raise UsageError("name", f"{option} names nothing", hint="known: " + ", ".join(known))
    return list(dict.fromkeys(words))
