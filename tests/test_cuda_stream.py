"""The kernels for few tokens, which stream W, without a GPU: under tests/cuda/cuda_runtime.h."""

from dataclasses import replace

import pytest
from device_emulation import Victim, check_device_calls, emulated
from support import problem_of, reduced_case
from test_cuda import plan_of as on_cores
from test_cuda_matrix import plan_of as on_units
from test_cuda_matrix import weight_of

from bsrgen.pattern import random_weight

TOKENS = (1, 3, 5, 16)


def streaming(plan, warps=2, **changes):
    """`plan` with a kernel for few tokens, in which `warps` share a part."""
    plan = replace(plan, stream_n=16)
    plan.__dict__["stream"] = replace(plan.stream, warps=warps, **changes)
    return plan


@pytest.mark.parametrize(("block", "dtype", "operator", "kind", "knobs"), [
    ((1, 1), "float32", "linear", "powerlaw", {"rows": 1, "warps": 8}), ((4, 4), "float64", "spmm", "uniform", {}),
    ((5, 7), "float32", "spmm", "full", {"rows": 5, "features": 3}), ((37, 53), "float32", "linear", "uniform", {}),
    ((64, 64), "float16", "linear", "one", {"rows": 8, "warps": 8}), ((32, 1), "float32", "linear", "empty", {}),
    ((3, 200), "bfloat16", "spmm", "uniform", {"rows": 3}),
])  # fmt: skip
def test_on_ordinary_cores(block, dtype, operator, kind, knobs, rng, tmp_path):
    (R, C) = block
    shape = (R * max(2, 41 // R) + R // 2 + 1, C * max(2, 90 // C) - C // 2)
    weight = weight_of(kind, shape, block, dtype)
    problem = problem_of(weight, operator, ("bias", "residual") if kind == "empty" else ())
    kernel = emulated(streaming(on_cores(problem, **knobs), 1 + (R > 4)), weight, tmp_path)
    check_device_calls(kernel, problem, weight, rng, (*TOKENS, 19))


def test_reduced_types(rng, tmp_path):
    for number, types in enumerate((("int8", "int8", "int8"), ("int8", "float32", "float32"))):
        problem, weight = reduced_case(types)
        (folder := tmp_path / str(number)).mkdir()
        check_device_calls(emulated(streaming(on_cores(problem)), weight, folder), problem, weight, rng, TOKENS)


@pytest.mark.parametrize(("block", "dtype", "operator", "kind", "rows"), [
    ((8, 8), "float16", "linear", "uniform", 8), ((32, 1), "bfloat16", "linear", "full", 32),
    ((37, 53), "float16", "spmm", "uniform", 16), ((64, 64), "bfloat16", "linear", "one", 64),
    ((16, 6), "float16", "linear", "empty", 16), ((24, 16), "float16", "spmm", "uniform", 24),
])  # fmt: skip
def test_on_matrix_units(block, dtype, operator, kind, rows, rng, tmp_path):
    (R, C) = block
    weight = weight_of(kind, (R * 3 - R // 2, C * max(3, 90 // C) - C // 2), block, dtype)
    problem = problem_of(weight, operator, "bias")
    plan = streaming(on_units(problem, rows), 1 + (R > 30))
    if rows == 32:  # half of a piece row
        plan.__dict__["stream"] = replace(plan.stream, rows=16)
    check_device_calls(emulated(plan, weight, tmp_path), problem, weight, rng, (*TOKENS, 17))


MUTATIONS = {
    "sums of other warps not awaited": (
        "        __syncthreads();\n#pragma unroll\n        for (int i = 0; i < MINE",
        "#pragma unroll\n        for (int i = 0; i < MINE",
    ),
    "one warp's sums": ("w < STREAM_WARPS; w++) sums", "w < 1; w++) sums"),
    "a part of the rows": ("if (e < OF_ALL)", "if (e < OF_ALL - 1)"),
    "another part": ("part_end[HALVES * unit + half]", "part_end[half]"),
    "another share": ("a.values + share *", "a.values + 0 * share *"),
    "loads past the end": ("next < last", "next <= last + 64"),
    "W of another column": ("ring[i][r], x[t]", "ring[0][r], x[t]"),
    "stale loads": (
        ", values + (int64_t)next * PIECE_ROWS, next < last",
        ", values + (int64_t)at * PIECE_ROWS, next < last",
    ),
    "half of the tree": ("for (int distance = 16;", "for (int distance = 1;"),
    "tree too wide": ("if (column + distance < STREAM_COLUMNS)", ""),
    "tokens past the end": ("&& n < a.n) ::finish", ") ::finish"),
    "X past the end": ("x[t] = there && n0 + t < a.n ?", "x[t] = there ?"),
    "columns left out": ("first += DEPTH * STEP", "first += 2 * DEPTH * STEP"),
}
ON_UNITS = {
    "another share": (" + share * (STREAM_ROWS * 8)", " + 0 * share"),
    "loads past the end": ("next < end", "next < end + 64"),
    "words exchanged": ("(lane % 4 + e / 2 * 4)", "(lane % 4 + e % 2 * 4)"),
    "tokens exchanged": ("n0 + lane / 4 + e % 2 * 8", "n0 + lane / 4 + e / 2 * 8"),
    "X past the end": ("if (n >= a.n) return 0;", ""),
    "features past the end": ("if (k < K) word", "word"),
    "wrong fragment": ("ring[i] + 2 * j)", "ring[i] + j)"),
    "wrong tile": ("TILE_K * q + (lane", "TILE_K * begin + (lane"),
    "wrong row": ("8 * j + lane % 4 * 2 + e % 2, t = lane", "8 * j + lane % 4 * 2 + e / 2, t = lane"),
}


@pytest.fixture(scope="module")
def victims():
    """Several parts, warps, shares of rows and turns of the ring; columns that do not fill a warp, ragged blocks."""
    weight = random_weight(3, (83, 783), (40, 5), 0.6)
    plan = on_cores(problem_of(weight, "linear", "bias"), rows=5, warps=8)
    cores = Victim(streaming(plan, 2, rows=20, lanes=5), weight, (1, 3))
    weight = weight_of("uniform", (61, 1001), (32, 3), "float16", 3)
    units = on_units(problem_of(weight, "linear", "bias"), 32)
    return cores, Victim(streaming(units, 2, rows=16, loads=2), weight, (3,))


def test_victims_are_right(victims, rng, tmp_path):
    for number, victim in enumerate(victims):
        (folder := tmp_path / str(number)).mkdir()
        victim.check(folder, rng)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_found(name, victims, rng, tmp_path):
    victims[0].assert_found(MUTATIONS[name], tmp_path, rng)


@pytest.mark.parametrize("name", ON_UNITS)
def test_mutation_on_units_is_found(name, victims, rng, tmp_path):
    victims[1].assert_found(ON_UNITS[name], tmp_path, rng)
