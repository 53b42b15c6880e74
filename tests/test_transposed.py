"""W.T: of patterns, of weights, and of kernels whose values come as W's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from support import OPERATOR_NAMES, assert_right, make_weight, problem_of

import bsrgen
from bsrgen.pattern import Weight, random_weight
from bsrgen.verify import verify


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 6), st.integers(1, 6), st.sampled_from([0, 0.1, 0.6, 1]))
@settings(max_examples=60, deadline=None)
def test_a_weight_is_transposed_element_by_element(M, K, R, C, density):
    weight = random_weight(3, (M, K), (R, C), density)
    turned = weight.T
    np.testing.assert_array_equal(turned.todense(), weight.todense().T)
    assert turned.pattern.blocksize == (C, R)
    assert (turned.T.pattern, turned.T.digest) == (weight.pattern, weight.digest)
    pattern, order = weight.pattern.transpose()
    assert pattern == turned.pattern
    np.testing.assert_array_equal(turned.data, weight.data[order].transpose(0, 2, 1))


def refreshed(weight: Weight, seed: int) -> Weight:
    data = np.random.default_rng(seed).uniform(0.5, 2, weight.data.shape).astype(weight.data.dtype)
    return Weight(weight.pattern, np.where(weight.data == 0, weight.data, data))


@pytest.mark.parametrize(
    ("operator", "kind", "shape", "blocksize", "dtype"),
    [
        ("linear", "uniform", (37, 44), (4, 3), "float32"),  # both sides odd
        ("spmm", "powerlaw", (64, 33), (32, 1), "float64"),
        ("linear", "empty", (20, 12), (4, 4), "float32"),
        ("spmm", "full", (20, 12), (1, 1), "float32"),
        ("linear", "one", (33, 34), (16, 16), "bfloat16"),
    ],
)
def test_the_kernel_of_w_transposed_takes_w(operator, kind, shape, blocksize, dtype, rng, tmp_path):
    weight = make_weight(kind, shape, blocksize, dtype)
    kernel = bsrgen.compile(weight, operator, dtype=dtype, transposed=True)
    assert kernel.transposed
    assert kernel.shape == shape[::-1]
    problem = problem_of(weight.T, operator)
    for n in (1, 35):
        x, _ = problem.sample(rng, n)
        assert_right(problem, weight.T, kernel(x), x)
    new = refreshed(weight, 5)
    kernel.update((new.data, new.pattern.indices, new.pattern.indptr))
    y = kernel(x)
    assert_right(problem, new.T, y, x)
    kernel.update(new.todense())
    np.testing.assert_array_equal(kernel(x), y)
    loaded = bsrgen.load(kernel.save(tmp_path / "w"))
    np.testing.assert_array_equal(loaded(x), y)
    loaded.update(new)
    np.testing.assert_array_equal(loaded(x), y)
    assert all(finding.ok for finding in verify(tmp_path / "w")[1])


def test_weights_that_share_x_are_one_product_with_their_gradients(rng):
    weights = [random_weight(seed, (rows, 24), (4, 4), 0.4) for seed, rows in ((1, 16), (2, 8))]
    kernel = bsrgen.compile(weights, transposed=True)
    new = [refreshed(weight, 7) for weight in weights]
    kernel.update(new)
    dy = rng.standard_normal((5, 24)).astype(np.float32)
    np.testing.assert_allclose(kernel(dy), dy[:, :16] @ new[0].todense() + dy[:, 16:] @ new[1].todense(), rtol=1e-4)


def test_int8_has_scales_for_the_outputs_of_w_transposed(rng):
    W = sparse.bsr_array(random_weight(1, (24, 36), (4, 4), 0.5).todense(), blocksize=(4, 4))
    kernel = bsrgen.compile(W, dtype="int8", transposed=True)
    x = rng.integers(-127, 127, (9, 24), np.int8)
    scale = np.abs(W.toarray()).max(axis=0) / 127
    scale[scale == 0] = 1
    expected = x.astype(np.float64) @ np.rint(W.toarray() / scale) * scale
    np.testing.assert_allclose(kernel(x), expected, rtol=1e-5, atol=1e-4)
    kernel.update(W * 2)
    np.testing.assert_allclose(kernel(x), 2 * expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_what_does_not_fit_says_so(operator):
    weight = random_weight(1, (37, 44), (4, 3), 0.4)
    kernel = bsrgen.compile(weight, operator, transposed=True)
    with pytest.raises(bsrgen.PatternMismatchError, match="shape"):
        kernel.update(weight.T)
    for options in ({"mode": "dynamic"}, {"mode": "pit", "axis": "tokens"}):
        with pytest.raises(bsrgen.UnsupportedError, match=r"transposed=True with .* do not go together"):
            bsrgen.compile(weight, operator, transposed=True, **options)
    with pytest.raises(bsrgen.UnsupportedError, match="swiglu"):
        bsrgen.compile([weight, weight], operator, epilogue="swiglu", transposed=True)
