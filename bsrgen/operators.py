"""The operators: one row each.  A kernel's signature, its checks and its reference all follow from the row."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bsrgen.dtypes import DType, as_types
from bsrgen.errors import ArgumentError

Array = NDArray[Any]
Places = tuple[int | None, int | None, int | None]  # of an axis in W, X and Y


@dataclass(frozen=True, slots=True)
class Operator:
    """A product with the weight W[M,K].  `token_axis` is the axis of N in both X and Y, which are row-major.

    permutable: the axes whose order does not matter, and where each lies in (W, X, Y), None where it does not: operands
    permuted along one give the same result, permuted along it too where Y has it.  Such axes may be thinned out and
    gathered at run time (mode="pit"; Zheng et al., SOSP 2023, section 3.1).  An axis that is not there must be kept in
    order and whole.
    """

    name: Literal["linear", "spmm"]
    formula: str
    x_shape: str
    y_shape: str
    token_axis: int
    product: Callable[[Any, Array], Array]  # (W, X) -> Y; W is anything with `@`, dense or scipy
    permutable: Mapping[str, Places] = field(hash=False)

    def __reduce__(self) -> Any:
        return as_operator, (self.name,)  # the row itself: `product` cannot be pickled

    def shape(self, n: int, features: int) -> tuple[int, int]:
        """The shape of an operand that holds `features` features of `n` tokens."""
        return (n, features) if self.token_axis == 0 else (features, n)

    def turned(self, v: Array) -> Array:
        """From token after token to the order that X and Y have here, and back."""
        return v if self.token_axis == 0 else v.T


LINEAR = Operator(
    "linear",
    "Y[N,M] = X[N,K] @ W[M,K].T",
    "[N,K]",
    "[N,M]",
    0,
    lambda W, X: np.ascontiguousarray((W @ X.T).T),
    {"n": (None, 0, 0), "k": (1, 1, None), "m": (0, None, 1)},
)
SPMM = Operator(
    "spmm",
    "Y[M,N] = W[M,K] @ X[K,N]",
    "[K,N]",
    "[M,N]",
    1,
    lambda W, X: np.asarray(W @ X),
    {"n": (None, 1, 1), "k": (1, 0, None), "m": (0, None, 0)},
)

OPERATORS: dict[str, Operator] = {row.name: row for row in (LINEAR, SPMM)}


@dataclass(frozen=True, slots=True)
class PatternOperator:
    """A product of dense arrays at a block pattern: of W[M,K] only the pattern counts, every call brings all numbers.

    `inputs` are its arrays and their shapes: N, tokens or heads, free at each call, D of a head, B stored blocks.
    """

    name: Literal["sddmm", "linear_grad", "softmax", "attention"]
    formula: str
    inputs: tuple[tuple[str, str], ...]
    result: str
    token_axis: int  # of N in the inputs
    headed: bool = False  # N stands for any leading axes, heads and batches, that the result has too


SDDMM = PatternOperator(
    "sddmm", "data[nnzb,R,C] = A[M,N] @ B[K,N].T at the stored blocks", (("a", "MN"), ("b", "KN")), "[nnzb,R,C]", 1
)
LINEAR_GRAD = PatternOperator(
    "linear_grad",
    "data[nnzb,R,C] = A[N,M].T @ B[N,K] at the stored blocks",
    (("a", "NM"), ("b", "NK")),
    "[nnzb,R,C]",
    0,
)
SOFTMAX = PatternOperator(
    "softmax", "P[N,nnzb,R,C] = softmax(scale * S[N,nnzb,R,C]) over the stored elements of a row", (("s", "NBRC"),),
    "[N,nnzb,R,C]", 0, True,
)  # fmt: skip
ATTENTION = PatternOperator(
    "attention", "Y[N,M,D] = softmax(scale * Q[N,M,D] @ K[N,K,D].T at the stored blocks) @ V[N,K,D]",
    (("q", "NMD"), ("k", "NKD"), ("v", "NKD")), "[N,M,D]", 0, True,
)  # fmt: skip

PATTERN_OPERATORS: dict[str, PatternOperator] = {row.name: row for row in (SDDMM, LINEAR_GRAD, SOFTMAX, ATTENTION)}


def as_operator(name: str) -> Operator:
    """The row called `name`.  ArgumentError when there is none."""
    if not isinstance(name, str) or name not in OPERATORS:
        raise ArgumentError(f"operator {name!r}: one of {', '.join(OPERATORS)}")
    return OPERATORS[name]


NAME = re.compile(r"\A[a-z][a-z0-9_]{0,94}\Z")


def kernel_name(
    operator: str, dtype: DType, x_dtype: DType, out_dtype: DType, shape: tuple[int, int], blocksize: tuple[int, int],
    pattern: str, epilogue: Sequence[str], pit: object = None,
) -> str:  # fmt: skip
    """Prefix of a kernel's symbols and files: operator, types, shape, block, digest of all else but the values.

    One type stands for all three where the others are its defaults; else _x and _y say what X and Y are.
    """
    text = f"{pattern} {operator} {dtype.name} {list(epilogue)}" + (f" {pit}" if pit else "")
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    operator += "_pit" if pit else ""
    (M, K), (R, C) = shape, blocksize
    types = dtype.short
    if x_dtype is not dtype:
        types += f"_x{x_dtype.short}"
    if out_dtype is not as_types(dtype, x_dtype)[2]:
        types += f"_y{out_dtype.short}"
    return f"{operator}_{types}_{M}x{K}_b{R}x{C}_{digest}"
