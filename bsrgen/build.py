"""Build: sources -> shared library, with the system's compiler under a time and memory limit."""

import functools
import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from bsrgen import llvm, nvcc, nvrtc
from bsrgen._paths import RUNTIME
from bsrgen.artifact import seal
from bsrgen.emit import Source, Unit
from bsrgen.errors import BuildError, CompilerNotFoundError
from bsrgen.gpus import code_flags
from bsrgen.machine import parallel_cores
from bsrgen.objects import Nameless, nameless
from bsrgen.store import Store
from bsrgen.targets import Target, native

TIMEOUT_S = 60  # one compiler process; the plans' budgets keep real ones below two seconds
MEMORY_BYTES = 4 << 30

_LIMITS = (  # ulimit's letter and unit
    ("v", resource.RLIMIT_AS, MEMORY_BYTES, 1024), ("t", resource.RLIMIT_CPU, TIMEOUT_S, 1),
    ("c", resource.RLIMIT_CORE, 0, 1),
)  # fmt: skip

COMPILE_FLAGS = (
    "-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-pthread",
    "-Wall", "-Wextra",
)  # fmt: skip
LINK_FLAGS = (
    "-shared", "-pthread", "-s", "-Wl,--build-id=none", "-Wl,-z,now", "-Wl,-z,relro", "-Wl,-z,noexecstack",
    "-Wl,-z,text", "-Wl,--as-needed",
)  # fmt: skip

