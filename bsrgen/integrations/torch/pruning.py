"""Pruning the linear layers of a model by blocks, at once or during training; what is pruned, convert_ makes sparse."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from bsrgen import prune, shapes
from bsrgen.errors import ArgumentError, ArgumentTypeError
from bsrgen.foreign import Pair
from bsrgen.integrations.torch.config import BsrConfig
from bsrgen.shapes import Search

Filter = Callable[[nn.Module, str], bool]


def linears(model: nn.Module, filter_fn: Filter | None) -> dict[str, nn.Linear]:
    """The layers that a filter takes, by name; None takes every nn.Linear, of subclasses none."""
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"{type(model).__name__} is not a torch.nn.Module")
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
        and (type(module) is nn.Linear if filter_fn is None else filter_fn(module, name))
    }  # fmt: skip


def prune_(
    model: nn.Module, blocksize: Pair | Mapping[str, Pair], density: float, filter_fn: Filter | None = None, *,
    scope: prune.Scope = "layer", balanced: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Set the blocks of smallest norm to zero in the nn.Linear layers of `model`, in place; each layer's density.

    blocksize: one for all or by layer name; density, scope, balanced: as in bsrgen.prune.magnitude_of_all.
    Errors: ArgumentError, ArgumentTypeError, PatternError (NaN or Inf in a weight); nothing has changed then.
    """
    layers = linears(model, filter_fn)
    weights = {name: layer.weight for name, layer in layers.items()}
    masks = prune.magnitude_of_all(weights, blocksize, density, scope=scope, balanced=balanced)
    with torch.no_grad():
        for name, kept in masks.items():
            layers[name].weight.mul_(_elements(layers[name], prune.shape_of(blocksize, name), kept))
    return {name: float(kept.mean()) if kept.size else 0.0 for name, kept in masks.items()}


def search(
    model: nn.Module, filter_fn: Filter | None = None, *, density: float | None = None, least_mass: float | None = None,
    config: BsrConfig | None = None, **options: Any,
) -> dict[str, Search]:  # fmt: skip
    """For each nn.Linear of a dense model, what pruning in each block shape keeps and costs: `bsrgen.shapes.search`.

    The picks go on to prune_: prune_(model, {name: found.pick.blocksize for name, found in ...}, density).
    config gives dtype, n and target; options are those of shapes.search.
    """
    config = config or BsrConfig(None)
    found = {}
    for name, layer in linears(model, filter_fn).items():
        x = str(layer.weight.dtype).removeprefix("torch.")
        found[name] = shapes.search(
            layer.weight, density=density, least_mass=least_mass, dtype=config.weight_dtype(x), x_dtype=x, n=config.n,
            target=config.target, **options,
        )  # fmt: skip
    return found


class Pruner:
    """Gradual pruning while a model trains: call `step()` after each step of the optimizer.

        pruner = Pruner(model, (32, 1), density=0.2, begin=100, end=1000, every=50)
        for batch in data: ...; optimizer.step(); pruner.step()

    Every `every` steps from `begin` to `end` the masks are chosen anew, at the density of the cubic schedule
    (prune.cubic): blocks that were pruned stay zero from then on, and their weights do not train.  After `end` the
    pattern is fixed.  Arguments as in `prune_`.  state_dict and load_state_dict keep the step and the masks.
    """

    def __init__(
        self, model: nn.Module, blocksize: Pair | Mapping[str, Pair], density: float, *, begin: int = 0, end: int,
        every: int = 1, filter_fn: Filter | None = None, scope: prune.Scope = "layer", balanced: bool = False,
    ) -> None:  # fmt: skip
        if every < 1:
            raise ArgumentError(f"every={every}: a number of steps from 1 up")
        prune.cubic(0, begin, end, density)
        self._layers = linears(model, filter_fn)
        self._blocksize = {name: prune.shape_of(blocksize, name) for name in self._layers}
        self._final, self._begin, self._end, self._every = density, begin, end, every
        self._options: dict[str, Any] = {"scope": scope, "balanced": balanced}
        self._step = 0
        self._masks: dict[str, torch.Tensor] = {}  # of elements

    @property
    def density(self) -> float:
        """That the schedule asks for at the present step."""
        return prune.cubic(self._step, self._begin, self._end, self._final)

    def step(self) -> float:
        """Choose masks where the schedule says so, and set pruned weights to zero; the density asked for."""
        now, self._step = self._step, self._step + 1
        due = self._begin <= now <= self._end and ((now - self._begin) % self._every == 0 or now == self._end)
        density = prune.cubic(now, self._begin, self._end, self._final)
        if due:
            self.apply()  # what was pruned has the smallest norms, 0, and stays pruned
            weights = {name: layer.weight for name, layer in self._layers.items()}
            masks = prune.magnitude_of_all(weights, self._blocksize, density, **self._options)
            for name, kept in masks.items():
                self._masks[name] = _elements(self._layers[name], self._blocksize[name], kept)
        self.apply()
        return density

    def apply(self) -> None:
        """Set pruned weights to zero."""
        with torch.no_grad():
            for name, mask in self._masks.items():
                weight = self._layers[name].weight
                weight.mul_(mask.to(weight))

    def state_dict(self) -> dict[str, Any]:
        """The step and the masks."""
        return {"step": self._step, "masks": {name: mask.clone() for name, mask in self._masks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What state_dict gave.  ArgumentError where a mask is of no layer here."""
        for name, mask in state["masks"].items():
            if name not in self._layers or mask.shape != self._layers[name].weight.shape:
                raise ArgumentError(f"a mask {tuple(mask.shape)} for {name!r}, which is no such layer of this model")
        self._step, self._masks = int(state["step"]), dict(state["masks"])


def group_lasso(
    model: nn.Module, blocksize: Pair | Mapping[str, Pair], filter_fn: Filter | None = None
) -> torch.Tensor:
    """sqrt(R * C) * the sum of the norms of all blocks: a penalty that drives whole blocks to zero; add it to the loss.

    Group lasso (Yuan and Lin, J. R. Statist. Soc. B 68(1), 2006).  Blocks that are zero have a gradient of zero.
    """
    total = torch.zeros(())
    for name, layer in linears(model, filter_fn).items():
        (R, C), w = prune.shape_of(blocksize, name), layer.weight
        rows, cols = -(-w.shape[0] // R), -(-w.shape[1] // C)
        padded = nn.functional.pad(w, (0, cols * C - w.shape[1], 0, rows * R - w.shape[0]))
        norms = torch.linalg.vector_norm(padded.reshape(rows, R, cols, C), dim=(1, 3))
        total = total.to(w) + (R * C) ** 0.5 * norms.sum()
    return total


def _elements(layer: nn.Linear, blocksize: Pair, kept: Any) -> torch.Tensor:
    shape = (int(layer.weight.shape[0]), int(layer.weight.shape[1]))
    return torch.from_numpy(prune.spread(kept, blocksize, shape)).to(layer.weight)
