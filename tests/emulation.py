"""Artifacts whose matrix unit is tests/c/amx_emulation.h: the same text, on any machine with a C compiler."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from support import REPOSITORY

from bsrgen import build, package
from bsrgen.artifact import read_artifact, write_manifest
from bsrgen.backends.c import CPlan, emit
from bsrgen.kernel import Kernel
from bsrgen.pattern import Weight
from bsrgen.targets import TARGETS, Target, native

AMX = TARGETS["x86-64-v4-amx"]
HEADER = REPOSITORY / "tests" / "c" / "amx_emulation.h"


def emulated(target: Target = AMX, flags: Sequence[str] | None = None) -> Target:
    """`target` with nothing that this machine lacks; vectors keep their length, whatever carries them out."""
    return replace(target, flags=(*(native().flags if flags is None else flags), "-Wno-psabi"), requires=())


def build_emulated(
    plans: CPlan | Sequence[CPlan], weight: Weight, folder: Path, compiler: build.Compiler | None = None
) -> Kernel:
    """Print, compile with warnings as errors and load plans, the matrix unit's among them emulated."""
    plans = (plans,) if isinstance(plans, CPlan) else tuple(plans)
    source = emit(plans, weight)
    extra = ("-O1", "-Werror", "-D_GNU_SOURCE=", "-include", str(HEADER))  # defined as main.c defines it, but before
    source = replace(source, units=tuple(replace(unit, flags=(*unit.flags, *extra)) for unit in source.units))
    compiler = compiler or build.find_compiler(plans[0].target)
    folder.mkdir(parents=True, exist_ok=True)
    build.build(source, folder, compiler)
    write_manifest(folder, package.describe(source, weight, compiler, (), folder, {}))
    return Kernel(read_artifact(folder), threads=1)
