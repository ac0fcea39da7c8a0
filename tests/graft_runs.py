"""What tests of records and of grafting share: a small graft, its record and faults, pictures of noise."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from surgery.graph.lineage import verify
from surgery.graph.run import RunOptions, RunResult, run_op
from surgery.ops.graft import Graft
from surgery.store.checkpoint import open_checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"
OP = Graft(replace=("mlp=r3",), layers="1,3", init="random")


def graft(source: Path, out: Path | None, **options: Any) -> RunResult:
    """A small graft of `source` without training, at `out` or a place of its own."""
    return run_op(OP, [open_checkpoint(source, name=str(source))], out, options=RunOptions(**options))


def record_of(path: Path) -> dict[str, Any]:
    """The record of a folder, as it is."""
    found: dict[str, Any] = json.loads((path / "surgery.json").read_bytes())
    return found


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def faults(path: Path) -> list[str]:
    """What `verify` finds."""
    return verify(open_checkpoint(path))


def listing(folder: Path) -> set[str]:
    """Every file and folder below, hidden ones too."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def digest(path: str | Path) -> str:
    return open_checkpoint(Path(path)).digest


def training(folder: Path) -> dict[str, Any]:
    """What the record of a folder says of its training."""
    training: dict[str, Any] = record_of(folder)["steps"][-1]["training"]
    return training


def small_pictures(folder: Path, **arrays: Any) -> str:
    """The --data of 20 labelled pictures of noise in `folder`; `arrays` replace those of the file."""
    rng = np.random.default_rng(0)
    made = {"arr_0": rng.integers(0, 255, (20, 8, 8, 1), dtype=np.uint8), "labels": np.arange(20) % 10, **arrays}
    np.savez(folder / "data.npz", **made)
    return f"npz:{folder / 'data.npz'}"
