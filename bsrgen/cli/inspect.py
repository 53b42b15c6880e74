"""bsrgen inspect: what is in an artifact, or what would become of a weight."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bsrgen.cli.common import console, duration, facts, problem_options, read, show_json, size, type_options, verb
from bsrgen.cli.model import model_document, model_facts, record_of
from bsrgen.errors import ArgumentError

if TYPE_CHECKING:
    from bsrgen.artifact import Artifact
    from bsrgen.cost import Cost
    from bsrgen.pattern import Pattern, Weight
    from bsrgen.plan import Plan
    from bsrgen.verdict import Advice, Verdict

SHAPES = 16  # most rows of the table of block shapes

Rows = list[tuple[str, str]]
Ranked = list[tuple["Cost", "Plan"]]


@click.command()
@problem_options
@type_options
@click.option("--n", type=click.IntRange(1), help="Tokens to count and plan for.  [default: 128]")
@click.option("--png", type=click.Path(path_type=Path), metavar="FILE", help="Write a picture of the pattern there.")
@verb
def inspect(
    *, weight_file: Path, key: str | None, blocksize: tuple[int, int] | None, dtype: str, png: Path | None,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Show a folder, an artifact or a model; or a weight file, the plan the cost model would take, and other shapes.

    Nothing is compiled, and no library is loaded.  The options other than --png are for weight files.  A file without
    blocks is taken in blocks of 1x1: the table of block shapes says which ones its nonzeros would be faster in.
    """
    folder = weight_file.is_dir()
    if folder and (record := record_of(weight_file)) is not None:
        if png is not None:
            raise ArgumentError(f"--png: a model has many patterns; inspect one kernel in {weight_file / 'kernels'}")
        if as_json:
            return show_json(model_document(weight_file, record))
        return model_facts(weight_file, record)
    if folder:
        pattern, document = _artifact(weight_file).pattern(), artifact_document(weight_file)
    else:
        weight = read(weight_file, key, blocksize, dtype, otherwise=(1, 1))
        levels = _levels(weight.pattern, dtype=dtype, **options)
        shapes = _shapes(levels[0][0][1], weight)
        pattern, document = weight.pattern, _weight_document(weight, levels, shapes, options["n"])
    if png is not None:
        from bsrgen.picture import png as encode

        png.write_bytes(encode(pattern))
        document["png"] = str(png)
    if as_json:
        show_json(document)
    elif folder:
        artifact_facts(weight_file)
    else:
        _weight_facts(weight_file.name, weight, levels, options["n"])
        _shape_table(shapes, options["n"])
    if png is not None and not as_json:
        click.echo(f"wrote {png}")


# ── an artifact ──────────────────────────────────────────────────────────────────────────────────────────────────────


def artifact_document(folder: Path) -> dict[str, Any]:
    """The manifest, what its plans do, and its digest."""
    import msgspec

    artifact = _artifact(folder)
    manifest = msgspec.to_builtins(artifact.manifest)
    counts = [level.counts for level in artifact.manifest.levels]
    return {
        "artifact": str(folder), "sha256": artifact.sha256, "pattern": pattern_document(artifact.pattern()),
        "counts": {"n": artifact.manifest.cost.n, "levels": counts}, "manifest": manifest,
    }  # fmt: skip


