"""Exam: does a kernel compute what its weight says?  Random inputs against float64, before an artifact is kept."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.dtypes import DTYPES, INT8, as_dtype
from bsrgen.errors import BuildError
from bsrgen.manifest import Manifest
from bsrgen.pattern import Weight
from bsrgen.problem import Problem

Array = NDArray[Any]
MOST_ELEMENTS = 1 << 26  # of X or Y: with millions of rows or columns, fewer tokens are sampled than were asked for


def affordable(problem: Problem, n: int) -> int:
    """n tokens, or as many as MOST_ELEMENTS allow; at least one."""
    return max(min(n, MOST_ELEMENTS // max(*problem.pattern.shape, 1)), 1)


@dataclass(frozen=True)
class Exam:
    """Random inputs of a problem and their float64 answers, computed once and put to many kernels."""

    problem: Problem
    weight: Weight
    tokens: tuple[int, ...]

    @functools.cached_property
    def questions(self) -> list[tuple[Array, dict[str, Any], Array, Array, Array]]:
        """(x, operands, old content of out, right result, bound) for each number of tokens."""
        rng, found = np.random.default_rng(0), []
        for n in self.tokens:
            x, given = self.problem.sample(rng, n)
            old = self.problem.sample_out(rng, n)
            found.append((x, given, old, *self.problem.reference(self.weight, x, given, old)))
        return found

    def worst(self, kernel: Callable[..., Any]) -> tuple[float, int]:
        """The largest error of a kernel, for this CPU or in tracks.HostCalls, as a share of its bound, and the
        number of tokens where that was."""
        shares = []
        for x, given, old, expected, bound in self.questions:
            kernel(x, out=(y := old.copy()), threads=1, **given)
            shares.append(error_share(y, expected, bound))
        return max(zip(shares, self.tokens, strict=True))


def require(share: float, n: int, manifest: Manifest) -> None:
    """BuildError where the largest error of a check, met at n, is more than its bound."""
    if share > 1:
        raise BuildError(
            f"{manifest.name}: the kernel differs from float64 by {share:.3g} times its bound at n = {n}: "
            f"the compiler or bsrgen is at fault ({manifest.compiler}); please report it"
        )


def error_share(y: Array, expected: Array, bound: Array) -> float:
    """The largest |y - expected| / bound: at most 1 for a right result.  Where sums or y may overflow, all is right."""
    dtype = as_dtype(y.dtype)
    real = DTYPES[dtype.real]
    with np.errstate(invalid="ignore"):
        finite = np.abs(expected) + bound / (2 * real.unit_roundoff) < real.largest
        if dtype is not INT8:  # which saturates
            finite &= np.abs(expected) + bound < dtype.largest
    error = np.abs(np.asarray(y, np.float64)[finite] - expected[finite])
    share = error / np.maximum(bound[finite], np.finfo(np.float64).tiny)
    return float(np.nan_to_num(share, nan=np.inf).max(initial=0.0))
