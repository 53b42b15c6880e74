"""Intel MKL through cffi: dense gemm, gemm with a packed weight, and the inspector-executor sparse routines.

Only what `peers` times.  `pip install mkl` puts libmkl_rt where it is looked for.
"""

from __future__ import annotations

import ctypes.util
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cffi
import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from bsrgen.errors import BsrgenError

Array = NDArray[Any]
ROW_MAJOR, COL_MAJOR, NO_TRANS, TRANS, PACKED, A_MATRIX, B_MATRIX = 101, 102, 111, 112, 151, 161, 162
FIX_OFFSET, ZERO_POINT = 173, 128  # of the activations, which MKL takes as unsigned bytes
SEQUENTIAL, TBB = 1, 4  # not MKL's OpenMP layers: beside torch's libgomp their products are wrong or crash
NON_TRANSPOSE, GENERAL, AGGRESSIVE, MANY_CALLS = 10, 20, 81, 1_000_000
CTYPE = {"s": "float", "d": "double"}
CDEF = """
typedef struct { int type, mode, diag; } descr;
int MKL_Set_Threading_Layer(int);
void MKL_Set_Num_Threads(int);
""" + "".join(
    f"""
void cblas_{p}gemm(int, int, int, int, int, int, {t}, const {t} *, int, const {t} *, int, {t}, {t} *, int);
size_t cblas_{p}gemm_pack_get_size(int, int, int, int);
void cblas_{p}gemm_pack(int, int, int, int, int, int, {t}, const {t} *, int, {t} *);
void cblas_{p}gemm_compute(int, int, int, int, int, int, const {t} *, int, const {t} *, int, {t}, {t} *, int);
int mkl_sparse_{p}_create_csr(void **, int, int, int, int *, int *, int *, {t} *);
int mkl_sparse_{p}_create_bsr(void **, int, int, int, int, int, int *, int *, int *, {t} *);
int mkl_sparse_{p}_mm(int, {t}, void *, descr, int, const {t} *, int, int, {t}, {t} *, int);
int mkl_sparse_{p}_mv(int, {t}, void *, descr, const {t} *, {t}, {t} *);
"""
    for p, t in CTYPE.items()
)
CDEF += """
size_t cblas_gemm_bf16bf16f32_pack_get_size(int, int, int, int);
void cblas_gemm_bf16bf16f32_pack(int, int, int, int, int, int, const void *, int, void *);
void cblas_gemm_bf16bf16f32_compute(int, int, int, int, int, int, float, const void *, int, const void *, int, float,
                                    float *, int);
size_t cblas_gemm_s8u8s32_pack_get_size(int, int, int, int);
void cblas_gemm_s8u8s32_pack(int, int, int, int, int, int, const void *, int, void *);
void cblas_gemm_s8u8s32_compute(int, int, int, int, int, int, int, float, const void *, int, signed char,
                                const void *, int, signed char, float, int *, int, const int *);
int mkl_sparse_set_mm_hint(void *, int, descr, int, int, int);
int mkl_sparse_set_mv_hint(void *, int, descr, int);
int mkl_sparse_set_memory_hint(void *, int);
int mkl_sparse_optimize(void *);
int mkl_sparse_destroy(void *);
"""

ffi = cffi.FFI()
ffi.cdef(CDEF)


@functools.cache
def library() -> Any:
    """libmkl_rt, or None where it is not installed."""
    path = _find("libmkl_rt.so*") or ctypes.util.find_library("mkl_rt")
    return None if path is None else ffi.dlopen(path)


@functools.cache
def declines(threads: int) -> str | None:
    """Put MKL on `threads` threads from here on, or say why not.  It keeps the layer a process asks for first."""
    if library() is None:
        return "mkl is not installed"
    if threads > 1:
        tbb = _find("libtbb.so.*")
        if tbb is None:  # MKL would end the process
            return "tbb is not installed, which mkl needs for several threads"
        ffi.dlopen(tbb, ffi.RTLD_NOW | ffi.RTLD_GLOBAL)
    library().MKL_Set_Threading_Layer(SEQUENTIAL if threads == 1 else TBB)
    library().MKL_Set_Num_Threads(threads)
    return None


def _find(name: str) -> str | None:
    return next(iter(sorted(map(str, Path(sys.prefix, "lib").glob(name)))), None)


def _prefix(dtype: np.dtype[Any]) -> str:
    return {"float32": "s", "float64": "d"}[dtype.name]


def _pointer(a: Array) -> Any:
    """The data of a contiguous array; keeps the array alive."""
    kind = {"float32": "float[]", "float64": "double[]", "int32": "int[]"}[a.dtype.name]
    return ffi.from_buffer(kind, a if a.flags.c_contiguous else a.T)


def _ok(status: int, what: str) -> None:
    if status:
        raise BsrgenError(f"MKL: {what} returned status {status}")


def gemm(W: Array, x: Array, y: Array, *, linear: bool) -> Callable[[], object]:
    """y = x @ W.T (linear) or y = W @ x, all row-major."""
    fn = getattr(library(), f"cblas_{_prefix(W.dtype)}gemm")
    (M, K), (w, a, b) = W.shape, map(_pointer, (W, x, y))
    if linear:
        N = len(x)
        return lambda: fn(ROW_MAJOR, NO_TRANS, TRANS, N, M, K, 1.0, a, K, w, K, 0.0, b, M)
    N = x.shape[1]
    return lambda: fn(ROW_MAJOR, NO_TRANS, NO_TRANS, M, N, K, 1.0, w, K, a, N, 0.0, b, N)


