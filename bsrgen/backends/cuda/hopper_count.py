"""Counting what a Hopper plan does on the whole GPU.

Below 128 rows of W to a tile of X, copies from L2 to shared memory are the limit, not the products: a byte of X is good
for as many FLOP as the tile has rows (roofline: Williams, Waterman, Patterson, CACM 52(4), 2009, one level further in).
Steps and tiles of W are counted in the tables of the pattern, or in closed form where it is only known to be even.
No rate here is measured: data sheets, and where they say nothing, the sources named or a guess.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.backends.cuda.hopper_packing import SLOT
from bsrgen.even import EvenPattern
from bsrgen.gpus import WARP, GpuTarget
from bsrgen.plan import Counts

if TYPE_CHECKING:
    from bsrgen.backends.cuda.hopper import HopperPlan, Shape

INGEST = 64.0  # bytes that one SM takes from L2 in a cycle, at most, sent to it alone or to others too: DeepGEMM's model of sm_90
SHARED = 128.0  # bytes that one SM reads or writes of shared memory in a cycle
BOX_CYCLES = 16.0  # of the copy engine for one box, however small: a guess
GATHER_CYCLES = 128.0  # of four warps that copy 64 features of 64 tokens, 16 bytes a thread: a guess
STEP_CYCLES = 40.0  # of barriers and the start of products, the rest hides behind the other warpgroup: a guess
TILE_CYCLES = 600.0  # from the last product of a tile to the first of the next, beside the traffic of Y: a guess
STREAM_CYCLES = 300.0  # of a thread block on the ordinary cores, beside its work: a guess
STREAM_RATE = 3.0  # instructions of an SM in a cycle, of 4: a guess
CLUSTER_CYCLES = 1000.0  # until the thread blocks of a cluster have met twice: a guess
OVERLAP = 0.1  # of the resources that do not bound: all of them are asynchronous; a guess
CLUSTERED = 0.13  # of the steps that rows in any order need, at most, are saved where rows that share columns are put
# together: 0 to 0.24 in 45 tables of random patterns, 4096 x 4096 in blocks of 16, 32 and 64, densities 0.05 to 0.8
ODD_SMS = 4  # that clusters of more than two leave idle: processor clusters of 16 and of 18 SMs; a guess
RESIDENT = 2  # thread blocks of a slot on an SM
DEALT = 1 << 12  # parts of a call that are dealt out to see how unevenly: with more it no longer matters


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """What a plan's tiles hold."""

    steps: NDArray[Any]  # of each tile, the most first
    w_tiles: NDArray[Any]  # 64 x 128 bytes each, zeros included

    def work(self, product: float, down: int) -> NDArray[Any]:
        """Cycles of one of `down` thread blocks that share a tile, without what waits for copies."""
        return 4 * self.w_tiles / down * product + self.steps * STEP_CYCLES + TILE_CYCLES


