"""Which blocks of a model to prune next, by second order, and what the others become.

The model's loss is the squared change of its embeddings.  Around the present weights W [M, K] of a layer it grows by
sum_m s_m dW_m H dW_m^T: H = E[x x^T] of the layer's inputs, s_m = E[d_m^2] of the gradient at output m for random
directions of the embedding (the diagonal of Kronecker's factor: Martens, Grosse, arXiv 1503.05671, section 3).  In that
metric blocks are removed as in optimal brain surgery (Hassibi, Stork, NIPS 1992; by groups: Kurtic et al., arXiv
2203.07259): block rows of R x 1 blocks have each their own set of columns, and what stays is solved for.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from model import Encoder
from text import Batch
from torch import Tensor, nn

DAMPING = 0.01  # of the mean of H's diagonal
STEP = 0.3  # columns that go before H is inverted again
LEAST = 0.04  # of a block row's columns stay


@dataclass
class Curvature:
    """Of one layer: H [K + 1, K + 1], the last column a constant one (the bias), and s [M]; sums over tokens."""

    H: Tensor
    s: Tensor
    tokens: int = 0


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def curvatures(model: Encoder, batches: Iterable[Batch]) -> dict[str, Curvature]:
    """Of each linear layer, over the live tokens of the batches."""
    layers = linears(model.layers)
    found = {
        name: Curvature(torch.zeros(m.in_features + 1, m.in_features + 1), torch.zeros(m.out_features))
        for name, m in layers.items()
    }
    alive: list[Tensor] = []

    def watch(name: str, module: nn.Linear) -> torch.utils.hooks.RemovableHandle:
        def backward(d: Tensor) -> None:
            found[name].s.add_(d[alive[-1]].float().square().sum(0))

        def forward(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            x = inputs[0].detach()[alive[-1]].float()
            x = torch.cat([x, torch.ones(len(x), 1)], 1)
            found[name].H.addmm_(x.T, x)
            found[name].tokens += len(x)
            output.register_hook(backward)

        return module.register_forward_hook(forward)

    handles = [watch(name, module) for name, module in layers.items()]
    for ids, live in batches:
        alive.append(live)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(ids, live)
        torch.autograd.grad(y, model.norm.weight, torch.randn_like(y))
    for handle in handles:
        handle.remove()
    return found


@dataclass
class Trace:
    """Columns of one block row in the order in which they would go, and what each costs."""

    columns: Tensor
    costs: Tensor


def trace(w: Tensor, H: Tensor, s: Tensor, columns: Tensor, most: float) -> Trace:
    """For the rows w [R, K] of one block row that stores `columns`: at most the share `most` of them go."""
    order, costs, left = [], [], columns
    ones = torch.tensor([H.shape[0] - 1])
    goal = max(round(len(columns) * (1 - most)), 1)
    full = torch.cat([w, w.new_zeros(len(w), 1)], 1)
    inside = torch.cat([columns, ones])
    target = full[:, inside] @ H[inside]
    while len(left) > goal:
        inside = torch.cat([left, ones])
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(H[inside][:, inside]))
        now = target[:, inside] @ inverse
        cost = (now.square() * s[:, None]).sum(0)[:-1] / inverse.diagonal()[:-1]
        count = min(max(round(STEP * len(left)), 1), len(left) - goal)
        gone = cost.argsort()
        order.append(left[gone[:count]])
        costs.append(cost[gone[:count]])
        left = left[gone[count:].sort().values]
    if not order:
        return Trace(columns[:0], w.new_zeros(0))
    return Trace(torch.cat(order), torch.cat(costs).cummax(0).values)


def refit(w: Tensor, H: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [R, K] that store `after` alone and come nearest to w, which stores `before`; and what the bias gains."""
    ones = torch.tensor([H.shape[0] - 1])
    full = torch.cat([w, w.new_zeros(len(w), 1)], 1)
    old, new = torch.cat([before, ones]), torch.cat([after, ones])
    factor = torch.linalg.cholesky(H[new][:, new])
    found = torch.cholesky_solve((full[:, old] @ H[old][:, new]).T, factor).T
    out = torch.zeros_like(w)
    out[:, after] = found[:, :-1]
    return out, found[:, -1]


def prune(model: Encoder, masks: dict[str, Tensor], found: dict[str, Curvature], density: float, R: int) -> None:
    """Prune all layers of the model to that density together, in place; masks: bool [block_rows, K] by layer."""
    layers = linears(model.layers)
    now = sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    most = min(1.0, 1.8 * (1 - density / now))  # of a block row: more than that is not needed to meet the mean
    traces: dict[tuple[str, int], Trace] = {}
    for name, module in layers.items():
        c = found[name]
        c.H /= c.tokens
        c.H.diagonal().add_(DAMPING * c.H.diagonal()[:-1].mean())
        c.s /= c.tokens
        for i, rows in enumerate(masks[name]):
            w, columns = module.weight.detach()[i * R : (i + 1) * R], rows.nonzero().squeeze(1)
            floor = min(most, 1 - LEAST * len(rows) / len(columns))
            traces[name, i] = trace(w, c.H, c.s[i * R : (i + 1) * R], columns, floor)
    costs = torch.cat([t.costs for t in traces.values()]).sort().values
    total = sum(m.numel() for m in masks.values())
    remove = sum(int(m.sum()) for m in masks.values()) - round(density * total)
    limit = costs[min(remove, len(costs)) - 1]
    with torch.no_grad():
        for (name, i), t in traces.items():
            module, rows = layers[name], slice(i * R, (i + 1) * R)
            before = masks[name][i].nonzero().squeeze(1)
            masks[name][i, t.columns[t.costs <= limit]] = False
            after = masks[name][i].nonzero().squeeze(1)
            module.weight[rows], gain = refit(module.weight[rows], found[name].H, before, after)
            module.bias[rows] += gain
