"""The libraries bsrgen is measured against: one table, one row per way of calling one, each checked before it is timed.

    python -m benchmarks.peers --density 0.2 --density 0.1        # the rate of every peer, per block shape

Every peer gets what suits it: weights packed or converted beforehand, and where it has no row-major `linear` also a row
on feature-major activations (K, N) -> (M, N), whose conversion is not charged to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import click
import numpy as np
import scipy.sparse

from benchmarks import mkl
from benchmarks.ceilings import Ceilings
from benchmarks.clock import at_their_best, importable, measure, one_thread
from bsrgen.pattern import Weight, random_weight

OPERATORS = ("linear", "spmm")  # Y[N,M] = X[N,K] @ W.T and Y[M,N] = W @ X[K,N], all row-major
SHAPES = "1x1 1x16 1x32 4x1 16x1 32x1 3x5 4x4 8x8 16x16 32x32 64x64 48x48"
BLOCKSIZES = tuple((int(R), int(C)) for R, C in (s.split("x") for s in SHAPES.split()))


@dataclass(frozen=True, slots=True)
class Case:
    """One product: a weight, an operator and its activations, row-major as the operator has them."""

    weight: Weight
    operator: str
    x: np.ndarray

    @property
    def linear(self) -> bool:
        return self.operator == "linear"

    @property
    def n(self) -> int:
        return int(self.x.shape[0 if self.linear else 1])

    @property
    def nonzero_flop(self) -> int:
        """2 * stored elements * N: what all rates are given on, the dense ones too."""
        return 2 * self.weight.pattern.nnz * self.n

    def dense(self) -> np.ndarray:
        return np.ascontiguousarray(self.weight.todense(), dtype=self.x.dtype)

    def csr(self) -> scipy.sparse.csr_array:
        p = self.weight.pattern
        W = self.weight.tobsr().tocsr()[: p.M, : p.K]
        W.sort_indices()
        return W

    def features(self, *, padded: bool = False) -> np.ndarray:
        """X as (K, N), C-contiguous; K filled up with zeros to whole blocks if `padded`."""
        p = self.weight.pattern
        X = np.ascontiguousarray(self.x.T if self.linear else self.x)
        return np.pad(X, ((0, p.block_cols * p.C - p.K), (0, 0))) if padded else X

    def out(self) -> np.ndarray:
        M = self.weight.pattern.M
        return np.zeros((self.n, M) if self.linear else (M, self.n), self.x.dtype)


@dataclass(frozen=True, slots=True)
class Run:
    """A peer, prepared: `call()` computes, `result()` shows the latest output in the operator's shape."""

    call: Callable[[], object]
    result: Callable[[], np.ndarray]


@dataclass(frozen=True, slots=True)
class Peer:
    """One way of calling one library; `declines` gives the reason why it cannot take a case, or None."""

    name: str
    library: str
    declines: Callable[[Case], str | None]
    prepare: Callable[[Case], Run]


def _shown(case: Case, Y: np.ndarray) -> np.ndarray:
    """An (M, N) output, perhaps of padded rows, as the operator's output."""
    Y = Y.reshape(-1, case.n)[: case.weight.pattern.M]
    return Y.T if case.linear else Y


def _torch() -> str | None:
    return None if importable("torch") else "torch is not installed"


def _mkl() -> str | None:
    return None if mkl.library() is not None else "mkl is not installed"


def _square(case: Case) -> str | None:
    R, C = case.weight.pattern.blocksize
    return None if R == C else f"takes square blocks only, not {R}x{C}"


def _numpy(case: Case, *, stored_transposed: bool) -> Run:
    W, y = case.dense(), case.out()
    right = np.ascontiguousarray(W.T) if stored_transposed else W.T
    a, b = (case.x, right) if case.linear else (W, case.x)
    return Run(lambda: np.matmul(a, b, out=y), lambda: y)


def _scipy(case: Case, W: scipy.sparse.sparray, X: np.ndarray) -> Run:
    X = X[:, 0] if case.n == 1 else X
    latest = [W @ X]

    def call() -> None:
        latest[0] = W @ X  # scipy has no out=

    return Run(call, lambda: _shown(case, latest[0]))


def _mkl_dense(case: Case, gemm: Callable[..., Callable[[], object]]) -> Run:
    y = case.out()
    return Run(gemm(case.dense(), case.x, y, linear=case.linear), lambda: y)


def _mkl_sparse(case: Case, W: scipy.sparse.sparray, X: np.ndarray) -> Run:
    """On (K, N): C-contiguous is feature-major, Fortran-contiguous is the row-major X of `linear`."""
    Y = np.zeros((W.shape[0], case.n), case.x.dtype, order="C" if X.flags.c_contiguous else "F")
    return Run(mkl.sparse(W, X, Y), lambda: _shown(case, Y))


def _torch_dense(case: Case) -> Run:
    import torch

    W, x, y = (torch.from_numpy(a) for a in (case.dense(), case.x, case.out()))
    a, b = (x, W.t()) if case.linear else (W, x)
    return Run(lambda: torch.mm(a, b, out=y), y.numpy)


def _onednn(case: Case) -> str | None:
    if not case.linear or case.x.dtype != np.float32:
        return "linear float32 only"
    if reason := _torch():
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
    return Run(lambda: torch.mm(W, X, out=Y), lambda: _shown(case, Y.numpy()))


