"""Which plans may be tried for a problem on GPUs: the plan space of the MLIR backend there."""

from collections.abc import Iterator

from bsrgen.backends.cuda.candidates import FEATURES, FEW, LANES, WARPS, fits, rows_of_tiles
from bsrgen.backends.cuda.plan import INT_MAX
from bsrgen.backends.mlir.gpu_plan import MlirGpuPlan
from bsrgen.gpus import GpuTarget
from bsrgen.problem import Problem

LACKS = (
    "use smaller blocks; for GPUs it has no int8, swiglu, geglu or quantize_x (backend='cuda' has them), and of very "
    "many blocks, use larger ones"
)


def gpu_candidates(problem: Problem, target: GpuTarget) -> Iterator[MlirGpuPlan]:
    """Legal plans, a good guess first.  All work on the problem's own blocks.

    Empty for int8, for pairs of weights (swiglu, geglu), and where the tables outgrow what LLVM takes as text.
    """
    p = problem.pattern
    types = (problem.dtype, problem.x_dtype, problem.out_dtype)
    if problem.gate_rows or any(row.name == "int8" for row in types) or max(p.M, p.K) > INT_MAX:
        return
    for rows in rows_of_tiles(p.R):
        for many in LANES:
            for warps in WARPS:
                for features in FEATURES:
                    plan = MlirGpuPlan(problem, target, rows, warps, features, many, *FEW)
                    if fits(plan):
                        yield plan
