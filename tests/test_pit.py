"""mode="pit": results against float64 for random selections, what stays, threads, values, errors, legality."""

import ctypes
from dataclasses import replace

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from support import assert_right, check_calls

import bsrgen
from bsrgen.backends.c.features import features_plans
from bsrgen.bench.clock import peer_threads
from bsrgen.bench.pit import compare
from bsrgen.operators import OPERATORS
from bsrgen.pattern import Weight, as_weight, random_weight
from bsrgen.pit import AXES
from bsrgen.pit_kernel import PitKernel
from bsrgen.targets import native
from bsrgen.verify import verify

SHAPE = (104, 77)  # a strip and a rest, odd K
TOKENS = (1, 5, 64, 131)  # one, a rest of a tile, several tiles
MASK = {"outputs": {"mask_block": (20, 32)}}  # by tiles; finer ones are gathered
CASES = [
    ("tokens", "float32", {}),
    ("tokens", "bfloat16", {"epilogue": ("bias", "gelu", "residual"), "out_dtype": "float32"}),
    ("features", "float32", {"epilogue": ("bias", "relu")}),
    ("features", "float64", {}),
    ("features", "bfloat16", {}),
    ("features", "int8", {}),
    ("features", "float32", {"target": "x86-64-v3"}),
    ("features", "float32", {"target": "x86-64"}),
    ("experts", "float32", {"epilogue": ("bias", "token_scale", "residual", "accumulate")}),
    ("experts", "int8", {}),
    ("outputs", "float32", {"epilogue": ("scale", "accumulate")}),
    ("outputs", "bfloat16", {"mask_block": (3, 8)}),
    ("outputs", "int8", {"mask_block": (1, 16)}),
    ("tokens", "float32", {"operator": "spmm"}),
    ("tokens", "int8", {"operator": "spmm"}),
    ("features", "float32", {"operator": "spmm", "epilogue": ("bias", "relu")}),
    ("features", "bfloat16", {"operator": "spmm"}),
    ("experts", "float32", {"operator": "spmm", "epilogue": ("bias", "token_scale", "residual", "accumulate")}),
    ("outputs", "bfloat16", {"operator": "spmm", "mask_block": (3, 8), "epilogue": ("scale", "accumulate")}),
]
_KERNELS: dict[str, tuple[PitKernel, Weight]] = {}


def dense(axis: str, dtype: str, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (3, 48, SHAPE[1]) if axis == "experts" else SHAPE
    return rng.integers(-127, 128, shape).astype(np.int8) if dtype == "int8" else rng.standard_normal(shape, np.float32)


def stored(kernel: PitKernel, W: np.ndarray) -> Weight:
    """W as the kernel keeps it."""
    return as_weight(W.reshape(-1, W.shape[-1]), blocksize=kernel.pattern.blocksize, dtype=kernel.dtype)


def made(axis: str, dtype: str = "float32", **options) -> tuple[PitKernel, Weight]:
    key = f"{axis} {dtype} {options}"
    if key not in _KERNELS:
        W = dense(axis, dtype)
        kernel = bsrgen.compile(W, mode="pit", axis=axis, dtype=dtype, threads=1, **MASK.get(axis, {}) | options)
        _KERNELS[key] = kernel, stored(kernel, W)
    return _KERNELS[key]


@pytest.mark.parametrize(("axis", "dtype", "options"), CASES, ids=lambda v: v if isinstance(v, str) else None)
def test_right_and_nothing_else_is_written(axis, dtype, options, request):
    if target := options.get("target"):
        if bsrgen.targets.native().family != "x86_64":
            pytest.skip("x86-64 only")
        assert target
    kernel, weight = made(axis, dtype, **options)
    assert kernel.problem.pattern.digest == weight.pattern.digest
    assert kernel.artifact.manifest.check is not None
    given = {"w_scale": kernel._values.bound["w_scale"]} if dtype == "int8" else {}
    rng = np.random.default_rng(1)
    for n in TOKENS:
        x, operands = kernel.problem.sample(rng, n)
        operands = {name: value for name, value in operands.items() if name != "w_scale"}
        old = kernel.problem.sample_out(rng, n)
        y = kernel(x, out=old.copy(), **operands)
        assert_right(kernel.problem, weight, y, x, operands | given, old)
    if dtype == "float32":
        check_calls(kernel, kernel.problem, weight, rng, (7,))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_micro_tile(dtype):
    """Forced sizes give what the table's own choice does, within the bound; all in one X, and all zeros."""
    kernel, weight = made("features", dtype, **({"epilogue": ("bias", "relu")} if dtype == "float32" else {}))
    rng = np.random.default_rng(2)
    x, given = kernel.problem.sample(rng, 50)
    x[10:16] = 0
    x[16:22] = rng.standard_normal((6, x.shape[1])).astype(x.dtype)
    for tile in (0, *kernel.tiles):
        assert_right(kernel.problem, weight, kernel(x, **given | {"tile": tile}), x, given)
    assert kernel.tiles[0] == 1


def bits(shape: tuple[int, ...]):
    """Masks of all kinds, all-zero and all-one ones often."""
    size = int(np.prod(shape))
    some = st.lists(st.booleans(), min_size=size, max_size=size).map(lambda v: np.array(v, bool).reshape(shape))
    return st.one_of(st.just(np.zeros(shape, bool)), st.just(np.ones(shape, bool)), some)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=30, deadline=None)
