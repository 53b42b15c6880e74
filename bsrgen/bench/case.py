"""What is timed: one weight, an operator and activations, in the shapes that the contenders want."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bsrgen.dtypes import DTYPES, FLOAT32, INT8, DType, as_dtype, bound_factor
from bsrgen.operators import as_operator
from bsrgen.pattern import Weight, random_weight
from bsrgen.problem import Problem, as_problem
from bsrgen.valued import aligned

Array = NDArray[Any]
SEED = 20261120
FULL = ("float32", "float64")
MOST = 127  # of int8, symmetric


@dataclass(frozen=True, slots=True)
class Case:
    """One product: a weight, an operator and its activations, row-major as the operator has them, on some threads.

    int8: `weight` is float32, but on the grid of whole multiples of `w_scale` (one a row of W) up to 127, which each
    row reaches: who quantises it by the largest of a row finds the same integers.  X is int8 times `x_scale`.
    """

    weight: Weight
    operator: str
    x: Array
    threads: int = 1
    w_scale: Array | None = None
    x_scale: float = 1.0

    @property
    def dtype(self) -> DType:
        """Of X, and of W as it is stored."""
        return as_dtype(self.x.dtype)

    @property
    def out_dtype(self) -> DType:
        """Of Y."""
        return FLOAT32 if self.dtype is INT8 else self.dtype

    @property
    def problem(self) -> Problem:
        """The same as bsrgen's own noun."""
        return as_problem(self.operator, self.weight.pattern, self.dtype, n=self.n)

    @property
    def given(self) -> dict[str, Any]:
        """What a kernel of this type takes besides X."""
        return {"x_scale": np.float32(self.x_scale)} if self.dtype is INT8 else {}

    @property
    def linear(self) -> bool:
        """Y[N,M] = X[N,K] @ W.T, else Y[M,N] = W @ X[K,N]."""
        return self.operator == "linear"

    @property
    def n(self) -> int:
        """Tokens."""
        return int(self.x.shape[0 if self.linear else 1])

    @property
    def nonzero_flop(self) -> int:
        """2 * stored elements * N: what all rates are given on, the dense ones too."""
        return 2 * self.weight.pattern.nnz * self.n

    @property
    def moved_bytes(self) -> int:
        """Stored values, X and Y once each."""
        return self.weight.pattern.nnz * self.dtype.bytes + self.x.nbytes + self.out().nbytes

    def dense(self) -> Array:
        """W (M, K) with its zeros, in the type of X."""
        p = self.weight.pattern
        W = np.zeros((p.block_rows, p.block_cols, p.R, p.C), self.weight.data.dtype)
        W[p.rows, p.indices] = self.weight.data
        W = W.transpose(0, 2, 1, 3).reshape(p.block_rows * p.R, p.block_cols * p.C)[: p.M, : p.K]
        if self.w_scale is not None:
            W = np.rint(W / self.w_scale[:, None])
        return np.ascontiguousarray(W, dtype=self.x.dtype)

    def csr(self) -> Any:
        """W (M, K) as scipy csr_array."""
        p = self.weight.pattern
        W = self.weight.tobsr().tocsr()[: p.M, : p.K]
        W.sort_indices()
        return W

    def features(self, *, padded: bool = False) -> Array:
        """X as (K, N), C-contiguous; K filled up with zeros to whole blocks if `padded`."""
        p = self.weight.pattern
        X = np.ascontiguousarray(self.x.T if self.linear else self.x)
        return np.pad(X, ((0, p.block_cols * p.C - p.K), (0, 0))) if padded else X

    def out(self) -> Array:
        """Room for Y, from the start of a line: where an array happens to lie is no contender's merit."""
        M = self.weight.pattern.M
        y = aligned(M * self.n * self.out_dtype.bytes).view(self.out_dtype.numpy)
        y.fill(0)
        return y.reshape((self.n, M) if self.linear else (M, self.n))

    def per_row(self, v: Array) -> Array:
        """One value a row of W, to go with Y."""
        return v if self.linear else v[:, None]

    def by_float32(self) -> "Case":
        """The same product in float32, the scale of X within the weight."""
        data = self.weight.data.astype(np.float32) * np.float32(self.x_scale)
        return replace(
            self, weight=Weight(self.weight.pattern, data), x=self.x.astype(np.float32), w_scale=None, x_scale=1.0
        )

    def reference(self) -> tuple[Array, Array]:
        """(Y, bound) in float64, as Problem.reference: reduced types sum in float32 or better and round Y once."""
        if self.dtype.name in FULL:
            return self.problem.reference(self.weight, self.x)
        p, operator = self.weight.pattern, as_operator(self.operator)
        W = replace(self, weight=Weight(p, self.weight.data.astype(np.float64))).csr()
        x64 = self.x.astype(np.float64) * self.x_scale
        y, size = operator.product(W, x64), operator.product(abs(W), abs(x64))
        entries = np.diff(p.indptr).repeat(p.R)[: p.M] * p.C
        bound = (
            self.per_row(bound_factor(entries + 4, FLOAT32.unit_roundoff)) * size
        )  # two scales more than a float type
        if self.dtype is not INT8:
            bound = bound + self.dtype.unit_roundoff * (np.abs(y) + bound) + self.dtype.smallest
        return y, bound


def case_of(weight: Weight, operator: str, n: int, threads: int = 1, dtype: DTypeLike | DType | None = None) -> Case:
    """`weight` with normal activations, from a fixed seed, of `dtype` or the weight's own type."""
    shape = as_operator(operator).shape(n, weight.pattern.K)
    x, row = np.random.default_rng(SEED).standard_normal(shape), as_dtype(weight.data.dtype if dtype is None else dtype)
    if row is INT8:
        weight, w_scale = on_grid(weight)
        x_scale = float(np.float32(max(np.abs(x).max(initial=0.0), 1e-6) / MOST))
        return Case(weight, operator, np.rint(x / x_scale).astype(np.int8), threads, w_scale, x_scale)
    if weight.data.dtype != row.numpy:
        weight = Weight(weight.pattern, weight.data.astype(row.numpy))
    return Case(weight, operator, x.astype(row.numpy), threads)


def on_grid(weight: Weight) -> tuple[Weight, Array]:
    """`weight` in float32, each row of W rounded to whole multiples of a 127th of its largest, and those scales."""
    p, data = weight.pattern, weight.data.astype(np.float32)
    largest = np.zeros((p.block_rows, p.R), np.float32)
    np.maximum.at(largest, p.rows, np.abs(data).max(axis=2, initial=0.0))
    scale = np.where(largest > 0, largest / np.float32(MOST), np.float32(1)).astype(np.float32)
    data = np.rint(data / scale[p.rows][:, :, None]) * scale[p.rows][:, :, None]
    return Weight(p, data.astype(np.float32)), scale.reshape(-1)[: p.M]


def random_case(
    operator: str, shape: tuple[int, int], blocksize: tuple[int, int], density: float, n: int, dtype: str = "float32"
) -> Case:
    """A uniform random weight, from a fixed seed, and its activations."""
    made = dtype if dtype in FULL else "float32"
    return case_of(random_weight(SEED, shape, blocksize, density, dtype=made), operator, n, dtype=DTYPES[dtype])
