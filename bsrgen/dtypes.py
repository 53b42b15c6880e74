"""The data types: one row each, with the name that every language uses for it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from bsrgen.errors import ArgumentTypeError


@dataclass(frozen=True, slots=True)
class DType:
    """A type of W and X, and the rounding that bounds a kernel's error (DESIGN section 6)."""

    name: str
    short: str  # in kernel names
    c: str
    bytes: int
    accumulator: str  # name of the row that sums are kept in
    unit_roundoff: float  # of the type itself: 2^-p

    @property
    def numpy(self) -> np.dtype[np.generic]:
        """The numpy dtype of native byte order."""
        return np.dtype(self.name)


FLOAT32 = DType("float32", "f32", "float", 4, "float32", 2.0**-24)
FLOAT64 = DType("float64", "f64", "double", 8, "float64", 2.0**-53)

DTYPES = {row.name: row for row in (FLOAT32, FLOAT64)}


def as_dtype(value: DTypeLike | DType) -> DType:
    """The row of `value`, a name or a numpy dtype.  ArgumentTypeError when there is none."""
    if isinstance(value, DType):
        return value
    try:
        name = np.dtype(value).name
    except (TypeError, ValueError, SyntaxError):  # numpy parses strings
        name = str(value)
    if name not in DTYPES:
        raise ArgumentTypeError(f"dtype {value!r}: no kernels for it; one of {', '.join(DTYPES)}")
    return DTYPES[name]


def bound_factor(terms: Any, unit_roundoff: float) -> Any:
    """g(n) = n u / (1 - n u) (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., lemma 3.1)."""
    return terms * unit_roundoff / (1 - terms * unit_roundoff)
