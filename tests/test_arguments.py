"""The arguments of a call: every layout is handled or refused with a typed error, and only `out` is ever written."""

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided
from support import CANARY, LEVELS, OPERATOR_NAMES, assert_right, frame_is_intact, framed, problem_of, run_python

import bsrgen
from bsrgen.pattern import random_weight

M, K = 37, 29


@pytest.fixture(params=OPERATOR_NAMES)
def case(request):
    """(weight, problem, kernel) of one operator, f32, K and M in partial blocks."""
    weight = random_weight(7, (M, K), (4, 3), 0.5)
    return weight, problem_of(weight, request.param), bsrgen.compile(weight, request.param)


@pytest.fixture
def linear():
    return bsrgen.compile(random_weight(7, (M, K), (4, 3), 0.5))


@pytest.fixture
def spmm():
    return bsrgen.compile(random_weight(7, (M, K), (4, 3), 0.5), "spmm")


def misaligned(a, by: int):
    """The same array, its first byte `by` behind a multiple of 64."""
    raw = np.zeros(a.nbytes + 128, np.uint8)
    at = -raw.ctypes.data % 64 + by
    view = raw[at : at + a.nbytes].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


def bytes_between(a, count: int):
    """The same array, its elements `count` bytes apart."""
    padded = np.zeros(a.shape, [("value", a.dtype), ("rest", np.int8, count)])
    padded["value"] = a
    return padded["value"]


LAYOUTS = {
    "rows apart": framed,
    "every other row": lambda a: np.repeat(a, 2, axis=0)[::2],
    "every other column": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "Fortran order": np.asfortranarray,
    "upside down": lambda a: a[::-1].copy()[::-1],
    "mirrored": lambda a: a[:, ::-1].copy()[:, ::-1],
    "both": lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
    "transposed slice": lambda a: np.repeat(a.T, 3, axis=0)[1::3].T,
    "read-only": lambda a: a.copy() if a.setflags(write=False) else a,
    "one byte between": lambda a: bytes_between(a, 1),
} | {f"misaligned by {by}": (lambda a, by=by: misaligned(a, by)) for by in (1, 2, 3, 4, 5, 31, 32, 63)}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_any_layout_of_x(case, layout, n, rng):
    weight, problem, kernel = case
    x, _ = problem.sample(rng, n)
    expected = kernel(x)
    assert_right(problem, weight, expected, x)
    given = layout(x.copy())
    before = np.array(given)
    np.testing.assert_array_equal(kernel(given), expected)
    np.testing.assert_array_equal(given, before)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "read-only"])
@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_any_layout_of_out(case, layout, n, rng):
    _, problem, kernel = case
    x, _ = problem.sample(rng, n)
    out = LAYOUTS[layout](np.zeros(problem.operator.shape(n, M), np.float32))
    assert kernel(x, out=out) is out
    np.testing.assert_array_equal(out, kernel(x))


@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_any_layout_of_operands(n, rng):
    weight = random_weight(7, (M, K), (4, 3), 0.5)
    for operator in OPERATOR_NAMES:
        steps = ("bias", "residual", "accumulate")
        problem, kernel = problem_of(weight, operator, steps), bsrgen.compile(weight, operator, epilogue=steps)
        x, given = problem.sample(rng, n)
        old = rng.standard_normal(problem.operator.shape(n, M)).astype(np.float32)
        expected = kernel(x, out=old.copy(), **given)
        assert_right(problem, weight, expected, x, given, old)
        for name, layout in LAYOUTS.items():
            bias = given["bias"]
            hostile = {"residual": layout(given["residual"].copy()), "bias": layout(bias[None].copy())[0]}
            out = LAYOUTS["rows apart" if name == "read-only" else name](old.copy())
            np.testing.assert_array_equal(kernel(x, out=out, **(given | hostile)), expected, name)


def test_broadcast_x(case, rng):
    """Stride 0 along either axis, or both."""
    weight, problem, kernel = case
    row, column = rng.standard_normal((2, 64)).astype(np.float32)
    shape = problem.operator.shape(20, K)
    for x in (
        np.broadcast_to(row[: shape[1]], shape),
        np.broadcast_to(column[: shape[0], None], shape),
        np.broadcast_to(np.float32(3), shape),
    ):
        np.testing.assert_array_equal(kernel(x), kernel(x.copy()))
        assert_right(problem, weight, kernel(x), x)


