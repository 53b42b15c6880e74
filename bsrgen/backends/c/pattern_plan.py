"""Products at a block pattern on the CPU: the plan, and what it costs."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.backends.c.products import FMA, Product, products
from bsrgen.operators import ATTENTION, LINEAR_GRAD, SDDMM, SOFTMAX
from bsrgen.pattern_problem import PatternProblem
from bsrgen.plan import Counts, Plan
from bsrgen.targets import Target

Array = NDArray[Any]
CHUNK_BYTES = 1024  # most of a panel row: what the sums are folded for, and how few rows stay in L1
OUTER_CHUNK = 128  # units of tokens: of the block row of A and two vectors of columns of B, what L1 holds
TILE_COLS = 12  # at most, with lanes along rows: each column is an address that a register holds
HELD = 8  # vectors of A that stay in registers where a block has one row
FOLD = 3.0  # vector operations for each vector of sums that is folded, put in its place or added to what was there
EXP = 20.0  # the same for each vector of weights


@dataclass(frozen=True)
class PatternPlan(Plan):
    """Lanes along columns, rows broadcast, where blocks are whole vectors of columns; for `linear_grad` along rows,
    columns broadcast, where they are whole vectors of those.  Else, and for pairs of bfloat16 of `sddmm`, along N; a
    register tile of rows x columns, as many as lanes, is folded into one vector in the end.
    Attention: lanes along keys, then along the elements of a head.
    """

    problem: PatternProblem  # type: ignore[assignment]

    def __str__(self) -> str:
        if self.problem.operator is SOFTMAX:
            return f"{self.target.name}: row by row, lanes along its stored elements"
        if self.problem.head:
            return f"{self.target.name}: {self.rows} queries x {self.vectors} vectors of keys, scores of a row in L1"
        if self.outer:
            return f"{self.target.name}: lanes along columns, {self.rows} rows x {self.vectors} vectors{self._how}"
        if self.upright:
            return f"{self.target.name}: lanes along rows, {self.vectors} vectors x {self.cols} columns{self._how}"
        tile = f"{self.rows} rows x {self.cols} columns"
        return f"{self.target.name}: lanes along N, {tile}, chunks of {self.chunk}{self._how}"

    @property
    def _how(self) -> str:
        return "" if self.product is FMA else f", {self.product.name} dot products"

    dense = zero_filled = False

    @property
    def product(self) -> Product:
        """How units are multiplied: pairs of bfloat16 where they lie side by side in both arrays, or one below the
        other in whole vectors."""
        paired = self.problem.operator is SDDMM or bool(self.outer or self.upright)
        return self._pairs if paired else FMA

    @property
    def _pairs(self) -> Product:
        return products(self.problem, self.target)[0]  # type: ignore[arg-type]

    @property
    def lanes(self) -> int:
        """Sums in one vector."""
        return self.target.lanes(self.problem.real.bytes)

    @property
    def outer(self) -> int:
        """Rows of the register tile with lanes along columns; 0 where the block is too narrow or too low for one."""
        s, p = self.problem, self.problem.pattern
        vectors = self._vectors(p.C)
        most = (self.target.registers * 3 // 4) // vectors
        pairs = s.operator is SDDMM and self.product is not FMA
        if s.operator.headed or pairs or p.C % (vectors * self.lanes):
            return 0
        best = max(rows for rows in range(1, most + 1) if p.R % rows == 0)
        return best if 2 * best * vectors >= self.target.registers // 2 else 0

    @property
    def upright(self) -> bool:
        """Whether lanes lie along rows: not where a column brings a broadcast for each multiply-add or its results lie
        apart, but for pairs (1536x384, density 0.2, N = 512, one core of Zen 5, GFLOP/s along rows and along N: float32
        32x1 210 and 182, 16x1 131 and 177, 32x8 171 and 183; bfloat16 368 and 189, 257 and 183, 319 and 192)."""
        s, p = self.problem, self.problem.pattern
        if s.operator is not LINEAR_GRAD or self.outer or p.R % self.lanes:
            return False
        return self._pairs is not FMA or (p.C == 1 and self.lanes < p.R)

    @property
    def as_it_lies(self) -> bool:
        """Whether lanes along rows need no panel of B: its columns are read where the caller has them."""
        s = self.problem
        return s.dtype is s.real and s.pattern.K % s.pattern.C == 0

    @property
    def rows(self) -> int:
        """Rows of the register tile: folded, a square one as far as the block goes."""
        if self.problem.head:
            return 8 if self.target.registers > 16 else 4
        if self.outer:
            return self.outer
        if self.upright:
            return self.vectors * self.lanes
        fits = 1 << (self.lanes.bit_length() - 1) // 2
        return min(fits, 1 << (self.problem.pattern.R.bit_length() - 1))

    @property
    def cols(self) -> int:
        """Columns of the register tile, of one block or of neighbours in a block row."""
        if self.upright:
            return min(self.target.registers * 3 // 4 // self.vectors, TILE_COLS)
        return max(self.lanes // self.rows, 1)

    @property
    def vectors(self) -> int:
        """Vectors of the register tile with lanes along columns, rows or keys."""
        return self._vectors(self.problem.pattern.R if self.upright else self.problem.pattern.C)

    def _vectors(self, count: int) -> int:
        whole = count // self.lanes
        return 2 if self.problem.operator.headed or whole % 2 == 0 else 3 if whole % 3 == 0 else 1

    @property
    def chunk(self) -> int:
        """Units of N that are packed and summed at a time: a block row of A stays in L1."""
        if self.outer or self.upright:
            return OUTER_CHUNK
        if self.rows == 1:
            return HELD * self.lanes
        room = 3 * self.target.l1_bytes // 4 // self.problem.pattern.R
        unit = self.lanes * self.problem.real.bytes
        return max(min(room, CHUNK_BYTES) // unit, 4) * self.lanes

    @property
    def row_group(self) -> int:
        """Block rows of A that are packed together: whole vectors of rows."""
        return -(-64 // self.problem.pattern.R)

    @property
    def row_scores(self) -> int:
        """Scores of a query that are kept: for the keys of its block row, rows not in the same set of L1."""
        p = self.problem.pattern
        width = self.padded(p.C) if self.problem.head else p.C
        return int(p.row_counts.max(initial=0)) * width + self.lanes

    def padded(self, count: int) -> int:
        """`count` in whole vectors."""
        return -(-count // self.lanes) * self.lanes

    @property
    def along(self) -> str:
        """What a folded tile goes along: rows, their columns side by side, or columns where that is how data lies."""
        p = self.problem.pattern
        return "columns" if p.C == 1 and p.R % self.rows == 0 and self.rows > 1 else "rows"

    @property
    def run(self) -> int:
        """Results of a whole tile that lie side by side in data."""
        p = self.problem.pattern
        if self.along == "columns":
            return self.rows
        return self.cols if p.R == 1 or p.C % self.cols == 0 else 1

    @cached_property
    def work(self) -> Array:
        """Running cost of the block rows, for the partition over threads."""
        p = self.problem.pattern
        return np.concatenate(([0], np.cumsum(p.row_counts * p.C + 16))).astype(np.uint64)

    @property
    def registers(self) -> int:
        """Vector registers of the micro-kernel."""
        if self.upright:
            return self.cols * self.vectors + self.vectors + 1
        if self.problem.head or self.outer:
            return self.rows * self.vectors + self.vectors + 1
        return self.lanes + (HELD if self.rows == 1 else min(self.rows, self.cols)) + 1

    def counts(self, n: int) -> Counts:
        """Countable cost of one call: of n summed, or of n heads."""
        s, p, t = self.problem, self.problem.pattern, self.target
        if s.operator is ATTENTION:
            keys = p.nnzb * self.padded(p.C) * -(-p.R // self.rows) * self.rows // self.lanes
            inner = s.head + self.padded(s.head) * p.C / self.padded(p.C)
            fma, other = n * keys * inner, n * (keys * EXP + 2 * p.K * s.head / self.lanes)
            loads = fma * (self.rows + self.vectors) / (self.rows * self.vectors)
        elif s.operator is SOFTMAX:
            fma, loads, other = 0, 0, n * p.nnz / self.lanes * EXP
        elif self.outer or self.upright:
            units, step = -(-n // self.product.group), self.cols if self.upright else self.rows
            fma = p.nnz * units / self.lanes
            loads = fma * (step + self.vectors) / (step * self.vectors)
            other = p.nnz / self.lanes * -(-units // self.chunk) * 2 + (p.K + p.M) * units / self.lanes * 4
        else:
            columns = -(-p.row_counts * p.C // self.cols).sum()
            tiles, per = columns * -(-p.R // self.rows), self.chunk * self.product.group
            vectors = -(-n // (self.product.group * self.lanes))
            fma = tiles * vectors * self.lanes
            other = tiles * max(-(-n // per), 1) * FOLD * self.lanes
            other += (p.K + p.M) * vectors * (2 if s.operator is SDDMM else 6)
            loads = fma * (self.rows + self.cols) / self.lanes
        cycles = max(fma / self.product.per_cycle(t), loads / t.loads_per_cycle) + other / t.fma_per_cycle
        table_bytes = 4 * (p.nnzb + p.block_rows + 1)
        count = int(np.prod(s.result_shape(n)))
        arrays = sum(int(np.prod(s.shape(letters, n))) for _, letters in s.operator.inputs)
        return Counts(
            flop=round(2 * fma * self.lanes * self.product.group), effective_flop=s.flop(n), vector_fma=round(fma),
            vector_loads=round(loads), l1_bytes=round(loads * t.vector_bytes), l2_bytes=round(arrays * s.real.bytes),
            memory_bytes=arrays * s.dtype.bytes + count * s.real.bytes + table_bytes, registers=self.registers,
            code_bytes=round(7 * self.lanes * (HELD if self.rows == 1 else 2)), table_bytes=table_bytes, value_bytes=0,
            cycles=float(cycles),
        )  # fmt: skip


def plan_pattern(problem: PatternProblem, target: Target) -> PatternPlan:
    """The plan for a target: there is one."""
    return PatternPlan(problem, target)
