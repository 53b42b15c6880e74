"""The smoke test: a kernel from a weight, called, updated, saved and loaded, in a few seconds."""

import numpy as np
import pytest
from scipy import sparse

import bsrgen


@pytest.fixture
def W(rng: np.random.Generator) -> sparse.bsr_array:
    blocks = rng.standard_normal((5, 4, 3)).astype(np.float32)
    return sparse.bsr_array((blocks, [0, 3, 1, 2, 3], [0, 2, 2, 5]), shape=(12, 12))


@pytest.mark.parametrize("n", [0, 1, 2, 5, 17, 33])
def test_linear_with_bias_and_relu(W, rng, n):
    k = bsrgen.compile(W, epilogue=("bias", "relu"))
    x, bias = rng.standard_normal((n, 12)).astype(np.float32), rng.standard_normal(12).astype(np.float32)
    np.testing.assert_allclose(k(x, bias=bias), np.maximum(x @ W.toarray().T + bias, 0), rtol=1e-5, atol=1e-5)


def test_spmm_new_values_save_and_load(W, rng, tmp_path):
    k = bsrgen.compile(W, "spmm", dtype="float64")
    x = rng.standard_normal((12, 7))
    np.testing.assert_allclose(k(x), W @ x, rtol=1e-14, atol=1e-14)
    k.update(2 * W)
    np.testing.assert_array_equal(bsrgen.load(k.save(tmp_path / "artifact"))(x), k(x))
    np.testing.assert_allclose(k(x), 2 * (W @ x), rtol=1e-14, atol=1e-14)


def test_errors_are_typed(W):
    k = bsrgen.compile(W, epilogue=("bias", "relu"))
    with pytest.raises(bsrgen.ArgumentError, match=r"x has shape \(2, 11\), expected \[\.\.\., 12\]"):
        k(np.zeros((2, 11), np.float32), bias=np.zeros(12, np.float32))
    with pytest.raises(TypeError, match="operand 'bias' is missing"):
        k(np.zeros((2, 12), np.float32))
    with pytest.raises(bsrgen.PatternMismatchError, match=r"block \(0, 0\) was stored and is absent now"):
        k.update(sparse.bsr_array((12, 12), blocksize=(4, 3), dtype=np.float32))