def gemm_packed(W: Array, x: Array, y: Array, *, linear: bool) -> Callable[[], object]:
    """As `gemm`, with the weight packed once, which MKL offers for exactly this use."""
    lib, p, (M, K) = library(), _prefix(W.dtype), W.shape
    size, pack, fn = (getattr(lib, f"cblas_{p}gemm_{name}") for name in ("pack_get_size", "pack", "compute"))
    m, n = (len(x), M) if linear else (M, x.shape[1])
    side, trans = (B_MATRIX, TRANS) if linear else (A_MATRIX, NO_TRANS)
    packed = np.empty(size(side, m, n, K) // W.itemsize + 1, W.dtype)  # size is in bytes
    pw, a, b = map(_pointer, (packed, x, y))
    pack(ROW_MAJOR, side, trans, m, n, K, 1.0, _pointer(W), K, pw)

    if linear:
        return lambda: fn(ROW_MAJOR, NO_TRANS, PACKED, m, n, K, a, K, pw, K, 0.0, b, n)
    return lambda: fn(ROW_MAJOR, PACKED, NO_TRANS, m, n, K, pw, K, a, n, 0.0, b, n)


def linear_bf16(W: Array, x: Array, y: Array) -> Callable[[], object]:
    """y[N,M] (float32) = x[N,K] @ W[M,K].T of bfloat16, the weight packed once."""
    lib, (M, K), N = library(), W.shape, len(x)
    packed = np.empty(lib.cblas_gemm_bf16bf16f32_pack_get_size(B_MATRIX, N, M, K), np.uint8)
    w, p, a, b = (ffi.from_buffer(v.view(np.uint8)) for v in (W, packed, x, y))
    lib.cblas_gemm_bf16bf16f32_pack(ROW_MAJOR, B_MATRIX, TRANS, N, M, K, w, K, p)
    fn, out = lib.cblas_gemm_bf16bf16f32_compute, ffi.cast("float *", b)
    return lambda keep=b: fn(ROW_MAJOR, NO_TRANS, PACKED, N, M, K, 1.0, a, K, p, K, 0.0, out, M)  # type: ignore[misc]


def linear_int8(W: Array, x: Array, y: Array) -> Callable[[], object]:
    """y[N,M] (int32) = (x[N,K] - ZERO_POINT) @ W[M,K].T of uint8 and int8, the weight packed once."""
    lib, (M, K), N = library(), W.shape, len(x)
    packed, zero = np.empty(lib.cblas_gemm_s8u8s32_pack_get_size(B_MATRIX, N, M, K), np.uint8), ffi.new("int[1]")
    w, p, a, b = map(ffi.from_buffer, (W, packed, x, y))
    lib.cblas_gemm_s8u8s32_pack(ROW_MAJOR, B_MATRIX, TRANS, N, M, K, w, K, p)
    shape, out = (ROW_MAJOR, NO_TRANS, PACKED, FIX_OFFSET, N, M, K), ffi.cast("int *", b)
    fn = lib.cblas_gemm_s8u8s32_compute
    return lambda keep=b: fn(*shape, 1.0, a, K, -ZERO_POINT, p, K, 0, 0.0, out, M, zero)  # type: ignore[misc]


def sparse(W: Any, X: Array, Y: Array) -> Callable[[], object]:
    """Y[M,N] = W @ X[K,N] for a scipy csr or (square-block) bsr `W`; X and Y both row-major, or both column-major.

    Inspector-executor: the hints say that millions of calls follow and that memory may be spent on them."""
    lib, p, N = library(), _prefix(W.dtype), X.shape[1]
    layout, ldx, ldy = (ROW_MAJOR, N, N) if X.flags.c_contiguous else (COL_MAJOR, *X.shape[:1], *Y.shape[:1])
    indptr, indices, data = W.indptr.astype(np.int32), W.indices.astype(np.int32), np.ascontiguousarray(W.data)
    arrays = (_pointer(indptr), _pointer(indptr[1:]), _pointer(indices), _pointer(data))
    handle, descr = ffi.new("void **"), ffi.new("descr *", {"type": GENERAL})[0]
    if isinstance(W, scipy.sparse.bsr_array):
        b = W.blocksize[0]
        create, shape = f"mkl_sparse_{p}_create_bsr", (ROW_MAJOR, W.shape[0] // b, W.shape[1] // b, b)
    else:
        create, shape = f"mkl_sparse_{p}_create_csr", W.shape
    _ok(getattr(lib, create)(handle, 0, *shape, *arrays), create)
    A = ffi.gc(handle[0], lib.mkl_sparse_destroy)
    _ok(lib.mkl_sparse_set_memory_hint(A, AGGRESSIVE), "set_memory_hint")
    x, y = _pointer(X), _pointer(Y)
    if N == 1:
        _ok(lib.mkl_sparse_set_mv_hint(A, NON_TRANSPOSE, descr, MANY_CALLS), "set_mv_hint")
        fn = functools.partial(getattr(lib, f"mkl_sparse_{p}_mv"), NON_TRANSPOSE, 1.0, A, descr, x, 0.0, y)
    else:
        _ok(lib.mkl_sparse_set_mm_hint(A, NON_TRANSPOSE, descr, layout, N, MANY_CALLS), "set_mm_hint")
        fn = functools.partial(
            getattr(lib, f"mkl_sparse_{p}_mm"), NON_TRANSPOSE, 1.0, A, descr, layout, x, N, ldx, 0.0, y, ldy
        )
    _ok(lib.mkl_sparse_optimize(A), "optimize")

    def call(keep: object = arrays) -> None:  # MKL's handle points into them
        _ok(fn(), "the product")

    return call
