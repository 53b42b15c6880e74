"""Tuning by the clock: who takes part, in which executor, for how long, and what becomes of plans that fail."""

import functools
import pickle
import re
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import assert_right, problem_of

import bsrgen
from bsrgen import build, choose, clock, tune
from bsrgen.backends import BACKENDS
from bsrgen.backends.c import CPlan
from bsrgen.cost import Cost
from bsrgen.epilogues import EPILOGUES, as_epilogues
from bsrgen.manifest import TIME_UP, TuningRecord
from bsrgen.operators import OPERATORS
from bsrgen.pattern import Pattern, random_weight
from bsrgen.plan import Plan
from bsrgen.targets import TARGETS, native

W = random_weight(21, (32, 40), (4, 2), 0.4)
PROBLEM = problem_of(W)


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """A store of the test's own, where no race is a hit; races of three, built in a hurry."""
    monkeypatch.setenv("BSRGEN_CACHE_DIR", str(tmp_path / "store"))
    monkeypatch.setattr("bsrgen.build.prepare_calls", lambda: None)
    monkeypatch.setattr(build, "COMPILE_FLAGS", [flag.replace("-O3", "-O0") for flag in build.COMPILE_FLAGS])
    monkeypatch.setattr(tune, "TOP", 3)


def tuned(**options: Any) -> Any:
    return bsrgen.compile(W, tune="measure", n=8, **options)


def records(kernel: Any) -> tuple[TuningRecord, ...]:
    return kernel.artifact.manifest.tuning


# ── who takes part ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Named(Plan):
    """A plan that is a name: its family is the part before the dot."""

    name: str = ""
    whole: bool = False

    @property
    def dense(self) -> bool:
        return self.whole

    def family(self, n: int) -> tuple[Any, ...]:
        return (self.name.partition(".")[0],)


def shortlisted(text: str, dense: str = "") -> str:
    """The names that are chosen, from names with the cheapest first."""
    plans = [Named(PROBLEM, native(), name, name in dense.split()) for name in text.split()]
    ranked: list[tuple[Cost, Plan]] = [(Cost(8, 1, 1, 1.0 + i, 1.0), plan) for i, plan in enumerate(plans)]
    return " ".join(plan.name for _, plan in tune.shortlist(ranked, 8))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("plans", "dense", "chosen"),
    [
        ("a.1 b.1", "", "a.1 b.1"),
        ("a.1 a.2 a.3 b.1 c.1 d.1", "", "a.1 a.2 b.1 c.1"),
        ("a.1 a.2 a.3 a.4 a.5", "", "a.1 a.2 a.3 a.4"),
        ("a.1 a.2 a.3 b.1 a.4", "", "a.1 a.2 b.1 a.3"),
        ("a.1 a.2 b.1 b.2 c.1 d.1", "d.1 c.1", "a.1 a.2 c.1 b.1"),
        ("a.1 b.1", "b.1", "a.1 b.1"),
    ],
)
def test_shortlist_is_diverse_and_holds_the_best_dense_plan(
    plans: str, dense: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "TOP", 4)
    assert shortlisted(plans, dense) == chosen


@pytest.mark.parametrize("n", [1, 128])
@pytest.mark.parametrize("operator", OPERATORS)
def test_shortlist_of_real_plans(operator: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "TOP", 8)
    problem = problem_of(random_weight(0, (256, 256), (8, 4), 0.3), operator)
    ranked = tune.rank(list(BACKENDS["c"].candidates(problem, TARGETS["x86-64-v4"])), n)
    chosen = tune.shortlist(ranked, n)
    assert len(chosen) == min(tune.TOP, len(ranked))
    assert chosen[0] is ranked[0]
    assert len({plan.family(n) for _, plan in chosen}) >= min(4, len({plan.family(n) for _, plan in ranked}))


