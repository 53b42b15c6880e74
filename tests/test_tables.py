"""The tables (dtypes, operators, epilogues, targets), problems and their reference, and what plans count and cost."""

import copy
import itertools
import math
import pickle
import re
import shutil
import subprocess
from dataclasses import fields, replace

import ml_dtypes
import numpy as np
import pytest
from support import DTYPE_NAMES, OPERATOR_NAMES, make_weight, problem_of, single

from bsrgen import cost, targets, tune
from bsrgen.backends.c import CPlan, candidates
from bsrgen.backends.c.plan import TokenTile, WeightTile
from bsrgen.cover import cover
from bsrgen.dtypes import ACCUMULATORS, DTYPES, PAIRS, as_dtype, as_types, bound_factor
from bsrgen.epilogues import EPILOGUES, STEPS, as_epilogues, composed, operands_of, steps_of
from bsrgen.errors import ArgumentError, ArgumentTypeError, BsrgenError, UnsupportedError
from bsrgen.operators import OPERATORS, as_operator
from bsrgen.pattern import Pattern, Weight, random_weight
from bsrgen.problem import Problem
from bsrgen.targets import TARGETS, as_targets, native

X86 = [row for row in TARGETS.values() if row.family == "x86_64"]


# ── dtypes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("row", DTYPES.values(), ids=DTYPES)
def test_dtype_rows_agree_with_numpy(row):
    assert row.numpy == np.dtype(getattr(ml_dtypes, row.name, row.name))
    assert row.numpy.isnative
    assert row.bytes == row.numpy.itemsize
    assert ACCUMULATORS[row.accumulator].bytes >= row.bytes
    assert DTYPES[row.real].real == row.real
    assert re.fullmatch("[a-z][a-z0-9]{1,3}", row.short)
    if row.numpy.kind == "i":
        assert (row.unit_roundoff, row.smallest, row.largest) == (0, 1, np.iinfo(row.numpy).max)
    else:
        info = ml_dtypes.finfo(row.numpy)
        assert row.unit_roundoff == info.eps / 2
        assert row.largest == info.max
        assert row.smallest == (info.tiny if row.name == "bfloat16" else info.smallest_subnormal)
    assert pickle.loads(pickle.dumps(row)) is copy.deepcopy(row) is row


@pytest.mark.parametrize("name", DTYPES)
def test_as_dtype_takes_what_numpy_takes(name):
    row = DTYPES[name]
    for value in (name, row, row.numpy, row.numpy.type):
        assert as_dtype(value) is row
    if row.numpy.kind != "V":
        assert as_dtype(row.numpy.str) is as_dtype(row.numpy.char) is row
    assert as_dtype(float) is DTYPES["float64"]


@pytest.mark.parametrize("value", ["int32", "float8", "uint8", "nonsense", "", complex, object, "f4,f4", 3, [], {}])
def test_as_dtype_refuses(value):
    with pytest.raises(ArgumentTypeError, match="one of float32, float64"):
        as_dtype(value)


def test_types_that_go_together():
    """Every pair of the table, its first type for Y where none is asked; all others are refused with what there is."""
    for w, x, y in itertools.product(DTYPES, DTYPES, (None, *DTYPES)):
        outs = PAIRS.get((w, x), ())
        if outs and (y is None or y in outs):
            assert [row.name for row in as_types(w, x, y)] == [w, x, y or outs[0]]
        else:
            with pytest.raises(UnsupportedError, match=r"kernels (read|write) (float|bfloat|int)"):
                as_types(w, x, y)
    assert [row.name for row in as_types("int8")] == ["int8", "int8", "float32"]
    with pytest.raises(ArgumentTypeError):
        as_types("int8", "int32")


def test_bound_factor():
    assert bound_factor(1, 2.0**-24) == pytest.approx(2.0**-24, rel=1e-6)
    assert bound_factor(3, 0.125) == 0.375 / 0.625
    np.testing.assert_array_less(0, np.diff(bound_factor(np.arange(100), 2.0**-24)))


