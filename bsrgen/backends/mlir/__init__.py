"""The MLIR backend: plans, their text in sparse_tensor and linalg, and its way to LLVM IR."""

from bsrgen.backends.mlir.candidates import candidates
from bsrgen.backends.mlir.lower import identity
from bsrgen.backends.mlir.plan import MlirPlan
from bsrgen.backends.mlir.text import emit

__all__ = ["MlirPlan", "candidates", "emit", "identity"]
