"""Convert: an ONNX file and tables of layers -> a folder with the rewritten file, its kernels and their library."""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bsrgen.artifact import Artifact, read_artifact
from bsrgen.assemble import assemble
from bsrgen.errors import ArgumentError, UnsupportedError
from bsrgen.files import model_matrices
from bsrgen.integrations.onnx.library import LIBRARY, operators_for
from bsrgen.integrations.onnx.tails import Tail, shapes_of, tail_of
from bsrgen.manifest import OPERANDS_FILE
from bsrgen.model import KERNELS, LayerRecord, Model
from bsrgen.onnx_graph import Graph, Product, dtype_name, known_graph
from bsrgen.sparsity import Job, Sparsity, jobs_of, read_sparsity
from bsrgen.targets import as_targets

GRAPH = "model.onnx"
DOMAIN = "bsrgen"
_LETTERS = {"row": "r", "element": "e"}  # what runtime/bsrgen_onnx.c knows of operands
_EXTERNAL_BYTES = 1 << 30  # protobuf ends at 2 GiB


@dataclass(frozen=True, slots=True)
class _Layer:
    """A kernel to be and the part of the graph that it takes the place of: one product and its tail, or several."""

    job: Job
    products: tuple[Product, ...]
    tails: tuple[Tail, ...]


def convert(
    model: str | os.PathLike[str],
    config: str | os.PathLike[str] | Sparsity,
    folder: str | os.PathLike[str],
    *,
    executor: Executor | None = None,
    progress: Callable[[float], object] | None = None,
) -> Model:
    """Rewrite the linear layers of an ONNX file that `config` chooses; the kernels, as bsrgen.compile_model gives them.

    `folder` holds model.onnx, libbsrgen_onnx.so and kernels/, and needs neither bsrgen nor a compiler: `session` says
    how to run it.  Bias, activations (Relu, Gelu, Sigmoid, Tanh, SiLU, also written out by Erf and Mul) and a residual
    of the same shape that follow a product alone go into its kernel, so that tables say no epilogue here; [[fuse]]
    makes products of one x one kernel.  Layers that no table names stay as they are.  Other arguments: compile_model.
    Errors, before anything is written: as compile_model; ArgumentError and UnsupportedError where a table asks what
    the graph does not have.
    """
    source = Path(model)
    if source.suffix != ".onnx":
        raise ArgumentError(f"{source}: convert rewrites .onnx files; compile_model takes other weights")
    sparsity = config if isinstance(config, Sparsity) else read_sparsity(Path(config))
    if sparsity.backend == "cuda":
        raise UnsupportedError("operators of ONNX Runtime are made for the CPU; take backend='c' or 'mlir'")
    names = model_matrices(source)
    graph = known_graph(source)
    layers = list(_layers(graph, jobs_of(sparsity, names)))

    def finish(temp: Path, records: Mapping[str, LayerRecord]) -> None:
        places = {name: Path(KERNELS) / record.kernel for name, record in records.items()}
        artifacts = [read_artifact(temp / places[layer.job.name]) for layer in layers]
        _write(rewritten(graph, layers, artifacts, [places[layer.job.name] for layer in layers]), temp / GRAPH)
        (target,) = as_targets(artifacts[0].manifest.levels[0].target)
        shutil.copyfile(operators_for(target), temp / LIBRARY)

    return assemble([layer.job for layer in layers], source, Path(folder), executor, progress, finish)


def _layers(graph: Graph, jobs: Iterable[Job]) -> Iterable[_Layer]:
    """What the tables choose, with all that the graph lets each kernel do."""
    shapes, taken = shapes_of(graph.model), {node for p in graph.products for node in (p.node, p.end)}
    for job in jobs:
        if job.epilogue or not job.bias:
            raise UnsupportedError(
                f"{job.name}: of an ONNX model the graph says bias and epilogue; leave them out of the tables"
            )
        sites = [[p for p in graph.products if p.name == name] for name in job.tensors]
        if len(sites) > 1:
            products = _that_share_x(job, [found for found in sites if len(found) == 1])
            tails = tuple(Tail((), (), (p.node, p.end), p.end, p.y) for p in products)
            yield _Layer(_typed(graph, job, products[0], ()), products, tails)
            continue
        for number, product in enumerate(sites[0]):
            if product.bias != sites[0][0].bias:
                raise UnsupportedError(f"{job.name}: the weight comes with {sites[0][0].bias} and with {product.bias}")
            tail = tail_of(graph, product, shapes, taken - {product.node, product.end})
            taken |= set(tail.nodes)
            name = f"{job.name}@{number + 1}" if number else job.name
            yield _Layer(_typed(graph, replace(job, name=name), product, tail.epilogue), (product,), (tail,))


