"""bsrgen compile: a weight file -> an artifact."""

import sys
import time
from pathlib import Path
from typing import Any, Literal

import click
from click.core import ParameterSource

from bsrgen.cli.common import (
    pair,
    problem_options,
    read,
    show_json,
    tune_option,
    type_options,
    verb,
    working,
)
from bsrgen.errors import ArgumentError


@click.command("compile")
@problem_options
@type_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for the artifact; replaced if it is one.")
@click.option("--n", type=click.IntRange(1), help="Tokens to plan for; the kernel takes any number.")
@click.option(
    "--mode",
    type=click.Choice(["static", "dynamic", "pit"]),
    default="static",
    show_default=True,
    help="dynamic: calls bring any weight of this shape, block shape and type; pit: they say what of --axis counts.",
)
@click.option(
    "--axis",
    type=click.Choice(["tokens", "features", "experts", "outputs"]),
    help="pit: what calls leave out.  Of experts WEIGHT holds one array [E, M, K], or --key names all.",
)
@click.option("--mask-block", callback=pair, metavar="TxF",
              help="pit, --axis outputs: tokens x features of a block of the mask.")  # fmt: skip
@click.option("--max-blocks", type=click.IntRange(0), help="dynamic: the most blocks of one, if more than WEIGHT has.")
@click.option("--strict", is_flag=True, help="Absent blocks contribute nothing even where x holds Inf or NaN.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "c", "mlir", "cuda"]),
    default="auto",
    show_default=True,
    help="What prints the kernel; auto is c.",
)
@click.option("--config", type=click.Path(path_type=Path), metavar="TOML",
              help="Compile the layers of a model that this file chooses, into one folder.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(1), help="Kernels at a time, with --config.  [default: one a core]")
@tune_option
@verb
def compile_(
    *, weight_file: Path, key: str | None, blocksize: tuple[int, int] | None, output: Path | None, as_json: bool,
    dtype: str, tune: Literal["off", "model", "measure"], config: Path | None, jobs: int | None, **options: Any,
) -> None:  # fmt: skip
    """Compile the kernel of WEIGHT, check it, and write its artifact.

    With --config, WEIGHT is the file of a whole model, and its table of layers says what becomes a kernel and how.  Of
    an .onnx file the folder also holds the file rewritten, for ONNX Runtime with the library beside it.

    Without -o the artifact is left in the store, and its folder is all that is printed on stdout.  What is printed ends
    in the verdict, and in the block shape of the same nonzeros that would be faster, if there is one.
    """
    from bsrgen import api
    from bsrgen.cli.inspect import artifact_document, artifact_facts

    if config is not None:
        return _model(weight_file, config, output, jobs, as_json)
    if options["mode"] == "pit":  # which takes W dense, where it has no blocks
        weight, options["blocksize"] = _whole(weight_file, key, options["axis"]), blocksize
    else:
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


def _whole(weight_file: Path, key: str | None, axis: str | None) -> Any:
    """The weight of a file as it is there, or those of all experts."""
    from bsrgen.files import read_matrix

    if axis == "experts" and key is not None:
        return [read_matrix(weight_file, part.strip()) for part in key.split(",")]
    return read_matrix(weight_file, key)


def _model(weight_file: Path, config: Path, output: Path | None, jobs: int | None, as_json: bool) -> None:
    """All layers that the tables of `config` choose."""
    from concurrent.futures import ThreadPoolExecutor

    from bsrgen.assemble import compile_model
    from bsrgen.cli.model import model_document, model_facts
    from bsrgen.machine import parallel_cores

    given = click.get_current_context().get_parameter_source
    alone = {"weight_file", "config", "output", "jobs", "as_json", "verbose"}
    others = [name for name in click.get_current_context().params if name not in alone]
    for name in others:
        if given(name) is ParameterSource.COMMANDLINE:
            raise ArgumentError(
                f"--{name.replace('_', '-')} with --config: say it in {config}, for the layers it is for"
            )
    if output is None:
        raise ArgumentError("--config needs -o FOLDER: a model is a folder of artifacts")
    start = time.perf_counter()
    make: Any = compile_model
    if weight_file.suffix == ".onnx":
        from bsrgen.integrations.onnx import convert

        make = convert
    with ThreadPoolExecutor(jobs or parallel_cores()) as pool, working(f"compiling {weight_file.name}") as progress:
        model = make(weight_file, config, output, executor=pool, progress=progress)
    seconds = time.perf_counter() - start
    if as_json:
        show_json({"seconds": seconds, **model_document(output, model.record)})
    else:
        model_facts(output, model.record, f", in {seconds:.1f} s")
