"""Report: bsrgen, its peers and the ceilings of the core timed side by side for one weight, and what follows."""

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from msgspec import to_builtins

from bsrgen import api
from bsrgen.advice import break_even
from bsrgen.backends import BACKENDS
from bsrgen.bench.case import Case, case_of
from bsrgen.bench.ceilings import Ceiling, Ceilings
from bsrgen.bench.clock import Timing, measure
from bsrgen.bench.dynamic import dynamic_peers
from bsrgen.bench.peer import Kind, Run
from bsrgen.bench.peers import PEERS, check, kernel_run, prepare
from bsrgen.errors import BuildError
from bsrgen.exam import error_share
from bsrgen.kernel import Kernel
from bsrgen.pattern import Weight
from bsrgen.problem import Problem
from bsrgen.targets import as_targets

PEAK, READ = "FMA peak", "weight read"
EVEN = 0.03  # ratios this close to 1 are noise on a shared machine
SETTLE_S = 5e-3  # between contenders of several threads
LIMIT_S = 12.0  # of timing for one n: a slow peer of a large weight would take minutes for all rounds


@dataclass(frozen=True, slots=True)
class Request:
    """What to compare: how bsrgen compiles, and how long the clock runs."""

    operator: str = "linear"
    epilogue: tuple[str, ...] = ()
    target: tuple[str, ...] = ("native",)
    tune: Literal["off", "model", "measure"] = "model"
    threads: int = 1
    rounds: int = 30
    dtype: str | None = None  # of W and X; None: the weight's own
    mode: Literal["static", "dynamic"] = "static"  # dynamic: also a kernel that takes W with the call


@dataclass(frozen=True, slots=True)
class Row:
    """A contender on the clock; `gain` is how many times faster bsrgen is, at least."""

    name: str
    kind: Kind
    timing: Timing
    gain: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """One n: the rows, fastest first, and bsrgen's share of what the core can do and of the error it may make."""

    problem: Problem
    kernel: Kernel
    rows: tuple[Row, ...]
    absent: dict[str, str]  # peers that are not in the rows, and why
    peak: Ceiling
    peak_flop_per_s: float
    peak_share: float
    read_bytes_per_s: float
    read_share: float
    error_share: float
    threads: int
    break_even: float | None  # density at which the best dense peer is as fast: the model's curve through the times

    @property
    def n(self) -> int:
        """Tokens."""
        return self.problem.n or 0

    def best(self, kind: str) -> Row:
        """The peer of that kind that bsrgen gains least over."""
        return min((row for row in self.rows if row.kind == kind), key=lambda row: row.gain)

    @property
    def unrest(self) -> float:
        """Usual over best time, the median over the rows: 1 on a machine that does nothing else."""
        return statistics.median(row.timing.median_s / row.timing.min_s for row in self.rows)

    def rate(self, row: Row) -> float:
        """FLOP per second on nonzeros."""
        return self.problem.flop(self.n) / row.timing.min_s


def compare(
    weight: Weight, request: Request, n: int, ceilings: Ceilings, progress: Callable[[float], object] | None = None
) -> Comparison:
    """Compile `weight` for n tokens, check every contender against float64 and time them in alternation.

    Call it within clock.peer_threads(request.threads).  BuildError where bsrgen's own result exceeds its bound.
    """
    case = case_of(weight, request.operator, n, request.threads, request.dtype)
    kernel = _compiled(case, request, ())
    more = dynamic_peers(request.tune) if request.mode == "dynamic" else ()
    runs, absent = prepare(case, (*more, *PEERS[1:]))
    own = {PEERS[0].name: kernel_run(kernel, case)}
    share = _own_error(own[PEERS[0].name], *case.reference())
    if request.epilogue:
        own[f"bsrgen + {', '.join(request.epilogue)}"] = _fused(case, request)
    peak = ceilings.fma(case.problem.dtype.short)
    read = ceilings.read(max(kernel.plan.value_bytes, 1))
    calls = {name: run.call for name, run in (own | runs).items()} | {PEAK: peak.call, READ: read.call}
    cpus, settle_s = (None, 0.0) if request.threads == 1 else ((), SETTLE_S)
    times = measure(calls, rounds=request.rounds, seconds=LIMIT_S, cpus=cpus, settle_s=settle_s, progress=progress)
    mine = times[PEERS[0].name]
    kinds = {peer.name: peer.kind for peer in (*PEERS, *more)}
    rows = [Row(name, kinds.get(name, "bsrgen"), times[name], _gain(mine, times[name])) for name in own | runs]
    return Comparison(
        problem=case.problem, kernel=kernel, rows=tuple(sorted(rows, key=lambda row: row.timing.min_s)),
        absent=absent, peak=peak, peak_flop_per_s=peak.rate(times[PEAK]),
        peak_share=peak.share(times[PEAK], mine, case.nonzero_flop) / request.threads,
        read_bytes_per_s=read.rate(times[READ]),
        read_share=read.share(times[READ], mine, kernel.plan.value_bytes) / request.threads,
        error_share=share, threads=request.threads, break_even=_break_even(kernel, case.problem, request, rows),
    )  # fmt: skip


