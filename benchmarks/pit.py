"""mode="pit": tokens, features, experts and masks of outputs against the best dense product of everything.

python -m benchmarks pit                                   # a few minutes
python -m benchmarks pit --only features --out benchmarks/results
python -m benchmarks pit --only N=4096 --rounds 3 --minutes 0.8 --out benchmarks/results   # again, until all is done

A live share of 0 % is detection alone: X is looked through, W is not touched.
"""

import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from benchmarks.machine import machine
from benchmarks.points import SEED
from bsrgen.bench.clock import at_their_best, peer_threads
from bsrgen.bench.pit import Row, compare

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
        experts = f", {self.experts} experts" if self.experts else ""
        return f"{self.axis} {self.dtype} {M}x{K} N={self.n}{blocks}{experts}"

    def weight(self) -> np.ndarray:
        """Dense values; of experts all of them."""
        M, K = self.shape
        shape = (self.experts, M, K) if self.experts else (M, K)
        W = np.random.default_rng(SEED).standard_normal(shape, np.float32)
        return np.asarray(W / np.float32(np.sqrt(K)))


def points() -> Iterator[Point]:
    """The grid."""
    square = (1024, 1024)
    for dtype in ("float32", "bfloat16", "int8"):
        yield Point("tokens", square, 1024, (1, 1), TENTHS, dtype)
        yield Point("tokens", (3072, 768), 512, (1, 1), TENTHS, dtype)
    yield Point("tokens", (256, 256), 128, (1, 1), TENTHS)
    for dtype in ("float32", "bfloat16"):
        for block in ((1, 1), (1, 16)):
            yield Point("features", square, 1024, block, RELU, dtype)
    yield Point("features", square, 1024, (1, 16), RELU, "int8")
    for size in (1024, 4096):
        for block in ((32, 1), (1, 64), (32, 64)):
            yield Point("features", (size, size), size, block, (*FIG15, 0.0))
    yield Point("features", (4096, 4096), 512, (1, 16), RELU)
    yield Point("features", (4096, 4096), 1, (1, 16), RELU)
    for experts in (8, 32, 128):
        yield Point("experts", (512, 512), 2048, (1, 1), (1.0,), experts=experts)
        yield Point("experts", (512, 512), 2048, (1, 1), (1.0,), "bfloat16", experts)
    for block in ((32, 64), (1, 64)):
        yield Point("outputs", square, 1024, block, TENTHS)
    yield Point("outputs", square, 1024, (1, 64), TENTHS, "int8")


@click.command()
@click.option("--only", default="", help="Only points whose name this regular expression finds: 'features .*1x16'.")
@click.option("--rounds", type=click.IntRange(3), default=10, show_default=True)
@click.option("--peers", default="", help="Only peers whose name this regular expression finds: 'oneDNN|openvino'.")
@click.option("--minutes", type=float, default=math.inf, help="Start no point after so many.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for <date>-pit.md; points that today's file has "
              "are kept and not taken again.")  # fmt: skip
def main(only: str, rounds: int, peers: str, minutes: float, out: Path | None) -> None:
    """Time the grid on one core, a table that grows with each point."""
    at_their_best(1)
    stop_s, file = time.monotonic() + 60 * minutes, out and out / f"{machine()['date']}-pit.md"
    kept = _kept(file)
    with peer_threads(1):
        for point in points():
            if not re.search(only, str(point)) or str(point) in kept:
                continue
            if time.monotonic() > stop_s:
                click.echo("stopped, --minutes are over")
                break
            _, rows = compare(
                point.weight(), point.axis, point.n, point.dtype, point.granularity, point.shares, rounds, peers=peers
            )
            kept[str(point)] = [_line(point, row) for row in rows]
            click.echo("\n".join(kept[str(point)]))
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                lines = [line for name in map(str, points()) for line in kept.get(name, [])]
                file.write_text("\n".join([*_head(), *lines]) + "\n")


def _kept(file: Path | None) -> dict[str, list[str]]:
    """The lines of a table by their points."""
    found: dict[str, list[str]] = {}
    for line in file.read_text().splitlines() if file and file.exists() else []:
        if line.startswith("| ") and " % |" in line:
            found.setdefault(line.split("|")[1].strip(), []).append(line)
    return found


def _head() -> Iterator[str]:
    m = machine()
    yield '# mode="pit" against the best dense product of everything'
    yield ""
    yield f"`{m['command']}`; one core; {m['date']}, {m['cpu']}, {m['target']}; minima of alternating samples."
    yield "Points come from several runs of that day; over dense: the smaller of the ratio of the minima and the usual"
    yield "ratio within a round."
    yield ""
    yield "of dense: time over the dense product's; 0 % live is what looking for what is live costs."
    yield "Experts: dense is all tokens by one expert's weight,"
    yield "the loop gathers, multiplies and scatters expert by expert (torch)."
    yield ""
    yield "| what | live | us | dense us | over dense | of dense | over the loop | dense |"
    yield "|---|---:|---:|---:|---:|---:|---:|---|"


def _line(point: Point, row: Row) -> str:
    us, dense = row.timing.min_s * 1e6, row.dense_timing.min_s * 1e6
    loop = f"{row.loop_timing.min_s / row.timing.min_s:.2f}x" if row.loop_timing else ""
    times = f"{us:.0f} | {dense:.0f} | {row.gain:.2f}x | {1 / row.gain:.3f}"
    return f"| {point} | {100 * row.live:.3g} % | {times} | {loop} | {row.dense} |"
