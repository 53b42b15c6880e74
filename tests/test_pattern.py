"""Pattern and Weight: every way in gives the same matrix back, every hostile way in is named or refused."""

import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from bsrgen.dtypes import DTYPES
from bsrgen.errors import ArgumentError, ArgumentTypeError, BsrgenError, PatternError
from bsrgen.pattern import Pattern, Weight, as_weight, random_weight

KINDS = ("uniform", "banded", "powerlaw")


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def triple(data=None, indices=(0, 1, 1), indptr=(0, 2, 3)):
    """A good 2 x 2 grid of 2 x 3 blocks, three of them stored, or a bad one."""
    data = np.arange(1, 19, dtype=np.float32).reshape(3, 2, 3) if data is None else data
    return data, np.asarray(indices), np.asarray(indptr)


def best_s(call, times=5):
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def dense_of(data, indices, indptr):
    """What the triple means, block by block."""
    out = np.zeros((2, 2, 2, 3), np.float64)
    for i in range(2):
        for b in range(int(indptr[i]), int(indptr[i + 1])):
            out[i, :, int(indices[b])] += np.asarray(data[b], np.float64)
    return out.reshape(4, 6)


def check(weight, dense):
    """The invariants of a Weight, and its values."""
    p = weight.pattern
    assert p.indptr.dtype == np.int64
    assert p.indices.dtype == np.int32
    assert p.shape == dense.shape
    assert (p.block_rows, p.block_cols) == (-(-p.M // p.R), -(-p.K // p.C))
    assert weight.data.shape == (p.nnzb, p.R, p.C)
    assert weight.data.flags.c_contiguous
    assert weight.data.dtype.isnative
    assert not any(a.flags.writeable for a in (weight.data, p.indptr, p.indices))
    key = p.rows * p.block_cols + p.indices
    assert (np.diff(key) > 0).all()
    np.testing.assert_array_equal(weight.todense().astype(np.float64), dense)
    padded = weight.tobsr().toarray()
    assert not padded[p.M :].any()
    assert not padded[:, p.K :].any()


# ---- round trips ---------------------------------------------------------------------------------


@st.composite
def matrices(draw):
    """(M, K) float32 with zeros, NaN, Inf and both zeros, and a block shape that need not divide it."""
    shape = draw(st.tuples(st.integers(0, 13), st.integers(0, 13)))
    blocksize = draw(st.tuples(st.integers(1, 15), st.integers(1, 15)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    W = rng.standard_normal(shape).astype(np.float32)
    W[rng.random(shape) >= draw(st.sampled_from((0.0, 0.05, 0.3, 1.0)))] = 0
    special = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)
    if draw(st.booleans()) and W.size:
        W.flat[rng.integers(0, W.size, 3)] = rng.choice(special, 3)
    return W, blocksize


def stored_cells(W, blocksize):
    (M, K), (R, C) = W.shape, blocksize
    return {(i // R, j // C) for i in range(M) for j in range(K) if W[i, j] != 0}


@settings(max_examples=150, deadline=None)
@given(matrices(), st.tuples(st.integers(1, 7), st.integers(1, 7)))
def test_dense_and_reblocked(matrix, second):
    W, blocksize = matrix
    weight = as_weight(W, blocksize=blocksize)
    check(weight, W)
    assert weight.notes == ()
    p = weight.pattern
    assert set(zip(p.rows.tolist(), p.indices.tolist(), strict=True)) == stored_cells(W, blocksize)
    check(as_weight(weight, blocksize=second), W)
    check(as_weight(weight.tobsr(), shape=W.shape, dtype=None), W)
    check(as_weight((weight.data, p.indices, p.indptr), shape=W.shape, blocksize=second), W)


@settings(max_examples=100, deadline=None)
@given(matrices(), st.sampled_from(("csr", "csc", "coo", "lil", "dok", "dia")), st.booleans())
def test_every_scipy_format(matrix, form, old_class):
    W, blocksize = matrix
    source = (sp.coo_matrix if old_class else sp.coo_array)(W).asformat(form)
    weight = as_weight(source, blocksize=blocksize)
    check(weight, W)
    p, stored = weight.pattern, source.tocoo()
    cells = set(zip((stored.row // p.R).tolist(), (stored.col // p.C).tolist(), strict=True))
    assert set(zip(p.rows.tolist(), p.indices.tolist(), strict=True)) == cells


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 9), st.integers(1, 9), st.floats(0, 1))
@pytest.mark.parametrize("kind", KINDS)
def test_random_weight(kind, M, K, R, C, density):
    weight = random_weight(1, (M, K), (R, C), density, kind=kind)
    p = weight.pattern
    assert p.nnzb == round(density * p.block_rows * p.block_cols)
    check(weight, weight.todense())
    check(as_weight(weight, blocksize=(2, 3), dtype=None), weight.todense())


def test_random_kinds(rng):
    uniform, banded, power = (random_weight(rng, (768, 768), (8, 8), 0.1, kind=kind) for kind in KINDS)
    assert uniform.pattern.density == pytest.approx(0.1, abs=1e-4)
    p = banded.pattern
    assert np.abs(p.rows - p.indices).max() <= 10
    counts = np.sort(power.pattern.row_counts)[::-1]
    assert counts[0] > 8 * counts[48] > 0
    assert (counts == 0).sum() >= 12
    variance = [np.square(w.todense()[w.todense().any(axis=1)]).sum(axis=1).mean() for w in (uniform, banded, power)]
    np.testing.assert_allclose(variance, 1, rtol=0.15)
    same = [random_weight(7, (768, 768), (8, 8), 0.1, dtype=np.float64).digest for _ in range(2)]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    "asked",
    [
        {"kind": "diagonal"},
        {"density": -0.1},
        {"density": 1.5},
        {"density": float("nan")},
        {"shape": (2**31 - 1, 2**31 - 1), "blocksize": (1, 1)},
    ],
    ids=str,
)
def test_random_refuses(asked):
    with pytest.raises(BsrgenError):
        random_weight(**({"rng": 0, "shape": (8, 8), "blocksize": (2, 2), "density": 1.0} | asked))


# ---- what comes in -------------------------------------------------------------------------------


def test_weight_comes_back_as_it_is(rng):
    weight = random_weight(rng, (10, 10), (4, 4), 0.5)
    assert as_weight(weight) is weight
    assert as_weight(weight, blocksize=(4, 4), shape=(10, 10), dtype=None) is weight
    wide = as_weight(weight, dtype=np.float64)
    assert wide.pattern is weight.pattern
    assert wide.data.dtype == np.float64
    assert as_weight(wide, dtype=None) is wide


def test_caller_keeps_his_arrays():
    data, indices, indptr = triple()
    indices, indptr = indices.astype(np.int32), indptr.astype(np.int64)
    for a in (data, indices, indptr):
        a.setflags(write=False)  # even frozen arrays may be thawed by their owner
    bsr = sp.bsr_array((data, indices, indptr))
    for W in ((data, indices, indptr), bsr):
        weight = as_weight(W, shape=(4, 6))
        p = weight.pattern
        for mine in (weight.data, p.indices, p.indptr):
            assert not any(np.shares_memory(mine, a) for a in (data, indices, indptr, bsr.indices, bsr.indptr))
    dense = np.eye(4, dtype=np.float32)
    assert not np.shares_memory(as_weight(dense, blocksize=(4, 4)).data, dense)
    thawed = weight.tobsr()
    thawed.data[:] = 0
    thawed.indices[:] = 0
    check(weight, dense_of(data, indices, indptr))


@pytest.mark.parametrize("values", ["f", "d", "e", "g", "b", "H", "q", "Q", ">f4", ">f8", ">i2", ml_dtypes.bfloat16])
@pytest.mark.parametrize("index", ["i4", "i8", "u1", "u4", "u8", ">i4", ">u8"])
def test_every_number(values, index):
    data, indices, indptr = triple()
    data = data.astype(values)
    W = data, indices.astype(index), indptr.astype(index)
    for dtype in (np.float32, np.float64, None):
        weight = as_weight(W, shape=(4, 6), dtype=dtype)
        check(weight, dense_of(data, indices, indptr))
        kept = data.dtype if data.dtype.name in DTYPES else np.dtype("float32")
        assert weight.data.dtype == (dtype or kept.newbyteorder("="))
        check(as_weight(W, shape=(4, 6), blocksize=(4, 1), dtype=dtype), dense_of(data, indices, indptr))


@pytest.mark.parametrize(
    "view",
    [
        np.asfortranarray,
        lambda a: a[::-1][::-1],
        lambda a: np.repeat(a, 2, axis=2)[:, :, ::2],
        lambda a: np.frombuffer(b"x" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape),
        lambda a: a.transpose(0, 2, 1).copy().transpose(0, 2, 1),
        lambda a: a.tolist(),
    ],
    ids=["fortran", "reversed", "strided", "misaligned", "transposed", "list"],
)
def test_every_memory_layout(view):
    data, indices, indptr = triple()
    check(as_weight((view(data), indices.tolist(), indptr.tolist()), shape=(4, 6)), dense_of(data, indices, indptr))
    dense = dense_of(data, indices, indptr)
    check(as_weight(np.asfortranarray(dense), blocksize=(3, 4)), dense)
    check(as_weight(dense[::-1, ::-1], blocksize=(3, 4)), dense[::-1, ::-1])
    check(as_weight(dense.tolist(), blocksize=(2, 2)), dense)


def test_unsorted_is_sorted_with_a_note():
    data, indices, indptr = triple(indices=(1, 0, 1))
    for W in ((data, indices, indptr), sp.bsr_array((data, indices, indptr))):
        weight = as_weight(W, shape=(4, 6))
        check(weight, dense_of(data, indices, indptr))
        assert weight.notes == ("sorted the column indices of 1 block row",)
        assert as_weight(weight, dtype=np.float64).notes == weight.notes
    csr = sp.csr_array((np.ones(4), [3, 1, 2, 0], [0, 2, 4]), shape=(2, 4))
    weight = as_weight(csr, blocksize=(2, 2))
    check(weight, csr.toarray())
    assert weight.notes == ("sorted the column indices of 2 block rows",)


def test_duplicates_are_summed_with_a_note():
    data, indices, indptr = triple(indices=(1, 1, 0))
    weight = as_weight((data, indices, indptr), shape=(4, 6))
    check(weight, dense_of(data, indices, indptr))
    assert weight.notes == ("summed 1 duplicate block",)
    assert weight.pattern.nnzb == 2
    coo = sp.coo_array((np.array([1, 2, 4, 100, 100], np.int8), ([1, 0, 1, 2, 2], [1, 0, 1, 0, 0])), shape=(3, 3))
    weight = as_weight(coo, blocksize=(2, 2))
    np.testing.assert_array_equal(weight.todense(), [[2, 0, 0], [0, 5, 0], [200, 0, 0]])
    assert weight.notes == ("summed 2 duplicate blocks",)
    csc = sp.csc_array((np.ones(3), [1, 1, 0], [0, 2, 3]), shape=(2, 2))
    np.testing.assert_array_equal(as_weight(csc, blocksize=(1, 2)).todense(), [[0, 1], [2, 0]])
    with pytest.raises(PatternError, match="duplicate blocks overflows"):
        as_weight((np.array([1e308, 1e308]), [0, 0], [0, 2]), shape=(1, 1), dtype=np.float64)


def test_stored_zeros_keep_their_block():
    data, indices, indptr = triple(data=np.zeros((3, 2, 3), np.float32))
    for blocksize, nnzb in (((2, 3), 3), ((4, 6), 1), ((1, 1), 18), ((4, 3), 2)):
        assert as_weight((data, indices, indptr), shape=(4, 6), blocksize=blocksize).pattern.nnzb == nnzb
    csr = sp.csr_array((np.zeros(2), [0, 3], [0, 1, 2]), shape=(2, 4))
    assert as_weight(csr, blocksize=(1, 2)).pattern.nnzb == 2
    assert as_weight(csr.toarray(), blocksize=(1, 2)).pattern.nnzb == 0
    nan = np.array([[0, np.nan], [0, 0]])
    check(as_weight(nan, blocksize=(1, 1)), nan)


def test_nan_and_inf_are_kept():
    data = np.full((3, 2, 3), np.nan)
    data[0], data[1] = np.inf, -np.inf
    for dtype in (np.float32, np.float64):
        np.testing.assert_array_equal(as_weight(triple(data), shape=(4, 6), dtype=dtype).data, data)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1), (5, 3)])
@pytest.mark.parametrize("blocksize", [(1, 1), (2, 2), (5, 3), (64, 64)])
def test_small_and_empty(shape, blocksize):
    for W in (np.zeros(shape), np.ones(shape)):
        check(as_weight(W, blocksize=blocksize), W)
        check(as_weight(sp.coo_array(W), blocksize=blocksize), W)
    p = as_weight(np.zeros(shape), blocksize=blocksize).pattern
    assert (p.nnzb, p.nnz, p.density) == (0, 0, 0.0)
    assert p.row_counts.tolist() == [0] * p.block_rows
    assert len(p.digest) == 64
    empty = as_weight((np.zeros((0, *blocksize)), [], np.zeros(p.block_rows + 1, int)), shape=shape)
    assert empty.pattern.digest == p.digest


# ---- padding -------------------------------------------------------------------------------------


def test_blocks_may_stick_out_of_the_shape():
    data, indices, indptr = triple()
    data[2, 1], data[:, :, 2] = 0, np.where(indices == 1, 0, 1)[:, None] * data[:, :, 2]
    whole = dense_of(data, indices, indptr)
    check(as_weight((data, indices, indptr), shape=(3, 5)), whole[:3, :5])
    check(as_weight((data, indices, indptr), shape=(3, 5), blocksize=(4, 2)), whole[:3, :5])
    bsr = sp.bsr_array((data, indices, indptr))
    check(as_weight(bsr, shape=(3, 5)), whole[:3, :5])
    for shape in ((2, 6), (4, 3), (5, 6), (4, 7)):
        with pytest.raises(ArgumentError, match="does not fit W"):
            as_weight(bsr, shape=shape)
    for value in (1.0, np.nan):
        for i, j, where in ((1, 0, "(1, 1)"), (0, 2, "(1, 1)")):
            bad = data.copy()
            bad[2, i, j] = value
            for blocksize in (None, (1, 1)):
                with pytest.raises(PatternError, match="padding must be zero") as caught:
                    as_weight((bad, indices, indptr), shape=(3, 5), blocksize=blocksize)
                assert where in str(caught.value)
                assert str(value) in str(caught.value)


def test_scipy_drops_the_last_rows_and_is_caught():
    bsr = sp.bsr_array((np.ones((2, 2, 2)), [0, 1], [0, 1, 2]), shape=(5, 4))  # scipy takes 5 // 2 block rows
    with pytest.raises(PatternError, match="indptr has 3 entries; 3 block rows"):
        as_weight(bsr)


# ---- hostile matrices ----------------------------------------------------------------------------

GOOD = np.ones((3, 2, 3), np.float32)
HOSTILE = {
    "column past the end": (triple(indices=(0, 2, 1)), r"indices\[1\] is column 2 in block row 0; there are 2"),
    "column negative": (triple(indices=(0, 1, -1)), r"indices\[2\] is column -1 in block row 1"),
    "column huge": (triple(indices=np.array([0, 1, 2**63], np.uint64)), "9223372036854775808"),
    "indptr falls": ((GOOD, [0, 1, 1], [0, 3, 1, 3]), "indptr falls from 3 to 1 at block row 1"),
    "indptr short": (triple(indptr=(0, 3)), "indptr has 2 entries; 2 block rows"),
    "indptr long": (triple(indptr=(0, 2, 3, 3)), "indptr has 4 entries"),
    "indptr empty": (triple(indptr=()), "indptr has 0 entries"),
    "indptr starts late": (triple(indptr=(1, 2, 3)), "indptr runs from 1 to 3; it must run from 0 to 3"),
    "indptr negative": (triple(indptr=(-1, 2, 3)), "indptr runs from -1 to 3"),
    "indptr ends early": (triple(indptr=(0, 1, 2)), "indptr runs from 0 to 2"),
    "indptr ends late": (triple(indptr=(0, 2, 2**62)), "indptr runs from 0 to 4611686018427387904"),
    "data short": ((GOOD[:2], [0, 1, 1], [0, 2, 3]), "data has 2 blocks and there are 3 indices"),
    "data long": ((np.ones((4, 2, 3)), [0, 1, 1], [0, 2, 3]), "data has 4 blocks and there are 3 indices"),
    "data 2-D": ((np.ones((3, 6)), [0, 1, 1], [0, 2, 3]), r"data has shape \(3, 6\)"),
    "data 4-D": ((np.ones((3, 2, 3, 1)), [0, 1, 1], [0, 2, 3]), "it must be"),
    "data without elements": ((np.ones((3, 0, 3)), [0, 1, 1], [0, 2, 3]), "it must be"),
    "indices 2-D": ((GOOD, [[0, 1, 1]], [0, 2, 3]), r"indices has shape \(1, 3\)"),
    "indptr 0-D": ((GOOD, [0, 1, 1], 3), r"indptr has shape \(\)"),
    "indices float": ((GOOD, [0.0, 1, 1], [0, 2, 3]), "indices has dtype float64; convert it to np.int64"),
    "indices bool": ((GOOD, np.array([0, 1, 1], bool), [0, 2, 3]), "indices has dtype bool"),
    "indptr object": ((GOOD, [0, 1, 1], np.array([0, 2, 3], object)), "indptr has dtype object"),
    "indices ragged": ((GOOD, [[0], [1, 1]], [0, 2, 3]), "cannot be read as an array"),
    "data object": ((GOOD.astype(object), [0, 1, 1], [0, 2, 3]), "data has dtype object, .* astype"),
    "data complex": ((GOOD.astype("F"), [0, 1, 1], [0, 2, 3]), r"data has dtype complex64, .* \.real"),
    "data bool": ((GOOD.astype(bool), [0, 1, 1], [0, 2, 3]), "data has dtype bool"),
    "data string": ((GOOD.astype("U3"), [0, 1, 1], [0, 2, 3]), "data has dtype <U"),
    "data dates": ((GOOD.astype("M8[s]"), [0, 1, 1], [0, 2, 3]), "data has dtype datetime64"),
    "data records": ((np.zeros((3, 2, 3), "f4,f4"), [0, 1, 1], [0, 2, 3]), "data has dtype"),
    "data masked": ((np.ma.masked_equal(GOOD, 1), [0, 1, 1], [0, 2, 3]), r"masked array; pass data.filled\(0\)"),
    "data overflows": ((GOOD * np.float64(1e300), [0, 1, 1], [0, 2, 3]), r"value 1e\+300 in block 0 overflows float32"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_triple(case):
    W, message = HOSTILE[case]
    rows = 3 if case == "indptr falls" else 2
    for blocksize in (None, (2, 2)):
        with pytest.raises((PatternError, ArgumentTypeError), match=message) as caught:
            as_weight(W, shape=(2 * rows, 6), blocksize=blocksize)
        assert isinstance(caught.value, BsrgenError)


@pytest.mark.parametrize("form", ["bsr", "csr", "csc", "coo"])
@pytest.mark.parametrize("bad", [9, -1, 2**31 - 1])
def test_hostile_scipy(form, bad):
    W = sp.coo_array(np.ones((4, 4))).asformat(form)
    (W.coords[1] if form == "coo" else W.indices)[-1] = bad
    with pytest.raises(PatternError, match=str(bad)):
        as_weight(W, blocksize=(2, 2))
    if form == "coo":
        return
    W = sp.coo_array(np.ones((4, 4))).asformat(form)
    W.indptr[1] = bad
    with pytest.raises(PatternError, match="indptr"):
        as_weight(W, blocksize=(2, 2))
    W = sp.coo_array(np.ones((4, 4))).asformat(form)
    W.data = W.data[:-1]
    with pytest.raises(PatternError, match="data has"):
        as_weight(W, blocksize=(2, 2))


@pytest.mark.parametrize(
    ("W", "asked", "error", "message"),
    [
        (np.ones((4, 4)), {}, ArgumentError, r"blocksize=\(R, C\)"),
        (sp.csr_array(np.ones((4, 4))), {}, ArgumentError, r"not BSR\); say which with blocksize="),
        (np.ones(4), {"blocksize": (1, 1)}, ArgumentError, "1 dimensions, not 2"),
        (np.ones((2, 2, 2)), {"blocksize": (1, 1)}, ArgumentError, "3 dimensions, not 2"),
        (sp.coo_array(np.ones(4)), {"blocksize": (1, 1)}, ArgumentError, "W.shape must be a pair"),
        (None, {}, ArgumentTypeError, "NoneType is not a matrix; pass a scipy sparse matrix"),
        ("W.npz", {}, ArgumentTypeError, "W has dtype <U5"),
        (object(), {"blocksize": (1, 1)}, ArgumentTypeError, "object is not a matrix"),
        ([[1.0], [2.0, 3.0]], {"blocksize": (1, 1)}, ArgumentTypeError, "cannot be read as an array"),
        (triple(), {}, ArgumentError, r"pass \(data, indices, indptr\) and shape=\(M, K\)"),
        (triple()[:2], {"shape": (4, 6)}, ArgumentError, "a tuple of 2 is not a matrix"),
        (np.ones((4, 4)), {"blocksize": (2, 2), "shape": (4, 5)}, ArgumentError, "leave shape= out"),
        (np.eye(4, dtype=complex), {"blocksize": (2, 2)}, ArgumentTypeError, "W has dtype complex128"),
        (np.full((2, 2), 1e39), {"blocksize": (2, 2)}, PatternError, r"1e\+39"),
        (np.ones((4, 4)), {"blocksize": (2, 2), "dtype": "int32"}, ArgumentTypeError, "int32"),
        (np.ones((4, 4)), {"blocksize": (2, 2), "dtype": "floaty"}, ArgumentTypeError, "floaty"),
        (np.ones((4, 4)), {"blocksize": 2}, ArgumentTypeError, "blocksize must be a pair of ints; got 2"),
        (np.ones((4, 4)), {"blocksize": "22"}, ArgumentTypeError, "blocksize must be a pair of ints; got '22'"),
        (np.ones((4, 4)), {"blocksize": (2.0, 2)}, ArgumentTypeError, "got"),
        (np.ones((4, 4)), {"blocksize": np.array(2)}, ArgumentTypeError, "got"),
        (np.ones((4, 4)), {"blocksize": (2,)}, ArgumentError, "got 1 of them"),
        (np.ones((4, 4)), {"blocksize": (2, 2, 2)}, ArgumentError, "got 3 of them"),
        (np.ones((4, 4)), {"blocksize": (0, 2)}, ArgumentError, "at least 1"),
        (np.ones((4, 4)), {"blocksize": (2, -2)}, ArgumentError, r"\(2, -2\)"),
        (triple(), {"shape": (-4, 6)}, ArgumentError, "at least 0"),
        (triple(), {"shape": (4,)}, ArgumentError, "got 1 of them"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, (np.ndarray, tuple)) else None,
)
def test_refused_arguments(W, asked, error, message):
    with pytest.raises(error, match=message):
        as_weight(W, **asked)


HUGE = {
    "shape": lambda: as_weight(triple(), shape=(2**40, 6)),
    "rows": lambda: as_weight(triple(), shape=(2**31, 6)),
    "padded rows": lambda: as_weight(triple(), shape=(2**31 - 1, 6)),
    "columns": lambda: as_weight(triple(), shape=(4, 2**31)),
    "short indptr": lambda: as_weight(([1.0], [0], [0, 1]), shape=(2**31 - 1, 2**31 - 1)),
    "2**63 elements": lambda: as_weight(triple(), shape=(2**63, 2**63)),
    "scipy": lambda: as_weight(sp.coo_array(([1.0], ([0], [0])), shape=(2**40, 2**40)), blocksize=(1, 1)),
    "block": lambda: as_weight(np.ones((2, 2)), blocksize=(2**31, 1)),
    "blocks": lambda: as_weight(np.ones((2, 2)), blocksize=(2**31 - 1, 2**31 - 1)),
    "blocks of 2**63 bytes": lambda: as_weight(sp.coo_array(np.eye(2)), blocksize=(2**30, 2**30)),
    "blocks past memory": lambda: as_weight(np.ones((2, 2)), blocksize=(2**28, 2**28)),
    "re-blocked past memory": lambda: as_weight(triple(), shape=(4, 6), blocksize=(2**28, 2**28)),
    "Pattern": lambda: Pattern((2**62, 2**62), (1, 1), np.array([0]), np.array([])),
    "virtual rows": lambda: as_weight(np.broadcast_to(np.float32(0), (2**40, 2**20)), blocksize=(1, 1)),
    "virtual blocks": lambda: as_weight(
        (np.broadcast_to(np.float32(0), (2**33, 1, 1)), np.broadcast_to(np.int64(0), 2**33), [0, 2**33]), shape=(1, 1)
    ),
}


@pytest.mark.parametrize("case", HUGE)
def test_huge_is_refused_at_once(case):
    def call():
        with pytest.raises(PatternError):
            HUGE[case]()

    assert best_s(call, 3) < 0.05


def test_largest_rows_are_taken():
    M = 2**31 - 2**20
    weight = as_weight(sp.coo_array(([3.0], ([M - 1], [2])), shape=(M, 4)), blocksize=(2**20, 1))
    assert weight.pattern.block_rows == 2**11 - 1
    assert weight.data[0, -1, 0] == 3
    assert weight.pattern.indptr[-2:].tolist() == [0, 1]


def test_pattern_checks_itself():
    good = Pattern((4, 6), (2, 3), np.array([0, 2, 3]), np.array([0, 1, 1]))
    assert good.indptr.tolist() == [0, 2, 3]
    with pytest.raises(PatternError, match="sorted and unique"):
        Pattern((4, 6), (2, 3), np.array([0, 2, 3]), np.array([1, 0, 1]))
    with pytest.raises(PatternError, match="sorted and unique"):
        Pattern((4, 6), (2, 3), np.array([0, 2, 3]), np.array([1, 1, 1]))
    with pytest.raises(PatternError, match="there are 2 block columns"):
        Pattern((4, 6), (2, 3), np.array([0, 2, 3]), np.array([0, 1, 2]))
    with pytest.raises(PatternError, match=r"\(nnzb, R, C\) = \(3, 2, 3\)"):
        Weight(good, np.zeros((2, 2, 3)))
    data = np.zeros((3, 2, 3), np.float32)
    assert not np.shares_memory(Weight(good, data).data, data)


# ---- torch ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse")
def test_torch():
    torch = pytest.importorskip("torch")
    dense = np.zeros((4, 6), np.float32)
    dense[0, 0], dense[1, 4], dense[3, 5] = 1, 2, -3
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.float8_e4m3fn):
        check(as_weight(torch.tensor(dense).to(dtype), blocksize=(3, 2)), dense)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        t = torch.tensor(dense).to(dtype)
        for layout in (t.to_sparse_csr(), t.to_sparse_csc(), t.to_sparse_coo(), t.t().contiguous().t()):
            check(as_weight(layout, blocksize=(2, 4)), dense)
            with pytest.raises(ArgumentError, match="blocksize="):
                as_weight(layout)
        for layout in (t.to_sparse_bsr((2, 3)), t.to_sparse_bsc((2, 3))):
            weight = as_weight(layout, dtype=None)
            check(weight, dense)
            assert weight.pattern.blocksize == (2, 3)
            assert weight.data.dtype == (np.float64 if dtype == torch.float64 else np.float32)
            check(as_weight(layout, blocksize=(4, 1)), dense)
    bsr = torch.tensor(dense, requires_grad=True).to_sparse_bsr((2, 3))
    check(as_weight(bsr), dense)
    check(as_weight((bsr.values(), bsr.col_indices(), bsr.crow_indices()), shape=bsr.shape), dense)
    linear = torch.nn.Linear(6, 4)
    check(as_weight(linear.weight, blocksize=(4, 1)), linear.weight.detach().numpy())
    uncoalesced = torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (2, 2))
    check(as_weight(uncoalesced, blocksize=(2, 2)), np.array([[0, 3], [0, 0]]))


@pytest.mark.filterwarnings("ignore:Sparse")
def test_torch_refused():
    torch = pytest.importorskip("torch")
    crow, values = torch.tensor([0, 1, 2]), torch.ones(2, 2, 2)
    bad = torch.sparse_bsr_tensor(crow, torch.tensor([0, 7]), values, (4, 4), check_invariants=False)
    with pytest.raises(PatternError, match="column 7"):
        as_weight(bad)
    with pytest.raises(ArgumentError, match="3 dimensions"):
        as_weight(torch.ones(2, 2, 2), blocksize=(1, 1))
    for t in (torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.complex64), torch.ones(2, 2).to("meta")):
        with pytest.raises(ArgumentTypeError):
            as_weight(t, blocksize=(1, 1))


# ---- looking at it -------------------------------------------------------------------------------


def test_picture():
    p = as_weight(triple(), shape=(4, 6)).pattern
    assert p.picture() == "##\n.#"
    assert p.picture(1, 2) == "#\n+"
    assert p.picture(1, 1) == "+"
    assert as_weight(np.zeros((0, 4)), blocksize=(1, 1)).pattern.picture() == ""
    with pytest.raises(ArgumentError, match="0 x 4"):
        p.picture(0, 4)
    sparse = np.zeros((8, 8))
    sparse[:4, :4], sparse[0, 4], sparse[4, :2] = 1, 1, 1
    sparse[5, 5:7], sparse[6, 5:7] = 1, 1
    assert as_weight(sparse, blocksize=(1, 1)).pattern.picture(2, 2) == "#:\n:+"


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.floats(0, 1), st.integers(1, 12), st.integers(1, 12))
def test_picture_counts(M, K, density, width, height):
    p = random_weight(0, (M, K), (1, 1), density).pattern
    high, wide = -(-M // height), -(-K // width)
    full = random_weight(0, (M, K), (1, 1), 1.0).pattern
    lines = p.picture(width, height).split("\n")
    for a, line in enumerate(lines):
        for b, char in enumerate(line):
            tile = [int(((q.rows // high == a) & (q.indices // wide == b)).sum()) for q in (p, full)]
            share = tile[0] / tile[1]
            assert char == ("." if share == 0 else ":" if share < 0.25 else "+" if share < 1 else "#")
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


def test_digest():
    p = as_weight(triple(), shape=(4, 6)).pattern
    assert (
        p.digest == "061c4e1d160cfa4dbe3bfd10e3ff902856991b36e99134f6ef2c6ed0daad81de"
    )  # never change it: it names artifacts
    assert p.digest is p.digest
    weight = as_weight(triple(), shape=(4, 6))
    assert weight.digest == "38dc733b8d4884fe8c539e21e99bf0b68e9c29ca353d3832e086eaddaa3cb9cf"
    same = as_weight(triple(data=-GOOD), shape=(4, 6))
    assert (same.pattern.digest, same.digest != weight.digest) == (p.digest, True)
    others = [
        as_weight(triple(), shape=(4, 6), blocksize=(2, 1)),
        as_weight(triple(indices=(0, 1, 0)), shape=(4, 6)),
        as_weight(triple(indptr=(0, 1, 3), indices=(0, 0, 1)), shape=(4, 6)),
        as_weight(triple(), shape=(4, 9)),
        as_weight(triple(data=GOOD * 0), shape=(3, 6)),
    ]
    assert len({w.pattern.digest for w in others} | {p.digest}) == 6
    assert as_weight(weight, dtype=np.float64).digest != weight.digest


def test_difference():
    p = as_weight(triple(), shape=(4, 6)).pattern
    assert p.difference(as_weight(triple(data=-GOOD), shape=(4, 6)).pattern) is None
    for indices, indptr, sentence in (
        ((0, 1, 0), (0, 2, 3), "block (1, 0) was absent and is stored now"),
        ((1, 1, 0), (0, 1, 3), "block (0, 0) was stored and is absent now"),
        ((0, 1), (0, 2, 2), "block (1, 1) was stored and is absent now"),
        ((0, 1, 0, 1), (0, 2, 4), "block (1, 0) was absent and is stored now"),
    ):
        other = as_weight((np.ones((len(indices), 2, 3)), indices, indptr), shape=(4, 6)).pattern
        assert p.difference(other) == sentence
    assert p.difference(as_weight(triple(), shape=(4, 9)).pattern) == "shape (4, 6) became (4, 9)"
    other = as_weight(triple(), shape=(4, 6), blocksize=(1, 1)).pattern
    assert p.difference(other) == "blocksize (2, 3) became (1, 1)"


def test_str():
    assert str(as_weight(triple(), shape=(4, 6)).pattern) == "4x6 in 2x3 blocks, 3 stored (75 %)"


# ---- cost ----------------------------------------------------------------------------------------


def test_import_is_light():
    heavy = "{'scipy', 'torch', 'safetensors', 'ml_dtypes'}"
    code = f"import sys, bsrgen.pattern, bsrgen.files; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


def test_large_csr_is_reblocked_fast(rng):
    csr = random_weight(rng, (4096, 4096), (1, 1), 0.1).tobsr().tocsr()
    assert best_s(lambda: as_weight(csr, blocksize=(32, 1)), 3) < 0.5


@pytest.mark.parametrize("blocksize", [(32, 1), (4, 4), (1, 1)])
def test_canonical_bsr_is_taken_fast(rng, blocksize):
    bsr = random_weight(rng, (768, 768), blocksize, 0.2).tobsr()
    assert best_s(lambda: as_weight(bsr), 20) < 0.002
