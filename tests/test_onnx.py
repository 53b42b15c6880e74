"""ONNX: weights of a file, layers rewritten into operators, and ONNX Runtime's results before and after."""

import subprocess

import numpy as np
import pytest
from click.testing import CliRunner
from support import run_python

import bsrgen
from bsrgen.__main__ import main
from bsrgen.errors import ArgumentError, ArtifactError, PatternError, UnsupportedError
from bsrgen.files import matrix_names, read_matrix, read_vector, read_weight
from bsrgen.prune import magnitude, masked
from bsrgen.sparsity import Fuse, Layer, Sparsity, _Table

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'bsrgen[onnx]'")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'bsrgen[onnx]'")
bo = pytest.importorskip("bsrgen.integrations.onnx")
helper, numpy_helper = onnx.helper, onnx.numpy_helper

WIDTH, INNER = 24, 40


def node(op, inputs, output, **attributes):
    return helper.make_node(op, inputs, [output], name=f"/{output}/{op}", **attributes)


def sparse(rng, M, K, density=0.3):
    """W [M, K] in blocks of 4x1."""
    W = rng.standard_normal((M, K), np.float32)
    return masked(W, (4, 1), magnitude(W, (4, 1), density))


def model_of(nodes, constants, inputs, outputs, opset=20):
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in (*inputs, *outputs)]
    graph = helper.make_graph(
        nodes, "test", values[: len(inputs)], values[len(inputs) :],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def mlp(rng):
    """Gemm with both orders of W, and a MatMul without bias whose weight comes through a Transpose."""
    constants = {
        "up.weight": sparse(rng, INNER, WIDTH), "up.bias": rng.standard_normal(INNER, np.float32),
        "onnx::Gemm_7": sparse(rng, WIDTH, INNER).T, "down.bias": rng.standard_normal((1, WIDTH), np.float32),
        "last.weight": sparse(rng, INNER, WIDTH),
    }  # fmt: skip
    nodes = [
        node("Gemm", ["x", "up.weight", "up.bias"], "up", transB=1),
        node("Relu", ["up"], "relu"),
        node("Gemm", ["relu", "onnx::Gemm_7", "down.bias"], "down"),
        node("Sigmoid", ["down"], "gate"),
        node("Mul", ["gate", "down"], "silu"),
        node("Transpose", ["last.weight"], "turned", perm=[1, 0]),
        node("MatMul", ["silu", "turned"], "y"),
    ]
    return model_of(nodes, constants, [("x", ["n", WIDTH])], [("y", ["n", INNER])])


def encoder(rng):
    """Self-attention with Q, K and V of one x, residuals, norms, and a feed-forward part whose GELU is written out."""
    constants, nodes = {}, []
    for name, (M, K) in {
        "q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "out": (WIDTH, WIDTH), "up": (INNER, WIDTH),
        "down": (WIDTH, INNER),
    }.items():  # fmt: skip
        constants[f"onnx::MatMul_{len(constants)}"] = sparse(rng, M, K).T
        constants[f"layer.{name}.bias"] = rng.standard_normal(M, np.float32)
        x = {"out": "context", "up": "norm1", "down": "gelu"}.get(name, "x")
        nodes.append(node("MatMul", [x, [*constants][-2]], f"{name}_product"))
        nodes.append(node("Add", [f"layer.{name}.bias", f"{name}_product"], name))
    q, k, v, out, up, down = (nodes[i : i + 2] for i in range(0, 12, 2))
    constants |= {
        "root": np.float32(np.sqrt(2)), "one": np.float32(1), "half": np.float32(0.5),
        "scale": np.float32(WIDTH**-0.5), "ones": np.ones(WIDTH, np.float32), "zeros": np.zeros(WIDTH, np.float32),
    }  # fmt: skip
    attention = [
        node("Transpose", ["k"], "turned", perm=[0, 2, 1]), node("MatMul", ["q", "turned"], "raw"),
        node("Mul", ["raw", "scale"], "scores"), node("Softmax", ["scores"], "shares", axis=-1),
        node("MatMul", ["shares", "v"], "context"),
    ]  # fmt: skip
    residual = [node("Add", ["out", "x"], "sum1"), node("LayerNormalization", ["sum1", "ones", "zeros"], "norm1")]
    gelu = [
        node("Div", ["up", "root"], "scaled"), node("Erf", ["scaled"], "erf"), node("Add", ["erf", "one"], "shifted"),
        node("Mul", ["up", "shifted"], "twice"), node("Mul", ["twice", "half"], "gelu"),
    ]  # fmt: skip
    last = [node("Add", ["norm1", "down"], "sum2"), node("LayerNormalization", ["sum2", "ones", "zeros"], "y")]
    shape = ["batch", "tokens", WIDTH]
    nodes = [*q, *k, *v, *attention, *out, *residual, *up, *gelu, *down, *last]
    return model_of(nodes, constants, [("x", shape)], [("y", shape)])


ALL = Sparsity(default=_Table(blocksize="4x1", n=8), layer=(Layer(match="*"),))
QKV = Sparsity(
    default=_Table(blocksize="4x1", n=8),
    fuse=(Fuse(match=tuple(f"layer.{c}.weight" for c in "qkv"), name="layer.qkv"),),
    layer=(Layer(match="layer.*"),),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("onnx"), np.random.default_rng(5)
    for name, model in (("mlp", mlp(rng)), ("encoder", encoder(rng))):
        onnx.save_model(model, folder / f"{name}.onnx")
    return folder


@pytest.fixture(scope="module")
def converted(files):
    """Both folders; the MLP's by the command."""
    (files / "all.toml").write_text('[default]\nblocksize = "4x1"\nn = 8\n[[layer]]\nmatch = "*"\n')
    command = ["compile", str(files / "mlp.onnx"), "--config", str(files / "all.toml"), "-o", str(files / "mlp")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    bo.convert(files / "encoder.onnx", QKV, files / "encoder")
    return files


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def dense(path):
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_weights_by_the_names_they_had(files):
    assert matrix_names(files / "mlp.onnx") == ["down.weight", "last.weight", "up.weight"]
    assert matrix_names(files / "encoder.onnx") == [f"layer.{c}.weight" for c in ("down", "k", "out", "q", "up", "v")]
    graph = onnx.load(files / "mlp.onnx").graph
    named = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    np.testing.assert_array_equal(read_matrix(files / "mlp.onnx", "down.weight"), named["onnx::Gemm_7"].T)
    np.testing.assert_array_equal(read_vector(files / "mlp.onnx", "down.bias"), named["down.bias"][0])
    assert read_vector(files / "mlp.onnx", "last.bias") is None
    weight = read_weight(files / "mlp.onnx", key="up.weight", blocksize=(4, 1))
    np.testing.assert_array_equal(weight.todense(), named["up.weight"])
    with pytest.raises(ArgumentError, match="choose one with key="):
        read_weight(files / "mlp.onnx", blocksize=(4, 1))


def test_what_is_rewritten(converted):
    assert operators(converted / "mlp" / "model.onnx") == ["Linear_float32"] * 3
    left = operators(converted / "encoder" / "model.onnx")
    assert {op: left.count(op) for op in ("Linear_float32", "MatMul", "Erf", "Add", "Split")} == {
        "Linear_float32": 4, "MatMul": 2, "Erf": 0, "Add": 0, "Split": 1,
    }  # fmt: skip
    steps = {name: k.problem.epilogue for name, k in bsrgen.load_model(converted / "encoder").items()}
    names = {name: [step.name for step in epilogue] for name, epilogue in steps.items()}
    assert names == {
        "layer.qkv": ["bias"], "layer.out": ["bias", "residual"], "layer.up": ["bias", "gelu"],
        "layer.down": ["bias", "residual"],
    }  # fmt: skip
    assert [step.name for step in bsrgen.load_model(converted / "mlp")["down"].problem.epilogue] == ["bias", "silu"]
    initialisers = {tensor.name for tensor in onnx.load(converted / "encoder" / "model.onnx").graph.initializer}
    assert not any(name.startswith("onnx::MatMul") for name in initialisers)  # dense weights are gone


@pytest.mark.parametrize(
    ("name", "shapes"),
    [("mlp", [(1, WIDTH), (13, WIDTH), (0, WIDTH)]), ("encoder", [(1, 1, WIDTH), (3, 7, WIDTH)])],
)
def test_onnxruntime_gives_the_same(converted, name, shapes, rng):
    before, after = dense(converted / f"{name}.onnx"), bo.session(converted / name)
    for shape in shapes:
        x = rng.standard_normal(shape, np.float32)
        (expected,), (y,) = before.run(None, {"x": x}), after.run(None, {"x": x})
        np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5)


def test_without_bsrgen(converted):
    """The folder needs ONNX Runtime alone, from any working directory, also moved."""
    script = """
import sys, numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(sys.argv[1] + "/libbsrgen_onnx.so")
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", options)
print(session.run(None, {"x": np.ones((5, 24), np.float32)})[0].shape, "bsrgen" in sys.modules)
"""
    moved = converted / "moved"
    subprocess.run(["cp", "-r", converted / "mlp", moved], check=True)
    assert run_python(script, str(moved)).split("\n")[0] == "(5, 40) False"


def test_threads_of_the_session(tmp_path, rng):
    """Large enough for two threads: equal bits for one and for two of them."""
    W = sparse(rng, 512, 256, 0.2)
    model = model_of([node("MatMul", ["x", "w"], "y")], {"w": W.T}, [("x", ["n", 256])], [("y", ["n", 512])])
    onnx.save_model(model, tmp_path / "m.onnx")
    bo.convert(tmp_path / "m.onnx", ALL, tmp_path / "m")
    x = rng.standard_normal((500, 256), np.float32)
    results = []
    for threads in (1, 2):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        results.append(bo.session(tmp_path / "m", options).run(None, {"x": x})[0])
    np.testing.assert_array_equal(*results)
    np.testing.assert_allclose(results[0], x @ W.T, rtol=1e-4, atol=1e-4)


def test_values_that_others_read_stay(tmp_path, rng):
    """An activation whose input is a result of the graph is not fused, nor is a residual of an unknown shape."""
    constants = {"w": sparse(rng, WIDTH, WIDTH).T, "b": rng.standard_normal(WIDTH, np.float32)}
    nodes = [node("MatMul", ["x", "w"], "p"), node("Add", ["p", "b"], "z"), node("Relu", ["z"], "y"),
             node("MatMul", ["y", "w"], "q"), node("Add", ["q", "r"], "end")]  # fmt: skip
    n = ["n", WIDTH]
    model = model_of(nodes, constants, [("x", n), ("r", ["m", WIDTH])], [("z", n), ("y", n), ("end", n)])
    onnx.save_model(model, tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match="comes with b and with None"):
        bo.convert(tmp_path / "m.onnx", ALL, tmp_path / "m")
    del constants["b"]
    nodes[1] = node("Identity", ["p"], "z")
    onnx.save_model(
        model_of(nodes, constants, [("x", n), ("r", ["m", WIDTH])], [("z", n), ("y", n), ("end", n)]),
        tmp_path / "m.onnx",
    )
    bo.convert(tmp_path / "m.onnx", ALL, tmp_path / "m")
    assert operators(tmp_path / "m" / "model.onnx") == ["Linear_float32", "Identity", "Relu", "Linear_float32", "Add"]
    x, r = (rng.standard_normal((5, WIDTH), np.float32) for _ in range(2))
    given = {"x": x, "r": r}
    results = (session.run(None, given) for session in (bo.session(tmp_path / "m"), dense(tmp_path / "m.onnx")))
    for y, expected in zip(*results, strict=True):
        np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5)


def test_what_is_refused(files, converted, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(PatternError, match=r"bad\.onnx: damaged or not a \.onnx file"):
        matrix_names(tmp_path / "bad.onnx")
    with pytest.raises(ArgumentError, match="No such file"):
        matrix_names(tmp_path / "none.onnx")
    for table, error, words in (
        (Layer(match="up.*", epilogue=("relu",)), UnsupportedError, "the graph says bias and epilogue"),
        (Layer(match="up.*", blocksize="4x1", x_dtype="bfloat16"), ArgumentError, "the graph computes in float32"),
        (Layer(match="none.*"), ArgumentError, "no tensor is left"),
    ):
        with pytest.raises(error, match=words):
            bo.convert(files / "mlp.onnx", Sparsity(layer=(table,)), tmp_path / "m")
    both = Fuse(match=("up.weight", "last.weight"), name="both", blocksize="4x1")
    with pytest.raises(ArgumentError, match="one and the same x"):
        bo.convert(files / "mlp.onnx", Sparsity(fuse=(both,)), tmp_path / "m")
    with pytest.raises(ArtifactError, match=r"no model\.onnx"):
        bo.session(files)
    with pytest.raises(ArgumentError, match=r"rewrites \.onnx files"):
        bo.convert(files / "all.toml", ALL, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_hostile_nodes(converted, tmp_path, rng):
    """A node may only name kernels below the library's folder, and its inputs are checked at each call."""
    folder = tmp_path / "mlp"
    subprocess.run(["cp", "-r", converted / "mlp", folder], check=True)
    good = onnx.load(folder / "model.onnx")

    def broken(**attributes):
        model = onnx.ModelProto()
        model.CopyFrom(good)
        for attribute in model.graph.node[0].attribute:
            if attribute.name in attributes:
                attribute.CopyFrom(helper.make_attribute(attribute.name, attributes[attribute.name]))
        onnx.save_model(model, folder / "model.onnx")
        return bo.session(folder)

    for attributes, words in (
        ({"library": "/lib/x86_64-linux-gnu/libc.so.6"}, "not a path below"),
        ({"library": "../../x.so"}, "not a path below"),
        ({"library": "kernels/none.so"}, "cannot be loaded"),
        ({"symbol": "other"}, "no such kernel"),
    ):
        with pytest.raises(Exception, match=words):
            broken(**attributes)
    x = {"x": rng.standard_normal((2, WIDTH), np.float32)}
    for attributes, words in (({"features": 7}, "number of features"), ({"operands": ""}, "number of inputs")):
        with pytest.raises(Exception, match=words):
            broken(**attributes).run(None, x)


def test_exported_by_torch(tmp_path):
    """Names come from the biases, GELU and SiLU from what the exporter writes."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx.export needs, is not installed")

    class Feed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)

        def forward(self, x):
            return x + self.down(torch.nn.functional.gelu(self.up(x)))

    feed, x = Feed().eval(), torch.randn(2, 5, 16)
    batch = {0: torch.export.Dim("batch")}
    names = {"input_names": ["x"], "dynamic_shapes": (batch,)}
    torch.onnx.export(feed, (x,), tmp_path / "m.onnx", dynamo=True, verbose=False, **names)
    model = bo.convert(tmp_path / "m.onnx", ALL, tmp_path / "m")
    steps = {name: [step.name for step in model[name].problem.epilogue] for name in model}
    assert steps == {"up": ["bias", "gelu"], "down": ["bias", "residual"]}
    with torch.inference_mode():
        expected = feed(x).numpy()
    (y,) = bo.session(tmp_path / "m").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