def _that_share_x(job: Job, found: Sequence[Sequence[Product]]) -> tuple[Product, ...]:
    products = tuple(one for (one,) in found)
    if len(products) != len(job.tensors) or len({p.x for p in products}) != 1:
        raise ArgumentError(
            f"{job.name}: {', '.join(job.tensors)} are not multiplied with one and the same x, once each"
        )
    return products


def _typed(graph: Graph, job: Job, product: Product, epilogue: tuple[str, ...]) -> Job:
    """The job with the graph's type for x and y, and the epilogue that was found there."""
    own = dtype_name(graph.constants[product.tensor].data_type)
    options = {"dtype": own, "x_dtype": own, "out_dtype": own} | job.options
    for field in ("x_dtype", "out_dtype"):
        if options[field] != own:
            raise ArgumentError(f"{job.name}: {field}={options[field]!r}, but the graph computes in {own}")
    return replace(job, epilogue=epilogue, options=options)


def rewritten(graph: Graph, layers: Sequence[_Layer], artifacts: Sequence[Artifact], places: Sequence[Path]) -> Any:
    """The model with a node of bsrgen in the place of each layer.  places: of the artifacts, beside the library."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    made: dict[int, list[Any]] = {}
    gone: set[int] = set()
    for layer, artifact, place in zip(layers, artifacts, places, strict=True):
        nodes, constants = _nodes(graph, layer, artifact, place)
        at = layer.tails[0].end if len(layer.products) == 1 else min(p.node for p in layer.products)
        made.setdefault(at, []).extend(nodes)
        gone |= {node for tail in layer.tails for node in tail.nodes}
        model.graph.initializer.extend(constants)
    kept = [one for i, node in enumerate(graph.nodes) for one in (*made.get(i, ()), *(() if i in gone else (node,)))]
    kept = _alive(kept, {value.name for value in model.graph.output})
    del model.graph.node[:]
    model.graph.node.extend(kept)
    read = {value for node in kept for value in _read_by(node)} | {value.name for value in model.graph.output}
    weights = [tensor for tensor in model.graph.initializer if tensor.name in read]
    had = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name in read or value.name not in had]
    del model.graph.initializer[:], model.graph.input[:]
    model.graph.initializer.extend(weights)
    model.graph.input.extend(inputs)  # before IR 4 initialisers are inputs too
    model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return model


def _nodes(graph: Graph, layer: _Layer, artifact: Artifact, place: Path) -> tuple[list[Any], list[Any]]:
    """The nodes of one layer and the constants they read."""
    from onnx import helper, numpy_helper

    m, name, first = artifact.manifest, layer.job.name, layer.tails[0]
    bound = artifact.arrays(OPERANDS_FILE) if m.bound else {}
    constants = [numpy_helper.from_array(bound[operand], f"{name}/{operand}") for operand in m.bound]
    values = iter(first.operands)
    inputs = [f"{name}/{o.name}" if o.name in bound else next(values) for o in m.operands]
    several = len(layer.tails) > 1
    node = helper.make_node(
        f"Linear_{m.out_dtype}", [layer.products[0].x, *inputs], [f"{name}/y" if several else first.y], name=name,
        domain=DOMAIN, library=(place / m.library).as_posix(), symbol=m.name, features=m.shape[1], rows=m.rows,
        operands="".join(_LETTERS[o.kind] for o in m.operands),
    )  # fmt: skip
    if not several:
        return [node], constants
    import numpy as np

    sizes, inputs, ends = {}, [f"{name}/y"], [t.y for t in layer.tails]
    if next(row.version for row in graph.model.opset_import if row.domain in ("", "ai.onnx")) < 13:
        sizes["split"] = list(m.parts)
    else:
        inputs.append(f"{name}/parts")
        constants.append(numpy_helper.from_array(np.array(m.parts, np.int64), inputs[-1]))
    return [node, helper.make_node("Split", inputs, ends, name=f"{name}/split", axis=-1, **sizes)], constants


def _read_by(node: Any) -> Iterable[str]:
    yield from node.input
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            yield from (value.name for value in inner.output)
            for one in inner.node:
                yield from _read_by(one)


def _alive(nodes: list[Any], read: set[str]) -> list[Any]:
    """The nodes without those that made the weights that nobody reads any more."""
    read, left = set(read), []
    for node in reversed(nodes):
        if node.op_type in ("Constant", "Identity", "Transpose") and not set(node.output) & read:
            continue
        left.append(node)
        read |= set(_read_by(node))
    return left[::-1]


def _write(model: Any, path: Path) -> None:
    import onnx

    external = model.ByteSize() > _EXTERNAL_BYTES
    onnx.save_model(model, path, save_as_external_data=external, location=f"{path.name}.data" if external else None)
