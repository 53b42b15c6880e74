"""Reduced precision without a compiler: problems, their reference and its bound, and what a call takes."""

import itertools
import math
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from support import DTYPE_NAMES, OPERATOR_NAMES, REDUCED, make_weight, problem_of

import bsrgen
from bsrgen.arguments import Call, bind
from bsrgen.dtypes import DTYPES
from bsrgen.exam import error_share
from bsrgen.pattern import Pattern, Weight, random_weight
from bsrgen.problem import as_problem

BF16 = np.dtype(ml_dtypes.bfloat16)
M, K = 11, 9
TYPES = [*((name, name, name) for name in DTYPE_NAMES), *REDUCED]
STEPS = ("scale", "bias", "clamp", "residual")


def case(types, operator="linear", steps=STEPS, shape=(M, K)):
    weight = make_weight("powerlaw", shape, (3, 4), types[0])
    return weight, problem_of(weight, operator, steps, *types)


# ── problems ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
@pytest.mark.parametrize("types", TYPES, ids="-".join)
def test_reference_is_the_scaled_product(types, operator, rng):
    """Against a loop over the dense matrix: scales of int8 around the epilogue, saturation at the end."""
    weight, problem = case(types, operator)
    x, given = problem.sample(rng, 5)
    given |= {"lo": -0.5, "hi": 0.75}
    y, bound = problem.reference(weight, x, given)
    W = weight.todense().astype(np.float64)
    for m, n in itertools.product(range(M), range(5)):
        at, xs = ((n, m), x[n]) if operator == "linear" else ((m, n), x[:, n])
        v = math.fsum(float(W[m, k]) * float(xs[k]) for k in range(K))
        v *= float(given["w_scale"][m]) if types[0] == "int8" else 1
        v *= float(given["x_scale"][n]) if types[1] == "int8" else 1
        v = min(max(v * float(given["scale"][m]) + float(given["bias"][m]), -0.5), 0.75) + float(given["residual"][at])
        if types[2] == "int8":
            v = min(max(v / float(given["y_scale"]), -127.0), 127.0)
        assert y[at] == pytest.approx(v, rel=1e-12, abs=1e-14)
    assert (bound >= 0).all()


def computed(weight, problem, x, given):
    """What a kernel may do, in numpy: float32 sums and steps, rounded to the type of Y."""
    real = problem.real.numpy.type
    W, sums = weight.todense().astype(np.float64), np.float64 if problem.accumulator.name == "int32" else real
    v = (x.astype(sums) @ W.T.astype(sums)).astype(real)
    for step in problem.epilogue:
        columns = {"token": lambda a: np.reshape(a, (-1, 1))}
        values = [columns.get(o.kind, lambda a: a)(np.asarray(given[o.name], real)) for o in step.operands]
        v = step.numpy(v, *values).astype(real)
    if problem.out_dtype.name == "int8":
        return np.clip(np.rint(v), -127, 127).astype(np.int8)
    return v.astype(problem.out_dtype.numpy)


@pytest.mark.parametrize("types", TYPES, ids="-".join)
def test_bound_forgives_rounding_and_nothing_else(types, rng):
    weight, problem = case(types, steps=("bias",), shape=(32, 64))
    x, given = problem.sample(rng, 40)
    expected, bound = problem.reference(weight, x, given)
    assert error_share(computed(weight, problem, x, given), expected, bound) <= 1
    data = weight.data.copy()
    largest = np.unravel_index(np.abs(data.astype(np.float64)).argmax(), data.shape)
    data[largest] = -data[largest]  # one wrong value
    assert error_share(computed(Weight(weight.pattern, data), problem, x, given), expected, bound) > 1
    y = computed(weight, problem, x, given)
    worst = np.unravel_index(np.abs(expected).argmin(), y.shape)
    y[worst] += 1  # int8: a neighbour may be as near, two steps away is not
    y[worst] += 1
    assert error_share(y, expected, bound) > 1


