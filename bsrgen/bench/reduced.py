"""Peers of bfloat16, float16 and int8: what torch, MKL, ONNX Runtime and OpenVINO have, and float32 with conversions.

Every call starts at row-major activations of the type and ends at row-major outputs, bfloat16 and float16 in their own
type and int8 in float32: shifts to unsigned bytes, scales and conversions are in the time.  The weight is made ready
beforehand.  No installed library multiplies sparse weights of these types: torch's CSR and BSR, scipy and MKL have no
such products, and torch's COO sums in the type itself, a hundred times beyond the bound.  So what they do in float32
stands for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bsrgen.bench import engines, mkl
from bsrgen.bench.case import Array, Case
from bsrgen.bench.clock import importable
from bsrgen.bench.peer import Peer, Run, as_torch

HALVES = ("bfloat16", "float16")
REDUCED = (*HALVES, "int8")
FLIP = 0x80  # int8 + 128, as uint8


def _needs(*packages: str) -> Callable[[Case], str | None]:
    """Linear with these packages."""

    def declines(case: Case) -> str | None:
        if not case.linear:
            return "linear only"
        return next((f"{name} is not installed" for name in packages if not importable(name)), None)

    return declines


def _mkl_and_torch(case: Case) -> str | None:
    return _needs("torch")(case) or mkl.declines(case.threads)


def _scale(case: Case) -> Array:
    """What turns sums of products of int8 into Y: one value a row of W."""
    assert case.w_scale is not None
    return np.asarray(case.w_scale * np.float32(case.x_scale), np.float32)


def _int_mm(case: Case, *, stored_transposed: bool) -> Run:
    """torch._int_mm into int32, then the scales."""
    import torch

    W, x, y = (as_torch(a) for a in (case.dense(), case.x, case.out()))
    scale, sums = as_torch(_scale(case)), torch.empty(y.shape, dtype=torch.int32)
    scale = scale if case.linear else scale[:, None]
    right = W.t().contiguous() if stored_transposed else W.t()
    a, b = (x, right) if case.linear else (W, x)

    def call() -> None:
        torch._int_mm(a, b, out=sums)
        torch.mul(sums, scale, out=y)

    return Run(call, lambda: np.asarray(y))


def _qlinear(case: Case) -> Run:
    """What torch.compile makes of a model quantised by PT2E: oneDNN on unsigned bytes, scales fused."""
    import torch

    W, x = as_torch(case.dense()), as_torch(case.x.view(np.uint8))
    packed, ops = torch.ops.onednn.qlinear_prepack(W, list(x.shape)), torch.ops.onednn
    w_scale, w_zero = as_torch(np.asarray(case.w_scale)), torch.zeros(len(W), dtype=torch.int32)
    shifted = torch.empty_like(x)
    latest = [x]

    def call() -> None:  # its int8 activations take a reference path, a thousand times slower
        torch.bitwise_xor(x, FLIP, out=shifted)
        rest: Any = (packed, w_scale, w_zero, None, 1.0, 0, torch.float32, "none", [], "")
        latest[0] = ops.qlinear_pointwise(shifted, case.x_scale, FLIP, *rest)

    return Run(call, lambda: latest[0].numpy())


def _mkl_int8(case: Case) -> Run:
    import torch

    shifted, sums = np.empty(case.x.shape, np.uint8), np.empty((case.n, case.weight.pattern.M), np.int32)
    product = mkl.linear_int8(case.dense(), shifted, sums)
    x, t, s = (as_torch(a) for a in (case.x.view(np.uint8), shifted, sums))
    scale, y = as_torch(_scale(case)), as_torch(case.out())

    def call() -> None:
        torch.bitwise_xor(x, FLIP, out=t)
        product()
        torch.mul(s, scale, out=y)

    return Run(call, lambda: np.asarray(y))


def _mkl_bf16(case: Case) -> Run:
    """MKL's product is float32; torch rounds it."""
    sums = np.empty((case.n, case.weight.pattern.M), np.float32)
    product, out = mkl.linear_bf16(case.dense(), case.x, sums), case.out()
    y, s = as_torch(out), as_torch(sums)

    def call() -> None:
        product()
        y.copy_(s)

    return Run(call, lambda: out)


