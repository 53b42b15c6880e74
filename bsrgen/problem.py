"""Problem: what to compute, without saying how."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bsrgen import epilogues
from bsrgen.dtypes import ACCUMULATORS, BFLOAT16, DTYPES, FLOAT8, INT8, INT32, DType, as_types, bound_factor
from bsrgen.epilogues import QUANTIZED_X, W_SCALE, Epilogue, Operand, as_epilogues, composed
from bsrgen.errors import ArgumentError, UnsupportedError
from bsrgen.operators import Operator, as_operator, kernel_name
from bsrgen.pattern import Pattern, Weight
from bsrgen.pit import Pit

Array = NDArray[Any]


@dataclass(frozen=True)
class Problem:
    """One operator with one fixed pattern: Y = epilogue(product(W, X)), row-major, N chosen at each call."""

    operator: Operator
    pattern: Pattern
    dtype: DType  # of W as it is stored
    epilogue: tuple[Epilogue, ...] = ()  # with the steps that int8 brings itself
    n: int | None = field(default=None, compare=False)  # a hint for the planner, never baked in
    x_dtype: DType = None  # type: ignore[assignment]  # of X; None: the weight's
    out_dtype: DType = None  # type: ignore[assignment]  # of Y; None: the first of PAIRS
    pit: Pit | None = None  # what of it a call leaves out, in mode="pit"

    def __post_init__(self) -> None:
        _, x, y = as_types(self.dtype, self.x_dtype, self.out_dtype)
        object.__setattr__(self, "x_dtype", x)
        object.__setattr__(self, "out_dtype", y)

    def __str__(self) -> str:
        p = self.pattern
        steps = f" + {', '.join(step.name for step in self.epilogue)}" if self.epilogue else ""
        types = self.dtype.name
        if (self.dtype, self.x_dtype, self.out_dtype) != as_types(self.dtype):
            types += f" x {self.x_dtype.name} -> {self.out_dtype.name}"
        return f"{self.operator.name} {types} {p.M}x{p.K} blocks {p.R}x{p.C} density {p.density:.3g}{steps}" + (
            f", {self.pit}" if self.pit else ""
        )

    @property
    def gate_rows(self) -> int:
        """Rows of W, the first ones, that make the gate of swiglu or geglu; 0 without."""
        return epilogues.gate_rows(self.epilogue, self.pattern.M, self.pattern.R)

    @property
    def rows(self) -> int:
        """Features of Y."""
        M = self.pattern.M - self.gate_rows
        return self.pit.features_of_y(M) if self.pit else M

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The operands of a call: those of the epilogue, in the order of the C signature, and what mode="pit" adds."""
        return (*epilogues.operands_of(self.epilogue), *((self.pit.axis.operand,) if self.pit else ()))

    @cached_property
    def name(self) -> str:
        """Name of the kernel and prefix of its C symbols."""
        p, steps = self.pattern, [step.name for step in self.epilogue]
        types = (self.dtype, self.x_dtype, self.out_dtype)
        return kernel_name(self.operator.name, *types, p.shape, p.blocksize, p.digest, steps, self.pit)

    @property
    def quantizes_x(self) -> bool:
        """Whether the kernel makes int8 of X itself, each token by its own largest magnitude."""
        return QUANTIZED_X in self.epilogue

    @property
    def read_dtype(self) -> DType:
        """The type of X where it is multiplied: the caller's, unless the kernel quantises it."""
        return INT8 if self.quantizes_x else self.x_dtype

    @property
    def accumulator(self) -> DType:
        """The type that sums are kept in: of int8 W with float X, X's."""
        return ACCUMULATORS[(self.read_dtype if self.dtype is INT8 else self.dtype).accumulator]

    @property
    def real(self) -> DType:
        """The type that the epilogue computes in, and of its operands per row, per token and scalar."""
        return DTYPES[self.dtype.real]

    def operand_dtype(self, operand: Operand) -> DType:
        """Type of an operand in memory."""
        return epilogues.operand_dtype(operand, self.dtype, self.out_dtype)

    def flop(self, n: int) -> int:
        """Effective FLOP of a call: 2 * stored elements * N."""
        return 2 * self.pattern.nnz * n

    def sample(self, rng: np.random.Generator, n: int) -> tuple[Array, dict[str, Any]]:
        """Random X of n tokens and random operands, for checks and timings."""
        x = _random(rng, self.operator.shape(n, self.pattern.K), self.x_dtype)
        if self.pit and not self.pit.axis.listed:
            x = np.where(rng.random(x.shape) < rng.random(self.operator.shape(n, 1)), x, x.dtype.type(0))
        return x, {operand.name: self._sample(rng, n, operand) for operand in self.operands}

    def _sample(self, rng: np.random.Generator, n: int, operand: Operand) -> Any:
        if self.pit and operand is self.pit.axis.operand:
            return self.pit.sample(rng, n, self.pattern.M)
        M, dtype = self.rows_of(operand) if operand.kind == "row" else self.rows, self.operand_dtype(operand)
        shape = {"row": (M,), "token": (n,), "element": self.operator.shape(n, M), "scalar": ()}[operand.kind]
        if not operand.positive:
            return _random(rng, shape, dtype)
        size = 0.01
        if operand.kind == "scalar":  # sums of so many integers then fill the range of int8, and some leave it
            size *= math.sqrt(1 + self.pattern.nnz / max(M, 1))
        return (size * rng.uniform(0.5, 1.5, shape)).astype(dtype.numpy) if shape else dtype.numpy.type(size)

    def rows_of(self, operand: Operand) -> int:
        """Values of an operand of kind "row": of w_scale, for the rows of W, of others for the features of Y; of
        experts, for the rows of all of them."""
        return self.pattern.M if operand in W_SCALE.operands or self.pit else self.rows

    def sample_out(self, rng: np.random.Generator, n: int) -> Array:
        """Random old content of `out`."""
        old: Array = _random(rng, self.operator.shape(n, self.rows), self.out_dtype)
        return old

    def reference(
        self, weight: Weight, x: Array, given: Mapping[str, Any] | None = None, out: Array | None = None
    ) -> tuple[Array, Array]:
        """(Y, bound) in float64: the right answer and the elementwise error a kernel may make (DESIGN section 6).

        |y - Y| <= g(k + 2) (|W| |x|), k stored entries of that row, carried through the epilogue by each step's gain,
        plus the roundings of the step itself and of Y.  Sums of int8 are exact.  Y of a byte is saturated.
        """
        if self.pit:
            return self._selected(self.pit, weight, x, given or {}, out)
        return self._computed(weight, x, given, out)

    def _selected(
        self, pit: Pit, weight: Weight, x: Array, given: Mapping[str, Any], out: Array | None
    ) -> tuple[Array, Array]:
        """The same of mode="pit": what is not selected is what `out` was, 0 without."""
        selection = given.get(pit.axis.operand.name)
        if pit.axis.name == "experts" and selection is None:
            raise ArgumentError(f"{self}: routing= says which expert each token goes to")
        y, bound = self._computed(weight, x, given, out, selection)
        kept = self.operator.turned(pit.kept(selection, y.shape[self.operator.token_axis], self.pattern.M))
        old = np.zeros(y.shape) if out is None else np.asarray(out, np.float64)
        return np.where(kept, y, old), np.where(kept, bound, 0.0)

    def _computed(
        self, weight: Weight, x: Array, given: Mapping[str, Any] | None, out: Array | None, selection: Any = None
    ) -> tuple[Array, Array]:
        u = self.real.unit_roundoff
        x, scale = _quantized(x, self.operator.token_axis) if self.quantizes_x else (x, None)
        y, bound = self._sums(weight, np.asarray(x, np.float64))
        if self.pit:
            y, bound = (self.operator.turned(self.pit.routed(self.operator.turned(v), selection)) for v in (y, bound))
        given = {**(given or {}), **({} if scale is None else {QUANTIZED_X.operands[0].name: scale})}
        for step in self.epilogue:
            off: Any = 0.0
            if step.gate:
                given[step.operands[0].name], tolerance, y, bound = self._gated(step.gate, y, bound)
                off = (np.abs(y) + bound) * tolerance
            values = [
                np.asarray(0.0 if out is None else out, np.float64)
                if operand.kind == "out"
                else self._operand(operand, given.get(operand.name, operand.default), selection)
                for operand in step.operands
            ]
            before, y = y, step.numpy(y, *values)
            size = np.abs(before) + np.abs(y) + sum(np.abs(v) for v in values if np.all(np.isfinite(v)))
            bound = step.gain(*values) * bound + off + step.roundings * (u * size + self.real.smallest)
        kind = self.out_dtype
        y = np.clip(y, -kind.largest, kind.largest) if kind.bytes == 1 else y
        if kind is not self.real:
            bound = bound + (0.5 if kind is INT8 else kind.unit_roundoff * (np.abs(y) + bound) + kind.smallest)
        return y, bound

    def _sums(self, weight: Weight, x: Array) -> tuple[Array, Array]:
        """The product and its bound."""
        p, W = weight.pattern, _sliced_csr(weight)
        y = self.operator.product(W, x)
        if self.accumulator is INT32:  # exact, and rounded once when it becomes a real number
            return y, self.real.unit_roundoff * np.abs(y)
        entries = np.diff(p.indptr).repeat(p.R)[: p.M] * p.C
        factor = self._per_row(bound_factor(entries + 2, self._sum_roundoff))
        bound = factor * self.operator.product(abs(W), abs(x)) + self._per_row((entries + 2) * self._underflow)
        for half, other in ((self.dtype, x), (self.x_dtype, W.data)):
            if self._is_half(half):  # what is smaller may be read as zero
                top = np.abs(other[np.isfinite(other)]).max(initial=0.0)
                bound = bound + self._per_row(entries * (half.smallest * top))
        return y, bound

    def _gated(self, step: Epilogue, y: Array, bound: Array) -> tuple[Array, Array, Array, Array]:
        """Of a pair of weights: the gate and its bound, the sums that it gates and theirs."""
        axis, half = 1 - self.operator.token_axis, self.gate_rows
        (v, up), (b, rest) = (np.split(part, [half], axis) for part in (y, bound))
        v, b = (part.take(range(self.rows), axis) for part in (v, b))
        gate = step.numpy(v)
        rounding = step.roundings * (self.real.unit_roundoff * (np.abs(v) + np.abs(gate)) + self.real.smallest)
        return gate, step.gain() * b + rounding, up, rest

    @property
    def _sum_roundoff(self) -> float:
        """Of an addition: Hopper keeps about 14 bits in sums of float8 (DeepSeek-V3, arXiv:2412.19437, 3.3.2)."""
        return 2.0**-13 if self.dtype is FLOAT8 else self.accumulator.unit_roundoff

    @property
    def _underflow(self) -> float:
        """What a sum may lose when a product is added to it: the matrix units for half types flush subnormal sums.

        Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 2, VDPBF16PS and TDPBF16PS: no denormals.
        """
        half = self._is_half(self.dtype) or self._is_half(self.x_dtype)
        return BFLOAT16.smallest if half else self.accumulator.smallest

    def _is_half(self, dtype: DType) -> bool:
        return dtype.unit_roundoff > self.real.unit_roundoff

    def _per_row(self, v: Array) -> Array:
        return self.operator.turned(v if v.ndim > 1 else v[None])

    def _operand(self, operand: Operand, value: Any, selection: Any) -> Array:
        v: Array = np.asarray(value, np.float64)
        if self.pit and operand.kind == "row":
            return self._per_row(self.pit.routed(v, selection))
        if operand.kind in ("token", "inside") and v.ndim:
            return v.reshape((-1, 1) if self.operator.token_axis == 0 else (1, -1))
        return self._per_row(v) if operand.kind == "row" else v


