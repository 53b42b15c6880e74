"""The constants of bsrgen/backends/c/count.py, fitted to what `accuracy` measured.

    python -m benchmarks accuracy --seed 61 --out fit.json
    python -m benchmarks fit fit.json

Prints each constant of `Fitted`, and the rates of the target, as they are and as they fit best: least squares of log
time over all plans, the faster a plan the more it weighs, soft on outliers.  A matrix's own common factor counts
little, because a rank does not see it.
"""

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from benchmarks.accuracy import Loss, replay, sentence, summary
from bsrgen.backends.c import count
from bsrgen.plan import Plan
from bsrgen.targets import native

Array = NDArray[Any]
Measured = list[tuple[int, list[tuple[Plan, float]]]]  # tokens, plans and seconds of each matrix
RATES = ("l2_bytes_per_cycle", "l3_bytes_per_cycle", "call_s")  # of the target, free too
COMMON = 0.7  # share of a matrix's common factor that is taken out
STIFF = 0.05  # pull towards today's constants: some are hardly seen by the data
FREEDOM = 6.0  # times up and down
MOST = {"overlap": 0.8, "load_share": 1.05}  # what more would mean nothing


def read(paths: Sequence[Path]) -> Measured:
    """All matrices of kept runs with the plans that are still candidates."""
    entries = [entry for path in paths for entry in replay(json.loads(path.read_text()))]
    return [(entry["point"]["n"], pairs) for entry, pairs in entries if pairs]


def predict(measured: Measured, constants: Array) -> list[Array]:
    """Seconds of every plan under other constants: `cost.estimate` with them."""
    names = [field.name for field in fields(count.Fitted)]
    fitted = count.Fitted(*(float(c) for c in constants[: len(names)]))
    rates = dict(zip(RATES, map(float, constants[len(names) :]), strict=True))

    def seconds(plan: Plan, n: int) -> float:
        target = replace(plan.target, **rates)
        cycles = count.counts(replace(plan, target=target), n, fitted).cycles
        return cycles / (target.ghz * 1e9) + target.call_s

    return [np.array([seconds(plan, n) for plan, _ in pairs]) for n, pairs in measured]


def residuals(measured: Measured, logs: Array, start: Array) -> Array:
    """What least squares makes small."""
    parts = [STIFF * (logs - start)]
    for (_, pairs), predicted in zip(measured, predict(measured, np.exp(logs)), strict=True):
        seconds = np.array([s for _, s in pairs])
        ratio = np.log(predicted / seconds)
        parts.append(np.sqrt(seconds.min() / seconds) * (ratio - COMMON * np.median(ratio)))
    return np.concatenate(parts)


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(files: tuple[Path, ...]) -> None:
    """Print constants that fit the times in FILES best, and what the model loses with them."""
    measured = read(files)
    if not measured:
        raise click.ClickException("no plan of these files is a candidate of this version: take the times anew")
    names = [field.name for field in fields(count.Fitted)] + list(RATES)
    now = [getattr(count.FITTED, field.name) for field in fields(count.Fitted)]
    start = np.log(np.array(now + [getattr(native(), rate) for rate in RATES]))
    high = np.array([min(s + np.log(FREEDOM), np.log(MOST.get(n, np.inf))) for n, s in zip(names, start, strict=True)])
    click.echo(f"{len(measured)} matrices, {sum(len(pairs) for _, pairs in measured)} plans")
    fit = least_squares(
        lambda logs: residuals(measured, logs, start), start, bounds=(start - np.log(FREEDOM), high + 1e-9),
        loss="soft_l1", f_scale=0.15, diff_step=0.02, max_nfev=25,
    )  # fmt: skip
    for name, before, after in zip(names, np.exp(start), np.exp(fit.x), strict=True):
        click.echo(f"{name:20} {before:10.3g} {after:10.3g}")
    losses = [
        Loss(
            pairs[int(p.argmin())][1] / min(s for _, s in pairs),
            tuple(s / t for (_, s), t in zip(pairs, p, strict=True)),
        )
        for (_, pairs), p in zip(measured, predict(measured, np.exp(fit.x)), strict=True)
    ]
    click.echo(sentence(summary(losses)))
