"""fuse_: what stands around the block-sparse layers of a model goes into their kernels, where nobody can tell."""

import inspect
import logging
import operator
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from bsrgen.errors import ArgumentTypeError
from bsrgen.integrations.torch.fused import PAIRS, BsrFused
from bsrgen.integrations.torch.layer import BsrLinear
from bsrgen.integrations.torch.nodes import (
    MULTIPLIES,
    activation_of,
    added,
    alike,
    calls,
    idle,
    is_linear,
    layer_of,
    reader,
)
from bsrgen.integrations.torch.tracing import traced
from bsrgen.machine import parallel_cores
from bsrgen.tune import PLANNED_N

_MOST_TOKENS = {"gelu": 32}  # by erf: 128 x 3072 take 128 us in the kernel, 86 in torch; 8 x 3072 are 1.2x (Zen 5)

_log = logging.getLogger("bsrgen")


@dataclass(frozen=True, slots=True)
class Fusion:
    """Layers of one module that are one kernel now.  what: the activation, "swiglu" or "geglu", and "residual"."""

    module: str  # as in model.named_modules()
    layers: tuple[str, ...]  # within that module
    what: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.module or 'the model'}: {', '.join(self.layers)}{''.join(f' + {what}' for what in self.what)}"


def fuse_(model: nn.Module, *, executor: Executor | None = None) -> tuple[Fusion, ...]:
    """Fuse around the BsrLinear layers of a converted model, in place, for inference; what was fused.

    Layers that share x (Q, K and V) become one kernel, gate and up of a SwiGLU or GeGLU without biases too; an
    activation (ReLU, GELU, SiLU, sigmoid, tanh) and a residual behind a layer go into its kernel, where nothing else
    reads what lies between; GELU by erf only where the config's n is at most 32.  Parameters, buffers and names stay
    where they are: state_dict, load_state_dict and optimizers do not notice.  Results differ by rounding only.

    torch.fx reads each module's own forward, with the defaults of its optional arguments; a module that it cannot read
    stays as it is.  A fused module runs its old forward in training, with gradients, and when an optional argument is
    given.  What fx reads it reads once: numbers kept on a module, and branches on them, are those of now.
    torch.compile and torch.export see one operator, bsrgen::fused.  Copies stay fused; pickles hold the old module.

    Errors: ArgumentTypeError for what is no module, and those of bsrgen.compile, before anything has changed.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"{type(model).__name__} is not a torch.nn.Module")
    planned = [(name, module, plan) for name, module in model.named_modules() if (plan := _plan(module)) is not None]
    every = [made for _, _, plan in planned for made in plan.made.values()]
    with nullcontext(executor) if executor else ThreadPoolExecutor(parallel_cores()) as pool:
        for future in [pool.submit(made.kernel) for made in every]:
            future.result()
    done = []
    for name, module, plan in planned:
        for own, made in plan.made.items():
            vars(module)[own] = made  # no submodule: nn.Sequential would run it
        module.__class__ = _class_of(module, plan)
        done += [Fusion(name, layers, what) for layers, what in plan.what]
    for fusion in done:
        _log.info("fused %s", fusion)
    return tuple(done)


# ── one module ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Plan:
    """What becomes of a module: its fused parts by the names they will have, and the graph that calls them."""

    graph: fx.Graph
    signature: inspect.Signature
    made: dict[str, BsrFused]
    what: list[tuple[tuple[str, ...], tuple[str, ...]]]
    dropouts: tuple[str, ...]  # names of modules that do nothing while they infer


def _plan(module: nn.Module) -> _Plan | None:
    """How to fuse in a module's own forward; None where there is nothing, or fx cannot read it."""
    nested = isinstance(module, (nn.ModuleList, nn.ModuleDict, BsrLinear)) or hasattr(type(module), "_bsrgen_base")
    if nested or module.training or not any(isinstance(m, BsrLinear) for m in module.modules()):
        return None
    signature = inspect.signature(type(module).forward)
    kinds = [p.kind for p in signature.parameters.values()]
    if "forward" in vars(module) or any(
        k not in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY) for k in kinds
    ):
        return None
    if (graph := traced(module, signature)) is None:
        return None
    dropouts = tuple(str(n.target) for n in graph.nodes if n.op == "call_module" and idle(module, n))
    plan = _Plan(graph, signature, {}, [], dropouts)
    for step in (_pairs, _tails, _shared):
        for nodes, layers, what, activation in step(module, graph):
            _replace(module, plan, nodes, layers, what, activation)
    if not plan.made:
        return None
    graph.lint()
    return plan


Found = Iterator[tuple[list[fx.Node], list[fx.Node], tuple[str, ...], str | None]]


def _pairs(module: nn.Module, graph: fx.Graph) -> Found:
    """act(gate(x)) * up(x), both without bias."""
    for node in graph.nodes:
        if not calls(module, node, MULTIPLIES) or len(node.all_input_nodes) != 2 or len(node.args) != 2:
            continue
        for first, up in (node.args, node.args[::-1]):
            act = activation_of(module, first)
            gate = first.args[0] if act in PAIRS and len(first.users) == 1 else None
            if gate is None or not (is_linear(module, gate) and is_linear(module, up)) or gate.args != up.args:
                continue
            g, u = layer_of(module, gate), layer_of(module, up)
            fit = alike(g, u) and g.out_features == u.out_features and g.bias is None
            if fit and len(gate.users) == len(up.users) == 1:
                yield [node], [gate, up], (PAIRS[str(act)],), act
                break


