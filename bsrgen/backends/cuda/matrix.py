"""The plan of a CUDA kernel on matrix units (mma.sync), and W in the order of their fragments."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.backends.cuda.pit import selection_bytes
from bsrgen.backends.cuda.plan import WARP, CudaPlan, Lanes
from bsrgen.backends.cuda.stream import Stream, on_units
from bsrgen.gpus import GpuTarget

TOKEN_WARPS = 4  # that share the tokens of a thread block
STEP_TILES = 4  # in shared memory at a time, where they are listed


@dataclass(frozen=True)
class MatrixPlan(CudaPlan):
    """Knobs of a kernel on matrix units.

    A thread block has `rows` rows, a multiple of 8, of one block row; each of its warps has many.tokens times 16 tokens
    (few.tokens); the columns of a step lie side by side and fill tiles of 32 bytes of features.
    """

    stages: int = 2  # steps of X in shared memory, one of which is multiplied

    def __str__(self) -> str:
        text = f"CUDA, matrix units: {self.rows} rows x {self.width} tokens a thread block, {self.step_k} features of X"
        text = f"{text} in shared memory; up to {self.few_n} tokens: {self.few_width} of them"
        return text + self._streaming + self._splitting

    @property
    def matrix(self) -> bool:
        """Whether the products are those of matrix units."""
        return True

    @property
    def tile_k(self) -> int:
        """Features of a tile."""
        return 32 // self.problem.dtype.bytes

    @property
    def unit_k(self) -> int:
        """Features of X that are multiplied at once."""
        return self.tile_k

    @property
    def width(self) -> int:
        """Tokens of a thread block where there are many."""
        return 16 * TOKEN_WARPS * self.many.tokens

    @property
    def few_width(self) -> int:
        """And where there are few."""
        return 16 * TOKEN_WARPS * self.few.tokens

    @property
    def thread_warps(self) -> int:
        """Warps of a thread block."""
        return TOKEN_WARPS

    @property
    def step_k(self) -> int:
        """Features in shared memory at a time, whole tiles."""
        return -(-self.step_columns * self.piece_columns // self.tile_k) * self.tile_k

    @property
    def shared_bytes(self) -> int:
        """Panels of X as it is multiplied, rows 16 bytes apart, and scales of tokens; of bytes none is transposed."""
        unit = self.problem.dtype.bytes
        scales = 8 * self.width if self.problem.quantizes_x else 0
        if self.problem.operator.token_axis == 0 or unit == 1:
            return self.stages * self.width * (self.step_k * unit + 16) + scales + selection_bytes(self)
        return self.stages * self.step_k * (self.width + 8) * unit

    def knobs(self) -> dict[str, Any]:
        """The decisions alone, as plain data."""
        return super().knobs() | {"stages": self.stages}

    @property
    def few_sums(self) -> int:
        """Sums that a thread of the kernel for few tokens has."""
        return self.halves * self.few.tokens * self.rows // 2

    @property
    def step_tiles(self) -> int:
        """Tiles of features in a step."""
        return self.step_k // self.tile_k

    @property
    def stream_columns(self) -> int:
        """Columns of what W is streamed in: tiles."""
        return self.tile_k

    @cached_property
    def stream(self) -> Stream | None:
        """How W streams in calls of few tokens: 16 of them are one tile of the units."""
        assert isinstance(self.target, GpuTarget)
        rows = self.problem.pattern.block_rows * self.row_pieces
        return (
            on_units(self.piece_rows, self.packed_bytes, rows, self.halves, self.target.sms) if self.stream_n else None
        )

    @cached_property
    def fragments(self) -> NDArray[Any]:
        """First tile of features of each step: int32[steps + 1]."""
        features = np.diff(self.packing.columns).astype(np.int64) * self.piece_columns
        return np.concatenate(([0], np.cumsum(-(-features // self.tile_k)))).astype(np.int32)

    @cached_property
    def features_of_tiles(self) -> NDArray[Any]:
        """For each feature of tiles piece * piece_columns + column, -1 behind a step's last: int64[tile_k * tiles]."""
        counts = np.diff(self.packing.columns).astype(np.int64) * self.piece_columns
        step = np.repeat(np.arange(counts.size), np.diff(self.fragments) * self.tile_k)
        inside = np.arange(step.size) - self.tile_k * self.fragments[:-1].astype(np.int64)[step]
        first = self.packing.columns[:-1].astype(np.int64)[step] * self.piece_columns
        return np.where(inside < counts[step], first + inside, -1).astype(np.int64)

    @cached_property
    def features_of_x(self) -> NDArray[Any]:
        """The same as features of X, K for those that are not there: int64[tile_k * tiles]."""
        p, place = self.problem.pattern, self.features_of_tiles
        if not self.packing.features.size:
            return place
        first, column = self.packing.features[place // self.piece_columns].astype(np.int64), place % self.piece_columns
        there = (place >= 0) & (first % p.C + column < p.C)
        return np.where(there, np.minimum(first + column, p.K), p.K)

    def in_fragments(self, packed: NDArray[Any]) -> NDArray[Any]:
        """[pieces, columns, rows] -> [tile][pair of strips][row][quad][strip][high][low]; k is high, quad, low."""
        whole = np.vstack([packed.reshape(-1, self.rows), np.zeros((1, self.rows), packed.dtype)])
        tiles = whole[self.features_of_tiles]  # -1 is the row of zeros
        pair = 2 - self.rows // 8 % 2
        shape = (
            -1,
            2,
            4,
            self.tile_k // 8,
            self.rows // (8 * pair),
            pair,
            8,
        )  # tile, high, quad, low; pairs, strip, row
        return np.ascontiguousarray(tiles.reshape(shape).transpose(0, 4, 6, 2, 5, 1, 3))


@dataclass(frozen=True)
class MatrixFeaturesPlan(MatrixPlan):
    """The same where tiles of features that X has nothing in are left out: `features` is one tile."""

    @property
    def step_k(self) -> int:
        """Features in shared memory at a time, of tiles that may lie apart."""
        return self.step_units * self.tile_k

    @property
    def step_units(self) -> int:
        """Tiles in shared memory at a time."""
        return STEP_TILES


def tokens(tiles: int) -> Lanes:
    """`tiles` times 16 tokens a warp."""
    return Lanes(tiles, WARP)
