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
