"""Entries that an operation makes in pieces, files that repeat a parent's, and what is measured on the way."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from surgery.arch.carried import indexes
from surgery.errors import CheckpointError
from surgery.graph.lineage import record_digest, verify
from surgery.graph.op import Compute, Keep, PartNames, Plan
from surgery.graph.run import RunOptions, run_op
from surgery.store.checkpoint import open_checkpoint


@dataclass(frozen=True)
class Invert:
    """Flips every bit of the weights; `short` leaves the last byte out."""

    short: bool = False

    name: ClassVar[str] = "invert"
    version: ClassVar[int] = 1
    parents: ClassVar[int] = 1
    trainer: ClassVar[str | None] = None

    def plan(self, ctx: Any, base: Any) -> Plan:
        entries = []
        for name, ref in base.tensors.items():
            where: dict[str, Any] = {"name": name, "dtype": ref.dtype, "shape": ref.shape}
            if ref.nbytes > 1000:
                entries.append(Compute(**where, how=None, refs=(ref,), streamed=True))
            else:
                entries.append(Keep(**where, ref=ref))
        return Plan(tuple(entries), (PartNames("", base.part().base),), indexes(base), mirror=base)

    def run(self, task: Any, tensors: Any, generator: Any) -> Any:
        raise AssertionError("streamed entries are not run")

    def stream(self, task: Compute, readers: list[Any], seed: int) -> Any:
        buffer = bytearray(777)
        for at in range(0, task.nbytes, 777):
            view = memoryview(buffer)[: min(777, task.nbytes - at)]
            readers[0].into(view, at)
            for i, byte in enumerate(view):
                view[i] = byte ^ 255
            yield view[:-1] if self.short and at + len(view) == task.nbytes else view

    def measure(self, plan: Plan, seed: int, *parents: Any) -> dict[str, Any]:
        return {"seed": seed, "share": 0.5}


def test_streamed_tensors_are_whole_and_hashed_in_the_files_of_the_parent(sharded: Path, tmp_path: Path) -> None:
    result = run_op(Invert(), [open_checkpoint(sharded)], tmp_path / "out", options=RunOptions(seed=3, workers=2))
    made, before = open_checkpoint(result.path), open_checkpoint(sharded)
    assert verify(made) == []
    for old, new in zip(sorted(sharded.glob("*.safetensors")), sorted(result.path.glob("*.safetensors")), strict=True):
        length = int.from_bytes(old.read_bytes()[:8], "little") + 8
        assert old.name == new.name and old.read_bytes()[:length] == new.read_bytes()[:length]
    changed = 0
    for name, ref in before.tensors.items():
        old_bytes = b"".join(map(bytes, before.chunks(ref)))
        new_bytes = b"".join(map(bytes, made.chunks(made.tensors[name])))
        if ref.nbytes > 1000:
            changed += 1
            assert new_bytes == bytes(b ^ 255 for b in old_bytes)
        else:
            assert new_bytes == old_bytes
        assert result.record["tensors"][name]["sha256"] == hashlib.sha256(new_bytes).hexdigest()
    assert changed > 10


def test_what_is_measured_stands_beside_what_is_hashed(tiny_dit: Path, tmp_path: Path) -> None:
    result = run_op(Invert(), [open_checkpoint(tiny_dit)], tmp_path / "out", options=RunOptions(seed=3))
    record = json.loads((result.path / "surgery.json").read_text())
    assert record["measured"] == {"seed": 3, "share": 0.5}
    assert record_digest(record | {"measured": {}}) == record["record"]


def test_too_few_bytes_are_a_fault_and_leave_nothing(tiny_dit: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="came out as"):
        run_op(Invert(short=True), [open_checkpoint(tiny_dit)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
