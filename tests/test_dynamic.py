"""mode="dynamic": any weight of a shape with the call, against float64; what is refused; files; C."""

import ctypes
import pickle
import subprocess
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import build_example, compiler, example_answer, run
from support import assert_right, check_calls, framed, make_weight, problem_of

import bsrgen
from bsrgen.dynamic import DynamicKernel, PreparedWeight
from bsrgen.errors import ArgumentError, ArgumentTypeError, CapacityError, PatternError, UnsupportedError
from bsrgen.even import PlannedPattern
from bsrgen.pattern import Pattern, Weight, random_weight
from bsrgen.problem import as_problem
from bsrgen.quantize import quantized
from bsrgen.stack import stacked
from bsrgen.verify import verify

SHAPE = (75, 203)
MANY = 301  # tokens that two threads share
KERNELS = {  # what their plans do: panels of X, gathered columns and bits, rows, dot products, k lanes, split vectors
    "panels": ("linear", "float32", (1, 1)),
    "bits": ("spmm", "bfloat16", (1, 1)),
    "rows": ("linear", "float32", (32, 1)),
    "quads": ("linear", "int8", (4, 4)),
    "pairs": ("spmm", "int8", (8, 2)),
    "tokens": ("spmm", "float64", (16, 16)),
    "gathered": ("linear", "bfloat16", (32, 1)),
}


