"""The library of operators, the same for all models: runtime/bsrgen_onnx.c, built once into the store."""

from pathlib import Path

from bsrgen.build import build_runtime
from bsrgen.targets import Target

LIBRARY = "libbsrgen_onnx.so"
_TEXTS = ("bsrgen_onnx.c", "bsrgen_ort.h", "bsrgen.h")


def operators_for(target: Target) -> Path:
    """The library for the CPUs of a target's family.  BuildError, CompilerNotFoundError."""
    return build_runtime(_TEXTS, LIBRARY, target)
