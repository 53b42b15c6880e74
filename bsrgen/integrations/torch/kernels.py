"""The kernels of this process by their specs, and the values of the tensors that they are called with."""

import functools
import weakref
from typing import Any, Literal

import torch

from bsrgen.errors import ArgumentError, UnsupportedError
from bsrgen.foreign import host, view
from bsrgen.integrations.torch.config import Spec, parsed
from bsrgen.integrations.torch.packed import Packed, find, keep
from bsrgen.integrations.torch.packed import forget as forget_packed
from bsrgen.kernel import Kernel
from bsrgen.loading import kernel_of as kernel_from
from bsrgen.pattern import Pattern, Weight, with_random_values

Role = Literal["forward", "dx", "dw"]  # y = x @ W.T, dx = dy @ W, dW = dy.T @ x at the pattern
_kernels: dict[tuple[str, Role, str], Kernel] = {}
_seen: dict[int, tuple[Any, Any, Any]] = {}  # copies of values and biases that train
_resident: dict[int, dict[tuple[str, Role], tuple[Any, int, int, Kernel]]] = {}  # of tensors on GPUs


def kernel_of(text: str, role: Role, crow: Any, col: Any, device: str = "cpu") -> Kernel:
    """The kernel of a spec: this process's, else from the store, else compiled.

    crow, col: the pattern's indptr and indices as tensors, looked at only where the process has no such kernel.
    Values in its artifact are random: what is multiplied comes from the layer, and one artifact serves every step of
    training.  Errors: those of bsrgen.compile, and ArgumentError for indices that are not of the spec's pattern.
    """
    found = _kernels.get((text, role, device))
    if found is None:
        spec = parsed(text)
        found = _kernels.setdefault((text, role, device), _made(spec, role, pattern_of(spec, crow, col), device))
    return found


def build(text: str, role: Role, pattern: Pattern, device: str) -> None:
    """Have the kernel compiled: into this process and the store.  Plain data in, so that another process may do it."""
    if (text, role, device) not in _kernels:
        _kernels.setdefault((text, role, device), _made(parsed(text), role, pattern, device))


def pattern_of(spec: Spec, crow: Any, col: Any) -> Pattern:
    """The pattern that index tensors say, which is the spec's.  ArgumentError."""
    pattern = Pattern(spec.shape, spec.blocksize, host("crow_indices", crow), host("col_indices", col))
    if pattern.digest != spec.pattern:
        raise ArgumentError(
            f"crow_indices and col_indices are {pattern}, of another pattern than the layer was made for: a layer's "
            "pattern is fixed; load_state_dict takes another one, or convert the model again"
        )
    return pattern


def _made(spec: Spec, role: Role, pattern: Pattern, device: str) -> Kernel:
    from bsrgen import api

    if role == "forward":
        return compiled(spec, [pattern], ("bias",) if spec.bias else (), device)
    weight, x = with_random_values(pattern, _rng(pattern)), spec.x_dtype
    common: dict[str, Any] = {"n": spec.n, "tune": spec.tune, **_place(spec, device)}
    if role == "dw":
        return api.compile(weight, operator="linear_grad", dtype=x, n=spec.n, **_gradients(spec, device))
    return api.compile(weight, transposed=True, dtype=x, strict=spec.strict, **common)


def compiled(spec: Spec, patterns: list[Pattern], epilogue: tuple[str, ...], device: str = "cpu") -> Kernel:
    """The kernel of layers that share x and all of `spec` but the pattern."""
    from bsrgen import api

    weights = [with_random_values(pattern, _rng(pattern)) for pattern in patterns]
    return api.compile(
        weights if len(weights) > 1 else weights[0], dtype=spec.dtype, x_dtype=spec.x_dtype, out_dtype=spec.x_dtype,
        quantize_x=spec.quantize_x, strict=spec.strict, epilogue=epilogue, n=spec.n, tune=spec.tune,
        **_place(spec, device),
    )  # fmt: skip


def _gradients(spec: Spec, device: str) -> dict[str, Any]:
    """_place for the gradient of values, which is not of every backend: C stands in for MLIR."""
    place = _place(spec, device)
    return place | {"backend": "cuda" if device == "cuda" else "auto"}


def _rng(pattern: Pattern) -> Any:
    import numpy as np

    return np.random.default_rng(int(pattern.digest[:16], 16))


def _place(spec: Spec, device: str) -> dict[str, Any]:
    """backend and target for tensors on `device`.  UnsupportedError where the config has chosen others."""
    if device == "cpu":
        if spec.backend == "cuda":
            raise UnsupportedError("a layer with backend='cuda' was called with CPU tensors; move the model and x")
        return {"backend": spec.backend, "target": spec.target}
    if spec.backend not in ("auto", "cuda"):
        raise UnsupportedError(
            f"a layer with backend={spec.backend!r} was called with CUDA tensors; convert with backend='cuda' or 'auto'"
        )
    major, minor = torch.cuda.get_device_capability()
    return {"backend": "cuda", "target": f"sm_{major}{minor}" if spec.target == "native" else spec.target}


def packed(text: str, role: Role, values: Any, crow: Any, col: Any, bias: Any) -> Packed:
    """The values as the kernel takes them, packed now if they have changed since the last call."""
    which, tensors = (text, role), (values,) if bias is None else (values, bias)
    found = find(values, which)
    if found is None or not found.holds(tensors):
        found = keep(Packed(kernel_of(text, role, crow, col), (values,), tensors[1:], which), (values,))
    return found


def recheck(values: Any, bias: Any) -> None:
    """Forget what was packed if the tensors differ from their copies of the last time, whatever their versions say.

    Half of the world's training code changes weights through `.data`, gradcheck too; where gradients are recorded, a
    comparison is cheap beside them.
    """
    seen = _seen.get(id(values))
    if seen is None or seen[0]() is not values or not (torch.equal(seen[1], values) and _same(seen[2], bias)):
        forget(values)
        ref = weakref.ref(values, functools.partial(_unsee, id(values)))
        _seen[id(values)] = ref, values.detach().clone(), None if bias is None else bias.detach().clone()


def _same(one: Any, other: Any) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def forget(values: Any) -> None:
    """Pack `values` and the bias anew in the next call, for every type and device."""
    forget_packed(values)
    _resident.pop(id(values), None)


def _unsee(key: int, ref: Any) -> None:
    if _seen.get(key, (None,))[0] is ref:
        del _seen[key]


def on_device(text: str, role: Role, values: Any, crow: Any, col: Any) -> Kernel:
    """A GPU kernel of its own for these values, which it uploads in its next call if they have changed."""
    known = _resident.setdefault(id(values), {})
    found = known.get((text, role))
    if found is None or found[0]() is not values or found[1:3] != (values.data_ptr(), values._version):
        kernel = kernel_of(text, role, crow, col, "cuda") if found is None else found[3]
        own = found[3] if found is not None and found[0]() is values else kernel_from(kernel.artifact)
        own.update(Weight(own._given, view(values.detach().resolve_neg().cpu().contiguous())))
        ref = weakref.ref(values, functools.partial(_drop, id(values)))
        known[text, role] = ref, values.data_ptr(), values._version, own
    return known[text, role][3]


def _drop(key: int, ref: Any) -> None:
    known = _resident.get(key, {})
    if any(found[0] is ref for found in known.values()):
        del _resident[key]
