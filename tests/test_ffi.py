"""The artifact as a function of TVM FFI, and by it in JAX: values, shapes, and errors that cross as exceptions."""

import numpy as np
import pytest
from support import assert_right, problem_of

import bsrgen
from bsrgen.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from bsrgen.pattern import random_weight

tvm_ffi = pytest.importorskip("tvm_ffi", reason="apache-tvm-ffi is not installed: pip install 'bsrgen[ffi]'")
WEIGHT = random_weight(7, (37, 24), (4, 1), 0.3)
STEPS = ("bias", "clamp", "residual")


@pytest.fixture(scope="module")
def kernel():
    return bsrgen.compile(WEIGHT, epilogue=STEPS, n=8)


def of(kernel):
    return getattr(tvm_ffi.load_module(str(kernel.artifact.library)), kernel.name)


def on(*arrays):
    """Arrays as TVM FFI takes them."""
    return tuple(tvm_ffi.from_dlpack(a) if isinstance(a, np.ndarray) else a for a in arrays)


def test_the_artifacts_own_values(kernel, rng):
    call, problem = of(kernel), problem_of(WEIGHT, epilogue=STEPS)
    for shape in ((9,), (2, 3), (1,), (0,)):
        x = rng.standard_normal((*shape, 24), np.float32)
        b, r = rng.standard_normal(37, np.float32), rng.standard_normal((*shape, 37), np.float32)
        y = np.full((*shape, 37), np.nan, np.float32)
        call(*on(x, b, -1.0, np.float32([2.5]), r, y))  # scalars as numbers or as arrays of one
        np.testing.assert_array_equal(y, kernel(x, bias=b, lo=-1.0, hi=2.5, residual=r))
        if len(shape) == 1:
            assert_right(problem, WEIGHT, y, x, {"bias": b, "lo": -1.0, "hi": 2.5, "residual": r})
        once = y.copy()
        call(*on(x, b, -1.0, 2.5, r, y, 2))  # threads
        np.testing.assert_array_equal(y, once)
        call(*on(x, b, None, None, r, y))
        np.testing.assert_array_equal(y, kernel(x, bias=b, residual=r))


def test_rows_further_apart(kernel, rng):
    x, r = rng.standard_normal((6, 30), np.float32), rng.standard_normal((6, 50), np.float32)
    outer = np.full((6, 41), np.nan, np.float32)
    b = np.zeros(37, np.float32)
    of(kernel)(*on(x[:, 2:26], b, None, None, r[:, 13:], outer[:, 1:38]))
    np.testing.assert_array_equal(outer[:, 1:38], kernel(x[:, 2:26], bias=b, residual=r[:, 13:]))
    assert np.isnan(np.delete(outer, slice(1, 38), axis=1)).all()


def test_errors_are_exceptions_and_nothing_is_written(kernel):
    x, b, r, y = (np.ones(shape, np.float32) for shape in ((5, 24), (37,), (5, 37), (5, 37)))
    double, flat = np.ones((5, 24)), np.ones(60 * 24, np.float32)
    inside = np.ndarray((5, 37), np.float32, flat, offset=8)
    for args, error, words in (
        ((x, b, 0, 0, r), ValueError, "takes x, its operands, y"),
        ((np.ones((5, 23), np.float32), b, 0, 0, r, y), ValueError, "x has a last axis that is not 24"),
        ((double, b, 0, 0, r, y), TypeError, "x has another dtype than float32"),
        ((x, b[:36], 0, 0, r, y), ValueError, "bias has another number of elements than 37"),
        ((x, b, "no", 0, r, y), TypeError, "lo is not an array"),
        ((x, b, 0, 0, r[:4], y), ValueError, "residual has another number of tokens than 5"),
        ((x, b, 0, 0, r, y[:4]), ValueError, "y has another number of tokens than 5"),
        ((np.ones((24, 5), np.float32).T, b, 0, 0, r, y), ValueError, "x does not lie row by row"),
        ((flat[: 5 * 24].reshape(5, 24), b, 0, 0, r, inside), ValueError, "y overlaps x"),
        ((x, b, 0, 0, r, y, -1), ValueError, "threads is not a number"),
    ):
        with pytest.raises(error, match=words):
            of(kernel)(*on(*args))
    assert all((array == 1).all() for array in (y, flat))


