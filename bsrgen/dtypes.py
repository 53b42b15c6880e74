"""The data types: one row each, with the name that every language uses for it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from bsrgen.errors import ArgumentTypeError, UnsupportedError


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
    largest: float  # finite magnitude; of int8 the symmetric range: -128 has no opposite

    def __reduce__(self) -> Any:
        return _row, (self.name,)  # the row itself, so that `is` holds in other processes

    @property
    def dlpack(self) -> tuple[int, int]:
        """DLPack's code of the kind (DLDataTypeCode) and the bits."""
        return {"bfloat16": 4, "uint8": 1, "float8_e4m3fn": 10}.get(
            self.name, 0 if self.name.startswith("int") else 2
        ), 8 * self.bytes

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype of native byte order; bfloat16 and float8_e4m3fn are ml_dtypes'."""
        if self.name in ("bfloat16", *HOPPER):
            import ml_dtypes

            found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, self.name))
            return found
        return np.dtype(self.name)


FLOAT32 = DType("float32", "f32", "float", 4, "float32", "float32", 2.0**-24, 2.0**-149, (2 - 2.0**-23) * 2.0**127)
FLOAT64 = DType("float64", "f64", "double", 8, "float64", "float64", 2.0**-53, 2.0**-1074, (2 - 2.0**-52) * 2.0**1023)
BFLOAT16 = DType("bfloat16", "bf16", "uint16_t", 2, "float32", "float32", 2.0**-8, 2.0**-126, (2 - 2.0**-7) * 2.0**127)
FLOAT16 = DType("float16", "f16", "uint16_t", 2, "float32", "float32", 2.0**-11, 2.0**-24, 65504.0)
INT8 = DType("int8", "s8", "int8_t", 1, "int32", "float32", 0.0, 1.0, 127.0)
INT32 = DType("int32", "s32", "int32_t", 4, "int32", "float32", 0.0, 1.0, 2.0**31 - 1)  # of sums only
UINT8 = DType("uint8", "u8", "uint8_t", 1, "int32", "float32", 0.0, 1.0, 255.0)  # of masks only
FLOAT8 = DType("float8_e4m3fn", "e4m3", "uint8_t", 1, "float32", "float32", 2.0**-4, 2.0**-9, 448.0)  # no Inf

HOPPER = {FLOAT8.name: FLOAT8}  # for matrix units of one GPU alone, which nothing else multiplies
HOPPER_ONLY = "it is for Hopper alone: backend='cuda', target='sm_90a', linear, blocks of 8 rows or more x 16 n columns"
DTYPES = {row.name: row for row in (FLOAT32, FLOAT64, BFLOAT16, FLOAT16, INT8)}
ACCUMULATORS = {row.name: row for row in (FLOAT32, FLOAT64, INT32)}

# Which types go together: of W and X, and those that Y may then have, the default first.
PAIRS: dict[tuple[str, str], tuple[str, ...]] = {
    ("float32", "float32"): ("float32",),
    ("float64", "float64"): ("float64",),
    ("bfloat16", "bfloat16"): ("bfloat16", "float32"),
    ("float16", "float16"): ("float16", "float32"),
    ("int8", "int8"): ("float32", "bfloat16", "int8"),
    ("bfloat16", "float32"): ("float32", "bfloat16"),  # from here on only W is reduced: for few tokens
    ("float16", "float32"): ("float32",),
    ("int8", "float32"): ("float32",),
    ("int8", "bfloat16"): ("bfloat16", "float32"),
}
HOPPER_PAIRS: dict[tuple[str, str], tuple[str, ...]] = {
    ("float8_e4m3fn", "float8_e4m3fn"): ("bfloat16", "float16", "float32", "float8_e4m3fn")
}


def as_dtype(value: DTypeLike | DType, hopper: bool = False) -> DType:
    """The row of `value`, a name or a numpy dtype; of HOPPER with `hopper`.  ArgumentTypeError, UnsupportedError."""
    if isinstance(value, DType):
        return value
    try:
        name = np.dtype(value).name
    except (TypeError, ValueError, SyntaxError):  # numpy parses strings
        name = str(value)
    if name in HOPPER:
        if not hopper:
            raise UnsupportedError(f"dtype {name!r}: {HOPPER_ONLY}")
        return HOPPER[name]
    if name not in DTYPES:
        raise ArgumentTypeError(f"dtype {value!r}: no kernels for it; one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _row(name: str) -> DType:
    return (DTYPES | ACCUMULATORS | HOPPER)[name]


def as_types(
    dtype: DTypeLike | DType, x_dtype: DTypeLike | DType | None = None, out_dtype: DTypeLike | DType | None = None,
    hopper: bool = False,
) -> tuple[DType, DType, DType]:  # fmt: skip
    """The rows of W, X and Y; None for X means W's, for Y the first of PAIRS; with `hopper` also those of HOPPER.

    ArgumentTypeError where a type has no row, UnsupportedError where the rows do not go together.
    """
    w = as_dtype(dtype, hopper)
    x = w if x_dtype is None else as_dtype(x_dtype, hopper)
    pairs = PAIRS | HOPPER_PAIRS
    if (w.name, x.name) not in pairs:
        reads = " or ".join(x_name for w_name, x_name in pairs if w_name == w.name)
        raise UnsupportedError(f"x_dtype={x.name!r} with dtype={w.name!r}: {w.name} kernels read {reads}")
    able = pairs[w.name, x.name]
    y = DTYPES[able[0]] if out_dtype is None else as_dtype(out_dtype, w.name in HOPPER)
    if y.name not in able:
        raise UnsupportedError(
            f"out_dtype={y.name!r} with dtype={w.name!r} and x_dtype={x.name!r}: such kernels write {' or '.join(able)}"
        )
    return w, x, y


def bound_factor(terms: Any, unit_roundoff: float) -> Any:
    """g(n) = n u / (1 - n u) (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., lemma 3.1)."""
    return terms * unit_roundoff / (1 - terms * unit_roundoff)
