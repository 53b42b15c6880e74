"""mode="pit" by the CUDA backend without a GPU: its text runs under tests/cuda/cuda_runtime.h, and on no GPU."""

from dataclasses import replace

import hypothesis
import numpy as np
import pytest
from device_emulation import GpuArray, Victim, check_device_calls, emulated, run
from hypothesis import strategies as st
from support import assert_right

import bsrgen
from bsrgen.backends.cuda import CudaPlan, Lanes, MatrixPlan, candidates
from bsrgen.backends.cuda.matrix import MatrixFeaturesPlan, tokens
from bsrgen.dtypes import DTYPES
from bsrgen.errors import ArgumentError, ArgumentTypeError
from bsrgen.given import Given
from bsrgen.gpus import GPUS
from bsrgen.operators import OPERATORS
from bsrgen.pattern import Weight, as_weight
from bsrgen.pit_device import PitDeviceKernel
from bsrgen.problem import Problem, as_problem

SM80 = GPUS["sm_80"]
EXPERTS = 5
TOKENS = (0, 1, 5, 33, 131)
FIXTURE = [hypothesis.HealthCheck.function_scoped_fixture]  # `made` only looks kernels up


def case(axis, dtype="float32", shape=(104, 77), mask_block=None, epilogue=(), blocksize=None, out_dtype=None):
    """A problem as compile makes it, and its weight."""
    shape = (EXPERTS, 48, shape[1]) if axis == "experts" else shape
    rng = np.random.default_rng(0)
    W = rng.integers(-127, 128, shape).astype(np.int8) if dtype == "int8" else rng.standard_normal(shape, np.float32)
    if blocksize:
        W = [as_weight(w * (rng.random((w.shape[0] // blocksize[0], 1)) < 0.7).repeat(blocksize[0], 0),
                       blocksize=blocksize, dtype=dtype) for w in (W if axis == "experts" else [W])]  # fmt: skip
        W = W if axis == "experts" else W[0]
    given = Given(W, None, None, "pit", None, axis, mask_block, False)
    weight, _, pit = given.weight(DTYPES[dtype], False, given.along(OPERATORS["linear"]))
    return as_problem("linear", weight.pattern, dtype, None, out_dtype, epilogue, pit=pit), weight


def simt(problem, rows=8, warps=4, features=16, many=Lanes(2, 32), few=Lanes(2, 16), few_n=32):  # noqa: B008
    strips = -(-problem.pattern.R // rows)
    return CudaPlan(problem, SM80, rows, min(warps, strips), features, many, few, few_n)


def units(problem, rows=32, features=32, many=2, stages=2):
    return MatrixPlan(problem, SM80, rows, 1, features, tokens(many), tokens(1), 64, stages=stages)


def live(problem, rows=8, features=16, stream_n=16):
    return replace(simt(problem, rows, 4, features, Lanes(2, 32), Lanes(1, 32), 32), stream_n=stream_n)


def live_units(problem, rows=32, stages=3, stream_n=16):
    features = 32 // problem.dtype.bytes
    plan = MatrixFeaturesPlan(problem, SM80, rows, 1, features, tokens(1), tokens(1), 64, stream_n)
    return replace(plan, stages=stages)


CASES = {
    "tokens f32": (simt, {"axis": "tokens", "epilogue": ("bias", "gelu", "token_scale", "residual")}, {}),
    "tokens bf16": (units, {"axis": "tokens", "dtype": "bfloat16", "epilogue": ("bias",)}, {}),
    "tokens int8": (simt, {"axis": "tokens", "dtype": "int8", "shape": (64, 96)}, {"features": 32}),
    "experts f32": (simt, {"axis": "experts", "epilogue": ("bias", "token_scale", "residual", "accumulate")}, {}),
    "experts blocks": (simt, {"axis": "experts", "dtype": "float64", "blocksize": (12, 7)}, {"rows": 4}),
    "experts f16": (units, {"axis": "experts", "dtype": "float16", "shape": (0, 96)}, {"rows": 16, "stages": 3}),
    "experts int8": (units, {"axis": "experts", "dtype": "int8", "epilogue": ("relu",)}, {"many": 1}),
    "outputs f32": (simt, {"axis": "outputs", "mask_block": (20, 32), "epilogue": ("scale", "accumulate")}, {}),
    "outputs fine": (simt, {"axis": "outputs", "mask_block": (3, 8), "dtype": "float16"}, {"rows": 4}),
    "outputs bf16": (units, {"axis": "outputs", "mask_block": (1, 16), "dtype": "bfloat16", "out_dtype": "float32"},
                     {"rows": 16}),
    "outputs int8": (simt, {"axis": "outputs", "mask_block": (64, 16), "dtype": "int8"}, {"many": Lanes(4, 8)}),
    "features f32": (live, {"axis": "features", "epilogue": ("bias", "relu"), "shape": (104, 560)}, {}),
    "features f64": (live, {"axis": "features", "dtype": "float64"}, {"rows": 4, "stream_n": 0}),
    "features int8": (live, {"axis": "features", "dtype": "int8"}, {}),
    "features bf16": (live_units, {"axis": "features", "dtype": "bfloat16", "shape": (72, 200)}, {}),
    "features f16": (live_units, {"axis": "features", "dtype": "float16"}, {"stages": 2, "stream_n": 0, "rows": 64}),
}  # fmt: skip
_KERNELS: dict[str, tuple[PitDeviceKernel, Problem, Weight]] = {}


@pytest.fixture
def made(tmp_path_factory):
    """Each kernel is compiled once for all tests."""

    def make(name: str) -> tuple[PitDeviceKernel, Problem, Weight]:
        if name not in _KERNELS:
            plan_of, options, knobs = CASES[name]
            problem, weight = case(**options)
            plan = plan_of(problem, **knobs)
            assert plan.shared_bytes <= 48 << 10
            kernel = emulated(plan, weight, tmp_path_factory.mktemp("pit"))
            _KERNELS[name] = kernel, problem, weight
        return _KERNELS[name]

    return make


@pytest.mark.parametrize("name", CASES)
def test_right_and_nothing_else_is_written(name, made, rng):
    kernel, problem, weight = made(name)
    assert isinstance(kernel, PitDeviceKernel)
    check_device_calls(kernel, problem, weight, rng, TOKENS)


def gathered(name: str, made, rng, n: int, chosen):
    """A call of n tokens of kernel `name` that selects `chosen`: (kernel, y, what out was, right, x, operands)."""
    kernel, problem, weight = made(name)
    x, given = problem.sample(rng, n)
    given |= {kernel.selects: chosen}
    old = problem.sample_out(rng, n)
    y = run(kernel, x, old.copy(), given)
    assert_right(problem, weight, y, x, given, old)
    return kernel, y, old, x, given


def bits(shape):
    """Masks of all kinds, all-zero and all-one ones often."""
    size = int(np.prod(shape))
    some = st.lists(st.booleans(), min_size=size, max_size=size).map(lambda v: np.array(v, bool).reshape(shape))
    return st.one_of(st.just(np.zeros(shape, bool)), st.just(np.ones(shape, bool)), some)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=16, deadline=None, suppress_health_check=FIXTURE)
def test_any_selection(data, made):
    name = data.draw(st.sampled_from(("tokens bf16", "experts f32", "outputs f32")))
    n = data.draw(st.integers(0, 70))
    _, problem, _ = made(name)
    pit = problem.pit
    if pit.axis.name == "experts":
        ids = st.one_of(st.integers(-2, EXPERTS + 1), st.just(3))  # those of no expert go to none
        chosen = np.array(data.draw(st.lists(ids, min_size=n, max_size=n)), np.int32)
        chosen[chosen >= EXPERTS] = -7
    else:
        chosen = data.draw(bits(pit.selection_shape(n, problem.pattern.M)))
    _, y, old, _, _ = gathered(name, made, np.random.default_rng(3), n, chosen)
    assert (y == old)[~pit.kept(chosen, n, problem.pattern.M)].all()


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=10, deadline=None, suppress_health_check=FIXTURE)
def test_any_zeros_of_x(data, made):
    name = data.draw(st.sampled_from(("features bf16", "features int8")))
    n = data.draw(st.integers(0, 40))
    kernel, problem, weight = made(name)
    x, given = problem.sample(np.random.default_rng(3), n)
    K = x.shape[1]
    x = np.where(data.draw(bits((n, 8))).repeat(-(-K // 8), 1)[:, :K], x, x.dtype.type(0))
    given["tile"] = data.draw(st.sampled_from((0, *kernel.tiles)))
    assert_right(problem, weight, run(kernel, x, problem.sample_out(np.random.default_rng(0), n), given), x, given)


@pytest.mark.parametrize("name", ["tokens bf16", "experts f32", "outputs f32"])
def test_a_token_has_the_same_bits_in_any_company(name, made, rng):
    """Which tokens share a tile changes nothing, nor what else is selected; what is left out is not read: NaN."""
    kernel, problem, _ = made(name)
    n, pit, M = 90, problem.pit, problem.pattern.M
    everything = np.full(n, 2, np.int32) if pit.axis.name == "experts" else np.ones(pit.selection_shape(n, M), bool)
    _, whole, _, x, given = gathered(name, made, rng, n, everything)
    for share in (0.3, 0.05):
        some = everything.copy()
        some[rng.random(some.shape) >= share] = -1 if pit.axis.name == "experts" else False
        kept = pit.kept(some, n, M)
        out = np.full(whole.shape, 7).astype(whole.dtype)
        if any(o.kind == "out" for step in problem.epilogue for o in step.operands):
            out = problem.sample_out(np.random.default_rng(5), n)
        x2 = np.where(kept.any(1)[:, None], x, x.dtype.type("nan"))
        first = run(kernel, x2, out.copy(), given | {kernel.selects: some})
        plain = run(kernel, x, out.copy(), given | {kernel.selects: everything})
        np.testing.assert_array_equal(first[kept], plain[kept])
        np.testing.assert_array_equal(first[~kept], out[~kept])


@pytest.mark.parametrize("name", ["features int8", "features bf16"])
def test_columns_without_x_are_not_read(name, made, rng):
    """W is NaN (of int8: something) where X is zero; and a token has the same bits in any company."""
    kernel, problem, weight = made(name)
    K, word = problem.pattern.K, 32 // problem.dtype.bytes if "16" in name else 4
    live = rng.random(-(-K // word)) < 0.3
    live = live.repeat(word)[:K]
    dead = np.broadcast_to(~np.pad(live, (0, weight.data.shape[2] - K)), weight.data.shape)
    poison = np.where(dead, np.asarray(99 if problem.dtype.name == "int8" else np.nan), weight.data)
    poisoned = Weight(weight.pattern, poison.astype(weight.data.dtype))
    for n in (3, 70):
        x, given = problem.sample(rng, n)
        x = np.where(live, rng.standard_normal(x.shape) * 40, 0).astype(x.dtype)
        right = run(kernel, x, problem.sample_out(rng, n), given)
        assert_right(problem, weight, right, x, given)
        kernel.update(poisoned)
        np.testing.assert_array_equal(run(kernel, x, problem.sample_out(rng, n), given), right)
        kernel.update(weight)
        few = np.where(np.arange(n)[:, None] % 3 == 1, x, x.dtype.type(0))
        np.testing.assert_array_equal(run(kernel, few, problem.sample_out(rng, n), given)[1::3], right[1::3])


def test_which_tokens_are_taken_from_arrays_of_the_device(made, rng):
    kernel, problem, _ = made("experts f32")
    x, given = problem.sample(rng, 6)
    operands = {name: GpuArray(kernel, a) if np.ndim(a) else a for name, a in given.items() if name != "routing"}
    y, ids = GpuArray(kernel, problem.sample_out(rng, 6)), np.arange(6, dtype=np.int32)
    there = GpuArray(kernel, x)
    refused = [
        (ArgumentTypeError, "'routing' is missing", {}),
        (ArgumentTypeError, "expected int32", {"routing": GpuArray(kernel, ids.astype(np.int64))}),
        (ArgumentTypeError, "not on an NVIDIA GPU", {"routing": ids}),
        (ArgumentError, "routing has shape", {"routing": GpuArray(kernel, ids[:4].copy())}),
        (ArgumentTypeError, "unexpected operand 'live'", {"live": GpuArray(kernel, ids)}),
        (ArgumentTypeError, "given twice", {"routing": GpuArray(kernel, ids), "select": GpuArray(kernel, ids)}),
    ]
    for error, text, call in refused:
        with pytest.raises(error, match=text):
            kernel(there, out=y, **operands | call)
    kernel(there, GpuArray(kernel, ids), y, **operands)
    with pytest.raises(ArgumentTypeError, match="takes no selection"):
        made("features int8")[0](there, GpuArray(kernel, ids))
    mask, _, _ = made("outputs f32")
    x, given = mask.problem.sample(rng, 41)
    wide = np.zeros((3, 8), bool)
    wide[:, :4] = given["mask"]
    old = mask.problem.sample_out(rng, 41)
    apart = run(mask, x, old.copy(), given | {"mask": wide[:, :4]})  # rows of the mask may lie apart
    np.testing.assert_array_equal(apart, run(mask, x, old.copy(), given))
    del given["mask"]
    assert_right(mask.problem, made("outputs f32")[2], run(mask, x, old.copy(), given), x, given, old)


def test_new_values_and_folders(made, rng, tmp_path):
    kernel, problem, _ = made("experts f32")
    W = rng.standard_normal((EXPERTS, 48, 77), np.float32)
    loaded = bsrgen.load(kernel.artifact.folder)
    loaded.update(list(W))
    again = bsrgen.load(loaded.save(tmp_path / "saved"))
    assert isinstance(again, PitDeviceKernel)
    assert again.selects == "routing"
    weight = as_weight(W.reshape(-1, 77), blocksize=problem.pattern.blocksize, dtype="float32")
    check_device_calls(again, problem, weight, rng, (9,))


# ── mutations: what the emulation must find ──────────────────────────────────────────────────────────────────────────

LISTS = {
    "counts read too early": ("    __syncthreads();\n    int place = -first", "    int place = -first"),
    "list read too early": ("    __syncthreads();\n    return total < 0", "    return total < 0"),
    "the first tile in all": ("tile * WIDTH, which", "0, which"),
    "places past the end": ("total < WIDTH ? total : WIDTH", "WIDTH"),
    "a rest of the call": ("(n + COUNT - 1) / COUNT * 32", "n / COUNT * 32"),
    "one place off": ("place + __popc(all & ((1u << lane) - 1))", "place + __popc(all & ((2u << lane) - 1))"),
    "rows of all experts": ("m % ROWS_OF_Y", "m"),
    "an expert too far": ("if (expert >= 0 && expert < EXPERTS)", "if (expert > 0 && expert < EXPERTS)"),
    "rows of the first expert": ("expert_groups[which * EXPERT_BLOCKS + group]", "expert_groups[group]"),
}
LIVE = {
    "list read too early": ("        __syncthreads();\n        walk_listed", "        walk_listed"),
    "one panel for all": ("(step + 1) % 2 * (STEP_UNITS * STRIDE)", "step % 2 * (STEP_UNITS * STRIDE)"),
    "units that are not there": ("units = left < STEP_UNITS ? left : STEP_UNITS;", "units = STEP_UNITS;"),
    "W of the wrong column": ("(int64_t)here[i] * PIECE_ROWS", "(int64_t)i * PIECE_ROWS"),
    "the last units": ("u < UNITS && is_live", "u < UNITS - 1 && is_live"),
    "only one list": ("for (int u = 0; u < UNITS;) {", "for (int u = 0; u == 0;) {"),
}


UNITS = {
    "W of the unit before": ("tile + list[i + 1]", "tile + list[i]"),
    "copies not waited for": ("copies_wait<STAGES - 2>();", "copies_wait<STAGES - 1>();"),
    "X of the first unit": ("list[f / UNIT_K] * UNIT_K", "list[0] * UNIT_K"),
}


@pytest.fixture(scope="module")
def victims():
    """Kernels in which all of them matter: several tiles of an expert, several lists of several steps."""
    experts, W = case("experts", shape=(0, 20), epilogue="bias")
    features, F = case("features", shape=(24, 300))
    few = simt(experts, rows=8, features=8, many=Lanes(1, 32), few=Lanes(1, 4), few_n=1)
    live_plan = replace(live(features, features=8, stream_n=0), warps=2, few_n=0)
    wide, U = case("features", dtype="float16", shape=(32, 208))
    return Victim(few, W, (3, 260)), Victim(live_plan, F, (40,)), Victim(live_units(wide), U, (40,))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_victims_are_right(which, victims, rng, tmp_path):
    victims[which].check(tmp_path, rng)


@pytest.mark.parametrize(("which", "name"), [
    (which, name) for which, names in enumerate((LISTS, LIVE, UNITS)) for name in names
])  # fmt: skip
def test_mutation_is_found(which, name, victims, rng, tmp_path):
    victims[which].assert_found((LISTS, LIVE, UNITS)[which][name], tmp_path, rng)


# ── plans ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", [
    {"axis": "tokens"}, {"axis": "features", "dtype": "bfloat16"}, {"axis": "features", "dtype": "float64"},
    {"axis": "experts", "dtype": "float16"}, {"axis": "outputs", "mask_block": (1, 3)},
    {"axis": "outputs", "mask_block": (32, 64), "dtype": "int8"},
], ids=str)  # fmt: skip
def test_candidates_are_sound(options):
    """Each thread block has rows of one expert or column of a mask; lists fit beside panels."""
    problem, _ = case(**options)
    for target in GPUS.values():
        plans = list(candidates(problem, target))
        assert plans
        for plan in plans:
            assert plan.shared_bytes <= 48 << 10
            assert plan.counts(128).cycles > 0
            if problem.pit.rows:
                assert problem.pit.rows // problem.pattern.R * plan.row_pieces % plan.group_rows == 0
            if not problem.pit.axis.listed:
                assert plan.knobs()["tiles"][-1] == plan.width
                assert plan.matrix or plan.many.along_k == plan.few.along_k == 1
