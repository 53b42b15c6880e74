"""Several block-sparse layers of one x, or one and what follows it, as one kernel: for inference.

    bsrgen::fused(x[..., K], values[], crow_indices[], col_indices[], bias[], residual?, spec) -> y[..., all rows]

The layers keep their parameters; a kernel of all patterns is made of them, with values packed when any has changed.
"""

import functools
from typing import Any

import msgspec
import torch
from torch import nn

from bsrgen.errors import ArgumentError, ArgumentTypeError
from bsrgen.integrations.torch.config import Spec, parsed
from bsrgen.integrations.torch.kernels import compiled, pattern_of
from bsrgen.integrations.torch.layer import BsrLinear, transformed, watched
from bsrgen.integrations.torch.ops import library
from bsrgen.integrations.torch.packed import Packed, find, keep, plain
from bsrgen.kernel import Kernel

ACTIVATIONS: dict[str, Any] = {
    "relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "sigmoid": torch.sigmoid,
    "tanh": torch.tanh, "gelu_tanh": functools.partial(nn.functional.gelu, approximate="tanh"),
}  # fmt: skip
PAIRS = {"silu": "swiglu", "gelu": "geglu"}  # what a gate goes through: act(gate) * up


class FusedSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The handle of a fused kernel in a graph: the specs of its layers, and what it does besides."""

    layers: tuple[str, ...]
    epilogue: tuple[str, ...]


_DECODER = msgspec.json.Decoder(FusedSpec)  # made with the module: threads that make the first one together crash


@functools.lru_cache(maxsize=4096)
def parsed_fused(text: str) -> tuple[tuple[Spec, ...], tuple[str, ...]]:
    """The specs of the layers and the epilogue.  ArgumentError for what no bsrgen of this version has written."""
    try:
        spec = _DECODER.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ArgumentError(f"spec {text!r:.80} is not one of this bsrgen: {e}; fuse the model again") from e
    return tuple(parsed(layer) for layer in spec.layers), spec.epilogue


def fused_kernel(text: str, crow: Any, col: Any) -> Kernel:
    """The kernel of a spec: this process's, else from the store, else compiled."""
    found = _kernels.get(text)
    if found is None:
        specs, epilogue = parsed_fused(text)
        patterns = [pattern_of(spec, *indices) for spec, *indices in zip(specs, crow, col, strict=True)]
        found = _kernels.setdefault(text, compiled(specs[0], patterns, epilogue))
    return found


_kernels: dict[str, Kernel] = {}


def packed(text: str, values: Any, crow: Any, col: Any, bias: Any) -> Packed:
    """The values as the kernel takes them, packed now if they have changed since the last call."""
    found = find(values[0], (text, "fused"))
    if found is None or not found.holds((*values, *bias)):
        found = keep(Packed(fused_kernel(text, crow, col), values, bias, (text, "fused")), values)
    return found


def product(x: Any, values: Any, crow: Any, col: Any, bias: Any, residual: Any, text: str) -> Any:
    """x[..., K] -> y[..., rows of all layers] on the CPU, by torch's number of threads."""
    have = packed(text, values, crow, col, bias)
    shape = _checked(parsed_fused(text)[0][0], x, have.features, have.rows, residual)
    return have.run(plain(x), None if residual is None else plain(residual), x.new_empty(shape))


def _checked(spec: Spec, x: Any, features: int, rows: int, residual: Any) -> tuple[int, ...]:
    """The shape of y.  ArgumentTypeError, ArgumentError."""
    dtype = getattr(torch, spec.x_dtype)
    if x.dtype != dtype or (residual is not None and residual.dtype != dtype):
        raise ArgumentTypeError(f"fused layers of {dtype}: x or residual has another dtype; convert it")
    if x.shape[-1:] != (features,):
        raise ArgumentError(f"fused layers: x has shape {tuple(x.shape)}, expected [..., {features}]")
    shape = (*x.shape[:-1], rows)
    if residual is not None and tuple(residual.shape) != shape:
        raise ArgumentError(f"fused layers: residual has shape {tuple(residual.shape)}, expected {shape}")
    return shape


def _fake(x: Any, values: Any, crow: Any, col: Any, bias: Any, residual: Any, text: str) -> Any:
    specs, epilogue = parsed_fused(text)
    rows = specs[0].shape[0] if set(PAIRS.values()) & set(epilogue) else sum(spec.shape[0] for spec in specs)
    return x.new_empty(_checked(specs[0], x, specs[0].shape[1], rows, residual))


