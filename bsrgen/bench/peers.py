"""bsrgen and the libraries it is measured against: one row per way of calling one, each checked before it is timed.

Every peer gets what suits it: weights packed or converted beforehand, and where it has no row-major `linear` also a row
on feature-major activations (K, N) -> (M, N), whose conversion is not charged to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bsrgen import api
from bsrgen.bench import engines, mkl, reduced
from bsrgen.bench.case import Array, Case
from bsrgen.bench.clock import importable
from bsrgen.bench.peer import Peer, Run, shown
from bsrgen.dtypes import DTYPES
from bsrgen.exam import error_share
from bsrgen.kernel import Kernel

SAME = "the same as"  # how the reason begins where nothing is lost
SLACK = 2.0  # of the bound that bsrgen keeps: what a peer may use, since no library promises one
SHAPES = "1x1 1x4 1x16 1x32 2x2 4x1 8x1 16x1 32x1 3x5 4x4 8x8 16x16 32x32 64x64 48x48"


def _torch(case: Case) -> str | None:
    return None if importable("torch") else "torch is not installed"


def _mkl(case: Case) -> str | None:
    return mkl.declines(case.threads)


def _square(case: Case) -> str | None:
    R, C = case.weight.pattern.blocksize
    return None if R == C else f"takes square blocks only, not {R}x{C}"


def _numpy(case: Case, *, stored_transposed: bool) -> Run:
    W, y = case.dense(), case.out()
    right = np.ascontiguousarray(W.T) if stored_transposed else W.T
    a, b = (case.x, right) if case.linear else (W, case.x)
    return Run(lambda: np.matmul(a, b, out=y), lambda: y)


def _scipy(case: Case, W: Any, X: Array) -> Run:
    X = X[:, 0] if case.n == 1 else X
    latest = [W @ X]

    def call() -> None:
        latest[0] = W @ X  # scipy has no out=

    return Run(call, lambda: shown(case, latest[0]))


def _gimmik(case: Case) -> str | None:
    if not importable("gimmik"):
        return "gimmik is not installed"
    nnz = case.weight.pattern.nnz
    return None if 0 < nnz <= engines.GIMMIK_NNZ else f"writes every nonzero as code: not for {nnz}"


def _gimmik_spmm(case: Case) -> Run:
    X = case.features()
    Y = np.zeros((case.weight.pattern.M, case.n), X.dtype)
    return Run(engines.gimmik_spmm(case.dense(), X, Y), lambda: shown(case, Y))


def _engine(case: Case, *packages: str) -> str | None:
    """Why an inference engine is not timed: a product with a constant weight is one of its layers as `linear` only."""
    if not case.linear or case.x.dtype != np.float32:
        return "linear float32 only"
    return next((f"{name} is not installed" for name in packages if not importable(name)), None)


def _engine_dense(case: Case, linear: Callable[..., Callable[[], object]]) -> Run:
    y = case.out()
    return Run(linear(case.dense(), case.x, y, case.threads), lambda: y)


def _scipy_bsr(case: Case) -> Run:
    return _scipy(case, case.weight.tobsr(), case.features(padded=True))


def _mkl_dense(case: Case, gemm: Callable[..., Callable[[], object]]) -> Run:
    y = case.out()
    return Run(gemm(case.dense(), case.x, y, linear=case.linear), lambda: y)


def _mkl_sparse(case: Case, W: Any, X: Array) -> Run:
    """On (K, N): C-contiguous is feature-major, Fortran-contiguous is the row-major X of `linear`."""
    Y = np.zeros((W.shape[0], case.n), case.x.dtype, order="C" if X.flags.c_contiguous else "F")
    return Run(mkl.sparse(W, X, Y), lambda: shown(case, Y))


def _torch_dense(case: Case) -> Run:
    import torch

    W, x, y = (torch.from_numpy(a) for a in (case.dense(), case.x, case.out()))
    a, b = (x, W.t()) if case.linear else (W, x)
    return Run(lambda: torch.mm(a, b, out=y), lambda: np.asarray(y))


def _onednn(case: Case) -> str | None:
    if not case.linear or case.x.dtype != np.float32:
        return "linear float32 only"
    if reason := _torch(case):
        return reason
    import torch

    return None if hasattr(torch.ops.mkldnn, "_reorder_linear_weight") else "this torch has no packed oneDNN linear"


def _onednn_dense(case: Case) -> Run:
    """What torch.compile(freezing) makes of nn.Linear: the weight reordered once, then oneDNN's own kernels."""
    import torch

    W, x = torch.from_numpy(case.dense()), torch.from_numpy(case.x)
    packed = torch.ops.mkldnn._reorder_linear_weight(W, case.n)
    latest = [x]

    def call() -> None:
        latest[0] = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")  # has no out=

    return Run(call, lambda: latest[0].numpy())


