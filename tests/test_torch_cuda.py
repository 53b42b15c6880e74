"""BsrLinear on CUDA tensors without a GPU: tensors of the CPU that say they are on one, kernels under tests/cuda."""

import types

import pytest
from device_emulation import build_emulated

torch = pytest.importorskip("torch", reason="torch is not installed")
import bsrgen.integrations.torch as bt  # noqa: E402
from bsrgen import device_arrays, nvcc  # noqa: E402
from bsrgen.integrations.torch import kernels, ops  # noqa: E402
from bsrgen.pattern_device import PatternDeviceKernel  # noqa: E402


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return str(tmp_path_factory.mktemp("store"))


@pytest.fixture
def on_gpu(monkeypatch, store):
    """The operators' CUDA side for tensors of the CPU, whose memory is what the emulation can reach; builds are
    emulated, into a store of their own."""
    plain = device_arrays._of_torch

    def array(what, value):
        return plain(what, value) if isinstance(value, torch.Tensor) else device_arrays_of(what, value)

    device_arrays_of = device_arrays.device_array
    for module in ("device", "pattern_device"):
        monkeypatch.setattr(f"bsrgen.{module}.device_array", array, raising=False)
    stream = types.SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr("bsrgen.build.build", build_emulated)
    monkeypatch.setattr(nvcc, "identity", lambda: "emulated")
    monkeypatch.setattr(kernels, "_kernels", {})
    monkeypatch.setattr(kernels, "_resident", {})
    monkeypatch.setenv("BSRGEN_CACHE_DIR", store)
    library = torch.library.Library("bsrgen", "IMPL")
    for name in ("linear", "linear_dx", "linear_dw"):
        library.impl(name, getattr(ops, f"_{name.replace('linear_', '')}_cuda"), "CPU", allow_override=True)
    yield
    library._destroy()


def layer_of(dtype, block):
    torch.manual_seed(0)
    linear = torch.nn.Linear(40, 48)
    bt.prune_(torch.nn.Sequential(linear), block, density=0.4)
    return bt.BsrLinear.from_linear(linear, bt.BsrConfig(block, backend="cuda", min_speedup=0, tune="off")).to(dtype)


@pytest.mark.parametrize(("dtype", "block"), [(torch.float32, (4, 4)), (torch.bfloat16, (16, 8))], ids=["f32", "bf16"])
def test_gradients(dtype, block, on_gpu, monkeypatch):
    """Of x by the transposed plan, of values by the sampled product, of the bias; new values go to the device."""
    layer = layer_of(dtype, block)
    x = torch.randn(2, 5, 40, dtype=dtype, requires_grad=True)
    monkeypatch.setattr("bsrgen.manifest.CostRecord.speedup", 2.0)  # the kernel, and not torch's dense product
    for step in range(2):
        y = layer(x)
        (y.float() ** 2).sum().backward()
        W, b = layer.weight.detach().double(), layer.bias.detach().double()
        expected = x.detach().double() @ W.T + b
        dy = (2 * expected).to(dtype).double()
        near = {"rtol": 2e-2, "atol": 0.3} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(y.double(), expected, **near)
        torch.testing.assert_close(x.grad.double(), dy @ W, **near)
        torch.testing.assert_close(layer.bias.grad.double(), dy.sum((0, 1)), **near)
        dense = torch.einsum("abm,abk->mk", dy, x.detach().double())
        kept = ops.dense_dw(dy.reshape(-1, 48), x.detach().double().reshape(-1, 40), layer.crow_indices,
                            layer.col_indices, ops.parsed(layer._spec(torch.float64)))  # fmt: skip
        assert dense.shape == (48, 40)
        torch.testing.assert_close(layer.values.grad.double(), kept, **near)
        if not step:
            with torch.no_grad():
                layer.values.mul_(-0.5)
            x.grad = layer.values.grad = layer.bias.grad = None
    made = [kernel for (_, role, device), kernel in kernels._kernels.items() if role == "dw"]
    assert [type(kernel) for kernel in made] == [PatternDeviceKernel]


def test_negated_views_and_opcheck(on_gpu, monkeypatch):
    """What torch says of the operators, as far as it can without a device; views that stand for other numbers."""
    layer = layer_of(torch.float32, (4, 4))
    monkeypatch.setattr("bsrgen.manifest.CostRecord.speedup", 2.0)
    at, spec = (layer.crow_indices, layer.col_indices), layer._spec(torch.float32)
    x, dy = torch._neg_view(torch.randn(3, 40)), torch._neg_view(torch.randn(3, 48))
    got = ops._dw_cuda(dy, x, *at, spec)
    torch.testing.assert_close(got, ops._dw_cuda(dy.resolve_neg(), x.resolve_neg(), *at, spec))
    y = ops._linear_cuda(x, layer.values, *at, layer.bias, spec)
    torch.testing.assert_close(y, ops._linear_cuda(x.resolve_neg(), layer.values, *at, layer.bias, spec))
    x, dy = torch.randn(3, 40, requires_grad=True), torch.randn(3, 48, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.linear, (x, layer.values, *at, layer.bias, spec), test_utils=tests)
    torch.library.opcheck(ops.linear_dw, (dy, x, *at, spec), test_utils=tests)