# ── operators ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_operator_rows(name, rng):
    row = as_operator(name)
    assert row is OPERATORS[name]
    W, n = rng.standard_normal((5, 4)), 3
    X = rng.standard_normal(row.shape(n, 4))
    assert X.shape[row.token_axis] == n
    Y = row.product(W, X)
    assert Y.shape == row.shape(n, 5)
    np.testing.assert_allclose(Y, X @ W.T if name == "linear" else W @ X, rtol=1e-14)


@pytest.mark.parametrize("name", ["nonsense", "", None, 5, ["linear"], b"linear", {}])
def test_as_operator_refuses(name):
    with pytest.raises(BsrgenError, match="one of linear, spmm"):
        as_operator(name)


# ── epilogues ────────────────────────────────────────────────────────────────────────────────────────────────────────

BY_HAND = {  # one number, in Python's own mathematics
    "bias": lambda v, bias: v + bias,
    "scale": lambda v, scale: v * scale,
    "token_scale": lambda v, token_scale: v * token_scale,
    "relu": lambda v: v if v > 0 else 0.0,
    "gelu": lambda v: v * 0.5 * math.erfc(-v / math.sqrt(2)),
    "gelu_tanh": lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "silu": lambda v: v / (1 + math.exp(-v)),
    "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
    "tanh": math.tanh,
    "clamp": lambda v, lo, hi: min(max(v, lo), hi),
    "residual": lambda v, residual: v + residual,
    "accumulate": lambda v, alpha, beta, out: alpha * v + beta * out,
    "w_scale": lambda v, w_scale: v * w_scale,
    "x_scale": lambda v, x_scale: v * x_scale,
    "quantized_x": lambda v, x_scale: v * x_scale,
    "quantize": lambda v, y_scale: v / y_scale,
    "swiglu": lambda v, gate: v * gate,
    "geglu": lambda v, gate: v * gate,
}
POINTS = [-30.0, -8.5, -3.0, -1.0, -0.3, -1e-8, 0.0, 1e-8, 0.2, 0.9, 2.5, 7.0, 40.0]


def test_every_row_is_tested():
    assert set(BY_HAND) == set(STEPS)
    assert all(name == row.name for name, row in STEPS.items())
    assert EPILOGUES.items() <= STEPS.items()


@pytest.mark.parametrize("row", STEPS.values(), ids=STEPS)
def test_numpy_formula(row, rng):
    for v in POINTS:
        operands = rng.uniform(-2, 2, len(row.operands))
        expected = BY_HAND[row.name](v, *operands)
        assert row.numpy(np.array(v), *operands) == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("row", STEPS.values(), ids=STEPS)
def test_gain_bounds_the_slope(row, rng):
    v = np.concatenate([np.linspace(-12, 12, 20001), rng.normal(0, 100, 1000)])
    for _ in range(5):
        operands = rng.uniform(-2, 2, len(row.operands))
        slope = np.abs(np.diff(row.numpy(np.sort(v), *operands)) / np.diff(np.sort(v)))
        assert slope.max() <= row.gain(*operands) * (1 + 1e-9) + 1e-6


@pytest.mark.parametrize("row", STEPS.values(), ids=STEPS)
def test_the_formula_in_C_names_its_operands(row):
    words = set(re.findall(r"[A-Za-z_]\w*", row.c)) - {"R", "splat", "rounded", "v"}
    functions = {w for w in words if w.startswith("v_")}
    assert words - functions == {o.symbol or o.name for o in row.operands}
    assert all((o.default is None) == (o.kind not in ("scalar", "token")) for o in row.operands)


def test_constants_in_the_formulas():
    """Written with all the digits that float64 has."""
    root = math.sqrt(8 / math.pi)
    literals = [float(text) for text in re.findall(r"R\(([\d.e+-]+)\)", EPILOGUES["gelu_tanh"].c)]
    assert literals == pytest.approx([root, root * 0.044715], rel=1e-15)


