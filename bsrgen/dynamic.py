"""DynamicKernel: load an artifact whose weight comes with the call, prepare weights for it, and call it with them."""

import functools
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

import numpy as np

from bsrgen.arguments import check_threads
from bsrgen.canonical import cast, check, reshaped, symmetric
from bsrgen.errors import (
    ArgumentTypeError,
    ArtifactError,
    CapacityError,
    OutOfMemoryError,
    PatternError,
    PatternMismatchError,
    UnsupportedError,
)
from bsrgen.foreign import integers, read
from bsrgen.kernel import Kernel
from bsrgen.pattern import Weight
from bsrgen.quantize import quantized
from bsrgen.stack import are_several
from bsrgen.valued import Array, _Values, aligned

_NO_MEMORY, _TOO_MANY, _BAD_INDPTR, _BAD_INDEX, _DUPLICATE = -2, -3, -4, -5, -6  # runtime/bsrgen.h


class _Triple(NamedTuple):
    """A weight as C takes it: data [blocks, R, C] of the kernel's type, int32 indices, int64 indptr; scales of int8."""

    data: Array
    indices: Array
    indptr: Array
    w_scale: Array | None = None
    ordered: bool = True  # whether blocks come in the caller's order
    cut: bool = False  # whether they are pieces of the caller's


class PreparedWeight:
    """A weight made ready for one dynamic kernel: checked, its tables and packed values in one buffer of `nbytes`.

    Made by `DynamicKernel.prepare`; any number of calls and threads may use it.  `nnzb` blocks are stored.
    """

    __slots__ = ("_ordered", "_values", "kernel", "nnzb")

    def __init__(self, kernel: "DynamicKernel", triple: _Triple, values: _Values) -> None:
        self.kernel, self.nnzb, self._values, self._ordered = kernel, len(triple.data), values, triple.ordered

    def __repr__(self) -> str:
        return f"<bsrgen.PreparedWeight of {self.nnzb} blocks for {self.kernel.name}>"

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self._values.packed.nbytes if self._values.packed is not None else 0

    def update(self, data: Any, *, threads: int | None = None) -> None:
        """New values for the same blocks, in the order they were given to `prepare`: [nnzb, R, C], in place.

        The pattern is neither checked nor planned again.  No other thread may be in a call with this weight meanwhile.
        int8 takes integers, the scales stay.  Errors: PatternError (shape, values), ArgumentTypeError, UnsupportedError
        for a weight that `prepare` had to bring into other blocks or another order; nothing has changed then.
        """
        k, m = self.kernel, self.kernel.artifact.manifest
        if not self._ordered:
            raise UnsupportedError(f"{k.name}: the weight was not prepared from blocks in one order; prepare it anew")
        raw = read((data, (), ()), k.shape).data
        if raw.shape != (self.nnzb, *m.blocksize):
            raise PatternError(f"{k.name}: data has shape {raw.shape}, the prepared {(self.nnzb, *m.blocksize)}")
        if k.dtype == np.int8 and raw.dtype.kind not in "iu":
            raise ArgumentTypeError(f"{k.name}: data has dtype {raw.dtype}; quantise it, or prepare the weight anew")
        none = np.zeros(0, np.int32)
        k._in_c(_Triple(k._cast(raw), none, none), self._values.packed, threads, values_only=True)


