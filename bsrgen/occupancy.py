"""Occupancy: how many blocks of another shape the nonzeros of a matrix need."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bsrgen.foreign import Array, Pair
from bsrgen.pattern import Pattern, Weight

SIDE = 64  # longest side of a coarser block, where the given one is not longer
FACTORS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # coarser sides are these multiples of the given one
_WORDS = {2: np.uint16, 4: np.uint32, 8: np.uint64}
BITMAP_CELLS = 1 << 28  # largest grid that is kept as one byte per block; beyond it, only the stored ones are listed


@dataclass(frozen=True, slots=True, eq=False)
class Occupancy:
    """Which blocks of a grid hold something: bool[rows, cols], or where that is too large, sorted keys i * cols + j."""

    shape: Pair
    blocksize: Pair
    cells: Array

    @property
    def nnzb(self) -> int:
        """Blocks that hold something."""
        return int(np.count_nonzero(self.cells)) if self.cells.ndim == 2 else int(self.cells.size)

    @property
    def elements(self) -> int:
        """What storing them takes, padding included."""
        return self.nnzb * self.blocksize[0] * self.blocksize[1]

    @property
    def density(self) -> float:
        """Blocks that hold something / all blocks."""
        (M, K), (R, C) = self.shape, self.blocksize
        return self.nnzb / max(1, -(-M // R) * -(-K // C))

    def coarser(self, new: Pair) -> "Occupancy":
        """The same in blocks of `new`, a multiple of the block shape."""
        down, right = new[0] // self.blocksize[0], new[1] // self.blocksize[1]
        if self.cells.ndim == 2:
            return Occupancy(self.shape, new, _joined(_joined(self.cells, down, 0), right, 1))
        old_cols, new_cols = (-(-self.shape[1] // width) for width in (self.blocksize[1], new[1]))
        i, j = np.divmod(self.cells, old_cols)
        return Occupancy(self.shape, new, np.unique(i // down * new_cols + j // right))


def _joined(cells: Array, factor: int, axis: int) -> Array:
    """Each `factor` neighbours along `axis` joined by or; the last ones may be fewer."""
    size = cells.shape[axis]
    if factor > SIDE:
        joined: Array = np.logical_or.reduceat(cells, np.arange(0, size, factor), axis=axis)
        return joined
    if axis == 1 and factor in _WORDS and size % factor == 0 and size:
        joined = np.ascontiguousarray(cells).view(_WORDS[factor]) != 0  # as one word: ten times faster than by bytes
        return joined
    slices = [(slice(None),) * axis + (slice(k, None, factor),) for k in range(factor)]
    joined = cells[slices[0]].copy() if factor > 1 else cells
    for k in slices[1:]:
        part = cells[k]
        joined[: part.shape[0], : part.shape[1]] |= part
    return joined


def stored(pattern: Pattern) -> Occupancy:
    """The stored blocks."""
    p = pattern
    if p.block_rows * p.block_cols > BITMAP_CELLS:
        return Occupancy(p.shape, p.blocksize, p.rows * p.block_cols + p.indices)
    cells = np.zeros((p.block_rows, p.block_cols), bool)
    cells[p.rows, p.indices] = True
    return Occupancy(p.shape, p.blocksize, cells)


def nonzeros(weight: Weight | Pattern) -> Occupancy:
    """The elements within the shape that are not zero; of a Pattern, those of its stored blocks."""
    p = weight if isinstance(weight, Pattern) else weight.pattern
    filled = weight.data != 0 if isinstance(weight, Weight) else np.ones((p.nnzb, p.R, p.C), bool)
    if p.block_rows * p.R * p.block_cols * p.C <= BITMAP_CELLS:
        cells = np.zeros((p.block_rows, p.R, p.block_cols, p.C), bool)
        cells[p.rows, :, p.indices, :] = filled
        cells = cells.reshape(p.block_rows * p.R, p.block_cols * p.C)[: p.M, : p.K]
        return Occupancy(p.shape, (1, 1), cells)
    b, r, c = filled.nonzero()
    i, j = p.rows[b] * p.R + r, p.indices[b].astype(np.int64) * p.C + c
    inside = (i < p.M) & (j < p.K)
    return Occupancy(p.shape, (1, 1), np.sort((i * p.K + j)[inside]))


def occupancies(weight: Weight | Pattern, most_elements: float, finer: bool = True) -> Iterator[Occupancy]:
    """The given block shape, then other ones that store at most `most_elements`, small ones first.

    Finer sides divide the given ones, coarser sides are multiples of them by FACTORS up to SIDE.  What is a multiple of
    the given shape counts its stored blocks; all else counts nonzeros, so that zeros within blocks show, and is left
    out unless `finer`.
    """
    p = weight if isinstance(weight, Pattern) else weight.pattern
    found, over = {p.blocksize: stored(p)}, set[Pair]()
    yield found[p.blocksize]
    rows, cols = (_sides(size, block) for size, block in zip(p.shape, p.blocksize, strict=True))
    for new in sorted(((r, c) for r in rows for c in cols), key=lambda new: (new[0] * new[1], new)):
        multiple = _divides(p.blocksize, new)
        if new == p.blocksize or not p.nnzb or not (multiple or finer):
            continue
        if any(_divides(old, new) and multiple <= _divides(p.blocksize, old) for old in over):
            continue  # a multiple of what stores too much stores no less
        before = [old for old in found if _divides(old, new) and multiple <= _divides(p.blocksize, old)]
        best = max(before, key=lambda old: old[0] * old[1], default=None)
        taken = found[best].coarser(new) if best else nonzeros(weight)
        if taken.elements <= most_elements:
            found[new] = taken
            yield taken
        else:
            over.add(new)


def _divides(old: Pair, new: Pair) -> bool:
    return new[0] % old[0] == 0 and new[1] % old[1] == 0


def _sides(size: int, block: int) -> list[int]:
    """Sides of finer blocks, the given side, and sides of coarser blocks that the matrix does not end far within."""
    finer = [side for side in range(1, min(block, SIDE + 1)) if block % side == 0]
    return [*finer, block, *(block * f for f in FACTORS if f > 1 and block * f <= SIDE and block * (f - 1) < size)]