def test_other_types_and_operators(rng):
    """spmm, float64, and bfloat16, which crosses as DLPack's own type."""
    import ml_dtypes

    k = bsrgen.compile(WEIGHT, operator="spmm", dtype="float64", n=8)
    x, y = rng.standard_normal((24, 5)), np.empty((37, 5))
    of(k)(*on(x, y))
    np.testing.assert_array_equal(y, k(x))
    torch = pytest.importorskip("torch", reason="torch is not installed, whose tensors may be bfloat16")
    k = bsrgen.compile(WEIGHT, dtype="bfloat16", n=8)
    x, y = torch.randn(5, 24, dtype=torch.bfloat16), torch.empty(5, 37, dtype=torch.bfloat16)
    of(k)(x, y)
    x, y = (array.view(torch.int16).numpy().view(ml_dtypes.bfloat16) for array in (x, y))
    np.testing.assert_array_equal(y, k(x))


@pytest.fixture
def bj():
    pytest.importorskip("jax", reason="jax is not installed: pip install 'bsrgen[jax]'")
    pytest.importorskip("jax_tvm_ffi", reason="jax-tvm-ffi is not installed: pip install 'bsrgen[jax]'")
    import bsrgen.integrations.jax as module

    return module


def test_jit_and_vmap(bj, kernel, rng):
    import jax

    f = jax.jit(bj.function(kernel))
    x = rng.standard_normal((3, 4, 24), np.float32)
    b, r = rng.standard_normal(37, np.float32), rng.standard_normal((3, 4, 37), np.float32)
    expected = kernel(x, bias=b, residual=r, hi=1.5)
    np.testing.assert_array_equal(f(x, bias=b, residual=r, hi=1.5), expected)
    over = jax.jit(jax.vmap(lambda x, r: f(x, bias=b, residual=r, hi=1.5)))
    np.testing.assert_array_equal(over(x, r), expected)
    assert str(jax.make_jaxpr(over)(x, r)).count("ffi_call[") == 1
    one = jax.vmap(lambda x: f(x, bias=b, residual=r[0], hi=1.5))(x)  # a residual that all share
    np.testing.assert_array_equal(one, kernel(x, bias=b, residual=np.broadcast_to(r[0], r.shape), hi=1.5))
    biases = rng.standard_normal((3, 37), np.float32)
    own = jax.vmap(lambda x, b: f(x, bias=b, residual=r[0]))(x, biases)
    np.testing.assert_array_equal(own[2], kernel(x[2], bias=biases[2], residual=r[0]))


def test_gradient(bj, rng):
    import jax

    b, x = rng.standard_normal(37, np.float32), rng.standard_normal((5, 24), np.float32)
    k, t = bsrgen.compile(WEIGHT, epilogue="bias", n=8, bias=b), bsrgen.compile(WEIGHT, transposed=True, n=8)
    f, W = bj.function(k, gradient=t), WEIGHT.todense()
    dx = jax.jit(jax.grad(lambda x: (f(x) ** 2).sum()))(x)
    np.testing.assert_allclose(dx, 2 * (x @ W.T + b) @ W, rtol=1e-4, atol=1e-4)
    db = jax.grad(lambda b: (f(x, bias=b) ** 2).sum())(b)
    np.testing.assert_allclose(db, 2 * (x @ W.T + b).sum(0), rtol=1e-4, atol=1e-4)


def test_what_jax_is_refused(bj, kernel):
    f = bj.function(kernel)
    b, r = np.zeros(37, np.float32), np.zeros((2, 37), np.float32)
    with pytest.raises(ArgumentError, match=r"takes \[..., K\] with K = 24"):
        f(np.zeros((2, 23), np.float32), bias=b, residual=r)
    with pytest.raises(ArgumentTypeError, match="takes float32"):
        f(np.zeros((2, 24), np.int8), bias=b, residual=r)
    with pytest.raises(ArgumentTypeError, match="missing operand 'bias'"):
        f(np.zeros((2, 24), np.float32), residual=r)
    with pytest.raises(Exception, match="residual has another number of tokens than 2"):  # the artifact's own words
        np.asarray(f(np.zeros((2, 24), np.float32), bias=b, residual=r[:1]))
    with pytest.raises(UnsupportedError, match="static CPU kernels"):
        bj.function(bsrgen.compile(WEIGHT, operator="sddmm"))
    with pytest.raises(UnsupportedError, match="without epilogue or with a bias"):
        bj.function(kernel, gradient=kernel)
