"""The plans of the MLIR backend for GPUs: the SIMT kernel of the CUDA backend, cut into pieces of one warp each."""

from typing import Any, ClassVar

from bsrgen.backends.cuda.plan import CudaPlan


class MlirGpuPlan(CudaPlan):
    """Knobs of an MLIR kernel for GPUs.  A piece has the rows of one warp, whose pieces are a sparse tensor."""

    backend: ClassVar[str] = "mlir"

    def __str__(self) -> str:
        return f"MLIR for GPUs: {super().__str__().partition(': ')[2]}"

    def knobs(self) -> dict[str, Any]:
        """The decisions alone, as plain data."""
        return super().knobs() | {"backend": self.backend, "device": "cuda"}

    @property
    def row_pieces(self) -> int:
        """One for each strip of rows; warps of a thread block have neighbouring ones, and share their columns of X."""
        return -(-self.problem.pattern.R // self.rows)
