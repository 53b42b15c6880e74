"""The verdict: sparse or dense, by which times, up to which density, and strict kernels."""

import importlib
import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from support import problem_of
from test_cli import run, run_json

import bsrgen
from bsrgen import advice, cost, tune
from bsrgen.artifact import read_artifact
from bsrgen.backends import BACKENDS, Backend
from bsrgen.backends.c.plan import CPlan
from bsrgen.choose import as_tuning, choose
from bsrgen.even import EvenPattern
from bsrgen.pattern import Pattern, random_weight
from bsrgen.targets import TARGETS
from bsrgen.verdict import WORTH, Advice, Verdict, short_time

C, V3 = BACKENDS["c"], TARGETS["x86-64-v3"]
SPARSE = Verdict(64, 0.2, "sparse", 2e-6, None, 2e-6, None, 6e-6, None, 0.6)
FASTER = Advice((16, 1), 10, 0.23, 1.15, 1e-6, 1.8)


def first_plan(weight, operator="linear", n=128, *, reblock=True):
    """What tune="model" takes; without `reblock` the best plan over the weight's own blocks."""
    problem = replace(problem_of(weight, operator), n=n)
    return tune.rank(list(C.candidates(problem, V3, reblock=reblock)), n)[0][1]


def judged(plan, weight, *times, backend=C):
    """The verdict, all plans of the backend being allowed."""
    ranked = tune.rank(list(backend.candidates(plan.problem, V3)), plan.problem.n)
    return advice.judge(backend, plan, ranked, weight, *times)


# ── the record ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_verdict_is_one_sentence():
    assert str(SPARSE) == (
        "sparse: predicted 2 us against 6 us for dense (predicted) at n = 64 on one core, 3x; "
        "break-even near density 0.6"
    )
    measured = msgspec.structs.replace(SPARSE, measured_seconds=3e-6, sparse_measured_seconds=3e-6)
    assert str(measured).startswith(
        "sparse: measured 3 us against 6 us for dense (predicted) at n = 64 on one core, 2x"
    )
    slow = msgspec.structs.replace(SPARSE, seconds=1.2e-5, sparse_seconds=1.2e-5, break_even=None)
    assert str(slow) == "dense: predicted 12 us against 6 us for dense (predicted) at n = 64 on one core, 0.5x"


def test_verdict_of_a_dense_plan_names_both_sides():
    v = Verdict(128, 0.9, "dense", 6e-4, 5e-4, 9e-4, 1e-3, 6e-4, 5e-4, 0.5)
    assert str(v) == (
        "dense: measured 500 us for dense, which runs, against 1 ms for sparse (measured) at n = 128 on one core, "
        "0.5x; break-even near density 0.5"
    )
    assert (v.choice, v.expected_speedup, v.measured_speedup, v.speedup) == ("dense", pytest.approx(2 / 3), 0.5, 0.5)
    assert SPARSE.measured_speedup is None


def test_an_alternative_is_named_where_it_is_worth_it():
    v = msgspec.structs.replace(SPARSE, alternatives=(FASTER,))
    assert v.alternative is FASTER
    assert str(v).endswith("; as 16x1 (covered density 0.23 instead of 0.2) 2x faster (predicted)")
    same = msgspec.structs.replace(FASTER, density=0.2)
    assert "(covered density 0.2) 2x" in msgspec.structs.replace(SPARSE, alternatives=(same,)).advice
    near = msgspec.structs.replace(FASTER, seconds=1.01 * SPARSE.seconds / WORTH)
    for others in ((), (near,)):
        v = msgspec.structs.replace(SPARSE, alternatives=others)
        assert v.alternative is None
        assert v.advice == "no other block shape of this mask would be faster (predicted)"
        assert str(v) == str(SPARSE)


@pytest.mark.parametrize(("seconds", "text"), [(1.234e-6, "1.23 us"), (9.99e-4, "999 us"), (0.0226, "22.6 ms")])
def test_short_time(seconds, text):
    assert short_time(seconds) == text


@pytest.mark.parametrize("field", ["seconds", "dense_seconds", "sparse_seconds", "measured_seconds", "n"])
def test_a_verdict_with_impossible_numbers_is_refused(field):
    record = msgspec.to_builtins(SPARSE)
    assert msgspec.convert(record, Verdict) == SPARSE
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(record | {field: 0}, Verdict)


# ── the judgement ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_few_blocks_are_sparse_and_most_are_dense():
    for density, choice in ((0.1, "sparse"), (0.95, "dense")):
        weight = random_weight(0, (768, 768), (1, 1), density)
        v = judged(first_plan(weight), weight)
        assert (v.choice, v.ran, v.density) == (choice, choice, weight.pattern.density)
        assert (v.break_even > density) == (choice == "sparse")


