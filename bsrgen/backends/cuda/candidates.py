"""Which plans may be tried for a problem: the plan space of the CUDA backend."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

from bsrgen.backends.cuda import dynamic, hopper, hopper_candidates
from bsrgen.backends.cuda.matrix import MatrixFeaturesPlan, MatrixPlan, tokens
from bsrgen.backends.cuda.pit import fits_selection
from bsrgen.backends.cuda.plan import INT_MAX, SHARED_BYTES, CudaPlan, Lanes
from bsrgen.dtypes import HOPPER
from bsrgen.gpus import GpuTarget
from bsrgen.problem import Problem
from bsrgen.targets import Target

AnyPlan = TypeVar("AnyPlan", bound=CudaPlan)
TABLE_ENTRIES = 1 << 21  # that nvcc reads as text in some 15 s
ROWS = (8, 4, 2, 1)
LANES = (Lanes(4, 32), Lanes(2, 32), Lanes(1, 32))
FEATURES = (32, 64, 16)
WARPS = (8, 16, 4)
LEAST_ROWS = 4  # of a block: matrix units have 8, the rest is zeros
FEW = (Lanes(4, 1), 4)  # where W does not stream
SOME = (Lanes(2, 16), 32, 16)  # where it does in calls of up to 16 tokens
SELECTED = (Lanes(2, 16), 32)  # where tokens are listed: W does not stream
LIVE = (Lanes(1, 32), 32, 16)  # where features are: lanes along k would add up what depends on other tokens
STAGES = (4, 3, 2)
NOT_ON = {
    "float16": (),
    "bfloat16": ("sm_75",),
    "int8": ("sm_75",),
}  # types of matrix units, architectures that lack them
LACKS = "its tables would be too long, or its experts too many (4096 at most): use larger blocks, or several kernels"


def candidates(problem: Problem, target: Target, *, reblock: bool = True) -> Iterator[CudaPlan | hopper.HopperPlan]:
    """Legal plans, a good guess first.  All work on the problem's own blocks.

    Empty where the tables outgrow what nvcc takes as text.
    """
    p = problem.pattern
    if max(p.M, p.K) > INT_MAX:
        return
    if p.known and problem.pit is None:  # Hopper's tables are clustered: a preparation has no time for that
        yield from hopper_candidates.candidates(problem, target)
    if problem.dtype.name in HOPPER:
        return
    yield from _matrix(problem, target)
    few = SOME if problem.pit is None else SELECTED if problem.pit.axis.listed else LIVE
    for rows in rows_of_tiles(p.R):
        for many in LANES:
            for warps in (*WARPS, *least_warps(problem, rows)):
                for features in FEATURES:
                    plan = CudaPlan(problem, target, rows, warps, features, many, *few)
                    if fits(plan):
                        yield from with_split(plan)


def _matrix(problem: Problem, target: Target) -> Iterator[MatrixPlan]:
    """Plans on matrix units, for the types that they multiply, where every architecture has them."""
    p = problem.pattern
    assert isinstance(target, GpuTarget)
    alike = (problem.dtype is problem.x_dtype or problem.quantizes_x) and problem.dtype.name in NOT_ON
    if not alike or p.R < LEAST_ROWS or {*target.archs} & {*NOT_ON[problem.dtype.name]}:
        return
    live = problem.pit is not None and not problem.pit.axis.listed
    kind, streamed = MatrixFeaturesPlan if live else MatrixPlan, 0 if problem.pit and not live else 16
    tile = 32 // problem.dtype.bytes
    if live and p.C % tile:
        return
    wide = (tile,) if live else (2 * tile, 4 * tile)
    for rows in (64, 32, 16, 8):
        for tiles in (2, 1, 4) if rows < p.R + 8 else ():
            for features in wide:
                plan = kind(problem, target, rows, 1, features, tokens(tiles), tokens(1), 64, streamed)
                deep = (replace(plan, stages=stages) for stages in STAGES)
                fitting = next((plan for plan in deep if fits(plan)), None)
                if tiles * rows <= (256 if plan.halves == 1 else 64) and fitting:
                    yield from with_split(fitting)


def with_split(plan: AnyPlan) -> Iterator[AnyPlan]:
    """`plan`, and as it is where thread blocks share launches of few units, if it can have such launches.

    Where the kernel quantises X, each thread block of a unit would have to look at all of it.
    """
    yield plan
    assert isinstance(plan.target, GpuTarget)
    sms = plan.target.sms
    for most in (2 * sms, 4 * sms):
        tiles = most // 2 // plan.units
        if plan.problem.quantizes_x or plan.problem.pit or not tiles or not plan.problem.pattern.known:
            continue
        split = replace(plan, split=most, few_n=max(plan.few_n, tiles * plan.few_width))
        shared = [s for s in (split.sharing, split.stream_sharing) if s]
        if shared and all(s.fits for s in shared):
            yield split


def least_warps(problem: Problem, rows: int) -> tuple[int, ...]:
    """Those of a thread block with one block row, where a call says for each group of few rows what is computed."""
    strips = -(-problem.pattern.R // rows)
    return (strips,) if problem.pit and strips < min(WARPS) else ()


def rows_of_tiles(R: int) -> list[int]:
    """Rows of a register tile: those that cut a block row into equal parts with few rows of zeros first."""
    even = [r for r in range(8, 0, -1) if R % r == 0]
    chosen = {*even[:2], *(r for r in ROWS if r <= R)}
    return sorted(chosen, key=lambda r: (-(-R // r) * r / R > 1.1, -r))


def fits(plan: CudaPlan) -> bool:
    """Registers, shared memory and tables within their limits; no other plan of the same shape."""
    words = plan.problem.accumulator.bytes // 4
    sums = plan.rows * plan.many.tokens * words
    if (sums * plan.halves > 64 and not plan.matrix) or plan.shared_bytes > SHARED_BYTES:
        return False
    if not fits_selection(plan):
        return False
    pieces = plan.problem.pattern.nnzb * plan.row_pieces * plan.column_pieces
    rows = plan.problem.pattern.block_rows * plan.row_pieces
    if not plan.problem.pattern.known:  # nothing is printed
        return pieces * plan.piece_columns < INT_MAX // 2 and dynamic.fits(plan)
    return 3 * pieces + 4 * rows < TABLE_ENTRIES and pieces * plan.piece_columns < INT_MAX // 2
