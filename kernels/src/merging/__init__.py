"""Weighted sums of bfloat16 tensors on the processor, where merging spends its time.

`weighted_sum(out, weights, inputs)` is compiled (`sums.c`) where the package was built with a compiler, numpy's work
(`packed.py`) elsewhere: the same bits either way. Needs numpy.
"""

from .packed import weighted_sum as weighted_sum_by_numpy

try:
    from ._sums import weighted_sum

    COMPILED = True
except ImportError:
    weighted_sum, COMPILED = weighted_sum_by_numpy, False

__all__ = ["COMPILED", "weighted_sum", "weighted_sum_by_numpy"]
