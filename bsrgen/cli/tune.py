"""bsrgen tune: the best plan for every weight of a folder, by the clock, into the store."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bsrgen.cli.common import (
    FAILED,
    INTERRUPTED,
    console,
    kernel_options,
    numbers,
    plain,
    printable,
    read,
    show_json,
    type_options,
    verb,
    working,
)
from bsrgen.errors import ArgumentError, BsrgenError

if TYPE_CHECKING:
    from bsrgen.kernel import Kernel


@dataclass(frozen=True, slots=True)
class Job:
    """One matrix at one n; `place` is where --out keeps it, a relative path."""

    file: Path
    key: str | None
    n: int
    place: Path

    def __str__(self) -> str:
        return f"{self.file.name}{'' if self.key is None else f' {self.key}'}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job: a kernel, tuned now or found in the store, or an error."""

    job: Job
    kernel: "Kernel | None" = None
    fresh: bool = False
    error: str = ""


@click.command()
@click.argument("paths", metavar="FOLDER|WEIGHT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@kernel_options
@type_options
@click.option("--n", "ns", callback=numbers, default="1,32,128", show_default=True, help="Tokens, a kernel for each.")
@click.option(
    "--seconds-per-matrix",
    type=click.FloatRange(0, min_open=True),
    help="For all --n of one.  [default: what it takes]",
)
@click.option("--jobs", type=click.IntRange(1), help="Compilers at a time.  [default: one a core]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder that gets the artifacts too.")
@verb
def tune(
    *, paths: tuple[Path, ...], ns: tuple[int, ...], jobs: int | None, out: Path | None, as_json: bool, **options: Any
) -> int:
    """Find the fastest plans of all weights in folders and files, by the clock, and keep them in the store.

    bsrgen.compile(W, tune="measure", n=N) with the same options then loads what was found, and the same command tunes
    what the store does not have.  --seconds-per-matrix is shared by its --n; a result that was cut short ("time" in
    the table) serves only that budget, tune_seconds= in Python.  What cannot be used is reported at the end (exit code
    1); Ctrl-C keeps what is done (exit code 130).
    """
    from bsrgen.machine import parallel_cores

    _check(**options)
    todo, outcomes = _jobs(paths, ns)
    interrupted = False
    with ThreadPoolExecutor(jobs or parallel_cores()) as pool, working(f"tuning {len(todo)} kernels") as progress:
        try:
            for number, job in enumerate(todo):
                tell = _telling(progress, number, len(todo))
                tell(0.0)
                outcomes.append(_tuned(job, len(ns), out, tell, executor=pool, **options))
        except KeyboardInterrupt:
            interrupted = True
    failed = [outcome for outcome in outcomes if outcome.error]
    if as_json:
        done = [_document(outcome) for outcome in outcomes if outcome.kernel]
        errors = [{"file": str(o.job.file), "key": o.job.key, "n": o.job.n or None, "error": o.error} for o in failed]
        show_json({"results": done, "failed": errors, "interrupted": interrupted})
    else:
        _table([outcome for outcome in outcomes if outcome.kernel])
    for outcome in failed:
        click.echo(f"bsrgen: not tuned: {outcome.error}", err=True)
    if interrupted:
        click.echo(f"bsrgen: interrupted; {len(outcomes)} of {len(todo)} are done, the same command goes on", err=True)
    return INTERRUPTED if interrupted else FAILED if failed else 0


def _check(
    operator: str, dtype: str, x_dtype: str | None, out_dtype: str | None, epilogue: tuple[str, ...],
    target: tuple[str, ...], **_: Any,
) -> None:  # fmt: skip
    """Errors that all matrices would share, before any work."""
    from bsrgen.dtypes import as_types
    from bsrgen.epilogues import as_epilogues
    from bsrgen.operators import as_operator
    from bsrgen.targets import as_targets

    as_operator(operator), as_types(dtype, x_dtype, out_dtype), as_epilogues(epilogue), as_targets(target)


def _telling(progress: Callable[[float], None], number: int, total: int) -> Callable[[float], None]:
    return lambda share: progress((number + share) / total)


def _jobs(paths: tuple[Path, ...], ns: tuple[int, ...]) -> tuple[list[Job], list[Outcome]]:
    """What to tune, and what cannot be looked into."""
    from bsrgen.files import matrix_names

    jobs, refused = [], []
    taken: set[Path] = set()
    for file, place in _files(paths):
        try:
            keys = matrix_names(file)
        except BsrgenError as e:
            refused.append(Outcome(Job(file, None, 0, place), error=_line(e)))
            continue
        for key in keys:
            inner = place if key is None else _own(place / (re.sub(r"[^\w.-]", "_", key).lstrip(".") or "_"), taken)
            jobs += [Job(file, key, n, inner / f"n{n}") for n in ns]
    if not jobs and not refused:
        raise ArgumentError(f"{', '.join(map(str, paths))}: no weights there")
    return jobs, refused


def _files(paths: tuple[Path, ...]) -> Iterator[tuple[Path, Path]]:
    """Each weight file once, and a place of its own under --out."""
    from bsrgen.files import SUFFIXES

    seen: set[Path] = set()
    places: set[Path] = set()
    for path in paths:
        found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()) if path.is_dir() else [path]
        for file in found:
            if (real := file.resolve()) in seen:
                continue
            seen.add(real)
            yield file, _own(file.relative_to(path) if path.is_dir() else Path(file.name), places)


