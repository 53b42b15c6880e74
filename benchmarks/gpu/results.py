"""What a run on a GPU keeps: a JSON file that is written anew after each point and taken up again, and its tables."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.points import Point

SCHEMA = "bsrgen-gpu-benchmarks 1"
OURS, DENSE, TUNED = "bsrgen", "torch dense", "torch bsr, tuned"
Times = dict[str, float]  # min_s, median_s, rounds


@dataclass(frozen=True)
class Line:
    """One contender at one point.  hot: operands as the caches keep them; cold: L2 overwritten before each call."""

    name: str
    kind: str
    hot: Times
    cold: Times
    how: str  # graph or launches
    error: float  # |y - reference| / |reference| over sampled tokens
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """One point; `absent` says why a contender was not timed."""

    grid: str
    point: Point
    nnz: int
    moved_bytes: int  # stored values, X and Y once
    lines: tuple[Line, ...]
    absent: dict[str, str]

    def seconds(self, name: str, way: str = "hot") -> float | None:
        """Median seconds of a contender."""
        return next((getattr(line, way)["median_s"] for line in self.lines if line.name == name), None)

    def over(self, name: str, way: str = "hot") -> float | None:
        """How many times faster ours is."""
        ours, other = self.seconds(OURS, way), self.seconds(name, way)
        return other / ours if ours and other else None

    @property
    def efficiency(self) -> float | None:
        """Rate per nonzero as a share of the dense product's rate on the same shape, in the same run."""
        over = self.over(DENSE)
        return over and over * self.nnz / (self.point.shape[0] * self.point.shape[1])

    def best_sparse(self) -> tuple[str, float] | None:
        """The fastest sparse peer, and how many times faster ours is."""
        rows = [(line.name, over) for line in self.lines if line.kind == "sparse" and (over := self.over(line.name))]
        return min(rows, key=lambda row: row[1], default=None)


@dataclass
class Results:
    """A file of results: what was measured on, its ceilings, the points so far."""

    facts: dict[str, Any]
    ceilings: dict[str, float] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    @property
    def done(self) -> set[Point]:
        """Points that are there."""
        return {figure.point for figure in self.figures}

    def save(self, folder: Path) -> None:
        """gpu.json and gpu.md, by rename: a run may be killed at any moment."""
        folder.mkdir(parents=True, exist_ok=True)
        document = {"schema": SCHEMA, "facts": self.facts, "commands": self.commands, "ceilings": self.ceilings,
                    "figures": [asdict(figure) for figure in self.figures]}  # fmt: skip
        for name, text in (("gpu.json", json.dumps(document, indent=1) + "\n"), ("gpu.md", markdown(self))):
            (folder / f"{name}.tmp").write_text(text)
            (folder / f"{name}.tmp").replace(folder / name)


def load(folder: Path) -> Results | None:
    """What a former call left there; None where nothing.  ValueError for a file of another kind."""
    try:
        document = json.loads((folder / "gpu.json").read_text())
    except FileNotFoundError:
        return None
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{folder / 'gpu.json'}: not of this version, {SCHEMA}")
    figures = [_figure(row) for row in document["figures"]]
    return Results(document["facts"], document["ceilings"], figures, document["commands"])


def _figure(row: dict[str, Any]) -> Figure:
    point = row["point"] | {"shape": tuple(row["point"]["shape"]), "block": tuple(row["point"]["block"])}
    lines = tuple(Line(**line) for line in row["lines"])
    return Figure(row["grid"], Point(**point), row["nnz"], row["moved_bytes"], lines, row["absent"])


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def markdown(results: Results) -> str:
    """All of it: head, ceilings, the goals, a table for each grid, who was absent and why."""
    facts = results.facts
    head = [f"# {facts['device']}, {facts['date']}", ""]
    head += [f"- {name}: {value}" for name, value in facts.items() if name not in ("device", "date")]
    head += [f"- `{command}`" for command in results.commands]
    ceilings = ["", "## Ceilings", "", "| what | measured |", "|---|---:|"]
    ceilings += [f"| {name} | {_rate(name, value)} |" for name, value in results.ceilings.items()]
    tables: list[str] = []
    for grid in dict.fromkeys(figure.grid for figure in results.figures):
        tables += ["", f"## {grid}", "", *_table(results, grid)]
    return "\n".join([*head, *ceilings, "", "## Goals", "", *goals(results), *tables, *_absent(results)]) + "\n"


def _rate(name: str, value: float) -> str:
    return f"{value * 1e-9:.0f} GB/s" if name.startswith(("copy", "L2")) else f"{value * 1e-12:.1f} TFLOP/s"


def _table(results: Results, grid: str) -> Iterator[str]:
    yield ("| point | hot us | cold us | TFLOP/s per nonzero | of dense per nonzero | over dense | over tuned BSR | "
           "over the best sparse | of copy, cold |")  # fmt: skip
    yield "|---|" + "---:|" * 8
    copy = results.ceilings.get("copy")
    for figure in results.figures:
        ours, cold = figure.seconds(OURS), figure.seconds(OURS, "cold")
        if figure.grid != grid or not ours or not cold:
            continue
        best, moved = figure.best_sparse(), copy and figure.moved_bytes / cold / copy
        cells = [
            f"{ours * 1e6:.1f}", f"{cold * 1e6:.1f}", f"{2e-12 * figure.nnz * figure.point.n / ours:.2f}",
            _cell(figure.efficiency, "{:.0%}"), _cell(figure.over(DENSE), "{:.2f}x"),
            _cell(figure.over(TUNED), "{:.2f}x"), f"{best[1]:.2f}x ({best[0]})" if best else "", _cell(moved, "{:.0%}"),
        ]  # fmt: skip
        yield f"| {figure.point} | {' | '.join(cells)} |"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def goals(results: Results) -> list[str]:
    """What the kernels are to show, counted over the points that are there."""
    copy = results.ceilings.get("copy")
    squares, streams, beaten = [], [], []
    for f in results.figures:
        p, cold = f.point, f.seconds(OURS, "cold")
        if p.block in ((64, 64), (32, 32)) and p.n >= 1024 and 0.1 <= p.density <= 0.5 and f.efficiency:
            squares.append(f.efficiency >= 0.6)
        if p.n == 1 and f.nnz * (2 if p.dtype != "float32" else 4) >= 64e6 and copy and cold:
            streams.append(f.moved_bytes / cold / copy >= 0.75)
        if over := f.over(TUNED):
            beaten.append(over > 1)
    rows = (
        ("64x64 and 32x32, density 0.1 to 0.5, N >= 1024: at least 60 % of torch's dense rate per nonzero", squares),
        ("N = 1, 64 MB of nonzeros or more: at least 75 % of the copy rate, cold", streams),
        ("faster than torch's tuned BSR product", beaten),
    )
    return [f"- {what}: {sum(met)} of {len(met)} points" for what, met in rows]


def _absent(results: Results) -> list[str]:
    reasons: dict[tuple[str, str], int] = {}
    for figure in results.figures:
        for name, why in figure.absent.items():
            reasons[name, why] = reasons.get((name, why), 0) + 1
    rows = [f"- {name}: {why} ({count} points)" for (name, why), count in sorted(reasons.items())]
    return ["", "## Not timed", "", *rows] if rows else []
