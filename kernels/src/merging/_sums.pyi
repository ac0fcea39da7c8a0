from collections.abc import Sequence

def weighted_sum(
    out: bytearray | memoryview,
    weights: Sequence[float],
    inputs: Sequence[bytes | bytearray | memoryview],
    /,
) -> bool: ...
