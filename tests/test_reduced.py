"""Kernels of reduced precision: every triple of types against float64, int8 exactly, scales, new values, artifacts."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support import DTYPE_NAMES, LEVELS, OPERATOR_NAMES, REDUCED, assert_right, check_calls, make_weight, problem_of

import bsrgen
from bsrgen.dtypes import DTYPES
from bsrgen.epilogues import EPILOGUES
from bsrgen.pattern import Weight, as_weight, random_weight
from bsrgen.quantize import quantized
from bsrgen.verify import verify

BF16 = np.dtype(ml_dtypes.bfloat16)
TOKENS = (0, 1, 2, 3, 4, 5, 17, 33, 64)
BLOCKS = ((32, 1), (1, 1), (4, 4), (1, 32), (16, 3), (5, 2), (16, 16), (2, 64))
STEPS = ("scale", "bias", "gelu", "residual")
BY_TYPES = pytest.mark.parametrize("types", REDUCED, ids="-".join)
INT8 = ("int8", "int8", "float32")


def built(types, operator="linear", blocksize=(16, 1), epilogue=(), shape=(53, 70), kind="powerlaw", **options):
    """(kernel, problem, weight) of one triple; rows in partial vectors, in padding, and without a block."""
    weight = make_weight(kind, shape, blocksize, types[0])
    w, x, y = types
    if w == "int8" and "w_scale" not in options:
        options["w_scale"] = np.linspace(0.005, 0.02, shape[0])
    kernel = bsrgen.compile(weight, operator, dtype=w, x_dtype=x, out_dtype=y, epilogue=epilogue, **options)
    return kernel, problem_of(weight, operator, epilogue, *types), weight


# ── every triple ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("types", "operator", "blocksize"),
    [
        pytest.param(types, operator, BLOCKS[(3 * i + j + k) % len(BLOCKS)], id=f"{'-'.join(types)}-{operator}-{k}")
        for i, types in enumerate(REDUCED)
        for j, operator in enumerate(OPERATOR_NAMES)
        for k in (0, 2)[: 1 + (i % 4 == 0)]
    ],
)
def test_every_triple(types, operator, blocksize, rng):
    kernel, problem, weight = built(types, operator, blocksize)
    assert kernel.problem == problem
    assert (kernel.dtype, kernel.x_dtype, kernel.out_dtype) == tuple(DTYPES[name].numpy for name in types)
    check_calls(kernel, problem, weight, rng, TOKENS)


@pytest.mark.parametrize("target", LEVELS)
@BY_TYPES
def test_every_level(types, target, rng):
    turn = (REDUCED.index(types) + len(target)) % 2
    operator, blocksize = (("linear", (32, 1)), ("spmm", (4, 4)))[turn]
    kernel, problem, weight = built(types, operator, blocksize, STEPS, target=target)
    check_calls(kernel, problem, weight, rng, (1, 3, 40))


@pytest.mark.parametrize(
    ("kind", "types"),
    [
        pytest.param(kind, types, id=f"{kind}-{'-'.join(types)}")
        for i, kind in enumerate(("empty", "full", "one", "banded", "uniform"))
        for types in REDUCED[i % 3 :: 3]
    ],
)
def test_every_kind(types, kind, rng):
    operator = OPERATOR_NAMES[(REDUCED.index(types) + len(kind)) % 2]
    kernel, problem, weight = built(types, operator, (4, 4), ("bias",), (30, 41), kind)
    check_calls(kernel, problem, weight, rng, (1, 20))


@pytest.mark.parametrize("steps", [tuple(EPILOGUES)[i : i + 3] for i in range(0, len(EPILOGUES), 3)], ids="-".join)
@pytest.mark.parametrize(
    "types",
    [("bfloat16",) * 3, ("float16",) * 3, INT8, ("int8",) * 3, ("int8", "float32", "float32")],
    ids="-".join,
)  # fmt: skip
def test_every_epilogue(types, steps, rng):
    operator = OPERATOR_NAMES[(len(steps[0]) + len(types[1])) % 2]
    steps = tuple(step for step in steps if step != "accumulate" or types[2] != "int8")  # refused: see test_types.py
    kernel, problem, weight = built(types, operator, epilogue=steps)
    check_calls(kernel, problem, weight, rng, (1, 3, 40))


@settings(
    max_examples=6, deadline=None, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(
    st.sampled_from(REDUCED), st.sampled_from(OPERATOR_NAMES), st.tuples(st.integers(1, 40), st.integers(1, 20)),
    st.tuples(st.integers(1, 120), st.integers(1, 150)), st.floats(0, 1), st.lists(st.sampled_from(STEPS), unique=True),
    st.lists(st.integers(0, 67), min_size=3, max_size=3),
)  # fmt: skip
def test_drawn_problems(types, operator, blocksize, shape, density, steps, tokens):
    rng = np.random.default_rng(0)
    weight = random_weight(1, shape, blocksize, density)
    weight = quantized(weight)[0] if types[0] == "int8" else as_weight(weight, dtype=types[0])
    kernel = bsrgen.compile(
        weight, operator, dtype=types[0], x_dtype=types[1], out_dtype=types[2], epilogue=steps,
        **({"w_scale": np.full(shape[0], 0.01)} if types[0] == "int8" else {}),
    )  # fmt: skip
    check_calls(kernel, problem_of(weight, operator, steps, *types), weight, rng, tuple(tokens))


def test_long_rows(rng):
    """Sums of 4096 products: the bound grows with the accumulator's roundoff, not with that of the type."""
    for types in REDUCED[::3]:
        kernel, problem, weight = built(types, blocksize=(16, 1), shape=(16, 4096), kind="full")
        check_calls(kernel, problem, weight, rng, (1, 9))