def test_no_tokens(case):
    _, problem, kernel = case
    x, shape = np.zeros(problem.operator.shape(0, K), np.float32), problem.operator.shape(0, M)
    assert kernel(x).shape == shape
    for out in (np.zeros(shape, np.float32), np.zeros((60, 60), np.float32)[: shape[0], : shape[1]]):
        assert kernel(x, out=out) is out
        assert kernel(x, out=out, threads=1) is out  # the careful path


# ── shapes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("batch", [(), (1,), (0,), (5,), (2, 3), (2, 0, 3), (2, 1, 3, 2)], ids=str)
def test_linear_takes_any_batch(linear, batch, rng):
    x = rng.standard_normal((*batch, K)).astype(np.float32)
    expected = linear(x.reshape(-1, K)).reshape(*batch, M)
    y = linear(x)
    assert y.shape == (*batch, M)
    np.testing.assert_array_equal(y, expected)
    out = np.zeros((*batch, M), np.float32)
    assert linear(x, out=out) is out
    np.testing.assert_array_equal(out, expected)
    if len(batch) > 1:
        turned = np.moveaxis(np.moveaxis(x, 0, 1).copy(), 0, 1)
        np.testing.assert_array_equal(linear(turned), expected)


def test_a_batch_without_features(rng):
    kernel = bsrgen.compile(random_weight(0, (5, 0), (2, 3), 0.0))
    y = kernel(np.zeros((2, 3, 0), np.float32))
    assert y.shape == (2, 3, 5)
    assert not y.any()


def test_out_of_a_batch_that_is_no_matrix_in_memory(linear, rng):
    """Filled or refused, with a typed error and nothing written."""
    x = rng.standard_normal((4, 3, K)).astype(np.float32)
    out = np.zeros((3, 4, M), np.float32).transpose(1, 0, 2)
    try:
        linear(x, out=out)
    except bsrgen.ArgumentError:
        assert not out.any()
    else:
        np.testing.assert_array_equal(out, linear(x))


def test_spmm_takes_a_vector(spmm, rng):
    x = rng.standard_normal((K, 1)).astype(np.float32)
    np.testing.assert_array_equal(spmm(x[:, 0]), spmm(x)[:, 0])
    np.testing.assert_array_equal(spmm @ x, spmm(x))
    np.testing.assert_array_equal(spmm @ x[:, 0], spmm(x)[:, 0])
    wide = rng.standard_normal((K, 7)).astype(np.float32)
    np.testing.assert_array_equal(spmm(wide[:, 3]), spmm(wide[:, 3].copy()))


@pytest.mark.parametrize("shape", [(), (K + 1,), (2, K - 1), (K, 2), (0, 0), (2, 3, K + 1), (1, 2, 3, 4)], ids=str)
def test_wrong_shapes_of_x_for_linear(linear, shape):
    with pytest.raises(bsrgen.ArgumentError, match=r"x has shape .*, expected \[\.\.\., 29\]"):
        linear(np.zeros(shape, np.float32))


@pytest.mark.parametrize("shape", [(), (K + 1,), (2, K), (K, 2, 1), (1, K, 2), (0, 0)], ids=str)
def test_wrong_shapes_of_x_for_spmm(spmm, shape):
    with pytest.raises(bsrgen.ArgumentError, match=r"x has shape .*, expected \[29, N\] or \[29\]"):
        spmm(np.zeros(shape, np.float32))


@pytest.mark.parametrize("shape", [(2, M + 1), (3, M), (M,), (M, 2), (1, 2, M), (0, M), ()], ids=str)
def test_wrong_shapes_of_out(linear, shape):
    with pytest.raises(bsrgen.ArgumentError, match="out has shape"):
        linear(np.zeros((2, K), np.float32), out=np.zeros(shape, np.float32))


# ── types ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["f8", "f2", "i4", "i1", "?", "c8", ">f4", "O", "S4", "M8[s]", "f4,f4", "g"])
def test_wrong_dtypes(linear, dtype):
    x, out = np.zeros((2, K), np.float32), np.zeros((2, M), np.float32)
    with pytest.raises(bsrgen.ArgumentTypeError, match="x has dtype"):
        linear(np.zeros((2, K), dtype))
    with pytest.raises(TypeError, match="out has dtype"):
        linear(x, out=np.zeros((2, M), dtype))
    np.testing.assert_array_equal(out, 0)


@pytest.mark.parametrize(
    "x", [None, 1.0, np.float32(1), "x", [[0.0] * K], ((0.0,) * K,), range(K), {}, object(), b"12"]
)
def test_x_that_is_no_array(linear, x):
    with pytest.raises(bsrgen.ArgumentTypeError, match=r"x .*not an array"):
        linear(x)


