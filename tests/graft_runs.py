"""What tests of grafting share: pictures of noise, and what a run left behind."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from surgery.store.checkpoint import open_checkpoint


def listing(folder: Path) -> set[str]:
    """Every file and folder below, hidden ones too."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def digest(path: str | Path) -> str:
    return open_checkpoint(Path(path)).digest


def training(folder: Path) -> dict[str, Any]:
    """What the record of a folder says of its training."""
    return json.loads((folder / "surgery.json").read_text())["steps"][-1]["training"]


def small_pictures(folder: Path, **arrays: Any) -> str:
    """The --data of 20 labelled pictures of noise in `folder`; `arrays` replace those of the file."""
    rng = np.random.default_rng(0)
    made = {"arr_0": rng.integers(0, 255, (20, 8, 8, 1), dtype=np.uint8), "labels": np.arange(20) % 10, **arrays}
    np.savez(folder / "data.npz", **made)
    return f"npz:{folder / 'data.npz'}"
