"""bsrgen: one fixed block-sparse weight matrix in, one fast kernel out."""

from importlib import import_module
from typing import TYPE_CHECKING

from bsrgen.errors import (
    ArgumentError,
    ArgumentTypeError,
    ArtifactCorruptError,
    ArtifactError,
    BsrgenError,
    BuildError,
    CapacityError,
    CaptureError,
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
    from bsrgen.device import DeviceKernel
    from bsrgen.dynamic import DynamicKernel, PreparedWeight
    from bsrgen.dynamic_device import DynamicDeviceKernel, PreparedDeviceWeight
    from bsrgen.kernel import Kernel
    from bsrgen.loading import load
    from bsrgen.model import Model, load_model
    from bsrgen.pattern_kernel import PatternKernel
    from bsrgen.pit_device import PitDeviceKernel
    from bsrgen.pit_kernel import PitKernel

__version__ = "0.1.0"

_MODULES = {  # imported on first use: `import bsrgen` itself costs a few milliseconds over numpy
    "advise": "advice", "compile": "api", "compile_model": "assemble", "DeviceKernel": "device",
    "DynamicDeviceKernel": "dynamic_device", "PreparedDeviceWeight": "dynamic_device", "DynamicKernel": "dynamic",
    "PreparedWeight": "dynamic", "Kernel": "kernel", "load": "loading", "Model": "model", "load_model": "model",
    "PatternKernel": "pattern_kernel", "PitKernel": "pit_kernel", "PitDeviceKernel": "pit_device",
    "attention": "", "prune": "", "shapes": "",
}  # fmt: skip


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'bsrgen' has no attribute {name!r}")
    module = import_module(f"bsrgen.{_MODULES[name] or name}")
    return getattr(module, name) if _MODULES[name] else module


__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "ArtifactCorruptError",
    "ArtifactError",
    "BsrgenError",
    "BuildError",
    "CapacityError",
    "CaptureError",
    "CompilerNotFoundError",
    "DeviceError",
    "DeviceKernel",
    "DynamicDeviceKernel",
    "DynamicKernel",
    "IncompatibleCPUError",
    "Kernel",
    "Model",
    "OutOfMemoryError",
    "PatternError",
    "PatternKernel",
    "PatternMismatchError",
    "PitDeviceKernel",
    "PitKernel",
    "PreparedDeviceWeight",
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
