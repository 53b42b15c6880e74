"""Shapes: which block shape to prune a weight in, by the cost model and by what magnitude pruning would keep."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from numpy.typing import DTypeLike

from bsrgen.backends import BACKENDS
from bsrgen.dtypes import as_types
from bsrgen.errors import ArgumentError, UnsupportedError
from bsrgen.even import EvenPattern
from bsrgen.foreign import Array, Pair, count, host, pair
from bsrgen.problem import as_problem
from bsrgen.prune import block_norms, fewest, magnitude, mass, share
from bsrgen.targets import as_targets
from bsrgen.tune import rank
from bsrgen.verdict import short_time

SHAPES: tuple[Pair, ...] = (
    (1, 1), (1, 4), (4, 1), (8, 1), (16, 1), (32, 1), (64, 1), (1, 16), (1, 32), (2, 2), (4, 4), (8, 8), (16, 16),
    (32, 32), (64, 64),
)  # fmt: skip
WITHIN = 1.25  # of the fastest shape's time: for a density, the shape that keeps most is chosen among those


@dataclass(frozen=True, slots=True)
class Shape:
    """A weight pruned by magnitude in blocks of one shape."""

    blocksize: Pair
    density: float  # stored blocks / all blocks
    mass: float  # share of the squared norm that they hold
    seconds: float  # predicted, one call of n tokens on one core
    speedup: float  # over a dense product, predicted
    kept: Array  # which blocks: bool [block_rows, block_cols]

    def __str__(self) -> str:
        R, C = self.blocksize
        return (
            f"{R}x{C}: density {self.density:.3g}, mass {self.mass:.3f}, predicted {short_time(self.seconds)}, "
            f"{self.speedup:.2g}x over dense"
        )


@dataclass(frozen=True, slots=True)
class Search:
    """All shapes that were looked at, the fastest first, and the one to take."""

    shapes: tuple[Shape, ...]
    pick: Shape

    def __str__(self) -> str:
        return "\n".join(f"{'->' if shape is self.pick else '  '} {shape}" for shape in self.shapes)


def search(
    W: Any,
    *,
    density: float | None = None,
    least_mass: float | None = None,
    shapes: Iterable[Pair] = SHAPES,
    balanced: bool = False,
    operator: str = "linear",
    dtype: DTypeLike = "float32",
    x_dtype: DTypeLike | None = None,
    n: int | None = None,
    target: str | tuple[str, ...] = "native",
) -> Search:
    """What pruning a dense W [M, K] would keep and cost, for each block shape; nothing is compiled or changed.

    density: a budget of size, each shape keeps that share of its blocks; the pick keeps the most mass among the shapes
        that are at most WITHIN times as slow as the fastest.
    least_mass: a budget of accuracy, each shape keeps the fewest blocks that hold that share of the squared norm; the
        pick is the fastest.  Give one of the two.  balanced: as in prune.magnitude, for a density.
    shapes: candidates (R, C); those larger than W are left out.  All else as in `bsrgen.compile`.

    Mass is a stand-in for accuracy that needs no data; retraining recovers what it does not see.
    Errors: ArgumentError, ArgumentTypeError, PatternError, UnsupportedError (no plan for any shape).
    """
    if (density is None) == (least_mass is None) or (balanced and density is None):
        raise ArgumentError("give density=, or least_mass= without balanced=")
    a, best, n = host("W", W), as_targets(target)[0], None if n is None else count("n", n, 1)
    types = as_types(dtype, x_dtype)
    found = []
    for blocksize in dict.fromkeys(pair("shapes", shape, 1) for shape in shapes):
        norms = block_norms(a, blocksize)
        if min(blocksize[0] - a.shape[0], blocksize[1] - a.shape[1]) > 0:
            continue
        kept = (
            magnitude(a, blocksize, share("density", density), balanced=balanced)
            if density is not None
            else fewest(norms, share("least_mass", least_mass or 0.0))
        )
        even = EvenPattern((a.shape[0], a.shape[1]), blocksize, int(kept.sum()))
        problem = as_problem(operator, even, *types, n=n)
        ranked = rank(list(BACKENDS["c"].candidates(problem, best, reblock=False)), n)
        if ranked:
            cost, covered = ranked[0][0], even.nnzb / max(1, kept.size)
            found.append(Shape(blocksize, covered, mass(norms, kept), cost.seconds, cost.speedup, kept))
    if not found:
        raise UnsupportedError(f"W of {a.shape}: no plan on {best.name} for any of these shapes; give smaller ones")
    found.sort(key=lambda shape: (shape.seconds, -shape.mass))
    near = [shape for shape in found if shape.seconds <= WITHIN * found[0].seconds]
    return Search(tuple(found), found[0] if density is None else max(near, key=lambda shape: shape.mass))
