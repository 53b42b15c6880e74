"""A point of a grid: everything that fixes one product, as data; its weight and activations are made when asked for."""

from dataclasses import dataclass

from benchmarks.matrices import operator_matrix
from bsrgen.bench.case import FULL, Case, case_of
from bsrgen.pattern import Weight, as_weight, random_weight

SEED = 20261120
DRAWN = ("uniform", "powerlaw", "banded")  # kinds of random_weight


@dataclass(frozen=True, slots=True)
class Point:
    """One product to be timed.  Two equal points have equal patterns, values and activations on every machine."""

    operator: str
    shape: tuple[int, int]
    block: tuple[int, int]
    density: float
    n: int
    kind: str = "uniform"  # one of DRAWN, or the name of an operator matrix (benchmarks/matrices.py)
    dtype: str = "float32"  # of W and X; Y is float32 where that is int8
    threads: int = 1
    seed: int = SEED

    def __str__(self) -> str:
        (M, K), (R, C) = self.shape, self.block
        parts = [f"{self.operator} {self.dtype} {M}x{K} {R}x{C} d={self.density:.4g} n={self.n}"]
        parts += [self.kind] if self.kind != "uniform" else []
        return " ".join(parts + ([f"{self.threads} threads"] if self.threads > 1 else []))

    def weight(self) -> Weight:
        """The matrix; in float32 where the type is a reduced one, which rounding is the case's."""
        if self.kind not in DRAWN:
            return as_weight(operator_matrix(self.kind), blocksize=self.block, dtype=self.dtype)
        made = self.dtype if self.dtype in FULL else "float32"  # the same values in all reduced types, before rounding
        return random_weight(self.seed, self.shape, self.block, self.density, kind=self.kind, dtype=made)

    def case(self) -> Case:
        """The matrix with its activations."""
        return case_of(self.weight(), self.operator, self.n, self.threads, dtype=self.dtype)
