"""Take the figures of grids: at each point bsrgen, every installed peer and the ceilings of the core in alternation."""

import functools
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cffi
import click
import numpy as np

from benchmarks import tables
from benchmarks.figures import Figure, Limit, Run, contenders, load, merged, save
from benchmarks.grids import DEFAULT, GRIDS, Grid
from benchmarks.machine import machine
from benchmarks.points import Point
from bsrgen import api
from bsrgen.bench import sparsifier
from bsrgen.bench.case import Case
from bsrgen.bench.ceilings import Ceiling, Ceilings
from bsrgen.bench.clock import Timing, at_their_best, measure, peer_threads
from bsrgen.bench.dynamic import dynamic_peers
from bsrgen.bench.peer import Peer
from bsrgen.bench.peer import Run as Prepared
from bsrgen.bench.peers import PEERS, kernel_run, prepare
from bsrgen.dtypes import DTYPES, as_dtype
from bsrgen.errors import BsrgenError
from bsrgen.kernel import Kernel
from bsrgen.machine import cache_bytes, usable_cores

SLOW = 20.0  # a peer that needs so many times the fastest contender's time in a first call is not timed
LONG_S = 0.05  # a first call that is not repeated
LIMIT_S = 10.0  # of timing one point: a large one gets fewer rounds
SETTLE_S = 5e-3  # between contenders of several threads (clock.measure)
OWN_PROCESS = {"_BSRGEN_BENCH", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}  # what clock.at_their_best sets
OURS, IN_C, PEAK, READ = "bsrgen", "bsrgen, C entry", "FMA peak", "weight read"
IN_MLIR, STOCK = "bsrgen, MLIR", "MLIR sparsifier"


@dataclass(frozen=True, slots=True)
class Settings:
    """How long and how carefully."""

    tune: str = "measure"
    rounds: int = 30
    minutes: float = math.inf
    peers: str = ""  # those whose name this regular expression finds


def figure(grid: str, point: Point, settings: Settings, ceilings: Ceilings) -> Figure:
    """Compile, check and time one point; call it within peer_threads(point.threads)."""
    case = point.case()
    kernel = api.compile(
        case.weight, case.operator, dtype=point.dtype, n=point.n, threads=point.threads, tune=settings.tune
    )
    own = Peer(OURS, OURS, "bsrgen", lambda _: None, lambda c: kernel_run(kernel, c), tuple(DTYPES))
    in_c = Peer(IN_C, OURS, "bsrgen", lambda _: None, lambda c: c_run(kernel, c), tuple(DTYPES.keys() - {"int8"}))
    row = GRIDS[grid]
    more = backends(settings.tune) if row.mlir else dynamic_peers(settings.tune) if row.dynamic else ()
    wanted = [peer for peer in PEERS if re.search(settings.peers, peer.name)]
    others = [peer for peer in wanted if peer.kind == "dense" or (peer.kind == "sparse" and not row.dynamic)]
    runs, absent = prepare(case, (own, in_c, *more, *others))
    kinds = {name: (KINDS | {peer.name: peer.kind for peer in more}).get(name, "bsrgen") for name in runs}
    runs, slow = without_slow(runs, kinds)
    peak = ceilings.fma(as_dtype(point.dtype).short)
    level, read = holding(ceilings, kernel.plan.value_bytes)
    calls = {name: run.call for name, run in runs.items()} | {PEAK: peak.call, READ: read.call}
    cpus, settle_s = (None, 0.0) if point.threads == 1 else ((), SETTLE_S)
    times = measure(calls, rounds=settings.rounds, seconds=LIMIT_S, cpus=cpus, settle_s=settle_s)
    bytes_ = kernel.plan.value_bytes
    return Figure(
        grid=grid, point=point, nnz=case.weight.pattern.nnz, weight_bytes=bytes_,
        moved_bytes=case.moved_bytes, plan=str(kernel.plan),
        verdict=str(kernel.verdict),
        predicted_s=kernel.cost.seconds,
        contenders=contenders({name: kinds[name] for name in runs}, times), absent=absent | slow,
        peak=limit("FMA", peak, times[PEAK], times[OURS], case.nonzero_flop / point.threads),
        read=limit(level, read, times[READ], times[OURS], bytes_ / point.threads),
    )  # fmt: skip


