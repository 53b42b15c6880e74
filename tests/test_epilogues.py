"""Epilogues: each row alone, every ordered pair, their operands and defaults, special values, what aliases out."""

import itertools
import math

import numpy as np
import pytest
from support import DTYPE_NAMES, OPERATOR_NAMES, assert_right, check_calls, framed, make_weight, problem_of

import bsrgen
from bsrgen.epilogues import EPILOGUES, as_epilogues
from bsrgen.pattern import Weight, as_weight

NAMES = tuple(EPILOGUES)
ACTIVATIONS = tuple(name for name, row in EPILOGUES.items() if not row.operands)
TOKENS = (0, 1, 3, 17, 40)
PAIRINGS = tuple(zip(OPERATOR_NAMES, DTYPE_NAMES, strict=True))
LENGTH = 8


def all_pairs() -> list[str]:
    """The names in an order in which each follows each, itself too: a de Bruijn sequence, from its Lyndon words."""
    words = [[a, *itertools.chain(*((a, b) for b in NAMES[i + 1 :]))] for i, a in enumerate(NAMES)]
    return [*itertools.chain(*words), NAMES[0]]


SEQUENCES = [tuple(all_pairs()[at : at + LENGTH]) for at in range(0, len(NAMES) ** 2, LENGTH - 1)]


def weight_for(operator: str, dtype: str) -> Weight:
    """Rows in partial vectors, in the padding of the last block, and without a block."""
    return make_weight("powerlaw", (37, 22), (16, 1) if operator == "linear" else (3, 4), dtype)


def test_the_sequences_hold_every_ordered_pair():
    pairs = {pair for steps in SEQUENCES for pair in itertools.pairwise(steps)}
    assert pairs == set(itertools.product(NAMES, NAMES))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ACTIVATIONS])
@pytest.mark.parametrize(("operator", "dtype"), PAIRINGS)
def test_alone(name, operator, dtype, rng):
    weight = weight_for(operator, dtype)
    kernel = bsrgen.compile(weight, operator, dtype=dtype, epilogue=name)
    check_calls(kernel, problem_of(weight, operator, name), weight, rng, TOKENS)


@pytest.mark.parametrize("steps", SEQUENCES, ids="-".join)
def test_every_ordered_pair(steps, rng):
    at = SEQUENCES.index(steps)  # spmm prints its epilogue once for each register of sums and compiles for long
    operator, dtype = OPERATOR_NAMES[at % 3 == 2], DTYPE_NAMES[at % 2]
    weight = weight_for(operator, dtype)
    problem = problem_of(weight, operator, steps)
    kernel = bsrgen.compile(weight, operator, dtype=dtype, epilogue=steps)
    for n in TOKENS:
        x, given = problem.sample(rng, n)
        old = rng.standard_normal(problem.operator.shape(n, 37)).astype(dtype)
        assert_right(problem, weight, kernel(x, out=old.copy(), **given), x, given, old)
    check_calls(kernel, problem, weight, rng, (5,))


