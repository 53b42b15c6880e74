"""How much work the tiles of a Hopper plan have: steps and tiles of W of each.

Counted in the tables of the pattern, or in closed form where it is only known to be even.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.even import EvenPattern

if TYPE_CHECKING:
    from bsrgen.backends.cuda.hopper import HopperPlan

STEP_CYCLES = 40.0  # of barriers and the start of products, the rest hides behind the other warpgroup: a guess
CLUSTERED = 0.13  # of the steps that rows in any order need, at most, are saved where rows that share columns are put
# together: 0 to 0.27 in 45 tables of random patterns, 4096 x 4096 in blocks of 16, 32 and 64, densities 0.05 to 0.8


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """What a plan's tiles hold."""

    steps: NDArray[Any]  # of each tile, the most first
    w_tiles: NDArray[Any]  # 64 x 128 bytes each, zeros included

    def work(self, product: float, down: int) -> NDArray[Any]:
        """Cycles of one of `down` thread blocks that share a tile, without what waits for copies."""
        return 4 * self.w_tiles / down * product + self.steps * STEP_CYCLES


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
