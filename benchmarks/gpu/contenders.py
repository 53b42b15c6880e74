"""Who is timed on a GPU: our kernel, torch's dense product, and the block-sparse products that can be had there.

W [M, K] stays, X and Y are row-major as the operator has them.  Peers that want feature-major activations get them so,
and the conversion is not charged to them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.gpu.stages import Stage
from bsrgen.bench.case import Case

Array = np.ndarray[Any, Any]
HALF = ("bfloat16", "float16")
TUNED: dict[str, Any] = {}  # what torch's tuning found, which may take a minute: one of a shape for all densities


@dataclass(frozen=True, slots=True)
class Run:
    """A call that is ready, and its result as Y [N, M] or [M, N] on the host.  `note`: what it was tuned to."""

    call: Callable[[], object]
    result: Callable[[], Array]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Contender:
    """`kind` is bsrgen, dense, sparse, dynamic or prepare.  `declines`: why a case is not for it, "" where it is."""

    name: str
    kind: str
    declines: Callable[[Case], str]
    prepare: Callable[[Stage, Case], Run]


def ours(kernel: Any) -> Contender:
    """The kernel through Python, on the stage's arrays."""

    def prepare(stage: Stage, case: Case) -> Run:
        x, y = stage.array(case.x), stage.array(_poisoned(case))
        call = functools.partial(kernel, x, out=y, **case.given)
        kernel.upload(0 if stage.real else -1)
        return Run(call, lambda: stage.host(y, case.out_dtype.numpy), str(kernel.plan))

    return Contender("bsrgen", "bsrgen", lambda case: "", prepare)


def dynamic(make: Callable[[], Any]) -> tuple[Contender, Contender]:
    """Kernels whose weight comes with the call: the call, and preparing a weight in memory that is there."""
    made = functools.cache(make)

    def declines(case: Case) -> str:
        return "the scales of int8 come with the call" if case.dtype.name == "int8" else ""

    def begun(stage: Stage, case: Case) -> tuple[Any, list[Any], Any]:
        kernel, p = made(), case.weight.pattern
        numbers = (p.indices.astype(np.int32), p.indptr.astype(np.int32))
        arrays = [stage.array(a) for a in (case.weight.data.astype(case.x.dtype), *numbers)]
        kernel.upload(0 if stage.real else -1)
        return kernel, arrays, kernel.prepare(arrays)

    def called(stage: Stage, case: Case) -> Run:
        kernel, _, ready = begun(stage, case)
        x, y = stage.array(case.x), stage.array(_poisoned(case))
        call = functools.partial(kernel, x, ready, out=y, **case.given)
        return Run(call, lambda: stage.host(y, case.out_dtype.numpy), str(kernel.plan))

    def prepared(stage: Stage, case: Case) -> Run:
        kernel, arrays, ready = begun(stage, case)
        x, y = stage.array(case.x), stage.array(_poisoned(case))

        def result() -> Array:
            kernel(x, ready, out=y, **case.given)
            return stage.host(y, case.out_dtype.numpy)

        return Run(functools.partial(kernel.prepare, arrays, into=ready, check=False), result)

    return (
        Contender("bsrgen, dynamic", "dynamic", declines, called),
        Contender("prepare a weight", "prepare", declines, prepared),
    )


def _poisoned(case: Case) -> Array:
    return np.full(case.out().shape, np.nan, case.out_dtype.numpy)


# ── torch ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _dense(stage: Any, case: Case) -> Run:
    w, x = case.dense(), case.x
    if not stage.real:
        w, x = w.astype(np.float32), x.astype(np.float32)
        y = np.zeros(case.out().shape, np.float32)
        call = functools.partial(np.matmul, *((x, w.T) if case.linear else (w, x)), out=y)
        return Run(call, lambda: y.astype(np.float32))
    torch, weight, there = stage.torch, stage.array(w.astype(x.dtype)), stage.array(x)
    y = stage.array(_poisoned(case))
    left, right = (there, weight.t()) if case.linear else (weight, there)
    return Run(functools.partial(torch.matmul, left, right, out=y), lambda: stage.host(y, case.out_dtype.numpy))


def _not_int8(case: Case) -> str:
    return "torch has no float32 result of int8 products on CUDA" if case.dtype.name == "int8" else ""


def _for_triton(case: Case) -> str:
    R, C = case.weight.pattern.blocksize
    if not all(size >= 16 and size & (size - 1) == 0 for size in (R, C)):
        return "blocks are powers of two from 16 up"
    return _not_int8(case)


def _bsr(stage: Any, case: Case) -> tuple[Any, Any]:
    """torch's BSR tensor, and X [K, N]."""
    torch, p = stage.torch, case.weight.pattern
    rows, columns = (stage.array(np.asarray(a, np.int32)) for a in (p.indptr, p.indices))
    values = stage.array(case.weight.data.astype(case.x.dtype))
    bsr = torch.sparse_bsr_tensor(rows, columns, values, size=p.shape, check_invariants=False)
    return bsr, stage.array(case.x.T if case.linear else case.x)