def c_run(kernel: Kernel, case: Case) -> Prepared:
    """The kernel's C entry through cffi, as a C program calls it: what Python's checks cost is the difference."""
    x, y, ffi = case.x, case.out(), cffi.FFI()
    ffi.cdef(f"int {kernel.name}(int64_t, const void *, int64_t, void *, int64_t, const void *, int);")
    library = ffi.dlopen(str(kernel.artifact.library.absolute()))
    pointers = ffi.from_buffer(x.view(np.uint8)), x.shape[1], ffi.from_buffer(y.view(np.uint8)), y.shape[1]
    entry = functools.partial(getattr(library, kernel.name), case.n, *pointers, ffi.NULL, case.threads)
    if status := entry():
        raise BsrgenError(f"{kernel.name}: status {status}")
    return Prepared(entry, lambda: y)


def backends(tune: str) -> tuple[Peer, ...]:
    """The MLIR backend, and the sparsifier that it builds on as MLIR has it."""

    def mlir(case: Case) -> Prepared:
        kernel = api.compile(
            case.weight, case.operator, dtype=case.dtype.name, n=case.n, threads=case.threads, tune=tune, backend="mlir"
        )
        return kernel_run(kernel, case)

    return (
        Peer(IN_MLIR, OURS, "mlir", lambda _: None, mlir, tuple(DTYPES)),
        Peer(STOCK, "torch-mlir", "stock", sparsifier.declines, sparsifier.prepare),
    )


KINDS = {peer.name: peer.kind for peer in PEERS}


def limit(name: str, ceiling: Ceiling, timing: Timing, ours: Timing, work: float) -> Limit:
    """A ceiling's rate, and bsrgen's share of it by the best samples and by the median of the rounds."""
    share = work / ours.min_s / ceiling.rate(timing)
    return Limit(name, ceiling.row, ceiling.rate(timing), share, ceiling.share(timing, ours, work))


def holding(ceilings: Ceilings, nbytes: int) -> tuple[str, Ceiling]:
    """The level of the caches that a weight of `nbytes` stays in, and the read rate of that level."""
    caches = cache_bytes()
    level = next((name for name in ("L1", "L2", "L3") if nbytes <= caches[name]), "DRAM")
    return level, ceilings.read(ceilings.sizes[level])


def first_call_s(run: Prepared) -> float:
    """Seconds of a call: the best of three, so that a disturbed moment costs no peer its place; one if that is long."""
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        run.call()
        best = min(best, time.perf_counter() - started)
        if best > LONG_S:
            break
    return best


def without_slow(runs: dict[str, Prepared], kinds: dict[str, str]) -> tuple[dict[str, Prepared], dict[str, str]]:
    """The runs worth timing, and why not the others; the fastest of each kind always is."""
    seconds = {}
    for name, run in runs.items():
        seconds[name] = first_call_s(run)
    kept = {min((name for name in runs if kinds[name] == kind), key=seconds.__getitem__) for kind in kinds.values()}
    most = SLOW * min(seconds.values())
    slow = {
        name: f"slow: {s / most * SLOW:.0f} times the fastest in a first call"
        for name, s in seconds.items()
        if s > most and name not in kept
    }
    return {name: run for name, run in runs.items() if name not in slow}, slow


def standard(ceilings: Ceilings, dtypes: set[str]) -> dict[str, float]:
    """All ceilings that the report draws, in alternation."""
    rows = {
        (f"{name} {dtype}" if name.startswith("fma") else name): ceiling
        for dtype in sorted(dtypes)
        for name, ceiling in ceilings.standard(as_dtype(dtype).short).items()
    }
    times = measure({name: ceiling.call for name, ceiling in rows.items()}, rounds=20)
    return {name: ceiling.rate(times[name]) for name, ceiling in rows.items()}


def take(grid: Grid, points: list[Point], settings: Settings, stop_s: float, keep: Callable[[Run], None]) -> Run:
    """Figures of `points`, all of as many threads; `keep` is called with all that there is after each one."""
    ceilings, threads = Ceilings(), points[0].threads
    figures: tuple[Figure, ...] = ()
    with peer_threads(threads):
        rates = standard(ceilings, {point.dtype for point in points})
        how = {"tune": settings.tune, "rounds": settings.rounds, "points": len(points)}
        run = Run(grid.name, machine(), how, rates, figures)
        for point in points:
            if time.monotonic() > stop_s:
                click.echo(f"{grid.name}: stopped after {len(figures)} of {len(points)} points, --minutes are over")
                break
            figures = (*figures, figure(grid.name, point, settings, ceilings))
            run = Run(grid.name, run.machine, how, rates, figures)
            click.echo(tables.line(figures[-1]))
            keep(run)
    return run


def in_new_process(grid: Grid, threads: int, options: list[str]) -> Run | None:
    """The points of `threads` threads: MKL keeps the number that a process asks for first."""
    kept = {name: value for name, value in os.environ.items() if name not in OWN_PROCESS}
    with tempfile.TemporaryDirectory(prefix="bsrgen-benchmarks-") as folder:
        command = [sys.executable, "-m", "benchmarks", grid.name, "--threads", str(threads), "--out", folder, *options]
        subprocess.run(command, check=True, env=kept, cwd=Path(__file__).parents[1])
        found = sorted(Path(folder).glob("*.json"))
        return load(found[0]) if found else None


