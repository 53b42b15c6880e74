"""Which plans may be tried for a problem: the plan space of the MLIR backend."""

from collections.abc import Iterator
from dataclasses import replace

from bsrgen.backends.c.candidates import INT_MAX, token_tiles
from bsrgen.backends.c.covers import covers
from bsrgen.backends.c.plan import CPlan
from bsrgen.backends.mlir.plan import MlirPlan
from bsrgen.problem import Problem
from bsrgen.targets import Target


def candidates(problem: Problem, target: Target, *, reblock: bool = True) -> Iterator[MlirPlan]:
    """Legal plans, a good guess first; without `reblock` only those over the problem's own blocks.

    Empty only where offsets inside one block outgrow a C int.
    """
    for cover in (None, *(covers(problem, target) if reblock else ())):
        if cover and problem.gate_rows % cover.blocks.R:
            continue  # a block would hold rows of the gate and of what it gates
        blank = CPlan(problem, target, None, None, cover=cover)
        p = blank.pattern
        for tile in token_tiles(blank) if p.R * max(p.C, 8 * blank.lanes) <= INT_MAX else ():
            if tile.pack:
                plan = MlirPlan(problem, target, tile, None, cover=cover)
                yield replace(plan, encoding="constants") if plan.fits_constants else plan
