"""Quantisation of weights: the formula by hand, hostile values, scales that are given."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import sparse

from bsrgen.dtypes import DTYPES
from bsrgen.errors import ArgumentTypeError, PatternError
from bsrgen.pattern import Weight, as_weight, random_weight
from bsrgen.quantize import LEAST_SCALE, quantized, source_of

INT8 = DTYPES["int8"]


def dense(rows, blocksize=(1, 1), dtype=None) -> Weight:
    return as_weight(np.array(rows), blocksize=blocksize, dtype=dtype)


def test_by_hand():
    """One row of each kind: max 127 steps, ties to even, zeros, and a row that is absent."""
    weight = dense([[127.0, -63.5, 0.5, 1.5], [0.0, 0.0, 2.0, -1.0], [0.0] * 4, [2.5, 2.5, -127, 0]], (1, 2))
    w, scale = quantized(weight)
    assert (w.data.dtype, scale.dtype) == (np.int8, np.float32)
    np.testing.assert_array_equal(scale, np.array([1, 2 / 127, 1, 1], np.float32))
    np.testing.assert_array_equal(
        w.todense(), [[127, -64, 0, 2], [0, 0, 127, -64], [0] * 4, [2, 2, -127, 0]]
    )  # -63.5 and 2.5 are ties; -1 / (2 / 127) is -63.5 too, and float32(2 / 127) is less than that
    assert w.pattern is weight.pattern


REALS = st.floats(-(2.0**100), 2.0**100, width=32)


@settings(max_examples=200, deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(1, 7), st.integers(1, 9)), elements=REALS))
def test_error_is_half_a_step(W):
    """|W - w_scale w| <= w_scale / 2, w uses the whole range, and integers come back from their products."""
    weight = as_weight(W, blocksize=(2, 3))
    w, scale = quantized(weight)
    assert ((scale >= LEAST_SCALE) & np.isfinite(scale)).all()
    back = scale.astype(np.float64)[:, None] * w.todense()
    assert (np.abs(back - W) <= 0.5 * scale[:, None] * (1 + 1e-5)).all()
    top = np.abs(W).max(axis=1)
    full = np.abs(w.todense().astype(int)).max(axis=1)
    assert (full[top > 127 * LEAST_SCALE] == 127).all()
    again, same = quantized(Weight(w.pattern, scale[np.minimum(rows_of(w), len(scale) - 1)] * w.data), scale)
    np.testing.assert_array_equal(again.data, w.data)
    assert same is scale


def rows_of(weight: Weight):
    """The row of each stored element."""
    p = weight.pattern
    return (p.rows[:, None] * p.R + np.arange(p.R))[:, :, None]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_every_floating_type_is_quantised_from_its_own_values(dtype):
    weight = random_weight(0, (19, 23), (4, 3), 0.5, dtype=dtype)
    w, scale = quantized(weight)
    W = weight.todense().astype(np.float64)
    expected = np.abs(W).max(axis=1) / 127
    np.testing.assert_array_equal(scale, np.where(expected > 0, expected, 1).astype(np.float32))
    np.testing.assert_array_equal(w.todense(), np.rint(W / scale.astype(np.float64)[:, None]))


def test_tiny_rows():
    """Where max / 127 is no normal float32 the step is the smallest normal: nothing divides by zero."""
    W = np.array([[1e-44, 0], [127 * LEAST_SCALE, LEAST_SCALE], [1e-300, -1e-300], [5e-324, 0]])
    w, scale = quantized(dense(W))
    np.testing.assert_array_equal(scale[:3], np.float32(LEAST_SCALE))
    np.testing.assert_array_equal(w.todense(), [[0, 0], [127, 1], [0, 0], [0, 0]])
    assert np.isfinite(scale).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scale", [None, np.ones(6, np.float32)])
def test_values_that_are_not_finite(value, scale):
    W = np.ones((6, 4), np.float32)
    W[4, 3] = value
    with pytest.raises(PatternError, match=r"value (nan|-?inf) in block 5 cannot be quantised"):
        quantized(as_weight(W, blocksize=(2, 2)), scale)


def test_rows_beyond_float32():
    with pytest.raises(PatternError, match=r"row 1 has a scale of .* overflows float32"):
        quantized(dense([[1.0], [1e42]], dtype="float64"))
    _, scale = quantized(dense([[1.0], [1e40]], dtype="float64"))
    assert np.isfinite(scale).all()


def test_given_scales_clip():
    scale = np.array([0.5, 1e-3], np.float32)
    w, same = quantized(dense([[100.0, -100.0, 3.25], [1.0, -1e30, 0.0]]), scale)
    np.testing.assert_array_equal(w.todense(), [[127, -127, 6], [127, -127, 0]])
    assert same is scale


# ── integers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_integers_are_taken_as_they_are():
    weight = random_weight(1, (9, 8), (2, 2), 0.5, dtype="int8")
    assert quantized(weight)[0] is weight
    np.testing.assert_array_equal(quantized(weight)[1], np.ones(9, np.float32))
    scale = np.full(9, 0.25, np.float32)
    assert quantized(weight, scale)[1] is scale


@pytest.mark.parametrize("dtype", ["b", "h", "i", "q", "B", "Q", ">i2"])
def test_any_integers_are_a_source(dtype):
    W = np.array([[0, 127], [5, 0]], dtype)
    triple = W.reshape(4, 1, 1), [0, 1, 0, 1], [0, 2, 4]
    for source in (
        source_of(W, INT8, blocksize=(1, 1)),
        source_of(triple, INT8, shape=(2, 2)),
        source_of(sparse.csr_array(W.astype(W.dtype.newbyteorder("="))), INT8, otherwise=(2, 1)),
    ):
        assert source.data.dtype == np.int8
        np.testing.assert_array_equal(source.todense(), W)


@pytest.mark.parametrize(
    ("value", "dtype"), [(-128, "b"), (128, "h"), (255, "B"), (-(2**40), "q"), (2**63, "Q"), (384, "i")]
)
def test_integers_out_of_range(value, dtype):
    """Refused, -128 too, and never wrapped around: 384 is -128 in its low bits."""
    W = np.zeros((4, 4), dtype)
    W[0, 0], W[3, 2] = 1, value
    with pytest.raises(PatternError, match=rf"value {value} in block 1: .*symmetric range \[-127, 127\]"):
        quantized(source_of(W, INT8, blocksize=(2, 2)))
    with pytest.raises(PatternError):
        as_weight(W, blocksize=(2, 2), dtype="int8")


def test_duplicates_that_add_up_beyond_the_range():
    triple = np.full((2, 1, 1), 100, np.int8), [0, 0], [0, 2]
    with pytest.raises(PatternError, match="value 200 in block 0"):
        source_of(triple, INT8, shape=(1, 1))


def test_floats_are_a_source_as_they_are():
    for dtype in ("f4", "f8", "f2", ml_dtypes.bfloat16):
        W = np.eye(4).astype(dtype)
        assert source_of(W, INT8, blocksize=(2, 2)).data.dtype == W.dtype
        assert source_of(W, DTYPES["float16"], blocksize=(2, 2)).data.dtype == np.float16
    with pytest.raises(ArgumentTypeError, match=r"dtype float32; .*quantises"):
        as_weight(np.eye(4, dtype="f4"), blocksize=(2, 2), dtype="int8")


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (5, 7)])
def test_nothing_stored(shape):
    w, scale = quantized(random_weight(0, shape, (2, 3), 0.0))
    assert w.data.shape == (0, 2, 3)
    np.testing.assert_array_equal(scale, np.ones(shape[0], np.float32))


# ── other types ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_float16_that_overflows():
    with pytest.raises(PatternError, match=r"value 65520\.0 in block 0 overflows float16"):
        dense([[65520.0]], dtype="float16")
    assert dense([[65519.0]], dtype="float16").data[0, 0, 0] == 65504
    with pytest.raises(PatternError, match="overflows bfloat16"):
        dense([[3.4e38]], dtype="bfloat16")
    assert np.isinf(dense([[np.inf]], dtype="float16").data).all()  # as it came
