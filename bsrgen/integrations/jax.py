"""JAX: a kernel as a function that jit, vmap and, given the kernel of W.T, grad understand; on the CPU.

The artifact's TVM-FFI function is what XLA calls, through jax-tvm-ffi; nothing is copied and no Python runs in a call.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from bsrgen.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from bsrgen.kernel import Kernel
from bsrgen.manifest import OPERANDS_FILE, Manifest

_BY_TOKEN = ("element",)  # operands that have x's leading axes


def function(kernel: Kernel, *, gradient: Kernel | None = None, threads: int = 0) -> Callable[..., Any]:
    """f(x, **operands): the kernel's Y as a JAX array, with the values that its artifact was saved with.

    linear: x [..., K] gives [..., M], a tuple for several weights; vmap adds an axis in front and is one call.
    spmm: x [K, N]; vmap is a loop.  operands: by name, as arrays; those bound in the kernel need not come.
    gradient: the kernel of the same weight with transposed=True, for reverse-mode derivatives to x; only of linear
    kernels without epilogue or with a bias.  threads: at most, 0 means all usable cores; bits are the same.
    Errors while tracing: ArgumentError, ArgumentTypeError; UnsupportedError for what has no such function (weights that
    come with the call, GPUs, patterns alone).  What the artifact refuses in a call comes as JAX's own error.
    """
    m = kernel.artifact.manifest
    if m.operator not in ("linear", "spmm") or m.mode != "static" or m.device != "cpu":
        raise UnsupportedError(f"{m.name}: JAX calls static CPU kernels of linear and spmm")
    if gradient is not None and (m.operator != "linear" or set(m.epilogue) - {"bias"} or m.parts):
        raise UnsupportedError(f"{m.name}: gradient= is for one linear weight without epilogue or with a bias")
    call = _batched(m, _registered(kernel), threads)
    if gradient is not None:
        call = _with_gradient(call, function(gradient, threads=threads))
    bound = kernel.artifact.arrays(OPERANDS_FILE) if m.bound else {}

    def f(x: Any, **operands: Any) -> Any:
        given = bound | operands
        _check(m, x, given)
        values = [jnp.asarray(given.get(o.name, o.default), _types(m)[o.name]) for o in m.operands]
        y = call(jnp.asarray(x), *values)
        return tuple(jnp.split(y, np.cumsum(m.parts)[:-1], m.operator == "linear" and -1)) if m.parts else y

    return f


def _check(m: Manifest, x: Any, given: dict[str, Any]) -> None:
    if getattr(x, "dtype", None) != m.types[1].numpy:
        raise ArgumentTypeError(f"{m.name}: x has dtype {getattr(x, 'dtype', type(x).__name__)}, takes {m.x_dtype}")
    axis, rank = (-1, "[..., K]") if m.operator == "linear" else (0, "[K, N]")
    if not x.shape or x.shape[axis] != m.shape[1] or (axis == 0 and x.ndim != 2):
        raise ArgumentError(f"{m.name}: x has shape {tuple(x.shape)}, takes {rank} with K = {m.shape[1]}")
    names = [o.name for o in m.operands]
    unknown = [name for name in given if name not in names]
    missing = [o.name for o in m.operands if o.name not in given and o.default is None]
    if unknown or missing:
        raise ArgumentTypeError(
            f"{m.name}: {'no operand' if unknown else 'missing operand'} {(unknown or missing)[0]!r}"
        )


def _types(m: Manifest) -> dict[str, Any]:
    from bsrgen.epilogues import operand_dtype

    w, _, y = m.types
    return {o.name: operand_dtype(o, w, y).numpy for o in m.given}


def _registered(kernel: Kernel) -> str:
    """The name under which XLA knows the artifact's function."""
    try:
        import jax_tvm_ffi
        import tvm_ffi
    except ImportError as e:
        raise UnsupportedError(f"JAX calls kernels through {e.name}: pip install 'bsrgen[jax]'") from e
    library = kernel.artifact.library.absolute()
    name = f"bsrgen.{kernel.name}.{kernel.artifact.manifest.files[library.name][:16]}"
    if name not in _known:
        found = getattr(tvm_ffi.load_module(str(library)), kernel.name)
        jax_tvm_ffi.register_ffi_target(name, found, ["args", "rets", "attrs.threads"], platform="cpu")
        _known.add(name)
    return name


_known: set[str] = set()  # XLA keeps targets for the life of the process and refuses to hear of one twice


def _batched(m: Manifest, target: str, threads: int) -> Any:
    """The call as one that vmap understands."""
    linear = m.operator == "linear"
    by_token = [linear, *(linear and o.kind in _BY_TOKEN for o in m.operands)]

    @custom_vmap  # type: ignore[untyped-decorator]
    def call(x: Any, *operands: Any) -> Any:
        shape = (*x.shape[:-1], m.rows) if linear else (m.rows, x.shape[1])
        result = jax.ShapeDtypeStruct(shape, m.types[2].numpy)
        return jax.ffi.ffi_call(target, result)(x, *operands, threads=np.int64(threads))

    @call.def_vmap  # type: ignore[untyped-decorator]
    def rule(size: int, batched: list[bool], *args: Any) -> Any:
        if all(ok or not has for ok, has in zip(by_token, batched, strict=True)):
            spread = [
                jnp.broadcast_to(a, (size, *a.shape)) if ok and not has else a
                for a, ok, has in zip(args, by_token, batched, strict=True)
            ]
            return call(*spread), True
        each = [a if has else jnp.broadcast_to(a, (size, *a.shape)) for a, has in zip(args, batched, strict=True)]
        return jax.lax.map(lambda one: call(*one), tuple(each)), True

    return call


def _with_gradient(call: Any, transposed: Callable[..., Any]) -> Any:
    """The call with its derivative: dx = dy @ W, and the sum of dy over the tokens for a bias."""

    @jax.custom_vjp  # type: ignore[untyped-decorator]
    def f(x: Any, *operands: Any) -> Any:
        return call(x, *operands)

    def forward(x: Any, *operands: Any) -> Any:
        return call(x, *operands), operands

    def backward(operands: Any, dy: Any) -> Any:
        return transposed(dy), *(dy.sum(tuple(range(dy.ndim - 1))).astype(o.dtype) for o in operands)

    f.defvjp(forward, backward)
    return f
