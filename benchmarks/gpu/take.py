"""Take the figures: one process, all contenders of a point in alternation, until the points or the budget are over."""

import functools
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.gpu import grids, l2, rehearse
from benchmarks.gpu.artifacts import Makes
from benchmarks.gpu.contenders import Contender, Run, dynamic, ours, peers
from benchmarks.gpu.results import Figure, Line, Results, Times
from benchmarks.gpu.results import load as begun
from benchmarks.gpu.stages import Stage, Timer, TorchStage
from benchmarks.points import Point
from bsrgen.bench.case import Case
from bsrgen.loading import load
from bsrgen.machine import parallel_cores

Array = np.ndarray[Any, Any]
ROUNDS, COLD_ROUNDS = 15, 7
CHECKED_TOKENS = 8
WRONG = 2e-2  # bfloat16 lies at 1e-3 to 1e-2, tf32 at 3e-4
COPY_BYTES, DENSE_SIZE = 1 << 30, 8192
REST_S = 30.0  # of a budget that no new point is begun in
AHEAD = 24  # points whose kernels are made together


def ceilings(stage: Stage, size: int = DENSE_SIZE, copied: int = COPY_BYTES) -> dict[str, float]:
    """Bytes a second of a copy, read and written both counted, and from L2; FLOP a second of dense products."""
    if not stage.real:
        return {"copy": 1.0}
    torch = stage.torch  # type: ignore[attr-defined]
    found = {}
    source = torch.randint(-100, 100, (copied,), dtype=torch.int8, device="cuda")
    to = torch.empty_like(source)
    found["copy"] = 2 * copied / _best(stage, lambda: to.copy_(source))
    for name in ("bfloat16", "float16", "float32"):
        a, b = (torch.randn(size, size, device="cuda").to(getattr(torch, name)) for _ in range(2))
        out = torch.empty_like(a)
        product = functools.partial(torch.matmul, a, b, out=out)
        found[f"dense {name} {size}"] = 2 * size**3 / _best(stage, product)
    if stage.facts()["capability"] == [9, 0]:
        found |= l2.ceilings(source.data_ptr(), stage.handle, functools.partial(_best, stage))  # type: ignore[attr-defined]
    return found


def _best(stage: Stage, call: Callable[[], object]) -> float:
    timer = stage.timer(call)
    return min(stage.sample(timer, cold=False) for _ in range(ROUNDS))


def reference(case: Case, tokens: Array) -> Array:
    """Y of some tokens in float64, [tokens, M]."""
    W, p, x = case.weight, case.weight.pattern, np.asarray(case.x, np.float64)
    data = W.data if case.w_scale is not None else W.data.astype(case.x.dtype)
    padded = np.zeros((len(tokens), p.block_cols * p.C))
    padded[:, : p.K] = (x[tokens] if case.linear else x[:, tokens].T) * case.x_scale
    inputs = padded.reshape(len(tokens), -1, p.C)[:, p.indices]
    sums = np.zeros((p.block_rows, p.R, len(tokens)))
    np.add.at(sums, p.rows, np.einsum("brc,tbc->brt", data.astype(np.float64), inputs, optimize=True))
    return sums.reshape(-1, len(tokens))[: p.M].T


def error_of(case: Case, y: Array, tokens: Array, expected: Array) -> float:
    """|y - reference| / |reference|; infinite where something is not finite."""
    got = np.asarray(y[tokens] if case.linear else y[:, tokens].T, np.float64)
    if not np.isfinite(got).all():
        return float("inf")
    return float(np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30))


def figure(
    stage: Stage, grid: str, point: Point, case: Case, kernel: Any, rounds: int, others: tuple[Contender, ...]
) -> Figure:
    """All contenders that take the case, checked, and timed in alternation: hot rounds first, then cold ones."""
    tokens = np.random.default_rng(0).permutation(point.n)[:CHECKED_TOKENS]
    expected = reference(case, tokens)
    runs: dict[str, tuple[Contender, Run, Timer, float]] = {}
    absent = {}
    for contender in (ours(kernel), *others):
        if why := contender.declines(case):
            absent[contender.name] = why
            continue
        try:
            run = contender.prepare(stage, case)
            run.call()
            error = error_of(case, run.result(), tokens, expected)
            if not error < WRONG:
                raise ArithmeticError(f"wrong: relative error {error:.2g}")
            runs[contender.name] = contender, run, stage.timer(run.call), error
        except Exception as e:  # of whatever a peer is made of: the others are still worth their time
            absent[contender.name] = _why(e)
    timers = {name: timer for name, (_, _, timer, _) in runs.items()}
    hot = _alternate(stage, timers, rounds, cold=False)
    cold = _alternate(stage, timers, min(rounds, COLD_ROUNDS), cold=True)
    lines = tuple(
        Line(name, contender.kind, hot[name], cold[name], timer.how, error, run.note)
        for name, (contender, run, timer, error) in runs.items()
    )
    return Figure(grid, point, case.weight.pattern.nnz, case.moved_bytes, lines, absent)


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _alternate(stage: Stage, timers: dict[str, Timer], rounds: int, *, cold: bool) -> dict[str, Times]:
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            samples[name].append(stage.sample(timer, cold))
    return {
        name: {"min_s": min(taken), "median_s": statistics.median(taken), "rounds": len(taken)}
        for name, taken in samples.items()
    }


