"""Kernels of a pattern without values: gradients of weights, and block-sparse attention."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPE_NAMES, LEVELS, framed, make_weight

import bsrgen
from bsrgen import attention
from bsrgen.attention import attention_blocks, causal, global_, sliding_window
from bsrgen.pattern import Weight, as_weight, random_weight
from bsrgen.pattern_kernel import PatternKernel
from bsrgen.verify import verify

PRODUCTS = ("sddmm", "linear_grad")


def assert_within(y, expected, bound):
    assert y.shape == expected.shape
    error = np.abs(np.asarray(y, np.float64) - expected)
    assert (error <= bound).all(), f"{(error > bound).sum()} of {y.size} results, worst {(error / bound).max():.3g}"


def check(kernel: PatternKernel, rng, tokens, scale=None):
    for n in tokens:
        arrays = kernel.problem.sample(rng, n)
        y = kernel(*arrays, scale=scale)
        assert_within(y, *kernel.problem.reference(arrays, 1.0 if scale is None else scale))
        out = np.full_like(y, np.nan)
        assert kernel(*[framed(a) for a in arrays], out=out, scale=scale) is out
        np.testing.assert_array_equal(out, y)


@pytest.mark.parametrize(
    ("operator", "kind", "shape", "blocksize", "dtype"),
    [
        ("sddmm", "uniform", (70, 50), (3, 5), "float32"),  # nothing is a multiple of anything
        ("linear_grad", "uniform", (70, 50), (3, 5), "float64"),
        ("sddmm", "powerlaw", (50, 60), (1, 1), "float32"),  # rows of A in registers
        ("linear_grad", "banded", (64, 66), (16, 16), "float32"),  # tiles of whole blocks
        ("linear_grad", "uniform", (70, 100), (32, 1), "bfloat16"),  # lanes along rows, pairs of tokens
        ("linear_grad", "uniform", (70, 100), (32, 1), "float32"),  # the same, x read where it lies
        ("linear_grad", "powerlaw", (70, 50), (16, 3), "bfloat16"),  # columns of several blocks in a tile
        ("linear_grad", "uniform", (70, 50), (16, 16), "bfloat16"),  # lanes along columns, pairs of tokens
        ("sddmm", "uniform", (64, 64), (4, 4), "bfloat16"),  # pairs
        ("sddmm", "one", (33, 64), (1, 32), "float16"),
        ("sddmm", "empty", (20, 12), (4, 4), "float32"),
        ("linear_grad", "full", (20, 12), (2, 8), "float32"),
        ("sddmm", "uniform", (60, 48), (20, 16), "float32"),  # tiles of more rows than lanes
        ("linear_grad", "uniform", (48, 32), (16, 8), "float64"),
    ],
)
def test_products_match_numpy(operator, kind, shape, blocksize, dtype, rng):
    weight = make_weight(kind, shape, blocksize, "float32")
    kernel = bsrgen.compile(weight, operator, dtype=dtype)
    assert isinstance(kernel, PatternKernel)
    check(kernel, rng, (0, 1, 33, 300))


def test_the_result_is_the_gradient_of_the_weight(rng):
    """dW of sum(dY * Y), from linear and from spmm, in the order and the padding of the weight's data."""
    weight = random_weight(1, (37, 44), (4, 3), 0.4)
    x, dy = rng.standard_normal((19, 44)), rng.standard_normal((19, 37))
    dense = as_weight(dy.T @ x, blocksize=(4, 3), dtype="float64")
    at = np.searchsorted(
        dense.pattern.rows * 15 + dense.pattern.indices, weight.pattern.rows * 15 + weight.pattern.indices
    )
    for operator, arrays in (("linear_grad", (dy, x)), ("sddmm", (dy.T, x.T))):
        kernel = bsrgen.compile(weight, operator, dtype="float64")
        np.testing.assert_allclose(kernel(*arrays), dense.data[at], atol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("operator", PRODUCTS)
def test_every_level(operator, level, rng):
    dtype = DTYPE_NAMES[PRODUCTS.index(operator)]
    kernel = bsrgen.compile(random_weight(1, (21, 30), (4, 3), 0.5), operator, dtype=dtype, target=level)
    assert kernel.plan.target == level
    check(kernel, rng, (1, 130))


@given(st.lists(st.booleans(), min_size=30, max_size=30))
@settings(max_examples=3, deadline=None)
def test_any_mask_of_blocks(stored):
    mask = np.array(stored).reshape(5, 6)
    pattern = as_weight(np.kron(mask, np.ones((2, 3), np.float32)), blocksize=(2, 3)).pattern
    kernel = bsrgen.compile(pattern, "sddmm")
    arrays = kernel.problem.sample(np.random.default_rng(0), 7)
    assert_within(kernel(*arrays), *kernel.problem.reference(arrays))


@pytest.mark.parametrize(
    ("operator", "blocksize"), [("sddmm", (4, 4)), ("linear_grad", (16, 16)), ("linear_grad", (32, 1))]
)
def test_epilogues(operator, blocksize, rng, tmp_path):
    weight = random_weight(1, (37, 44), blocksize, 0.4)
    kernel = bsrgen.compile(weight, operator, epilogue=("scale", "accumulate"))
    rows = rng.uniform(0.5, 2, 37).astype(np.float32)
    for n in (20, 600):
        a, b = kernel.problem.sample(rng, n)
        old = rng.standard_normal(weight.data.shape).astype(np.float32)
        for scale in (np.float32(0.125), rows):
            expected, bound = kernel.problem.reference((a, b), scale)
            plain = kernel(a, b, scale=scale, beta=0, out=np.full_like(old, np.nan))
            assert_within(plain, expected, bound)
            y = kernel(a, b, scale=scale, alpha=2, beta=-0.5, out=old.copy())
            assert_within(y, 2 * expected - 0.5 * old, 3 * bound + 1e-6)
    for wrong in (None, 10**400, "1"):
        with pytest.raises(bsrgen.ArgumentTypeError, match="beta must be one real number"):
            kernel(a, b, scale=1.0, beta=wrong)
    shared = np.concatenate([rows, old.reshape(-1)])
    y = kernel(a, b, scale=shared[:37], beta=0, out=shared[:-37].reshape(old.shape))  # scale lies within out
    np.testing.assert_array_equal(y, plain)
    loaded = bsrgen.load(kernel.save(tmp_path / "k"))
    np.testing.assert_array_equal(loaded(a, b, scale=rows, beta=0, out=old), plain)
    assert all(finding.ok for finding in verify(tmp_path / "k")[1])
    assert operator in str(loaded)
    assert "tile" in loaded.source


def test_threads_share_nonzeros_and_give_equal_bits(rng):
    kernel = bsrgen.compile(random_weight(1, (512, 256), (8, 8), 0.3, kind="powerlaw"), "linear_grad")
    arrays = kernel.problem.sample(rng, 1000)
    one = kernel(*arrays, threads=1)
    for threads in (2, 3, 7):
        np.testing.assert_array_equal(kernel(*arrays, threads=threads), one)
    assert_within(one, *kernel.problem.reference(arrays))


def test_what_makes_no_sense_is_refused(rng):
    weight = random_weight(1, (8, 8), (4, 4), 0.5)
    for arguments, error, says in (
        ({"dtype": "int8"}, bsrgen.UnsupportedError, "int8"),
        ({"dtype": "bfloat16", "out_dtype": "bfloat16"}, bsrgen.UnsupportedError, "writes float32"),
        ({"epilogue": "relu"}, bsrgen.UnsupportedError, "takes scale, accumulate"),
        ({"epilogue": ("accumulate", "scale")}, bsrgen.UnsupportedError, "before"),
        ({"backend": "mlir"}, bsrgen.UnsupportedError, "it is of c, cuda"),
        ({"transposed": True}, bsrgen.UnsupportedError, "transposed=True: the two do not go together"),
        ({"mode": "dynamic"}, bsrgen.UnsupportedError, "mode='dynamic'"),
        ({"mode": "pit", "axis": "tokens"}, bsrgen.UnsupportedError, "axis='tokens'"),
        ({"mask_block": (1, 8)}, bsrgen.UnsupportedError, "mask_block"),
        ({"max_blocks": 0}, bsrgen.UnsupportedError, "max_blocks=0"),
        ({"tune": "measure", "tune_seconds": 1}, bsrgen.UnsupportedError, "tune='measure'"),
        ({"tune_seconds": 1}, bsrgen.ArgumentError, "only tune='measure'"),
        ({"progress": print}, bsrgen.UnsupportedError, "progress"),
        ({"scale": 1.0}, bsrgen.ArgumentTypeError, "with the call"),
    ):
        with pytest.raises(error, match=says):
            bsrgen.compile(weight, "sddmm", **arguments)
    kernel = bsrgen.compile(weight, "sddmm")
    a = np.ones((8, 5), np.float32)
    for call, error, says in (
        (lambda: kernel(a), bsrgen.ArgumentTypeError, "takes a, b"),
        (lambda: kernel(a, a[:, :4]), bsrgen.ArgumentError, r"b has shape \(8, 4\), expected \[8, 5\]"),
        (lambda: kernel(a, a.astype(np.float64)), bsrgen.ArgumentTypeError, "float64"),
        (lambda: kernel(a, a, scale=2.0), bsrgen.ArgumentTypeError, "unexpected operand 'scale'"),
        (lambda: kernel(a, a, out=np.empty((1, 4, 4), np.float32)), bsrgen.ArgumentError, "out has shape"),
        (lambda: kernel(a, a, threads=0), bsrgen.ArgumentError, "threads"),
        (lambda: kernel.update(weight), bsrgen.UnsupportedError, "no values"),
        (lambda: kernel @ a, bsrgen.ArgumentTypeError, "in a call"),
    ):
        with pytest.raises(error, match=says):
            call()


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────────

RULES = (
    causal(),
    sliding_window(5),
    global_(2),
    causal() & sliding_window(9),
    causal() & sliding_window(4) | global_(1),
)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("sizes", "blocksize"), [((37, 37), (8, 16)), ((5, 70), (16, 16)), ((0, 3), (4, 16))])
def test_blocks_and_masks_hold_what_the_rule_allows(rule, sizes, blocksize):
    pattern, mask = attention_blocks(rule, *sizes, blocksize)
    np.testing.assert_array_equal(mask.dense(pattern), rule.dense(*sizes))
    assert len({bits.tobytes() for bits in mask.bits}) == len(mask.bits)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_any_mask_of_elements(data):
    q, k = (data.draw(st.integers(0, 20)) for _ in range(2))
    dense = np.array(data.draw(st.lists(st.booleans(), min_size=q * k, max_size=q * k)), bool).reshape(q, k)
    for rule in (dense, np.zeros((q, k), bool), np.ones((q, k), bool)):
        pattern, mask = attention_blocks(rule, q, k, (3, 16))
        np.testing.assert_array_equal(mask.dense(pattern), rule)


