"""Read-only access to torch pickles (`.bin`, `.pt`, `.pth`), never with code execution."""

from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, UsageError, closest, printable


def load_pickle(path: Path, *, key: str | None) -> dict[str, Any]:
    """The tensors of a pickle, memory-mapped, by name; `key` chooses a nested dictionary such as "ema".

    Raises `CheckpointError` when `torch.load(weights_only=True)` refuses: there is no fall-back that runs code.
    """
    import pickle

    import torch

    try:
        try:
            found = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        except RuntimeError as err:
            if "mmap can only be used" not in str(err):
                raise
            found = torch.load(path, weights_only=True, map_location="cpu")  # legacy, not a zip: needs a copy in memory
    except pickle.UnpicklingError:
        raise CheckpointError(
            "unsafe-pickle", f"{path}: holds objects other than tensors and plain containers",
            hint="loading it could run code; convert it to safetensors where you trust it",
        ) from None  # fmt: skip
    except (RuntimeError, EOFError, ValueError, OSError, KeyError) as err:
        first = str(err).splitlines()[0] if str(err) else type(err).__name__
        raise CheckpointError(
            "malformed", f"{path}: not a torch file ({printable(first, limit=100)})", hint="fetch it again"
        ) from None
    return _tensors(found, path, key)


def _tensors(found: Any, path: Path, key: str | None) -> dict[str, Any]:
    import torch

    nested = [k for k, v in found.items() if isinstance(v, dict)] if isinstance(found, dict) else []
    if key is not None:
        if key not in nested:
            raise UsageError("key", f"{path}: no dictionary '{printable(key)}' inside", hint=closest(key, nested))
        found = found[key]
    if not isinstance(found, dict):
        raise CheckpointError("malformed", f"{path}: holds no dictionary of tensors", hint="save a state_dict")
    tensors = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if not tensors and nested:
        raise UsageError(
            "key", f"{path}: the tensors are nested", hint=f"choose with --key: {', '.join(map(str, nested[:8]))}"
        )
    if len(tensors) != len(found):
        others = [str(k) for k in found if k not in tensors]
        raise CheckpointError(
            "malformed", f"{path}: {printable(', '.join(others[:5]), limit=120)} are not tensors",
            hint="name the state_dict inside with --key" if nested else "save a plain state_dict",
        )  # fmt: skip
    return tensors
