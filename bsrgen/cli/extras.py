"""What `bsrgen doctor` finds of the extras: MLIR, CUDA and GPUs.  That one is missing matters to who asks for it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bsrgen.errors import BsrgenError


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at; `advice` says what to do unless it is ok."""

    what: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    advice: str = ""


def mlir() -> Iterator[Finding]:
    """An extra: that it is missing matters only to those who ask for it."""
    from bsrgen.backends.mlir import identity
    from bsrgen.bindings import INSTALL, VARIABLE
    from bsrgen.errors import UnsupportedError

    try:
        yield Finding("mlir", "ok", identity())
    except UnsupportedError as e:
        if VARIABLE in os.environ:
            yield Finding("mlir", "warn", f"{VARIABLE}={os.environ[VARIABLE]}: {e}", INSTALL)
        else:
            yield Finding("mlir", "ok", f"none, which only backend='mlir' needs: {INSTALL}")
        return
    yield _mlir_gpu()


def _mlir_gpu() -> Finding:
    """Whether the MLIR that was found goes on to machine code of GPUs: with NVIDIA's tools for it."""
    from bsrgen.backends.mlir.gpu_text import gpu_identity

    try:
        return Finding("mlir gpu", "ok", gpu_identity())
    except BsrgenError as e:
        return Finding("mlir gpu", "ok", f"not possible, which only backend='mlir' for GPUs needs: {e}")


def cuda() -> Iterator[Finding]:
    """Another extra; whether there is a GPU does not matter to who compiles for one."""
    from bsrgen.errors import CompilerNotFoundError
    from bsrgen.nvcc import INSTALL, VARIABLE, find_nvcc

    try:
        nvcc = find_nvcc()
        yield Finding("cuda", "ok", f"{nvcc.path}: {nvcc.identity}")
    except CompilerNotFoundError as e:
        if VARIABLE in os.environ:
            yield Finding("cuda", "warn", str(e), INSTALL)
        else:
            yield Finding("cuda", "ok", f"no nvcc, which only backend='cuda' needs: {INSTALL}")


def nvrtc() -> Iterator[Finding]:
    """What races on a GPU are faster with."""
    from bsrgen.errors import CompilerNotFoundError
    from bsrgen.nvrtc import INSTALL, VARIABLE, find_nvrtc

    try:
        yield Finding("nvrtc", "ok", f"{(nvrtc := find_nvrtc()).path}: {nvrtc.identity}")
    except CompilerNotFoundError as e:
        if VARIABLE in os.environ:
            yield Finding("nvrtc", "warn", str(e), INSTALL)
        else:
            yield Finding("nvrtc", "ok", f"none, which only tune='measure' on a GPU is faster with: {INSTALL}")


def gpus() -> Iterator[Finding]:
    from bsrgen import driver
    from bsrgen.errors import DeviceError

    try:
        found = driver.gpus()
    except DeviceError as e:
        yield Finding("gpu", "ok", f"none, which only calls of backend='cuda' need: {e}")
        return
    for gpu in found:
        yield Finding("gpu", "ok", f"{gpu.number}: {gpu}; the driver knows CUDA {driver.version()}")
