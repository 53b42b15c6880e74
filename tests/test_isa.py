"""One artifact on other CPUs, under qemu-user: the best level that the CPU has, the right sum, never SIGILL."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from programs import (
    DRIVER,
    assert_driver_is_right,
    assert_example_is_right,
    build_example,
    compiler,
    driver_flags,
    emulator,
    kernel_name,
    run,
    tool,
)
from support import REPOSITORY, problem_of

import bsrgen
from bsrgen.backends.c import text
from bsrgen.errors import IncompatibleCPUError
from bsrgen.pattern import Weight, random_weight
from bsrgen.problem import Problem
from bsrgen.targets import TARGETS, Target, native

x86 = pytest.mark.skipif(native().family != "x86_64", reason=f"runs x86-64 code, this is {native().family}")
LEVELS = ("x86-64", "x86-64-v3", "x86-64-v4")
CPUS = {"qemu64": "x86-64", "Nehalem": "x86-64", "Haswell": "x86-64-v3", "max": "x86-64-v3"}  # qemu has no AVX-512
Saved = Callable[..., tuple[Path, Problem, Weight]]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """compile(...).save(...), once for the same arguments."""
    done: dict[tuple[object, ...], tuple[Path, Problem, Weight]] = {}

    def save(
        target: str | tuple[str, ...], operator: str = "linear", dtype: str = "float32",
        blocksize: tuple[int, int] = (4, 4), epilogue: tuple[str, ...] = (), shape: tuple[int, int] = (29, 43),
    ) -> tuple[Path, Problem, Weight]:  # fmt: skip
        key = (target, operator, dtype, blocksize, epilogue, shape)
        if key not in done:
            weight = random_weight(0, shape, blocksize, 0.4, dtype=dtype)
            kernel = bsrgen.compile(weight, operator, dtype=dtype, epilogue=epilogue, target=target)
            folder = kernel.save(tmp_path_factory.mktemp("isa") / "saved")
            done[key] = folder, problem_of(weight, operator, epilogue), weight
        return done[key]

    return save


# ── x86-64 ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@x86
@pytest.mark.parametrize(("operator", "dtype"), [("linear", "float32"), ("spmm", "float64")])
@pytest.mark.parametrize("cpu", ["this", *CPUS])
def test_best_level_is_picked(cpu: str, operator: str, dtype: str, saved: Saved, tmp_path: Path) -> None:
    folder, problem, weight = saved(LEVELS, operator, dtype)
    program = build_example(folder, tmp_path / "example", compiler())
    command = [program] if cpu == "this" else [*emulator("x86_64", cpu), program]
    best = CPUS.get(cpu, max((name for name in LEVELS if _has(native(), name)), key=LEVELS.index))
    assert_example_is_right(run(command), problem, weight, best)


@x86
@pytest.mark.parametrize("blocksize", [(1, 1), (4, 1), (16, 1)], ids=lambda b: f"{b[0]}x{b[1]}")
def test_new_values_reach_every_level(blocksize: tuple[int, int], tmp_path: Path) -> None:
    """The old values are all ones: no level's can be told from another's."""
    weight = random_weight(0, (32, 24), blocksize, 0.4)
    problem = problem_of(weight)
    kernel = bsrgen.compile(Weight(weight.pattern, np.ones_like(weight.data)), target=("x86-64", "x86-64-v3"))
    kernel.update(weight)
    folder = kernel.save(tmp_path / "saved")
    program = build_example(folder, tmp_path / "example", compiler())
    for cpu, level in (("Nehalem", "x86-64"), ("Haswell", "x86-64-v3")):
        assert_example_is_right(run([*emulator("x86_64", cpu), program]), problem, weight, level)


def _has(target: Target, level: str) -> bool:
    return set(TARGETS[level].requires) <= set(target.requires)


def _refused(command: list[str | Path]) -> tuple[int, set[str]]:
    """Exit status of an example that must not run, and the features it says are missing."""
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode >= 0, f"died of signal {-result.returncode}"
    assert "status 1, missing CPU features: " in result.stderr, result.stderr
    return result.returncode, set(result.stderr.rpartition(": ")[2].split())


@x86
@pytest.mark.parametrize(
    ("level", "cpu", "missing"),
    [
        ("x86-64-v4", "max", {f for f in TARGETS["x86-64-v4"].requires if f.startswith("avx512")}),
        ("x86-64-v4", "Nehalem", set(TARGETS["x86-64-v4"].requires) - set(TARGETS["x86-64-v2"].requires)),
        ("x86-64-v3", "Nehalem", set(TARGETS["x86-64-v3"].requires) - set(TARGETS["x86-64-v2"].requires)),
        ("x86-64-v3", "Haswell,-fma", {"fma"}),
        ("x86-64-v3", "Haswell,-bmi2,-avx2", {"bmi2", "avx2"}),
        ("x86-64-v3", "Haswell,-xsave", {"avx", "avx2", "fma"}),  # no AVX state without it
    ],
)
def test_cpu_without_the_features_gets_an_error(
    level: str, cpu: str, missing: set[str], saved: Saved, tmp_path: Path
) -> None:
    program = build_example(saved(level)[0], tmp_path / "example", compiler())
    status, said = _refused([*emulator("x86_64", cpu), program])
    assert status == 1
    assert missing <= said
    assert said <= set(TARGETS[level].requires)
    if "xsave" not in cpu:
        assert said == missing


UNUSED = {  # implied by -march, but nothing in a kernel can turn into such an instruction
    "cx16": "cmpxchg16b: kernels have no 16-byte atomics",
    "lahf_sahf": "compares of x87",
    "xsave": "the system's part of avx",
}


@x86
@pytest.mark.parametrize("level", [name for name, row in TARGETS.items() if row.family == "x86_64"])
def test_level_requires_what_its_flags_allow_the_compiler_to_use(level: str) -> None:
    """-march=x86-64-v3 may print any of its instructions: each must be asked for at run time."""

    def macros(*flags: str) -> set[str]:
        lines = run([tool("gcc"), *flags, "-dM", "-E", "-x", "c", os.devnull]).splitlines()
        return {line.split()[1].strip("_").lower() for line in lines if line.split()[2:] == ["1"]}

    other = {"crc32": "sse4.2", "gcc_have_sync_compare_and_swap_16": "cx16"}
    other |= {f.replace(".", "_").replace("-", "_"): f for f in TARGETS[level].requires}
    new = {m for m in macros(*TARGETS[level].flags) - macros("-march=x86-64") if not m.startswith("fp_fast")}
    assert {other.get(m, m) for m in new} - set(UNUSED) == set(TARGETS[level].requires)


LOAD = """
import sys
import bsrgen, numpy as np
for folder in sys.argv[1:]:
    try:
        k = bsrgen.load(folder)
        print(k.plan.target, float(k(np.ones((4, 43), np.float32), threads=2).sum(dtype=np.float64)))
    except bsrgen.IncompatibleCPUError as error:
        print("refused:", error)
