"""bsrgen.integrations.torch on the CPU: layers, conversion, tracing, gradients at a fixed pattern."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import run_python

from bsrgen.errors import ArgumentError, ArgumentTypeError, PatternError, UnsupportedError

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'bsrgen[torch]'")
nn = torch.nn

from torch.nn.utils import prune as pruning  # noqa: E402

import bsrgen.integrations.torch as bt  # noqa: E402
from bsrgen.integrations.torch import kernels, ops, packed  # noqa: E402
from bsrgen.integrations.torch.config import parsed  # noqa: E402
from bsrgen.prune import block_norms  # noqa: E402

SHAPE, BLOCK = (22, 13), (3, 3)  # blocks stick out of it
CONFIG = bt.BsrConfig(BLOCK, min_speedup=0)


def sparse_linear(dtype=torch.float32, shape=SHAPE, block=BLOCK, seed=0, bias=True):
    """An nn.Linear with zero blocks, one block row of them empty."""
    torch.manual_seed(seed)
    linear = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)
    kept = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1])) < 0.4
    kept[1], kept[0, 0] = False, True
    with torch.no_grad():
        linear.weight.mul_(kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]])
    return linear


def close(y, expected, dtype=torch.float32):
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=8 * eps, atol=8 * eps, check_dtype=False)


# ── the layer ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_layer_is_the_linear_it_was_made_of(dtype, bias):
    linear = sparse_linear(dtype, bias=bias)
    layer = bt.BsrLinear.from_linear(linear, CONFIG)
    assert layer.values.dtype == dtype
    wide = copy.deepcopy(linear).to(torch.float64)
    for shape in [(13,), (1, 13), (2, 5, 13), (0, 13), (2, 0, 3, 13)]:
        x = torch.randn(shape).to(dtype)
        for y in (layer(x), torch.no_grad()(layer)(x)):
            assert y.dtype == dtype
            assert y.shape == (*shape[:-1], 22)
            close(y.double(), wide(x.double()), dtype)
    x = torch.randn(13, 6).to(dtype).t()  # not contiguous
    close(layer(x).double(), wide(x.double()), dtype)


def test_to_linear_is_the_way_back():
    linear = sparse_linear(torch.bfloat16).eval().requires_grad_(False)
    linear.bias.requires_grad_(True)
    layer = bt.BsrLinear.from_linear(linear, CONFIG)
    back = layer.to_linear()
    assert not layer.training
    assert torch.equal(back.weight, linear.weight)
    assert torch.equal(back.bias, linear.bias)
    assert (back.weight.requires_grad, back.bias.requires_grad, back.training) == (False, True, False)
    assert "blocksize=3x3" in repr(layer)


def test_state_copies_and_pickles():
    linear = sparse_linear()
    layer, x = bt.BsrLinear.from_linear(linear, CONFIG), torch.randn(4, 13)
    state = layer.state_dict()
    assert list(state) == ["values", "bias", "crow_indices", "col_indices"]
    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    for other in copies:
        assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        layer.values.mul_(2)  # theirs stay
    for other in copies:
        close(other(x), linear(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_another_pattern_can_be_loaded_and_a_damaged_one_not():
    first, second = (bt.BsrLinear.from_linear(sparse_linear(seed=seed), CONFIG) for seed in (0, 1))
    state = second.state_dict()
    first.load_state_dict(state)
    x = torch.randn(4, 13)
    assert torch.equal(first(x), second(x))
    damaged = state | {"col_indices": state["col_indices"] + 100}
    with pytest.raises(RuntimeError, match="no weight of this layer"):
        first.load_state_dict(damaged)
    assert torch.equal(first(x), second(x))
    with torch.no_grad():
        first.col_indices.zero_()
    kernels._kernels.clear()
    with pytest.raises((ArgumentError, PatternError)):
        copy.deepcopy(first)(x)


@pytest.mark.parametrize("change", ["in place", "another parameter", "data", "refreshed", "set_", "bias"])
def test_new_values_are_seen(change):
    layer, x = bt.BsrLinear.from_linear(sparse_linear(), CONFIG), torch.randn(4, 13)
    with torch.no_grad():
        layer(x)
    layer(x)
    with torch.no_grad():
        if change == "in place":
            layer.values.add_(1.0)
        elif change == "another parameter":
            layer.values = nn.Parameter(layer.values * 2)
        elif change == "set_":
            layer.values.set_(layer.values.clone() + 1)
        elif change == "bias":
            layer.bias.add_(1.0)
        else:
            layer.values.data.view(-1)[0] += 1.0  # torch counts no version
    if change == "refreshed":
        layer.refresh()
    with torch.set_grad_enabled(change == "data"):
        close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_new_values_are_seen_by_the_kernels_of_all_types():
    layer, x = bt.BsrLinear.from_linear(sparse_linear(), CONFIG), torch.randn(4, 13)
    layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    layer.values.data.mul_(2)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    half, h = bt.BsrLinear.from_linear(sparse_linear(torch.bfloat16), CONFIG), x.bfloat16()
    before = half(h)
    half.bias.data.add_(10)
    close(half(h).float(), before.float() + 10, torch.bfloat16)
    with torch.inference_mode():
        made = bt.BsrLinear.from_linear(sparse_linear(), CONFIG)
        made(x)
        made.values.mul_(3)
        close(made(x), nn.functional.linear(x, made.weight, made.bias))


def test_a_bias_may_come_and_go():
    layer, x = bt.BsrLinear.from_linear(sparse_linear(bias=False), CONFIG), torch.randn(4, 13)
    before = layer(x)
    layer.bias = nn.Parameter(torch.full((22,), 100.0))
    close(layer(x), before + 100)
    layer.bias = None
    assert torch.equal(layer(x), before)


def test_transforms_and_forward_mode_see_the_dense_product():
    linear, x, t = sparse_linear(), torch.randn(4, 13), torch.randn(4, 13)
    layer = bt.BsrLinear.from_linear(linear, CONFIG)
    for expected, got in zip(torch.func.jvp(linear, (x,), (t,)), torch.func.jvp(layer, (x,), (t,)), strict=True):
        close(got, expected)
    with torch.autograd.forward_ad.dual_level():
        y = layer(torch.autograd.forward_ad.make_dual(x, t))
        close(torch.autograd.forward_ad.unpack_dual(y).tangent, t @ linear.weight.T)
    close(torch.func.jacrev(layer)(x[0]), linear.weight)
    close(torch.func.vmap(layer)(x), linear(x))


def test_to_another_type_runs_its_kernels():
    linear, x = sparse_linear(), torch.randn(4, 13)
    layer = bt.BsrLinear.from_linear(linear, CONFIG).to(torch.bfloat16)
    assert layer.kernel().dtype.name == "bfloat16"
    close(layer(x.bfloat16()).float(), linear(x), torch.bfloat16)
    with pytest.raises(ArgumentTypeError, match="convert x"):
        layer(x)
    with pytest.raises(UnsupportedError, match="cannot become"):
        layer.to(torch.float8_e4m3fn)
    assert layer.values.dtype == torch.bfloat16
    quantised = bt.BsrLinear.from_linear(linear, bt.BsrConfig(BLOCK, dtype="int8", min_speedup=0))
    with pytest.raises(UnsupportedError, match="cannot become"):
        quantised.half()


def test_short_weights_in_a_float32_model():
    linear, x = sparse_linear(), torch.randn(4, 13)
    for dtype, quantize_x in ((torch.bfloat16, False), ("int8", True)):
        layer = bt.BsrLinear.from_linear(linear, bt.BsrConfig(BLOCK, dtype=dtype, quantize_x=quantize_x))
        assert layer.kernel().dtype.name in ("bfloat16", "int8")
        with torch.no_grad():
            y = layer(x)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, linear(x), rtol=0.05, atol=0.05)


def test_autocast_runs_the_kernel_of_its_type():
    linear, x = sparse_linear(), torch.randn(4, 13, requires_grad=True)
    layer = bt.BsrLinear.from_linear(linear, CONFIG)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = layer(x), linear(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    close(y.float(), expected.float(), torch.bfloat16)
    y.float().sum().backward()
    assert layer.values.grad.dtype == x.grad.dtype == torch.float32
    close(x.grad, linear.weight.sum(0).expand(4, 13), torch.bfloat16)


def test_torchs_thread_count_is_honoured(monkeypatch):
    layer, x = bt.BsrLinear.from_linear(sparse_linear(), CONFIG), torch.randn(4, 13)
    asked = []
    run = packed.Instance.run
    monkeypatch.setattr(packed.Instance, "run", lambda self, *a: (asked.append(a[-1]), run(self, *a)))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            layer(x)
    finally:
        torch.set_num_threads(before)
    assert asked == [1, 2]


def test_negated_views_are_read_as_what_they_stand_for():
    """A view that says the negative of its memory: of x, of values and of a bias."""
    layer = bt.BsrLinear.from_linear(sparse_linear(), CONFIG)
    x, dense = torch._neg_view(torch.randn(4, 13)), layer.to_linear()
    assert x.is_neg()
    with torch.no_grad():
        close(layer(x), dense(x.resolve_neg()))
        layer.values, layer.bias = (nn.Parameter(torch._neg_view(t.data)) for t in (layer.values, layer.bias))
        assert layer.bias.is_neg()
        close(layer(x.resolve_neg()), -dense(x.resolve_neg()))
    layer(x).square().sum().backward()
    dense = nn.functional.linear(x.resolve_neg(), layer.weight, layer.bias).square().sum()
    close(layer.values.grad, torch.autograd.grad(dense, layer.values)[0])


def test_errors_name_the_way_out():
    layer = bt.BsrLinear.from_linear(sparse_linear(), CONFIG)
    for x in (torch.randn(4, 12), torch.tensor(1.0)):
        with pytest.raises(ArgumentError, match=r"expected \[\.\.\., 13\]"), torch.no_grad():
            layer(x)
    with pytest.raises(ArgumentTypeError, match="not an nn"):
        bt.BsrLinear.from_linear(nn.Bilinear(2, 2, 2), CONFIG)
    with pytest.raises(ArgumentError, match="meta"):
        bt.BsrLinear.from_linear(nn.Linear(3, 3, device="meta"), CONFIG)
    with pytest.raises(ArgumentTypeError, match="complex64"):
        bt.BsrLinear.from_linear(nn.Linear(3, 3, dtype=torch.complex64), CONFIG)
    pending = sparse_linear()
    pruning.l1_unstructured(pending, "weight", 0.5)
    with pytest.raises(ArgumentError, match=r"prune\.remove"):
        bt.BsrLinear.from_linear(pending, CONFIG)
    normed = torch.nn.utils.parametrizations.weight_norm(sparse_linear())
    with pytest.raises(ArgumentError, match="computed in each call"):
        bt.BsrLinear.from_linear(normed, CONFIG)
    for wrong, error in (
        ({"blocksize": (0, 1)}, ArgumentError), ({"dtype": "int4"}, ArgumentTypeError),
        ({"quantize_x": True}, UnsupportedError), ({"min_speedup": -1}, ArgumentError),
        ({"min_speedup": "2"}, ArgumentTypeError),
    ):  # fmt: skip
        with pytest.raises(error):
            bt.BsrConfig(**{"blocksize": BLOCK} | wrong)
    with pytest.raises(ArgumentError, match="convert the model again"):
        ops.linear(torch.randn(4, 13), layer.values, layer.crow_indices, layer.col_indices, None, "{}")
    with pytest.raises(UnsupportedError, match="CPU tensors"):
        bt.BsrLinear.from_linear(sparse_linear(), bt.BsrConfig(BLOCK, backend="cuda"))(torch.randn(4, 13))


# ── conversion ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_convert_replaces_what_gains():
    sparse, dense = sparse_linear(shape=(64, 64), block=(4, 4)), nn.Linear(64, 64)
    model = nn.Sequential(sparse, nn.GELU(), dense, nn.Sequential(sparse)).eval()
    x, shares = torch.randn(3, 64), []
    expected = model(x)
    with ThreadPoolExecutor(1) as pool:
        done = bt.convert_(model, bt.BsrConfig((4, 4), n=64), executor=pool, progress=shares.append)
    assert [(c.name, c.converted) for c in done] == [("0", True), ("2", False)]
    assert isinstance(model[0], bt.BsrLinear)
    assert model[3][0] is model[0]
    assert model[2] is dense
    assert shares == [1.0]
    assert done[0].layer is model[0]
    assert done[0].speedup > 1 > done[1].speedup
    assert "stays dense" in str(done[1])
    assert not model[0].training
    torch.testing.assert_close(model(x), expected)


def test_convert_takes_what_the_filter_takes():
    model = nn.ModuleDict({"a": sparse_linear(), "b": sparse_linear()})
    done = bt.convert_(model, CONFIG, lambda module, name: name == "b")
    assert [c.name for c in done] == ["b"]
    assert type(model["a"]) is nn.Linear
    tied = nn.ModuleList([sparse_linear(), sparse_linear()])
    tied[1].weight = tied[0].weight
    bt.convert_(tied, CONFIG)
    assert tied[0].values is tied[1].values
    with pytest.raises(ArgumentError, match="from_linear"):
        bt.convert_(sparse_linear(), CONFIG)
    with pytest.raises(ArgumentTypeError, match="BsrConfig"):
        bt.convert_(model, (32, 1))
    with pytest.raises(ArgumentTypeError, match="executor"):
        bt.convert_(model, CONFIG, executor=3)
    assert bt.convert_(nn.Sequential(nn.GELU()), CONFIG) == ()


def test_a_saved_model_loads_into_its_dense_architecture():
    model = nn.Sequential(sparse_linear(), nn.GELU(), nn.Linear(22, 4)).eval()
    calls = []
    model[0].register_forward_hook(lambda *a: calls.append(len(a)))
    done = bt.convert_(model, CONFIG, lambda module, name: name == "0")
    x = torch.randn(3, 13)
    with torch.device("meta"):
        fresh = nn.Sequential(nn.Linear(13, 22), nn.GELU(), nn.Linear(22, 4)).eval()
    bt.load_(fresh, model.state_dict(), CONFIG)
    assert torch.equal(fresh(x), model(x))
    assert calls == [3]  # hooks stay
    assert fresh[0].pattern() == done[0].layer.pattern()
    state = model.state_dict()
    bt.load_(fresh, state, CONFIG)
    with torch.no_grad():
        fresh[0].values.add_(1)
    assert not torch.equal(fresh[0].values, state["0.values"])  # copies
    with pytest.raises(ArgumentTypeError, match="BsrConfig"):
        bt.load_(fresh, {}, None)
    dense = nn.Sequential(nn.Linear(13, 22), nn.GELU(), nn.Linear(22, 4))
    for wrong in ({"0.values": state["0.values"][0]}, {"0.crow_indices": state["0.crow_indices"]}):
        with pytest.raises(ArgumentError, match=r"0\.values"):
            bt.load_(dense, {name: t for name, t in state.items() if name != "0.values"} | wrong, CONFIG)


def test_convert_finds_block_shapes():
    linear = sparse_linear(shape=(64, 64), block=(8, 8))
    model = nn.Sequential(linear)
    bt.convert_(model, bt.BsrConfig(None, min_speedup=0))
    R, C = model[0].values.shape[1:]
    assert (8 % R, 8 % C) == (0, 0)
    assert R * C > 1
    torch.testing.assert_close(model[0].weight, linear.weight)


def test_an_encoder_layer_of_torch_runs_the_sparse_kernels():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    bt.prune_(model, (4, 4), 0.25)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = model(x)
        done = bt.convert_(model, bt.BsrConfig((4, 4), min_speedup=0))
        assert [c.name for c in done] == ["linear1", "linear2"]  # out_proj is a subclass whose weight others read
        with torch.no_grad():
            model.linear1.bias.zero_(), model.linear2.bias.zero_(), model.linear2.values.zero_()
        quiet = model(x)
    assert not torch.allclose(quiet, expected)
    model.linear1 = model.linear1.to_linear()
    model.linear2 = model.linear2.to_linear()
    torch.testing.assert_close(quiet, model(x))


# ── tracing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def model_and_x():
    return nn.Sequential(bt.BsrLinear.from_linear(sparse_linear(), CONFIG), nn.GELU()), torch.randn(4, 13)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_makes_one_graph(backend):
    model, x = model_and_x()
    fast = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
        assert torch.equal(fast(torch.cat([x, x])), model(torch.cat([x, x])))
    model[0].zero_grad()
    model(x).square().sum().backward()
    expected = model[0].values.grad.clone()
    model[0].zero_grad()
    fast(x).square().sum().backward()
    torch.testing.assert_close(model[0].values.grad, expected)
    with torch.no_grad():
        model[0].values.mul_(2)
        assert torch.equal(fast(x), model(x))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(fast(x), model(x))


@pytest.mark.slow
def test_inductor():
    model, x = model_and_x()
    fast = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export_carries_all_that_a_kernel_is_made_of(strict, tmp_path):
    model, x = model_and_x()
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: batch},), strict=strict)
    torch.export.save(program, tmp_path / "model.pt2")
    kernels._kernels.clear()  # as in another process
    packed._known.clear()
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    x = torch.randn(7, 13)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_another_process_loads_an_exported_program(tmp_path):
    model, x = model_and_x()
    torch.export.save(torch.export.export(model.eval(), (x,)), tmp_path / "model.pt2")
    torch.save((x, model(x).detach()), tmp_path / "x.pt")
    script = (
        "import sys, torch, bsrgen.integrations.torch\n"
        "x, y = torch.load(sys.argv[2])\n"
        "print(torch.equal(torch.export.load(sys.argv[1]).module()(x), y))"
    )
    said = run_python(script, str(tmp_path / "model.pt2"), str(tmp_path / "x.pt"), BSRGEN_DISABLE_JIT="1")
    assert said.strip() == "True"


def test_operators_pass_torchs_own_checks():
    layer = bt.BsrLinear.from_linear(sparse_linear(torch.float64), CONFIG)
    at, spec = (layer.crow_indices, layer.col_indices), layer._spec(torch.float64)
    x, dy = (torch.randn(2, 3, size, dtype=torch.float64, requires_grad=True) for size in (13, 22))
    torch.library.opcheck(ops.linear, (x, layer.values, *at, layer.bias, spec))
    torch.library.opcheck(ops.linear, (x.detach(), layer.values.detach(), *at, None, ops._plain(spec)))
    torch.library.opcheck(ops.linear_dx, (dy, layer.values, *at, spec))
    torch.library.opcheck(ops.linear_dw, (dy, x, *at, spec))


def test_modes_see_the_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    layer, x = bt.BsrLinear.from_linear(sparse_linear(), CONFIG), torch.randn(4, 13)
    with torch.no_grad(), Watch():
        layer(x)
    assert "bsrgen.linear.default" in seen


# ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_gradients_match_finite_differences():
    layer = bt.BsrLinear.from_linear(sparse_linear(torch.float64), CONFIG)
    x = torch.randn(2, 13, dtype=torch.float64, requires_grad=True)
    given = (x, layer.values.detach().clone().requires_grad_(), layer.bias.detach().clone().requires_grad_())

    def call(x, values, bias):
        return torch.func.functional_call(layer, {"values": values, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(call, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, v, b: call(x, v.clone(), b), given, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_dense_layer(dtype):
    atol = 0.2 if dtype.itemsize < 4 else 1e-5
    linear = sparse_linear(dtype)
    layer, x = bt.BsrLinear.from_linear(linear, CONFIG), torch.randn(2, 3, 13).to(dtype)
    pairs = []
    for module in (linear, layer):
        given = x.clone().requires_grad_()
        module(given).square().sum().backward()
        pairs.append((given.grad, module.bias.grad))
    for dense, sparse in zip(*pairs, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=0.02, atol=atol)
    p = layer.pattern()
    padded = nn.functional.pad(linear.weight.grad, (0, p.block_cols * 3 - 13, 0, p.block_rows * 3 - 22))
    blocks = padded.reshape(p.block_rows, 3, p.block_cols, 3).transpose(1, 2)[p.rows, p.indices.copy()]
    torch.testing.assert_close(layer.values.grad, blocks, rtol=0.02, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_values_by_a_dense_product(dtype):
    """What CUDA tensors get where the model expects more of that; it needs no GPU."""
    layer = bt.BsrLinear.from_linear(sparse_linear(dtype), CONFIG)
    x, dy = (torch.randn(2, 3, size).to(dtype) for size in (13, 22))
    at = layer.crow_indices, layer.col_indices, layer._spec(dtype)
    dense = ops.dense_dw(ops._rows(dy), ops._rows(x), *at[:2], parsed(at[2]))
    torch.testing.assert_close(dense, ops._dw_cpu(dy, x, *at), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_fine_tuning_lowers_the_loss(optimizer):
    torch.manual_seed(0)
    layer = bt.BsrLinear.from_linear(sparse_linear(), CONFIG)
    x, goal, before = torch.randn(32, 13), torch.randn(32, 22), layer.pattern()
    optimiser, losses = optimizer(layer.parameters(), lr=0.05), []
    for _ in range(20):
        optimiser.zero_grad()
        loss = nn.functional.mse_loss(layer(x), goal)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert layer.pattern() == before
    assert torch.equal(layer.to_linear()(x) != 0, layer(x) != 0)


def test_an_empty_pattern_trains():
    linear = nn.Linear(6, 6)
    nn.init.zeros_(linear.weight)
    layer, x = bt.BsrLinear.from_linear(linear, CONFIG), torch.randn(4, 6, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros(4, 6))
    assert layer.values.grad.shape == (0, 3, 3)
    assert torch.equal(layer.bias.grad, torch.full((6,), 4.0))


def test_what_was_packed_goes_with_its_tensor():
    before = len(packed._known), len(kernels._seen)
    layer = bt.BsrLinear.from_linear(sparse_linear(), CONFIG)
    layer(torch.randn(4, 13)).sum().backward()
    assert len(packed._known) > before[0]
    del layer
    assert (len(packed._known), len(kernels._seen)) == before


# ── pruning of models ────────────────────────────────────────────────────────────────────────────────────────────────


def test_prune_zeroes_blocks_in_place():
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8))
    densities = bt.prune_(model, {"0": (4, 1), "2": (2, 2)}, 0.25, balanced=True)
    assert densities == {"0": 0.25, "2": 0.25}
    assert int((model[0].weight.reshape(2, 4, 12).abs().sum(1) > 0).sum()) == 6
    done = bt.convert_(model, bt.BsrConfig((4, 1), min_speedup=0))
    assert done[0].density == 0.25
    with pytest.raises(ArgumentError, match="no block shape"):
        bt.prune_(nn.Sequential(nn.Linear(4, 4)), {}, 0.5)


def test_shapes_are_searched_layer_by_layer():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    found = bt.search(model, density=0.25, shapes=[(1, 1), (8, 8)], config=bt.BsrConfig(None, n=64))
    bt.prune_(model, {name: one.pick.blocksize for name, one in found.items()}, 0.25)
    for name, one in found.items():
        assert np.array_equal(prune_norms(model[int(name)], one.pick.blocksize) > 0, one.pick.kept)


def test_gradual_pruning_follows_its_schedule_and_goes_on_where_it_stopped():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    pruner = bt.Pruner(model, (4, 4), density=0.25, begin=2, end=10, every=4, scope="global")
    optimiser, x = torch.optim.Adam(model.parameters(), 0.01), torch.randn(32, 16)
    stored = []
    for _ in range(12):
        optimiser.zero_grad()
        (model(x) - x).square().mean().backward()
        optimiser.step()
        pruner.step()
        stored.append(sum(int(prune_norms(layer).astype(bool).sum()) for layer in (model[0], model[2])))
    assert stored[:2] == [32, 32]
    assert stored[10] == stored[11] == 8
    assert sorted(stored, reverse=True) == stored
    again = bt.Pruner(model, (4, 4), density=0.25, begin=2, end=10, every=4, scope="global")
    again.load_state_dict(pruner.state_dict())
    with torch.no_grad():
        model[0].weight.add_(1)
    again.apply()
    assert int(prune_norms(model[0]).astype(bool).sum()) < 16
    with pytest.raises(ArgumentError, match="no such layer"):
        again.load_state_dict({"step": 1, "masks": {"x": torch.ones(1)}})


def prune_norms(layer, block=(4, 4)):
    return block_norms(layer.weight, block)


def test_group_lasso_has_a_gradient_everywhere():
    model = nn.Sequential(nn.Linear(5, 4))
    with torch.no_grad():
        model[0].weight[:2] = 0
    penalty = bt.group_lasso(model, (2, 2))
    blocks = nn.functional.pad(model[0].weight, (0, 1)).reshape(2, 2, 3, 2)
    close(penalty, 2 * blocks.square().sum((1, 3)).sqrt().sum())
    penalty.backward()
    assert torch.isfinite(model[0].weight.grad).all()
    assert np.isclose(model[0].weight.grad[:2].abs().sum(), 0)
