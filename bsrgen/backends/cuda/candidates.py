"""Which plans may be tried for a problem: the plan space of the CUDA backend."""

from collections.abc import Iterator
from dataclasses import replace

from bsrgen.backends.cuda import hopper
from bsrgen.backends.cuda.matrix import MatrixPlan, tokens
from bsrgen.backends.cuda.plan import SHARED_BYTES, CudaPlan, Lanes
from bsrgen.gpus import GpuTarget
from bsrgen.problem import Problem
from bsrgen.targets import Target

INT_MAX = 2**31 - 1
TABLE_ENTRIES = 1 << 21  # that nvcc reads as text in some 15 s
ROWS = (8, 4, 2, 1)
LANES = (Lanes(4, 32), Lanes(2, 32), Lanes(1, 32))
FEATURES = (32, 64, 16)
WARPS = (8, 16, 4)
LEAST_ROWS = 4  # of a block: matrix units have 8, the rest is zeros
FEW = (Lanes(4, 1), 4)  # where W does not stream
SOME = (Lanes(2, 16), 32, 16)  # where it does in calls of up to 16 tokens
STAGES = (4, 3, 2)
NOT_ON = {
    "float16": (),
    "bfloat16": ("sm_75",),
    "int8": ("sm_75",),
}  # types of matrix units, architectures that lack them
LACKS = "its tables would be too long: use larger blocks"


def candidates(problem: Problem, target: Target, *, reblock: bool = True) -> Iterator[CudaPlan | hopper.HopperPlan]:
    """Legal plans, a good guess first.  All work on the problem's own blocks.

    Empty where the tables outgrow what nvcc takes as text.
    """
    p = problem.pattern
    if max(p.M, p.K) > INT_MAX:
        return
    yield from hopper.candidates(problem, target)
    yield from _matrix(problem, target)
    for rows in rows_of_tiles(p.R):
        for many in LANES:
            for warps in WARPS:
                for features in FEATURES:
                    plan = CudaPlan(problem, target, rows, warps, features, many, *SOME)
                    if fits(plan):
                        yield plan


def _matrix(problem: Problem, target: Target) -> Iterator[MatrixPlan]:
    """Plans on matrix units, for the types that they multiply, where every architecture has them."""
    p = problem.pattern
    assert isinstance(target, GpuTarget)
    alike = problem.dtype is problem.x_dtype and problem.dtype.name in NOT_ON
    if not alike or p.R < LEAST_ROWS or {*target.archs} & {*NOT_ON[problem.dtype.name]}:
        return
    for rows in (64, 32, 16, 8):
        for tiles in (2, 1, 4) if rows < p.R + 8 else ():
            for features in (32, 64) if problem.dtype.bytes == 2 else (64, 128):
                plan = MatrixPlan(problem, target, rows, 1, features, tokens(tiles), tokens(1), 64, 16)
                deep = (replace(plan, stages=stages) for stages in STAGES)
                fitting = next((plan for plan in deep if fits(plan)), None)
                if tiles * rows * plan.halves <= 128 and fitting:
                    yield fitting


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
    pieces = plan.problem.pattern.nnzb * plan.row_pieces * plan.column_pieces
    rows = plan.problem.pattern.block_rows * plan.row_pieces
    return 3 * pieces + 4 * rows < TABLE_ENTRIES and pieces * plan.piece_columns < INT_MAX // 2
