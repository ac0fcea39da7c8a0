"""Tile sizes per architecture, from `tiles.json` beside this file or the file named by SURGERY_KERNEL_TILES.

Nothing is tuned at run time: a first call costs one compilation. Sizes are classes of the average number of rows an
expert gets, which is known without asking the device.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

SHIPPED = Path(__file__).with_name("tiles.json")
SIZES = (("large", 96), ("medium", 24), ("small", 0))  # rows an expert, from which on


@dataclass(frozen=True)
class Tiles:
    """The launch parameters of every kernel for one architecture, precision and size class."""

    arch: str
    size: str
    block_m: int
    kernels: Mapping[str, Mapping[str, int]]

    def of(self, kernel: str) -> Mapping[str, int]:
        """Block sizes, `num_warps` and `num_stages` of one kernel."""
        return self.kernels[kernel]


def architecture(capability: tuple[int, int]) -> str:
    """The entry that serves a compute capability: same generation, or the one with as little shared memory."""
    number = capability[0] * 10 + capability[1]
    if number < 80:
        raise ValueError(f"compute capability {capability[0]}.{capability[1]}: the kernels need sm80 or later")
    if number in (86, 89) or number >= 120:
        return "sm120"  # 99 KiB of shared memory a block
    return "sm80" if number < 90 else "sm90" if number < 100 else "sm100"


@cache
def _read(path: Path) -> Mapping[str, Mapping]:
    try:
        document = json.loads(path.read_text())
        if document["format"] != 1:
            raise ValueError(f"format {document['format']}, known: 1")
        return document["archs"]
    except (OSError, KeyError, TypeError, ValueError) as err:
        raise ValueError(f"{path}: no table of tiles: {err}") from None


def table() -> Mapping[str, Mapping]:
    """The whole table: architecture -> precision ("16", "32") -> size class -> kernel -> parameters."""
    return _read(Path(os.environ.get("SURGERY_KERNEL_TILES") or SHIPPED))


def tiles(arch: str, dtype: torch.dtype, pairs: int, num_experts: int) -> Tiles:
    """What to launch with for so many pairs over so many experts. Raises ValueError when the table lacks it."""
    size = next(name for name, rows in SIZES if pairs >= rows * num_experts)
    precision = "32" if dtype == torch.float32 else "16"
    try:
        entry = table()[arch][precision]
        sizes = entry[size]
        return Tiles(arch, size, sizes["block_m"], {**entry["any"], **sizes["kernels"]})
    except KeyError as err:
        raise ValueError(f"the table of tiles has no {err} for {arch}, {precision} bit, {size}") from None