def as_problem(
    operator: str,
    pattern: Pattern,
    dtype: DTypeLike | DType,
    x_dtype: DTypeLike | DType | None = None,
    out_dtype: DTypeLike | DType | None = None,
    epilogue: str | Sequence[str] = (),
    n: int | None = None,
    quantize_x: bool = False,
    pit: Pit | None = None,
) -> Problem:
    """What `bsrgen.compile` is asked for with these arguments.  ArgumentError, ArgumentTypeError, UnsupportedError."""
    w, x, y = as_types(dtype, x_dtype, out_dtype)
    if quantize_x and not (w is INT8 and x is not INT8):
        raise UnsupportedError(
            f"quantize_x with W of {w.name} and X of {x.name}: it makes int8 of X of float32 or bfloat16, for W of int8"
        )
    user = as_epilogues(epilogue)
    steps = composed(user, w, x, y, quantize_x)
    if pit and (quantize_x or any(step.gate for step in user)):
        raise UnsupportedError(
            "mode='pit' with quantize_x, swiglu or geglu: quantise X, or gate, outside of the kernel"
        )
    problem = Problem(as_operator(operator), pattern, w, steps, n, x, y, pit)
    if any(step.gate for step in user[1:]):
        raise ArgumentError(f"epilogue {[step.name for step in user]}: swiglu and geglu come first, and once")
    if y is INT8 and any(operand.kind == "out" for step in steps for operand in step.operands):
        raise UnsupportedError(
            f"{problem}: 'accumulate' adds to real numbers, and out is int8; use out_dtype='float32'"
        )
    most = pattern.longest_row * pattern.C
    if problem.accumulator is INT32 and most * 127 * 128 > INT32.largest:
        raise UnsupportedError(
            f"{problem}: a row of {most} stored entries may overflow int32 sums; use x_dtype='float32', or split W"
        )
    return problem


