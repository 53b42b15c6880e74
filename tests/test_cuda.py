"""The CUDA backend without a GPU: its text runs on the CPU, under tests/cuda/cuda_runtime.h, and on no GPU."""

import ctypes
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from device_emulation import GpuArray, Victim, check_device_calls, emulated, run
from support import DTYPE_NAMES, OPERATOR_NAMES, REDUCED, assert_right, make_weight, problem_of, reduced_case, single

import bsrgen
from bsrgen import device_memory, driver
from bsrgen.backends import BACKENDS
from bsrgen.backends.cuda import CudaPlan, Lanes, candidates
from bsrgen.choose import allowed
from bsrgen.device_arrays import DeviceArray, device_array, of_capsule, stream_of
from bsrgen.dtypes import DTYPES
from bsrgen.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from bsrgen.gpus import GPUS, as_gpus
from bsrgen.pattern import Weight, random_weight

SM80 = GPUS["sm_80"]
FEW = Lanes(4, 1)
BLOCKS = ((1, 1), (2, 3), (4, 4), (8, 1), (1, 16), (32, 1), (16, 16), (64, 64), (37, 53), (5, 7), (3, 200))
KINDS = ("uniform", "powerlaw", "empty", "one", "full", "banded")
TOKENS = (0, 1, 5, 33, 130)


def plan_of(problem, rows=4, warps=4, features=32, many=Lanes(2, 32), few=FEW, few_n=4, stream_n=0):  # noqa: B008
    return CudaPlan(problem, SM80, rows, warps, features, many, few, few_n, stream_n)


