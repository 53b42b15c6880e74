"""The measuring tools measure: clock, ceilings, and every peer right before it is timed."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bsrgen.bench import ceilings, clock, peers
from bsrgen.bench.case import case_of, random_case
from bsrgen.bench.peer import Peer, Run
from bsrgen.bench.report import Comparison, Request, Row, compare, document, verdict
from bsrgen.operators import OPERATORS
from bsrgen.pattern import random_weight
from bsrgen.targets import host

needs_cc = pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")


@pytest.fixture(scope="module")
def ceiling() -> ceilings.Ceilings:
    return ceilings.Ceilings()


def test_measure_alternates_contenders_and_samples_long_enough() -> None:
    order: list[str] = []

    def contender(name: str, seconds: float) -> clock.Call:
        def call() -> None:
            order.append(name)
            time.sleep(seconds)

        return call

    timings = clock.measure({"a": contender("a", 2e-3), "b": contender("b", 1e-3)}, rounds=4)
    assert order[-16:] == ["a", "a", "b", "b"] * 4  # each round: one untimed call, then the sample
    assert [len(t.samples) for t in timings.values()] == [4, 4]
    assert 1e-3 <= timings["b"].min_s <= timings["b"].median_s
    assert timings["a"].min_s >= 2e-3


def test_short_calls_are_repeated_within_a_sample() -> None:
    timing = clock.measure({"nothing": lambda: None}, rounds=3)["nothing"]
    assert timing.min_s * timing.calls >= clock.SAMPLE_S / 4
    assert timing.calls > 100


def test_measure_takes_as_many_rounds_as_fit() -> None:
    start = time.perf_counter()
    timing = clock.measure({"nap": lambda: time.sleep(1e-3)}, seconds=0.05)["nap"]
    assert len(timing.samples) >= 3
    assert 0.05 <= time.perf_counter() - start < 5


def test_ratio_is_taken_round_by_round() -> None:
    a, b = clock.Timing((1.0, 10.0, 1.0), 1), clock.Timing((2.0, 20.0, 2.0), 1)
    assert a.ratio(b) == 2.0
    assert (a.min_s, a.median_s) == (1.0, 1.0)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no CPU affinity on this system")
def test_pinned_keeps_one_core_and_lets_go() -> None:
    before = os.sched_getaffinity(0)
    with clock.pinned(None):
        assert os.sched_getaffinity(0) == {max(before)}
    with clock.pinned(()):
        assert os.sched_getaffinity(0) == before
    assert os.sched_getaffinity(0) == before


@needs_cc
@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "s8"])
def test_peaks_by_operand(ceiling: ceilings.Ceilings, dtype: str) -> None:
    rows = {op: ceiling.fma(dtype, op) for op in ceiling.operands(dtype)}
    assert {"reg", "mem"} <= set(rows)
    rates = {op: row.rate(t) for (op, row), t in zip(rows.items(), timed(rows), strict=True)}
    assert all(1e8 < r < 1e13 for r in rates.values()), rates
    assert ceiling.fma(dtype) is rows["reg"]  # found once


@needs_cc
def test_peaks_are_those_that_the_cpu_has(ceiling: ceilings.Ceilings) -> None:
    """A type without its own counts as f32; a level of dots or tiles is there where the target has its feature."""
    assert ceiling.fma("f16") is ceiling.fma("f32")
    levels = {level for _, _, level in ceiling.peaks}
    for level, feature in {"avx512bf16": "avx512bf16", "avx512vnni": "avx512vnni", "amx": "amx-tile"}.items():
        assert (level in levels) == host().has(feature)
    assert (ceiling.counted_as("bf16") == "bf16") == ("avx512bf16" in levels)


@needs_cc
def test_read_rates_fall_with_the_footprint(ceiling: ceilings.Ceilings) -> None:
    rows = {name: ceiling.read(ceiling.sizes[name]) for name in ("L1", "L3")}
    l1, l3 = (row.rate(t) for row, t in zip(rows.values(), timed(rows), strict=True))
    assert l1 > l3 > 1e8
    with pytest.raises(ValueError, match="no row"):
        ceiling.read(1024, level="vax")


def timed(rows: dict[str, ceilings.Ceiling]) -> list[clock.Timing]:
    return list(clock.measure({name: row.call for name, row in rows.items()}, rounds=5).values())


def test_share_of_a_ceiling() -> None:
    row = ceilings.Ceiling("c", 100.0, lambda: None, "row")
    assert row.share(clock.Timing((1.0,), 1), clock.Timing((0.5,), 1), 25.0) == 0.5  # 50 of 100 flop/s


@pytest.mark.parametrize("names", ["gcc", "clang clang-19", "aarch64-linux-gnu-gcc"])
def test_ceilings_compile_without_warnings(names: str, tmp_path: Path) -> None:
    cc = next(filter(shutil.which, names.split()), None)
    if cc is None:
        pytest.skip(f"{names.split()[0]} is not installed")
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-c"]
    subprocess.run([cc, *flags, str(ceilings.SOURCE), "-o", str(tmp_path / "ceilings.o")], check=True)


@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("blocksize", [(1, 1), (3, 5), (4, 4), (32, 1)], ids=lambda b: f"{b[0]}x{b[1]}")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("operator", list(OPERATORS))
def test_every_peer_is_right_or_says_why_not(operator: str, dtype: str, blocksize: tuple[int, int], n: int) -> None:
    case = random_case(operator, (50, 70), blocksize, 0.3, n, dtype)
    libraries = [peer for peer in peers.PEERS if peer.kind != "bsrgen"]
    runs, reasons = peers.prepare(case, libraries)
    assert set(runs) | set(reasons) == {p.name for p in libraries if dtype in p.dtypes}
    assert {"numpy dense", "scipy bsr", "scipy csr"} <= set(runs)
    assert not [why for why in reasons.values() if why.startswith(("wrong", "fails"))], reasons
    for run in runs.values():
        assert run.result().shape == case.out().shape


@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("blocksize", [(1, 1), (3, 5), (4, 4)], ids=lambda b: f"{b[0]}x{b[1]}")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("operator", list(OPERATORS))
def test_every_peer_of_reduced_types_is_right_or_says_why_not(
    operator: str, dtype: str, blocksize: tuple[int, int], n: int
) -> None:
    case = random_case(operator, (50, 70), blocksize, 0.3, n, dtype)
    assert (case.dtype.name, case.out().dtype.name) == (dtype, "float32" if dtype == "int8" else dtype)
    libraries = [peer for peer in peers.PEERS if peer.kind != "bsrgen"]
    runs, reasons = peers.prepare(case, libraries)
    assert {"numpy dense, by float32", "scipy csr, by float32"} <= set(runs)
    assert not [why for why in reasons.values() if why.startswith(("wrong", "fails"))], reasons
    assert all(run.result().dtype == case.out().dtype for run in runs.values())
    kinds = {peer.name: peer.kind for peer in libraries}
    assert {kinds[name] for name in runs} == {"dense", "sparse"}
    assert "numpy dense" not in reasons  # whose types are others


def test_int8_case_is_on_the_grid_that_every_row_fills() -> None:
    """Whoever quantises by the largest of a row finds the case's integers and scales."""
    case = random_case("linear", (50, 70), (4, 4), 0.3, 7, "int8")
    W, dense = case.dense(), case.weight.todense()
    assert case.w_scale is not None
    assert np.abs(case.x.astype(int)).max() == 127
    filled = np.abs(dense).max(axis=1) > 0
    assert filled.sum() > 0
    assert (np.abs(W.astype(int)).max(axis=1) == 127 * filled).all()
    np.testing.assert_array_equal(W * case.w_scale[:, None], dense)
    found = np.abs(dense).max(axis=1, initial=1e-30) / 127
    np.testing.assert_array_equal(np.rint(dense / found[:, None]), W)
    expected, bound = case.reference()
    exact = (case.x.astype(np.int64) @ W.T.astype(np.int64)) * case.w_scale.astype(float) * case.x_scale
    assert peers.check(exact.astype(np.float32), expected, bound) < 0.5
    assert case.given == {"x_scale": np.float32(case.x_scale)}
    np.testing.assert_array_equal(case_of(case.weight, "linear", 7, dtype="int8").dense(), W)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_bound_has_room_for_one_rounding(dtype: str) -> None:
    case = random_case("spmm", (50, 70), (4, 4), 0.3, 7, dtype)
    expected, bound = case.reference()
    assert 0.1 < peers.check(expected.astype(case.x.dtype), expected, bound) <= 1
    coarse = expected * (1 + 4 * case.dtype.unit_roundoff)
    with pytest.raises(ArithmeticError, match="x the bound"):
        peers.check(coarse.astype(case.x.dtype), expected, bound)


