"""Grafting a full-size DiT-XL/2 (750 M parameters, 3 GB) with random weights, against `cp -r` of the same folder.

Needs about 9 GB of disk in the temporary folder. Stage 1 on dit-digits is timed with one worker and with two.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median_low

from measure import SURGERY, Cost, finish, median, row, run


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="surgery-bench-") as name:
        folder = Path(name)
        big = folder / "big"
        made = run([*SURGERY, "init", "dit-xl-2", "-o", str(big)])
        if made.status:
            raise SystemExit("surgery init failed")
        inspect = median([*SURGERY, "inspect", str(big), "--json"], runs=3)
        plan = median([*SURGERY, "graft", "--replace", "attn=hyena", str(big), "--dry-run"], runs=3)
        target, copied = folder / "big-g", folder / "copy"
        words = f"graft --replace attn=hyena:k=4 {big} --layers 50% --init random -o {target}"
        # In turn, each graft beside its own copy: what else the machine does moves both.
        pairs = [
            (
                run([sys.executable, "-c", "import torch"]),
                _again(["cp", "-r", str(big), str(copied)], copied, runs=1),
                _again([*SURGERY, *words.split()], target, runs=1),
            )
            for _ in range(5)
        ]
        ratios = [max(0.0, graft.cpu - torch.cpu) / copy.cpu for torch, copy, graft in pairs]
        at = ratios.index(median_low(ratios))
        torch, copy, graft = pairs[at]
        digits = [*SURGERY, "graft", "--replace", "attn=hyena", "dit-digits", "--data", "digits", "--layers", "all"]
        load = os.getloadavg()[0]  # about one is our own; two workers gain nothing on cores that others hold
        turns = [
            [_again([*digits, "--workers", n, "-o", str(folder / n)], folder / n, runs=1).wall for n in ("1", "2")]
            for _ in range(2)
        ]
        one, two = (min(walls) for walls in zip(*turns, strict=True))
        finish(
            "graft",
            [
                row("inspect, 3 GB", inspect.cpu, "CPU s", 0.5),
                row("graft --dry-run, 3 GB", plan.cpu, "CPU s", 0.5),
                row(
                    "graft 50 %, random, CPU without torch's import / CPU of cp -r",
                    ratios[at],
                    "x",
                    2.0,
                    f"median of {len(pairs)} in turn, {min(ratios):.2f} to {max(ratios):.2f}; its graft "
                    f"{graft.cpu:.2f} s, torch {torch.cpu:.2f} s, cp {copy.cpu:.2f} s",
                ),
                row("the same, peak anonymous memory", max(g.anonymous for _, _, g in pairs) / 2**20, "MiB", 600),
                row(
                    "init, peak anonymous memory",
                    made.anonymous / 2**20,
                    "MiB",
                    600,
                    f"{made.cpu:.1f} CPU s, {made.wall:.1f} s",
                ),
                row(
                    "stage 1 on dit-digits, wall with 2 workers / with 1",
                    two / one,
                    "x",
                    0.85,
                    f"{two:.1f} s, {one:.1f} s, the shorter of two in turn, after a load of {load:.1f} on "
                    f"{os.cpu_count()} cores; includes start-up and recording",
                ),
            ],
        )


def _again(command: list[str], target: Path, *, runs: int = 3) -> Cost:
    """The cheapest of some runs, the output removed in between."""
    costs = []
    for _ in range(runs):
        shutil.rmtree(target, ignore_errors=True)
        costs.append(run(command))
        if costs[-1].status:
            raise SystemExit(f"failed: {' '.join(command)}")
    shutil.rmtree(target, ignore_errors=True)
    return min(costs, key=lambda c: c.cpu)


if __name__ == "__main__":
    main()