@cache
def kernel_of(name: str) -> DynamicKernel:
    """Planned for all blocks."""
    operator, dtype, blocksize = KERNELS[name]
    rows, cols = (-(-size // block) for size, block in zip(SHAPE, blocksize, strict=True))
    k = bsrgen.compile(
        None, operator, blocksize, dtype=dtype, mode="dynamic", shape=SHAPE, max_blocks=rows * cols, n=40
    )
    assert isinstance(k, DynamicKernel)
    return k


def cast(weight: Weight, dtype: Any) -> Weight:
    """Values of that type, integers for int8."""
    data = np.rint(weight.data * 40).clip(-127, 127) if dtype == np.int8 else weight.data
    return Weight(weight.pattern, data.astype(dtype))


def shuffled(weight: Weight, rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """The triple, its blocks in random order within each block row."""
    p = weight.pattern
    order = np.argsort(p.rows + rng.random(p.nnzb), kind="stable")
    return weight.data[order], p.indices[order], p.indptr.astype(np.int32)


def judged(kernel: DynamicKernel, weight: Weight, n: int, rng: np.random.Generator, ready: Any = None) -> bytes:
    """Call, compare with float64; the bytes of the result."""
    problem = problem_of(weight, kernel.artifact.manifest.operator)
    x, operands = problem.sample(rng, n)
    if kernel.dtype == np.int8:
        operands["w_scale"] = np.ones(SHAPE[0], np.float32)
    y = kernel(x, weight if ready is None else ready, **operands)
    assert_right(problem, weight, y, x, operands)
    return bytes(y.tobytes())


@pytest.mark.parametrize("name", KERNELS)
@given(
    seed=st.integers(0, 2**32), density=st.sampled_from([0.0, 0.02, 0.3, 0.9, 1.0]), n=st.sampled_from([1, 2, 9, 40])
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_pattern_in_any_order(name: str, seed: int, density: float, n: int) -> None:
    kernel = kernel_of(name)
    kind = ("uniform", "banded", "powerlaw")[seed % 3]
    weight = cast(random_weight(seed, SHAPE, KERNELS[name][2], density, kind=kind), kernel.dtype)
    first = judged(kernel, weight, n, np.random.default_rng(seed))
    triple = shuffled(weight, np.random.default_rng(seed + 1))
    assert judged(kernel, weight, n, np.random.default_rng(seed), kernel.prepare(triple)) == first


@pytest.mark.parametrize("name", KERNELS)
def test_threads_and_new_values(name: str, rng: np.random.Generator) -> None:
    kernel = kernel_of(name)
    weight = cast(make_weight("powerlaw", SHAPE, KERNELS[name][2], "float32"), kernel.dtype)
    full = cast(make_weight("full", SHAPE, KERNELS[name][2], "float32"), kernel.dtype)
    for w in (weight, full):
        triple = shuffled(w, rng)
        ready = kernel.prepare(triple)
        x, operands = problem_of(w, kernel.artifact.manifest.operator).sample(rng, MANY)
        operands.pop("w_scale", None)
        y = kernel(x, ready, threads=1, **operands)
        for threads in (2, 3):
            assert kernel(x, ready, threads=threads, **operands).tobytes() == y.tobytes()
        ready.update(np.zeros_like(triple[0]))
        assert not np.asarray(kernel(x, ready, **operands), np.float32).any()
        ready.update(triple[0])
        out = framed(np.zeros_like(y))
        assert kernel(framed(x), ready, out, **operands) is out
        assert out.tobytes() == y.tobytes()


def test_threads_prepare_the_same_bytes(rng: np.random.Generator) -> None:
    """Sorted and shuffled, empty rows among them, new values: panels, bits, gathered columns and corrections."""
    shape = (603, 1201)
    kernel = bsrgen.compile(None, dtype="int8", mode="dynamic", shape=shape, blocksize=(1, 1), max_blocks=250_000, n=40)
    weight = cast(random_weight(4, shape, (1, 1), 0.3, kind="powerlaw"), np.int8)
    for triple in ((weight.data, weight.pattern.indices, weight.pattern.indptr), shuffled(weight, rng)):
        one, *others = (kernel.prepare(triple, threads=threads) for threads in (1, 2, 3, 7))
        x = rng.integers(-9, 9, (3, shape[1]), np.int8)
        np.testing.assert_array_equal(kernel(x, one), x.astype(np.int32) @ weight.todense().T.astype(np.int32))
        for other in others:
            assert answers_of(kernel, other, weight) == answers_of(kernel, one, weight)
            other.update(triple[0] // 2, threads=2)
        others[0].update(triple[0] // 2, threads=1)
        assert answers_of(kernel, others[0], weight) == answers_of(kernel, others[1], weight)


def answers_of(kernel: DynamicKernel, ready: PreparedWeight, weight: Weight) -> bytes:
    """What calls can read of a prepared weight: its results for every column of X alone."""
    return bytes(np.asarray(kernel(np.eye(weight.pattern.K, dtype=np.int8), ready)).tobytes())


def test_every_kind_of_epilogue(rng: np.random.Generator) -> None:
    steps = ("scale", "bias", "gelu", "residual", "clamp", "accumulate")
    kernel = bsrgen.compile(None, "linear", (4, 4), epilogue=steps, mode="dynamic", shape=SHAPE, max_blocks=400)
    weight = random_weight(3, SHAPE, (4, 4), 0.3)
    problem = problem_of(weight, "linear", steps)
    check_calls(kernel.ready(weight), problem, weight, rng, (1, 7, 40))


@pytest.mark.parametrize("types", [("bfloat16", "float32", False), ("int8", "float32", True)], ids=str)
def test_pairs_and_quantised_x(types: tuple[str, str, bool], rng: np.random.Generator) -> None:
    """SwiGLU of two weights, x of another type, x made int8 by the kernel; floating weights of int8."""
    dtype, x, quantizes = types
    parts = [random_weight(seed, (48, 96), (16, 1), 0.3) for seed in (1, 2)]
    kernel = bsrgen.compile(
        parts, mode="dynamic", n=16, dtype=dtype, x_dtype=x, quantize_x=quantizes, epilogue="swiglu"
    )
    both, given = stacked(parts), {}
    problem = as_problem("linear", both.pattern, dtype, x, None, "swiglu", None, quantizes)
    if quantizes:
        both, given["w_scale"] = quantized(both)
    both = Weight(both.pattern, both.data.astype(kernel.dtype))
    for n in (1, 20):
        tokens = rng.standard_normal((n, 96), dtype=np.float32)
        assert_right(problem, both, kernel(tokens, parts), tokens, given)


def test_what_a_weight_may_be(rng: np.random.Generator) -> None:
    kernel = kernel_of("panels")
    weight = random_weight(5, SHAPE, (1, 1), 0.2)
    p, x = weight.pattern, rng.standard_normal((3, SHAPE[1]), dtype=np.float32)
    y = kernel(x, weight)
    csr = scipy.sparse.csr_array(weight.tobsr().tocsr())
    blocks = random_weight(5, SHAPE, (5, 7), 0.2)
    for other, expected in (
        ((weight.data, p.indices, p.indptr), y),
        ((weight.data.reshape(-1), p.indices.astype(np.int64), p.indptr.astype(np.uint16)), y),
        ((weight.data.astype(np.float64), p.indices.tolist(), p.indptr.tolist()), y),
        (weight.tobsr(), y),
        (csr, y),
        (csr.tocoo(), y),
        (weight.todense(), y),
        (blocks, kernel(x, blocks.todense())),  # in other blocks
    ):
        np.testing.assert_array_equal(kernel(x, other), expected)
    ready = kernel.prepare(csr)
    ready.update(2 * weight.data)  # in the order of csr.data
    np.testing.assert_array_equal(kernel(x, ready), kernel(x, 2 * csr))
    mixed = rng.permutation(csr.nnz)
    coo = csr.tocoo()
    coo = scipy.sparse.coo_array((coo.data[mixed], (coo.row[mixed], coo.col[mixed])), SHAPE)
    for other in (csr.tocsc(), coo, weight.todense()):
        with pytest.raises(UnsupportedError, match="prepare it anew"):
            kernel.prepare(other).update(weight.data)
    torch = pytest.importorskip("torch")
    arrays = (p.indptr, p.indices.astype(np.int64), weight.data)
    bsr = torch.sparse_bsr_tensor(*(torch.from_numpy(a.copy()) for a in arrays), SHAPE)
    np.testing.assert_array_equal(kernel(x, bsr), y)
    tall = kernel_of("rows")  # 75 rows in blocks of 32
    padded = random_weight(1, SHAPE, (32, 1), 0.3)
    np.testing.assert_array_equal(tall(x, padded.tobsr()), tall(x, padded))


@pytest.mark.parametrize("width", [3, 7])
def test_wider_blocks_are_cut(width: int, rng: np.random.Generator) -> None:
    """Blocks of several columns for a kernel that pairs single ones; K is no multiple of their width."""
    kernel = kernel_of("gathered")
    wide = cast(make_weight("powerlaw", SHAPE, (32, width), "float32"), kernel.dtype)
    ready = kernel.prepare(wide)
    judged(kernel, wide, 9, rng, ready)
    x = rng.standard_normal((3, SHAPE[1]), dtype=np.float32).astype(kernel.dtype)
    assert kernel(x, Weight(wide.pattern, wide.data)).tobytes() == kernel(x, ready).tobytes()
    with pytest.raises(UnsupportedError, match="prepare it anew"):
        ready.update(wide.data)
    p = wide.pattern  # the last block twice: halves of it are summed
    data = np.concatenate([wide.data, wide.data[-1:]])
    data[-2:] = wide.data[-1] / np.array(2, kernel.dtype)
    indptr = p.indptr + (np.arange(len(p.indptr)) > p.rows[-1])
    twice = data, np.append(p.indices, p.indices[-1]), indptr
    assert kernel(x, twice).tobytes() == kernel(x, ready).tobytes()


def test_int8_takes_scales_and_floating_weights(rng: np.random.Generator) -> None:
    kernel, weight = kernel_of("quads"), random_weight(5, SHAPE, (4, 4), 0.2)
    x = rng.integers(-127, 128, (5, SHAPE[1]), np.int8)
    integers, own = quantized(weight)
    given = {"w_scale": own, "x_scale": 0.5}
    assert_right(problem_of(integers), integers, kernel(x, weight, x_scale=0.5), x, given)
    ready = kernel.prepare(cast(weight, np.int8))
    scale = rng.uniform(0.5, 2, SHAPE[0]).astype(np.float32)
    np.testing.assert_allclose(kernel(x, ready, w_scale=scale), kernel(x, ready) * scale, rtol=1e-6)
    with pytest.raises(ArgumentTypeError, match="quantise it, or prepare"):
        ready.update(weight.data)
    with pytest.raises(PatternError, match="symmetric range"):
        ready.update(np.full(ready_shape(ready), -128, np.int8))


def ready_shape(ready: PreparedWeight) -> tuple[int, ...]:
    return (ready.nnzb, *ready.kernel.artifact.manifest.blocksize)


def good() -> dict[str, Any]:
    """A triple for the kernel "panels", whose first block row has three blocks."""
    indptr = np.full(SHAPE[0] + 1, 3, np.int32)
    indptr[0] = 0
    return {"data": np.ones((3, 1, 1), np.float32), "indices": np.array([5, 9, 2], np.int32), "indptr": indptr}


BAD = {
    "a column that there is not": ({"indices": np.array([5, 203, 2], np.int32)}, r"indices\[1\] is column 203"),
    "a negative column": ({"indices": np.array([5, 9, -1], np.int32)}, r"indices\[2\] is column -1"),
    "beyond 32 bits": ({"indices": np.array([5, 2**32 + 9, 2])}, r"indices\[1\] is column 4294967305"),
    "twice": ({"indices": np.array([5, 9, 5], np.int32)}, r"block \(0, 5\) comes 2 times; sum them first"),
    "indptr too short": ({"indptr": np.array([0, 3])}, "indptr has 2 entries; 75 block rows"),
    "indptr falls": ({"indptr": np.r_[0, 3, 2, np.full(73, 3)].astype(np.int32)}, "indptr falls from 3 to 2"),
    "indptr ends elsewhere": ({"indptr": np.r_[0, np.full(75, 2)].astype(np.int32)}, "it must run from 0 to 3"),
    "fewer values": ({"data": np.ones((2, 1, 1), np.float32)}, "data has 2 blocks and there are 3 indices"),
}  # fmt: skip


@pytest.mark.parametrize("why", BAD)
def test_bad_patterns_are_refused(why: str) -> None:
    changed, match = BAD[why]
    triple = good() | changed
    with pytest.raises(PatternError, match=match):
        kernel_of("panels").prepare((triple["data"], triple["indices"], triple["indptr"]))
    kernel_of("panels").prepare(tuple(good().values()))


def test_more_blocks_than_planned() -> None:
    W = random_weight(1, SHAPE, (32, 1), 0.1)
    kernel = bsrgen.compile(W, mode="dynamic")
    more = random_weight(1, SHAPE, (32, 1), 0.2)
    extra = more.pattern.nnzb - W.pattern.nnzb
    with pytest.raises(CapacityError, match=f"{extra} too many; compile with max_blocks={more.pattern.nnzb}"):
        kernel.prepare(more)
    assert isinstance(kernel.pattern, PlannedPattern)
    assert kernel.pattern.nnzb == W.pattern.nnzb
    x = np.ones((2, SHAPE[1]), np.float32)
    with pytest.raises(PatternError, match=r"W has shape \(64, 203\), the kernel \(75, 203\)"):
        kernel(x, random_weight(1, (64, 203), (32, 1), 0.1))
    with pytest.raises(ArgumentTypeError, match="was prepared for"):
        kernel(x, kernel_of("rows").prepare(W))
    with pytest.raises(ArgumentError, match="x has shape"):
        kernel(np.ones((2, 7), np.float32), W)
    with pytest.raises(UnsupportedError, match="comes with the call"):
        kernel.update(W)
    assert "to prepare a new weight" in str(kernel.verdict)
    assert "any 61 of 3 x 203 blocks" in str(kernel)


def test_what_compile_refuses() -> None:
    W = random_weight(1, (8, 8), (4, 4), 0.5)
    for options, error, match in (
        ({"mode": "nonsense"}, UnsupportedError, "mode='nonsense': one of static, dynamic"),
        ({"mode": "dynamic", "backend": "mlir"}, UnsupportedError, "it is of c, cuda"),
        ({"max_blocks": 3}, ArgumentError, "for mode='dynamic'"),
        ({"mode": "dynamic", "max_blocks": 1}, ArgumentError, "max_blocks=1: from 2, which W has, to 4"),
        ({"mode": "dynamic", "max_blocks": 5}, ArgumentError, "to 4, which is all"),
        ({"mode": "dynamic", "max_blocks": 2.5}, ArgumentTypeError, "a number of blocks"),
    ):
        with pytest.raises(error, match=match):
            bsrgen.compile(W, **options)
    with pytest.raises(ArgumentError, match="it needs shape="):
        bsrgen.compile(None, mode="dynamic")


@pytest.mark.parametrize("shape", [(5, 0), (3, 4)], ids=str)
def test_nothing_to_store(shape: tuple[int, int]) -> None:
    kernel = bsrgen.compile(None, "spmm", (2, 2), mode="dynamic", shape=shape)
    assert kernel.pattern.nnzb == 0
    empty = random_weight(0, shape, (2, 2), 0)
    np.testing.assert_array_equal(kernel(np.ones((shape[1], 3), np.float32), empty), np.zeros((shape[0], 3)))


def test_artifact_and_c(tmp_path: Any, rng: np.random.Generator) -> None:
    """Saved, loaded, verified; its C example, which prepares a weight; NAME_prepare and what it refuses."""
    kernel = kernel_of("rows")
    folder = kernel.save(tmp_path / "kernel")
    loaded, findings = verify(folder)
    assert isinstance(loaded, DynamicKernel)
    assert all(finding.ok for finding in findings), findings
    weight = random_weight(2, SHAPE, (32, 1), 0.3)
    x = rng.standard_normal((4, SHAPE[1]), dtype=np.float32)
    np.testing.assert_array_equal(loaded(x, weight), kernel(x, weight))
    program = build_example(folder, tmp_path / "example", compiler(), "-D_ISOC11_SOURCE")
    assert example_answer(run([program]))[1] == 4 * SHAPE[0] * SHAPE[1]
    function = ctypes.CDLL(str(loaded.artifact.library))[f"{kernel.name}_prepare"]
    function.restype = ctypes.c_int64
    p = weight.pattern
    call = np.array([p.nnzb, weight.data.ctypes.data, p.indices.ctypes.data, p.indptr.ctypes.data], np.int64)
    ready = kernel.prepare(weight)
    assert function(call.ctypes.data_as(ctypes.c_void_p), None, 0) == ready.nbytes
    room = np.empty(ready.nbytes, np.uint8).ctypes.data_as(ctypes.c_void_p)
    for changed, status in (({0: 3 * 203 + 1}, -3), ({0: 3}, -4)):
        other = call.copy()
        for at, value in changed.items():
            other[at] = value
        assert function(other.ctypes.data_as(ctypes.c_void_p), room, 0) == status


def test_command_line(tmp_path: Any) -> None:
    weight = random_weight(2, SHAPE, (32, 1), 0.3)
    p = weight.pattern
    np.savez(tmp_path / "W.npz", data=weight.data, indices=p.indices, indptr=p.indptr, shape=SHAPE)
    folder = str(tmp_path / "kernel")
    words = ["compile", str(tmp_path / "W.npz"), "--mode", "dynamic", "--max-blocks", "609", "--n", "40", "-o", folder]
    for command in (words, ["inspect", folder], ["verify", folder]):
        result = subprocess.run([sys.executable, "-m", "bsrgen", *command], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    assert bsrgen.load(folder).pattern.nnzb == 609


def test_planned_patterns() -> None:
    p = PlannedPattern((6, 9), (2, 3), 5)
    assert pickle.loads(pickle.dumps(p)) == p != PlannedPattern((6, 9), (2, 3), 4)
    assert not p.known
    assert p.longest_row == 3
    assert Pattern((2, 2), (1, 1), np.array([0, 1, 2]), np.array([0, 1])).known
