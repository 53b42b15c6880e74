"""Kernel: load an artifact and call it.  Needs no compiler and no templates."""

import functools
import io
import itertools
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec
import numpy as np
from numpy.typing import NDArray

from bsrgen.arguments import Call, COperand, default_threads
from bsrgen.artifact import Artifact, save_artifact
from bsrgen.epilogues import pair_of
from bsrgen.errors import (
    ArgumentError,
    ArgumentTypeError,
    ArtifactCorruptError,
    ArtifactError,
    IncompatibleCPUError,
    OutOfMemoryError,
    PatternMismatchError,
)
from bsrgen.manifest import OPERANDS_FILE, CostRecord, LevelRecord
from bsrgen.operators import OPERATORS
from bsrgen.pattern import Pattern, Weight
from bsrgen.problem import Problem
from bsrgen.quantize import quantized, source_of
from bsrgen.shortcut import Shortcut
from bsrgen.stack import are_several, parts_of, stacked
from bsrgen.trampoline import OVERLAP, trampoline
from bsrgen.verdict import Verdict

Array = NDArray[Any]

_OK, _BAD_ARGUMENT, _NO_MEMORY = 0, 2, 3  # enum bsrgen_status in runtime/bsrgen.h
_PACK_NO_MEMORY = -2  # what the library's _pack returns where it finds none; -1: no such level


class _Values(NamedTuple):
    """What a call takes besides its arguments; replaced as a whole, so that no call sees a half.

    data, packed, pointer: values given by `update`, as stored, packed, and where C finds them; before that none, and C
    takes the library's.  settled: operands that need not come with the call; records: all for C, where none has to;
    template: the same where `missing` ones have to, None where calls read what is in `out`.
    """

    bound: dict[str, Any]
    weight_scale: str
    settled: dict[str, COperand]
    records: Any
    template: Any
    missing: frozenset[str]
    data: Array | None
    packed: Array | None
    pointer: Any