@pytest.mark.parametrize("out", [1.0, "x", [[0.0] * M], (), bytearray(8 * M), memoryview(bytes(4 * M))])
def test_out_that_is_no_array(linear, out):
    with pytest.raises(bsrgen.ArgumentTypeError, match=r"out is .*, not a numpy array"):
        linear(np.zeros((2, K), np.float32), out=out)


def test_subclasses(linear, rng):
    class Sub(np.ndarray):
        pass

    x = rng.standard_normal((3, K)).astype(np.float32)
    for wrapped in (x.view(Sub), np.matrix(x), np.ma.masked_array(x), x.view(np.recarray)):
        y = linear(wrapped)
        assert type(y) is np.ndarray
        np.testing.assert_array_equal(y, linear(x))
    out = np.zeros((3, M), np.float32).view(Sub)
    assert linear(x, out=out) is out
    np.testing.assert_array_equal(out, linear(x))


def test_memory_mapped_files(linear, rng, tmp_path):
    x = rng.standard_normal((3, K)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.testing.assert_array_equal(linear(np.load(tmp_path / "x.npy", mmap_mode="r")), linear(x))
    out = np.lib.format.open_memmap(tmp_path / "y.npy", "w+", np.float32, (3, M))
    linear(x, out=out)
    out.flush()
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), linear(x))


class TestTorch:
    @pytest.fixture(autouse=True)
    def _torch(self):
        self.torch = pytest.importorskip("torch")

    def test_tensors_are_read_in_place(self, case, rng):
        _, problem, kernel = case
        x, _ = problem.sample(rng, 6)
        tensor = self.torch.from_numpy(x.copy())
        for t in (tensor, tensor.T.contiguous().T, tensor.repeat(1, 2)[:, : x.shape[1]], tensor.flip(0).flip(0)):
            y = kernel(t)
            assert type(y) is np.ndarray
            np.testing.assert_array_equal(y, kernel(x))

    @pytest.mark.parametrize(
        "make",
        [
            lambda torch, t: t.double(),
            lambda torch, t: t.bfloat16(),
            lambda torch, t: t.requires_grad_(),
            lambda torch, t: t.to_sparse(),
            lambda torch, t: t.to("meta"),
        ],
        ids=["float64", "bfloat16", "requires grad", "sparse", "meta"],
    )
    def test_tensors_that_cannot_be_read(self, linear, make):
        with pytest.raises(bsrgen.ArgumentTypeError):
            linear(make(self.torch, self.torch.zeros(2, K)))

    def test_operands(self, rng):
        weight = random_weight(7, (M, K), (4, 3), 0.5)
        kernel = bsrgen.compile(weight, epilogue=("bias", "clamp"))
        x, bias = rng.standard_normal((2, K)).astype(np.float32), rng.standard_normal(M).astype(np.float32)
        y = kernel(x, bias=self.torch.from_numpy(bias), hi=self.torch.tensor(0.5))
        np.testing.assert_array_equal(y, kernel(x, bias=bias, hi=0.5))


@pytest.mark.parametrize("error", [BufferError, RuntimeError, TypeError, ValueError, AttributeError])
def test_broken_dlpack(linear, error):
    class Broken:
        def __dlpack__(self, **_):
            raise error("not today")

        def __dlpack_device__(self):
            return (1, 0)

    with pytest.raises(bsrgen.ArgumentTypeError, match="x cannot be read"):
        linear(Broken())


# ── out ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_read_only_out(case, rng):
    _, problem, kernel = case
    x, _ = problem.sample(rng, 3)
    out = np.zeros(problem.operator.shape(3, M), np.float32)
    out.setflags(write=False)
    with pytest.raises(bsrgen.ArgumentError, match="out is read-only"):
        kernel(x, out=out)
    assert not out.any()


@pytest.mark.parametrize("strides", [(0, 4), (4, 0), (0, 0), (4, 4), (4 * M - 4, 4), (8, 4)], ids=str)
def test_out_whose_elements_share_memory(linear, strides):
    out = as_strided(np.zeros(4 * M, np.float32), (3, M), strides)
    with pytest.raises(bsrgen.ArgumentError, match="several results share"):
        linear(np.ones((3, K), np.float32), out=out)
    assert not out.any()


