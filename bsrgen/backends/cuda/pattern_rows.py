"""Softmax of rows of stored blocks, and attention at them, on GPUs: the plan, and what it costs."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bsrgen.backends.cuda.count import OVERLAP, SHARED_CYCLES, STEP_CYCLES
from bsrgen.backends.cuda.plan import INT_MAX, SHARED_BYTES, WARP
from bsrgen.gpus import GpuTarget
from bsrgen.operators import ATTENTION
from bsrgen.pattern_problem import PatternProblem
from bsrgen.plan import Counts, Plan

WARPS = 4  # of a thread block
EXP_CYCLES = 16  # of a warp for an exponential and what belongs to it; a guess


@dataclass(frozen=True)
class RowsPlan(Plan):
    """Softmax: a warp has a row, its lanes go along the stored elements.  Attention: a warp has `queries` rows, lanes
    are keys while scores are made and elements of a head while they weigh V; the softmax goes along (Milakov,
    Gimelshein, arXiv 1805.02867, algorithm 3), so that scores never leave the thread block."""

    backend: ClassVar[str] = "cuda"
    matrix: ClassVar[bool] = False

    problem: PatternProblem  # type: ignore[assignment]
    queries: int

    dense = zero_filled = False

    def __str__(self) -> str:
        if self.problem.operator is not ATTENTION:
            return f"CUDA: a row for each of {WARPS} warps, lanes along its stored elements"
        return f"CUDA: {self.tile_queries} queries a thread block, {WARP} keys at a time in shared memory"

    def knobs(self) -> dict[str, Any]:
        """The decisions alone, as plain data."""
        return {"backend": self.backend, "matrix": self.matrix} | super().knobs()

    @property
    def tile_queries(self) -> int:
        """Of a thread block: all in one block row where that has so many."""
        return WARPS * self.queries

    @property
    def row_pieces(self) -> int:
        """Pieces that a block row is cut into."""
        return -(-self.problem.pattern.R // self.tile_queries)

    @property
    def head(self) -> int:
        """Elements of a head in shared memory: whole vectors."""
        return -(-self.problem.head // 4) * 4

    @property
    def shared_bytes(self) -> int:
        """Queries, 32 keys or their values, 32 weights for each query; and which keys they are."""
        reals = self.tile_queries * (self.head + WARP) + WARP * (self.head + 4)
        return reals * self.problem.real.bytes + 4 * WARP if self.problem.head else 0

    @property
    def fits(self) -> bool:
        """Shared memory, sums of a thread and the places of a block row's columns within their limits."""
        p = self.problem.pattern
        sums = self.queries * -(-self.problem.head // WARP) * self.problem.real.bytes // 4
        counted = p.nnzb * p.C < INT_MAX - WARP and max(p.M, p.K) < INT_MAX
        return counted and self.shared_bytes <= SHARED_BYTES and sums <= 64

    @cached_property
    def order(self) -> NDArray[Any]:
        """Block rows, those with most work first: int32."""
        return np.argsort(-self.problem.pattern.row_counts, kind="stable").astype(np.int32)

    def counts(self, n: int) -> Counts:
        """What one call of n heads does on the whole GPU."""
        s, p, t = self.problem, self.problem.pattern, self.target
        assert isinstance(t, GpuTarget)
        rows = p.nnzb * (self.row_pieces * self.tile_queries if s.head else p.R)
        keys = n * rows * p.C  # pairs of a query and a key, those of no query included
        flop, units = 4 * keys * s.head, n * p.block_rows * (self.row_pieces if s.head else -(-p.R // WARPS))
        loads = keys * s.real.bytes * s.head * (1 / self.queries + 1 / 4) * 2 if s.head else 0.0
        size = sum(int(np.prod(s.shape(letters, n))) for _, letters in s.operator.inputs) * s.dtype.bytes
        memory = size + int(np.prod(s.result_shape(n))) * s.real.bytes
        from_l2 = 2 * keys / self.tile_queries * s.head * s.dtype.bytes if s.head else 3 * keys * s.dtype.bytes
        sms = min(t.sms, max(units, 1))
        bounds = (
            flop / (t.flop_per_cycle(s.real.bytes) * sms / t.sms), loads / (SHARED_CYCLES * sms),
            from_l2 / (t.l2_bytes_per_cycle * sms / t.sms),
            memory / t.dram_bytes_per_cycle if memory > t.l2_bytes else 0.0,
            keys / WARP * EXP_CYCLES / (WARPS * sms), 4 * keys / (WARP * self.tile_queries * sms) * STEP_CYCLES,
        )  # fmt: skip
        table_bytes = 4 * (2 * p.block_rows + p.nnzb)
        return Counts(
            flop=flop, effective_flop=s.flop(n), vector_fma=flop // (2 * WARP), vector_loads=int(loads / 128),
            l1_bytes=int(loads), l2_bytes=int(from_l2), memory_bytes=memory, registers=64, code_bytes=4096,
            table_bytes=table_bytes, value_bytes=0, cycles=max(bounds) + OVERLAP * (sum(bounds) - max(bounds)),
        )  # fmt: skip


def plan_rows(problem: PatternProblem, target: GpuTarget) -> RowsPlan | None:
    """As many queries a warp as a block row and the memory of a thread block have room for; None where that is none."""
    most = -(-problem.pattern.R // WARPS)
    plans = (RowsPlan(problem, target, queries) for queries in (4, 2, 1) if queries < 2 * most or queries == 1)
    return next((plan for plan in plans if plan.fits), None)
