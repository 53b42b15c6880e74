"""Kernel: load an artifact and call it.  Needs no compiler and no templates."""

import itertools
import platform
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from bsrgen.arguments import Call, COperand, default_threads
from bsrgen.artifact import Artifact
from bsrgen.errors import (
    ArgumentError,
    ArgumentTypeError,
    ArtifactCorruptError,
    ArtifactError,
    IncompatibleCPUError,
    OutOfMemoryError,
)
from bsrgen.manifest import OPERANDS_FILE
from bsrgen.operators import OPERATORS
from bsrgen.pattern import Weight
from bsrgen.shortcut import Shortcut
from bsrgen.trampoline import OVERLAP, trampoline
from bsrgen.valued import Array, Valued, _Values

_OK, _BAD_ARGUMENT, _NO_MEMORY = 0, 2, 3  # enum bsrgen_status in runtime/bsrgen.h


class Kernel(Valued):
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
