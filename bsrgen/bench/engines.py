"""Peers that build something before they compute: GiMMiK's generated C, ONNX Runtime, OpenVINO.

Only what `peers` times.  Each function returns the call; shapes and types are baked in, which suits these libraries.
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cffi
import numpy as np
from numpy.typing import NDArray

from bsrgen.build import find_compiler
from bsrgen.errors import BsrgenError
from bsrgen.targets import native

Array = NDArray[Any]
Call = Callable[[], object]
GIMMIK_NNZ = 8192  # most: every nonzero is a line of C, and gcc 12 needs about 10 s for so many
GIMMIK_FLAGS = (  # -Ofast without what it does to the process: its start-up code flushes denormals in every thread
    *("-O3", "-std=c99", "-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-shared", "-fPIC"),  # -fassociative-math and no SLP are slower or equal (gcc 12.2, hex3 and hex6 M0)
)
GIMMIK_LIMIT_S = 120
CTYPE = {"float32": "float", "float64": "double"}


def gimmik_spmm(W: Array, X: Array, Y: Array) -> Call:
    """Y[M,N] = W[M,K] @ X[K,N], row-major, as straight-line code for this W and N (Wozniak et al., CPC 202, 2016)."""
    from gimmik.c import CMatMul

    n = X.shape[1]
    source, _ = next(CMatMul(W, n=n, ldb=n, ldc=n).kernels(W.dtype.type, kname="product"))
    ffi = cffi.FFI()
    real = CTYPE[W.dtype.name]
    ffi.cdef(f"void product(const {real} *, {real} *);")
    with tempfile.TemporaryDirectory(prefix="bsrgen-gimmik-") as folder:
        (text := Path(folder, "product.c")).write_text(source)
        target = native()
        command = [find_compiler(target).path, *GIMMIK_FLAGS, *target.flags, str(text), "-o", str(text)[:-1] + "so"]
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=GIMMIK_LIMIT_S, check=False
        )
        if done.returncode:
            raise BsrgenError(f"GiMMiK's C does not compile: {done.stderr[:300]}")
        library = ffi.dlopen(command[-1])
    x, y = ffi.from_buffer(f"{real}[]", X), ffi.from_buffer(f"{real}[]", Y)

    def call(keep: object = library) -> None:  # dlclose comes with the last reference
        library.product(x, y)

    return call


def onnxruntime_linear(W: Array, x: Array, y: Array, threads: int) -> Call:
    """y = x @ W.T as a MatMul whose weight is an initializer, which ONNX Runtime packs; arrays bound, not copied."""
    from onnx import helper

    return _session(helper.make_node("MatMul", ["x", "w"], ["y"]), {"w": np.ascontiguousarray(W.T)}, x, y, threads)


def onnxruntime_int8(W: Array, w_scale: Array, x_scale: float, x: Array, y: Array, threads: int) -> Call:
    """y (float32) = x_scale * (x - 128) @ (w_scale * W).T, x of uint8 and W of int8, packed, as one node."""
    from onnx import helper

    names = ["x", "w", "x_scale", "w_scale", "x_zero"]
    node = helper.make_node("MatMulIntegerToFloat", names, ["y"], domain="com.microsoft")
    kept = {"w": np.ascontiguousarray(W.T), "x_scale": np.array(x_scale, np.float32), "w_scale": np.asarray(w_scale)}
    return _session(node, kept | {"x_zero": np.array(128, np.uint8)}, x, y, threads)


def _session(node: Any, kept: dict[str, Array], x: Array, y: Array, threads: int) -> Call:
    """A graph of one node on x and y, all else initializers."""
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    types = ((name, a, helper.np_dtype_to_tensor_dtype(a.dtype)) for name, a in (("x", x), ("y", y)))
    ends = [helper.make_tensor_value_info(name, kind, a.shape) for name, a, kind in types]
    weights = [numpy_helper.from_array(a, name) for name, a in kept.items()]
    graph = helper.make_graph([node], "linear", ends[:1], ends[1:], weights)
    domains = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=domains, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    bound = session.io_binding()
    bound.bind_input("x", "cpu", 0, x.dtype.type, x.shape, x.ctypes.data)
    bound.bind_output("y", "cpu", 0, y.dtype.type, y.shape, y.ctypes.data)
    return functools.partial(session.run_with_iobinding, bound)


OPENVINO = {"float32": ("f32", "f32"), "bfloat16": ("bf16", "bf16"), "float16": ("f16", "f32")}  # type, and inside


def openvino_linear(W: Array, x: Array, y: Array, threads: int) -> Call:
    """y = x @ W.T as a MatMul with a constant weight; inside in the type of x, and not in what OpenVINO would choose
    (for float16 bfloat16, where the CPU has that and not the other)."""
    import openvino
    from openvino import opset13

    kind, inside = OPENVINO[x.dtype.name]
    element = getattr(openvino.Type, kind)
    tensors = [
        openvino.Tensor(a.view(np.uint8) if a.dtype.name == "bfloat16" else a, a.shape, element) for a in (x, y, W)
    ]
    given = opset13.parameter(x.shape, element)
    product = opset13.matmul(given, opset13.constant(tensors[2]), False, True)
    how = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    how["INFERENCE_PRECISION_HINT"] = inside
    model = openvino.Core().compile_model(openvino.Model([product], [given], "linear"), "CPU", how)
    request = model.create_infer_request()
    request.set_input_tensor(tensors[0])
    request.set_output_tensor(tensors[1])

    def call(keep: object = (x, y, W)) -> None:
        request.infer()

    return call
