"""MLIR's Python bindings, under whichever name they are installed, and what they can do."""

import functools
import importlib
import importlib.metadata
import os
from dataclasses import dataclass
from types import ModuleType

from bsrgen.errors import UnsupportedError

VARIABLE = "BSRGEN_MLIR_PACKAGE"
PACKAGES = ("mlir", "torch_mlir")  # upstream's own name; the wheel on PyPI that carries them
PROBE = "builtin.module(sparsification-and-bufferization,func.func(promote-buffers-to-stack),finalize-memref-to-llvm)"
INSTALL = "pip install 'bsrgen[mlir]' (torch-mlir >= 20261001 and llvmlite), or backend='c', which needs neither"


@dataclass(frozen=True, slots=True)
class Bindings:
    """A package whose passes lower sparse tensors: what is used of it, and its name with its version."""

    identity: str
    ir: ModuleType
    passmanager: ModuleType
    llvm: ModuleType


def bindings() -> Bindings:
    """Those of $BSRGEN_MLIR_PACKAGE, else the first of PACKAGES that can lower.  UnsupportedError where none can."""
    asked = os.environ.get(VARIABLE)
    failures = []
    for package in (asked,) if asked else PACKAGES:
        try:
            return _load(package)
        except (ImportError, ValueError) as e:
            failures.append(f"{package}: {' '.join(str(e).split())[:200]}")
    raise UnsupportedError(
        f"backend='mlir': no MLIR bindings that lower sparse tensors ({'; '.join(failures)}); "
        + (f"unset {VARIABLE}, or " if asked else "")
        + INSTALL
    )


@functools.cache
def _load(package: str) -> Bindings:
    """ImportError where `package` is absent or an empty placeholder, ValueError where a pass is missing."""
    ir, passmanager = (importlib.import_module(f"{package}.{part}") for part in ("ir", "passmanager"))
    llvm = importlib.import_module(f"{package}.dialects.llvm")
    if not hasattr(llvm, "translate_module_to_llvmir"):
        raise ImportError(f"{package} cannot translate to LLVM IR")
    with ir.Context() as context:
        context.enable_multithreading(False)
        passmanager.PassManager.parse(PROBE)
    return Bindings(f"{package} {_version(package)}", ir, passmanager, llvm)


def _version(package: str) -> str:
    """Of the distribution that brings it; a build of upstream has none."""
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "of no distribution"
