"""Pairs of weights and X that the kernel quantises, without a GPU: under tests/cuda/cuda_runtime.h."""

import numpy as np
import pytest
from device_emulation import Victim, check_device_calls, emulated, run
from support import assert_right
from test_cuda import plan_of as on_cores
from test_cuda_matrix import plan_of as on_units
from test_cuda_matrix import weight_of
from test_cuda_stream import streaming

from bsrgen.pattern import Weight
from bsrgen.problem import as_problem

TOKENS = (1, 3, 20, 40)
CASES = {
    "swiglu": (on_cores, {"warps": 6}, (6, 5), "linear", ("float32", None), ("swiglu", "bias"), False),
    "geglu": (on_cores, {}, (3, 4), "spmm", ("float64", None), ("geglu", "residual"), False),
    "int8 pair": (on_cores, {}, (4, 4), "linear", ("int8", "int8"), ("swiglu",), False),
    "quantized": (on_cores, {}, (4, 12), "linear", ("int8", "float32"), ("bias",), True),
    "quantized features": (on_cores, {"warps": 3}, (5, 3), "spmm", ("int8", "bfloat16"), (), True),
    "quantized pair": (on_cores, {"features": 64}, (8, 1), "linear", ("int8", "float32"), ("geglu", "bias"), True),
    "units": (on_units, {"rows": 16}, (16, 8), "linear", ("float16", None), ("swiglu", "bias"), False),
    "quantized on units": (on_units, {"rows": 16}, (16, 12), "linear", ("int8", "float32"), ("bias",), True),
    "features on units": (on_units, {"rows": 8, "many": 1}, (8, 3), "spmm", ("int8", "bfloat16"), ("geglu",), True),
    "units of int8": (on_units, {"rows": 8}, (8, 6), "spmm", ("int8", None), ("geglu",), False),
}


def case(name):
    make, knobs, block, operator, (w, x), epilogue, quantize = CASES[name]
    shape = (62, 80 if name == "quantized on units" else 75)  # rows of X that are aligned, and that are not
    weight = weight_of("uniform", shape, block, w)
    problem = as_problem(operator, weight.pattern, w, x, None, epilogue, quantize_x=quantize)
    return streaming(make(problem, few_n=20, **knobs) if make is on_cores else make(problem, **knobs)), weight


@pytest.mark.parametrize("name", CASES)
def test_cases(name, rng, tmp_path):
    plan, weight = case(name)
    kernel = emulated(plan, weight, tmp_path)
    check_device_calls(kernel, plan.problem, weight, rng, TOKENS)
    other = Weight(weight.pattern, -weight.data)
    kernel.update(other)
    check_device_calls(kernel, plan.problem, other, rng, (3,))


@pytest.mark.parametrize("name", ["quantized", "quantized features"])
def test_tokens_that_are_quantised_alone(name, rng, tmp_path):
    """Of zeros, of subnormal numbers, of infinities, with one NaN: each has its own scale, and spoils no other."""
    plan, weight = case(name)
    problem = plan.problem
    x, given = problem.sample(rng, 24)
    tokens = x if problem.operator.token_axis == 0 else x.T
    tokens[0], tokens[1] = 0, (tokens[1] * 1e-30).astype(x.dtype)
    tokens[2, 3], tokens[3, 5] = np.inf, np.nan
    kernel = emulated(plan, weight, tmp_path)
    for n in (4, 24):
        some = np.ascontiguousarray(tokens[:n] if problem.operator.token_axis == 0 else tokens[:n].T)
        assert_right(problem, weight, run(kernel, some, problem.sample_out(rng, n), given), some, given)


MUTATIONS = {
    "gate of the same rows": ("group + THREAD_BLOCKS", "group"),
    "no barrier between the halves": ("    __syncthreads();\n    walk", "    walk"),
    "scale of the gate's rows": ("a.w_scale[m + 32]", "a.w_scale[m]"),
    "sums exchanged": ("sums.of[HALVES - 1][i], sums.of[0][i]", "sums.of[0][i], sums.of[HALVES - 1][i]"),
    "the gate's range": ("part_begin[HALVES * unit + half]", "part_begin[HALVES * unit]"),
    "largest of some": ("for (int f = lane; f < K; f += 32)", "for (int f = lane; f < K - 32; f += 32)"),
    "no scales": ("    scales_of_x<WIDTH, THREADS>", "    if (n0) scales_of_x<WIDTH, THREADS>"),
    "another token's": ("k0 + c, inverse[t])", "k0 + c, inverse[0])"),
    "scales not awaited": ("every Y of that token */\n    }\n    __syncthreads();", "*/\n    }"),
}  # fmt: skip


@pytest.fixture(scope="module")
def victim():
    plan, weight = case("quantized pair")
    return Victim(plan, weight, (3, 40))


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_found(name, victim, rng, tmp_path):
    victim.assert_found(MUTATIONS[name], tmp_path, rng)


ON_UNITS = {
    "another token's scale": ("quantized(get_x(four[i]), inverse[t])", "quantized(get_x(four[i]), inverse[0])"),
    "bytes in another order": ("inverse[t]) << 8 * i;", "inverse[t]) << 8 * (3 - i);"),
    "X past the end": ("if (a.aligned && n < a.n && k0", "if (a.aligned && k0"),
    "scales of other tokens": ("scale[t]);", "scale[t ^ 1]);"),
}


@pytest.mark.parametrize("name", ON_UNITS)
def test_mutation_on_units_is_found(name, rng, tmp_path):
    plan, weight = case("quantized on units")
    Victim(plan, weight, (20, 40)).assert_found(ON_UNITS[name], tmp_path, rng)
