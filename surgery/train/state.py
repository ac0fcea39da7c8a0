"""The resumable state of a training run: weights, optimiser, curve and place, in one safetensors file."""

import json
import os
from pathlib import Path

import torch
from torch import nn

from surgery.errors import CheckpointError, OutputError
from surgery.train.optim import Ema

_STATE = "finetune.safetensors"
_FORMAT = 1


class TrainingState:
    """The resumable state of one run: one safetensors file, replaced whole, its place in the run in the header."""

    def __init__(self, folder: Path, key: str) -> None:
        self.path, self.key = folder / _STATE, key
        self.saved_step: int | None = None
        self.since: list[float] = []

    def save(
        self,
        step: int,
        named: list[tuple[str, nn.Parameter]],
        optimiser: torch.optim.Optimizer,
        history: list[dict[str, float]],
        since: list[float],
        ema: Ema | None = None,
    ) -> None:
        """Write the state before 0-based `step`; raises OutputError."""
        from safetensors.torch import save_file

        tensors = {}
        for i, (name, p) in enumerate(named):
            tensors[f"raw/{name}"] = p.detach().contiguous()
            if ema is not None:
                tensors[f"ema/{name}"] = ema.values[i].contiguous()
            for slot, value in optimiser.state[p].items():
                tensors[f"{slot}/{name}"] = value.contiguous()
        place = {"format": _FORMAT, "key": self.key, "step": step, "history": history, "since": since}
        partial = self.path.with_suffix(".partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata={"surgery": json.dumps(place)})
            with open(partial, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(partial, self.path)
        except OSError as error:
            raise OutputError(
                "not-writable",
                f"cannot keep the training state in {self.path.parent}: {error}",
                hint="check the folder and its rights",
            ) from error
        self.saved_step = step

    def load(
        self,
        named: list[tuple[str, nn.Parameter]],
        optimiser: torch.optim.Optimizer,
        history: list[dict[str, float]],
        ema: Ema | None = None,
    ) -> int:
        """The step to go on from, 0 without a state; raises CheckpointError when it belongs to another run."""
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return 0
        try:
            with safe_open(self.path, framework="pt") as handle:
                place = json.loads((handle.metadata() or {})["surgery"])
                if place["format"] != _FORMAT or place["key"] != self.key:
                    raise CheckpointError(
                        "other-run",
                        f"{self.path} was made by a run with other weights, images or settings",
                        hint="name another folder, or remove that file to start again",
                    )
                held = set(handle.keys())
                slots = {key.split("/", 1)[0] for key in held} - {"raw", "ema"}
                with torch.no_grad():
                    for i, (name, p) in enumerate(named):
                        p.copy_(handle.get_tensor(f"raw/{name}"))
                        if ema is not None:
                            ema.values[i].copy_(handle.get_tensor(f"ema/{name}"))
                        optimiser.state[p] = {
                            slot: handle.get_tensor(f"{slot}/{name}").to("cpu" if slot == "step" else p.device)
                            for slot in sorted(slots)
                            if f"{slot}/{name}" in held
                        }
                history.extend(place["history"])
                self.since = [float(v) for v in place["since"]]
                self.saved_step = int(place["step"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                "bad-state", f"{self.path} is not a finetuning state: {error}", hint="remove that file to start again"
            ) from error
        return self.saved_step