def test_as_epilogues_numbers_repeated_steps():
    assert as_epilogues("relu") == as_epilogues(("relu",)) == as_epilogues(["relu"]) == (EPILOGUES["relu"],)
    assert as_epilogues(()) == as_epilogues([]) == ()
    steps = as_epilogues(("bias", "clamp", "bias", "accumulate", "clamp", "bias", "accumulate"))
    names = ["bias", "lo", "hi", "bias2", "alpha", "beta", "lo2", "hi2", "bias3", "alpha2", "beta2"]
    assert [o.name for o in operands_of(steps)] == names
    assert [o.symbol or o.name for o in steps[2].operands] == ["bias"]
    assert [o.name for o in steps[-1].operands if o.kind == "out"] == ["out"]


def test_int8_brings_its_own_steps():
    relu, real, int8 = as_epilogues("relu"), DTYPES["float32"], DTYPES["int8"]
    for types, names in (
        ((real, real, real), ["relu"]),
        ((int8, real, real), ["w_scale", "relu"]),
        ((int8, int8, real), ["w_scale", "x_scale", "relu"]),
        ((int8, int8, int8), ["w_scale", "x_scale", "relu", "quantize"]),
    ):
        steps = composed(relu, *types)
        assert [step.name for step in steps] == names
        assert steps == steps_of(names) == pickle.loads(pickle.dumps(steps))


@pytest.mark.parametrize(
    "names", ["nonsense", "", "w_scale", ("bias", "quantize"), ("bias", None), b"bias", 5, None, [["bias"]], {"x": 1}]
)
def test_as_epilogues_refuses(names):
    with pytest.raises(BsrgenError):
        as_epilogues(names)


# ── targets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_levels_build_on_one_another():
    plain = [row for row in X86 if row.name != "x86-64-v3-vnni"]  # a branch: AVX-512 does not bring avxvnni
    for low, high in [*itertools.pairwise(plain), (TARGETS["x86-64-v3"], TARGETS["x86-64-v3-vnni"])]:
        assert set(low.requires) < set(high.requires)
        assert low.vector_bytes <= high.vector_bytes
        assert low.registers <= high.registers
    for row in TARGETS.values():
        assert row.lanes(4) == 2 * row.lanes(8) == row.vector_bytes // 4
        assert row.flop_per_cycle(4) == 2 * row.flop_per_cycle(8) > 0
        assert row.l1_bytes < row.l2_bytes


MACROS = {  # of gcc and clang, and the feature that __builtin_cpu_supports knows
    "__SSE3__": "sse3", "__SSSE3__": "ssse3", "__SSE4_1__": "sse4.1", "__SSE4_2__": "sse4.2", "__POPCNT__": "popcnt",
    "__AVX__": "avx", "__AVX2__": "avx2", "__FMA__": "fma", "__BMI__": "bmi", "__BMI2__": "bmi2", "__LZCNT__": "lzcnt",
    "__MOVBE__": "movbe", "__F16C__": "f16c", "__AVX512F__": "avx512f", "__AVX512BW__": "avx512bw",
    "__AVX512CD__": "avx512cd", "__AVX512DQ__": "avx512dq", "__AVX512VL__": "avx512vl", "__AVXVNNI__": "avxvnni",
    "__AVX512VNNI__": "avx512vnni", "__AVX512BF16__": "avx512bf16", "__AMX_TILE__": "amx-tile",
    "__AMX_BF16__": "amx-bf16", "__AMX_INT8__": "amx-int8", "__AVX512VBMI__": "avx512vbmi",
    "__AVX512VBMI2__": "avx512vbmi2",
}  # fmt: skip


@pytest.mark.parametrize("row", X86, ids=lambda row: row.name)
def test_a_target_requires_all_that_its_flags_let_the_compiler_use(row):
    """Else a CPU, or a virtual one, without it runs the code all the same: SIGILL, or lzcnt read as bsr."""
    gcc = shutil.which("x86_64-linux-gnu-gcc") or (shutil.which("gcc") if native().family == "x86_64" else None)
    if gcc is None:
        pytest.skip("no gcc for x86_64")
    result = subprocess.run(
        [gcc, *row.flags, "-dM", "-E", "-x", "c", "/dev/null"], capture_output=True, text=True, check=True
    )
    enabled = {MACROS[word] for word in re.findall(r"#define (\w+)", result.stdout) if word in MACROS}
    assert enabled == set(row.requires)


