"""The epilogues: what happens to the accumulator `v` before it is stored.  One formula each, for every backend.

A formula is C over one vector (or scalar) `v`.  It may use + - * /, comparisons through v_max and v_min, R(c) for
literals, the functions of runtime/bsrgen_math.h, and its operands by name.  Of two products in a sum one is rounded():
compilers contract either, and bits would depend on which.  `numpy` is its twin in float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bsrgen.dtypes import DTYPES, INT8, INT32, UINT8, DType
from bsrgen.errors import ArgumentError, ArgumentTypeError

Array = NDArray[Any]
Kind = Literal["row", "token", "element", "scalar", "out", "inside", "gate", "live", "routing", "mask"]
SELECTING = ("live", "routing", "mask")  # what a call of mode="pit" computes: bsrgen.pit
OPTIONAL = ("live", "mask")  # of these; without, all is computed


@dataclass(frozen=True, slots=True)
class Operand:
    """An input of an epilogue: one value per output feature ("row"), per token or for all of them ("token"), per output
    ("element"), or one ("scalar").  Scalars and values per token have a default, other arrays have not.

    Not the caller's are "out", the old content of `out`, and what the kernel makes itself: "inside" for each token,
    "gate" for each output.

    What is to be computed in mode="pit" is said by "live", nonzero for each token; "routing", the number of its expert
    for each token, negative for none; and "mask", nonzero for each block of outputs.
    """

    name: str
    kind: Kind
    default: float | None = None
    symbol: str = ""  # what the formula calls it, where `name` is numbered
    positive: bool = False  # a scale: other values are refused


@dataclass(frozen=True, slots=True)
class Epilogue:
    """One step, elementwise."""

    name: str
    c: str
    numpy: Callable[..., Array]
    operands: tuple[Operand, ...] = ()
    flop: int = 1  # per output, for the cost model
    gain: Callable[..., Any] = lambda *operands: 1.0  # by how much the step can grow an error in v: its Lipschitz bound
    roundings: int = 1  # of the step itself, in units of |v| + |result| + |operands|
    gate: "Epilogue | None" = None  # what the sums of the first of two weights that share X go through: their `gate`

    def __reduce__(self) -> Any:
        return _with_operands, (self.name, self.operands)  # from the row: its functions cannot be pickled


def _erf(v: Array) -> Array:
    from scipy.special import erf

    return np.asarray(erf(v))


def _sigmoid(v: Array) -> Array:
    from scipy.special import expit

    return np.asarray(expit(v))


def _gelu_tanh(v: Array) -> Array:
    return np.asarray(0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))))


def _at_most(gain: float) -> Callable[..., float]:
    return lambda *operands: gain


BIAS = Epilogue("bias", "v + bias", lambda v, bias: v + bias, (Operand("bias", "row"),))
SCALE = Epilogue("scale", "v * scale", lambda v, scale: v * scale, (Operand("scale", "row"),), gain=np.abs)
RELU = Epilogue("relu", "v_max(v, splat(R(0)))", lambda v: np.maximum(v, 0))
GELU = Epilogue(
    "gelu",
    "v * v_normcdf(v)",
    lambda v: v * 0.5 * (1 + _erf(v / np.sqrt(2))),
    flop=40,
    gain=_at_most(1.13),
    roundings=4,
)
GELU_TANH = Epilogue(
    "gelu_tanh",  # 0.5 (1 + tanh z) = sigmoid(2 z); Hendrycks, Gimpel, arXiv 1606.08415, section 2
    "v * v_sigmoid(v * (R(1.5957691216057308) + R(0.07135481627260025) * (v * v)))",
    _gelu_tanh,
    flop=35,
    gain=_at_most(1.13),
    roundings=8,
)
SILU = Epilogue("silu", "v * v_sigmoid(v)", lambda v: v * _sigmoid(v), flop=30, gain=_at_most(1.1), roundings=4)
SIGMOID = Epilogue("sigmoid", "v_sigmoid(v)", _sigmoid, flop=30, gain=_at_most(0.25), roundings=4)
TANH = Epilogue("tanh", "v_tanh(v)", np.tanh, flop=30, roundings=4)
CLAMP = Epilogue(
    "clamp",
    "v_min(v_max(v, splat(lo)), splat(hi))",
    lambda v, lo, hi: np.clip(v, lo, hi),
    (Operand("lo", "scalar", -np.inf), Operand("hi", "scalar", np.inf)),
    flop=2,
)
TOKEN_SCALE = Epilogue(  # a router's weight, or a mask of tokens
    "token_scale",
    "v * token_scale",
    lambda v, token_scale: v * token_scale,
    (Operand("token_scale", "token", 1.0),),
    gain=np.abs,
)
RESIDUAL = Epilogue("residual", "v + residual", lambda v, residual: v + residual, (Operand("residual", "element"),))
# Of two weights that share X: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202, section 2.
SWIGLU, GEGLU = (
    Epilogue(name, "v * gate", lambda v, gate: v * gate, (Operand("gate", "gate"),), 1 + step.flop, np.abs, gate=step)
    for name, step in (("swiglu", SILU), ("geglu", GELU))
)
ACCUMULATE = Epilogue(
    "accumulate",  # BLAS: out = alpha * v + beta * out; beta = 0 does not read out (NaN there is not propagated)
    "beta == 0 ? alpha * v : rounded(alpha * v) + beta * out",
    lambda v, alpha, beta, out: alpha * v + (beta * out if np.any(beta) else 0),
    (Operand("alpha", "scalar", 1.0), Operand("beta", "scalar", 1.0), Operand("out", "out")),
    flop=3,
    gain=lambda alpha, beta, out: np.abs(alpha),
    roundings=4,
)

# Steps that int8 brings itself: W[m, k] = w_scale[m] * w and X[n, k] = x_scale[n] * x, symmetric, zero points are 0.
W_SCALE = Epilogue(
    "w_scale", "v * w_scale", lambda v, w_scale: v * w_scale, (Operand("w_scale", "row", positive=True),), gain=np.abs
)
X_SCALE = Epilogue(
    "x_scale",
    "v * x_scale",
    lambda v, x_scale: v * x_scale,
    (Operand("x_scale", "token", 1.0, positive=True),),
    gain=np.abs,
)
QUANTIZED_X = Epilogue(  # the kernel quantises X itself, and x_scale with it
    "quantized_x", "v * x_scale", lambda v, x_scale: v * x_scale, (Operand("x_scale", "inside"),), gain=np.abs
)
QUANTIZE = Epilogue(  # the store rounds to the nearest integer in [-127, 127]
    "quantize",
    "v / y_scale",
    lambda v, y_scale: v / y_scale,
    (Operand("y_scale", "scalar", 1.0, positive=True),),
    gain=lambda y_scale: 1 / np.abs(y_scale),
)

EPILOGUES = {
    row.name: row
    for row in (BIAS, SCALE, TOKEN_SCALE, RELU, GELU, GELU_TANH, SILU, SIGMOID, TANH, CLAMP, RESIDUAL, ACCUMULATE)
}
GATED = {row.name: row for row in (SWIGLU, GEGLU)}  # the first step of a pair of weights
CHOICES = EPILOGUES | GATED
STEPS = CHOICES | {row.name: row for row in (W_SCALE, X_SCALE, QUANTIZED_X, QUANTIZE)}


def as_epilogues(names: str | Sequence[str]) -> tuple[Epilogue, ...]:
    """The rows of `names`, in order.  An epilogue that comes a second time numbers its operands: bias, bias2."""
    names = (names,) if isinstance(names, str) else tuple(names) if isinstance(names, (list, tuple)) else names
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise ArgumentTypeError(f"epilogue={names!r}: a name or a sequence of names, of {', '.join(CHOICES)}")
    for name in names:
        if name not in CHOICES:
            raise ArgumentError(f"epilogue {name!r}: one of {', '.join(CHOICES)}")
    return steps_of(names)


def steps_of(names: Sequence[str]) -> tuple[Epilogue, ...]:
    """The rows of a kernel's own list of steps, those of int8 among them."""
    earlier = [names[:i].count(name) for i, name in enumerate(names)]
    return tuple(
        _numbered(STEPS[name], count + 1) if count else STEPS[name] for name, count in zip(names, earlier, strict=True)
    )