def _torch_bsr(case: Case) -> Run:
    import torch

    B, X = case.weight.tobsr(), torch.from_numpy(case.features(padded=True))
    parts = [torch.from_numpy(np.array(a)) for a in (B.indptr, B.indices, B.data)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "BSR tensor support is in beta state"
        W = torch.sparse_bsr_tensor(*parts, size=B.shape, check_invariants=True)
    Y = torch.zeros(B.shape[0], case.n, dtype=X.dtype)
    return Run(lambda: torch.mm(W, X, out=Y), lambda: shown(case, Y.numpy()))


def kernel_run(kernel: Kernel, case: Case) -> Run:
    """A kernel as a contender: what a caller writes, checks and cffi included."""
    x, y = case.x, case.out()
    given = case.given
    return Run(lambda: kernel(x, out=y, **given), lambda: y)


def _bsrgen(case: Case) -> Run:
    kernel = api.compile(case.weight, case.operator, dtype=case.dtype.name, n=case.n, threads=case.threads)
    return kernel_run(kernel, case)


_FULL = (
    Peer("bsrgen", "bsrgen", "bsrgen", lambda _: None, _bsrgen, tuple(DTYPES)),
    Peer("numpy dense", "numpy", "dense", lambda _: None, lambda c: _numpy(c, stored_transposed=False)),
    Peer(
        "numpy dense, W.T stored",
        "numpy",
        "dense",
        lambda c: None if c.linear else f"{SAME} numpy dense for spmm",
        lambda c: _numpy(c, stored_transposed=True),
    ),
    Peer("mkl dense", "mkl", "dense", _mkl, lambda c: _mkl_dense(c, mkl.gemm)),
    Peer("mkl dense, packed", "mkl", "dense", _mkl, lambda c: _mkl_dense(c, mkl.gemm_packed)),
    Peer("torch dense", "torch", "dense", _torch, _torch_dense),
    Peer("torch dense, oneDNN packed", "torch", "dense", _onednn, _onednn_dense),
    Peer(
        "onnxruntime dense",
        "onnxruntime",
        "dense",
        lambda c: _engine(c, "onnx", "onnxruntime"),
        lambda c: _engine_dense(c, engines.onnxruntime_linear),
    ),
    Peer(
        "openvino dense",
        "openvino",
        "dense",
        lambda c: _engine(c, "openvino"),
        lambda c: _engine_dense(c, engines.openvino_linear),
    ),
    Peer("scipy bsr", "scipy", "sparse", lambda _: None, _scipy_bsr),
    Peer("scipy csr", "scipy", "sparse", lambda _: None, lambda c: _scipy(c, c.csr(), c.features())),
    Peer("mkl csr", "mkl", "sparse", _mkl, lambda c: _mkl_sparse(c, c.csr(), c.features())),
    Peer(
        "mkl csr, row-major",
        "mkl",
        "sparse",
        lambda c: _mkl(c) or (None if c.linear else f"{SAME} mkl csr for spmm"),
        lambda c: _mkl_sparse(c, c.csr(), c.x.T),
    ),
    Peer(
        "mkl bsr",
        "mkl",
        "sparse",
        lambda c: _mkl(c) or _square(c),
        lambda c: _mkl_sparse(c, c.weight.tobsr(), c.features(padded=True)),
    ),
    Peer("torch bsr", "torch", "sparse", lambda c: _torch(c) or _square(c), _torch_bsr),
    Peer("gimmik", "gimmik", "sparse", _gimmik, _gimmik_spmm),
)
PEERS = (*_FULL, *reduced.ROWS, *reduced.by_float32(_FULL, reduced.BY_FLOAT32))


def check(y: Array, expected: Array, bound: Array, slack: float = SLACK) -> float:
    """The largest error of `y` as a share of `bound` (of Problem.reference).  ArithmeticError above `slack`."""
    y = y if y.dtype in (np.float32, np.float64) else y.astype(np.float32)  # whose limits numpy does not know
    share = error_share(y, expected, bound)
    if share > slack:
        raise ArithmeticError(f"the largest error is {share:.1f} x the bound")
    return share


def prepare(case: Case, peers: Sequence[Peer] = PEERS) -> tuple[dict[str, Run], dict[str, str]]:
    """The peers that take this case, checked against float64, and the reason why not for all others of its type."""
    runs: dict[str, Run] = {}
    reasons: dict[str, str] = {}
    expected, bound = case.reference()
    for peer in (peer for peer in peers if case.dtype.name in peer.dtypes):
        reason = peer.declines(case)
        if reason is None:
            try:
                run = peer.prepare(case)
                run.call()
                check(run.result(), expected, bound)
            except ArithmeticError as e:
                reason = f"wrong result: {e}"
            except Exception as e:  # whatever a library makes of this case; the others can still be timed
                if peer.kind == "bsrgen":
                    raise
                reason = f"fails: {e}"
        if reason is None:
            runs[peer.name] = run
        else:
            reasons[peer.name] = reason
    return runs, reasons