def test_any_selection(data):
    axis = data.draw(st.sampled_from(sorted(AXES)))
    n = data.draw(st.integers(0, 40))
    options = {"features": {"epilogue": ("bias", "relu")}, "outputs": {"epilogue": ("scale", "accumulate")}}
    options["experts"] = {"epilogue": ("bias", "token_scale", "residual", "accumulate")}
    kernel, weight = made(axis, **options.get(axis, {}))
    x, given = kernel.problem.sample(np.random.default_rng(3), n)
    name, pit = kernel.selects, kernel.artifact.manifest.as_pit
    if axis == "features":
        mask = data.draw(bits((n, 7))).repeat(11, 1)
        x = np.where(mask, np.random.default_rng(4).standard_normal(x.shape), -0.0).astype(np.float32)
    elif axis == "experts":
        given[name] = np.array(data.draw(st.lists(st.integers(-2, 2), min_size=n, max_size=n)), np.int64)
    else:
        given[name] = data.draw(bits(pit.selection_shape(n, SHAPE[0])))
    old = kernel.problem.sample_out(np.random.default_rng(5), n)
    y = kernel(x, out=old.copy(), **given)
    assert_right(kernel.problem, weight, y, x, given, old)
    if axis != "features":
        assert (y == old)[~pit.kept(given[name], n, SHAPE[0])].all()


def test_a_new_result_is_zero_where_nothing_is_selected():
    kernel, _ = made("tokens")
    x = np.random.default_rng(0).standard_normal((2, 5, SHAPE[1])).astype(np.float32)
    live = np.array([[1, 0, 0, 1, 0], [0, 0, 1, 1, 1]], bool)
    y = kernel(x, live)
    assert y.shape == (2, 5, SHAPE[0])
    assert not y[~live].any()
    assert y[live].all()
    np.testing.assert_array_equal(kernel(x, live=np.flatnonzero(live)), y)  # the same by their numbers
    assert kernel(x).all()
    assert not kernel(x, live=[]).any()