def artifact_facts(folder: Path, *, short: bool = False, err: bool = False) -> None:
    """The artifact for people; `short` is what `compile` prints."""
    artifact = _artifact(folder)
    m, problem = artifact.manifest, artifact.problem()
    rows: Rows = [("problem", str(problem))]
    for level in m.levels:
        rows.append(("plan", level.plan))
        if not short:
            rows.append(("", f"needs {', '.join(level.requires) or 'nothing beyond the baseline'}"))
            rows += _count_rows(level.counts, m.cost.n)
    measured = "" if m.cost.measured_seconds is None else f", measured {duration(m.cost.measured_seconds)}"
    rows.append(("cost", f"{_cost(m.cost.flop, m.cost.bytes, m.cost.seconds, m.cost.n, m.verdict.where)}{measured}"))
    rows.append(("verdict", str(m.verdict)))
    why = "no GPU that was there runs it" if m.device == "cuda" else "this CPU cannot"
    check = f"not run: {why}" if m.check is None else (
        f"largest error {100 * m.check.worst:.2g} % of the float64 bound at n = {', '.join(map(str, m.check.n))}"
    )  # fmt: skip
    rows.append(("check", check))
    if not short:
        rows += [("tuning" * (not i), str(record)) for i, record in enumerate(m.tuning)]
        rows += [("C", m.prototype), ("compiler", m.compiler), ("flags", " ".join(m.flags))]
        rows += [("bsrgen", f"{m.bsrgen}, ABI {m.abi}, schema {m.schema}")]
        sizes = {name: (artifact.folder / name).stat().st_size for name in m.files}
        rows += [("files" * (not i), f"{name}  {size(n)}") for i, (name, n) in enumerate(sizes.items())]
    rows += [("notes" * (not i), line) for i, line in enumerate(m.notes)]
    rows += [("folder", str(folder)), ("sha256", artifact.sha256)]
    facts(m.name, rows if short else [*rows, *_pattern_rows(problem.pattern)], err=err)


def _artifact(folder: Path) -> "Artifact":
    from bsrgen.artifact import read_artifact

    return read_artifact(folder)


# ── a weight ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _levels(
    pattern: "Pattern", *, operator: str, dtype: str, x_dtype: str | None, out_dtype: str | None,
    epilogue: tuple[str, ...], target: tuple[str, ...], n: int | None,
) -> list[Ranked]:  # fmt: skip
    """For each target its plans, what tune="model" takes first."""
    from bsrgen.backends import BACKENDS
    from bsrgen.choose import allowed
    from bsrgen.problem import as_problem
    from bsrgen.targets import as_targets
    from bsrgen.tune import rank

    problem = as_problem(operator, pattern, dtype, x_dtype, out_dtype, epilogue, n)
    return [rank(allowed(BACKENDS["c"], problem, row), n) for row in as_targets(target)]


def _shapes(plan: "Plan", weight: "Weight") -> tuple["Advice", ...]:
    """The block shapes that the nonzeros could be stored in, for the best target."""
    from bsrgen.advice import block_shapes
    from bsrgen.backends import BACKENDS

    return block_shapes(BACKENDS["c"], plan.problem, weight, plan.target)


def _verdict(ranked: Ranked, weight: "Weight") -> "Verdict":
    from bsrgen.advice import judge
    from bsrgen.backends import BACKENDS

    return judge(BACKENDS["c"], ranked[0][1], ranked, weight)


def _weight_document(
    weight: "Weight", levels: list[Ranked], shapes: tuple["Advice", ...], n: int | None
) -> dict[str, Any]:
    from msgspec import to_builtins

    from bsrgen.cost import estimate
    from bsrgen.tune import PLANNED_N

    n = n or PLANNED_N
    documents = [
        {
            "target": plan.target.name, "plan": str(plan), "knobs": plan.knobs(), "counts": asdict(plan.counts(n)),
            "cost": asdict(estimate(plan, n)), "verdict": to_builtins(_verdict(ranked, weight)),
        }
        for ranked in levels
        for _, plan in ranked[:1]
    ]  # fmt: skip
    problem = levels[0][0][1].problem
    return {
        "problem": str(problem), "pattern": pattern_document(problem.pattern), "notes": list(weight.notes),
        "n": n, "levels": documents, "block_shapes": to_builtins(shapes),
    }  # fmt: skip


