"""Advice: the verdict on a kernel, the break-even density, and which other block shape would be faster."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from bsrgen.backends import BACKENDS, Backend
from bsrgen.cost import DENSE_SHARE, Cost, estimate, peak_flop_per_cycle
from bsrgen.dtypes import as_types
from bsrgen.errors import UnsupportedError
from bsrgen.even import EvenPattern
from bsrgen.foreign import count
from bsrgen.gpus import GpuTarget
from bsrgen.occupancy import Occupancy, occupancies
from bsrgen.pattern import Weight
from bsrgen.plan import Plan
from bsrgen.problem import Problem, as_problem
from bsrgen.quantize import source_of
from bsrgen.targets import Target, as_targets
from bsrgen.tune import PLANNED_N, rank
from bsrgen.verdict import WORTH, Advice, Coming, Verdict

SLACK = 2.0  # block shapes that must be slower than the given one by more are not looked at
SHAPES = 32  # most other block shapes whose plans are ranked for a table
FEW = 8  # and for the verdict of each compile
KEPT = 5  # alternatives in a verdict
TOP = 8  # plans that compete for the break-even density
STEPS = 14  # halvings of the density's interval
# Cycles of preparing a weight for a dynamic kernel: for a block, for a block row; bytes of W that a cycle moves.
PREPARE_BLOCK, PREPARE_ROW, PREPARE_BYTES = 6.0, 20.0, 4.0
# On a GPU, guesses until a clock has seen one: cycles of four kernels, one of them one thread block; bytes of tables.
PREPARE_STEPS, PREPARE_BLOCK_BYTES = 40_000.0, 40.0


def advise(
    W: Any,
    operator: str = "linear",
    blocksize: tuple[int, int] | None = None,
    dtype: DTypeLike = "float32",
    n: int | None = None,
    target: str | tuple[str, ...] = "native",
    *,
    x_dtype: DTypeLike | None = None,
    shape: tuple[int, int] | None = None,
) -> tuple[Advice, ...]:
    """Block shapes for the nonzeros of W [M, K] by predicted time, fastest first, the given one among them.

    The arguments are those of `bsrgen.compile`, but W without blocks of its own (dense, CSR) is taken in blocks of 1x1,
    and of several targets the best counts.  Densities are exact, times are the model's for one core.  Nothing is
    compiled.  Errors: ArgumentError, ArgumentTypeError, PatternError, UnsupportedError.
    """
    types = as_types(dtype, x_dtype)
    weight = source_of(W, types[0], blocksize=blocksize, shape=shape, otherwise=(1, 1))
    problem = as_problem(operator, weight.pattern, *types, n=None if n is None else count("n", n, 1))
    best = as_targets(target)[0]
    found = block_shapes(BACKENDS["c"], problem, weight, best)
    if not found:
        raise UnsupportedError(f"{problem}: no plan for blocks of that shape on {best.name}; use smaller blocks")
    return found


def block_shapes(
    backend: Backend, problem: Problem, weight: Weight, target: Target, *, only_faster: bool = False
) -> tuple[Advice, ...]:
    """`advise` for a problem whose pattern is the weight's; nothing where no plan works on its own blocks, which the
    others would be compared with.  `only_faster` leaves out what cannot be, to save time."""
    own, n = weight.pattern, problem.n or PLANNED_N
    given_s, values = _seconds(backend, problem, target), int(np.count_nonzero(weight.data))
    if given_s == float("inf"):
        return ()
    within = _elements_within(SLACK * given_s, problem, target)
    if only_faster:  # nor what a dense product would beat
        within = min(_elements_within(given_s, problem, target), DENSE_SHARE * own.M * own.K)
    finer = not only_faster or WORTH * values <= own.nnz
    advice = []
    for taken in _worth_ranking(occupancies(weight, within, finer), FEW if only_faster else SHAPES):
        given = taken.blocksize == own.blocksize
        pattern = EvenPattern(own.shape, taken.blocksize, taken.nnzb)
        seconds = given_s if given else _seconds(backend, replace(problem, pattern=pattern, n=n), target)
        if seconds == float("inf"):
            continue
        fill = taken.elements / max(values, 1) if taken.nnzb else 1.0
        advice.append(Advice(taken.blocksize, taken.nnzb, taken.density, fill, seconds, given_s / seconds, given))
    return tuple(sorted(advice, key=lambda a: (a.seconds, not a.given)))


def _worth_ranking(found: Iterable[Occupancy], most: int) -> list[Occupancy]:
    """The first, which is the given one, and the most promising: few elements, and rows and columns share loads."""
    first, *others = found
    others.sort(key=lambda taken: taken.nnzb * (taken.blocksize[0] + 2) * (taken.blocksize[1] + 1))
    return [first, *others[:most]]


def _elements_within(seconds: float, problem: Problem, target: Target) -> float:
    """Stored elements that the products of a core can take in that time, at their peak."""
    flop_per_s = peak_flop_per_cycle(problem, target) * target.ghz * 1e9
    return max(problem.pattern.nnz, seconds * flop_per_s / (2 * (problem.n or PLANNED_N)))


def _native(backend: Backend, problem: Problem, target: Target) -> list[Plan]:
    """Plans that work on the problem's own blocks, cheapest first."""
    return [plan for _, plan in rank(list(backend.candidates(problem, target, reblock=False)), problem.n)]


