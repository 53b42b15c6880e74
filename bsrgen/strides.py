"""Where the elements of an array lie: what C can walk, what shares memory."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.errors import ArgumentError

Array = NDArray[Any]


def leading(a: Array) -> int:
    """Leading dimension in elements of a matrix that C can walk as it lies; -1 when it cannot."""
    rows, columns = (int(size) for size in a.shape)
    item = a.itemsize
    if not a.flags.aligned or (columns > 1 and a.strides[1] != item):
        return -1
    if rows <= 1 or columns == 0:
        return max(columns, 1)
    ld, rest = divmod(a.strides[0], item)
    return int(ld) if rest == 0 and ld >= columns else -1


def rows(a: Array) -> tuple[Array, int]:
    """`a` or a row-major copy of it, and its leading dimension."""
    ld = leading(a)
    if ld >= 0:
        return a, ld
    a = np.array(a, order="C")
    return a, max(a.shape[1], 1)


def reshaped(out: Array, shape: tuple[int, int]) -> Array:
    """`out` as a matrix: a view of it wherever numpy can make one, else a copy that must be copied back."""
    if out.shape == shape:
        return out
    view = out.view()
    try:
        view.shape = shape  # raises instead of copying
    except AttributeError as e:
        raise ArgumentError(
            f"out has strides {out.strides}, which no matrix {shape} can have; pass a contiguous out"
        ) from e
    return view


def self_overlapping(a: Array) -> bool:
    """Whether two elements may share memory: an axis steps by less than what lies within one of its steps."""
    span = a.itemsize
    for stride, size in sorted(
        (abs(stride), size) for stride, size in zip(a.strides, a.shape, strict=True) if size > 1
    ):
        if stride < span:
            return a.size > 0
        span += stride * (size - 1)
    return False


def same(a: Array, b: Array) -> bool:
    return a.ctypes.data == b.ctypes.data and a.shape == b.shape and a.strides == b.strides
