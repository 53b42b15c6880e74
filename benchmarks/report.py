"""Kept runs as tables, plots and one page:  python -m benchmarks report benchmarks/results/*.json

Writes <stem>.md and <grid>-*.png beside each other in --out, and report.html, which needs no other file and no network.
Files of `python -m benchmarks accuracy` add its sentence.  Without matplotlib there are no plots, all else comes.
"""

import base64
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import jinja2

from benchmarks import accuracy, tables
from benchmarks.figures import Run, load
from benchmarks.grids import GRIDS
from benchmarks.plots import plots
from benchmarks.style import THEMES
from bsrgen.errors import UnsupportedError

TEMPLATE = Path(__file__).parent / "report.html.j2"


def pictures(run: Run, folder: Path) -> list[dict[str, str]]:
    """Write the light plots of a run, and give both themes for the page."""
    made = []
    for plot in plots(run, GRIDS[run.grid].over):
        bytes_ = {theme.name: plot.png(theme) for theme in THEMES}
        (folder / f"{plot.name}.png").write_bytes(bytes_["light"])
        inline = {name: base64.b64encode(data).decode() for name, data in bytes_.items()}
        made.append({"caption": plot.caption, **inline})
    return made


def facts(run: Run) -> list[tuple[str, str]]:
    """The figures that stand out on the page."""
    gains = {kind: [f.best(kind).over for f in run.figures] for kind in ("dense", "sparse")}
    wins = sum(gain > 1 for gain in gains["dense"])
    return [
        (f"{statistics.geometric_mean(gains['dense']):.2f}x", "the best dense, geometric mean"),
        (f"{statistics.geometric_mean(gains['sparse']):.2f}x", "the best sparse, geometric mean"),
        (f"{statistics.median(f.peak.share_rounds for f in run.figures):.0%}", "of the FMA peak, median"),
        (f"{wins} of {len(run.figures)}", "points faster than every dense product"),
    ]


def page(runs: Sequence[tuple[Run, list[dict[str, str]]]], judged: dict[str, Any] | None) -> str:
    """The HTML text."""
    rows = [
        {
            "grid": run.grid, "title": GRIDS[run.grid].title, "source": GRIDS[run.grid].source, "facts": facts(run),
            "machine": tables.machine_line(run.machine).replace("`", ""), "pictures": made,
            "tables": [
                {"heading": t.heading, "head": t.head, "rows": t.rows, "text": tables.TEXT}
                for t in tables.tables(run, GRIDS[run.grid])
            ],
        }
        for run, made in runs
    ]  # fmt: skip
    about = judged and {
        "sentence": accuracy.sentence(judged["summary"]),
        "machine": tables.machine_line(judged["machine"]).replace("`", ""),
    }
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(TEMPLATE.read_text()).render(runs=rows, accuracy=about, method=tables.METHOD)


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write to; that of the first file by default.")
def main(*, files: tuple[Path, ...], out: Path | None) -> None:
    """Make tables, plots and report.html out of the JSON FILES of runs; of each grid the last file counts."""
    folder = out or files[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    runs: dict[str, tuple[Run, list[dict[str, str]]]] = {}
    judged = None
    for path in files:
        kept = json.loads(path.read_bytes())
        if kept.get("schema") == accuracy.SCHEMA:
            judged = kept
            continue
        try:
            run = load(path)
        except ValueError as e:
            raise click.ClickException(str(e)) from e
        (folder / f"{path.stem}.md").write_text(tables.markdown(run, GRIDS[run.grid]))
        made: list[dict[str, str]] = []
        try:
            made = pictures(run, folder)
        except UnsupportedError as e:
            click.echo(str(e), err=True)
        runs[run.grid] = run, made
    (folder / "report.html").write_text(page(list(runs.values()), judged))
    click.echo(
        f"{folder / 'report.html'}: {len(runs)} grids, {sum(len(run.figures) for run, _ in runs.values())} points"
    )


if __name__ == "__main__":
    main()