@needs_cc
def test_bsrgen_is_a_row_of_the_table() -> None:
    case = random_case("linear", (50, 70), (5, 2), 0.3, 7)
    runs, reasons = peers.prepare(case)
    assert next(iter(runs)) == "bsrgen"
    assert set(runs) | set(reasons) == {p.name for p in peers.PEERS if "float32" in p.dtypes}


def test_check_refuses_a_wrong_result() -> None:
    case = random_case("spmm", (8, 8), (2, 2), 0.5, 3)
    expected, bound = case.problem.reference(case.weight, case.x)
    y = (case.weight.todense() @ case.x).astype(np.float32)
    assert peers.check(y, expected, bound) <= peers.SLACK
    for wrong in (y[0, 0] + 1e-2, np.nan):
        y[0, 0] = wrong
        with pytest.raises(ArithmeticError, match="x the bound"):
            peers.check(y, expected, bound)


def test_a_library_that_fails_is_left_out_with_its_words() -> None:
    def prepare(case: object) -> Run:
        raise RuntimeError("out of order")

    broken = Peer("broken", "none", "dense", lambda case: None, prepare)
    runs, reasons = peers.prepare(random_case("linear", (8, 8), (2, 2), 0.5, 3), [broken])
    assert (runs, reasons) == ({}, {"broken": "fails: out of order"})


