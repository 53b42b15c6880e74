"""Cost: predicted seconds of one call on one core, a roofline over a plan's counts.  It ranks, the clock decides."""

from dataclasses import dataclass

from bsrgen.plan import Plan

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
    """A dense product of the same shape and type: FLOP at a library's share of peak, or the weight's bytes."""
    p, dtype, target = plan.problem.pattern, plan.problem.dtype, plan.target
    lanes = target.lanes(dtype.bytes)
    peak = target.flop_per_cycle(dtype.bytes) * DENSE_SHARE * min(1.0, (n + lanes // 2) / (2 * lanes))
    weight_bytes = p.M * p.K * dtype.bytes
    cycles = max(2 * p.M * p.K * n / peak, weight_bytes / target.bytes_per_cycle(weight_bytes))
    return cycles / (target.ghz * 1e9) + target.call_s
