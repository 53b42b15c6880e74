"""Which plans may be tried for a problem: the plan space of the C backend."""

from collections.abc import Iterator
from dataclasses import replace

from bsrgen.backends.c.plan import PANEL_BYTES, CPlan, TokenTile, WeightTile
from bsrgen.problem import Problem
from bsrgen.targets import Target

MAX_TILE = 24  # sums in one register tile: 32 registers less the operands; one more helps nobody and compiles slower
INT_MAX = 2**31 - 1  # offsets inside a register tile are C ints
SMALL_TOKENS = 8  # register tile of the weight tile that only serves small n


def candidates(problem: Problem, target: Target) -> Iterator[CPlan]:
    """Legal plans, a good guess first.  Empty only where offsets inside one block outgrow a C int."""
    if problem.pattern.R * max(problem.pattern.C, 8 * target.lanes(problem.dtype.bytes)) > INT_MAX:
        return
    for plan in _tables(problem, target):
        yield plan
        code = replace(plan, encoding="code")
        if code.fits_code:
            yield code


def _tables(problem: Problem, target: Target) -> Iterator[CPlan]:
    """The plans that keep the pattern as a table."""
    lanes = target.lanes(problem.dtype.bytes)
    weights = list(_weight_tiles(problem, target))
    small = _small(weights)
    alone = [CPlan(problem, target, None, w) for w in weights] if problem.operator.token_axis == 0 else []
    tall = lanes <= problem.pattern.R
    yield from alone if tall else ()
    for t in _token_tiles(problem, target):
        yield CPlan(problem, target, t, small, lanes if small else 0)
    yield from alone if not tall else ()


def _small(weights: list[WeightTile]) -> WeightTile | None:
    """The weight tile for calls of few tokens: the most sums per token, so that one token keeps the FMA pipes busy."""
    if not weights:
        return None
    best = max(weights, key=lambda w: (w.vectors * w.row_lanes, -w.tokens))
    tokens = min(best.tokens, SMALL_TOKENS)
    return replace(best, tokens=tokens)


def _weight_tiles(problem: Problem, target: Target) -> Iterator[WeightTile]:
    """Rows x k lanes that fill a vector with at most a third of zero fill; register tiles that fill the registers."""
    p, lanes = problem.pattern, target.lanes(problem.dtype.bytes)
    for k_lanes in (1 << b for b in range(lanes.bit_length())):
        row_lanes = lanes // k_lanes
        whole = -(-p.R // row_lanes)
        if p.C % k_lanes or 3 * whole * row_lanes > 4 * p.R or (k_lanes > 1 and lanes <= p.R):
            continue
        for vectors in {min(whole, v): None for v in (2, 1, 3)}:
            most = min(target.registers - 1 - vectors, MAX_TILE) // vectors
            for tokens in {min(most, t): None for t in (24, 12, 8)}:
                if tokens * (p.block_cols * p.C + p.R + 2 * lanes) > INT_MAX:
                    continue  # W_LDX and the tile of sums, each for all tokens
                yield WeightTile(row_lanes, k_lanes, vectors, tokens)


def _token_tiles(problem: Problem, target: Target) -> Iterator[TokenTile]:
    """Rows of a block x vectors of tokens that fill the registers; panels of X that fit L1, or all of X."""
    p, lanes = problem.pattern, target.lanes(problem.dtype.bytes)
    features = max(p.block_cols * p.C, 1)
    for rows in {min(p.R, r): None for r in (8, 6, 5, 4, 3, 2)}:
        room = min(target.registers - 1, MAX_TILE + 4)
        most = min(room // (rows + 1) if rows > 1 else room, 8)
        widths = {most: None, 1 << (most.bit_length() - 1): None, min(most, 4): None} if most else {}
        for vectors in widths:
            for chunk in {vectors: None, vectors * max(1, 8 // vectors): None}:
                vector_bytes = chunk * lanes * problem.dtype.bytes
                caches = (3 * target.l1_bytes // 4, target.l1_bytes, target.l2_bytes // 2)
                fits = [max(cache // vector_bytes // p.C, 1) * p.C for cache in caches]
                whole = [features] if features * vector_bytes <= PANEL_BYTES else []
                for panel in dict.fromkeys([*whole, *(min(fit, features) for fit in fits)]):
                    if panel * vector_bytes <= max(PANEL_BYTES, p.C * vector_bytes):
                        yield TokenTile(rows, vectors, chunk, panel)
                if problem.operator.token_axis == 1 and whole:
                    yield TokenTile(rows, vectors, chunk, features, pack=False)
