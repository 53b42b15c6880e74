"""runtime/bsrgen_parallel.h and bsrgen_scratch.h: the modes of runtime/threads_test.c, for every machine."""

import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "runtime" / "threads_test.c"
WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror")
FLAGS = ("-std=gnu11", "-O2", "-g", *WARNINGS, f"-I{ROOT / 'runtime'}", "-pthread")
CLANG = next(filter(shutil.which, ("clang", *(f"clang-{version}" for version in range(25, 12, -1)))), "clang")
ARM_ROOT = Path("/usr/aarch64-linux-gnu")  # where Debian and Fedora keep the C library of the cross compiler

FORKS = ("fork", "fork_busy", "fork_handler", "fork_dlclose")
THREADS = ("counts", "nested", "concurrent", "create_fails", "signals", "float_mode", "scratch")
MODES = (*THREADS, "scratch_warm", "exit", "dlclose", *FORKS)


@dataclass(frozen=True)
class Machine:
    """A compiler, its flags, the command that runs what it makes, and the modes that mean something there."""

    compiler: str
    flags: tuple[str, ...] = ()
    runner: tuple[str, ...] = ()
    modes: tuple[str, ...] = MODES


MACHINES = {
    "gcc": Machine("gcc"),
    "clang": Machine(CLANG),
    "tsan": Machine("gcc", ("-fsanitize=thread",), modes=THREADS),  # it forbids threads in a forked child
    # qemu-user does not fork a process of several threads reliably: its child may abort or hang in qemu's own locks
    "aarch64": Machine(
        "aarch64-linux-gnu-gcc", runner=("qemu-aarch64", "-L", str(ARM_ROOT)), modes=tuple(sorted({*MODES} - {*FORKS}))
    ),
}
BROKEN = {  # what the tools say when it is they that fail
    "unexpected memory mapping": "ThreadSanitizer cannot map its shadow here (vm.mmap_rnd_bits)",
}
every_machine = pytest.mark.parametrize("machine", MACHINES)


def compile_c(machine: Machine, *arguments: str) -> None:
    """Run the compiler; warnings are errors."""
    done = subprocess.run([machine.compiler, *FLAGS, *machine.flags, *arguments], capture_output=True, text=True)
    if "-fsanitize=thread" in machine.flags and "libtsan" in done.stderr:
        pytest.skip("the compiler has no ThreadSanitizer")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(machine): the test program and the library that it opens, compiled once."""

    @cache
    def built(name: str) -> tuple[Path, Path]:
        machine = MACHINES[name]
        for tool in filter(None, (machine.compiler, *machine.runner[:1])):
            if shutil.which(tool) is None:
                pytest.skip(f"no {tool}")
        folder = tmp_path_factory.mktemp(name)
        program, library = folder / "threads_test", folder / "threads_test.so"
        compile_c(machine, str(SOURCE), "-o", str(program), "-Wl,--wrap=pthread_create", "-ldl")
        compile_c(machine, "-DLIBRARY", "-fPIC", "-shared", str(SOURCE), "-o", str(library))
        return program, library

    return built


@pytest.mark.parametrize(
    ("machine", "mode"), [(name, mode) for name, machine in MACHINES.items() for mode in machine.modes]
)
def test_mode(build, machine, mode):
    program, library = build(machine)
    command = [*MACHINES[machine].runner, str(program), mode, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    for sign, reason in BROKEN.items():
        if sign in done.stderr:
            pytest.skip(reason)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


@every_machine
def test_all_modes_are_tested(build, machine):
    program, _ = build(machine)
    usage = subprocess.run([*MACHINES[machine].runner, str(program)], capture_output=True, text=True).stderr
    assert sorted(usage.split("modes:")[1].split()) == sorted((*MODES, "--bench"))


@every_machine
@pytest.mark.parametrize("headers", [("parallel",), ("scratch",), ("scratch", "parallel", "parallel")], ids="+".join)
def test_headers_compile_unused(build, machine, headers, tmp_path):
    build(machine)
    text = "#define _GNU_SOURCE\n" + "".join(f'#include "bsrgen_{header}.h"\n' for header in headers)
    (tmp_path / "unused.c").write_text(text)
    compile_c(MACHINES[machine], "-c", str(tmp_path / "unused.c"), "-o", str(tmp_path / "unused.o"))


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_headers_export_nothing(build):
    _, library = build("gcc")
    lines = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in lines.stdout.splitlines()] == ["call"]
