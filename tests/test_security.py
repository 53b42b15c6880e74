"""Data never becomes code: what the package calls, what names may be, what a compiler sees, what load leaves be."""

import ast
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPE_NAMES, REDUCED, REPOSITORY, problem_of, run_python

import bsrgen
from bsrgen import build
from bsrgen.backends.c import candidates, emit
from bsrgen.dtypes import DTYPES
from bsrgen.epilogues import EPILOGUES
from bsrgen.errors import BsrgenError, BuildError, CompilerNotFoundError
from bsrgen.pattern import Pattern, Weight, random_weight
from bsrgen.targets import TARGETS, native

NAME = re.compile(r"\A[a-z][a-z0-9_]{0,62}\Z")
FILES = sorted((REPOSITORY / "bsrgen").rglob("*.py"))
FORBIDDEN_MODULES = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "xmlrpc", "code", "pty",
}  # fmt: skip
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.spawnl", "os.spawnv", "os.spawnve",
    "os.execv", "os.execve", "os.execvp", "subprocess.getoutput", "subprocess.getstatusoutput", "tempfile.mktemp",
    "ctypes.CDLL",
}  # fmt: skip
ALLOWED = {
    ("bench/clock.py", "os.execve"): "this interpreter again, without variables that slow a peer down",
    ("machine.py", "ctypes.CDLL"): "this process's own libc, for arch_prctl",
}
DANGEROUS_KEYWORDS = {("shell", True), ("allow_pickle", True), ("weights_only", False)}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