def table():
    """Every block shape with a type or both, an operator, a kind of pattern, a plan; neighbours differ in all."""
    lanes = (Lanes(4, 32), Lanes(1, 32), Lanes(2, 32), Lanes(4, 8))
    for turn, (block, dtype) in enumerate(product(BLOCKS, DTYPE_NAMES)):
        if turn % 3 == 2:
            continue  # two of three say as much
        knobs = {"rows": (4, 8, 1, 5, 2)[turn % 5], "warps": (4, 1, 8)[turn % 3], "features": (16, 32, 5)[turn % 3],
                 "many": lanes[turn % 4]}  # fmt: skip
        yield pytest.param(block, dtype, OPERATOR_NAMES[turn // 2 % 2], KINDS[turn % 6], knobs, id=f"{block}-{dtype}")


@pytest.mark.parametrize(("block", "dtype", "operator", "kind", "knobs"), list(table()))
def test_table(block, dtype, operator, kind, knobs, rng, tmp_path):
    (R, C) = block
    shape = (R * max(2, 41 // R) + R // 2 + 1, C * max(2, 90 // C) - C // 2)
    weight = make_weight(kind, shape, block, dtype)
    problem = problem_of(weight, operator)
    plan = plan_of(problem, **knobs)
    assert plan.shared_bytes <= 48 << 10
    kernel = emulated(plan, weight, tmp_path)
    check_device_calls(kernel, problem, weight, rng, TOKENS)
    other = Weight(weight.pattern, weight.data * rng.standard_normal(weight.data.shape).astype(dtype))
    kernel.update(other)
    check_device_calls(kernel, problem, other, rng, (7,))


@pytest.mark.parametrize("types", REDUCED, ids="-".join)
def test_reduced_types(types, rng, tmp_path):
    problem, weight = reduced_case(types)
    check_device_calls(emulated(plan_of(problem), weight, tmp_path), problem, weight, rng, (3, 70))


EPILOGUES = {
    "all": ("bias", "scale", "relu", "gelu", "gelu_tanh", "residual", "clamp", "accumulate"),
    "others": ("silu", "sigmoid", "tanh", "bias", "bias"),
}


@pytest.mark.parametrize(("operator", "name", "dtype"), [
    ("linear", "all", "float32"), ("spmm", "all", "float64"), ("linear", "all", "bfloat16"), ("spmm", "all", "int8"),
    ("spmm", "others", "float32"), ("linear", "others", "float64"), ("linear", "others", "float16"),
])  # fmt: skip
def test_epilogues(name, operator, dtype, rng, tmp_path):
    weight = make_weight("uniform", (45, 60), (4, 4), "float32")
    weight = Weight(weight.pattern, (np.rint(weight.data * 40) if dtype == "int8" else weight.data).astype(
        DTYPES[dtype].numpy))  # fmt: skip
    problem = problem_of(weight, operator, EPILOGUES[name], dtype)
    check_device_calls(emulated(plan_of(problem), weight, tmp_path), problem, weight, rng, (1, 35))


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
@pytest.mark.parametrize("shape", [(0, 7), (7, 0), (1, 1)], ids=str)
def test_shapes_without_rows_or_columns(shape, operator, rng, tmp_path):
    weight = random_weight(0, shape, (2, 3), 1.0)
    problem = problem_of(weight, operator, "bias")
    kernel = emulated(plan_of(problem), weight, tmp_path)
    for n in (0, 1, 5):
        x, given = problem.sample(rng, n)
        y = run(kernel, x, problem.sample_out(rng, n), given)
        assert_right(problem, weight, y, x, given)


def test_absent_blocks_contribute_nothing(rng, tmp_path):
    """Inf and NaN in X reach only the rows that have a block there: padding is zeros of X, not of W alone."""
    weight = single((45, 60), (4, 7))
    problem = problem_of(weight)
    x, _ = problem.sample(rng, 40)
    x[:, :56] = np.nan
    kernel = emulated(plan_of(problem), weight, tmp_path)
    y = run(kernel, x, problem.sample_out(rng, 40), {})
    assert np.isfinite(y).all()
    assert_right(problem, weight, y, np.where(np.isnan(x), 0, x))


def test_every_knob_gives_the_same_sums_in_every_run(rng, tmp_path):
    """Thread blocks and threads run in another order each time; results are equal to the bit."""
    weight = make_weight("powerlaw", (64, 96), (8, 2), "float32")
    problem = problem_of(weight)
    x, _ = problem.sample(rng, 3)
    for number, few in enumerate((Lanes(4, 1), Lanes(1, 4), Lanes(2, 16))):
        (folder := tmp_path / str(number)).mkdir()
        kernel = emulated(plan_of(problem, few=few), weight, folder)
        first, *others = (run(kernel, x, problem.sample_out(rng, 3), {}).tobytes() for _ in range(3))
        assert set(others) == {first}


def test_memory_of_a_device_is_given_back(rng, tmp_path):
    """That of old values after `update`, and all of it with the kernel."""
    weight = make_weight("uniform", (24, 30), (4, 3), "float32")
    problem = problem_of(weight)
    kernel, released = emulated(plan_of(problem), weight, tmp_path), []
    kernel._release = lambda memory: released.append(int(device_memory.interface().cast("uintptr_t", memory))) or 0
    check_device_calls(kernel, problem, weight, rng, (3,))
    first = kernel._residents[0].packed
    kernel.update(Weight(weight.pattern, 2 * weight.data))
    assert not released
    kernel.upload()
    assert released == [first]
    device_memory.release_all(kernel._residents, kernel._release)
    assert len(released) == 2


def test_save_keeps_new_values(rng, tmp_path):
    weight = make_weight("uniform", (24, 30), (4, 3), "float32")
    (tmp_path / "built").mkdir()
    problem = problem_of(weight)
    kernel = emulated(plan_of(problem), weight, tmp_path / "built")
    other = Weight(weight.pattern, 2 * weight.data)
    kernel.update(other)
    loaded = bsrgen.load(kernel.save(tmp_path / "saved"))
    check_device_calls(loaded, problem, other, rng, (3, 9))


# ── mutations: what the emulation must find ──────────────────────────────────────────────────────────────────────────

MUTATIONS = {
    "no barrier": ("        __syncthreads();\n", ""),
    "one panel for all": ("panels + (step + 1 - first) % 2 * (STEP_FEATURES * STRIDE)", "panels"),
    "tokens past the end": ("&& n0 + token + t < a.n)", ")"),
    "X past the end": ("there && n0 + t < a.n ?", "there ?"),
    "rows past the end": ("&& m0 + r < M &&", "&&"),
    "wrong column": ("column_features[first + f / PIECE_COLUMNS]", "column_features[first]"),
    "wrong strip": ("+ strip * ROWS;\n                const acc_t *x", ";\n                const acc_t *x"),
    "too few tokens staged": ("t < WIDTH; t +=", "t < WIDTH - 1; t +="),
    "panel too small": ("2 * STEP_FEATURES * STRIDE)", "STEP_FEATURES * STRIDE)"),
    "last lanes not summed": ("distance < 32", "distance < 16"),
    "a lane left out": ("e = part;", "e = part + 1;"),
    "early exit": ("    if (first < last) stage", "    if (warp == 1) return;\n    if (first < last) stage"),
    "half a warp": ("    for (int distance = LANES", "    if (threadIdx.x % 32 < 16)\n    for (int distance = LANES"),
    "wrong step": ("row * span + step - begin_of_all,", "row * span,"),
    "unaligned": ("multiply(sums, w + c * PIECE_ROWS,", "multiply(sums, w + c * PIECE_ROWS + 1,"),
}


@pytest.fixture(scope="module")
def victim():
    """A kernel in which all of them matter: several steps, ragged blocks, a group that is not full."""
    weight = random_weight(3, (43, 83), (6, 5), 0.6)
    return Victim(plan_of(problem_of(weight, "linear", "bias"), warps=6), weight, (1, 3, 70))


def test_victim_is_right(victim, rng, tmp_path):
    victim.check(tmp_path, rng)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_found(name, victim, rng, tmp_path):
    victim.assert_found(MUTATIONS[name], tmp_path, rng)


# ── plans ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_candidates_are_sound(operator, block):
    weight = make_weight("uniform", (130, 212), block, "float32")
    problem = problem_of(weight, operator)
    for target in GPUS.values():
        plans = list(candidates(problem, target))
        assert plans
        assert len({str(plan.knobs()) for plan in plans}) == len(plans)
        for plan in plans:
            assert plan.shared_bytes <= 48 << 10
            assert plan.thread_warps <= 32
            assert plan.piece_rows * plan.row_pieces >= weight.pattern.R
            assert plan.packing.source.size == weight.pattern.nnzb * plan.row_pieces * plan.column_pieces
            for n in (1, 5, 128, 4000):
                counts = plan.counts(n)
                assert counts.effective_flop == problem.flop(n) <= counts.flop
                assert counts.cycles > 0
                assert counts.registers <= 128


def test_large_products_get_large_tiles():
    from bsrgen import tune

    weight = random_weight(0, (2048, 2048), (32, 32), 0.2)
    problem = replace(problem_of(weight), n=4096)
    best = tune.rank(list(candidates(problem, SM80)), 4096)[0][1]
    assert best.rows * best.many.tokens >= 16


def test_tables_that_are_too_long():
    weight = random_weight(0, (2048, 2048), (1, 1), 0.2)
    with pytest.raises(UnsupportedError, match="use larger blocks"):
        allowed(BACKENDS["cuda"], problem_of(weight), SM80)


@pytest.mark.parametrize(("value", "error"), [
    ("native", UnsupportedError), ("sm_99", ArgumentError), ((), ArgumentError), (("sm_80", 3), ArgumentTypeError),
    (None, ArgumentTypeError), ("x86-64-v3", ArgumentError),
])  # fmt: skip
def test_targets_refused(value, error, monkeypatch):
    monkeypatch.setattr(driver, "LIBRARY", "no such library")
    driver.driver.cache_clear()
    with pytest.raises(error, match="target"):
        as_gpus(value)


def test_targets_of_one_library():
    (both,) = as_gpus(("sm_90", "sm_80", "sm_90"))
    assert both.name == "sm_80,sm_90"
    assert both.flags == (
        "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    )  # fmt: skip
    assert both.sms == GPUS["sm_90"].sms


# ── arguments ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    weight = make_weight("uniform", (24, 30), (4, 3), "float32")
    problem = problem_of(weight, "linear", ("bias", "residual", "clamp"))
    return emulated(plan_of(problem), weight, tmp_path_factory.mktemp("linear")), weight, problem


def test_batches_vectors_and_strides(linear, rng):
    kernel, weight, problem = linear
    x, given = problem.sample(rng, 6)
    right = run(kernel, x, np.zeros((6, 24), np.float32), given)
    assert_right(problem, weight, right, x, given)
    batched = given | {"residual": given["residual"].reshape(2, 3, 24)}
    y = run(kernel, x.reshape(2, 3, 30).copy(), np.zeros((2, 3, 24), np.float32), batched)
    np.testing.assert_array_equal(y.reshape(6, 24), right)
    one = run(kernel, x[0].copy(), np.zeros(24, np.float32), given | {"residual": given["residual"][0].copy()})
    np.testing.assert_allclose(one, right[0], rtol=1e-4)


def test_arguments_are_refused(linear, rng):
    kernel, _, problem = linear
    x, given = problem.sample(rng, 3)
    y = np.zeros((3, 24), np.float32)

    def gpu(a, **changes):
        return GpuArray(kernel, a, **changes)

    operands = {name: gpu(a) if np.ndim(a) else a for name, a in given.items()}
    shared = gpu(np.zeros((3, 54), np.float32))
    inside = shared.__cuda_array_interface__["data"][0]
    refused = [
        (ArgumentTypeError, "numpy array that is not on an NVIDIA GPU", (x,), {}),
        (ArgumentTypeError, "list that is not", (x.tolist(),), {}),
        (ArgumentTypeError, "give out=", (gpu(x),), {}),
        (ArgumentTypeError, "has dtype float64", (gpu(x.astype(np.float64)), gpu(y)), {}),
        (ArgumentError, "x has shape", (gpu(x[:, :29].copy()), gpu(y)), {}),
        (ArgumentError, "out has shape", (gpu(x), gpu(y[:2].copy())), {}),
        (ArgumentError, "read-only", (gpu(x), gpu(y, data=(inside, True))), {}),
        (ArgumentError, "strides", (gpu(x, strides=(4, 12)), gpu(y)), {}),
        (ArgumentError, "negative", (gpu(x, strides=(-120, 4)), gpu(y)), {}),
        (ArgumentError, "not aligned", (gpu(x, data=(inside + 2, False)), gpu(y)), {}),
        (ArgumentError, "overlaps", (gpu(x, data=(inside, False)), gpu(y, data=(inside + 8, False))), {}),
        (ArgumentTypeError, "masked", (gpu(x, mask=1), gpu(y)), {}),
        (ArgumentError, "threads=2", (gpu(x), gpu(y)), {"threads": 2}),
        (ArgumentTypeError, "stream='s'", (gpu(x), gpu(y)), {"stream": "s"}),
        (ArgumentTypeError, "unexpected operand 'scale'", (gpu(x), gpu(y)), {"scale": 1}),
        (ArgumentTypeError, "bias is a numpy array", (gpu(x), gpu(y)), {"bias": given["bias"]}),
        (ArgumentError, "bias has shape", (gpu(x), gpu(y)), {"bias": gpu(given["bias"][:5].copy())}),
        (ArgumentError, "residual has shape", (gpu(x), gpu(y)), {"residual": gpu(given["residual"][:2].copy())}),
        (ArgumentTypeError, "lo must be one real number", (gpu(x), gpu(y)), {"lo": "low"}),
    ]
    for error, text, arguments, more in refused:
        with pytest.raises(error, match=text):
            kernel(*arguments, **operands | more)
    with pytest.raises(ArgumentTypeError, match="'bias' is missing"):
        kernel(gpu(x), gpu(y), residual=operands["residual"])


def test_arrays_of_other_libraries():
    class Array:
        def __init__(self, kind):
            self.kind = kind

        def __dlpack_device__(self):
            return self.kind, 1

    with pytest.raises(ArgumentTypeError, match="Array that is not on an NVIDIA GPU"):
        device_array("x", Array(10))  # AMD's
    a = np.arange(12, dtype=np.float32).reshape(3, 4)[:, 1:3]
    seen = of_capsule("x", a.__dlpack__(), a)
    assert (seen.pointer, seen.shape, seen.strides, seen.dtype) == (a.ctypes.data, (3, 2), (4, 1), np.float32)
    assert seen.span == (a.ctypes.data, a.ctypes.data + 40)
    assert not seen.contiguous

    class Stream:
        def __cuda_stream__(self):
            return 0, 77

    like = DeviceArray(0, (1,), (1,), np.dtype(np.float32), 0, False, object())
    assert [stream_of(like, s) for s in (None, 5, Stream())] == [0, 5, 77]


def test_c_entry_refuses(linear):
    kernel = linear[0]
    library = ctypes.CDLL(str(kernel.artifact.library))
    function, words = library[kernel.name], library[f"{kernel.name}_error"]
    words.restype = ctypes.c_char_p
    c64, c = ctypes.c_int64, ctypes.c_void_p
    some = np.zeros(4096, np.float32).ctypes.data & ~15
    good = [3, some, 30, some, 24, some, some, 24, -1.0, 1.0, some, None]
    function.argtypes = [c64, c, c64, c, c64, c, c, c64, ctypes.c_float, ctypes.c_float, c, c]
    for place, value in ((0, -1), (1, None), (2, 29), (3, None), (4, 23), (5, None), (6, None), (7, 23), (10, None),
                         (10, some + 4)):  # fmt: skip
        status = function(*good[:place], value, *good[place + 1 :])
        assert status == 2
        assert b"bad argument" in words(status)
    assert words(1035) == b"no usable NVIDIA driver"
    assert function(0, *good[1:]) == 0
