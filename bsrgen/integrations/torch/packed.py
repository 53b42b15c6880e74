"""Values of tensors as a kernel keeps them, and whether they still are what the tensors say."""

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from bsrgen.errors import ArgumentError
from bsrgen.foreign import view
from bsrgen.instance import Instance
from bsrgen.kernel import Kernel
from bsrgen.pattern import Weight

_known: dict[int, dict[tuple[str, str], "Packed"]] = {}  # by the id of each tensor of values, then by kernel and role


class Packed:
    """The values of one tensor, or of several that make one weight, as a kernel keeps them; their biases side by side.

    A tensor is known by itself, its address and its version, which every in-place change counts up; tensors made in
    inference mode have none and are compared with a copy.  Changes through `.data` are not counted: see `forget`.
    """

    __slots__ = (
        "bias", "dtype", "features", "instance", "operands", "residual", "rows", "seen", "stale", "which",
    )  # fmt: skip

    def __init__(self, kernel: Kernel, values: Sequence[Any], bias: Sequence[Any], which: tuple[str, str]) -> None:
        self.which, self.stale = which, False
        gone = functools.partial(_drop, which, tuple(map(id, values)))
        self.seen = [_look(tensor, gone) for tensor in (*values, *bias)]
        data = values[0].detach() if len(values) == 1 else torch.cat([tensor.detach() for tensor in values])
        self.instance = Instance(kernel, Weight(kernel._given, view(data.resolve_neg().contiguous())))
        m = kernel.artifact.manifest
        self.rows, self.features, self.dtype = m.rows, kernel.shape[1], getattr(torch, kernel.x_dtype.name)
        self.bias = self._biases(kernel, bias)
        known = {} if self.bias is None else {"bias": self.bias.data_ptr()}
        added = {"residual": 0} if "residual" in m.epilogue else {}
        self.operands = self.instance.operands(**known, **added)
        self.residual = self.instance.place("residual") if added else -1

    @staticmethod
    def _biases(kernel: Kernel, bias: Sequence[Any]) -> Any:
        """Where they lie if they are one and of the kernel's type, else in a copy.  ArgumentError."""
        if not bias:
            return None
        real = getattr(torch, kernel.problem.real.name)
        whole = bias[0] if len(bias) == 1 else torch.cat(list(bias))
        if tuple(whole.shape) != (kernel.shape[0],):
            raise ArgumentError(f"{kernel.name}: bias has shape {tuple(whole.shape)}, expected ({kernel.shape[0]},)")
        return whole.detach().to(real).resolve_neg().contiguous()

    def holds(self, tensors: Sequence[Any]) -> bool:
        """Whether it is still right for these: values first, biases then."""
        if self.stale or len(tensors) != len(self.seen):
            return False
        for (ref, pointer, version, copy), tensor in zip(self.seen, tensors):  # noqa: B905  # strict takes its time
            if ref() is not tensor or tensor.data_ptr() != pointer:
                return False
            if copy is None:
                if tensor._version != version:
                    return False
            elif not torch.equal(copy, tensor):
                return False
        return True

    def reads(self, ref: Any) -> bool:
        """Whether this weak reference is to one of its tensors."""
        return any(ref is seen for seen, *_ in self.seen)

    def run(self, x: Any, residual: Any, y: Any) -> Any:
        """y, written, by torch's number of threads; all three are contiguous and of the kernel's type."""
        operands, features = self.operands, self.features
        if residual is not None:
            operands = self.instance.with_address(operands, self.residual, residual.data_ptr(), self.rows)
        n = x.numel() // features if features else y.numel() // self.rows if self.rows else 0
        self.instance.run(n, x.data_ptr(), features, y.data_ptr(), self.rows, operands, torch.get_num_threads())
        return y


def _look(tensor: Any, gone: Any) -> tuple[Any, int, int, Any]:
    """What says whether it still is what it was: itself, its address, its version, or in place of that a copy."""
    copy = tensor.detach().clone() if tensor.is_inference() else None
    return weakref.ref(tensor, gone), tensor.data_ptr(), 0 if copy is not None else tensor._version, copy


def _drop(which: tuple[str, str], keys: tuple[int, ...], ref: Any) -> None:
    """A tensor does not exist any more: nobody asks for what was packed of it.  Runs at any time, in any thread."""
    for key in keys:
        known = _known.get(key, {})
        packed = known.get(which)
        if packed is not None and packed.reads(ref):
            packed.stale = True
            known.pop(which, None)
            if not known:
                _known.pop(key, None)


def find(first: Any, which: tuple[str, str]) -> Packed | None:
    """What was packed last of values whose first tensor this is, for a kernel and a role."""
    known = _known.get(id(first))
    return None if known is None else known.get(which)


def keep(packed: Packed, values: Sequence[Any]) -> Packed:
    """Have it found."""
    for tensor in values:
        _known.setdefault(id(tensor), {})[packed.which] = packed
    return packed


def forget(values: Any) -> None:
    """Pack what this tensor is a part of anew in the next call, for every type."""
    for packed in _known.pop(id(values), {}).values():
        packed.stale = True


def plain(tensor: Any) -> Any:
    """`tensor` as its memory says it: contiguous, and no view that stands for other numbers (z.conj().imag)."""
    tensor = tensor if tensor.is_contiguous() else tensor.contiguous()
    return tensor.resolve_neg() if tensor.is_neg() else tensor
