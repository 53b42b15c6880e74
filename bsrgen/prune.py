"""Prune: which blocks of a weight to keep, by their magnitude, in blocks of any shape.  Arrays in, arrays out.

Of whole models: bsrgen.integrations.torch (prune_, Pruner, group_lasso).  Which block shape: bsrgen.shapes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bsrgen.errors import ArgumentError, PatternError
from bsrgen.foreign import Pair, host, pair

Array = NDArray[Any]
Scope = Literal["layer", "global"]


def block_norms(W: Any, blocksize: Pair) -> Array:
    """The Frobenius norm of each R x C block of a dense W [M, K]: float64 [block_rows, block_cols].

    Blocks may stick out of W; there they count as zeros.  W: an ndarray or a torch tensor.  PatternError for NaN, Inf
    and what is not a matrix.
    """
    a, (R, C) = host("W", W), pair("blocksize", blocksize, 1)
    if a.ndim != 2 or a.dtype.kind not in "iuf":
        raise PatternError(f"W has shape {a.shape} and dtype {a.dtype}; expected a matrix of real numbers")
    squares = np.square(a, dtype=np.float64)
    for axis, side in enumerate((R, C)):
        starts = np.arange(0, max(a.shape[axis], 1), side)
        squares = np.add.reduceat(squares, starts, axis) if a.shape[axis] else squares
    if not np.isfinite(squares).all():
        raise PatternError("W holds NaN or Inf: its blocks have no order; train or load it again")
    norms: Array = np.sqrt(squares)
    return norms


def magnitude(W: Any, blocksize: Pair, density: float, *, balanced: bool = False) -> Array:
    """Which blocks of W [M, K] to keep: bool [block_rows, block_cols], the round(density * blocks) of largest norm.

    balanced: the same number in each block row, the largest of that row, at least one where density is not 0; work is
    then even over rows, at some loss of what is kept.  Of equal blocks the first stays.
    Errors: ArgumentError for a density outside [0, 1], PatternError as block_norms.
    """
    norms = block_norms(W, blocksize)
    density = share("density", density)
    if not balanced:
        return _largest(norms.ravel(), round(density * norms.size)).reshape(norms.shape)
    count = max(round(density * norms.shape[1]), int(density > 0 and norms.shape[1] > 0))
    return np.array([_largest(row, count) for row in norms], bool).reshape(norms.shape)


def magnitude_of_all(
    weights: Mapping[str, Any], blocksize: Pair | Mapping[str, Pair], density: float, *,
    scope: Scope = "layer", balanced: bool = False,
) -> dict[str, Array]:  # fmt: skip
    """`magnitude` for several weights by name; blocksize is one for all or a mapping with the same names.

    scope "layer" keeps that density in each.  "global" keeps that share of all elements, those of the blocks with the
    largest root mean square wherever they are: weights that matter less lose more.
    Errors: ArgumentError, also for balanced with "global"; PatternError.
    """
    shapes = {name: shape_of(blocksize, name) for name in weights}
    if scope == "layer":
        return {name: magnitude(W, shapes[name], density, balanced=balanced) for name, W in weights.items()}
    if scope != "global" or balanced:
        raise ArgumentError(f"scope={scope!r}, balanced={balanced}: 'layer' or 'global', rows balanced only by 'layer'")
    density, norms = share("density", density), {name: block_norms(W, shapes[name]) for name, W in weights.items()}
    sizes = {name: shapes[name][0] * shapes[name][1] for name in weights}
    scores = np.concatenate([np.zeros(0), *(norms[name].ravel() / np.sqrt(sizes[name]) for name in weights)])
    elements = np.concatenate([np.zeros(0), *(np.full(norms[name].size, sizes[name]) for name in weights)])
    order = np.argsort(-scores, kind="stable")
    kept = np.zeros(scores.size, bool)
    kept[order[np.cumsum(elements[order]) <= density * elements.sum() + 0.5]] = True
    parts = np.split(kept, np.cumsum([norms[name].size for name in weights])[:-1]) if weights else []
    return {name: part.reshape(norms[name].shape) for name, part in zip(weights, parts, strict=True)}


def shape_of(blocksize: Pair | Mapping[str, Pair], name: str) -> Pair:
    """The block shape of one weight: the one for all, or its own.  ArgumentError."""
    if isinstance(blocksize, Mapping) and name not in blocksize:
        raise ArgumentError(f"blocksize has no block shape for {name!r}; give one, or leave that weight out")
    return pair("blocksize", blocksize[name] if isinstance(blocksize, Mapping) else blocksize, 1)


def masked(W: Any, blocksize: Pair, kept: Array) -> Array:
    """A copy of W [M, K] with zeros in the blocks that are not kept."""
    a = host("W", W)
    mask = spread(kept, pair("blocksize", blocksize, 1), (a.shape[0], a.shape[1]))
    return np.where(mask, a, np.zeros((), a.dtype))


def spread(kept: Array, blocksize: Pair, shape: Pair) -> Array:
    """The mask of the elements of an M x K matrix from that of its blocks."""
    (R, C), (M, K) = blocksize, shape
    if kept.shape != (grid := (-(-M // R), -(-K // C))):
        raise ArgumentError(f"a mask of {kept.shape} blocks, where {M}x{K} has {grid} of {R}x{C}")
    mask: Array = kept.repeat(R, axis=0)[:M].repeat(C, axis=1)[:, :K]
    return mask


def mass(norms: Array, kept: Array) -> float:
    """The share of the weight's squared norm that the kept blocks hold; 1 for a weight of zeros."""
    squares = np.square(norms)
    total = float(squares.sum())
    return float(squares[kept].sum()) / total if total else 1.0


def cubic(step: int, begin: int, end: int, final: float, initial: float = 1.0) -> float:
    """The density at a training step: `initial` until `begin`, `final` from `end` on, between them fast, then slowly.

    d = final + (initial - final) * (1 - (step - begin) / (end - begin))^3 (Zhu and Gupta, arXiv 1710.01878, eq. 1).
    """
    if end < begin:
        raise ArgumentError(f"begin={begin}, end={end}: the schedule ends before it begins")
    initial, final = share("initial", initial), share("final", final)
    left = 1.0 if step < begin else 0.0 if step >= end else 1 - (step - begin) / (end - begin)
    return final + (initial - final) * left**3


def share(name: str, value: float) -> float:
    """`value` as a number from 0 to 1; the ArgumentError names it."""
    if not isinstance(value, (int, float, np.integer, np.floating)) or not 0 <= value <= 1:
        raise ArgumentError(f"{name}={value!r}: a number from 0 to 1")
    return float(value)


def _largest(scores: Array, count: int) -> Array:
    """bool: the `count` largest; of equal ones the first."""
    kept = np.zeros(scores.size, bool)
    kept[np.argsort(-scores, kind="stable")[:count]] = True
    return kept


def fewest(norms: Sequence[float] | Array, least: float) -> Array:
    """bool like `norms`: the fewest blocks whose mass is at least `least`, the largest first."""
    squares = np.square(np.asarray(norms, np.float64))
    order = np.argsort(-squares, axis=None, kind="stable")
    have = np.cumsum(squares.ravel()[order])
    count = int(np.searchsorted(have, least * have[-1] * (1 - 1e-12))) + 1 if have.size and have[-1] > 0 else 0
    return _largest(squares.ravel(), min(count, squares.size) if least > 0 else 0).reshape(squares.shape)
