"""BsrLinear: nn.Linear with a block-sparse weight of a fixed pattern."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd import forward_ad

from bsrgen.errors import ArgumentError, ArgumentTypeError, BsrgenError, UnsupportedError
from bsrgen.foreign import host
from bsrgen.integrations.torch.config import FLOATS, BsrConfig, spec_text
from bsrgen.integrations.torch.kernels import Role, forget, kernel_of, recheck
from bsrgen.integrations.torch.ops import linear, product
from bsrgen.kernel import Kernel
from bsrgen.pattern import Pattern, Weight, as_weight

try:  # none of these is public: where one is missing, every call goes through the dispatcher
    _modes, _functorch = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack
    _tracing, _profiling = torch._C._get_tracing_state, torch._C._autograd._profiler_enabled
except AttributeError:
    _modes = _functorch = _tracing = _profiling = lambda: True


def watched(x: torch.Tensor) -> bool:
    """Whether something wants to see operators go by: subclasses, modes, tracers, the profiler."""
    return type(x) is not torch.Tensor or bool(_modes() or _tracing() or _profiling())


def transformed() -> bool:
    """Whether functorch or forward-mode differentiation is at work."""
    return bool(_functorch() or forward_ad._current_level >= 0)


def _autocast(device: str) -> bool:
    """Whether autocast is on there; not every kind of device has it."""
    return bool(torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device))


class BsrLinear(nn.Module):  # type: ignore[misc]  # torch is not typed here
    """y = x @ W.T + bias for x [..., in_features], W block-sparse with a fixed pattern.

    Parameters and buffers, in the layout of torch's sparse_bsr tensors:
        values [nnzb, R, C]                   blocks by rows, zero where they stick out of W; a parameter
        crow_indices [block_rows + 1], col_indices [nnzb]    int32 buffers
        bias [out_features] or None           a parameter
    They can be saved, loaded, copied, pickled, moved and trained like any; optimizers that change `values` are seen in
    the next call, which packs them again without a compiler.  load_state_dict takes another pattern too.

    x has the layer's type (`values.dtype`), or under autocast any: then the kernel of autocast's type runs.  Kernels
    are compiled when a type is used for the first time, or taken from bsrgen's store; `kernel()` does it ahead.
    """

    TENSORS = ("values", "crow_indices", "col_indices")
    in_features: int
    out_features: int

    def __init__(self, weight: Weight, config: BsrConfig, bias: Any = None, *, device: Any = None, dtype: Any = None):
        """From a bsrgen Weight (see as_weight) and a bias [M] or None, copied.  dtype: what the layer computes in."""
        super().__init__()
        p = weight.pattern
        self.out_features, self.in_features = p.shape
        self.config = config
        values = torch.from_numpy(weight.data.astype(np.float64 if weight.data.dtype == np.float64 else np.float32))
        dtype = dtype or values.dtype
        self.values = nn.Parameter(values.to(device=device, dtype=dtype))
        self.register_buffer("crow_indices", torch.from_numpy(p.indptr.astype(np.int32)).to(device))
        self.register_buffer("col_indices", torch.from_numpy(p.indices.copy()).to(device))
        own = None if bias is None else torch.as_tensor(bias).detach().clone().to(device, dtype)
        self.register_parameter("bias", None if own is None else nn.Parameter(own))
        self._name_kernels(p)

    def _name_kernels(self, pattern: Pattern) -> None:
        """Specs without and with a bias, by the type of x; types that do not go with config.dtype have none."""
        self._specs: dict[Any, tuple[str, str]] = {}
        for name in FLOATS:
            with suppress(UnsupportedError):
                plain, biased = (spec_text(pattern, self.config, name, bias) for bias in (False, True))
                self._specs[getattr(torch, name)] = plain, biased

    def _spec(self, dtype: Any) -> str:
        """The spec for x of a type.  UnsupportedError."""
        specs = self._specs.get(dtype)
        if specs is None:
            raise UnsupportedError(f"BsrLinear with dtype={self.config.dtype!r} has no kernel for x of {dtype}")
        return specs[self._parameters["bias"] is not None]

    @classmethod
    def from_linear(cls, module: nn.Linear, config: BsrConfig) -> "BsrLinear":
        """The layer of an nn.Linear, whose all-zero blocks are absent; type, device, mode, requires_grad stay.

        Errors: ArgumentTypeError for what is no nn.Linear of real numbers, ArgumentError for pending pruning masks and
        meta tensors, UnsupportedError for types that do not go together.
        """
        return cls._of(module, block_weight(module, config), config)

    @classmethod
    def _of(cls, module: nn.Linear, weight: Weight, config: BsrConfig) -> "BsrLinear":
        w = module.weight
        layer = cls(weight, config, module.bias, device=w.device, dtype=w.dtype)
        layer.values.requires_grad_(w.requires_grad)
        if layer.bias is not None:
            layer.bias.requires_grad_(module.bias.requires_grad)
        for name, value in vars(module).items():
            if name.startswith(("_forward_", "_backward_")) or name == "_is_full_backward_hook":
                setattr(layer, name, value)  # what others have hooked on the layer goes on seeing its calls
        layer.train(module.training)
        return layer

    def to_linear(self) -> nn.Linear:
        """The nn.Linear of the same weight, zeros stored; its parameters are copies."""
        values, bias = self.values, self.bias
        dense = nn.Linear(
            self.in_features, self.out_features, bias is not None, device="meta", dtype=values.dtype
        ).to_empty(device=values.device)
        with torch.no_grad():
            dense.weight.copy_(self.weight)
            if bias is not None:
                dense.bias.copy_(bias)
                dense.bias.requires_grad_(bias.requires_grad)
        dense.weight.requires_grad_(values.requires_grad)
        return dense.train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> y [..., out_features], of x's type.

        Within torch.func's transforms and forward-mode differentiation, whose rules operators of others cannot give, it
        is the dense product of `weight`.
        """
        parameters, buffers = self._parameters, self._buffers  # torch's own look-up of a name takes 0.4 us
        values, bias = parameters["values"], parameters["bias"]
        crow, col = buffers["crow_indices"], buffers["col_indices"]
        on_cpu = x.is_cpu
        if (torch.is_autocast_enabled("cpu") if on_cpu else _autocast(x.device.type)) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        elif x.dtype is not values.dtype:
            raise ArgumentTypeError(
                f"BsrLinear of {values.dtype}: x has dtype {x.dtype}; convert x, or the layer with .to(dtype)"
            )
        specs = self._specs.get(x.dtype)
        spec = self._spec(x.dtype) if specs is None else specs[bias is not None]  # the former raises
        if torch.compiler.is_compiling():
            return linear(x, values, crow, col, bias, spec)
        if transformed():
            return nn.functional.linear(x, self.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        if not on_cpu or watched(x):
            return linear(x, values, crow, col, bias, spec)
        if torch.is_grad_enabled():
            if values.requires_grad and (self.training or x.requires_grad):
                recheck(values, bias)
            return linear(x, values, crow, col, bias, spec)
        return product("forward", x, values, crow, col, bias, spec)  # past the dispatcher, which takes 3 us

    def refresh(self) -> None:
        """Say that `values` or `bias` has changed behind torch's back: through `.data` or memory that they share.

        Calls that record gradients see that by themselves, by a comparison.  All other ways to change them are always
        seen: optimizers, in-place operations, load_state_dict, .to, a new parameter.
        """
        forget(self.values)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight [out_features, in_features], made now from `values`, through which gradients flow."""
        (nnzb, R, C), crow = self.values.shape, self.crow_indices
        block_rows, block_cols = len(crow) - 1, -(-self.in_features // C)
        numbers = torch.arange(block_rows, device=crow.device)
        rows = torch.repeat_interleave(numbers, crow.diff(), output_size=nnzb)
        dense = self.values.new_zeros(block_rows, block_cols, R, C)
        dense = dense.index_put((rows, self.col_indices.long()), self.values)
        return dense.transpose(1, 2).reshape(block_rows * R, block_cols * C)[: self.out_features, : self.in_features]

    def pattern(self) -> Pattern:
        """Which blocks are stored."""
        shape, block = (self.out_features, self.in_features), (self.values.shape[1], self.values.shape[2])
        indices = (host(name, getattr(self, name)) for name in ("crow_indices", "col_indices"))
        return Pattern(shape, block, *indices)

    def kernel(self, dtype: Any = None) -> Kernel:
        """The kernel for x of `dtype` (a torch dtype; None: the layer's), compiled if need be.  Its plan, verdict and
        source are what runs; the values in it are not the layer's."""
        spec = self._spec(dtype or self.values.dtype)
        return kernel_of(spec, "forward", self.crow_indices, self.col_indices, self.values.device.type)

    def requests(self, train: bool) -> list[tuple[str, Role]]:
        """The kernels of the layer's type: those of a call, or of training too."""
        spec = self._spec(self.values.dtype)
        return [(spec, role) for role in (("forward", "dx", "dw") if train else ("forward",))]

    def extra_repr(self) -> str:
        """For print(model)."""
        nnzb, R, C = self.values.shape
        blocks = -(-self.out_features // R) * -(-self.in_features // C)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"blocksize={R}x{C}, density={nnzb / max(blocks, 1):.3g}"
        )

    # ── what torch calls ─────────────────────────────────────────────────────────────────────────────────────────

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """.to, .half, .cuda and the like; types without a kernel are refused before anything changes."""
        dtype = fn(self.values.detach().new_empty(0)).dtype
        if dtype not in self._specs:
            names = ", ".join(str(known) for known in self._specs)
            raise UnsupportedError(f"BsrLinear with dtype={self.config.dtype!r} cannot become {dtype}: one of {names}")
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        """Another pattern takes the place of this one; torch does the rest."""
        new = [state.get(prefix + name) for name in self.TENSORS]
        if all(isinstance(tensor, torch.Tensor) for tensor in new):
            try:
                self._adopt(*new)
            except BsrgenError as e:
                errors = arguments[-1]
                errors.append(f"{prefix}values, crow_indices and col_indices are no weight of this layer: {e}")
        super()._load_from_state_dict(state, prefix, *arguments)

    def _adopt(self, values: Any, crow: Any, col: Any) -> None:
        """Make room for values of that pattern.  PatternError, ArgumentError."""
        if values.ndim != 3:
            raise ArgumentError(f"values has shape {tuple(values.shape)}, expected (nnzb, R, C)")
        shape, block = (self.out_features, self.in_features), (int(values.shape[1]), int(values.shape[2]))
        pattern = Pattern(shape, block, host("crow_indices", crow), host("col_indices", col))
        if pattern.nnzb != values.shape[0]:
            raise ArgumentError(f"values has {values.shape[0]} blocks, the indices {pattern.nnzb}")
        if pattern == self.pattern():
            return
        old = self.values
        self.values = nn.Parameter(old.detach().new_zeros(values.shape), requires_grad=old.requires_grad)
        device = old.device
        self.crow_indices = torch.from_numpy(pattern.indptr.astype(np.int32)).to(device)
        self.col_indices = torch.from_numpy(pattern.indices.copy()).to(device)
        self._name_kernels(pattern)


def block_weight(module: nn.Linear, config: BsrConfig) -> Weight:
    """The weight of an nn.Linear in blocks of the config, as numbers of its type or, of half types, float32.

    Errors: as BsrLinear.from_linear.
    """
    if not isinstance(module, nn.Linear):
        raise ArgumentTypeError(f"{type(module).__name__} is not an nn.Linear")
    if hasattr(module, "weight_orig"):
        raise ArgumentError(
            "the layer has a pruning mask of torch.nn.utils.prune; call prune.remove(module, 'weight') first"
        )
    if "weight" not in module._parameters:
        raise ArgumentError(
            "the weight is computed in each call, by weight_norm, spectral_norm or a parametrization; remove that first"
        )
    w = module.weight
    if w.is_meta:
        raise ArgumentError("the weight is a meta tensor without values; load the model first")
    config.weight_dtype(str(w.dtype).removeprefix("torch."))
    own = "float64" if w.dtype == torch.float64 else "float32"
    blocksize = config.blocksize
    if blocksize is None:
        from bsrgen.advice import advise

        dtype = str(w.dtype).removeprefix("torch.")
        blocksize = advise(w, dtype=config.weight_dtype(dtype), x_dtype=dtype, n=config.n)[0].blocksize
    return as_weight(w, blocksize=blocksize, dtype=own)
