"""Which plans may be tried for a problem: the plan space of the C backend."""

from collections.abc import Iterator
from dataclasses import replace

from bsrgen.backends.c.covers import columns, covers
from bsrgen.backends.c.features import FeaturesPlan, features_plans
from bsrgen.backends.c.layout import PANEL_BYTES
from bsrgen.backends.c.matrix_candidates import matrix_plans
from bsrgen.backends.c.plan import CPlan
from bsrgen.backends.c.products import products
from bsrgen.backends.c.tiles import ALL, TokenTile, WeightTile
from bsrgen.cover import Cover
from bsrgen.problem import Problem
from bsrgen.targets import Target

MAX_SUMS = 28  # in one register tile: 32 registers less the operands
INT_MAX = 2**31 - 1  # offsets inside a register tile are C ints
SMALL_TOKENS = 8  # register tile of the weight tile that only serves small n
EXPAND_TOKENS = {1: 4, 2: 9, 4: 17}  # columns of a product: fewer tokens are faster with expanded rows (Zen 5)
EXPAND_MOST = 16  # bits for each stored element
SHORT_ROWS = 3  # of blocks whose calls of few tokens have vectors of their own: X of 8 tokens stays in L1 twice as long
SHORT_MOST = 6  # one in so many stored, of 16 lanes: 1.1 cycles each beside 2.9 a vector that is expanded (Zen 5)
CHUNK = 16  # tiles of tokens that take W out of L2 in turn, where W is larger than that


def candidates(problem: Problem, target: Target, *, reblock: bool = True) -> Iterator[CPlan]:
    """Legal plans, a good guess first; without `reblock` only those over the problem's own blocks.

    Empty only where offsets inside one block outgrow a C int.  A pattern that comes with the call is walked in its own
    blocks, by vectors.
    """
    if not problem.pattern.known:
        yield from _tables(problem, target, None)
        return
    listed = problem.pit is None or problem.pit.axis.listed
    matrix = list(matrix_plans(problem, target, reblock=reblock)) if listed else []
    if strips := list(features_plans(problem, target)):
        yield from (*matrix, *(_whole(strips) or strips))
        return
    filled = problem.pattern.R >= 8  # enough rows of a tile for a good guess
    yield from matrix if filled else ()
    for cover in (None, *(covers(problem, target) if reblock else columns(problem, target))):
        if cover and problem.gate_rows % cover.blocks.R:
            continue  # a block would hold rows of the gate and of what it gates
        if cover and problem.pit and problem.pit.rows % cover.blocks.R:
            continue  # or of two groups that have tokens of their own
        for plan in _tables(problem, target, cover):
            yield plan
            code = replace(plan, encoding="code")
            if code.fits_code:
                yield code
    yield from matrix if not filled else ()


def _whole(strips: list[FeaturesPlan]) -> list[CPlan]:
    """The same tiles for lists of tokens, which need not look for zeros, where X of a tile stays in L1: 3 to 7 % less
    time in float32 and bfloat16, 11 % more at K = 4096, where it does not (Zen 5, 2026-11-21)."""
    found = []
    for strip in strips:
        assert strip.weight is not None
        plan = CPlan(strip.problem, strip.target, None, strip.weight, product=strip.product)
        x_bytes = strip.weight.tokens * plan.pattern.block_cols * plan.pattern.C * plan.cell_bytes
        if strip.listed and x_bytes <= strip.target.l1_bytes:
            found.append(replace(plan, weight=replace(strip.weight, chunk=CHUNK if _streams(plan) else 1)))
    return found


def _tables(problem: Problem, target: Target, cover: Cover | None) -> Iterator[CPlan]:
    """The plans over one choice of blocks that keep the pattern as a table."""
    for product in products(problem, target):
        plan = CPlan(problem, target, None, None, cover=cover, product=product)
        if plan.stored.C % product.group == 0:
            yield from _tiled(plan)
        elif plan.stored.C == 1:
            yield from _tiled(replace(plan, gather=True))


def _tiled(blank: CPlan) -> Iterator[CPlan]:
    """The tiles of one way to multiply."""
    p, lanes, problem = blank.pattern, blank.lanes, blank.problem
    if p.R * max(p.C, 8 * lanes) > INT_MAX:
        return
    weights = list(_weight_tiles(blank))
    small = _small(weights) or _narrow(blank)
    few = small.row_lanes * small.k_lanes if small else EXPAND_TOKENS[blank.product.group]
    alone = [replace(blank, weight=w) for w in weights] if problem.operator.token_axis == 0 else []
    tall = lanes <= p.R
    yield from alone if tall else ()
    for t in token_tiles(blank):
        plan = replace(blank, tokens=t)
        tile = small or _expanded(plan)
        short = _short_lanes(plan)
        if short and (not tile or _sparse(plan) or 1 < (problem.n or 0) <= short):
            yield replace(plan, short_lanes=short, small_n=short + 1)
        if tile and not (short and _sparse(plan)):
            yield replace(plan, weight=tile, small_n=few)
        elif not short:
            yield plan
    yield from alone if not tall else ()


def _small(weights: list[WeightTile]) -> WeightTile | None:
    """The weight tile for calls of few tokens: the most sums per token, so that one token keeps the FMA pipes busy."""
    if not weights:
        return None
    best = max(weights, key=lambda w: (w.vectors * w.row_lanes, -w.tokens))
    return replace(best, tokens=min(best.tokens, SMALL_TOKENS), k_panel=ALL, chunk=1)


