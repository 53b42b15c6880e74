"""Quantise: weights of int8 with one scale for each output feature, W[m, k] = w_scale[m] * w[m, k].

The integer scheme of Jacob et al., arXiv 1712.05877, section 2, with the symmetric ranges per channel of
Krishnamoorthi, arXiv 1806.08342, section 2: w lies in [-127, 127], so that zero points are 0 and -w exists.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.dtypes import FLOAT32, INT8, DType
from bsrgen.errors import PatternError
from bsrgen.foreign import pair, read
from bsrgen.pattern import Pattern, Weight, as_weight

Array = NDArray[Any]
LEAST_SCALE = 2.0**-126  # the smallest normal float32: rows of smaller numbers would divide by zero, or by little


def source_of(
    W: Any,
    dtype: DType,
    *,
    blocksize: tuple[int, int] | None = None,
    shape: tuple[int, int] | None = None,
    otherwise: tuple[int, int] | None = None,
) -> Weight:
    """as_weight in `dtype`, but where that is int8 and W holds floating numbers, those, for `quantized`."""
    own: str | None = dtype.name
    if dtype is INT8:
        raw = W if isinstance(W, Weight) else read(W, None if shape is None else pair("shape", shape, 0))
        own = "int8" if raw.data.dtype.kind in "iu" else None
    return as_weight(W, blocksize=blocksize, shape=shape, dtype=own, otherwise=otherwise)


def quantized(weight: Weight, scale: Array | None = None) -> tuple[Weight, Array]:
    """(the weight in int8, w_scale[M] in float32), W = w_scale[:, None] * w.

    Of floating numbers w = round(W / w_scale) to nearest, ties to even, clipped to [-127, 127], where w_scale is
    `scale` or, for each row, its largest magnitude / 127: 1 for a row of zeros, no less than LEAST_SCALE for others.
    What is int8 already is taken as it is, with `scale` or ones.  PatternError for Inf, NaN, and rows whose scale
    float32 cannot hold.
    """
    p = weight.pattern
    if weight.data.dtype == INT8.numpy:
        return weight, np.ones(p.M, np.float32) if scale is None else scale
    w = weight.data.astype(np.float64)
    lost = ~np.isfinite(w)
    if lost.any():
        at = tuple(int(i[0]) for i in lost.nonzero())
        raise PatternError(f"value {w[at]} in block {at[0]} cannot be quantised; weights of int8 are finite")
    if scale is None:
        scale = _largest(p, w) / INT8.largest
        scale = np.where(scale == 0, 1.0, np.maximum(scale, LEAST_SCALE))
        if scale.max(initial=0.0) > FLOAT32.largest:
            m = int(scale.argmax())
            raise PatternError(f"row {m} has a scale of {scale[m]:.3g}, which overflows float32; scale W")
        scale = scale.astype(np.float32)
    rows = np.ones(p.block_rows * p.R)
    rows[: p.M] = scale
    w /= rows.reshape(p.block_rows, p.R)[p.rows][:, :, None]
    np.clip(np.rint(w, out=w), -INT8.largest, INT8.largest, out=w)
    return Weight(p, w.astype(np.int8), weight.notes), scale


def _largest(p: Pattern, data: Array) -> Array:
    """The largest magnitude of each row: [M]."""
    largest = np.zeros((p.block_rows, p.R))
    stored = p.row_counts > 0
    if stored.any():
        largest[stored] = np.maximum.reduceat(np.abs(data).max(axis=2), p.indptr[:-1][stored], axis=0)
    return largest.reshape(-1)[: p.M]
