"""Read-only access to torch pickles (`.bin`, `.pt`, `.pth`), never with code execution."""

from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, UsageError, closest, printable
from surgery.store.header import is_unicode


def load_pickle(path: Path, *, key: str | None) -> dict[str, Any]:
    """The tensors of a pickle, memory-mapped, by name; `key` chooses a nested dictionary such as "ema".

    Raises `CheckpointError` when `torch.load(weights_only=True)` refuses: there is no fall-back that runs code.
    """
    import pickle
    import warnings

    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch speaks of its own old storage classes
            try:
                found = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
            except RuntimeError as err:
                if "mmap can only be used" not in str(err):
                    raise
                # Legacy, not a zip: needs a copy in memory.
                found = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError:
        raise CheckpointError(
            "unsafe-pickle", f"{path}: holds more than tensors and plain containers, or is no pickle",
            hint="loading it could run code; convert it to safetensors where you trust it",
        ) from None  # fmt: skip
    except MemoryError:
        raise
    except Exception as err:  # a damaged file fails in whatever way its bytes lead to
        first = str(err).splitlines()[0] if str(err) else type(err).__name__
        raise CheckpointError(
            "malformed", f"{path}: not a torch file ({printable(first, limit=100)})", hint="fetch it again"
        ) from None
    return _tensors(found, path, key)


def _tensors(found: Any, path: Path, key: str | None) -> dict[str, Any]:
    import torch

    nested = (
        [k for k, v in found.items() if isinstance(v, dict) and isinstance(k, str)] if isinstance(found, dict) else []
    )
    if key is not None:
        if key not in nested:
            raise UsageError("key", f"{path}: no dictionary '{printable(key)}' inside", hint=closest(key, nested))
        found = found[key]
    if not isinstance(found, dict):
        raise CheckpointError("malformed", f"{path}: holds no dictionary of tensors", hint="save a state_dict")
    tensors = {k: v.detach() for k, v in found.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if not tensors and nested and key is None:
        names = ", ".join(printable(n, limit=40) for n in nested[:8])
        raise UsageError("key", f"{path}: the tensors are nested", hint=f"choose with --key: {names}")
    if len(tensors) != len(found):
        others = [str(k) for k in found if k not in tensors]
        raise CheckpointError(
            "malformed", f"{path}: {printable(', '.join(others[:5]), limit=120)} are not tensors",
            hint="name the state_dict inside with --key" if nested and key is None else "save a plain state_dict",
        )  # fmt: skip
    for name, tensor in tensors.items():
        if not name or not is_unicode(name) or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(
                "malformed",
                f"{path}: '{printable(name)}' has no plain bytes or no proper name",
                hint="save dense, named tensors",
            )
    return tensors
