"""Products at a block pattern and block-sparse attention beside torch's dense products: tables, of one core."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.machine import machine
from benchmarks.points import SEED
from bsrgen import api, attention
from bsrgen.bench.ceilings import Ceilings
from bsrgen.bench.clock import Timing, at_their_best, measure, peer_threads
from bsrgen.dtypes import as_dtype
from bsrgen.pattern import random_weight
from bsrgen.pattern_kernel import PatternKernel

Calls = dict[str, Callable[[], object]]
OURS, PEAK = "bsrgen", "FMA peak"
BLOCKS = ((1, 1), (4, 4), (16, 16), (32, 1), (64, 64))
LIMIT_S = 4.0  # of timing one point


@dataclass(frozen=True, slots=True)
class Row:
    """One point: what ran, its effective FLOP and compulsory bytes, and the times of one run."""

    what: str
    flop: int
    bytes: int
    plan: str
    times: dict[str, Timing]
    peak: float

    def over(self, name: str) -> str:
        """The speed-up over a contender: of best samples and of the rounds' median, the smaller."""
        ours, other = self.times[OURS], self.times[name]
        return f"{min(other.min_s / ours.min_s, ours.ratio(other)):.1f}x"


def timed(what: str, kernel: PatternKernel, n: int, arrays: list[Any], peers: Calls, ceilings: Ceilings) -> Row:
    """bsrgen, `peers` and the peak in alternation."""
    out = np.empty_like(kernel(*arrays))
    peak = ceilings.fma(as_dtype(kernel.out_dtype).short)
    calls: Calls = {OURS: lambda: kernel(*arrays, out=out), **peers, PEAK: peak.call}
    times = measure(calls, rounds=20, seconds=LIMIT_S)
    s = kernel.problem
    moved = sum(a.nbytes for a in arrays) + out.nbytes
    return Row(what, s.flop(n), moved, str(kernel.plan), times, peak.rate(times[PEAK]))


def products(ceilings: Ceilings) -> Iterator[Row]:
    """Gradients of a weight of 768 x 768, and scores of attention: rows and columns are tokens, N a head's elements."""
    points = [((768, 768), block, 0.2, n) for n, block in product((128, 4096), BLOCKS)]
    points += [((4096, 4096), block, 0.1, 64) for block in ((32, 32), (64, 64))]
    import torch

    for operator, (shape, block, density, n) in product(("sddmm", "linear_grad"), points):
        weight = random_weight(SEED, shape, block, density)
        kernel: Any = api.compile(weight, operator, threads=1)
        a, b = kernel.problem.sample(np.random.default_rng(SEED), n)
        ta, tb = (torch.from_numpy(v if operator == "sddmm" else v.T) for v in (a, b))
        dense = torch.empty(shape)
        what = f"{operator} {shape[0]}x{shape[1]} {block[0]}x{block[1]} d={density} N={n}"
        peers: Calls = {"torch, all of it": lambda x=ta, y=tb, z=dense: torch.mm(x, y.T, out=z)}  # type: ignore[misc]
        yield timed(what, kernel, n, [a, b], peers, ceilings)


def windows(ceilings: Ceilings) -> Iterator[Row]:
    """Causal sliding windows, heads of 64, beside torch's scaled_dot_product_attention with masks and without."""
    import torch

    dense = torch.nn.functional.scaled_dot_product_attention
    for tokens, size in ((4096, 512), (4096, 128), (2048, 512), (4096, 4096)):
        rule = attention.causal() & attention.sliding_window(size)
        kernel = attention.compile(tokens, 64, rule, threads=1)
        arrays = kernel.problem.sample(np.random.default_rng(SEED), 1)
        q, k, v = (torch.from_numpy(a)[None] for a in arrays)
        allowed = torch.from_numpy(rule.dense(tokens, tokens))
        added = torch.zeros(tokens, tokens).masked_fill(~allowed, -np.inf)
        error = np.abs(kernel(*arrays) - dense(q, k, v, attn_mask=allowed)[0].numpy()).max()
        assert error < 1e-5, f"{tokens} tokens: {error} from torch"
        peers: Calls = {
            "torch, mask": lambda q=q, k=k, v=v, m=allowed: dense(q, k, v, attn_mask=m),  # type: ignore[misc]
            "torch, added mask": lambda q=q, k=k, v=v, m=added: dense(q, k, v, attn_mask=m),  # type: ignore[misc]
            "torch, all causal": lambda q=q, k=k, v=v: dense(q, k, v, is_causal=True),  # type: ignore[misc]
        }
        yield timed(f"attention {tokens} tokens, window {size}", kernel, 1, arrays, peers, ceilings)


def table(rows: list[Row], peers: list[str]) -> str:
    """Markdown, one line a point.  The floor: multiply-adds of stored elements at the peak of the same rounds."""
    head = ["point", "time", "floor", "GFLOP/s", "of peak", *(f"over {peer}" for peer in peers)]
    lines = [" | ".join(head), "|".join(["---"] + ["---:"] * (len(head) - 1))]
    for row in rows:
        ours = row.times[OURS].min_s
        floor = row.flop / row.peak
        share = float(np.median(floor / np.asarray(row.times[OURS].samples)))
        cells = [row.what, f"{ours * 1e6:.0f} us", f"{floor * 1e6:.0f} us", f"{row.flop / ours / 1e9:.0f}",
                 f"{100 * share:.0f} %", *(row.over(peer) for peer in peers)]  # fmt: skip
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Folder for <date>-sampled.md.")
def main(*, out: Path | None) -> None:
    """Time the gradients of weights, scores of attention and whole attention, one core, beside torch."""
    at_their_best(1)
    ceilings, where = Ceilings(), machine()
    with peer_threads(1):
        first, second = list(products(ceilings)), list(windows(ceilings))
    low, high = (f(row.peak for row in first) / 1e9 for f in (min, max))
    text = f"""# Products at a block pattern, and block-sparse attention

{where["cpu"]}, {where["date"]}, one core, float32, all contenders in alternation in one run; FMA peak {low:.0f} to
{high:.0f} GFLOP/s. Rates are on stored elements (of attention on whole blocks, masked elements included), the floor is
their multiply-adds at the peak, shares are medians over the rounds, speed-ups the smaller of the ratio of best samples
and the median ratio. `python -m benchmarks sampled` takes it again.

{table(first, ["torch, all of it"])}

{table(second, ["torch, mask", "torch, added mask", "torch, all causal"])}
"""
    click.echo(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{where['date']}-sampled.md").write_text(text)
