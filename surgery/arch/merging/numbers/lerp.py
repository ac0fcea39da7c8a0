"""Linear merges of two by `torch.lerp`: less work in some formats, other last digits (`--numerics fast`).

Widening, multiplying and rounding are one pass in the processor's registers. The differences to the three float32
operations of the exact way, at most one step of the stored dtype, depend on the processor, so no other machine need
make the same bytes. It pays for float16 and large models, and where the exact arithmetic is not compiled.
"""

from collections.abc import Iterator, Sequence

from surgery.store.reader import Reader


def lerps(weights: Sequence[float], readers: Sequence[Reader], dtype: str) -> bool:
    """Whether two inputs are mixed, not more nor less, and stored as what they are: then no sum can overflow."""
    mixed = len(weights) == 2 and abs(sum(weights) - 1) < 1e-6 and min(weights) >= 0
    return mixed and dtype in ("BF16", "F16", "F32") and all(r.dtype == dtype for r in readers)


def lerped(share: float, readers: Sequence[Reader], dtype: str, total: int, piece: int) -> Iterator[memoryview]:
    """The bytes of H + `share` (D - H), in pieces that are valid until the next one; `readers` are of H and D."""
    import torch

    from surgery.store.dtypes import as_bytes, torch_dtype

    kind = torch_dtype(dtype)
    assert kind is not None
    out = torch.empty(min(piece, total), dtype=kind)
    size = out.element_size()
    made = memoryview(as_bytes(out)).cast("B")
    inputs = [torch.empty_like(out) for _ in readers]
    buffers = [memoryview(as_bytes(tensor)).cast("B") for tensor in inputs]
    for start in range(0, total, piece):
        count = min(piece, total - start)
        for reader, buffer in zip(readers, buffers, strict=True):
            reader.into(buffer[: count * size], start * size)
        host, donor = (tensor[:count] for tensor in inputs)
        torch.lerp(host, donor, share, out=out[:count])
        yield made[: count * size]
