"""Choose: the plan for a problem on a target, the first, the model's best, or the winner of a race of the best few."""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen import build, package, tune
from bsrgen.artifact import read_artifact, write_manifest
from bsrgen.backends import BACKENDS, Backend
from bsrgen.cost import Cost, estimate
from bsrgen.dtypes import HOPPER, HOPPER_ONLY
from bsrgen.errors import ArgumentError, ArgumentTypeError, BsrgenError, BuildError, UnsupportedError
from bsrgen.exam import Exam, affordable
from bsrgen.machine import parallel_cores
from bsrgen.manifest import TIME_UP, TuningRecord
from bsrgen.pattern import Weight
from bsrgen.plan import Plan
from bsrgen.problem import Problem
from bsrgen.targets import Target
from bsrgen.tracks import Contender, Track, track_of

ROUNDS = 30
TIMING_S = 20.0  # of timing for one race, whatever the budget: plans of a second a call are told apart by fewer rounds
NOTE_CHARACTERS = 300
POLL_S = 0.5  # an executor that is shut down cancels work without a word to those who wait for it

Array = NDArray[Any]
Progress = Callable[[float], object]


@dataclass(frozen=True, slots=True)
class Tuning:
    """How to choose: compile's tune, tune_seconds, executor, progress and strict."""

    mode: str
    seconds: float | None = None
    executor: Executor | None = None
    progress: Progress = lambda share: None
    strict: bool = False  # no plan that multiplies absent elements as zeros
    deadline: float = math.inf  # on the clock of time.monotonic

    def begun(self) -> "Tuning":
        """The same with `seconds` running from now: one deadline for all targets of a call."""
        return replace(self, deadline=time.monotonic() + (self.seconds or math.inf))

    @property
    def keys(self) -> tuple[str, ...]:
        """What it adds to the store's keys, the better result first: a race that had all the time it wanted serves
        every budget, one that was cut short only requests of the same budget."""
        return (self.mode,) if self.seconds is None else (self.mode, f"{self.mode} within {self.seconds!r} s")


@dataclass(frozen=True, slots=True)
class Choice:
    """A plan, all that it was chosen from by predicted cost, and the race that it won: the fastest first, then those
    that were not measured."""

    plan: Plan
    ranked: tuple[tuple[Cost, Plan], ...]
    records: tuple[TuningRecord, ...] = ()


def as_tuning(
    mode: Any, seconds: Any = None, executor: Any = None, progress: Any = None, strict: Any = False
) -> Tuning:  # fmt: skip
    """The arguments of compile, checked.  ArgumentError, ArgumentTypeError."""
    if mode not in ("off", "model", "measure"):
        raise ArgumentError(f"tune={mode!r}: one of 'off', 'model', 'measure'")
    if seconds is not None:
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float, np.integer, np.floating)):
            raise ArgumentTypeError(f"tune_seconds={seconds!r}: a number of seconds, or None for all it takes")
        if not (math.isfinite(seconds) and seconds > 0):
            raise ArgumentError(f"tune_seconds={seconds!r}: more than 0, or None for all it takes")
        if mode != "measure":
            raise ArgumentError(f"tune_seconds={seconds!r} with tune={mode!r}: only tune='measure' takes time")
    if executor is not None and not isinstance(executor, Executor):
        raise ArgumentTypeError(f"executor={executor!r}: a concurrent.futures.Executor, or None for threads")
    if progress is not None and not callable(progress):
        raise ArgumentTypeError(f"progress={progress!r}: a function that takes the share done, from 0 to 1")
    return Tuning(mode, seconds and float(seconds), executor, progress or (lambda share: None), bool(strict))


def allowed(backend: Backend, problem: Problem, target: Target, *, strict: bool = False) -> list[Plan]:
    """The plans that may run, a good guess first.  UnsupportedError where there are none."""
    plans = [plan for plan in backend.candidates(problem, target) if not (strict and plan.zero_filled)]
    if not plans:
        raise UnsupportedError(
            f"{problem}: no plan of backend {backend.name!r} for {target.name}"
            f"{' that is strict' * strict}; {HOPPER_ONLY if problem.dtype.name in HOPPER else backend.lacks}"
        )
    return plans


