"""Arithmetic of merging on the processor: weighted sums of bfloat16, and float16 to float32 and back.

Compiled (`sums.c`, `halves.c`) where the package was built with a compiler, numpy's work (`packed.py`, `halves.py`)
elsewhere: the same bits either way. Needs numpy.
"""

from .halves import narrow as narrow_by_numpy
from .halves import widen as widen_by_numpy
from .packed import weighted_sum as weighted_sum_by_numpy

try:
    from ._sums import weighted_sum

    COMPILED = True
except ImportError:
    weighted_sum, COMPILED = weighted_sum_by_numpy, False

try:
    from ._halves import narrow, widen
except ImportError:  # also where the processor lacks the instructions
    narrow, widen = narrow_by_numpy, widen_by_numpy

__all__ = [
    "COMPILED",
    "narrow",
    "narrow_by_numpy",
    "weighted_sum",
    "weighted_sum_by_numpy",
    "widen",
    "widen_by_numpy",
]
