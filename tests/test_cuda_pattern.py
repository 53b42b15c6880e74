"""Products at a block pattern by CUDA text without a GPU, under tests/cuda/cuda_runtime.h; and their machine code."""

import numpy as np
import pytest
from device_emulation import GpuArray, emulated_source, said
from support import CANARY, frame_is_intact, framed, make_weight

import bsrgen
from bsrgen.backends.cuda import emit_pattern
from bsrgen.backends.cuda.pattern_candidates import pattern_candidates
from bsrgen.backends.cuda.pattern_plan import CoresPlan, UnitsPlan
from bsrgen.errors import ArgumentError, ArgumentTypeError, DeviceError
from bsrgen.gpus import GPUS, as_gpus
from bsrgen.pattern import Weight
from bsrgen.pattern_device import PatternDeviceKernel
from bsrgen.pattern_problem import as_pattern_problem

SM80 = GPUS["sm_80"]


def problem_of(kind, shape, block, operator, dtype, epilogue=()):
    return as_pattern_problem(operator, make_weight(kind, shape, block, "float32").pattern, dtype, epilogue=epilogue)


def emulated(plan, folder, change=lambda text: text):
    p = plan.problem.pattern
    kernel = emulated_source(emit_pattern((plan,)), Weight(p, np.zeros((p.nnzb, *p.blocksize), np.int8)), folder, change)
    assert isinstance(kernel, PatternDeviceKernel)
    return kernel


def call(kernel, arrays, old, **given):
    """One call, everything brought to the "GPU" and back."""
    y = GpuArray(kernel, old)
    given = {name: GpuArray(kernel, a) if np.ndim(a) else a for name, a in given.items()}
    assert kernel(*[GpuArray(kernel, a) for a in arrays], out=y, **given) is y
    return y.fetch()


def check(kernel, problem, rng, lengths):
    """Plainly and inside frames of NaN, with scales of rows and what was there where the kernel takes them."""
    names = [step.name for step in problem.epilogue]
    for n in lengths:
        arrays, given, scale = problem.sample(rng, n), {}, 1.0
        old = np.full(problem.result_shape(n), np.nan, problem.real.numpy)
        if "scale" in names:
            given["scale"] = scale = rng.uniform(0.5, 2, problem.pattern.M).astype(problem.real.numpy)
        if "accumulate" in names:
            old = rng.standard_normal(old.shape).astype(old.dtype)
            given |= {"alpha": 2.0, "beta": -0.5}
        expected, bound = problem.reference(arrays, scale)
        if "accumulate" in names:
            expected, bound = 2 * expected - 0.5 * old, 3 * bound + 1e-6
        y = call(kernel, arrays, old.copy(), **given)
        error = np.abs(y.astype(np.float64) - expected)
        assert (error <= bound).all(), f"n = {n}: {(~(error <= bound)).sum()} of {y.size} wrong"
        if n:
            out = framed(old.reshape(1, -1), (1, 4), (1, 4), fill=CANARY)
            inside = GpuArray(kernel, out)
            memory = inside.__cuda_array_interface__
            inside.__cuda_array_interface__ = memory | {"shape": old.shape, "strides": None}
            kernel(*[GpuArray(kernel, framed(a)) for a in arrays], out=inside,
                   **{name: GpuArray(kernel, a) if np.ndim(a) else a for name, a in given.items()})  # fmt: skip
            np.testing.assert_array_equal(inside.fetch().reshape(y.shape), y)
            assert frame_is_intact(out)


CORES, UNITS = (4, 4, 4, 8, 4), (16, 1)
CASES = {  # kind, shape, blocks, operator, type, epilogue, plan, knobs, lengths
    "nothing is a multiple": ("uniform", (23, 50), (3, 5), "sddmm", "float32", (), CoresPlan, (3, 2, 1, 16, 8), (0, 1, 37)),
    "linear, pieces": ("uniform", (70, 40), (37, 4), "linear_grad", "float64", ("scale",), CoresPlan, CORES, (1, 70)),
    "single elements": ("powerlaw", (20, 90), (1, 1), "linear_grad", "float32", ("scale", "accumulate"), CoresPlan,
                        (1, 4, 1, 8, 16), (0, 5, 130)),
    "one slice": ("full", (20, 12), (2, 8), "sddmm", "float16", (), CoresPlan, (2, 4, 4, 32, 1), (33,)),
    "one block": ("one", (33, 64), (1, 32), "linear_grad", "bfloat16", (), CoresPlan, (1, 2, 1, 16, 8), (9,)),
    "units, linear": ("uniform", (70, 90), (16, 16), "linear_grad", "bfloat16", (), UnitsPlan, (16, 1), (0, 1, 40, 150)),
    "units, gathered": ("uniform", (70, 90), (32, 1), "linear_grad", "float16", ("scale",), UnitsPlan, (32, 2), (3, 100)),
    "units, sddmm": ("banded", (70, 90), (8, 8), "sddmm", "float16", ("accumulate",), UnitsPlan, (8, 1), (1, 72, 133)),
    "units, odd": ("uniform", (50, 60), (20, 12), "sddmm", "bfloat16", (), UnitsPlan, (24, 1, 64, 2), (5, 65)),
    "empty": ("empty", (20, 12), (4, 4), "sddmm", "float32", (), CoresPlan, CORES, (4,)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_products_match_numpy(name, rng, tmp_path):
    kind, shape, block, operator, dtype, epilogue, plan, knobs, lengths = CASES[name]
    problem = problem_of(kind, shape, block, operator, dtype, epilogue)
    check(emulated(plan(problem, SM80, *knobs), tmp_path), problem, rng, lengths)