def _narrow(blank: CPlan) -> WeightTile | None:
    """The same with shorter vectors, 16 bytes or more, for blocks that do not fill the longest."""
    p, lanes = blank.pattern, blank.lanes // 2
    while lanes * blank.unit_bytes >= 16:
        for row_lanes in (lanes >> b for b in range(lanes.bit_length())):
            if p.R % row_lanes == 0 and p.C % (lanes // row_lanes) == 0:
                tile = WeightTile(row_lanes, lanes // row_lanes, min(p.R // row_lanes, 4), SMALL_TOKENS // 2)
                return tile if _addressable(blank, tile) else None
        lanes //= 2
    return None


def _expanded(plan: CPlan) -> WeightTile | None:
    """A vector of neighbouring k of single rows, stored ones expanded in registers; where bits are not too many."""
    p = plan.pattern
    if p.R > 1 or EXPAND_MOST * p.nnz < p.M * p.K or plan.lanes * plan.unit_bytes < 64:
        return None
    tile = WeightTile(1, plan.lanes, 1, SMALL_TOKENS, expand=True)
    return tile if plan.may_expand(tile) and _addressable(plan, tile) else None


def _short_lanes(plan: CPlan) -> int:
    """Half a vector of tokens, 16 bytes or more, for calls of few; 0 where blocks have rows enough without."""
    return plan.lanes // 2 if plan.lanes >= 8 and plan.pattern.R <= SHORT_ROWS and plan.product.group == 1 else 0


def _sparse(plan: CPlan) -> bool:
    """Whether so few are stored that a multiply-add for each costs less than expanding their rows."""
    p = plan.pattern
    return p.R == 1 and SHORT_MOST * p.nnz * plan.lanes < 16 * p.M * p.K


def _weight_tiles(blank: CPlan) -> Iterator[WeightTile]:
    """Rows x k lanes that fill a vector with at most a third of zero fill; register tiles that fill the registers."""
    p, lanes, target = blank.pattern, blank.lanes, blank.target
    for k_lanes in (1 << b for b in range(lanes.bit_length())):
        row_lanes = lanes // k_lanes
        whole = -(-p.R // row_lanes)
        if p.C % k_lanes or 3 * whole * row_lanes > 4 * p.R or (k_lanes > 1 and lanes <= p.R):
            continue
        for vectors in {min(whole, v): None for v in (2, 1, 3, 4)}:
            most = min(target.registers - 1 - vectors, MAX_SUMS) // vectors
            for tokens in {min(most, t): None for t in (24 // vectors, most, 8)}:
                tile = WeightTile(row_lanes, k_lanes, vectors, tokens)
                if _addressable(blank, tile):
                    yield tile
                    if _streams(blank):
                        yield replace(tile, chunk=CHUNK)
                    yield from _blocked(blank, tile)


def _addressable(blank: CPlan, tile: WeightTile) -> bool:
    """Whether W_LDX and the sums, for all tokens of a tile, are C ints."""
    p = blank.pattern
    return tile.tokens * (p.block_cols * p.C + p.R + 2 * blank.lanes) <= INT_MAX


def _streams(blank: CPlan) -> bool:
    """Whether W does not stay in L2 beside all else."""
    return 4 * blank.pattern.nnz * blank.w_bytes > 3 * blank.target.l2_bytes


def _blocked(blank: CPlan, tile: WeightTile) -> Iterator[WeightTile]:
    """The same with panels of X that stay in L1, where X of one tile does not, and chunks, where W leaves L2."""
    p = blank.pattern
    token_bytes, features = tile.tokens * blank.cell_bytes, p.block_cols * p.C
    if features * token_bytes <= blank.target.l1_bytes:
        return
    panel = max(3 * blank.target.l1_bytes // 4 // token_bytes // p.C, 1) * p.C
    if panel < features:
        yield replace(tile, k_panel=panel, chunk=CHUNK if _streams(blank) else 1)


def token_tiles(blank: CPlan) -> Iterator[TokenTile]:
    """Rows of a block x vectors of tokens that fill the registers; panels of X that fit L1, or all of X."""
    p, target, lanes = blank.pattern, blank.target, blank.lanes
    features = max(p.block_cols * p.C, 1)
    for rows in {min(p.R, r): None for r in (8, 6, 5, 4, 3, 2)}:
        room = min(target.registers - 1, MAX_SUMS)
        most = min(room // (rows + 1) if rows > 1 else room, 8)
        power = 1 << max(most.bit_length() - 1, 0)
        step = blank.product.group if blank.gather else 1
        widths = dict.fromkeys(v // step * step for v in (most, power, min(most, 4), min(most, 2)) if v >= step)
        for vectors in widths:
            vector_bytes = vectors * lanes * blank.cell_bytes  # of one feature
            caches = (3 * target.l1_bytes // 4, target.l1_bytes, target.l2_bytes // 2)
            fits = [max(cache // vector_bytes // p.C, 1) * p.C for cache in caches]
            whole = [features] if features * vector_bytes <= PANEL_BYTES else []
            for panel in dict.fromkeys([*whole, *(min(fit, features) for fit in fits)]):
                if panel * vector_bytes <= max(PANEL_BYTES, p.C * vector_bytes):
                    yield TokenTile(rows, vectors, panel)
            as_it_lies = blank.problem.operator.token_axis == 1 and blank.problem.pit is None
            if as_it_lies and blank.same_x and blank.product.group == 1:
                yield TokenTile(rows, vectors, features, pack=False)
