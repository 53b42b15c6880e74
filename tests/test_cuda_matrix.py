"""The kernel on matrix units without a GPU: ldmatrix, mma.sync and cp.async are those of tests/cuda/cuda_runtime.h."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from device_emulation import Victim, check_device_calls, emulated, run
from support import OPERATOR_NAMES, assert_right, problem_of, single

from bsrgen.backends.cuda import MatrixPlan, candidates
from bsrgen.backends.cuda.matrix import tokens
from bsrgen.dtypes import DTYPES
from bsrgen.gpus import GPUS, as_gpus
from bsrgen.pattern import Weight, random_weight

SM80 = GPUS["sm_80"]
BLOCKS = ((8, 8), (32, 1), (16, 16), (64, 64), (37, 53), (5, 7), (24, 200), (8, 16))
TOKENS = (0, 1, 5, 33, 150)


def weight_of(kind, shape, block, dtype, seed=1):
    density = {"empty": 0.0, "full": 1.0}.get(kind, 0.35)
    weight = single(shape, block) if kind == "one" else random_weight(seed, shape, block, density)
    data = np.rint(weight.data * 40) if dtype == "int8" else weight.data
    return Weight(weight.pattern, data.astype(DTYPES[dtype].numpy))


def plan_of(problem, rows=16, features=32, many=2, stages=3):
    return MatrixPlan(problem, SM80, rows, 1, features, tokens(many), tokens(1), 64, stages=stages)


def table():
    """Every block shape with both operators; types, kinds and plans in turn."""
    for turn, (block, operator) in enumerate(product(BLOCKS, OPERATOR_NAMES)):
        dtype = ("float16", "bfloat16", "int8")[(turn + turn // 2) % 3]
        knobs = {"rows": (16, 8, 32, 24)[turn % 4], "features": (32, 64, 24)[turn % 3], "many": 1 + turn // 2 % 2,
                 "stages": (2, 3, 4)[turn % 3]}  # fmt: skip
        kind = ("uniform", "full", "one", "uniform", "empty")[turn % 5]
        yield pytest.param(block, operator, dtype, kind, knobs, id=f"{block}-{operator}-{dtype}-{kind}")


@pytest.mark.parametrize(("block", "operator", "dtype", "kind", "knobs"), list(table()))
def test_table(block, operator, dtype, kind, knobs, rng, tmp_path):
    (R, C) = block
    shape = (R * max(2, 41 // R) + R // 2 + 1, C * max(2, 90 // C) - C // 2)
    weight = weight_of(kind, shape, block, dtype)
    problem = problem_of(weight, operator, ("bias", "silu") if kind == "full" else ())
    plan = plan_of(problem, **knobs)
    if plan.shared_bytes > 48 << 10:
        plan = replace(plan, stages=2)
    kernel = emulated(plan, weight, tmp_path)
    check_device_calls(kernel, problem, weight, rng, TOKENS)
    other = weight_of(kind, shape, block, dtype, seed=1)
    other = Weight(weight.pattern, (other.data.astype(np.float32) * 2).astype(weight.data.dtype))
    kernel.update(other)
    check_device_calls(kernel, problem, other, rng, (7,))


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_units_of_sm_75(operator, rng, tmp_path):
    """Products of half a tile and copies that land at once, which that architecture's code has."""
    weight = weight_of("uniform", (45, 93), (16, 8), "float16")
    problem = problem_of(weight, operator)
    kernel = emulated(plan_of(problem), weight, tmp_path, lambda text: f"#define BSRGEN_TURING\n{text}")
    check_device_calls(kernel, problem, weight, rng, TOKENS)


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_absent_blocks_contribute_nothing(operator, rng, tmp_path):
    """Tiles that a block does not fill hold zeros of X, too: Inf and NaN elsewhere in X reach no row."""
    weight = single((45, 80), (8, 8))
    weight = Weight(weight.pattern, weight.data.astype(np.float16))
    problem = problem_of(weight, operator)
    x, _ = problem.sample(rng, 40)
    (x if operator == "spmm" else x.T)[:72] = np.nan
    y = run(emulated(plan_of(problem), weight, tmp_path), x, problem.sample_out(rng, 40), {})
    assert_right(problem, weight, y, np.where(np.isnan(x), 0, x).astype(x.dtype))


MUTATIONS = {
    "copies not awaited": ("        copies_wait<STAGES - 2>();\n", ""),
    "one group too few": ("copies_wait<STAGES - 2>", "copies_wait<STAGES - 1>"),
    "no barrier": ("        __syncthreads();\n", ""),
    "one panel for all": ("panels + (ahead - first) % STAGES * PANEL", "panels"),
    "ring too short": ("% STAGES * PANEL", "% (STAGES - 1) * PANEL"),
    "a step left out": ("step + STAGES - 1;", "step + STAGES;"),
    "rows of the matrix exchanged": ("lane % 16) * STRIDE", "(lane ^ 8) % 16) * STRIDE"),
    "halves exchanged": ("lane / 16 * VECTOR_X);", "(1 - lane / 16) * VECTOR_X);"),
    "wrong fragment": ("w + 2 * j)", "w + j)"),
    "wrong strip": ("from + j * (64 * PAIR)", "from"),
    "W too far ahead": ("a, q + 1, last_tile", "a, q + 2, last_tile"),
    "W past the end": ("if (q < last) v =", "if (q <= last) v ="),
    "wrong row of Y": ("lane % 4 * 2 + e % 2", "lane % 4 * 2 + e / 2"),
    "tokens past the end": ("&& n0 + t < a.n) finish", ") finish"),
    "X past the end": ("there > 0 && n0 + t < a.n;", "there > 0;"),
    "last tile left out": ("q < end; q++", "q < end - 1; q++"),
}


@pytest.fixture(scope="module")
def victim():
    """A kernel in which all of them matter: several steps, tiles that are not full, two strips in a load."""
    weight = random_weight(3, (70, 168), (32, 8), 0.7)
    weight = Weight(weight.pattern, weight.data.astype(np.float16))
    return Victim(plan_of(problem_of(weight, "linear", "bias"), 32, 24), weight, (3, 70))


def test_victim_is_right(victim, rng, tmp_path):
    victim.check(tmp_path, rng)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_found(name, victim, rng, tmp_path):
    victim.assert_found(MUTATIONS[name], tmp_path, rng)


@pytest.mark.parametrize(("dtype", "block", "archs", "there"), [
    ("float16", (32, 1), ("sm_80", "sm_90"), True), ("bfloat16", (8, 8), ("sm_90",), True),
    ("float16", (32, 1), ("sm_75", "sm_90"), True), ("bfloat16", (32, 1), ("sm_75", "sm_90"), False),
    ("int8", (8, 8), ("sm_80",), True), ("float32", (32, 1), ("sm_80",), False),
    ("float16", (2, 2), ("sm_80",), False),
])  # fmt: skip
def test_where_matrix_units_serve(dtype, block, archs, there):
    problem = problem_of(weight_of("uniform", (128, 96), block, dtype))
    plans = list(candidates(problem, as_gpus(archs)[0]))
    assert any(plan.matrix for plan in plans) == there
    assert not all(plan.matrix for plan in plans)
    for plan in plans:
        assert plan.shared_bytes <= 48 << 10
        assert plan.counts(300).cycles > 0
