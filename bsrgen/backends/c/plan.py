"""The plans of the C backend.  A kernel has up to two micro-kernels over one packed weight.

`WeightTile` keeps the SIMD lanes on the weight (rows x k of a block), X is broadcast straight from row-major X: any N.
`TokenTile` keeps the lanes on the tokens, X comes from a feature-major panel packed once per chunk of tokens, W is
broadcast: any block shape at full lanes, once N fills them.  Both read the same packed values, because a broadcast can
fetch any element of a block from a constant offset.  `MatrixTile` multiplies on the matrix unit, for any N and alone.
"""

from dataclasses import asdict, dataclass
from typing import Any

from bsrgen.backends.c.layout import Layout
from bsrgen.backends.c.matrix import TILES
from bsrgen.backends.c.products import FMA
from bsrgen.backends.c.tiles import MatrixTile, TokenTile, WeightTile
from bsrgen.plan import Counts
from bsrgen.targets import X86_64_V4_BF16, Target

EXPAND = {1: "avx512vbmi2", 2: "avx512vbmi2", 4: "avx512f", 8: "avx512f"}  # what expands units of so many bytes
CODE_FMA = 1024  # most multiply-adds written out in one kernel: more takes gcc 12 seconds and gains nothing here
CODE_ROWS = 64  # most block rows: each is a function of its own for each register tile

__all__ = ["CPlan", "MatrixTile", "TokenTile", "WeightTile"]


