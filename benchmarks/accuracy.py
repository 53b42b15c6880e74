"""How good the cost model is: its pick beside the best measured plan, on matrices drawn by a seed.

    python -m benchmarks accuracy                        # 60 matrices, 12 best plans by the model and 4 others of each
    python -m benchmarks accuracy --count 6 --jobs 1     # a short one
    python -m benchmarks accuracy --again FILE.json      # today's model on the times in FILE: nothing is timed

The file keeps knobs, counts, predicted and measured seconds of every plan: `replay` gives them back as plans to fit on.
"""

import functools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import machine
from benchmarks.points import Point
from bsrgen import build, package, tune
from bsrgen.artifact import write_manifest
from bsrgen.backends import BACKENDS
from bsrgen.bench.case import Case
from bsrgen.bench.ceilings import Ceilings
from bsrgen.bench.clock import Timing, at_their_best, measure
from bsrgen.bench.peers import check
from bsrgen.cost import estimate
from bsrgen.dtypes import DTYPES
from bsrgen.kernel import Kernel
from bsrgen.operators import OPERATORS
from bsrgen.pattern import Weight
from bsrgen.plan import Plan
from bsrgen.targets import native

SCHEMA, VERSION = "bsrgen-accuracy", 1
COUNT, SEED, TOP, OTHERS = 60, 60, 12, 4
NEAR, GOAL = 1.15, 0.85  # a pick within 15 % of the best measured plan is good; so many of the picks should be
SIZES = (256, 300, 384, 500, 512, 640, 768, 1000, 1024, 1536, 2048, 3000, 3072, 4096)
BLOCKS = "1x1 1x8 1x16 1x32 2x1 4x1 8x1 16x1 32x1 64x1 3x5 4x4 8x8 12x12 16x4 4x16 16x16 32x32 48x48 64x64"
TOKENS = (1, 2, 4, 7, 8, 16, 31, 32, 64, 100, 128, 200, 256, 512)
KINDS = ("uniform", "uniform", "uniform", "powerlaw", "banded")
DENSITIES = (0.02, 0.5)
MOST_NNZ, MOST_FLOP = 3_000_000, 1_000_000_000  # of one matrix: 16 plans of it must be built and timed in seconds
LIMIT_S = 8.0  # of timing one matrix


def draw(count: int = COUNT, seed: int = SEED, dtype: str = "float32") -> tuple[Point, ...]:
    """`count` points in `dtype`; the first are the same for every count.  What would take too long is drawn again."""
    rng = np.random.default_rng(seed)
    found: list[Point] = []
    while len(found) < count:
        M, K = (int(rng.choice(SIZES)) for _ in range(2))
        R, C = (int(size) for size in str(rng.choice(BLOCKS.split())).split("x"))
        density = float(np.exp(rng.uniform(*np.log(DENSITIES))).round(3))
        n, operator = int(rng.choice(TOKENS)), str(rng.choice(list(OPERATORS)))
        point = Point(operator, (M, K), (R, C), density, n, str(rng.choice(KINDS)), seed=seed + len(found), dtype=dtype)
        if M * K * density <= MOST_NNZ and 2 * M * K * density * n <= MOST_FLOP:
            found.append(point)
    return tuple(found)


def build_plan(plan: Plan, weight: Weight, folder: Path, bound: dict[str, NDArray[Any]]) -> Kernel:
    """Print, compile and load one plan, past the store, with operands of its own."""
    compiler = build.find_compiler(plan.target)
    source = BACKENDS["c"].emit((plan,), weight)
    build.build(source, folder, compiler)
    return Kernel(write_manifest(folder, package.describe(source, weight, compiler, (), folder, bound)), threads=1)


def contenders(case: Case, top: int, others: int, seed: int) -> tuple[int, list[tuple[int, Plan]]]:
    """How many candidates there are; the model's `top` and `others` drawn from the rest, with their places."""
    plans = list(BACKENDS["c"].candidates(case.problem, native()))
    ranked = [plan for _, plan in tune.rank(plans, case.n)]
    rest = range(min(top, len(ranked)), len(ranked))
    drawn = np.random.default_rng(seed).choice(rest, min(others, len(rest)), replace=False)
    places = (*range(min(top, len(ranked))), *sorted(int(i) for i in drawn))
    return len(ranked), [(place, ranked[place]) for place in places]