@BY_TYPES
def test_bits_do_not_depend_on_threads(types, rng):
    kernel, problem, _ = built(types, shape=(200, 300), kind="uniform")
    x, given = problem.sample(rng, 200)
    runs = {kernel(x, threads=threads, **given).tobytes() for threads in (1, 2, 3, 8)}
    assert len(runs) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_of_accumulate_do_not_depend_on_threads(dtype, rng):
    """alpha * v + beta * out may be contracted in two ways; M leaves a part of a vector."""
    weight = make_weight("uniform", (54, 4000), (1, 1), dtype)
    kernel = bsrgen.compile(weight, dtype=dtype, epilogue="accumulate", n=80)
    x, given = kernel.problem.sample(rng, 80)
    old = kernel.problem.sample_out(rng, 80)
    runs = {kernel(x, out=old.copy(), threads=threads, **given).tobytes() for threads in (1, 2, 3, 5)}
    assert len(runs) == 1


@pytest.mark.parametrize("target", LEVELS)
@pytest.mark.parametrize("blocksize", [(16, 1), (3, 5)], ids=str)
def test_gathered_integers_on_every_level(blocksize, target, rng):
    check_calls(*built(INT8, blocksize=blocksize, target=target), rng, (1, 16, 70))


# ── int8 ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
@pytest.mark.parametrize("blocksize", BLOCKS, ids=str)
def test_integers_are_exact(operator, blocksize, rng):
    """Without scales the result is the integer product; X may hold -128 too."""
    weight = make_weight("uniform", (53, 130), blocksize, "int8")
    kernel = bsrgen.compile(weight, operator, dtype="int8")
    W = weight.todense().astype(np.int64)
    for n in TOKENS:
        x = rng.integers(-128, 127, kernel.problem.operator.shape(n, 130), np.int8, endpoint=True)
        np.testing.assert_array_equal(kernel(x), x @ W.T if operator == "linear" else W @ x)


