"""mode="pit" against dense products of everything: selections of several sizes, one kernel, all in one run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen import api
from bsrgen.bench.case import SEED, Case, case_of
from bsrgen.bench.clock import Timing, measure
from bsrgen.bench.peer import as_torch
from bsrgen.bench.peers import PEERS, check, prepare
from bsrgen.dtypes import as_dtype
from bsrgen.pattern import Weight, as_weight
from bsrgen.pit_kernel import PitKernel

Array = NDArray[Any]
MOST_CHECKED = 256  # tokens
LIMIT_S = 20.0  # of timing one weight
SHARES = (1.0, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.01)
LOOP = "loop over experts"


@dataclass(frozen=True, slots=True)
class Selection:
    """What a call is given: a name for the table, X, what is selected, the share of the dense product that is live."""

    name: str
    x: Array
    given: dict[str, Any]
    live: float


@dataclass(frozen=True, slots=True)
class Row:
    """One selection on the clock, beside the best dense product and, of experts, a loop of dense products."""

    selection: str
    live: float
    timing: Timing
    dense: str
    dense_timing: Timing
    loop_timing: Timing | None = None

    @property
    def gain(self) -> float:
        """Over the dense product: the smaller of the ratio of the best samples and the usual one within a round."""
        return min(self.dense_timing.min_s / self.timing.min_s, self.timing.ratio(self.dense_timing))


def masked(x: Array, granularity: tuple[int, int], live: float) -> Array:
    """X with `live` of its blocks of (tokens, features), the others zeros; exactly that share, from a fixed seed."""
    rows, cols = (-(-size // step) for size, step in zip(x.shape, granularity, strict=True))
    kept = np.zeros(rows * cols, bool)
    kept[np.random.default_rng(SEED).permutation(rows * cols)[: round(live * rows * cols)]] = True
    mask = kept.reshape(rows, cols).repeat(granularity[0], 0).repeat(granularity[1], 1)[: x.shape[0], : x.shape[1]]
    return np.where(mask, x, x.dtype.type(0))


def skewed(experts: int, n: int) -> Array:
    """An expert for each of n tokens, by Zipf's law: the first gets the most."""
    law = 1 / np.arange(1, experts + 1)
    return np.random.default_rng(SEED).choice(experts, n, p=law / law.sum())


