"""Selection: what a call of mode="pit" computes, checked and as C takes it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.epilogues import Operand
from bsrgen.errors import ArgumentError, ArgumentTypeError

Array = NDArray[Any]
COperand = tuple[Array | None, int, float]  # struct bsrgen_operand: data, ld, scalar


def selected(
    name: str, operand: Operand, value: Any, shape: tuple[int, ...], tokens: tuple[int, ...], groups: int
) -> COperand:
    """`value` of a selecting operand: bytes or numbers of experts.  ArgumentError, ArgumentTypeError.

    shape: what C takes; tokens: the same as the caller may have it, like x without its features; groups: experts.
    """
    if value is None:
        if operand.kind == "routing":
            raise ArgumentTypeError(f"{name}: operand 'routing' is missing: k(x, routing=...)")
        return None, 0, 0.0
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as e:
        raise ArgumentTypeError(f"{name}: {operand.name} cannot be read as an array: {e}") from e
    if array.size == 0 and array.dtype.kind == "f":
        array = array.astype(np.int64 if operand.kind != "mask" else bool)  # []
    if operand.kind == "live" and array.dtype.kind in "iu":
        array = _of_indices(name, array, shape[0])
        tokens = shape
    if array.dtype.kind not in ("iu" if operand.kind == "routing" else "b"):
        want = "integers" if operand.kind == "routing" else "bool, or indices" if operand.kind == "live" else "bool"
        raise ArgumentTypeError(f"{name}: {operand.name} has dtype {array.dtype}; expected {want}")
    if array.shape not in (shape, tokens):
        raise ArgumentError(f"{name}: {operand.name} has shape {array.shape}, expected {shape}")
    array = array.reshape(shape)
    if operand.kind != "routing":
        flat = np.ascontiguousarray(array).view(np.uint8)
        return flat, flat.shape[-1] if operand.kind == "mask" else 0, 0.0
    if array.size and int(array.max()) >= groups:
        raise ArgumentError(f"{name}: routing sends a token to expert {int(array.max())}; there are {groups}, from 0")
    return np.ascontiguousarray(np.maximum(array, -1) if array.dtype.kind == "i" else array, np.int32), 0, 0.0


def _of_indices(name: str, indices: Array, n: int) -> Array:
    """Which of n tokens are named by `indices`."""
    if indices.ndim != 1:
        raise ArgumentError(f"{name}: live has shape {indices.shape}: indices of tokens are one axis")
    if indices.size and not (int(indices.min()) >= 0 and int(indices.max()) < n):
        wrong = int(indices.max()) if int(indices.max()) >= n else int(indices.min())
        raise ArgumentError(f"{name}: live names token {wrong}; there are {n}, from 0")
    live = np.zeros(n, bool)
    live[indices] = True
    if live.sum() != indices.size:
        raise ArgumentError(f"{name}: live names tokens more than once; integers are indices, a mask is bool")
    return live
