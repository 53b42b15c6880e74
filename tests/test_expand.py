"""Single rows expanded in registers (runtime/bsrgen_expand.h): calls of few tokens, bits instead of offsets."""

from dataclasses import replace

import numpy as np
import pytest
from support import assert_right, build_plan, c_pack, check_calls, framed, make_weight, problem_of

from bsrgen.backends.c import CPlan, candidates
from bsrgen.dtypes import DTYPES
from bsrgen.pattern import Weight
from bsrgen.targets import TARGETS

TARGET = "x86-64-v4-bf16"
PLAIN, BF16, INT8 = ("float32",) * 3, ("bfloat16",) * 3, ("int8", "int8", "float32")
TYPES = (PLAIN, ("float64",) * 3, BF16, ("bfloat16", "float32", "float32"), INT8, ("int8", "float32", "float32"))
on_avx512 = pytest.mark.isa(TARGET)


def weight_of(kind: str, shape, blocksize, dtype: str) -> Weight:
    if dtype in ("float32", "float64"):
        return make_weight(kind, shape, blocksize, dtype)
    weight = make_weight(kind, shape, blocksize, "float32")
    data = np.rint(weight.data * 30).clip(-127, 127) if dtype == "int8" else weight.data
    return Weight(weight.pattern, data.astype(DTYPES[dtype].numpy))


def expanding(weight: Weight, types, operator: str = "linear") -> list[CPlan]:
    """The plans over the problem's own blocks whose calls of few tokens expand rows, one a product."""
    problem = problem_of(weight, operator, (), *(DTYPES[name] for name in types))
    plans = [plan for plan in candidates(problem, TARGETS[TARGET]) if plan.bits and not plan.cover]
    return list({plan.product: plan for plan in plans}.values())


@on_avx512
@pytest.mark.parametrize("blocksize", [(1, 1), (1, 2), (1, 4), (1, 8)], ids=str)
@pytest.mark.parametrize("types", TYPES, ids="-".join)
def test_every_type(types, blocksize, rng, tmp_path):
    weight = weight_of("powerlaw", (23, 203), blocksize, types[0])
    plans = expanding(weight, types)
    assert plans or blocksize[1] * DTYPES[DTYPES[types[0]].real].bytes >= 16  # which fill a vector of their own
    for number, plan in enumerate(plans):
        (folder := tmp_path / str(number)).mkdir(mode=0o700)
        kernel = build_plan(plan, weight, folder)
        check_calls(kernel, plan.problem, weight, rng, (0, 1, 2, 3, 7, 8, 16, 17))


@on_avx512
@pytest.mark.parametrize("types", [PLAIN, BF16, INT8], ids="-".join)
@pytest.mark.parametrize("kind", ["empty", "one", "full", "uniform"])
def test_panels_and_patterns(types, kind, rng, tmp_path):
    weight = weight_of(kind, (40, 300), (1, 1), types[0])
    dense_enough = weight_of("uniform", (40, 300), (1, 1), types[0])
    plan = expanding(dense_enough, types)[0]
    problem = problem_of(weight, "linear", (), *(DTYPES[name] for name in types))
    plan = replace(plan, problem=problem, tokens=replace(plan.tokens, k_panel=128))
    kernel = build_plan(plan, weight, tmp_path)
    check_calls(kernel, problem, weight, rng, (1, 2, 5, 16))
    packed = np.frombuffer(
        kernel.artifact.library.parent.joinpath(f"{kernel.name}_values_0.bin").read_bytes(), np.uint8
    )
    np.testing.assert_array_equal(c_pack(kernel)(weight.data, 0), packed)


@on_avx512
@pytest.mark.parametrize("operator", ["linear", "spmm"])
@pytest.mark.parametrize("types", [PLAIN, BF16], ids="-".join)
def test_nothing_leaks_from_x(types, operator, rng, tmp_path):
    weight = weight_of("uniform", (31, 130), (1, 1), types[0])
    plan = expanding(weight, types, operator)[0]
    assert not plan.zero_filled
    kernel = build_plan(plan, weight, tmp_path)
    for bad in (np.nan, np.inf):
        x, _ = plan.problem.sample(rng, 2)
        for k in (0, 57, 129):
            spoilt = x.copy()
            spoilt[(slice(None), k) if operator == "linear" else (k, slice(None))] = bad
            assert_right(plan.problem, weight, kernel(framed(spoilt)), spoilt)


def test_other_panels_targets_and_blocks_do_not_expand():
    weight = weight_of("uniform", (16, 256), (1, 1), "bfloat16")
    problem = problem_of(weight, "linear", (), *(DTYPES[name] for name in BF16))
    assert not any(plan.bits for plan in candidates(problem, TARGETS["x86-64-v3"]))
    assert all(
        plan.panels == 1 or plan.k_panel % plan.bits.step == 0
        for plan in candidates(problem, TARGETS[TARGET])
        if plan.bits
    )
    sparse = Weight(make_weight("one", (16, 256), (1, 1), "float32").pattern, np.ones((1, 1, 1), np.float32))
    assert not any(plan.bits for plan in candidates(problem_of(sparse), TARGETS[TARGET]))  # bits beyond reason


def test_bits_mark_what_is_stored(rng):
    """The table against the dense mask, on every machine."""
    weight = weight_of("uniform", (9, 300), (1, 2), "bfloat16")
    plan = next(p for p in expanding(weight, BF16) if p.product.name == "bf16")
    p, bits = plan.packing.blocks, plan.bits
    table = plan.packing.stored_bits(bits)
    marks = np.unpackbits(table.view(np.uint8), bitorder="little").reshape(9, -1)
    mask = np.zeros((9, p.block_cols * p.C), np.uint8)
    for row, column in zip(p.rows, p.indices, strict=True):
        mask[row, column * p.C : (column + 1) * p.C] = 1
    np.testing.assert_array_equal(marks[:, : mask.shape[1]], mask)
    assert not marks[:, mask.shape[1] :].any()
