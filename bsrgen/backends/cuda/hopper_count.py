"""Counting what a Hopper plan does on the whole GPU.

Below 128 rows of W to a tile of X, copies from L2 to shared memory are the limit, not the products: a byte of X is good
for as many FLOP as the tile has rows (roofline: Williams, Waterman, Patterson, CACM 52(4), 2009, one level further in).
No rate here is measured: data sheets, and where they say nothing, the sources named or a guess.
"""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from bsrgen.backends.cuda.hopper_packing import SLOT
from bsrgen.backends.cuda.hopper_schedule import (
    BAND,
    BUCKETS,
    GAIN,
    LISTED,
    Line,
    Listing,
    dealt_time,
    listed,
    pieces_time,
)
from bsrgen.backends.cuda.hopper_shape import Shape
from bsrgen.backends.cuda.hopper_tiles import STEP_CYCLES
from bsrgen.gpus import WARP, GpuTarget
from bsrgen.plan import Counts

if TYPE_CHECKING:
    from bsrgen.backends.cuda.hopper import HopperPlan

W_BYTES = 128 * SLOT  # of a tile of W
WARPGROUPS = 2  # that multiply
INGEST = 64.0  # bytes that one SM takes from L2 in a cycle, at most, sent to it alone or not: DeepGEMM's model of sm_90
SHARED = 128.0  # bytes that one SM reads or writes of shared memory in a cycle
SECTOR = 32  # bytes that L2 sends at least
TURN_SHARE = 0.8  # of the rate of L2 or memory, where X is read by rows and written by columns: a guess
TURN_CYCLES = 2500.0  # of the kernel that does it, beside its bytes: until the next one has seen its end; a guess
BOX_CYCLES = 16.0  # of the copy engine for one box, however small: a guess
GATHER_CYCLES = 128.0  # of four warps that copy 64 features of 64 tokens, 16 bytes a thread: a guess
TILE_CYCLES = 300.0  # from the last product of a tile to the first of the next, beside the traffic of Y: a guess
TABLE_CYCLES = 300.0  # more where tables of the tile are read only then: a guess
OUTGO = 64.0  # bytes that one SM gives to L2 in a cycle: as many as it takes; a guess
STREAM_CYCLES = 300.0  # of a thread block on the ordinary cores, beside its work: a guess
STREAM_RATE = 3.0  # instructions of an SM in a cycle, of 4: a guess
CLUSTER_CYCLES = 1000.0  # until the thread blocks of a cluster have met twice: a guess
OVERLAP = 0.1  # of the resources that do not bound: all of them are asynchronous; a guess
ODD_SMS = 4  # that clusters of more than two leave idle: processor clusters of 16 and of 18 SMs; a guess
RESIDENT = 2  # thread blocks of a slot on an SM
MEET_CYCLES = 1000.0  # of who adds parts of a tile up: a count, a fence, the first of the others' sums; a guess
CUT_CYCLES = 1500.0  # until a thread block knows where its piece begins and ends: a guess


def counts(plan: "HopperPlan", n: int, shape: Shape) -> Counts:
    """What one call of n tokens does, by that kernel; those of one band of them as often as there are bands."""
    if n <= plan.band:
        return _counts(plan, n, n, shape)
    one, times = _counts(plan, plan.band, n, shape), n / plan.band
    scaled = {name: round(getattr(one, name) * times) for name in ("flop", "vector_fma", "vector_loads", "l1_bytes")}
    memory = one.memory_bytes + round((times - 1) * (one.memory_bytes - one.value_bytes - one.table_bytes))
    return replace(
        one, **scaled, effective_flop=plan.problem.flop(n), l2_bytes=round(one.l2_bytes * times), memory_bytes=memory,
        cycles=one.cycles * times,
    )  # fmt: skip


