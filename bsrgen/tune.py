"""Tune: the cost model ranks the plans of a problem, the clock decides between the best."""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bsrgen.cost import Cost, estimate
from bsrgen.plan import Plan

PLANNED_N = 128  # tokens a plan is made for when nobody says: a short sequence, a batch of frames
TOP = 6  # plans that the clock compares
ROUNDS = 30
SAMPLE_S = 2e-4


@dataclass(frozen=True, slots=True)
class Timing:
    """One plan on the clock."""

    plan: Plan
    seconds: float  # minimum of the rounds, all plans in turn


def rank(plans: Sequence[Plan], n: int | None) -> list[tuple[Cost, Plan]]:
    """`plans` with their predicted cost at n tokens, cheapest first; equal costs keep the backend's order."""
    costs = [(estimate(plan, n or PLANNED_N), plan) for plan in plans]
    return sorted(costs, key=lambda pair: pair[0].seconds)


def measure(plans: Sequence[Plan], make: Callable[[Plan, Path], Callable[[], object]]) -> list[Timing]:
    """Time `plans` against each other, fastest first.  `make` builds one in a folder and returns the call to time.

    They take turns for ROUNDS rounds and their minimum counts, so that a disturbed moment hurts all alike.
    """
    root = Path(tempfile.mkdtemp(prefix="bsrgen-tune-"))
    try:
        folders = [root / str(number) for number in range(len(plans))]
        for folder in folders:
            folder.mkdir(mode=0o700)
        with ThreadPoolExecutor() as pool:
            calls = list(pool.map(make, plans, folders))
        repeats = [max(1, int(SAMPLE_S / _seconds(call, 1))) for call in calls]
        best = [float("inf")] * len(calls)
        for _ in range(ROUNDS):
            for q, call in enumerate(calls):
                best[q] = min(best[q], _seconds(call, repeats[q]))
        timings = [Timing(plan, seconds) for plan, seconds in zip(plans, best, strict=True)]
        return sorted(timings, key=lambda timing: timing.seconds)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
