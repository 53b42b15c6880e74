"""What a run keeps: one Figure a point, all of them in a Run, which is the JSON file."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.points import Point
from bsrgen.bench.clock import Timing

SCHEMA, VERSION = "bsrgen-benchmarks", 1


@dataclass(frozen=True, slots=True)
class Contender:
    """One way of computing the product; `over_*` is how many times faster bsrgen is."""

    name: str
    kind: str  # bsrgen, dense, sparse; mlir, stock: of the grid "mlir"
    min_s: float
    median_s: float
    samples: int
    over_best: float  # ratio of the best samples
    over_rounds: float  # median over the rounds of the ratios of samples taken side by side

    @property
    def over(self) -> float:
        """What is claimed: the smaller ratio."""
        return min(self.over_best, self.over_rounds)


@dataclass(frozen=True, slots=True)
class Limit:
    """A ceiling of this core, measured in the rounds of the point, and bsrgen's share of it."""

    name: str
    row: str  # of bsrgen_ceilings.c
    rate: float  # flop/s or bytes/s, best sample
    share_best: float
    share_rounds: float


@dataclass(frozen=True, slots=True)
class Figure:
    """One point.  Rates are on nonzeros: 2 * stored elements * N flop."""

    grid: str
    point: Point
    nnz: int
    weight_bytes: int  # values as packed, zero fill included
    moved_bytes: int  # compulsory: stored values, X and Y once
    plan: str
    verdict: str
    predicted_s: float
    contenders: tuple[Contender, ...]  # bsrgen first, as Python calls it
    absent: dict[str, str]
    peak: Limit
    read: Limit

    @property
    def ours(self) -> Contender:
        """bsrgen."""
        return self.contenders[0]

    @property
    def in_c_s(self) -> float:
        """Seconds of bsrgen's C entry, without Python's checks."""
        return min(c.min_s for c in self.contenders if c.kind == "bsrgen")

    def best(self, kind: str) -> Contender:
        """The peer of that kind over which least can be claimed."""
        return min((c for c in self.contenders if c.kind == kind), key=lambda c: c.over)

    def rate(self, contender: Contender) -> float:
        """flop/s on nonzeros, best sample."""
        return 2 * self.nnz * self.point.n / contender.min_s

    @property
    def intensity(self) -> float:
        """flop on nonzeros per compulsory byte."""
        return 2 * self.nnz * self.point.n / self.moved_bytes

    @property
    def block(self) -> str:
        """R x C."""
        return "x".join(map(str, self.point.block))


@dataclass(frozen=True, slots=True)
class Run:
    """The file of one grid."""

    grid: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    ceilings: dict[str, float]  # flop/s and bytes/s of this core, all in alternation, before the first point
    figures: tuple[Figure, ...]
    schema: str = SCHEMA
    version: int = VERSION


def contenders(kinds: dict[str, str], times: dict[str, Timing], ours: str = "bsrgen") -> tuple[Contender, ...]:
    """bsrgen, then the others, fastest first."""
    mine = times[ours]
    rows = [
        Contender(name, kind, t.min_s, t.median_s, len(t.samples), t.min_s / mine.min_s, mine.ratio(t))
        for name, kind in kinds.items()
        if (t := times[name])
    ]
    return tuple(sorted(rows, key=lambda row: (row.name != ours, row.min_s)))


def save(run: Run, path: Path) -> None:
    """Write the file, all of it anew."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(run), indent=1) + b"\n")


def load(path: Path) -> Run:
    """Read a file that `save` wrote.  ValueError for any other."""
    try:
        run = msgspec.json.decode(path.read_bytes(), type=Run)
    except msgspec.DecodeError as e:
        raise ValueError(f"{path.name}: not a file of python -m benchmarks: {e}") from e
    if (run.schema, run.version) != (SCHEMA, VERSION):
        raise ValueError(f"{path.name}: schema {run.schema} {run.version}, this version reads {SCHEMA} {VERSION}")
    return run


def merged(runs: Iterable[Run]) -> Run:
    """Parts of one grid, taken by several processes, as one run: the head of the first."""
    first, *rest = runs
    figures = first.figures + tuple(figure for run in rest for figure in run.figures)
    return replace(first, figures=figures)


def break_even(line: Sequence[tuple[float, float]]) -> float | None:
    """The density at which a speed-up falls through 1, between the points in logarithms; None where it does not."""
    line = sorted(line)
    for (d0, g0), (d1, g1) in itertools.pairwise(line):
        if g0 >= 1 > g1:
            t = math.log(g0) / math.log(g0 / g1)
            return math.exp((1 - t) * math.log(d0) + t * math.log(d1))
    return None
