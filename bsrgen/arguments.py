"""The arguments of a call: checked, and made into what C takes.  The slow, careful path of `Kernel.__call__`."""

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen import strides
from bsrgen.dtypes import DTYPES, DType
from bsrgen.epilogues import OPTIONAL, SELECTING, W_SCALE, Operand, operand_dtype
from bsrgen.errors import ArgumentError, ArgumentTypeError
from bsrgen.foreign import host, view
from bsrgen.machine import parallel_cores
from bsrgen.manifest import Manifest
from bsrgen.operators import OPERATORS
from bsrgen.problem import Problem
from bsrgen.selection import selected

Array = NDArray[Any]
COperand = tuple[Array | None, int, float]  # struct bsrgen_operand: data, ld, scalar
MAX_THREADS = 1 << 16


@dataclass(frozen=True, slots=True)
class Prepared:
    """One call in the shape of the C ABI; `finish` gives the caller's result."""

    n: int
    x: Array
    ldx: int
    y: Array
    ldy: int
    operands: list[COperand]
    threads: int
    out: Array  # what the caller gets
    target: Array  # `out` in two dimensions

    def finish(self) -> Array:
        """Copy back where y was a temporary."""
        if self.y is not self.target:
            np.copyto(self.target, self.y)
        return self.out


class Call:
    """The signature of one artifact."""

    def __init__(self, manifest: Manifest, threads: int) -> None:
        self.name = manifest.name
        self.rows, self.features = manifest.rows, manifest.shape[1]
        self.stacked = manifest.shape[0]
        self.operator = OPERATORS[manifest.operator]
        w, x, y = manifest.types
        self.x_dtype, self.out_dtype = x.numpy, y.numpy
        self.real, self.halves = DTYPES[w.real], w.real != w.name
        self.operands, self.pit = manifest.given, manifest.as_pit
        self.dtypes = {operand.name: operand_dtype(operand, w, y).numpy for operand in self.operands}
        self.reads_out = "accumulate" in manifest.epilogue
        self.partial = self.pit is not None and self.pit.axis.listed  # a call may leave results as they were
        self.threads = threads

    def prepare(
        self, x: Any, out: Any, threads: int | None, operands: Mapping[str, Any], settled: Mapping[str, COperand]
    ) -> Prepared:
        """Check everything, copy what C cannot take as it lies.  Raises before any work starts.

        settled: operands that were checked before, for what `operands` does not give.
        """
        self.known(operands)
        x = as_array(self.name, "x", x, self.x_dtype)
        x2, batch = self._two_axes(x)
        n = x2.shape[self.operator.token_axis]
        shape = self.operator.shape(n, self.rows)
        out, target = self._target(out, shape, self._result_shape(x, batch, n))
        values = [
            settled[operand.name]
            if operand.name in settled and operands.get(operand.name) is None
            else self._operand(operand, operands, shape, batch)
            for operand in self.operands
        ]
        x2, ldx = strides.rows(x2)
        y, ldy = target, strides.leading(target)
        if ldy < 0 or self._overlaps(target, x2, values):
            kept = self.reads_out or self.partial
            y = np.array(target, order="C") if kept else np.empty(shape, self.out_dtype)
            ldy = shape[1]
        count = self.threads if threads is None else check_threads(threads)
        return Prepared(n, x2, ldx, y, ldy, values, count, out, target)

    def settled(self, bound: Mapping[str, Any]) -> dict[str, COperand]:
        """The operands that a call need not give: those bound, those with a default, and selections of all."""
        self.known(bound)
        given = {o.name for o in self.operands if o.default is not None or o.kind in OPTIONAL} | bound.keys()
        shape = self.operator.shape(1, self.rows)
        return {o.name: self._operand(o, bound, shape, None) for o in self.operands if o.name in given}

    def count(self, operand: Operand) -> int:
        """Values of an operand of kind "row"."""
        return self.stacked if operand in W_SCALE.operands or self.pit else self.rows

    def known(self, operands: Mapping[str, Any]) -> None:
        """Refuse names that the epilogue has not.  ArgumentTypeError."""
        names = [operand.name for operand in self.operands]
        for name in operands:
            if name not in names:
                takes = f"takes {', '.join(names)}" if names else "takes no operands"
                raise ArgumentTypeError(f"{self.name}: unexpected operand {name!r}: its epilogue {takes}")

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
        out = as_result(self.name, out, full, self.out_dtype, zeros=self.reads_out or self.partial)
        return out, strides.reshaped(out, shape)

    def _operand(
        self, operand: Operand, given: Mapping[str, Any], shape: tuple[int, int], batch: tuple[int, ...] | None
    ) -> COperand:
        value = given.get(operand.name)
        if operand.kind in SELECTING and self.pit:
            n = shape[self.operator.token_axis]
            own = self.pit.selection_shape(n, self.stacked)
            tokens = own if operand.kind == "mask" or self.operator.token_axis else () if batch is None else batch
            return selected(self.name, operand, value, own, tokens, self.pit.groups(self.stacked))
        if value is None and operand.default is None:
            raise ArgumentTypeError(f"{self.name}: operand {operand.name!r} is missing: k(x, {operand.name}=...)")
        if operand.kind == "scalar" or value is None or (operand.kind == "token" and np.ndim(value) == 0):
            number = self.number(operand, operand.default if value is None else value)
            return (None, 0, number) if operand.kind == "scalar" else (np.array([number], self.real.numpy), 0, 0.0)
        want, halves = self.dtypes[operand.name], self.halves and operand.kind != "element"
        array = as_array(self.name, operand.name, value, want, halves)
        if operand.positive and not _is_scale(array):
            raise ArgumentError(f"{self.name}: {operand.name} holds values that are not positive and finite")
        fits = self._shapes(operand, shape, batch)
        if array.shape not in fits:
            like = ", like the result" if operand.kind == "element" else ""
            raise ArgumentError(f"{self.name}: {operand.name} has shape {array.shape}, expected {fits[0]}{like}")
        if operand.kind == "element":
            array, ld = strides.rows(array.reshape(shape))
            return array, ld, 0.0
        return np.require(array.reshape(-1), requirements=["C", "A"]), int(operand.kind == "token"), 0.0

    def _shapes(
        self, operand: Operand, shape: tuple[int, int], batch: tuple[int, ...] | None
    ) -> tuple[tuple[int, ...], ...]:
        """What shapes an operand may have, the usual one first."""
        linear = self.operator.token_axis == 0
        if operand.kind == "row":
            each = ((self.stacked // self.rows, self.rows),) if self.count(operand) > self.rows > 0 else ()
            return ((self.count(operand),), *each)
        if operand.kind == "element":
            return ((self.rows,) if batch is None else (*batch, self.rows) if linear else shape,)
        tokens = () if batch is None else batch if linear else shape[1:]
        return tokens, (*tokens, 1) if linear else (1, *tokens)

    def number(self, operand: Operand, value: Any) -> float:
        """One real number for an operand.  ArgumentError, ArgumentTypeError."""
        number = as_number(self.name, operand.name, value)
        if operand.positive and not self.real.smallest <= number <= self.real.largest:
            raise ArgumentError(f"{self.name}: {operand.name} is {number}; it must be positive and finite")
        return number

    def _overlaps(self, y: Array, x: Array, operands: list[COperand]) -> bool:
        """Whether writing y could change an input; a residual that is y itself is read before it is written."""
        if np.may_share_memory(y, x):
            return True
        arrays = [array for array, _, _ in operands if array is not None and np.may_share_memory(y, array)]
        return not all(strides.same(array, y) for array in arrays)


def as_array(kernel: str, what: str, value: Any, want: np.dtype[Any], halves: bool = False) -> Array:
    """A numpy view of `value`, which has that dtype; `halves`: or a shorter floating one, and becomes a copy."""
    if not isinstance(value, np.ndarray):
        if not hasattr(value, "__dlpack__"):
            raise ArgumentTypeError(f"{kernel}: {what} is {type(value).__name__}, not an array; try numpy.asarray")
        try:
            value = view(value)
        except Exception as e:  # whatever the other library raises
            raise ArgumentTypeError(f"{kernel}: {what} cannot be read as a CPU array: {e}") from e
    if value.dtype != want:
        if halves and value.dtype.name in _HALVES:
            return np.asarray(value).astype(want)
        way = "quantise it: rint(x / x_scale) in [-127, 127]" if want == np.int8 else f"use .astype('{want}')"
        raise ArgumentTypeError(
            f"{kernel}: {what} has dtype {value.dtype}, the kernel {want}; {way}, or compile a kernel for its dtype"
        )
    return np.asarray(value)


def as_result(kernel: str, out: Any, shape: tuple[int, ...], dtype: np.dtype[Any], *, zeros: bool) -> Array:
    """`out` if it can be written, or where it is None a new array, of zeros where what is there counts."""
    if out is None:
        return np.zeros(shape, dtype) if zeros else np.empty(shape, dtype)
    if not isinstance(out, np.ndarray):
        raise ArgumentTypeError(f"{kernel}: out is {type(out).__name__}, not a numpy array")
    if out.dtype != dtype:
        raise ArgumentTypeError(f"{kernel}: out has dtype {out.dtype}, the result {dtype}")
    if out.shape != shape:
        raise ArgumentError(f"{kernel}: out has shape {out.shape}, the result {shape}")
    if not out.flags.writeable:
        raise ArgumentError(f"{kernel}: out is read-only")
    if strides.self_overlapping(out):
        raise ArgumentError(f"{kernel}: out has strides {out.strides}: several results share one place in memory")
    return out


def as_number(kernel: str, what: str, value: Any) -> float:
    """One real number.  ArgumentTypeError."""
    if np.ndim(value) == 0 and not isinstance(value, (complex, np.complexfloating, str, bytes)):
        with suppress(TypeError, ValueError, OverflowError):
            return float(value)
    raise ArgumentTypeError(f"{kernel}: {what} must be one real number, not {value!r:.80}")


def bind(problem: Problem, operands: Mapping[str, Any]) -> dict[str, Array]:
    """Operands given when a kernel is compiled, as arrays of what its epilogue computes in.  One for each row, or one
    number: of values per token, one for all."""
    known = {o.name: o for o in problem.operands}
    bound = {}
    for name, value in operands.items():
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no operands"
            raise ArgumentTypeError(f"{problem}: no parameter of compile is called {name!r}, and its epilogue {takes}")
        if known[name].kind in ("element", *SELECTING):
            raise ArgumentError(f"{problem}: {name} depends on the number of tokens: give it with the call")
        shape = (problem.rows_of(known[name]),) if known[name].kind == "row" else ()
        try:
            array = host(name, value)
            with np.errstate(over="raise"):
                array = array.astype(np.float64 if shape == () else problem.real.numpy, casting="same_kind", order="C")
        except FloatingPointError as e:
            raise ArgumentError(f"{problem}: {name} has values beyond {problem.real.name}") from e
        except (TypeError, ValueError, RuntimeError) as e:
            raise ArgumentTypeError(f"{problem}: {name}={value!r}: expected real numbers") from e
        if problem.pit and array.ndim == 2 and array.shape[1] == problem.rows:  # of experts
            array = array.reshape(-1)
        if array.shape != shape:
            each = "; give one for each token with the call" if known[name].kind == "token" else ""
            raise ArgumentError(f"{problem}: {name} has shape {array.shape}, expected {shape}{each}")
        if known[name].positive and not _is_scale(array, problem.real):
            raise ArgumentError(f"{problem}: {name} holds values that are not positive and finite")
        bound[name] = array
    return bound


_HALVES = {row.name for row in DTYPES.values() if row.unit_roundoff and row.accumulator == "float32"}


def _is_scale(value: Any, dtype: DType | None = None) -> bool:
    """Whether all values are positive and finite, also as `dtype`."""
    with np.errstate(over="ignore", under="ignore"):
        value = np.asarray(value, dtype.numpy if dtype else None)
    return bool(((value > 0) & (value < np.inf)).all())


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