def test_bound_of_int8_is_one_rounding_of_an_exact_sum(rng):
    """Sums are integers: no bound grows with the number of entries."""
    weight = Weight(random_weight(0, (4, 4096), (4, 4), 1.0).pattern, np.full((1024, 4, 4), 127, np.int8))
    problem = problem_of(weight, "linear", (), "int8")
    x = np.full((2, 4096), -127, np.int8)
    y, bound = problem.reference(weight, x, {"w_scale": np.ones(4), "x_scale": 1.0})
    assert (y == -(127**2) * 4096).all()
    assert (bound <= 8 * 2.0**-24 * np.abs(y)).all()


def test_results_beyond_float16_may_be_anything():
    weight = Weight(random_weight(0, (1, 2), (1, 2), 1.0).pattern, np.full((1, 1, 2), 200, np.float16))
    problem = problem_of(weight)
    x = np.array([[200, 200], [100, 100], [-200, -200]], np.float16)
    y, bound = problem.reference(weight, x)
    assert error_share(np.array([[np.inf], [40000], [-np.inf]], np.float16), y, bound) <= 1
    assert error_share(np.array([[np.inf], [np.inf], [-np.inf]], np.float16), y, bound) > 1
    y32, bound32 = problem_of(weight, y="float32").reference(weight, x)
    assert error_share(np.array([[np.inf], [40000], [-80000]], np.float32), y32, bound32) > 1


@pytest.mark.parametrize("types", TYPES, ids="-".join)
def test_sample_has_the_types_of_a_call(types, rng):
    for operator in OPERATOR_NAMES:
        _, problem = case(types, operator)
        w, x, y = (DTYPES[name] for name in types)
        X, given = problem.sample(rng, 6)
        assert X.dtype == x.numpy
        assert problem.sample_out(rng, 6).dtype == y.numpy
        assert problem.sample_out(rng, 6).shape == problem.operator.shape(6, M)
        assert given["residual"].dtype == (np.float32 if types[2] == "int8" else y.numpy)
        assert {a.dtype for name, a in given.items() if name != "residual"} == {DTYPES[w.real].numpy}
        scales = [given[name] for name in ("w_scale", "x_scale", "y_scale") if name in given]
        assert len(scales) == types.count("int8")
        assert all((scale > 0).all() for scale in scales)
        if types[1] == "int8":
            assert given["x_scale"].shape == (6,)
            assert X.min() >= -127


def test_names_say_the_types():
    pattern = random_weight(0, (32, 64), (4, 4), 0.5).pattern
    names = {types: as_problem("linear", pattern, *types).name for types in TYPES}
    assert len(set(names.values())) == len(TYPES)
    for types, short in {
        ("float32",) * 3: "f32", ("float64",) * 3: "f64", ("bfloat16",) * 3: "bf16", ("float16",) * 3: "f16",
        ("bfloat16", "bfloat16", "float32"): "bf16_yf32", ("int8", "int8", "float32"): "s8",
        ("int8", "int8", "int8"): "s8_ys8", ("bfloat16", "float32", "float32"): "bf16_xf32",
        ("int8", "bfloat16", "float32"): "s8_xbf16_yf32",
    }.items():  # fmt: skip
        assert names[types].startswith(f"linear_{short}_32x64_b4x4_")
    assert str(as_problem("linear", pattern, "int8", out_dtype="bfloat16")).startswith(
        "linear int8 x int8 -> bfloat16 32x64 "
    )


def test_problems_that_are_refused():
    pattern = random_weight(0, (32, 64), (4, 4), 0.5).pattern
    with pytest.raises(bsrgen.UnsupportedError, match="'accumulate' adds to real numbers"):
        as_problem("linear", pattern, "int8", None, "int8", ("bias", "accumulate"))
    as_problem("linear", pattern, "int8", None, "float32", ("bias", "accumulate"))
    for blocks, fits in ((33026, True), (33027, False)):  # 4 * 33026 * 127 * 128 is the last sum below 2^31
        long = Pattern((1, 4 * blocks), (1, 4), np.array([0, blocks]), np.arange(blocks))
        as_problem("linear", long, "int8", "float32")
        if fits:
            as_problem("linear", long, "int8")
        else:
            with pytest.raises(bsrgen.UnsupportedError, match="132108 stored entries may overflow int32"):
                as_problem("linear", long, "int8")