@pytest.mark.parametrize("n", [1, 128])
@pytest.mark.parametrize("operator", ["linear", "spmm"])
@pytest.mark.parametrize("blocksize", [(1, 1), (32, 1), (4, 4), (3, 5)], ids=lambda b: f"{b[0]}x{b[1]}")
def test_break_even_is_where_a_plan_of_that_density_takes_as_long(blocksize, operator, n):
    """Found again by compiling for it: the best plan of a random weight with that density costs what dense does."""
    weight = random_weight(0, (300, 400), blocksize, 0.2)
    plan = first_plan(weight, operator, n, reblock=False)
    v = judged(plan, weight)
    assert 0 < v.break_even <= 1
    if v.break_even < 1:
        there = first_plan(random_weight(1, (300, 400), blocksize, v.break_even), operator, n, reblock=False)
        assert cost.estimate(there, n).seconds == pytest.approx(v.dense_seconds, rel=0.02)


def test_break_even_moves_with_the_clock():
    weight = random_weight(0, (768, 768), (4, 4), 0.2)
    plan = first_plan(weight)
    predicted = cost.estimate(plan, 128)
    evens = []
    for slower in (1.0, 2.0, 4.0, 8.0):
        v = judged(plan, weight, slower * predicted.seconds)
        assert v.sparse_measured_seconds == v.measured_seconds == slower * predicted.seconds
        assert v.dense_measured_seconds is None
        assert (v.break_even > 0.2) == (v.speedup > 1)
        evens.append(v.break_even)
    assert evens == sorted(evens, reverse=True)
    assert evens[1] == pytest.approx(evens[0] / 2, rel=0.15)  # far from small densities, time is nearly proportional


def test_break_even_of_nothing_and_of_everything():
    empty = random_weight(0, (64, 64), (4, 4), 0.0)
    v = judged(first_plan(empty), empty)
    assert 0 < v.break_even <= 1
    assert v.choice == "sparse"
    nothing = random_weight(0, (0, 64), (4, 4), 0.0)
    assert 0 <= judged(first_plan(nothing), nothing).break_even <= 1
    problem = replace(problem_of(empty), n=128)
    assert advice.break_even(C, problem, V3, 1.0, 1e-9) == 0  # dense is always faster
    assert advice.break_even(C, problem, V3, 1e-9, 1.0) == 1


@dataclass(frozen=True)
class Filled(CPlan):
    """Stands for a plan that multiplies absent blocks."""

    @property
    def zero_filled(self) -> bool:
        return True


@dataclass(frozen=True)
class Dense(CPlan):
    """Stands for the dense plan."""

    @property
    def dense(self) -> bool:
        return True

    @property
    def zero_filled(self) -> bool:
        return True


def backend_with(kind: type[CPlan]) -> Backend:
    """The C backend, whose every plan comes as one of `kind` first."""

    def candidates(problem, target, *, reblock=True):
        for plan in C.candidates(problem, target, reblock=False):
            yield kind(problem, target, plan.tokens, plan.weight, plan.small_n, plan.encoding)
            yield plan

    return replace(C, candidates=candidates)


def test_verdict_where_the_dense_plan_runs():
    weight = random_weight(0, (64, 64), (4, 4), 0.5)
    backend, sparse = backend_with(Dense), first_plan(weight)
    dense = next(iter(backend.candidates(sparse.problem, V3)))
    assert dense.dense
    v = judged(dense, weight, 4e-6, 3e-6, backend=backend)
    assert (v.ran, v.choice, v.measured_seconds) == ("dense", "dense", 3e-6)
    assert (v.measured_speedup, v.sparse_measured_seconds) == (pytest.approx(0.75), 4e-6)
    assert v.sparse_seconds == cost.estimate(sparse, 128).seconds
    assert v.dense_seconds == min(cost.dense_seconds(sparse, 128), v.sparse_seconds)
    assert v.break_even < 0.5


def test_strict_takes_no_plan_that_fills_zeros():
    weight = random_weight(0, (64, 64), (4, 4), 0.5)
    for kind in (Filled, Dense):
        for how in ("off", "model"):
            backend, problem = backend_with(kind), problem_of(weight)
            loose, strict = (
                choose(backend, problem, weight, V3, as_tuning(how, strict=s), None, None, None).plan
                for s in (False, True)
            )
            assert isinstance(loose, kind)
            assert type(strict) is CPlan


def test_a_strict_verdict_knows_strict_plans_only():
    weight = random_weight(0, (64, 64), (4, 4), 0.95)
    loose, strict = (
        choose(C, problem_of(weight), weight, V3, as_tuning("model", strict=s), None, None, None) for s in (False, True)
    )
    assert loose.plan.dense
    assert not any(plan.zero_filled for _, plan in strict.ranked)
    dense_s = [advice.judge(C, c.plan, c.ranked, weight).dense_seconds for c in (loose, strict)]
    assert dense_s[0] < dense_s[1] == cost.dense_seconds(strict.plan, 128)


@pytest.fixture
def small_ints(monkeypatch):
    """C ints too small for offsets in a block of 128 rows, as 2**31 - 1 is for one of 2**24."""
    monkeypatch.setattr(importlib.import_module("bsrgen.backends.c.candidates"), "INT_MAX", (1 << 13) - 1)


