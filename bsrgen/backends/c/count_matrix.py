"""Counting what a plan of the matrix unit does.

A product takes as many cycles as operand A has rows or B has, 9.5 at least, whatever the columns (Target).  Products,
tile loads and stores are exact; no clock has seen the other rates of this file yet.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bsrgen.backends.c.count import epilogue_cycles
from bsrgen.backends.c.matrix import MatrixPacking, Pass
from bsrgen.plan import Counts
from bsrgen.targets import Target

if TYPE_CHECKING:
    from bsrgen.backends.c.plan import CPlan


@dataclass(frozen=True, slots=True)
class Rates:
    """Cycles each, or per cycle (Intel's optimisation manual, Golden Cove; research/cpu.md)."""

    lines: float = 2.0  # loads of 64 bytes out of L1; a tile row is one
    loads: float = 3.0  # all loads
    latency: float = 52.0  # of a product: fewer than four tiles of sums wait for it
    overlap: float = 0.25  # of the resources that do not bound
    store_tile: float = 16.0
    finish: float = 20.0  # one tile of sums into Y, a token's rows after the other
    finish_turned: float = 60.0  # rows of sums to rows of Y, 16 x 16 in registers
    finish_rows: float = 30.0
    begin: float = 60.0  # a block row and unit: loop, mispredictions, sums that drain
    configure: float = 400.0
    copy: float = 1.5  # 64 bytes of X into its copy
    square: float = 60.0  # 32 x 32 of X into a panel, rows as they are
    square_turned: tuple[float, float] = (45.0, 85.0)  # the same, turned; elements of 1 or 2 bytes, in dwords
    square_single: tuple[float, float] = (70.0, 100.0)  # one by one


RATES = Rates()


@dataclass(frozen=True, slots=True)
class _Step:
    """One K step of one pass."""

    dots: float  # cycles of products
    lines: float
    loads: float
    stores: float
    shuffles: float
    w_bytes: float
    x_bytes: float  # from beyond L1
    chains: int

    def cycles(self, target: Target, w_rate: float, r: Rates) -> float:
        stream = self.w_bytes * w_rate + self.x_bytes / target.l2_bytes_per_cycle
        parts = (self.dots, max(self.lines / r.lines, self.loads / r.loads), self.stores, self.shuffles, stream)
        bound = max(*parts, r.latency if self.chains < 4 else 0)
        return bound + r.overlap * (sum(parts) - max(parts))


def matrix_counts(plan: "CPlan", n: int, r: Rates = RATES) -> Counts:
    """What one call of n tokens does on one core."""
    q, problem, target = plan.matrix_packing, plan.problem, plan.target
    p, T = plan.pattern, q.tile.token_tiles
    units = max(1, -(-n // q.tokens))
    whole, rest = divmod(n, q.tokens) if q.tile.x_first else (units, 0)
    parts = [(whole, T)] + ([(1, -(-rest // 16))] if rest else [])
    step = _x_first_step if q.tile.x_first else _w_first_step
    steps = [(times, step(plan, each, tiles, n)) for times, tiles in parts if times for each in q.passes]
    w_rate = _w_rate(plan, min(q.tile.chunk, units))
    cycles = q.count * sum(times * s.cycles(target, w_rate, r) for times, s in steps)
    table_bytes = 4 * (p.block_rows + 1) + q.offset_bytes * _offsets(q)
    tiles = p.block_rows * len(q.row_tiles) * sum(times * live for times, live in parts)
    products = q.count * len(q.row_tiles) * sum(times * live for times, live in parts)
    lines = q.count * sum(times * s.lines for times, s in steps)
    return Counts(
        flop=2 * 16 * q.step_k * products * min(p.R, 16),
        effective_flop=problem.flop(n),
        vector_fma=products,
        vector_loads=round(lines),
        l1_bytes=round(64 * lines),
        l2_bytes=round(q.count * sum(times * (s.w_bytes + s.x_bytes) for times, s in steps)),
        memory_bytes=plan.value_bytes
        + table_bytes
        + (problem.pattern.K * problem.x_dtype.bytes + p.M * problem.out_dtype.bytes) * n,
        registers=plan.registers,
        code_bytes=32 * T * len(q.row_tiles) + 4096,
        table_bytes=table_bytes,
        value_bytes=plan.value_bytes,
        cycles=cycles + _around(plan, n, units, tiles, r) + epilogue_cycles(plan, n),
    )


def _w_rate(plan: "CPlan", turns: int) -> float:
    """Cycles for a byte of W: from far for the first of the units that take turns at a block row, then as it stays."""
    target, row_bytes = plan.target, plan.value_bytes / max(plan.pattern.block_rows, 1)
    again = 0.0 if row_bytes <= target.l1_bytes / 2 else 1 / target.bytes_per_cycle(max(row_bytes, target.l1_bytes))
    return (1 / target.bytes_per_cycle(max(plan.value_bytes, target.l1_bytes)) + again * (turns - 1)) / turns


def _offsets(q: MatrixPacking) -> int:
    return q.blocks.nnzb if q.tile.form == "direct" else q.count * q.step_offsets


def _x_first_step(plan: "CPlan", each: Pass, tiles: int, n: int) -> _Step:
    q, V = plan.matrix_packing, len(each.tiles)
    d, tokens = q.step_k // q.group, min(16 * tiles, n)
    dots = V * sum(plan.target.product_cycles(min(16, tokens - 16 * t), d) for t in range(tiles))
    lines = tokens + V * d
    gathers = q.pieces > 1 and each.first == 0
    x_bytes = 0 if q.tokens * q.padded_k * q.product.part_bytes <= plan.target.l1_bytes // 2 else tokens * 4 * d
    return _Step(
        dots=dots,
        lines=lines,
        loads=lines + tokens * q.pieces * gathers,
        stores=tokens * gathers,
        shuffles=tokens * (q.pieces - 1) / 2 * gathers,  # inserts from memory: either vector port
        w_bytes=4 * V * d * each.tiles[0],
        x_bytes=x_bytes if q.pieces == 1 or gathers else 0,
        chains=tiles * V,
    )


def _w_first_step(plan: "CPlan", each: Pass, tiles: int, n: int) -> _Step:
    q, T, rows = plan.matrix_packing, tiles, each.slots
    d, g = q.step_k // q.group, q.group
    free = 8 - (T + 1) * min(q.tile.row_tiles, len(q.row_tiles))  # tiles of X
    loaded = T * d * (1 if free >= T else len(each.tiles))
    lines = loads = float(rows + loaded)
    stores = shuffles = x_bytes = 0.0
    if each.first == 0:
        x_bytes = 0.0 if q.panel_bytes <= plan.target.l1_bytes // 2 else float(d * g * T * 16 * q.product.part_bytes)
    if each.first == 0 and q.tile.rings:
        stores = d * T
        if q.single:
            lines += d * g * T / 2 * (1 if g == 2 else 0.5)
            loads += d * g * (T / 2 + 1)
            shuffles = stores * (1 if g == 2 else 2.5)  # vpermb, unpack, and half of the inserts
        else:
            lines += d * T
            loads += d * (T + 1)
    dots = T * sum(plan.target.product_cycles(live, d) for live in each.tiles)
    w_bytes = 4.0 * d * rows
    return _Step(dots, lines, loads, stores, shuffles, w_bytes, x_bytes, T * len(each.tiles))


def _around(plan: "CPlan", n: int, units: int, tiles: int, r: Rates) -> float:
    """Cycles before and after the products."""
    q, linear = plan.matrix_packing, plan.problem.operator.token_axis == 0
    p, size = plan.pattern, q.product.part_bytes
    control = p.block_rows * units * r.begin * (len(q.passes) if q.tile.x_first else 1) + r.configure
    if q.tile.x_first:
        copied = n * q.padded_k * size / 64 * r.copy * q.pieces**0.5 if q.copies_x else 0.0
        return control + copied + tiles * (r.store_tile + r.finish)
    square = (r.square_single if q.single else r.square_turned)[size - 1] if linear else r.square
    packed = -(-p.K // 32) * units * -(-q.tokens // 32) * square
    return control + packed + tiles * (r.store_tile + (r.finish_turned if linear else r.finish_rows))