class DynamicKernel(Kernel):
    """A kernel for any weight of its shape, block shape and type with up to `nnzb` blocks: y = kernel(x, weight).

    Made by `bsrgen.compile(W, mode="dynamic")`.  All else is as in Kernel.
    """

    _packs = "prepare"

    def __call__(  # type: ignore[override]
        self, x: Any, weight: Any, out: Array | None = None, *, threads: int | None = None, **operands: Any
    ) -> Any:
        """Y = epilogue(product(weight, x)); x, out, threads, operands and errors as in Kernel.

        weight: what `prepare` gave, or what it takes, which is then prepared for this call alone.
        """
        ready = weight if type(weight) is PreparedWeight else self.prepare(weight, threads=threads)
        if ready.kernel is not self:
            raise ArgumentTypeError(f"{self.name}: the weight was prepared for {ready.kernel.name}, not for this")
        return self._run(ready._values, x, out, threads, operands)

    def prepare(self, weight: Any, *, threads: int | None = None) -> PreparedWeight:
        """Check a weight and bring it into the kernel's order, once for many calls.  Nothing of `weight` is kept.

        weight: (data, indices, indptr), scipy BSR, torch sparse_bsr or a bsrgen Weight, in the kernel's block shape and
        type; columns may come in any order within a block row, each once.  The result does not depend on that order.
        Blocks that are several of the kernel's side by side are cut: bfloat16 and int8 of 3x5 are twice to four times
        as fast in a kernel for 3x1, which pairs columns (README).  What `compile` takes besides (other blocks, other
        types, dense, a list of weights that share X) is taken too, by a slower way through NumPy, which sums
        duplicates.  int8: integers are taken as they are, with the w_scale bound
        to the kernel, given with the call, or ones; floating numbers are quantised with that, or by each row's largest.
        Elements of a block outside of the matrix are not looked at; they must be finite.  threads: at most so many, as
        of calls; tables and values are the same for any number of them.

        Errors, before anything is written: CapacityError (more blocks than planned, and by how many), PatternError
        (shape, block shape, indptr, a column out of range, a block that comes twice), ArgumentError, ArgumentTypeError.
        """
        if self._foreign:
            raise self._foreign
        triple = self._triple(weight)
        try:
            self._in_c(triple, buffer := self._room(self._in_c(triple, None)), threads)
        except (PatternError, CapacityError):
            if not triple.cut:
                raise
            triple = self._converted(weight)  # which sums blocks that come twice, and has words for all else
            self._in_c(triple, buffer := self._room(self._in_c(triple, None)), threads)
        return PreparedWeight(self, triple, self._bundle(self._bound(triple), "none", None, buffer))

    @functools.cached_property
    def _spare(self) -> deque[Array]:
        return deque(maxlen=1)

    def _room(self, nbytes: int) -> Array:
        """A buffer; that of a prepared weight which nobody uses any more is taken again, because it takes longer to
        bring pages into a new one than to write them (int8 1x1, 1024x1024, density 1/4: 340 to 210 us)."""
        spare, room = self._spare, None
        with suppress(IndexError):
            room = spare.pop()
        if room is None or room.nbytes < nbytes:
            room = aligned(nbytes)
        mine = room[:nbytes]
        weakref.finalize(mine, spare.append, room).atexit = False
        return mine

    def ready(self, weight: Weight) -> Callable[..., Any]:
        """Calls of this kernel for `weight`."""
        return functools.partial(self, weight=self.prepare(weight))

    def update(self, W: Any) -> None:
        """A dynamic kernel has no values of its own.  UnsupportedError."""
        raise UnsupportedError(f"{self.name}: its weight comes with the call; prepare(W), or update what that gave")

    def __matmul__(self, x: Any) -> Any:
        raise ArgumentTypeError(f"{self.name}: its weight comes with the call: k(x, weight)")

    def matvec(self, x: Any) -> Any:
        """ArgumentTypeError, as `@`."""
        return self @ x

    # ── from what callers hold to what C takes ───────────────────────────────────────────────────────────────────

    def _bound(self, triple: _Triple) -> dict[str, Any]:
        bound = self._values.bound
        if self.dtype != np.int8:
            return bound
        scale = np.ones(self.shape[0], np.float32) if triple.w_scale is None else triple.w_scale
        return {"w_scale": scale} | bound

    def _triple(self, W: Any) -> _Triple:
        m = self.artifact.manifest
        several = are_several(W)
        if isinstance(W, Weight):
            p, parts = W.pattern, (W.data, W.pattern.indices, W.pattern.indptr)
            shape, blocksize = p.shape, p.blocksize
        elif not several:
            raw = reshaped(read(W, given), given) if (given := self._shape_for(W)) else read(W, None)
            shape, parts = raw.shape, (raw.data, raw.minor, raw.major)
            blocksize = raw.blocksize if raw.layout == "bsr" else (0, 0)
        if not several and shape != m.shape:
            raise PatternMismatchError(f"{self.name}: W has shape {shape}, the kernel {m.shape}")
        quantises = self.dtype == np.int8 and not several and parts[0].dtype.kind not in "iu"
        (R, C), (r, c) = m.blocksize, blocksize if not several else (0, 0)
        if r == R and c > C and c % C == 0 and not quantises:
            return self._cut(parts, c // C)
        if several or blocksize != m.blocksize or quantises:
            by_rows = not several and (isinstance(W, Weight) or raw.layout in ("bsr", "csr"))
            return self._converted(W, parts[1] if by_rows else None)
        return _Triple(self._cast(parts[0]), *self._integers(parts[0], parts[1], parts[2]))

    def _converted(self, W: Any, indices: Any = None) -> _Triple:
        """W by way of NumPy: in other blocks, of another type, dense, several that share X; duplicates are summed.
        indices: the columns of W's blocks, where these come row by row."""
        weight, scale = self._weight(W), None
        if weight.data.dtype != self.dtype:
            weight, scale = quantized(weight, self._values.bound.get("w_scale"))
        p = weight.pattern
        same = indices is not None and np.array_equal(indices, p.indices)
        return _Triple(weight.data, p.indices, p.indptr, scale, same)

    def _cut(self, parts: tuple[Array, Any, Any], pieces: int) -> _Triple:
        """Blocks that are `pieces` of the kernel's side by side, cut; those outside of the matrix fall away."""
        p, (R, C) = self.pattern, self.artifact.manifest.blocksize
        data = self._cast(parts[0])
        indptr, indices = check(parts[2], parts[1], p.block_rows, -(-p.block_cols // pieces))
        if len(data) != indices.size:
            raise PatternError(f"{self.name}: data has {len(data)} blocks and there are {indices.size} indices")
        data = data.reshape(-1, R, pieces, C).transpose(0, 2, 1, 3).reshape(-1, R, C)
        columns = (indices[:, None] * pieces + np.arange(pieces, dtype=np.int64)).reshape(-1)
        inside = columns < p.block_cols
        before = np.concatenate([[0], np.cumsum(inside, dtype=np.int64)])
        if not inside.all():
            data, columns = data[inside], columns[inside]
        return _Triple(
            np.ascontiguousarray(data),
            columns.astype(np.int32),
            before[indptr.astype(np.int64) * pieces],
            ordered=False,
            cut=True,
        )

    def _cast(self, data: Array) -> Array:
        """data in the kernel's type, C-contiguous.  PatternError, ArgumentTypeError."""
        if data.dtype != self.dtype:
            return cast(data, self.dtype, False)
        if data.dtype == np.int8 and data.min(initial=0) < -127:
            symmetric(data)
        return np.ascontiguousarray(data)

    def _integers(self, data: Array, indices: Any, indptr: Any) -> tuple[Array, Array]:
        """(int32 indices, int64 indptr) of the sizes that C relies on; int32 indices are left to its checks."""
        indices, indptr = integers("indices", indices), integers("indptr", indptr)
        rows, cols = self.pattern.block_rows, self.pattern.block_cols
        if indices.dtype != np.int32 or indptr.size != rows + 1 or len(data) != indices.size:
            indptr, indices = check(indptr, indices, rows, cols)
            if len(data) != indices.size:
                raise PatternError(f"{self.name}: data has {len(data)} blocks and there are {indices.size} indices")
        return np.ascontiguousarray(indices), np.ascontiguousarray(indptr, np.int64)

    def _in_c(
        self, triple: _Triple, buffer: Array | None, threads: int | None = None, *, values_only: bool = False
    ) -> int:
        """The library's own preparation, or with no buffer the bytes it needs."""
        ffi = self._tramp.ffi
        weight = ffi.new("struct bsrgen_weight *")
        weight.blocks = len(triple.data)
        weight.data = ffi.cast("void *", triple.data.ctypes.data)
        weight.indices = ffi.cast("int32_t *", triple.indices.ctypes.data)
        weight.indptr = ffi.cast("int64_t *", triple.indptr.ctypes.data)
        to = ffi.NULL if buffer is None else ffi.from_buffer(buffer)
        weight.threads = self._threads if threads is None else check_threads(threads)
        status: int = self._tramp.prepare(self._pack, weight, to, int(values_only))
        if status < 0:
            self._refuse(status, triple)
        return status

    def _refuse(self, status: int, triple: _Triple) -> NoReturn:
        """What C found, in words."""
        p, blocks = self.pattern, len(triple.data)
        if status == _TOO_MANY:
            refuse_more(self.name, blocks, p.nnzb)
        if status == _NO_MEMORY:
            raise OutOfMemoryError(f"{self.name}: no memory to sort {blocks} blocks")
        if status in (_BAD_INDPTR, _BAD_INDEX):
            check(triple.indptr, triple.indices, p.block_rows, p.block_cols)  # raises, with words
        if status == _DUPLICATE:
            rows = np.repeat(np.arange(p.block_rows), np.diff(triple.indptr))
            keys, counts = np.unique(rows * p.block_cols + triple.indices, return_counts=True)
            i, j = divmod(int(keys[counts.argmax()]), p.block_cols)
            raise PatternError(f"{self.name}: block ({i}, {j}) comes {counts.max()} times; sum them first")
        raise ArtifactError(f"{self.name}: the library cannot prepare a weight (status {status})")


def refuse_more(name: str, blocks: int, most: int) -> None:
    """CapacityError where there are more blocks than are planned."""
    if blocks > most:
        raise CapacityError(
            f"{name}: W has {blocks} blocks and {most} are planned, {blocks - most} too many; "
            f"compile with max_blocks={blocks}"
        )
