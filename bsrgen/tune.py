"""Tune: the cost model ranks the plans of a problem, the clock decides between the best."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from bsrgen.cost import Cost, estimate
from bsrgen.plan import Plan

PLANNED_N = 128  # tokens a plan is made for when nobody says: a short sequence, a batch of frames
TOP = 8  # plans that the clock compares
SURE = 2  # the model's best are measured however short the time
PER_FAMILY = 2


def rank(plans: Sequence[Plan], n: int | None) -> list[tuple[Cost, Plan]]:
    """`plans` with their predicted cost at n tokens, cheapest first; equal costs keep the backend's order."""
    costs = [(estimate(plan, n or PLANNED_N), plan) for plan in plans]
    return sorted(costs, key=lambda pair: pair[0].seconds)


def shortlist(ranked: Sequence[tuple[Cost, Plan]], n: int) -> list[tuple[Cost, Plan]]:
    """Those of `ranked` that the clock shall compare, the best first: TOP of them, PER_FAMILY of a family before more
    of any, and the best dense plan in any case."""
    seen: Counter[tuple[Any, ...]] = Counter()
    first: list[tuple[Cost, Plan]] = []
    more: list[tuple[Cost, Plan]] = []
    for pair in ranked:
        family = pair[1].family(n)
        seen[family] += 1
        (first if seen[family] <= PER_FAMILY else more).append(pair)
    chosen = (first + more)[:TOP]
    dense = next((pair for pair in ranked if pair[1].dense), None)
    if dense is None or any(pair is dense for pair in chosen):
        return chosen
    return [*chosen[:SURE], dense, *chosen[SURE : TOP - 1]]