# ── S1 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(REPOSITORY / "bsrgen").as_posix())
def test_nothing_that_turns_data_into_code(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not {name.split(".")[0] for name in names} & FORBIDDEN_MODULES, f"line {node.lineno}"
    for name, call in calls(path):
        allowed = (path.relative_to(REPOSITORY / "bsrgen").as_posix(), name) in ALLOWED
        assert allowed or name not in FORBIDDEN_CALLS, f"line {call.lineno}: {name}"
        for keyword in call.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            assert (keyword.arg, value) not in DANGEROUS_KEYWORDS, f"line {call.lineno}: {keyword.arg}={value}"
        if name in ("np.load", "numpy.load", "load_npz"):
            passed = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert passed.get("allow_pickle") == "False" or name == "load_npz", (
                f"line {call.lineno}: allow_pickle=False"
            )
        if name in ("torch.load",):
            pytest.fail(f"line {call.lineno}: {name} unpickles")


def test_processes_are_started_in_few_places_and_from_lists() -> None:
    found = {}
    for path in FILES:
        for name, call in calls(path):
            if (
                re.fullmatch(r"(subprocess\.)?(run|Popen|call|check_call|check_output)", name)
                and "subprocess" in path.read_text()
            ):
                found.setdefault(path.relative_to(REPOSITORY).as_posix(), []).append(ast.unparse(call.args[0]))
    started = {
        path: [words for words in commands if words.startswith(("'", '"', "f'"))] for path, commands in found.items()
    }
    assert not any(started.values()), f"a string as a command: {started}"
    assert "bsrgen/build.py" in found


def test_templates_come_from_files_and_nobody_chooses_their_name() -> None:
    for path in FILES:
        for name, call in calls(path):
            assert not name.endswith((".from_string", "jinja2.Template")), f"{path}:{call.lineno}"
            if name in ("render", "emit.render"):
                assert isinstance(call.args[0], ast.Constant | ast.JoinedStr), f"{path}:{call.lineno}"


# ── S3 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

DIMS = st.integers(0, 2**31 - 65)
BLOCK = st.integers(1, 64)


@settings(max_examples=100, deadline=None)
@given(
    M=DIMS,
    K=DIMS,
    R=BLOCK,
    C=BLOCK,
    operator=st.sampled_from(["linear", "spmm"]),
    types=st.sampled_from([*((name, name, name) for name in DTYPE_NAMES), *REDUCED]),
)
def test_kernel_names_are_c_names(M: int, K: int, R: int, C: int, operator: str, types: tuple[str, str, str]) -> None:
    pattern = Pattern((M % 997, K), (R, C), np.zeros(-(-(M % 997) // R) + 1, np.int64), np.zeros(0, np.int32))
    weight, steps = Weight(pattern, np.zeros((0, R, C))), [name for name in EPILOGUES if name != "accumulate"]
    assert NAME.match(problem_of(weight, operator, steps, *types).name)


def _numpy_knows(word: str) -> bool:
    try:
        return np.dtype(word).name in DTYPES
    except Exception:  # of many kinds: numpy parses strings
        return False


@settings(max_examples=300, deadline=None)
@given(
    word=st.text(max_size=40),
    which=st.sampled_from(["operator", "dtype", "out_dtype", "epilogue", "mode", "backend", "target", "tune"]),
)
def test_strings_are_looked_up_never_printed(word: str, which: str) -> None:
    """What a caller can spell is a row of a table, or a typed error before any work starts."""
    known = {"linear", "spmm", "static", "auto", "c", "native", "off", "model", "measure", *EPILOGUES, *TARGETS}
    if word in known or (which.endswith("dtype") and _numpy_knows(word)):
        return
    with pytest.raises((BsrgenError, TypeError)) as caught:
        bsrgen.compile(WEIGHT, **{which: word})
    assert isinstance(caught.value, BsrgenError)
    assert not isinstance(caught.value, BuildError)


WEIGHT = random_weight(0, (8, 8), (4, 4), 0.5)
INJECTIONS = (
    'x"; system("id"); //',
    "a\nb",
    "*/ int evil; /*",
    "{{ 7 * 7 }}",
    "${HOME}",
    "$(id)",
    "`id`",
    "%n%n",
    "a\0b",
    "../../x",
    "-o/tmp/x",
)


@pytest.mark.parametrize("word", INJECTIONS)
@pytest.mark.parametrize("which", ["operator", "dtype", "epilogue", "mode", "backend", "target", "tune"])
def test_injections_are_refused(which: str, word: str) -> None:
    with pytest.raises(BsrgenError):
        bsrgen.compile(WEIGHT, **{which: word})
    if which in ("epilogue", "target"):
        with pytest.raises(BsrgenError):
            bsrgen.compile(WEIGHT, **{which: (word, word)})


def test_operand_names_are_looked_up(rng: np.random.Generator) -> None:
    for word in INJECTIONS:
        with pytest.raises(BsrgenError):
            bsrgen.compile(WEIGHT, epilogue=("bias",), **{word: np.zeros(8, np.float32)})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.4e38])
def test_values_never_enter_the_text(value: float) -> None:
    data = np.full(WEIGHT.data.shape, value, np.float32)
    plan = next(iter(candidates(problem_of(WEIGHT), TARGETS["x86-64-v3"])))
    plain, odd = (emit((plan,), weight).files for weight in (WEIGHT, Weight(WEIGHT.pattern, data)))
    assert {name for name in plain if plain[name] != odd[name]} == {n for n in plain if "_values_" in n}


# ── S5 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def fake_compiler(folder: Path, body: str) -> Path:
    """A compiler that says it is one, and does `body` when it should compile."""
    path = folder / "fake-cc"
    machine = f"{native().family}-linux-gnu"
    head = f'case "$1" in --version) echo fake 1.0; exit;; -dumpmachine) echo {machine}; exit;; esac\n'
    path.write_text(f"#!/bin/sh\n{head}{body}\n")
    path.chmod(0o755)
    return path


def test_compiler_sees_little_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tmp_path / "seen"
    limits = "for what in v t c; do ulimit -$what; done"
    cc = fake_compiler(
        tmp_path, f"tr '\\0' '\\n' < /proc/$$/environ > {seen}; ({limits}) > {seen}.limits; pwd > {seen}.cwd; exit 1"
    )
    for name in ("GCC_EXEC_PREFIX", "CPATH", "C_INCLUDE_PATH", "COMPILER_PATH", "CFLAGS", "AWS_SECRET", "PYTHONPATH"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("BSRGEN_CC", str(cc))
    with pytest.raises(BuildError):
        bsrgen.compile(random_weight(0, (9, 9), (3, 3), 0.5))
    names = {line.partition("=")[0] for line in seen.read_text().splitlines()}
    assert names <= {"PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "LC_ALL"}
    memory, cpu, core = Path(f"{seen}.limits").read_text().split()[:3]
    assert int(memory) == build.MEMORY_BYTES >> 10
    assert int(cpu) == build.TIMEOUT_S
    assert int(core) == 0
    cwd = Path(Path(f"{seen}.cwd").read_text().strip())
    assert Path(os.environ["BSRGEN_CACHE_DIR"]).resolve() in cwd.resolve().parents


def test_build_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cc = fake_compiler(tmp_path, f"stat -c %a . > {tmp_path}/mode; exit 1")
    monkeypatch.setenv("BSRGEN_CC", str(cc))
    with pytest.raises(BuildError):
        bsrgen.compile(random_weight(0, (9, 9), (3, 3), 0.4))
    assert (tmp_path / "mode").read_text().split()[0] == "700"


def test_failed_build_says_what_and_keeps_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cc = fake_compiler(
        tmp_path,
        'echo "note: hello" >&2; echo "k.c:7:1: error: this is it" >&2; echo "k.c:9:1: error: not this" >&2; exit 3',
    )
    monkeypatch.setenv("BSRGEN_CC", str(cc))
    with pytest.raises(BuildError, match="error: this is it") as caught:
        bsrgen.compile(random_weight(0, (9, 9), (3, 3), 0.3))
    message = str(caught.value)
    assert str(cc) in message
    assert "status 3" in message
    kept = Path(re.findall(r"kept in (\S+)", message)[0])
    assert list(kept.glob("*.c")), "the sources are not where the message says"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700


def test_compiler_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it started: gcc is a driver, the work is done by its children."""
    monkeypatch.setattr(build, "TIMEOUT_S", 1)
    cc = fake_compiler(tmp_path, f"sleep 60 & echo $! >> {tmp_path}/children; wait")
    monkeypatch.setenv("BSRGEN_CC", str(cc))
    with pytest.raises(BuildError, match="stopped after 1 s"):
        bsrgen.compile(random_weight(0, (9, 9), (3, 3), 0.2))
    time.sleep(0.2)
    for child in map(int, (tmp_path / "children").read_text().split()):
        state = Path(f"/proc/{child}/stat")
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z", "left running"


@pytest.mark.parametrize("cc", ["/nonexistent/cc", "gcc -fplugin=evil.so", "$(id)", "", "sh"])
def test_compiler_is_a_program_and_nothing_else(cc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BSRGEN_CC", cc)
    if not cc:
        assert build.find_compiler(native()).path  # empty is not set
        return
    with pytest.raises(CompilerNotFoundError, match=re.escape(cc)):
        bsrgen.compile(WEIGHT)


# ── S8 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

LOAD = """
import json, os, sys
started = []
watched = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.fork", "os.forkpty", "socket.connect")
sys.addaudithook(lambda event, args: started.append([event, repr(args)[:200]]) if event in watched else None)
import bsrgen
import numpy as np
k = bsrgen.load(sys.argv[1])
y = k(np.ones((2, 40), np.float32))
k.update((np.ones((k.pattern.nnzb, 4, 4), np.float32), k.pattern.indices, k.pattern.indptr))
z = k(np.ones((2, 40), np.float32))
str(k), k.source, k.cost, k.verdict, k.plan, k.problem
k.save(sys.argv[2])
again = bsrgen.load(sys.argv[2])(np.ones((2, 40), np.float32))
results = {"y": y.tolist(), "z": z.tolist(), "again": again.tolist()}
json.dump({"started": started, "modules": sorted(sys.modules), **results}, sys.stdout)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bsrgen.compile(random_weight(0, (24, 40), (4, 4), 0.3)).save(tmp_path_factory.mktemp("security") / "saved")


@pytest.mark.parametrize("store", ["shared", "new"])
def test_load_never_compiles(saved: Path, store: str, tmp_path: Path) -> None:
    """Poisoned compilers first in PATH, no templates on the way; with and without the extension for fast calls."""
    marker, tools = tmp_path / "was run", tmp_path / "bin"
    tools.mkdir()
    for name in ("cc", "gcc", "clang", "c99", "ld", "as", "cc1"):
        (tools / name).write_text(f"#!/bin/sh\ntouch '{marker}'\nexit 1\n")
        (tools / name).chmod(0o755)
    cache = {"BSRGEN_CACHE_DIR": str(tmp_path / "store")} if store == "new" else {}
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    out = run_python(LOAD, str(saved), str(tmp_path / "copy"), BSRGEN_CC=str(tools / "cc"), PATH=path, **cache)
    seen: dict[str, Any] = json.loads(out)
    assert not marker.exists()
    assert seen["started"] == []
    workshop = {
        "api",
        "build",
        "choose",
        "clock",
        "calibration",
        "emit",
        "package",
        "plan",
        "cost",
        "tune",
        "backends",
        "cli",
        "bench",
    }
    loaded = {name.removeprefix("bsrgen.").split(".")[0] for name in seen["modules"] if name.startswith("bsrgen.")}
    assert not loaded & workshop
    heavy = {"jinja2", "click", "rich", "torch", "archspec", "matplotlib", "scipy.special"}
    assert not heavy & set(seen["modules"])
    np.testing.assert_array_equal(seen["z"], seen["again"])
    assert seen["y"] != seen["z"]


DISABLED = """
import sys, bsrgen
from bsrgen import build
from bsrgen.pattern import random_weight
print(bsrgen.load(sys.argv[1]).name)
print(bsrgen.compile(random_weight(0, (24, 40), (4, 4), 0.3)).name)  # the store has it
for what in (lambda: bsrgen.compile(random_weight(1, (24, 40), (4, 4), 0.3)), lambda: build.build_trampoline()):
    try:
        what()
        print("built")
    except bsrgen.BuildError as error:
        print(error)
"""


def test_disabled_jit_forbids_builds_and_nothing_else(saved: Path, tmp_path: Path) -> None:
    first, second, third, fourth = run_python(DISABLED, str(saved), BSRGEN_DISABLE_JIT="1").splitlines()
    assert first == second
    assert "BSRGEN_DISABLE_JIT=1" in third
    assert fourth  # in the store already: nothing to build
    run_python("import bsrgen; bsrgen.compile", BSRGEN_DISABLE_JIT="1")
    script = (
        "import bsrgen\nfrom bsrgen import build\n"
        "try: build.build_trampoline()\nexcept bsrgen.BuildError as error: print(error)\nelse: print('built')\n"
    )
    assert "BSRGEN_DISABLE_JIT=1" in run_python(
        script, BSRGEN_DISABLE_JIT="1", BSRGEN_CACHE_DIR=str(tmp_path / "empty")
    )


def test_artifacts_are_opened_locally() -> None:
    """RTLD_LOCAL | RTLD_NOW: what one library defines is not seen by the next."""
    text = (REPOSITORY / "bsrgen" / "trampoline.py").read_text()
    assert "RTLD_LOCAL" in text
    assert "RTLD_GLOBAL" not in text


def test_many_artifacts_keep_their_own_answers(saved: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """Same name, other values: two libraries with the same symbols in one process."""
    x = rng.standard_normal((3, 40)).astype(np.float32)
    first = bsrgen.load(saved)
    other = Weight(first.pattern, np.ones((first.pattern.nnzb, 4, 4), np.float32))
    second = bsrgen.compile(other)
    assert second.name == first.name
    third = bsrgen.load(second.save(tmp_path / "third"))
    y = first(x)
    np.testing.assert_allclose(second(x), x @ other.todense().T, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(third(x), second(x))
    np.testing.assert_array_equal(first(x), y)
    assert not np.allclose(y, second(x))