def _counts(plan: "HopperPlan", n: int, all_n: int, shape: Shape) -> Counts:
    """Of n tokens of a call of `all_n`."""
    problem, target, p, width = plan.problem, plan.target, plan.problem.pattern, shape.width
    assert isinstance(target, GpuTarget)
    tiles, unit = plan.tiles, problem.dtype.bytes
    steps, w_tiles = float(tiles.steps.sum()), float(tiles.w_tiles.sum())
    value_bytes, y_bytes = int(w_tiles) * W_BYTES, problem.out_dtype.bytes
    table_bytes = 4 * tiles.steps.size * plan.cut.slots * SLOT + int(steps) * (5 + 4 * plan.cut.pieces)
    widths = shape.groups(n) * shape.across
    bounds, from_l2 = (_split if shape.few else _whole)(plan, shape, n)
    turns, each = plan.turned and not shape.streams, p.K * problem.x_dtype.bytes + problem.rows * y_bytes
    memory = value_bytes + table_bytes + each * n
    beyond = value_bytes + table_bytes + each * all_n > target.l2_bytes
    x_bytes = p.K * problem.x_dtype.bytes * n if turns else 0  # which whoever turns X reads
    dram = (memory - x_bytes) / target.dram_bytes_per_cycle if beyond else 0.0
    bounds = (*bounds, from_l2 / target.l2_bytes_per_cycle, dram)
    cycles = max(bounds) + OVERLAP * (sum(bounds) - max(bounds)) + CLUSTER_CYCLES * (plan.cluster(shape) > 1)
    cycles += CUT_CYCLES * shape.equal
    turned_bytes = 2 * n * plan.turning.rows * unit if turns else 0  # read and written
    cycles += _turning(target, turned_bytes, x_bytes if beyond else 0)
    flop = int(w_tiles * 128 / unit) * 2 * SLOT * widths * width
    l1_bytes = w_tiles * 4 * widths * _product(plan, shape) * SHARED
    return Counts(
        flop=max(flop, problem.flop(n)), effective_flop=problem.flop(n), vector_fma=flop // (2 * WARP),
        vector_loads=int(w_tiles * 4 * widths), l1_bytes=int(l1_bytes),
        l2_bytes=int(from_l2) + turned_bytes, memory_bytes=memory,
        registers=width // 2 * (1 if shape.few else plan.slots // 2) + 40, code_bytes=64 * 4 * 2 ** (plan.slots // 2),
        table_bytes=table_bytes, value_bytes=value_bytes, cycles=cycles,
    )  # fmt: skip


