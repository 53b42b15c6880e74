"""The clock: fair timing on a noisy machine.  One core, warm, contenders in alternation, minimum and median of many."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

Call = Callable[[], object]
SAMPLE_S = 200e-6  # a shorter sample is mostly clock (30 ns) and Python's call (50 ns); a longer one catches more noise


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per call of one contender: one sample a round, so samples of equal index were taken side by side."""

    samples: tuple[float, ...]
    calls: int  # calls in one sample

    @property
    def min_s(self) -> float:
        """The best sample."""
        return min(self.samples)

    @property
    def median_s(self) -> float:
        """The usual sample."""
        return statistics.median(self.samples)

    def ratio(self, other: Timing) -> float:
        """How many times faster than `other`: the median over the rounds, so a slow phase of the machine cancels."""
        return statistics.median(o / s for s, o in zip(self.samples, other.samples, strict=True))


@contextlib.contextmanager
def pinned(cpus: Sequence[int] | None) -> Iterator[None]:
    """Keep this thread, and threads it starts, on `cpus`; None means the last usable core, () means anywhere."""
    if cpus == () or not hasattr(os, "sched_setaffinity"):
        yield
        return
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(usable)} if cpus is None else cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, usable)


def _sample(call: Call, calls: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(calls):
        call()
    return (time.perf_counter_ns() - start) * 1e-9 / calls


def _calls_per_sample(call: Call, sample_s: float) -> int:
    """Warm `call` up and return how many calls make a sample of at least `sample_s`."""
    seconds = min(_sample(call, 1) for _ in range(3))
    calls = 1
    while seconds * calls < sample_s and calls < 1 << 20:
        calls = max(2 * calls, int(0.5 * sample_s / max(seconds, 1e-9)))
        seconds = min(_sample(call, calls), _sample(call, calls))
    return calls


def measure(
    contenders: Mapping[str, Call],
    *,
    rounds: int | None = 30,
    seconds: float | None = None,
    sample_s: float = SAMPLE_S,
    cpus: Sequence[int] | None = None,
    settle_s: float = 0.0,
    progress: Callable[[float], object] | None = None,
) -> dict[str, Timing]:
    """Time zero-argument callables in alternation on one core (or on `cpus`).

    Every round takes one sample of each contender: one untimed call (the others have cooled its caches), then as
    many calls as make `sample_s`.  At most `rounds` are taken, and no more than fit into `seconds`, but never fewer
    than 3.  `settle_s` passes before each contender's turn: threads of the one before spin on for a few milliseconds
    (libgomp, OpenBLAS) and would take a core away.  `progress` is told after each round which share is done.
    """
    most, limit_s = rounds or sys.maxsize, seconds or float("inf")
    with pinned(cpus):
        calls = {name: _calls_per_sample(call, sample_s) for name, call in contenders.items()}
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        start = time.perf_counter()
        done, spent = 0, 0.0
        while done < 3 or (done < most and spent < limit_s):
            for name, call in contenders.items():
                if settle_s:
                    time.sleep(settle_s)
                call()
                samples[name].append(_sample(call, calls[name]))
            done, spent = done + 1, time.perf_counter() - start
            if progress:
                progress(min(1.0, max(done / most, spent / limit_s)))
    return {name: Timing(tuple(samples[name]), calls[name]) for name in contenders}
