"""The CUDA backend: plans for NVIDIA GPUs and their text, device and host."""

from bsrgen.backends.cuda.candidates import LACKS, candidates
from bsrgen.backends.cuda.matrix import MatrixPlan
from bsrgen.backends.cuda.plan import CudaPlan, Lanes
from bsrgen.backends.cuda.text import emit
from bsrgen.backends.cuda.trial import trial

__all__ = ["LACKS", "CudaPlan", "Lanes", "MatrixPlan", "candidates", "emit", "trial"]
