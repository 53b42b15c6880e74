"""What callers hold, unpacked: scipy, torch, ndarrays and raw triples.  Only kind and dtype are checked here."""

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bsrgen.errors import ArgumentError, ArgumentTypeError, PatternError

Array = npt.NDArray[Any]
Pair = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Raw:
    """A matrix as it came.  bsr: major is indptr, minor indices; bsc: the same by columns; coo: rows and columns."""

    layout: str  # csr and csc are bsr and bsc of 1 x 1 blocks
    shape: Pair
    data: Array  # (n, r, c); (M, K) where dense
    major: Any = None
    minor: Any = None
    native: bool = False  # blocks of its own, so that no blocksize= is needed
    notes: tuple[str, ...] = ()

    @property
    def blocksize(self) -> Pair:
        return (1, 1) if self.layout == "dense" else (self.data.shape[1], self.data.shape[2])


def read(W: Any, shape: Pair | None) -> Raw:
    """`W` unpacked; only its kind, its dimensions and the dtype of its values are checked."""
    if isinstance(W, (tuple, list)) and len(W) == 3 and shape is not None:
        return Raw("bsr", shape, _blocks(W[0]), W[2], W[1], True)
    if isinstance(W, tuple):
        raise ArgumentError(f"a tuple of {len(W)} is not a matrix; pass (data, indices, indptr) and shape=(M, K)")
    if _is_torch(W):
        return _read_torch(W)
    if hasattr(W, "tocoo") and hasattr(W, "format"):
        return _read_scipy(W)
    dense = _numbers("W", W)
    if dense.ndim != 2:
        raise ArgumentError(f"W must be a matrix; an array of shape {dense.shape} has {dense.ndim} dimensions, not 2")
    return Raw("dense", (dense.shape[0], dense.shape[1]), dense)


def _read_scipy(W: Any) -> Raw:
    shape = pair("W.shape", W.shape, 0)
    if W.format in ("bsr", "csr", "csc"):
        return Raw(
            "bsc" if W.format == "csc" else "bsr", shape, _blocks(W.data), W.indptr, W.indices, W.format == "bsr"
        )
    try:
        W = W.tocoo()
    except (ValueError, TypeError, IndexError) as e:
        raise PatternError(f"W of type {type(W).__name__} is damaged: {e}") from e
    return Raw("coo", shape, _blocks(W.data), W.row, W.col)


def _read_torch(W: Any) -> Raw:
    layout, W = str(W.layout).removeprefix("torch."), W.detach()
    if W.ndim != 2:
        raise ArgumentError(f"W must be a matrix; a tensor of shape {tuple(W.shape)} has {W.ndim} dimensions, not 2")
    shape = (int(W.shape[0]), int(W.shape[1]))
    if layout in ("sparse_bsr", "sparse_csr"):
        return Raw("bsr", shape, _blocks(W.values()), W.crow_indices(), W.col_indices(), layout == "sparse_bsr")
    if layout in ("sparse_bsc", "sparse_csc"):
        return Raw("bsc", shape, _blocks(W.values()), W.ccol_indices(), W.row_indices(), layout == "sparse_bsc")
    if layout == "sparse_coo":
        W = W.coalesce()
        return Raw("coo", shape, _blocks(W.values()), *W.indices())
    return Raw("dense", shape, _numbers("W", W))


def _is_torch(a: object) -> bool:
    return any(t.__name__ == "Tensor" and t.__module__ == "torch" for t in type(a).__mro__)


def host(name: str, a: Any) -> Array:
    """`a` as an ndarray; torch's half types become float32, which holds them exactly."""
    if isinstance(a, np.ndarray) and hasattr(a, "mask"):
        raise ArgumentTypeError(f"{name} is a masked array; pass {name}.filled(0)")
    try:
        if not _is_torch(a):
            return np.asarray(a)
        a = a.detach().cpu()
        half = a.is_floating_point() and a.element_size() < 4
        return np.asarray((a.float() if half else a).resolve_conj().resolve_neg().numpy())
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as e:
        raise ArgumentTypeError(f"{name} of type {type(a).__name__} cannot be read as an array: {e}") from e


def view(a: Any) -> Array:
    """What speaks DLPack as an ndarray of the same memory; of torch also bfloat16, which numpy's DLPack does not know.

    Raises whatever the other library or numpy raises.
    """
    if not (_is_torch(a) and str(a.dtype) == "torch.bfloat16") or a.requires_grad:
        return np.from_dlpack(a)
    import ml_dtypes
    import torch

    return np.from_dlpack(a.view(torch.int16)).view(ml_dtypes.bfloat16)


def _numbers(name: str, value: Any) -> Array:
    """`value` as an ndarray of real numbers."""
    a = host(name, value)
    if a.dtype.kind in "iuf" or (a.dtype.kind == "V" and a.dtype.type.__module__ == "ml_dtypes"):
        return a
    if a.dtype.kind == "O" and a.ndim == 0:
        kinds = "a scipy sparse matrix, a 2-D array, a torch tensor or (data, indices, indptr) with shape="
        raise ArgumentTypeError(f"{name} of type {type(value).__name__} is not a matrix; pass {kinds}")
    way = "take its .real" if a.dtype.kind in "cW" else "convert it, as with astype(np.float32)"
    raise ArgumentTypeError(f"{name} has dtype {a.dtype}, and weights are real numbers; {way}")


def _blocks(value: Any) -> Array:
    """Values as (n, r, c); a 1-D array is 1 x 1 blocks."""
    a = _numbers("data", value)
    if a.ndim == 1:
        return a.reshape(-1, 1, 1)
    if a.ndim != 3 or 0 in a.shape[1:]:
        raise PatternError(f"data has shape {a.shape}; it must be (nnzb, R, C), or (nnz,) for 1x1 blocks")
    return a


def pair(name: str, value: Any, low: int) -> Pair:
    """`value` as two ints of at least `low`; the typed error names it."""
    try:
        pair = tuple(operator.index(v) for v in value)
    except TypeError:
        raise ArgumentTypeError(f"{name} must be a pair of ints; got {value!r}") from None
    if len(pair) != 2:
        raise ArgumentError(f"{name} must be a pair of ints; got {len(pair)} of them: {value!r}")
    if min(pair) < low:
        raise ArgumentError(f"{name} must be at least {low} in both directions; got {pair}")
    return pair


def count(name: str, value: Any, low: int) -> int:
    """`value` as an int of at least `low`; the typed error names it."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise ArgumentTypeError(f"{name}={value!r:.80}: a number from {low} up")
    if value < low:
        raise ArgumentError(f"{name}={value}: a number from {low} up")
    return int(value)


def integers(name: str, value: Any) -> Array:
    """`value` as a 1-D ndarray of integers; an empty one may have any dtype."""
    a = host(name, value)
    if a.ndim != 1:
        raise PatternError(f"{name} has shape {a.shape}; it must have one dimension")
    if a.size and a.dtype.kind not in "iu":
        raise ArgumentTypeError(f"{name} has dtype {a.dtype}; convert it to np.int64")
    return a
