"""From what callers hold to valid, sorted blocks.

Between the two everything is a key: block (i, j) of a grid with `cols` block columns is i * cols + j, so that sorting,
merging and re-blocking are one-dimensional numpy operations.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bsrgen.dtypes import DTYPES, HOPPER, INT8, as_dtype
from bsrgen.errors import ArgumentError, ArgumentTypeError, PatternError
from bsrgen.foreign import Array, Pair, Raw, integers

_DIM_MAX = 2**31 - 1  # block columns and the tables of the kernels are int32
_BYTES_MAX = 2**63 - 1


def reshaped(raw: Raw, shape: Pair | None) -> Raw:
    """`raw` with the shape that the caller gave; BSR may be cut inside its last block row and column."""
    own = grid(raw.shape, raw.blocksize)
    if shape in (None, raw.shape):
        return raw
    if raw.layout != "bsr" or grid(shape, raw.blocksize) != own:
        raise ArgumentError(f"shape={shape} does not fit W, which has shape {raw.shape}; leave shape= out")
    return replace(raw, shape=shape)


def grid(shape: Pair, blocksize: Pair) -> Pair:
    """(block_rows, block_cols); PatternError where an int32 cannot count the padded rows or columns."""
    grid = (-(-shape[0] // blocksize[0]), -(-shape[1] // blocksize[1]))
    if max(grid[0] * blocksize[0], grid[1] * blocksize[1]) > _DIM_MAX:
        raise PatternError(f"shape {shape} in blocks of {blocksize} passes 2**31 - 1 rows or columns; split the matrix")
    return grid


def check_stored(nnzb: int, blocksize: Pair) -> None:
    if nnzb > _DIM_MAX or nnzb * blocksize[0] * blocksize[1] * 8 > _BYTES_MAX:
        raise PatternError(f"{nnzb} blocks of {blocksize} pass 2**31 - 1 blocks or 2**63 bytes; split the matrix")


def check(indptr: Any, indices: Any, rows: int, cols: int, major: str = "row") -> tuple[Array, Array]:
    """(indptr, indices) as int64 and int32, valid but for the order inside a row; the arrays given where they fit."""
    indptr, indices = integers("indptr", indptr), integers("indices", indices)
    if indptr.size != rows + 1:
        raise PatternError(
            f"indptr has {indptr.size} entries; {rows} block {major}s, the last one padded if need be, take {rows + 1}"
        )
    if indptr[0] != 0 or indptr[-1] != indices.size:
        raise PatternError(
            f"indptr runs from {indptr[0]} to {indptr[-1]}; it must run from 0 to {indices.size}, the number of "
            "indices (scipy: W.prune() drops unused ones at the end)"
        )
    if indices.size > _DIM_MAX:
        raise PatternError(f"{indices.size} stored blocks pass 2**31 - 1; split the matrix")
    falls = indptr[1:] < indptr[:-1]
    if falls.any():
        i = int(falls.argmax())
        raise PatternError(f"indptr falls from {indptr[i]} to {indptr[i + 1]} at block {major} {i}; it may only rise")
    at = _outside(indices, cols)
    if at is not None:
        i, minor = int(np.searchsorted(indptr, at, "right")) - 1, "column" if major == "row" else "row"
        raise PatternError(
            f"indices[{at}] is {minor} {indices[at]} in block {major} {i}; there are {cols} block {minor}s"
        )
    return indptr.astype(np.int64, copy=False), indices.astype(np.int32, copy=False)


def _outside(indices: Array, size: int) -> int | None:
    """Where the first index that is not in [0, size) stands."""
    if not indices.size or (indices.min() >= 0 and indices.max() < size):
        return None
    return int(((indices < 0) | (indices >= size)).argmax())


def _check_padding(key: Array, data: Array, shape: Pair) -> None:
    """PatternError where a block holds something that is not zero outside of `shape`."""
    r, c = data.shape[1:]
    rows, cols = grid(shape, (r, c))
    bottom, right = shape[0] % r or r, shape[1] % c or c
    for edge, inside in ((key >= (rows - 1) * cols, np.s_[bottom:, :]), (key % cols == cols - 1, np.s_[:, right:])):
        out = data[edge][(slice(None), *inside)] != 0
        if out.any():
            b, i, j = (int(v[0]) for v in out.nonzero())
            value = float(data[edge][(slice(None), *inside)][b, i, j])
            where = divmod(int(key[edge][b]), cols)
            raise PatternError(f"block {where} holds {value} outside of shape {shape}; the padding must be zero")


def target(dtype: Any, have: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype to convert to: a row of DTYPES, or where None is asked `have` if it is one, else float32."""
    if dtype is None:
        dtype = have.name if have.name in DTYPES | HOPPER else "float32"
    return as_dtype(dtype, hopper=True).numpy