def counts(plan: "HopperPlan", n: int, shape: "Shape") -> Counts:
    """What one call of n tokens does, by that kernel."""
    problem, target, p, width = plan.problem, plan.target, plan.problem.pattern, shape.width
    assert isinstance(target, GpuTarget)
    tiles, unit = plan.tiles, problem.dtype.bytes
    steps, w_tiles = float(tiles.steps.sum()), float(tiles.w_tiles.sum())
    value_bytes, x_bytes, y_bytes = int(w_tiles) * 128 * SLOT, 128 * width, problem.out_dtype.bytes
    table_bytes = 4 * tiles.steps.size * plan.cut.slots * SLOT + int(steps) * (5 + 4 * plan.cut.pieces)
    # a product of 64 rows reads 2 KiB of W and the tokens' 32 bytes each, or is limited by its multiply-adds
    rate = target.matrix_flop_per_cycle(problem.dtype.name) / target.sms
    product = max(2 * SLOT * width * 32 / unit / rate, (2048 + 32 * width) / SHARED)
    widths = -(-n // (width * shape.across)) * shape.across
    work = _split if shape.few else _whole
    bounds, from_l2 = work(plan, shape, widths, product, x_bytes, y_bytes)
    memory = value_bytes + table_bytes + (p.K * problem.x_dtype.bytes + problem.rows * y_bytes) * n
    dram = memory / target.dram_bytes_per_cycle if memory > target.l2_bytes else 0.0
    bounds = (*bounds, from_l2 / target.l2_bytes_per_cycle, dram)
    cycles = max(bounds) + OVERLAP * (sum(bounds) - max(bounds)) + CLUSTER_CYCLES * (plan.cluster(shape) > 1)
    flop = int(w_tiles * 128 / unit) * 2 * SLOT * widths * width
    return Counts(
        flop=max(flop, problem.flop(n)), effective_flop=problem.flop(n), vector_fma=flop // (2 * WARP),
        vector_loads=int(w_tiles * 4 * widths), l1_bytes=int(w_tiles * 4 * widths * product * SHARED),
        l2_bytes=int(from_l2), memory_bytes=memory, registers=width // 2 * (1 if shape.few else plan.slots // 2) + 40,
        code_bytes=64 * 4 * 2 ** (plan.slots // 2), table_bytes=table_bytes, value_bytes=value_bytes, cycles=cycles,
    )  # fmt: skip


def _whole(
    plan: "HopperPlan", shape: "Shape", widths: int, product: float, x_bytes: int, y_bytes: int
) -> tuple[tuple[float, ...], float]:
    """Thread blocks that stay, each with whole tiles: cycles of products, of what an SM takes in and of boxes; bytes
    from L2, where what is sent to several counts once."""
    target, tiles, width = plan.target, plan.tiles, shape.width
    assert isinstance(target, GpuTarget)
    cluster = plan.cluster(shape)
    sms = target.sms if cluster <= 2 else max(target.sms - ODD_SMS, cluster)
    clusters, units = max(sms // cluster, 1), tiles.steps.size * widths // shape.across
    steps, w_tiles = float(tiles.steps.sum()) * widths, float(tiles.w_tiles.sum()) * widths
    staged = 2 * plan.slots * SLOT * width * (4 if plan.late else y_bytes) / SHARED
    work = tiles.work(product, plan.down) + staged
    uneven, busy = _unevenness(work, widths // shape.across, clusters), clusters * cluster
    w_bytes, piece_boxes = 128 * SLOT * w_tiles, plan.cut.pieces * (1 if plan.problem.operator.token_axis == 0 else width // SLOT)
    taken = w_bytes + steps * plan.down * x_bytes
    boxes = steps * max(plan.down if plan.problem.operator.token_axis == 0 else 1, 1) * piece_boxes * BOX_CYCLES
    if plan.gathered:
        boxes = steps * plan.down * GATHER_CYCLES * width / SLOT
    from_l2 = w_bytes / shape.across + steps * x_bytes
    products = float(work.sum()) * widths * plan.down * uneven / busy
    return (products, taken * uneven / (INGEST * busy), boxes * uneven / busy), from_l2


def _split(
    plan: "HopperPlan", shape: "Shape", widths: int, product: float, x_bytes: int, y_bytes: int
) -> tuple[tuple[float, ...], float]:
    """Thread blocks of one slot and a part of its steps; each brings its own X, and has its sums added up."""
    target, w_tiles = plan.target, float(plan.tiles.w_tiles.sum())
    assert isinstance(target, GpuTarget)
    slots = plan.tiles.steps.size * plan.cut.slots
    thread_blocks = slots * shape.parts * widths
    rounds = thread_blocks / (RESIDENT * target.sms)
    uneven = math.ceil(rounds) / rounds if rounds < 2 else 1 + 0.5 / rounds
    sms = min(target.sms, thread_blocks)
    if rounds < 1:
        uneven = max(1.0, math.ceil(thread_blocks / target.sms) * target.sms / thread_blocks) if thread_blocks > target.sms else 1.0
    staged = 2 * SLOT * shape.width * 4 / SHARED
    boxes = plan.cut.pieces * (1 if plan.problem.operator.token_axis == 0 else max(shape.width // SLOT, 1))
    if shape.streams:  # a lane widens W and X, and multiplies; 16 rows of a tile each
        vector = 16 // plan.problem.dtype.bytes
        product = (16 * vector * (shape.width + 1) + 4 * vector * shape.width) / (4 * STREAM_RATE)
        serial, boxes = slots * shape.parts * (STREAM_CYCLES + staged), 0
    else:
        serial = w_tiles * STEP_CYCLES + slots * shape.parts * (TILE_CYCLES / RESIDENT + staged)
    products = (4 * w_tiles * product + serial) * widths * uneven / sms
    from_l2 = widths * w_tiles * (128 * SLOT + x_bytes)
    return (products, from_l2 * uneven / (INGEST * sms), w_tiles * widths * boxes * BOX_CYCLES * uneven / sms), from_l2


def _unevenness(work: NDArray[Any], widths: int, clusters: int) -> float:
    """How much longer the last cluster works than the mean, dealt out as the kernel does: the most first, every second
    round backwards."""
    units = work.size * widths
    if units > DEALT:
        return 1 + 0.5 * clusters / units
    rounds = -(-units // clusters)
    dealt = np.zeros(rounds * clusters)
    dealt[:units] = np.repeat(work, widths)
    table = dealt.reshape(rounds, clusters)
    table[1::2] = table[1::2, ::-1]
    return float(table.sum(axis=0).max() * clusters / max(dealt.sum(), 1e-9))


def tiles_of(plan: "HopperPlan") -> Tiles:
    """Of the pattern's tables, or as they are likely to be."""
    p, cut = plan.problem.pattern, plan.cut
    if not isinstance(p, EvenPattern):
        t = plan.packing
        return Tiles(np.diff(t.steps).astype(np.float64), np.diff(t.values[t.steps]).astype(np.float64))
    slots = -(-p.block_rows // cut.segments) * cut.parts
    count, wide = -(-slots // cut.slots), p.block_cols * cut.wide
    if not p.nnzb:
        return Tiles(np.zeros(count), np.zeros(count))

    def united(block_rows: int) -> float:
        """Pieces that so many block rows need together."""
        share = 1 - (1 - p.density) ** min(block_rows, p.block_rows)
        saved = CLUSTERED * (1 - share**4) if block_rows > 1 else 0.0
        return wide * max(share * (1 - saved), p.density)

    steps = max(math.ceil(united(cut.block_rows)) / cut.pieces, 1.0)
    per_slot = united(cut.segments) / cut.pieces  # in whole steps, were its pieces side by side
    mixed = 0.0 if cut.pieces == 1 or cut.block_rows == cut.segments else 0.5 * min(2**cut.slots - 2, steps)
    w_tiles = max(cut.slots * min(per_slot + mixed, steps), 1.0)
    blocks = max(cut.block_rows * p.block_cols, 1)  # were each of them stored by chance
    spread = math.sqrt((1 - p.density) / (p.density * blocks))
    place = np.linspace(1, 0, 2 * count + 1)[1::2]
    likely = 1 + spread * np.array([NormalDist().inv_cdf(q) for q in place.tolist()])
    return Tiles(steps * np.maximum(likely, 0.1), w_tiles * np.maximum(likely, 0.1))
