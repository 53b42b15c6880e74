"""The operators bsrgen::linear, linear_dx and linear_dw: of tensors and a spec, so that torch can trace and save them.

    linear(x[..., K], values, crow_indices, col_indices, bias, spec)   -> y[..., M]  = x @ W.T + bias
    linear_dx(dy[..., M], values, crow_indices, col_indices, spec)     -> dx[..., K] = dy @ W
    linear_dw(dy[..., M], x[..., K], crow_indices, col_indices, spec)  -> dvalues[nnzb, R, C], dy.T @ x at
        the pattern, of the type of sums

The handle of a kernel is its spec, a string (config.Spec) that names the pattern by digest.  A graph holds it as a
constant and the index tensors as its inputs or buffers: torch.compile, torch.export and a saved program carry all that
is needed, and a process that has no such kernel yet takes it from the store or compiles it in the first call.

Each is the others' derivative, in the values too: gradients of any order.
"""

from math import prod
from typing import Any

import msgspec
import torch

from bsrgen.dtypes import DTYPES
from bsrgen.errors import ArgumentError, ArgumentTypeError
from bsrgen.foreign import view
from bsrgen.integrations.torch.config import Spec, parsed, written
from bsrgen.integrations.torch.kernels import Role, kernel_of, on_device, packed
from bsrgen.integrations.torch.packed import plain

