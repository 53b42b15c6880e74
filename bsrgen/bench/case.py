"""What is timed: one weight, an operator and activations, in the shapes that the contenders want."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.dtypes import as_dtype
from bsrgen.operators import as_operator
from bsrgen.pattern import Weight, random_weight
from bsrgen.problem import Problem

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One product: a weight, an operator and its activations, row-major as the operator has them, on some threads."""

    weight: Weight
    operator: str
    x: Array
    threads: int = 1

    @property
    def problem(self) -> Problem:
        """The same as bsrgen's own noun."""
        return Problem(as_operator(self.operator), self.weight.pattern, as_dtype(self.x.dtype), (), self.n)

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

    def dense(self) -> Array:
        """W (M, K) with its zeros."""
        return np.ascontiguousarray(self.weight.todense(), dtype=self.x.dtype)

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
        """Room for Y."""
        M = self.weight.pattern.M
        return np.zeros((self.n, M) if self.linear else (M, self.n), self.x.dtype)


def case_of(weight: Weight, operator: str, n: int, threads: int = 1) -> Case:
    """`weight` with normal activations of its own type, from a fixed seed."""
    shape = as_operator(operator).shape(n, weight.pattern.K)
    x = np.random.default_rng(20261120).standard_normal(shape).astype(weight.data.dtype)
    return Case(weight, operator, x, threads)


def random_case(
    operator: str, shape: tuple[int, int], blocksize: tuple[int, int], density: float, n: int, dtype: str = "float32"
) -> Case:
    """A uniform random weight, from a fixed seed, and its activations."""
    return case_of(random_weight(20261120, shape, blocksize, density, dtype=dtype), operator, n)
