"""MLIR's stock sparsifier as a peer: one linalg operation on the whole BSR tensor through its pipeline of that name.

What `backend="mlir"` is measured against, and another judge of its results.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import cffi
import numpy as np
from numpy.typing import NDArray

from bsrgen import llvm
from bsrgen.backends.mlir.lower import identity, lower
from bsrgen.backends.mlir.text import TYPES, arithmetic, dense
from bsrgen.bench.case import Case
from bsrgen.bench.peer import Run
from bsrgen.build import LINK_FLAGS, find_compiler
from bsrgen.emit import render
from bsrgen.errors import UnsupportedError
from bsrgen.problem import Problem
from bsrgen.targets import native

Array = NDArray[Any]
NAME = "stock"


def declines(case: Case) -> str | None:
    """Why it is not timed here."""
    p = case.weight.pattern
    if (p.block_rows * p.R, p.block_cols * p.C) != p.shape or not p.nnzb:
        return "takes whole blocks only, at least one"
    try:
        identity()
    except UnsupportedError as e:
        return str(e)
    return None


def stock_text(problem: Problem) -> str:
    """W @ X on plain tensors, sums as the accumulator.  Blocks of one row or column make W a tensor of four dimensions:
    the map with floordiv and mod refuses a divisor of 1."""
    p = problem.pattern
    view = {
        "name": NAME, **arithmetic(problem), "x": TYPES[problem.read_dtype.name], "R": p.R, "C": p.C,
        "M": p.M, "K": p.K, "block_rows": p.block_rows, "block_cols": p.block_cols, "nnzb": p.nnzb, "nnz": p.nnz,
        "split": 1 in p.blocksize, "linear": problem.operator.token_axis == 0,
        "pos": dense(p.indptr.astype(np.int32)), "crd": dense(p.indices.astype(np.int32)),
    }  # fmt: skip
    return render("mlir/linalg.mlir.j2", k=view)


def prepare(case: Case) -> Run:
    """Lowered with the sparsifier's own vectors as long as the CPU's, then LLVM with its vectorisers."""
    problem, target, p = case.problem, native(), case.weight.pattern
    lanes = target.lanes(problem.real.bytes)
    options = f"enable-runtime-library=false enable-index-optimizations=true reassociate-fp-reductions=true vl={lanes}"
    lowered = lower(stock_text(problem), f"sparsifier{{{options}}}", "canonicalize")
    code = llvm.compile_object(lowered.llvm_ir, llvm.flags(target), vectorize=True)
    y = np.zeros(problem.operator.shape(case.n, p.M), problem.accumulator.numpy)
    x, sums = (_split(a, size, problem) for a, size in ((case.x, p.C), (y, p.R)))
    values = np.ascontiguousarray(case.weight.data).reshape(-1)
    arguments = [*_memref(values), *_memref(x), *_memref(sums)]
    library = _load(code, len(arguments))
    entry = getattr(library, NAME)

    def call(used: tuple[Any, ...] = (library, values, x, sums)) -> None:
        """`used`: what the addresses in `arguments` and `entry` are of, kept as long as the call."""
        y.fill(0)
        entry(*arguments)

    return Run(call, lambda: y)


def _split(array: Array, size: int, problem: Problem) -> Array:
    """X or Y as linalg.mlir.j2 wants it: features by block where W has four dimensions."""
    if 1 not in problem.pattern.blocksize:
        return array
    return array.reshape((array.shape[0], -1, size) if problem.operator.token_axis == 0 else (-1, size, array.shape[1]))


def _memref(array: Array) -> list[int]:
    """A memref as arguments: allocated, aligned, offset, sizes, strides in elements."""
    strides = (stride // array.itemsize for stride in array.strides)
    return [array.ctypes.data, array.ctypes.data, 0, *array.shape, *strides]


def _load(code: bytes, arguments: int) -> Any:
    """An object file as a library; its function takes so many integers and addresses."""
    ffi = cffi.FFI()
    ffi.cdef(f"void {NAME}({', '.join(['intptr_t'] * arguments)});")
    with tempfile.TemporaryDirectory() as folder:
        file, library = Path(folder) / f"{NAME}.o", Path(folder) / f"{NAME}.so"
        file.write_bytes(code)
        subprocess.run([find_compiler(native()).path, *LINK_FLAGS, str(file), "-o", str(library)], check=True)
        return ffi.dlopen(str(library))
