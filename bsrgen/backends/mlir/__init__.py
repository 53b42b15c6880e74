"""The MLIR backend: plans, their text in sparse_tensor and linalg, and its way to LLVM IR, for CPUs and for GPUs."""

from collections.abc import Iterator
from typing import Any

from bsrgen.backends.mlir.candidates import candidates as cpu_candidates
from bsrgen.backends.mlir.gpu_candidates import LACKS, gpu_candidates
from bsrgen.backends.mlir.gpu_plan import MlirGpuPlan
from bsrgen.backends.mlir.gpu_text import emit_gpu, gpu_identity
from bsrgen.backends.mlir.lower import identity
from bsrgen.backends.mlir.plan import MlirPlan
from bsrgen.backends.mlir.text import emit as emit_cpu
from bsrgen.emit import Source
from bsrgen.errors import ArgumentError
from bsrgen.gpus import GpuTarget, as_gpus
from bsrgen.pattern import Weight
from bsrgen.problem import Problem
from bsrgen.targets import Target, as_targets

__all__ = ["LACKS", "MlirGpuPlan", "MlirPlan", "candidates", "emit", "identity", "targets", "tools"]


def targets(value: Any) -> tuple[Target, ...]:
    """Of compile's target=: ISA levels and microarchitectures, best first, or one for all GPUs."""
    names = value if isinstance(value, (tuple, list)) else (value,)
    gpus = [name for name in names if isinstance(name, str) and name.startswith("sm_")]
    if gpus and len(gpus) < len(names):
        raise ArgumentError(f"target={value!r}: one library is for CPUs or for GPUs; compile twice")
    return as_gpus(value) if gpus else as_targets(value)


def tools(targets: tuple[Target, ...]) -> str:
    """Names and versions of what makes the bytes."""
    return gpu_identity() if any(isinstance(target, GpuTarget) for target in targets) else identity()


def candidates(problem: Problem, target: Target, *, reblock: bool = True) -> Iterator[MlirPlan] | Iterator[MlirGpuPlan]:
    """Legal plans, a good guess first; without `reblock` only those over the problem's own blocks."""
    if isinstance(target, GpuTarget):
        return gpu_candidates(problem, target)
    return cpu_candidates(problem, target, reblock=reblock)


def emit(plans: tuple[Any, ...], weight: Weight) -> Source:
    """Sources and data of one artifact.  Pure: equal inputs and packages, equal bytes."""
    return emit_gpu(plans[0], weight) if isinstance(plans[0], MlirGpuPlan) else emit_cpu(plans, weight)
