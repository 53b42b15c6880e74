"""Which plans may be tried for a product at a block pattern on a GPU, and the one that is taken."""

from collections.abc import Iterator

from bsrgen.backends.cuda.candidates import LEAST_ROWS, NOT_ON, rows_of_tiles
from bsrgen.backends.cuda.pattern_plan import CoresPlan, PatternCudaPlan, UnitsPlan
from bsrgen.backends.cuda.pattern_rows import RowsPlan, plan_rows
from bsrgen.errors import UnsupportedError
from bsrgen.gpus import GpuTarget
from bsrgen.pattern_problem import PatternProblem
from bsrgen.tune import PLANNED_N

THREADS = (128, 256)


def pattern_candidates(problem: PatternProblem, target: GpuTarget) -> Iterator[PatternCudaPlan]:
    """Legal plans of a product, a good guess first."""
    p = problem.pattern
    if problem.dtype.name in NOT_ON and p.R >= LEAST_ROWS and not {*target.archs} & {*NOT_ON[problem.dtype.name]}:
        for rows in (64, 32, 16, 8):
            for tiles in (2, 1) if rows < p.R + 8 else ():
                units = UnitsPlan(problem, target, rows, tiles)
                if units.fits:
                    yield units
    for rows in rows_of_tiles(p.R):
        side_rows = min(1 << (-(-p.R // rows) - 1).bit_length(), 16)
        for columns in (8, 4, 2):
            for side_columns in (16, 32, 8):
                for threads in THREADS:
                    slices = threads // (side_rows * side_columns)
                    cores = CoresPlan(problem, target, rows, columns, side_rows, side_columns, slices)
                    sums = rows * columns * problem.real.bytes // 4
                    if 1 <= slices <= 16 and cores.threads == threads and sums <= 64 and cores.fits:
                        yield cores


def plan_pattern(problem: PatternProblem, target: GpuTarget) -> PatternCudaPlan | RowsPlan:
    """The plan that the model likes best.  UnsupportedError where there is none."""
    if problem.operator.headed:
        rows = plan_rows(problem, target)
        if rows is None:
            raise UnsupportedError(
                f"{problem}: heads of {problem.head} do not fit the shared memory of a GPU; use backend='c'"
            )
        return rows
    plans = list(pattern_candidates(problem, target))
    if not plans:
        raise UnsupportedError(f"{problem}: too many stored columns for one kernel on a GPU; use several")
    return min(plans, key=lambda plan: plan.counts(problem.n or PLANNED_N).cycles)
