"""mode="dynamic" on CUDA without a GPU: weights come with the call and are prepared by kernels, in the emulation."""

import ctypes
import subprocess
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from device_emulation import GpuArray, check_device_calls, emulated, run
from programs import tool
from support import assert_right, problem_of
from test_cuda import plan_of as on_cores
from test_cuda_matrix import plan_of as on_units
from test_cuda_matrix import weight_of

import bsrgen
from bsrgen.backends.cuda import candidates, dynamic
from bsrgen.dynamic_device import DynamicDeviceKernel
from bsrgen.errors import (
    ArgumentError,
    ArgumentTypeError,
    CapacityError,
    DeviceError,
    PatternError,
    PatternMismatchError,
    UnsupportedError,
)
from bsrgen.even import planned
from bsrgen.gpus import GPUS
from bsrgen.pattern import Weight, random_weight

WINDOW_BYTES = 8 * 32 * 9  # of shared memory: 32 words of bits for eight rows and what they have in common
CASES = {  # block, type, operator, epilogue, plan, what it is a case of
    "shared columns": ((4, 3), "float32", "linear", ("bias", "residual"), partial(on_cores, stream_n=16)),
    "windows": ((1, 1), "float32", "spmm", (), partial(on_cores, rows=1, warps=8, stream_n=16)),
    "cut": ((37, 53), "float32", "linear", ("gelu",), partial(on_cores, rows=5, stream_n=16)),
    "words": ((8, 4), "int8", "spmm", (), partial(on_cores, rows=8, warps=2)),
    "pairs": ((6, 5), "float32", "linear", "swiglu", partial(on_cores, rows=3, stream_n=4)),
    "units": ((16, 1), "float16", "linear", ("bias", "silu"), on_units),
    "units, cut": ((24, 90), "bfloat16", "spmm", (), partial(on_units, rows=16, features=64)),
    "units, int8": ((16, 24), "int8", "linear", ("bias",), partial(on_units, features=64, many=1)),
    "units, pairs": ((16, 8), "bfloat16", "linear", "geglu", partial(on_units, stages=2)),
}  # fmt: skip
KINDS = ("uniform", "full", "empty", "one")


class Ready:
    """A kernel and a weight that was prepared for it, called as kernels are."""

    def __init__(self, kernel, prepared):
        self.kernel, self.prepared, self.artifact, self.name = kernel, prepared, kernel.artifact, kernel.name

    def __call__(self, x, out, **given):
        return self.kernel(x, self.prepared, out, **given)