def test_as_targets():
    names = ["x86-64", "x86-64-v4", "x86-64-v3", "x86-64-v4", "x86-64-v2"]
    assert [row.name for row in as_targets(tuple(names))] == ["x86-64-v4", "x86-64-v3", "x86-64-v2", "x86-64"]
    assert as_targets(tuple(row.name for row in X86)) == tuple(reversed(X86))
    assert as_targets(names) == as_targets(tuple(names))
    assert as_targets("aarch64") == (TARGETS["aarch64"],)
    assert as_targets("native") == as_targets(("native", "native")) == (native(),)
    assert native().name in TARGETS


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("nehalem", "x86-64-v2"), ("sandybridge", "x86-64-v2"), ("haswell", "x86-64-v3"), ("zen3", "x86-64-v3"),
        ("skylake", "x86-64-v3"), ("skylake_avx512", "x86-64-v4"), ("sapphirerapids", "x86-64-v4-amx"),
        ("zen4", "x86-64-v4-bf16"), ("zen5", "x86-64-v4-bf16"), ("cascadelake", "x86-64-v4-vnni"),
        ("icelake", "x86-64-v4-vnni"), ("alderlake", "x86-64-v3-vnni"),
        ("core2", "x86-64"), ("neoverse_n1", "aarch64"), ("m1", "aarch64"), ("a64fx", "aarch64"),
        ("x86_64_v3", "x86-64-v3"),
    ],
)  # fmt: skip
def test_a_microarchitecture_stands_for_its_level(name, level):
    assert [row.name for row in as_targets(name)] == [level]


GOLDEN_COVE = ("avx512_vbmi2", "avx512_vnni", "avx512_bf16", "avx512vbmi", "amx_tile", "amx_bf16")


@pytest.fixture
def fresh_host():
    """What is detected once for a process, detected anew; and forgotten again."""
    caches = (targets.features, targets.host)
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


@pytest.mark.skipif(native().family != "x86_64", reason="features of x86-64")
@pytest.mark.parametrize(
    ("extra", "permitted", "level"),
    [
        ((), True, "x86-64-v4"), (("avx_vnni",), True, "x86-64-v4"), (("avx512_vnni",), True, "x86-64-v4-vnni"),
        (("avx512_bf16",), True, "x86-64-v4"), (("avx512_vnni", "avx512_bf16"), True, "x86-64-v4-vnni"),
        (("avx512_vnni", "avx512_bf16", "avx512_vbmi2"), True, "x86-64-v4-bf16"),
        ((*GOLDEN_COVE, "amx_int8"), True, "x86-64-v4-amx"), ((*GOLDEN_COVE, "amx_int8"), False, "x86-64-v4-bf16"),
        (GOLDEN_COVE, True, "x86-64-v4-bf16"),
    ],
)  # fmt: skip
def test_native_is_what_the_cpu_has_and_the_kernel_permits(fresh_host, monkeypatch, extra, permitted, level):
    """By features, not by the name that archspec makes of them."""
    import archspec.cpu

    found = archspec.cpu.TARGETS["x86_64_v4"].features | set(extra)
    cpu = archspec.cpu.Microarchitecture("", [], "GenuineIntel", found, {}, 0)
    monkeypatch.setattr("archspec.cpu.detect.detected_info", lambda: cpu)
    monkeypatch.setattr("archspec.cpu.host", lambda: archspec.cpu.TARGETS["x86_64_v3"])
    monkeypatch.setattr(targets, "tiles_permitted", lambda: permitted)
    assert native().name == level
    assert targets.runs_here(native())
    assert targets.runs_here(TARGETS["x86-64-v3-vnni"]) == ("avx_vnni" in extra)
    assert not targets.runs_here(TARGETS["aarch64"])