def test_the_largest_sums():
    """Every product at its extreme: no saturation on the way, no offset that is left."""
    weight = Weight(random_weight(0, (16, 8192), (16, 4), 1.0).pattern, np.full((2048, 16, 4), 127, np.int8))
    kernel = bsrgen.compile(weight, dtype="int8")
    for value in (127, -127, -128):
        y = kernel(np.full((3, 8192), value, np.int8))
        assert (y == np.float32(127 * value * 8192)).all()
    signs = np.where(np.arange(8192) % 2, 127, -128).astype(np.int8)
    assert (kernel(signs[None]) == np.float32(127 * (127 - 128) * 4096)).all()


def test_results_of_int8_round_to_even_and_saturate():
    kernel = bsrgen.compile(as_weight(np.eye(16, dtype=np.int8), blocksize=(16, 1)), dtype="int8", out_dtype="int8")
    x = np.zeros((3, 16), np.int8)
    x[0, :12] = [0, 1, 2, 3, 5, -1, -3, -5, 127, -127, 7, -7]
    y = kernel(x, y_scale=2.0)
    assert y.dtype == np.int8
    assert y[0, :12].tolist() == [0, 0, 1, 2, 2, 0, -2, -2, 64, -64, 4, -4]
    assert kernel(x, y_scale=0.25)[0, :12].tolist() == [0, 4, 8, 12, 20, -4, -12, -20, 127, -127, 28, -28]
    assert kernel(np.full((1, 16), -128, np.int8))[0].tolist() == [-127] * 16  # symmetric
    assert kernel(x, y_scale=1e-30)[0, :10].tolist() == [0, 127, 127, 127, 127, -127, -127, -127, 127, -127]


def test_quantised_results_of_infinity():
    kernel = bsrgen.compile(np.eye(4, dtype=np.int8), blocksize=(4, 1), dtype="int8", out_dtype="int8", epilogue="bias")
    bias = np.array([np.inf, -np.inf, 1e30, -1e30], np.float32)
    assert kernel(np.ones((1, 4), np.int8), bias=bias)[0].tolist() == [127, -127, 127, -127]


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
@pytest.mark.parametrize("out", ["float32", "bfloat16", "int8"])
def test_scales_of_tokens(operator, out, rng):
    """One for each, one for all, bound, or none: 1."""
    kernel, problem, weight = built(("int8", "int8", out), operator, epilogue="bias")
    x, given = problem.sample(rng, 21)
    w_scale = kernel.artifact.arrays("operands.npz")["w_scale"]
    bare = {"w_scale": w_scale, "bias": given["bias"]} | ({"y_scale": given["y_scale"]} if out == "int8" else {})
    call = {name: value for name, value in bare.items() if name != "w_scale"}
    column = given["x_scale"][:, None] if operator == "linear" else given["x_scale"][None]
    for scale in (given["x_scale"], column, 0.02, np.float32(0.02), np.array(0.02)):
        assert_right(problem, weight, kernel(x, x_scale=scale, **call), x, bare | {"x_scale": scale})
    assert_right(problem, weight, kernel(x, **call), x, bare)
    fixed = built(("int8", "int8", out), operator, epilogue="bias", x_scale=0.02)[0]
    np.testing.assert_array_equal(fixed(x, **call), kernel(x, x_scale=0.02, **call))
    np.testing.assert_array_equal(fixed(x, x_scale=column, **call), kernel(x, x_scale=column, **call))


def test_scales_of_a_batch(rng):
    kernel, problem, _ = built(INT8)
    x, given = problem.sample(rng, 6)
    scales, plain = given["x_scale"], kernel(x, x_scale=given["x_scale"])
    for shape in ((2, 3), (2, 3, 1)):
        y = kernel(x.reshape(2, 3, -1), x_scale=scales.reshape(shape))
        np.testing.assert_array_equal(y.reshape(6, -1), plain)
    np.testing.assert_array_equal(kernel(x[0], x_scale=scales[:1]), plain[0])


