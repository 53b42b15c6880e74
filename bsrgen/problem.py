"""Problem: what to compute, without saying how."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen import epilogues
from bsrgen.dtypes import ACCUMULATORS, DTYPES, FLOAT32, INT8, DType, bound_factor
from bsrgen.epilogues import Epilogue, Operand
from bsrgen.operators import Operator, kernel_name
from bsrgen.pattern import Pattern, Weight

Array = NDArray[Any]


@dataclass(frozen=True)
class Problem:
    """One operator with one fixed pattern: Y = epilogue(product(W, X)), row-major, N chosen at each call."""

    operator: Operator
    pattern: Pattern
    dtype: DType  # of W as it is stored
    epilogue: tuple[Epilogue, ...] = ()
    n: int | None = field(default=None, compare=False)  # a hint for the planner, never baked in
    x_dtype: DType = None  # type: ignore[assignment]  # of X; None: the weight's
    out_dtype: DType = None  # type: ignore[assignment]  # of Y; None: X's, float32 where that is int8

    def __post_init__(self) -> None:
        x = self.x_dtype or self.dtype
        object.__setattr__(self, "x_dtype", x)
        object.__setattr__(self, "out_dtype", self.out_dtype or (FLOAT32 if x is INT8 else x))

    def __str__(self) -> str:
        p = self.pattern
        steps = f" + {', '.join(step.name for step in self.epilogue)}" if self.epilogue else ""
        return f"{self.operator.name} {self.dtype.name} {p.M}x{p.K} blocks {p.R}x{p.C} density {p.density:.3g}{steps}"

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The operands of the epilogue, in the order of the C signature."""
        return epilogues.operands_of(self.epilogue)

    @cached_property
    def name(self) -> str:
        """Name of the kernel and prefix of its C symbols."""
        p, steps = self.pattern, [step.name for step in self.epilogue]
        return kernel_name(self.operator.name, self.dtype, p.shape, p.blocksize, p.digest, steps)

    @property
    def accumulator(self) -> DType:
        """The type that sums are kept in: of int8 W with float X, X's."""
        return ACCUMULATORS[(self.x_dtype if self.dtype is INT8 else self.dtype).accumulator]

    @property
    def real(self) -> DType:
        """The type that the epilogue computes in, and of its operands per row, per token and scalar."""
        return DTYPES[self.dtype.real]

    def operand_dtype(self, operand: Operand) -> DType:
        """Type of an operand in memory: of Y for those shaped like Y, where that is a floating type."""
        like_y = operand.kind in ("element", "out") and self.out_dtype is not INT8
        return self.out_dtype if like_y else self.real

    def flop(self, n: int) -> int:
        """Effective FLOP of a call: 2 * stored elements * N."""
        return 2 * self.pattern.nnz * n

    def sample(self, rng: np.random.Generator, n: int) -> tuple[Array, dict[str, Any]]:
        """Random X of n tokens and random operands, for checks and timings."""
        x = rng.standard_normal(self.operator.shape(n, self.pattern.K)).astype(self.dtype.numpy)
        shapes = {"row": (self.pattern.M,), "element": self.operator.shape(n, self.pattern.M), "scalar": ()}
        given = {o.name: rng.standard_normal(shapes[o.kind]).astype(self.dtype.numpy) for o in self.operands}
        return x, given

    def reference(
        self, weight: Weight, x: Array, given: Mapping[str, Any] | None = None, out: Array | None = None
    ) -> tuple[Array, Array]:
        """(Y, bound) in float64: the right answer and the elementwise error a kernel may make (DESIGN section 6).

        |y - Y| <= g(k + 2) (|W| |x|), k stored entries of that row, carried through the epilogue by each step's gain,
        plus the roundings of the step itself.
        """
        p = self.pattern
        W = _sliced_csr(weight)
        x64 = np.asarray(x, np.float64)
        u = self.accumulator.unit_roundoff
        y = self.operator.product(W, x64)
        entries = np.diff(p.indptr).repeat(p.R)[: p.M] * p.C
        factor = self._per_row(bound_factor(entries + 2, u))
        tiny = float(np.finfo(self.accumulator.name).smallest_subnormal)  # a product may underflow by as much
        bound = factor * self.operator.product(abs(W), abs(x64)) + self._per_row((entries + 2) * tiny)
        for step in self.epilogue:
            values = [
                np.asarray(0.0 if out is None else out, np.float64)
                if operand.kind == "out"
                else self._operand(operand, (given or {}).get(operand.name, operand.default))
                for operand in step.operands
            ]
            before, y = y, step.numpy(y, *values)
            size = np.abs(before) + np.abs(y) + sum(np.abs(v) for v in values if np.all(np.isfinite(v)))
            bound = step.gain(*values) * bound + step.roundings * u * size
        return y, bound

    def _per_row(self, v: Array) -> Array:
        return v if self.operator.token_axis == 0 else v[:, None]

    def _operand(self, operand: Operand, value: Any) -> Array:
        value = np.asarray(value, np.float64)
        return self._per_row(value) if operand.kind == "row" else value


def _sliced_csr(weight: Weight) -> Any:
    """W as float64 CSR of the user's shape, stored zeros kept out of nobody's way."""
    p = weight.pattern
    return weight.tobsr().astype(np.float64).tocsr()[: p.M, : p.K]
