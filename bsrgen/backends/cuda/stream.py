"""Calls of few tokens: how W streams through the registers of a GPU, and which thread block has which part of it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[Any]

WARP = 32
LOAD_BYTES = 16  # of a lane
LINE_LOADS = 8  # lanes side by side along rows: whole lines of 128 bytes
IN_FLIGHT = 8  # loads of a lane
SECTOR_BYTES = 32  # what memory gives at least
WARPS = 8  # of a thread block at most
WARP_BYTES = 4 << 10  # of W that a warp should have, IN_FLIGHT loads of its lanes
SUMS = 32  # of a thread: 64 spill, addresses of as many tokens take registers as well (nvcc 13.0, 128 registers)
SHARED_BYTES = 48 << 10


@dataclass(frozen=True, slots=True)
class Stream:
    """A thread block has `rows` rows of a piece row and a range along k; its warps share the range, and their sums meet
    in shared memory.  A lane loads `vector` rows of a column, or a fragment; `lanes` of them lie along the rows."""

    rows: int
    vector: int
    lanes: int
    warps: int
    loads: int  # of a lane, ahead of their products, where there is one token
    tokens: tuple[int, ...]  # a kernel for each: its calls have at most so many, or several times the last

    def depth(self, tokens: int) -> int:
        """Loads ahead in the kernel for so many tokens; their X takes registers, too."""
        return self.loads if tokens == 1 or self.lanes == WARP else self.loads // 2

    def width(self, n: int) -> int:
        """Tokens of a thread block in a call of n."""
        return next((t for t in self.tokens if n <= t), self.tokens[-1])


def on_cores(
    piece_rows: int, element_bytes: int, sum_bytes: int, packed_bytes: int, piece_row_count: int, halves: int, sms: int
) -> Stream:
    """For products on the ordinary cores: whole lines where a column of a piece row has as many rows, but two thread
    blocks to each SM; `halves` is 2 for a pair of weights."""
    vector = next(v for v in (16, 8, 4, 2, 1) if v * element_bytes <= LOAD_BYTES and piece_rows % v == 0)
    chunks = piece_rows // vector
    shares = [d for d in range(LINE_LOADS, 0, -1) if chunks % d == 0]
    least = min((d for d in shares if d * vector * element_bytes >= SECTOR_BYTES), default=shares[0])
    lanes = next(d for d in shares if d <= least or piece_row_count * (chunks // d) >= 2 * sms * halves)
    units = piece_row_count * (chunks // lanes) // halves
    most = min(SUMS * 4 // (vector * sum_bytes), 16)
    tokens = (*(t for t in (1, 4) if t < most), most)
    rows = lanes * vector
    return Stream(rows, vector, lanes, _warps(packed_bytes, units, halves * rows * most * sum_bytes), IN_FLIGHT, tokens)


def on_units(piece_rows: int, packed_bytes: int, piece_row_count: int, halves: int, sms: int) -> Stream:
    """For matrix units: as many rows as leave two thread blocks to each SM."""
    strips = piece_rows // 8
    pair = 2 - strips % 2
    shares = [s for s in range(strips, 0, -1) if strips % s == 0 and s % pair == 0 and s <= 8]
    chosen = next((s for s in shares if piece_row_count * (strips // s) >= 2 * sms * halves), shares[-1])
    units = piece_row_count * (strips // chosen) // halves
    loads = max(IN_FLIGHT * pair // chosen, 1)
    return Stream(8 * chosen, pair, WARP, _warps(packed_bytes, units, halves * 8 * chosen * 16 * 4), loads, (16,))


def _warps(packed_bytes: int, units: int, sums_bytes: int) -> int:
    """Warps that share a unit: a power of two, each with work to hide its latency, all sums in shared memory."""
    warps = 1
    while warps < WARPS and 2 * warps * WARP_BYTES * units <= packed_bytes and 2 * warps * sums_bytes <= SHARED_BYTES:
        warps *= 2
    return warps


def parts(rows: Integers, ends: Integers, shares: int, halves: int) -> dict[str, Integers]:
    """Work of thread blocks, the longest first: piece row `rows[i]`, of which each of `shares` shares of its rows has a
    part, walks units [ends[i], ends[i + 1]) along k; of a pair of weights those of the gate, then those as far on."""
    begin, end = (e.reshape(halves, -1) for e in (ends[:-1], ends[1:]))
    order = np.repeat(np.argsort(-(end - begin).sum(axis=0), kind="stable"), shares)
    share = np.tile(np.arange(shares), rows.size)
    table = {"row": rows[order], "share": share, "begin": begin[:, order].T, "end": end[:, order].T}
    return {name: values.ravel().astype(np.int32) for name, values in table.items()}


def runs(features: Integers, K: int) -> tuple[Integers, int]:
    """(first of each run, length of a run) of features that lie side by side, K for those that are not there."""
    for run in (8, 4, 2):
        table = features.reshape(-1, run)
        if (table == np.minimum(table[:, :1] + np.arange(run), K)).all():
            return table[:, 0].astype(np.int32), run
    return features.astype(np.int32), 1