def cast(data: Array, to: np.dtype[Any], copy: bool) -> Array:
    """`data` as a read-only C-contiguous array of `to`; PatternError where a number becomes Inf or NaN."""
    if to == INT8.numpy:
        if data.dtype.kind not in "iu":
            raise ArgumentTypeError(f"W has dtype {data.dtype}; bsrgen.compile(W, dtype='int8') quantises it")
        symmetric(data)
    with np.errstate(over="ignore", invalid="ignore"):
        new: Array = np.array(data, dtype=to, order="C", copy=copy or None)
    if to.kind != "i" and not np.can_cast(data.dtype, to, "safe"):
        lost = ~np.isfinite(new)
        if lost.any():
            lost &= np.isfinite(data.astype(np.float64))
        if lost.any():
            at = tuple(int(v[0]) for v in lost.nonzero())
            raise PatternError(f"value {data[at]} in block {at[0]} overflows {to}; scale W or ask for a wider dtype")
    new.setflags(write=False)
    return new


def symmetric(data: Array) -> None:
    """PatternError where an integer lies outside of the symmetric range of int8."""
    out = (data < -INT8.largest) | (data > INT8.largest)
    if out.any():
        at = tuple(int(v[0]) for v in out.nonzero())
        raise PatternError(
            f"value {data[at]} in block {at[0]}: weights of int8 lie in the symmetric range [-127, 127]; clip W"
        )


def frozen(a: Array, dtype: npt.DTypeLike) -> Array:
    """`a` of `dtype`, C-contiguous, read-only and nobody's view: itself if it is all that, else a copy."""
    if a.dtype == dtype and a.flags.c_contiguous and a.flags.owndata and not a.flags.writeable:
        return a
    a = np.array(a, dtype=dtype, order="C")
    a.setflags(write=False)
    return a


def expand(indptr: Array) -> npt.NDArray[np.int64]:
    """The row of each entry."""
    return np.repeat(np.arange(indptr.size - 1), np.diff(indptr))


def rising(indptr: Array, indices: Array) -> npt.NDArray[np.bool_]:
    """bool[nnzb - 1]: does entry k + 1 lie behind entry k, in its row or in a later one?"""
    rises = indices[1:] > indices[:-1]
    starts = indptr[(indptr > 0) & (indptr < indices.size)]
    rises[starts - 1] = True
    return rises


