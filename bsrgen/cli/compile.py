"""bsrgen compile: a weight file -> an artifact."""

import sys
import time
from pathlib import Path
from typing import Any, Literal

import click

from bsrgen.cli.common import problem_options, read, show_json, tune_option, type_options, verb, working


@click.command("compile")
@problem_options
@type_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for the artifact; replaced if it is one.")
@click.option("--n", type=click.IntRange(1), help="Tokens to plan for; the kernel takes any number.")
@click.option(
    "--mode",
    type=click.Choice(["static", "dynamic"]),
    default="static",
    show_default=True,
    help="dynamic: calls bring any weight of this shape, block shape and type.",
)
@click.option("--max-blocks", type=click.IntRange(0), help="dynamic: the most blocks of one, if more than WEIGHT has.")
@click.option("--strict", is_flag=True, help="Absent blocks contribute nothing even where x holds Inf or NaN.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "c", "mlir", "cuda"]),
    default="auto",
    show_default=True,
    help="What prints the kernel; auto is c.",
)
@tune_option
@verb
def compile_(
    *, weight_file: Path, key: str | None, blocksize: tuple[int, int] | None, output: Path | None, as_json: bool,
    dtype: str, tune: Literal["off", "model", "measure"], **options: Any,
) -> None:  # fmt: skip
    """Compile the kernel of WEIGHT, check it, and write its artifact.

    Without -o the artifact is left in the store, and its folder is all that is printed on stdout.  What is printed ends
    in the verdict, and in the block shape of the same nonzeros that would be faster, if there is one.
    """
    from bsrgen import api
    from bsrgen.cli.inspect import artifact_document, artifact_facts

    weight = read(weight_file, key, blocksize, dtype)
    start = time.perf_counter()
    with working(f"compiling {weight_file.name}"):
        kernel = api.compile(weight, dtype=dtype, tune=tune, **options)
    seconds = time.perf_counter() - start
    folder = kernel.artifact.folder if output is None else kernel.save(output)
    if as_json:
        show_json({"folder": str(folder), "seconds": seconds, **artifact_document(folder)})
    elif output is None:
        if sys.stderr.isatty():
            artifact_facts(folder, short=True, err=True)
        click.echo(folder)
    else:
        artifact_facts(folder, short=True)