_ENVIRONMENT = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH")  # what a compiler may see of ours
_CROSS = {"x86_64": "x86_64-linux-gnu-gcc", "aarch64": "aarch64-linux-gnu-gcc"}


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C compiler: its path and what it says of itself."""

    path: str
    version: str  # first line of --version
    machine: str  # -dumpmachine

    @property
    def identity(self) -> str:
        """What must be equal for two builds to give equal bytes."""
        return f"{self.version} ({self.machine})"


def find_compiler(target: Target) -> Compiler:
    """The compiler for `target`: $BSRGEN_CC, else cc, gcc, clang, a cross gcc.  CompilerNotFoundError if none fits."""
    asked = os.environ.get("BSRGEN_CC")
    names = [asked] if asked else ["cc", "gcc", "clang", _CROSS.get(target.host, "cc")]
    for name in names:
        path = shutil.which(name)
        if path and (compiler := _probe(path)).machine.split("-")[0] == target.host:
            return compiler
    raise CompilerNotFoundError(
        f"no C compiler for {target.host}: tried {', '.join(names)}; install gcc or clang, or set BSRGEN_CC to one"
    )


@functools.cache
def _probe(path: str) -> Compiler:
    def ask(flag: str) -> str:
        try:
            result = subprocess.run(
                [path, flag], capture_output=True, text=True, errors="replace", timeout=20, env=_environment(),
                check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as e:
            raise CompilerNotFoundError(f"{path} {flag}: {e}; set BSRGEN_CC to a C compiler") from e
        return result.stdout.partition("\n")[0].strip() if result.returncode == 0 else ""

    return Compiler(path, ask("--version"), ask("-dumpmachine"))


def build(source: Source, folder: Path, compiler: Compiler) -> Path:
    """Write `source` into `folder` and compile it there: lib<name>.so and build.log.  BuildError keeps the folder."""
    _refuse_if_disabled(source.name)
    for name, data in source.files.items():
        (folder / name).write_bytes(data)
    started = time.monotonic()
    codes = [unit for unit in source.units if unit.file.endswith(".ptx")]
    units = [unit for unit in source.units if unit not in codes]
    objects = [f"{Path(unit.file).stem}.o" for unit in units]
    library = f"lib{source.name}.so"
    run: Callable[[list[str]], str] = functools.partial(_run, folder=folder)
    logs = [_assemble(unit, folder) for unit in codes]  # other units take in what becomes of it
    headers = ("-isystem", nvcc.find_nvcc().include) if codes else ()
    compile_one = functools.partial(_object, source=source, compiler=compiler, folder=folder, headers=headers)
    with ThreadPoolExecutor(max_workers=parallel_cores()) as pool:
        logs += pool.map(compile_one, units, objects)
    device = bool(codes) or any(unit.file.endswith(".cu") for unit in units)
    libraries = [nvcc.find_nvcc().runtime, *nvcc.LINK] if device else []
    logs.append(run([compiler.path, *LINK_FLAGS, f"-Wl,-soname,{library}", *objects, *libraries, "-o", library]))
    for name in objects:
        (folder / name).unlink(missing_ok=True)
    if not (folder / library).is_file():
        raise BuildError(f"{source.name}: {compiler.path} wrote no library; sources kept in {folder}")
    if flaw := nvcc.flaw("".join(logs)):
        raise BuildError(f"{source.name}: ptxas: {flaw}; sources kept in {folder}")
    head = "".join(f"{who}\n" for who in (compiler.identity, source.tools) if who)
    (folder / "build.log").write_text(head + "".join(logs))
    _log_time(source.name, time.monotonic() - started)
    return folder / library


def _assemble(unit: Unit, folder: Path) -> str:
    """PTX -> machine code for each GPU, in one file; log text."""
    code = f"{Path(unit.file).stem}.fatbin"
    return _run([nvcc.find_nvcc().path, "-O3", "-Xptxas", "-v", *unit.flags, "-fatbin", unit.file, "-o", code], folder)


def _object(unit: Unit, target: str, source: Source, compiler: Compiler, folder: Path, headers: Sequence[str]) -> str:
    """One file -> an object in `folder`, from the store where another kernel of the same text has been; log text."""
    text = None if headers else nameless(source, unit)
    if text is not None:
        flags = (*COMPILE_FLAGS, *unit.flags, "-I.")
        with suppress(BuildError, OSError):  # then the file is compiled here, and says what is wrong with it
            make = functools.partial(_nameless, text, [compiler.path, *flags])
            program = f"{os.path.realpath(compiler.path)} {os.stat(compiler.path).st_mtime_ns}"  # wrappers add flags
            kept = Store.default().publish(text.key(compiler.identity, program, *flags), make)
            data, said = text.named((kept / "unit.o").read_bytes()), (kept / "unit.log").read_text()
            if data is not None:
                (folder / target).write_bytes(data)
                return text.commands(" ".join([Path(compiler.path).name, *flags]), target) + said
    return _compile(unit, target, compiler, folder, headers)


def _nameless(text: Nameless, command: list[str], folder: Path) -> None:
    """The object and what the compiler says of it, in a folder of the store."""
    texts = {"unit.c": text.text, **text.headers}
    for name, data in texts.items():
        (folder / name).write_bytes(data)
    log = _run([*command, "-c", "unit.c", "-o", "unit.o"], folder)
    data = (folder / "unit.o").read_bytes()
    if not data.startswith(b"\x7fELF") or text.stand_in.encode() not in data:
        raise BuildError(f"{text.file}: {command[0]} wrote no object")
    (folder / "unit.log").write_text(log.partition("\n")[2])
    for name in texts:
        (folder / name).unlink()
    seal(folder, {})


def _compile(unit: Unit, target: str, compiler: Compiler, folder: Path, headers: Sequence[str] = ()) -> str:
    """One file -> an object in `folder`; log text."""
    if unit.file.endswith(".ll"):
        (folder / target).write_bytes(llvm.compile_object((folder / unit.file).read_text(), unit.flags))
        return f"llvmlite -O3 {' '.join(unit.flags)} {unit.file} -o {target}\n"
    if unit.kernels:
        try:
            return _in_two_parts(unit, target, compiler, folder)
        except BuildError as e:
            (arch,) = unit.flags
            whole = replace(unit, flags=(code_flags(arch, arch),), kernels=())
            return f"NVRTC: {e}\n{_compile(whole, target, compiler, folder)}"
    if unit.file.endswith(".cu"):
        command = [nvcc.find_nvcc().path, "-ccbin", compiler.path, *nvcc.FLAGS, *unit.flags]
        return _run([*command, "-I.", "-c", unit.file, "-o", target], folder)
    return _run([compiler.path, *COMPILE_FLAGS, *unit.flags, *headers, "-I.", "-c", unit.file, "-o", target], folder)


def _in_two_parts(unit: Unit, target: str, compiler: Compiler, folder: Path) -> str:
    """A .cu by NVRTC and a C++ compiler; log text.  Of what races build, which only this machine runs."""
    (arch,) = unit.flags
    found, cubin = nvrtc.find_nvrtc(), f"{Path(unit.file).stem}.cubin"
    headers = {path.name: path.read_text() for path in folder.glob("*.h")}
    made = found.compile((folder / unit.file).read_text(), headers, unit.kernels, arch)
    (folder / cubin).write_bytes(made.cubin)
    names = ",".join(f'"{name}"' for name in made.lowered)
    flags = [*nvcc.HOST_FLAGS, f'-DBSRGEN_CUBIN="{cubin}"', f"-DBSRGEN_KERNELS={names}"]
    include = f"-I{nvcc.find_nvcc().include}"
    log = _run([compiler.path, *flags, include, f"-I{RUNTIME}", "-I.", "-c", unit.file, "-o", target], folder)
    return f"{found.identity} --gpu-architecture={arch} {unit.file}\n{made.log}\n{log}"


@functools.cache  # trying once in a process is enough
def prepare_calls() -> None:
    """The extension for fast calls, built once; without Python.h calls take cffi's ABI mode."""
    from bsrgen.trampoline import trampoline

    if trampoline().mode != "api" and os.environ.get("BSRGEN_DISABLE_JIT") != "1":
        with suppress(BuildError):
            build_trampoline()
            trampoline.cache_clear()