# ── operands when a kernel is compiled ───────────────────────────────────────────────────────────────────────────────


def test_bind_converts_to_what_the_epilogue_computes_in():
    _, problem = case(("int8", "int8", "int8"), steps=("bias",))
    bound = bind(problem, {"bias": np.ones(M, BF16), "w_scale": np.ones(M), "x_scale": 0.25, "y_scale": np.float32(3)})
    assert {name: (a.dtype.name, a.shape) for name, a in bound.items()} == {
        "bias": ("float32", (M,)), "w_scale": ("float32", (M,)), "x_scale": ("float64", ()), "y_scale": ("float64", ())
    }  # fmt: skip


BAD_SCALES = [0.0, -1.0, np.nan, np.inf, -np.inf, 1e-60, 1e60]


@pytest.mark.parametrize("scale", BAD_SCALES)
def test_bind_refuses_scales_that_are_none(scale):
    _, problem = case(("int8", "int8", "int8"), steps=())
    for name in ("x_scale", "y_scale"):
        with pytest.raises(bsrgen.ArgumentError, match=f"{name} holds values that are not positive and finite"):
            bind(problem, {name: scale})
    rows = np.ones(M)
    rows[-1] = scale
    with pytest.raises(bsrgen.ArgumentError, match="w_scale"):
        bind(problem, {"w_scale": rows})


def test_bind_refuses_values_per_token():
    _, problem = case(("int8", "int8", "float32"), steps=())
    with pytest.raises(bsrgen.ArgumentError, match="give one for each token with the call"):
        bind(problem, {"x_scale": np.ones(5)})
    with pytest.raises(bsrgen.ArgumentTypeError, match="its epilogue takes w_scale, x_scale"):
        bind(problem, {"y_scale": 1.0})


def test_bind_takes_torch_halves():
    torch = pytest.importorskip("torch")
    _, problem = case(("bfloat16", "bfloat16", "bfloat16"), steps=("bias",))
    bias = torch.linspace(-1, 1, M).bfloat16()
    for given in (bias, torch.nn.Parameter(bias)):
        np.testing.assert_array_equal(bind(problem, {"bias": given})["bias"], bias.float().numpy())


# ── operands of a call ───────────────────────────────────────────────────────────────────────────────────────────────


def call_of(types, operator="linear", steps=()):
    """The signature of a kernel that nobody compiled."""
    problem = case(types, operator, steps)[1]
    manifest = SimpleNamespace(
        name=problem.name, shape=(M, K), rows=M, operator=operator, steps=problem.epilogue,
        epilogue=tuple(step.name for step in problem.epilogue),
        types=(problem.dtype, problem.x_dtype, problem.out_dtype), given=problem.operands, as_pit=None,
    )  # fmt: skip
    return Call(manifest, 1), problem


def prepared(call, problem, n, x=None, **given):
    x = problem.sample(np.random.default_rng(0), n)[0] if x is None else x
    operands = call.prepare(x, None, None, given, call.settled({})).operands
    return dict(zip((o.name for o in call.operands), operands, strict=True))


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_scales_per_token(operator):
    """One number for all, or an array like x without its features."""
    call, problem = call_of(("int8", "int8", "float32"), operator)
    rows, scales = {"w_scale": np.ones(M, np.float32)}, np.linspace(1, 2, 5, dtype=np.float32)
    shapes = {"linear": ((5,), (5, 1)), "spmm": ((5,), (1, 5))}[operator]
    for shape in shapes:
        array, ld, _ = prepared(call, problem, 5, x_scale=scales.reshape(shape), **rows)["x_scale"]
        assert (array.dtype, array.ndim, ld) == (np.float32, 1, 1)
        np.testing.assert_array_equal(array, scales)
    every_other = np.repeat(scales, 2)[::2]
    assert prepared(call, problem, 5, x_scale=every_other, **rows)["x_scale"][0].flags.c_contiguous
    for number, value in (
        (None, 1.0),
        (0.25, 0.25),
        (np.float64(0.25), 0.25),
        (np.array(3), 3.0),
        (np.ones((), BF16), 1),
    ):
        array, ld, _ = prepared(call, problem, 5, **rows, **({} if number is None else {"x_scale": number}))["x_scale"]
        assert (array.dtype, array.tolist(), ld) == (np.float32, [value], 0)
    for shape in [(4,), (6,), (1,), shapes[1][::-1], (5, 5), (5, 1, 1)]:
        with pytest.raises(bsrgen.ArgumentError, match=r"x_scale has shape .*, expected \(5,\)"):
            prepared(call, problem, 5, x_scale=np.ones(shape, np.float32), **rows)


