"""The data types: one row each, with the name that every language uses for it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from bsrgen.errors import ArgumentTypeError


@dataclass(frozen=True, slots=True)
class DType:
    """A type of W, X or Y, and the rounding that bounds a kernel's error (DESIGN section 6)."""

    name: str
    short: str  # in kernel names
    c: str  # in headers; bfloat16 and float16 cross the ABI as their bits
    bytes: int
    accumulator: str  # name of the row that sums of products are kept in
    real: str  # name of the row that the epilogue computes in
    unit_roundoff: float  # of the type itself: 2^-p; 0 for integers
    smallest: float  # nonzero magnitude that kernels tell from zero; below, matrix units read and write zero

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype of native byte order; bfloat16 is ml_dtypes'."""
        if self.name == "bfloat16":
            import ml_dtypes

            return np.dtype(ml_dtypes.bfloat16)
        return np.dtype(self.name)


FLOAT32 = DType("float32", "f32", "float", 4, "float32", "float32", 2.0**-24, 2.0**-149)
FLOAT64 = DType("float64", "f64", "double", 8, "float64", "float64", 2.0**-53, 2.0**-1074)
BFLOAT16 = DType("bfloat16", "bf16", "uint16_t", 2, "float32", "float32", 2.0**-8, 2.0**-126)
FLOAT16 = DType("float16", "f16", "uint16_t", 2, "float32", "float32", 2.0**-11, 2.0**-24)
INT8 = DType("int8", "s8", "int8_t", 1, "int32", "float32", 0.0, 1.0)
INT32 = DType("int32", "s32", "int32_t", 4, "int32", "float32", 0.0, 1.0)  # of sums only

DTYPES = {row.name: row for row in (FLOAT32, FLOAT64, BFLOAT16, FLOAT16, INT8)}
ACCUMULATORS = {row.name: row for row in (FLOAT32, FLOAT64, INT32)}


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
