"""A module's forward as a torch.fx graph of its children, where it is a function of its required arguments alone."""

import inspect
import logging
from typing import Any

from torch import fx, nn

from bsrgen.integrations.torch.nodes import hooked, mutates

_log = logging.getLogger("bsrgen")


def traced(module: nn.Module, signature: inspect.Signature) -> fx.Graph | None:
    """The graph, optional arguments at their defaults; None where torch.fx cannot read it, or where it changes tensors
    or the module.  The module is as it was afterwards, whatever its forward did."""
    defaults = {p.name: p.default for p in signature.parameters.values() if p.default is not p.empty}
    if any(isinstance(value, (list, tuple, dict, set)) for value in defaults.values()):
        return None
    before, name = _contents(module), type(module).__name__
    try:
        graph = _Tracer().trace(module, concrete_args=defaults or None)
    except Exception as e:  # whatever user code makes of proxies
        _log.info("%s is not fused: torch.fx cannot read it: %s", name, e)
        return None
    finally:
        changed = _restored(before)
    required = [name for name, p in signature.parameters.items() if p.default is p.empty][1:]
    if changed or not _without(graph, set(defaults), required) or any(mutates(module, n) for n in graph.nodes):
        _log.info("%s is not fused: its forward is no function of its arguments that changes nothing", name)
        return None
    return graph


class _Tracer(fx.Tracer):  # type: ignore[misc]
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """All are, but small ones that only compute, as activations of other packages."""
        plain = not any(True for _ in module.parameters()) and not any(True for _ in module.buffers())
        own = type(module).__module__.startswith("torch.nn") or hooked(module)
        return own or not plain or any(True for _ in module.children())


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """What a module and its children hold, and copies of it: dictionaries, lists and sets, not what is in them."""
    own = [vars(m) for m in module.modules()]
    own += [value for one in own for value in one.values() if isinstance(value, (dict, list, set))]
    return [(held, held.copy()) for held in own]


def _restored(contents: list[tuple[Any, Any]]) -> bool:
    """Whether anything had changed; it is as it was now."""
    changed = False
    for held, copy in contents:
        now, then = (list(c.items() if isinstance(c, dict) else c) for c in (held, copy))
        pairs = zip(now, then, strict=False)
        same = len(now) == len(then) and all(a is b or (isinstance(a, tuple) and a[1] is b[1]) for a, b in pairs)
        if not same:
            changed = True
            held.clear()
            (held.extend if isinstance(held, list) else held.update)(copy)
    return changed


def _without(graph: fx.Graph, defaults: set[str], required: list[str]) -> bool:
    """Take the arguments out of the graph that have their defaults in it; False where it reads them all the same, or
    the required ones are not what is left."""
    for node in list(graph.nodes):
        if (
            node.op == "placeholder"
            and node.target not in required
            and any(node.target == name or node.target.startswith(f"{name}_") for name in defaults)
        ):
            for user in list(node.users):
                if user.users or "assert" not in str(user.target):
                    return False
                graph.erase_node(user)
            graph.erase_node(node)
    return [node.target for node in graph.nodes if node.op == "placeholder"] == required
