"""The strips of mode="pit": micro-tiles of tokens x one word of K, whose columns of W are read if they are live.

W lies in strips of rows, word after word of K, so that a live word's weights are a few whole vectors side by side.  A
tile of T tokens multiplies the words that any of them needs; the largest tile with all words is the dense product.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from bsrgen.backends.c.count import FITTED, epilogue_cycles
from bsrgen.backends.c.plan import CPlan
from bsrgen.backends.c.products import AMX_BF16, AMX_S8, BF16, S8, X8, Product, matrix_product, strip_products
from bsrgen.backends.c.tiles import WeightTile
from bsrgen.dtypes import INT8
from bsrgen.plan import Counts
from bsrgen.problem import Problem
from bsrgen.targets import Target

# Sizes of tiles by vector registers, and vectors of a strip: 6 tokens x 4 vectors are 24 sums, 4 of W and one of X.
SHAPES = {32: ((1, 2, 3, 6), 4), 16: ((1, 2, 4), 2)}
MATRIX = 16  # tokens of a tile of the matrix unit, and words of one of its steps
# Words of W and X as vectors keep them, for each product of the matrix unit, and the tiles beside its own.
UNITS = {AMX_BF16: (BF16, (1, 2, 4)), AMX_S8: (S8, ())}
# Cycles that no manual gives: of a word around its multiply-adds, of one of a token in a tile that walks parts, of a
# tile in a panel, of a part.  Fitted to forced tiles (tile=) of 1024^3 at 1 to 100 % live, blocks of 1x1 and 1x16,
# float32 and bfloat16 (Zen 5, 2026-11-21).
WORD, PART_WORD, TILE, PART = 1.6, 0.2, 12.0, 18.0
F_BATCH = 16  # columns that strips are whole numbers of: four words
SMALL = 2  # tokens of tiles that are limited by what L2 gives of W
WORDS = 32768  # of a panel, for places of 16 bits


@dataclass(frozen=True)
class FeaturesPlan(CPlan):
    """Knobs: words of K in a panel and in a part of it, units of tokens in a chunk."""

    panel: int = 1024
    part: int = 128
    chunk: int = 86
    unit: Product | None = None  # of the matrix unit, which multiplies the largest tile

    def __str__(self) -> str:
        how = "" if self.product.name == "fma" else f"{self.product.name} dot products, "
        how = f"{self.unit.name} products, " if self.unit else how
        sizes = ", ".join(map(str, self.tiles))
        return (
            f"{self.target.name}: {how}live columns, tiles of {sizes} tokens x {self.weight_lanes * self.vectors} "
            f"rows, panels of {self.panel} words, chunks of {self.chunk * self.tiles[-1]} tokens"
        )

    @property
    def tiles(self) -> tuple[int, ...]:
        """Sizes of tiles in tokens, the last one the dense product's."""
        return (*UNITS[self.unit][1], MATRIX) if self.unit else _shape(self.target)[0]

    @property
    def on_tiles(self) -> bool:
        """Whether the matrix unit multiplies."""
        return self.unit is not None

    @property
    def listed(self) -> bool:
        """Not where outputs are masked: tiles of tokens that a strip of rows need not have are left out."""
        return super().listed and not self.masked

    @property
    def masked(self) -> bool:
        """Whether a call says which blocks of Y are computed."""
        return self.problem.pit is not None and self.problem.pit.axis.operand.kind == "mask"

    @property
    def shares_rows(self) -> bool:
        """No: then each thread would look for live columns in all of X."""
        return False

    @property
    def vectors(self) -> int:
        """Vectors of rows in a strip."""
        assert self.weight is not None
        return self.weight.vectors

    @property
    def rates(self) -> tuple[tuple[int, int], ...]:
        """The table that chooses between tiles at the covered sparsity: time of a word of a token in a tile of each
        size, and of starting one in a panel, in hundredths of the former in the largest tile."""
        words = [self._word_cycles(size) for size in self.tiles]
        starts = [TILE + (PART * -(-self.panel // self.part) if self._walks(size) else 0) for size in self.tiles]
        return tuple(
            (round(100 * word / words[-1]), round(100 * start / words[-1]))
            for word, start in zip(words, starts, strict=True)
        )

    def _walks(self, size: int) -> bool:
        """Whether tiles of so many tokens walk parts of a panel."""
        return size <= SMALL or size == MATRIX

    def _word_cycles(self, size: int) -> float:
        """Cycles for one word of one token in a tile of so many: the target's rates, as count.py puts them together.  W
        comes out of L1 where a tile walks parts, else out of L2."""
        target, vectors = self.target, self.vectors
        if size == MATRIX:  # a step: a product for each vector of rows; rows of W side by side, where some are left out
            dots, rows = vectors * target.product_cycles(MATRIX, MATRIX), vectors * MATRIX
            return (max(dots, rows) + FITTED.overlap * min(dots, rows)) / MATRIX**2
        sums = size * vectors
        chains = sums * (1 if sums >= 8 else 2)  # F_SUMS in features_tile.c.j2
        fma = max(vectors / self.product.per_cycle(target), vectors * self.product.latency(target) / chains)
        loads = (vectors / size + 1) / (target.loads_per_cycle * FITTED.load_share)
        line = vectors * self.weight_lanes * self.w_bytes
        stream = 0.0 if self._walks(size) else line / size / target.l2_bytes_per_cycle
        bound = max(fma, loads, stream)
        own = WORD / size + (PART_WORD if size <= SMALL else 0)
        return bound + FITTED.overlap * (fma + loads + stream - bound) + own

    def counts(self, n: int) -> Counts:
        """Countable cost of one call of n tokens, all live; cycles by the largest tile's rate on the matrix unit."""
        counts = super().counts(n)
        if self.unit is None:
            return counts
        words = self.pattern.block_cols * self.pattern.C * -(-self.pattern.M // (self.vectors * self.weight_lanes))
        cycles = -(-n // MATRIX) * MATRIX * words * self._word_cycles(MATRIX)
        return replace(counts, cycles=cycles + epilogue_cycles(self, n))

    def knobs(self) -> dict[str, Any]:
        """The decisions alone, as plain data."""
        own = {
            "panel": self.panel,
            "part": self.part,
            "chunk": self.chunk,
            "tiles": list(self.tiles),
            "rates": [list(r) for r in self.rates],
            "unit": self.unit.name if self.unit else "",
        }
        return super().knobs() | own


def features_plans(problem: Problem, target: Target) -> Iterator[FeaturesPlan]:
    """One for each way to multiply that needs no sums of whole rows of W, where W is dense in strips of vectors."""
    p = problem.pattern
    strips = (
        p.C >= p.K and p.C % F_BATCH == 0 and p.nnzb == p.block_rows and p.R % target.lanes(problem.real.bytes) == 0
    )
    pit = problem.pit
    if pit is None or not strips or (pit.axis.listed and (problem.dtype is INT8 or problem.operator.token_axis)):
        return
    if pit.axis.name == "outputs" and not pit.by_tiles:
        return
    unit = matrix_product(problem, target)
    if unit and not pit.axis.listed:
        yield _plan(problem, target, UNITS[unit][0], unit)
    for product in strip_products(problem, target):
        yield _plan(problem, target, product)


def _plan(problem: Problem, target: Target, product: Product, unit: Product | None = None) -> FeaturesPlan:
    blank = FeaturesPlan(problem, target, None, None, product=product, unit=unit)
    tiles, vectors = blank.tiles, _shape(target)[1]
    lanes, R = blank.lanes, problem.pattern.R
    vectors = next(v for v in (vectors, 3, 2, 1) if v <= vectors and R % (v * lanes) == 0)
    word_bytes = vectors * lanes * blank.w_bytes
    panel = min(max(target.l2_bytes // 4 // word_bytes // lanes, 1) * lanes, WORDS // lanes * lanes)
    part = max(2 * target.l1_bytes // 3 // word_bytes // lanes, 1) * lanes
    words = blank.pattern.block_cols * blank.pattern.C
    chunk = max(target.l2_bytes // 8 // (tiles[-1] * vectors * lanes * blank.unit_bytes), 1)
    tile = WeightTile(lanes, 1, vectors, tiles[-1])
    return replace(blank, weight=tile, panel=min(panel, -(-words // lanes) * lanes), part=part, chunk=chunk)


def _shape(target: Target) -> tuple[tuple[int, ...], int]:
    return SHAPES[32 if target.registers >= 32 else 16]


def features_view(plan: CPlan) -> dict[str, Any] | None:
    """What features_tile.c.j2 sees."""
    if not isinstance(plan, FeaturesPlan):
        return None
    pit, last = plan.problem.pit, len(plan.problem.operands) - 1
    assert pit is not None
    sizes = {"panel": plan.panel, "part": plan.part, "small": SMALL, "chunk": plan.chunk}
    return sizes | {"tiles": plan.tiles, "rates": plan.rates, "vectors": plan.vectors,
            "dot": plan.unit.intrinsic if plan.unit else "", "totals": plan.product is X8,
            "tile_index": None if pit.axis.listed else last,
            "mask": {"index": last, "tokens": pit.tokens, "rows": pit.rows} if plan.masked else None}  # fmt: skip
