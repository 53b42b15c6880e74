"""Counting what a C plan does: multiply-adds, loads, bytes per level, and the cycles they need on a target.

The counts are exact where there is one panel; how many (panel, block row) pairs hold blocks is judged by the first.
Fitted are cycles that no manual gives, fitted to measured plans.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bsrgen.pattern import Pattern
from bsrgen.plan import Counts

if TYPE_CHECKING:
    from bsrgen.backends.c.plan import CPlan

SAMPLE = 20_000  # stored blocks by which empty segments are counted
GATHER_OPS = {2: 2, 4: 3}  # shuffles for one gathered vector of X, by the columns of a unit
WIDEN_OPS = 2  # for a vector of W that is narrower in memory than where it is multiplied
FMA_BYTES = 7  # of code for one multiply-add and its share of the loads (gcc 12, AVX-512: 6 to 8)


@dataclass(frozen=True, slots=True)
class Fitted:
    """Cycles and shares of overlap that rank plans: least squares of log time over 1,027 plans of 76 matrices
    in float32, 286 of 22 in bfloat16 (`python -m benchmarks accuracy`, `fit`; Zen 5, 2026-11-21), good plans most."""

    overlap: float = 0.12  # of the resources that do not bound
    load_share: float = 0.93  # of the loads a core can do that it does
    token_segment: float = 10.0  # start and end of a segment in the token tile
    token_sum: float = 0.06  # each vector of sums that starts at zero and is stored
    spill: float = 1.6  # each vector of sums that waits for the next panel
    pack: float = 2.6  # one vector of X into its panel
    pack_transposed: float = 4.5
    pack_words: float = 7.0  # the same of words, taken apart where they are gathered
    finish: float = 3.8  # one vector of sums into Y
    finish_transposed: float = 6.4
    weight_segment: float = 6.0
    weight_sum: float = 0.5  # one vector of sums, straight to Y
    tile_sum: float = 2.1  # one vector of sums by way of the tile
    tile_spill: float = 2.2  # the same, where it waits for the next panel
    fold: float = 0.7  # a round of folding one vector
    expand: float = 2.5  # one vector of an expanded row
    single: float = 1.6  # loads of a nonzero for one token
    code_row: float = 6.0  # the pattern as code: one call per block row
    unit: float = 23.0  # one unit of tokens


FITTED = Fitted()


@dataclass(frozen=True, slots=True)
class _Work:
    fma: float
    other: float  # vector operations between load and multiply-add: widening, gathering
    loads: float
    latency: float  # cycles of the longest chains of dependent multiply-adds
    x_bytes: float  # of X read by the micro-kernel
    x_live_bytes: float  # of X that should stay in L1 between uses
    w_passes: float  # how often the weight is streamed
    control: float  # cycles between the segments and around the product


def counts(plan: "CPlan", n: int, fitted: Fitted = FITTED) -> Counts:
    """What one call of n tokens does on one core."""
    problem, target, p = plan.problem, plan.target, plan.pattern
    segments = _segments(p, plan.k_panel, plan.panels)
    units = _units(plan, segments)
    value_bytes = round(units * plan.packing.block_values * plan.w_bytes) + 4 * plan.corrections
    table_bytes = 4 * (segments + 1) + round(units * _unit_offset_bytes(plan))
    if plan.panels > 1:
        table_bytes += 4 * segments + 4 * (plan.panels + 1)
    few, read_bytes = plan.uses_weight_tile(n), value_bytes + table_bytes
    if plan.bits:
        bit_bytes = round(segments * _bit_vectors(plan) * plan.bits.count / 8)
        table_bytes += bit_bytes
        read_bytes = value_bytes + bit_bytes if few else read_bytes
    single = n == 1 and plan.single
    work = (_weight_work if few else _single_work if single else _token_work)(plan, n, segments, units, fitted)
    resident = work.x_live_bytes <= target.l1_bytes
    w_bytes = read_bytes * work.w_passes
    x_beyond = 0.0 if resident else work.x_bytes
    stream = w_bytes / target.bytes_per_cycle(value_bytes) + x_beyond / target.bytes_per_cycle(work.x_live_bytes)
    return Counts(
        flop=round(work.fma * 2 * plan.product.group * (plan.weight_lanes if few else plan.lanes_at(n))),
        effective_flop=problem.flop(n),
        vector_fma=round(work.fma),
        vector_loads=round(work.loads),
        l1_bytes=round(work.loads * target.vector_bytes),
        l2_bytes=round(w_bytes + x_beyond),
        memory_bytes=value_bytes
        + table_bytes
        + (problem.pattern.K * problem.x_dtype.bytes + p.M * problem.out_dtype.bytes) * n,
        registers=plan.registers,
        code_bytes=_code_bytes(plan),
        table_bytes=table_bytes,
        value_bytes=value_bytes,
        cycles=_cycles(plan, work, stream, fitted),
    )


def _segments(p: Pattern, k_panel: int, panels: int) -> int:
    """(panel, block row) pairs that are walked; with panels those that hold blocks, judged by the first ones."""
    if panels == 1:
        return p.block_rows
    if not p.nnzb:
        return 0
    if p.nnzb <= SAMPLE or type(p) is Pattern:
        rows = max(int(np.searchsorted(p.indptr, SAMPLE)), 1)
        end = int(p.indptr[min(rows, p.block_rows)])
        row = np.repeat(np.arange(min(rows, p.block_rows)), np.diff(p.indptr[: rows + 1]))
        held = np.unique(row * panels + p.indices[:end].astype(np.int64) * p.C // k_panel).size
        return max(round(held * p.block_rows / min(rows, p.block_rows)), 1)
    empty = float((1 - p.density) ** (k_panel / p.C))
    return round(p.block_rows * panels * (1 - empty))


def _units(plan: "CPlan", segments: int) -> float:
    """Packed blocks; gathered columns are grouped in each segment, half a group of each is zeros on average."""
    p, group = plan.pattern, plan.product.group
    return p.nnzb / group + segments * (group - 1) / (2 * group) if plan.gather else p.nnzb


def _bit_vectors(plan: "CPlan") -> int:
    """Vectors of bits for one segment."""
    return plan.bits.vectors(plan.k_panel) if plan.bits else 0


def _unit_offset_bytes(plan: "CPlan") -> int:
    """Bytes of offsets for one packed block or group of columns."""
    return plan.packing.offset_bytes * (plan.product.group if plan.gather else 1)


def _cycles(plan: "CPlan", w: _Work, stream: float, f: Fitted) -> float:
    target = plan.target
    fma = w.fma / plan.product.per_cycle(target)
    loads = w.loads / (target.loads_per_cycle * f.load_share)
    fma += w.other / (2 * target.fma_per_cycle)  # on pipes of their own, in part
    bound = max(fma, loads, w.latency, stream)
    return bound + f.overlap * (fma + loads + stream - min(bound, fma + loads + stream)) + w.control


def _chains(sums: float) -> int:
    """Independent chains of a register tile: T_SUMS and W_SUMS in the templates."""
    return 1 if sums >= 8 else 2 if sums >= 4 else 4 if sums >= 2 else 8


def _row_tiles(rows: int, most: int) -> list[int]:
    """Rows of the register tiles of one group."""
    return [most] * (rows // most) + [rows % most] * (rows % most > 0)


def _stall(plan: "CPlan", rows: int, vectors: float) -> float:
    """Cycles that a step of a register tile of several rows waits for its own sums."""
    sums = rows * vectors
    busy = sums / plan.product.per_cycle(plan.target)
    return max(0.0, plan.product.latency(plan.target) / _chains(sums) - busy) if rows > 1 else 0.0


def _token_work(plan: "CPlan", n: int, segments: int, blocks: float, f: Fitted) -> _Work:
    t, p = plan.tokens, plan.pattern
    assert t is not None
    linear = plan.problem.operator.token_axis == 0
    together = plan.product.group if plan.gather else 1
    lanes = plan.lanes_at(n)
    vectors = -(-n // (lanes * together)) * together
    units = max(1, -(-vectors // t.vectors))
    v = vectors / units
    row_tiles = sum(-(-g.rows // t.rows) for g in plan.groups)
    rows = p.R / row_tiles
    steps = blocks * row_tiles * units * p.C
    walks = segments * row_tiles * units
    sums = walks * rows * v
    offsets = blocks * row_tiles * units * _unit_offset_bytes(plan) / 8
    code, chains = plan.encoding == "code", _chains(rows * v)
    control = f.unit * units + walks * (f.code_row if code else f.token_segment) + sums * f.token_sum
    if plan.panels > 1:
        control += (sums + p.M * vectors) * f.spill
    packs = 1 if plan.packs_whole else -(-p.block_rows // plan.waiting_block_rows)
    transposed = f.pack_words if plan.product.group > 1 else f.pack_transposed
    packed = 0.0 if not t.pack and n % lanes == 0 else p.K * vectors * packs / together
    gathers = steps * (v * GATHER_OPS.get(together, 0) + rows * WIDEN_OPS * (plan.w_bytes < plan.unit_bytes))
    control += packed * (transposed if linear else f.pack)
    control += (
        units * blocks * p.C * sum(_stall(plan, tile, v) for g in plan.groups for tile in _row_tiles(g.rows, t.rows))
    )
    direct = not linear and plan.panels == 1
    control += 0 if direct else p.M * vectors * (f.finish_transposed if linear else f.finish)
    return _Work(
        fma=steps * rows * v,
        other=gathers,
        loads=steps * (v + rows) + (0 if code else offsets),
        latency=steps
        * plan.product.latency(plan.target)
        / (min(chains, 8 // plan.packing.offset_bytes) if p.C == 1 and not plan.gather else chains),
        x_bytes=steps * v * lanes * plan.unit_bytes,
        x_live_bytes=min(plan.k_panel, p.K) * v * lanes * plan.cell_bytes,
        w_passes=units,
        control=control + epilogue_cycles(plan, n),
    )


def _single_work(plan: "CPlan", n: int, segments: int, blocks: float, f: Fitted) -> _Work:
    control = f.unit * n + f.token_segment * segments + epilogue_cycles(plan, n)
    return _Work(blocks / plan.lanes_at(n), 0.0, f.single * blocks, 0.0, 0.0, 0.0, 1.0, control)


def _weight_work(plan: "CPlan", n: int, segments: int, stored: float, f: Fitted) -> _Work:
    w, p = plan.weight, plan.pattern
    assert w is not None
    cell, line = plan.cell_bytes, 64
    units = max(1, -(-n // w.tokens))
    t = n / units
    row_tiles = len(plan.groups)
    vectors = sum(g.slots for g in plan.groups) / w.row_lanes / row_tiles
    blocks = stored * row_tiles * units
    steps, offsets = blocks * p.C / w.k_lanes, blocks * _unit_offset_bytes(plan) / 8
    walks = segments * row_tiles * units
    sums = walks * t * vectors
    expanded = 0.0
    if plan.bits:
        steps = expanded = walks * _bit_vectors(plan)
        offsets = steps
    direct, gathers = w.k_lanes == plan.panels == 1, plan.gather and not plan.bits
    control = f.unit * units + walks * f.weight_segment + sums * (f.weight_sum if direct else f.tile_sum)
    control += expanded * f.expand
    if plan.panels > 1:
        control += (sums + n * p.M / w.row_lanes) * f.tile_spill
    control += n * p.M / plan.weight_lanes * (w.k_lanes - 1) * f.fold
    if plan.problem.operator.token_axis or plan.copies_x:
        control += n * p.K / plan.lanes * (f.pack_transposed if plan.problem.operator.token_axis else f.pack)
    touched = min(1.0, p.density * max(line / cell / p.C, 1.0))  # of the lines of X, by one block row
    chunk = min(w.chunk, units)
    return _Work(
        fma=steps * t * vectors,
        other=steps
        * (t * plan.product.group * 2 if gathers else WIDEN_OPS * vectors * (plan.w_bytes < plan.unit_bytes)),
        loads=steps * (t + vectors) + offsets,
        latency=steps * plan.product.latency(plan.target) / _chains(t * vectors),
        x_bytes=p.block_rows * row_tiles * n * p.K * cell * touched,
        x_live_bytes=min(w.tokens, n) * min(plan.k_panel, p.K) * cell,
        w_passes=units / chunk,
        control=control + epilogue_cycles(plan, n),
    )


def epilogue_cycles(plan: "CPlan", n: int) -> float:
    """Cycles of the epilogue's operations."""
    flop = sum(step.flop for step in plan.problem.epilogue) * n * plan.pattern.M
    return flop / plan.lanes / plan.target.fma_per_cycle