def _break_even(kernel: Kernel, problem: Problem, request: Request, rows: Sequence[Row]) -> float | None:
    """By the measured times, or by the kernel's own verdict where it runs the dense plan."""
    if kernel.verdict.ran == "dense":
        return kernel.verdict.break_even
    own_s = next(row.timing.min_s for row in rows if row.name == PEERS[0].name)
    gain = min(row.gain for row in rows if row.kind == "dense")
    return break_even(BACKENDS["c"], problem, as_targets(request.target)[0], own_s, gain * own_s)


def _gain(mine: Timing, other: Timing) -> float:
    """The smaller of the ratio of the best samples and the usual ratio within a round.

    The one suffers where bsrgen had the luckier moment, the other where a neighbour hurts some contenders more: a busy
    machine stops threads that wait for each other far longer than one that works alone.
    """
    return min(other.min_s / mine.min_s, mine.ratio(other))


def _compiled(case: Case, request: Request, epilogue: tuple[str, ...]) -> Kernel:
    return api.compile(
        case.weight, request.operator, dtype=case.dtype.name, epilogue=epilogue, target=request.target, n=case.n,
        threads=request.threads, tune=request.tune,
    )  # fmt: skip


def _own_error(run: Run, expected: Any, bound: Any) -> float:
    run.call()
    try:
        return check(run.result(), expected, bound, slack=1.0)
    except ArithmeticError as e:
        raise BuildError(f"bsrgen: {e}; the compiler or bsrgen is at fault, please report it") from e


def _fused(case: Case, request: Request) -> Run:
    """bsrgen with the epilogue: what the fused steps cost; the peers compute the product alone."""
    import numpy as np

    kernel = _compiled(case, request, request.epilogue)
    _, given = kernel.problem.sample(np.random.default_rng(0), case.n)
    given |= case.given
    y = case.out()
    call = functools.partial(kernel, case.x, out=y, **given)
    expected, bound = kernel.problem.reference(case.weight, case.x, given, y.copy())
    call()
    if error_share(y, expected, bound) > 1:
        raise BuildError(f"{kernel.name}: its result exceeds the error bound; please report it")
    return Run(call, lambda: y)


def verdict(comparisons: Sequence[Comparison]) -> str:
    """One line: sparse or dense for this matrix, how much faster than the best peers of either kind, for each n, and
    the density up to which it would be faster than the best dense one."""
    words: dict[str, list[int]] = {}
    for c in comparisons:
        gain = c.best("dense").gain
        word = "even" if abs(gain - 1) <= EVEN else "sparse" if gain > 1 else "dense"
        words.setdefault(word, []).append(c.n)
    who = ", ".join(word if len(words) == 1 else f"{word} at n={','.join(map(str, at))}" for word, at in words.items())
    dense, sparse = (", ".join(f"{c.best(kind).gain:.2g}" for c in comparisons) for kind in ("dense", "sparse"))
    ns = ",".join(str(c.n) for c in comparisons)
    even = ", ".join("?" if c.break_even is None else f"{c.break_even:.2g}" for c in comparisons)
    return f"{who}: bsrgen {dense}x the best dense, {sparse}x the best sparse, break-even at density {even} (n={ns})"


def dynamic_verdict(comparisons: Sequence[Comparison]) -> str:
    """One line: the dynamic call over the static one, the preparation over one dense product, for each n."""
    calls, prepares = [], []
    for c in comparisons:
        of = {row.kind: row.timing.min_s for row in reversed(c.rows)}  # the fastest of each kind
        static_s = next(row.timing.min_s for row in c.rows if row.name == PEERS[0].name)
        calls.append(f"{of['dynamic'] / static_s:.2f}")
        prepares.append(f"{of['prepare'] / of['dense']:.2f}")
    ns = ",".join(str(c.n) for c in comparisons)
    made = f"preparing a weight {', '.join(prepares)}x a dense product's"
    return f"{', '.join(calls)}x the static kernel's time, {made} (n={ns})"


def block_shapes(comparisons: Sequence[Comparison]) -> str:
    """One line: the block shape of the same nonzeros that gains most over the kernels timed, by the model."""
    gains = {v.seconds / v.alternative.seconds: v for c in comparisons if (v := c.kernel.verdict).alternative}
    if not gains:
        return comparisons[0].kernel.verdict.advice
    best = gains[max(gains)]
    return f"{best.advice} at n = {best.n}"


def document(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """The comparisons as plain data, in seconds, FLOP per second and bytes per second."""
    first = comparisons[0]
    return {
        "problem": str(first.problem), "threads": first.threads, "verdict": verdict(comparisons),
        "block_shapes": block_shapes(comparisons),
        "runs": [_run(c) for c in comparisons],
    }  # fmt: skip


def _run(c: Comparison) -> dict[str, Any]:
    return {
        "n": c.n,
        "plan": str(c.kernel.plan),
        "artifact": str(c.kernel.artifact),
        "contenders": [
            {
                "name": row.name, "kind": row.kind, "min_s": row.timing.min_s, "median_s": row.timing.median_s,
                "flop_per_s": c.rate(row), "bsrgen_speedup": row.gain, "samples": len(row.timing.samples),
            }
            for row in c.rows
        ],
        "absent": c.absent,
        "peak": {"row": c.peak.row, "flop_per_s": c.peak_flop_per_s, "share": c.peak_share},
        "weight_read": {"bytes_per_s": c.read_bytes_per_s, "share": c.read_share},
        "error_share_of_bound": c.error_share,
        "break_even": c.break_even,
        "model_verdict": to_builtins(c.kernel.verdict),
        "unrest": c.unrest,
    }  # fmt: skip