def test_scales_of_a_batch_and_of_a_vector():
    call, problem = call_of(("int8", "int8", "float32"))
    rows, x = {"w_scale": np.ones(M, np.float32)}, np.ones((2, 3, K), np.int8)
    for shape in ((2, 3), (2, 3, 1)):
        scales = np.arange(1, 7, dtype=np.float32).reshape(shape)
        np.testing.assert_array_equal(prepared(call, problem, 6, x, x_scale=scales, **rows)["x_scale"][0], range(1, 7))
    with pytest.raises(bsrgen.ArgumentError, match=r"expected \(2, 3\)"):
        prepared(call, problem, 6, x, x_scale=np.ones(6, np.float32), **rows)
    assert prepared(call, problem, 1, x[0, 0], x_scale=np.ones(1, np.float32), **rows)["x_scale"][1] == 1
    with pytest.raises(bsrgen.ArgumentError):
        prepared(call, problem, 1, x[0, 0], x_scale=np.ones(2, np.float32), **rows)
    assert prepared(call, problem, 0, x[:0], x_scale=np.ones((0, 3), np.float32), **rows)["x_scale"][0].size == 0


@pytest.mark.parametrize("scale", BAD_SCALES)
def test_calls_refuse_scales_that_are_none(scale):
    call, problem = call_of(("int8", "int8", "int8"))
    good = {"w_scale": np.ones(M, np.float32), "x_scale": np.ones(5, np.float32), "y_scale": 1.0}
    prepared(call, problem, 5, **good)
    with np.errstate(over="ignore", under="ignore"):
        for name, bad in (
            ("x_scale", scale), ("y_scale", scale), ("x_scale", np.array([1, 1, scale, 1, 1], np.float32)),
            ("w_scale", np.full(M, scale, np.float32)),
        ):  # fmt: skip
            with pytest.raises(bsrgen.ArgumentError, match=f"{name} .*positive and finite"):
                prepared(call, problem, 5, **(good | {name: bad}))


@pytest.mark.parametrize("types", REDUCED, ids="-".join)
def test_small_operands_may_be_halves(types):
    """Values per row become float32; those like the result are not copied and have its type."""
    call, problem = call_of(types, steps=("bias", "residual"))
    given = problem.sample(np.random.default_rng(1), 5)[1]
    for half in (np.float16, BF16, np.float32):
        bias = given["bias"].astype(half)
        array, ld, _ = prepared(call, problem, 5, **(given | {"bias": bias}))["bias"]
        assert (array.dtype, ld) == (np.float32, 0)
        np.testing.assert_array_equal(array, bias.astype(np.float32))
    for wrong in (np.float64, np.int8, np.int32):
        with pytest.raises(bsrgen.ArgumentTypeError, match="bias has dtype"):
            prepared(call, problem, 5, **(given | {"bias": given["bias"].astype(wrong)}))
    wrong = np.float16 if types[2] != "float16" else np.float32
    with pytest.raises(bsrgen.ArgumentTypeError, match="residual has dtype"):
        prepared(call, problem, 5, **(given | {"residual": given["residual"].astype(wrong)}))
    assert prepared(call, problem, 5, **given)["residual"][0] is not None


