"""A rehearsal of the GPU benchmark: its whole script on the CPU, kernels under the tests' emulation, a clock that means
nothing.  It shows that the script does not break; nothing in it has run on a GPU."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu.stages import RehearsalStage

TESTS = Path(__file__).parents[2] / "tests"


@contextmanager
def emulated() -> Iterator[None]:
    """CUDA kernels are built for the CPU, and the driver is tests/cuda/libcuda.c.  Needs the extra `test`."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    import pytest
    from device_emulation import build_emulated
    from gpu_places import emulated_driver

    from bsrgen.backends import BACKENDS

    row = replace(BACKENDS["cuda"], tools=lambda targets: "emulated")
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr("bsrgen.build.build", build_emulated)
        patch.setattr("bsrgen.backends.BACKENDS", BACKENDS | {"cuda": row})
        stack.enter_context(emulated_driver(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
        yield


def stage() -> RehearsalStage:
    """The place to rehearse at."""
    return RehearsalStage()