def _tails(module: nn.Module, graph: fx.Graph) -> Found:
    """A layer, perhaps an activation, perhaps the sum with a residual; dropout between them does nothing here."""
    for node in list(graph.nodes):
        if not is_linear(module, node):
            continue
        end, act, what = node, None, []
        after = reader(module, end)
        if after is not None and (act := activation_of(module, after)) is not None:
            if (layer_of(module, node).config.n or PLANNED_N) > _MOST_TOKENS.get(act, 1 << 62):
                continue
            end, what = after, [act]
            after = reader(module, end)
        other = None
        if after is not None and (other := added(module, after, end)) is not None:
            end, what = after, [*what, "residual"]
        if what:
            yield [end, *([other] if other is not None else [])], [node], tuple(what), act


def _shared(module: nn.Module, graph: fx.Graph) -> Found:
    """Layers of one x, of one kind, whose blocks do not stick out."""
    groups: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if is_linear(module, node):
            layer = layer_of(module, node)
            key = (node.args[0], str(layer.config), layer.values.dtype, layer.values.shape[1:], layer.bias is None)
            groups.setdefault(key, []).append(node)
    for nodes in groups.values():
        layers = [layer_of(module, node) for node in nodes]
        if len(nodes) > 1 and not any(layer.out_features % layer.values.shape[1] for layer in layers[:-1]):
            yield [nodes[0]], nodes, (), None


def _replace(
    module: nn.Module, plan: _Plan, nodes: list[fx.Node], layers: list[fx.Node], what: tuple[str, ...], act: str | None
) -> None:
    """Call the fused part where nodes[0] is; of several layers, each takes its own of the results."""
    graph, name = plan.graph, f"fused_{len(plan.made)}"
    plan.made[name] = BsrFused(tuple(layer_of(module, n) for n in layers), act, "residual" in what).eval()
    plan.what.append((tuple(str(n.target) for n in layers), what))
    with graph.inserting_before(nodes[0]):
        call = graph.create_node("call_module", name, (layers[0].args[0], *nodes[1:]))
        call.meta["fused"] = True
        if what:
            nodes[0].replace_all_uses_with(call)
            _erase(graph, nodes[0])
            return
        parts = [graph.call_function(operator.getitem, (call, i)) for i in range(len(layers))]
    for node, part in zip(layers, parts, strict=True):
        node.replace_all_uses_with(part)
        graph.erase_node(node)
        if all(user.op == "call_method" and user.target in ("view", "reshape") for user in part.users):
            for user in part.users:
                user.target = "reshape"  # the results are columns of one array
        else:
            with graph.inserting_after(part):
                whole = graph.call_method("contiguous", (part,))
            part.replace_all_uses_with(whole, lambda user, whole=whole: user is not whole)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """A node, and those that made its inputs for nobody else."""
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for one in inputs:
        if not one.users and one.op != "placeholder":
            _erase(graph, one)


# ── the module's new class ───────────────────────────────────────────────────────────────────────────────────────────


def _class_of(module: nn.Module, plan: _Plan) -> Any:
    """A subclass of the module's class whose forward is the graph where the module only infers."""
    base, signature = type(module), plan.signature
    graph_forward: Callable[..., Any] = type(fx.GraphModule(module, plan.graph)).forward
    needed = sum(p.default is p.empty for p in signature.parameters.values()) - 1
    parts = tuple((name, layers) for name, (layers, _) in zip(plan.made, plan.what, strict=True))

    def as_fused(self: Any) -> bool:
        """Whether the layers are those that were fused, nobody watches them, and dropout is off."""
        for name, layers in parts:
            for own, layer in zip(layers, vars(self)[name]._layers, strict=True):
                if _child(self, own) is not layer or layer._forward_hooks or layer._forward_pre_hooks:
                    return False
        return not any(_child(self, name).training for name in plan.dropouts)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training and not torch.is_grad_enabled() and as_fused(self):
            if len(args) == needed and not kwargs:
                return graph_forward(self, *args)
            given = signature.bind(self, *args, **kwargs).arguments
            plain = [p.name for p in signature.parameters.values() if p.default is p.empty]
            if all(value is signature.parameters[name].default for name, value in given.items() if name not in plain):
                return graph_forward(*(given[name] for name in plain))
        return base.forward(self, *args, **kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]  # torch.export asks for it

    def deepcopy(self: Any, memo: Any) -> Any:
        import copy

        own: Any = type(self)
        new = memo[id(self)] = own.__new__(own)
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def reduce(self: Any, protocol: Any) -> Any:
        return _plain, (base,), {k: v for k, v in vars(self).items() if not isinstance(v, BsrFused)}

    members = {"forward": forward, "__deepcopy__": deepcopy, "__reduce_ex__": reduce, "_bsrgen_base": base}
    made: Any = type
    return made(f"Fused{base.__name__}", (base,), members | {"__module__": __name__})


def _child(module: Any, name: str) -> Any:
    """A module by its name, at a tenth of get_submodule's price."""
    for key in name.split("."):
        module = module._modules[key]
    return module


def _plain(base: Any) -> Any:
    return base.__new__(base)