@dataclass(frozen=True)
class CPlan(Layout):
    """Knobs of a C kernel.  Calls of fewer than `small_n` tokens take the weight tile where there are both, or a token
    tile of one vector of `short_lanes`."""

    def __post_init__(self) -> None:
        one_panel = (self.tokens is None and self.weight is None) or self.panels == 1
        assert one_panel or self.k_panel % self.pattern.C == 0, "a block lies in two panels"
        assert one_panel or self.tokens is None or self.tokens.pack, "X as it lies has no panels"
        assert not self.gather or (self.product.group > 1 and self.pattern.C == 1), "only single columns are gathered"
        assert self.product.tiles == (self.matrix is not None), "the matrix unit has products of its own"
        assert not (self.weight and self.weight.expand) or self.may_expand(self.weight), "rows that cannot be expanded"
        assert not self.short_lanes or (self.tokens and not self.weight and not self.gather), (
            "nothing to be shorter than"
        )
        assert not self.matrix or self.matrix_packing.tiles_needed <= TILES, "too many tiles"

    def __str__(self) -> str:
        parts = [str(self.matrix)] if self.matrix else []
        if (t := self.tokens) is not None:
            parts.append(
                f"lanes along tokens, {t.rows} rows x {t.vectors} vectors, "
                f"panels of {self.k_panel} features{'' if t.pack else ', X unpacked'}"
                f"{f'; n < {self.small_n}: {t.rows} rows x {self.short_lanes} tokens' if self.short_lanes else ''}"
            )
        if (w := self.weight) is not None:
            lanes = {1: "rows", self.weight_lanes: "k"}.get(w.k_lanes, f"{w.row_lanes} rows x {w.k_lanes} k")
            if self.weight_lanes < self.lanes:
                lanes = f"{w.row_lanes} rows x {w.k_lanes} k"
            lanes += ", rows expanded by bits" if w.expand else ""
            when = f"n < {self.small_n}: " if self.tokens else ""
            panels = f", panels of {self.k_panel} features" if self.panels > 1 and not self.tokens else ""
            panels += f", chunks of {w.chunk} tiles" if w.chunk > 1 else ""
            parts.append(f"{when}lanes along {lanes}, {w.tokens} tokens x {w.vectors} vectors{panels}")
        blocks = ""
        if self.cover is not None:
            blocks = "dense, " if self.dense else f"as {self.stored.R}x{self.stored.C} blocks, "
        how = "" if self.product is FMA else f"{self.product.name} {'' if self.matrix else 'dot '}products, "
        how += "gathered columns, " if self.gather else ""
        return f"{self.target.name}: {blocks}{how}{'; '.join(parts)}; pattern as {self.encoding}"

    def knobs(self) -> dict[str, Any]:
        """The decisions alone, as plain data."""
        tile = {name: tile and asdict(tile) for name, tile in self._tiles.items()}
        return {
            **tile,
            "small_n": self.small_n,
            "short_lanes": self.short_lanes,
            "encoding": self.encoding,
            "product": self.product.name,
            "gather": self.gather,
            "blocksize": list(self.stored.blocksize),
            "dense": self.dense,
        }

    def may_expand(self, tile: WeightTile) -> bool:
        """Whether rows may be expanded into vectors of `tile`: on the target, and whole vectors in a panel."""
        bits = self.bits_of(tile)
        whole = self.panels == 1 or self.k_panel % bits.step == 0
        return whole and self.pattern.R == 1 and bits.bytes in EXPAND and self.target.has(EXPAND[bits.bytes])

    @property
    def _tiles(self) -> dict[str, TokenTile | WeightTile | MatrixTile | None]:
        return {"tokens": self.tokens, "weight": self.weight, "matrix": self.matrix}

    @property
    def lowered(self) -> bool:
        """Whether the register tile comes from elsewhere than the C text, as a function for each number of vectors."""
        return False

    @property
    def listed(self) -> bool:
        """Whether a call's tokens come in lists (mode="pit")."""
        return self.problem.pit is not None and self.problem.pit.axis.listed

    @property
    def shares_rows(self) -> bool:
        """Whether threads share the rows, not the tokens."""
        return self.tokens is None and self.matrix is None

    @property
    def on_tiles(self) -> bool:
        """Whether the matrix unit multiplies."""
        return self.matrix is not None

    @property
    def fallback(self) -> Target | None:
        """The row for where the system refuses the matrix unit: what every CPU that has it can do beside it."""
        return X86_64_V4_BF16 if self.on_tiles else None

    @property
    def registers(self) -> int:
        """Vector registers of the larger micro-kernel: sums, one k step of the held operand, one streamed vector."""
        need = [16 if self.matrix else 0]  # what transposes 16 x 16 sums
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
        single = (
            self.problem.pattern.known
            and not self.gather
            and self.bits is None
            and len(self.groups) == 1
            and tile_rows == self.pattern.R
            and self.panels == 1
        )
        return single and self.pattern.block_rows <= CODE_ROWS and self.code_fma <= CODE_FMA

    def uses_weight_tile(self, n: int) -> bool:
        """Whether a call of n tokens runs the weight tile."""
        return self.weight is not None and (self.tokens is None or n < self.small_n)

    @property
    def few_n(self) -> int:
        """Tokens from which calls take the first micro-kernel; 0: all do."""
        return self.small_n if self.tokens and (self.weight or self.short_lanes) else 0

    @property
    def single(self) -> bool:
        """Whether calls of one token read X as it lies: rows of single elements, one panel."""
        alone = self.short_lanes > 0 and self.pattern.blocksize == (1, 1) and self.panels == 1
        return alone and self.encoding == "table" and self.same_x and not self.listed and not self.problem.gate_rows

    def lanes_at(self, n: int) -> int:
        """Tokens of one vector of the token tile in a call of n."""
        return self.short_lanes if self.short_lanes and n < self.small_n else self.lanes

    def family(self, n: int) -> tuple[Any, ...]:
        """The blocks that are walked, and the axis of the lanes and the register tile that run at n tokens."""
        blocks = (self.product.name, self.gather, self.pattern.blocksize, self.dense)
        if (m := self.matrix) is not None:
            return (*blocks, m.form, m.token_tiles, m.row_tiles)
        if self.uses_weight_tile(n):
            assert self.weight is not None
            w = self.weight
            return (*blocks, "weight", w.row_lanes, w.k_lanes, w.vectors, min(w.tokens, n))
        assert self.tokens is not None
        return (*blocks, "tokens", self.tokens.rows, self.tokens.vectors, self.lanes_at(n))

    def counts(self, n: int) -> Counts:
        """Countable cost of one call of n tokens (backends/c/count.py)."""
        from bsrgen.backends.c.count import counts
        from bsrgen.backends.c.count_matrix import matrix_counts

        return matrix_counts(self, n) if self.matrix else counts(self, n)
