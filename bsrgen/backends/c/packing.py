"""The order in which a kernel keeps its values, and the tables it walks them by."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.backends.c.products import Product
from bsrgen.cover import OUTSIDE, Cover
from bsrgen.pattern import Pattern

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of a block row that are packed together; `slots` >= rows counts the zero fill of the last vector."""

    row: int
    rows: int
    slots: int


@dataclass(frozen=True, slots=True)
class Bits:
    """How bits tell the stored cells of X's features from the others, a vector at a time."""

    step: int  # cells of a vector
    cells: int  # that a bit stands for
    bytes: int  # of W that it stands for

    @property
    def count(self) -> int:
        """Bits of a vector."""
        return self.step // self.cells

    def vectors(self, cells: int) -> int:
        """Vectors that so many cells take."""
        return -(-cells // self.step)


@dataclass(frozen=True)
class Packing:
    """Blocks by panel of X and block row; in one such segment group after group, block after block."""

    blocks: Pattern
    cover: Cover | None  # where the blocks are not the problem's own
    groups: tuple[Group, ...]
    k_lanes: int  # neighbouring k that lie side by side
    k_panel: int  # features of a panel
    panels: int
    product: Product

    @property
    def count(self) -> int:
        """Packed blocks."""
        return self.blocks.nnzb

    @property
    def block_values(self) -> int:
        """Packed units of one block."""
        return sum(group.slots for group in self.groups) * self.blocks.C

    @property
    def offset_bytes(self) -> int:
        """Bytes of one offset: 16 bits where a panel is short enough."""
        return 2 if self.k_panel <= 1 << 16 else 4

    @cached_property
    def _segment(self) -> Array:
        """(panel, block row) of each stored block, as one number, in pattern order."""
        p = self.blocks
        panel = p.indices.astype(np.int64) * p.C // max(self.k_panel, 1)
        return panel * p.block_rows + p.rows

    @cached_property
    def _sorted(self) -> Array:
        """Stored blocks by panel, block row, block column."""
        if self.panels == 1:
            return np.arange(self.blocks.nnzb, dtype=np.uint32)
        return np.argsort(self._segment, kind="stable").astype(np.uint32)

    @property
    def order(self) -> Array:
        """Stored blocks in packed order."""
        return self._sorted

    @cached_property
    def _segments(self) -> tuple[Array, Array]:
        """The (panel, block row) pairs that the kernel walks, and their stored blocks."""
        if self.panels == 1:
            return np.arange(self.blocks.block_rows), self.blocks.row_counts
        return np.unique(self._segment, return_counts=True)

    @property
    def segments(self) -> Array:
        """The (panel, block row) pairs that the kernel walks: all of them, or with panels those that hold blocks."""
        return self._segments[0]

    @property
    def counts(self) -> Array:
        """Packed blocks of each segment."""
        return self._segments[1]

    @cached_property
    def pointers(self) -> Array:
        """First packed block of each segment, and the end."""
        return np.concatenate(([0], np.cumsum(self.counts))).astype(np.uint32)

    @property
    def _segment_of_block(self) -> Array:
        """Number of the segment of each packed block."""
        return np.repeat(np.arange(self.segments.size), self.counts)

    @cached_property
    def segment_rows(self) -> Array:
        """Block row of each segment."""
        return (self.segments % max(self.blocks.block_rows, 1)).astype(np.uint32)

    def stored_bits(self, bits: Bits) -> Array:
        """Whole vectors of bits for the panel of each segment, of single rows: which of its features are stored."""
        C, per_panel = self.blocks.C, bits.vectors(self.k_panel) * bits.count
        segment = np.repeat(np.arange(self.segments.size), self._segments[1])
        column = self.blocks.indices[self._sorted].astype(np.int64) * C % max(self.k_panel, 1)
        marks = np.zeros((self.segments.size, per_panel), np.uint8)
        for c in range(0, C, bits.cells):
            marks[segment, (column + c) // bits.cells] = 1
        return np.packbits(marks, axis=1, bitorder="little").view(f"<u{bits.count // 8}")

    @cached_property
    def panel_starts(self) -> Array:
        """First segment of each panel, and the end."""
        firsts = np.arange(self.panels + 1) * self.blocks.block_rows
        return np.searchsorted(self.segments, firsts).astype(np.uint32)

    @cached_property
    def offsets(self) -> Array:
        """First feature of each packed block, relative to its panel: 16 bits where that is enough."""
        p = self.blocks
        k = p.indices[self.order].astype(np.int64) * p.C % max(self.k_panel, 1)
        return k.astype(f"u{self.offset_bytes}")

    def pack(self, data: Array, corrections: int = 0) -> Array:
        """(nnzb, R, C) of the problem's pattern -> bytes: per segment and group, [block][k step][slot][k lane], with
        `corrections` numbers for the rows ahead of all, int32."""
        units = self._units(self.cover.move(data) if self.cover else data)
        starts = self.pointers.astype(np.int64)
        counts, n = np.diff(starts), self.count
        steps, kl = units.shape[2] // self.k_lanes, self.k_lanes
        packed = np.zeros((n * self.block_values, self.product.group), units.dtype)
        before = 0
        for group in self.groups:
            size = group.slots * units.shape[2]
            part = np.zeros((n, steps, group.slots, kl, self.product.group), units.dtype)
            rows = units[:, group.row : group.row + group.rows].reshape(n, group.rows, steps, kl, self.product.group)
            part[:, :, : group.rows] = rows.transpose(0, 2, 1, 3, 4)
            first = starts[:-1] * self.block_values + counts * before
            at = np.repeat(first - starts[:-1] * size, counts) + np.arange(n) * size
            if len(self.groups) == 1:
                packed = part
                break
            packed[at[:, None] + np.arange(size)] = part.reshape(n, size, self.product.group)
            before += size
        head = self._row_sums(units, corrections) if corrections else b""
        return np.frombuffer(head + packed.tobytes(), np.uint8)

    def _units(self, data: Array) -> Array:
        """(packed blocks, R, units of columns, elements of a unit), in packed order."""
        data = data[self.order] if self.panels > 1 else data
        if self.product.group > 1:
            data = _parts(data, self.product)
        return data.reshape(self.count, self.blocks.R, self.blocks.C, self.product.group)

    def _row_sums(self, units: Array, numbers: int) -> bytes:
        """-128 times the sum of each row of W."""
        rows = self.segment_rows.astype(np.int64)[self._segment_of_block]
        sums = np.zeros((self.blocks.block_rows, self.blocks.R), np.int32)
        np.add.at(sums, rows, units.sum(axis=(2, 3), dtype=np.int32) * -128)
        return np.pad(sums.reshape(-1), (0, numbers - sums.size)).tobytes()


@dataclass(frozen=True)
class GatheredPacking(Packing):
    """Columns of R rows, `group` of those of one segment in a unit; where the last ones are fewer, zeros fill it."""

    @property
    def counts(self) -> Array:
        """Units of each segment."""
        return -(-self._segments[1] // self.product.group)

    @property
    def count(self) -> int:
        """Packed units."""
        return int(self.pointers[-1])

    @cached_property
    def order(self) -> Array:
        """Stored column of each element of each unit, OUTSIDE where there is none."""
        group, columns = self.product.group, self._segments[1]
        filled = np.full(self.count * group, OUTSIDE, np.uint32)
        firsts = np.cumsum(columns) - columns
        at = np.repeat(self.pointers[:-1].astype(np.int64) * group - firsts, columns) + np.arange(columns.sum())
        filled[at] = self._sorted
        return filled

    @property
    def offset_bytes(self) -> int:
        """Bytes of one offset; K is one, of the row of zeros."""
        return 2 if self.blocks.K < 1 << 16 else 4

    @cached_property
    def offsets(self) -> Array:
        """Feature of each element of each unit, relative to its panel; where there is none, that of zeros, K."""
        real = self.order != OUTSIDE
        panel = (self.segments // max(self.blocks.block_rows, 1))[self._segment_of_block]
        start = panel.repeat(self.product.group) * self.k_panel
        feature = np.where(real, self.blocks.indices[np.where(real, self.order, 0)] if real.any() else 0, self.blocks.K)
        return np.asarray(feature - start, f"u{self.offset_bytes}")

    def _units(self, data: Array) -> Array:
        padded = np.concatenate((data, np.zeros((1, *data.shape[1:]), data.dtype)))
        columns = padded[np.minimum(self.order, len(data))]  # (units * group, R, 1)
        columns = columns.reshape(self.count, self.product.group, self.blocks.R, 1)
        return _parts(columns.transpose(0, 2, 3, 1), self.product)


def _parts(data: Array, product: Product) -> Array:
    """Elements as they lie in a word: int8 in 16 bits where that is what is multiplied."""
    return data.astype(np.int16) if data.dtype == np.int8 and product.part_bytes == 2 else data
