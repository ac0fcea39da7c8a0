"""What is promised of Chain-of-Experts on a CPU: conversion of 60 GB, and the cost of a split layer.

Run:  python benchmarks/coe.py [--json]

Costs of layers are CPU seconds of one thread, converted and unconverted in turns in one process, medians.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import SURGERY, finish, row, run

from surgery.store.header import plan_header

SIZES = ((256, 128, 16, 4), (512, 256, 32, 4), (1024, 704, 64, 8))  # H, I, N, K


def hollow(folder: Path) -> Path:
    """Qwen3-30B-A3B as a sparse file of 61 GB: header, and a hole where the data would be."""
    h, inner, n, depth, vocabulary = 2048, 768, 128, 48, 151_936
    names = [("model.embed_tokens.weight", (vocabulary, h)), ("lm_head.weight", (vocabulary, h))]
    for layer in range(depth):
        lead = f"model.layers.{layer}."
        names += [(f"{lead}self_attn.{x}_proj.weight", (4096, h)) for x in "qo"]
        names += [(f"{lead}mlp.gate.weight", (n, h))]
        for e in range(n):
            names += [(f"{lead}mlp.experts.{e}.{x}_proj.weight", (inner, h)) for x in ("gate", "up", "down")]
    header, places = plan_header([(name, "BF16", shape) for name, shape in names], metadata={"format": "pt"})
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as handle:
        handle.write(header)
        handle.truncate(len(header) + sum(count for _, count in places.values()))
    config = {
        "model_type": "qwen3_moe", "hidden_size": h, "moe_intermediate_size": inner, "num_experts": n,
        "num_experts_per_tok": 8, "num_hidden_layers": depth, "vocab_size": vocabulary,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def conversion() -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as place:
        base = hollow(Path(place) / "big")
        size = (base / "model.safetensors").stat().st_size
        cost = run([*SURGERY, "coe", str(base), "-o", str(Path(place) / "coe")])
        if cost.status:
            raise SystemExit("the conversion failed")
    note = f"{size / 1e9:.0f} GB, sparse; a dense file is also hashed once, at 1-2 GB a CPU second"
    return [
        row("conversion", cost.cpu, "CPU s", 20, note),
        row("conversion, anonymous memory", cost.anonymous / 1e6, "MB", 200),
    ]


def products(experts: Any, rows: int) -> None:
    """Every expert's weights times so many rows, by torch.mm."""
    import torch

    for up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        torch.mm(torch.ones(rows, up.shape[1]), up.t())
        torch.mm(torch.ones(rows, down.shape[1]), down.t())


def layers() -> list[dict[str, object]]:
    """Unconverted, converted and not trained yet, converted and trained (alpha no longer zero). For the last also what
    sets its price: the experts alone, two calls of half the rows against one, and torch's products alone, every
    expert's weights times half the rows, twice, against once times all, rows shared out evenly.

    Until training moves alpha, both passes read the same z and go through the experts together. Afterwards pass 2
    waits for what pass 1 returned: an expert has half as many rows at a time. A product first brings the weights into
    the order it computes in, which costs the same for any number of rows, and so is paid twice.
    """
    import torch
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

    from surgery.arch.moe.carried.configuration_coe import CoEQwen3MoeConfig
    from surgery.arch.moe.carried.modeling_coe_qwen3_moe import CoEQwen3MoeSparseMoeBlock

    torch.set_num_threads(1)
    rows = []
    for h, inner, n, k in SIZES:
        sizes = {"hidden_size": h, "moe_intermediate_size": inner, "num_experts": n, "num_experts_per_tok": k}
        chain = {"coe_iterations": 2, "coe_topk": [k // 2] * 2, "coe_route": "split", "coe_reselect": "forbid"}
        made: list[Any] = []
        for kind in ("plain", "fresh", "trained"):
            torch.manual_seed(0)
            config = CoEQwen3MoeConfig(**sizes, **chain) if kind != "plain" else Qwen3MoeConfig(**sizes)
            config._experts_implementation = "grouped_mm"
            block = Qwen3MoeSparseMoeBlock(config)
            for tensor in block.parameters():
                torch.nn.init.normal_(tensor, std=0.02)
            if kind != "plain":
                block.__class__ = CoEQwen3MoeSparseMoeBlock
                block.start_chain(config)
                block.reset_chain()
            if kind == "trained":
                torch.nn.init.constant_(block.coe_alpha, 0.1)
            made.append(block.eval())
        for tokens in (256, 1024):
            x = torch.randn(1, tokens, h)
            flat, experts = x[0], made[0].experts
            with torch.no_grad():
                _, weights, index = made[0].gate(flat)
            first = (flat, index[:, : k // 2].contiguous(), weights[:, : k // 2].contiguous())
            second = (flat, index[:, k // 2 :].contiguous(), weights[:, k // 2 :].contiguous())
            calls: list[list[tuple[Any, tuple[Any, ...]]]] = [[(block, (x,))] for block in made]
            calls += [[(experts, (flat, index, weights))], [(experts, first), (experts, second)]]
            count = tokens * k // n
            calls += [[(products, (experts, count))], [(products, (experts, count // 2))] * 2]
            seconds: list[list[float]] = [[] for _ in calls]
            with torch.no_grad():
                for _ in range(max(9, 15360 // h)):  # the smaller the layer, the more its time wavers
                    for number, call in enumerate(calls):
                        began = time.thread_time()
                        for function, inputs in call:
                            function(*inputs)
                        seconds[number].append(time.thread_time() - began)
            plain, fresh, trained, whole, halves, all_rows, half_rows = (statistics.median(s[1:]) for s in seconds)
            what = f"split layer H={h} I={inner} N={n} K={k} T={tokens}"
            rows.append(row(f"{what}, converted", fresh / plain, "x", 1.15, f"{plain * 1e3:.1f} ms unconverted"))
            note = f"the experts alone {halves / whole:.2f}x, torch's products alone {half_rows / all_rows:.2f}x"
            rows.append(row(f"{what}, trained", trained / plain, "x", 1.15, note))
    return rows


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    finish("coe", conversion() + layers())