def test_target_has_features_and_rates_of_dots_and_tiles():
    bf16, amx = TARGETS["x86-64-v4-bf16"], TARGETS["x86-64-v4-amx"]
    assert bf16.has("avx512bf16")
    assert bf16.has("avx512vnni")
    assert not bf16.has("amx-tile")
    assert [amx.product_cycles(*rows) for rows in ((16, 16), (4, 8), (4, 16))] == [16, 9.5, 16]


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("nonsense", ArgumentError), ("", ArgumentError), ((), ArgumentError), ("x86-64-v5", ArgumentError),
        (("x86-64", "aarch64"), UnsupportedError), ("power9le", UnsupportedError), ("x86", UnsupportedError),
        (5, BsrgenError), (None, BsrgenError), (("native", None), BsrgenError), ([["native"]], BsrgenError),
    ],
)  # fmt: skip
def test_as_targets_refuses(value, error):
    with pytest.raises(error):
        as_targets(value)


# ── problems ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_reference_is_the_plain_product(operator, dtype, rng):
    """Against a loop over the dense matrix: padding, empty rows, an epilogue with every kind of operand."""
    weight = make_weight("powerlaw", (11, 9), (3, 4), dtype)
    problem = problem_of(weight, operator, ("scale", "bias", "clamp", "residual", "accumulate"))
    x, given = problem.sample(rng, 5)
    given |= {"lo": -0.5, "hi": 0.75, "alpha": 2.0, "beta": -1.5}
    out = rng.standard_normal(problem.operator.shape(5, 11)).astype(dtype)
    y, bound = problem.reference(weight, x, given, out)
    W = weight.todense().astype(np.float64)
    for m in range(11):
        for n in range(5):
            at, xs = ((n, m), x[n]) if operator == "linear" else ((m, n), x[:, n])
            v = math.fsum(float(W[m, k]) * float(xs[k]) for k in range(9))
            v = min(max(v * float(given["scale"][m]) + float(given["bias"][m]), -0.5), 0.75)
            v = 2.0 * (v + float(given["residual"][at])) - 1.5 * float(out[at])
            assert y[at] == pytest.approx(v, rel=1e-12, abs=1e-14)
    assert y.shape == bound.shape == out.shape
    assert (bound >= 0).all()


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_bound_of_the_plain_product(operator, rng):
    """g(k + 2) (|W| |x|), k the stored entries of that row, zeros in the padding of C included."""
    weight = make_weight("powerlaw", (11, 9), (3, 4), "float32")
    problem = problem_of(weight, operator)
    x, _ = problem.sample(rng, 5)
    _, bound = problem.reference(weight, x)
    k = np.repeat(weight.pattern.row_counts * 4, 3)[:11]
    sizes = np.abs(weight.todense().astype(np.float64)) @ np.abs(x.astype(np.float64).T if operator == "linear" else x)
    expected = (bound_factor(k + 2, 2.0**-24)[:, None] * sizes).T
    least = expected if operator == "linear" else expected.T
    assert (bound >= least * (1 - 1e-12)).all()
    assert (bound <= least * (1 + 1e-12) + 1e-36).all()  # no more than what underflow may add


def test_bound_catches_a_wrong_value_and_forgives_float32(rng):
    weight = make_weight("uniform", (32, 64), (4, 4), "float32")
    problem = problem_of(weight)
    x, _ = problem.sample(rng, 8)
    y, bound = problem.reference(weight, x)
    W = weight.todense()
    assert (np.abs((x @ W.T).astype(np.float64) - y) <= bound).all()
    W = W.copy()
    W[weight.pattern.rows[0] * 4, weight.pattern.indices[0] * 4] *= 1.0005
    assert not (np.abs((x @ W.T).astype(np.float64) - y) <= bound).all()


def test_problem_names_and_equality():
    weight = make_weight("uniform", (32, 64), (4, 4), "float32")
    problem = problem_of(weight, "linear", ("bias", "relu"))
    assert re.fullmatch(r"linear_f32_32x64_b4x4_[0-9a-f]{8}", problem.name)
    assert str(problem) == f"linear float32 32x64 blocks 4x4 density {weight.pattern.density:.3g} + bias, relu"
    assert replace(problem, n=7) == problem
    assert replace(problem, n=7).name == problem.name
    others = [
        problem_of(weight), problem_of(weight, "spmm", ("bias", "relu")),
        problem_of(weight, "linear", ("relu", "bias")),
        problem_of(weight, "linear", ("bias", "relu"), "float64"),
        problem_of(make_weight("uniform", (32, 64), (4, 4), "float32", seed=1), "linear", ("bias", "relu")),
    ]  # fmt: skip
    assert len({problem.name, *(other.name for other in others)}) == 6
    same_values = problem_of(Weight(weight.pattern, 2 * weight.data), "linear", ("bias", "relu"))
    assert same_values.name == problem.name
    assert problem.flop(3) == 2 * weight.pattern.nnz * 3