def _quantized(x: Array, token_axis: int) -> tuple[Array, Array]:
    """(X as int8 in float32, x_scale[n]) in the very operations of the kernel (templates/c/quantize.c.j2)."""
    x = np.asarray(x, np.float32)
    with np.errstate(all="ignore"):
        top = np.fmax.reduce(np.abs(x), axis=1 - token_axis, initial=np.float32(127 * 2.0**-126))
        inverse, scale = np.float32(127) / top, top / np.float32(127)
        scaled = np.nan_to_num(np.rint(x * np.expand_dims(inverse, 1 - token_axis)), nan=0.0)
    scale[np.isnan(x).any(axis=1 - token_axis)] = np.nan
    return np.clip(scaled, -127, 127), scale


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType) -> Any:
    if dtype is INT8:
        return rng.integers(-127, 127, shape, np.int8, endpoint=True)
    return rng.standard_normal(shape).astype(dtype.numpy)


def _sliced_csr(weight: Weight) -> Any:
    """W as float64 CSR of the user's shape, stored zeros kept out of nobody's way."""
    p = weight.pattern
    if p.R == p.C == 1:  # CSR as it lies: the way through BSR took a tenth of a cold compile of 3,000,000 elements
        from scipy.sparse import csr_array

        return csr_array((weight.data.reshape(-1).astype(np.float64), p.indices, p.indptr), shape=p.shape)
    W = weight.tobsr().astype(np.float64).tocsr()
    return W if W.shape == p.shape else W[: p.M, : p.K]
