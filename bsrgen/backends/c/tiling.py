"""How the register tiles of vectors cut a block row: what their templates loop over."""

from collections.abc import Sequence
from typing import Any

from bsrgen.backends.c.packing import Group
from bsrgen.backends.c.plan import CPlan
from bsrgen.backends.c.tiles import TokenTile


def variants(most: int, code: bool) -> Sequence[int]:
    """Register tiles that are compiled: every size, or with the pattern as code only the full one and one."""
    return sorted({1, most}) if code else range(1, most + 1)


def code(plan: CPlan) -> list[dict[str, Any]]:
    """The pattern as code: the blocks of each block row, with the places of their values and of their first feature."""
    p = plan.pattern
    return [
        {"i": i, "blocks": [
            {"value": b * plan.packing.block_values, "k": int(p.indices[b]) * p.C, "j": int(p.indices[b])}
            for b in range(p.indptr[i], p.indptr[i + 1])]}
        for i in range(p.block_rows)
    ]  # fmt: skip


def folds(lanes: int, k_lanes: int) -> list[dict[str, Any]]:
    """Rounds that add up the `k_lanes` neighbours of each row: two vectors of groups become one of half groups."""
    rounds = []
    group = k_lanes
    while group > 1:
        low = [first + q for first in range(0, 2 * lanes, group) for q in range(group // 2)]
        high = [q + group // 2 for q in low]
        rounds.append({"group": group, "low": ", ".join(map(str, low)), "high": ", ".join(map(str, high))})
        group //= 2
    return rounds


def group(plan: CPlan, q: int, unit: int) -> dict[str, int]:
    one: Group = plan.groups[q]
    C = plan.pattern.C
    before = q * plan.groups[0].slots * C  # only the last group can be smaller
    return {"row": one.row, "rows": one.rows, "slots": one.slots, "size": one.slots * C,
            "before": before, "vectors": one.slots // unit}  # fmt: skip


def token_groups(plan: CPlan, groups: list[dict[str, int]], full: int) -> list[dict[str, Any]]:
    """Groups as the token tile walks them: a run of equal groups, then the odd one; each cut into register tiles."""
    assert plan.tokens is not None
    runs = [{**groups[0], "count": full}] + [{**g, "count": 1} for g in groups[full:]]
    return [{**run, "tiles": _tiles(run["rows"], plan.tokens)} for run in runs]


def _tiles(rows: int, tile: TokenTile) -> list[dict[str, int]]:
    whole, rest = divmod(rows, tile.rows)
    tiles = [{"row": 0, "rows": tile.rows, "count": whole}] if whole else []
    return tiles + ([{"row": whole * tile.rows, "rows": rest, "count": 1}] if rest else [])