@pytest.mark.parametrize(
    ("name", "operator", "dtype"),
    [*((name, "linear", dtype) for name in ACTIVATIONS for dtype in DTYPE_NAMES), ("gelu", "spmm", "float32")],
)
def test_activation_over_the_whole_range(name, operator, dtype, rng):
    """W = I, so that v is x: tiny, ordinary and huge numbers, Inf and NaN, against the formula in float64."""
    weight = as_weight(np.eye(45), blocksize=(1, 1), dtype=dtype)
    problem = problem_of(weight, operator, name)
    kernel = bsrgen.compile(weight, operator, dtype=dtype, epilogue=name)
    check_calls(kernel, problem, weight, rng, TOKENS)
    top = float(np.finfo(dtype).max)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, top, -top, 1e30, -1e30, 1e-30, -1e-30, 1e-6, -1e-6])
    spread = np.concatenate([special, np.linspace(-120, 120, 1901), np.linspace(-2, 2, 901), rng.normal(0, 800, 200)])
    rows = -(-spread.size // 45)
    x = np.resize(spread, (rows, 45)).astype(dtype)
    x = x if operator == "linear" else np.ascontiguousarray(x.T)
    assert_right(problem, weight, kernel(x), x)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_activations_at_infinity(dtype):
    """Limits, by hand: nothing in common with the formulas of the table."""
    weight = as_weight(np.eye(5), blocksize=(1, 1), dtype=dtype)
    x = np.array([np.inf, -np.inf, np.nan, 0.0, 1.0], dtype)
    expected = {
        "relu": (np.inf, 0, 0, 1),
        "sigmoid": (1, 0, 0.5, 1 / (1 + math.exp(-1))),
        "tanh": (1, -1, 0, math.tanh(1)),
    }
    for name, (top, bottom, zero, one) in expected.items():
        y = bsrgen.compile(weight, dtype=dtype, epilogue=name, strict=True)(x)
        np.testing.assert_allclose(y, [top, bottom, np.nan, zero, one], rtol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_repeated_steps_number_their_operands(operator, rng):
    steps = ("bias", "relu", "bias", "scale", "residual", "residual", "clamp", "clamp", "bias")
    names = [o.name for o in problem_of(make_weight("full", (9, 6), (3, 2), "float32"), operator, steps).operands]
    assert names == ["bias", "bias2", "scale", "residual", "residual2", "lo", "hi", "lo2", "hi2", "bias3"]
    weight = make_weight("full", (9, 6), (3, 2), "float32")
    problem, kernel = problem_of(weight, operator, steps), bsrgen.compile(weight, operator, epilogue=steps)
    for n in (1, 20):
        x, given = problem.sample(rng, n)
        given |= {"lo": -1.0, "hi": 2.0, "lo2": -0.5, "hi2": 1.5}
        assert_right(problem, weight, kernel(x, **given), x, given)


# ── scalars ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("operator", "dtype"), PAIRINGS)
def test_accumulate(operator, dtype, rng):
    weight = weight_for(operator, dtype)
    problem = problem_of(weight, operator, "accumulate")
    kernel = bsrgen.compile(weight, operator, dtype=dtype, epilogue="accumulate")
    for n in (1, 2, 19, 64):
        x, _ = problem.sample(rng, n)
        old = rng.standard_normal(problem.operator.shape(n, 37)).astype(dtype)
        for given in (
            {},
            {"alpha": 0.5},
            {"beta": -2},
            {"alpha": np.float32(3), "beta": np.array(0.25)},
            {"alpha": 0.0},
        ):
            out = old.copy()
            assert kernel(x, out, **given) is out
            assert_right(problem, weight, out, x, given, old)
        np.testing.assert_array_equal(kernel(x), kernel(x, np.zeros_like(old)))  # no out: the old content is 0
        nan = np.full_like(old, np.nan)
        assert_right(problem, weight, kernel(x, nan, alpha=2.0, beta=0.0), x, {"alpha": 2.0, "beta": 0.0}, old)
        assert np.isnan(kernel(x, np.full_like(old, np.nan))).all()


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_clamp_defaults_to_no_limits(operator, rng):
    weight = weight_for(operator, "float32")
    problem = problem_of(weight, operator, "clamp")
    kernel = bsrgen.compile(weight, operator, epilogue=("clamp",))
    x, _ = problem.sample(rng, 21)
    np.testing.assert_array_equal(kernel(x), bsrgen.compile(weight, operator)(x))
    for given in ({"lo": 0}, {"hi": 0.25}, {"lo": -0.5, "hi": 0.5}, {"lo": 1.0, "hi": -1.0}, {"lo": np.inf}):
        assert_right(problem, weight, kernel(x, **given), x, given)


def test_operands_given_to_compile_are_defaults(rng, tmp_path):
    """Converted to the kernel's dtype like W, overridden by the call, kept by save."""
    weight = weight_for("linear", "float32")
    bias, scale, x = rng.standard_normal(37), rng.standard_normal(37), rng.standard_normal((4, 22)).astype(np.float32)
    steps = ("scale", "bias", "clamp")
    bound = bsrgen.compile(weight, epilogue=steps, bias=bias, scale=scale.astype(np.float32), hi=0.75)
    free = bsrgen.compile(weight, epilogue=steps)
    given = {"bias": bias.astype(np.float32), "scale": scale.astype(np.float32), "hi": 0.75}
    expected = free(x, **given)
    for kernel in (bound, bsrgen.load(bound.save(tmp_path / "k"))):
        np.testing.assert_array_equal(kernel(x), expected)
        other = given | {"bias": np.zeros(37, np.float32)}
        np.testing.assert_array_equal(kernel(x, bias=other["bias"]), free(x, **other))
    bias[:] = np.nan  # a copy was taken
    np.testing.assert_array_equal(bound(x), expected)


@pytest.mark.parametrize(
    ("epilogue", "given", "error"),
    [
        ("bias", {"bias": np.zeros(36)}, bsrgen.ArgumentError),
        ("bias", {"bias": np.zeros((1, 37))}, bsrgen.ArgumentError),
        ("bias", {"bias": np.zeros(37, complex)}, bsrgen.ArgumentTypeError),
        ("bias", {"bias": ["x"] * 37}, bsrgen.ArgumentTypeError),
        ("bias", {"scale": np.zeros(37)}, bsrgen.ArgumentTypeError),
        ("clamp", {"lo": [1.0, 2.0]}, bsrgen.ArgumentError),
        ("clamp", {"lo": "1"}, bsrgen.ArgumentTypeError),
        ("residual", {"residual": np.zeros((1, 37))}, bsrgen.ArgumentError),
        ((), {"bias": np.zeros(37)}, bsrgen.ArgumentTypeError),
    ],
)
def test_wrong_operands_of_compile_are_refused_before_a_build(epilogue, given, error, monkeypatch):
    monkeypatch.setattr("bsrgen.build.build", lambda *_: pytest.fail("built"))
    with pytest.raises(error):
        bsrgen.compile(weight_for("linear", "float64"), epilogue=epilogue, **given)


# ── aliases ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("operator", "dtype"), PAIRINGS)
def test_residual_may_be_out(operator, dtype, rng):
    weight = weight_for(operator, dtype)
    problem = problem_of(weight, operator, ("relu", "residual"))
    kernel = bsrgen.compile(weight, operator, dtype=dtype, epilogue=("relu", "residual"))
    for n in (1, 2, 18, 70):
        x, given = problem.sample(rng, n)
        expected = kernel(x, **given)
        assert_right(problem, weight, expected, x, given)
        for residual in (given["residual"].copy(), framed(given["residual"])):
            assert kernel(x, residual=residual, out=residual) is residual
            np.testing.assert_array_equal(residual, expected)


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_operands_that_overlap_out_by_part_are_read_before_it_is_written(operator, rng):
    weight = make_weight("full", (24, 24), (4, 4), "float32")
    problem = problem_of(weight, operator, ("bias", "residual"))
    kernel = bsrgen.compile(weight, operator, epilogue=("bias", "residual"))
    n, memory = 24, rng.standard_normal(2000).astype(np.float32)
    for x_at, out_at, bias_at, residual_at in [(0, 100, 300, 120), (0, 0, 1000, 1), (600, 0, 30, 576), (0, 24, 24, 25)]:
        m = memory.copy()
        x, out, residual = (m[at : at + 24 * n].reshape(24, n) for at in (x_at, out_at, residual_at))
        bias = m[bias_at : bias_at + 24]
        given = {"bias": bias.copy(), "residual": residual.copy()}
        before = x.copy()
        kernel(x, out=out, bias=bias, residual=residual)
        assert_right(problem, weight, out, before, given)
        untouched = np.ones(m.size, bool)
        untouched[out_at : out_at + 24 * n] = False
        np.testing.assert_array_equal(m[untouched], memory[untouched])


def test_residual_of_a_batch_and_of_a_vector(rng):
    weight = weight_for("linear", "float32")
    problem = problem_of(weight, "linear", ("residual",))
    kernel = bsrgen.compile(weight, epilogue="residual")
    x, given = problem.sample(rng, 12)
    r = given["residual"]
    y = kernel(x, residual=r)
    np.testing.assert_array_equal(kernel(x.reshape(3, 4, 22), residual=r.reshape(3, 4, 37)), y.reshape(3, 4, 37))
    np.testing.assert_array_equal(kernel(x[5], residual=r[5]), kernel(x[5:6], residual=r[5:6])[0])
    for wrong in (r[:3], r.reshape(3, 4, 37), r.T, r[0]):
        with pytest.raises(bsrgen.ArgumentError, match="residual has shape"):
            kernel(x, residual=wrong)


def test_as_epilogues_is_what_compile_takes(rng):
    weight = weight_for("linear", "float32")
    assert bsrgen.compile(weight, epilogue="relu").problem.epilogue == as_epilogues(("relu",))
    assert bsrgen.compile(weight, epilogue=["bias", "relu"]).problem.epilogue == as_epilogues(("bias", "relu"))