@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_out_may_overlap_x(case, n, rng):
    """Wholly, by part, interleaved: as if x had been copied first; the rest of the memory is untouched."""
    weight, problem, kernel = case
    xs, ys = problem.operator.shape(n, K), problem.operator.shape(n, M)
    size = max(K, M) * n
    for x_at, y_at in [(0, 0), (0, 1), (1, 0), (0, K * n - 1), (M * n - 1, 0), (5, n + 3), (0, K * n)]:
        memory = rng.standard_normal(3 * size).astype(np.float32)
        before = memory.copy()
        x, y = memory[x_at:][: K * n].reshape(xs), memory[y_at:][: M * n].reshape(ys)
        old = x.copy()
        assert kernel(x, out=y) is y
        assert_right(problem, weight, y, old)
        written = np.s_[y_at : y_at + M * n]
        np.testing.assert_array_equal(np.delete(memory, written), np.delete(before, written))


def test_out_interleaved_with_x(linear, rng):
    memory = rng.standard_normal((8, K + M)).astype(np.float32)
    x, out = memory[:, :K], memory[:, K:]
    expected, before = linear(x.copy()), x.copy()
    linear(x, out=out)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(x, before)


# ── threads and operands ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("threads", [0, -1, -(2**63), 2**16 + 1, 2**40, 10**30])
def test_thread_counts_out_of_range(linear, threads):
    with pytest.raises(bsrgen.ArgumentError, match="threads="):
        linear(np.zeros((2, K), np.float32), threads=threads)


@pytest.mark.parametrize("threads", [True, False, 1.0, 1.5, "2", np.float64(2), np.array([1, 2]), [1]])
def test_thread_counts_that_are_none(linear, threads):
    with pytest.raises(bsrgen.ArgumentTypeError, match="threads="):
        linear(np.zeros((2, K), np.float32), threads=threads)


@pytest.mark.parametrize("threads", [None, 1, 2, 7, 1000, np.int64(2), np.uint8(3)])
def test_thread_counts_that_are_right(linear, threads, rng):
    x = rng.standard_normal((9, K)).astype(np.float32)
    np.testing.assert_array_equal(linear(x, threads=threads), linear(x))


@pytest.fixture
def many():
    return bsrgen.compile(random_weight(7, (M, K), (4, 3), 0.5), epilogue=("bias", "clamp", "residual", "accumulate"))


def given(**other):
    return {"bias": np.zeros(M, np.float32), "residual": np.zeros((2, M), np.float32)} | other


@pytest.mark.parametrize("name", ["bias", "residual"])
def test_missing_operands(many, name):
    operands = given()
    del operands[name]
    with pytest.raises(bsrgen.ArgumentTypeError, match=f"operand '{name}' is missing"):
        many(np.zeros((2, K), np.float32), **operands)


def test_unknown_operands(many, linear):
    x = np.zeros((2, K), np.float32)
    with pytest.raises(bsrgen.ArgumentTypeError, match=r"unexpected operand 'biass'.*takes bias, lo, hi, residual"):
        many(x, **given(biass=1))
    with pytest.raises(bsrgen.ArgumentTypeError, match=r"unexpected operand 'bias'.*takes no operands"):
        linear(x, bias=np.zeros(M, np.float32))


BIG = pytest.param(10**400, id="10**400")


@pytest.mark.parametrize("scalar", ["2", "abc", b"2", 2j, [1.0], np.ones(1), np.ones((1, 1)), {}, object(), BIG])
@pytest.mark.parametrize("name", ["lo", "alpha"])
def test_scalars_that_are_none(many, name, scalar):
    with pytest.raises(bsrgen.ArgumentTypeError, match=f"{name} must be one real number"):
        many(np.zeros((2, K), np.float32), **given(**{name: scalar}))


@pytest.mark.parametrize("scalar", [2, 2.0, np.float32(2), np.float64(2), np.int8(2), np.array(2.0), np.array(2)])
def test_scalars_of_any_real_type(many, scalar, rng):
    x = rng.standard_normal((2, K)).astype(np.float32)
    np.testing.assert_array_equal(many(x, **given(alpha=scalar)), many(x, **given(alpha=2.0)))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("bias", np.zeros(M - 1, np.float32), bsrgen.ArgumentError),
        ("bias", np.zeros((1, M), np.float32), bsrgen.ArgumentError),
        ("bias", np.zeros(M), bsrgen.ArgumentTypeError),
        ("bias", [0.0] * M, bsrgen.ArgumentTypeError),
        ("bias", 0.0, bsrgen.ArgumentTypeError),
        ("bias", None, bsrgen.ArgumentTypeError),
        ("residual", np.zeros((2, M - 1), np.float32), bsrgen.ArgumentError),
        ("residual", np.zeros(M, np.float32), bsrgen.ArgumentError),
        ("residual", np.zeros((2, M), ">f4"), bsrgen.ArgumentTypeError),
    ],
)
def test_wrong_operands(many, name, value, error):
    out = np.full((2, M), CANARY, np.float32)
    with pytest.raises(error, match=name):
        many(np.zeros((2, K), np.float32), out=out, **given(**{name: value}))
    np.testing.assert_array_equal(out, np.float32(CANARY))


