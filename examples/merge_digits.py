"""What a merge costs a vision-language model, and where: the trade-off curve and the layer profile on real digits.

    python examples/merge_digits.py [OUT] [SEED,SEED,...]        about two and a half minutes of one core a seed

Trains the small models of vlm_digits.py, runs the commands that it prints, and ends with a table over the seeds. Shares
of right answers for seeds 0, 1 and 2, 200 questions a task; mean, smallest and largest:

    host / donor            read                    sum                     image-sum
    1.00 / 0.00             0.915 [0.900, 0.945]    0.145 [0.090, 0.205]    0.000 [0.000, 0.000]
    0.90 / 0.10             0.905 [0.870, 0.950]    0.135 [0.100, 0.190]    0.000 [0.000, 0.000]
    0.70 / 0.30             0.778 [0.710, 0.850]    0.147 [0.070, 0.220]    0.000 [0.000, 0.000]
    0.50 / 0.50             0.383 [0.285, 0.485]    0.168 [0.110, 0.225]    0.010 [0.005, 0.020]
    0.10 / 0.90             0.018 [0.005, 0.040]    0.658 [0.595, 0.745]    0.032 [0.025, 0.040]
    0.00 / 1.00             0.008 [0.000, 0.020]    0.993 [0.990, 0.995]    0.023 [0.020, 0.025]
    0.50, layers 0-2 only   0.488 [0.435, 0.515]    0.115 [0.035, 0.170]    0.003 [0.000, 0.005]
    0.50, layers 3-5 only   0.783 [0.705, 0.865]    0.132 [0.080, 0.185]    0.000 [0.000, 0.000]

Shown: reading falls as more of the text model comes in, and half of it in the early layers costs more than twice what
it costs in the late ones, in each seed. Taking layers out agrees: the answers of `read` lose 7 to 11 nats without layer
0, and at most 0.25 without one of the last three, but for one layer of one seed (0.95). Not shown: that arithmetic
carries over to images. No share gives both; sums come back where reading is gone, and image-sum, on which no model was
trained, stays near nothing. At this size it is a study of the tools and not of the paper's claim about reasoning.
"""

import csv
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm_digits import make

TASKS = ("read", "sum", "image-sum")
SHARES = (1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3, 0.1, 0)


def surgery(*words: str | Path) -> None:
    """Run one command as a user would, and show it."""
    line = ["surgery", *map(str, words)]
    print(f"$ {shlex.join(line)}", flush=True)
    subprocess.run([sys.executable, "-m", *line], check=True)


def study(out: Path, seed: int, *, shorten: int = 1, per_task: int = 200, shares: Sequence[float] = SHARES) -> None:
    """Train, then measure: pictures and tables go to `out`."""
    import torch

    torch.set_num_threads(1)
    make(out, seed, shorten=shorten, per_task=per_task)
    data = (
        "--eval",
        out / "questions.jsonl",
        "--prompt",
        "bare",
        "--group-by",
        "task",
        "--threads",
        "1",
        "--batch",
        "100",
    )
    short = ("--metric", "acc", "--max-new-tokens", "4", "--dev", "0")
    many = ",".join(f"{share:g}" for share in shares)

    # 1. Which layers does the intact model need, for which task? Each is taken out in turn.
    surgery(
        "probe",
        "layers",
        out / "vlm",
        *data,
        "--ablate",
        "zero",
        "-o",
        out / "profile.csv",
        "--png",
        out / "profile.png",
    )
    # 2. The trade-off: more and more of the text model, in all layers.
    merge = ("sweep", "merge", out / "vlm", out / "llm", *data, *short)
    surgery(*merge, "--alpha", many, "-o", out / "curve.csv", "--png", out / "curve.png")
    # 3. Where does it hurt? Half of the text model, in three early or three late layers, and two at a time.
    halves = ("--layers", "0-2", "--layers", "3-5", "--window", "2")
    surgery(*merge, "--alpha", "0.5", *halves, "-o", out / "windows.csv", "--png", out / "windows.png")
    # 4. Write one of them, and set it against the host question by question.
    surgery("merge", out / "vlm", out / "llm", "--alpha", "0.5", "--layers", "3-5", "-o", out / "merged", "-q")
    ask = ("--data", out / "questions.jsonl", "--prompt", "bare", "--max-new-tokens", "4", "--batch", "100")
    for name in ("vlm", "merged"):
        surgery("eval", "vqa", out / name, *ask, "--threads", "1", "--group-by", "task", "-o", out / f"{name}.jsonl")
    surgery("eval", "compare", out / "vlm.jsonl", out / "merged.jsonl", "--group-by", "task", "--flips", "5")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def over_seeds(folders: Sequence[Path], name: str, **where: str) -> str:
    """The mean over the seeds, and the smallest and largest, of the rows with these values."""
    found = [float(r["value"]) for f in folders for r in rows(f / name) if all(r[k] == v for k, v in where.items())]
    mean = sum(found) / len(found)
    return f"{mean:.3f}" + (f" [{min(found):.3f}, {max(found):.3f}]" if len(found) > 1 else "")


def table(folders: Sequence[Path]) -> list[str]:
    """Accuracies by share and by place; with several seeds the smallest and largest beside the mean."""
    lines = ["host / donor".ljust(24) + "".join(task.ljust(24) for task in TASKS)]
    for share in [r["alpha"] for r in rows(folders[0] / "curve.csv") if r["group"] == "all"]:
        cells = (over_seeds(folders, "curve.csv", alpha=share, group=f"task={task}") for task in TASKS)
        lines.append(f"{float(share):.2f} / {1 - float(share):.2f}".ljust(24) + "".join(c.ljust(24) for c in cells))
    for layers in dict.fromkeys(r["layers"] for r in rows(folders[0] / "windows.csv")):
        cells = (over_seeds(folders, "windows.csv", layers=layers, group=f"task={task}") for task in TASKS)
        lines.append(f"0.50, layers {layers} only".ljust(24) + "".join(c.ljust(24) for c in cells))
    return [line.rstrip() for line in lines]


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "out/merge-digits")
    seeds = [int(s) for s in (sys.argv[2] if len(sys.argv) > 2 else "0").split(",")]
    for number in seeds:
        study(root / f"seed-{number}", number)
    print("\n".join(["", *table([root / f"seed-{number}" for number in seeds])]))
