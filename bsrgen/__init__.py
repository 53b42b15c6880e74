"""bsrgen: one fixed block-sparse weight matrix in, one fast kernel out."""

from typing import TYPE_CHECKING

from bsrgen.errors import (
    ArgumentError,
    ArgumentTypeError,
    ArtifactCorruptError,
    ArtifactError,
    BsrgenError,
    BuildError,
    CapacityError,
    CompilerNotFoundError,
    DeviceError,
    IncompatibleCPUError,
    OutOfMemoryError,
    PatternError,
    PatternMismatchError,
    StoreError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from bsrgen import attention, prune, shapes
    from bsrgen.advice import advise
    from bsrgen.api import compile
    from bsrgen.assemble import compile_model
    from bsrgen.dynamic import DynamicKernel, PreparedWeight
    from bsrgen.kernel import Kernel
    from bsrgen.loading import load
    from bsrgen.model import load_model

__version__ = "0.1.0"


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    """Import the stages on first use: `import bsrgen` itself costs a few milliseconds over numpy."""
    if name == "compile":
        from bsrgen.api import compile

        return compile
    if name == "advise":
        from bsrgen.advice import advise

        return advise
    if name in ("attention", "prune", "shapes"):
        from importlib import import_module

        return import_module(f"bsrgen.{name}")
    if name == "load":
        from bsrgen.loading import load

        return load
    if name == "Kernel":
        from bsrgen.kernel import Kernel

        return Kernel
    if name in ("DynamicKernel", "PreparedWeight"):
        from bsrgen import dynamic

        return getattr(dynamic, name)
    if name == "compile_model":
        from bsrgen.assemble import compile_model

        return compile_model
    if name == "load_model":
        from bsrgen.model import load_model

        return load_model
    raise AttributeError(f"module 'bsrgen' has no attribute {name!r}")


__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "ArtifactCorruptError",
    "ArtifactError",
    "BsrgenError",
    "BuildError",
    "CapacityError",
    "CompilerNotFoundError",
    "DeviceError",
    "DynamicKernel",
    "IncompatibleCPUError",
    "Kernel",
    "OutOfMemoryError",
    "PatternError",
    "PatternMismatchError",
    "PreparedWeight",
    "StoreError",
    "UnsupportedError",
    "__version__",
    "advise",
    "attention",
    "compile",
    "compile_model",
    "load",
    "load_model",
    "prune",
    "shapes",
]