def test_matmul_says_what_linear_means(linear):
    with pytest.raises(bsrgen.ArgumentError, match=r"x @ W\.T"):
        linear @ np.zeros((K, 2), np.float32)


def test_nothing_around_out_is_written(case, rng):
    _, problem, kernel = case
    for n in (1, 2, 3, 15, 16, 17, 65):
        x, _ = problem.sample(rng, n)
        for after in ((0, 1), (1, 0), (0, 16), (3, 7)):
            out = framed(np.zeros(problem.operator.shape(n, M), np.float32), (1, 1), after, fill=CANARY)
            kernel(x, out=out)
            assert frame_is_intact(out)


# ── pages ────────────────────────────────────────────────────────────────────────────────────────────────────────────

PAGES = """
import ctypes, itertools, mmap, sys
import numpy as np
import bsrgen
from bsrgen.pattern import random_weight
from support import assert_right, problem_of

PAGE, SPAN = mmap.PAGESIZE, 24 * mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

class Region:
    'SPAN bytes between two pages that nobody may touch.'
    def __init__(self):
        base = libc.mmap(None, SPAN + 2 * PAGE, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        assert base not in (None, 2**64 - 1)
        for guard in (base, base + PAGE + SPAN):
            assert libc.mprotect(guard, PAGE, 0) == 0
        self.bytes = np.frombuffer((ctypes.c_uint8 * SPAN).from_address(base + PAGE), np.uint8)
        self.bytes[:] = 0xA5

    def put(self, a, at_end, ld=0):
        'A matrix or vector with the values of `a`, flush with the first or the last byte; rows `ld` elements apart.'
        shape, item = a.shape, a.itemsize
        ld = max(ld, shape[-1])
        count = (shape[0] - 1) * ld + shape[1] if a.ndim == 2 and a.size else a.size
        size = count * item
        assert size <= SPAN
        flat = (self.bytes[SPAN - size:] if at_end else self.bytes[:size]).view(a.dtype)
        strides = (ld * item, item)[-a.ndim:]
        view = np.lib.stride_tricks.as_strided(flat, shape, strides) if a.size else flat.reshape(shape)
        view[...] = a
        return view

x_region, y_region, bias_region, residual_region = (Region() for _ in range(4))
rng = np.random.default_rng(0)
target = sys.argv[1]
CASES = [
    ("linear", "float32", (35, 27), (16, 1), ()),
    ("linear", "float64", (23, 18), (3, 5), ("bias", "residual")),
    ("linear", "float32", (12, 45), (1, 16), ("bias", "accumulate")),
    ("spmm", "float32", (30, 26), (4, 4), ("bias", "residual")),
    ("spmm", "float64", (19, 21), (8, 1), ("residual", "accumulate")),
]
tokens = [*range(0, 20), 31, 32, 33, 47, 64, 65]
done = 0
for operator, dtype, shape, block, steps in CASES:
    weight = random_weight(3, shape, block, 0.6, dtype=dtype)
    problem = problem_of(weight, operator, steps)
    kernel = bsrgen.compile(weight, operator, dtype=dtype, epilogue=steps, target=target)
    for n, (x_end, y_end), apart in itertools.product(tokens, itertools.product((0, 1), repeat=2), (0, 3)):
        x0, given = problem.sample(rng, n)
        old = rng.standard_normal(problem.operator.shape(n, shape[0])).astype(dtype)
        x = x_region.put(x0, x_end, x0.shape[1] + apart)
        placed = dict(given)
        for name, region in (("bias", bias_region), ("residual", residual_region)):
            if name in given:
                placed[name] = region.put(given[name], y_end, given[name].shape[-1] + apart)
        y_region.bytes[:] = 0xA5
        y = y_region.put(old, y_end, old.shape[1] + apart)
        written = np.zeros(SPAN, bool)
        mask = y_region.bytes.copy()
        kernel(x, out=y, **placed)
        assert_right(problem, weight, y, x0, given, old)
        y[...] = old
        assert (y_region.bytes == mask).all(), (problem, n, x_end, y_end, apart)
        done += 1
print(done)
"""


@pytest.mark.parametrize("target", LEVELS[-2:])
def test_nothing_outside_of_the_arrays_is_touched(target):
    """Arrays flush with pages that may not be touched, before and behind: a read or a write outside is a SIGSEGV."""
    assert int(run_python(PAGES, target)) >= 1000
