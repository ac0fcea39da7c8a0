"""The graph: pass-through, memory against depth, cost of scheduling, planning of large graphs; and mergekit beside it.

Every figure is CPU time of whole processes or ratios of two of one run. Needs about 2 GB in the temporary folder.
"""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from measure import SURGERY, Cost, finish, row, run

BIN = Path(sys.executable).parent
LAYERS = 304 * 2**20 // (38 * 2 * 1024 * 1024)  # of 38 Mi elements each: 304 MiB of bf16


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="surgery-bench-") as name:
        folder = Path(name)
        rows = [*pass_through(folder), *depth(folder), *scheduling(), *planning(folder), *against_mergekit(folder)]
        finish("graph", rows)


def sparse(path: Path, tensors: list[tuple[str, str, tuple[int, ...]]]) -> None:
    """A safetensors file of that header, written with a cheap pattern, not holes: bytes have to be moved."""
    from surgery.store.header import plan_header

    header, places = plan_header(tensors, metadata={"format": "pt"})
    path.parent.mkdir(parents=True, exist_ok=True)
    pattern = bytes(range(256)) * 4096
    left = sum(count for _, count in places.values())
    with open(path, "wb") as handle:
        handle.write(header)
        while left > 0:
            handle.write(pattern[: min(left, len(pattern))])
            left -= len(pattern)


def cheapest(command: list[str], target: Path, *, runs: int = 3, cwd: Path | None = None) -> Cost:
    """The run with the least CPU time, the output removed before each."""
    costs = []
    for _ in range(runs):
        shutil.rmtree(target, ignore_errors=True)
        costs.append(run(command, cwd=cwd))
        if costs[-1].status:
            raise SystemExit(f"failed: {' '.join(command)}")
    return min(costs, key=lambda c: c.cpu)


def pass_through(folder: Path) -> list[dict[str, object]]:
    """304 MiB of bf16 that only change their names."""
    big = folder / "big"
    tensors = [(f"model.layers.{i}.w{j}.weight", "BF16", (1024, 1024)) for i in range(19) for j in range(8)]
    sparse(big / "model.safetensors", tensors)
    words = ["rename", "-r", "model.*=*", str(big), "-o", str(folder / "renamed"), "-q"]
    first = cheapest(
        [*SURGERY, *words], folder / "renamed", runs=1
    )  # hashes the parent, whose digests are not known yet
    known = cheapest([*SURGERY, *words], folder / "renamed")
    copy = cheapest(["cp", "-r", str(big), str(folder / "copy")], folder / "copy")
    script = (
        f"import sys\nsys.argv = {['surgery', *words]!r}\nfrom surgery.cli.main import main\n"
        "try:\n    main()\nfinally:\n    sys.exit(9 if 'torch' in sys.modules else 0)"
    )
    shutil.rmtree(folder / "renamed")
    torch = run([sys.executable, "-c", script]).status
    return [
        row("pass-through of 304 MiB, parent never hashed before", first.cpu, "CPU s", 0.6, f"cp {copy.cpu:.2f} s"),
        row("pass-through of 304 MiB, digests known", known.cpu, "CPU s", 0.6),
        row("the same, peak anonymous memory", max(first.anonymous, known.anonymous) / 2**20, "MiB", 40),
        row("the same, torch imported", float(torch == 9), "", 0),
    ]


def depth(folder: Path) -> list[dict[str, object]]:
    """A cast of a model and of one with twice the layers."""
    peaks = {}
    for layers in (8, 16):
        model = folder / f"deep{layers}"
        tensors = [(f"model.layers.{i}.w{j}.weight", "F32", (1024, 1024)) for i in range(layers) for j in range(4)]
        sparse(model / "model.safetensors", tensors)
        words = ["cast", "--dtype", "bf16", str(model), "-o", str(folder / "cast"), "-q", "--workers", "2"]
        runs = [cheapest([*SURGERY, *words], folder / "cast", runs=1) for _ in range(3)]
        peaks[layers] = sorted(c.anonymous for c in runs)[1] / 2**20
    return [
        row(
            "twice the layers (128 to 256 MiB), more peak memory of a cast",
            max(0.0, peaks[16] - peaks[8]),
            "MiB",
            10,
            f"{peaks[8]:.0f} and {peaks[16]:.0f} MiB with torch",
        )
    ]


def scheduling() -> list[dict[str, object]]:
    """The executor with work that does nothing."""
    from surgery.graph.engine import local
    from surgery.graph.engine.work import Resources, Unit
    from surgery.store.tensors import TensorRef

    costs = {}
    real = local.carry_out
    local.carry_out = lambda job, pickles: {job.name: ""}  # type: ignore[assignment]
    try:
        for count in (25_000, 100_000):
            ref = TensorRef("a", "U8", (1,), "f", 0, 1)
            units = [Unit(f"n{i}", ref, "U8", (1,), 1, (), 1) for i in range(count)]
            started = time.process_time()
            local.run_jobs(units, lambda job, result: None, resources=Resources(2, 1, 1 << 30))
            costs[count] = (time.process_time() - started) / count * 1e6
    finally:
        local.carry_out = real
    return [
        row("scheduling, 100 000 tensors, 2 workers", costs[100_000], "us per tensor", 50),
        row("per tensor, 100 000 against 25 000", costs[100_000] / costs[25_000], "x", 2, "quadratic would be 4"),
    ]


