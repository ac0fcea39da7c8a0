"""What merging costs: CPU seconds and memory of whole processes, against `cp` and `mergekit-yaml` in the same run.

Two models of 1.3 GB in bfloat16 are written (random bits, no model is run), merged linearly and by TIES by both
programs, and the values compared. "Layers" is the command as it stands, which keeps embeddings and head; "everything"
merges these too, as mergekit does. Digests of the inputs are known, as after any first use. The sha256 of what is
merged and the wait for the disk, which neither `cp` nor mergekit has, are part of the work; `--hash header` leaves out
the former. TIES is compared on models of 0.4 GB: mergekit sorts every tensor, for minutes a gigabyte.
Usage: merge.py [--json] [--size MB] [--skip-ties] [--folder DIR]
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from measure import SURGERY, Cost, finish, median, row, run

MERGEKIT = str(Path(sys.executable).parent / "mergekit-yaml")
HIDDEN, INNER, VOCAB = 2048, 5632, 32000
SHA256 = """
import hashlib, sys
state, piece = hashlib.sha256(), bytearray(1 << 19)
with open(sys.argv[1], "rb") as file:
    while count := file.readinto(piece):
        state.update(memoryview(piece)[:count])
"""
IMPORTS = "import surgery.cli.merge, surgery.arch.merging.tasks"  # numpy's after the setting that the command makes
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048, "hidden_act": "silu", "tie_word_embeddings": False, "dtype": "bfloat16",
    "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for n in range(layers):
        at = f"model.layers.{n}"
        found |= {f"{at}.self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
        found |= {f"{at}.mlp.{p}_proj.weight": (INNER, HIDDEN) for p in ("gate", "up")}
        found[f"{at}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        found |= {f"{at}.{p}_layernorm.weight": (HIDDEN,) for p in ("input", "post_attention")}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def write_models(root: Path, layers: int, names: Sequence[str]) -> None:
    """Models that come from one: each is the first plus a tenth of noise, tensor by tensor."""
    import numpy as np

    from surgery.store.header import plan_header

    header, places = plan_header(((n, "BF16", s) for n, s in shapes(layers).items()), metadata={"format": "pt"})
    handles = []
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}, indent=2))
        handles.append(open(root / name / "model.safetensors", "wb"))  # noqa: SIM115
        handles[-1].write(header)
    generator = np.random.default_rng(0)
    for name in places:
        count = places[name][1] // 2
        base = generator.standard_normal(count, np.float32) * np.float32(0.02)
        for index, handle in enumerate(handles):
            other = base if not index else base + generator.standard_normal(count, np.float32) * np.float32(0.002)
            handle.write((other.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    for handle in handles:
        handle.close()


def resident(command: Sequence[str]) -> int:
    """Peak resident bytes of one run, mapped files included, from the kernel."""
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024


def largest_ulps(one: Path, two: Path, scales: Sequence[Path]) -> float:
    """The largest distance between two files of bfloat16 with the same tensors, in steps of the format.

    A step is that of the largest of the values that went in: where they cancel, last digits of float32 remain, and
    these are not the same with and without fused multiply-add.
    """
    import torch
    from safetensors import safe_open

    most = 0.0
    with safe_open(one, "pt") as a, safe_open(two, "pt") as b:
        inputs = [safe_open(path, "pt") for path in scales]
        for name in a.keys():  # noqa: SIM118
            x, y = (t.get_tensor(name).float() for t in (a, b))
            large = torch.stack([t.get_tensor(name).float().abs() for t in inputs]).amax(0).maximum(x.abs())
            step = torch.exp2(torch.floor(torch.log2(large.clamp_min(1e-30))) - 7)
            most = max(most, float(((x - y).abs() / step).max()))
    return most


def once(command: Sequence[str], out: Path) -> Cost:
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    cost = run(command, watch=False)
    if cost.status:
        raise SystemExit(f"failed: {' '.join(map(str, command))}")
    return cost


def best(command: Sequence[str], out: Path, runs: int) -> Cost:
    """The run with the median CPU time; the output is removed before each."""
    return middle([once(command, out) for _ in range(runs)])


def middle(costs: Sequence[Cost]) -> Cost:
    """The one with the median CPU time."""
    return sorted(costs, key=lambda c: c.cpu)[len(costs) // 2]


def interleaved(commands: Sequence[tuple[Sequence[str], Path]], rounds: int) -> list[list[Cost]]:
    """Every command's runs, one of each a round: other work on the machine falls on all of them alike."""
    found: list[list[Cost]] = [[] for _ in commands]
    for _ in range(rounds):
        for costs, (command, out) in zip(found, commands, strict=True):
            costs.append(once(command, out))
    return found


def main() -> None:
    size = int(sys.argv[sys.argv.index("--size") + 1]) if "--size" in sys.argv else 1300
    layers = max(2, round((size * 1e6 / 2 - 2 * VOCAB * HIDDEN) / (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)))
    folder = sys.argv[sys.argv.index("--folder") + 1] if "--folder" in sys.argv else None
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        root = Path(temporary)
        write_models(root, layers, ("base", "a", "b"))
        rows = measured(root)
    if "--skip-ties" not in sys.argv:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            root = Path(temporary)
            write_models(root, 2, ("base", "a", "b"))
            rows += measured_ties(root)
    finish("merge", rows)


