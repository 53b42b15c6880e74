"""The figures that README quotes: every block shape against every installed peer, ceilings in the same run, one core.

    python -m benchmarks.grid                    # 768x768, N = 128, density 0.2 and 0.1, both operators
    python -m benchmarks.grid --dtype float64 --tune model --block 32x1 --block 4x4

Prints one table an operator and density and, with --out, writes the same as JSON and markdown.
"""

import json
import platform
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import click

from bsrgen import api
from bsrgen.bench.case import Case, random_case
from bsrgen.bench.ceilings import Ceilings
from bsrgen.bench.clock import at_their_best, measure, peer_threads
from bsrgen.bench.peers import PEERS, SHAPES, kernel_run, prepare

HEAD = "| block | us | GFLOP/s | of FMA peak | over dense | best dense | over sparse | best sparse | plan |"


@dataclass(frozen=True, slots=True)
class Figure:
    """One kernel in one run: rates on nonzeros, ratios as medians over the rounds."""

    operator: str
    dtype: str
    shape: tuple[int, int]
    block: str
    density: float
    n: int
    seconds: float
    gflops: float
    share_of_peak: float
    over_dense: float
    best_dense: str
    over_sparse: float
    best_sparse: str
    plan: str

    def row(self) -> str:
        """A line of the markdown table."""
        return (
            f"| {self.block} | {self.seconds * 1e6:.1f} | {self.gflops:.1f} | {self.share_of_peak:.0%} "
            f"| {self.over_dense:.2f}x | {self.best_dense} | {self.over_sparse:.2f}x | {self.best_sparse} "
            f"| {self.plan} |"
        )


def figure(case: Case, density: float, tune: str, rounds: int, ceilings: Ceilings) -> Figure:
    """Time bsrgen, every peer that takes the case, and the FMA peak in turn."""
    kernel = api.compile(case.weight, case.operator, dtype=case.x.dtype, n=case.n, threads=1, tune=tune)
    kinds = {peer.name: peer.kind for peer in PEERS}
    runs, _ = prepare(case, [peer for peer in PEERS if peer.kind != "bsrgen"])
    peak = ceilings.fma("f32" if case.x.dtype.itemsize == 4 else "f64")
    calls = {name: run.call for name, run in runs.items()}
    calls |= {"peak": peak.call, "bsrgen": kernel_run(kernel, case).call}
    times = measure(calls, rounds=rounds)
    ours = times["bsrgen"]
    best = {
        kind: min((name for name in runs if kinds[name] == kind), key=lambda name: times[name].min_s)
        for kind in ("dense", "sparse")
    }
    p = case.weight.pattern
    return Figure(
        case.operator, case.x.dtype.name, p.shape, f"{p.R}x{p.C}", density, case.n, ours.min_s,
        case.nonzero_flop / ours.min_s * 1e-9, peak.share(times["peak"], ours, case.nonzero_flop),
        ours.ratio(times[best["dense"]]), best["dense"], ours.ratio(times[best["sparse"]]), best["sparse"],
        str(kernel.plan),
    )  # fmt: skip


@click.command()
@click.option("--operator", multiple=True, default=("linear", "spmm"), show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--density", type=float, multiple=True, default=(0.2, 0.1), show_default=True)
@click.option("--shape", type=(int, int), default=(768, 768), show_default=True, help="M K")
@click.option("--n", type=int, multiple=True, default=(128,), show_default=True)
@click.option("--block", multiple=True, default=tuple(SHAPES.split()), show_default=True)
@click.option("--tune", type=click.Choice(["off", "model", "measure"]), default="measure", show_default=True)
@click.option("--rounds", type=int, default=30, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="folder for <date>-grid.json and .md")
def main(
    operator: tuple[str, ...], dtype: str, density: tuple[float, ...], shape: tuple[int, int], n: tuple[int, ...],
    block: tuple[str, ...], tune: str, rounds: int, out: Path | None,
) -> None:  # fmt: skip
    """Print share of FMA peak and speed-up over the best dense and sparse peer for each block shape."""
    at_their_best()
    ceilings = Ceilings()
    figures: list[Figure] = []
    lines = [f"{date.today()}, {platform.machine()}, one core, tune={tune}, {rounds} rounds in alternation"]
    click.echo(lines[0])
    with peer_threads(1):
        for op in operator:
            for d in density:
                for tokens in n:
                    title = f"\n{op} {dtype} {shape[0]}x{shape[1]}, N = {tokens}, density {d}\n\n{HEAD}\n"
                    lines.append(title + "|---|" + "---:|" * 4 + "---|---:|---|---|")
                    click.echo(lines[-1])
                    for name in block:
                        R, C = (int(size) for size in name.split("x"))
                        case = random_case(op, shape, (R, C), d, tokens, dtype)
                        figures.append(figure(case, d, tune, rounds, ceilings))
                        lines.append(figures[-1].row())
                        click.echo(lines[-1])
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{date.today()}-grid.json").write_text(json.dumps([asdict(f) for f in figures], indent=1) + "\n")
        (out / f"{date.today()}-grid.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