@needs_cc
@pytest.mark.parametrize("threads", [1, 2])
def test_compare_times_all_in_one_run(ceiling: ceilings.Ceilings, threads: int) -> None:
    shares: list[float] = []
    weight = random_weight(7, (50, 70), (5, 2), 0.3)
    with clock.peer_threads(threads):
        c = compare(weight, Request(epilogue=("relu",), threads=threads, rounds=3), 9, ceiling, shares.append)
    assert {"bsrgen", "bsrgen + relu", "numpy dense", "scipy csr"} <= {row.name for row in c.rows}
    assert {len(row.timing.samples) for row in c.rows} == {3}
    assert [row.timing.min_s for row in c.rows] == sorted(row.timing.min_s for row in c.rows)
    assert (shares[-1], c.n, c.threads) == (1.0, 9, threads)
    assert 0 < c.peak_share < 1
    assert 0 <= c.error_share <= 1
    assert {row["name"] for row in document([c])["runs"][0]["contenders"]} == {row.name for row in c.rows}


@needs_cc
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_compare_takes_empty_and_full(ceiling: ceilings.Ceilings, density: float) -> None:
    weight = random_weight(7, (8, 8), (4, 4), density)
    with clock.peer_threads(1):
        c = compare(weight, Request(rounds=3), 2, ceiling)
    assert c.best("sparse").kind == "sparse"
    assert c.error_share <= 1


def timing(*samples: float) -> clock.Timing:
    return clock.Timing(samples, 1)


def compared(n: int, dense: float, sparse: float) -> Comparison:
    """What only the verdict of a Comparison needs."""
    rows = (Row("d", "dense", timing(1.0), dense), Row("e", "dense", timing(1.0), dense + 1))
    case = case_of(random_weight(7, (8, 8), (4, 4), 0.5), "linear", n)
    rest = dict.fromkeys(Comparison.__dataclass_fields__, None) | {
        "problem": case.problem,
        "threads": 1,
        "break_even": 0.625,
    }
    return Comparison(**rest | {"rows": (*rows, Row("s", "sparse", timing(1.0), sparse))})  # type: ignore[arg-type]


def test_verdict_is_one_line() -> None:
    a, b, c = compared(1, 0.5, 3.0), compared(32, 1.01, 4.0), compared(128, 5.21, 10.4)
    assert verdict([c]) == (
        "sparse: bsrgen 5.2x the best dense, 10x the best sparse, break-even at density 0.62 (n=128)"
    )
    assert verdict([a, c]).startswith("dense at n=1, sparse at n=128: bsrgen 0.5, 5.2x the best dense, 3, 10x")
    assert verdict([b]).startswith("even: bsrgen 1x")


def test_at_their_best_starts_once_more_without_handicaps() -> None:
    code = (
        "import os, sys; from bsrgen.bench.clock import at_their_best; at_their_best(2)\n"
        "print(os.environ.get('OPENBLAS_CORETYPE'), os.environ['OMP_NUM_THREADS'], 'numpy' in sys.modules)"
    )
    env = {name: value for name, value in os.environ.items() if name != "_BSRGEN_BENCH"}
    env["OPENBLAS_CORETYPE"] = "Haswell"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "2", "False"]