def planning(folder: Path) -> list[dict[str, object]]:
    """Recipes of 200 and 100 steps over checkpoints that hold 100 000 and 50 000 tensors together."""
    costs = {}
    for steps in (100, 200):
        lines, names = [], []
        for i in range(steps // 4):
            model = folder / f"plan{i}.safetensors"
            if not model.exists():
                sparse(model, [(f"model.layers.{n}.w{k}.weight", "U8", (1,)) for n in range(50) for k in range(40)])
            lines.append(f"  a{i}: {{op: rename, from: m{i}, with: {{rule: 'model.*=m.*'}}}}")
            lines.append(f"  b{i}: {{op: slice, from: a{i}, with: {{layers: 0-11}}}}")
            lines.append(f"  c{i}: {{op: reshard, from: b{i}, with: {{shard_size: 1MB}}}}")
            lines.append(f"  d{i}: {{op: rename, from: c{i}, with: {{rule: 'm.*=*'}}}}")
            names.append(i)
        text = "surgery: 1\ninputs: {" + ", ".join(f"m{i}: {folder}/plan{i}.safetensors" for i in names) + "}\nsteps:\n"
        text += "\n".join(lines) + "\noutputs: {" + ", ".join(f"d{i}: out/d{i}" for i in names) + "}\n"
        recipe = folder / f"plan{steps}.yaml"
        recipe.write_text(text)
        run([*SURGERY, "plan", str(recipe), "--json"])  # digests of the inputs become known
        costs[steps] = min((run([*SURGERY, "plan", str(recipe), "--json"]) for _ in range(3)), key=lambda c: c.cpu)
        if costs[steps].status:
            raise SystemExit("surgery plan failed")
    return [
        row("plan of 200 steps over 50 checkpoints with 100 000 tensors", costs[200].cpu, "CPU s", 3),
        row("200 steps against 100", costs[200].cpu / costs[100].cpu, "x", 2.5, "quadratic would be 4"),
    ]


def against_mergekit(folder: Path) -> list[dict[str, object]]:
    """The same files, mergekit's and ours, on a Llama of some 70 million parameters."""
    models = llamas(folder)
    single = folder / "pass.yml"
    single.write_text(f"models: [{{model: {models[0]}}}]\nmerge_method: passthrough\ndtype: bfloat16\n")
    linear = "".join(f"  - {{model: {m}, parameters: {{weight: 0.5}}}}\n" for m in models)
    several = folder / "multi.yml"
    several.write_text(
        f"name: first\nmerge_method: linear\ndtype: bfloat16\nmodels:\n{linear}---\n"
        f"merge_method: linear\ndtype: bfloat16\nmodels:\n  - {{model: first, parameters: {{weight: 0.5}}}}\n"
        f"  - {{model: {models[1]}, parameters: {{weight: 0.5}}}}\n"
    )
    rows = []
    single_words = [str(BIN / "mergekit-yaml"), str(single), str(folder / "theirs"), "--no-write-model-card"]
    places = ["-I", str(folder / "middle"), "--out-path", str(folder / "theirs")]
    several_words = [str(BIN / "mergekit-multi"), str(several), *places, "--no-write-model-card"]
    for file, theirs, what in ((single, single_words, "passthrough"), (several, several_words, "multi")):
        shutil.rmtree(folder / "middle", ignore_errors=True)
        other = cheapest(theirs, folder / "theirs", runs=1)
        ours = cheapest([*SURGERY, "run", str(file), "-o", str(folder / "ours"), "-q"], folder / "ours", runs=1)
        costs = [f"{c.cpu:.2f} s, {c.anonymous / 2**20:.0f} MiB" for c in (ours, other)]
        note = f"ours {costs[0]}; theirs {costs[1]}"
        rows.append(row(f"{what}: CPU, ours / mergekit", ours.cpu / other.cpu, "x", 1.0, note))
        rows.append(row(f"{what}: memory, ours / mergekit", ours.anonymous / other.anonymous, "x", 1.0))
    return rows


def llamas(folder: Path) -> list[Path]:
    """Two Llamas with the layout of a real one, in bfloat16."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "intermediate_size": 1376,
        "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 32000,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    tensors = [("model.embed_tokens.weight", "BF16", (32000, 512)), ("lm_head.weight", "BF16", (32000, 512))]
    tensors.append(("model.norm.weight", "BF16", (512,)))
    for i in range(12):
        at = f"model.layers.{i}"
        tensors += [(f"{at}.self_attn.{p}_proj.weight", "BF16", (512, 512)) for p in "qkvo"]
        tensors += [(f"{at}.mlp.{p}_proj.weight", "BF16", (1376, 512)) for p in ("gate", "up")]
        tensors += [(f"{at}.mlp.down_proj.weight", "BF16", (512, 1376))]
        tensors += [(f"{at}.{n}.weight", "BF16", (512,)) for n in ("input_layernorm", "post_attention_layernorm")]
    found = []
    for number in range(2):
        model = folder / f"llama{number}"
        sparse(model / "model.safetensors", tensors)
        (model / "config.json").write_text(json.dumps(config))
        found.append(model)
    return found


if __name__ == "__main__":
    main()
