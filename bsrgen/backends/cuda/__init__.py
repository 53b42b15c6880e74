"""The CUDA backend: plans for NVIDIA GPUs and their text, device and host."""

from typing import Any

from bsrgen.backends.cuda import hopper_text, text
from bsrgen.backends.cuda.candidates import LACKS, candidates
from bsrgen.backends.cuda.hopper import HopperPlan
from bsrgen.backends.cuda.matrix import MatrixPlan
from bsrgen.backends.cuda.pattern_candidates import plan_pattern
from bsrgen.backends.cuda.pattern_text import emit_pattern
from bsrgen.backends.cuda.plan import CudaPlan, Lanes
from bsrgen.backends.cuda.trial import trial
from bsrgen.emit import Source
from bsrgen.pattern import Weight

__all__ = [
    "LACKS", "CudaPlan", "HopperPlan", "Lanes", "MatrixPlan", "candidates", "emit", "emit_pattern", "plan_pattern",
    "trial",
]  # fmt: skip


def emit(plans: tuple[Any, ...], weight: Weight) -> Source:
    """Sources and data of one artifact: device text, host text, the packed values.  Pure: equal inputs, equal bytes."""
    return hopper_text.emit(plans, weight) if isinstance(plans[0], HopperPlan) else text.emit(plans, weight)