def _torch_bsr(stage: Any, case: Case, tuned: bool) -> Run:
    if not stage.real:
        raise RuntimeError("Triton needs a GPU")
    from torch.sparse import _triton_ops, _triton_ops_meta

    torch = stage.torch
    bsr, x = _bsr(stage, case)
    y = torch.full((case.weight.pattern.M, case.n), float("nan"), dtype=x.dtype, device=stage.device)
    zeros = torch.zeros_like(y)
    shape = str((case.weight.pattern.shape, case.weight.pattern.blocksize, case.n, case.dtype.name))
    if tuned and shape not in TUNED:
        TUNED[shape] = _triton_ops_meta.tune_bsr_dense_addmm(zeros, bsr, x, beta=0, alpha=1)
    meta = TUNED[shape] if tuned else None
    call = functools.partial(_triton_ops.bsr_dense_addmm, zeros, bsr, x, beta=0, alpha=1, out=y, meta=meta)
    return Run(call, lambda: stage.host(y.t() if case.linear else y, case.x.dtype), str(meta) if meta else "")


# ── wheels that may be carried ───────────────────────────────────────────────────────────────────────────────────────


def _needs(package: str, declines: Callable[[Case], str]) -> Callable[[Case], str]:
    def why(case: Case) -> str:
        import importlib.util

        return declines(case) or ("" if importlib.util.find_spec(package) else f"not installed: {package}")

    return why


def _for_stk(case: Case) -> str:
    fits = case.weight.pattern.blocksize == (128, 128) and case.n % 128 == 0 and case.dtype.name in HALF
    return "" if fits else "stk has blocks of 128 x 128 of bfloat16 or float16, and N of whole blocks"


def _stk(stage: Any, case: Case) -> Run:
    """Y = X @ W.T or (X.T @ W.T).T with W transposed ahead: dense times sparse is what stk is fast at."""
    import stk

    W = stage.array(np.ascontiguousarray(case.dense().T).astype(case.x.dtype))
    sparse = stk.ops.to_sparse(W, blocking=128)
    x = stage.array(case.x if case.linear else case.x.T)
    kept: list[Any] = [None]

    def call() -> None:
        kept[0] = stk.ops.dds(x, sparse)

    return Run(call, lambda: stage.host(kept[0] if case.linear else kept[0].t(), case.x.dtype))


def _blksprs(stage: Any, case: Case) -> Run:
    """Y.T = W @ X.T, W as blksprs's compressed blocks."""
    from blksprs.ops.conversion import to_sparse
    from blksprs.ops.matmul import matmul

    p, torch = case.weight.pattern, stage.torch
    mask = np.zeros((1, p.block_rows, p.block_cols), bool)
    mask[0, p.rows, p.indices] = True
    layout = stage.array(mask)
    W = to_sparse(stage.array(case.dense().astype(case.x.dtype))[None], layout, p.R)
    x = stage.array(case.x.T if case.linear else case.x)[None]
    full = torch.ones((1, p.block_cols, x.shape[2] // p.R), dtype=torch.bool, device=stage.device)
    right = to_sparse(x, full, p.R)
    out_layout = torch.ones((1, p.block_rows, x.shape[2] // p.R), dtype=torch.bool, device=stage.device)
    layouts: dict[str, Any] = {}  # found in the first call: else every call would wait for the GPU
    kept: list[Any] = [None]

    def call() -> None:
        kept[0] = matmul(W, layout, right, full, out_layout, p.R, layout_cache=layouts)

    def result() -> Array:
        from blksprs.ops.conversion import to_dense

        y = to_dense(kept[0], out_layout, p.R)[0]
        return stage.host(y.t() if case.linear else y, case.x.dtype)

    return Run(call, result)


def _for_blksprs(case: Case) -> str:
    R, C = case.weight.pattern.blocksize
    if R != C or case.n % R:
        return "blksprs has square blocks, and N of whole blocks"
    return _for_triton(case)


def peers() -> tuple[Contender, ...]:
    """All but ours, the dense product first."""
    from benchmarks.gpu import cusparse

    tuned, default = functools.partial(_torch_bsr, tuned=True), functools.partial(_torch_bsr, tuned=False)
    return (
        Contender("torch dense", "dense", _not_int8, _dense),
        Contender("torch bsr", "sparse", _for_triton, default),
        Contender("torch bsr, tuned", "sparse", _for_triton, tuned),
        Contender("cusparse bsr", "sparse", cusparse.declines, functools.partial(cusparse.prepare, blocked_ell=False)),
        Contender("cusparse blocked-ell", "sparse", cusparse.declines_ell,
                  functools.partial(cusparse.prepare, blocked_ell=True)),
        Contender("stk", "sparse", _needs("stk", _for_stk), _stk),
        Contender("blksprs", "sparse", _needs("blksprs", _for_blksprs), _blksprs),
    )  # fmt: skip