def composed(steps: Sequence[Epilogue], w: DType, x: DType, y: DType, quantize_x: bool = False) -> tuple[Epilogue, ...]:
    """`steps` with those that int8 brings: its sums become real numbers before, and real numbers become int8 after."""
    scale = (QUANTIZED_X,) if quantize_x else (X_SCALE,) if x is INT8 else ()
    before = (*((W_SCALE,) if w is INT8 else ()), *scale)
    return (*before, *steps, *((QUANTIZE,) if y is INT8 else ()))


def _numbered(step: Epilogue, number: int) -> Epilogue:
    operands = tuple(
        operand if operand.kind == "out" else replace(operand, name=f"{operand.name}{number}", symbol=operand.name)
        for operand in step.operands
    )
    return replace(step, operands=operands)


def _with_operands(name: str, operands: tuple[Operand, ...]) -> Epilogue:
    return replace(STEPS[name], operands=operands)


_NOT_GIVEN = ("out", "inside", "gate")


def pair_of(steps: Sequence[Epilogue]) -> Epilogue | None:
    """The step that makes one result of two weights, if there is one."""
    return next((step for step in steps if step.gate), None)


def gate_rows(steps: Sequence[Epilogue], rows: int, block_rows: int) -> int:
    """Of `rows` stacked rows, those of the gate, whole blocks; the result has one for each of the rest."""
    return -(-rows // (2 * block_rows)) * block_rows if pair_of(steps) else 0


def operands_of(steps: Sequence[Epilogue]) -> tuple[Operand, ...]:
    """The operands that a call must or may give, in the order of the C signature."""
    return tuple(operand for step in steps for operand in step.operands if operand.kind not in _NOT_GIVEN)


def operand_dtype(operand: Operand, w: DType, y: DType) -> DType:
    """Type of an operand in memory: of Y for those shaped like Y, where that is a floating type; else what the epilogue
    computes in."""
    if operand.kind in SELECTING:
        return INT32 if operand.kind == "routing" else UINT8
    return y if operand.kind in ("element", "out") and y is not INT8 else DTYPES[w.real]