def measured(root: Path) -> list[dict[str, object]]:
    out, theirs = root / "out", root / "theirs"
    a, b, base = (str(root / n) for n in ("a", "b", "base"))
    layers = [*SURGERY, "merge", a, b, "--alpha", "0.7", "-q", "-o", str(out)]
    linear = [*layers, "--include", "embed", "--include", "head"]
    file = f"{a}/model.safetensors"
    (root / "linear.yml").write_text(
        f"merge_method: linear\nmodels:\n- {{model: {a}, parameters: {{weight: 0.7}}}}\n"
        f"- {{model: {b}, parameters: {{weight: 0.3}}}}\ndtype: bfloat16\n"
    )
    once([*linear, "--workers", "1"], out)  # the digests of the inputs are known from here on
    copy, bare = root / "copy", [*linear, "--hash", "header"]
    copied, plain, ours, two, header, two_header = interleaved(
        [
            (["cp", file, str(copy)], copy),
            ([*layers, "--workers", "1"], out),
            ([*linear, "--workers", "1"], out),
            ([*linear, "--workers", "2"], out),
            ([*bare, "--workers", "1"], out),
            ([*bare, "--workers", "2"], out),
        ],
        7,
    )
    slow = best([MERGEKIT, str(root / "linear.yml"), str(theirs), "--quiet"], theirs, 3).cpu
    walls = [min(c.wall for c in costs) for costs in (ours, two, header, two_header)]
    disk = min(once(["dd", f"if={file}", f"of={copy}", "bs=1M", "conv=fsync"], copy).wall for _ in range(3))
    cp, usual, full, light = (middle(costs).cpu for costs in (copied, plain, ours, header))
    imported = median([sys.executable, "-c", IMPORTS], runs=5)
    start, begun = imported.cpu, imported.wall
    nothing = median([sys.executable, "-c", "import hashlib"], runs=3).cpu
    digest = median([sys.executable, "-c", SHA256, file], runs=3).cpu - nothing
    memory = resident([*linear, "--workers", "1", "--overwrite"])
    dry = median([*linear, "--dry-run"], runs=3)
    files = [root / n / "model.safetensors" for n in ("out", "theirs", "a", "b")]
    ulps = largest_ulps(files[0], files[1], files[2:])
    rows = [
        row("linear, layers, without imports, in copies by cp", (usual - start) / cp, "x", 4,
            f"{usual:.2f} CPU s, {start:.2f} of it imports; cp {cp:.2f}"),
        row("linear, everything, --hash header, without imports, in copies by cp", (light - start) / cp, "x", 4,
            f"{light:.2f} CPU s"),
        row("linear, everything, without imports, in copies by cp", (full - start) / cp, "x", None,
            f"{full:.2f} CPU s, a sha256 of the output alone {digest:.2f}; aimed at: 4"),
        row("resident memory of linear", memory / 1e6, "MB", 300, "one worker"),
        row("linear, everything, as a share of mergekit-yaml", full / slow, "x", 0.2, f"mergekit {slow:.1f} CPU s"),
        row("the same, --hash header", light / slow, "x", 0.2),
        row("largest distance from mergekit's values", ulps, "ulp", 1),
        row("merge --dry-run", dry.cpu, "CPU s", 0.5),
        row("linear, everything, by two workers without imports, as a share of the wall time of one",
            (walls[1] - begun) / (walls[0] - begun), "x", 1 / 1.6,
            f"{walls[0]:.2f} and {walls[1]:.2f} s, {begun:.2f} s of each imports, the best of seven"),
        row("the same, --hash header", (walls[3] - begun) / (walls[2] - begun), "x", None,
            f"{walls[2]:.2f} and {walls[3]:.2f} s; written and synced by dd: {disk:.2f} s"),
    ]  # fmt: skip
    return rows


def measured_ties(root: Path) -> list[dict[str, object]]:
    out, theirs = root / "out", root / "theirs"
    a, b, base = (str(root / n) for n in ("a", "b", "base"))
    ties = [*SURGERY, "merge", a, b, "--base", base, "-m", "ties", "--alpha", "0.7", "--alpha2", "0.3", "-q", "-o"]
    (root / "ties.yml").write_text(
        f"merge_method: ties\nbase_model: {base}\nmodels:\n"
        f"- {{model: {a}, parameters: {{weight: 0.7, density: 0.2}}}}\n"
        f"- {{model: {b}, parameters: {{weight: 0.3, density: 0.2}}}}\ndtype: float32\nout_dtype: bfloat16\n"
    )
    command = [*ties, str(out), "--include", "embed", "--include", "head", "--workers", "1"]
    once(command, out)  # digests
    one, two = interleaved([(command, out), ([*command[:-1], "2"], out)], 3)
    trimmed, walls = middle(one), [min(c.wall for c in costs) for costs in (one, two)]
    memory = resident([*command, "--overwrite"])
    slow = best([MERGEKIT, str(root / "ties.yml"), str(theirs), "--quiet"], theirs, 1)
    return [
        row("TIES as a share of mergekit-yaml", trimmed.cpu / slow.cpu, "x", 0.25,
            f"{trimmed.cpu:.1f} and {slow.cpu:.1f} CPU s"),
        row("TIES by two workers, as a share of the wall time of one", walls[1] / walls[0], "x", 1 / 1.6,
            f"{walls[0]:.1f} and {walls[1]:.1f} s, the best of three"),
        row("resident memory of TIES", memory / 1e6, "MB", 400, "one worker; up to 64 MB of it sorts |tau|"),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
