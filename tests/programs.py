"""C programs around artifacts: compilers and emulators that are here, the artifact's example, its answer."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bsrgen import build, package
from bsrgen.artifact import Artifact, write_manifest
from bsrgen.backends import BACKENDS
from bsrgen.pattern import Weight
from bsrgen.plan import Plan
from bsrgen.problem import Problem

Array = np.ndarray[Any, Any]
STRICT = ("-Wall", "-Wextra", "-Werror", "-pedantic")
TOKENS = 4  # of templates/c/example.c.j2
CROSS_ROOT = Path("/usr/aarch64-linux-gnu")  # where Debian's cross compiler keeps the libc of the other machine


def tool(*names: str) -> str:
    """The first of `names` that is installed; else the test is skipped, and says what is missing."""
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"not installed: {' or '.join(names)}")
    return path


def compiler(family: str = "x86_64") -> str:
    """A C compiler for x86_64 or aarch64, cross or not."""
    native = os.uname().machine == family
    return tool("cc", "gcc") if native else tool(f"{family.replace('_', '-')}-linux-gnu-gcc")


def run(command: Sequence[str | Path], cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """stdout of a command that must succeed."""
    words = [str(word) for word in command]
    result = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, f"{shlex.join(words)}: {result.returncode}\n{result.stdout}{result.stderr}"
    return result.stdout


def emulator(family: str, cpu: str = "max") -> list[str]:
    """qemu-user for a program of this architecture on that CPU; needed even where the machine is the same."""
    qemu = [tool(f"qemu-{family}"), "-cpu", cpu]
    if family != os.uname().machine:
        if not (CROSS_ROOT / "lib").is_dir():
            pytest.skip(f"not installed: a C library for {family} in {CROSS_ROOT}")
        qemu += ["-L", str(CROSS_ROOT)]
    return qemu


def build_artifact(plans: Sequence[Plan], weight: Weight, folder: Path) -> Artifact:
    """What `compile` builds of these plans, one per ISA level, past the store and the check."""
    folder.mkdir(parents=True, exist_ok=True)
    cc = build.find_compiler(plans[0].target)
    source = BACKENDS[plans[0].backend].emit(tuple(plans), weight)
    build.build(source, folder, cc)
    manifest = package.describe(source, weight, cc, (), folder, {})
    write_manifest(folder, manifest)
    return Artifact(folder, manifest)


def kernel_name(folder: Path) -> str:
    """Name of the kernel in an artifact."""
    return next(folder.glob("lib*.so")).name[3:-3]


def build_example(folder: Path, program: Path, cc: str, *flags: str) -> Path:
    """example.c of the artifact in `folder`, linked with its library."""
    name = kernel_name(folder)
    link = [f"-I{folder}", f"-L{folder}", f"-l{name}", f"-Wl,-rpath,{folder}"]
    run([cc, "-std=c99", *STRICT, *flags, folder / "example.c", *link, "-o", program])
    return program


def example_answer(stdout: str) -> tuple[str, float]:
    """(ISA level, sum of Y) as the example prints them."""
    found = re.fullmatch(r"(\S+): sum of Y = (\S+)\n", stdout)
    assert found, stdout
    return found[1], float(found[2])


def assert_example_is_right(stdout: str, problem: Problem, weight: Weight, level: str | None = None) -> None:
    """The example's sum is that of the float64 reference: x is all ones, arrays are zeros, scalars are one."""
    target, total = example_answer(stdout)
    assert level in (None, target)
    M, K = weight.pattern.shape
    x = np.ones(problem.operator.shape(TOKENS, K))
    sizes = {"row": (M,), "element": problem.operator.shape(TOKENS, M)}
    given = {o.name: 1.0 if o.kind == "scalar" else np.zeros(sizes[o.kind]) for o in problem.operands}
    expected, bound = problem.reference(weight, x, given, np.zeros(problem.operator.shape(TOKENS, M)))
    assert abs(total - expected.sum()) <= bound.sum() + 1e-8 * abs(expected).sum()
    assert abs(expected).sum() > 0, "a sum of zeros would prove nothing"


DRIVER = Path(__file__).with_name("c") / "driver.c"
DRIVEN = {"row": "r", "element": "e", "scalar": "s"}


def driver_flags(problem: Problem) -> list[str]:
    """What tests/c/driver.c must know of a kernel."""
    p = problem.pattern
    kinds = "".join(DRIVEN[o.kind] for o in problem.operands)
    return [
        f"-DKERNEL={problem.name}", f'-DHEADER="{problem.name}.h"', f"-DREAL={problem.dtype.c}", f"-DM={p.M}",
        f"-DK={p.K}", f"-DVALUES={p.nnz}", f"-DLINEAR={int(problem.operator.token_axis == 0)}",
        f'-DOPERANDS="{kinds}"',
    ]  # fmt: skip


def sample(features: int, n: int) -> Array:
    """What the driver fills its arrays with: [features, n]."""
    f, t = np.ogrid[:features, :n]
    return np.asarray((f * 5 + t * 3) % 7 - 3) / 4


def assert_driver_is_right(stdout: str, problem: Problem, weight: Weight) -> None:
    """Each sum that the driver prints is that of the float64 reference."""
    M, K = weight.pattern.shape
    linear = problem.operator.token_axis == 0
    lines = [line.split() for line in stdout.splitlines()]
    assert len(lines) == 2 * 16, stdout
    for n, total in ((int(n), float(total)) for n, total in lines):
        x, old = (a.T if linear else a for a in (sample(K, n), sample(M, n)))
        given = {}
        for i, o in enumerate(problem.operands):
            given[o.name] = {"row": sample(M, i + 1)[:, i], "element": old, "scalar": np.array(0.5 + i)}[o.kind]
        expected, bound = problem.reference(weight, x, given, old)
        assert abs(total - expected.sum()) <= bound.sum() + 1e-12, f"n = {n}: {total}, expected {expected.sum()}"
