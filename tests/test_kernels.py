"""Kernels against the float64 reference: the table, the plan space, random problems, special values, large shapes."""

import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from support import (
    CANARY,
    DTYPE_NAMES,
    LEVELS,
    OPERATOR_NAMES,
    assert_right,
    build_plan,
    check_calls,
    framed,
    make_weight,
    problem_of,
)

import bsrgen
from bsrgen.backends.c import CPlan, candidates
from bsrgen.pattern import Weight, random_weight
from bsrgen.plan import Plan
from bsrgen.targets import TARGETS, native

TOKENS = (0, 1, 2, 5, 16, 17, 33, 130)
KINDS = ("uniform", "banded", "powerlaw", "empty", "full", "one")
BLOCKS = (
    (1, 1), (1, 16), (1, 32), (4, 1), (16, 1), (32, 1), (3, 5), (4, 4), (8, 8), (16, 16), (32, 32), (64, 64), (48, 48),
    "whole",
)  # fmt: skip


def covering(*factors: tuple, apart: tuple[int, int] | None = None) -> Iterator[tuple]:
    """Rows in which every pair of values of every two factors occurs, found greedily; not so of those `apart`."""
    rng = random.Random(0)
    open_pairs = {
        (a, u, b, v)
        for (a, us), (b, vs) in itertools.combinations(enumerate(factors), 2)
        for u, v in itertools.product(range(len(us)), range(len(vs)))
        if (a, b) != apart
    }
    rows = list(itertools.product(*(range(len(f)) for f in factors)))
    rng.shuffle(rows)
    while open_pairs:
        pairs = {row: {(a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(row)), 2)} for row in rows}
        best = max(rows, key=lambda row: len(pairs[row] & open_pairs))
        open_pairs -= pairs[best]
        yield tuple(factor[at] for factor, at in zip(factors, best, strict=True))