def whole_share(plan: "CPlan", fitted: Fitted = FITTED) -> float:
    """The share of a mask of outputs from which computing all of Y is faster than a list of tokens for each group of
    rows: every list reads and packs X anew, from where it lies.  More than 1 where vectors would cross groups."""
    p, pit, target, n = plan.pattern, plan.problem.pit, plan.target, plan.problem.n or 1024
    if pit is None or pit.rows % plan.lanes:
        return 2.0
    transposed = fitted.pack_words if plan.product.group > 1 else fitted.pack_transposed
    stream = target.vector_bytes / target.bytes_per_cycle(n * plan.problem.pattern.K * plan.problem.x_dtype.bytes)
    as_it_lies = plan.matrix.x_first if plan.matrix else plan.uses_weight_tile(n)
    vector = max(fitted.pack if as_it_lies else transposed, stream)
    once = plan.counts(n).cycles
    return once / (once + (pit.groups(plan.problem.pattern.M) - 1) * n * p.K / plan.lanes * vector)


def _code_bytes(plan: "CPlan") -> int:
    """Machine code of the micro-kernels: their multiply-adds, written out for each size of the register tile."""
    if plan.encoding == "code":
        return plan.code_fma * FMA_BYTES
    fma, columns = 0, min(plan.pattern.C, 4)
    if t := plan.tokens:
        kinds = len({min(g.rows, t.rows) for g in plan.groups} | {g.rows % t.rows for g in plan.groups} - {0})
        forms = 1 if t.pack else 2
        fma += forms * kinds * t.rows * sum(range(1, t.vectors + 1)) * 2 * columns
    if w := plan.weight:
        fma += w.vectors * sum(range(1, w.tokens + 1)) * columns
    return fma * FMA_BYTES