def _own(first: Path, taken: set[Path]) -> Path:
    """That place, or the next free one by a number at its end; it is taken now."""
    place, number = first, 1
    while place in taken:
        number += 1
        place = first.with_name(f"{first.name}-{number}")
    taken.add(place)
    return place


def _tuned(
    job: Job, parts: int, out: Path | None, tell: Callable[[float], None], *, blocksize: tuple[int, int] | None,
    dtype: str, seconds_per_matrix: float | None, executor: ThreadPoolExecutor, **options: Any,
) -> Outcome:  # fmt: skip
    from bsrgen import api

    fresh: list[bool] = []

    def progress(share: float) -> None:
        fresh[:] = [True]
        tell(share)

    try:
        weight = read(job.file, job.key, blocksize, dtype)
        seconds = None if seconds_per_matrix is None else seconds_per_matrix / parts
        kernel = api.compile(
            weight, dtype=dtype, n=job.n, tune="measure", tune_seconds=seconds, executor=executor, progress=progress,
            **options,
        )  # fmt: skip
        if out is not None:
            kernel.save(out / job.place)
    except (BsrgenError, OSError) as e:
        where = "" if str(job.file) in str(e) else f"{job.file}: "
        return Outcome(job, error=_line(f"{where}{e}"))
    return Outcome(job, kernel, bool(fresh))


def _line(error: object) -> str:
    return printable(" ".join(str(error).split()))


def _document(outcome: Outcome) -> dict[str, Any]:
    """One kernel as plain data; times in seconds, of one call on one core."""
    assert outcome.kernel is not None
    m = outcome.kernel.artifact.manifest
    picks = [r for r in m.tuning if r.target == m.levels[0].target]
    pick = min(picks, key=lambda r: r.predicted_seconds, default=None)
    seconds = m.cost.measured_seconds
    return {
        "file": str(outcome.job.file), "key": outcome.job.key, "n": outcome.job.n, "fresh": outcome.fresh,
        "cut_short": m.cut_short, "plan": m.levels[0].plan, "seconds": seconds,
        "flop_per_s": seconds and m.cost.flop / seconds, "predicted_seconds": m.cost.seconds,
        "model_pick_seconds": pick and pick.measured_seconds, "dense_seconds": m.cost.measured_dense_seconds,
        "predicted_dense_seconds": m.cost.dense_seconds, "plans": len(picks),
        "artifact": str(outcome.kernel.artifact),
    }  # fmt: skip


def _table(outcomes: list[Outcome]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("matrix", overflow="fold", max_width=26)
    for name in ("n", "us", "GFLOP/s", "model", "dense", ""):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.add_column("plan", overflow="fold", style="dim")
    for outcome in outcomes:
        d = _document(outcome)
        seconds, said = d["seconds"], "tuned" if d["fresh"] else "stored"
        gains = [_gain(d["model_pick_seconds"], seconds), _gain(d["dense_seconds"], seconds)]
        gains[1] = gains[1] or f"~{_gain(d['predicted_dense_seconds'], seconds)}"
        cells = [f"{seconds * 1e6:.1f}", f"{d['flop_per_s'] / 1e9:.1f}"] if seconds else ["", ""]
        table.add_row(
            plain(str(outcome.job)), str(d["n"]), *cells, *gains, f"{said}, time" if d["cut_short"] else said,
            plain(d["plan"].partition(": ")[2]),
        )  # fmt: skip
    out = console()
    if outcomes:
        out.print(table)
        out.print(
            "[dim]model, dense: times of the model's own pick and of the dense plan over this one (~ predicted)[/]"
        )


def _gain(other: float | None, seconds: float | None) -> str:
    return f"{other / seconds:.2f}x" if other and seconds else ""