def test_all_operands_bound_is_the_fast_path(rng):
    kernel, problem, weight = built(INT8, epilogue="bias", bias=np.linspace(-1, 1, 53), x_scale=0.03)
    assert kernel._plain
    assert kernel._values.records is not None
    x, _ = problem.sample(rng, 9)
    y = kernel(x)
    np.testing.assert_array_equal(y, kernel(x, threads=1))
    assert_right(problem, weight, y, x, kernel.artifact.arrays("operands.npz"))
    assert built(INT8, epilogue="bias")[0]._values.records is None


# ── quantisation ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("x_dtype", ["int8", "float32", "bfloat16"])
def test_floating_weights_are_quantised(x_dtype, rng):
    """What comes out is W x but for half a step of each weight."""
    weight = random_weight(3, (64, 96), (16, 1), 0.5)
    kernel = bsrgen.compile(weight, dtype="int8", x_dtype=x_dtype)
    assert kernel.artifact.manifest.weight_scale == "max"
    x = rng.integers(-127, 128, (9, 96)).astype(DTYPES[x_dtype].numpy)
    exact = x.astype(np.float64) @ weight.todense().T.astype(np.float64)
    _, scale = quantized(weight)
    stored = (weight.todense() != 0).astype(np.float64)
    steps = np.abs(x.astype(np.float64)) @ stored.T * scale / 2
    rounding = 2.0**-8 * np.abs(exact) if x_dtype == "bfloat16" else 1e-5 * np.abs(exact)
    assert (np.abs(kernel(x).astype(np.float64) - exact) <= 1.01 * steps + rounding + 1e-4).all()
    w, scale = quantized(weight)
    assert_right(kernel.problem, w, kernel(x), x, {"w_scale": scale})


def other_values(weight, seed=9):
    data = np.random.default_rng(seed).standard_normal(weight.data.shape).astype(np.float32)
    return Weight(weight.pattern, np.where(weight.data == 0, 0, data * 3).astype(np.float32))


@pytest.mark.parametrize("given", [False, True])
def test_update_quantises_as_compile_does(given, tmp_path, rng):
    old = random_weight(3, (64, 96), (16, 1), 0.5)
    new, options = other_values(old), {"w_scale": np.full(64, 0.02)} if given else {}
    kernel, fresh = (bsrgen.compile(W, dtype="int8", **options) for W in (old, new))
    x = rng.integers(-127, 128, (9, 96)).astype(np.int8)
    before = kernel(x)
    for way in (new, new.tobsr(), new.todense()):
        kernel.update(old)
        np.testing.assert_array_equal(kernel(x), before)
        kernel.update(way)
        np.testing.assert_array_equal(kernel(x), fresh(x))
    saved = bsrgen.load(kernel.save(tmp_path / "saved"))
    np.testing.assert_array_equal(saved(x), fresh(x))
    assert saved.artifact.manifest.weight_scale == ("given" if given else "max")
    assert saved.artifact.manifest.weight == fresh.artifact.manifest.weight
    assert all(finding.ok for finding in verify(tmp_path / "saved")[1])


def test_update_with_integers_keeps_the_scales(tmp_path, rng):
    weight = random_weight(3, (64, 96), (16, 1), 0.5)
    kernel = bsrgen.compile(weight, dtype="int8")
    w = quantized(weight)[0]
    negative = Weight(w.pattern, -w.data)
    x = rng.integers(-127, 128, (9, 96)).astype(np.int8)
    before = kernel(x)
    kernel.update(negative)
    np.testing.assert_array_equal(kernel(x), -before)
    np.testing.assert_array_equal(bsrgen.load(kernel.save(tmp_path / "k"))(x), -before)
    ones = bsrgen.compile(w, dtype="int8")
    assert ones.artifact.manifest.weight_scale == "none"
    np.testing.assert_array_equal(ones(x), bsrgen.compile(w, dtype="int8", w_scale=np.ones(64))(x))
    ones.update(weight)  # floating values bring scales
    np.testing.assert_array_equal(ones(x), before)
    assert bsrgen.load(ones.save(tmp_path / "o")).artifact.manifest.weight_scale == "max"


