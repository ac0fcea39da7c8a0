"""Distilled operators on disk: one safetensors file each, written whole or not at all.

A file is named by the path of the module it replaces and by the digest of everything that decided it, so a run finds
exactly the operators it would train again and no others.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from surgery.errors import CheckpointError, OutputError


@dataclass(frozen=True)
class DistillResult:
    """The best weights of one operator on the CPU, their held-out relative error, and how it got there.

    `history`: one record per evaluation: step, loss (training, mean since the record before), rel_err. The first has
    step 0: the untrained operator. `steps` is the step of the best one.
    """

    state_dict: dict[str, Tensor]
    rel_err: float
    steps: int
    history: list[dict[str, float]] = field(default_factory=list)


class OperatorStore:
    """The finished operators of one folder; `path` is a module path, `key` a hex digest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, path: str, key: str, *, unfinished: bool = False) -> Path:
        return self.folder / f"{path}-{key[:16]}{'.unfinished' if unfinished else ''}.safetensors"

    def save(self, path: str, key: str, result: DistillResult, *, unfinished: bool = False) -> None:
        """Keep a result; `unfinished` ones are for the user to find and never read back. Raises OutputError."""
        from safetensors.torch import save_file

        file = self._file(path, key, unfinished=unfinished)
        note = {"key": key, "rel_err": result.rel_err, "steps": result.steps, "history": result.history}
        partial = file.with_suffix(".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tensors = {name: value.contiguous() for name, value in result.state_dict.items()}
            save_file(tensors, partial, metadata={"surgery": json.dumps(note)})
            with open(partial, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(partial, file)
        except OSError as error:
            raise OutputError("not-writable", f"cannot keep the distilled operator {file}: {error}") from error

    def load(self, path: str, key: str) -> DistillResult | None:
        """The finished result with this digest, or None; raises CheckpointError for a damaged file."""
        from safetensors import SafetensorError, safe_open

        file = self._file(path, key)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as handle:
                note = json.loads((handle.metadata() or {})["surgery"])
                if note["key"] != key:
                    return None
                # Cloned: what is read is mapped, and the folder it lies in may be a temporary one.
                state = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118
                return DistillResult(state, float(note["rel_err"]), int(note["steps"]), list(note["history"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError("bad-operator", f"{file} is not a distilled operator: {error}") from error
