"""NVRTC: NVIDIA's compiler as a library, without processes, host compiler or headers; for races of plans."""

import functools
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsrgen.errors import BuildError, CompilerNotFoundError

VARIABLE = "BSRGEN_NVRTC"
INSTALL = "pip install 'bsrgen[cuda]', or set BSRGEN_NVRTC to libnvrtc.so of a CUDA toolkit"
OLDEST = (12, 0)
NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
_FUNCTIONS = """
int nvrtcVersion(int *major, int *minor); const char *nvrtcGetErrorString(int error);
int nvrtcCreateProgram(void **program, const char *text, const char *name, int headers, const char **texts,
                       const char **names);
int nvrtcAddNameExpression(void *program, const char *name);
int nvrtcCompileProgram(void *program, int count, const char **options);
int nvrtcGetLoweredName(void *program, const char *name, const char **lowered);
int nvrtcGetProgramLogSize(void *program, size_t *bytes); int nvrtcGetProgramLog(void *program, char *log);
int nvrtcGetCUBINSize(void *program, size_t *bytes); int nvrtcGetCUBIN(void *program, char *cubin);
int nvrtcDestroyProgram(void **program);
"""
# What the generated text includes; NVRTC knows the built-in types and functions without.
HEADERS = {
    "stdint.h": (
        "typedef signed char int8_t; typedef unsigned char uint8_t; typedef short int16_t; typedef unsigned short"
        " uint16_t;\ntypedef int int32_t; typedef unsigned uint32_t; typedef long long int64_t;"
        " typedef unsigned long long uint64_t;\ntypedef unsigned long long uintptr_t;\n#define INT32_MAX 2147483647\n"
    ),
    "cuda.h": "struct alignas(64) CUtensorMap { unsigned long long opaque[16]; };\n",
    "stddef.h": "",
    "string.h": "",
    "cuda_runtime.h": "",
    "cuda_fp16.h": (
        "struct __half { unsigned short bits; };\n"
        "static __device__ __forceinline__ __half __ushort_as_half(unsigned short v) { __half h = {v}; return h; }\n"
        "static __device__ __forceinline__ unsigned short __half_as_ushort(__half h) { return h.bits; }\n"
        "static __device__ __forceinline__ float __half2float(__half h)\n"
        '{ float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h.bits)); return f; }\n'
        "static __device__ __forceinline__ __half __float2half_rn(float f)\n"
        '{ __half h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(f)); return h; }\n'
    ),
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """Machine code of one architecture, the kernels' names in it, and what ptxas said."""

    cubin: bytes
    lowered: tuple[str, ...]
    log: str


@dataclass(frozen=True, slots=True)
class Nvrtc:
    """The library: where it is, and its release."""

    path: str
    release: str

    @property
    def identity(self) -> str:
        """What it says of itself."""
        return f"NVRTC {self.release}"

    def compile(self, text: str, headers: Mapping[str, str], kernels: Sequence[str], arch: str) -> Compiled:
        """`text` to machine code of `arch` ("sm_90a").  BuildError with the first error where it is wrong."""
        ffi, library = _library(self.path)
        keep: list[Any] = []  # C strings live as long as something holds them

        def strings(words: Sequence[str]) -> Any:
            keep.extend(made := [ffi.new("char[]", word.encode()) for word in words])
            return ffi.new("const char *[]", made or [ffi.NULL])

        all_headers = HEADERS | dict(headers)
        program = ffi.new("void **")
        names, texts = strings(list(all_headers)), strings(list(all_headers.values()))
        _must(library.nvrtcCreateProgram(program, text.encode(), b"kernel.cu", len(all_headers), texts, names), self)
        try:
            for kernel in kernels:
                _must(library.nvrtcAddNameExpression(program[0], kernel.encode()), self)
            flags = [f"--gpu-architecture={arch}", "--std=c++17", "--ptxas-options=-v"]
            status = library.nvrtcCompileProgram(program[0], len(flags), strings(flags))
            log = _bytes(ffi, library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program[0]).rstrip(b"\0")
            said = log.decode(errors="replace")
            if status:
                lines = said.splitlines()
                first = next((line for line in lines if "error" in line.lower()), f"error {status}")
                raise BuildError(f"{self.identity} {' '.join(flags)}: {first}")
            lowered = ffi.new("const char **")
            found = []
            for kernel in kernels:
                _must(library.nvrtcGetLoweredName(program[0], kernel.encode(), lowered), self)
                found.append(ffi.string(lowered[0]).decode())
            cubin = _bytes(ffi, library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program[0])
            return Compiled(cubin, tuple(found), said)
        finally:
            library.nvrtcDestroyProgram(program)


def find_nvrtc() -> Nvrtc:
    """$BSRGEN_NVRTC, else that of the wheels, else the dynamic linker's.  CompilerNotFoundError if none works."""
    asked = os.environ.get(VARIABLE)
    for path in [asked] if asked else [*_in_wheels(), *NAMES]:
        try:
            return _probe(path)
        except OSError:
            continue
    where = f"{VARIABLE}={asked} cannot be loaded" if asked else "none in the wheels and none that can be loaded"
    raise CompilerNotFoundError(f"no NVRTC: {where}; {INSTALL}")


def _in_wheels() -> list[str]:
    try:
        spec = importlib.util.find_spec("nvidia.cu13")
    except ModuleNotFoundError:
        return []
    folders = (spec.submodule_search_locations or []) if spec else []
    places = [Path(folder) / "lib" / name for folder in folders for name in NAMES]
    return [str(place) for place in places if place.is_file()]


@functools.cache
def _probe(path: str) -> Nvrtc:
    ffi, library = _library(path)
    major, minor = ffi.new("int *"), ffi.new("int *")
    library.nvrtcVersion(major, minor)
    if (major[0], minor[0]) < OLDEST:
        raise CompilerNotFoundError(f"{path} is NVRTC {major[0]}.{minor[0]}, 12.0 or newer is needed; {INSTALL}")
    return Nvrtc(path, f"{major[0]}.{minor[0]}")


@functools.cache
def _library(path: str) -> tuple[Any, Any]:
    import cffi

    ffi = cffi.FFI()
    ffi.cdef(_FUNCTIONS)
    for part in sorted(Path(path).parent.glob("libnvrtc-builtins.so*")) if "/" in path else ():
        ffi.dlopen(str(part))  # it looks for this by name, which the linker then knows
    return ffi, ffi.dlopen(path)


def _must(status: int, nvrtc: Nvrtc) -> None:
    if status:
        ffi, library = _library(nvrtc.path)
        raise BuildError(f"{nvrtc.identity}: {ffi.string(library.nvrtcGetErrorString(status)).decode()}")


def _bytes(ffi: Any, size_of: Any, get: Any, program: Any) -> bytes:
    size = ffi.new("size_t *")
    size_of(program, size)
    data = ffi.new("char[]", max(size[0], 1))
    get(program, data)
    return bytes(ffi.buffer(data, size[0]))
