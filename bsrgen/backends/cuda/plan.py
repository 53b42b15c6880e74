"""The plan of a CUDA kernel: register tiles, what a thread block shares, and the blocks as the kernel walks them."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

from bsrgen.backends.cuda.count import counts
from bsrgen.backends.cuda.packing import Packing, pack_pattern
from bsrgen.backends.cuda.pit import selection_bytes, tile_sizes
from bsrgen.backends.cuda.split import LEAST_LOADS, LEAST_STEPS, Sharing
from bsrgen.backends.cuda.stream import LOAD_BYTES, Stream, on_cores
from bsrgen.dtypes import INT32
from bsrgen.gpus import GpuTarget
from bsrgen.plan import Counts, Plan

SHARED_BYTES = 48 << 10  # static shared memory of a thread block, on every architecture
INT_MAX = 2**31 - 1  # places in tables are ints of the device
WARP = 32


@dataclass(frozen=True, slots=True)
class Lanes:
    """What the 32 lanes of a warp do: `along_tokens` of them times `tokens` each; the rest share the sums of a row."""

    tokens: int
    along_tokens: int

    @property
    def along_k(self) -> int:
        """Lanes that add up parts of the same sums."""
        return WARP // self.along_tokens

    @property
    def width(self) -> int:
        """Tokens of a thread block."""
        return self.tokens * self.along_tokens

    @property
    def stride(self) -> int:
        """Elements from feature to feature of X in shared memory: 4 more keep transposed writes in different banks."""
        return self.width + (4 if self.width >= 16 else 0)


@dataclass(frozen=True)
class CudaPlan(Plan):
    """Knobs of a CUDA kernel.  A warp has `rows` rows of one block row, a thread block `warps` of them, and X lies
    between them in shared memory, `features` of the columns that they need at a time."""

    backend: ClassVar[str] = "cuda"

    rows: int
    warps: int
    features: int
    many: Lanes
    few: Lanes  # for calls of at most few_n tokens
    few_n: int
    stream_n: int = 0  # calls of at most so many stream W instead; 0: none
    split: int = 0  # thread blocks that share a launch of few units along k; 0: it is not shared

    def __str__(self) -> str:
        text = f"CUDA: {self.rows} rows x {self.many.tokens} tokens a thread, {self.thread_warps} warps, "
        text += f"{self.width} tokens x {self.step_columns * self.piece_columns} features of X in shared memory"
        if self.few_n > self.stream_n:
            text += f"; up to {self.few_n} tokens: {self.few.along_k} lanes along k"
        return text + self._streaming + self._splitting

    @property
    def _streaming(self) -> str:
        if not (stream := self.stream):
            return ""
        return f"; up to {self.stream_n}: {stream.warps} warps stream W for {stream.rows} rows"

    @property
    def _splitting(self) -> str:
        return f"; few units are shared by up to {self.split} thread blocks" if self.split else ""

    @property
    def matrix(self) -> bool:
        """Whether the products are those of matrix units: in MatrixPlan."""
        return False

    @property
    def width(self) -> int:
        """Tokens of a thread block where there are many."""
        return self.many.width

    @property
    def few_width(self) -> int:
        """And where there are few."""
        return self.few.width

    @property
    def dense(self) -> bool:
        """Whether the whole matrix is multiplied, zeros included: no plan of this backend does."""
        return False

    @property
    def zero_filled(self) -> bool:
        """Whether elements that are not stored are multiplied as zeros of W: only with zeros in place of X."""
        return False

    def knobs(self) -> dict[str, Any]:
        """The decisions alone, as plain data."""
        return {
            "backend": self.backend, "rows": self.rows, "warps": self.warps, "features": self.features,
            "many": asdict(self.many), "few": asdict(self.few), "few_n": self.few_n,
            "stream_n": self.stream_n, "split": self.split, "matrix": self.matrix, **tile_sizes(self),
        }  # fmt: skip

    def family(self, n: int) -> tuple[Any, ...]:
        """What plans share that do much the same at n tokens."""
        if n <= self.stream_n:
            return self.matrix, self.stream, self.split
        return (self.matrix, self.rows, *((self.few, self.split) if n <= self.few_n else (self.many,)))

    def counts(self, n: int) -> Counts:
        """What one call of n tokens does on the whole GPU."""
        return counts(self, n)

    @cached_property
    def stream(self) -> Stream | None:
        """How W streams in calls of few tokens."""
        assert isinstance(self.target, GpuTarget)
        unit, sms = self.problem.accumulator.bytes, self.target.sms
        rows = self.problem.pattern.block_rows * self.row_pieces
        return (
            on_cores(
                self.piece_rows, self.problem.dtype.bytes * self.word, unit, self.packed_bytes, rows, self.halves, sms
            )
            if self.stream_n
            else None
        )

    @property
    def halves(self) -> int:
        """Weights that make one result: 2 of swiglu and geglu."""
        return 2 if self.problem.gate_rows else 1

    # ── launches of few units ────────────────────────────────────────────────────────────────────────────────────

    @property
    def units(self) -> int:
        """Thread blocks for each tile of tokens, were none shared."""
        rows = self.problem.pattern.block_rows * self.row_pieces // self.halves
        return max(-(-rows // self.group_rows), 1)

    @property
    def few_sums(self) -> int:
        """Sums that a thread of the kernel for few tokens has."""
        return self.halves * self.rows * self.few.tokens

    @cached_property
    def sharing(self) -> Sharing | None:
        """How the kernel for few tokens is shared."""
        if not self.split or self.few_n <= self.stream_n:
            return None
        unit = self.problem.accumulator.bytes
        return Sharing(self.split, LEAST_STEPS, WARP * self.thread_warps * self.few_sums * unit)

    @cached_property
    def stream_sharing(self) -> Sharing | None:
        """How the kernel that streams W is shared: each lane has LEAST_LOADS to do."""
        if not self.split or not (stream := self.stream):
            return None
        sums = self.halves * stream.rows * stream.tokens[-1]
        threads = WARP * stream.warps
        bytes_of_one = stream.rows * self.stream_columns * self.problem.dtype.bytes
        least = -(-LEAST_LOADS * LOAD_BYTES * threads // bytes_of_one)
        return Sharing(self.split, least, -(-sums // threads) * threads * self.problem.accumulator.bytes)

    @property
    def step_tiles(self) -> int:
        """Waits for W in a step: of matrix units one for each tile of features."""
        return 1

    @property
    def stream_columns(self) -> int:
        """Columns of what W is streamed in: pieces."""
        return self.piece_columns

    @property
    def workspace_bytes(self) -> int:
        """Of the memory that a call brings for parts of sums."""
        return max((s.workspace_bytes for s in (self.sharing, self.stream_sharing) if s), default=0)

    # ── blocks as the kernel walks them: pieces of the problem's ─────────────────────────────────────────────────

    @property
    def row_pieces(self) -> int:
        """Pieces that a block row is cut into, because it has more rows than the warps of a thread block."""
        return -(-self._strips // self.warps)

    @property
    def strips(self) -> int:
        """Warps that share a piece of a block row."""
        return -(-self._strips // self.row_pieces)

    @property
    def _strips(self) -> int:
        return -(-self.problem.pattern.R // self.rows)

    @property
    def piece_rows(self) -> int:
        """Rows of a piece as they are packed, those of zeros included."""
        return self.strips * self.rows

    @property
    def group_rows(self) -> int:
        """Block rows, or pieces of one, that a thread block has."""
        return max(self.warps // self.strips, 1)

    @property
    def thread_warps(self) -> int:
        """Warps of a thread block."""
        return self.group_rows * self.strips

    @property
    def column_pieces(self) -> int:
        """Pieces that a block is cut into along k, because shared memory does not hold its columns."""
        return -(-self.problem.pattern.C // self.features)

    @property
    def piece_columns(self) -> int:
        """Columns of a piece."""
        return -(-self.problem.pattern.C // self.column_pieces)

    @property
    def packed_bytes(self) -> int:
        """Of W as it is packed, about: without what fills tiles."""
        pieces = self.problem.pattern.nnzb * self.row_pieces * self.column_pieces
        return pieces * self.piece_rows * self.piece_columns * self.problem.dtype.bytes

    @property
    def word(self) -> int:
        """Neighbouring columns that are multiplied at once: 4 of int8 by one dp4a, where they fill the pieces."""
        whole = self.piece_columns % 4 == 0 and self.piece_columns * self.column_pieces == self.problem.pattern.C
        return 4 if self.problem.accumulator is INT32 and whole and not self.matrix else 1

    @property
    def unit_k(self) -> int:
        """Features of X that are multiplied at once."""
        return self.word

    @property
    def step_units(self) -> int:
        """So many of them whose X is in shared memory at a time, where they are listed."""
        return self.step_columns * self.piece_columns // self.unit_k

    @property
    def step_columns(self) -> int:
        """Columns of pieces whose X is in shared memory at a time."""
        return max(self.features // self.piece_columns, 1)

    @property
    def shared_bytes(self) -> int:
        """Two panels of X, in the type of the sums; scales of tokens that the kernel quantises, or lists of tokens."""
        unit = self.problem.accumulator.bytes
        widest = max(self.many.stride, self.few.stride)
        scales = 8 * max(self.width, self.few_width) if self.problem.quantizes_x else 0
        panels = 2 * self.step_columns * (self.piece_columns // self.word) * widest * unit
        return panels + scales + selection_bytes(self)

    @cached_property
    def packing(self) -> Packing:
        """The tables."""
        p = self.problem.pattern
        gate = self.problem.gate_rows // p.R * self.row_pieces
        return pack_pattern(p, self.row_pieces, self.column_pieces, self.group_rows, self.step_columns, gate)
