"""Counting what a C plan does: multiply-adds, loads, bytes per level, and the cycles they need on a target.

The constants without a source are cycles of loop control, fitted on one machine (Zen 5, 2026-11-20); they rank plans.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bsrgen.plan import Counts
from bsrgen.targets import Target

if TYPE_CHECKING:
    from bsrgen.backends.c.plan import CPlan

BLOCK_CYCLES = 0.5  # read an offset, advance two pointers
CODE_ROW_CYCLES = 6.0  # the pattern as code: one call per block row
ROW_CYCLES = 10.0  # start and end of one row's loop: pointers, one mispredicted exit


@dataclass(frozen=True, slots=True)
class _Work:
    fma: float
    loads: float
    x_bytes: float  # of X read by the micro-kernel
    x_live_bytes: float  # of X that should stay in L1 between uses
    w_passes: float  # how often the weight is streamed
    rows: float  # row loops started
    blocks: float  # block visits
    steps: float  # dependent steps along k
    sums: float  # accumulators in flight
    moved: float  # elements packed, spilled, transposed and stored around the product


def counts(plan: "CPlan", n: int) -> Counts:
    """What one call of n tokens does on one core."""
    problem, target, p = plan.problem, plan.target, plan.pattern
    real = problem.dtype.bytes
    value_bytes = p.nnzb * plan.block_values * real
    table_bytes = 4 * (plan.panels * p.block_rows + 1) + p.nnzb * plan.offset_bytes
    memory = value_bytes + table_bytes + (p.K + p.M) * n * real
    work = _weight_work(plan, n) if plan.uses_weight_tile(n) else _token_work(plan, n)
    resident = work.x_live_bytes <= 0.8 * target.l1_bytes
    stream = (value_bytes + table_bytes) * work.w_passes
    l2_bytes = stream + (0 if resident else work.x_bytes)
    vector = target.vector_bytes
    return Counts(
        flop=round(work.fma * 2 * plan.lanes),
        effective_flop=problem.flop(n),
        vector_fma=round(work.fma),
        vector_loads=round(work.loads),
        l1_bytes=round(work.loads * vector),
        l2_bytes=round(l2_bytes),
        memory_bytes=memory,
        registers=plan.registers,
        table_bytes=table_bytes,
        value_bytes=value_bytes,
        cycles=_cycles(target, work, stream, value_bytes, 0.0 if resident else work.x_bytes, plan),
    )


def _cycles(target: Target, w: _Work, stream: float, value_bytes: int, x_l2: float, plan: "CPlan") -> float:
    fma = w.fma / target.fma_per_cycle
    loads = w.loads / target.loads_per_cycle
    latency = w.steps * target.fma_latency / max(w.sums, 1)
    beyond = stream / (target.l2_bytes_per_cycle if value_bytes <= target.l2_bytes else target.l3_bytes_per_cycle)
    beyond += x_l2 / (target.l2_bytes_per_cycle if w.x_live_bytes <= target.l2_bytes else target.l3_bytes_per_cycle)
    bound = max(fma, loads, latency, beyond)
    rest = 0.15 * (fma + loads + beyond - bound)  # overlap is not perfect
    code = plan.encoding == "code" and not plan.uses_weight_tile(0)
    control = w.rows * CODE_ROW_CYCLES if code else w.blocks * BLOCK_CYCLES + w.rows * ROW_CYCLES
    return bound + rest + control + w.moved / plan.lanes


def _token_work(plan: "CPlan", n: int) -> _Work:
    t, p = plan.tokens, plan.pattern
    assert t is not None
    linear = plan.problem.operator.token_axis == 0
    vectors = -(-n // plan.lanes)
    tiles = max(1, -(-vectors // t.vectors))
    v = vectors / tiles if vectors else 0
    row_tiles = sum(-(-g.rows // t.rows) for g in plan.groups)
    rows = p.R / row_tiles
    visits = p.nnzb * row_tiles * tiles
    steps = visits * p.C
    spills = 2 * (plan.panels - 1) * p.M * vectors * plan.lanes
    packs = -(-p.block_rows // plan.waiting_block_rows) if plan.panels > 1 else 1
    moved = packs * (4 if linear else 1) * n * p.K + (4 if linear else 1) * n * p.M + spills
    sums = rows * v if rows * v >= 8 else 8
    return _Work(
        fma=steps * rows * v,
        loads=steps * (v + rows),
        x_bytes=steps * v * plan.target.vector_bytes,
        x_live_bytes=min(plan.k_panel, p.K) * min(t.vectors, vectors) * plan.target.vector_bytes,
        w_passes=tiles,
        rows=p.block_rows * row_tiles * tiles * plan.panels,
        blocks=visits,
        steps=steps * rows * v,
        sums=min(sums, 64) * 1.0,
        moved=(moved if t.pack else moved - n * p.K) + _epilogue(plan, n),
    )


def _weight_work(plan: "CPlan", n: int) -> _Work:
    w, p = plan.weight, plan.pattern
    assert w is not None
    real = plan.problem.dtype.bytes
    tiles = max(1, -(-n // w.tokens))
    t = n / tiles
    row_tiles = len(plan.groups)
    vectors = sum(g.slots for g in plan.groups) / w.row_lanes / row_tiles
    visits = p.nnzb * row_tiles * tiles
    steps = visits * p.C / w.k_lanes
    reduce = 2.0 if w.k_lanes == 1 else 4.0 * w.k_lanes  # shuffles and adds of the lanes that share a row
    sums = t * vectors if t * vectors >= 8 else 8
    line = 64 // real
    return _Work(
        fma=steps * t * vectors,
        loads=steps * (t + vectors),
        x_bytes=p.block_rows * row_tiles * n * p.K * real * min(1.0, p.density * line / max(p.C, 1)),
        x_live_bytes=min(w.tokens, n) * min(plan.k_panel, p.K) * real,
        w_passes=max(1.0, n / w.tokens),
        rows=p.block_rows * row_tiles * tiles * plan.panels,
        blocks=visits,
        steps=steps * t * vectors,
        sums=min(sums, 64) * 1.0,
        moved=n * p.M * reduce + (n * p.K * 1.5 if plan.problem.operator.token_axis else 0) + _epilogue(plan, n),
    )


def _epilogue(plan: "CPlan", n: int) -> float:
    """Operations of the epilogue, counted as moved elements."""
    return sum(step.flop for step in plan.problem.epilogue) * n * plan.pattern.M / plan.target.fma_per_cycle
