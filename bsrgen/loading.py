"""Load: from an artifact to the kernel of its kind."""

import os
from pathlib import Path

from bsrgen.artifact import Artifact, read_artifact
from bsrgen.device import DeviceKernel
from bsrgen.dynamic import DynamicKernel
from bsrgen.dynamic_device import DynamicDeviceKernel
from bsrgen.kernel import Kernel
from bsrgen.operators import PATTERN_OPERATORS
from bsrgen.pattern_device import PatternDeviceKernel
from bsrgen.pattern_kernel import PatternKernel
from bsrgen.pit_device import PitDeviceKernel
from bsrgen.pit_kernel import PitKernel


def load(folder: str | os.PathLike[str], *, threads: int | None = None, expect_sha256: str | None = None) -> Kernel:
    """Load the artifact in `folder`.  Never compiles; every file is checked before anything is mapped.

    threads: default for calls, None means all usable cores.  expect_sha256: the manifest's digest, when the caller
    knows whose artifact it must be.  Errors: ArtifactError, ArtifactCorruptError, IncompatibleCPUError.
    """
    return kernel_of(read_artifact(Path(folder), expect_sha256), threads=threads)


def kernel_of(artifact: Artifact, *, threads: int | None = None, may_be_foreign: bool = False) -> Kernel:
    """The kernel of an artifact: for CPU or GPU, of a weight, of weights to come or of a pattern; see Kernel."""
    m = artifact.manifest
    kind: type[Kernel] = DynamicKernel if m.mode == "dynamic" else PitKernel if m.pit else Kernel
    if m.operator in PATTERN_OPERATORS:
        kind = PatternDeviceKernel if m.device == "cuda" else PatternKernel
    elif m.device == "cuda":
        kind = DynamicDeviceKernel if m.mode == "dynamic" else PitDeviceKernel if m.pit else DeviceKernel
    return kind(artifact, threads=threads, may_be_foreign=may_be_foreign)