def test_sample_has_the_shapes_of_a_call(rng):
    weight = make_weight("uniform", (11, 9), (3, 4), "float64")
    for operator in OPERATOR_NAMES:
        problem = problem_of(weight, operator, ("bias", "residual", "clamp"))
        x, given = problem.sample(rng, 6)
        assert x.shape == problem.operator.shape(6, 9)
        assert {name: np.shape(a) for name, a in given.items()} == {
            "bias": (11,), "residual": problem.operator.shape(6, 11), "lo": (), "hi": ()
        }  # fmt: skip
        assert all(a.dtype == np.float64 for a in (x, *given.values()))


# ── counts and costs ─────────────────────────────────────────────────────────────────────────────────────────────────

V3 = TARGETS["x86-64-v3"]  # 8 lanes of f32


def test_counts_of_one_block_by_hand():
    """One 2 x 3 block, 16 tokens, one token tile of 2 rows x 2 vectors: 3 steps of 2 x 2 multiply-adds."""
    weight = single((4, 6), (2, 3))
    plan = CPlan(problem_of(weight, "spmm"), V3, TokenTile(2, 2, 6), None)
    counts = plan.counts(16)
    assert counts.effective_flop == 2 * 6 * 16
    assert counts.flop == counts.effective_flop
    assert counts.vector_fma == 3 * 2 * 2
    assert counts.vector_loads == 3 * (2 + 2)
    assert counts.value_bytes == 6 * 4
    assert counts.table_bytes == 4 * 3 + 2  # pointers of two block rows and the end, one 16-bit offset
    assert counts.memory_bytes == 24 + 14 + (6 + 4) * 16 * 4
    assert counts.registers == 2 * 2 + 2 + 1
    assert counts.cycles > counts.vector_fma / V3.fma_per_cycle


def test_counts_of_a_weight_tile_by_hand():
    """One 8 x 1 block, 4 tokens, lanes along rows: one multiply-add a token."""
    weight = single((8, 4), (8, 1))
    plan = CPlan(problem_of(weight), V3, None, WeightTile(8, 1, 1, 4))
    counts = plan.counts(4)
    assert (counts.vector_fma, counts.vector_loads, counts.flop, counts.effective_flop) == (4, 5, 64, 64)
    assert plan.counts(0).effective_flop == 0
    half = CPlan(problem_of(single((5, 4), (5, 1))), V3, None, WeightTile(8, 1, 1, 4)).counts(4)
    assert half.flop == 64  # zero fill is executed
    assert half.effective_flop == 40


def test_counts_of_panels_by_hand():
    """Blocks (0,0), (0,2), (1,2) of 2x2 in two panels of 4 features: three segments of four hold blocks."""
    p = Pattern((4, 8), (2, 2), np.array([0, 2, 3]), np.array([0, 2, 2]))
    problem = problem_of(Weight(p, np.ones((3, 2, 2), np.float32)))
    tables = 4 * 4 + 3 * 2 + 4 * 3 + 4 * 3  # pointers and the end, offsets, block row of each segment, panel starts
    tokens = CPlan(problem, V3, TokenTile(2, 2, 4), None)
    counts = tokens.counts(32)
    assert (len(tokens.packing.segments), tokens.panels) == (3, 2)
    assert counts.vector_fma == 3 * 2 * 2 * 4  # blocks x columns x rows x vectors
    assert (counts.value_bytes, counts.table_bytes, counts.registers) == (12 * 4, tables, 7)
    weight = CPlan(problem, V3, None, WeightTile(8, 1, 1, 4, k_panel=4, chunk=2))
    counts = weight.counts(8)
    assert counts.vector_fma == 3 * 2 * 8  # blocks x columns x tokens
    assert (counts.value_bytes, counts.table_bytes, counts.registers) == (3 * 2 * 8 * 4, tables, 6)