def _merge(key: Array, data: Array) -> tuple[Array, Array, int]:
    """Sorted unique keys, their blocks (duplicates summed in float64 or int64) and how many were merged."""
    if (key[1:] > key[:-1]).all():
        return key, data, 0
    order = np.argsort(key, kind="stable")
    key, data = key[order], data[order]
    first = np.flatnonzero(np.append(True, key[1:] != key[:-1]))
    merged = int(key.size - first.size)
    if merged:
        wide = data.astype(np.int64 if data.dtype.kind == "i" else np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            data = np.add.reduceat(wide, first, axis=0)
        if np.isinf(data).any() and not np.isinf(wide).any():
            raise PatternError("the sum of duplicate blocks overflows float64; sum them yourself or scale W")
    return key[first], data, merged


def _reblock(key: Array, data: Array, shape: Pair, new: Pair) -> tuple[Array, Array]:
    """The same elements in blocks of `new`; a block is stored where any element of it was."""
    (r, c), (R, C) = data.shape[1:], new
    cols, (new_rows, new_cols) = grid(shape, (r, c))[1], grid(shape, new)
    i, j = np.divmod(key, max(1, cols))
    i, j = (i * r)[:, None] + np.arange(r), (j * c)[:, None] + np.arange(c)
    inside = (i < shape[0])[:, :, None] & (j < shape[1])[:, None, :]
    (i, p), (j, q) = np.divmod(i, R), np.divmod(j, C)
    cell = ((i * new_cols)[:, :, None] + j[:, None, :])[inside]
    if new_rows * new_cols <= 16 * cell.size + 2**16:  # a bitmap of the grid is cheaper than sorting every element
        stored = np.zeros(new_rows * new_cols, bool)
        stored[cell] = True
        key = np.flatnonzero(stored)
        rank = np.cumsum(stored) - 1
        place = rank[cell]
    else:
        key, place = np.unique(cell, return_inverse=True)
    check_stored(key.size, new)
    blocks = np.zeros((key.size, R, C), data.dtype)
    blocks.reshape(-1)[place * (R * C) + ((p * C)[:, :, None] + q[:, None, :])[inside]] = data[inside]
    return key, blocks


def _cut(dense: Array, blocksize: Pair) -> tuple[Array, Array]:
    """Keys and blocks of the cells of a dense matrix that hold anything but zeros."""
    (M, K), (R, C) = dense.shape, blocksize
    rows, cols = grid((M, K), blocksize)
    if (M % R or K % C) and M * K:
        check_stored(rows * cols, blocksize)
        padded = np.zeros((rows * R, cols * C), dense.dtype)
        padded[:M, :K] = dense
        dense = padded
    cells = dense.reshape(rows, R, cols, C)
    stored = (cells != 0).any(axis=(1, 3))
    return np.flatnonzero(stored), cells.transpose(0, 2, 1, 3)[stored]


def _keys(raw: Raw, rows: int, cols: int) -> tuple[Array, tuple[str, ...]]:
    """The key of every stored block as it came, and a note if BSR had columns out of order."""
    if raw.layout == "coo":
        i, j = integers("row", raw.major), integers("col", raw.minor)
        for name, index, size in (("row", i, rows), ("col", j, cols)):
            at = _outside(index, size)
            if at is not None:
                raise PatternError(f"{name}[{at}] is {index[at]}; it must lie in [0, {size})")
        _same_length(raw.data, i)
        _same_length(raw.data, j)
        return i.astype(np.int64) * cols + j.astype(np.int64), ()
    if raw.layout == "bsc":
        indptr, indices = check(raw.major, raw.minor, cols, rows, "column")
        _same_length(raw.data, indices)
        return indices.astype(np.int64) * cols + expand(indptr), ()
    indptr, indices = check(raw.major, raw.minor, rows, cols)
    _same_length(raw.data, indices)
    i = expand(indptr)
    n = np.unique(i[1:][(i[1:] == i[:-1]) & (indices[1:] < indices[:-1])]).size
    return i * cols + indices, (f"sorted the column indices of {n} block row{'s'[: n != 1]}",) if n else ()


def _same_length(data: Array, indices: Array) -> None:
    if data.shape[0] != indices.size:
        raise PatternError(f"data has {data.shape[0]} blocks and there are {indices.size} indices; they must be equal")


def canonical(raw: Raw, want: Pair | None) -> tuple[Array, Array, Array, tuple[str, ...]]:
    """indptr, indices, blocks, notes.  The blocks are `raw.data` itself where nothing had to change."""
    if want is None and not raw.native:
        raise ArgumentError("W has no blocks of its own (it is not BSR); say which with blocksize=(R, C)")
    old, new = raw.blocksize, want or raw.blocksize
    if raw.layout == "dense":
        key, data = _cut(raw.data, new)
        return *compressed(key, *grid(raw.shape, new)), data, ()
    rows, cols = grid(raw.shape, old)
    whole = raw.shape == (rows * old[0], cols * old[1])
    if raw.layout == "bsr" and whole and new == old:
        indptr, indices = check(raw.major, raw.minor, rows, cols)
        _same_length(raw.data, indices)
        if rising(indptr, indices).all():
            return indptr.copy(), indices.copy(), raw.data, ()
    key, notes = _keys(raw, rows, cols)
    key, data, merged = _merge(key, raw.data)
    if merged:
        notes += (f"summed {merged} duplicate block{'s'[: merged != 1]}",)
    if not whole:
        _check_padding(key, data, raw.shape)
    if new != old:
        key, data = _reblock(key, data, raw.shape, new)
    return *compressed(key, *grid(raw.shape, new)), data, notes


def compressed(key: Array, rows: int, cols: int) -> tuple[Array, Array]:
    """(indptr, indices) of sorted keys."""
    i, j = np.divmod(key, max(1, cols))
    indptr = np.zeros(rows + 1, np.int64)
    np.cumsum(np.bincount(i, minlength=rows), out=indptr[1:])
    return indptr, j
