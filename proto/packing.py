"""Plans, tables and packed values of the AMX micro-kernels, and what their templates see."""

from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.pattern import Pattern

Array = NDArray[Any]
UNIT = 8  # bytes that one offset of a panel counts


@dataclass(frozen=True)
class Element:
    """A type of W and X that the matrix unit multiplies."""

    name: str
    c: str
    bytes: int
    acc: str
    dot: str

    @property
    def group(self) -> int:
        """Neighbouring k in a dword."""
        return 4 // self.bytes


BF16 = Element("bfloat16", "uint16_t", 2, "float", "_tile_dpbf16ps")
INT8 = Element("int8", "int8_t", 1, "int32_t", "_tile_dpbssd")


def _pad(a: Array, axis: int, to: int) -> Array:
    width = [(0, 0)] * a.ndim
    width[axis] = (0, to - a.shape[axis])
    return np.pad(a, width)


def _tiles(total: int, exact: bool) -> tuple[int, ...]:
    """Rows of each tile of a block row: 16, and what is left in the last one where the tile may be smaller."""
    count = -(-total // 16)
    return tuple(min(16, total - 16 * t) if exact else 16 for t in range(count))


# ── direct ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Direct:
    """X as A in place, W as B: token_tiles x row_tiles sums in tiles; C a multiple of the dword's k."""

    pattern: Pattern
    element: Element
    token_tiles: int = 2
    row_tiles: int = 2  # of one pass
    chunk: int = 8
    copy_x: bool = False  # True also where the last block column sticks out of K, or pieces are joined
    gathers: bool = False  # blocks of 16 or 32 bytes a row are joined to K steps of 64
    ahead: int = 2

    @property
    def pieces(self) -> int:
        """Blocks side by side in a K step."""
        width = self.pattern.C * self.element.bytes
        assert not self.gathers or width in (16, 32)
        return 64 // width if self.gathers else 1

    @property
    def k_tile(self) -> int:
        """k of one product or piece: the largest divisor of C that a tile holds and dwords divide."""
        C, g = self.pattern.C, self.element.group
        assert C % g == 0
        return max(d for d in range(g, 16 * g + 1, g) if C % d == 0)

    @property
    def tile_cols(self) -> int:
        """Outputs of one tile."""
        return min(self.pattern.R, 16)

    @property
    def tiles(self) -> int:
        """Row tiles of a block row."""
        return -(-self.pattern.R // 16)

    @property
    def passes(self) -> list[dict[str, int]]:
        """Row tiles that are summed together."""
        R, step = self.pattern.R, self.row_tiles
        cut = [(t, min(step, self.tiles - t)) for t in range(0, self.tiles, step)]
        return [{"first": t, "tiles": n, "rows": min(R - 16 * t, 16 * n)} for t, n in cut]

    def _numbers(self, tokens: int) -> tuple[Any, Any, Any]:
        """Numbers of the tiles of sums, A and B; those that stream take turns."""
        rows = min(self.row_tiles, self.tiles)
        sums, free = tokens * rows, 8 - tokens * rows
        held = 1 if tokens == 1 else rows  # tokens == 1: A is held, B streams
        turns = free - held - (tokens > 1)  # the last token tile may have another shape: its A has a tile of its own
        assert turns >= 1, "too many tiles"

        def c(t: int, r: int) -> int:
            return t * rows + r

        if tokens == 1:
            return c, lambda t: sums, lambda r: sums + 1 + r % turns
        return c, lambda t: 7 if t == tokens - 1 else sums + rows + t % turns, lambda r: sums + r

    def _variant(self, tokens: int, rows: int) -> dict[str, Any]:
        c, a, b = self._numbers(tokens)
        ops = []
        for t in range(tokens):
            ops.append({"what": "x", "tile": a(t), "t": t})
            for r in range(rows):
                if t == 0:
                    ops.append({"what": "w", "tile": b(r), "r": r})
                ops.append({"what": "dot", "c": c(t, r), "a": a(t), "b": b(r)})
        sums = [{"tile": c(t, r), "t": t, "r": r} for t in range(tokens) for r in range(rows)]
        return {"tokens": tokens, "rows": rows, "ops": ops, "sums": sums}

    def _config(self, tokens: int) -> list[dict[str, Any]]:
        c, a, b = self._numbers(tokens)
        rows, e = min(self.row_tiles, self.tiles), self.element
        out = {}
        for t in range(tokens):
            live = "rest" if t == tokens - 1 else 16
            for r in range(rows):
                out[c(t, r)] = (live, self.tile_cols * 4)
                out[b(r)] = (self.k_tile * self.pieces // e.group, self.tile_cols * 4)
            out[a(t)] = (live, self.k_tile * self.pieces * e.bytes)
        return [{"tile": t, "rows": r, "row_bytes": n} for t, (r, n) in sorted(out.items())]

    def view(self) -> dict[str, Any]:
        """What matrix_direct.c.j2 sees."""
        p, e = self.pattern, self.element
        padded = p.block_cols * p.C
        counts = sorted({q["tiles"] for q in self.passes})
        return {
            "direct": True, "linear": True, "element": e.c, "element_bytes": e.bytes, "group": e.group, "acc": e.acc,
            "dot": e.dot, "token_tiles": self.token_tiles, "row_tiles": self.tiles, "tile_cols": self.tile_cols,
            "k_tile": self.k_tile, "passes": self.passes, "chunk": self.chunk,
            "padded_k": padded + (self.k_tile if self.gathers else 0), "pieces": self.pieces, "ahead": self.ahead,
            "slots": self.slots, "copy_x": self.copy_x or padded != p.K or self.gathers,
            "variants": [self._variant(t, r) for t in range(1, self.token_tiles + 1) for r in counts],
            "configs": [self._config(t) for t in range(1, self.token_tiles + 1)],
            "offset_type": f"uint{8 * self.offsets.itemsize}_t",
        }  # fmt: skip

    @property
    def steps(self) -> Array:
        """K steps (blocks, where none are joined) of each block row."""
        return -(-self.pattern.row_counts // self.pieces)

    @property
    def slots(self) -> int:
        """Gathered K steps that the ring holds: a power of two; several passes read a whole block row again."""
        need = self.ahead + (max(self.steps, default=0) if len(self.passes) > 1 else 1)
        return 1 << int(need - 1).bit_length()

    @property
    def pointers(self) -> Array:
        """First step of each block row, and the end."""
        return np.concatenate(([0], np.cumsum(self.steps))).astype(np.uint32)

    @property
    def _places(self) -> Array:
        """Where each stored block lies among the pieces of all steps."""
        p = self.pattern
        rank = np.arange(p.nnzb) - np.repeat(p.indptr[:-1], p.row_counts)
        return np.repeat(self.pointers[:-1].astype(np.int64) * self.pieces, p.row_counts) + rank

    @property
    def offsets(self) -> Array:
        """First feature of each piece; the tile of zeros behind K where there is none."""
        p = self.pattern
        k = np.full(int(self.pointers[-1]) * self.pieces, p.block_cols * p.C, np.int64)
        k[self._places] = p.indices.astype(np.int64) * p.C
        return k.astype(np.uint16 if p.block_cols * p.C < 1 << 16 else np.uint32)

    def pack(self, data: Array) -> Array:
        """(nnzb, R, C) -> per block row and pass: [step][k tile][row tile][dword row][output][k of the dword]."""
        p, g, kt = self.pattern, self.element.group, self.k_tile
        total = int(self.pointers[-1])
        filled = np.zeros((total * self.pieces, self.tiles * self.tile_cols, p.C), data.dtype)
        filled[self._places, : p.R] = data
        wide = self.pieces * p.C  # of a step: its pieces side by side
        filled = filled.reshape(total, self.pieces, self.tiles * self.tile_cols, p.C).transpose(0, 2, 1, 3)
        kt *= self.pieces
        parts = filled.reshape(total, self.tiles, self.tile_cols, wide // kt, kt // g, g).transpose(0, 3, 1, 4, 2, 5)
        out = [
            parts[self.pointers[i] : self.pointers[i + 1], :, q["first"] : q["first"] + q["tiles"]].reshape(-1)
            for i in range(p.block_rows)
            for q in self.passes
        ]
        return np.concatenate(out) if out else np.zeros(0, data.dtype)


# ── gathered ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Gather:
    """W as A, X as B out of a panel: listed columns in full K steps, or (gathers False) whole blocks where they lie."""

    pattern: Pattern
    element: Element
    linear: bool = True
    token_tiles: int = 2
    row_tiles: int = 2  # of one pass
    ahead: int = 2
    chunk: int = 4
    gathers: bool = True

    def __post_init__(self) -> None:
        assert self.token_tiles % 2 == 0
        assert self.gathers or not self.single
        live = min(self.row_tiles, -(-self.pattern.R // 16))
        assert live * self.token_tiles + live + 1 <= 8, "too many tiles"

    @property
    def single(self) -> bool:
        """Whether columns are listed one by one: C does not fill dwords."""
        return self.pattern.C % self.element.group != 0

    @property
    def step_rows(self) -> int:
        """Dword rows of one K step."""
        if self.gathers:
            return 16
        g = self.element.group
        return max(d for d in range(1, 17) if self.pattern.C % (d * g) == 0)

    @property
    def tiles(self) -> tuple[int, ...]:
        """Rows of each row tile."""
        return _tiles(self.pattern.R, self.pattern.R <= 16 * self.row_tiles)

    @property
    def panel_row(self) -> int:
        """Bytes of one panel row."""
        return 16 * self.token_tiles * (self.element.bytes if self.single else 4)

    @property
    def panel_rows(self) -> int:
        """Rows of the panel, of which the last listed one is zero."""
        p = self.pattern
        return p.K if self.single else p.block_cols * p.C // self.element.group

    @property
    def passes(self) -> list[dict[str, Any]]:
        """Row tiles that are summed together, and the instructions of one K step."""
        tiles, step, T = self.tiles, min(self.row_tiles, len(self.tiles)), self.token_tiles
        sums = step * T
        out = []
        for first in range(0, len(tiles), step):
            live = min(step, len(tiles) - first)
            free = 8 - sums - step  # tiles of B
            ops = []
            for r in range(live):
                ops.append({"what": "w", "tile": sums + r, "r": r})
                for t in range(T):
                    if r == 0 or free < T:
                        ops.append({"what": "x", "tile": sums + step + t % free, "t": t})
                    ops.append({"what": "dot", "c": r * T + t, "a": sums + r, "b": sums + step + t % free})
            stored = [{"tile": r * T + t, "r": r, "t": t} for r in range(live) for t in range(T)]
            step_bytes = sum(tiles[first : first + live]) * self.step_rows * 4
            out.append({"first": first, "tiles": live, "ops": ops, "sums": stored, "step_bytes": step_bytes})
        return out

    @property
    def config(self) -> list[dict[str, int]]:
        """Shape of the 8 tiles."""
        tiles, step, T = self.tiles, min(self.row_tiles, len(self.tiles)), self.token_tiles
        shape = [{"rows": 0, "row_bytes": 0} for _ in range(8)]
        for r in range(step):
            shape[step * T + r] = {"rows": tiles[r], "row_bytes": self.step_rows * 4}
            for t in range(T):
                shape[r * T + t] = {"rows": tiles[r], "row_bytes": 64}
        for t in range(min(T, 8 - step * T - step)):
            shape[step * T + step + t] = {"rows": self.step_rows, "row_bytes": 64}
        return shape

    @cached_property
    def steps(self) -> Array:
        """K steps of each block row."""
        p = self.pattern
        per = self.step_rows * self.element.group
        return -(-p.row_counts * p.C // per)

    @property
    def slots(self) -> int:
        """Gathered K steps that the ring holds: a power of two; several passes read a whole block row again."""
        need = self.ahead + (max(self.steps, default=0) if len(self.passes) > 1 else 1)
        return 1 << int(need - 1).bit_length()

    @property
    def pointers(self) -> Array:
        """First K step of each block row, and the end."""
        return np.concatenate(([0], np.cumsum(self.steps))).astype(np.uint32)

    def _slots(self) -> tuple[Array, Array]:
        """For each stored block, in dwords or columns: where its first one lies among those of all steps; that many."""
        p = self.pattern
        size = p.C if self.single else p.C // self.element.group
        per = self.step_rows * (self.element.group if self.single else 1)
        rank = np.arange(p.nnzb) - np.repeat(p.indptr[:-1], p.row_counts)
        first = np.repeat(self.pointers[:-1].astype(np.int64) * per, p.row_counts) + rank * size
        return first[:, None] + np.arange(size), int(self.pointers[-1]) * per

    @property
    def offsets(self) -> Array:
        """Panel row of each column (or dword row) of each K step, in units of 8 bytes; the zero row where there is none."""
        p, g = self.pattern, self.element.group
        at, total = self._slots()
        size = at.shape[1]
        rows = np.full(total, self.panel_rows, np.int64)
        rows[at] = p.indices.astype(np.int64)[:, None] * size + np.arange(size)
        rows = np.minimum(rows, self.panel_rows)
        rows = rows if self.gathers else rows[:: self.step_rows]
        out = rows * (self.panel_row // UNIT)
        return out.astype(np.uint16 if self.panel_rows * self.panel_row // UNIT < 1 << 16 else np.uint32)

    def pack(self, data: Array) -> Array:
        """(nnzb, R, C) -> per block row and pass: [K step][row tile][row][k of the step]."""
        p = self.pattern
        per = self.step_rows * self.element.group
        at, total = self._slots()
        cells = total if self.single else total * self.element.group
        rows = np.zeros((p.R, cells), data.dtype)
        if self.single:
            rows[:, at] = data.transpose(1, 0, 2)
        else:
            g = self.element.group
            k = (at[:, :, None] * g + np.arange(g)).reshape(p.nnzb, p.C)
            rows[:, k] = data.transpose(1, 0, 2)
        rows = _pad(rows, 0, sum(self.tiles)).reshape(sum(self.tiles), cells // per, per)  # row, step, k
        first = np.concatenate(([0], np.cumsum(self.tiles)))
        out = [
            rows[first[q["first"]] : first[q["first"] + q["tiles"]], self.pointers[i] : self.pointers[i + 1]]
            .transpose(1, 0, 2)
            .reshape(-1)
            for i in range(p.block_rows)
            for q in self.passes
        ]
        return np.concatenate(out) if out else np.zeros(0, data.dtype)

    def view(self) -> dict[str, Any]:
        """What matrix_gather.c.j2 sees."""
        e = self.element
        return {
            "direct": False, "linear": self.linear, "element": e.c, "element_bytes": e.bytes, "group": e.group,
            "acc": e.acc, "dot": e.dot, "token_tiles": self.token_tiles, "row_tiles": self.tiles, "single": self.single,
            "gathers": self.gathers, "step_rows": self.step_rows, "ahead": self.ahead, "slots": self.slots,
            "panel_rows": self.panel_rows, "panel_tail": 33, "chunk": self.chunk, "passes": self.passes,
            "config": self.config, "offset_type": f"uint{8 * self.offsets.itemsize}_t",
        }  # fmt: skip