library = torch.library.Library("bsrgen", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_PATTERN = "Tensor crow_indices, Tensor col_indices"
library.define(f"linear(Tensor x, Tensor values, {_PATTERN}, Tensor? bias, str spec) -> Tensor", tags=_TAGS)
library.define(f"linear_dx(Tensor dy, Tensor values, {_PATTERN}, str spec) -> Tensor", tags=_TAGS)
library.define(f"linear_dw(Tensor dy, Tensor x, {_PATTERN}, str spec) -> Tensor", tags=_TAGS)
linear, linear_dx, linear_dw = (
    getattr(torch.ops.bsrgen, name).default for name in ("linear", "linear_dx", "linear_dw")
)


def _check(spec: Spec, name: str, x: Any, features: int) -> None:
    if x.dtype != getattr(torch, spec.x_dtype):
        raise ArgumentTypeError(
            f"bsrgen layer of {spec.x_dtype}: {name} has dtype {x.dtype}; convert it, or the layer with .to(dtype)"
        )
    if x.shape[-1:] != (features,):
        raise ArgumentError(f"bsrgen layer: {name} has shape {tuple(x.shape)}, expected [..., {features}]")


def product(role: Role, x: Any, values: Any, crow: Any, col: Any, bias: Any, text: str) -> Any:
    """x[..., features] -> y[..., rows] on the CPU, by torch's number of threads.  No gradients, no modes."""
    have = packed(text, role, values, crow, col, bias)
    shape, features, rows = x.shape, have.features, have.rows
    if x.dtype is not have.dtype or not shape or shape[-1] != features:
        _check(parsed(text), "x" if role == "forward" else "dy", x, features)
    if not x.is_contiguous() or x.is_neg():
        x = plain(x)
    return have.run(x, None, x.new_empty(shape[0], rows) if len(shape) == 2 else x.new_empty((*shape[:-1], rows)))


def _linear_cpu(x: Any, values: Any, crow: Any, col: Any, bias: Any, spec: str) -> Any:
    return product("forward", x, values, crow, col, bias, spec)


def _dx_cpu(dy: Any, values: Any, crow: Any, col: Any, spec: str) -> Any:
    return product("dx", dy, values, crow, col, None, spec)


def _rows(t: Any) -> Any:
    """t [..., F] as [N, F], row by row."""
    return plain(t.detach().reshape(prod(t.shape[:-1]), t.shape[-1]))


def _dw_cpu(dy: Any, x: Any, crow: Any, col: Any, spec: str) -> Any:
    M, K = parsed(spec).shape
    _check(parsed(spec), "dy", dy, M)
    _check(parsed(spec), "x", x, K)
    out = _dw_fake(dy, x, crow, col, spec)
    kernel: Any = kernel_of(spec, "dw", crow, col)
    kernel(view(_rows(dy)), view(_rows(x)), out=out.numpy(), threads=torch.get_num_threads())
    return out


def _dw_cuda(dy: Any, x: Any, crow: Any, col: Any, spec: str) -> Any:
    """By the kernel, or where the model expects more of that by torch's dense product; the stored blocks are kept."""
    M, K = parsed(spec).shape
    _check(parsed(spec), "dy", dy, M)
    _check(parsed(spec), "x", x, K)
    kernel = kernel_of(spec, "dw", crow, col, "cuda")
    if kernel.cost.speedup >= 1:
        return kernel(_rows(dy), _rows(x))
    return dense_dw(_rows(dy), _rows(x), crow, col, parsed(spec))


def dense_dw(dy: Any, x: Any, crow: Any, col: Any, spec: Spec) -> Any:
    """dy[N, M].T @ x[N, K], and of that the stored blocks; waits for nothing."""
    (M, K), (R, C) = spec.shape, spec.blocksize
    real = getattr(torch, DTYPES[spec.x_dtype].real)
    dense = dy.to(real).T @ x.to(real)
    dense = torch.nn.functional.pad(dense, (0, -K % C, 0, -M % R)).reshape(-(-M // R), R, -(-K // C), C)
    counts = crow.diff().long()
    numbers = torch.arange(len(counts), device=counts.device)
    rows = torch.repeat_interleave(numbers, counts, output_size=len(col))
    return dense[rows, :, col.long()]


def _linear_cuda(x: Any, values: Any, crow: Any, col: Any, bias: Any, spec: str) -> Any:
    _check(parsed(spec), "x", x, parsed(spec).shape[1])
    kernel = on_device(spec, "forward", values, crow, col)
    given = {} if bias is None else {"bias": plain(bias.detach().to(getattr(torch, kernel.problem.real.name)))}
    return kernel(plain(x.detach()), **given)


def _dx_cuda(dy: Any, values: Any, crow: Any, col: Any, spec: str) -> Any:
    _check(parsed(spec), "dy", dy, parsed(spec).shape[0])
    return on_device(spec, "dx", values, crow, col)(plain(dy.detach()))


library.impl("linear", _linear_cpu, "CPU")
library.impl("linear_dx", _dx_cpu, "CPU")
library.impl("linear_dw", _dw_cpu, "CPU")
library.impl("linear", _linear_cuda, "CUDA")
library.impl("linear_dx", _dx_cuda, "CUDA")
library.impl("linear_dw", _dw_cuda, "CUDA")


# ── shapes and types, for tracing ────────────────────────────────────────────────────────────────────────────────────


def _linear_fake(x: Any, values: Any, crow: Any, col: Any, bias: Any, spec: str) -> Any:
    M, K = parsed(spec).shape
    _check(parsed(spec), "x", x, K)
    return x.new_empty((*x.shape[:-1], M))


def _dx_fake(dy: Any, values: Any, crow: Any, col: Any, spec: str) -> Any:
    return dy.new_empty((*dy.shape[:-1], parsed(spec).shape[1]))


def _dw_fake(dy: Any, x: Any, crow: Any, col: Any, spec: str) -> Any:
    real = getattr(torch, DTYPES[parsed(spec).x_dtype].real)
    return dy.new_empty((col.shape[0], *parsed(spec).blocksize), dtype=real)


for _name, _fake in (("linear", _linear_fake), ("linear_dx", _dx_fake), ("linear_dw", _dw_fake)):
    torch.library.register_fake(f"bsrgen::{_name}", _fake, lib=library)


# ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _plain(text: str) -> str:
    """The spec of the product alone, in the type of x."""
    spec = parsed(text)
    return written(msgspec.structs.replace(spec, dtype=spec.x_dtype, quantize_x=False, bias=False))


def _keep_linear(ctx: Any, inputs: Any, output: Any) -> None:
    x, values, crow, col, _, ctx.spec = inputs
    ctx.save_for_backward(x, values, crow, col)


def _linear_backward(ctx: Any, dy: Any) -> Any:
    (x, values, crow, col), need = ctx.saved_tensors, ctx.needs_input_grad
    dx = linear_dx(dy, values, crow, col, ctx.spec) if need[0] else None
    dw = linear_dw(dy, x, crow, col, ctx.spec).to(values.dtype) if need[1] else None
    db = dy.reshape(prod(dy.shape[:-1]), dy.shape[-1]).sum(0) if need[4] else None
    return dx, dw, None, None, db, None


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    a, b, crow, col, ctx.spec = inputs
    ctx.save_for_backward(a, b, crow, col)


def _dx_backward(ctx: Any, g: Any) -> Any:
    (dy, values, crow, col), need = ctx.saved_tensors, ctx.needs_input_grad
    ddy = linear(g, values, crow, col, None, _plain(ctx.spec)) if need[0] else None
    dw = linear_dw(dy, g, crow, col, ctx.spec).to(values.dtype) if need[1] else None
    return ddy, dw, None, None, None


def _dw_backward(ctx: Any, g: Any) -> Any:
    (dy, x, crow, col), need = ctx.saved_tensors, ctx.needs_input_grad
    ddy = linear(x, g, crow, col, None, _plain(ctx.spec)) if need[0] else None
    dx = linear_dx(dy, g, crow, col, ctx.spec) if need[1] else None
    return ddy, dx, None, None, None


torch.library.register_autograd("bsrgen::linear", _linear_backward, setup_context=_keep_linear, lib=library)
torch.library.register_autograd("bsrgen::linear_dx", _dx_backward, setup_context=_keep, lib=library)
torch.library.register_autograd("bsrgen::linear_dw", _dw_backward, setup_context=_keep, lib=library)