def taken(results: Results, stage: Stage, makes: Makes, todo: list[tuple[str, Point]], rounds: int, stop_s: float,
          keep: Callable[[], None], coming: Makes | None = None) -> None:  # fmt: skip
    """Figures of `todo` into `results`: kernels of some points are made on all cores, then those points are timed, so
    that nothing else runs meanwhile.  `keep` is called after each point.  `coming` makes dynamic kernels."""
    others = peers()
    for first in range(0, len(todo), AHEAD):
        some = todo[first : first + AHEAD]
        kernels = made_ahead(makes, some) if time.monotonic() <= stop_s else [Future()] * len(some)
        for (grid, point), made in zip(some, kernels, strict=True):
            if time.monotonic() > stop_s:
                click.echo(f"stopped before {point}: the budget is over; the same command goes on from here")
                return
            try:
                folder, case = made.result(), point.case()
                kernel = makes.kernel(folder, case.weight)
                more = dynamic(functools.partial(_dynamic, coming, point)) if coming else ()
                results.figures.append(figure(stage, grid, point, case, kernel, rounds, (*others, *more)))
            except Exception as e:  # a point that cannot be taken costs the others nothing
                results.figures.append(Figure(grid, point, 0, 0, (), {"bsrgen": _why(e)}))
            click.echo(_said(results.figures[-1]))
            keep()
            if not stage.alive():
                raise click.ClickException("the GPU's context is broken; the same command goes on from here")


def _dynamic(coming: Makes, point: Point) -> Any:
    return load(coming.make(point))


def made_ahead(makes: Makes, todo: list[tuple[str, Point]]) -> list[Future[Path]]:
    """The kernels of points, made; races of plans one after the other, because they are timed."""
    with ThreadPoolExecutor(1 if makes.tune == "measure" else parallel_cores()) as pool:
        return [pool.submit(makes.make, point) for _, point in todo]


def _said(f: Figure) -> str:
    ours_s, best = f.seconds("bsrgen"), f.best_sparse()
    if ours_s is None:
        return f"{f.point}: no kernel: {f.absent.get('bsrgen')}"
    dense = f" {f.over('torch dense'):.2f}x dense" if f.over("torch dense") else ""
    return f"{f.point}: {ours_s * 1e6:.1f} us{dense}" + (f" {best[1]:.2f}x {best[0]}" if best else "")


def prepared(makes: Makes, todo: list[tuple[str, Point]]) -> None:
    """Compile the kernels of all points into the folder of artifacts."""
    for (_, point), made in zip(todo, made_ahead(makes, todo), strict=True):
        place = makes.place(point)
        if failure := made.exception():
            click.echo(f"{point}: {' '.join(str(failure).split())}")
        elif place is not None:
            click.echo(f"{point}: {place.stat().st_size / 1e3:.0f} KB")


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(grids.GRIDS)), metavar="[GRID]...")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of gpu.json and gpu.md; a run goes on there.")
@click.option("--budget-s", type=float, default=float("inf"), help="Begin no point after so many, less a tenth.")
@click.option("--artifacts", type=click.Path(path_type=Path), help="Folder of kernels made ahead (--prepare).")
@click.option("--prepare", "ahead", is_flag=True, help="Only compile, into --artifacts; needs nvcc and no GPU.")
@click.option("--target", default="native", show_default=True, help="sm_90 or several, sm_80,sm_90.")
@click.option("--tune", type=click.Choice(["off", "model", "measure"]), default="model", show_default=True)
@click.option("--rounds", type=click.IntRange(3), default=ROUNDS, show_default=True)
@click.option("--dynamic", "dynamically", is_flag=True, help="Also kernels whose weight comes with the call.")
@click.option("--only", default="", help="Only points whose line this regular expression finds.")
@click.option("--rehearse", "rehearsed", is_flag=True, help="The whole script on the CPU, on tiny points; no figures.")
def main(
    *, names: tuple[str, ...], out: Path | None, budget_s: float, artifacts: Path | None, ahead: bool, target: str,
    tune: str, rounds: int, only: str, rehearsed: bool, dynamically: bool,
) -> None:  # fmt: skip
    """Time grids on the first GPU here: bsrgen, torch's dense and BSR products, cuSPARSE, stk, blksprs; ceilings."""
    stop_s = time.monotonic() + budget_s - min(REST_S, 0.1 * budget_s)
    chosen = names or (("tiny",) if rehearsed else grids.DEFAULT)
    todo = [(grid, point) for grid, point in grids.points(chosen) if re.search(only, str(point))]
    archs = tuple(target.split(","))
    makes = Makes(archs[0] if len(archs) == 1 else archs, tune, artifacts)
    coming = replace(makes, mode="dynamic") if dynamically else None
    if ahead and (artifacts is None or target == "native"):
        raise click.UsageError("--prepare needs --artifacts, and a --target: sm_90, or several")
    with ExitStack() as stack:
        if rehearsed:
            stack.enter_context(rehearse.emulated())
        if ahead:
            for made in filter(None, (makes, coming)):
                prepared(made, todo)
            return
        stage = rehearse.stage() if rehearsed else TorchStage()
        stack.enter_context(stage.entered())
        results = _begun(out, stage)
        if not results.ceilings:
            results.ceilings = ceilings(stage)
        left = [(grid, point) for grid, point in todo if point not in results.done]
        click.echo(f"{stage.name}: {len(left)} of {len(todo)} points to take")
        taken(results, stage, makes, left, rounds, stop_s, lambda: results.save(out) if out else None, coming)
        if out:
            results.save(out)


def _begun(out: Path | None, stage: Stage) -> Results:
    """The results so far, of the same device, or new ones."""
    results = (begun(out) if out else None) or Results({"date": date.today().isoformat(), **stage.facts()})
    if results.facts["device"] != stage.facts()["device"]:
        raise click.UsageError(f"{out} holds figures of {results.facts['device']}; give another folder")
    command = " ".join(["python -m benchmarks", *(word.rsplit("/", 1)[-1] for word in sys.argv[1:])])
    results.commands.append(command)
    return results
