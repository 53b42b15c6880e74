"""Packing for Hopper: which block rows share a tile of Y and its X, in which steps, and W as it is copied."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.pattern import Pattern

Integers = NDArray[Any]

SLOT = 64  # rows of W that one product has
WINDOW = 1024  # block rows that are searched for partners: the search is quadratic


@dataclass(frozen=True, slots=True)
class Cut:
    """How block rows become slots of 64 rows and columns pieces: `segments` block rows share a slot, or `parts` slots
    a block row; `slots` of them share a tile; `wide` pieces of `width` features are a block's columns."""

    segments: int
    parts: int
    slots: int
    wide: int
    width: int
    step: int = 64  # features of a step

    @property
    def pieces(self) -> int:
        """Pieces of a step."""
        return self.step // self.width

    @property
    def block_rows(self) -> int:
        """Of a tile."""
        return max(self.slots // self.parts, 1) * self.segments


@dataclass(frozen=True, slots=True, eq=False)
class HopperPacking:
    """The pattern as tables, tiles in the order they start in: the most work first.

    A tile goes through the pieces that any of its slots has, 128 bytes of features a step.  A slot that has none of a
    step's has no W for it; zeros stand for pieces that it lacks, and X behind the last one is out of bounds, which
    reads as zeros.
    """

    rows: Integers  # row of Y of each row of each tile, -1 for none: int32[tiles * slots * 64]
    steps: Integers  # first step of each tile: int32[tiles + 1]
    features: Integers  # first feature of each piece of each step, K for none: int32[steps * pieces]
    masks: Integers  # which slots have W for a step: uint8[steps]
    values: Integers  # first tile of W, 64 x 64, of each step: int32[steps + 1]
    source: Integers  # where each piece of a tile of W comes from, -1 for zeros: int64[tiles of W, segments, pieces]

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables that the kernel reads."""
        return sum(t.nbytes for t in (self.rows, self.steps, self.features, self.masks, self.values))


def pack_hopper(p: Pattern, cut: Cut) -> HopperPacking:
    """Tables of `p`.  Pure."""
    order = clustered(p, cut.block_rows)
    position = np.empty_like(order)
    position[order] = np.arange(order.size)
    count = -(-p.block_rows // cut.segments) * cut.parts  # of slots
    tiles = -(-count // cut.slots)
    slot, segment, column, piece = _pieces(p, cut, position)
    wide = max(p.block_cols * cut.wide, 1)
    keys, at = np.unique(slot // cut.slots * wide + column, return_inverse=True)  # what each tile needs of X
    needs = np.zeros(keys.size, np.uint8)
    np.bitwise_or.at(needs, at, (1 << slot % cut.slots).astype(np.uint8))
    tile = keys // wide
    work = np.bincount(slot // cut.slots, minlength=tiles) + np.bincount(tile, minlength=tiles)
    schedule = np.argsort(-work, kind="stable")  # Graham, SIAM J. Appl. Math. 17(2), 1969
    place = np.empty(tiles, np.int64)
    place[schedule] = np.arange(tiles)
    # pieces that the same slots need side by side, where a step has several: fewer zeros
    rank = np.lexsort((keys, needs if cut.pieces > 1 else keys, place[tile]))
    per_tile = np.bincount(place[tile], minlength=tiles)
    first, steps = _starts(per_tile), _starts(-(-per_tile // cut.pieces))
    inside = np.arange(keys.size) - first[place[tile[rank]]]
    step, lane = np.empty(keys.size, np.int64), np.empty(keys.size, np.int64)
    step[rank], lane[rank] = steps[place[tile[rank]]] + inside // cut.pieces, inside % cut.pieces
    features = np.full((int(steps[-1]), cut.pieces), p.K, np.int32)
    features[step, lane] = keys % wide // cut.wide * p.C + keys % wide % cut.wide * cut.width
    masks = np.zeros(int(steps[-1]), np.uint8)
    np.bitwise_or.at(masks, step, needs)
    values = _starts(np.bitwise_count(masks))
    below = np.bitwise_count(masks[step[at]] & ((1 << slot % cut.slots) - 1).astype(np.uint8))
    source = np.full((int(values[-1]), cut.segments, cut.pieces), -1, np.int64)
    source[values[step[at]] + below, segment, lane[at]] = piece
    rows = _rows(p, cut, order, tiles)[schedule]
    return HopperPacking(
        rows.astype(np.int32).ravel(), steps.astype(np.int32), features.ravel(), masks, values.astype(np.int32), source
    )


def clustered(p: Pattern, size: int) -> Integers:
    """Block rows in an order in which each `size` of them share many columns: the one with most blocks, then whatever
    has the largest part of what it and those before it need in common with them (greedily by Jaccard's index, as SMaT
    clusters rows: Okanovic et al., SC 2024).  int64[block_rows]."""
    if size == 1 or not p.nnzb:
        return np.arange(p.block_rows)
    found: list[int] = []
    for begin in range(0, p.block_rows, WINDOW):
        inside = slice(p.indptr[begin], p.indptr[min(begin + WINDOW, p.block_rows)])
        bits = np.zeros((min(WINDOW, p.block_rows - begin), p.block_cols), bool)
        bits[p.rows[inside] - begin, p.indices[inside]] = True
        words = np.packbits(bits, axis=1)
        counts = bits.sum(1)
        left = np.argsort(-counts, kind="stable")
        while left.size:
            union = words[left[0]].copy()
            found.append(begin + int(left[0]))
            left = left[1:]
            for _ in range(min(size - 1, left.size)):
                shared = np.bitwise_count(words[left] & union).sum(1, np.int64)
                both = np.bitwise_count(union).sum(dtype=np.int64) + counts[left] - shared
                best = int(np.argmax(shared / np.maximum(both, 1)))
                union |= words[left[best]]
                found.append(begin + int(left[best]))
                left = np.delete(left, best)
    return np.array(found)


def _pieces(p: Pattern, cut: Cut, position: Integers) -> tuple[Integers, Integers, Integers, Integers]:
    """Slot, segment, piece column and number (block, part, piece of its columns) of all pieces of stored blocks."""
    shape = (p.nnzb, cut.parts, cut.wide)
    number = np.arange(p.nnzb * cut.parts * cut.wide, dtype=np.int64).reshape(shape)
    a, b = np.arange(cut.parts)[None, :, None], np.arange(cut.wide)[None, None, :]
    row = position[p.rows][:, None, None]
    slot = np.broadcast_to(row // cut.segments * cut.parts + a, shape)
    segment = np.broadcast_to(row % cut.segments, shape)
    column = np.broadcast_to(p.indices.astype(np.int64)[:, None, None] * cut.wide + b, shape)
    return slot.ravel(), segment.ravel(), column.ravel(), number.ravel()


def _rows(p: Pattern, cut: Cut, order: Integers, tiles: int) -> Integers:
    """Row of Y of each row of each tile, -1 for none: [tiles, slots * 64]."""
    rows = np.full((tiles * cut.slots, SLOT), -1, np.int64)
    at, r = np.arange(order.size)[:, None], np.arange(p.R)[None, :]
    slot = at // cut.segments * cut.parts + r // SLOT
    m = order[:, None] * p.R + r
    rows[slot, at % cut.segments * p.R + r % SLOT] = np.where(m < p.M, m, -1)
    return rows.reshape(tiles, -1)


def _starts(counts: Integers) -> Integers:
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))


def pack_tiles(data: NDArray[Any], source: Integers, cut: Cut) -> NDArray[Any]:
    """data[nnzb, R, C] -> [tiles of W][64 rows][cut.step features], zeros where there is nothing, as 128-byte
    swizzling has them: 16 bytes j of row r at place j ^ r % 8 of the row (PTX ISA 8.5, section 5.5.7)."""
    nnzb, R, C = data.shape
    height = min(R, SLOT)
    whole = np.zeros((nnzb, cut.parts * height, C), data.dtype)
    whole[:, :R] = data
    pieces = whole.reshape(nnzb, cut.parts, height, cut.wide, cut.width).transpose(0, 1, 3, 2, 4)
    pieces = np.concatenate([pieces.reshape(-1, height, cut.width), np.zeros((1, height, cut.width), data.dtype)])
    tiles = np.zeros((source.shape[0], SLOT, cut.step), data.dtype)
    found = pieces[source].transpose(0, 1, 3, 2, 4)  # -1 is the piece of zeros
    tiles[:, : cut.segments * height] = found.reshape(-1, cut.segments * height, cut.step)
    r, j = np.ogrid[:SLOT, :8]
    return np.ascontiguousarray(tiles.reshape(-1, SLOT, 8, cut.step // 8)[:, r, j ^ r % 8])