def build_trampoline() -> None:
    """Build the call path's extension into the store, unless it is there.  BuildError where Python.h is missing."""
    import sysconfig

    import cffi
    from cffi import recompiler

    from bsrgen import trampoline

    def make(folder: Path) -> None:
        compiler = find_compiler(native())
        text = f"{trampoline.MODULE}.c"
        ffi = cffi.FFI()
        ffi.cdef(trampoline.DECLARATIONS)
        source = (RUNTIME / trampoline.SOURCE).read_text()
        recompiler.make_c_source(ffi, trampoline.MODULE, source, str(folder / text), verbose=False)
        flags = ["-std=gnu11", "-O2", "-fPIC", "-pthread", f"-I{RUNTIME}", f"-I{sysconfig.get_path('include')}"]
        _run([compiler.path, *flags, *LINK_FLAGS, text, "-o", f"{trampoline.MODULE}{trampoline.SUFFIX}"], folder)
        seal(folder, {})

    store = Store.default()
    if store.get(trampoline.extension_key()) is None:
        _refuse_if_disabled(trampoline.MODULE)
        store.publish(trampoline.extension_key(), make)


def build_runtime(texts: Sequence[str], library: str, target: Target) -> Path:
    """`library` made of texts of runtime/, the first of them C, for a target's family; built once into the store."""
    compiler, flags = find_compiler(target), (*COMPILE_FLAGS, *LINK_FLAGS)
    data = {name: (RUNTIME / name).read_bytes() for name in texts}
    identity = "\0".join((compiler.identity, library, *flags)).encode()
    key = hashlib.sha256(b"\0".join((identity, *data.values()))).hexdigest()

    def make(folder: Path) -> None:
        _refuse_if_disabled(library)
        for name, text in data.items():
            (folder / name).write_bytes(text)
        _run([compiler.path, *flags, "-I.", texts[0], "-o", library], folder)
        seal(folder, {})

    return Store.default().publish(key, make) / library


def _refuse_if_disabled(what: str) -> None:
    if os.environ.get("BSRGEN_DISABLE_JIT") == "1":
        raise BuildError(f"{what}: a build is needed, but BSRGEN_DISABLE_JIT=1 forbids it; load a built artifact")


def _run(command: list[str], folder: Path) -> str:
    """Run one compiler process in `folder`; its command and words as log text, without paths of this machine."""
    try:
        process = subprocess.Popen(
            _limited(command), cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, errors="replace", env=_environment(), start_new_session=True,
        )  # fmt: skip
    except OSError as e:
        raise BuildError(f"{command[0]}: cannot run: {e}") from e
    with process:
        try:
            _, said = process.communicate(timeout=TIMEOUT_S)
        except BaseException as e:
            os.killpg(process.pid, signal.SIGKILL)  # the driver's children too: cc1, as, ld
            if isinstance(e, subprocess.TimeoutExpired):
                where = f"stopped after {TIMEOUT_S} s; sources kept in {folder}"
                raise BuildError(f"{' '.join(command)}: {where}") from None
            raise
    if process.returncode:
        words = said.splitlines()
        first = next((line for line in words if "error" in line.lower()), words[0] if words else "no message")
        raise BuildError(f"{' '.join(command)}: exit status {process.returncode}: {first}; sources kept in {folder}")
    said = re.sub(r"^ptxas info    : Compile time = .*\n", "", said, flags=re.M)  # equal inputs, equal logs
    words = [Path(word).name if word.startswith("/") else word for word in command]
    return f"{' '.join(words)}\n{said}"


def _limited(command: list[str]) -> list[str]:
    """`command` with our environment under limits of memory, time and core files.

    The shell sets them: Python code between fork and exec (preexec_fn) may deadlock in a process of several threads.
    The shell also adds variables of its own, hence env -i.
    """
    limits = []
    for flag, which, most, unit in _LIMITS:
        hard = resource.getrlimit(which)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        limits.append(f"ulimit -{flag} {most // unit}")
    clean = ["/usr/bin/env", "-i", *(f"{name}={value}" for name, value in _environment().items())]
    return ["/bin/sh", "-c", f'{" && ".join(limits)} && exec "$@"', "sh", *clean, *command]


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | {"LC_ALL": "C"}


def _log_time(name: str, seconds: float) -> None:
    import logging

    logging.getLogger("bsrgen").info("built %s in %.2f s", name, seconds)