def test_update_that_fails_changes_nothing(rng):
    weight = random_weight(3, (64, 96), (16, 1), 0.5)
    kernel = bsrgen.compile(weight, dtype="int8")
    x = rng.integers(-127, 128, (9, 96)).astype(np.int8)
    before, values = kernel(x), kernel._values
    broken = weight.data.copy()
    broken[3, 2, 0] = np.nan
    for bad in (Weight(weight.pattern, broken), random_weight(4, (64, 96), (16, 1), 0.5)):
        with pytest.raises(bsrgen.PatternError):
            kernel.update(bad)
    with pytest.raises(bsrgen.PatternError, match="symmetric range"):
        kernel.update(Weight(weight.pattern, np.full(weight.data.shape, -128, np.int8)))
    assert kernel._values is values
    np.testing.assert_array_equal(kernel(x), before)


@pytest.mark.parametrize("types", [types for types in REDUCED if types[0] != "int8"], ids="-".join)
def test_update_of_half_types(types, tmp_path, rng):
    kernel, problem, old = built(types)
    new = as_weight(other_values(old), dtype=types[0])
    kernel.update(other_values(old))  # float32, converted as compile converts
    x, _ = problem.sample(rng, 9)
    assert_right(problem, new, kernel(x), x)
    fresh = bsrgen.compile(new, dtype=types[0], x_dtype=types[1], out_dtype=types[2])
    np.testing.assert_array_equal(kernel(x), fresh(x))
    np.testing.assert_array_equal(bsrgen.load(kernel.save(tmp_path / "k"))(x), fresh(x))


# ── values ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "types", [types for types in REDUCED if types[2] != "int8" and types[1] != "int8"], ids="-".join
)
def test_infinity_and_nan_come_through(types):
    """Each in its row of Y; a strict kernel lets none into rows without that block."""
    kernel = bsrgen.compile(
        np.diag(np.arange(1, 17)), blocksize=(1, 1), dtype=types[0], x_dtype=types[1], out_dtype=types[2], strict=True
    )
    x = np.ones((3, 16), kernel.x_dtype)
    x[0, 3], x[1, 5], x[2, 7] = np.inf, -np.inf, np.nan
    y = kernel(x).astype(np.float64)
    assert (y[0, 3], y[1, 5]) == (np.inf, -np.inf)
    assert np.isnan(y[2, 7])
    assert np.isfinite(np.delete(y, [3, 5, 7], axis=1)).all()


def test_results_that_float16_cannot_hold_are_infinite():
    kernel = bsrgen.compile(np.full((2, 4), 200.0), blocksize=(2, 1), dtype="float16")
    x = np.array([[200] * 4, [-200] * 4, [100, -100, 50, 0]], np.float16)
    assert kernel(x).tolist() == [[np.inf] * 2, [-np.inf] * 2, [10000.0] * 2]
    wide = bsrgen.compile(np.full((2, 4), 200.0), blocksize=(2, 1), dtype="float16", out_dtype="float32")
    assert wide(x).tolist() == [[160000.0] * 2, [-160000.0] * 2, [10000.0] * 2]


def test_results_of_bfloat16_round_to_even():
    kernel = bsrgen.compile(np.ones((1, 2)), blocksize=(1, 2), dtype="bfloat16")
    low, ulp = 1.0, 2.0**-7
    x = np.array([[low, ulp / 2], [low + ulp, ulp / 2], [low, ulp * 0.75], [low, ulp / 4]], BF16)
    assert kernel(x).astype(float)[:, 0].tolist() == [low, low + 2 * ulp, low + ulp, low]


