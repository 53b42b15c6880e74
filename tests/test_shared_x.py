"""Weights that share X, gates of a pair, X that the kernel quantises, and one plan of each way to multiply."""

import numpy as np
import pytest
from support import OPERATOR_NAMES, build_plan, c_pack, check_calls, make_weight, problem_of

import bsrgen
from bsrgen.backends.c import candidates
from bsrgen.errors import ArgumentError, PatternMismatchError, UnsupportedError
from bsrgen.exam import error_share
from bsrgen.pattern import as_weight, random_weight
from bsrgen.problem import as_problem
from bsrgen.quantize import quantized
from bsrgen.stack import stacked
from bsrgen.targets import native
from bsrgen.verify import verify

TOKENS = (0, 1, 3, 35, 130)


def pair(blocksize=(16, 1), shape=(90, 83)):
    return [random_weight(seed, shape, blocksize, 0.3) for seed in (1, 2)]


@pytest.mark.parametrize(
    ("dtype", "blocksize", "operator", "step"),
    [
        ("float32", (16, 1), "linear", "geglu"), ("float32", (4, 4), "spmm", "swiglu"),
        ("bfloat16", (4, 4), "linear", "swiglu"), ("bfloat16", (32, 1), "spmm", "geglu"),
        ("int8", (32, 1), "linear", "swiglu"), ("int8", (1, 1), "spmm", "geglu"),
    ],
)  # fmt: skip
def test_pairs(dtype, operator, blocksize, step, rng):
    weights = pair(blocksize)
    options = {"x_dtype": "float32", "quantize_x": True} if dtype == "int8" else {}
    kernel = bsrgen.compile(weights, operator, dtype=dtype, epilogue=(step, "bias"), **options)
    assert kernel.shape[0] == kernel.problem.gate_rows + 90
    weight = as_weight(stacked(weights), dtype=None if dtype == "int8" else dtype)
    if dtype == "int8":
        weight, scale = quantized(weight)
    for n in TOKENS:
        x, given = kernel.problem.sample(rng, n)
        bound = given | ({"w_scale": scale} if dtype == "int8" else {})
        expected, allowed = kernel.problem.reference(weight, x, bound)
        given.pop("w_scale", None)
        ys = [kernel(x, threads=threads, **given) for threads in (1, 3)]
        assert ys[0].shape == expected.shape
        assert ys[0].tobytes() == ys[1].tobytes()
        assert error_share(ys[0], expected, allowed) <= 1


@pytest.mark.parametrize(("M", "blocksize"), [(99, (256, 2)), (2, (256, 4)), (70, (96, 1))])
def test_a_pair_of_rows_that_blocks_outgrow(M, blocksize, rng):
    """The gate is padded to whole blocks, and finer blocks that cover them are fewer for the other weight."""
    weights = pair(blocksize, (M, 3000))
    kernel = bsrgen.compile(weights, epilogue="swiglu", n=256)
    x = rng.standard_normal((256, 3000), dtype=np.float32)
    expected, allowed = kernel.problem.reference(as_weight(stacked(weights)), x, {})
    ys = [kernel(x, threads=threads) for threads in (1, 2, 3, 4)]
    assert error_share(ys[0], expected, allowed) <= 1
    assert len({y.tobytes() for y in ys}) == 1


def test_a_pair_is_what_it_says(rng):
    gate, up = pair()
    x = rng.standard_normal((7, 83), dtype=np.float32)
    y = bsrgen.compile([gate, up], epilogue="swiglu")(x)
    g, u = (x.astype(np.float64) @ w.todense().T for w in (gate, up))
    np.testing.assert_allclose(y, g / (1 + np.exp(-g)) * u, atol=2e-6)


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_several_weights_make_several_results(operator, tmp_path, rng):
    weights = [random_weight(seed, (rows, 83), (16, 1), 0.3) for seed, rows in enumerate((64, 32, 40))]
    kernel = bsrgen.compile(weights, operator, epilogue="bias", bias=np.arange(136, dtype=np.float32))
    x = rng.standard_normal((5, 83) if operator == "linear" else (83, 5), dtype=np.float32)
    for k in (kernel, bsrgen.load(kernel.save(tmp_path / "k"))):
        at = 0
        for y, w in zip(k(x), weights, strict=True):
            bias, W = np.arange(at, at := at + w.pattern.M), w.todense().astype(np.float64)
            expected = x @ W.T + bias if operator == "linear" else W @ x + bias[:, None]
            np.testing.assert_allclose(y, expected, atol=1e-4)
    assert all(finding.ok for finding in verify(tmp_path / "k")[1])
    kernel.update([weights[0], weights[1], random_weight(2, (40, 83), (16, 1), 0.3)])


def test_update_minds_the_parts(rng):
    a, b = pair((4, 1), (8, 12))
    kernel = bsrgen.compile([a, b])
    whole = stacked([a, b]).todense()
    with pytest.raises(PatternMismatchError, match=r"weights of \(4, 12\) rows, the kernel's have \(8, 8\)"):
        kernel.update([whole[:4], whole[4:]])
    with pytest.raises(ArgumentError, match="two weights of one shape"):
        bsrgen.compile([a, b], epilogue="swiglu").update([whole[:4], whole[4:]])
    kernel.update([a, b])