def test_kernels_of_one_type_convert_nothing():
    for name, other in (("float32", np.float16), ("float32", BF16), ("float32", np.float64), ("float64", np.float32)):
        call, problem = call_of((name,) * 3, steps=("bias",))
        with pytest.raises(bsrgen.ArgumentTypeError, match="bias has dtype"):
            prepared(call, problem, 5, bias=np.ones(M, other))


def test_types_of_x_and_out():
    for types in TYPES:
        call, _ = call_of(types)
        x, y = (DTYPES[name].numpy for name in types[1:])
        given = {o.name: np.ones(M, np.float32) for o in call.operands if o.kind == "row"}
        assert call.prepare(np.ones((2, K), x), None, None, given, call.settled({})).out.dtype == y
        assert call.prepare(np.ones((2, K), x), np.ones((2, M), y), None, given, {}).out.dtype == y
        for other in {"f4", "f8", "f2", "i1", BF16}:
            if np.dtype(other) != x:
                way = r"rint\(x / x_scale\)" if x == np.int8 else "astype"
                with pytest.raises(bsrgen.ArgumentTypeError, match=f"x has dtype .*{way}"):
                    call.prepare(np.ones((2, K), other), None, None, given, {})
            if np.dtype(other) != y:
                with pytest.raises(bsrgen.ArgumentTypeError, match="out has dtype"):
                    call.prepare(np.ones((2, K), x), np.ones((2, M), other), None, given, {})


def test_settled_operands():
    """What a call need not give: operands that are bound, and those with a default."""
    call, _ = call_of(("int8", "int8", "int8"), steps=("bias",))
    ones = np.ones(M, np.float32)
    assert call.settled({}).keys() == {"x_scale", "y_scale"}
    assert call.settled({"bias": ones}).keys() == {"x_scale", "y_scale", "bias"}
    settled = call.settled({"w_scale": ones, "bias": ones, "x_scale": np.array(0.5)})
    assert {name: (None if a is None else a.tolist(), ld, scalar) for name, (a, ld, scalar) in settled.items()} == {
        "w_scale": ([1.0] * M, 0, 0.0), "x_scale": ([0.5], 0, 0.0), "bias": ([1.0] * M, 0, 0.0),
        "y_scale": (None, 0, 1.0),
    }  # fmt: skip
    assert call_of(("float32",) * 3)[0].settled({}) == {}
    clamp = call_of(("float32",) * 3, steps=("clamp",))[0].settled({})
    assert clamp == {"lo": (None, 0, -np.inf), "hi": (None, 0, np.inf)}
    assert call_of(("float32",) * 3, steps=("residual",))[0].settled({}) == {}


class TestTorch:
    @pytest.fixture(autouse=True)
    def _torch(self):
        self.torch = pytest.importorskip("torch")

    @pytest.mark.parametrize("name", ["bfloat16", "float16"])
    def test_halves_are_read_in_place(self, name):
        call, _ = call_of((name,) * 3, steps=("residual", "bias"))
        dtype = getattr(self.torch, name)
        x, bias = self.torch.rand(6, K).to(dtype), self.torch.rand(M).to(dtype)
        residual = self.torch.rand(2 * M, 6).to(dtype).T[:, ::2]
        ready = call.prepare(x, None, None, {"residual": residual, "bias": bias}, call.settled({}))
        assert ready.x.ctypes.data == x.data_ptr()
        np.testing.assert_array_equal(ready.x.astype(np.float32), x.float().numpy())
        np.testing.assert_array_equal(ready.operands[0][0].astype(np.float32), residual.float().numpy())
        np.testing.assert_array_equal(ready.operands[1][0], bias.float().numpy())

    def test_tensors_that_cannot_be_read(self):
        call, _ = call_of(("bfloat16",) * 3)
        x = self.torch.zeros(2, K, dtype=self.torch.bfloat16)
        for wrong in (x.clone().requires_grad_(), x.to("meta"), x.to_sparse(), x.half(), x.float()):
            with pytest.raises(bsrgen.ArgumentTypeError, match="x "):
                call.prepare(wrong, None, None, {}, {})
