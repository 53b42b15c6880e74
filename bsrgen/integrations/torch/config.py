"""BsrConfig, what a user asks of a layer, and Spec, what one kernel of it is: a string that travels through graphs."""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from bsrgen.dtypes import DTYPES, as_dtype, as_types
from bsrgen.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from bsrgen.foreign import pair
from bsrgen.pattern import Pattern

FLOATS = ("float32", "float64", "bfloat16", "float16")  # what a layer may compute in


@dataclass(frozen=True, slots=True)
class BsrConfig:
    """How linear layers are made block-sparse.  Names that `bsrgen.compile` has mean the same here.

    blocksize: (R, C), rows are outputs; None takes for each layer the block shape of its nonzeros that the cost model
        predicts to be fastest (`bsrgen.advise`).
    dtype: of the weight in the kernel, a name or a torch dtype; None: as the layer computes, so that a model in
        bfloat16 runs bfloat16 kernels.  "bfloat16" or "int8" in a float32 model shorten only the weight that is read;
        the parameter stays.
    quantize_x: with dtype="int8", the kernel makes int8 of x too, token by token.
    min_speedup: a layer whose kernel is predicted to be fewer times faster than a dense product, at n tokens on one
        core, stays an nn.Linear.  0 converts every layer.
    train: compile what gradients need too, when the model is converted; else the first backward pass does.
    """

    blocksize: tuple[int, int] | None
    dtype: Any = None
    quantize_x: bool = False
    n: int | None = None
    tune: Literal["off", "model", "measure"] = "model"
    strict: bool = False
    backend: str = "auto"
    target: str | tuple[str, ...] = "native"
    min_speedup: float = 1.0
    train: bool = False

    def __post_init__(self) -> None:
        put = object.__setattr__
        if self.blocksize is not None:
            put(self, "blocksize", pair("blocksize", self.blocksize, 1))
        if self.dtype is not None:
            put(self, "dtype", as_dtype(str(self.dtype).removeprefix("torch.")).name)
        if isinstance(self.min_speedup, bool) or not isinstance(self.min_speedup, (int, float)):
            raise ArgumentTypeError(f"min_speedup={self.min_speedup!r}: a number")
        if not self.min_speedup >= 0:
            raise ArgumentError(f"min_speedup={self.min_speedup!r}: 0, which converts every layer, or more")
        if self.quantize_x and self.dtype != "int8":
            raise UnsupportedError("quantize_x=True makes int8 of x, for weights of dtype='int8'")

    def weight_dtype(self, x_dtype: str) -> str:
        """Type of the weight in a kernel for x of that type.  ArgumentTypeError, UnsupportedError."""
        if x_dtype not in FLOATS:
            raise ArgumentTypeError(f"a layer of {x_dtype}: layers compute in {', '.join(FLOATS)}")
        return as_types(self.dtype or x_dtype, x_dtype)[0].name


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that decides about the code of a layer's kernel.  As text it is the operator's handle: graphs, exported
    programs too, hold it beside the index tensors, from which the kernel is made where the process has none."""

    pattern: str  # digest
    shape: tuple[int, int]
    blocksize: tuple[int, int]
    dtype: str  # of the weight
    x_dtype: str  # of x and y
    bias: bool
    quantize_x: bool
    n: int | None
    tune: Literal["off", "model", "measure"]
    strict: bool
    backend: str
    target: str | tuple[str, ...]


def spec_text(pattern: Pattern, config: BsrConfig, x_dtype: str, bias: bool) -> str:
    """The handle of the kernel for x of `x_dtype`."""
    spec = Spec(
        pattern.digest, pattern.shape, pattern.blocksize, config.weight_dtype(x_dtype), x_dtype, bias,
        config.quantize_x, config.n, config.tune, config.strict, config.backend, config.target,
    )  # fmt: skip
    return written(spec)


def written(spec: Spec) -> str:
    """The spec as text; equal specs give equal text."""
    return msgspec.json.encode(spec).decode()


_DECODER = msgspec.json.Decoder(Spec)  # made with the module: threads that make the first one together crash


@functools.lru_cache(maxsize=4096)
def parsed(text: str) -> Spec:
    """The spec that is written there.  ArgumentError for what no bsrgen of this version has written."""
    try:
        spec = _DECODER.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ArgumentError(f"spec {text!r:.80} is not one of this bsrgen: {e}; convert the model again") from e
    if not {spec.dtype, spec.x_dtype} <= DTYPES.keys():
        raise ArgumentError(f"spec {text!r:.80}: types {spec.dtype}, {spec.x_dtype} are unknown")
    return spec