@pytest.mark.parametrize(
    ("tokens", "head", "rule", "blocksize", "dtype"),
    [
        (200, 64, causal() & sliding_window(50), (64, 64), "float32"),
        ((77, 130), 33, sliding_window(20) | global_(3), (24, 48), "float32"),  # a head of no whole vectors
        (100, 40, causal(), (32, 16), "float64"),
        (60, 48, np.random.default_rng(1).random((60, 60)) < 0.1, (16, 32), "bfloat16"),
        (20, 16, np.zeros((20, 20), bool), (16, 16), "float32"),
        (20, 16, np.ones((20, 20), bool), (16, 16), "float32"),
    ],
    ids=["window", "global", "float64", "bfloat16", "none", "all"],
)
def test_attention_matches_dense_masked_attention(tokens, head, rule, blocksize, dtype, rng, tmp_path):
    kernel = attention.compile(tokens, head, rule, blocksize=blocksize, dtype=dtype)
    arrays = kernel.problem.sample(rng, 3)
    for scale in (None, 0.3):
        y = kernel(*arrays, scale=scale)
        assert_within(y, *kernel.problem.reference(arrays, scale or head**-0.5))
        np.testing.assert_array_equal(kernel(*arrays, scale=scale, threads=2), y)
    sizes = tokens if isinstance(tokens, tuple) else (tokens, tokens)
    allowed = rule if isinstance(rule, np.ndarray) else rule.dense(*sizes)
    assert not y[:, ~allowed.any(axis=1)].any()
    two = [a.reshape(1, 3, *a.shape[1:]) for a in arrays]
    np.testing.assert_array_equal(kernel(*two, scale=0.3), y[None])
    loaded = bsrgen.load(kernel.save(tmp_path / "k"))
    np.testing.assert_array_equal(loaded(*arrays, scale=0.3), y)
    assert all(finding.ok for finding in verify(tmp_path / "k")[1])


