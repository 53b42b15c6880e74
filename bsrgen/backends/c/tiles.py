"""The register tiles of the micro-kernels: vectors of the weight, vectors of tokens, tiles of the matrix unit."""

from dataclasses import dataclass
from typing import Literal

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
    expand: bool = False  # single rows, values close together: bits say to which of a vector's k they belong


@dataclass(frozen=True, slots=True)
class TokenTile:
    """Lanes along tokens: registers hold `rows` x `vectors` sums; X of so many tokens is packed at a time."""

    rows: int
    vectors: int
    k_panel: int  # features of X in one panel: it stays in L1; all of them: sums never leave the registers
    pack: bool = True  # False (spmm): full vectors are read straight from X


@dataclass(frozen=True, slots=True)
class MatrixTile:
    """Tiles of the matrix unit hold token_tiles x row_tiles sums of 16 tokens x 16 rows.  Where X comes from:

    direct     operand A, as it lies in row-major X, or copied tile by tile; W is B
    joined     the same, narrow blocks side by side in K steps of 64 bytes
    panel      operand B, whole blocks of a panel of dwords, packed once for each unit of tokens; W is A
    gathered   the same, the columns of a block row side by side in full K steps
    """

    form: Literal["direct", "joined", "panel", "gathered"]
    token_tiles: int
    row_tiles: int  # of one pass over a block row
    chunk: int = 8  # units of tokens that take turns at a block row
    ahead: int = 2  # K steps that are gathered before they are multiplied: a tile load waits for stores on their way
    copy_x: bool = False  # direct: also where rows of X do not share sets of L1

    @property
    def x_first(self) -> bool:
        """Whether X is operand A, token after token."""
        return self.form in ("direct", "joined")

    @property
    def rings(self) -> bool:
        """Whether K steps of X are gathered into a ring."""
        return self.form in ("joined", "gathered")

    def __str__(self) -> str:
        copied = ", X copied" if self.copy_x else ""
        return f"matrix tiles, {self.form}, {self.token_tiles} of tokens x {self.row_tiles} of rows{copied}"