def selected(grid: Grid, every: int, threads: int | None, only: str = "") -> dict[int, list[Point]]:
    """The points to take, by their number of threads; those that need more cores than there are go with a word."""
    chosen: dict[int, list[Point]] = {}
    for point in grid.thinned(every):
        if threads in (None, point.threads) and re.search(only, str(point)):
            chosen.setdefault(point.threads, []).append(point)
    for count in [count for count in chosen if count > usable_cores()]:
        lost = len(chosen.pop(count))
        click.echo(f"{grid.name}: {lost} points need {count} cores, {usable_cores()} usable: not taken")
    return chosen


@click.command()
@click.argument("grids", nargs=-1, type=click.Choice(list(GRIDS)), metavar="[GRID]...")
@click.option("--tune", type=click.Choice(["off", "model", "measure"]), default="measure", show_default=True)
@click.option("--rounds", type=click.IntRange(3), default=30, show_default=True, help="Samples of each contender.")
@click.option("--thin", type=click.IntRange(1), default=1, show_default=True, help="One point of so many.")
@click.option("--only", default="", help="Only points whose line this regular expression finds: ' 4x4 .*n=128'.")
@click.option("--peers", default="", help="Only peers whose name this regular expression finds: 'oneDNN|openvino'.")
@click.option("--minutes", type=float, default=math.inf, help="Start no point after so many.")
@click.option("--threads", type=click.IntRange(1), help="Only the points of so many threads.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for <date>-<grid>.json and .md; points that "
              "today's file has from this machine are kept and not taken again.")  # fmt: skip
@click.option("--list", "listed", is_flag=True, help="Show the grids and take none.")
def main(
    *, grids: tuple[str, ...], tune: str, rounds: int, thin: int, only: str, peers: str, minutes: float,
    threads: int | None, out: Path | None, listed: bool,
) -> None:  # fmt: skip
    """Time grids (README's where none is named): bsrgen beside every installed peer and the ceilings of the core."""
    rows = [GRIDS[name] for name in grids or DEFAULT]
    if listed:
        for grid in GRIDS.values():
            click.echo(f"{grid.name:10} {sum(1 for _ in grid.thinned(thin)):4} points  {grid.title} ({grid.source})")
        return
    at_their_best(threads or 1)
    settings, stop_s = Settings(tune, rounds, minutes, peers), time.monotonic() + 60 * minutes
    for grid in rows:
        click.echo(f"\n{grid.title}: {grid.source}")
        parts = taken(grid, out)
        done = {f.point for part in parts for f in part.figures}
        for count, all_points in selected(grid, thin, threads, only).items():
            points = [point for point in all_points if point not in done]
            if not points:
                continue
            if count == (threads or 1):
                keep = functools.partial(write, grid=grid, folder=out, before=tuple(parts))
                parts.append(take(grid, points, settings, stop_s, keep))
            else:
                left = max(0.0, stop_s - time.monotonic()) / 60
                options = ["--tune", tune, "--rounds", str(rounds), "--thin", str(thin), "--only", only]
                options += ["--minutes", str(left), "--peers", peers]
                if (part := in_new_process(grid, count, options)) is not None:
                    write(part, grid, out, tuple(parts))
                    parts.append(part)
        if out is None and parts and merged(parts).figures:
            click.echo("\n" + tables.markdown(merged(parts), grid))


def taken(grid: Grid, folder: Path | None) -> list[Run]:
    """What `folder` has of the grid from today and this machine: a run that was stopped goes on."""
    now = machine()
    path = folder / f"{now['date']}-{grid.name}.json" if folder else None
    if path is None or not path.exists():
        return []
    run = load(path)
    alike = all(run.machine[key] == now[key] for key in ("cpu", "target", "compiler"))
    return [run] if alike else []


def write(run: Run, grid: Grid, folder: Path | None, before: tuple[Run, ...] = ()) -> None:
    """<date>-<grid>.json and .md in `folder`, where one is given; `before` are parts of the same grid."""
    if folder is None:
        return
    place = {point: number for number, point in enumerate(grid.points())}
    run = merged([*before, run])
    run = replace(run, figures=tuple(sorted(run.figures, key=lambda f: place.get(f.point, len(place)))))
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{run.machine['date']}-{run.grid}"
    save(run, folder / f"{stem}.json")
    (folder / f"{stem}.md").write_text(tables.markdown(run, grid))