def _product(plan: "HopperPlan", shape: Shape) -> float:
    """Cycles of one of the four products of a tile of W: it reads 2 KiB of W and the tokens' 32 bytes each, or is
    limited by its multiply-adds.  A lane that streams widens W and X, and multiplies, for 16 rows of a tile."""
    target, unit, width = plan.target, plan.problem.dtype.bytes, shape.width
    assert isinstance(target, GpuTarget)
    if shape.streams:
        return (16 // unit) * (16 * (width + 1) + 4 * width) / (4 * STREAM_RATE)
    rate = target.matrix_flop_per_cycle(plan.problem.dtype.name) / target.sms
    return max(2 * SLOT * width * 32 / unit / rate, (2048 + 32 * width) / SHARED)


def _boxes(plan: "HopperPlan", shape: Shape) -> int:
    """That X of a step comes in."""
    return plan.cut.pieces * (1 if plan.token_major else max(shape.width // SLOT, 1))


def _x_bytes(plan: "HopperPlan", shape: Shape) -> float:
    """Of X of a step, as L2 sends it: whole sectors of each token's piece."""
    piece_bytes = plan.cut.width * plan.problem.dtype.bytes
    return 128.0 * shape.width * (max(SECTOR / piece_bytes, 1.0) if plan.token_major else 1.0)


def _turning(target: GpuTarget, turned_bytes: int, from_memory: int) -> float:
    """Cycles of the kernel that turns X, of which so many bytes do not lie in L2; the copy does."""
    if not turned_bytes:
        return 0.0
    moving = max(turned_bytes / target.l2_bytes_per_cycle, from_memory / target.dram_bytes_per_cycle)
    return TURN_CYCLES + moving / TURN_SHARE


Bounds = tuple[tuple[float, ...], float]  # cycles of products, of what an SM takes in, of boxes; bytes from L2


def clusters_of(plan: "HopperPlan", shape: Shape) -> int:
    """That stay on the GPU at a time, it is thought."""
    target, cluster = plan.target, plan.cluster(shape)
    assert isinstance(target, GpuTarget)
    sms = target.sms if cluster <= 2 else max(target.sms - ODD_SMS, cluster)
    return max(sms // cluster, 1)


def line_of(plan: "HopperPlan", shape: Shape) -> Line:
    """What tiles of W, steps and tiles cost a thread block: cycles of what takes longest."""
    target, tiles, down = plan.target, plan.tiles, plan.down
    assert isinstance(target, GpuTarget)
    l2, x_bytes = target.l2_bytes_per_cycle / target.sms, _x_bytes(plan, shape)
    rows = (
        (4 * _product(plan, shape) / down, STEP_CYCLES),
        (W_BYTES / down / INGEST, x_bytes / INGEST),
        (W_BYTES / shape.across / down / l2, x_bytes / down / l2),
        (0.0, _box_cycles(plan, shape)),
    )
    each = float(tiles.w_tiles.sum()) / max(float(tiles.steps.sum()), 1.0)
    w, step = max(rows, key=lambda row: row[0] * each + row[1])
    between, covered = _between(plan, shape)
    snap = max(w * plan.cut.slots + step, _meeting(plan, shape) / 4)
    tile = max(math.ceil(between - covered), 1)
    return Line(math.ceil(w), math.ceil(step), tile, math.ceil(snap) + plan.cut.slots + 1)


def _meeting(plan: "HopperPlan", shape: Shape) -> float:
    """Cycles of a thread block that leaves its sums of a tile, or fetches another's, all of them at once."""
    target = plan.target
    assert isinstance(target, GpuTarget)
    return plan.sums_bytes(shape) * target.sms / target.l2_bytes_per_cycle


def _box_cycles(plan: "HopperPlan", shape: Shape) -> float:
    """Of whatever brings X of a step."""
    return GATHER_CYCLES * shape.width / SLOT if plan.gathered else _boxes(plan, shape) * BOX_CYCLES


def listing_of(plan: "HopperPlan", shape: Shape, n: int) -> Listing | None:
    """Who has which tiles of n tokens, where dealing them out by turns is slower and X stays in L2 beside W and Y."""
    x_bytes, line, tiles = n * plan.rows_of_x * plan.problem.x_dtype.bytes, line_of(plan, shape), plan.tiles
    if shape.few or shape.equal or x_bytes > BAND * plan.target.l2_bytes or tiles.steps.size * shape.groups(n) > LISTED:
        return None
    return listed(np.repeat(line.work(tiles.steps, tiles.w_tiles), shape.groups(n)), clusters_of(plan, shape))


def uneven_of(plan: "HopperPlan", shape: Shape, n: int, line: Line) -> float:
    """How much longer the last cluster works than the mean of all that there might be, by the schedule of n tokens."""
    groups, tiles, clusters = shape.groups(n), plan.tiles, clusters_of(plan, shape)
    work = line.work(tiles.steps, tiles.w_tiles)
    mean = float(work.sum()) * groups / clusters
    if shape.equal:
        return (
            pieces_time(line, tiles.steps, tiles.w_tiles, groups, clusters, _meeting(plan, shape), MEET_CYCLES) / mean
        )
    if work.size * groups > LISTED:
        return 1 + 0.5 * clusters / (work.size * groups)
    time = dealt_time(np.repeat(work, groups), clusters)
    found = listing_of(plan, shape, n) if time * GAIN > mean and groups in map(shape.groups, BUCKETS) else None
    return (found.time if found else time) / mean


def _whole(plan: "HopperPlan", shape: Shape, n: int) -> Bounds:
    """Thread blocks that stay, each with whole tiles or a piece of the line of all.  What L2 sends to several counts
    once there, and for each of them where it is taken in."""
    tiles, x_bytes, down = plan.tiles, _x_bytes(plan, shape), plan.down
    busy, line = clusters_of(plan, shape) * plan.cluster(shape), line_of(plan, shape)
    between, covered = _between(plan, shape)
    work = tiles.work(_product(plan, shape), down) + between - covered
    uneven, widths = uneven_of(plan, shape, n, line), shape.groups(n) * shape.across
    steps, w_bytes = float(tiles.steps.sum()) * widths, W_BYTES * float(tiles.w_tiles.sum()) * widths
    return (
        float(work.sum()) * widths * down * uneven / busy + covered,  # nothing covers the last tile's
        (w_bytes + steps * down * x_bytes) * uneven / (INGEST * busy),
        steps * down * _box_cycles(plan, shape) * uneven / busy,
    ), w_bytes / shape.across + steps * x_bytes


def _between(plan: "HopperPlan", shape: Shape) -> tuple[float, float]:
    """Cycles of a warpgroup from the last product of a tile to the first of the next, and how many of them products of
    the other one cover, which is some steps behind.

    What the copy engine stores is written to shared memory once, and only what the buffers have no room for is waited
    for; else it is written, read again and sent by the threads.
    """
    unit, tiles = plan.problem.out_dtype.bytes, plan.tiles
    results = plan.slots * SLOT * shape.width // WARPGROUPS
    if plan.boxed(shape):
        kept = plan.staging_bytes(shape) // WARPGROUPS
        between = results * unit / SHARED + max(results * unit - kept, 0) / OUTGO
    else:
        between = TABLE_CYCLES + 2 * results * (4 if plan.late else unit) / SHARED
    step = 4 * _product(plan, shape) * float(tiles.w_tiles.sum() / max(tiles.steps.sum(), 1)) / plan.down / WARPGROUPS
    between += TILE_CYCLES
    return between, min(between, plan.lead(shape) * step)


def _split(plan: "HopperPlan", shape: Shape, n: int) -> Bounds:
    """Thread blocks of one slot and a part of its steps; each brings its own X, and has its sums added up."""
    target, w_tiles, widths = plan.target, float(plan.tiles.w_tiles.sum()), shape.groups(n)
    assert isinstance(target, GpuTarget)
    parts = plan.tiles.steps.size * plan.cut.slots * shape.parts
    sms = min(target.sms, parts * widths)
    staged = 2 * SLOT * shape.width * 4 / SHARED
    if shape.streams:
        serial, boxes = parts * (STREAM_CYCLES + staged), 0
    else:
        between = (TILE_CYCLES + TABLE_CYCLES) / RESIDENT
        serial, boxes = w_tiles * STEP_CYCLES + parts * (between + staged), _boxes(plan, shape)
    from_l2 = widths * w_tiles * (W_BYTES + _x_bytes(plan, shape))
    uneven = 1 + 0.5 * RESIDENT * sms / (parts * widths)
    if parts * widths <= LISTED:
        of_w = max(4 * _product(plan, shape), (W_BYTES + _x_bytes(plan, shape)) / INGEST)
        own = plan.tiles.w_tiles * of_w + serial / parts
        every = np.repeat(own, plan.cut.slots * shape.parts * widths)
        uneven = dealt_time(every, sms) * sms / float(every.sum())
    return (
        (4 * w_tiles * _product(plan, shape) + serial) * widths * uneven / sms,
        from_l2 * uneven / (INGEST * sms),
        w_tiles * widths * boxes * BOX_CYCLES * uneven / sms,
    ), from_l2
