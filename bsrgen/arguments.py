"""The arguments of a call: checked, and made into what C takes.  The slow, careful path of `Kernel.__call__`."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.dtypes import DTYPES
from bsrgen.errors import ArgumentError, ArgumentTypeError
from bsrgen.machine import parallel_cores
from bsrgen.manifest import Manifest, OperandRecord
from bsrgen.operators import OPERATORS
from bsrgen.problem import Problem

Array = NDArray[Any]
MAX_THREADS = 1 << 16


@dataclass(frozen=True, slots=True)
class Prepared:
    """One call in the shape of the C ABI; `finish` gives the caller's result."""

    n: int
    x: Array
    ldx: int
    y: Array
    ldy: int
    operands: list[tuple[Array | None, int, float]]
    threads: int
    out: Array  # what the caller gets
    target: Array  # `out` in two dimensions

    def finish(self) -> Array:
        """Copy back where y was a temporary."""
        if self.y is not self.target:
            np.copyto(self.target, self.y)
        return self.out


class Call:
    """The signature of one artifact and the operands bound to it."""

    def __init__(self, manifest: Manifest, bound: Mapping[str, Any], threads: int) -> None:
        self.name = manifest.name
        self.rows, self.features = manifest.shape
        self.operator = OPERATORS[manifest.operator]
        self.dtype = DTYPES[manifest.dtype].numpy
        self.records = manifest.operands
        self.reads_out = "accumulate" in manifest.epilogue
        self.threads = threads
        self.bound: dict[str, Any] = {}
        self._known(bound)
        self.bound = dict(bound)

    def prepare(self, x: Any, out: Any, threads: int | None, operands: Mapping[str, Any]) -> Prepared:
        """Check everything, copy what C cannot take as it lies.  Raises before any work starts."""
        self._known(operands)
        x = self._array("x", x)
        x2, batch = self._two_axes(x)
        n = x2.shape[self.operator.token_axis]
        shape = self.operator.shape(n, self.rows)
        out, target = self._target(out, shape, self._result_shape(x, batch, n))
        given = self.bound | dict(operands)
        values = [self._operand(record, given, shape, batch) for record in self.records]
        x2, ldx = _rows(x2)
        y, ldy = target, _leading(target)
        if ldy < 0 or self._overlaps(target, x2, values):
            y = np.array(target, order="C") if self.reads_out else np.empty(shape, self.dtype)
            ldy = shape[1]
        count = self.threads if threads is None else check_threads(threads)
        return Prepared(n, x2, ldx, y, ldy, values, count, out, target)

    def _known(self, operands: Mapping[str, Any]) -> None:
        names = [record.name for record in self.records]
        for name in operands:
            if name not in names:
                takes = f"takes {', '.join(names)}" if names else "takes no operands"
                raise ArgumentTypeError(f"{self.name}: unexpected operand {name!r}: its epilogue {takes}")

    def _array(self, what: str, value: Any) -> Array:
        """A numpy view of `value` with the kernel's dtype."""
        if not isinstance(value, np.ndarray):
            if not hasattr(value, "__dlpack__"):
                raise ArgumentTypeError(
                    f"{self.name}: {what} is {type(value).__name__}, not an array; try numpy.asarray"
                )
            try:
                value = np.from_dlpack(value)
            except Exception as e:  # whatever the other library raises
                raise ArgumentTypeError(f"{self.name}: {what} cannot be read as a CPU array: {e}") from e
        if value.dtype != self.dtype:
            raise ArgumentTypeError(
                f"{self.name}: {what} has dtype {value.dtype}, the kernel {self.dtype}; convert it with "
                f".astype('{self.dtype}'), or compile a kernel for its dtype"
            )
        return np.asarray(value)

    def _two_axes(self, x: Array) -> tuple[Array, tuple[int, ...] | None]:
        """x as a matrix, and the leading axes it had (None: one vector)."""
        axis = 1 - self.operator.token_axis
        limit = 2 if self.operator.token_axis == 1 else x.ndim
        if (
            x.ndim == 0
            or x.ndim > limit
            or x.shape[0 if x.ndim == 1 else axis - 2 if axis == 0 else -1] != self.features
        ):
            raise ArgumentError(f"{self.name}: x has shape {x.shape}, expected {self._expected('K', self.features)}")
        if x.ndim == 1:
            return (x[None, :] if axis == 1 else x[:, None]), None
        return (x, x.shape[:-1]) if x.ndim == 2 else (x.reshape(math.prod(x.shape[:-1]), self.features), x.shape[:-1])

    def _expected(self, letter: str, size: int) -> str:
        if self.operator.token_axis == 0:
            return f"[..., {size}] ({letter} = {size})"
        return f"[{size}, N] or [{size}] ({letter} = {size})"

    def _result_shape(self, x: Array, batch: tuple[int, ...] | None, n: int) -> tuple[int, ...]:
        if batch is None:
            return (self.rows,)
        return (*batch, self.rows) if self.operator.token_axis == 0 else (self.rows, n)

    def _target(self, out: Any, shape: tuple[int, int], full: tuple[int, ...]) -> tuple[Array, Array]:
        if out is None:
            out = np.zeros(full, self.dtype) if self.reads_out else np.empty(full, self.dtype)
        elif not isinstance(out, np.ndarray):
            raise ArgumentTypeError(f"{self.name}: out is {type(out).__name__}, not a numpy array")
        elif out.dtype != self.dtype:
            raise ArgumentTypeError(f"{self.name}: out has dtype {out.dtype}, the result {self.dtype}")
        elif out.shape != full:
            raise ArgumentError(f"{self.name}: out has shape {out.shape}, the result {full}")
        elif not out.flags.writeable:
            raise ArgumentError(f"{self.name}: out is read-only")
        elif _self_overlapping(out):
            raise ArgumentError(
                f"{self.name}: out has strides {out.strides}: several results share one place in memory"
            )
        return out, _reshaped(out, shape)

    def _operand(
        self, record: OperandRecord, given: Mapping[str, Any], shape: tuple[int, int], batch: tuple[int, ...] | None
    ) -> tuple[Array | None, int, float]:
        value = given.get(record.name)
        if value is None and record.default is not None:
            return None, 0, float(record.default)
        if value is None:
            raise ArgumentTypeError(f"{self.name}: operand {record.name!r} is missing: k(x, {record.name}=...)")
        if record.kind == "scalar":
            if np.ndim(value) != 0 or isinstance(value, (complex, np.complexfloating, str, bytes)):
                raise ArgumentTypeError(f"{self.name}: {record.name} must be one real number, not {value!r}")
            try:
                return None, 0, float(value)
            except (TypeError, ValueError, OverflowError) as e:
                raise ArgumentTypeError(f"{self.name}: {record.name} must be one real number, not {value!r}") from e
        array = self._array(record.name, value)
        if record.kind == "row":
            if array.shape != (self.rows,):
                raise ArgumentError(f"{self.name}: {record.name} has shape {array.shape}, expected ({self.rows},)")
            return np.require(array, requirements=["C", "A"]), 0, 0.0
        full = (self.rows,) if batch is None else (*batch, self.rows) if self.operator.token_axis == 0 else shape
        if array.shape != full:
            raise ArgumentError(f"{self.name}: {record.name} has shape {array.shape}, expected {full}, like the result")
        array, ld = _rows(array.reshape(shape))
        return array, ld, 0.0

    def _overlaps(self, y: Array, x: Array, operands: list[tuple[Array | None, int, float]]) -> bool:
        """Whether writing y could change an input; a residual that is y itself is read before it is written."""
        arrays = [x, *(a for a, _, _ in operands if a is not None and not _same(a, y))]
        return any(np.may_share_memory(y, array) for array in arrays)