library.define(
    "fused(Tensor x, Tensor[] values, Tensor[] crow_indices, Tensor[] col_indices, Tensor[] bias, Tensor? residual, "
    "str spec) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.impl("fused", product, "CPU")
torch.library.register_fake("bsrgen::fused", _fake, lib=library)
fused = torch.ops.bsrgen.fused.default


class BsrFused(nn.Module):  # type: ignore[misc]  # torch is not typed here
    """act(layer(x)) + residual; or a tuple of several layers' results; or act(gate(x)) * up(x), as one kernel.

    With gradients, autocast, on other devices, or where the residual has another shape or type than the result, the
    layers run one by one.  It has no parameters of its own: the layers are those of the model.
    """

    def __init__(self, layers: tuple[BsrLinear, ...], activation: str | None = None, residual: bool = False) -> None:
        super().__init__()
        self._layers = layers  # a tuple is no submodule: the state dict stays as it was
        self.activation, self.residual = activation, residual
        self.paired = activation in PAIRS and len(layers) == 2
        self.features, self.rows = layers[0].in_features, layers[0].out_features
        self.parts = [] if self.paired or len(layers) == 1 else [layer.out_features for layer in layers]
        each = [self._own(dtype) for dtype in layers[0]._specs]
        self._texts = {own: self._text(own) for own in each if all(own)}
        self._kept: tuple[Any, ...] = ()  # of the last call: its type, where the tensors are, what was packed of them

    def forward(self, x: torch.Tensor, residual: Any = None) -> Any:
        """x [..., K]; residual like the result."""
        if torch.compiler.is_compiling() or not x.is_cpu or watched(x) or transformed() or torch.is_grad_enabled():
            y = self._by_operator(x, residual, fused)
        else:
            have = self._ready(x, residual)
            if have is None:
                y = self._by_operator(x, residual, product)
            else:
                y = have.run(x, residual, x.new_empty((*x.shape[:-1], have.rows)))
        return y.split(self.parts, -1) if self.parts and type(y) is not tuple else y

    def _ready(self, x: torch.Tensor, residual: Any) -> Packed | None:
        """What was packed in the last call, if it is right for this one, and nothing needs a second look."""
        if not self._kept or torch.is_autocast_enabled("cpu") or x.shape[-1:] != (self.features,):
            return None
        dtype, slots, have = self._kept
        if x.dtype is not dtype or not x.is_contiguous() or x.is_neg():
            return None
        if self.residual and not (
            type(residual) is torch.Tensor and residual.dtype is dtype and residual.is_contiguous()
            and not residual.is_neg() and residual.shape[:-1] == x.shape[:-1] and residual.shape[-1] == self.rows
        ):  # fmt: skip
            return None
        now = [tensor for parameters, name in slots if (tensor := parameters[name]) is not None]
        return have if have.holds(now) else None

    def _by_operator(self, x: torch.Tensor, residual: Any, call: Any) -> Any:
        """The careful way, through the dispatcher or past it; layer by layer where the kernel does not fit."""
        own = self._own(x.dtype)
        if not self._fits(x, residual, own):
            return self.separately(x, residual)
        text = self._texts.get(own) or self._text(own)  # the former is what torch.compile can read
        values, crow, col = ([getattr(layer, name) for layer in self._layers] for name in BsrLinear.TENSORS)
        bias = [layer.bias for layer in self._layers if layer.bias is not None]
        if call is product and not any(tensor.is_inference() for tensor in (*values, *bias)):
            have = packed(text, values, crow, col, bias)
            slots = [(f._parameters, name) for name in ("values", "bias") for f in self._layers]
            self._kept = x.dtype, slots, have
        return call(x, values, crow, col, bias, residual, text)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": ()}  # pointers of this process

    def _fits(self, x: torch.Tensor, residual: Any, own: tuple[str, ...]) -> bool:
        """Whether the kernel does what the layers would."""
        first, biased = self._layers[0], {layer.bias is not None for layer in self._layers}
        if not x.is_cpu or not all(own) or x.dtype != first.values.dtype:
            return False
        if not torch.compiler.is_compiling() and transformed():
            return False
        if torch.is_autocast_enabled("cpu") or len(biased) > 1 or (self.paired and True in biased):
            return False
        learns = x.requires_grad or any(p.requires_grad for layer in self._layers for p in layer.parameters())
        if torch.is_grad_enabled() and learns:
            return False
        if not self.residual:
            return True
        shape = (*x.shape[:-1], first.out_features)
        return isinstance(residual, torch.Tensor) and residual.dtype == x.dtype and tuple(residual.shape) == shape

    def separately(self, x: torch.Tensor, residual: Any = None) -> Any:
        """The same, layer by layer."""
        y = [layer(x) for layer in self._layers]
        if self.activation is not None:
            y[0] = ACTIVATIONS[self.activation](y[0])
        if self.paired:
            return y[0] * y[1]
        if len(y) > 1:
            return tuple(y)
        return y[0] + residual if self.residual else y[0]

    def _own(self, dtype: Any) -> tuple[str, ...]:
        """The specs of the layers; "" where one has no kernel for the type."""
        return tuple(f._specs.get(dtype, ("", ""))[f.bias is not None] for f in self._layers)

    def _text(self, own: tuple[str, ...]) -> str:
        act = () if self.activation is None else (PAIRS[self.activation] if self.paired else self.activation,)
        bias = ("bias",) if self._layers[0].bias is not None else ()
        return msgspec.json.encode(FusedSpec(own, (*bias, *act, *(("residual",) if self.residual else ())))).decode()

    def kernel(self) -> Kernel:
        """The kernel for x of the layers' type, compiled if need be."""
        own = self._own(self._layers[0].values.dtype)
        _, crow, col = ([getattr(layer, name) for layer in self._layers] for name in BsrLinear.TENSORS)
        return fused_kernel(self._text(own), crow, col)

    def extra_repr(self) -> str:
        """For print(model)."""
        act = PAIRS[str(self.activation)] if self.paired else self.activation
        what = [f"{len(self._layers)} of {self.features} features", act, "residual" if self.residual else None]
        return ", ".join(filter(None, what))