def test_each_token_goes_to_several_experts():
    """Results are summed, weighed by token_scale; those of no expert stay."""
    kernel, weight = made("experts", epilogue=("bias", "token_scale"))
    rng = np.random.default_rng(0)
    x, given = kernel.problem.sample(rng, 2 * 9)
    routing = rng.integers(-1, 3, (2, 9, 2))
    routing[0, 3] = -1
    scale = rng.random((2, 9, 2), np.float32)
    out = np.full((2, 9, 48), 7, np.float32)
    given |= {"token_scale": scale, "routing": routing}
    assert kernel(x.reshape(2, 9, -1), out=out, **given) is out
    total, error = np.zeros((18, 48)), np.zeros((18, 48))
    for k in range(2):
        one = given | {"token_scale": scale[..., k].reshape(-1), "routing": routing[..., k].reshape(-1)}
        y, bound = kernel.problem.reference(weight, x, one)
        total, error = total + y, error + bound
    went = (routing >= 0).any(-1).reshape(-1)
    got = out.reshape(18, 48)
    assert (got[~went] == 7).all()
    assert (np.abs(got - total)[went] <= (error + 1e-6 * np.abs(total))[went]).all()
    np.testing.assert_array_equal(kernel(x.reshape(2, 9, -1), **given)[routing[..., 0] >= 0], out[routing[..., 0] >= 0])
    with pytest.raises(bsrgen.ArgumentError, match=r"routing has shape \(4, 2\)"):
        kernel(x, **given | {"routing": routing[0, :4]})
    adds, _ = made("experts", epilogue=("bias", "token_scale", "residual", "accumulate"))
    with pytest.raises(bsrgen.UnsupportedError, match="several experts with epilogue 'residual'"):
        adds(x, routing=routing.reshape(18, 2))


def test_columns_of_x_are_tokens():
    """spmm: a selection has one entry for each column; several experts for each are refused."""
    kernel, _ = made("tokens", operator="spmm")
    x = np.random.default_rng(0).standard_normal((SHAPE[1], 7)).astype(np.float32)
    live = np.arange(7) % 3 > 0
    y = kernel(x, live)
    assert y.shape == (SHAPE[0], 7)
    assert not y[:, ~live].any()
    np.testing.assert_array_equal(y[:, live], kernel(x)[:, live])
    np.testing.assert_allclose(kernel(x[:, 1], live=live[1:2]), y[:, 1], rtol=1e-4)
    grouped, _ = made("experts", operator="spmm", epilogue=("bias", "token_scale", "residual", "accumulate"))
    with pytest.raises(bsrgen.UnsupportedError, match="several experts with operator 'spmm'"):
        grouped(x, routing=np.zeros((7, 2), int))


def same(kernel, x, given):
    """The short way, which calls without threads= take, and the careful one: results are equal."""
    short, careful = kernel(x, **given), kernel(x, threads=1, **given)
    np.testing.assert_array_equal(short, careful)
    return short


def test_the_short_way_is_the_careful_one():
    """Selections and operands of every kind, and those that only the careful way takes."""
    x = np.random.default_rng(0).standard_normal((9, SHAPE[1])).astype(np.float32)
    tokens, (experts, _) = made("tokens")[0], made("experts", epilogue=("bias", "token_scale"))
    live, routing = np.arange(9) % 2 == 0, np.arange(9) % 4 - 1
    for chosen in (live, np.flatnonzero(live), live.tolist(), np.flatnonzero(live).astype(np.uint8), None):
        same(tokens, x, {"live": chosen})
    given = {"bias": np.ones(144, np.float32), "token_scale": np.linspace(1, 2, 9, dtype=np.float32)}
    for ids in (routing, routing.astype(np.int32), routing.astype(np.int16), routing[::-1]):
        for scale in (given["token_scale"], 0.5, given["token_scale"][::-1], given["token_scale"][:, None]):
            same(experts, x, given | {"routing": ids, "token_scale": scale})
    for wrong in (np.array([2**32] * 9), np.full(9, 3), np.full(9, 3, np.int32)):
        with pytest.raises(bsrgen.ArgumentError, match="routing sends a token to expert"):
            experts(x, routing=wrong, **given)
    out = np.zeros((9, SHAPE[0]), np.float32)
    assert tokens(x, out=out, live=out.view(bool).reshape(-1)[:9]) is out  # overlapping, and all zero
    assert not out.any()


