"""Pattern and Weight: a block-sparse matrix that is known to be valid, and `as_weight`, which makes one of anything."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from bsrgen.canonical import (
    canonical,
    cast,
    check,
    check_stored,
    compressed,
    expand,
    frozen,
    grid,
    reshaped,
    rising,
    target,
)
from bsrgen.errors import ArgumentError, PatternError
from bsrgen.foreign import Array, Pair, Raw, pair, read


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """Which R x C blocks of an M x K matrix are stored: indptr int64[block_rows + 1], indices int32[nnzb].

    `shape` is the caller's; blocks that stick out of it are padded.  Indices are sorted and unique in a row.  Both
    arrays are read-only copies.  Patterns are equal when their digests are.
    """

    shape: Pair
    blocksize: Pair
    indptr: npt.NDArray[np.int64] = field(repr=False)
    indices: npt.NDArray[np.int32] = field(repr=False)
    _digest: str = field(default="", init=False, repr=False)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Pattern) and self.digest == other.digest)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> Any:
        return Pattern, (self.shape, self.blocksize, self.indptr, self.indices)  # read-only again, and checked

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "shape", pair("shape", self.shape, 0))
        put(self, "blocksize", pair("blocksize", self.blocksize, 1))
        rows, cols = grid(self.shape, self.blocksize)
        indptr, indices = check(self.indptr, self.indices, rows, cols)
        if not rising(indptr, indices).all():
            raise PatternError("indices must be sorted and unique in each block row; as_weight() sorts and sums them")
        check_stored(indices.size, self.blocksize)
        put(self, "indptr", frozen(indptr, np.int64))
        put(self, "indices", frozen(indices, np.int32))

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
        return expand(self.indptr)

    @property
    def longest_row(self) -> int:
        """Most stored blocks of one block row."""
        return int(self.row_counts.max(initial=0))

    @property
    def known(self) -> bool:
        """Whether the pattern is known when the kernel is generated (else: even.PlannedPattern)."""
        return True

    @property
    def digest(self) -> str:
        """sha256 (hex) of shape, blocksize, indptr and indices; the same on every machine."""
        if not self._digest:
            text = hashlib.sha256("bsr {} {} {} {}\n".format(*self.shape, *self.blocksize).encode())
            text.update(self.indptr.astype("<i8", copy=False).tobytes())
            text.update(self.indices.astype("<i4", copy=False).tobytes())
            object.__setattr__(self, "_digest", text.hexdigest())
        return self._digest

    def transpose(self) -> tuple["Pattern", Array]:
        """The pattern of the transposed matrix, K x M in blocks of C x R, and which stored block of this one each of
        its blocks is, itself transposed: int64[nnzb]."""
        order: Array = np.argsort(self.indices, kind="stable")
        indptr = np.zeros(self.block_cols + 1, np.int64)
        np.cumsum(np.bincount(self.indices, minlength=self.block_cols), out=indptr[1:])
        rows = self.rows[order].astype(np.int32)
        return Pattern(self.shape[::-1], self.blocksize[::-1], indptr, rows), order

    def in_words(self, columns: int) -> "Pattern":
        """The same blocks, `columns` neighbouring columns taken as one; C is a multiple of them."""
        words = object.__new__(Pattern)  # nothing to check again
        shape, blocksize = (self.M, -(-self.K // columns)), (self.R, self.C // columns)
        put = object.__setattr__
        put(words, "shape", shape), put(words, "blocksize", blocksize), put(words, "_digest", "")
        put(words, "indptr", self.indptr), put(words, "indices", self.indices)
        return words

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

    def __reduce__(self) -> Any:
        return Weight, (self.pattern, self.data, self.notes)

    def __post_init__(self) -> None:
        want = (self.pattern.nnzb, *self.pattern.blocksize)
        if self.data.shape != want:
            raise PatternError(f"data has shape {self.data.shape}; this pattern needs (nnzb, R, C) = {want}")
        object.__setattr__(self, "data", frozen(self.data, self.data.dtype))

    @property
    def digest(self) -> str:
        """sha256 (hex) of the pattern, the dtype and the values."""
        text = hashlib.sha256(f"{self.pattern.digest} {self.data.dtype.name}\n".encode())
        little = self.data if np.little_endian else self.data.byteswap()
        text.update(little.tobytes())
        return text.hexdigest()

    @property
    def T(self) -> "Weight":  # noqa: N802
        """The transposed matrix (K, M), in blocks of C x R."""
        pattern, order = self.pattern.transpose()
        return Weight(pattern, self.data[order].transpose(0, 2, 1), self.notes)

    def tobsr(self) -> Any:
        """A scipy bsr_array of the padded shape (block_rows * R, block_cols * C); shorter floats become float32."""
        from scipy.sparse import bsr_array

        p = self.pattern
        dtype = np.float32 if self.data.dtype.name in ("bfloat16", "float16", "float8_e4m3fn") else self.data.dtype
        triple = (self.data.astype(dtype), p.indices.copy(), p.indptr.copy())
        return bsr_array(triple, shape=(p.block_rows * p.R, p.block_cols * p.C), blocksize=p.blocksize)

    def todense(self) -> Array:
        """The (M, K) ndarray."""
        p = self.pattern
        out = np.zeros((p.block_rows, p.R, p.block_cols, p.C), self.data.dtype)
        out[p.rows, :, p.indices, :] = self.data
        return out.reshape(p.block_rows * p.R, p.block_cols * p.C)[: p.M, : p.K]


def as_weight(
    W: object,
    *,
    blocksize: Pair | None = None,
    shape: Pair | None = None,
    dtype: npt.DTypeLike | None = np.float32,
    otherwise: Pair | None = None,
) -> Weight:
    """A Weight with the values of `W`, in fresh arrays.  Raises PatternError, ArgumentError or ArgumentTypeError.

    `W`: scipy sparse array or matrix, 2-D ndarray, torch tensor (strided or sparse), Weight, or (data, indices, indptr)
    with `shape`, where data is (nnzb, R, C), or 1-D for 1 x 1 blocks.  `blocksize` is needed where W has no blocks of
    its own, unless `otherwise` says which, and re-blocks where it has.  Stored zeros of sparse input keep their block;
    all-zero blocks of dense input are absent.  `shape` may also cut BSR inside its last block row and column.  dtype
    None keeps the rows of DTYPES and makes float32 of the rest; int8 takes integers from -127 to 127 only.
    """
    want = None if blocksize is None else pair("blocksize", blocksize, 1)
    given = None if shape is None else pair("shape", shape, 0)
    if isinstance(W, Weight) and want in (None, W.pattern.blocksize) and given in (None, W.pattern.shape):
        to = target(dtype, W.data.dtype)
        data = cast(W.data, to, False)
        return W if data is W.data else Weight(W.pattern, data, W.notes)
    raw = reshaped(_raw(W) if isinstance(W, Weight) else read(W, given), given)
    want = want or (None if raw.native else otherwise)
    to = target(dtype, raw.data.dtype)
    try:
        indptr, indices, data, notes = canonical(raw, want)
        pattern = Pattern(raw.shape, want or raw.blocksize, indptr, indices)
        return Weight(pattern, cast(data, to, data is raw.data), raw.notes + notes)
    except MemoryError:
        raise PatternError(f"shape {raw.shape} in blocks of {want or raw.blocksize} does not fit memory") from None


def _raw(weight: Weight) -> Raw:
    p = weight.pattern
    return Raw("bsr", p.shape, weight.data, p.indptr, p.indices, True, weight.notes)


def random_weight(
    rng: np.random.Generator | int,
    shape: Pair,
    blocksize: Pair,
    density: float,
    *,
    kind: str = "uniform",
    dtype: npt.DTypeLike | None = np.float32,
) -> Weight:
    """A Weight with round(density * blocks) blocks; values normal with variance 1 / stored elements of the row, or for
    int8 uniform in [-127, 127].

    kind "uniform": blocks drawn without replacement; "banded": full bands around the scaled diagonal; "powerlaw": row
    counts follow Zipf's law in random order, and an eighth of the rows or more is empty where the others can hold all.
    """
    rng, to = np.random.default_rng(rng), target(dtype, np.dtype(np.float32))
    shape, (R, C) = pair("shape", shape, 0), pair("blocksize", blocksize, 1)
    rows, cols = grid(shape, (R, C))
    if kind not in _KINDS:
        raise ArgumentError(f"kind={kind!r} is unknown; one of {', '.join(_KINDS)}")
    if not 0 <= density <= 1:
        raise ArgumentError(f"density={density!r} must lie in [0, 1]")
    n = round(density * rows * cols)
    check_stored(n, (R, C))
    key = _KINDS[kind](rng, rows, cols, n) if n else np.zeros(0, np.int64)
    return with_random_values(Pattern(shape, (R, C), *compressed(key, rows, cols)), rng, to)


def with_random_values(pattern: Pattern, rng: np.random.Generator, dtype: npt.DTypeLike = np.float32) -> Weight:
    """A Weight of that pattern, its values as `random_weight` draws them."""
    p, to = pattern, np.dtype(dtype)
    data: Array = rng.standard_normal((p.nnzb, p.R, p.C), np.float64 if to == np.float64 else np.float32)
    data /= np.sqrt(p.row_counts * p.C).astype(data.dtype)[p.rows][:, None, None]
    if to == np.int8:
        data = rng.integers(-127, 127, data.shape, np.int8, endpoint=True)
    data[p.rows == p.block_rows - 1, p.M - (p.block_rows - 1) * p.R :, :] = 0
    data[p.indices == p.block_cols - 1, :, p.K - (p.block_cols - 1) * p.C :] = 0
    return Weight(p, cast(data, to, False))


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