def stored(case: Case) -> Weight:
    """The weight in the type of X; int8 without its scales, which are operands."""
    if case.w_scale is None:
        return case.weight
    p = case.weight.pattern
    scale = np.pad(case.w_scale, (0, p.block_rows * p.R - p.M), constant_values=1).reshape(p.block_rows, p.R, 1)
    return Weight(p, np.rint(case.weight.data / scale[p.rows]).astype(np.int8))


@dataclass(frozen=True, slots=True)
class Loss:
    """The model on one matrix; ratios are 1 where it is perfect."""

    pick: float  # time of its first plan over that of the best measured one
    times: tuple[float, ...]  # measured over predicted seconds, of every plan


def examine(point: Point, top: int, others: int, jobs: int, rounds: int, ceilings: Ceilings) -> dict[str, Any]:
    """Build, check and time the plans of one matrix in alternation, with the FMA peak in the same rounds."""
    case = point.case()
    candidates, placed = contenders(case, top, others, point.seed)
    weight = stored(case)
    expected, bound = case.reference()
    scales = {} if case.w_scale is None else {"w_scale": case.w_scale, "x_scale": np.array(case.x_scale, np.float32)}
    peak = ceilings.fma(case.problem.real.short)
    with tempfile.TemporaryDirectory(prefix="bsrgen-accuracy-") as root:

        def make(place: int, plan: Plan) -> functools.partial[Any]:
            folder = Path(root, str(place))
            folder.mkdir(mode=0o700)
            return functools.partial(build_plan(plan, weight, folder, scales), case.x, out=case.out())

        with ThreadPoolExecutor(jobs) as pool:
            calls = list(pool.map(make, *zip(*placed, strict=True)))
        for call in calls:
            check(call(), expected, bound, slack=1.0)
        named = {str(place): call for (place, _), call in zip(placed, calls, strict=True)}
        times = measure(named | {"peak": peak.call}, rounds=rounds, seconds=LIMIT_S)
        best = min(named, key=lambda name: times[name].min_s)
        duel = measure({name: named[name] for name in {"0", best}}, rounds=rounds, seconds=LIMIT_S / 4)
    return {
        "point": asdict(point),
        "candidates": candidates,
        "peak_flop_per_s": peak.rate(times["peak"]),
        "best": int(best),
        "pick_over_best": max(1.0, duel["0"].min_s / duel[best].min_s),  # fresh samples: the best of many was lucky
        "plans": [_record(place, plan, case.n, times[str(place)]) for place, plan in placed],
    }


def _record(place: int, plan: Plan, n: int, timing: Timing) -> dict[str, Any]:
    return {
        "place": place, "plan": str(plan), "knobs": plan.knobs(), "counts": asdict(plan.counts(n)),
        "predicted_s": estimate(plan, n).seconds, "min_s": timing.min_s, "median_s": timing.median_s,
    }  # fmt: skip


def replay(document: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], list[tuple[Plan, float]]]]:
    """Each matrix of a kept run, with the plans that are still candidates here and their measured seconds."""
    for entry in document["matrices"]:
        problem = point_of(entry["point"]).case().problem
        known = {_key(plan.knobs()): plan for plan in BACKENDS["c"].candidates(problem, native())}
        pairs = [(known.get(_key(row["knobs"])), row["min_s"]) for row in entry["plans"]]
        yield entry, [(plan, seconds) for plan, seconds in pairs if plan is not None]


def _key(knobs: Mapping[str, Any]) -> str:
    return json.dumps(knobs, sort_keys=True)


