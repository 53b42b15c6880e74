"""Runs as text: a line while it is taken, markdown to keep."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks.figures import Figure, Run

ALWAYS = ("operator", "dtype")  # what a section never mixes
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
    "All contenders of a row, the FMA peak and the read rate took turns in one run.  Time and rate are the best "
    "sample, shares are medians over the rounds (and of the best samples), ratios the smaller of both.  Rates are on nonzeros."
)
BOTH = ("linear", "spmm")
SIDE = 0.2  # density of the table that sets the operators side by side


def line(f: Figure) -> str:
    """One figure while a grid is taken."""
    dense, sparse = f.best("dense"), f.best("sparse")
    own = f"{f.ours.min_s * 1e6:.1f} us, {f.rate(f.ours) * 1e-9:.1f} GFLOP/s, {f.peak.share_rounds:.0%} of peak"
    peers = f"{dense.over:.2f}x {dense.name}, {sparse.over:.2f}x {sparse.name}"
    return f"{f.point}: {own}, {f.read.share_rounds:.0%} of {f.read.name}; {peers}"


def markdown(run: Run, title: str, source: str, over: str) -> str:
    """All figures of a run: a head, README's table where both operators were taken, one table a section."""
    m = run.machine
    packages = ", ".join(f"{name} {version}" for name, version in m["packages"].items())
    caches = ", ".join(f"{name} {size >> 10} KB" for name, size in m["caches_bytes"].items())
    rates = run.ceilings.items()
    head = [
        f"# {title}",
        f"Points of: {source}.  {m['date']}, {m['cpu']}, {m['cores']} cores, {m['target']}, {caches}, "
        f"{m['compiler']}, Python {m['python']}; {packages}.  `{m['command']}`",
        METHOD,
        "Ceilings before the first row: " + ", ".join(f"{what} {rate * 1e-9:.0f} G/s" for what, rate in rates),
    ]
    parts = ["\n\n".join(head), side_by_side(run.figures), *sections(run.figures, over)]
    return "\n\n".join(part for part in parts if part) + "\n"


def sections(figures: Sequence[Figure], over: str) -> list[str]:
    """A table for each operator, type and, along blocks, density; constants in its heading."""
    keys = (*ALWAYS, "density") if over == "block" else ALWAYS
    grouped: dict[tuple[object, ...], list[Figure]] = {}
    for f in figures:
        grouped.setdefault(tuple(getattr(f.point, key) for key in keys), []).append(f)
    return [section(members) for members in grouped.values()]


def section(figures: Sequence[Figure]) -> str:
    """One table; columns of the point that do not vary go into the heading."""
    first = figures[0]
    varies = [key for key in POINT if len({getattr(f.point, key) for f in figures}) > 1] or ["block"]
    fixed = [f"{name} {cell(first)}" for key, (name, cell) in POINT.items() if key not in varies]
    columns = [POINT[key] for key in varies] + RESULT
    return f"## {first.point.operator} {first.point.dtype}, {', '.join(fixed)}\n\n" + table(
        [name for name, _ in columns], [[cell(f) for _, cell in columns] for f in figures]
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    rule = "".join("---|" if name in TEXT else "---:|" for name in head)
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}", *(f"| {' | '.join(row)} |" for row in rows)])


def side_by_side(figures: Sequence[Figure]) -> str:
    """README's table: both operators at density 0.2, a row for each block; empty where not both were taken."""
    pairs: dict[str, dict[str, Figure]] = {}
    for f in (f for f in figures if abs(f.point.density - SIDE) < 1e-9):
        pairs.setdefault(f.block, {})[f.point.operator] = f
    both = {block: found for block, found in pairs.items() if set(BOTH) <= set(found)}
    rest = {replace(f.point, operator="", block=(1, 1)) for found in both.values() for f in found.values()}
    if len(rest) != 1:
        return ""
    head = ["block", *(name for op in BOTH for name in (f"`{op}` GFLOP/s", "over dense", "over sparse"))]
    rows = [[block, *(cell for op in BOTH for cell in cells(found[op]))] for block, found in both.items()]
    return f"## Both operators, density {SIDE}\n\n" + table(head, rows)


def cells(f: Figure) -> list[str]:
    """Rate and both ratios."""
    return [f"{f.rate(f.ours) * 1e-9:.0f}", f"{f.best('dense').over:.2f}x", f"{f.best('sparse').over:.2f}x"]
