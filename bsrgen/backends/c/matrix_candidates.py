"""Which plans of the matrix unit may be tried for a problem, and over which other blocks."""

from collections.abc import Iterator
from dataclasses import replace

from bsrgen.backends.c.covers import DENSE_COLS, TALLEST, may_be_dense
from bsrgen.backends.c.layout import PANEL_BYTES
from bsrgen.backends.c.plan import CPlan
from bsrgen.backends.c.products import Product, matrix_product
from bsrgen.backends.c.tiles import MatrixTile
from bsrgen.cover import Cover, cover, full
from bsrgen.pattern import Pattern
from bsrgen.problem import Problem
from bsrgen.targets import Target

CHUNK = 8  # most units of tokens that take turns at a block row
RING_BYTES = 1 << 20  # most of a ring that keeps a whole block row
PASSES = 4  # most walks over a block row: each is a function of its own


def matrix_plans(problem: Problem, target: Target, *, reblock: bool) -> Iterator[CPlan]:
    """Those over the problem's own blocks first; none where the target has no matrix unit for these types."""
    product = matrix_product(problem, target)
    if product is None:
        return
    for other in (None, *(_covers(problem.pattern, product) if reblock else ())):
        blocks = other.blocks if other else problem.pattern
        if problem.gate_rows % blocks.R or (problem.pit and problem.pit.rows % blocks.R):
            continue  # a block would hold rows of the gate and of what it gates, or of two groups of pit
        for tile in _tiles(problem, blocks, product):
            plan = CPlan(problem, target, None, None, cover=other, product=product, matrix=_in_l2(tile, blocks, target))
            if _fits(plan):
                yield plan


def _covers(p: Pattern, product: Product) -> Iterator[Cover]:
    """The same columns in blocks of 16 or 32 rows, which fill tiles, and the dense product's."""
    if not p.nnzb:
        return
    for rows in (16, 32):
        if (rows > p.R and p.M > p.R) or (p.R > TALLEST and rows == 32):
            yield cover(p, (rows, p.C))
    if may_be_dense(p):
        step = 16 * product.group
        yield full(p, (32 if p.M > 16 else 16, min(DENSE_COLS, -(-p.K // step) * step)))


def _tiles(problem: Problem, p: Pattern, product: Product) -> Iterator[MatrixTile]:
    """Two tiles of rows x two of tokens where blocks are that tall, else one of rows x more of tokens."""
    linear, rows = problem.operator.token_axis == 0, -(-p.R // 16)
    row_bytes, shapes = p.C * product.part_bytes, ((2, 2),) if rows > 1 else ((4, 1), (2, 1))
    if p.C % (8 * product.group) == 0:
        if linear:
            for T, V in dict.fromkeys((shapes[0], (4, 1), *(((1, 4),) if rows > 3 else ()))):
                yield from (
                    MatrixTile("direct", T, V, copy_x=copy) for copy in ((True,) if problem.pit else (False, True))
                )
        yield from (MatrixTile("panel", *shape) for shape in shapes)
    if linear and row_bytes in (16, 32):
        yield MatrixTile("joined", *shapes[0])
    if p.C % (16 * product.group):
        yield from (MatrixTile("gathered", *shape) for shape in shapes)


def _in_l2(tile: MatrixTile, p: Pattern, target: Target) -> MatrixTile:
    """The tile with as many units of tokens a chunk as keep X in half of L2."""
    unit_bytes = 16 * tile.token_tiles * p.block_cols * p.C * 2
    return replace(tile, chunk=max(min(target.l2_bytes // 2 // max(unit_bytes, 1), CHUNK), 1))


def _fits(plan: CPlan) -> bool:
    """Whether scratch and text stay within their bounds."""
    q = plan.matrix_packing
    if len(q.passes) > PASSES:
        return False
    if q.tile.rings and q.slots * q.tokens * 64 > RING_BYTES:
        return False
    chunk_bytes = q.tokens * q.padded_k * q.product.part_bytes if q.tile.x_first else q.panel_bytes
    return chunk_bytes * q.tile.chunk <= PANEL_BYTES
