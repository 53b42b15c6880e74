"""The command line of bsrgen; its verbs are the stages."""

from typing import Any

import click

from bsrgen import __version__
from bsrgen.cli.bench import bench
from bsrgen.cli.cache import cache
from bsrgen.cli.common import EXIT_CODES
from bsrgen.cli.compile import compile_
from bsrgen.cli.doctor import doctor
from bsrgen.cli.inspect import inspect
from bsrgen.cli.tune import tune
from bsrgen.cli.verify import verify

HELP = f"""Turn one fixed block-sparse weight into one fast kernel.

WEIGHT is a .npz (scipy.sparse.save_npz, or arrays data, indices, indptr, shape), .npy or .safetensors file.
Every verb takes --json and --help.
{EXIT_CODES}
\b
Environment:
  BSRGEN_CACHE_DIR    folder of the store (else the user's cache folder)
  BSRGEN_DISABLE_JIT  1: never compile, use what the store holds
  BSRGEN_CC           the C compiler
  BSRGEN_NUM_THREADS  threads of a call that does not say how many
"""


class _Group(click.Group):
    """Tells the verbs, as ctx.obj, whether this process is theirs alone: `bench` may then start it again."""

    def main(self, args: Any = None, *rest: Any, **extra: Any) -> Any:
        """click's entry; without `args` those of the process count."""
        return super().main(args, *rest, obj=args is None, **extra)


@click.group(cls=_Group, help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="bsrgen")
def main() -> None:
    """Group of the verbs."""


for _verb in (compile_, tune, bench, inspect, verify, doctor, cache):
    main.add_command(_verb)


if __name__ == "__main__":
    main(prog_name="bsrgen")