def _onnxruntime_int8(case: Case) -> Run:
    """MatMulIntegerToFloat on unsigned bytes; its products of two signed types are twenty times slower on x86."""
    y, x = case.out(), case.x.view(np.uint8)
    shifted = np.empty_like(x)
    assert case.w_scale is not None
    product = engines.onnxruntime_int8(case.dense(), case.w_scale, case.x_scale, shifted, y, case.threads)

    def call() -> None:
        np.bitwise_xor(x, np.uint8(FLIP), out=shifted)
        product()

    return Run(call, lambda: y)


def _openvino(case: Case) -> Run:
    y = case.out()
    return Run(engines.openvino_linear(case.dense(), case.x, y, case.threads), lambda: y)


def _torch_dense(case: Case) -> Run:
    import torch

    out = case.out()
    W, x, y = (as_torch(a) for a in (case.dense(), case.x, out))
    a, b = (x, W.t()) if case.linear else (W, x)
    return Run(lambda: torch.mm(a, b, out=y), lambda: out)


def _onednn_dense(case: Case) -> Run:
    """The weight reordered once; oneDNN's own kernels."""
    import torch

    W, x, out = as_torch(case.dense()), as_torch(case.x), case.out()
    packed, product = torch.ops.mkldnn._reorder_linear_weight(W, case.n), torch.ops.mkldnn._linear_pointwise
    latest = [x]

    def call() -> None:
        latest[0] = product(x, packed, None, "none", [], "")

    def result() -> Array:
        as_torch(out).copy_(latest[0])
        return out

    return Run(call, result)


def _onednn(case: Case) -> str | None:
    if reason := _needs("torch")(case):
        return reason
    import torch

    if case.dtype.name == "float16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return "oneDNN has no float16 on this CPU"
    return None


def _torch(case: Case) -> str | None:
    return None if importable("torch") else "torch is not installed"


def _converted(case: Case, peer: Peer) -> Run:
    """`peer` in float32, X converted before and Y after each call; by torch where it is there, which vectorises it."""
    as_float = case.by_float32()
    run, out = peer.prepare(as_float), case.out()
    before = as_float.x, case.x
    if importable("torch"):
        (to, source), y = map(as_torch, before), as_torch(out)

        def call() -> None:
            to.copy_(source)
            run.call()
            y.copy_(as_torch(run.result()))
    else:

        def call() -> None:
            np.copyto(*before, casting="unsafe")
            run.call()
            np.copyto(out, run.result(), casting="unsafe")

    return Run(call, lambda: out)


def by_float32(peers: Sequence[Peer], names: Sequence[str]) -> tuple[Peer, ...]:
    """Rows of `peers` that compute reduced types in float32."""

    def row(peer: Peer) -> Peer:
        declines, prepare = peer.declines, functools.partial(_converted, peer=peer)
        return replace(
            peer, name=f"{peer.name}, by float32", declines=lambda case: declines(case.by_float32()), prepare=prepare,
            dtypes=REDUCED,
        )  # fmt: skip

    return tuple(row(peer) for peer in peers if peer.name in names)


def _dense(name: str, declines: Callable[[Case], str | None], prepare: Callable[[Case], Run], *dtypes: str) -> Peer:
    """A row; its library is the first word of its name."""
    return Peer(name, name.split()[0], "dense", declines, prepare, dtypes)


ROWS = (
    _dense("torch dense, reduced", _torch, _torch_dense, *HALVES),
    _dense("torch dense, oneDNN packed, reduced", _onednn, _onednn_dense, *HALVES),
    _dense("torch int_mm", _torch, lambda c: _int_mm(c, stored_transposed=False), "int8"),
    _dense("torch int_mm, W.T stored", _needs("torch"), lambda c: _int_mm(c, stored_transposed=True), "int8"),
    _dense("torch qlinear, oneDNN", _needs("torch"), _qlinear, "int8"),
    _dense("mkl dense bf16, packed", _mkl_and_torch, _mkl_bf16, "bfloat16"),
    _dense("mkl dense int8, packed", _mkl_and_torch, _mkl_int8, "int8"),
    _dense("onnxruntime dense int8", _needs("onnx", "onnxruntime"), _onnxruntime_int8, "int8"),
    _dense("openvino dense, reduced", _needs("openvino"), _openvino, *HALVES),
)
BY_FLOAT32 = (
    *("numpy dense", "torch dense, oneDNN packed", "scipy csr"),
    *("mkl csr", "mkl csr, row-major", "mkl bsr", "torch bsr"),
)
