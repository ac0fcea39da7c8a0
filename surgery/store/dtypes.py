"""Names of dtypes in the format against torch's. Imports torch inside the functions."""

from functools import cache
from typing import TYPE_CHECKING, Any

from surgery.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_TORCH = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip


def torch_dtype(name: str) -> "torch.dtype | None":
    """torch's dtype for a format name; None for the sub-byte ones, which torch reads as raw bytes."""
    import torch

    return getattr(torch, _TORCH[name]) if name in _TORCH else None


@cache
def _names() -> dict[Any, str]:
    import torch

    return {getattr(torch, attribute): name for name, attribute in _TORCH.items()}


def name_of(dtype: "torch.dtype") -> str:
    """The format's name of a torch dtype. Raises `CheckpointError` for one that the format cannot hold."""
    if dtype not in _names():
        raise CheckpointError("unknown-dtype", f"{dtype} cannot be stored in safetensors", hint="cast the tensor first")
    return _names()[dtype]


def as_bytes(tensor: "torch.Tensor") -> Any:
    """The tensor's bytes in row-major order as a flat uint8 array that shares memory when it can."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else torch.empty(0, dtype=torch.uint8).numpy()
