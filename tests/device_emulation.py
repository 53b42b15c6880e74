"""CUDA artifacts that run on the CPU: the same text under tests/cuda/cuda_runtime.h, and arrays for its "GPU"."""

import ctypes
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from programs import tool
from support import CANARY, REPOSITORY, assert_right, frame_is_intact, framed

from bsrgen import build, package
from bsrgen.artifact import Artifact, read_artifact, write_manifest
from bsrgen.backends.cuda import CudaPlan, emit
from bsrgen.device import DeviceKernel
from bsrgen.emit import Source
from bsrgen.errors import DeviceError
from bsrgen.loading import kernel_of
from bsrgen.pattern import Weight
from bsrgen.problem import Problem

Array = np.ndarray[Any, Any]
HEADERS = REPOSITORY / "tests" / "cuda"
FLAGS = ("-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")


def emulated(
    plan: CudaPlan, weight: Weight, folder: Path, change: Callable[[str], str] = lambda text: text
) -> DeviceKernel:
    """Print `plan`, compile it for the CPU and load it; `change` may alter the device's text before."""
    return emulated_source(emit((plan,), weight), weight, folder, change)


def emulated_source(
    source: Source, weight: Weight, folder: Path, change: Callable[[str], str] = lambda text: text
) -> DeviceKernel:
    """The same of text that has been printed."""
    name = source.name
    device = change(source.files[f"{name}_device.cu"].decode())
    compiler = build.find_compiler(source.plans[0].target)
    build_emulated(replace(source, files={**source.files, f"{name}_device.cu": device.encode()}), folder, compiler)
    manifest = package.describe(source, weight, compiler, (), folder, {})
    write_manifest(folder, replace_notes(manifest, head=getattr(source.plans[0].problem, "head", 0)))
    kernel = kernel_of(read_artifact(folder))
    assert isinstance(kernel, DeviceKernel)
    return kernel


def build_emulated(source: Source, folder: Path, compiler: build.Compiler) -> Path:
    """What build.build does, for the CPU."""
    name = source.name
    for file, data in source.files.items():
        (folder / file).write_bytes(data)
    gcc, gxx = tool("gcc"), tool("g++")
    library = f"lib{name}.so"
    commands = (
        (gcc, "-std=gnu11", *FLAGS, "-I.", "-c", f"{name}.c", "-o", "main.o"),
        (gxx, "-std=c++17", *FLAGS, "-Wno-unknown-pragmas", "-Wno-unused-function", f"-I{HEADERS}", "-I.", "-x", "c++",
         "-c", f"{name}_device.cu", "-o", "device.o"),
        (gxx, "-shared", "-Wl,-z,noexecstack", "main.o", "device.o", "-o", library),
    )  # fmt: skip
    for command in commands:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[:2000]
    for file in (folder / "main.o", folder / "device.o"):
        file.unlink()
    (folder / "build.log").write_text("emulated\n")
    return folder / library


def replace_notes(manifest: Any, **changes: Any) -> Any:
    """The manifest of what is not for a GPU."""
    import msgspec

    return msgspec.structs.replace(manifest, notes=("emulated",), **changes)


def said(artifact: Artifact) -> str:
    """What the emulation objected to in the last launch."""
    function = ctypes.CDLL(str(artifact.library)).emulation_said
    function.restype = ctypes.c_char_p
    return function().decode()


class GpuArray:
    """A copy of a numpy array, or of a view and all around it, where the emulation has its device memory: a page that
    nobody may touch behind it, NaN before it.  `fetch` brings what is there now."""

    def __init__(self, kernel: DeviceKernel, array: Array, **changes: Any) -> None:
        base = array if array.base is None or array.base.ndim != array.ndim else array.base
        self.view, self.base = array, base
        library = ctypes.CDLL(str(kernel.artifact.library))
        upload = library[f"{kernel.name}_upload"]
        upload.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p]
        memory, whole = ctypes.c_void_p(), np.ascontiguousarray(base)
        assert upload(whole.ctypes.data, whole.nbytes, 0, ctypes.byref(memory)) == 0
        self.memory = memory.value
        start = self.memory + (array.ctypes.data - base.ctypes.data if base is not array else 0)
        typestr = {"bfloat16": "<u2", "float8_e4m3fn": "|u1"}.get(array.dtype.name, array.dtype.str)
        self.__cuda_array_interface__ = {
            "shape": array.shape, "typestr": typestr, "data": (start, False), "strides": array.strides, "version": 3,
        } | changes  # fmt: skip

    def fetch(self) -> Array:
        """What is there now, also in the array that this one was made of."""
        ctypes.memmove(self.base.ctypes.data, self.memory, self.base.nbytes)
        return self.view


def run(kernel: DeviceKernel, x: Array, out: Array, given: dict[str, Any]) -> Array:
    """One call, everything brought to the "GPU" and back; the result, which lies in `out`."""
    operands = {name: GpuArray(kernel, a) if np.ndim(a) else a for name, a in given.items()}
    y = GpuArray(kernel, out)
    assert kernel(GpuArray(kernel, x), out=y, **operands) is y
    return y.fetch()


def check_device_calls(
    kernel: DeviceKernel, problem: Problem, weight: Weight, rng: Any, tokens: Any, exact: bool = True
) -> None:
    """Call `kernel` with each N of `tokens`, plainly and inside frames of NaN; nothing outside of out may change.  Both
    give the same bits if `exact`."""
    for n in tokens:
        x, given = problem.sample(rng, n)
        old = problem.sample_out(rng, n)
        plain = run(kernel, x, old.copy(), given)
        assert_right(problem, weight, plain, x, given, old)
        out = framed(old, fill=CANARY)
        if min(out.shape):  # strides of arrays without elements say nothing
            inside = run(kernel, framed(x), out, given)
            if exact:
                np.testing.assert_array_equal(inside, plain)
            assert_right(problem, weight, inside, x, given, old)
            assert frame_is_intact(out)


@dataclass(frozen=True)
class Victim:
    """A kernel in which every line of a template matters, and the calls that show it."""

    plan: CudaPlan
    weight: Weight
    tokens: tuple[int, ...]

    def check(self, folder: Path, rng: Any) -> None:
        """It is right as it is."""
        check_device_calls(emulated(self.plan, self.weight, folder), self.plan.problem, self.weight, rng, self.tokens)

    def assert_found(self, mutation: tuple[str, str], folder: Path, rng: Any) -> None:
        """The emulation finds it where one text of the kernel is replaced by another."""
        old, new = mutation

        def change(text: str) -> str:
            assert old in text
            return text.replace(old, new)

        kernel = emulated(self.plan, self.weight, folder, change)
        with pytest.raises((AssertionError, DeviceError, pytest.fail.Exception)) as found:
            check_device_calls(kernel, self.plan.problem, self.weight, rng, self.tokens)
        assert found.type is not DeviceError or said(kernel.artifact)
