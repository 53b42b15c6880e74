"""Other blocks for the same pattern: split, merged where zeros are few, and all of them, the dense product."""

from collections.abc import Iterator

import numpy as np

from bsrgen.backends.c.products import products
from bsrgen.cover import OUTSIDE, Cover, cover, full, inside
from bsrgen.pattern import Pattern
from bsrgen.problem import Problem
from bsrgen.targets import Target

TALLEST = 64  # rows of a block made by merging or splitting
DENSE_COLS = 256  # columns of a block of the dense plan: its panel of X stays in L1
DENSE_ELEMENTS = 64 << 20  # of a matrix that has dense plans although few of its elements are stored
SAMPLE = 20_000  # stored blocks by which merging is judged
FEW = 8  # tokens
MOST = 3  # merged patterns that are worth plans
# Share of FMA peak by rows that share X (one Zen 5 core, 768x768, N = 128, density 0.2, 2026-11-21): what merging buys.
RATE = {1: 0.50, 2: 0.62, 4: 0.75, 8: 0.85}


def columns(problem: Problem, target: Target) -> Iterator[Cover]:
    """The single columns of blocks that no dot product takes as they are: they can be gathered."""
    p, groups = problem.pattern, [product.group for product in products(problem, target)]
    if p.C > 1 and any(p.C % group for group in groups):
        yield cover(p, (p.R, 1))


def covers(problem: Problem, target: Target) -> Iterator[Cover]:
    """Covers worth planning for, the dense ones last."""
    p = problem.pattern
    if not p.nnzb:
        return
    yield from columns(problem, target)
    if p.R in (2, 3) and (problem.n or FEW) < FEW:
        yield cover(p, (1, p.C))  # single rows are expanded in registers
    if p.R > TALLEST and p.block_rows < 8:
        yield cover(p, (TALLEST, p.C))
    yield from (cover(p, blocksize) for blocksize in _merged(p))
    if may_be_dense(p) and (p.nnzb < p.block_rows * p.block_cols or p.R < 8 or p.C > DENSE_COLS):
        for rows in _dense_rows(problem, target):
            yield full(p, (rows, min(DENSE_COLS, max(p.K, 1))))


def may_be_dense(p: Pattern) -> bool:
    """Whether storing all of the matrix is thinkable: places of pieces are 32 bits."""
    return min(max(DENSE_ELEMENTS, 4 * p.nnz), OUTSIDE // 2) >= p.M * p.K


def _merged(p: Pattern) -> list[tuple[int, int]]:
    """Block sizes that this pattern fills well enough to be faster, the best first."""
    sample = _sample(p)
    stored = inside(sample)
    if not stored:
        return []
    found = []
    for a in (1, 2, 3, 4, 5, 6, 8, 16, 32):
        for b in (1, 2, 3, 4, 6, 8):
            R, C = a * p.R, b * p.C
            if a * b == 1 or R > TALLEST or (C > 16 and b > 1) or (R > p.M > p.R) or (C > p.K > p.C):
                continue
            gain = _rate(R, C) / _rate(p.R, p.C)
            fill = inside(cover(sample, (R, C)).blocks) / stored if gain > 1 else 1.0
            if fill < gain:
                found.append((fill / gain, (R, C)))
    return [blocksize for _, blocksize in sorted(found)[:MOST]]


def _rate(R: int, C: int) -> float:
    """Share of peak that blocks of R rows reach; a few columns side by side help a little."""
    rows = max(r for r in RATE if r <= R)
    return RATE[rows] * (1.1 if C >= 4 else 1.0)


def _sample(p: Pattern) -> Pattern:
    """About SAMPLE blocks of `p`: groups of block rows that make 64 rows, evenly drawn from the whole matrix."""
    size = max(TALLEST // p.R, 1)
    groups = -(-p.block_rows // size)
    taken = np.unique(np.linspace(0, groups - 1, max(min(SAMPLE * groups // p.nnzb, groups), 1)).astype(np.int64))
    rows = (taken[:, None] * size + np.arange(size)).reshape(-1)
    counts = np.where(rows < p.block_rows, p.row_counts[np.minimum(rows, p.block_rows - 1)], 0)
    indptr = np.concatenate(([0], np.cumsum(counts)))
    at = np.repeat(p.indptr[np.minimum(rows, p.block_rows)] - indptr[:-1], counts) + np.arange(indptr[-1])
    return Pattern((rows.size * p.R, p.K), p.blocksize, indptr, p.indices[at])


def _dense_rows(problem: Problem, target: Target) -> list[int]:
    """Rows of the dense plan's blocks: vectors of rows with the least padding, or one register tile of rows."""
    M, lanes = problem.pattern.M, target.lanes(problem.real.bytes)
    tall = min((v * lanes for v in (2, 3, 4)), key=lambda rows: (-(-M // rows) * rows, rows))
    short = min((8, 7, 6, 5, 4), key=lambda rows: (-(-M // rows) * rows * (1 + 0.05 * (8 - rows)), -rows))
    return [short] if problem.operator.token_axis else list(dict.fromkeys((tall, short)))
