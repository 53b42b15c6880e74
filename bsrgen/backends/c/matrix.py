"""What the matrix unit's micro-kernels walk: K steps of a block row, their tables and packed values.

The stored blocks of a block row lie side by side: C columns each, rank after rank.  A K step is step_k neighbouring
columns of that line, whole blocks or not; zeros fill the last one.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.backends.c.packing import Packing
from bsrgen.backends.c.tiles import MatrixTile

Array = NDArray[Any]
TILES = 8
OFFSET_UNIT = 8  # bytes that an offset into a panel counts: those of long matrices then fit 16 bits


@dataclass(frozen=True, slots=True)
class Pass:
    """Row tiles that are summed together: their number, and the rows that each keeps room for."""

    first: int
    tiles: tuple[int, ...]

    @property
    def slots(self) -> int:
        """Rows of all its tiles, the empty ones of the last among them."""
        return sum(self.tiles)


@dataclass(frozen=True)
class MatrixPacking(Packing):
    """By block row and pass: [K step][row tile][dword][row][k of the dword], or where W is operand A, rows before
    dwords."""

    tile: MatrixTile

    # ── shapes ───────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def group(self) -> int:
        """Neighbouring k in a dword."""
        return self.product.group

    @property
    def single(self) -> bool:
        """Whether columns are gathered one by one: blocks do not fill dwords."""
        return not self.tile.x_first and self.blocks.C % self.group != 0

    @property
    def pieces(self) -> int:
        """Blocks side by side in a K step that is joined."""
        return 64 // (self.blocks.C * self.product.part_bytes) if self.tile.form == "joined" else 1

    @property
    def step_k(self) -> int:
        """Columns of one K step: of whole blocks, the most that a tile holds and that divide C."""
        if self.tile.rings:
            return 16 * self.group
        widths = range(self.group, 16 * self.group + 1, self.group)
        return max(d for d in widths if self.blocks.C % d == 0)

    @property
    def row_tiles(self) -> tuple[int, ...]:
        """Rows of each tile of a block row: the last one of a single pass may have fewer."""
        R, count = self.blocks.R, -(-self.blocks.R // 16)
        exact = not self.tile.x_first and count <= self.tile.row_tiles
        return tuple(min(16, R - 16 * t if exact else R) for t in range(count))

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The walks over a block row."""
        tiles, step = self.row_tiles, self.tile.row_tiles
        return tuple(Pass(t, tiles[t : t + step]) for t in range(0, len(tiles), step))

    @property
    def tokens(self) -> int:
        """Tokens of one unit."""
        return 16 * self.tile.token_tiles

    @property
    def tiles_needed(self) -> int:
        """Tiles of the largest pass, with at least one for each operand."""
        T, rows = self.tile.token_tiles, min(self.tile.row_tiles, len(self.row_tiles))
        return T * rows + (rows + 1 if not self.tile.x_first else 2 if T == 1 else rows + 2)

    @property
    def padded_k(self) -> int:
        """Columns that a copy of X has: of whole blocks, and a block of zeros where K steps are filled up."""
        return self.blocks.block_cols * self.blocks.C + (self.blocks.C if self.pieces > 1 else 0)

    @property
    def copies_x(self) -> bool:
        """Whether a copy of X is multiplied, also where X as it lies would do."""
        return self.tile.copy_x or self.pieces > 1 or self.padded_k != self.blocks.K

    @property
    def panel_row(self) -> int:
        """Bytes of a panel's row: a feature, or dwords of features."""
        return self.tokens * (self.product.part_bytes if self.single else 4)

    @property
    def panel_rows(self) -> int:
        """Rows of a panel before the row of zeros."""
        p = self.blocks
        return p.K if self.single else p.block_cols * p.C // self.group

    @property
    def panel_bytes(self) -> int:
        """Bytes of the panel of one unit: packing writes up to 32 rows behind the last."""
        return (self.panel_rows + 33) * self.panel_row

    @property
    def slots(self) -> int:
        """K steps that the ring holds: a power of two; several passes read a whole block row again."""
        most = int(self.steps.max(initial=0)) if len(self.passes) > 1 else 1
        return 1 << (self.tile.ahead + most - 1).bit_length()

    # ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def steps(self) -> Array:
        """K steps of each block row."""
        return -(-self.blocks.row_counts * self.blocks.C // self.step_k)

    @property
    def counts(self) -> Array:
        """What the kernel counts in each block row: blocks, or K steps."""
        return self.blocks.row_counts if self.tile.form == "direct" else self.steps

    @property
    def count(self) -> int:
        """K steps of all block rows."""
        return int(self.steps.sum())

    @property
    def block_values(self) -> int:
        """Dwords of one K step."""
        return self.step_k // self.group * sum(self.row_tiles)

    @property
    def offset_bytes(self) -> int:
        """Bytes of one offset."""
        p = self.blocks
        last = p.block_cols * p.C if self.tile.x_first else self.panel_rows * self.panel_row // OFFSET_UNIT
        return 2 if last < 1 << 16 else 4

    @property
    def step_offsets(self) -> int:
        """Offsets of one K step."""
        if self.tile.x_first:
            return self.pieces
        return 1 if self.tile.form == "panel" else self.step_k if self.single else self.step_k // self.group

    @cached_property
    def firsts(self) -> Array:
        """First stored block of each block row, and the end: what `update` packs by."""
        return self.blocks.indptr.astype(np.uint32)

    @cached_property
    def offsets(self) -> Array:
        """First feature of each block; or of each gathered row of a panel its place, in OFFSET_UNIT bytes."""
        p = self.blocks
        if self.tile.form == "direct":
            k = p.indices.astype(np.int64) * p.C
        elif self.tile.form == "joined":
            k = np.full(self.count * self.pieces, p.block_cols * p.C, np.int64)
            k[self._places // p.C] = p.indices.astype(np.int64) * p.C
        else:
            k = self._panel_places
        return k.astype(f"u{self.offset_bytes}")

    @property
    def _panel_places(self) -> Array:
        unit = 1 if self.single else self.group  # columns that a row of the panel holds
        size = self.blocks.C // unit
        rows = np.full(self.count * self.step_k // unit, self.panel_rows, np.int64)
        at = (self._places // unit)[:, None] + np.arange(size)
        rows[at] = self.blocks.indices.astype(np.int64)[:, None] * size + np.arange(size)
        rows = np.minimum(rows, self.panel_rows)
        rows = rows[:: self.step_k // unit] if self.tile.form == "panel" else rows
        return np.asarray(rows * (self.panel_row // OFFSET_UNIT))

    @property
    def _places(self) -> Array:
        """Where the first column of each stored block lies in the line of all K steps."""
        p = self.blocks
        rank = np.arange(p.nnzb) - np.repeat(p.indptr[:-1], p.row_counts)
        first = np.cumsum(self.steps) - self.steps
        return np.asarray(np.repeat(first * self.step_k, p.row_counts) + rank * p.C)

    # ── values ───────────────────────────────────────────────────────────────────────────────────────────────────

    def pack(self, data: Array, corrections: int = 0) -> Array:
        """(nnzb, R, C) of the problem's pattern -> bytes; there are no corrections."""
        data = self.cover.move(data) if self.cover else data
        rows, steps, g = sum(self.row_tiles), self.count, self.group
        line = np.zeros((rows, steps * self.step_k), data.dtype)
        line[: self.blocks.R, self._places[:, None] + np.arange(self.blocks.C)] = data.transpose(1, 0, 2)
        if self.tile.x_first:
            tiles, cols = len(self.row_tiles), self.row_tiles[0]
            cells = line.reshape(tiles, cols, steps, self.step_k // g, g).transpose(2, 0, 3, 1, 4)
        else:
            cells = line.reshape(rows, steps, self.step_k).transpose(1, 0, 2)
        return np.frombuffer(self._by_pass(cells), np.uint8)

    def _by_pass(self, cells: Array) -> bytes:
        """[K step][row tile or row]... -> a block row and pass after the other."""
        if len(self.passes) == 1:
            return cells.tobytes()
        ends, out = np.cumsum(self.steps), []
        for end, steps in zip(ends, self.steps, strict=True):
            for q in self.passes:
                first = q.first if self.tile.x_first else 16 * q.first
                wide = len(q.tiles) if self.tile.x_first else q.slots
                out.append(cells[end - steps : end, first : first + wide].tobytes())
        return b"".join(out)
