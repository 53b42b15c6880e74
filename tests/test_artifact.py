"""Artifacts: what lies in the folder, who can use it without Python, what is refused, and the same bytes again."""

import ctypes
import hashlib
import json
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from programs import assert_example_is_right, build_artifact, build_example, compiler, kernel_name, run, tool
from support import DTYPE_NAMES, check_calls, problem_of, run_python
from test_golden import STATIC, Golden

import bsrgen
from bsrgen.artifact import Artifact, read_artifact
from bsrgen.backends.c import candidates, emit
from bsrgen.errors import ArtifactCorruptError, ArtifactError
from bsrgen.kernel import Kernel
from bsrgen.pattern import Weight, random_weight
from bsrgen.problem import Problem
from bsrgen.targets import TARGETS, native

Edit = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Made:
    """An artifact as a user saves it, and what it was made of."""

    folder: Path
    kernel: Kernel
    weight: Weight
    problem: Problem

    @property
    def name(self) -> str:
        return self.kernel.name


def made(folder: Path, operator: str, weight: Weight, epilogue: tuple[str, ...]) -> Made:
    kernel = bsrgen.compile(weight, operator, epilogue=epilogue, dtype=weight.data.dtype)
    return Made(kernel.save(folder), kernel, weight, problem_of(weight, operator, epilogue))


@pytest.fixture(scope="session")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Made:
    weight = random_weight(0, (24, 40), (4, 4), 0.3)
    return made(tmp_path_factory.mktemp("saved") / "linear", "linear", weight, ("bias", "gelu"))


@pytest.fixture(scope="session")
def spmm(tmp_path_factory: pytest.TempPathFactory) -> Made:
    weight = random_weight(1, (23, 41), (3, 5), 0.3, dtype="float64")
    return made(tmp_path_factory.mktemp("a folder") / "spmm", "spmm", weight, ("residual",))


@pytest.fixture(scope="session")
def golden_artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Every golden problem of this architecture, built."""
    root = tmp_path_factory.mktemp("golden")
    here = [case for case in STATIC if case.plans[0].target.family == native().family]
    return {case.name: build_artifact(case.plans, case.weight, root / case.name) for case in here}


@pytest.fixture
def copy(linear: Made, tmp_path: Path) -> Path:
    """An artifact to be damaged."""
    return Path(shutil.copytree(linear.folder, tmp_path / "copy"))


@pytest.fixture
def no_dlopen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes as far as to map a library has failed."""

    def never() -> None:
        pytest.fail("a library was about to be mapped")

    monkeypatch.setattr("bsrgen.kernel.trampoline", never)


def seal(folder: Path, manifest: bytes) -> None:
    """Put a forged manifest in place, with the digest that makes it look whole."""
    (folder / "manifest.json").write_bytes(manifest)
    (folder / "manifest.sha256").write_text(hashlib.sha256(manifest).hexdigest() + "\n")


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_folder_explains_itself(linear: Made) -> None:
    names = {path.name for path in linear.folder.iterdir()}
    name, target = linear.name, linear.kernel.plan.target.replace("-", "_")
    companions = {f"{name}.pc", f"{name}Config.cmake", "example.c", "build.log", "pattern.npz"}
    sources = {f"lib{name}.so", f"{name}.h", f"{name}.c", f"{name}_{target}.c", "bsrgen.h", "bsrgen_parallel.h"}
    assert companions | sources | {"manifest.json", "manifest.sha256"} <= names
    assert not [n for n in names if n.endswith((".o", ".tmp"))]
    manifest = json.loads((linear.folder / "manifest.json").read_text())
    assert manifest["files"].keys() == names - {"manifest.json", "manifest.sha256"}
    assert all(hashlib.sha256((linear.folder / n).read_bytes()).hexdigest() == h for n, h in manifest["files"].items())
    assert manifest["prototype"] + ";" in (linear.folder / f"{name}.h").read_text()