def shape_of(blocksize: tuple[int, int] | str) -> tuple[tuple[int, int], tuple[int, int]]:
    """An odd shape of at least two by three blocks that the blocks do not divide, and the blocksize."""
    if blocksize == "whole":
        return (37, 53), (37, 53)
    R, C = blocksize
    return (R * max(2, 41 // R) + R // 2 + 1, C * max(3, 43 // C) - C // 2), (R, C)


TABLE = [
    pytest.param(block, operator, dtype, target.values[0], kind, marks=target.marks)
    for block, operator, dtype, target, kind in covering(
        BLOCKS, OPERATOR_NAMES, DTYPE_NAMES, LEVELS, KINDS, apart=(0, 4)
    )
]


@pytest.mark.parametrize(("block", "operator", "dtype", "target", "kind"), TABLE)
def test_table(block, operator, dtype, target, kind, rng):
    shape, blocksize = shape_of(block)
    weight = make_weight(kind, shape, blocksize, dtype)
    kernel = bsrgen.compile(weight, operator, dtype=dtype, target=target)
    assert kernel.plan.target == target
    check_calls(kernel, problem_of(weight, operator), weight, rng, TOKENS)


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
@pytest.mark.parametrize("shape", [(0, 7), (7, 0), (0, 0), (1, 1)], ids=str)
def test_shapes_without_rows_or_columns(shape, operator, rng):
    weight = random_weight(0, shape, (2, 3), 1.0)
    check_calls(bsrgen.compile(weight, operator), problem_of(weight, operator), weight, rng, (0, 1, 3, 20))


def test_several_targets_in_one_library_run_the_best(rng):
    """Also: levels that share packed values and levels that do not."""
    weight = make_weight("uniform", (40, 36), (8, 3), "float32")
    names = [row.name for row in TARGETS.values() if row.family == native().family]
    kernel = bsrgen.compile(weight, target=tuple(names))
    assert kernel.plan.target == native().name
    assert {level.target for level in kernel.artifact.manifest.levels} == set(names)
    check_calls(kernel, problem_of(weight), weight, rng, TOKENS)


# ── the plan space ───────────────────────────────────────────────────────────────────────────────────────────────────

PLANNED = {
    "linear f32 16x16": ("linear", "float32", (67, 150), (16, 16), "uniform"),
    "linear f32 32x1": ("linear", "float32", (96, 300), (32, 1), "uniform"),
    "linear f32 1x16": ("linear", "float32", (33, 230), (1, 16), "powerlaw"),
    "linear f64 3x5": ("linear", "float64", (50, 261), (3, 5), "banded"),
    "linear f64 24x2": ("linear", "float64", (100, 77), (24, 2), "uniform"),
    "spmm f32 4x4": ("spmm", "float32", (61, 301), (4, 4), "powerlaw"),
    "spmm f32 20x3": ("spmm", "float32", (61, 100), (20, 3), "uniform"),
    "spmm f64 1x1": ("spmm", "float64", (30, 211), (1, 1), "uniform"),
    "spmm f32 small": ("spmm", "float32", (12, 10), (2, 2), "uniform"),
    "linear f32 small": ("linear", "float32", (32, 13), (16, 1), "uniform"),
}
PLANS_EACH = int(os.environ.get("BSRGEN_TEST_PLANS", "3"))


def kind_of(plan: CPlan) -> tuple:
    """What makes two plans run different code."""
    t, w = plan.tokens, plan.weight
    tiles = (t and (t.pack, t.rows == 1, plan.single), w and (w.k_lanes, w.vectors > 1, w.chunk > 1))
    return plan.target.name, plan.encoding, plan.panels > 1, len(plan.groups) > 1, plan.cover is not None, *tiles


def sample_plans(operator: str, dtype: str, shape, blocksize, kind: str, count: int) -> list[Plan]:
    """`count` plans, as unlike one another as the plan space has them."""
    problem = problem_of(make_weight(kind, shape, blocksize, dtype), operator)
    rng = random.Random(f"{problem}")
    plans = [plan for level in LEVELS for plan in candidates(problem, TARGETS[level.values[0]])]
    rng.shuffle(plans)
    turns = []  # the first of each kind, then the second of each kind, ...
    for i, plan in enumerate(plans):
        turns.append(sum(kind_of(other) == kind_of(plan) for other in plans[:i]))
    return [plans[i] for i in sorted(range(len(plans)), key=turns.__getitem__)][:count]


def planned() -> Iterator[pytest.ParameterSet]:
    for name, (operator, dtype, shape, blocksize, kind) in PLANNED.items():
        for i, plan in enumerate(sample_plans(operator, dtype, shape, blocksize, kind, PLANS_EACH)):
            mark = pytest.mark.isa(plan.target.name)
            yield pytest.param(name, plan, marks=mark, id=f"{name}-{i}-{plan.target.name}")


@pytest.mark.parametrize(("name", "plan"), list(planned()))
def test_plan_space(name, plan, rng, tmp_path):
    operator, dtype, shape, blocksize, kind = PLANNED[name]
    weight = make_weight(kind, shape, blocksize, dtype)
    kernel = build_plan(plan, weight, tmp_path)
    check_calls(kernel, problem_of(weight, operator), weight, rng, (0, 1, 3, 8, 15, 33, 64, 130))
    other = Weight(weight.pattern, weight.data * rng.standard_normal(weight.data.shape).astype(dtype))
    kernel.update(other)
    check_calls(kernel, problem_of(weight, operator), other, rng, (1, 33))


# ── random problems ──────────────────────────────────────────────────────────────────────────────────────────────────

# 4 combinations x 5 problems x 16 calls = 320 examples; BSRGEN_TEST_PROBLEMS=157 for the 10,000 of a long night
PROBLEMS = int(os.environ.get("BSRGEN_TEST_PROBLEMS", "5"))
CALLS = 16


@st.composite
def weights(draw, dtype: str) -> Weight:
    R, C = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    shape = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    density = draw(st.floats(0, 1))
    kind = draw(st.sampled_from(("uniform", "banded", "powerlaw")))
    weight = random_weight(draw(st.integers(0, 99)), shape, (R, C), density, kind=kind, dtype=dtype)
    return Weight(weight.pattern, weight.data * weight.data.dtype.type(2.0 ** draw(st.sampled_from((0, -50, 50)))))


@st.composite
def calls(draw) -> tuple[int, tuple[int, int], tuple[int, int], int, str]:
    """N, the frames of x and of out (extra columns), threads, and how x is cut off from its values."""
    edges = st.tuples(st.integers(0, 3), st.integers(0, 17))
    hard = st.sampled_from(("plain", "cancelling", "sparse", "wide"))
    return draw(st.integers(0, 140)), draw(edges), draw(edges), draw(st.integers(1, 4)), draw(hard)


def spoil(x, how: str, rng):
    """x made hard to sum: neighbours that cancel, many zeros, 1e-15 .. 1e15 side by side."""
    if how == "cancelling" and x.size:
        x.reshape(-1)[1::2] = -x.reshape(-1)[: x.size - 1 : 2] if x.size > 1 else x.reshape(-1)[1::2]
    if how == "sparse":
        x[rng.random(x.shape) < 0.7] = 0
    if how == "wide":
        x *= (10.0 ** rng.uniform(-15, 15, x.shape)).astype(x.dtype)
    return x


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_random_problems(operator, dtype):
    examples = 0

    @settings(
        max_examples=PROBLEMS, deadline=None, derandomize="BSRGEN_TEST_PROBLEMS" not in os.environ, database=None,
        phases=(Phase.explicit, Phase.generate),  # no shrinking: every step would compile
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(weights(dtype), st.lists(calls(), min_size=CALLS, max_size=CALLS))
    def run(weight, drawn):
        nonlocal examples
        problem, rng = problem_of(weight, operator), np.random.default_rng(0)
        note(f"{problem}, pattern\n{weight.pattern.picture()}")
        kernel = bsrgen.compile(weight, operator, dtype=dtype)
        for n, x_frame, out_frame, threads, how in drawn:
            x, _ = problem.sample(rng, n)
            x = framed(spoil(x, how, rng), x_frame, x_frame[::-1])
            out = framed(np.zeros(problem.operator.shape(n, weight.pattern.M), dtype), out_frame, out_frame)
            assert_right(problem, weight, kernel(x, out=out, threads=threads), x)
            assert np.isnan(out.base).sum() == out.base.size - out.size
            examples += 1

    run()
    assert examples >= PROBLEMS * CALLS


# ── Inf and NaN ──────────────────────────────────────────────────────────────────────────────────────────────────────

SPECIAL = [
    pytest.param(*row[:3], row[3].values[0], marks=row[3].marks)
    for row in covering(OPERATOR_NAMES, DTYPE_NAMES, ((3, 5), (16, 3), (4, 8), (1, 16)), LEVELS)
]


@pytest.mark.parametrize(("operator", "dtype", "blocksize", "target"), SPECIAL)
def test_inf_and_nan_in_X_and_behind_it(operator, dtype, blocksize, target, rng):
    """What lies behind a row of X does not leak in, where K is no multiple of C; inside, SciPy's rule holds for strict
    kernels: an absent block contributes nothing, a stored zero times NaN is NaN.  The reference follows it."""
    (R, C), bads = blocksize, (np.nan, np.inf, -np.inf)
    weight = random_weight(2, (4 * R + 1, 5 * C - C // 2), blocksize, 0.6, dtype=dtype)
    assert (weight.pattern.indices == 4).any()
    data = weight.data.copy()
    data[::2, : R // 2 + 1] = 0
    weight = Weight(weight.pattern, data)
    problem, kernel = (
        problem_of(weight, operator),
        bsrgen.compile(weight, operator, dtype=dtype, target=target, strict=True),
    )
    for n, bad in itertools.product((1, 3, 16, 50), bads):
        x, _ = problem.sample(rng, n)
        for after in ((0, 1), (1, 16), (3, 40)):
            assert_right(problem, weight, kernel(framed(x, (1, 2), after, fill=bad)), x)
        for k in rng.choice(weight.pattern.K, 4, replace=False):
            spoilt = x.copy()
            spoilt[(slice(None), k) if operator == "linear" else (k, slice(None))] = bad
            assert_right(problem, weight, kernel(spoilt), spoilt)


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_a_token_with_nan_spoils_no_other_token(operator, rng):
    weight = make_weight("full", (34, 40), (4, 4), "float32")
    problem, kernel = problem_of(weight, operator), bsrgen.compile(weight, operator)
    for n in (2, 17, 65):
        x, _ = problem.sample(rng, n)
        for token in (0, n // 2, n - 1):
            bad = x.copy()
            bad[(token, slice(None)) if operator == "linear" else (slice(None), token)] = np.nan
            y = kernel(bad)
            if operator == "spmm":
                y = y.T
            assert np.isnan(y[token]).all()
            assert np.isfinite(np.delete(y, token, axis=0)).all()


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 3e38), ("float64", 1.5e308), ("float32", 4.2e-45), ("float64", 1.5e-323)]
)
def test_extreme_weights_compile_and_are_right(dtype, size, operator, rng):
    """The check in `compile` must not take an overflow or an underflow that any kernel has for a bug of this one."""
    weight = make_weight("full", (9, 8), (2, 4), dtype)
    weight = Weight(weight.pattern, (np.sign(weight.data) * size).astype(dtype))
    kernel = bsrgen.compile(weight, operator, dtype=dtype, target="x86-64" if native().family == "x86_64" else "native")
    x = np.zeros(kernel.problem.operator.shape(5, 8), dtype)
    x[(slice(None), 3) if operator == "linear" else (3, slice(None))] = 1
    y = kernel(x)
    np.testing.assert_array_equal(y if operator == "linear" else y.T, np.tile(weight.todense()[:, 3], (5, 1)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_a_weight_with_nan_and_inf_compiles_without_a_warning(operator, rng):
    dense = rng.standard_normal((9, 8)).astype(np.float32)
    dense[1, 2], dense[5, 7] = np.nan, np.inf
    kernel = bsrgen.compile(dense, operator, blocksize=(3, 2))
    y = kernel(np.ones(8, np.float32))
    assert np.isnan(y[1])
    assert y[5] == np.inf
    assert np.isfinite(np.delete(y, [1, 5])).all()


# ── sizes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("dtype", "K"), [("float32", 1024), ("float64", 512)])
@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_rows_of_X_4096_bytes_apart(operator, dtype, K, rng):
    """Rows of X in one L1 set are copied apart first: right with and without a leading dimension."""
    weight = random_weight(4, (70, K), (32, 1), 0.1, dtype=dtype)
    kernel = bsrgen.compile(weight, operator, dtype=dtype)
    check_calls(kernel, problem_of(weight, operator), weight, rng, (1, 2, 5, 33, 130))


@pytest.mark.parametrize(
    ("operator", "dtype", "blocksize", "panels"),
    [("linear", "float32", (1, 1), 1), ("spmm", "float64", (1, 1), 1), ("linear", "float32", (2, 3), 4)],
)
def test_few_tokens_in_shorter_vectors(operator, dtype, blocksize, panels, rng, tmp_path):
    """Also single tokens of single elements, which have a way of their own; empty rows, the same bits by threads."""
    weight = random_weight(3, (203, 149), blocksize, 0.06, dtype=dtype, kind="powerlaw")
    problem = replace(problem_of(weight, operator), n=3)
    plan = next(plan for plan in candidates(problem, native()) if plan.short_lanes and plan.cover is None)
    if panels > 1:
        plan = replace(plan, tokens=replace(plan.tokens, k_panel=blocksize[1] * -(-149 // panels // blocksize[1])))
    assert (plan.panels > 1) == (panels > 1)
    assert plan.single == (blocksize == (1, 1))
    kernel = build_plan(plan, weight, tmp_path)
    check_calls(kernel, problem, weight, rng, (1, 2, 8, 9))
    for n in (1, 7):
        x, given = problem.sample(rng, n)
        np.testing.assert_array_equal(kernel(x, threads=2, **given), kernel(x, threads=1, **given))


def placed(values, ld, offset_bytes, fill=CANARY):
    """A copy of `values` with leading dimension `ld`, so many bytes behind a page's start, `fill` around it."""
    rows, cols = values.shape
    room = np.full((rows + 1) * ld + 4096, fill, values.dtype)
    start = (-room.ctypes.data % 4096 + offset_bytes) // values.itemsize
    view = room[start : start + rows * ld].reshape(rows, ld)[:, :cols]
    view[...] = values
    return view, room


@pytest.mark.parametrize(
    ("dtype", "M", "blocksize"),
    [("float32", 1024, (12, 2)), ("float32", 1024, (1, 1)), ("bfloat16", 2048, (16, 2))],
)
def test_rows_of_Y_4096_bytes_apart(dtype, M, blocksize, rng):
    """Where lines of Y are written in parts, results wait on a stage: the same bits, and nothing else is written."""
    weight = random_weight(4, (M, 96), blocksize, 0.1, dtype=dtype)
    kernel = bsrgen.compile(weight, dtype=dtype)
    assert "struct stage" in kernel.source
    problem = problem_of(weight)
    for n in (9, 67):
        x, given = problem.sample(rng, n)
        plain = kernel(x)
        assert_right(problem, weight, plain, x, given)
        for ld, offset in ((M, 16), (2 * M, 0), (2 * M, 48), (M + 8, 16)):
            out, room = placed(np.zeros_like(plain), ld, offset)
            assert kernel(x, out=out, threads=2) is out
            np.testing.assert_array_equal(out, plain)
            out[...] = CANARY
            assert (room == room.dtype.type(CANARY)).all()


def test_vectors_of_X_in_two_lines(rng):
    """spmm reads X as it lies, or packs it where vectors would lie in two lines: the same bits."""
    weight = random_weight(4, (512, 512), (1, 1), 1 / 32)
    kernel = bsrgen.compile(weight, "spmm")
    assert "lie in two lines" in kernel.source
    x, given = problem_of(weight, "spmm").sample(rng, 144)
    plain = kernel(placed(x, 144, 0)[0])
    assert_right(problem_of(weight, "spmm"), weight, plain, x, given)
    for ld, offset in ((144, 16), (150, 0)):
        np.testing.assert_array_equal(kernel(placed(x, ld, offset, np.nan)[0]), plain)


@pytest.mark.parametrize(
    ("operator", "blocksize"), [("linear", (32, 1)), ("linear", (4, 4)), ("spmm", (16, 16)), ("spmm", (1, 32))]
)
def test_1024_by_1024(operator, blocksize, rng):
    weight = random_weight(5, (1024, 1024), blocksize, 0.1, kind="powerlaw")
    kernel = bsrgen.compile(weight, operator)
    check_calls(kernel, problem_of(weight, operator), weight, rng, (1, 67, 256))


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_more_features_than_sixteen_bits_count(operator, rng):
    """Offsets of 32 bits: K > 65,536, blocks in the last columns."""
    weight = random_weight(6, (20, 66_000), (4, 3), 0.02)
    assert weight.pattern.indices.max() * 3 > 65_600
    kernel = bsrgen.compile(weight, operator)
    check_calls(kernel, problem_of(weight, operator), weight, rng, (1, 18))


def test_many_rows_and_few_blocks_are_never_printed_as_code():
    """A function for each of many empty block rows took gcc a minute: code has a budget of rows too."""
    weight = random_weight(0, (20_000, 64), (1, 1), 2 / (20_000 * 64))
    kernel = bsrgen.compile(weight)
    assert len(kernel.source) < 60_000
    x = np.ones((3, 64), np.float32)
    np.testing.assert_allclose(kernel(x), x @ weight.todense().T, rtol=1e-6)
