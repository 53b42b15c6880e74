"""Who does what on a Hopper, and how long the last one takes: tiles dealt out, or the line of all steps in pieces."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]

BUCKETS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # of tokens: kernels are chosen for each
LISTED = 1 << 12  # tiles of a call that are listed for thread blocks: with more, dealing is within 1 % of it
BAND = 0.75  # of L2, at most, has X of the tokens that all of W meets before the next ones
GAIN = 0.99  # of the time, at most, that a list leaves: else it is not worth its bytes


@dataclass(frozen=True, slots=True)
class Line:
    """How long the line of a kernel's work is: all tiles, a tile's groups of tokens side by side (stream-K: Osama et
    al., PPoPP 2023).  Lengths are cycles of what binds, so that equal pieces take equal times; a cut goes to the next
    step, or to the end of a tile that is no further than `snap` away: sums that are left and fetched cost more.
    """

    w: int  # of a tile of W
    step: int  # of a step: its X
    tile: int  # from the last step of a tile to the next one's first
    snap: int  # at least a whole step, so that a cut inside of a tile is at one

    def work(self, steps: Floats, w_tiles: Floats) -> Floats:
        """Of each tile."""
        work: Floats = self.w * w_tiles + self.step * steps + self.tile
        return work

    @property
    def least(self) -> int:
        """Of a piece: no two cuts meet."""
        return 3 * self.snap + self.tile

    def pieces(self, length: int, most: int) -> int:
        """That a line of that length is cut into."""
        return max(min(most, length // self.least), 1)


def pieces_time(
    line: Line, steps: Floats, w_tiles: Floats, groups: int, most: int, meet: float, wait: float = 0
) -> float:
    """How long the longest piece takes, `meet` for each set of sums that it leaves or fetches, `wait` for the latter.

    Steps of a tile are taken to be alike; the kernel knows each (templates/cuda/wgmma_walk.cuh.j2).
    """
    inside = line.work(steps, w_tiles) - line.tile
    ahead = np.concatenate(([0.0], np.cumsum(inside + line.tile))) * groups
    pieces = line.pieces(int(ahead[-1]), most)
    at = ahead[-1] * np.arange(pieces) / pieces
    tile = np.minimum(np.searchsorted(ahead, at, "right"), steps.size) - 1
    length = inside[tile] + line.tile
    group = np.minimum((at - ahead[tile]) // length, groups - 1)
    lead, step = at - ahead[tile] - group * length, inside[tile] / np.maximum(steps[tile], 1)
    within = (lead > line.snap) & (lead < inside[tile] - line.snap)
    moved = np.where(within, np.ceil(lead / np.maximum(step, 1)) * step, np.where(lead > line.snap, length, 0))
    times = np.diff(np.append(at - lead + moved, ahead[-1]))
    cuts, unit = np.flatnonzero(within), (tile * groups + group)[within]
    first = np.flatnonzero(np.diff(unit, prepend=-1))  # of each tile
    times[cuts] += meet  # sums that are left
    # whoever begins a tile ends with it, and finds the others' there
    times[cuts[first] - 1] += wait + meet * np.diff(first, append=unit.size)
    return float(times.max())


def dealt_time(work: Floats, clusters: int) -> float:
    """Of tiles dealt out as the kernel does: the most first, every second round backwards."""
    rounds = -(-work.size // clusters)
    dealt = np.zeros(rounds * clusters)
    dealt[: work.size] = work
    table = dealt.reshape(rounds, clusters)
    table[1::2] = table[1::2, ::-1]
    return float(table.sum(axis=0).max())


def to_the_least(work: Floats, clusters: int) -> tuple[NDArray[Any], float]:
    """The cluster of each tile, and the time of the last one: round by round, the most work to whoever has least so far
    (largest first: Graham, SIAM J. Appl. Math. 17(2), 1969)."""
    loads, chosen = np.zeros(clusters), np.empty(work.size, np.int64)
    for begin in range(0, work.size, clusters):
        some = work[begin : begin + clusters]
        least = np.argsort(loads, kind="stable")[: some.size]
        chosen[begin : begin + some.size] = least
        loads[least] += some
    return chosen, float(loads.max())


@dataclass(frozen=True, slots=True, eq=False)
class Listing:
    """Which tiles each cluster has, in the order in which it takes them."""

    ends: NDArray[Any]  # where each one's begin in `tiles`, and the end: int32[clusters + 1]
    tiles: NDArray[Any]  # int32
    time: float


def listed(work: Floats, clusters: int) -> Listing | None:
    """A list of tiles for each cluster, the most work first; None where dealing them out is about as fast."""
    if work.size > LISTED or work.size <= clusters:
        return None
    chosen, time = to_the_least(work, clusters)
    if time > GAIN * dealt_time(work, clusters):
        return None
    ends = np.concatenate(([0], np.cumsum(np.bincount(chosen, minlength=clusters))))
    return Listing(ends.astype(np.int32), np.argsort(chosen, kind="stable").astype(np.int32), time)
