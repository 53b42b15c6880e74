"""mode="pit": tokens, features, experts and masks of outputs against the best dense product of everything.

python -m benchmarks pit                                   # a few minutes
python -m benchmarks pit --only features --out benchmarks/results
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from benchmarks.machine import machine
from benchmarks.points import SEED
from bsrgen.bench.clock import at_their_best, peer_threads
from bsrgen.bench.pit import Row, compare
from bsrgen.pit import AXES

FIG15 = (0.5, 0.1, 0.05, 0.01)  # live shares of PIT's figure 15 (Zheng et al., SOSP 2023)
TENTHS = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1)
RELU = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.01)


@dataclass(frozen=True, slots=True)
class Point:
    """One weight, an axis, and the selections that are timed."""

    axis: str
    shape: tuple[int, int]
    n: int
    granularity: tuple[int, int]
    shares: Sequence[float]
    dtype: str = "float32"
    experts: int = 0

    def __str__(self) -> str:
        (M, K), (a, b) = self.shape, self.granularity
        blocks = f", {a}x{b}" if self.axis in ("features", "outputs") else ""
        return f"{self.axis} {self.dtype} {M}x{K} N={self.n}{blocks}"

    def weight(self) -> np.ndarray:
        """Dense values; of experts all of them."""
        M, K = self.shape
        shape = (self.experts, M, K) if self.experts else (M, K)
        W = np.random.default_rng(SEED).standard_normal(shape, np.float32)
        return np.asarray(W / np.float32(np.sqrt(K)))


def points() -> Iterator[Point]:
    """The grid."""
    square = (1024, 1024)
    for dtype in ("float32", "bfloat16"):
        yield Point("tokens", square, 1024, (1, 1), TENTHS, dtype)
        yield Point("tokens", (3072, 768), 512, (1, 1), TENTHS, dtype)
    for dtype in ("float32", "bfloat16"):
        for block in ((1, 1), (1, 16)):
            yield Point("features", square, 1024, block, RELU, dtype)
    for block in ((32, 1), (1, 64), (32, 64)):
        yield Point("features", square, 1024, block, FIG15)
    yield Point("features", (4096, 4096), 512, (1, 16), RELU)
    yield Point("features", (4096, 4096), 1, (1, 16), RELU)
    for experts in (8, 32, 128):
        yield Point("experts", (512, 512), 2048, (1, 1), (1.0,), experts=experts)
        yield Point("experts", (512, 512), 2048, (1, 1), (1.0,), "bfloat16", experts)
    for block in ((32, 64), (1, 64)):
        yield Point("outputs", square, 1024, block, TENTHS)


@click.command()
@click.option("--only", type=click.Choice(tuple(AXES)), help="One axis.")
@click.option("--rounds", type=click.IntRange(3), default=10, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for <date>-pit.md.")
def main(only: str | None, rounds: int, out: Path | None) -> None:
    """Time the grid on one core and write one table."""
    at_their_best(1)
    lines = [*_head()]
    with peer_threads(1):
        for point in points():
            if only in (None, point.axis):
                _, rows = compare(
                    point.weight(), point.axis, point.n, point.dtype, point.granularity, point.shares, rounds
                )
                lines += (said := [_line(point, row) for row in rows])
                click.echo("\n".join(said))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{machine()['date']}-pit.md").write_text("\n".join(lines) + "\n")


def _head() -> Iterator[str]:
    m = machine()
    yield '# mode="pit" against the best dense product of everything'
    yield ""
    yield f"`{m['command']}`; one core; {m['date']}, {m['cpu']}, {m['target']}; minima of alternating samples."
    yield ""
    yield "of dense: time over the dense product's.  Experts: dense is all tokens by one expert's weight,"
    yield "the loop gathers, multiplies and scatters expert by expert (torch)."
    yield ""
    yield "| what | live | us | dense us | over dense | of dense | over the loop | dense |"
    yield "|---|---:|---:|---:|---:|---:|---:|---|"


def _line(point: Point, row: Row) -> str:
    us, dense = row.timing.min_s * 1e6, row.dense_timing.min_s * 1e6
    loop = f"{row.loop_timing.min_s / row.timing.min_s:.2f}x" if row.loop_timing else ""
    name = f"{point}, {point.experts} experts" if point.experts else str(point)
    times = f"{us:.0f} | {dense:.0f} | {row.gain:.2f}x | {us / dense:.3f}"
    return f"| {name} | {100 * row.live:.3g} % | {times} | {loop} | {row.dense} |"
