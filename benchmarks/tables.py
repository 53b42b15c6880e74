"""Runs as text: a line while it is taken, markdown to keep."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.figures import Figure, Run, break_even
from benchmarks.grids import Grid
from benchmarks.points import Point

Column = tuple[str, Callable[[Figure], str]]

POINT: dict[str, Column] = {
    "kind": ("pattern", lambda f: f.point.kind),
    "shape": ("M x K", lambda f: "x".join(map(str, f.point.shape))),
    "block": ("block", lambda f: f.block),
    "density": ("density", lambda f: f"{f.point.density:.3g}"),
    "n": ("N", lambda f: str(f.point.n)),
    "threads": ("threads", lambda f: str(f.point.threads)),
}
RESULT: list[Column] = [
    ("us", lambda f: f"{f.ours.min_s * 1e6:.1f}"),
    ("in C", lambda f: f"{f.in_c_s * 1e6:.1f}"),
    ("usual us", lambda f: f"{f.ours.median_s * 1e6:.1f}"),
    ("GFLOP/s", lambda f: f"{f.rate(f.ours) * 1e-9:.1f}"),
    ("of FMA peak", lambda f: f"{f.peak.share_rounds:.0%}"),
    ("best samples", lambda f: f"{f.peak.share_best:.0%}"),
    ("of read rate", lambda f: f"{f.read.share_rounds:.0%} {f.read.name}"),
    ("over dense", lambda f: f"{f.best('dense').over:.2f}x"),
    ("best dense", lambda f: f.best("dense").name),
    ("over sparse", lambda f: f"{f.best('sparse').over:.2f}x"),
    ("best sparse", lambda f: f.best("sparse").name),
    ("plan", lambda f: f.plan),
]
TEXT = {"pattern", "M x K", "block", "of read rate", "best dense", "best sparse", "plan"}  # not right-aligned
METHOD = (
    "All contenders of a row, the FMA peak and the read rate took turns in one run.  Time and rate are the best sample "
    "of calls from Python (in C: of the C entry), shares are medians over the rounds (best samples: of those), ratios "
    "the smaller of both.  Rates are on nonzeros."
)
BOTH = ("linear", "spmm")
SIDE = 0.2  # density of the table that sets the operators side by side


def line(f: Figure) -> str:
    """One figure while a grid is taken."""
    own = f"{f.ours.min_s * 1e6:.1f} us, {f.rate(f.ours) * 1e-9:.1f} GFLOP/s, {f.peak.share_rounds:.0%} of peak"
    found = [c for c in f.contenders if c.kind in ("dynamic", "prepare")]
    found += [f.best(kind) for kind in ("dense", "sparse") if any(c.kind == kind for c in f.contenders)]
    peers = ", ".join(f"{c.over:.2f}x {c.name}" for c in found)
    return f"{f.point}: {own}, {f.read.share_rounds:.0%} of {f.read.name}; {peers}"


@dataclass(frozen=True, slots=True)
class Table:
    """A heading, column names and cells."""

    heading: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As markdown, under a heading of the second level."""
        rule = "".join("---|" if name in TEXT else "---:|" for name in self.head)
        rows = [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join([f"## {self.heading}", "", f"| {' | '.join(self.head)} |", f"|{rule}", *rows])


def markdown(run: Run, grid: Grid) -> str:
    """All figures of a run: a head, README's table where both operators were taken, one table a section."""
    rates = ", ".join(f"{what} {rate * 1e-9:.0f} G/s" for what, rate in run.ceilings.items())
    head = [f"# {grid.title}", f"Points of: {grid.source}.  {machine_line(run.machine)}", METHOD]
    parts = [*head, f"Ceilings before the first row: {rates}", *(table.markdown() for table in tables(run, grid))]
    return "\n\n".join(parts) + "\n"


def machine_line(machine: Mapping[str, Any]) -> str:
    """The head of a file in a line."""
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    caches = ", ".join(f"{name} {size >> 10} KB" for name, size in machine["caches_bytes"].items())
    return (
        f"{machine['date']}, {machine['cpu']}, {machine['target']}, usable cores: {machine['cores']}, {caches}, "
        f"{machine['compiler']}, Python {machine['python']}; {packages}.  `{machine['command']}`"
    )


def tables(run: Run, grid: Grid) -> list[Table]:
    """README's, all peers', and one for each operator, type and, along blocks, density."""
    if any(c.kind == "mlir" for f in run.figures for c in f.contenders):
        return backends(run.figures)
    if any(c.kind == "dynamic" for f in run.figures for c in f.contenders):
        return dynamics(run.figures)
    keys = ("operator", "dtype", "density") if grid.over == "block" else ("operator", "dtype")
    grouped: dict[tuple[object, ...], list[Figure]] = {}
    for f in run.figures:
        grouped.setdefault(tuple(getattr(f.point, key) for key in keys), []).append(f)
    all_peers = everyone(run.figures) if run.grid == "shapes" else []
    evens = break_evens(run.figures) if grid.over == "density" else []
    return [*side_by_side(run.figures), *evens, *all_peers, *(section(members) for members in grouped.values())]


def section(figures: Sequence[Figure]) -> Table:
    """Columns of the point that do not vary go into the heading."""
    first = figures[0]
    varies = [key for key in POINT if len({getattr(f.point, key) for f in figures}) > 1] or ["block"]
    fixed = [f"{name} {cell(first)}" for key, (name, cell) in POINT.items() if key not in varies]
    columns = [POINT[key] for key in varies] + RESULT
    rows = tuple(tuple(cell(f) for _, cell in columns) for f in figures)
    heading = f"{first.point.operator} {first.point.dtype}, {', '.join(fixed)}"
    return Table(heading, tuple(name for name, _ in columns), rows)


def side_by_side(figures: Sequence[Figure]) -> list[Table]:
    """README's table: both operators at density 0.2, a row for each block; one a type, none where more varies."""
    grouped: dict[Point, dict[str, dict[str, Figure]]] = {}
    for f in (f for f in figures if abs(f.point.density - SIDE) < 1e-9):
        rest = replace(f.point, operator="", block=(1, 1))
        grouped.setdefault(rest, {}).setdefault(f.block, {})[f.point.operator] = f
    both = {rest: {b: ops for b, ops in pairs.items() if set(BOTH) <= set(ops)} for rest, pairs in grouped.items()}
    both = {rest: found for rest, found in both.items() if found}
    if len({replace(rest, dtype="") for rest in both}) != 1:
        return []
    head = ("block", *(name for op in BOTH for name in (f"`{op}` GFLOP/s", "over dense", "over sparse")))
    return [
        Table(
            f"Both operators, density {SIDE}" + (f", {rest.dtype}" if len(both) > 1 else ""),
            head,
            tuple((block, *(cell for op in BOTH for cell in _cells(ops[op]))) for block, ops in found.items()),
        )
        for rest, found in both.items()
    ]


def backends(figures: Sequence[Figure]) -> list[Table]:
    """C, MLIR and the stock sparsifier: rates, and shares of the FMA peak, medians over the rounds; one an operator."""
    kinds = {"C": "bsrgen", "MLIR": "mlir", "stock": "stock"}
    made = []
    for operator in dict.fromkeys(f.point.operator for f in figures):
        rows = []
        for f in (f for f in figures if f.point.operator == operator):
            chosen = {name: next((c for c in f.contenders if c.kind == kind), None) for name, kind in kinds.items()}
            cells = [(f"{f.rate(c) * 1e-9:.0f}", f"{f.peak.share_rounds / c.over_rounds:.0%}") if c else ("-", "-")
                     for c in chosen.values()]  # fmt: skip
            peak = f"{f.peak.rate * 1e-9:.0f}"
            rows.append((f.block, *(rate for rate, _ in cells), *(share for _, share in cells), peak))
        head = ("block", *(f"{name} GFLOP/s" for name in kinds), *(f"{name} of peak" for name in kinds), "FMA peak")
        p = figures[0].point
        heading = f"{operator} {p.dtype}, {p.shape[0]} x {p.shape[1]}, density {p.density:.3g}, N = {p.n}"
        made.append(Table(heading, head, tuple(rows)))
    return made


def dynamics(figures: Sequence[Figure]) -> list[Table]:
    """The static kernel, the dynamic call on the same pattern, and preparing it; one an operator, type and N."""
    grouped: dict[str, list[Figure]] = {}
    for f in figures:
        grouped.setdefault(f"{f.point.operator} {f.point.dtype}, N = {f.point.n}", []).append(f)
    head = ("M x K", "block", "density", "static us", "dynamic us", "dynamic / static", "prepare us", "prepare / dense",
            "dense us", "dense / dynamic", "best dense")  # fmt: skip
    return [Table(heading, head, tuple(_dynamic_row(f) for f in members)) for heading, members in grouped.items()]


def _dynamic_row(f: Figure) -> tuple[str, ...]:
    """Ratios to the static kernel: the larger of that of the best samples and the median within a round."""
    call, prepare = (next(c for c in f.contenders if c.kind == kind) for kind in ("dynamic", "prepare"))
    dense = min((c for c in f.contenders if c.kind == "dense"), key=lambda c: c.min_s, default=None)
    ratio = max(call.min_s / f.ours.min_s, call.over_rounds)
    static, dynamic, made = (f"{seconds * 1e6:.1f}" for seconds in (f.ours.min_s, call.min_s, prepare.min_s))
    cells = ("-", "-", "-", "none was timed")
    if dense:
        shares = f"{prepare.min_s / dense.min_s:.2f}", f"{dense.min_s * 1e6:.1f}", f"{dense.min_s / call.min_s:.2f}x"
        cells = (*shares, dense.name)
    return (POINT["shape"][1](f), f.block, f"{f.point.density:.3g}", static, dynamic, f"{ratio:.2f}", made, *cells)


def break_evens(figures: Sequence[Figure]) -> list[Table]:
    """Density at which the best dense of the same type is as fast, by block; for lines of at least three densities."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for f in figures:
        p = f.point
        where = f"{p.operator} {p.dtype} {p.shape[0]}x{p.shape[1]} N={p.n}"
        where += f" {p.kind}" if p.kind != "uniform" else ""
        where += f" {p.threads} threads" if p.threads > 1 else ""
        lines.setdefault(where, {}).setdefault(f.block, []).append((p.density, f.best("dense").over))
    lines = {where: kept for where, all_ in lines.items() if (kept := {b: v for b, v in all_.items() if len(v) > 2})}
    if not lines:
        return []
    names = dict.fromkeys(block for kept in lines.values() for block in kept)
    rows = tuple((block, *(_even(kept.get(block)) for kept in lines.values())) for block in names)
    return [Table("Break-even density against the best dense of the same type", ("block", *lines), rows)]


def _even(line: list[tuple[float, float]] | None) -> str:
    """The density, or beyond which one of those timed it must lie."""
    if line is None:
        return "-"
    if (even := break_even(line)) is not None:
        return f"{even:.2g}"
    densities, faster = [density for density, _ in line], all(gain >= 1 for _, gain in line)
    return f"> {max(densities):.2g}" if faster else f"< {min(densities):.2g}"


def everyone(figures: Sequence[Figure]) -> list[Table]:
    """Rates of all contenders on `linear` at density 0.2, where block shapes vary."""
    chosen = [f for f in figures if f.point.operator == "linear" and abs(f.point.density - SIDE) < 1e-9]
    if len(chosen) < 2:
        return []
    names = list(dict.fromkeys(c.name for f in chosen for c in f.contenders))
    rates = [{c.name: f"{f.rate(c) * 1e-9:.1f}" for c in f.contenders} for f in chosen]
    rows = tuple(
        (f.block, *(rate.get(name, "-") for name in names), f"{f.peak.rate * 1e-9:.0f}")
        for f, rate in zip(chosen, rates, strict=True)
    )
    return [Table(f"Every contender, linear, density {SIDE}: GFLOP/s", ("block", *names, "FMA peak"), rows)]


def _cells(f: Figure) -> tuple[str, str, str]:
    return f"{f.rate(f.ours) * 1e-9:.0f}", f"{f.best('dense').over:.2f}x", f"{f.best('sparse').over:.2f}x"