def choose(
    backend: Backend, problem: Problem, weight: Weight, target: Target, tuning: Tuning, compiler: build.Compiler,
    exam: Exam, folder: Path,
) -> Choice:  # fmt: skip
    """The plan for one target.  A race uses `folder`, which must not exist and is gone afterwards, except that a
    BuildError leaves it as it is.  Targets that do not run here are left to the model: no records."""
    plans = allowed(backend, problem, target, strict=tuning.strict)
    ranked = tuple(tune.rank(plans, problem.n))
    if tuning.mode == "off":
        return Choice(plans[0], ranked)
    track = track_of(target) if tuning.mode == "measure" else None
    if track is None:
        return Choice(ranked[0][1], ranked)
    n = problem.n or tune.PLANNED_N
    entries = [(estimate(plan, affordable(problem, n)), plan) for _, plan in tune.shortlist(ranked, n)]
    race = _Race(backend, track, weight, entries, tuning, compiler, exam, folder)
    try:
        with track.entered():
            plan, records = race.run()
    except BuildError:
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder)
    return Choice(plan, ranked, records)


def build_candidate(
    backend: str, track: Track, plan: Plan, weight: Weight, compiler: build.Compiler, folder: Path
) -> None:
    """Print, compile and describe one plan in `folder`.  Plain data in, files out: another process may do it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    row = BACKENDS[backend]
    source = row.trial(row.emit((plan,), weight), track)
    build.build(source, folder, compiler)
    write_manifest(folder, package.describe(source, weight, compiler, (), folder, {}))


class _Race:
    """The steps of one race: compile all, check each against float64, time what is left in alternation."""

    def __init__(
        self, backend: Backend, track: Track, weight: Weight, entries: Sequence[tuple[Cost, Plan]], tuning: Tuning,
        compiler: build.Compiler, exam: Exam, folder: Path,
    ) -> None:  # fmt: skip
        self.backend, self.track, self.weight, self.entries, self.tuning = backend, track, weight, entries, tuning
        self.compiler, self.exam = compiler, exam
        self.folders = [folder / str(number) for number in range(len(entries))]
        self.notes = [""] * len(entries)
        self.failures: list[BaseException] = []

    def run(self) -> tuple[Plan, tuple[TuningRecord, ...]]:
        """The winner and all records.  Where no plan is left, the first failure is raised, as a BsrgenError."""
        inputs = self._inputs()  # where memory is short, that shows before the work
        self._compile()
        try:
            kernels = self._examined()
            if not kernels:
                first = self.failures[0]
                if isinstance(first, BsrgenError):
                    raise first
                raise BuildError(f"{self.exam.problem}: no plan could be built: {first!r}") from first
            seconds = self._timed(kernels, *inputs)
        finally:
            self.track.leave(self.folders)
        records = [
            TuningRecord(
                cost.n, plan.target.name, str(plan), plan.knobs(), plan.dense, cost.seconds, seconds.get(number), note
            )
            for number, ((cost, plan), note) in enumerate(zip(self.entries, self.notes, strict=True))
        ]
        records.sort(key=lambda record: math.inf if record.measured_seconds is None else record.measured_seconds)
        return self.entries[min(seconds, key=seconds.__getitem__)][1], tuple(records)

    def _inputs(self) -> tuple[Array, Array, dict[str, Any]]:
        """x, out and operands, the same for all plans."""
        problem, n = self.exam.problem, self.entries[0][0].n
        x, given = problem.sample(np.random.default_rng(0), n)
        return x, np.zeros(problem.operator.shape(n, problem.rows), problem.out_dtype.numpy), given

    def _compile(self) -> None:
        """All plans, or those that are begun in time; SURE of them in any case."""
        jobs = [
            (self.backend.name, self.track, plan, self.weight, self.compiler, folder)
            for (_, plan), folder in zip(self.entries, self.folders, strict=True)
        ]
        futures: list[Future[None]] = []
        with _workers(self.tuning.executor) as executor:
            try:
                for job in jobs:
                    futures.append(_submitted(executor, job))
                self._wait(futures)
            finally:
                for future in futures:
                    future.cancel()
                while pending := _pending(futures):  # nobody may write into a folder that goes
                    wait(pending, POLL_S)
        for number, future in enumerate(futures):
            if future.cancelled() and number >= tune.SURE and time.monotonic() >= self.tuning.deadline:
                self.notes[number] = TIME_UP
            elif future.cancelled():
                self._drop(number, BuildError(f"executor={self.tuning.executor!r} cancelled it"))
            elif (failure := future.exception()) is not None:
                self._drop(number, failure)

    def _wait(self, futures: list[Future[None]]) -> None:
        while pending := _pending(futures):
            left = self.tuning.deadline - time.monotonic()
            if left <= 0:
                for future in futures[tune.SURE :]:
                    future.cancel()
            wait(_pending(pending), min(left, POLL_S) if left > 0 else POLL_S, FIRST_COMPLETED)
            self.tuning.progress(0.5 * sum(future.done() for future in futures) / len(futures))

    def _drop(self, number: int, failure: BaseException) -> None:
        """Out of the race, with a note; what is neither the compiler's nor the machine's fault is ours, and raised."""
        if not isinstance(failure, (BsrgenError, OSError, BrokenExecutor)):
            raise failure
        self.failures.append(failure)
        text = " ".join(str(failure).partition("; sources kept in")[0].split())
        self.notes[number] = f"dropped: {text}"[:NOTE_CHARACTERS]

    def _examined(self) -> dict[int, Contender]:
        """Those that load and give right results."""
        kernels = {}
        for number, folder in enumerate(self.folders):
            if self.notes[number]:
                continue
            try:
                kernel = self.track.load(read_artifact(folder), self.exam.weight)
                share, n = self.exam.worst(kernel)
                if share > 1:
                    raise BuildError(f"differs from float64 by {share:.3g} times its bound at n = {n}")
                kernels[number] = kernel
            except (BsrgenError, OSError) as failure:
                self._drop(number, failure)
        return kernels

    def _timed(self, kernels: dict[int, Contender], x: Array, out: Array, given: dict[str, Any]) -> dict[int, float]:
        """Seconds of a call: the minimum of up to ROUNDS samples."""
        contenders = {str(number): kernel for number, kernel in kernels.items()}
        left = max(self.tuning.deadline - time.monotonic(), 1e-3)
        times = self.track.measure(
            contenders, x, out, given, rounds=ROUNDS, seconds=min(left, TIMING_S),
            progress=lambda share: self.tuning.progress(0.5 + 0.5 * share),
        )  # fmt: skip
        for number in kernels:
            rounds = len(times[str(number)].samples)
            if left < TIMING_S and rounds < ROUNDS:
                self.notes[number] = f"{TIME_UP} after {rounds} of {ROUNDS} rounds"
        return {number: times[str(number)].min_s for number in kernels}


def _pending(futures: Sequence[Future[None]]) -> list[Future[None]]:
    """Those not done.  `wait` alone would wait for ever for one that was cancelled and never taken up."""
    return [future for future in futures if not future.done()]


def _submitted(executor: Executor, job: tuple[Any, ...]) -> "Future[None]":
    try:
        return executor.submit(build_candidate, *job)
    except RuntimeError as e:  # broken, or shut down
        raise BuildError(f"executor={executor!r} takes no work: {e}") from e


@contextmanager
def _workers(executor: Executor | None) -> Iterator[Executor]:
    """The caller's executor, left open; else threads, each of which waits for a compiler."""
    if executor is not None:
        yield executor
        return
    with ThreadPoolExecutor(parallel_cores()) as pool:
        yield pool