def bind(problem: Problem, operands: Mapping[str, Any]) -> dict[str, Array]:
    """Operands given when a kernel is compiled, as arrays of its dtype.  Scalars and "row" operands only."""
    known = {o.name: o for o in problem.operands}
    bound = {}
    for name, value in operands.items():
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no operands"
            raise ArgumentTypeError(f"{problem}: no parameter of compile is called {name!r}, and its epilogue {takes}")
        if known[name].kind == "element":
            raise ArgumentError(f"{problem}: {name} depends on the number of tokens: give it with the call")
        shape = (problem.pattern.M,) if known[name].kind == "row" else ()
        try:
            array = np.asarray(value)
            with np.errstate(over="raise"):
                array = array.astype(np.float64 if shape == () else problem.dtype.numpy, casting="same_kind", order="C")
        except FloatingPointError as e:
            raise ArgumentError(f"{problem}: {name} has values beyond {problem.dtype.name}") from e
        except (TypeError, ValueError, RuntimeError) as e:
            raise ArgumentTypeError(f"{problem}: {name}={value!r}: expected real numbers") from e
        if array.shape != shape:
            raise ArgumentError(f"{problem}: {name} has shape {array.shape}, expected {shape}")
        bound[name] = array
    return bound


def check_threads(threads: Any) -> int:
    """A thread count from 1 up."""
    if isinstance(threads, bool) or not isinstance(threads, (int, np.integer)):
        raise ArgumentTypeError(f"threads={threads!r}: an int from 1 up")
    if not 1 <= threads <= MAX_THREADS:
        raise ArgumentError(f"threads={threads}: a number from 1 to {MAX_THREADS}")
    return int(threads)


def default_threads(threads: int | None) -> int:
    """`threads`, else $BSRGEN_NUM_THREADS, else all cores this process may use, within its quota of time."""
    if threads is not None:
        return check_threads(threads)
    text = os.environ.get("BSRGEN_NUM_THREADS", "")
    if text:
        if not text.isdecimal() or not 1 <= int(text[:9]) <= MAX_THREADS or len(text) > 9:
            raise ArgumentError(f"BSRGEN_NUM_THREADS={text!r}: a number from 1 to {MAX_THREADS}")
        return int(text)
    return parallel_cores()


def _leading(a: Array) -> int:
    """Leading dimension in elements of a matrix that C can walk as it lies; -1 when it cannot."""
    rows, columns = (int(size) for size in a.shape)
    item = a.itemsize
    if not a.flags.aligned or (columns > 1 and a.strides[1] != item):
        return -1
    if rows <= 1 or columns == 0:
        return max(columns, 1)
    ld, rest = divmod(a.strides[0], item)
    return int(ld) if rest == 0 and ld >= columns else -1


def _rows(a: Array) -> tuple[Array, int]:
    """`a` or a row-major copy of it, and its leading dimension."""
    ld = _leading(a)
    if ld >= 0:
        return a, ld
    a = np.array(a, order="C")
    return a, max(a.shape[1], 1)


def _reshaped(out: Array, shape: tuple[int, int]) -> Array:
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


def _self_overlapping(a: Array) -> bool:
    """Whether two elements may share memory: an axis steps by less than what lies within one of its steps."""
    span = a.itemsize
    for stride, size in sorted(
        (abs(stride), size) for stride, size in zip(a.strides, a.shape, strict=True) if size > 1
    ):
        if stride < span:
            return a.size > 0
        span += stride * (size - 1)
    return False


def _same(a: Array, b: Array) -> bool:
    return a.ctypes.data == b.ctypes.data and a.shape == b.shape and a.strides == b.strides
