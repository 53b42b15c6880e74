"""PatternProblem: a product of dense arrays at a block pattern (gradients, attention), without saying how."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bsrgen.dtypes import DTYPES, INT8, DType, as_dtype, bound_factor
from bsrgen.epilogues import ACCUMULATE, SCALE, Epilogue, Operand, as_epilogues, operands_of
from bsrgen.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from bsrgen.operators import ATTENTION, LINEAR_GRAD, PATTERN_OPERATORS, SDDMM, SOFTMAX, PatternOperator, kernel_name
from bsrgen.pattern import Pattern

Array = NDArray[Any]
EXP_FLOP = 20  # what an exponential counts as
STRIP = 256  # queries of attention that the reference takes together
PRODUCTS = (SDDMM.name, LINEAR_GRAD.name, SOFTMAX.name)  # what `compile` makes of a pattern alone
BACKENDS = ("c", "cuda")  # that have them
STEPS = (SCALE, ACCUMULATE)  # epilogues that make sense of sums that are a weight's gradient, each once


@dataclass(frozen=True, eq=False)
class Mask:
    """Which elements of cut blocks count: bits uint8[kinds, R, ceil(C / 8)], the first column in the lowest bit, and
    for each stored block its kind + 1, or 0 where all of it counts: uint32[nnzb]."""

    kinds: Array
    bits: Array

    def dense(self, p: Pattern) -> Array:
        """bool[M, K]: the elements that count."""
        return self.strip(p, 0, p.block_rows)

    def strip(self, p: Pattern, i0: int, i1: int) -> Array:
        """The same of block rows [i0, i1)."""
        here = slice(p.indptr[i0], p.indptr[i1])
        whole = np.ones((1, p.R, p.C), bool)
        cut = np.unpackbits(self.bits, axis=2, bitorder="little")[:, :, : p.C].astype(bool)
        out = np.zeros((i1 - i0, p.R, p.block_cols, p.C), bool)
        out[p.rows[here] - i0, :, p.indices[here], :] = np.concatenate((whole, cut))[self.kinds[here]]
        return out.reshape((i1 - i0) * p.R, p.block_cols * p.C)[: p.M - i0 * p.R, : p.K]


def no_mask(p: Pattern) -> Mask:
    """All of every stored block counts."""
    return Mask(np.zeros(p.nnzb, np.uint32), np.zeros((0, p.R, -(-p.C // 8)), np.uint8))


@dataclass(frozen=True)
class PatternProblem:
    """One row of PATTERN_OPERATORS with one fixed pattern; N is chosen at each call."""

    operator: PatternOperator
    pattern: Pattern
    dtype: DType  # of the inputs
    epilogue: tuple[Epilogue, ...] = ()
    n: int | None = field(default=None, compare=False)
    head: int = 0
    mask: Mask | None = None

    def __str__(self) -> str:
        p = self.pattern
        steps = f" + {', '.join(step.name for step in self.epilogue)}" if self.epilogue else ""
        head = f" heads of {self.head}" if self.head else ""
        types = self.dtype.name + ("" if self.dtype is self.real else f" -> {self.real.name}")
        return f"{self.operator.name} {types} {p.M}x{p.K}{head} blocks {p.R}x{p.C} density {p.density:.3g}{steps}"

    @property
    def operands(self) -> tuple[Operand, ...]:
        """What a call takes beside the inputs."""
        return operands_of(self.epilogue)

    @property
    def pit(self) -> None:
        """Nothing is left out."""
        return None

    @property
    def real(self) -> DType:
        """The type of the sums and of the result."""
        return DTYPES[self.dtype.real]

    x_dtype = read_dtype = property(lambda self: self.dtype)
    out_dtype = accumulator = property(lambda self: self.real)

    @cached_property
    def name(self) -> str:
        """Name of the kernel and prefix of its C symbols."""
        p, types = self.pattern, (self.dtype, self.dtype, self.real)
        return kernel_name(
            self.operator.name, *types, p.shape, p.blocksize, p.digest, [step.name for step in self.epilogue]
        )

    def flop(self, n: int) -> int:
        """Effective FLOP of a call: 2 * stored elements * N, of attention twice for each element of a head; of softmax
        EXP_FLOP an element."""
        if self.operator is SOFTMAX:
            return EXP_FLOP * self.pattern.nnz * n
        return 2 * self.pattern.nnz * n * (2 * self.head if self.head else 1)

    def shape(self, which: str, n: int) -> tuple[int, ...]:
        """The shape of an input, from its letters in the operator's row."""
        p = self.pattern
        size = {"M": p.M, "K": p.K, "N": n, "D": self.head, "B": p.nnzb, "R": p.R, "C": p.C}
        return tuple(size[letter] for letter in which)

    @property
    def numbers(self) -> dict[str, float]:
        """What a check gives beside random inputs: a scale that shows, and `out` is not read."""
        names = {step.name for step in self.epilogue}
        beta = {"beta": 0.0} if ACCUMULATE.name in names else {}
        return beta | ({"scale": 0.5} if SCALE.name in names or self.operator.headed else {})

    def result_shape(self, n: int) -> tuple[int, ...]:
        """The shape of the result."""
        p = self.pattern
        shape = (p.M, self.head) if self.operator is ATTENTION else (p.nnzb, p.R, p.C)
        return (n, *shape) if self.operator.headed else shape

    def sample(self, rng: np.random.Generator, n: int) -> list[Array]:
        """Random inputs."""
        shapes = [self.shape(letters, n) for _, letters in self.operator.inputs]
        return [np.asarray(rng.standard_normal(shape)).astype(self.dtype.numpy) for shape in shapes]

    def reference(self, inputs: Sequence[Array], scale: Any = 1.0) -> tuple[Array, Array]:
        """(result, bound) in float64.  Of products |y - Y| <= g(N + 4) |scale| |A| |B|, as ever (DESIGN section 6).

        Of attention, with d the largest bound of a query's scores, g(D + 4) |scale| |Q| |K| and a rounding: weights
        e^(score - largest) and their sum each move by a factor of e^(2 d) at most, sums have g(count + 16) more.
        """
        real = [np.asarray(a, np.float64) for a in inputs]
        if self.operator is ATTENTION:
            return self._attention(real, float(scale))
        if self.operator is SOFTMAX:
            return self._softmax(real[0], float(scale))
        a, b = real if self.operator is SDDMM else [v.T for v in real]
        p, n = self.pattern, a.shape[1]
        rows = np.broadcast_to(np.asarray(scale, np.float64), (p.M,))
        factor = bound_factor(n + 4, self.real.unit_roundoff)
        tiny = (n + 4) * max(self.real.smallest, self.dtype.smallest if self.dtype is not self.real else 0.0)
        size = _blocks(p, np.abs(rows[:, None] * a)) @ _blocks(p, np.abs(b), columns=True).transpose(0, 2, 1)
        exact = _blocks(p, rows[:, None] * a) @ _blocks(p, b, columns=True).transpose(0, 2, 1)
        return exact, factor * size + tiny

    def _softmax(self, s: Array, scale: float) -> tuple[Array, Array]:
        p, u = self.pattern, self.real.unit_roundoff
        counts = (self.mask or no_mask(p)).dense(p)
        dense = np.full((s.shape[0], p.block_rows, p.R, p.block_cols, p.C), -np.inf)
        dense[:, p.rows, :, p.indices, :] = scale * s.transpose(1, 0, 2, 3)
        padded = np.zeros((p.block_rows * p.R, p.block_cols * p.C), bool)
        padded[: p.M, : p.K] = counts
        rows = np.where(padded, dense.reshape(s.shape[0], *padded.shape), -np.inf)
        top = rows.max(axis=2, initial=-np.inf, keepdims=True)
        w = np.exp(rows - np.where(np.isfinite(top), top, 0))
        total = w.sum(axis=2, keepdims=True)
        w = np.divide(w, total, where=total > 0, out=np.zeros(w.shape))
        off = 2 * u * np.abs(np.where(padded, rows, 0)).max(axis=2, initial=0)
        w, relative = (
            a.reshape(s.shape[0], p.block_rows, p.R, p.block_cols, p.C)[:, p.rows, :, p.indices, :].transpose(
                1, 0, 2, 3
            )
            for a in (w, np.broadcast_to((4 * off + bound_factor(padded.sum(axis=1) + 16, u))[:, :, None], w.shape))
        )
        return w, relative * w + 64 * self.real.smallest

    def _attention(self, inputs: Sequence[Array], scale: float) -> tuple[Array, Array]:
        """Strip by strip of a few block rows, and of keys that they see."""
        q, k, v = inputs
        p, u, mask = self.pattern, self.real.unit_roundoff, self.mask or no_mask(self.pattern)
        y = np.zeros(q.shape)
        bound = np.full(q.shape, 64 * self.real.smallest)
        step = max(STRIP // p.R, 1)
        for i in range(0, p.block_rows, step):
            stop = min(i + step, p.block_rows)
            seen = p.indices[p.indptr[i] : p.indptr[stop]]
            keys = slice(int(seen.min(initial=p.block_cols)) * p.C, (int(seen.max(initial=-1)) + 1) * p.C)
            rows = slice(i * p.R, stop * p.R)
            counts = mask.strip(p, i, stop)[:, keys]
            size = np.abs(q[:, rows]) @ np.abs(k[:, keys]).transpose(0, 2, 1) * abs(scale)
            s = np.where(counts, scale * (q[:, rows] @ k[:, keys].transpose(0, 2, 1)), -np.inf)
            off = np.where(counts, (bound_factor(self.head + 4, u) + u) * size, 0).max(axis=2, initial=0)
            top = np.max(s, axis=2, initial=-np.inf, keepdims=True)
            w = np.exp(s - np.where(np.isfinite(top), top, 0))
            total = w.sum(axis=2, keepdims=True)
            w = np.divide(w, total, where=total > 0, out=np.zeros(w.shape))
            y[:, rows] = w @ v[:, keys]
            relative = (np.expm1(4 * off) + bound_factor(counts.sum(axis=1) + 16, u))[:, :, None]
            bound[:, rows] += relative * (w @ np.abs(v[:, keys]))
        return y, bound


def _blocks(p: Pattern, a: Array, columns: bool = False) -> Array:
    """[nnzb, R or C, N]: for each stored block its rows of `a`, or those of its columns."""
    size, number, at = (p.C, p.block_cols, p.indices) if columns else (p.R, p.block_rows, p.rows)
    padded = np.zeros((number * size, a.shape[1]))
    padded[: a.shape[0]] = a
    return padded.reshape(number, size, a.shape[1])[at]


def as_pattern_problem(
    operator: str, pattern: Pattern, dtype: DTypeLike | DType, out_dtype: DTypeLike | DType | None = None,
    epilogue: str | Sequence[str] = (), n: int | None = None, head: int = 0, mask: Mask | None = None,
) -> PatternProblem:  # fmt: skip
    """What is asked for with these arguments.  ArgumentError, ArgumentTypeError, UnsupportedError."""
    row, dtype, steps = PATTERN_OPERATORS[operator], as_dtype(dtype), as_epilogues(epilogue)
    if dtype is INT8:
        raise UnsupportedError(
            f"operator {operator!r} with dtype 'int8': it multiplies float32, float64, bfloat16, float16"
        )
    real = DTYPES[dtype.real]
    if out_dtype is not None and as_dtype(out_dtype) is not real:
        raise UnsupportedError(
            f"operator {operator!r} of {dtype.name} writes {real.name}, not {as_dtype(out_dtype).name}"
        )
    able = () if row.headed else STEPS
    for number, step in enumerate(steps):
        if step not in able or step in steps[:number]:
            have = f"takes {', '.join(s.name for s in able)}, each once" if able else "has no epilogue"
            raise UnsupportedError(f"epilogue {step.name!r} of operator {operator!r}, which {have}")
    if [step.name for step in steps] == ["accumulate", "scale"]:
        raise UnsupportedError(f"epilogue of operator {operator!r}: 'scale' comes before 'accumulate'")
    if row is ATTENTION and head < 1:
        raise ArgumentError(f"operator 'attention' needs the size of a head: use bsrgen.attention.compile, not {head}")
    if math.prod(pattern.blocksize) > 1 << 24:
        raise UnsupportedError(f"blocks of {pattern.R}x{pattern.C}: sampled products take up to 2^24 elements a block")
    return PatternProblem(row, pattern, dtype, steps, n or (1 if row.headed else None), head, mask)


def refuse_values(operator: str, backend: str, operands: Mapping[str, Any], **options: Any) -> None:
    """Refuse what `compile` has for weights, but not for PRODUCTS.  UnsupportedError, ArgumentTypeError."""
    if backend not in ("auto", *BACKENDS):
        raise UnsupportedError(f"operator {operator!r} with backend={backend!r}: it is of {', '.join(BACKENDS)}")
    refuse(f"operator {operator!r}", **options)
    if operands:
        raise ArgumentTypeError(f"operator {operator!r}: {', '.join(operands)} come with the call")


def refuse(what: str, **options: Any) -> None:
    """Refuse each of `options` that says something.  UnsupportedError."""
    for name, value in options.items():
        if value is not None and value is not False and value != "":
            raise UnsupportedError(f"{what} with {name}={value!r}: the two do not go together; leave one out")
