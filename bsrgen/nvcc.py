"""nvcc: where it is, what it says of itself, and what is linked with what it makes."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bsrgen.errors import CompilerNotFoundError

VARIABLE = "BSRGEN_NVCC"
INSTALL = "pip install 'bsrgen[cuda]', or install the CUDA toolkit, or set BSRGEN_NVCC to its nvcc"
OLDEST = (12, 0)  # C++17 and every architecture of gpus.py

FLAGS = (
    "-O3", "-std=c++17", "-Xptxas", "-v", "-Xcompiler",
    # nothing of libstdc++: neither unwinding nor guards of static data
    "-fPIC,-fvisibility=hidden,-fno-exceptions,-fno-rtti,-fno-threadsafe-statics,-Wall,-Wextra",
)  # fmt: skip
HOST_FLAGS = (  # of a C++ compiler for the host's part, where NVRTC has made the device's
    "-x", "c++", "-std=c++17", "-O2", "-DBSRGEN_HOST_PART", "-fPIC", "-fvisibility=hidden", "-fno-exceptions",
    "-fno-rtti", "-fno-threadsafe-statics", "-fno-ipa-icf",  # stubs are told apart by their addresses
)  # fmt: skip
LINK = ("-static-libgcc", "-Wl,--exclude-libs,ALL", "-lpthread", "-ldl", "-lrt")


@dataclass(frozen=True, slots=True)
class Nvcc:
    """NVIDIA's compiler: its path, its release, and the static runtime library beside it."""

    path: str
    release: str
    runtime: str

    @property
    def include(self) -> str:
        """The folder with the CUDA runtime's headers."""
        return str(Path(self.runtime).parents[1] / "include")

    @property
    def takes_code(self) -> bool:
        """Whether its runtime library loads machine code at run time (cudaLibraryLoadData)."""
        return int(self.release.partition(".")[0]) >= 13

    @property
    def libdevice(self) -> Path | None:
        """NVIDIA's functions of mathematics as LLVM bitcode."""
        places = [folder / "nvvm" / "libdevice" / "libdevice.10.bc" for folder in Path(self.runtime).parents]
        return next((place for place in places if place.is_file()), None)

    @property
    def identity(self) -> str:
        """What must be equal for two builds to give equal bytes."""
        return f"nvcc {self.release}"


def find_nvcc() -> Nvcc:
    """$BSRGEN_NVCC, else nvcc on PATH, else that of bsrgen[cuda]'s wheels.  CompilerNotFoundError if none works."""
    asked = os.environ.get(VARIABLE)
    found = shutil.which(asked) if asked else shutil.which("nvcc") or _in_wheels()
    if not found:
        where = f"{VARIABLE}={asked} is not a program" if asked else "none on PATH and none in the wheels"
        raise CompilerNotFoundError(f"kernels for NVIDIA GPUs need nvcc: {where}; {INSTALL}")
    return _probe(found)


def flaw(log: str) -> str:
    """What ptxas says of a kernel that is right and too slow to keep: products of warpgroups one after the other (C7510
    and its like), or no notice taken of setmaxnreg; "" where it says nothing of the kind."""
    found = re.search(r"\(C75\d\d\) .*", log)
    return found.group() if found else ""


def identity() -> str:
    """nvcc's, as it enters the key of the store."""
    return find_nvcc().identity


def _in_wheels(tool: str = "nvcc") -> str | None:
    """A program of NVIDIA's wheels on PyPI."""
    try:
        spec = importlib.util.find_spec("nvidia.cu13")
    except ModuleNotFoundError:
        return None
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders if (path := shutil.which(tool, path=f"{folder}/bin"))), None)


@functools.cache
def _probe(path: str) -> Nvcc:
    release = re.search(r"release [\d.]+, V(\d+)\.(\d+)\.(\d+)", _ask(path, "--version"))
    top = re.search(r"^#\$ TOP=(.*)$", _ask(path, "--dryrun", "-x", "cu", "-c", os.devnull), re.M)
    if not release or not top:
        raise CompilerNotFoundError(f"{path} does not answer as nvcc does; {INSTALL}")
    if tuple(map(int, release.groups()))[:2] < OLDEST:
        raise CompilerNotFoundError(f"{path} is CUDA {release[1]}.{release[2]}, 12.0 or newer is needed; {INSTALL}")
    places = [Path(top[1]) / folder / "libcudart_static.a" for folder in ("lib64", "lib", "targets/x86_64-linux/lib")]
    runtime = next((place for place in places if place.is_file()), None)
    if runtime is None:
        raise CompilerNotFoundError(f"{path} has no libcudart_static.a beside it, {places[0]} for one; {INSTALL}")
    return Nvcc(path, ".".join(release.groups()), str(runtime.resolve()))


def _ask(path: str, *arguments: str) -> str:
    try:
        result = subprocess.run(
            [path, *arguments], capture_output=True, text=True, errors="replace", timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise CompilerNotFoundError(f"{path} {' '.join(arguments)}: {e}; {INSTALL}") from e
    return result.stdout + result.stderr
