"""The linear layers of an ONNX file: products with a constant weight, by the names that their weights had."""

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.errors import UnsupportedError

Array = NDArray[Any]
_NUMBERED = re.compile(r"\A(onnx::\w+_\d+|(val|node|t|_)_?\d+|\d+)\Z")  # names that exporters make up
_FLOATS = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}  # TensorProto.DataType


@dataclass(frozen=True, slots=True)
class Product:
    """One linear layer: y = x @ W.T (+ bias).

    name: of W, as in a checkpoint where that can be told.  node: its place among the graph's nodes.  tensor: the
    constant that holds W [M, K] where by_rows, else W.T.  bias: of the node itself or of the Add behind it, by its
    name in the graph, or None.  end: the place of the last node.  y: what that gives.
    """

    name: str
    node: int
    x: str
    tensor: str
    by_rows: bool
    bias: str | None
    end: int
    y: str


@dataclass(frozen=True, slots=True)
class Graph:
    """An ONNX graph with who makes and who reads each value.  readers: of a value that leaves the graph there is one
    more, -1; so there is for values that subgraphs read."""

    model: Any
    constants: Mapping[str, Any]  # TensorProto
    makers: Mapping[str, int]
    readers: Mapping[str, tuple[int, ...]]
    products: tuple[Product, ...]

    @property
    def nodes(self) -> Any:
        return self.model.graph.node

    def array(self, name: str) -> Array:
        """A constant's value; bfloat16 as ml_dtypes has it."""
        from onnx import numpy_helper

        return np.asarray(numpy_helper.to_array(self.constants[name]))

    def weight(self, product: Product) -> Array:
        """W [M, K]."""
        W = self.array(product.tensor)
        return W if product.by_rows else np.ascontiguousarray(W.T)

    def only_reader(self, value: str) -> int | None:
        """The node that alone reads a value, or None."""
        return readers[0] if len(readers := self.readers.get(value, ())) == 1 and readers[0] >= 0 else None

    def named(self) -> dict[str, Product]:
        """The first product of each name."""
        return {product.name: product for product in reversed(self.products)}


def read_graph(path: Path) -> Graph:
    """The graph of an ONNX file, with external data.  UnsupportedError where onnx is not installed."""
    path.stat()  # OSError as the system says it
    try:
        import onnx
    except ImportError as e:
        raise UnsupportedError("ONNX files need the package onnx: pip install 'bsrgen[onnx]'") from e
    return graph_of(onnx.load(path))


def dtype_name(data_type: int) -> str | None:
    """The name that a type of ONNX has here; None for what no product has."""
    return _FLOATS.get(data_type)


@functools.lru_cache(maxsize=1)
def _kept(path: Path, changed_ns: int, size: int) -> Graph:
    return read_graph(path)


def known_graph(path: Path) -> Graph:
    """read_graph, remembered for the file that was read last: its tensors are asked for one by one."""
    state = path.stat()
    return _kept(path.absolute(), state.st_mtime_ns, state.st_size)


def graph_of(model: Any) -> Graph:
    """The products of a model and what surrounds them."""
    nodes = model.graph.node
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in nodes:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    makers = {value: i for i, node in enumerate(nodes) for value in node.output if value}
    readers: dict[str, list[int]] = {}
    for i, node in enumerate(nodes):
        for value in node.input:
            readers.setdefault(value, []).append(i)
        for value in _captured(node):
            readers.setdefault(value, []).append(-1)
    for value in model.graph.output:
        readers.setdefault(value.name, []).append(-1)
    graph = Graph(model, constants, makers, {name: tuple(who) for name, who in readers.items()}, ())
    found = [product for i in range(len(nodes)) if (product := _product(graph, i)) is not None]
    return Graph(model, constants, makers, graph.readers, tuple(_renamed(found)))


def _captured(node: Any) -> Iterable[str]:
    """What the subgraphs of a node may read from outside."""
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            for one in inner.node:
                yield from one.input
                yield from _captured(one)
            yield from (value.name for value in inner.output)


def _product(graph: Graph, i: int) -> Product | None:
    """The linear layer that begins at node i, if one does."""
    node = graph.nodes[i]
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Gemm"):
        return None
    flags = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    flags |= {a.name: a.f if a.name in ("alpha", "beta") else a.i for a in node.attribute}
    tensor, by_rows = _constant(graph, node.input[1], bool(flags["transB"]))
    if tensor is None or (flags["alpha"], flags["transA"]) != (1.0, 0):
        return None
    own = node.input[2] if len(node.input) > 2 and node.input[2] else None
    M = graph.constants[tensor].dims[0 if by_rows else 1]
    if own and (flags["beta"] != 1.0 or not _is_row(graph, own, M)):
        return None
    end, bias = (i, own) if own else _added(graph, i, M)
    name = _name(graph, node, tensor, bias)
    return Product(name, i, node.input[0], tensor, by_rows, bias, end, graph.nodes[end].output[0])


def _constant(graph: Graph, value: str, by_rows: bool) -> tuple[str | None, bool]:
    """The constant matrix of floats that `value` is, through Identity and Transpose, and whether it holds W."""
    while value not in graph.constants:
        node = graph.nodes[graph.makers[value]] if value in graph.makers else None
        if node is None or node.op_type not in ("Identity", "Transpose"):
            return None, by_rows
        if node.op_type == "Transpose":
            by_rows ^= next((list(a.ints) for a in node.attribute if a.name == "perm"), [1, 0]) == [1, 0]
        value = node.input[0]
    tensor = graph.constants[value]
    return (value if len(tensor.dims) == 2 and dtype_name(tensor.data_type) else None), by_rows


def _is_row(graph: Graph, value: str, M: int) -> bool:
    """Whether a constant holds one number for each of M outputs."""
    dims = list(graph.constants[value].dims) if value in graph.constants else []
    return bool(dims) and dims[-1] == M and all(size == 1 for size in dims[:-1])


def _added(graph: Graph, i: int, M: int) -> tuple[int, str | None]:
    """The Add of a bias behind node i and the bias; i itself and None where there is none that no other reads past."""
    value = graph.nodes[i].output[0]
    reader = graph.only_reader(value)
    if reader is not None and graph.nodes[reader].op_type == "Add":
        other = [name for name in graph.nodes[reader].input if name != value]
        if len(other) == 1 and _is_row(graph, other[0], M) and len(graph.constants[other[0]].dims) == 1:
            return reader, other[0]
    return i, None


def _name(graph: Graph, node: Any, tensor: str, bias: str | None) -> str:
    """The weight's name in the checkpoint, told by itself, its bias or the path of its node; else the tensor's own."""
    if not _NUMBERED.match(tensor):
        return tensor
    if bias is not None and bias.endswith(".bias"):
        return f"{bias.removesuffix('.bias')}.weight"
    path = re.fullmatch(r"/(.+)/(?:MatMul|Gemm)(?:_\d+)?", node.name)
    return f"{path[1].replace('/', '.')}.weight" if path else tensor


def _renamed(found: list[Product]) -> Iterable[Product]:
    """Products of different tensors that were told to have one name go by their tensors' own."""
    tensors: dict[str, set[str]] = {}
    for product in found:
        tensors.setdefault(product.name, set()).add(product.tensor)
    return (p if len(tensors[p.name]) == 1 else replace(p, name=p.tensor) for p in found)
