"""Pattern and Weight: a block-sparse matrix that is known to be valid, and `as_weight`, which makes one of anything.

Between the two everything is a key: block (i, j) of a grid with `cols` block columns is i * cols + j, so that sorting,
merging and re-blocking are one-dimensional numpy operations.
"""

import hashlib
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bsrgen.dtypes import as_dtype
from bsrgen.errors import ArgumentError, ArgumentTypeError, PatternError

Array = npt.NDArray[Any]
Pair = tuple[int, int]

_DIM_MAX = 2**31 - 1  # block columns and the tables of the kernels are int32
_BYTES_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """Which R x C blocks of an M x K matrix are stored: indptr int64[block_rows + 1], indices int32[nnzb].

    `shape` is the caller's; blocks that stick out of it are padded.  Indices are sorted and unique in a row.  Both
    arrays are read-only copies.  Equal patterns have equal digests; == is identity.
    """

    shape: Pair
    blocksize: Pair
    indptr: npt.NDArray[np.int64] = field(repr=False)
    indices: npt.NDArray[np.int32] = field(repr=False)
    _digest: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "shape", _pair("shape", self.shape, 0))
        put(self, "blocksize", _pair("blocksize", self.blocksize, 1))
        rows, cols = _grid(self.shape, self.blocksize)
        indptr, indices = _check(self.indptr, self.indices, rows, cols)
        if not _rising(indptr, indices).all():
            raise PatternError("indices must be sorted and unique in each block row; as_weight() sorts and sums them")
        _check_stored(indices.size, self.blocksize)
        put(self, "indptr", _frozen(indptr, np.int64))
        put(self, "indices", _frozen(indices, np.int32))

    def __str__(self) -> str:
        M, K = self.shape
        return f"{M}x{K} in {self.R}x{self.C} blocks, {self.nnzb} stored ({100 * self.density:.4g} %)"

    @property
    def M(self) -> int:  # noqa: N802
        """Rows, out_features."""
        return self.shape[0]

    @property
    def K(self) -> int:  # noqa: N802
        """Columns, in_features."""
        return self.shape[1]

    @property
    def R(self) -> int:  # noqa: N802
        """Rows of a block."""
        return self.blocksize[0]

    @property
    def C(self) -> int:  # noqa: N802
        """Columns of a block."""
        return self.blocksize[1]

    @property
    def block_rows(self) -> int:
        """ceil(M / R)."""
        return -(-self.shape[0] // self.blocksize[0])

    @property
    def block_cols(self) -> int:
        """ceil(K / C)."""
        return -(-self.shape[1] // self.blocksize[1])

    @property
    def nnzb(self) -> int:
        """Stored blocks."""
        return self.indices.size

    @property
    def nnz(self) -> int:
        """Stored elements, padding included: nnzb * R * C."""
        return self.nnzb * self.R * self.C

    @property
    def density(self) -> float:
        """Stored blocks / all blocks; 0.0 for a matrix without blocks."""
        return self.nnzb / max(1, self.block_rows * self.block_cols)

    @property
    def row_counts(self) -> npt.NDArray[np.int64]:
        """Stored blocks of each block row: int64[block_rows]."""
        return np.diff(self.indptr)

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """Block row of each stored block: int64[nnzb]."""
        return _expand(self.indptr)

    @property
    def digest(self) -> str:
        """sha256 (hex) of shape, blocksize, indptr and indices; the same on every machine."""
        if not self._digest:
            text = hashlib.sha256("bsr {} {} {} {}\n".format(*self.shape, *self.blocksize).encode())
            text.update(self.indptr.astype("<i8", copy=False).tobytes())
            text.update(self.indices.astype("<i4", copy=False).tobytes())
            object.__setattr__(self, "_digest", text.hexdigest())
        return self._digest

    def difference(self, other: "Pattern") -> str | None:
        """Where `other` first differs, as a sentence; None if both are the same pattern."""
        for name in ("shape", "blocksize"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {mine} became {theirs}"
        cols = self.block_cols
        a, b = self.rows * cols + self.indices, other.rows * cols + other.indices
        n = min(a.size, b.size)
        at = int(np.append(a[:n] != b[:n], True).argmax())
        if at == a.size == b.size:
            return None
        if at == b.size or (at < a.size and a[at] < b[at]):
            return f"block {divmod(int(a[at]), cols)} was stored and is absent now"
        return f"block {divmod(int(b[at]), cols)} was absent and is stored now"

    def picture(self, width: int = 64, height: int = 32) -> str:
        """The pattern in at most `height` lines of at most `width` characters, without a final newline.

        One character per block where the grid fits, '.' absent and '#' stored; else one per tile of blocks: '.' empty,
        ':' less than a quarter stored, '+' more, '#' full.
        """
        if min(width, height) < 1:
            raise ArgumentError(f"a picture of {width} x {height} characters is empty; both must be at least 1")
        rows, cols = self.block_rows, self.block_cols
        high, wide = max(1, -(-rows // height)), max(1, -(-cols // width))  # blocks of a tile
        h, w = -(-rows // high), -(-cols // wide)
        stored = np.bincount(self.rows // high * w + self.indices // wide, minlength=h * w)
        tall = np.minimum(high, rows - high * np.arange(h))  # the last tile may be smaller
        broad = np.minimum(wide, cols - wide * np.arange(w))
        level = np.digitize(stored / np.outer(tall, broad).ravel(), [np.nextafter(0, 1), 0.25, 1.0])
        text = np.frombuffer(b".:+#", np.uint8)[level].tobytes().decode()
        return "\n".join(text[k : k + w] for k in range(0, h * w, w or 1))


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A Pattern and its values: data (nnzb, R, C), C-contiguous and read-only, zero in the padding.

    `notes` says what as_weight had to canonicalise.
    """

    pattern: Pattern
    data: Array = field(repr=False)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        want = (self.pattern.nnzb, *self.pattern.blocksize)
        if self.data.shape != want:
            raise PatternError(f"data has shape {self.data.shape}; this pattern needs (nnzb, R, C) = {want}")
        object.__setattr__(self, "data", _frozen(self.data, self.data.dtype))

    @property
    def digest(self) -> str:
        """sha256 (hex) of the pattern, the dtype and the values."""
        text = hashlib.sha256(f"{self.pattern.digest} {self.data.dtype.name}\n".encode())
        little = self.data if np.little_endian else self.data.byteswap()
        text.update(little.tobytes())
        return text.hexdigest()

    def tobsr(self) -> Any:
        """A scipy bsr_array of the padded shape (block_rows * R, block_cols * C); half types become float32."""
        from scipy.sparse import bsr_array

        p = self.pattern
        dtype = self.data.dtype if self.data.dtype.name in ("float64", "float32") else np.float32
        triple = (self.data.astype(dtype), p.indices.copy(), p.indptr.copy())
        return bsr_array(triple, shape=(p.block_rows * p.R, p.block_cols * p.C), blocksize=p.blocksize)

    def todense(self) -> Array:
        """The (M, K) ndarray."""
        p = self.pattern
        out = np.zeros((p.block_rows, p.R, p.block_cols, p.C), self.data.dtype)
        out[p.rows, :, p.indices, :] = self.data
        return out.reshape(p.block_rows * p.R, p.block_cols * p.C)[: p.M, : p.K]


def as_weight(
    W: object, *, blocksize: Pair | None = None, shape: Pair | None = None, dtype: npt.DTypeLike | None = np.float32
) -> Weight:
    """A Weight with the values of `W`, in fresh arrays.  Raises PatternError, ArgumentError or ArgumentTypeError.

    `W`: scipy sparse array or matrix, 2-D ndarray, torch tensor (strided or sparse), Weight, or (data, indices, indptr)
    with `shape`, where data is (nnzb, R, C), or 1-D for 1 x 1 blocks.  `blocksize` is needed where W has no blocks of
    its own and re-blocks where it has.  Stored zeros of sparse input keep their block; all-zero blocks of dense input
    are absent.  `shape` may also cut BSR inside its last block row and column.  dtype None keeps float32 and float64
    and makes float32 of the rest.
    """
    want = None if blocksize is None else _pair("blocksize", blocksize, 1)
    given = None if shape is None else _pair("shape", shape, 0)
    if isinstance(W, Weight) and want in (None, W.pattern.blocksize) and given in (None, W.pattern.shape):
        to = _target(dtype, W.data.dtype)
        return W if to == W.data.dtype else Weight(W.pattern, _cast(W.data, to, False), W.notes)
    raw = _raw(W) if isinstance(W, Weight) else _read(W, given)
    raw = _reshaped(raw, given)
    to = _target(dtype, raw.data.dtype)
    try:
        indptr, indices, data, notes = _canonical(raw, want)
        return Weight(
            Pattern(raw.shape, want or raw.blocksize, indptr, indices),
            _cast(data, to, data is raw.data),
            raw.notes + notes,
        )
    except MemoryError:
        raise PatternError(f"shape {raw.shape} in blocks of {want or raw.blocksize} does not fit memory") from None


def _raw(weight: Weight) -> "_Raw":
    p = weight.pattern
    return _Raw("bsr", p.shape, weight.data, p.indptr, p.indices, True, weight.notes)


def random_weight(
    rng: np.random.Generator | int,
    shape: Pair,
    blocksize: Pair,
    density: float,
    *,
    kind: str = "uniform",
    dtype: npt.DTypeLike | None = np.float32,
) -> Weight:
    """A Weight with round(density * blocks) blocks; values normal with variance 1 / stored elements of the row.

    kind "uniform": blocks drawn without replacement; "banded": full bands around the scaled diagonal; "powerlaw": row
    counts follow Zipf's law in random order, and an eighth of the rows or more is empty where the others can hold all.
    """
    rng, to = np.random.default_rng(rng), _target(dtype, np.dtype(np.float32))
    shape, (R, C) = _pair("shape", shape, 0), _pair("blocksize", blocksize, 1)
    rows, cols = _grid(shape, (R, C))
    if kind not in _KINDS:
        raise ArgumentError(f"kind={kind!r} is unknown; one of {', '.join(_KINDS)}")
    if not 0 <= density <= 1:
        raise ArgumentError(f"density={density!r} must lie in [0, 1]")
    n = round(density * rows * cols)
    _check_stored(n, (R, C))
    key = _KINDS[kind](rng, rows, cols, n) if n else np.zeros(0, np.int64)
    pattern = Pattern(shape, (R, C), *_compressed(key, rows, cols))
    data: Array = rng.standard_normal((n, R, C), np.float64 if to == np.float64 else np.float32)
    data /= np.sqrt(pattern.row_counts * C).astype(data.dtype)[pattern.rows][:, None, None]
    data[pattern.rows == rows - 1, shape[0] - (rows - 1) * R :, :] = 0
    data[pattern.indices == cols - 1, :, shape[1] - (cols - 1) * C :] = 0
    return Weight(pattern, _cast(data, to, False))


def _uniform(rng: np.random.Generator, rows: int, cols: int, n: int) -> Array:
    key: Array = rng.choice(rows * cols, n, replace=False, shuffle=False)
    key.sort()
    return key


def _banded(rng: np.random.Generator, rows: int, cols: int, n: int) -> Array:
    counts = np.full(rows, n // rows)
    counts[rng.choice(rows, n % rows, replace=False)] += 1
    middle = (np.arange(rows) + 0.5) * cols / rows
    first = np.clip(np.rint(middle - counts / 2).astype(np.int64), 0, cols - counts)
    return np.repeat(np.arange(rows) * cols + first, counts) + _rank(counts)


def _powerlaw(rng: np.random.Generator, rows: int, cols: int, n: int) -> Array:
    full = max(-(-n // cols), rows - max(1, rows // 8))  # rows that may hold blocks
    law, low, high = 1 / np.arange(1, full + 1), 0.0, float(cols * full)
    for _ in range(64):  # bisection: the largest scale of the law, cut at a full row, that needs no more than n blocks
        scale = (low + high) / 2
        low, high = (scale, high) if np.minimum(scale * law, cols).astype(np.int64).sum() <= n else (low, scale)
    held = np.minimum(low * law, cols).astype(np.int64)
    held[np.flatnonzero(held < cols)[: n - held.sum()]] += 1
    counts = np.zeros(rows, np.int64)
    counts[rng.permutation(rows)[:full]] = held
    k, count = _rank(counts), np.repeat(counts, counts)
    j = rng.integers(k * cols // count, (k + 1) * cols // count)  # one column from each of `count` equal strips
    return np.repeat(np.arange(rows) * cols, counts) + j


def _rank(counts: Array) -> Array:
    """0, 1, ... counts[i] - 1 for each row, one after the other."""
    first: Array = np.repeat(np.cumsum(counts) - counts, counts)
    return np.arange(first.size) - first


_KINDS: dict[str, Callable[[np.random.Generator, int, int, int], Array]] = {
    "uniform": _uniform,
    "banded": _banded,
    "powerlaw": _powerlaw,
}


# ---- what callers hold ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Raw:
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


def _read(W: Any, shape: Pair | None) -> _Raw:
    """`W` unpacked; only its kind, its dimensions and the dtype of its values are checked."""
    if isinstance(W, (tuple, list)) and len(W) == 3 and shape is not None:
        return _Raw("bsr", shape, _blocks(W[0]), W[2], W[1], True)
    if isinstance(W, tuple):
        raise ArgumentError(f"a tuple of {len(W)} is not a matrix; pass (data, indices, indptr) and shape=(M, K)")
    if _is_torch(W):
        return _read_torch(W)
    if hasattr(W, "tocoo") and hasattr(W, "format"):
        return _read_scipy(W)
    dense = _numbers("W", W)
    if dense.ndim != 2:
        raise ArgumentError(f"W must be a matrix; an array of shape {dense.shape} has {dense.ndim} dimensions, not 2")
    return _Raw("dense", (dense.shape[0], dense.shape[1]), dense)


def _reshaped(raw: _Raw, shape: Pair | None) -> _Raw:
    """`raw` with the shape that the caller gave; BSR may be cut inside its last block row and column."""
    grid = _grid(raw.shape, raw.blocksize)
    if shape in (None, raw.shape):
        return raw
    if raw.layout != "bsr" or _grid(shape, raw.blocksize) != grid:
        raise ArgumentError(f"shape={shape} does not fit W, which has shape {raw.shape}; leave shape= out")
    return replace(raw, shape=shape)


def _read_scipy(W: Any) -> _Raw:
    shape = _pair("W.shape", W.shape, 0)
    _grid(shape, (1, 1))
    if W.format in ("bsr", "csr", "csc"):
        return _Raw(
            "bsc" if W.format == "csc" else "bsr", shape, _blocks(W.data), W.indptr, W.indices, W.format == "bsr"
        )
    try:
        W = W.tocoo()
    except (ValueError, TypeError, IndexError) as e:
        raise PatternError(f"W of type {type(W).__name__} is damaged: {e}") from e
    return _Raw("coo", shape, _blocks(W.data), W.row, W.col)


def _read_torch(W: Any) -> _Raw:
    layout, W = str(W.layout).removeprefix("torch."), W.detach()
    if W.ndim != 2:
        raise ArgumentError(f"W must be a matrix; a tensor of shape {tuple(W.shape)} has {W.ndim} dimensions, not 2")
    shape = (int(W.shape[0]), int(W.shape[1]))
    if layout in ("sparse_bsr", "sparse_csr"):
        return _Raw("bsr", shape, _blocks(W.values()), W.crow_indices(), W.col_indices(), layout == "sparse_bsr")
    if layout in ("sparse_bsc", "sparse_csc"):
        return _Raw("bsc", shape, _blocks(W.values()), W.ccol_indices(), W.row_indices(), layout == "sparse_bsc")
    if layout == "sparse_coo":
        W = W.coalesce()
        return _Raw("coo", shape, _blocks(W.values()), *W.indices())
    return _Raw("dense", shape, _numbers("W", W))


def _is_torch(a: object) -> bool:
    return any(t.__name__ == "Tensor" and t.__module__ == "torch" for t in type(a).__mro__)


def _host(name: str, a: Any) -> Array:
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


def _numbers(name: str, value: Any) -> Array:
    """`value` as an ndarray of real numbers."""
    a = _host(name, value)
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


def _pair(name: str, value: Any, low: int) -> Pair:
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


# ---- checks --------------------------------------------------------------------------------------


def _grid(shape: Pair, blocksize: Pair) -> Pair:
    """(block_rows, block_cols); PatternError where an int32 cannot count the padded rows or columns."""
    grid = (-(-shape[0] // blocksize[0]), -(-shape[1] // blocksize[1]))
    if max(grid[0] * blocksize[0], grid[1] * blocksize[1]) > _DIM_MAX:
        raise PatternError(f"shape {shape} in blocks of {blocksize} passes 2**31 - 1 rows or columns; split the matrix")
    return grid


def _check_stored(nnzb: int, blocksize: Pair) -> None:
    if nnzb > _DIM_MAX or nnzb * blocksize[0] * blocksize[1] * 8 > _BYTES_MAX:
        raise PatternError(f"{nnzb} blocks of {blocksize} pass 2**31 - 1 blocks or 2**63 bytes; split the matrix")


def _check(indptr: Any, indices: Any, rows: int, cols: int, major: str = "row") -> tuple[Array, Array]:
    """(indptr, indices) as int64 and int32, valid but for the order inside a row; the arrays given where they fit."""
    indptr, indices = _integers("indptr", indptr), _integers("indices", indices)
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


def _integers(name: str, value: Any) -> Array:
    """`value` as a 1-D ndarray of integers; an empty one may have any dtype."""
    a = _host(name, value)
    if a.ndim != 1:
        raise PatternError(f"{name} has shape {a.shape}; it must have one dimension")
    if a.size and a.dtype.kind not in "iu":
        raise ArgumentTypeError(f"{name} has dtype {a.dtype}; convert it to np.int64")
    return a


def _check_padding(key: Array, data: Array, shape: Pair) -> None:
    """PatternError where a block holds something that is not zero outside of `shape`."""
    r, c = data.shape[1:]
    rows, cols = _grid(shape, (r, c))
    bottom, right = shape[0] % r or r, shape[1] % c or c
    for edge, inside in ((key >= (rows - 1) * cols, np.s_[bottom:, :]), (key % cols == cols - 1, np.s_[:, right:])):
        out = data[edge][(slice(None), *inside)] != 0
        if out.any():
            b, i, j = (int(v[0]) for v in out.nonzero())
            value = float(data[edge][(slice(None), *inside)][b, i, j])
            where = divmod(int(key[edge][b]), cols)
            raise PatternError(f"block {where} holds {value} outside of shape {shape}; the padding must be zero")


def _target(dtype: Any, have: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype to convert to: a row of DTYPES, or where None is asked `have` if it is a float32 or float64."""
    if dtype is None:
        dtype = have.name if have.name in ("float32", "float64") else "float32"
    return as_dtype(dtype).numpy


def _cast(data: Array, to: np.dtype[Any], copy: bool) -> Array:
    """`data` as a read-only C-contiguous array of `to`; PatternError where a number becomes Inf."""
    with np.errstate(over="ignore", invalid="ignore"):
        new: Array = np.array(data, dtype=to, order="C", copy=copy or None)
    if not np.can_cast(data.dtype, to, "safe"):
        lost = np.isinf(new)
        if lost.any():
            lost &= np.isfinite(data.astype(np.float64))
        if lost.any():
            at = tuple(int(v[0]) for v in lost.nonzero())
            raise PatternError(f"value {data[at]} in block {at[0]} overflows {to}; scale W or ask for a wider dtype")
    new.setflags(write=False)
    return new


# ---- keys ----------------------------------------------------------------------------------------


def _frozen(a: Array, dtype: npt.DTypeLike) -> Array:
    """`a` of `dtype`, C-contiguous, read-only and nobody's view: itself if it is all that, else a copy."""
    if a.dtype == dtype and a.flags.c_contiguous and a.flags.owndata and not a.flags.writeable:
        return a
    a = np.array(a, dtype=dtype, order="C")
    a.setflags(write=False)
    return a


def _expand(indptr: Array) -> npt.NDArray[np.int64]:
    """The row of each entry."""
    return np.repeat(np.arange(indptr.size - 1), np.diff(indptr))


def _rising(indptr: Array, indices: Array) -> npt.NDArray[np.bool_]:
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
    cols, (new_rows, new_cols) = _grid(shape, (r, c))[1], _grid(shape, new)
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
    _check_stored(key.size, new)
    blocks = np.zeros((key.size, R, C), data.dtype)
    blocks.reshape(-1)[place * (R * C) + ((p * C)[:, :, None] + q[:, None, :])[inside]] = data[inside]
    return key, blocks


def _cut(dense: Array, blocksize: Pair) -> tuple[Array, Array]:
    """Keys and blocks of the cells of a dense matrix that hold anything but zeros."""
    (M, K), (R, C) = dense.shape, blocksize
    rows, cols = _grid((M, K), blocksize)
    if (M % R or K % C) and M * K:
        _check_stored(rows * cols, blocksize)
        padded = np.zeros((rows * R, cols * C), dense.dtype)
        padded[:M, :K] = dense
        dense = padded
    cells = dense.reshape(rows, R, cols, C)
    stored = (cells != 0).any(axis=(1, 3))
    return np.flatnonzero(stored), cells.transpose(0, 2, 1, 3)[stored]


def _keys(raw: _Raw, rows: int, cols: int) -> tuple[Array, tuple[str, ...]]:
    """The key of every stored block as it came, and a note if BSR had columns out of order."""
    if raw.layout == "coo":
        i, j = _integers("row", raw.major), _integers("col", raw.minor)
        for name, index, size in (("row", i, rows), ("col", j, cols)):
            at = _outside(index, size)
            if at is not None:
                raise PatternError(f"{name}[{at}] is {index[at]}; it must lie in [0, {size})")
        _same_length(raw.data, i)
        _same_length(raw.data, j)
        return i.astype(np.int64) * cols + j.astype(np.int64), ()
    if raw.layout == "bsc":
        indptr, indices = _check(raw.major, raw.minor, cols, rows, "column")
        _same_length(raw.data, indices)
        return indices.astype(np.int64) * cols + _expand(indptr), ()
    indptr, indices = _check(raw.major, raw.minor, rows, cols)
    _same_length(raw.data, indices)
    i = _expand(indptr)
    n = np.unique(i[1:][(i[1:] == i[:-1]) & (indices[1:] < indices[:-1])]).size
    return i * cols + indices, (f"sorted the column indices of {n} block row{'s'[: n != 1]}",) if n else ()


def _same_length(data: Array, indices: Array) -> None:
    if data.shape[0] != indices.size:
        raise PatternError(f"data has {data.shape[0]} blocks and there are {indices.size} indices; they must be equal")


def _canonical(raw: _Raw, want: Pair | None) -> tuple[Array, Array, Array, tuple[str, ...]]:
    """indptr, indices, blocks, notes.  The blocks are `raw.data` itself where nothing had to change."""
    if want is None and not raw.native:
        raise ArgumentError("W has no blocks of its own (it is not BSR); say which with blocksize=(R, C)")
    old, new = raw.blocksize, want or raw.blocksize
    if raw.layout == "dense":
        key, data = _cut(raw.data, new)
        return *_compressed(key, *_grid(raw.shape, new)), data, ()
    rows, cols = _grid(raw.shape, old)
    whole = raw.shape == (rows * old[0], cols * old[1])
    if raw.layout == "bsr" and whole and new == old:
        indptr, indices = _check(raw.major, raw.minor, rows, cols)
        _same_length(raw.data, indices)
        if _rising(indptr, indices).all():
            return indptr.copy(), indices.copy(), raw.data, ()
    key, notes = _keys(raw, rows, cols)
    key, data, merged = _merge(key, raw.data)
    if merged:
        notes += (f"summed {merged} duplicate block{'s'[: merged != 1]}",)
    if not whole:
        _check_padding(key, data, raw.shape)
    if new != old:
        key, data = _reblock(key, data, raw.shape, new)
    return *_compressed(key, *_grid(raw.shape, new)), data, notes


def _compressed(key: Array, rows: int, cols: int) -> tuple[Array, Array]:
    """(indptr, indices) of sorted keys."""
    i, j = np.divmod(key, max(1, cols))
    indptr = np.zeros(rows + 1, np.int64)
    np.cumsum(np.bincount(i, minlength=rows), out=indptr[1:])
    return indptr, j
