"""The emitted C under every compiler: no warning of the strict kind, right answers, nothing for a sanitizer."""

import functools
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from programs import (
    CROSS_ROOT,
    DRIVEN,
    DRIVER,
    assert_driver_is_right,
    assert_example_is_right,
    build_artifact,
    build_example,
    driver_flags,
    run,
    tool,
)
from support import DTYPE_NAMES, WITH_DOTS, problem_of
from test_golden import GOLDEN, STATIC

from bsrgen.backends.c import CPlan, candidates, emit, text
from bsrgen.emit import Source
from bsrgen.epilogues import EPILOGUES
from bsrgen.pattern import Weight, random_weight
from bsrgen.targets import TARGETS, native

STRICT = (
    "-Wall", "-Wextra", "-Werror", "-Wconversion", "-Wsign-conversion", "-Wdouble-promotion", "-Wshadow", "-Wundef",
    "-Wstrict-prototypes", "-Wmissing-prototypes", "-Wpointer-arith", "-Wcast-qual", "-Wwrite-strings", "-Wvla",
)  # fmt: skip
COMPILERS = (("gcc",), ("clang", "clang-19"))
BASE = ("-std=gnu11", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-pthread", "-I.")
BLOCKSIZES = ((1, 1), (1, 16), (4, 1), (3, 5), (4, 4), (8, 8), (16, 1), (32, 1))
SHAPES = (  # no rows, no columns, no blocks, one block, and more columns than 2**31 / a tile of tokens
    ((0, 5), (2, 2), 0.0), ((5, 0), (2, 2), 0.0), ((6, 6), (2, 2), 0.0), ((64, 64), (64, 64), 1.0),
    ((3, 40_000_000), (1, 1), 1e-7),
)  # fmt: skip
LEVELS = tuple(name for name in TARGETS if name not in ("x86-64-v2", *WITH_DOTS))  # whose text is that of others
STEPS: tuple[tuple[str, ...], ...] = ((), *((name,) for name in EPILOGUES), tuple(EPILOGUES), ("bias", "bias", "scale"))


@dataclass(frozen=True)
class Case:
    """Sources to be compiled."""

    name: str
    plans: tuple[CPlan, ...]
    weight: Weight

    def __str__(self) -> str:
        return self.name

    @functools.cached_property
    def source(self) -> Source:
        """The text."""
        return emit(self.plans, self.weight)


GOLDENS = tuple(Case(case.name, case.plans, case.weight) for case in GOLDEN)
HOLDING = tuple(Case(case.name, case.plans, case.weight) for case in STATIC)


def table(level: str) -> Iterator[Case]:
    """Block shapes x operators, dtypes and epilogues in turn, two kinds of plan each: other levels take other kinds."""
    turn = LEVELS.index(level)
    for number, (blocksize, operator) in enumerate(itertools.product(BLOCKSIZES, ("linear", "spmm"))):
        dtype, steps = ("float32", "float64")[(number // 2 + turn) % 2], STEPS[(number + turn) % len(STEPS)]
        weight = random_weight(0, (37, 45), blocksize, 0.4, dtype=dtype)
        plans = list(candidates(problem_of(weight, operator, steps), TARGETS[level]))
        kinds = [plans[0], plans[-1]]
        panels = [replace(p, weight=None, small_n=0) if p.bits else p for p in plans if p.tokens][:1]
        kinds += [replace(p, tokens=replace(p.tokens, k_panel=p.pattern.C, pack=True)) for p in panels]
        kinds += [p for p in plans if p.encoding == "code"][:1]
        for plan in {
            str(kinds[(number + turn + i) % len(kinds)]): kinds[(number + turn + i) % len(kinds)] for i in (0, 2)
        }.values():
            yield Case(f"{operator} {dtype} {blocksize[0]}x{blocksize[1]} {'+'.join(steps)}", (plan,), weight)
    for shape, blocksize, density in SHAPES:
        weight = random_weight(0, shape, blocksize, density)
        for operator in ("linear", "spmm"):
            yield Case(
                f"{operator} {shape}", (next(iter(candidates(problem_of(weight, operator), TARGETS[level]))),), weight
            )


def compiler_for(names: tuple[str, ...], family: str) -> list[str]:
    """gcc or clang for x86_64 or aarch64."""
    if family == native().family:
        return [tool(*names)]
    if "gcc" in names:
        return [tool(f"{family.replace('_', '-')}-linux-gnu-gcc")]
    if not (CROSS_ROOT / "include").is_dir():
        pytest.skip(f"not installed: C headers for {family} in {CROSS_ROOT}")
    return [tool(*names), f"--target={family}-linux-gnu", f"-I{CROSS_ROOT / 'include'}"]


def write(source: Source, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, data in source.files.items():
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("names", COMPILERS, ids=lambda n: n[0])
@pytest.mark.parametrize("case", GOLDENS, ids=str)
def test_golden_text_compiles_without_warnings(case: Case, names: tuple[str, ...], tmp_path: Path) -> None:
    """With the optimiser, which sees what the front end cannot: unset variables, bounds."""
    cc = compiler_for(names, case.plans[0].target.family)
    write(case.source, tmp_path)
    for unit in case.source.units:
        run([*cc, *BASE, *STRICT, *unit.flags, "-O2", "-c", unit.file, "-o", "unit.o"], cwd=tmp_path)


@pytest.mark.parametrize("names", COMPILERS, ids=lambda n: n[0])
@pytest.mark.parametrize("level", LEVELS)
def test_every_problem_compiles_without_warnings(level: str, names: tuple[str, ...], tmp_path: Path) -> None:
    """The compilers take turns: each sees half of the table on every level."""
    cc = compiler_for(names, TARGETS[level].family)
    mine = (LEVELS.index(level) + COMPILERS.index(names)) % 2
    for number, case in itertools.islice(enumerate(table(level)), mine, None, 2):
        folder = tmp_path / str(number)
        write(case.source, folder)
        for unit in case.source.units[number // 2 % 2 :]:  # every other time without the entry points: plans share them
            command = [*cc, *BASE, *STRICT, *unit.flags, "-fsyntax-only", unit.file]
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
            assert result.returncode == 0, f"{case}: {case.plans[0]}\n{' '.join(command)}\n{result.stderr[:3000]}"


def test_table_has_every_epilogue_and_every_kind_of_plan() -> None:
    cases = [case for level in LEVELS for case in table(level)]
    assert {step.name for case in cases for step in case.plans[0].problem.epilogue} == set(EPILOGUES)
    plans = [case.plans[0] for case in cases]
    assert {p.problem.dtype.name for p in plans} == {"float32", "float64"}
    assert {p.encoding for p in plans} == {"table", "code"}
    assert any(p.panels > 1 for p in plans)
    assert any(p.tokens and p.weight for p in plans)
    assert any(p.tokens and not p.tokens.pack for p in plans)
    assert {p.k_lanes for p in plans} >= {1, 2, 4, 8}


@pytest.mark.parametrize("case", [case for case in HOLDING if case.plans[0].target.family == native().family], ids=str)
def test_clang_builds_what_gcc_builds(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole artifact by clang, and its example gives the same sum."""
    clang = tool("clang", "clang-19")
    lacks = set(case.plans[-1].target.requires) - set(native().requires)
    if lacks:
        pytest.skip(f"this CPU lacks {', '.join(sorted(lacks))}")
    if case.plans[0].problem.x_dtype.name not in ("float32", "float64"):
        pytest.skip("the example prints bits, not numbers")
    monkeypatch.setenv("BSRGEN_CC", clang)
    build_artifact(case.plans, case.weight, tmp_path / "made")
    program = build_example(tmp_path / "made", tmp_path / "example", clang)
    assert_example_is_right(run([program]), case.plans[0].problem, case.weight)


# ── sanitizers ───────────────────────────────────────────────────────────────────────────────────────────────────────

SANITIZERS = {
    "address,undefined": {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    "thread": {"TSAN_OPTIONS": "halt_on_error=1"},
}


def sanitized() -> list[Case]:
    """Runs here, each with its own way through memory: the goldens, and odd shapes under all epilogues."""
    here = [case for case in HOLDING if set(case.plans[-1].target.requires) <= set(native().requires)]
    mine = [case for case in here if case.plans[0].target.family == native().family]
    cases = [case for case in mine if case.weight.data.dtype.name in DTYPE_NAMES]  # the driver's types
    steps = tuple(name for name, row in EPILOGUES.items() if not {o.kind for o in row.operands} - {*DRIVEN})
    for operator, blocksize in (("linear", (3, 5)), ("spmm", (3, 5)), ("linear", (16, 4))):
        weight = random_weight(0, (37, 43), blocksize, 0.4, dtype="float32")
        plans = list(candidates(problem_of(weight, operator, steps), native()))
        both = [plan for plan in plans if plan.tokens and plan.weight] or plans
        cases.append(
            Case(
                f"{operator}-{blocksize[0]}x{blocksize[1]}",
                (replace(both[0], small_n=4 if both[0].weight else 0),),
                weight,
            )
        )
        code = [plan for plan in plans if plan.encoding == "code"]
        cases += [Case(f"{operator}-{blocksize[0]}x{blocksize[1]}-code", (plan,), weight) for plan in code[:1]]
    return cases


@functools.cache
def why_not(sanitizer: str) -> str | None:
    """What keeps a sanitized program from running here, None if it runs."""
    folder = Path(os.environ["BSRGEN_CACHE_DIR"]).parent / f"try-{sanitizer}-{os.getpid()}"
    folder.mkdir()
    (folder / "t.c").write_text("int main(void) { return 0; }\n")
    try:
        flags = [f"-fsanitize={sanitizer}", "t.c", "-o", "t"]
        for command in ([shutil.which("gcc") or "gcc", *flags], [folder / "t"]):
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
            if result.returncode:
                return f"gcc -fsanitize={sanitizer} does not work here: {result.stderr.strip()[:200]}"
    except OSError as error:
        return str(error)
    return None


def drive(case: Case, sanitizer: str, folder: Path) -> None:
    if reason := why_not(sanitizer):
        pytest.skip(reason)
    source = case.source
    write(source, folder)
    problem = case.plans[0].problem
    sanitize = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-g", "-O1"]
    objects = []
    for unit in source.units:
        objects.append(unit.file.replace(".c", ".o"))
        run([tool("gcc"), *BASE, *sanitize, *unit.flags, "-c", unit.file, "-o", objects[-1]], cwd=folder)
    flags = [*BASE, "-Wall", "-Wextra", "-Werror", *sanitize, *driver_flags(problem)]
    run([tool("gcc"), *flags, DRIVER, *objects, "-o", "driver"], cwd=folder)
    (folder / "data").write_bytes(case.weight.data.tobytes())
    out = run([folder / "driver", folder / "data"], env=os.environ | SANITIZERS[sanitizer])
    assert_driver_is_right(out, problem, case.weight)


@pytest.mark.parametrize("case", sanitized(), ids=str)
def test_no_report_of_address_and_undefined_sanitizer(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads take part even in little work; every buffer is as long as the contract says and no longer."""
    monkeypatch.setattr(text, "FLOP_PER_PART", 1)
    drive(Case(case.name, case.plans, case.weight), "address,undefined", tmp_path)


def test_no_report_of_thread_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "FLOP_PER_PART", 1)
    case = next(c for c in sanitized() if c.name == "linear-3x5")
    drive(Case(case.name, case.plans, case.weight), "thread", tmp_path)