def test_table_bytes_are_those_of_the_tables():
    weight = random_weight(3, (64, 60), (2, 3), 0.1, kind="powerlaw")
    for plan in candidates(problem_of(weight), V3):
        tables = [plan.packing.pointers, plan.packing.offsets]
        tables += [plan.packing.segment_rows, plan.packing.panel_starts] if plan.panels > 1 else []
        assert plan.counts(8).table_bytes == sum(table.nbytes for table in tables), plan


def test_counts_of_a_cover_are_those_of_its_blocks():
    """One stored element as one block of 4 x 2: eight multiply-adds a token where one would do."""
    weight = single((4, 8), (1, 1))
    plan = CPlan(problem_of(weight, "spmm"), V3, TokenTile(4, 1, 8), None, cover=cover(weight.pattern, (4, 2)))
    counts = plan.counts(8)
    assert (counts.vector_fma, counts.flop, counts.effective_flop) == (8, 128, 16)
    assert (counts.value_bytes, plan.zero_filled, plan.dense) == (32, True, False)
    assert plan.family(8) != replace(plan, cover=None, tokens=TokenTile(1, 1, 8)).family(8)


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
@pytest.mark.parametrize("blocksize", [(16, 1), (4, 4), (1, 16), (3, 5)], ids=str)
def test_counts_of_all_candidates_are_sound(operator, blocksize):
    weight = make_weight("uniform", (64, 60), blocksize, "float32")
    problem = problem_of(weight, operator)
    for target in TARGETS.values():
        for plan in candidates(problem, target):
            assert plan.registers <= target.registers, plan
            last = 0.0
            for n in (0, 1, 2, 7, 8, 64, 129, 1000):
                counts = plan.counts(n)
                assert all(getattr(counts, f.name) >= 0 for f in fields(counts))
                assert counts.effective_flop == problem.flop(n) <= counts.flop
                estimate = cost.estimate(plan, n)
                assert estimate.flop == counts.effective_flop
                assert math.isfinite(estimate.seconds)
                assert estimate.seconds > 0
            assert cost.estimate(plan, 4096).seconds > cost.estimate(plan, 512).seconds > last


def test_candidates_are_legal_and_distinct():
    for kind, blocksize in [("uniform", (5, 3)), ("empty", (4, 4)), ("full", (64, 60)), ("one", (1, 1))]:
        for operator in OPERATOR_NAMES:
            problem = problem_of(make_weight(kind, (64, 60), blocksize, "float32"), operator)
            for target in TARGETS.values():
                plans = list(candidates(problem, target))
                assert plans, "never empty"
                assert len({str(plan.knobs()) for plan in plans}) == len(plans)
                assert all(plan.problem is problem and plan.target is target for plan in plans)


def test_rank_is_by_predicted_time():
    problem = problem_of(make_weight("uniform", (64, 60), (4, 4), "float32"))
    plans = list(candidates(problem, V3))
    for n in (1, 128):
        ranked = tune.rank(plans, n)
        assert [c.seconds for c, _ in ranked] == sorted(c.seconds for c, _ in ranked)
        assert {id(plan) for _, plan in ranked} == {id(plan) for plan in plans}
    assert tune.rank(plans, None)[0][0].n == tune.PLANNED_N


def test_more_blocks_cost_more():
    for n in (1, 128):
        sparse, dense = (
            cost.estimate(tune.rank(list(candidates(problem_of(w), V3)), n)[0][1], n).seconds
            for w in (random_weight(0, (768, 768), (16, 1), density) for density in (0.1, 0.9))
        )
        assert dense > 2 * sparse


def test_a_problem_is_plain_data():
    problem = problem_of(make_weight("uniform", (8, 8), (4, 4), "float32"))
    assert isinstance(problem, Problem)
    with pytest.raises(AttributeError):
        problem.n = 3
    knobs = next(iter(candidates(problem, V3))).knobs()
    tiles = {"tokens", "weight", "matrix"}
    assert set(knobs) == tiles | {"small_n", "short_lanes", "encoding", "product", "gather", "blocksize", "dense"}