"""


@x86
@pytest.mark.parametrize(
    ("cpu", "only", "lacks", "not_lacks"),
    [("Nehalem", "x86-64-v3", "avx2", "sse4.2"), ("max", "x86-64-v4", "avx512f", "avx2")],
)
def test_python_on_another_cpu(cpu: str, only: str, lacks: str, not_lacks: str, saved: Saved) -> None:
    refused, (multi, problem, weight) = saved(only)[0], saved(LEVELS)
    env = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "OPENBLAS_CORETYPE": "Nehalem",
    }  # OpenBLAS's own guess dies in qemu
    out = run([*emulator("x86_64", cpu), sys.executable, "-c", LOAD, refused, multi], env=env).splitlines()
    assert out[0].startswith("refused:")
    said = out[0].split("lacks ")[1].split(";")[0].split(", ")
    assert lacks in said
    assert not_lacks not in said
    assert_example_is_right("{}: sum of Y = {}\n".format(*out[1].split()), problem, weight, CPUS[cpu])


# ── AArch64 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("blocksize", [(1, 1), (4, 4), (16, 1), (3, 5)], ids=lambda b: f"{b[0]}x{b[1]}")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("operator", ["linear", "spmm"])
def test_aarch64(operator: str, dtype: str, blocksize: tuple[int, int], saved: Saved, tmp_path: Path) -> None:
    cc, qemu = compiler("aarch64"), emulator("aarch64")
    quick = operator == "spmm" and blocksize in ((16, 1), (3, 5))  # a long formula in each of many tiles: 6 s of gcc
    epilogue = ("bias", "relu") if quick else ("bias", "gelu")
    folder, problem, weight = saved("aarch64", operator, dtype, blocksize, epilogue)
    program = build_example(folder, tmp_path / "example", cc)
    assert_example_is_right(run([*qemu, program]), problem, weight, "aarch64")


@pytest.mark.parametrize("operator", ["linear", "spmm"])
def test_aarch64_threads_strides_and_new_values(
    operator: str, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cc, qemu = compiler("aarch64"), emulator("aarch64")
    monkeypatch.setattr(text, "FLOP_PER_PART", 1)  # threads even for this little work
    epilogue = ("bias", "residual", "clamp", "silu", "accumulate")
    folder, problem, weight = saved("aarch64", operator, "float32", (4, 4), epilogue, (26, 42))
    (tmp_path / "data").write_bytes(weight.data.tobytes())
    link = [f"-I{folder}", f"-L{folder}", f"-l{kernel_name(folder)}", f"-Wl,-rpath,{folder}"]
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", *driver_flags(problem)]
    run([cc, *flags, DRIVER, *link, "-o", tmp_path / "driver"])
    assert_driver_is_right(run([*qemu, tmp_path / "driver", tmp_path / "data"]), problem, weight)


@pytest.mark.skipif(native().family == "aarch64", reason="this is AArch64")
def test_kernel_for_another_machine_can_be_saved_but_not_called(saved: Saved, tmp_path: Path) -> None:
    compiler("aarch64")
    weight = saved("aarch64")[2]
    kernel = bsrgen.compile(weight, target="aarch64")
    assert kernel.plan.target == "aarch64"
    assert "aarch64" in str(kernel)
    assert "-march=armv8-a" in (kernel.artifact.folder / "build.log").read_text()
    with pytest.raises(IncompatibleCPUError, match="aarch64"):
        kernel(np.ones((4, 43), np.float32))
    with pytest.raises(IncompatibleCPUError, match="aarch64"):
        bsrgen.load(kernel.save(tmp_path / "saved"))