def point_of(fields: Mapping[str, Any]) -> Point:
    """A Point from its JSON form."""
    return Point(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def kept_loss(entry: Mapping[str, Any]) -> Loss:
    """What the model of that day lost on a matrix."""
    return Loss(entry["pick_over_best"], tuple(row["min_s"] / row["predicted_s"] for row in entry["plans"]))


def again_loss(n: int, pairs: Sequence[tuple[Plan, float]]) -> Loss:
    """What today's model loses among the plans that were timed then."""
    predicted = [estimate(plan, n).seconds for plan, _ in pairs]
    pick = pairs[min(range(len(pairs)), key=predicted.__getitem__)][1]
    times = tuple(seconds / guess for (_, seconds), guess in zip(pairs, predicted, strict=True))
    return Loss(pick / min(seconds for _, seconds in pairs), times)


def summary(losses: Sequence[Loss]) -> dict[str, float]:
    """The figures over all matrices."""
    ratios = [math.log(ratio) for loss in losses for ratio in loss.times]
    return {
        "matrices": len(losses),
        "share_within_15_percent": sum(loss.pick <= NEAR for loss in losses) / len(losses),
        "median_pick_over_best": statistics.median(loss.pick for loss in losses),
        "worst_pick_over_best": max(loss.pick for loss in losses),
        "median_measured_over_predicted": math.exp(statistics.median(ratios)),
        "median_abs_log_error": statistics.median(abs(r) for r in ratios),
        "median_abs_log_error_scaled": statistics.median(abs(r - statistics.median(ratios)) for r in ratios),
    }


def sentence(figures: Mapping[str, float]) -> str:
    """The figure that the benchmark is for, and the model's error in absolute time."""
    return (
        f"the model's pick is within 15 % of the best measured plan for {figures['share_within_15_percent']:.0%} of "
        f"{figures['matrices']:.0f} matrices (goal {GOAL:.0%}); "
        f"median loss {figures['median_pick_over_best'] - 1:.1%}, "
        f"worst {figures['worst_pick_over_best'] - 1:.0%}; predicted seconds are off by a factor of "
        f"{math.exp(figures['median_abs_log_error']):.2f} in the median"
    )


def document(entries: Sequence[Mapping[str, Any]], **settings: Any) -> dict[str, Any]:
    """What is kept of a run."""
    head = {"schema": SCHEMA, "version": VERSION, "machine": machine(), "settings": settings}
    return head | {"summary": summary([kept_loss(entry) for entry in entries]), "matrices": list(entries)}


@click.command()
@click.option("--count", type=click.IntRange(1), default=COUNT, show_default=True, help="Matrices.")
@click.option("--seed", type=int, default=SEED, show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True, help="Of W and X.")
@click.option("--top", type=click.IntRange(1), default=TOP, show_default=True, help="The model's best plans.")
@click.option("--others", type=click.IntRange(0), default=OTHERS, show_default=True, help="Plans from the rest.")
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Compilers at a time.")
@click.option("--rounds", type=click.IntRange(3), default=20, show_default=True)
@click.option("--minutes", type=float, default=math.inf, help="Stop before the next matrix after so many.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file, written anew after each matrix.")
@click.option("--again", type=click.Path(exists=True, path_type=Path), help="Judge today's model by a kept file.")
def main(
    *, count: int, seed: int, dtype: str, minutes: float, out: Path | None, again: Path | None, **how: int
) -> None:
    """Print for how many matrices the model's pick is within 15 % of the best measured plan."""
    if again is not None:
        judge_again(json.loads(again.read_text()))
        return
    at_their_best()
    ceilings, entries, started = Ceilings(), [], time.monotonic()
    for point in draw(count, seed, dtype):
        if time.monotonic() - started > 60 * minutes:
            break
        entries.append(examine(point, how["top"], how["others"], how["jobs"], how["rounds"], ceilings))
        rows = {row["place"]: row for row in entries[-1]["plans"]}
        best, pick = entries[-1]["best"], rows[0]
        click.echo(
            f"{entries[-1]['pick_over_best']:5.2f}x  {pick['min_s'] * 1e6:9.1f} us (predicted "
            f"{pick['predicted_s'] * 1e6:9.1f}) best is number {best:3}  {point}"
        )
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(document(entries, seed=seed, dtype=dtype, **how), indent=1) + "\n")
    click.echo(sentence(summary([kept_loss(entry) for entry in entries])))


def judge_again(kept: Mapping[str, Any]) -> None:
    """Print what today's model makes of kept times."""
    losses = []
    for entry, pairs in replay(kept):
        if pairs:
            losses.append(again_loss(entry["point"]["n"], pairs))
            lost = len(entry["plans"]) - len(pairs)
            note = f"  ({lost} plans are no candidates any more)" if lost else ""
            click.echo(f"{losses[-1].pick:5.2f}x  {point_of(entry['point'])}{note}")
    if not losses:
        raise click.ClickException("no plan of that file is a candidate of this version: take the times anew")
    click.echo(sentence(summary(losses)))


if __name__ == "__main__":
    main()