def _seconds(backend: Backend, problem: Problem, target: Target) -> float:
    """Predicted time of the best of them; infinite where there is none."""
    plans = _native(backend, problem, target)
    return estimate(plans[0], problem.n or PLANNED_N).seconds if plans else float("inf")


# ── the verdict ──────────────────────────────────────────────────────────────────────────────────────────────────────


def judge(
    backend: Backend, plan: Plan, ranked: Sequence[tuple[Cost, Plan]], weight: Weight,
    sparse_s: float | None = None, dense_s: float | None = None,
) -> Verdict:  # fmt: skip
    """The verdict on a kernel that runs `plan`; sparse_s, dense_s: the best measured times, where there are.

    ranked: the plans that may run instead, the cheapest first; a strict kernel's are fewer.
    """
    problem, target = plan.problem, plan.target
    n = problem.n or PLANNED_N
    mine = estimate(plan, n)
    sparse = next((c.seconds for c, p in ranked if not p.dense), mine.seconds) if plan.dense else mine.seconds
    dense = min([mine.dense_seconds, *(c.seconds for c, p in ranked if p.dense)])
    even = break_even(backend, problem, target, sparse_s or sparse, dense_s or dense)
    coming, others = None, []
    if problem.pattern.known:
        others = [a for a in block_shapes(backend, problem, weight, target, only_faster=True) if not a.given]
    else:
        coming = _coming(backend, plan)
    return Verdict(
        n, problem.pattern.density, "dense" if plan.dense else "sparse", mine.seconds,
        dense_s if plan.dense else sparse_s, sparse, sparse_s, dense, dense_s, even, tuple(others[:KEPT]), target.where,
        coming,
    )  # fmt: skip


def _coming(backend: Backend, plan: Plan) -> Coming:
    """What it costs that `plan` does not know the pattern."""
    problem, target, p = plan.problem, plan.target, plan.problem.pattern
    even = replace(problem, pattern=EvenPattern(p.shape, p.blocksize, p.nnzb))
    ranked = rank([*backend.candidates(even, target, reblock=False)], problem.n)
    static_s = min(estimate(plan, problem.n or PLANNED_N).seconds, *(cost.seconds for cost, _ in ranked[:1]))
    moved = 2 * p.nnz * problem.dtype.bytes
    if isinstance(target, GpuTarget):
        cycles = PREPARE_STEPS + (moved + PREPARE_BLOCK_BYTES * p.nnzb) / target.dram_bytes_per_cycle
    else:
        cycles = PREPARE_BLOCK * p.nnzb + PREPARE_ROW * p.block_rows + moved / PREPARE_BYTES
    return Coming(static_s, cycles / (target.ghz * 1e9) + target.call_s)


def predicted_speedup(problem: Problem, target: Target, *, strict: bool = False) -> float:
    """The gain of the model's best sparse plan in C over a dense product, as `judge` would say it; nothing is compiled.
    0 where no plan works."""
    plans = [plan for plan in BACKENDS["c"].candidates(problem, target) if not (strict and plan.zero_filled)]
    ranked = rank(plans, problem.n)
    sparse_s = min((cost.seconds for cost, plan in ranked if not plan.dense), default=float("inf"))
    dense_s = min((cost.seconds if plan.dense else cost.dense_seconds for cost, plan in ranked), default=0.0)
    return dense_s / sparse_s


def break_even(backend: Backend, problem: Problem, target: Target, sparse_s: float, dense_s: float) -> float | None:
    """Density at which the best sparse plan takes `dense_s`, blocks evenly spread; 1 where it never takes as long, None
    where no plan works on the problem's own blocks.

    The model's curve of time over density, scaled to pass through `sparse_s` at the problem's own density.
    """
    p, n = problem.pattern, problem.n or PLANNED_N
    total, plans = p.block_rows * p.block_cols, _native(backend, problem, target)[:TOP]
    if not plans:
        return None

    def seconds(density: float) -> float:
        even = replace(problem, pattern=EvenPattern(p.shape, p.blocksize, round(density * total)))
        return min(estimate(replace(plan, problem=even), n).seconds for plan in plans)

    scale = sparse_s / seconds(p.density)
    low, high = 0.0, 1.0
    if scale * seconds(high) <= dense_s:
        return high
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if scale * seconds(middle) <= dense_s else (low, middle)
    return low