def case(name, kind="uniform", seed=1):
    """A weight of the case; its shape has a rest, but for pairs."""
    (R, C), dtype = CASES[name][:2]
    rest = 0 if "pairs" in name else R // 2
    shape = (R * max(4, 41 // R) + rest, C * max(3, 90 // C) - C // 2)
    if name == "windows":
        shape = (11, 1100)
    return weight_of(kind, shape, (R, C), dtype, seed)


def planned_for(name, weight, most=None):
    """The problem of a weight to come, and its type."""
    _, _, operator, epilogue, _ = CASES[name]
    p = weight.pattern
    to_come = planned(weight, p.block_rows * p.block_cols if most is None else most, weight.data.dtype)
    return replace(problem_of(weight, operator, epilogue), pattern=to_come.pattern), to_come


def kernel_of(name, folder, change=lambda text: text):
    problem, to_come = planned_for(name, case(name))
    plan = CASES[name][4](problem)
    if plan.matrix:
        plan = replace(plan, stream_n=16)
    kernel = emulated(plan, to_come, folder, change)
    assert isinstance(kernel, DynamicDeviceKernel)
    return kernel


def triple(kernel, weight, rng=None, integers=np.int64):
    """Its arrays on the "GPU", blocks in random order within each block row."""
    p = weight.pattern
    order = np.argsort(p.rows + (rng.random(p.nnzb) if rng else 0.5), kind="stable")
    arrays = weight.data[order], p.indices[order].astype(integers), p.indptr.astype(integers)
    return tuple(GpuArray(kernel, a) for a in arrays)


@pytest.mark.parametrize("name", CASES)
def test_any_pattern_in_any_order(name, rng, tmp_path, monkeypatch):
    """One kernel, many weights, in memory of its own or of another one."""
    monkeypatch.setattr(dynamic, "MAP_BYTES", WINDOW_BYTES)
    kernel, _, operator, epilogue = kernel_of(name, tmp_path), *CASES[name][1:4]
    ready = None
    for turn, kind in enumerate(KINDS[:: 2 if name == "windows" else 1]):  # all of single elements are many
        weight = case(name, kind, seed=turn)
        problem = problem_of(weight, operator, epilogue)
        given = triple(kernel, weight, rng, (np.int64, np.int32)[turn % 2])
        ready = kernel.prepare(given, into=ready)
        assert ready.nnzb == weight.pattern.nnzb
        check_device_calls(Ready(kernel, ready), problem, weight, rng, (1, 5, 37) if kind == "uniform" else (3, 20))
    weight = case(name, seed=7)
    ready = kernel.prepare(triple(kernel, weight, rng))
    other = Weight(weight.pattern, (weight.data.astype(np.float32) / 2).astype(weight.data.dtype))
    ready = kernel.prepare(triple(kernel, weight))
    ready.update(GpuArray(kernel, other.data))
    check_device_calls(Ready(kernel, ready), problem_of(weight, operator, epilogue), other, rng, (20,))


@pytest.mark.parametrize("name", ["shared columns", "units"])
def test_bits_are_those_of_a_static_kernel(name, rng, tmp_path):
    """The same plan adds in the same order, however the blocks came."""
    weight, operator, epilogue, plan = case(name), *CASES[name][2:]
    problem = problem_of(weight, operator, epilogue)
    (tmp_path / "static").mkdir()
    (tmp_path / "dynamic").mkdir()
    static = replace(plan(problem), stream_n=16)
    fixed, kernel = emulated(static, weight, tmp_path / "static"), kernel_of(name, tmp_path / "dynamic")
    ready = Ready(kernel, kernel.prepare(triple(kernel, weight, rng)))
    for n in (1, 9, 40):
        x, given = problem.sample(rng, n)
        out = problem.sample_out(rng, n)
        np.testing.assert_array_equal(run(ready, x, out.copy(), given), run(fixed, x, out.copy(), given))


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A kernel for up to 70 blocks of 4x3."""
    name = "shared columns"
    problem, to_come = planned_for(name, weight_of("empty", (42, 89), (4, 3), "float32"), 70)
    kernel = emulated(on_cores(problem, stream_n=16), to_come, tmp_path_factory.mktemp("small"))
    return kernel, weight_of("uniform", (42, 89), (4, 3), "float32", seed=3)


def fewer(weight, blocks):
    """The first blocks of a weight."""
    p = weight.pattern
    return weight.data[:blocks].copy(), p.indices[:blocks].copy(), np.minimum(p.indptr, blocks)


BAD = {
    "a column that there is not": (1, 5, 30, r"indices\[5\] is not one of the block columns 0 to 29"),
    "a negative column": (1, 9, -1, r"indices\[9\] is not"),
    "indptr falls": (2, 3, 0, "indptr at block row 2 of 11"),
    "indptr begins elsewhere": (2, 0, 1, "indptr at block row 0"),
    "indptr ends elsewhere": (2, 11, 69, "indptr at block row 10"),
    "indptr is far out": (2, 4, 2**40, "indptr at block row 3"),
}


@pytest.mark.parametrize("why", [*BAD, "twice"])
def test_bad_patterns_are_found_on_the_device(why, small, rng):
    kernel, weight = small
    arrays = fewer(weight, 70)
    if why == "twice":
        arrays[1][[20, 21]] = 7
        row = int(np.searchsorted(weight.pattern.indptr, 20, side="right")) - 1
        match = rf"block \({row}, 7\) comes more than once"
    else:
        which, at, value, match = BAD[why]
        arrays = tuple(a.astype(np.int64) if a.ndim == 1 else a for a in arrays)
        arrays[which][at] = value
    given = tuple(GpuArray(kernel, a) for a in arrays)
    with pytest.raises(PatternError, match=match):
        kernel.prepare(given)
    ready = kernel.prepare(given, check=False)  # counts as a weight without blocks
    problem = problem_of(weight, "linear", ("bias", "residual"))
    check_device_calls(Ready(kernel, ready), problem, Weight(weight.pattern, weight.data * 0), rng, (2, 20))


def test_weights_are_refused(small):
    """Before anything is launched."""
    kernel, weight = small
    data, indices, indptr = fewer(weight, 70)

    def gpu(a, **changes):
        return GpuArray(kernel, a, **changes)

    good = [gpu(data), gpu(indices), gpu(indptr)]
    for error, text, changed in (
        (ArgumentTypeError, "give .data, indices, indptr.", "weight"),
        (ArgumentTypeError, "data has dtype float64", {0: gpu(data.astype(np.float64))}),
        (PatternError, "data has shape", {0: gpu(data.reshape(-1, 12))}),
        (PatternError, "69 blocks and there are 70", {0: gpu(data[:69].copy())}),
        (ArgumentError, "not contiguous", {0: gpu(data, strides=(96, 12, 4))}),
        (ArgumentTypeError, "indices has dtype int16", {1: gpu(indices.astype(np.int16))}),
        (ArgumentTypeError, "indptr has dtype int64 and shape", {2: gpu(indptr[None].copy())}),
        (PatternError, "11 entries; 11 block rows need 12", {2: gpu(indptr[1:].copy())}),
        (ArgumentTypeError, "not on an NVIDIA GPU", {1: indices.tolist()}),
    ):
        with pytest.raises(error, match=text):
            kernel.prepare(changed if changed == "weight" else [changed.get(i, a) for i, a in enumerate(good)])
    more = weight.pattern.nnzb
    with pytest.raises(CapacityError, match=f"{more} blocks and 70 are planned, {more - 70} too many"):
        kernel.prepare(triple(kernel, weight))
    with pytest.raises(CapacityError, match=f"max_blocks={more}"):
        kernel.prepare(weight)
    with pytest.raises(PatternMismatchError, match="the kernel takes"):
        kernel.prepare(random_weight(0, (42, 90), (4, 3), 0.01))
    with pytest.raises(UnsupportedError, match="comes with the call"):
        kernel.update(weight)
    ready = kernel.prepare(tuple(good))
    with pytest.raises(PatternError, match="data has 69 blocks, the prepared 70"):
        ready.update(gpu(data[:69].copy()))
    x, y = gpu(np.zeros((2, 89), np.float32)), gpu(np.zeros((2, 42), np.float32))
    ready.kernel = None
    with pytest.raises(AttributeError):
        kernel(x, ready, y)


def test_weights_of_the_host_and_calls_with_them(small, rng):
    kernel, weight = small
    p = fewer(weight, 70)
    first = Weight(bsrgen.pattern.Pattern((42, 89), (4, 3), p[2], p[1]), p[0])
    problem = problem_of(first, "linear", ("bias", "residual"))
    for given in (first, first.tobsr(), kernel.prepare(first)):
        x, operands = problem.sample(rng, 7)
        y = GpuArray(kernel, problem.sample_out(rng, 7))
        there = {name: GpuArray(kernel, a) for name, a in operands.items()}
        assert kernel(GpuArray(kernel, x), given, y, **there) is y
        assert_right(problem, first, y.fetch(), x, operands)
    with pytest.raises(UnsupportedError, match="prepare it anew"):
        kernel.prepare(first.tobsr()).update(GpuArray(kernel, first.data))
    ready = kernel.prepare(first)
    ready.update(GpuArray(kernel, first.data))
    assert "of 70 blocks" in repr(ready)
    released = []
    kernel._release, kept = lambda memory: released.append(memory), kernel._release
    try:
        del ready, given
        mine = kernel.prepare(triple(kernel, first))
        del mine
    finally:
        kernel._release = kept
    assert len(released) == 1


def test_c_entry_refuses(small):
    kernel, _ = small
    library, c64, c = ctypes.CDLL(str(kernel.artifact.library)), ctypes.c_int64, ctypes.c_void_p
    size, prepare, look, words = (
        library[f"{kernel.name}_{f}"] for f in ("prepared_bytes", "prepare", "prepared", "error")
    )
    size.argtypes, size.restype, words.restype = [c64], c64, ctypes.c_char_p
    assert size(71) == size(-1) == -3
    assert 0 < size(0) < size(70)
    prepare.argtypes = [c, ctypes.c_int, ctypes.c_int, c, ctypes.c_int, ctypes.c_int, c]
    some = np.zeros(4096, np.float32).ctypes.data & ~15
    for weight, widths, memory, status in (
        ((71, some, some, some), (8, 8), some, -3), ((1, None, some, some), (8, 8), some, 2),
        ((1, some, None, some), (8, 8), some, 2), ((0, None, None, None), (8, 8), some, 2),
        ((1, some, some, some), (8, 2), some, 2), ((1, some, some, some), (4, 4), None, 2),
        ((1, some, some, some), (4, 4), some + 4, 2),
    ):  # fmt: skip
        record = np.array([part or 0 for part in weight], np.int64)
        assert prepare(record.ctypes.data, *widths, memory, 0, -1, None) == status
        assert b"planned" in words(status) or b"bad argument" in words(status)
    assert look(None, -1, None, None) == 2


def test_the_example_in_c(small):
    kernel, _ = small
    folder = kernel.artifact.folder
    words = [tool("gcc"), "-Wall", "-Wextra", "-Werror", "example.c", "-I.", "-L.", f"-l{kernel.name}"]
    subprocess.run([*words, "-Wl,-rpath,$ORIGIN", "-o", "program"], cwd=folder, check=True)
    said = subprocess.run([folder / "program"], capture_output=True, text=True, check=True).stdout
    assert said == "sm_80: no error\n"


@pytest.mark.parametrize("shape", [(5, 0), (3, 4)], ids=str)
def test_nothing_to_store(shape, rng, tmp_path):
    weight = random_weight(0, shape, (2, 2), 0)
    to_come = planned(weight, 0, np.dtype(np.float32))
    problem = replace(problem_of(weight, "spmm"), pattern=to_come.pattern)
    kernel = emulated(on_cores(problem, stream_n=4), to_come, tmp_path)
    ready = Ready(kernel, kernel.prepare(triple(kernel, weight)))
    x, given = problem.sample(rng, 3)
    assert not run(ready, x, np.ones((shape[0], 3), np.float32), given).any()


# ── mutations: what the emulation must find ──────────────────────────────────────────────────────────────────────────

MUTATIONS = {
    "bits of the last window": ("maps[w] = 0;", "maps[w] &= from ? ~0u : 0;"),
    "no barrier before ranks": ("count_bits(maps, before);\n", "if (from % 3) count_bits(maps, before);\n"),
    "ranks of one window": ("base[m] += before", "base[m] += 0 * before"),
    "pieces unsorted": ("piece = f.row_pieces[r] + rank_of(f, r, c)", "piece = f.row_pieces[r] + (q - f.first[r])"),
    "slots of rows": ("(rank_of(f, UNION, c) * COLUMN_PIECES + part) % STEP", "rank_of(f, r, c) % STEP"),
    "steps of one row": ("rank_of(f, r, c) * COLUMN_PIECES + (has", "rank_of(f, 0, c) * COLUMN_PIECES + (has"),
    "blocks as they came": ("(q * ROW_PIECES +", "(f.row_pieces[r] * ROW_PIECES +"),
    "no thread before this one": ("columns = before_me(columns, room)", "columns = 0"),
    "no end": ("TABLE(int, STEP_COLUMNS)[steps] = columns;", ""),
    "parts of the first row": ("+ half] = row_pieces[e / SHARES + 1];", "+ half] = row_pieces[1];"),
    "rows past the end": ("if (i >= HALF_ROWS) continue;", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", [None, *MUTATIONS])
def test_mutation_is_found(name, rng, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic, "MAP_BYTES", 8 * 32 * 5)
    weight = random_weight(3, (50, 5200), (6, 5), 0.02)
    to_come = planned(weight, None, np.dtype(np.float32))
    problem = problem_of(weight, "linear", "bias")
    plan = on_cores(replace(problem, pattern=to_come.pattern), rows=3, warps=8, features=30, stream_n=2)

    def change(text):
        assert name is None or MUTATIONS[name][0] in text
        return text.replace(*MUTATIONS[name]) if name else text

    kernel = emulated(plan, to_come, tmp_path, change)

    def check():
        ready = kernel.prepare(triple(kernel, weight, rng))
        check_device_calls(Ready(kernel, ready), problem, weight, rng, (1, 20))

    if name is None:
        check()
        return
    with pytest.raises((AssertionError, DeviceError, PatternError, pytest.fail.Exception)):
        check()


# ── plans ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90a"])
def test_candidates_are_sound(arch):
    weight = random_weight(0, (2048, 2048), (1, 1), 0.0)
    long = problem_of(planned(weight, 2048 * 1024, np.dtype(np.float32)))
    assert list(candidates(long, GPUS[arch])), "no tables that nvcc would have to read"
    for name in CASES:
        problem, _ = planned_for(name, case(name))
        plans = list(candidates(problem, GPUS[arch]))
        assert plans
        for plan in plans:
            view, sizes = dynamic.prepare_view(plan), dynamic.places(plan)
            assert 8 * view["maps"] * view["words"] <= dynamic.MAP_BYTES
            assert list(sizes.values()) == sorted(sizes.values())
            assert sizes["values"] % 128 == 0