@pytest.mark.parametrize(
    ("kind", "shape", "blocksize", "dtype"),
    [("uniform", (50, 70), (3, 5), "float64"), ("powerlaw", (33, 40), (1, 1), "float32")],
)
def test_softmax_of_stored_elements(kind, shape, blocksize, dtype, rng):
    kernel = bsrgen.compile(make_weight(kind, shape, blocksize, "float32"), "softmax", dtype=dtype)
    arrays = kernel.problem.sample(rng, 3)
    assert_within(kernel(*arrays, scale=0.5), *kernel.problem.reference(arrays, 0.5))
    assert kernel(arrays[0][:0]).shape == (0, *arrays[0].shape[1:])


def test_scores_softmax_and_product_are_attention(rng, tmp_path):
    rule = causal() & sliding_window(9) | global_(2)
    softmax = attention.compile_softmax(100, rule, blocksize=(16, 32))
    q, k, v = (rng.standard_normal((100, 24)).astype(np.float32) for _ in range(3))
    scores = bsrgen.compile(softmax.pattern, "sddmm", epilogue="scale")(q, k, scale=24**-0.5)
    p = softmax(scores)
    arrays = [scores[None]]
    assert_within(p[None], *softmax.problem.reference(arrays))
    spmm = bsrgen.compile(Weight(softmax.pattern, p), "spmm")
    whole = attention.compile(100, 24, rule, blocksize=(16, 32))
    np.testing.assert_allclose(spmm(v), whole(q, k, v), rtol=1e-4, atol=1e-5)
    assert all(finding.ok for finding in verify(softmax.save(tmp_path / "k"))[1])


