"""What a node of a torch.fx graph is, as far as fusing asks."""

import operator
from typing import Any

import torch
from torch import fx, nn

from bsrgen.integrations.torch.layer import BsrLinear

F = nn.functional
_ACTIVATIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", "relu": "relu", nn.ReLU: "relu", F.silu: "silu", nn.SiLU: "silu",
    torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", "sigmoid": "sigmoid", nn.Sigmoid: "sigmoid",
    torch.tanh: "tanh", F.tanh: "tanh", "tanh": "tanh", nn.Tanh: "tanh", F.gelu: "gelu", nn.GELU: "gelu",
}  # fmt: skip
_ADDS = (operator.add, torch.add, "add")
MULTIPLIES = (operator.mul, torch.mul, "mul")
_DROPOUTS = (nn.Dropout, F.dropout)
_WRITES = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
    operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift,
}  # fmt: skip


def layer_of(module: nn.Module, node: fx.Node) -> Any:
    """The module that a node calls; None for a fused part, which the module has not got yet."""
    return None if node.meta.get("fused") else module.get_submodule(str(node.target))


def is_linear(module: nn.Module, node: Any) -> bool:
    """Whether a node calls a BsrLinear of the CPU that nothing else watches."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    layer = layer_of(module, node)
    return type(layer) is BsrLinear and layer.values.is_cpu and not hooked(layer)


def hooked(module: nn.Module) -> bool:
    return any(
        getattr(module, name)
        for name in vars(module)
        if name.startswith(("_forward_", "_backward_")) and name.endswith("hooks")
    )


def calls(module: nn.Module, node: Any, kinds: tuple[Any, ...]) -> bool:
    """Whether a node calls one of these functions, methods (by name) or modules (by type)."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method", "call_module"):
        return False
    what = type(layer_of(module, node)) if node.op == "call_module" else node.target
    return any(what is kind or (isinstance(kind, str) and node.op == "call_method" and what == kind) for kind in kinds)


def activation_of(module: nn.Module, node: Any) -> str | None:
    """The epilogue that a node is."""
    name = next((name for kind, name in _ACTIVATIONS.items() if calls(module, node, (kind,))), None)
    if name is None:
        return None
    if node.op == "call_module":
        layer = layer_of(module, node)
        if hooked(layer) or getattr(layer, "inplace", False):
            return None
        return f"{name}_tanh" if getattr(layer, "approximate", "none") == "tanh" else name
    options = dict(node.kwargs) | dict(zip(("inplace",), node.args[1:], strict=False))
    approximate = options.pop("approximate", "none")
    if any(options.values()):
        return None
    return f"{name}_tanh" if approximate == "tanh" else name


def idle(module: nn.Module, node: Any) -> bool:
    """Whether a node is dropout that does nothing: a module while the model infers, a function that says so."""
    if not calls(module, node, _DROPOUTS):
        return False
    if node.op == "call_module":
        return not hooked(layer_of(module, node))
    options = dict(zip(("p", "training", "inplace"), node.args[1:], strict=False)) | dict(node.kwargs)
    return options.get("training", True) is False and not options.get("inplace")


def mutates(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node may change what another one reads; `h += r` may not, where h is what a layer has just made."""
    if "out" in node.kwargs or node.kwargs.get("inplace"):
        return True
    if node.op == "call_module":
        return bool(getattr(layer_of(module, node), "inplace", False))
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if node.op not in ("call_method", "call_function"):
        return False
    if node.target is operator.iadd:
        made = node.args[0]
        while idle(module, made):
            made = made.args[0]
        return not is_linear(module, made) or len(made.users) > 1
    said = any(argument is True for argument in node.args[1:])  # inplace of F.relu, training of F.dropout
    return said or node.target in _WRITES or name == "__setitem__" or (name[-1:] == "_" and name[-2:] != "__")


def reader(module: nn.Module, node: fx.Node) -> fx.Node | None:
    """Who alone reads a node, past dropout."""
    while len(node.users) == 1:
        (user,) = node.users
        if not idle(module, user):
            return user
        node = user
    return None


def added(module: nn.Module, node: fx.Node, end: fx.Node) -> fx.Node | None:
    """What a node adds to `end`; `h += r` too, where h is `end` and no input of somebody's."""
    inside = calls(module, node, (operator.iadd,)) and leads(module, node.args[0], end)
    if not (inside or calls(module, node, _ADDS)) or len(node.args) != 2 or node.kwargs:
        return None
    others = [a for a in node.args if isinstance(a, fx.Node) and not leads(module, a, end)]
    return others[0] if len(others) == 1 else None


def leads(module: nn.Module, node: fx.Node, start: fx.Node) -> bool:
    """Whether `node` is `start` or dropout of it."""
    while node is not start and idle(module, node):
        node = node.args[0]
    return node is start


def alike(one: BsrLinear, other: BsrLinear) -> bool:
    same = one.config == other.config and one.values.dtype == other.values.dtype
    return same and one.values.shape[1:] == other.values.shape[1:] and (one.bias is None) == (other.bias is None)
