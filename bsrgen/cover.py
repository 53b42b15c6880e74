"""Cover: the same stored elements in blocks of another shape, absent ones among them filled with zeros."""

from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.canonical import compressed, grid
from bsrgen.pattern import Pattern

Array = NDArray[Any]
OUTSIDE = 0xFFFFFFFF  # a piece of a block that sticks out of the matrix, where the cover has no block


@dataclass(frozen=True, eq=False)
class Cover:
    """`blocks` stores every element that `own` stores.  Values move in pieces of r x c = gcd of the block sizes."""

    own: Pattern
    blocks: Pattern

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cover) and (self.own, self.blocks) == (other.own, other.blocks)

    def __hash__(self) -> int:
        return hash((self.own, self.blocks))

    @property
    def piece(self) -> tuple[int, int]:
        """Rows and columns that move together."""
        return gcd(self.own.R, self.blocks.R), gcd(self.own.C, self.blocks.C)

    @property
    def pieces(self) -> int:
        """Pieces of one block of `own`."""
        r, c = self.piece
        return self.own.R // r * (self.own.C // c)

    @cached_property
    def fills(self) -> bool:
        """Whether the cover holds an element of the matrix that is not stored: a zero that X is multiplied with."""
        return inside(self.blocks) > inside(self.own)

    @cached_property
    def moves(self) -> Array:
        """For each piece of each block of `own`, in order: its place among the pieces of the cover, or OUTSIDE."""
        r, c = self.piece
        rows, cols = _pieces(self.own, r, c)
        high, wide = self.blocks.R // r, self.blocks.C // c
        i, j = rows // high, cols // wide
        key = self.blocks.rows * self.blocks.block_cols + self.blocks.indices
        at = np.searchsorted(key, i * self.blocks.block_cols + j)
        place = (at * high + rows % high) * wide + cols % wide
        kept = (i < self.blocks.block_rows) & (j < self.blocks.block_cols)
        return np.where(kept, place, OUTSIDE).astype(np.uint32)

    def move(self, data: Array) -> Array:
        """Values (nnzb, R, C) of `own` -> (nnzb, R, C) of the cover."""
        (r, c), own, blocks = self.piece, self.own, self.blocks
        pieces = data.reshape(own.nnzb, own.R // r, r, own.C // c, c).transpose(0, 1, 3, 2, 4).reshape(-1, r, c)
        high, wide = blocks.R // r, blocks.C // c
        out = np.zeros((blocks.nnzb * high * wide, r, c), data.dtype)
        kept = self.moves != OUTSIDE
        out[self.moves[kept]] = pieces[kept]
        moved = out.reshape(blocks.nnzb, high, wide, r, c).transpose(0, 1, 3, 2, 4)
        return moved.reshape(blocks.nnzb, *blocks.blocksize)


def cover(own: Pattern, blocksize: tuple[int, int]) -> Cover:
    """The cover with the fewest blocks of that size."""
    rows, cols = grid(own.shape, blocksize)
    r, c = gcd(own.R, blocksize[0]), gcd(own.C, blocksize[1])
    i, j = _pieces(own, r, c)
    i, j = i // (blocksize[0] // r), j // (blocksize[1] // c)
    key = np.unique((i * cols + j)[(i < rows) & (j < cols)])
    return Cover(own, Pattern(own.shape, blocksize, *compressed(key, rows, cols)))


def full(own: Pattern, blocksize: tuple[int, int]) -> Cover:
    """Every block of the matrix: the dense product."""
    rows, cols = grid(own.shape, blocksize)
    return Cover(own, Pattern(own.shape, blocksize, *compressed(np.arange(rows * cols), rows, cols)))


def inside(p: Pattern) -> int:
    """Stored elements that lie in the matrix."""
    high = np.minimum(p.R, p.M - p.rows * p.R)
    wide = np.minimum(p.C, p.K - p.indices.astype(np.int64) * p.C)
    return int((high * wide).sum())


def _pieces(own: Pattern, r: int, c: int) -> tuple[Array, Array]:
    """Row and column, in pieces of r x c, of each piece of each block, row-major in the block."""
    high, wide = own.R // r, own.C // c
    rows = (own.rows * high)[:, None, None] + np.arange(high)[:, None] + np.zeros(wide, np.int64)
    cols = (own.indices.astype(np.int64) * wide)[:, None, None] + np.arange(wide) + np.zeros((high, 1), np.int64)
    return rows.reshape(-1), cols.reshape(-1)