def test_a_list_of_one_makes_a_tuple_of_one(rng, tmp_path):
    weight, x = pair()[0], rng.standard_normal((5, 83), dtype=np.float32)
    kernel = bsrgen.compile([weight])
    kernel.save(tmp_path / "k")
    for k in (kernel, bsrgen.load(tmp_path / "k")):
        assert [y.shape for y in k(x)] == [(5, 90)]
        assert isinstance(k(x), tuple)
    assert bsrgen.compile(weight)(x).shape == (5, 90)


def test_weights_that_do_not_go_together():
    w = random_weight(0, (40, 83), (16, 1), 0.3)
    other = random_weight(0, (40, 80), (16, 1), 0.3)
    for W, options in (
        ([w, w], {}), ([w, other], {}), ([], {}), ([w], {"epilogue": "swiglu"}), (w, {"epilogue": "swiglu"}),
        ([w, random_weight(0, (48, 83), (16, 1), 0.3)], {"epilogue": "geglu"}),
        ([w, w], {"epilogue": ("bias", "swiglu")}),
    ):  # fmt: skip
        with pytest.raises(ArgumentError):
            bsrgen.compile(W, **options)


# ── X that the kernel quantises ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("blocksize", "operator", "x_dtype"),
    [((32, 1), "linear", "float32"), ((4, 4), "spmm", "bfloat16"), ((1, 3), "linear", "bfloat16")],
)
def test_quantize_x(blocksize, operator, x_dtype, rng):
    weight, scale = quantized(make_weight("uniform", (70, 83), blocksize, "float32"))
    kernel = bsrgen.compile(
        weight, operator, dtype="int8", x_dtype=x_dtype, quantize_x=True, epilogue="relu", w_scale=scale
    )
    problem = kernel.problem
    for n in TOKENS:
        x, _ = problem.sample(rng, n)
        expected, allowed = problem.reference(weight, x, {"w_scale": scale})
        assert error_share(kernel(x), expected, allowed) <= 1


def test_a_token_of_zeros_or_nan_stays_alone(rng):
    weight = random_weight(0, (32, 40), (16, 1), 0.5)
    kernel = bsrgen.compile(weight, dtype="int8", x_dtype="float32", quantize_x=True)
    x = rng.standard_normal((4, 40), dtype=np.float32)
    clean = kernel(x)
    x[1], x[2, 7] = 0, np.nan
    y = kernel(x)
    assert (y[1] == 0).all()
    assert np.isnan(y[2]).all()
    assert np.array_equal(y[[0, 3]], clean[[0, 3]])


@pytest.mark.parametrize("size", [1e-30, 1e-36, 3e-37])
def test_quantised_tokens_of_tiny_numbers(size, rng):
    """Against float64 itself: the reference repeats the kernel's operations."""
    W = rng.standard_normal((32, 400)).astype(np.float32)
    x = (rng.standard_normal((3, 400)) * size).astype(np.float32)
    y = bsrgen.compile(W, blocksize=(16, 1), dtype="int8", x_dtype="float32", quantize_x=True)(x)
    expected = x.astype(np.float64) @ W.T
    assert np.abs(y - expected).max() < 0.05 * np.abs(expected).max()


def test_quantize_x_needs_int8_and_floating_x():
    weight = random_weight(0, (32, 40), (16, 1), 0.5)
    for options in ({}, {"dtype": "int8"}, {"dtype": "bfloat16"}):
        with pytest.raises(UnsupportedError, match="quantize_x"):
            bsrgen.compile(weight, quantize_x=True, **options)


# ── one plan of each way to multiply ─────────────────────────────────────────────────────────────────────────────────


def ways(plan):
    """What makes a plan's text different from another's."""
    tiles = (plan.tokens is not None, plan.weight is not None, plan.weight and plan.weight.k_lanes > 1)
    return plan.product.name, plan.gather, *tiles, plan.panels > 1, plan.encoding, plan.dense


@pytest.mark.isa("avx2")
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("blocksize", [(16, 3), (8, 4), (1, 1)], ids=str)
def test_every_way_to_multiply(dtype, blocksize, rng, tmp_path):
    weight = make_weight("uniform", (70, 253), blocksize, dtype)
    plans = {}
    for number, operator in enumerate(OPERATOR_NAMES):
        for plan in candidates(as_problem(operator, weight.pattern, dtype), native()):
            plans.setdefault((*ways(plan), number), plan)
    some = list(plans.values())[:: max(len(plans) // 4, 1)]
    for number, plan in enumerate(some):
        (folder := tmp_path / str(number)).mkdir()
        kernel = build_plan(plan, weight, folder)
        problem = problem_of(weight, plan.problem.operator.name)
        check_calls(kernel, problem, weight, rng, (1, 17, 67))
        np.testing.assert_array_equal(c_pack(kernel)(weight.data, 0), plan.packing.pack(weight.data, plan.corrections))
