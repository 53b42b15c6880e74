"""What a C plan's knobs mean for its data: units, panels, windows that stay in a cache, and the packed values."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bsrgen.backends.c.matrix import MatrixPacking
from bsrgen.backends.c.packing import Bits, GatheredPacking, Group, Packing
from bsrgen.backends.c.products import FMA, Product
from bsrgen.backends.c.tiles import MatrixTile, TokenTile, WeightTile
from bsrgen.cover import Cover
from bsrgen.pattern import Pattern
from bsrgen.plan import Plan

Array = NDArray[Any]
PANEL_BYTES = 64 << 20  # most scratch for one chunk of X
SPLIT_READS = 12
FINISH_ROWS = 64  # whose sums become results together, so that Y is written in runs


@dataclass(frozen=True)
class Layout(Plan):
    """The knobs, and what follows from them for the data that a kernel walks."""

    tokens: TokenTile | None
    weight: WeightTile | None
    small_n: int = 0
    encoding: Literal["table", "code", "constants"] = "table"  # constants: tables inside the module of MLIR
    cover: Cover | None = None  # other blocks that hold the stored ones; None: the problem's own
    product: Product = FMA
    gather: bool = False  # single columns, put together as they occur in a block row, and X likewise when it is read
    matrix: MatrixTile | None = None  # instead of both tiles
    short_lanes: int = 0  # of the vectors of tokens in calls of at most so many; 0: no other than in larger calls

    @property
    def stored(self) -> Pattern:
        """The blocks whose elements are packed."""
        return self.cover.blocks if self.cover else self.problem.pattern

    @cached_property
    def pattern(self) -> Pattern:
        """The blocks that the kernel walks: those that are packed, their columns in units of the product."""
        whole = self.gather or self.matrix or self.product.group == 1
        return self.stored if whole else self.stored.in_words(self.product.group)

    @property
    def dense(self) -> bool:
        """Whether the whole matrix is multiplied, zeros included."""
        p = self.pattern
        return self.problem.pattern.known and 0 < p.nnzb == p.block_rows * p.block_cols

    @property
    def zero_filled(self) -> bool:
        """Whether elements that are not stored are multiplied as zeros."""
        return self.cover is not None and self.cover.fills

    @property
    def lanes(self) -> int:
        """Sums in one vector."""
        return self.target.lanes(self.unit_bytes)

    @property
    def unit_bytes(self) -> int:
        """Bytes of a sum, and of a unit of X and W as they are multiplied."""
        return self.problem.real.bytes

    @property
    def w_bytes(self) -> int:
        """Bytes of a packed unit of W."""
        return self.problem.dtype.bytes if self.product is FMA else self.unit_bytes

    @property
    def cell_bytes(self) -> int:
        """Bytes of what X's panels and copies keep of one token: a unit, or of gathered columns an element."""
        return self.product.part_bytes if self.gather else self.unit_bytes

    @property
    def same_x(self) -> bool:
        """Whether cells of X lie in the caller's X as the kernel reads them."""
        x, product = self.problem.read_dtype, self.product
        if product is FMA:
            return x.name == self.problem.accumulator.name
        return not self.gather and not product.corrections and x.bytes == product.part_bytes

    @property
    def corrections(self) -> int:
        """Numbers ahead of the packed values that correct the sums of the rows, whole lines of them."""
        return -(-(self.pattern.block_rows * self.pattern.R + self.lanes) // 16) * 16 if self.product.corrections else 0

    # ── packing ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def k_lanes(self) -> int:
        """Neighbouring k that are packed side by side."""
        return self.weight.k_lanes if self.weight and not self.weight.expand else 1

    @property
    def weight_lanes(self) -> int:
        """Elements in one vector of the weight tile: fewer where blocks have few rows."""
        return self.weight.row_lanes * self.weight.k_lanes if self.weight else self.lanes

    @property
    def k_panel(self) -> int:
        """Features in one panel, the token tile's where there are two tiles; the padded K where there is one panel."""
        padded = self.pattern.block_cols * self.pattern.C
        tile = self.tokens or self.weight
        return min(tile.k_panel, padded) if tile and padded else padded

    @property
    def panels(self) -> int:
        """How often the pattern is walked: once per panel of X."""
        padded = self.pattern.block_cols * self.pattern.C
        return -(-padded // self.k_panel) if padded else 1

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The rows of one block row, cut into packed groups."""
        R = self.pattern.R
        step = self.weight.vectors * self.weight.row_lanes if self.weight else self._token_rows
        unit = self.weight.row_lanes if self.weight else 1
        return tuple(Group(r, min(step, R - r), -(-min(step, R - r) // unit) * unit) for r in range(0, R, step))

    @property
    def _token_rows(self) -> int:
        assert self.tokens is not None
        return self.tokens.rows

    @property
    def weight_window(self) -> int:
        """Block rows whose partial sums are folded together: whole vectors of rows come out, within 32 KiB of L1, and
        FINISH_ROWS of them where X leaves room there: int8 8x8, 1024x1024, density 1/32, N = 128: 42 to 37 us; bfloat16
        8x8, 768x768, density 0.1, whose X fills most of L1: 52 to 55 (Zen 5, 2026-11-21)."""
        w, R = self.weight, self.pattern.R
        if w is None or R % w.row_lanes:
            return 1
        lanes = self.weight_lanes
        row_bytes = w.tokens * lanes * self.unit_bytes * max(R // w.row_lanes, 1)
        room = (32 << 10) // row_bytes
        whole = [count for count in range(1, room + 1) if count * R % lanes == 0]
        beside = self.target.l1_bytes - w.tokens * self.k_panel * self.cell_bytes
        within = [n for n in whole if n * R <= FINISH_ROWS and n * row_bytes <= beside] or whole[:1]
        return within[-1] if within else max(min(room, lanes // R), 1)

    @property
    def leading_dimension(self) -> int:
        """Of X in the weight tile: K, or more where rows would share an L1 set or vectors along k must be aligned."""
        lanes, features = self.weight_lanes, self.pattern.block_cols * self.pattern.C
        if self.gather:
            features += 1  # zeros, for groups of fewer columns
            lanes *= self.product.group
        if (self.weight and self.weight.k_lanes > 1) or not self.same_x:
            features = -(-features // lanes) * lanes
        return features + lanes if features and features * self.cell_bytes % 4096 == 0 else features

    @property
    def copies_x(self) -> bool:
        """Whether the weight tile reads a copy of X, with another leading dimension, also where X is contiguous."""
        unit = self.product.group
        return self.leading_dimension != self.pattern.K or not self.same_x or self.problem.pattern.K % unit != 0

    @property
    def bits(self) -> Bits | None:
        """Of expanded rows: which of their elements are stored."""
        return self.bits_of(self.weight) if self.weight and self.weight.expand else None

    def bits_of(self, tile: WeightTile) -> Bits:
        """The same of the rows that `tile` would expand."""
        part = self.product.part_bytes if self.gather else self.w_bytes
        together = 2 if self.product.group > 1 and not self.gather and self.pattern.C % 2 == 0 else 1
        return Bits(tile.k_lanes * (self.w_bytes // part), together, part * together)

    @property
    def shared_block_rows(self) -> int:
        """Block rows whose weights stay in a quarter of L2 while the tiles of a chunk use them, whole windows."""
        p, window = self.pattern, self.weight_window
        if self.weight is None or self.weight.chunk == 1 or not p.nnzb:
            return max(p.block_rows, 1)
        row_bytes = self.value_bytes / (p.block_rows * self.panels)
        return max(int(self.target.l2_bytes // 4 / row_bytes) // window, 1) * window

    @property
    def summed_block_rows(self) -> int:
        """Block rows whose sums wait for the next panel in the weight tile, in half of L2, whole windows."""
        w, p, window = self.weight, self.pattern, self.weight_window
        if w is None or not p.nnzb:
            return window
        slots = sum(group.slots for group in self.groups) // w.row_lanes * self.weight_lanes
        row_bytes = w.tokens * slots * self.unit_bytes * w.chunk
        return max(self.target.l2_bytes // 2 // row_bytes // window, 1) * window

    @property
    def packs_split(self) -> bool:
        """Whether X as it lies is packed after all where its vectors lie in two lines: few rows wait for reads, and
        packing costs as much as SPLIT_READS of them (spmm, 2000x2000, 1x1, density 1/32: 576 to 328 us, Zen 5)."""
        t, p = self.tokens, self.pattern
        reads = p.nnzb * -(-p.R // t.rows) / max(p.block_cols, 1) if t else 0
        return t is not None and not t.pack and t.rows <= 4 and reads >= SPLIT_READS

    @property
    def packs_whole(self) -> bool:
        """Whether a chunk of X is packed at once, all panels of it, and not again for each window of rows."""
        assert self.tokens is not None
        p = self.pattern
        return self.panels == 1 or self.gather or p.block_cols * p.C * self.feature_bytes <= PANEL_BYTES

    @property
    def feature_bytes(self) -> int:
        """Bytes of one feature in a panel of X."""
        assert self.tokens is not None
        return self.tokens.vectors * self.lanes * self.cell_bytes

    @property
    def waiting_block_rows(self) -> int:
        """Block rows whose sums wait outside registers: for the next panel, in a quarter of L2; else to be transposed.

        Transposed are FINISH_ROWS rows, whole vectors where blocks allow it: Y is written in longer runs.  float32 1x1,
        1024x1024, density 1/32, N = 128: 152 us with 16 rows, 115 with 64, 116 with 128 (Zen 5, 2026-11-21).
        """
        p = self.pattern
        if self.tokens and self.panels > 1:
            row_bytes = self.tokens.vectors * self.target.vector_bytes * p.R
            return min(max(self.target.l2_bytes // 4 // row_bytes, 1), max(p.block_rows, 1))
        most = max(FINISH_ROWS // p.R, 1)
        whole = [count for count in range(1, most + 1) if count * p.R % self.lanes == 0]
        return whole[-1] if whole else most

    @cached_property
    def packing(self) -> Packing:
        """The order of the values, and the tables that the kernel walks them by."""
        if self.matrix:
            return self.matrix_packing
        kind = GatheredPacking if self.gather else Packing
        return kind(self.pattern, self.cover, self.groups, self.k_lanes, self.k_panel, self.panels, self.product)

    @cached_property
    def matrix_packing(self) -> MatrixPacking:
        """The same of the matrix unit."""
        assert self.matrix is not None
        return MatrixPacking(self.pattern, self.cover, (), 1, self.k_panel, 1, self.product, self.matrix)

    @property
    def value_bytes(self) -> int:
        """Bytes of the packed values; of a pattern that comes with the call, the most."""
        count = self.packing.count if self.problem.pattern.known else self.most_units
        return count * self.packing.block_values * self.w_bytes + 4 * self.corrections

    @property
    def most_segments(self) -> int:
        """(panel, block row) pairs that any pattern of so many blocks may have."""
        p = self.pattern
        return p.block_rows if self.panels == 1 else min(p.block_rows * self.panels, p.nnzb)

    @property
    def most_units(self) -> int:
        """Packed blocks, or units of gathered columns, that any pattern of so many blocks may have."""
        p, group = self.pattern, self.product.group
        return (p.nnzb + (group - 1) * min(self.most_segments, p.nnzb)) // group if self.gather else p.nnzb

    @cached_property
    def work(self) -> Array:
        """Running cost of the block rows, for the partition over threads: nonzeros plus what a stored row costs."""
        p = self.pattern
        row = p.row_counts * p.C + 16
        if gate := self.problem.gate_rows // p.R:  # row by row of the result, that of the gate with it, not its padding
            row = row[: row.size - gate] + row[gate:]
        return np.concatenate(([0], np.cumsum(row))).astype(np.uint64)
