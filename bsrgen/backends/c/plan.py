"""The plans of the C backend.  A kernel has up to two micro-kernels over one packed weight.

`WeightTile` keeps the SIMD lanes on the weight (rows x k of a block), X is broadcast straight from row-major X: any N.
`TokenTile` keeps the lanes on the tokens, X comes from a feature-major panel packed once per chunk of tokens, W is
broadcast: any block shape at full lanes, once N fills them.  Both read the same packed values, because a broadcast can
fetch any element of a block from a constant offset.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bsrgen.backends.c.packing import GatheredPacking, Group, Packing
from bsrgen.backends.c.products import FMA, Product
from bsrgen.cover import Cover
from bsrgen.pattern import Pattern
from bsrgen.plan import Counts, Plan

Array = NDArray[Any]
CODE_FMA = 1024  # most multiply-adds written out in one kernel: more takes gcc 12 seconds and gains nothing here

PANEL_BYTES = 64 << 20  # most scratch for one chunk of X
CODE_ROWS = 64  # most block rows: each is a function of its own for each register tile


ALL = 1 << 31  # features: one panel


@dataclass(frozen=True, slots=True)
class WeightTile:
    """Lanes along rows and k: registers hold `tokens` x `vectors` sums of row_lanes rows, k_lanes partial sums each."""

    row_lanes: int
    k_lanes: int
    vectors: int
    tokens: int
    k_panel: int = ALL  # features of X per walk over the pattern: X of one tile stays in L1
    chunk: int = 1  # tiles of tokens that take a window of W out of L2 in turn; 1: W is read anew for each tile


@dataclass(frozen=True, slots=True)
class TokenTile:
    """Lanes along tokens: registers hold `rows` x `vectors` sums; X of so many tokens is packed at a time."""

    rows: int
    vectors: int
    k_panel: int  # features of X in one panel: it stays in L1; all of them: sums never leave the registers
    pack: bool = True  # False (spmm): full vectors are read straight from X


@dataclass(frozen=True)
class CPlan(Plan):
    """Knobs of a C kernel.  With both tiles, calls of fewer than `small_n` tokens take the weight tile."""

    tokens: TokenTile | None
    weight: WeightTile | None
    small_n: int = 0
    encoding: Literal["table", "code"] = "table"
    cover: Cover | None = None  # other blocks that hold the stored ones; None: the problem's own
    product: Product = FMA
    gather: bool = False  # single columns, put together as they occur in a block row, and X likewise when it is read

    def __post_init__(self) -> None:
        one_panel = (self.tokens is None and self.weight is None) or self.panels == 1
        assert one_panel or self.k_panel % self.pattern.C == 0, "a block lies in two panels"
        assert one_panel or self.tokens is None or self.tokens.pack, "X as it lies has no panels"
        assert not self.gather or (self.product.group > 1 and self.pattern.C == 1), "only single columns are gathered"

    def __str__(self) -> str:
        parts = []
        if (t := self.tokens) is not None:
            parts.append(
                f"lanes along tokens, {t.rows} rows x {t.vectors} vectors, "
                f"panels of {self.k_panel} features{'' if t.pack else ', X unpacked'}"
            )
        if (w := self.weight) is not None:
            lanes = {1: "rows", self.weight_lanes: "k"}.get(w.k_lanes, f"{w.row_lanes} rows x {w.k_lanes} k")
            if self.weight_lanes < self.lanes:
                lanes = f"{w.row_lanes} rows x {w.k_lanes} k"
            when = f"n < {self.small_n}: " if self.tokens else ""
            panels = f", panels of {self.k_panel} features" if self.panels > 1 and not self.tokens else ""
            panels += f", chunks of {w.chunk} tiles" if w.chunk > 1 else ""
            parts.append(f"{when}lanes along {lanes}, {w.tokens} tokens x {w.vectors} vectors{panels}")
        blocks = ""
        if self.cover is not None:
            blocks = "dense, " if self.dense else f"as {self.stored.R}x{self.stored.C} blocks, "
        how = "" if self.product is FMA else f"{self.product.name} dot products, "
        how += "gathered columns, " if self.gather else ""
        return f"{self.target.name}: {blocks}{how}{'; '.join(parts)}; pattern as {self.encoding}"

    def knobs(self) -> dict[str, Any]:
        """The decisions alone, as plain data."""
        tile = {"tokens": self.tokens and asdict(self.tokens), "weight": self.weight and asdict(self.weight)}
        return {
            **tile,
            "small_n": self.small_n,
            "encoding": self.encoding,
            "product": self.product.name,
            "gather": self.gather,
            "blocksize": list(self.stored.blocksize),
            "dense": self.dense,
        }

    @property
    def stored(self) -> Pattern:
        """The blocks whose elements are packed."""
        return self.cover.blocks if self.cover else self.problem.pattern

    @cached_property
    def pattern(self) -> Pattern:
        """The blocks that the kernel walks: those that are packed, their columns in units of the product."""
        return self.stored if self.gather or self.product.group == 1 else self.stored.in_words(self.product.group)

    @property
    def dense(self) -> bool:
        """Whether the whole matrix is multiplied, zeros included."""
        return 0 < self.pattern.nnzb == self.pattern.block_rows * self.pattern.block_cols

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
        return self.weight.k_lanes if self.weight else 1

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
        """Block rows whose partial sums are folded together: whole vectors of rows come out, within 32 KiB of L1."""
        w, R = self.weight, self.pattern.R
        if w is None or w.k_lanes == 1 or R % w.row_lanes:
            return 1
        lanes = self.weight_lanes
        room = (32 << 10) // (w.tokens * lanes * self.unit_bytes * max(R // w.row_lanes, 1))
        whole = [count for count in range(1, room + 1) if count * R % lanes == 0]
        return whole[0] if whole else max(min(room, lanes // R), 1)

    @property
    def leading_dimension(self) -> int:
        """Of X in the weight tile: K, or more where rows would share an L1 set or vectors along k must be aligned."""
        lanes, features = self.weight_lanes, self.pattern.block_cols * self.pattern.C
        if self.gather:
            features += 1  # zeros, for groups of fewer columns
            lanes *= self.product.group
        if self.k_lanes > 1 or not self.same_x:
            features = -(-features // lanes) * lanes
        return features + lanes if features and features * self.cell_bytes % 4096 == 0 else features

    @property
    def copies_x(self) -> bool:
        """Whether the weight tile reads a copy of X, with another leading dimension, also where X is contiguous."""
        unit = self.product.group
        return self.leading_dimension != self.pattern.K or not self.same_x or self.problem.pattern.K % unit != 0

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

        Transposed are whole vectors of rows where 64 rows allow it.
        """
        p = self.pattern
        if self.tokens and self.panels > 1:
            row_bytes = self.tokens.vectors * self.target.vector_bytes * p.R
            return min(max(self.target.l2_bytes // 4 // row_bytes, 1), max(p.block_rows, 1))
        whole = [count for count in range(1, 64 // p.R + 1) if count * p.R % self.lanes == 0]
        return whole[0] if whole else -(-self.lanes // p.R)

    @cached_property
    def packing(self) -> Packing:
        """The order of the values, and the tables that the kernel walks them by."""
        kind = GatheredPacking if self.gather else Packing
        return kind(self.pattern, self.cover, self.groups, self.k_lanes, self.k_panel, self.panels, self.product)

    @property
    def value_bytes(self) -> int:
        """Bytes of the packed values."""
        return self.packing.count * self.packing.block_values * self.w_bytes + 4 * self.corrections

    @cached_property
    def work(self) -> Array:
        """Running cost of the block rows, for the partition over threads: nonzeros plus what a stored row costs."""
        p = self.pattern
        row = p.row_counts * p.C + 16
        if gate := self.problem.gate_rows // p.R:  # row by row of the result, that of the gate with it
            row = row[:gate] + np.pad(row[gate:], (0, 2 * gate - row.size))
        return np.concatenate(([0], np.cumsum(row))).astype(np.uint64)

    # ── counting ─────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def registers(self) -> int:
        """Vector registers of the larger micro-kernel: sums, one k step of the held operand, one streamed vector."""
        need = [0]
        if self.tokens:
            held = self.tokens.vectors if self.tokens.rows > 1 or self.gather else 0  # one row: X is a memory operand
            need.append(self.tokens.rows * self.tokens.vectors + held + 1)
        if self.weight:
            need.append(self.weight.tokens * self.weight.vectors + self.weight.vectors + 1)
        return max(need)

    @property
    def code_fma(self) -> int:
        """Multiply-adds that the pattern as code writes out, in all register tiles."""
        steps = self.pattern.nnzb * self.pattern.C
        if self.tokens:
            return steps * self.tokens.rows * (self.tokens.vectors + 1) * (1 if self.tokens.pack else 2)
        assert self.weight is not None
        return steps // self.weight.k_lanes * self.weight.vectors * (self.weight.tokens + 1)

    @property
    def fits_code(self) -> bool:
        """Whether the pattern may be printed as code: one group of rows, one panel, within the budget."""
        tile_rows = self.tokens.rows if self.tokens else self.pattern.R
        single = not self.gather and len(self.groups) == 1 and tile_rows == self.pattern.R and self.panels == 1
        return single and self.pattern.block_rows <= CODE_ROWS and self.code_fma <= CODE_FMA

    def uses_weight_tile(self, n: int) -> bool:
        """Whether a call of n tokens runs the weight tile."""
        return self.tokens is None or (self.weight is not None and n < self.small_n)

    def family(self, n: int) -> tuple[Any, ...]:
        """The blocks that are walked, and the axis of the lanes and the register tile that run at n tokens."""
        blocks = (self.product.name, self.gather, self.pattern.blocksize, self.dense)
        if self.uses_weight_tile(n):
            assert self.weight is not None
            w = self.weight
            return (*blocks, "weight", w.row_lanes, w.k_lanes, w.vectors, min(w.tokens, n))
        assert self.tokens is not None
        return (*blocks, "tokens", self.tokens.rows, self.tokens.vectors)

    def counts(self, n: int) -> Counts:
        """Countable cost of one call of n tokens (backends/c/count.py)."""
        from bsrgen.backends.c.count import counts

        return counts(self, n)
