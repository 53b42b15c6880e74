"""The order in which a kernel keeps its values, and the tables it walks them by."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.cover import Cover
from bsrgen.pattern import Pattern

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of a block row that are packed together; `slots` >= rows counts the zero fill of the last vector."""

    row: int
    rows: int
    slots: int


@dataclass(frozen=True)
class Packing:
    """Blocks by panel of X and block row; in one such segment group after group, block after block."""

    blocks: Pattern
    cover: Cover | None  # where the blocks are not the problem's own
    groups: tuple[Group, ...]
    k_lanes: int  # neighbouring k that lie side by side
    k_panel: int  # features of a panel
    panels: int

    @property
    def block_values(self) -> int:
        """Packed elements of one block."""
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
    def order(self) -> Array:
        """Stored blocks in packed order: by panel, block row, block column."""
        if self.panels == 1:
            return np.arange(self.blocks.nnzb, dtype=np.uint32)
        return np.argsort(self._segment, kind="stable").astype(np.uint32)

    @cached_property
    def _held(self) -> tuple[Array, Array]:
        """The (panel, block row) pairs that the kernel walks, and their stored blocks."""
        if self.panels == 1:
            return np.arange(self.blocks.block_rows), self.blocks.row_counts
        return np.unique(self._segment, return_counts=True)

    @property
    def segments(self) -> Array:
        """The (panel, block row) pairs that the kernel walks: all of them, or with panels those that hold blocks."""
        return self._held[0]

    @cached_property
    def pointers(self) -> Array:
        """First packed block of each segment, and the end."""
        return np.concatenate(([0], np.cumsum(self._held[1]))).astype(np.uint32)

    @cached_property
    def segment_rows(self) -> Array:
        """Block row of each segment."""
        return (self.segments % max(self.blocks.block_rows, 1)).astype(np.uint32)

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

    def pack(self, data: Array) -> Array:
        """(nnzb, R, C) of the problem's pattern -> packed: per block row and group, [block][k step][slot][k lane]."""
        p, kl = self.blocks, self.k_lanes
        data = self.cover.move(data) if self.cover else data
        data = data[self.order] if self.panels > 1 else data
        starts = self.pointers.astype(np.int64)
        counts = np.diff(starts)
        packed = np.zeros(p.nnzb * self.block_values, data.dtype)
        before = 0
        for group in self.groups:
            size = group.slots * p.C
            part = np.zeros((p.nnzb, p.C // kl, group.slots, kl), packed.dtype)
            rows = data[:, group.row : group.row + group.rows].reshape(p.nnzb, group.rows, p.C // kl, kl)
            part[:, :, : group.rows] = rows.transpose(0, 2, 1, 3)
            first = starts[:-1] * self.block_values + counts * before
            at = np.repeat(first - starts[:-1] * size, counts) + np.arange(p.nnzb) * size
            if len(self.groups) == 1:
                return part.reshape(-1)
            packed[at[:, None] + np.arange(size)] = part.reshape(p.nnzb, size)
            before += size
        return packed
