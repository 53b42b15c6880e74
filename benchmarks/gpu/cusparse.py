"""cuSPARSE's block-sparse products through ctypes: SpMM on BSR and on Blocked-ELL (its documentation, generic API)."""

import ctypes
import functools
from typing import Any

import numpy as np

from benchmarks.gpu.contenders import Run
from benchmarks.gpu.stages import Stage
from bsrgen.bench.case import Case

Array = np.ndarray[Any, Any]
LIBRARIES = ("libcusparse.so.12", "libcusparse.so")
TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}  # cudaDataType (library_types.h)
R_32F, INDEX_32I, BASE_ZERO, NO_TRANSPOSE = 0, 2, 0, 0  # cusparse.h
COLUMN, ROW = 1, 2  # cusparseOrder_t
BLOCKED_ELL_ALG1, BSR_ALG1 = 13, 14  # cusparseSpMMAlg_t
LEAST_BLOCK = 2


def declines(case: Case) -> str:
    """What its SpMM multiplies with sums of float32."""
    return "" if case.dtype.name in TYPES else f"no {case.dtype.name} here"


def declines_ell(case: Case) -> str:
    """Blocked-ELL has square blocks and the same number in each block row: ours is filled up with zeros."""
    p = case.weight.pattern
    if why := declines(case):
        return why
    if p.R != p.C or p.R < LEAST_BLOCK:
        return "Blocked-ELL has square blocks"
    return "" if p.nnzb else "nothing stored"


@functools.cache
def _library() -> Any:
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeError(f"not installed: {LIBRARIES[0]}")


def _must(name: str, *arguments: Any) -> None:
    function = getattr(_library(), name)
    function.restype = ctypes.c_int
    if status := function(*arguments):
        raise RuntimeError(f"{name}: cuSPARSE status {status}")


def filled(case: Case) -> tuple[Array, Array]:
    """Blocked-ELL: block columns [block rows, most], -1 where a row has fewer, and values [rows, most * C]."""
    p, data = case.weight.pattern, case.weight.data
    counts = np.diff(p.indptr)
    most = max(int(counts.max(initial=0)), 1)
    columns = np.full((p.block_rows, most), -1, np.int32)
    values = np.zeros((p.block_rows, most, p.R, p.C), data.dtype)
    slot = np.arange(p.nnzb) - np.repeat(p.indptr[:-1], counts)
    columns[p.rows, slot], values[p.rows, slot] = p.indices, data
    return columns, np.ascontiguousarray(values.transpose(0, 2, 1, 3)).reshape(p.block_rows * p.R, most * p.C)


def prepare(stage: Stage, case: Case, *, blocked_ell: bool) -> Run:
    """Y = W X with W described once, its buffer allocated once; sums in float32."""
    if not stage.real:
        raise RuntimeError("cuSPARSE needs a GPU")
    p, kind = case.weight.pattern, TYPES[case.dtype.name]
    data = case.weight.data.astype(case.x.dtype)
    x, y = stage.array(case.x), stage.array(np.full(case.out().shape, np.nan, case.x.dtype))
    keep: list[Any] = [x, y]

    def there(array: Array) -> ctypes.c_void_p:
        keep.append(stage.array(array))
        return ctypes.c_void_p(keep[-1].data_ptr())

    def made(name: str, *arguments: Any) -> ctypes.c_void_p:
        description = ctypes.c_void_p()
        _must(name, ctypes.byref(description), *arguments)
        return description

    i64 = ctypes.c_int64
    handle = made("cusparseCreate")
    _must("cusparseSetStream", handle, ctypes.c_void_p(stage.handle))
    if blocked_ell:
        columns, values = filled(case)
        W = made("cusparseCreateBlockedEll", i64(p.block_rows * p.R), i64(p.block_cols * p.C), i64(p.R),
                 i64(columns.shape[1] * p.C), there(columns), there(values.astype(case.x.dtype)), INDEX_32I, BASE_ZERO,
                 kind)  # fmt: skip
    else:
        W = made("cusparseCreateBsr", i64(p.block_rows), i64(p.block_cols), i64(p.nnzb), i64(p.R), i64(p.C),
                 there(p.indptr.astype(np.int32)), there(p.indices.astype(np.int32)), there(data), INDEX_32I, INDEX_32I,
                 BASE_ZERO, kind, ROW)  # fmt: skip
    order, (m, k) = (COLUMN if case.linear else ROW), p.shape
    X = made("cusparseCreateDnMat", i64(k), i64(case.n), i64(k if case.linear else case.n),
             ctypes.c_void_p(keep[0].data_ptr()), kind, order)  # fmt: skip
    Y = made("cusparseCreateDnMat", i64(m), i64(case.n), i64(m if case.linear else case.n),
             ctypes.c_void_p(keep[1].data_ptr()), kind, order)  # fmt: skip
    one, zero, size = ctypes.c_float(1), ctypes.c_float(0), ctypes.c_size_t()
    how = (handle, NO_TRANSPOSE, NO_TRANSPOSE, ctypes.byref(one), W, X, ctypes.byref(zero), Y, R_32F,
           BLOCKED_ELL_ALG1 if blocked_ell else BSR_ALG1)  # fmt: skip
    _must("cusparseSpMM_bufferSize", *how, ctypes.byref(size))
    buffer = there(np.zeros(size.value + 16, np.int8))
    keep += [one, zero]

    def call() -> None:
        _must("cusparseSpMM", *how, buffer)

    return Run(call, lambda: stage.host(keep[1], case.x.dtype))