def test_no_plan_for_the_own_blocks_is_no_break_even(small_ints):
    """Blocks that only a cover splits; the kernel is built all the same."""
    weight = random_weight(0, (256, 4), (128, 1), 0.7)
    assert not list(C.candidates(problem_of(weight), V3, reblock=False))
    k = bsrgen.compile(weight, target=("x86-64-v3", "x86-64"), tune="off")
    assert (k.verdict.break_even, k.verdict.alternatives) == (None, ())
    assert "break-even" not in str(k.verdict)
    with pytest.raises(bsrgen.UnsupportedError, match="smaller blocks"):
        bsrgen.advise(weight, target="x86-64-v3")


# ── what users see ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense 8x8 blocks around the diagonal, as CSR without a word about blocks."""
    import scipy.sparse

    path = tmp_path_factory.mktemp("hidden") / "W.npz"
    scipy.sparse.save_npz(
        path, scipy.sparse.csr_array(random_weight(0, (256, 320), (8, 8), 0.1, kind="banded").todense())
    )
    return path


def test_kernel_and_its_artifact_have_the_same_verdict(tmp_path):
    weight = random_weight(0, (256, 320), (8, 8), 0.1, kind="banded")
    k = bsrgen.compile(weight, blocksize=(1, 1), strict=True)
    assert isinstance(k.verdict, Verdict)
    assert k.plan.knobs["blocksize"] != [1, 1], "the kernel found the blocks by itself"
    assert (8, 8) in {a.blocksize for a in k.verdict.alternatives}
    assert k.verdict.alternative is None or k.verdict.alternative.seconds < k.verdict.seconds
    assert len(k.verdict.alternatives) <= advice.KEPT
    assert str(k.verdict) in str(k)
    assert "sparse" in str(k.verdict)
    loaded = bsrgen.load(k.save(tmp_path / "out"))
    assert loaded.verdict == k.verdict
    assert loaded.artifact.manifest.strict


def test_strict_kernels_leave_absent_blocks_alone():
    weight = random_weight(1, (24, 40), (4, 4), 0.3)
    x = np.ones((3, 40), np.float32)
    x[1, 7] = np.inf
    y = bsrgen.compile(weight, strict=True)(x)
    touched = (weight.todense()[:, 7] != 0) | np.isin(
        np.arange(24) // 4, weight.pattern.rows[weight.pattern.indices == 1]
    )
    assert np.isfinite(y[1, ~touched]).all()
    assert not np.isfinite(y[1, touched]).any()
    assert np.isfinite(y[[0, 2]]).all()


def test_cli_names_the_block_shape(hidden, tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    text = run("compile", hidden, "--blocksize", "1x1", "--strict", "-o", tmp_path / "out").stdout
    assert read_artifact(tmp_path / "out").manifest.strict
    assert re.search(r"as \d+x\d+ blocks, ", " ".join(text.split()))
    *_, shapes, verdict = run("bench", hidden, "--blocksize", "1x1", "--n", "64", "--rounds", 3).stdout.splitlines()
    assert re.match(r"block shapes: (as .*x faster \(predicted\) at n = 64|no other .* \(predicted\))$", shapes)
    assert verdict.startswith("verdict: ")
    assert verdict.endswith("(n=64)")
    document = run_json("bench", hidden, "--blocksize", "8x8", "--n", "64", "--rounds", 3)
    assert 0 < document["runs"][0]["break_even"] <= 1
    assert f"break-even at density {document['runs'][0]['break_even']:.2g} (n=64)" in document["verdict"]
    assert document["runs"][0]["model_verdict"]["density"] == pytest.approx(0.1, abs=0.01)


def test_inspect_takes_a_file_without_blocks(hidden):
    document = run_json("inspect", hidden, "--target", "x86-64-v4")
    assert document["pattern"]["blocksize"] == [1, 1]
    shapes = document["block_shapes"]
    assert [a["seconds"] for a in shapes] == sorted(a["seconds"] for a in shapes)
    assert [a["blocksize"] for a in shapes if a["given"]] == [[1, 1]]
    assert shapes[0]["speedup"] > 1.3
    (at,) = (a for a in shapes if a["blocksize"] == [8, 8])
    assert (at["fill"], at["density"]) == (1.0, pytest.approx(0.1, abs=0.01))
    (level,) = document["levels"]
    assert msgspec.convert(level["verdict"], Verdict).ran == "sparse"
    text = run("inspect", hidden).stdout
    for word in ("covered density", "1x1 (given)", "more, all slower"):
        assert word in text
    assert json.dumps(document)


def test_even_pattern_is_a_pattern_of_that_count():
    for shape, blocksize, nnzb in (
        ((30, 50), (4, 3), 0),
        ((30, 50), (4, 3), 77),
        ((30, 50), (4, 3), 136),
        ((0, 5), (1, 1), 0),
    ):
        even = EvenPattern(shape, blocksize, nnzb)
        real = Pattern(shape, blocksize, even.indptr, even.indices)  # valid: sorted, unique, in range
        assert (even.nnzb, even.density, even.nnz) == (real.nnzb, real.density, real.nnz)
        if real.block_rows:
            assert np.ptp(even.row_counts) <= 1