def test_no_file_names_this_machine(linear: Made) -> None:
    hidden = [os.fsencode(str(p)) for p in (Path.home(), Path.cwd(), linear.folder.parent, Path(sys.prefix))]
    for path in linear.folder.iterdir():
        data = path.read_bytes()
        assert not [word for word in hidden if word != b"/" and word in data], path.name


def test_saved_folder_has_the_permissions_of_any_new_folder(linear: Made, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    assert linear.folder.stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "file").touch()
    modes = {oct(path.stat().st_mode) for path in linear.folder.iterdir()}
    assert modes == {oct((tmp_path / "file").stat().st_mode)}


def test_values_lie_in_the_library_where_the_manifest_says(golden_artifacts: dict[str, Artifact]) -> None:
    for artifact in golden_artifacts.values():
        library = artifact.library.read_bytes()
        for level in artifact.manifest.levels:
            data = (artifact.folder / level.values.file).read_bytes()
            assert level.values.offset % 64 == 0
            assert library[level.values.offset : level.values.offset + level.values.bytes] == data


def test_library_tells_what_it_is(linear: Made) -> None:
    info = ctypes.CDLL(str(linear.folder / f"lib{linear.name}.so"))[f"{linear.name}_info"]
    info.restype = ctypes.c_char_p
    embedded = json.loads(info(0))
    assert embedded["name"] == linear.name
    assert embedded["pattern"] == linear.weight.pattern.digest
    assert info(1) == b""
    assert info(2).decode() == linear.kernel.plan.target
    assert info(17) is not None


# ── the library ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=[*(case.name for case in STATIC if case.plans[0].target.family == "x86_64"), "linear", "spmm"])
def library(request: pytest.FixtureRequest, golden_artifacts: dict[str, Artifact]) -> Path:
    if request.param in golden_artifacts:
        return golden_artifacts[request.param].library
    if request.param not in ("linear", "spmm"):
        pytest.skip(f"x86-64 only, this is {native().family}")
    folder = request.getfixturevalue(request.param).folder
    return Path(folder / f"lib{kernel_name(folder)}.so")


def test_exported_symbols_are_the_entry_points(library: Path) -> None:
    name = library.name[3:-3]
    lines = [line.split() for line in run([tool("nm"), "-D", "--defined-only", library]).splitlines()]
    assert sorted(line[2] for line in lines) == sorted(
        [name, f"{name}_call", f"{name}_info", f"{name}_pack", f"__tvm_ffi_{name}"]
    )
    assert {line[1] for line in lines} == {"T"}


def test_library_is_hardened_and_needs_only_libc(library: Path) -> None:
    dynamic = run([tool("readelf"), "--wide", "--dynamic", library])
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\.so", dynamic))
    assert needed <= {"libc", "libm", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}
    assert "libc" in needed
    assert "BIND_NOW" in dynamic or re.search(r"FLAGS_1.*NOW", dynamic)
    assert not re.search(r"TEXTREL|RPATH|RUNPATH", dynamic)
    assert f"[{library.name}]" in dynamic  # SONAME
    segments = run([tool("readelf"), "--wide", "--segments", library])
    assert "GNU_RELRO" in segments
    stack = next(line for line in segments.splitlines() if "GNU_STACK" in line)
    assert " RW " in stack
    assert not [line for line in segments.splitlines() if re.search(r"\bRWE\b", line)]
    assert not run([tool("nm"), library, "-a"]).strip()  # stripped: no local names, no paths