@pytest.mark.parametrize("options", [{"mask_block": (3, 8)}, {"mask_block": (1, 16)}], ids=str)
def test_fine_masks_that_want_nearly_all(options):
    """All of Y is computed then, and what nobody wants is not stored."""
    kernel, weight = made("outputs", "bfloat16" if options["mask_block"][0] == 3 else "int8", **options)
    given = {"w_scale": kernel._values.bound["w_scale"]} if kernel.dtype == np.int8 else {}
    x, operands = kernel.problem.sample(rng := np.random.default_rng(0), 50)
    operands.pop("w_scale", None)
    for missing in (0, 1, 9):
        operands["mask"] = np.ones_like(operands["mask"])
        operands["mask"].flat[rng.permutation(operands["mask"].size)[:missing]] = False
        old = kernel.problem.sample_out(rng, 50)
        y = kernel(x, out=old.copy(), **operands)
        assert_right(kernel.problem, weight, y, x, operands | given, old)


def test_rates_of_tiles_follow_the_target():
    """Where L2 gives less, tiles that read W from it are dearer; the largest one's word is the unit."""
    plan = next(features_plans(made("features")[0].problem, target := native()))
    slower = replace(plan, target=replace(target, l2_bytes_per_cycle=target.l2_bytes_per_cycle / 4))
    assert plan.rates[-1][0] == slower.rates[-1][0] == 100
    assert slower.rates[0][0] < plan.rates[0][0]
    words = [word for word, _ in plan.rates]
    assert words == sorted(words, reverse=True)


def test_block_sparse_weights_keep_their_blocks():
    W = random_weight(0, (96, 80), (16, 4), 0.3)
    kernel = bsrgen.compile(W, mode="pit", axis="tokens", threads=1)
    assert kernel.pattern.digest == W.pattern.digest
    rng = np.random.default_rng(0)
    for n in (3, 70):
        x, given = kernel.problem.sample(rng, n)
        assert_right(kernel.problem, W, kernel(x, **given), x, given)


