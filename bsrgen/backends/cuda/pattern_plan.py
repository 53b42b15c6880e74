"""Products at a block pattern on GPUs: plans, the tiles that their thread blocks have, and what they cost."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bsrgen.backends.cuda.count import MMA_SHARE, OVERLAP, SHARED_CYCLES, STEP_CYCLES
from bsrgen.backends.cuda.plan import INT_MAX, SHARED_BYTES, WARP
from bsrgen.gpus import GpuTarget
from bsrgen.operators import SDDMM
from bsrgen.pattern_problem import PatternProblem
from bsrgen.plan import Counts, Plan

Array = NDArray[Any]
SECTOR_BYTES = 32  # that memory and L2 are read in
STAGES = 3  # steps in shared memory for matrix units, one of which is multiplied
FRAGMENT_N = 32  # of a step on matrix units: one load of four matrices for each 8 rows
HELD = 20  # elements that a thread has on their way into shared memory
UNIT_WARPS = 4  # of a thread block on matrix units


@dataclass(frozen=True)
class PatternCudaPlan(Plan):
    """A thread block has a tile of the results: up to `tile_rows` rows of a block row x `tile_columns` of the columns
    that its stored blocks have, listed side by side whatever their width.  It walks N by steps through shared memory.
    """

    backend: ClassVar[str] = "cuda"
    matrix: ClassVar[bool] = False  # whether matrix units multiply

    problem: PatternProblem  # type: ignore[assignment]

    dense = zero_filled = False

    @property
    def tile_rows(self) -> int:
        """Rows of a thread block."""
        raise NotImplementedError

    @property
    def tile_columns(self) -> int:
        """Listed columns of a thread block."""
        raise NotImplementedError

    @property
    def step(self) -> int:
        """Of N, in shared memory at a time."""
        raise NotImplementedError

    @property
    def threads(self) -> int:
        """Of a thread block."""
        raise NotImplementedError

    @property
    def shared_bytes(self) -> int:
        """Panels of A and B, and which rows and columns they have."""
        raise NotImplementedError

    @property
    def linear(self) -> bool:
        """Whether rows of A and B are tokens, features side by side."""
        return self.problem.operator is not SDDMM

    def knobs(self) -> dict[str, Any]:
        """The decisions alone, as plain data."""
        return {"backend": self.backend, "matrix": self.matrix} | super().knobs()

    @property
    def row_pieces(self) -> int:
        """Pieces that a block row is cut into."""
        return -(-self.problem.pattern.R // self.tile_rows)

    @cached_property
    def tiles(self) -> Array:
        """int32[tiles, 3]: of each thread block its piece of a block row, its first listed column and the one behind
        its last; those of the same columns are neighbours."""
        p, width = self.problem.pattern, self.tile_columns
        each = -(-p.row_counts.astype(np.int64) * p.C // width)
        row = np.repeat(np.arange(p.block_rows), each)
        first = p.indptr[row] * p.C + (np.arange(row.size) - np.repeat(np.cumsum(each) - each, each)) * width
        last = np.minimum(first + width, p.indptr[row + 1] * p.C)
        pieces = np.arange(self.row_pieces)
        rows = (row[:, None] * self.row_pieces + pieces).ravel()
        columns = [np.repeat(ends, pieces.size) for ends in (first, last)]
        return np.stack([rows, *columns], axis=1).astype(np.int32)

    @property
    def fits(self) -> bool:
        """Shared memory and 32-bit numbers of columns within their limits."""
        p = self.problem.pattern
        return self.shared_bytes <= SHARED_BYTES and p.nnzb * p.C < INT_MAX and max(p.M, p.K) < INT_MAX

    @property
    def peak(self) -> float:
        """FLOP of the GPU in a cycle."""
        raise NotImplementedError

    @property
    def loads(self) -> float:
        """Bytes from shared memory for each of N and a whole tile."""
        raise NotImplementedError

    def counts(self, n: int) -> Counts:
        """What one call does on the whole GPU, were it timed alone."""
        s, p, t = self.problem, self.problem.pattern, self.target
        assert isinstance(t, GpuTarget)
        tiles = len(self.tiles)
        flop = 2 * tiles * self.tile_rows * self.tile_columns * n
        sms = min(t.sms, max(tiles, 1))
        from_l2 = tiles * n * s.dtype.bytes * (self.tile_rows + self.tile_columns * self._spread)
        table_bytes = 4 * (3 * tiles + p.nnzb)
        memory = (p.M + p.K) * n * s.dtype.bytes + p.nnz * s.real.bytes + table_bytes
        share, steps = sms / t.sms, tiles * -(-n // self.step)
        bounds = (
            flop / (self.peak * share), tiles * n * self.loads / (SHARED_CYCLES * sms),
            from_l2 / (t.l2_bytes_per_cycle * share), memory / t.dram_bytes_per_cycle if memory > t.l2_bytes else 0.0,
            steps / sms * STEP_CYCLES,
        )  # fmt: skip
        return Counts(
            flop=flop, effective_flop=s.flop(n), vector_fma=flop // (2 * WARP),
            vector_loads=int(tiles * n * self.loads / 128), l1_bytes=int(tiles * n * self.loads), l2_bytes=int(from_l2),
            memory_bytes=memory, registers=self._registers, code_bytes=64 * self._registers, table_bytes=table_bytes,
            value_bytes=0, cycles=max(bounds) + OVERLAP * (sum(bounds) - max(bounds)),
        )  # fmt: skip

    @property
    def _registers(self) -> int:
        raise NotImplementedError

    @property
    def _spread(self) -> float:
        """Bytes of B that are read for each one that is needed: whole sectors, of which the pattern has a part."""
        p, unit = self.problem.pattern, self.problem.dtype.bytes
        if not self.linear or p.C * unit >= SECTOR_BYTES or not p.nnzb:
            return 1.0
        blocks = SECTOR_BYTES / (p.C * unit)
        density = p.nnzb / (p.block_rows * p.block_cols)
        return float((1 - (1 - density) ** blocks) / density)


@dataclass(frozen=True)
class CoresPlan(PatternCudaPlan):
    """On ordinary cores, every type and block shape.  A thread has `rows` x `columns` sums; side_rows x side_columns
    threads make a tile, and `slices` of them take a part of each step, whose sums are added in the end, in order."""

    rows: int
    columns: int
    side_rows: int
    side_columns: int
    slices: int

    def __str__(self) -> str:
        shared = f", {self.slices} along N" if self.slices > 1 else ""
        return (
            f"CUDA: {self.rows} rows x {self.columns} columns a thread, {self.tile_rows} x {self.tile_columns} a "
            f"thread block{shared}, steps of {self.step}"
        )

    @property
    def tile_rows(self) -> int:
        """Rows of a thread block."""
        return self.rows * self.side_rows

    @property
    def tile_columns(self) -> int:
        """Listed columns of a thread block."""
        return self.columns * self.side_columns

    @property
    def step(self) -> int:
        """Of N, in shared memory at a time."""
        return max(16, 4 * self.slices)

    @property
    def threads(self) -> int:
        """Of a thread block."""
        return self.side_rows * self.side_columns * self.slices

    @property
    def strides(self) -> tuple[int, int]:
        """Elements from one of N to the next in the panels of A and B: 4 more keep transposed writes apart."""
        return -(-self.tile_rows // 4) * 4 + 4, -(-self.tile_columns // 4) * 4 + 4

    @property
    def shared_bytes(self) -> int:
        """Two panels of the type of the sums, which are also where slices leave theirs."""
        panels = 2 * self.step * sum(self.strides)
        sums = (self.slices - 1) * self.tile_rows * self.tile_columns
        return max(panels, sums) * self.problem.real.bytes + 4 * (self.tile_rows + self.tile_columns)

    @property
    def peak(self) -> float:
        """FLOP of the GPU in a cycle, without its matrix units."""
        assert isinstance(self.target, GpuTarget)
        return self.target.flop_per_cycle(self.problem.real.bytes)

    @property
    def loads(self) -> float:
        """Bytes from shared memory for each of N and a tile: a warp's rows are the same for many of its threads."""
        unit = self.problem.real.bytes
        warps = self.side_rows * self.side_columns / WARP
        across = max(WARP // self.side_columns, 1)  # rows of threads in a warp
        return unit * warps * (32 * self.rows * min(across, 4) / 4 + WARP * self.columns) + unit * (
            self.tile_rows + self.tile_columns
        )

    @property
    def fits(self) -> bool:
        """And what a thread brings of a step leaves room for its sums: with 32 ptxas spilled (sm_90, nvcc 13.0)."""
        return super().fits and self.held <= HELD

    @property
    def held(self) -> int:
        """Elements of A and B that a thread has on their way."""
        return sum(-(-self.step * size // self.threads) for size in (self.tile_rows, self.tile_columns))

    @property
    def _registers(self) -> int:
        words = self.problem.real.bytes // 4
        return 40 + words * (self.rows * self.columns + self.rows + self.columns) + 4 * self.held


@dataclass(frozen=True)
class UnitsPlan(PatternCudaPlan):
    """On matrix units (mma.sync), float16 and bfloat16.  Listed columns are the side of 16, rows of a block that of 8,
    so that blocks of 8 rows and of any width fill the units; tokens are what is summed.  A warp has `rows` rows and
    `tiles_of_16` times 16 columns."""

    matrix: ClassVar[bool] = True

    rows: int
    tiles_of_16: int
    step_n: int = FRAGMENT_N
    stages: int = STAGES

    def __str__(self) -> str:
        return (
            f"CUDA, matrix units: {self.tile_rows} rows x {self.tile_columns} columns a thread block, steps of "
            f"{self.step}, {self.stages} in shared memory"
        )

    @property
    def tile_rows(self) -> int:
        """Rows of a thread block."""
        return self.rows

    @property
    def tile_columns(self) -> int:
        """Listed columns of a thread block."""
        return 16 * self.tiles_of_16 * UNIT_WARPS

    @property
    def step(self) -> int:
        """Of N, in shared memory at a time."""
        return self.step_n

    @property
    def threads(self) -> int:
        """Of a thread block."""
        return WARP * UNIT_WARPS

    @property
    def strides(self) -> tuple[int, int]:
        """Elements from row to row of the panels: odd numbers of 16 bytes, so that 8 rows are in different banks."""
        sizes = (self.tile_rows, self.tile_columns) if self.linear else (self.step, self.step)
        a, b = (8 * (size // 8 | 1) for size in sizes)
        return a, b

    @property
    def panel(self) -> int:
        """Elements of a step of A and B."""
        a, b = self.strides
        return self.step * (a + b) if self.linear else self.tile_rows * a + self.tile_columns * b

    @property
    def shared_bytes(self) -> int:
        """A ring of panels, and which rows and columns they have."""
        return self.stages * self.panel * self.problem.dtype.bytes + 4 * (self.tile_rows + self.tile_columns)

    @property
    def peak(self) -> float:
        """FLOP of the units in a cycle, as far as loops reach it."""
        assert isinstance(self.target, GpuTarget)
        return self.target.matrix_flop_per_cycle(self.problem.dtype.name) * MMA_SHARE

    @property
    def loads(self) -> float:
        """Bytes from and to shared memory for each of N: A once for each warp, B once; both written once."""
        return self.problem.dtype.bytes * ((UNIT_WARPS + 1) * self.tile_rows + 2 * self.tile_columns)

    @property
    def _registers(self) -> int:
        strips = self.rows // 8
        return 40 + strips * (4 * self.tiles_of_16 + 4) + 8 * self.tiles_of_16
