"""bsrgen bench: is sparse worth it for this weight, on this machine?"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from bsrgen.cli.common import (
    console,
    numbers,
    plain,
    problem_options,
    read,
    show_json,
    size,
    tune_option,
    verb,
    working,
)

if TYPE_CHECKING:
    from bsrgen.bench.report import Comparison
    from bsrgen.pattern import Weight

PACKAGES = ("numpy", "scipy", "mkl", "torch")
UNREST = 1.25  # usual over best time, above which a run is called disturbed
FEW = 8  # tokens up to which reading the weight is the limit


@click.command()
@problem_options
@click.option("--n", "ns", callback=numbers, default="1,32,128", show_default=True, help="Tokens, a table for each.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="For bsrgen and all peers.")
@click.option("--rounds", type=click.IntRange(3), default=30, show_default=True, help="Samples of each contender.")
@click.option(
    "--mode",
    type=click.Choice(("static", "dynamic", "pit")),
    default="static",
    show_default=True,
    help="dynamic: also a kernel that takes the weight with the call, and preparing one.",
)
@click.option("--axis", type=click.Choice(("tokens", "features", "experts", "outputs")), default="tokens",
              show_default=True, help="Of --mode pit: what calls leave out.")  # fmt: skip
@tune_option
@verb
def bench(
    *, weight_file: Path, key: str | None, blocksize: tuple[int, int] | None, dtype: str,
    ns: tuple[int, ...], as_json: bool, threads: int, mode: Literal["static", "dynamic", "pit"], axis: str,
    **options: Any,
) -> None:  # fmt: skip
    """Time the kernel of WEIGHT against every installed library, and say whether sparse is worth it.

    Values are the file's, activations random.  All contenders and the multiply-add peak of the core take turns in one
    run.  Rates count stored elements only, for dense products too; speed-up is that of bsrgen over each.  With
    --epilogue, bsrgen is timed with it as well; the libraries compute the product alone.  The last line is the verdict,
    with the density up to which sparse would win; the one before it names the block shape of the same nonzeros that
    would be faster by the model (bsrgen inspect has the table).  With --mode dynamic one more line says what it costs
    that a pattern comes with the call, and to prepare one.

    With --mode pit the weight is taken as dense, activations or outputs are thinned out along --axis, from 100 to 1 %
    live, on one core; features and outputs in blocks of 1x16 and 32x64.  For experts the rows of the weight are cut
    into 8 (4, 2) of them, and tokens go to them by Zipf's law; dense is all tokens by one of them.
    """
    from bsrgen.bench.clock import at_their_best, peer_threads

    if click.get_current_context().find_root().obj is True:
        at_their_best(threads)
    from bsrgen.bench import report
    from bsrgen.bench.ceilings import Ceilings

    weight = read(weight_file, key, blocksize, dtype)
    if mode == "pit":
        _pit(weight_file, weight, axis, ns, dtype, options["rounds"], as_json)
        return
    request = report.Request(threads=threads, dtype=dtype, mode=mode, **options)
    comparisons = []
    with peer_threads(threads):
        with working("measuring the ceilings of this core"):
            ceilings = Ceilings()
        for n in ns:
            with working(f"n = {n}") as progress:
                comparisons.append(report.compare(weight, request, n, ceilings, progress))
            if not as_json:
                if len(comparisons) == 1:
                    _head(weight_file, comparisons[0])
                _table(comparisons[-1])
    if as_json:
        show_json({"weight": str(weight_file), "machine": _machine(), **report.document(comparisons)})
        return
    _notes(comparisons)
    if request.mode == "dynamic":
        click.echo(f"dynamic: {report.dynamic_verdict(comparisons)}")
    click.echo(f"block shapes: {report.block_shapes(comparisons)}")
    click.echo(f"verdict: {report.verdict(comparisons)}")


def _pit(
    weight_file: Path, weight: "Weight", axis: str, ns: tuple[int, ...], dtype: str, rounds: int, as_json: bool
) -> None:
    """The table of --mode pit for each number of tokens."""
    from bsrgen.bench.clock import peer_threads
    from bsrgen.bench.pit import compare

    found: list[dict[str, Any]] = []
    with peer_threads(1):
        for n in ns:
            with working(f"n = {n}") as progress:
                blocks = {"features": (1, 16), "outputs": (32, 64)}.get(axis, (1, 1))
                W = weight.todense().astype("float32")
                if axis == "experts":
                    W = W.reshape(next(e for e in (8, 4, 2, 1) if len(W) % e == 0), -1, W.shape[1])
                kernel, rows = compare(W, axis, n, dtype, blocks, rounds=rounds, progress=progress)
            found += [
                {"n": n, "live": row.live, "seconds": row.timing.min_s, "dense": row.dense,
                 "dense_seconds": row.dense_timing.min_s, "speedup": row.gain}
                for row in rows
            ]  # fmt: skip
            if not as_json:
                click.echo(f"{weight_file.name}: {kernel.problem}, n = {n}, one core; dense: {rows[0].dense}")
                for row in rows:
                    times = f"{row.timing.min_s * 1e6:10.1f} us, dense {row.dense_timing.min_s * 1e6:10.1f} us"
                    click.echo(f"{row.selection:>12} {times} {row.gain:7.2f}x")
    if as_json:
        show_json({"weight": str(weight_file), "machine": _machine(), "axis": axis, "rows": found})
        return
    worst = min(found, key=lambda row: row["speedup"])
    even = max((row["live"] for row in found if row["speedup"] > 1), default=0.0)
    click.echo(
        f"verdict: by {axis} faster than dense up to {100 * even:.3g} % live; at worst {worst['speedup']:.2f}x, "
        f"n = {worst['n']}, {100 * worst['live']:.3g} % live"
    )


def _machine() -> dict[str, Any]:
    from bsrgen.machine import cpu_model, versions
    from bsrgen.targets import native

    installed = {name: version for name, version in versions(PACKAGES).items() if version}
    return {"cpu": cpu_model(), "target": native().name, "packages": installed}


def _head(weight_file: Path, c: "Comparison") -> None:
    machine = _machine()
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    threads = "one thread" if c.threads == 1 else f"{c.threads} threads"
    out = console()
    out.print(f"[bold]{plain(weight_file.name)}[/]: {plain(str(c.problem))}, {threads}", soft_wrap=True)
    out.print(f"[dim]{plain(machine['cpu'])}, {machine['target']}; {packages}[/]", soft_wrap=True)


def _table(c: "Comparison") -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(f"n = {c.n}", min_width=34, no_wrap=True)
    for name in ("min us", "median us", "GFLOP/s", "speed-up"):
        table.add_column(name, justify="right", no_wrap=True, min_width=10)
    for row in c.rows:
        own = row.kind == "bsrgen"
        cells = [f"{row.timing.min_s * 1e6:.1f}", f"{row.timing.median_s * 1e6:.1f}", f"{c.rate(row) / 1e9:.1f}"]
        gain = "" if own else f"{row.gain:.2f}x"
        table.add_row(row.name, *cells, gain, style="bold" if own else "")
    table.add_row(f"peak ({c.peak.row})", "", "", f"{c.peak_flop_per_s / 1e9:.1f}", "", style="dim")
    shares = [f"{100 * c.peak_share:.0f} % of peak"]
    if c.n <= FEW:
        rate, held = f"{c.read_bytes_per_s / 1e9:.0f} GB/s", size(c.kernel.plan.value_bytes)
        shares.append(f"{100 * c.read_share:.0f} % of this core's {rate} ({held} of weight)")
    out = console()
    out.print()
    out.print(table)
    out.print(f"bsrgen: {', '.join(shares)}; error {100 * c.error_share:.1f} % of its bound", soft_wrap=True)
    out.print(f"[dim]{plain(str(c.kernel.plan))}[/]")


def _notes(comparisons: list["Comparison"]) -> None:
    from bsrgen.bench.peers import SAME

    reasons: dict[str, list[str]] = {}
    for c in comparisons:
        for name, why in c.absent.items():
            if why.startswith(SAME):
                continue
            names = reasons.setdefault(why, [])
            if name not in names:
                names.append(name)
    out = console()
    out.print()
    for why, names in reasons.items():
        out.print(f"[dim]not timed: {', '.join(names)}: {plain(why)}[/]", soft_wrap=True)
    unrest = max(c.unrest for c in comparisons)
    if unrest > UNREST:
        out.print(f"[yellow]other work disturbed this run: usual times are {unrest:.1f} x the best; run it again[/]")
