"""Which plans may be tried for a problem: the plan space of the CUDA backend."""

from collections.abc import Iterator

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
FEW = (Lanes(4, 1), 4)
LACKS = "it has no swiglu, geglu or quantize_x; of very many blocks, use larger ones"


def candidates(problem: Problem, target: Target, *, reblock: bool = True) -> Iterator[CudaPlan | hopper.HopperPlan]:
    """Legal plans, a good guess first.  All work on the problem's own blocks.

    Empty for pairs of weights (swiglu, geglu), for X that the kernel would have to quantise, and where the tables
    outgrow what nvcc takes as text.
    """
    p = problem.pattern
    if problem.gate_rows or problem.quantizes_x or max(p.M, p.K) > INT_MAX:
        return
    yield from hopper.candidates(problem, target)
    yield from _matrix(problem, target)
    for rows in rows_of_tiles(p.R):
        for many in LANES:
            for warps in WARPS:
                for features in FEATURES:
                    plan = CudaPlan(problem, target, rows, warps, features, many, *FEW)
                    if fits(plan):
                        yield plan


def _matrix(problem: Problem, target: Target) -> Iterator[MatrixPlan]:
    """Plans on matrix units, for the types that they multiply, where every architecture has them."""
    p = problem.pattern
    assert isinstance(target, GpuTarget)
    alike = problem.dtype is problem.x_dtype and problem.dtype.name in ("float16", "bfloat16")
    if not alike or "sm_75" in target.archs or p.R < LEAST_ROWS:
        return
    for rows in (64, 32, 16, 8):
        for tiles in (2, 1, 4) if rows < p.R + 8 else ():
            for features in (64, 32):
                plan = MatrixPlan(problem, target, rows, 1, features, tokens(tiles), tokens(1), 64)
                if tiles * rows <= 128 and fits(plan):
                    yield plan


def rows_of_tiles(R: int) -> list[int]:
    """Rows of a register tile: those that cut a block row into equal parts with few rows of zeros first."""
    even = [r for r in range(8, 0, -1) if R % r == 0]
    chosen = {*even[:2], *(r for r in ROWS if r <= R)}
    return sorted(chosen, key=lambda r: (-(-R // r) * r / R > 1.1, -r))


def fits(plan: CudaPlan) -> bool:
    """Registers, shared memory and tables within their limits; no other plan of the same shape."""
    words = plan.problem.accumulator.bytes // 4
    sums = plan.rows * plan.many.tokens * words
    if (sums > 64 and not plan.matrix) or plan.shared_bytes > SHARED_BYTES:
        return False
    pieces = plan.problem.pattern.nnzb * plan.row_pieces * plan.column_pieces
    rows = plan.problem.pattern.block_rows * plan.row_pieces
    return 3 * pieces + 4 * rows < TABLE_ENTRIES and pieces * plan.piece_columns <= INT_MAX
