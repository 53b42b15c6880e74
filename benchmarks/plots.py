"""The plots of a run, one function a kind."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.figures import Contender, Figure, Run, break_even
from benchmarks.style import HUES, KIND, Plot, Theme, say, spread, ticks
from bsrgen.bench.peers import SHAPES

PANELS, COLUMNS = 6, 3
BAR_PANELS = 10
ROUND = [digit * 10.0**power for power in range(-4, 7) for digit in (1, 2, 5)]
Label = tuple[float, float, str]  # x, y, colour


def plots(run: Run, over: str) -> Iterator[Plot]:
    """The pictures that say something about a run: the roofline, and one along what the grid varies."""
    if not run.figures:
        return
    rows = {"density": _gains, "block": _bars, "n": _sweep, "nnz": _cloud}
    yield from rows[over](run)
    yield Plot(
        f"{run.grid}-roofline",
        "Roofline: rate on nonzeros over flop per compulsory byte, with the ceilings of this core measured in the run.",
        lambda canvas, theme: roofline(run, canvas, theme),
        (8, 4.6),
    )


# ── roofline ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def roofline(run: Run, canvas: Any, theme: Theme) -> None:
    """bsrgen and its best peers under the peak and the read rates; log-log."""
    axes = canvas.add_subplot()
    wide = [f.intensity for f in run.figures]
    lo, hi = min(wide) / 2, max(wide) * 2
    rates = {name.removeprefix("read "): rate for name, rate in run.ceilings.items() if name.startswith("read")}
    peaks = {n.removeprefix("fma reg "): rate for n, rate in run.ceilings.items() if n.startswith("fma reg")}
    peak = max(peaks.values())
    low = min(f.rate(c) for f in run.figures for c in _three(f)) * 1e-9
    for level, rate in rates.items():
        ridge = min(max(peak / rate, lo), hi)
        axes.plot([lo, ridge], [lo * rate * 1e-9, ridge * rate * 1e-9], color=theme.ink, lw=0.8, alpha=0.6)
        at = max(lo * 1.1, 1.5 * low * 1e9 / rate)
        if 2 * at < ridge:
            slope = math.degrees(math.atan(rate * 1e-9))
            say(axes, at, at * rate * 1e-9 * 1.06, f"{level} {rate * 1e-9:.0f} GB/s", theme, va="bottom",
                 rotation=slope, rotation_mode="anchor", transform_rotates_text=True)  # fmt: skip
    for dtype, rate in peaks.items():
        axes.plot([lo, hi], [rate * 1e-9] * 2, color=theme.ink, lw=1.1)
        say(axes, hi, rate * 1e-9, f"{dtype} FMA peak {rate * 1e-9:.0f} GFLOP/s", theme, ha="right", va="bottom")
    for kind, colour in reversed(KIND.items()):
        points = [(f.intensity, f.rate(c) * 1e-9) for f in run.figures for c in _three(f) if c.kind == kind]
        own = kind == "bsrgen"
        axes.scatter(*zip(*points, strict=True), s=26 if own else 14, color=colour, lw=0, alpha=0.95 if own else 0.6,
                     label="bsrgen" if own else f"best {kind} peer", zorder=3 if own else 2)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(lo, hi), ylim=(low / 1.5, peak * 2e-9))
    ticks(axes.xaxis, ROUND, "{:g}", most=12)
    ticks(axes.yaxis, ROUND, "{:g}", most=12)
    axes.set(xlabel="flop on nonzeros per compulsory byte", ylabel="GFLOP/s on nonzeros")
    axes.legend(frameon=False, loc="lower right", handletextpad=0.2)


def _three(f: Figure) -> tuple[Contender, Contender, Contender]:
    return f.ours, f.best("dense"), f.best("sparse")


# ── small multiples ──────────────────────────────────────────────────────────────────────────────────────────────────


def _groups(run: Run, without: Iterable[str], most: int = PANELS) -> dict[str, list[Figure]]:
    """Figures that differ only in the fields `without`, by what they share; the `most` largest of them, in order."""
    names = [name for name in ("operator", "dtype", "kind", "shape", "density", "n", "threads") if name not in without]
    varied = [name for name in names if len({getattr(f.point, name) for f in run.figures}) > 1]
    groups: dict[str, list[Figure]] = {}
    for f in run.figures:
        groups.setdefault(", ".join(_word(f, name) for name in varied), []).append(f)
    largest = sorted(groups, key=lambda name: -len(groups[name]))[:most]
    return {name: members for name, members in groups.items() if name in largest}


def _word(f: Figure, name: str) -> str:
    value = getattr(f.point, name)
    words = {
        "shape": "x".join(map(str, f.point.shape)),
        "density": f"density {f.point.density:.3g}",
        "n": f"N = {value}",
    }
    return words.get(name, f"{value} threads" if name == "threads" else str(value))


def _panels(canvas: Any, count: int, **how: Any) -> list[Any]:
    columns = min(count, COLUMNS)
    axes = canvas.subplots(-(-count // columns), columns, squeeze=False, sharex=True, sharey=True, **how)
    flat = list(axes.flat)
    for spare in flat[count:]:
        spare.set_visible(False)
    return flat[:count]


def _size(count: int) -> tuple[float, float]:
    columns = min(count, COLUMNS)
    return (2.2 + 3.0 * columns, 0.5 + 2.9 * -(-count // columns)) if count > 1 else (7.0, 4.2)


def _hues(run: Run) -> dict[str, str]:
    """A colour for each block shape, the same in all plots of a run."""
    order = {name: place for place, name in enumerate(SHAPES.split())}
    names = sorted({f.block for f in run.figures}, key=lambda name: order.get(name, len(order)))
    return {name: HUES[place % len(HUES)] for place, name in enumerate(names)}


def _lines(axes: Any, members: Sequence[Figure], x: str, y: Callable[[Figure], float], run: Run) -> dict[str, Label]:
    """A line for each block shape, and where its name belongs: at its end."""
    hues, ends = _hues(run), {}
    for block, hue in hues.items():
        line = sorted((getattr(f.point, x), y(f)) for f in members if f.block == block)
        if line:
            axes.plot(*zip(*line, strict=True), color=hue, lw=1.8, marker="o", ms=3.5, mew=0)
            ends[block] = (*line[-1], hue)
    return ends


def _label(axes: Any, ends: Mapping[str, Label], theme: Theme) -> None:
    """Names at the ends of lines, once the limits of the axes are final."""
    low, high = axes.get_ylim()
    height_pt = axes.figure.get_figheight() * 72 * 0.8 / axes.get_subplotspec().get_gridspec().nrows
    gap = (high / low) ** (9.5 / height_pt)
    for name, height in spread({name: end[1] for name, end in ends.items()}, gap).items():
        x, _, hue = ends[name]
        say(axes, x, height, f"  {name}", theme, color=hue, clip_on=False)


# ── speed-up over density ────────────────────────────────────────────────────────────────────────────────────────────


def _gains(run: Run) -> Iterator[Plot]:
    groups = _groups(run, ("density",))
    yield Plot(
        f"{run.grid}-speedup",
        "Speed-up over the best dense product of any peer; a ring marks the density at which both take the same time.",
        lambda canvas, theme: speedup(run, groups, canvas, theme),
        _size(len(groups)),
    )


def speedup(run: Run, groups: dict[str, list[Figure]], canvas: Any, theme: Theme) -> None:
    """Log-log, so that a time proportional to density is a straight line."""
    panels = list(zip(_panels(canvas, len(groups)), groups.items(), strict=True))
    labels = []
    for axes, (name, members) in panels:
        axes.set_title(name)
        axes.set(xscale="log", yscale="log")
        axes.hlines(1.0, *_ends(f.point.density for f in members), color=theme.ink, lw=0.9)
        ends = _lines(axes, members, "density", _gain, run)
        named = {}
        for block, (x, y, hue) in ends.items():
            even = break_even([(f.point.density, _gain(f)) for f in members if f.block == block])
            if even:
                axes.plot([even], [1.0], "o", ms=8, mfc=theme.paper, mec=hue, mew=1.8, zorder=4)
            named[f"{block}, even at {even:.2g}" if even else block] = (x, y, hue)
        labels.append(named)
    for (axes, (_, members)), named in zip(panels, labels, strict=True):
        _label(axes, named, theme)
        ticks(axes.xaxis, sorted({f.point.density for f in members}))
        ticks(axes.yaxis, [2.0**k for k in range(-3, 8)], "{:g}x")
    canvas.supxlabel("density", fontsize=9)
    canvas.supylabel("times faster than the best dense", fontsize=9)


def _ends(values: Iterable[float]) -> tuple[float, float]:
    kept = list(values)
    return min(kept), max(kept)


def _gain(f: Figure) -> float:
    return f.best("dense").over


# ── matrices of all shapes ───────────────────────────────────────────────────────────────────────────────────────────


def _cloud(run: Run) -> Iterator[Plot]:
    yield Plot(
        f"{run.grid}-matrices",
        "Every matrix: speed-up over the best dense and over the best sparse peer, by its stored elements.",
        lambda canvas, theme: cloud(run, canvas, theme),
        (8, 4.2),
    )


def cloud(run: Run, canvas: Any, theme: Theme) -> None:
    """A point a matrix and kind of peer; log-log."""
    axes = canvas.add_subplot()
    axes.set(xscale="log", yscale="log", xlabel="stored elements", ylabel="times faster")
    axes.hlines(1.0, *_ends(f.nnz for f in run.figures), color=theme.ink, lw=0.9)
    for kind in ("dense", "sparse"):
        gains = [f.best(kind).over for f in run.figures]
        axes.scatter([f.nnz for f in run.figures], gains, s=16, color=KIND[kind], lw=0, alpha=0.8,
                     label=f"over the best {kind}")  # fmt: skip
    ticks(axes.xaxis, [10.0**power for power in range(9)], "{:,.0f}", most=9)
    ticks(axes.yaxis, [2.0**k for k in range(-6, 10)], "{:.2g}x", most=12)
    axes.legend(frameon=False, loc="upper left", handletextpad=0.2)


# ── rate over block shape ────────────────────────────────────────────────────────────────────────────────────────────


def _bars(run: Run) -> Iterator[Plot]:
    groups = _groups(run, (), BAR_PANELS)
    if {f.point.operator for f in run.figures} == {"linear", "spmm"}:  # side by side
        groups = dict(sorted(groups.items(), key=lambda pair: (_place(run, pair[1][0]), pair[0])))
    rows = -(-len(groups) // 2)
    yield Plot(
        f"{run.grid}-blocks",
        "Rate on nonzeros over block shape, beside the best dense and the best sparse peer; the line is the FMA peak.",
        lambda canvas, theme: bars(run, groups, canvas, theme),
        (9.5, 0.6 + 2.3 * rows) if len(groups) > 1 else (8.0, 3.6),
    )


def _place(run: Run, f: Figure) -> int:
    """Where the point of `f` stands in its grid, whatever its operator."""
    return [replace(other.point, operator="") for other in run.figures].index(replace(f.point, operator=""))


def bars(run: Run, groups: dict[str, list[Figure]], canvas: Any, theme: Theme) -> None:
    """Three bars a block shape, the peak of the same rounds above them."""
    columns = min(len(groups), 2)
    grid = canvas.subplots(-(-len(groups) // columns), columns, squeeze=False, sharey=True)
    for spare in list(grid.flat)[len(groups) :]:
        spare.set_visible(False)
    for axes, (name, members) in zip(grid.flat, groups.items(), strict=False):
        axes.set_title(name)
        axes.grid(axis="y")
        for place, f in enumerate(members):
            peak = f.peak.rate * 1e-9 * f.point.threads
            axes.plot(
                [place - 0.42, place + 0.42], [peak] * 2, color=theme.ink, lw=1, label=None if place else "FMA peak"
            )
        for shift, kind in zip((-0.28, 0.0, 0.28), KIND, strict=True):
            heights = [f.rate(next(c for c in _three(f) if c.kind == kind)) * 1e-9 for f in members]
            at = [place + shift for place in range(len(members))]
            axes.bar(at, heights, 0.26, color=KIND[kind], label="bsrgen" if kind == "bsrgen" else f"best {kind}")
        axes.set_xticks(range(len(members)), [f.block for f in members], rotation=45 if len(members) > 7 else 0)
        axes.spines["left"].set_visible(False)
    canvas.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside upper right", ncols=4, frameon=False,
                  fontsize=9, handlelength=1)  # fmt: skip
    canvas.supylabel("GFLOP/s on nonzeros", fontsize=9)


# ── rate over the number of tokens ───────────────────────────────────────────────────────────────────────────────────


def _sweep(run: Run) -> Iterator[Plot]:
    groups = _groups(run, ("n",))
    yield Plot(
        f"{run.grid}-tokens",
        "Rate on nonzeros over the number of tokens; dashed: the best dense product of any peer.",
        lambda canvas, theme: sweep(run, groups, canvas, theme),
        _size(len(groups)),
    )


def sweep(run: Run, groups: dict[str, list[Figure]], canvas: Any, theme: Theme) -> None:
    """A line for each block shape; the dense peers' depends on the block only through the count of nonzeros."""
    panels = list(zip(_panels(canvas, len(groups)), groups.items(), strict=True))
    labels = []
    for axes, (name, members) in panels:
        axes.set_title(name)
        axes.set(xscale="log", yscale="log")
        ends = _lines(axes, members, "n", lambda f: f.rate(f.ours) * 1e-9, run)
        dense: dict[int, float] = {}
        for f in members:
            dense[f.point.n] = max(dense.get(f.point.n, 0.0), f.rate(f.best("dense")) * 1e-9)
        line = sorted(dense.items())
        axes.plot(*zip(*line, strict=True), color=theme.ink, lw=1.2, ls=(0, (4, 2)))
        labels.append(ends | {"best dense": (*line[-1], theme.ink)})
    for (axes, (_, members)), ends in zip(panels, labels, strict=True):
        _label(axes, ends, theme)
        ticks(axes.xaxis, sorted({f.point.n for f in members}), "{:g}")
        ticks(axes.yaxis, [2.0**k for k in range(-4, 12)], "{:g}")
    canvas.supxlabel("N, tokens", fontsize=9)
    canvas.supylabel("GFLOP/s on nonzeros", fontsize=9)
