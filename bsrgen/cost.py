"""Cost: predicted seconds of one call on one core, a roofline over a plan's counts.  It ranks, the clock decides."""

from dataclasses import dataclass

import numpy as np

from bsrgen.dtypes import BFLOAT16, INT8
from bsrgen.plan import Plan
from bsrgen.problem import Problem
from bsrgen.targets import Target

TILED = {  # FLOP a cycle of oneDNN's dense products on matrix tiles, at so many tokens (research/cpu.md, section 3)
    BFLOAT16: ((1, 8, 128), (33, 249, 478)),
    INT8: ((1, 8, 128), (66, 380, 988)),
}
GPU_FULL_N = 256  # tokens from which dense products fill the matrix units of a GPU; not measured
DENSE_SHARE = 0.85  # of FMA peak: what a good dense f32 product reaches once N >= 64 (MKL, oneDNN; research note)


@dataclass(frozen=True, slots=True)
class Cost:
    """Predicted cost of one call of n tokens (roofline: Williams, Waterman, Patterson, CACM 52(4), 2009)."""

    n: int
    flop: int  # effective: 2 * stored elements * N
    bytes: int  # compulsory: weight, tables, X and Y once
    seconds: float
    dense_seconds: float

    @property
    def speedup(self) -> float:
        """Predicted gain over a dense product of the same shape."""
        return self.dense_seconds / self.seconds


def estimate(plan: Plan, n: int) -> Cost:
    """Predict one call of n tokens on one core of the plan's target."""
    counts, target = plan.counts(n), plan.target
    seconds = counts.cycles / (target.ghz * 1e9) + target.call_s
    return Cost(n, counts.effective_flop, counts.memory_bytes, seconds, dense_seconds(plan, n))


def dense_seconds(plan: Plan, n: int) -> float:
    """A dense product of the same shape and types: FLOP at a library's share of peak, or the weight's bytes."""
    p, target = plan.problem.pattern, plan.target
    weight_bytes = p.M * p.K * plan.problem.dtype.bytes
    rate = dense_flop_per_cycle(plan.problem, target, n)
    cycles = max(2 * p.M * p.K * n / rate, weight_bytes / target.bytes_per_cycle(weight_bytes))
    return cycles / (target.ghz * 1e9) + target.call_s


def dense_flop_per_cycle(problem: Problem, target: Target, n: int) -> float:
    """What a dense library does in a cycle of one core for n tokens of these types."""
    if problem.dtype is problem.x_dtype and (peak := target.matrix_flop_per_cycle(problem.dtype.name)):
        return peak * DENSE_SHARE * min(1.0, n / GPU_FULL_N)
    if _on_tiles(problem, target):
        tokens, rates = TILED[problem.dtype]
        return float(np.interp(np.log(n), np.log(tokens), rates))
    lanes = target.lanes(problem.real.bytes)
    return peak_flop_per_cycle(problem, target) * DENSE_SHARE * min(1.0, (n + lanes // 2) / (2 * lanes))


def peak_flop_per_cycle(problem: Problem, target: Target) -> float:
    """What a core can do at most in a cycle with these types: multiply-adds, dot products, or products of tiles."""
    dtype, lanes, fma = problem.dtype, target.lanes(problem.real.bytes), target.flop_per_cycle(problem.real.bytes)
    if _on_tiles(problem, target):
        return 2 * 16 * 16 * (64 // dtype.bytes) / target.product_cycles(16, 16)
    if dtype is problem.read_dtype is BFLOAT16 and target.has("avx512bf16"):
        return max(fma, 2 * 2 * lanes * target.bf16_dot_per_cycle)
    if dtype is problem.read_dtype is INT8 and target.family == "x86_64":
        quads = target.has("avx512vnni") or target.has("avxvnni")
        return max(2 * fma, 2 * 4 * lanes * target.int8_dot_per_cycle * quads)
    return fma


def _on_tiles(problem: Problem, target: Target) -> bool:
    """Whether the matrix unit multiplies these types."""
    alike = problem.dtype is problem.read_dtype and problem.dtype in TILED
    return alike and target.has("amx-bf16" if problem.dtype is BFLOAT16 else "amx-int8")