def _weight_facts(name: str, weight: "Weight", levels: list[Ranked], n: int | None) -> None:
    from bsrgen.cost import estimate
    from bsrgen.tune import PLANNED_N

    n = n or PLANNED_N
    problem = levels[0][0][1].problem
    rows: Rows = [("problem", str(problem)), *(("note", line) for line in weight.notes)]
    for ranked in levels:
        plan = ranked[0][1]
        cost = estimate(plan, n)
        rows += [("plan", str(plan)), *_count_rows(asdict(plan.counts(n)), n)]
        rows += [("cost", _cost(cost.flop, cost.bytes, cost.seconds, n))]
        rows += [("verdict", str(_verdict(ranked, weight)))]
    facts(name, [*rows, *_pattern_rows(problem.pattern)])


def _shape_table(shapes: tuple["Advice", ...], n: int | None) -> None:
    from rich import box
    from rich.table import Table

    from bsrgen.tune import PLANNED_N

    if not shapes:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("block shape", "covered density", "fill", "predicted", "speed-up"):
        table.add_column(name, justify="left" if name == "block shape" else "right", no_wrap=True)
    for a in (a for at, a in enumerate(shapes) if at < SHAPES or a.given):
        cells = (f"{a.density:.3g}", f"{a.fill:.3g}", duration(a.seconds), f"{a.speedup:.2f}x")
        table.add_row(a.name + " (given)" * a.given, *cells, style="bold" if a.given else "")
    out = console()
    out.print(f"\nthe same nonzeros in other block shapes, n = {n or PLANNED_N}, one core, best plan of the model")
    out.print(table)
    if len(shapes) > SHAPES:
        out.print(f"[dim]and {len(shapes) - SHAPES} more, all slower; --json has them[/]")


# ── both ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def pattern_document(pattern: "Pattern") -> dict[str, Any]:
    """Facts of a pattern as plain data."""
    counts = pattern.row_counts if pattern.known else pattern.row_counts[:0]  # nobody knows yet
    per_row = (
        {"min": int(counts.min()), "mean": float(counts.mean()), "max": int(counts.max())} if counts.size else None
    )
    return {
        "shape": pattern.shape, "blocksize": pattern.blocksize, "nnzb": pattern.nnzb, "density": pattern.density,
        "block_rows": pattern.block_rows, "block_cols": pattern.block_cols, "blocks_per_row": per_row,
        "empty_rows": int((counts == 0).sum()), "sha256": pattern.digest,
    }  # fmt: skip


def _pattern_rows(pattern: "Pattern") -> Rows:
    document = pattern_document(pattern)
    rows: Rows = [("pattern", str(pattern))]
    if per_row := document["blocks_per_row"]:
        spread = f"{per_row['min']} to {per_row['max']}, mean {per_row['mean']:.4g}"
        rows.append(("", f"blocks in a block row: {spread}; {document['empty_rows']} of {pattern.block_rows} empty"))
    rows += [("", line) for line in pattern.picture(80, 24).splitlines()]
    return rows


def _count_rows(c: Mapping[str, float], n: int) -> Rows:
    """`c` holds the fields of plan.Counts."""
    fill = c["flop"] / c["effective_flop"] if c["effective_flop"] else 1.0
    fma, loads = f"{c['vector_fma']:.4g} vector FMAs", f"{c['vector_loads']:.4g} vector loads"
    l1, l2, values, tables, code = (size(c[f"{name}_bytes"]) for name in ("l1", "l2", "value", "table", "code"))
    return [
        ("", f"n = {n}: {c['flop']:.4g} FLOP, {fill:.3g} x those of the stored values; {fma}"),
        ("", f"{loads}; {l1} from L1, {l2} from beyond it"),
        ("", f"{values} of values, {tables} of tables, {code} of code; {c['registers']} vector registers"),
    ]


def _cost(flop: int, count: int, seconds: float, n: int, where: str = "one core") -> str:
    return f"{flop / 1e6:.4g} MFLOP, {size(count)}, predicted {duration(seconds)} at n = {n} on {where}"
