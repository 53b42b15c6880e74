"""Counting what a Hopper plan does on the whole GPU, in closed form: the pattern's tables are not made for it.

Below 128 rows of W to a tile of X, copies from L2 to shared memory are the limit, not the products: a byte of X is good
for as many FLOP as the tile has rows (roofline: Williams, Waterman, Patterson, CACM 52(4), 2009, one level further in).
No rate here is measured: data sheets, and where they say nothing, the sources named or a guess.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bsrgen.backends.cuda.hopper_packing import SLOT
from bsrgen.gpus import WARP, GpuTarget
from bsrgen.plan import Counts

if TYPE_CHECKING:
    from bsrgen.backends.cuda.hopper import HopperPlan

INGEST = 64.0  # bytes that one SM takes from L2 in a cycle, at most: DeepGEMM's model of sm_90
SHARED = 128.0  # bytes that one SM reads or writes of shared memory in a cycle
BOX_CYCLES = 16.0  # of the copy engine for one box, however small: a guess
GATHER_CYCLES = 128.0  # of four warps that copy 64 features of 64 tokens, 16 bytes a thread: a guess
STEP_CYCLES = 40.0  # of barriers and the start of products, the rest hides behind the other warpgroup: a guess
TILE_CYCLES = 600.0  # from the last product of a tile to the first of the next, beside the traffic of Y: a guess
OVERLAP = 0.1  # of the resources that do not bound: all of them are asynchronous; a guess


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Expected shape of a plan's tiles, were the blocks spread evenly."""

    count: int
    steps: float  # of all tiles
    w_tiles: float  # 64 x 64 tiles of W, zeros included


def counts(plan: "HopperPlan", n: int) -> Counts:
    """What one call of n tokens does."""
    problem, target, p, width = plan.problem, plan.target, plan.problem.pattern, plan.width(n)
    assert isinstance(target, GpuTarget)
    tiles, widths, boxes, few = _tiles(plan), -(-n // width), plan.cut.pieces, plan.few(width)
    if problem.operator.token_axis:
        boxes *= max(width // SLOT, 1)
    steps = tiles.w_tiles if few else tiles.steps  # each slot brings its own X where tokens are few
    value_bytes = int(tiles.w_tiles) * 2 * SLOT * SLOT
    table_bytes = 4 * tiles.count * plan.slots * SLOT + int(tiles.steps) * (5 + 4 * plan.cut.pieces)
    y_bytes = problem.out_dtype.bytes
    from_l2 = widths * (value_bytes + steps * width * 2 * SLOT)
    # a product of 64 rows reads 2 KiB of W and the tokens' 32 bytes each, or is limited by its multiply-adds
    rate = target.matrix_flop_per_cycle(problem.dtype.name) / target.sms
    product = max(2 * SLOT * width * 16 / rate, (2 * SLOT * 16 + 32 * width) / SHARED)
    staged = 2 * tiles.count * plan.slots * SLOT * width * (4 * plan.parts if few else 4 if plan.late else y_bytes)
    memory = value_bytes + table_bytes + (p.K * problem.x_dtype.bytes + problem.rows * y_bytes) * n
    thread_blocks = max(tiles.count * (plan.slots * plan.parts if few else widths), 1)
    sms = min(target.sms, thread_blocks)
    uneven = _unevenness(thread_blocks, sms)
    serial = steps * STEP_CYCLES + tiles.count * TILE_CYCLES * (plan.parts if few else 1) + staged / SHARED
    bounds = (
        (4 * tiles.w_tiles * product + serial) * widths * uneven / sms,
        max(from_l2 / target.l2_bytes_per_cycle, from_l2 * uneven / (INGEST * sms)),
        steps * widths * boxes * BOX_CYCLES * uneven / sms,
        memory / target.dram_bytes_per_cycle if memory > target.l2_bytes else 0.0,
    )
    if plan.gathered and not few:
        bounds = (*bounds[:2], steps * widths * GATHER_CYCLES * width / SLOT * uneven / sms, bounds[3])
    cycles = max(bounds) + OVERLAP * (sum(bounds) - max(bounds))
    flop = int(tiles.w_tiles) * 2 * SLOT * SLOT * widths * width
    return Counts(
        flop=max(flop, problem.flop(n)), effective_flop=problem.flop(n), vector_fma=flop // (2 * WARP),
        vector_loads=int(tiles.w_tiles * 4 * widths), l1_bytes=int(tiles.w_tiles * 4 * widths * product * SHARED),
        l2_bytes=int(from_l2), memory_bytes=memory, registers=width // 2 * plan.slots // 2 + 40,
        code_bytes=64 * 4 * 2 ** (plan.slots // 2), table_bytes=table_bytes, value_bytes=value_bytes, cycles=cycles,
    )  # fmt: skip


def _unevenness(tiles: int, sms: int) -> float:
    """How much longer the last SM works than the mean: a whole tile more at most, half of one in an order from large to
    small where there are several for each."""
    rounds = tiles / sms
    return math.ceil(rounds) / rounds if rounds < 2 else 1 + 0.5 / rounds


def _tiles(plan: "HopperPlan") -> _Tiles:
    p, cut = plan.problem.pattern, plan.cut
    slots = -(-p.block_rows // cut.segments) * cut.parts
    count, wide = -(-slots // cut.slots), p.block_cols * cut.wide
    if not p.nnzb:
        return _Tiles(count, 0.0, 0.0)

    def united(block_rows: int) -> float:
        """Pieces that so many block rows need together."""
        return wide * (1 - (1 - p.density) ** min(block_rows, p.block_rows))

    per_tile = united(cut.block_rows)
    steps = max(math.ceil(per_tile) / cut.pieces, 1.0)
    per_slot = united(cut.segments) / cut.pieces  # in whole steps, were its pieces side by side
    mixed = 0.0 if cut.pieces == 1 or cut.block_rows == cut.segments else 0.5 * min(2**cut.slots - 2, steps)
    w_tiles = slots * min(per_slot + mixed, steps)
    return _Tiles(count, count * steps, max(w_tiles, 1.0))