def test_a_measured_dense_plan_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    worst = tune.rank(list(BACKENDS["c"].candidates(PROBLEM, native())), 8)[-1][1]
    monkeypatch.setattr(CPlan, "dense", property(lambda self: self == worst))
    kernel = tuned()
    (dense,) = [record for record in records(kernel) if record.dense]
    assert kernel.cost.measured_dense_seconds == dense.measured_seconds
    assert dense.knobs == worst.knobs()


# ── executors ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_plans_are_plain_data() -> None:
    """What an executor in another process is given comes out equal, and is read-only again."""
    steps = as_epilogues([*EPILOGUES, "bias", "bias"])
    for operator in OPERATORS:
        problem = replace(problem_of(W, operator), epilogue=steps, n=7)
        for plan in BACKENDS["c"].candidates(problem, native()):
            again = pickle.loads(pickle.dumps(plan))
            assert again == plan
            assert (again.problem.n, again.knobs(), str(again)) == (7, plan.knobs(), str(plan))
            assert again.problem.operands == problem.operands
    weight = pickle.loads(pickle.dumps(W))
    assert (weight.digest, weight.notes) == (W.digest, W.notes)
    assert not weight.data.flags.writeable
    assert not weight.pattern.indices.flags.writeable


def test_a_damaged_pattern_does_not_come_out_of_a_pickle() -> None:
    kind, (shape, blocksize, indptr, _) = W.pattern.__reduce__()
    assert kind is Pattern
    with pytest.raises(bsrgen.PatternError):
        kind(shape, blocksize, indptr, np.full(W.pattern.nnzb, 99))


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_processes_compile(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here: list[str] = []
    real = build.build
    monkeypatch.setattr(build, "build", lambda source, *rest: here.append(source.name) or real(source, *rest))
    if start == "fork":  # a fork would inherit the counter; it still must not count here
        monkeypatch.setattr(build, "build", real)
    with ProcessPoolExecutor(1, mp_context=get_context(start)) as pool:
        kernel = tuned(executor=pool, epilogue=("bias", "gelu", "clamp"))
        assert pool.submit(int, 7).result() == 7  # left open
    assert len([record for record in records(kernel) if record.measured_seconds]) == 3
    assert len(here) == (start == "spawn")  # only the winner, again


class Slow(ThreadPoolExecutor):
    """One thread, and a barrier that holds it up until the time is over."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        return super().submit(functools.partial(self.late, fn), *args, **kwargs)

    @staticmethod
    def late(fn: Callable[..., Any], *args: Any) -> Any:
        threading.Event().wait(0.1)
        return fn(*args)


def test_the_budget_ends_compiling_but_two_are_measured() -> None:
    with Slow(1) as pool:
        kernel = tuned(tune_seconds=0.01, executor=pool)
    found = records(kernel)
    assert len(found) == tune.TOP
    assert [record.note for record in found[2:]] == [TIME_UP] * (tune.TOP - 2)
    assert all(record.note.startswith(f"{TIME_UP} after ") for record in found[:2])
    assert all(record.measured_seconds for record in found[:2])
    predicted = sorted(record.predicted_seconds for record in found)
    assert sorted(record.predicted_seconds for record in found[:2]) == predicted[:2]
    m = kernel.artifact.manifest
    assert m.cut_short
    assert m.levels[0].measured_seconds == found[0].measured_seconds
    assert_right(PROBLEM, W, kernel(np.ones((3, 40), np.float32)), np.ones((3, 40), np.float32))


def test_one_budget_for_all_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "TOP", 2)
    races: list[Any] = []
    real = choose._Race._compile
    monkeypatch.setattr(choose._Race, "_compile", lambda race: races.append(race) or real(race))
    tuned(tune_seconds=600, target=("native", "x86-64-v2"))
    assert len(races) == 2
    assert len({race.tuning.deadline for race in races}) == 1


def test_what_was_cut_short_serves_the_same_budget_only() -> None:
    with Slow(1) as pool:
        short = tuned(tune_seconds=0.01, executor=pool)
    assert tuned(tune_seconds=0.01).artifact.folder == short.artifact.folder
    full = tuned()
    assert not full.artifact.manifest.cut_short
    assert tuned(tune_seconds=60).artifact.folder == full.artifact.folder
    assert tuned(tune_seconds=0.01).artifact.folder == full.artifact.folder  # what had all its time is better


def test_a_budget_that_was_enough_serves_requests_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "TOP", 2)
    kernel = tuned(tune_seconds=600)
    assert not kernel.artifact.manifest.cut_short
    monkeypatch.setattr(build, "build", lambda source, *_: pytest.fail(f"{source.name} was built"))
    assert tuned().artifact.manifest.tuning == records(kernel)


def test_an_executor_that_was_shut_down_is_a_typed_error() -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with pytest.raises(bsrgen.BuildError, match="takes no work"):
        tuned(executor=pool)


class Forgetful(Executor):
    """Runs the first `runs` at once; the others are cancelled, `late` or at once, and nobody is told."""

    def __init__(self, runs: int, *, late: bool = False) -> None:
        self.runs, self.late = runs, late

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        self.runs -= 1
        if self.runs >= 0:
            future.set_result(fn(*args, **kwargs))
        elif self.late:
            threading.Timer(0.2, future.cancel).start()
        else:
            future.cancel()
        return future


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.timeout(60)
def test_work_that_the_executor_cancels_is_not_waited_for(late: bool) -> None:
    kernel = tuned(executor=Forgetful(1, late=late))
    assert [bool(record.measured_seconds) for record in records(kernel)] == [True, False, False]
    assert "cancelled it" in records(kernel)[-1].note
    with pytest.raises(bsrgen.BuildError, match="cancelled it"):
        tuned(executor=Forgetful(0, late=late), epilogue="relu")


@pytest.mark.timeout(60)
def test_work_that_never_began_is_not_waited_for_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """An executor that keeps its queue to itself does not say that it dropped what we cancelled."""

    class Stuck(Forgetful):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
            return super().submit(fn, *args, **kwargs) if self.runs > 0 else Future()

    found = records(tuned(tune_seconds=0.01, executor=Stuck(tune.SURE)))
    assert [record.note for record in found[tune.SURE :]] == [TIME_UP] * (tune.TOP - tune.SURE)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"tune_seconds": 0}, bsrgen.ArgumentError, "tune_seconds=0"),
        ({"tune_seconds": -1.5}, bsrgen.ArgumentError, "-1.5"),
        ({"tune_seconds": float("nan")}, bsrgen.ArgumentError, "nan"),
        ({"tune_seconds": float("inf")}, bsrgen.ArgumentError, "None for all"),
        ({"tune_seconds": "5"}, bsrgen.ArgumentTypeError, "'5'"),
        ({"tune_seconds": True}, bsrgen.ArgumentTypeError, "True"),
        ({"tune_seconds": 5, "tune": "model"}, bsrgen.ArgumentError, "only tune='measure'"),
        ({"executor": map}, bsrgen.ArgumentTypeError, "Executor"),
        ({"progress": 1}, bsrgen.ArgumentTypeError, "progress=1"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=re.escape(says)):
        bsrgen.compile(W, **({"tune": "measure"} | options))


# ── what happens on the way ──────────────────────────────────────────────────────────────────────────────────────────


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[Any], bool]) -> None:
    """Builds in a race fail where `fails(folder)` says so."""
    real = build.build

    def broken(source: Any, folder: Path, compiler: Any) -> Path:
        if folder.parent.name == "tune" and fails(folder):
            raise bsrgen.BuildError(f"cc k.c: exit status 1: internal error; sources kept in {folder}")
        return real(source, folder, compiler)

    monkeypatch.setattr(build, "build", broken)


def test_a_plan_that_does_not_compile_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, lambda folder: folder.name in "01")
    found = records(tuned())
    assert [record.note for record in found if record.note] == ["dropped: cc k.c: exit status 1: internal error"] * 2
    assert [record.measured_seconds is None for record in found] == [False] * (len(found) - 2) + [True] * 2
    assert "dropped" in str(found[-1])


def test_the_first_failure_is_raised_where_no_plan_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, lambda folder: True)
    with pytest.raises(bsrgen.BuildError, match="internal error; sources kept in") as caught:
        tuned()
    kept = Path(str(caught.value).rpartition("kept in ")[2])
    assert (kept.parent / "1").parent.name == "tune"
    assert kept.parent.is_dir()


@pytest.mark.parametrize("failure", [OSError(28, "no space left"), BrokenExecutor("a worker died")])
def test_the_first_failure_is_a_typed_error(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(build, "build", broken)
    with pytest.raises(bsrgen.BuildError, match=r"no space left|a worker died") as caught:
        tuned()
    assert caught.value.__cause__ is failure


def test_a_plan_with_a_wrong_result_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    real = choose.Exam.worst
    monkeypatch.setattr(
        choose.Exam, "worst", lambda self, k: (7.5, 3) if k.artifact.folder.name == "0" else real(self, k)
    )
    dropped = [record for record in records(tuned()) if record.note]
    assert len(dropped) == 1
    assert dropped[0].note == "dropped: differs from float64 by 7.5 times its bound at n = 3"


def test_our_own_faults_are_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(build, "build", broken)
    with pytest.raises(ZeroDivisionError):
        tuned()
    assert not list((tmp_path / "store" / "tmp").iterdir())


def test_progress_rises_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "TOP", 2)
    told: list[float] = []
    kernel = tuned(progress=told.append, target=("native", "x86-64-v2"))
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert 0 <= told[0] < 0.5
    told.clear()
    tuned(progress=told.append, target=("native", "x86-64-v2"))
    assert not told  # from the store
    levels = kernel.artifact.manifest.levels
    assert [level.measured_seconds for level in levels] == [
        min(r.measured_seconds for r in records(kernel) if r.target == level.target) for level in levels
    ]


@pytest.mark.skipif(native().family != "x86_64", reason="the other architecture is aarch64")
def test_a_level_that_cannot_run_here_is_left_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "TOP", 2)
    monkeypatch.setattr("bsrgen.tracks.native", lambda: TARGETS["x86-64-v3"])
    kernel = tuned(target=("x86-64-v4", "x86-64-v3"))
    high, low = kernel.artifact.manifest.levels
    assert high.measured_seconds is None
    assert kernel.cost.measured_seconds is None  # which is about the first level
    assert low.measured_seconds > 0


def test_libraries_of_a_race_are_closed() -> None:
    def mapped() -> set[str]:
        return {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/tune/" in line}

    others = mapped()  # races for GPUs in this process leave theirs: the CUDA runtime in them may have threads
    tuned()
    assert mapped() == others


def test_huge_matrices_are_timed_at_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The records say at how many; their times are not taken for those of the planned number."""
    monkeypatch.setattr("bsrgen.exam.MOST_ELEMENTS", 40 * 5)
    seen: list[Any] = []
    real = clock.measure
    monkeypatch.setattr(clock, "measure", lambda calls, **o: seen.extend(calls.values()) or real(calls, **o))
    kernel = tuned()
    assert {record.n for record in records(kernel)} == {5}
    assert [call.args[0].shape for call in seen] == [(5, 40)] * len(seen)
    assert len({id(call.keywords["out"]) for call in seen}) == 1
    assert (kernel.cost.n, kernel.cost.measured_seconds, kernel.verdict.measured_seconds) == (8, None, None)


def test_plans_are_timed_in_turns_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "TOP", 2)
    seen: dict[str, Any] = {}
    real = clock.measure

    def measure(calls: Any, **options: Any) -> Any:
        seen.update(options, names=list(calls))
        return real(calls, **options)

    monkeypatch.setattr(clock, "measure", measure)
    tuned()
    assert seen["names"] == ["0", "1"]
    assert seen.get("cpus") is None  # the last usable core
    assert (seen["rounds"], seen["seconds"]) == (choose.ROUNDS, choose.TIMING_S)