class Kernel:
    """One compiled kernel: y = kernel(x).  Made by `bsrgen.compile` and `bsrgen.load`; safe to call from many threads.

    Everything it was made of can be looked at: pattern, problem, plan, cost, source, artifact, verdict.
    """

    _packs = "pack"  # the entry point that makes packed values

    def __init__(self, artifact: Artifact, *, threads: int | None = None, may_be_foreign: bool = False) -> None:
        """`may_be_foreign`: where this machine cannot run the artifact, calls raise IncompatibleCPUError, not this."""
        m = artifact.manifest
        self.artifact = artifact
        self._call = Call(m, default_threads(threads))
        self._dtype, self._x_dtype, self._out_dtype = (row.numpy for row in m.types)
        self._level = 0
        self._foreign: IncompatibleCPUError | None = None
        self._tramp = trampoline()
        self._shortcut = Shortcut(self._call, self._tramp.ffi)
        self._fresh = np.zeros if self._call.partial else np.empty
        try:
            self._values = self._with(artifact.arrays(OPERANDS_FILE) if m.bound else {}, m.weight_scale, None)
        except (ArgumentError, ArgumentTypeError) as e:
            raise ArtifactCorruptError(f"{artifact}: {OPERANDS_FILE} is not of this kernel: {e}") from e
        self._threads = self._call.threads
        self._token_axis = OPERATORS[m.operator].token_axis
        if m.transposed:
            _ = self.pattern  # `update` needs it, whatever becomes of the folder
        self._rows, self._features = m.rows, m.shape[1]
        self._x_bytes, self._y_bytes = self._features * self._x_dtype.itemsize, self._rows * self._out_dtype.itemsize
        self._bind_here(may_be_foreign)
        self._plain = self._foreign is None and not m.parts

    def _bind_here(self, may_be_foreign: bool) -> None:
        """Bind; where this machine cannot, say so now, or in calls."""
        try:
            self._bind()
        except IncompatibleCPUError as e:
            if not may_be_foreign:
                raise
            self._foreign = e

    def _with(self, bound: dict[str, Any], weight_scale: str, data: Array | None) -> _Values:
        return self._bundle(bound, weight_scale, data, None if data is None else self.packed(data, self._level))

    def _bundle(self, bound: dict[str, Any], weight_scale: str, data: Array | None, packed: Array | None) -> _Values:
        ffi = self._tramp.ffi
        settled, names = self._call.settled(bound), [operand.name for operand in self._call.operands]
        missing = frozenset(names) - settled.keys()
        template = None
        if not self._call.reads_out:
            template = self._records([settled.get(name, (None, 0, 0.0)) for name in names])
        pointer = ffi.NULL if packed is None else ffi.from_buffer(packed)
        records = None if missing else template
        return _Values(bound, weight_scale, settled, records, template, missing, data, packed, pointer)

    def _records(self, operands: list[COperand]) -> Any:
        """The operands as C has them; it reads the arrays that they were made of."""
        ffi = self._tramp.ffi
        if not operands:
            return ffi.NULL
        records = ffi.new("struct bsrgen_operand[]", len(operands))
        for record, (array, ld, scalar) in zip(records, operands, strict=True):
            record.data = ffi.NULL if array is None else ffi.cast("void *", array.ctypes.data)
            record.ld, record.scalar = ld, scalar
        return records

    def _bind(self) -> None:
        """Map the library and find its functions, if this CPU has what one of its levels needs."""
        m, path = self.artifact.manifest, self._tramp
        if m.family != platform.machine():
            raise IncompatibleCPUError(f"{self.artifact}: built for {m.family}, this machine is {platform.machine()}")
        library = path.library(self.artifact.library.absolute(), m.files[m.library])
        info = path.function(library, f"{m.name}_info")
        target = path.ffi.string(path.info(info, 2)).decode()
        if not target:
            needs = " or ".join(level.target for level in m.levels)
            lacks = path.ffi.string(path.info(info, 1)).decode().strip().replace(" ", ", ")
            raise IncompatibleCPUError(
                f"{self.artifact}: built for {needs}; this CPU lacks {lacks}; "
                f"build it again with target='native' or a lower level"
            )
        names = [level.target for level in m.levels]
        if target not in names:
            raise ArtifactError(f"{self.artifact}: the library runs {target!r}, the manifest knows {', '.join(names)}")
        self._level = names.index(target)
        self._find(library)

    def _find(self, library: Any) -> None:
        """The functions that calls and new values need."""
        self._function = self._tramp.function(library, f"{self.name}_call")
        self._pack = self._tramp.function(library, f"{self.name}_{self._packs}")

    # ── the call ─────────────────────────────────────────────────────────────────────────────────────────────────

    def __call__(self, x: Any, out: Array | None = None, *, threads: int | None = None, **operands: Any) -> Any:
        """Y = epilogue(product(W, x)).

        linear: x is [..., K], the result [..., M].  spmm: x is [K, N] or [K], the result [M, N] or [M].
        Any strides; what is not row-major is copied.  x has x_dtype, the result out_dtype: all else is a TypeError,
        no call converts silently.  out: written and returned; nothing else is written.  Other threads run meanwhile.

        Operands of the epilogue by name: bias [M], scale [M], residual like the result, and scalars.  Kernels of int8
        and half types compute them in float32 and take bias and scale in half types too.  Of int8, x stands for
        x_scale * x, where x_scale is one number or an array like x without its features (1), and a result of int8 for
        y_scale * y (1): real numbers are divided by y_scale, rounded to nearest, ties to even, and saturate at 127.

        Of several weights that share X, the result is a tuple of views of one array, which `out` may give; bias and
        scale have the values of all weights, one after the other.
        """
        return self._run(self._values, x, out, threads, operands)

    def _run(self, values: _Values, x: Any, out: Array | None, threads: int | None, operands: dict[str, Any]) -> Any:
        """A call with these values: the short way for what C takes as it lies, else the careful one."""
        if self._plain and threads is None and type(x) is np.ndarray and x.dtype is self._x_dtype:
            axis, shape = self._token_axis, x.shape
            if len(shape) == 2 and shape[1 - axis] == self._features:
                n = shape[axis]
                full = (self._rows, n) if axis else (n, self._rows)
                records, _kept = values.records, None
                if operands:
                    records, _kept = self._shortcut.records(values.template, values.missing, operands, n, full, out)
                if records is not None and out is None:
                    out = self._fresh(full, self._out_dtype)
                if (
                    records is not None
                    and type(out) is np.ndarray
                    and out.dtype is self._out_dtype
                    and out.shape == full
                ):
                    path = self._tramp
                    view = path.ffi.from_buffer
                    try:
                        here, there = view(x), view(path.bytes, out, True)
                    except (ValueError, BufferError):  # not contiguous, or not writable
                        return self._general(values, x, out, threads, operands)
                    status = path.call(
                        self._function, n, here, shape[1], n * self._x_bytes, there, full[1], n * self._y_bytes,
                        values.pointer, records, self._threads,
                    )  # fmt: skip
                    if status == _OK:
                        return out
                    if status not in (OVERLAP, _BAD_ARGUMENT):  # which the careful way has words for
                        self.refuse(status)
        return self._general(values, x, out, threads, operands)

    def _general(
        self, values: _Values, x: Any, out: Array | None, threads: int | None, operands: dict[str, Any]
    ) -> Any:
        ffi = self._tramp.ffi
        if self._foreign:
            raise self._foreign
        call = self._call.prepare(x, out, threads, operands, values.settled)
        status = self._tramp.call(
            self._function, call.n, ffi.cast("void *", call.x.ctypes.data), call.ldx, 0,
            ffi.cast("void *", call.y.ctypes.data), call.ldy, 0, values.pointer, self._records(call.operands),
            call.threads,
        )  # fmt: skip
        if status != _OK:
            self.refuse(status)
        return self._parted(call.finish())

    def _parted(self, y: Any) -> Any:
        """The result, or of several weights a view of it for each."""
        parts = self.artifact.manifest.parts
        if not parts:
            return y
        places = [slice(*ends) for ends in itertools.pairwise(itertools.accumulate(parts, initial=0))]
        return tuple(y[..., place] if self._token_axis == 0 else y[place] for place in places)

    def refuse(self, status: int) -> NoReturn:
        """The error for a call that came back with `status`."""
        if status == _NO_MEMORY:
            raise OutOfMemoryError(f"{self.name}: no memory for the packed activations")
        raise ArtifactError(f"{self.name}: the library refused the call (status {status})")

    def ready(self, weight: Weight) -> Callable[..., Any]:
        """Calls of this kernel for `weight`, which a static kernel has in it."""
        return self

    def __matmul__(self, x: Any) -> Any:
        """k @ x for spmm without operands: the same as k(x)."""
        if self._token_axis == 0 and np.ndim(x) != 1:
            raise ArgumentError(
                f"{self.name}: operator 'linear' computes x @ W.T; call k(x), or compile operator='spmm'"
            )
        return self(x)

    __array_ufunc__ = None  # x @ k is a TypeError, not an object array

    def __reduce__(self) -> Any:
        raise TypeError(f"{self.name}: a kernel cannot be pickled; save it to a folder and load it there")

    def matvec(self, x: Any) -> Any:
        """W @ x for one vector: with shape and dtype, all that scipy.sparse.linalg.aslinearoperator asks for."""
        return self(np.asarray(x).reshape(-1))

    # ── new values ───────────────────────────────────────────────────────────────────────────────────────────────

    def update(self, W: Any) -> None:
        """Put the values of W in place of the old ones: same shape, block shape and pattern, no compiler.

        Takes what `compile` takes; in a dense W, blocks outside the pattern must be zero.  PatternMismatchError says
        where another pattern differs.  After an error nothing has changed; calls that run meanwhile keep old values.
        With transposed=True, W still is what `compile` was given: its values move to their places in W.T.
        An int8 kernel quantises floating W with the w_scale that `compile` was given, or else with new ones, which take
        the place of the old; integers are taken as they are, and the scales stay.
        """
        self._values = self.valued(W)

    def valued(self, W: Any) -> _Values:
        """What `update` makes of W; the kernel stays as it is (see instance.py)."""
        if self._foreign:
            raise self._foreign
        m, values = self.artifact.manifest, self._values
        weight = self._weight(W)
        same = weight.pattern.digest == (self._turned[0].digest if m.transposed else m.pattern)
        data = weight.data if same else _filled(self._given, weight) if _is_dense(W) else None
        if data is None:
            where = self._given.difference(weight.pattern)
            raise PatternMismatchError(f"{self.name}: update needs the kernel's pattern: {where}; compile a new kernel")
        if m.transposed:
            (turned := np.empty((m.nnzb, *m.blocksize), data.dtype))[self._turned[1]] = data.transpose(0, 2, 1)
            data = turned
        bound, how = values.bound, values.weight_scale
        if data.dtype != self._dtype:
            given = bound["w_scale"] if how == "given" else None
            weight, scale = quantized(Weight(self.pattern, data), given)
            data, bound, how = weight.data, bound | {"w_scale": scale}, "given" if how == "given" else "max"
        return self._with(bound, how, data)

    @functools.cached_property
    def _turned(self) -> tuple[Pattern, Array]:
        """Of a kernel of W.T: the pattern of W as it is given, and the kernel's block that each of its blocks is."""
        return self.pattern.transpose()

    @property
    def _given(self) -> Pattern:
        """The pattern of W as `compile` was given it."""
        return self._turned[0] if self.transposed else self.pattern

    def _weight(self, W: Any) -> Weight:
        """W in the blocks it is given in and in the kernel's type, or where that is int8 and W is not, as it came."""
        m, (_, blocksize) = self.artifact.manifest, self._sizes_given
        if are_several(W):
            weights = [source_of(part, m.types[0], blocksize=blocksize) for part in W]
            parts = parts_of(weights, pair_of(m.steps) is not None)
            if not m.transposed and parts != (m.parts or (m.rows,)):
                raise PatternMismatchError(
                    f"{self.name}: weights of {parts} rows, the kernel's have {m.parts or m.rows}"
                )
            return stacked(weights)
        return source_of(W, m.types[0], blocksize=blocksize, shape=self._shape_for(W))

    def _shape_for(self, W: Any) -> tuple[int, int] | None:
        """The kernel's shape for what has none of its own: a triple, and BSR whose last blocks stick out of it."""
        sizes, blocksize = self._sizes_given
        if isinstance(W, tuple):
            return sizes
        padded = tuple(-(-size // block) * block for size, block in zip(sizes, blocksize, strict=True))
        return sizes if getattr(W, "format", None) == "bsr" and getattr(W, "shape", None) == padded else None

    @property
    def _sizes_given(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shape and block shape of W as it is given."""
        m = self.artifact.manifest
        return (m.shape[::-1], m.blocksize[::-1]) if m.transposed else (m.shape, m.blocksize)

    def packed(self, data: Array, level: int) -> Array:
        """The bytes of values [nnzb, R, C] as ISA level `level` of the library keeps them, 64-byte aligned."""
        ffi = self._tramp.ffi
        packed = aligned(self._packed(ffi.NULL, ffi.NULL, level))
        self._packed(ffi.from_buffer(data.view(np.uint8)), ffi.from_buffer(packed), level)
        return packed

    def _packed(self, data: Any, packed: Any, level: int) -> int:
        count = self._tramp.pack(self._pack, data, packed, level)
        if count == _PACK_NO_MEMORY:
            raise OutOfMemoryError(f"{self.name}: no memory to pack {self.nnz} values")
        if count < 0:
            raise ArtifactError(f"{self.name}: the library cannot pack values for level {level} (status {count})")
        return count

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the artifact to `folder`, updated values included, and return it.

        A folder that holds an artifact and nothing else is replaced as a whole; any other non-empty folder is refused
        (ArgumentError).  StoreError where the disk says no, ArtifactCorruptError where the kernel's own files are gone.
        """
        m, changed, values = self.artifact.manifest, {}, self._values
        if values.data is not None:
            library = bytearray(self.artifact.read(m.library))
            for number, level in enumerate(m.levels):
                packed = self.packed(values.data, number).tobytes()
                record = level.values
                assert record is not None, "no update without values"
                changed[record.file] = packed
                library[record.offset : record.offset + len(packed)] = packed
            changed[m.library] = bytes(library)
            if "w_scale" in values.bound:
                np.savez(file := io.BytesIO(), **values.bound)
                changed[OPERANDS_FILE] = file.getvalue()
            m = msgspec.structs.replace(
                m, weight=Weight(self.pattern, values.data).digest, check=None, bound=tuple(sorted(values.bound)),
                weight_scale=values.weight_scale,
            )  # fmt: skip
        save_artifact(self.artifact, Path(folder), changed, m)
        return Path(folder).resolve()

    # ── everything can be looked at ──────────────────────────────────────────────────────────────────────────────

    @property
    def name(self) -> str:
        """Name of the kernel and prefix of its C symbols."""
        return self.artifact.manifest.name

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K) of the weight."""
        return self.artifact.manifest.shape

    @property
    def transposed(self) -> bool:
        """Whether W comes as the transpose of what is multiplied; shape and pattern are those of W.T then."""
        return self.artifact.manifest.transposed

    @property
    def dtype(self) -> "np.dtype[Any]":
        """Type of the weight."""
        return self._dtype

    @property
    def x_dtype(self) -> "np.dtype[Any]":
        """Type of X."""
        return self._x_dtype

    @property
    def out_dtype(self) -> "np.dtype[Any]":
        """Type of the result."""
        return self._out_dtype

    @property
    def nnz(self) -> int:
        """Stored elements."""
        m = self.artifact.manifest
        return m.nnzb * m.blocksize[0] * m.blocksize[1]

    @functools.cached_property
    def pattern(self) -> Pattern:
        """Which blocks are stored."""
        return self.artifact.pattern()

    @functools.cached_property
    def problem(self) -> Problem:
        """What is computed."""
        problem = self.artifact.problem()
        assert isinstance(problem, Problem)
        return problem

    @property
    def plan(self) -> LevelRecord:
        """How: the plan of the ISA level in use."""
        return self.artifact.manifest.levels[self._level]

    @property
    def cost(self) -> CostRecord:
        """What the model expects of one call on one core, and what was measured."""
        return self.artifact.manifest.cost

    @property
    def verdict(self) -> Verdict:
        """Is sparse worth it for this matrix, and would another block shape be faster?  str() is one sentence."""
        return self.artifact.manifest.verdict

    @property
    def source(self) -> str:
        """The generated text of the ISA level in use: C or CUDA; before it, from MLIR, the register tile, or the kernel
        for GPUs, as MLIR before and after the sparsifier, and as LLVM IR; for GPUs also PTX."""
        level = f"{self.name}_{self.plan.target.replace('-', '_')}"
        steps = [f"{level}{end}" for end in ("_tile.mlir", "_loops.mlir", "_tile.ll", ".c")]
        steps += [f"{self.name}_device{end}" for end in (".cu", ".mlir", "_loops.mlir", ".ll", ".ptx", ".c")]
        return "\n".join(self.artifact.read(step).decode() for step in steps if step in self.artifact.manifest.files)

    def __str__(self) -> str:
        m = self.artifact.manifest
        lines = [
            f"{self.name}",
            f"  problem   {self.problem}",
            f"  plan      {self.plan}",
            f"  cost      {m.cost.flop / 1e6:.3g} MFLOP, {m.cost.bytes / 1e6:.3g} MB, predicted "
            f"{m.cost.seconds * 1e6:.3g} us at n = {m.cost.n} on {m.verdict.where}",
            f"  verdict   {m.verdict}",
            f"  artifact  {self.artifact}",
            *("            " + line for line in self.pattern.picture(64, 16).splitlines()),
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<bsrgen.Kernel {self.name} on {self.plan.target}, {self._threads} threads>"


def _filled(ours: Pattern, weight: Weight) -> Array | None:
    """Values of a dense W whose blocks lie within the pattern `ours`: stored blocks that are zero now hold zeros."""
    theirs = weight.pattern
    if ours.shape != theirs.shape:
        return None
    mine, other = (p.rows * p.block_cols + p.indices for p in (ours, theirs))
    if not np.isin(other, mine).all():
        return None
    data = np.zeros((ours.nnzb, *ours.blocksize), weight.data.dtype)
    data[np.searchsorted(mine, other)] = weight.data
    return data


def aligned(count: int) -> Array:
    """So many bytes on 64-byte lines, contents undefined."""
    room = np.empty(count + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + count]


def _is_dense(W: Any) -> bool:
    """Whether W is an array or tensor that has a value for every element, and so no pattern of its own."""
    return isinstance(W, np.ndarray) or str(getattr(W, "layout", "")) == "torch.strided"
