"""Which plans may be tried for a problem: the plan space of the C backend."""

from collections.abc import Iterator

from bsrgen.backends.c.plan import CPlan, TokenTile, WeightTile
from bsrgen.problem import Problem
from bsrgen.targets import Target


def candidates(problem: Problem, target: Target) -> Iterator[CPlan]:
    """Legal plans, a good guess first.  Never empty: the token tile takes any block shape."""
    for tokens, weight in _tiles(problem, target):
        lanes = target.lanes(problem.dtype.bytes)
        small = lanes if tokens and weight else 0
        plan = CPlan(problem, target, tokens, weight, small)
        if plan.registers <= target.registers:
            yield plan


def _tiles(problem: Problem, target: Target) -> Iterator[tuple[TokenTile | None, WeightTile | None]]:
    linear = problem.operator.token_axis == 0
    weights = list(_weight_tiles(problem, target))
    tokens = list(_token_tiles(problem, target))
    small = weights[0] if weights else None
    if linear and problem.pattern.R >= target.lanes(problem.dtype.bytes):
        yield from ((None, w) for w in weights)
    for t in tokens:
        yield t, small
        yield t, None
    if linear:
        yield from ((None, w) for w in weights)


def _weight_tiles(problem: Problem, target: Target) -> Iterator[WeightTile]:
    """Rows x k lanes that fill a vector with at most a third of zero fill, then register tiles over rows and tokens."""
    p, lanes = problem.pattern, target.lanes(problem.dtype.bytes)
    k_lanes = 1
    while k_lanes <= lanes:
        row_lanes = lanes // k_lanes
        slots = -(-p.R // row_lanes) * row_lanes
        if p.C % k_lanes == 0 and slots * 3 <= p.R * 4:
            whole = slots // row_lanes
            for vectors in sorted(
                {min(whole, 2), min(whole, 3), min(whole, 1), min(whole, 4)}, key=lambda v: (v != min(whole, 2), v)
            ):
                for tokens in sorted({(target.registers - 1 - vectors) // vectors, 12, 8, 6}, reverse=True):
                    if tokens * vectors + vectors + 1 <= target.registers and tokens <= 24:
                        yield WeightTile(row_lanes, k_lanes, vectors, tokens, tokens)
        k_lanes *= 2


def _token_tiles(problem: Problem, target: Target) -> Iterator[TokenTile]:
    p, lanes = problem.pattern, target.lanes(problem.dtype.bytes)
    padded = max(p.block_cols * p.C, 1)
    for rows in sorted({min(p.R, r) for r in (1, 2, 3, 4, 5, 6, 8)}, reverse=True):
        for vectors in (8, 6, 4, 3, 2, 1):
            if rows * vectors + (vectors if rows > 1 else 0) + 1 > target.registers:
                continue
            for chunk in (8, 12, 4):
                if chunk % vectors:
                    continue
                for panel in sorted({padded, *(max(q // p.C, 1) * p.C for q in (64, 96, 128, 256))}, reverse=True):
                    if panel <= padded:
                        yield TokenTile(rows, vectors, chunk, panel)