@pytest.mark.parametrize("axis", AXES)
def test_same_bits_for_any_number_of_threads(axis):
    M, K, n = 256, 512, 96  # enough for three threads
    W = np.random.default_rng(0).standard_normal((2, M // 2, K) if axis == "experts" else (M, K), np.float32)
    kernel = bsrgen.compile(W, mode="pit", axis=axis, **MASK.get(axis, {}))
    for tokens in (n, 1):
        x, given = kernel.problem.sample(np.random.default_rng(6), tokens)
        expected = kernel(x, threads=1, **given)
        for threads in (2, 3, 5):
            assert kernel(x, threads=threads, **given).tobytes() == expected.tobytes(), threads


@pytest.mark.parametrize("axis", AXES)
def test_new_values_and_folders(axis, tmp_path):
    options = {"features": {"epilogue": ("bias", "relu")}, "outputs": {"epilogue": ("scale", "accumulate")}}
    options["experts"] = {"epilogue": ("bias", "token_scale", "residual", "accumulate")}
    kernel, _ = made(axis, **options.get(axis, {}))
    kernel = bsrgen.load(kernel.artifact.folder, threads=1)
    assert isinstance(kernel, PitKernel)
    W = dense(axis, "float32", seed=9)
    kernel.update(list(W) if axis == "experts" else W)
    x, given = kernel.problem.sample(np.random.default_rng(7), 19)
    old = kernel.problem.sample_out(np.random.default_rng(8), 19)
    y = kernel(x, out=old.copy(), **given)
    assert_right(kernel.problem, stored(kernel, W), y, x, given, old)
    again, findings = verify(kernel.save(tmp_path / "saved"))
    assert all(finding.ok for finding in findings), findings
    np.testing.assert_array_equal(again(x, out=old.copy(), **given), y)
    assert str(axis) in str(again.problem)


def test_from_c():
    """The typed entry: a mask, none, and what it refuses."""
    kernel, _ = made("tokens")
    x = np.random.default_rng(0).standard_normal((9, SHAPE[1])).astype(np.float32)
    live = np.arange(9) % 2 == 0
    y = np.full((9, SHAPE[0]), 7, np.float32)
    entry = ctypes.CDLL(str(kernel.artifact.library))[kernel.name]
    i64, p = ctypes.c_int64, ctypes.c_void_p

    def call(n: int, mask: int | None) -> int:
        arguments = (i64(n), p(x.ctypes.data), i64(SHAPE[1]), p(y.ctypes.data), i64(SHAPE[0]), p(mask), p(None), 1)
        return int(entry(*arguments))

    assert call(9, live.ctypes.data) == 0
    np.testing.assert_array_equal(y[live], kernel(x)[live])
    assert (y[~live] == 7).all()
    assert call(9, None) == 0
    np.testing.assert_array_equal(y, kernel(x))
    assert call(-1, None) == 2
    assert "live" in (kernel.artifact.folder / f"{kernel.name}.h").read_text()


REFUSED = [
    ({"axis": "rows"}, bsrgen.ArgumentError, "one of tokens"),
    ({}, bsrgen.ArgumentError, "one of tokens"),
    ({"axis": "tokens", "operator": "spmm", "backend": "cuda"}, bsrgen.UnsupportedError, "or backend='c'"),
    ({"axis": "tokens", "mask_block": (1, 8)}, bsrgen.ArgumentError, "axis='outputs'"),
    ({"axis": "outputs"}, bsrgen.ArgumentError, "mask_block"),
    ({"axis": "outputs", "mask_block": (0, 8)}, bsrgen.ArgumentTypeError, "from 1 up"),
    ({"axis": "outputs", "mask_block": 8}, bsrgen.ArgumentTypeError, "two ints"),
    ({"axis": "outputs", "mask_block": (4, 9), "blocksize": (8, 8)}, bsrgen.ArgumentError, "whole blocks"),
    ({"axis": "features", "blocksize": (8, 8)}, bsrgen.ArgumentError, "leave it out"),
    ({"axis": "experts"}, bsrgen.ArgumentError, "at least one expert"),
    ({"axis": "tokens", "backend": "mlir"}, bsrgen.UnsupportedError, "mode='pit' with backend"),
    ({"axis": "tokens", "dtype": "int8", "x_dtype": "float32", "quantize_x": True}, bsrgen.UnsupportedError, "outside"),
    ({"axis": "tokens", "mode": "static"}, bsrgen.ArgumentError, "only mode='pit'"),
    ({"axis": "tokens", "mode": "later"}, bsrgen.UnsupportedError, "one of static"),
]


@pytest.mark.parametrize(("options", "error", "words"), REFUSED)
def test_compile_refuses(options, error, words):
    with pytest.raises(error, match=words):
        bsrgen.compile(np.ones((16, 8), np.float32), **{"mode": "pit"} | options)


def test_experts_are_alike():
    with pytest.raises(bsrgen.ArgumentError, match="all experts have one"):
        bsrgen.compile([np.ones((4, 3), np.float32), np.ones((5, 3), np.float32)], mode="pit", axis="experts")


def test_rows_of_experts_are_part_of_the_kernel(rng):
    """The same numbers as other experts are another kernel, and no update of it."""
    W = rng.standard_normal((64, 20), np.float32)
    kernels = [bsrgen.compile(W.reshape(count, -1, 20), mode="pit", axis="experts") for count in (4, 2)]
    assert [k(np.ones((3, 20), np.float32), routing=np.arange(3) % 2).shape for k in kernels] == [(3, 16), (3, 32)]
    for other in (W.reshape(2, 32, 20), [W[:32], W[32:]], [W[:16], W[16:32], W[32:48], W[48:, :19]]):
        with pytest.raises(bsrgen.PatternMismatchError, match="each of the 4 experts is 16x20"):
            kernels[0].update(other)


CALLS = [
    ("tokens", {"live": np.ones(3, bool)}, bsrgen.ArgumentError, "live has shape"),
    ("tokens", {"live": np.ones(4, np.float32)}, bsrgen.ArgumentTypeError, "dtype float32"),
    ("tokens", {"live": np.array([4])}, bsrgen.ArgumentError, "names token 4"),
    ("tokens", {"live": np.array([-1])}, bsrgen.ArgumentError, "names token -1"),
    ("tokens", {"live": np.array([1, 0, 1, 0])}, bsrgen.ArgumentError, "more than once"),
    ("tokens", {"mask": np.ones(4, bool)}, bsrgen.ArgumentTypeError, "unexpected operand 'mask'"),
    ("features", {"select": np.ones(4, bool)}, bsrgen.ArgumentTypeError, "takes no selection"),
    ("experts", {}, bsrgen.ArgumentTypeError, "'routing' is missing"),
    ("experts", {"routing": np.array([0, 1, 3, 0])}, bsrgen.ArgumentError, "expert 3"),
    ("experts", {"routing": np.ones(4, bool)}, bsrgen.ArgumentTypeError, "expected integers"),
    ("outputs", {"mask": np.ones((4, 4), bool)}, bsrgen.ArgumentError, "mask has shape"),
    ("outputs", {"mask": np.ones(4, bool)}, bsrgen.ArgumentError, "mask has shape"),
    ("outputs", {"mask": np.ones((1, 4))}, bsrgen.ArgumentTypeError, "expected bool"),
]


@pytest.mark.parametrize(("axis", "call", "error", "words"), CALLS)
def test_calls_refuse(axis, call, error, words):
    options = {"features": {"epilogue": ("bias", "relu")}, "outputs": {"epilogue": ("scale", "accumulate")}}
    options["experts"] = {"epilogue": ("bias", "token_scale", "residual", "accumulate")}
    kernel, _ = made(axis, **options.get(axis, {}))
    x, given = kernel.problem.sample(np.random.default_rng(0), 4)
    given.pop(kernel.selects, None)
    with pytest.raises(error, match=words):
        kernel(x, **given | call)


# ── which axes may be permuted ───────────────────────────────────────────────────────────────────────────────────────


def shuffled(a: np.ndarray, at: int | None, order: np.ndarray) -> np.ndarray:
    return a if at is None else np.take(a, order, at)


@pytest.mark.parametrize(("name", "letter"), [(o.name, a) for o in OPERATORS.values() for a in o.permutable])
def test_permutable_axes(name, letter):
    """Operands permuted along an axis of the column give the result permuted along it, or the same where Y lacks it."""
    operator, sizes, rng = OPERATORS[name], {"n": 6, "k": 5, "m": 4}, np.random.default_rng(0)
    W = rng.integers(-9, 10, (sizes["m"], sizes["k"])).astype(np.float64)  # exact sums in any order
    X = rng.integers(-9, 10, operator.shape(sizes["n"], sizes["k"])).astype(np.float64)
    order = rng.permutation(sizes[letter])
    in_w, in_x, in_y = operator.permutable[letter]
    permuted = operator.product(shuffled(W, in_w, order), shuffled(X, in_x, order))
    np.testing.assert_array_equal(permuted, shuffled(operator.product(W, X), in_y, order))
    assert np.array_equal(permuted, operator.product(W, X)) == (in_y is None)


def test_axes_of_pit_are_permutable_ones():
    for axis in AXES.values():
        assert set(axis.permuted) <= set(OPERATORS["linear"].permutable)


def test_bench_has_a_row_for_each_selection():
    with peer_threads(1):
        _, rows = compare(dense("features", "float32"), "features", 5, shares=(1.0, 0.1), rounds=3)
        _, grouped = compare(dense("experts", "float32"), "experts", 9, rounds=3)
    assert [row.live for row in rows] == [1.0, 0.1]
    assert grouped[0].loop_timing is not None
    assert all(row.gain > 0 for row in (*rows, *grouped))
