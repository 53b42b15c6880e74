"""What a kernel can do behind a product of an ONNX graph: activations and a residual, which read its result alone."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from bsrgen.onnx_graph import Graph, Product

_ACTIVATIONS = {"Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh"}
Shape = tuple[int | str, ...]
Step = tuple[str, tuple[int, ...]]  # an epilogue and the nodes that it stands for, the last one last


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of a layer: epilogue after the bias, the values that are its element operands, the nodes that the kernel
    takes the place of, the last of them, and what that gives."""

    epilogue: tuple[str, ...]
    operands: tuple[str, ...]
    nodes: tuple[int, ...]
    end: int
    y: str


def tail_of(graph: Graph, product: Product, shapes: Mapping[str, Shape], taken: Collection[int]) -> Tail:
    """As much of what follows as the kernel can do.  taken: nodes that other kernels do."""
    tail = Tail((), (), tuple(sorted({product.node, product.end})), product.end, product.y)
    while True:
        if (step := _activation(graph, tail.y)) is not None:
            name, nodes = step
            operands = tail.operands
        elif (added := _residual(graph, tail.y, shapes)) is not None:
            node, other = added
            name, nodes, operands = "residual", (node,), (*tail.operands, other)
        else:
            return tail
        if set(nodes) & set(taken):
            return tail
        end = nodes[-1]
        tail = Tail((*tail.epilogue, name), operands, (*tail.nodes, *nodes), end, graph.nodes[end].output[0])


def shapes_of(model: Any) -> dict[str, Shape]:
    """Shapes of all values as far as inference tells; a size is a number or a symbol."""
    import onnx

    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # models above protobuf's 2 GiB, operators of other domains: then nothing is known
        graph = model.graph
    found: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            sizes = value.type.tensor_type.shape.dim
            found[value.name] = tuple(d.dim_param or d.dim_value if d.WhichOneof("value") else "" for d in sizes)
    return found


def _residual(graph: Graph, value: str, shapes: Mapping[str, Shape]) -> tuple[int, str] | None:
    """The Add of a value of the same shape, which is proven, and that value."""
    reader = graph.only_reader(value)
    if reader is None or graph.nodes[reader].op_type != "Add":
        return None
    others = [name for name in graph.nodes[reader].input if name != value]
    shape = shapes.get(value, ())
    same = len(others) == 1 and len(shape) > 1 and "" not in shape and shapes.get(others[0]) == shape
    return (reader, others[0]) if same else None


def _activation(graph: Graph, value: str) -> Step | None:
    """The activation that reads a value alone."""
    reader = graph.only_reader(value)
    if reader is not None:
        node = graph.nodes[reader]
        if node.op_type == "Gelu":
            tanh = any(a.name == "approximate" and a.s == b"tanh" for a in node.attribute)
            return ("gelu_tanh" if tanh else "gelu"), (reader,)
        return (_ACTIVATIONS[node.op_type], (reader,)) if node.op_type in _ACTIVATIONS else None
    return next(_of_two_readers(graph, value), None)


def _of_two_readers(graph: Graph, value: str) -> Iterator[Step]:
    """v * sigmoid(v), and v * 0.5 * (1 + erf(v / sqrt(2))) with its factors in any order."""
    readers = graph.readers.get(value, ())
    if len(readers) != 2 or min(readers) < 0:
        return
    for first, last in (readers, readers[::-1]):
        inner, outer = graph.nodes[first], graph.nodes[last]
        if inner.op_type == "Sigmoid" and graph.only_reader(inner.output[0]) == last and outer.op_type == "Mul":
            yield "silu", (first, last)
        if (half := _erf(graph, value, first)) is not None:
            nodes, factor = half
            yield from _gelu(graph, value, last, nodes, factor)


def _erf(graph: Graph, value: str, first: int) -> tuple[tuple[int, ...], str] | None:
    """1 + erf(value / sqrt(2)), which begins at node `first`: its nodes and its name."""
    divided = _with_constant(graph, first, value, "Div", sqrt(2)) or _with_constant(
        graph, first, value, "Mul", sqrt(0.5)
    )
    erf = graph.only_reader(graph.nodes[first].output[0]) if divided else None
    if erf is None or graph.nodes[erf].op_type != "Erf":
        return None
    one = graph.only_reader(graph.nodes[erf].output[0])
    if one is None or not _with_constant(graph, one, graph.nodes[erf].output[0], "Add", 1.0):
        return None
    return (first, erf, one), graph.nodes[one].output[0]


def _gelu(graph: Graph, value: str, last: int, nodes: tuple[int, ...], factor: str) -> Iterator[Step]:
    """The product of value, factor and 0.5, whose node that reads `value` is `last`."""
    halves = 0
    pair = [value, factor]
    for i, name in enumerate(pair):  # one of the two may be halved first
        half = last if name == value else graph.only_reader(name)
        if half is not None and _with_constant(graph, half, name, "Mul", 0.5):
            pair[i], nodes, halves = graph.nodes[half].output[0], (*nodes, half), halves + 1
            last = last if name != value else graph.only_reader(pair[i]) or -1
    if last < 0 or graph.nodes[last].op_type != "Mul" or sorted(graph.nodes[last].input) != sorted(pair):
        return
    if graph.only_reader(pair[1]) != last:
        return
    nodes = (*nodes, last)
    if halves == 0:
        y = graph.nodes[last].output[0]
        half = graph.only_reader(y)
        if half is None or not _with_constant(graph, half, y, "Mul", 0.5):
            return
        nodes, halves = (*nodes, half), 1
    if halves == 1:
        yield "gelu", nodes


def _with_constant(graph: Graph, node: int, value: str, op: str, number: float) -> bool:
    """Whether a node is `value op number`; of Div the number divides."""
    found = graph.nodes[node]
    others = [name for name in found.input if name != value]
    if found.op_type != op or len(others) != 1 or others[0] not in graph.constants:
        return False
    if op == "Div" and found.input[0] != value:
        return False
    array = graph.array(others[0])
    one = array.ndim <= 1 and array.size == 1  # else it may add axes
    return one and bool(np.isclose(float(array.reshape(())), number, rtol=2e-3))  # as half types round it