def selections(
    axis: str, x: Array, rows: int, granularity: tuple[int, int], shares: Sequence[float], experts: int = 0
) -> Iterator[Selection]:
    """What is timed of an axis; of outputs `granularity` are the blocks of the mask, of features those of X."""
    rng = np.random.default_rng(SEED)
    if axis == "experts":
        yield Selection(f"{experts} experts, skewed", x, {"routing": skewed(experts, len(x))}, 1.0)
        return
    for share in shares:
        name = f"{100 * share:.3g} % live"
        if axis == "tokens":
            live = np.zeros(len(x), bool)
            live[rng.permutation(len(x))[: round(share * len(x))]] = True
            yield Selection(name, x, {"live": live}, share)
        elif axis == "features":
            yield Selection(name, masked(x, granularity, share), {}, share)
        else:
            shape = (-(-len(x) // granularity[0]), -(-rows // granularity[1]))
            mask = np.zeros(shape[0] * shape[1], bool)
            mask[rng.permutation(mask.size)[: round(share * mask.size)]] = True
            yield Selection(name, x, {"mask": mask.reshape(shape)}, share)


def compare(
    W: Array, axis: str, n: int, dtype: str = "float32", granularity: tuple[int, int] = (1, 1),
    shares: Sequence[float] = SHARES, rounds: int = 10, progress: Callable[[float], object] | None = None,
    peers: str = "",
) -> tuple[PitKernel, list[Row]]:  # fmt: skip
    """W [M, K] (experts: [E, M, K]) for n tokens, within peer_threads(1), beside the dense products whose name the
    regular expression `peers` finds.  ArithmeticError: a wrong result."""
    each = list(W) if W.ndim == 3 else [W]
    case = case_of(as_weight(each[0], blocksize=(64, 64)), "linear", n, dtype=as_dtype(dtype))
    more: dict[str, Any] = {"mask_block": granularity} if axis == "outputs" else {}
    weight = W if axis == "experts" else _as_timed(case, each[0])
    kernel = api.compile(weight, mode="pit", axis=axis, dtype=dtype, n=n, threads=1, **more)
    assert isinstance(kernel, PitKernel)
    runs, _ = prepare(case, [peer for peer in PEERS if peer.kind == "dense" and re.search(peers, peer.name)])
    calls: dict[str, Callable[[], object]] = {name: run.call for name, run in runs.items()}
    chosen = list(selections(axis, case.x, each[0].shape[0], granularity, shares, len(each)))
    out = np.zeros((n, each[0].shape[0]), kernel.out_dtype)
    for one in chosen:
        _check(kernel, one, case, each)
        calls[one.name] = lambda one=one: kernel(one.x, out=out, **case.given, **one.given)  # type: ignore[misc]
    if axis == "experts":
        calls[LOOP] = _loop(each, case, chosen[0].given["routing"])
    times = measure(calls, rounds=rounds, seconds=LIMIT_S, progress=progress)
    dense = min(runs, key=lambda name: times[name].min_s)
    loop = times.get(LOOP)
    return kernel, [Row(one.name, one.live, times[one.name], dense, times[dense], loop) for one in chosen]


def _as_timed(case: Case, W: Array) -> Array:
    """W on the grid of int8 that the peers get, or as it is."""
    return W if case.w_scale is None else case.weight.todense()


def _check(kernel: PitKernel, one: Selection, case: Case, each: Sequence[Array]) -> None:
    """The kernel's result within its bound; of many tokens, where each is computed alone, the first ones."""
    some = slice(MOST_CHECKED if kernel.artifact.manifest.as_pit.axis.name == "features" else None)  # type: ignore[union-attr]
    weight = Weight(kernel.pattern, _data(kernel, case, each))
    given = {**case.given, **one.given}
    if case.w_scale is not None:
        given |= {"w_scale": kernel._values.bound["w_scale"]}
    expected, bound = kernel.problem.reference(weight, one.x[some], given)
    check(kernel(one.x, **case.given, **one.given)[some], expected, bound, slack=1.0)


def _data(kernel: PitKernel, case: Case, each: Sequence[Array]) -> Array:
    """The values that the kernel was made of, block by block."""
    p = kernel.pattern
    W = np.concatenate([w if case.w_scale is None else np.rint(w / case.w_scale[:, None]) for w in each])
    padded = np.zeros((p.block_rows * p.R, p.block_cols * p.C), np.float32)
    padded[: p.M, : p.K] = W
    blocks = padded.reshape(p.block_rows, p.R, p.block_cols, p.C).transpose(0, 2, 1, 3)
    return blocks[p.rows, p.indices].astype(kernel.dtype)


def _loop(each: Sequence[Array], case: Case, routing: Array) -> Callable[[], object]:
    """What a model does without grouped products: gather each expert's tokens, multiply, scatter; torch where it is."""
    x, y = case.x, case.out()
    try:
        import torch
    except ImportError:
        right, groups = (
            [np.ascontiguousarray(w.T, x.dtype) for w in each],
            [np.flatnonzero(routing == e) for e in range(len(each))],
        )

        def by_numpy() -> None:
            for w, group in zip(right, groups, strict=True):
                y[group] = x[group] @ w

        return by_numpy
    tx, ty, ids = as_torch(x), as_torch(y), torch.from_numpy(routing.astype(np.int64))
    weights = [as_torch(w.astype(x.dtype)) for w in each]

    def by_torch() -> None:
        for e, w in enumerate(weights):
            group = (ids == e).nonzero()[:, 0]
            if len(group):
                ty[group] = torch.nn.functional.linear(tx[group], w)

    return by_torch