def test_large_scores_do_not_overflow():
    kernel = attention.compile(200, 64, causal() & sliding_window(50))
    q = np.full((1, 200, 64), 300, np.float32)
    v = np.random.default_rng(0).standard_normal((1, 200, 64)).astype(np.float32)
    y = kernel(q, q, v)
    np.testing.assert_allclose(y[0, 0], v[0, 0], rtol=1e-6)
    np.testing.assert_allclose(y[0, 9], v[0, :10].mean(axis=0), rtol=1e-4, atol=1e-6)


def test_attention_says_what_is_wrong():
    for arguments, error, says in (
        ((20, 16, causal(), {"blocksize": (16, 8)}), bsrgen.UnsupportedError, "multiples of 16"),
        ((20, 0, causal(), {}), bsrgen.ArgumentError, "head=0"),
        ((20, 16, np.ones((20, 21), bool), {}), bsrgen.ArgumentError, r"bool\[20, 20\]"),
        ((20, 16, causal(), {"dtype": "int8"}), bsrgen.UnsupportedError, "int8"),
        ((20.5, 16, causal(), {}), bsrgen.ArgumentTypeError, "tokens"),
        ((20, 16, causal(), {"blocksize": 64}), bsrgen.ArgumentTypeError, "blocksize must be a pair"),
        ((20, 16, causal(), {"blocksize": (64,) * 3}), bsrgen.ArgumentError, "got 3 of them"),
    ):
        with pytest.raises(error, match=says):
            attention.compile(*arguments[:3], **arguments[3])
    with pytest.raises(bsrgen.ArgumentError, match="size=0"):
        sliding_window(0)
    with pytest.raises(TypeError, match="unsupported operand"):
        causal() & "window"
    kernel = attention.compile(20, 16, np.ones((20, 20), bool), blocksize=(16, 16))
    q = np.ones((2, 20, 16), np.float32)
    with pytest.raises(bsrgen.ArgumentError, match="v has shape"):
        kernel(q, q, q[:1])
