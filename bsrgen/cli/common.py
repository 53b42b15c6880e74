"""What the verbs share: option types, the options of a problem, --json, --verbose, errors and exit codes."""

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bsrgen.errors import ArtifactError, BsrgenError, BuildError, StoreError

if TYPE_CHECKING:
    from rich.console import Console

    from bsrgen.pattern import Weight

FAILED, USAGE, BUILD, ARTIFACT, INTERRUPTED = 1, 2, 3, 4, 130
EXIT_CODES = """
\b
Exit codes:
  0  done
  1  a check failed: verify, doctor; some matrices could not be tuned: tune
  2  usage, or an input that cannot be used
  3  the build failed, or the store or the output cannot be written
  4  the artifact is damaged, or not for this CPU or this bsrgen
  130  interrupted; tune keeps what it has done
"""
_CODES: tuple[tuple[type[Exception], int], ...] = (
    (ArtifactError, ARTIFACT),
    (BuildError, BUILD),
    (StoreError, BUILD),
    (BsrgenError, USAGE),
    (OSError, BUILD),
)
PIPE_COLUMNS = 100  # where nobody says how wide the output is


def pair(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """RxC, e.g. 32x1 -> (R, C)."""
    if text is None:
        return None
    R, _, C = text.partition("x")
    if not (R.isdecimal() and C.isdecimal() and int(R) and int(C)):
        raise click.BadParameter(f"{text!r} is not a block shape; give rows x columns, e.g. 32x1")
    return int(R), int(C)


def numbers(ctx: click.Context, param: click.Parameter, text: str) -> tuple[int, ...]:
    """Numbers from 1 up, separated by commas; each counts once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise click.BadParameter(f"{text!r}: numbers from 1 up, separated by commas, e.g. 1,32,128")
    return tuple(dict.fromkeys(map(int, parts)))


def names(ctx: click.Context, param: click.Parameter, text: str) -> tuple[str, ...]:
    """Words separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def byte_count(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    """Bytes, or with K, M, G or T powers of 1024."""
    if text is None:
        return None
    power = "KMGT".find(text[-1:].upper()) + 1 if text else 0
    digits = text[:-1] if power else text
    if not digits.isdecimal():
        raise click.BadParameter(f"{text!r} is not a size; e.g. 500M or 2G")
    return int(digits) << 10 * power


def verb(command: Callable[..., int | None]) -> Callable[..., None]:
    """Adds --json (passed on as `as_json`) and --verbose; errors become one line and an exit code.

    What `command` returns is the exit code, None for 0.
    """

    @click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout and nothing else.")
    @click.option("--verbose", is_flag=True, help="Log what is built and loaded, on stderr.")
    @functools.wraps(command)
    def run(*, verbose: bool, as_json: bool, **options: Any) -> None:
        if verbose:
            import logging

            logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", force=True)
        try:
            code = command(as_json=as_json, **options) or 0
        except (BsrgenError, OSError) as e:
            if isinstance(e, BrokenPipeError):
                raise
            code = next(code for kind, code in _CODES if isinstance(e, kind))
            text = printable(" ".join(str(e).split()))
            click.echo(f"bsrgen: error: {text}", err=True)
            if as_json:
                show_json({"error": {"type": type(e).__name__, "message": text, "exit_code": code}})
        click.get_current_context().exit(code)

    return run


def problem_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The weight and what is to be computed with it: passed on as `weight_file` and the names of bsrgen.compile."""
    command = kernel_options(command)
    command = click.option("--key", help="Name of the matrix, where the file holds several.")(command)
    return click.argument("weight_file", metavar="WEIGHT", type=click.Path(path_type=Path))(command)


def kernel_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What is to be computed, by the names of bsrgen.compile."""
    for option in (
        click.option("--target", callback=names, default="native", show_default=True, metavar="A,B,...",
                     help="ISA levels or microarchitectures for one library, e.g. x86-64-v3,x86-64-v4."),
        click.option("--epilogue", callback=names, default="", metavar="A,B,...", help="Fused steps, e.g. bias,gelu."),
        click.option("--dtype", default="float32", show_default=True,
                     help="Of W: float32, float64, bfloat16, float16, or int8, to which other types are quantised."),
        click.option("--blocksize", callback=pair, metavar="RxC", help="Needed where the file has no blocks."),
        click.option("--operator", default="linear", show_default=True, help="linear: x @ W.T, or spmm: W @ x."),
    ):  # fmt: skip
        command = option(command)
    return command


def type_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Types other than W's, as bsrgen.compile has them."""
    for option in (
        click.option("--out-dtype", help="Of Y.  [default: --x-dtype, float32 where that is int8]"),
        click.option("--x-dtype", help="Of X: float32 or bfloat16 where only W is to be shorter.  [default: --dtype]"),
    ):
        command = option(command)
    return command


def tune_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--tune, as bsrgen.compile has it."""
    return click.option(
        "--tune", type=click.Choice(["off", "model", "measure"]), default="model", show_default=True,
        help="How the plan is chosen: the first legal one, by the cost model, by the clock.",
    )(command)  # fmt: skip


def read(
    weight_file: Path,
    key: str | None,
    blocksize: tuple[int, int] | None,
    dtype: str,
    otherwise: tuple[int, int] | None = None,
) -> "Weight":
    """The weight in a file, as `dtype`; in blocks of `otherwise` where neither the file nor `blocksize` has any."""
    from bsrgen.dtypes import as_dtype
    from bsrgen.files import read_weight
    from bsrgen.quantize import source_of

    element = as_dtype(dtype)
    return source_of(read_weight(weight_file, key=key, blocksize=blocksize, otherwise=otherwise), element)


def show_json(value: Any) -> None:
    """`value` on stdout."""
    click.echo(json.dumps(value, indent=2, allow_nan=False, default=str))


def console(*, err: bool = False) -> "Console":
    """A rich console; as wide as the terminal, else PIPE_COLUMNS."""
    from rich.console import Console

    stream = sys.stderr if err else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else PIPE_COLUMNS, highlight=False)


def facts(title: str, rows: list[tuple[str, str]], *, err: bool = False) -> None:
    """A title and two columns of text, for people."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(f"  {name}", plain(text))
    out = console(err=err)
    out.print(f"[bold]{plain(title)}[/]")
    out.print(table)


def printable(text: str) -> str:
    """`text` with what could steer a terminal written as escapes: file names come from strangers."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def plain(text: str) -> str:
    """`text` as rich should print it: no markup, no control characters."""
    from rich.markup import escape

    return escape(printable(text))


@contextlib.contextmanager
def working(what: str) -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr while something runs, where stderr is a terminal; yields how to tell the share done."""
    if not sys.stderr.isatty():
        yield lambda share: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(30), TimeElapsedColumn())
    # no refresh of its own: a thread that wakes up ten times a second is in every timing
    with Progress(*columns, console=console(err=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task(plain(what), total=None)
        bar.refresh()
        yield lambda share: bar.update(task, total=1.0, completed=share, refresh=True)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"
