"""How pictures look: themes, colours, and a picture as bytes; matplotlib is imported when one is drawn."""

import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bsrgen.errors import UnsupportedError

HUES = (
    "#2A85CC",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8C6BB1",
    "#7F7F7F",
)  # Okabe and Ito's, blue for both themes
OURS, DENSE, SPARSE = HUES[0], HUES[4], HUES[2]
KIND = {"bsrgen": OURS, "dense": DENSE, "sparse": SPARSE}


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of the page."""

    name: str
    paper: str
    ink: str
    faint: str


THEMES = (Theme("light", "#ffffff", "#24292f", "#d0d7de"), Theme("dark", "#16191d", "#d7dde3", "#3a4149"))


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture: name of the file, caption, and how to draw it."""

    name: str
    caption: str
    draw: Callable[[Any, Theme], None]  # (matplotlib Figure, theme)
    size: tuple[float, float]

    def png(self, theme: Theme) -> bytes:
        """The file's bytes; equal runs give equal bytes with one version of matplotlib."""
        canvas = _canvas(self.size, theme)
        with _style(theme):
            self.draw(canvas, theme)
            out = io.BytesIO()
            canvas.savefig(out, format="png", dpi=150, facecolor=theme.paper, metadata={"Software": None})
        return out.getvalue()


def _canvas(size: tuple[float, float], theme: Theme) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    except ImportError as e:
        raise UnsupportedError(f"plots need matplotlib: pip install 'bsrgen[report]' ({e})") from e
    canvas = Canvas(figsize=size, layout="constrained", facecolor=theme.paper)
    FigureCanvasAgg(canvas)
    return canvas


def _style(theme: Theme) -> Any:
    import matplotlib as mpl

    ink = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    off = ("axes.spines.top", "axes.spines.right", "xtick.minor.visible", "ytick.minor.visible")
    return mpl.rc_context(
        dict.fromkeys(ink, theme.ink)
        | dict.fromkeys(off, False)
        | {
            "axes.facecolor": theme.paper,
            "axes.edgecolor": theme.faint,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
        }
        | {"axes.titlelocation": "left", "font.size": 9, "font.family": "sans-serif", "axes.axisbelow": True}
        | {"grid.color": theme.faint, "grid.linewidth": 0.5, "xtick.major.size": 0, "ytick.major.size": 0}
    )


def say(axes: Any, x: float, y: float, text: str, theme: Theme, **how: Any) -> None:
    """Small text at a point of the data."""
    axes.text(x, y, text, color=how.pop("color", theme.ink), fontsize=8, **{"va": "center"} | how)


def ticks(axis: Any, values: Sequence[float], text: str = "{:.2g}", most: int = 6) -> None:
    """Ticks at those of `values` that are in view, at most `most`."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    shown = [value for value in values if low <= value <= high]
    while len(shown) > most:
        shown = shown[::-2][::-1]
    axis.set_major_locator(ticker.FixedLocator(shown))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: text.format(value)))
    axis.set_minor_locator(ticker.NullLocator())


def spread(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Heights of labels on a logarithmic axis, at least the factor `gap` apart: the mean of pushing up and down."""
    names = sorted(heights, key=heights.__getitem__)
    up = list(itertools.accumulate((math.log(heights[name]) for name in names), lambda a, b: max(b, a + math.log(gap))))
    falling = (math.log(heights[name]) for name in reversed(names))
    down = list(itertools.accumulate(falling, lambda a, b: min(b, a - math.log(gap))))[::-1]
    return {name: math.exp((a + b) / 2) for name, a, b in zip(names, up, down, strict=True)}
