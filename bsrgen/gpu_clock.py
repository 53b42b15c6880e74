"""The clock of a GPU: launches in CUDA graphs between events, contenders in alternation, as on CPUs (clock.py)."""

import math
import sys
import time
from collections.abc import Callable, Mapping

from bsrgen.clock import Timing
from bsrgen.driver import Span, Stream
from bsrgen.workspaces import workspaces

Launch = Callable[[int], object]  # on the stream of this handle; returns before it is done
SAMPLE_S = 200e-6  # events tell half a microsecond
MOST_LAUNCHES = 200  # of a graph
WARM = 3


def measure(
    contenders: Mapping[str, Launch], *, rounds: int | None = 30, seconds: float | None = None,
    progress: Callable[[float], object] | None = None,
) -> dict[str, Timing]:  # fmt: skip
    """Time launches on the current GPU.

    Each contender is launched a few times and then recorded as a graph of as many launches as last SAMPLE_S: between
    them no time goes by in Python or in the driver.  A round takes one graph of each between two events, after one that
    is not timed because the others have cooled the caches.  At most `rounds` are taken, and no more than fit into
    `seconds`, but never fewer than 3.  DeviceError where a launch fails, allocates or waits.
    """
    most, limit_s = rounds or sys.maxsize, seconds or math.inf
    stream = Stream()
    span = Span(stream)
    graphs, calls = {}, {}
    with workspaces().in_turn():
        for name, launch in contenders.items():
            calls[name], graphs[name] = _graph(launch, stream, span)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    start, done, spent = time.perf_counter(), 0, 0.0
    while done < 3 or (done < most and spent < limit_s):
        for name, replay in graphs.items():
            replay()
            samples[name].append(_seconds(replay, span) / calls[name])
        done, spent = done + 1, time.perf_counter() - start
        if progress:
            progress(min(1.0, max(done / most, spent / limit_s)))
    return {name: Timing(tuple(samples[name]), calls[name]) for name in contenders}


def _graph(launch: Launch, stream: Stream, span: Span) -> tuple[int, Callable[[], None]]:
    """How many launches make a sample, and a graph of so many."""
    for _ in range(WARM):
        launch(stream.handle)
    stream.wait()
    one = stream.graph(lambda: launch(stream.handle))
    once = min(_seconds(one, span) for _ in range(WARM))
    calls = max(1, min(MOST_LAUNCHES, math.ceil(SAMPLE_S / max(once, 1e-7))))

    def all_of_them() -> None:
        for _ in range(calls):
            launch(stream.handle)

    return calls, stream.graph(all_of_them)


def _seconds(replay: Callable[[], None], span: Span) -> float:
    span.begin()
    replay()
    return max(span.end_s(), 1e-9)
