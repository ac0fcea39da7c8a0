"""A small mixture of experts learns to write Python, becomes a Chain-of-Experts two ways, and trains on.

Run:  python examples/coe_toy.py [OUT]      (under two minutes on two cores)

What it shows: both conversions begin exactly where the base stands, both train, and the plain model with the same
budget is reported beside them. At this size no gain is to be expected, and none is claimed.
"""

import sys
from pathlib import Path

import surgery
from surgery.graph.run import RunOptions

out = Path(sys.argv[1] if len(sys.argv) > 1 else "out/coe-toy")
options = RunOptions(threads=1)
setting = {"data": "stdlib", "batch": 8, "length": 64, "save_every": 0}

blank = surgery.apply("init", arch="qwen3-moe-tiny", out=out / "blank").path
base = surgery.apply("train-coe", blank, out=out / "moe", options=options, steps=250, lr=3e-3, **setting)
print(f"plain model, 250 steps: {base.record['steps'][-1]['training']['val_loss']['end']:.4f} nats a byte")

for mode in ("append", "split"):
    chain = surgery.apply("coe", base.path, out=out / mode, iterations=2, mode=mode)
    print(f"{mode}: function {chain.record['measured']['function']}")
    trained = surgery.apply(
        "train-coe", chain.path, out=out / f"{mode}-trained", options=options, gate_steps=25, steps=75, lr=1e-3,
        gate_lr=1e-3, **setting,
    )  # fmt: skip
    facts = trained.record["steps"][-1]["training"]
    own, plain = facts["val_loss"], facts["baseline"]["val_loss"]
    print(f"{mode}: {own['start']:.4f} -> {own['end']:.4f}; unconverted, same budget -> {plain['end']:.4f}")

back = surgery.apply("coe", out / "split", out=out / "back", collapse=True)
same = surgery.open(back.path).digest == surgery.open(base.path).digest
print(f"collapsed: {'the same bytes' if same else 'other bytes'}")
