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

from bsrgen.plan import Counts, Plan

Array = NDArray[Any]
CODE_FMA = 1024  # most multiply-adds written out in one kernel: more takes gcc 12 seconds and gains nothing here

CODE_ROWS = 64  # most block rows: each is a function of its own for each register tile


@dataclass(frozen=True, slots=True)
class WeightTile:
    """Lanes along rows and k: registers hold `tokens` x `vectors` sums of row_lanes rows, k_lanes partial sums each."""

    row_lanes: int
    k_lanes: int
    vectors: int
    tokens: int
    chunk: int  # tokens for which one block row of W stays in L1 before the next row is read


@dataclass(frozen=True, slots=True)
class TokenTile:
    """Lanes along tokens: registers hold `rows` x `vectors` sums."""

    rows: int
    vectors: int
    chunk: int  # vectors of tokens that share one packed panel
    k_panel: int  # features of X in one panel: it stays in L1; all of them: sums never leave the registers
    pack: bool = True  # False (spmm): full vectors are read straight from X


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of a block row that are packed together; `slots` >= rows counts the zero fill of the last vector."""

    row: int
    rows: int
    slots: int


@dataclass(frozen=True)
class CPlan(Plan):
    """Knobs of a C kernel.  With both tiles, calls of fewer than `small_n` tokens take the weight tile."""

    tokens: TokenTile | None
    weight: WeightTile | None
    small_n: int = 0
    encoding: Literal["table", "code"] = "table"

    def __str__(self) -> str:
        parts = []
        if (t := self.tokens) is not None:
            parts.append(
                f"lanes along tokens, {t.rows} rows x {t.vectors} vectors, chunks of {t.chunk} vectors, "
                f"panels of {t.k_panel} features{'' if t.pack else ', X unpacked'}"
            )
        if (w := self.weight) is not None:
            lanes = {1: "rows", self.lanes: "k"}.get(w.k_lanes, f"{w.row_lanes} rows x {w.k_lanes} k")
            when = f"n < {self.small_n}: " if self.tokens else ""
            parts.append(f"{when}lanes along {lanes}, {w.tokens} tokens x {w.vectors} vectors")
        return f"{self.target.name}: {'; '.join(parts)}; pattern as {self.encoding}"

    def knobs(self) -> dict[str, Any]:
        """The decisions alone, as plain data."""
        tile = {"tokens": self.tokens and asdict(self.tokens), "weight": self.weight and asdict(self.weight)}
        return {**tile, "small_n": self.small_n, "encoding": self.encoding}

    @property
    def lanes(self) -> int:
        """Elements in one vector."""
        return self.target.lanes(self.problem.dtype.bytes)

    # ── packing ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def k_lanes(self) -> int:
        """Neighbouring k that are packed side by side."""
        return self.weight.k_lanes if self.weight else 1

    @property
    def k_panel(self) -> int:
        """Features in one panel; the padded K where there is one panel."""
        padded = self.problem.pattern.block_cols * self.problem.pattern.C
        return min(self.tokens.k_panel, padded) if self.tokens and padded else padded

    @property
    def panels(self) -> int:
        """How often the pattern is walked: once per panel of X."""
        padded = self.problem.pattern.block_cols * self.problem.pattern.C
        return -(-padded // self.k_panel) if padded else 1

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The rows of one block row, cut into packed groups."""
        R = self.problem.pattern.R
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
        w, R = self.weight, self.problem.pattern.R
        if w is None or w.k_lanes == 1 or R % w.row_lanes:
            return 1
        room = (32 << 10) // (w.tokens * self.target.vector_bytes * max(R // w.row_lanes, 1))
        whole = [count for count in range(1, room + 1) if count * R % self.lanes == 0]
        return whole[0] if whole else max(min(room, self.lanes // R), 1)

    @property
    def waiting_block_rows(self) -> int:
        """Block rows whose sums wait outside registers: for the next panel, within half of L2; else to be transposed.

        Transposed are whole vectors of rows where 64 rows allow it.
        """
        p = self.problem.pattern
        if self.tokens and self.panels > 1:
            row_bytes = self.tokens.chunk * self.target.vector_bytes * p.R
            return min(max((512 << 10) // row_bytes, 1), max(p.block_rows, 1))
        whole = [count for count in range(1, 64 // p.R + 1) if count * p.R % self.lanes == 0]
        return whole[0] if whole else -(-self.lanes // p.R)

    @property
    def block_values(self) -> int:
        """Packed elements of one block."""
        return sum(group.slots for group in self.groups) * self.problem.pattern.C

    @cached_property
    def order(self) -> Array:
        """Stored blocks in packed order: by panel, block row, block column."""
        p = self.problem.pattern
        if self.panels == 1:
            return np.arange(p.nnzb, dtype=np.uint32)
        panel = p.indices.astype(np.int64) * p.C // self.k_panel
        row = np.arange(p.block_rows).repeat(p.row_counts)
        return np.lexsort((p.indices, row, panel)).astype(np.uint32)

    @cached_property
    def pointers(self) -> Array:
        """First packed block of each (panel, block row), and the end: [panels * block_rows + 1]."""
        p = self.problem.pattern
        if self.panels == 1:
            return p.indptr.astype(np.uint32)
        panel = p.indices.astype(np.int64) * p.C // self.k_panel
        row = np.arange(p.block_rows).repeat(p.row_counts)
        counts = np.bincount(panel * p.block_rows + row, minlength=self.panels * p.block_rows)
        return np.concatenate(([0], np.cumsum(counts))).astype(np.uint32)

    @cached_property
    def offsets(self) -> Array:
        """First feature of each packed block, relative to its panel: 16 bits where that is enough."""
        p = self.problem.pattern
        k = p.indices[self.order].astype(np.int64) * p.C % max(self.k_panel, 1)
        return k.astype(np.uint16 if self.offset_bytes == 2 else np.uint32)

    @property
    def offset_bytes(self) -> int:
        """Bytes of one offset: 16 bits where a panel is short enough."""
        return 2 if self.k_panel <= 1 << 16 else 4

    @cached_property
    def work(self) -> Array:
        """Running cost of the block rows, for the partition over threads: nonzeros plus what a stored row costs."""
        p = self.problem.pattern
        return np.concatenate(([0], np.cumsum(p.row_counts * p.C + 16))).astype(np.uint64)

    def pack(self, data: Array) -> Array:
        """(nnzb, R, C) in pattern order -> packed values: per block row and group, [block][k step][slot][k lane]."""
        p, kl = self.problem.pattern, self.k_lanes
        data = data[self.order] if self.panels > 1 else data
        starts = self.pointers.astype(np.int64)
        counts = np.diff(starts)
        packed = np.zeros(p.nnzb * self.block_values, self.problem.dtype.numpy)
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

    # ── counting ─────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def registers(self) -> int:
        """Vector registers of the larger micro-kernel: sums, one k step of the held operand, one streamed vector."""
        need = [0]
        if self.tokens:
            held = self.tokens.vectors if self.tokens.rows > 1 else 0  # one row: X is a memory operand
            need.append(self.tokens.rows * self.tokens.vectors + held + 1)
        if self.weight:
            need.append(self.weight.tokens * self.weight.vectors + self.weight.vectors + 1)
        return max(need)

    @property
    def code_fma(self) -> int:
        """Multiply-adds that the pattern as code writes out, in all register tiles."""
        steps = self.problem.pattern.nnzb * self.problem.pattern.C
        if self.tokens:
            return steps * self.tokens.rows * (self.tokens.vectors + 1) * (1 if self.tokens.pack else 2)
        assert self.weight is not None
        return steps // self.weight.k_lanes * self.weight.vectors * (self.weight.tokens + 1)

    @property
    def fits_code(self) -> bool:
        """Whether the pattern may be printed as code: one group of rows, one panel, within the budget."""
        tile_rows = self.tokens.rows if self.tokens else self.problem.pattern.R
        single = len(self.groups) == 1 and tile_rows == self.problem.pattern.R and self.panels == 1
        return single and self.problem.pattern.block_rows <= CODE_ROWS and self.code_fma <= CODE_FMA

    def uses_weight_tile(self, n: int) -> bool:
        """Whether a call of n tokens runs the weight tile."""
        return self.tokens is None or (self.weight is not None and n < self.small_n)

    def family(self, n: int) -> tuple[Any, ...]:
        """The axis of the lanes and the register tile that run at n tokens."""
        if self.uses_weight_tile(n):
            assert self.weight is not None
            w = self.weight
            return ("weight", w.row_lanes, w.k_lanes, w.vectors, min(w.tokens, n))
        assert self.tokens is not None
        return ("tokens", self.tokens.rows, self.tokens.vectors)

    def counts(self, n: int) -> Counts:
        """Countable cost of one call of n tokens (backends/c/count.py)."""
        from bsrgen.backends.c.count import counts

        return counts(self, n)