class TestTorch:
    @pytest.fixture(autouse=True)
    def _torch(self):
        self.torch = pytest.importorskip("torch")

    @pytest.mark.parametrize("name", ["bfloat16", "float16"])
    def test_tensors(self, name, rng):
        dtype = getattr(self.torch, name)
        W = self.torch.randn(32, 48).to(dtype)
        kernel = bsrgen.compile(W, blocksize=(16, 1), dtype=name, epilogue=("bias", "residual"))
        x, bias, residual = (self.torch.randn(*shape).to(dtype) for shape in ((5, 48), (32,), (5, 32)))
        y = kernel(x, bias=bias, residual=residual)
        assert y.dtype == DTYPES[name].numpy
        expected = x.double() @ W.double().T + bias.double() + residual.double()
        np.testing.assert_allclose(y.astype(np.float64), expected.numpy(), rtol=2e-2, atol=2e-2)

    def test_dynamic_quantisation_of_activations(self):
        """Per token, as torch users do it."""
        W, x = self.torch.randn(32, 48), self.torch.randn(7, 48)
        scale = x.abs().amax(-1, keepdim=True) / 127
        kernel = bsrgen.compile(W, blocksize=(16, 1), dtype="int8")
        y = kernel((x / scale).round().to(self.torch.int8), x_scale=scale)
        np.testing.assert_allclose(y, (x @ W.T).numpy(), atol=0.05 * float((x @ W.T).abs().max()))


# ── artifacts ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("types", REDUCED[::3], ids="-".join)
def test_verify_reads_the_weight_back(types, tmp_path):
    """Out of packed bytes that may be pairs, quads, and sums of rows."""
    for operator, blocksize in (("linear", (16, 1)), ("spmm", (4, 4)), ("linear", (1, 32))):
        kernel, _, weight = built(types, operator, blocksize, ("bias",))
        folder = kernel.save(tmp_path / f"{operator}{blocksize}")
        _, findings = verify(folder)
        assert all(finding.ok for finding in findings), findings
        assert kernel.artifact.manifest.weight == weight.digest


def test_verify_finds_a_changed_value(tmp_path):
    """In the library, where its packing would have put another: correction sums no longer fit, or the digest."""
    from bsrgen.artifact import write_manifest

    folder = built(INT8)[0].save(tmp_path / "k")
    kernel = bsrgen.load(folder)
    record = kernel.plan.values
    library = bytearray(kernel.artifact.library.read_bytes())
    for at in range(record.offset, record.offset + record.bytes):
        if library[at]:
            library[at] ^= 1
            break
    kernel.artifact.library.unlink()
    kernel.artifact.library.write_bytes(library)
    write_manifest(folder, kernel.artifact.manifest)
    assert not next(finding for finding in verify(folder)[1] if finding.what == "values").ok


@pytest.mark.parametrize("types", REDUCED[1::3], ids="-".join)
def test_save_and_load(types, tmp_path, rng):
    kernel, problem, _ = built(types, epilogue="bias", bias=np.linspace(-1, 1, 53))
    loaded = bsrgen.load(kernel.save(tmp_path / "k"))
    assert loaded.problem == problem
    x, given = problem.sample(rng, 9)
    given = {name: value for name, value in given.items() if name not in ("bias", "w_scale")}
    np.testing.assert_array_equal(loaded(x, **given), kernel(x, **given))
    m = loaded.artifact.manifest
    assert (m.dtype, m.x_dtype, m.out_dtype) == types
    assert m.check is not None
    assert m.check.worst <= 1


@pytest.mark.parametrize("types", [("bfloat16",) * 3, INT8], ids="-".join)
def test_tuned_by_the_clock(types, rng):
    kernel, problem, weight = built(types, shape=(128, 128), kind="uniform", tune="measure", n=16)
    assert kernel.cost.measured_seconds
    check_calls(kernel, problem, weight, rng, (16,))


def test_kernels_of_one_type_keep_their_names():
    """Artifacts, goldens and symbols of float32 and float64 are what they were."""
    for name in DTYPE_NAMES:
        kernel = bsrgen.compile(make_weight("uniform", (16, 16), (4, 4), name), dtype=name)
        assert kernel.name.startswith(f"linear_{DTYPES[name].short}_16x16_b4x4_")
        assert kernel.x_dtype == kernel.out_dtype == kernel.dtype == name