@pytest.mark.parametrize("limit", ["2.34"])
def test_library_runs_on_older_systems(library: Path, limit: str) -> None:
    text = run([tool("readelf"), "--wide", "--version-info", library])
    versions = {tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_([\d.]+)", text)}
    host = tuple(map(int, os.confstr("CS_GNU_LIBC_VERSION").split()[1].split(".")))  # type: ignore[union-attr]
    assert max(versions) <= max(tuple(map(int, limit.split("."))), min(host, (2, 34)))


# ── users that are no Python ─────────────────────────────────────────────────────────────────────────────────────────

HEADER_CHECKS = (
    (("gcc", "cc"), "-std=c99", "c"),
    (("gcc", "cc"), "-std=c17", "c"),
    (("clang", "clang-19"), "-std=c99", "c"),
    (("g++", "c++"), "-std=c++11", "c++"),
    (("clang++", "clang++-19"), "-std=c++20", "c++"),
)


@pytest.mark.parametrize(("names", "std", "language"), HEADER_CHECKS, ids=lambda v: v[0] if isinstance(v, tuple) else v)
@pytest.mark.parametrize("kind", ["linear", "spmm"])
def test_header_compiles(
    kind: str, names: tuple[str, ...], std: str, language: str, request: Any, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(kind).folder
    header = f"{kernel_name(folder)}.h"
    includes = [f'#include "{name}"' for name in (header, header, "bsrgen.h", "bsrgen.h")]
    (tmp_path / "use").write_text("\n".join([*includes, "int main(void) { return 0; }", ""]))
    strict = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-Wconversion", "-Wshadow", "-Wundef"]
    strict += ["-Wstrict-prototypes"] if language == "c" else ["-Wold-style-cast"]
    run([tool(*names), std, *strict, "-fsyntax-only", f"-I{folder}", "-x", language, tmp_path / "use"])


@pytest.mark.parametrize("kind", ["linear", "spmm"])
def test_example_runs_without_python(kind: str, request: Any, tmp_path: Path) -> None:
    case = request.getfixturevalue(kind)
    program = build_example(case.folder, tmp_path / "example", compiler(native().family))
    out = run(["env", "-i", program], cwd=Path("/"))
    assert_example_is_right(out, case.problem, case.weight, case.kernel.plan.target)


def test_example_says_itself_how_it_is_built(copy: Path, linear: Made) -> None:
    text = (copy / "example.c").read_text()
    (command,) = re.findall(r"^ \*   (cc .+?)(?: \*/)?$", text, re.M)
    out = run(["sh", "-c", command], cwd=copy)
    assert_example_is_right(out, linear.problem, linear.weight)


PLAIN = [case for case in STATIC if case.plans[0].target.family == "x86_64" and case.dtype in DTYPE_NAMES]


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_example_of_every_kind_of_plan(case: Golden, golden_artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    if case.name not in golden_artifacts:
        pytest.skip(f"x86-64 only, this is {native().family}")
    lacks = set(case.plans[-1].target.requires) - set(native().requires)
    if lacks:
        pytest.skip(f"this CPU lacks {', '.join(sorted(lacks))}")
    program = build_example(golden_artifacts[case.name].folder, tmp_path / "example", compiler())
    assert_example_is_right(run([program]), case.problem, case.weight)


def test_golden_kernels_are_right(golden_artifacts: dict[str, Artifact], rng: np.random.Generator) -> None:
    for case in STATIC:
        runs = case.name in golden_artifacts and set(case.plans[-1].target.requires) <= set(native().requires)
        if runs:
            kernel = Kernel(golden_artifacts[case.name], threads=1)
            check_calls(kernel, case.problem, case.weight, rng, (0, 1, 2, 5, 8, 16, 33))


def test_pkg_config_file(spmm: Made, tmp_path: Path) -> None:
    """In a folder with a blank in its name."""
    config, env = tool("pkg-config"), os.environ | {"PKG_CONFIG_PATH": str(spmm.folder)}
    assert " " in str(spmm.folder)
    flags = run([config, "--cflags", "--libs", spmm.name], env=env).strip()
    program, cc = tmp_path / "example", compiler(native().family)
    run(["sh", "-c", f'{cc} "$1/example.c" {flags} -o "$2"', "sh", spmm.folder, program])
    assert_example_is_right(run(["env", "-i", program]), spmm.problem, spmm.weight)
    assert run([config, "--modversion", spmm.name], env=env).strip() == bsrgen.__version__


def test_cmake_package(spmm: Made, tmp_path: Path) -> None:
    cmake = tool("cmake")
    (tmp_path / "CMakeLists.txt").write_text(
        f"cmake_minimum_required(VERSION 3.13)\nproject(use C)\n"
        f"find_package({spmm.name} CONFIG REQUIRED)\nfind_package({spmm.name} CONFIG REQUIRED)\n"
        f'add_executable(use "{spmm.folder}/example.c")\ntarget_link_libraries(use {spmm.name}::{spmm.name})\n'
    )
    made = tmp_path / "build"
    run([cmake, "-S", tmp_path, "-B", made, f"-D{spmm.name}_DIR={spmm.folder}"])
    run([cmake, "--build", made])
    assert_example_is_right(run(["env", "-i", made / "use"]), spmm.problem, spmm.weight)


TWO = """
#include "{a}.h"
#include "{b}.h"
#include "bsrgen.h"
#include <stdio.h>

static float x[3 * 40], y[3 * 24], bias[24];
static double u[41 * 3], v[23 * 3], residual[23 * 3];

int main(void)
{{
    for (int i = 0; i < 3 * 40; i++) x[i] = 1;
    for (int i = 0; i < 41 * 3; i++) u[i] = 1;
    struct bsrgen_operand operand = {{ bias, 0, 0 }};
    struct bsrgen_call call = {{ 3, x, 40, y, 24, NULL, &operand, NULL, 2 }};
    if ({a}_call(&call) || {b}(3, u, 3, v, 3, residual, 3, NULL, 2)) return 1;
    double first = 0, second = 0;
    for (int i = 0; i < 3 * 24; i++) first += y[i];
    for (int i = 0; i < 23 * 3; i++) second += v[i];
    printf("%.9g %.17g\\n", first, second);
    return 0;
}}
"""


@pytest.mark.parametrize(("names", "language"), [(("cc", "gcc"), "c"), (("c++", "g++"), "c++")], ids=["c", "c++"])
def test_two_artifacts_in_one_program(
    linear: Made, spmm: Made, names: tuple[str, ...], language: str, tmp_path: Path
) -> None:
    (tmp_path / "two").write_text(TWO.format(a=linear.name, b=spmm.name))
    flags = [
        f for m in (linear, spmm) for f in (f"-I{m.folder}", f"-L{m.folder}", f"-l{m.name}", f"-Wl,-rpath,{m.folder}")
    ]
    run(
        [
            tool(*names),
            "-Wall",
            "-Wextra",
            "-Werror",
            "-x",
            language,
            tmp_path / "two",
            "-x",
            "none",
            *flags,
            "-o",
            tmp_path / "program",
        ]
    )
    first, second = map(float, run(["env", "-i", tmp_path / "program"]).split())
    bias, residual = np.zeros(24), np.zeros((23, 3))
    expected, bound = linear.problem.reference(linear.weight, np.ones((3, 40)), {"bias": bias})
    assert abs(first - expected.sum()) <= bound.sum() + 1e-8 * abs(expected).sum()
    expected, bound = spmm.problem.reference(spmm.weight, np.ones((41, 3)), {"residual": residual})
    assert abs(second - expected.sum()) <= bound.sum()


# ── new values from C ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", [case for case in STATIC if case.plans[0].target.family == "x86_64"], ids=str)
def test_pack_from_c_is_pack_of_the_plan(
    case: Golden, golden_artifacts: dict[str, Artifact], rng: np.random.Generator
) -> None:
    if case.name not in golden_artifacts:
        pytest.skip(f"x86-64 only, this is {native().family}")
    pack = ctypes.CDLL(str(golden_artifacts[case.name].library))[f"{case.problem.name}_pack"]
    pack.argtypes, pack.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int], ctypes.c_int64
    data = rng.standard_normal(case.weight.data.shape).astype(case.weight.data.dtype)
    for level, plan in enumerate(case.plans):
        expected = plan.packing.pack(data)
        assert pack(None, None, level) == expected.nbytes
        packed = np.full(expected.size + 16, 7, np.uint8)  # what lies behind must stay
        assert pack(data.ctypes.data, packed.ctypes.data, level) == expected.nbytes
        np.testing.assert_array_equal(packed[: expected.size], expected)
        assert (packed[expected.size :] == 7).all()
    assert pack(None, None, len(case.plans)) == -1
    assert pack(None, None, 1 << 30) == -1


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_new_values_are_saved_whatever_the_old_ones_were(
    value: float, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Where values lie in the library is not a matter of finding bytes: zeros are everywhere."""
    old = random_weight(0, (16, 16), (1, 1), 0.3)
    kernel = bsrgen.compile(Weight(old.pattern, np.full_like(old.data, value)))
    kernel.update(old)
    again = bsrgen.load(kernel.save(tmp_path / "saved"))
    x = rng.standard_normal((5, 16)).astype(np.float32)
    np.testing.assert_array_equal(again(x), kernel(x))
    np.testing.assert_allclose(again(x), x @ old.todense().T, rtol=1e-5, atol=1e-5)


# ── damage and forgery ───────────────────────────────────────────────────────────────────────────────────────────────


def damages(data: bytes) -> dict[str, bytes | None]:
    """Ways for a file to go wrong."""
    half = len(data) // 2
    flipped = bytearray(data)
    if data:
        flipped[half] ^= 0x10
    return {
        "missing": None, "empty": b"", "truncated": data[:half], "one byte short": data[:-1],
        "one byte long": data + b"\0", "flipped": bytes(flipped), "zeroed": data[:half] + bytes(len(data) - half),
        "text": b"<html>404</html>\n",
    }  # fmt: skip


@pytest.mark.usefixtures("no_dlopen")
def test_every_damaged_file_is_found_before_dlopen(copy: Path) -> None:
    for path in sorted(copy.iterdir()):
        data = path.read_bytes()
        for what, damaged in damages(data).items():
            if damaged == data or (path.name == "manifest.sha256" and what == "one byte short"):
                continue  # a digest without the line's end says the same
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            with pytest.raises(ArtifactCorruptError):
                pytest.fail(f"{path.name}, {what}: {bsrgen.load(copy)}")
            path.write_bytes(data)


@pytest.mark.usefixtures("no_dlopen")
def test_damaged_library_is_found_before_dlopen(copy: Path, linear: Made) -> None:
    draw, path = random.Random(0), copy / f"lib{linear.name}.so"
    data = path.read_bytes()
    cuts = [data[: draw.randrange(len(data))] for _ in range(24)]
    flips = []
    for _ in range(60):
        flipped = bytearray(data)
        for at in draw.sample(range(len(data)), 3):
            flipped[at] ^= 1 << draw.randrange(8)
        flips.append(bytes(flipped))
    for damaged in cuts + flips:
        path.write_bytes(damaged)
        with pytest.raises(ArtifactCorruptError, match=re.escape(path.name)):
            bsrgen.load(copy)


def test_what_is_no_artifact(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path, Path("/dev/null")):
        with pytest.raises(ArtifactError, match=re.escape(str(path))):
            bsrgen.load(path)


def _deep(m: dict[str, Any]) -> bytes:
    return json.dumps(m).replace('"tuning": []', '"tuning": ' + "[" * 200_000 + "]" * 200_000).encode()


def _put(**fields: Any) -> Edit:
    return lambda m: m.update(fields)


def _level(**fields: Any) -> Edit:
    return lambda m: m["levels"][0].update(fields)


def _values(**fields: Any) -> Edit:
    return lambda m: m["levels"][0]["values"].update(fields)


def _file(name: str, digest: str = "0" * 64) -> Edit:
    return lambda m: m["files"].update({name: digest})


HOSTILE: dict[str, Edit] = {
    "name leaves the folder": _put(name="../../lib/evil"),
    "name with NUL": _put(name="a\0b"),
    "name with a newline": _put(name="a\nb"),
    "name with code": _put(name="x; int main"),
    "name of another kernel": lambda m: m.update(name=m["name"][:-8] + "00000000"),
    "file leaves the folder": _file("../evil.so"),
    "file is absolute": _file("/etc/passwd"),
    "file with NUL": _file("a\0b"),
    "file with a newline": _file("a\nb"),
    "file with a wrong hash": lambda m: m["files"].update({n: "0" * 64 for n in m["files"] if n.endswith(".so")}),
    "file with no hash": _file("example.c", "sha256"),
    "file of the wrong type": lambda m: m["files"].update({"example.c": 7}),
    "no files": _put(files={}),
    "library not listed": lambda m: m["files"].pop(f"lib{m['name']}.so"),
    "files is a list": lambda m: m.update(files=list(m["files"])),
    "twice the same key": lambda m: json.dumps(m).replace('{"schema"', '{"schema": 1, "schema"').encode(),
    "escaped key": lambda m: json.dumps(m).replace('"schema"', '"sch\\u0065ma"').encode(),
    "unknown key": _put(command="rm -rf /"),
    "unknown key in a level": _level(exec="rm -rf /"),
    "key missing": lambda m: m.pop("prototype") and None,
    "another schema": _put(schema=1),
    "another ABI": _put(abi=99),
    "schema is true": _put(schema=True),
    "shape beyond 2**63": _put(shape=[1 << 63, 40]),
    "shape negative": _put(shape=[-24, 40]),
    "shape of another kernel": _put(shape=[8, 40]),
    "shape with three axes": _put(shape=[24, 40, 1]),
    "blocksize 0": _put(blocksize=[0, 4]),
    "blocksize of another kernel": _put(blocksize=[2, 8]),
    "nnzb negative": _put(nnzb=-1),
    "nnzb beyond 2**63": _put(nnzb=1 << 64),
    "unknown dtype": _put(dtype="float7"),
    "dtype of another kernel": _put(dtype="float64"),
    "unknown operator": _put(operator="system"),
    "operator of another kernel": _put(operator="spmm"),
    "unknown epilogue": _put(epilogue=["system"]),
    "epilogue of another kernel": _put(epilogue=["gelu"]),
    "operands of another epilogue": _put(operands=[]),
    "operand of another kind": lambda m: m["operands"][0].update(kind="scalar"),
    "default that is no number": lambda m: m["operands"][0].update(default="rm -rf /"),
    "pattern of another kernel": _put(pattern="0" * 64),
    "values in another file": _values(file="../../etc/passwd"),
    "values are the library": lambda m: m["levels"][0]["values"].update(file=f"lib{m['name']}.so"),
    "values before the file": _values(offset=-64),
    "values beyond the file": _values(offset=1 << 62),
    "values of another length": _values(bytes=1 << 40),
    "no level": _put(levels=[]),
    "200,000 levels of nesting": _deep,
    "400,000 fields": lambda m: m["levels"][0].update(knobs={str(i): 0 for i in range(400_000)}),
    "larger than any manifest": _put(notes=["x" * (4 << 20)]),
    "number too large": lambda m: json.dumps(m).replace('"seconds": ', '"seconds": 1e999, "x": ').encode(),
    "NaN": lambda m: json.dumps(m | {"check": {"n": [1], "worst": float("nan")}}).encode(),
    "not UTF-8": lambda m: json.dumps(m).encode().replace(b"float32", b"float\xff\xfe"),
    "not JSON": lambda m: b"import os",
    "nothing": lambda m: b"",
    "a pickle": lambda m: b"\x80\x04\x95\x00.",
}


@pytest.mark.usefixtures("no_dlopen")
@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_manifest_is_refused(attack: str, copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    forged = HOSTILE[attack](manifest)
    seal(copy, forged if isinstance(forged, bytes) else json.dumps(manifest).encode())
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        with pytest.raises(ArtifactError, match="manifest|" + re.escape(str(copy))):
            bsrgen.load(copy)
        taken.append(time.perf_counter() - start)
    assert min(taken) < 0.05


@pytest.mark.usefixtures("no_dlopen")
def test_links_and_strange_libraries_are_refused(copy: Path, linear: Made, tmp_path: Path) -> None:
    library = copy / f"lib{linear.name}.so"
    (copy / "libextra.so").write_bytes(library.read_bytes())
    with pytest.raises(ArtifactCorruptError, match="not listed"):
        bsrgen.load(copy)
    (copy / "libextra.so").unlink()
    library.rename(tmp_path / "elsewhere.so")
    library.symlink_to(tmp_path / "elsewhere.so")
    with pytest.raises(ArtifactCorruptError, match="symbolic link"):
        bsrgen.load(copy)


def test_expected_digest(linear: Made, copy: Path) -> None:
    digest = hashlib.sha256((copy / "manifest.json").read_bytes()).hexdigest()
    assert bsrgen.load(copy, expect_sha256=digest).name == linear.name
    assert bsrgen.load(copy, expect_sha256=digest.upper()).name == linear.name
    for wrong in (digest[::-1], digest[:-1], "", "sha256:" + digest):
        with pytest.raises(ArtifactCorruptError, match="expected"):
            bsrgen.load(copy, expect_sha256=wrong)
    manifest = json.loads((copy / "manifest.json").read_text())
    seal(copy, json.dumps(manifest | {"notes": ["sparse for ever"]}).encode())
    assert bsrgen.load(copy).artifact.manifest.notes == ("sparse for ever",)  # whole, but not what was expected
    with pytest.raises(ArtifactCorruptError, match="expected"):
        bsrgen.load(copy, expect_sha256=digest)


# ── the same bytes ───────────────────────────────────────────────────────────────────────────────────────────────────

REBUILD = """
import sys, bsrgen
from bsrgen.pattern import random_weight
bsrgen.compile(random_weight(0, (24, 40), (4, 4), 0.3), "linear", epilogue=("bias", "gelu")).save(sys.argv[1])
"""


def test_rebuild_is_identical_in_other_places(linear: Made, tmp_path: Path) -> None:
    """Another process, store, folder, hash seed, working folder, locale and time zone."""
    run_python(
        REBUILD, str(tmp_path / "again"), PYTHONHASHSEED="1234", BSRGEN_CACHE_DIR=str(tmp_path / "other store"),
        TZ="Asia/Tokyo", LC_ALL="C", TMPDIR=str(tmp_path), SOURCE_DATE_EPOCH="1",
    )  # fmt: skip
    files = {path.name: path.read_bytes() for path in linear.folder.iterdir()}
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert files.keys() == again.keys()
    assert [name for name in files if files[name] != again[name]] == []


def test_log_rebuilds_the_library(linear: Made, copy: Path) -> None:
    library = copy / f"lib{linear.name}.so"
    before = library.read_bytes()
    library.unlink()
    commands = [line for line in (copy / "build.log").read_text().splitlines()[1:] if line]
    run(["sh", "-ec", "\n".join(commands)], cwd=copy)
    assert library.read_bytes() == before


@pytest.mark.parametrize("operator", ["linear", "spmm"])
@pytest.mark.parametrize("blocksize", [(1, 1), (4, 4), (16, 1)], ids=lambda b: f"{b[0]}x{b[1]}")
def test_text_does_not_grow_with_the_matrix(operator: str, blocksize: tuple[int, int]) -> None:
    """Compile time neither: values and tables enter by .incbin."""
    lines = []
    for density in (0.05, 0.5):
        weight = random_weight(0, (512, 512), blocksize, density)
        source = emit((next(iter(candidates(problem_of(weight, operator), TARGETS["x86-64-v3"]))),), weight)
        texts = {name.removeprefix(source.name): text for name, text in source.files.items() if ".bin" not in name}
        lines.append({name: text.count(b"\n") for name, text in texts.items()})
    assert lines[0] == lines[1]


def test_save_over_an_artifact_replaces_it_whole(linear: Made, spmm: Made, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    spmm.kernel.save(folder)
    linear.kernel.save(folder)
    assert read_artifact(folder).manifest.name == linear.name
    assert {p.name for p in folder.iterdir()} == {p.name for p in linear.folder.iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