PEERS = (
    Peer("numpy dense", "numpy", lambda _: None, lambda c: _numpy(c, stored_transposed=False)),
    Peer(
        "numpy dense, W.T stored",
        "numpy",
        lambda c: None if c.linear else "the same as numpy dense for spmm",
        lambda c: _numpy(c, stored_transposed=True),
    ),
    Peer("mkl dense", "mkl", lambda _: _mkl(), lambda c: _mkl_dense(c, mkl.gemm)),
    Peer("mkl dense, packed", "mkl", lambda _: _mkl(), lambda c: _mkl_dense(c, mkl.gemm_packed)),
    Peer("torch dense", "torch", lambda _: _torch(), _torch_dense),
    Peer("torch dense, oneDNN packed", "torch", _onednn, _onednn_dense),
    Peer("scipy bsr", "scipy", lambda _: None, lambda c: _scipy(c, c.weight.tobsr(), c.features(padded=True))),
    Peer("scipy csr", "scipy", lambda _: None, lambda c: _scipy(c, c.csr(), c.features())),
    Peer("mkl csr", "mkl", lambda _: _mkl(), lambda c: _mkl_sparse(c, c.csr(), c.features())),
    Peer(
        "mkl csr, row-major",
        "mkl",
        lambda c: _mkl() or (None if c.linear else "the same as mkl csr for spmm"),
        lambda c: _mkl_sparse(c, c.csr(), c.x.T),
    ),
    Peer(
        "mkl bsr",
        "mkl",
        lambda c: _mkl() or _square(c),
        lambda c: _mkl_sparse(c, c.weight.tobsr(), c.features(padded=True)),
    ),
    Peer("torch bsr", "torch", lambda c: _torch() or _square(c), _torch_bsr),
)


def check(case: Case, y: np.ndarray) -> None:
    """Raise unless |y - ref| <= 2 (k + 2) u |W| |x| elementwise, ref in float64, k = K (a dense row)."""
    W, X = case.weight.todense().astype(np.float64), case.features().astype(np.float64)
    k, u = case.weight.pattern.K, np.finfo(case.x.dtype).eps / 2
    error = np.abs(_shown(case, W @ X) - y)
    bound = 2 * (k + 2) * u * _shown(case, np.abs(W) @ np.abs(X))
    if not (error <= bound).all():
        raise ArithmeticError(
            f"the largest error is {error.max():.2e}, {(error / (bound + 1e-300)).max():.1f} x the bound"
        )


def prepare(case: Case, peers: Sequence[Peer] = PEERS) -> tuple[dict[str, Run], dict[str, str]]:
    """The peers that take this case, checked against float64, and for every other one the reason why not."""
    runs: dict[str, Run] = {}
    reasons: dict[str, str] = {}
    for peer in peers:
        reason = peer.declines(case)
        if reason is not None:
            reasons[peer.name] = reason
            continue
        run = peer.prepare(case)
        run.call()
        try:
            check(case, run.result())
        except ArithmeticError as e:
            reasons[peer.name] = f"wrong result: {e}"
        else:
            runs[peer.name] = run
    return runs, reasons


def random_case(
    operator: str, shape: tuple[int, int], blocksize: tuple[int, int], density: float, n: int, dtype: str = "float32"
) -> Case:
    """A uniform random weight and normal activations, from a fixed seed."""
    rng = np.random.default_rng(20261120)
    weight = random_weight(rng, shape, blocksize, density, dtype=np.dtype(dtype))
    x = rng.standard_normal((n, shape[1]) if operator == "linear" else (shape[1], n)).astype(dtype)
    return Case(weight, operator, x)


@click.command()
@click.option("--operator", type=click.Choice(OPERATORS), default="linear", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True)
@click.option("--density", type=float, multiple=True, default=(0.2, 0.1), show_default=True)
@click.option("--shape", type=(int, int), default=(768, 768), show_default=True, help="M K")
@click.option("--n", type=int, default=128, show_default=True)
@click.option("--rounds", type=int, default=15, show_default=True)
def main(operator: str, dtype: str, density: tuple[float, ...], shape: tuple[int, int], n: int, rounds: int) -> None:
    """Print the rate of every peer in GFLOP/s on nonzeros (best of the rounds), and the FMA peak of the same rounds."""
    at_their_best()
    peak = Ceilings().fma("f32" if dtype == "float32" else "f64")
    names = [p.name for p in PEERS]
    with one_thread():
        for d in density:
            print(f"\n{operator} {dtype} {shape[0]}x{shape[1]}, N = {n}, density {d}: GFLOP/s on nonzeros, one core")
            print("| block | " + " | ".join(names) + " | FMA peak |\n|---|" + "---|" * (len(names) + 1))
            for blocksize in BLOCKSIZES:
                case = random_case(operator, shape, blocksize, d, n, dtype)
                runs, reasons = prepare(case)
                times = measure({k: r.call for k, r in runs.items()} | {"peak": peak.call}, rounds=rounds)
                rates = [f"{case.nonzero_flop / times[k].min_s * 1e-9:.1f}" if k in runs else "-" for k in names]
                rates.append(f"{peak.rate(times['peak']) * 1e-9:.0f}")
                print(f"| {blocksize[0]}x{blocksize[1]} | " + " | ".join(rates) + " |", flush=True)
                for k in sorted(k for k, why in reasons.items() if why.startswith("wrong")):
                    print(f"  {k}: {reasons[k]}")


if __name__ == "__main__":
    main()
