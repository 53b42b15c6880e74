"""Where plans race and kernels are examined: on this CPU, or on a GPU that is here; numpy arrays in and out on both."""

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bsrgen import clock, driver, gpu_clock
from bsrgen.artifact import Artifact
from bsrgen.errors import DeviceError
from bsrgen.gpus import GpuTarget, runs_on
from bsrgen.kernel import Kernel
from bsrgen.loading import kernel_of
from bsrgen.pattern import Weight
from bsrgen.targets import Target, native
from bsrgen.trampoline import trampoline

Array = NDArray[Any]
UNCHECKED = "not checked by execution: no GPU that was there runs it"  # a manifest's note
Contender = Callable[..., Any]  # called as a kernel for the CPU is


class Track(Protocol):
    """A place to run kernels at."""

    @property
    def where(self) -> str:
        """What figures taken here are of; "" for this CPU."""

    def entered(self) -> AbstractContextManager[None]:
        """Everything below happens within."""

    def load(self, artifact: Artifact, weight: Weight) -> Contender:
        """A kernel that takes and gives numpy arrays, for `weight`, which a static one has in it."""

    def measure(
        self, contenders: Mapping[str, Contender], x: Array, out: Array, given: Mapping[str, Any], **how: Any
    ) -> dict[str, clock.Timing]:
        """Seconds of a call of each, in alternation; `how` is what clock.measure takes."""

    def leave(self, folders: Iterable[Path]) -> None:
        """Nobody will call the kernels of these artifacts again."""


@dataclass(frozen=True, slots=True)
class CpuTrack:
    """One core of this CPU."""

    where: str = ""

    def entered(self) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()

    def load(self, artifact: Artifact, weight: Weight) -> Contender:
        """The kernel, of one thread."""
        return kernel_of(artifact, threads=1).ready(weight)

    def measure(
        self, contenders: Mapping[str, Contender], x: Array, out: Array, given: Mapping[str, Any], **how: Any
    ) -> dict[str, clock.Timing]:
        """By the clock of this CPU, pinned to one core."""
        calls: dict[str, clock.Call] = {
            name: functools.partial(kernel, x, out=out, **given) for name, kernel in contenders.items()
        }
        return clock.measure(calls, **how)

    def leave(self, folders: Iterable[Path]) -> None:
        """Close their libraries."""
        for folder in folders:
            trampoline().unload(folder)


class HostCalls:
    """A kernel for GPUs, called with numpy arrays: they go to the current GPU and come back."""

    def __init__(self, kernel: Kernel, weight: Weight) -> None:
        self.kernel = kernel.ready(weight)

    def __call__(self, x: Array, out: Array, threads: int | None = None, **given: Any) -> Array:
        """As Kernel's; waits for the result.  DeviceError where the launch or the kernel failed."""
        y = driver.Buffer(np.ascontiguousarray(out))
        self.kernel(driver.Buffer(x), out=y, **on_device(given))
        out[...] = y.fetch()
        return out


def on_device(given: Mapping[str, Any]) -> dict[str, Any]:
    """Operands with their arrays on the current GPU."""
    return {name: driver.Buffer(np.asarray(a)) if np.ndim(a) else a for name, a in given.items()}


def sampled(kernel: Any, arrays: Iterable[Array], shape: tuple[int, ...], numbers: Mapping[str, Any]) -> Array:
    """The result of a kernel of a pattern, from numpy arrays: on one thread of this CPU, or on the current GPU."""
    if kernel.artifact.manifest.device == "cpu":
        found: Array = kernel(*arrays, threads=1, **numbers)
        return found
    y = driver.Buffer(np.full(shape, np.nan, kernel.out_dtype))
    kernel(*map(driver.Buffer, arrays), out=y, **numbers)
    return y.fetch()


@dataclass(frozen=True, slots=True)
class GpuTrack:
    """A GPU of this machine."""

    gpu: driver.Gpu

    @property
    def where(self) -> str:
        """Its name and the driver's version, which counts for times as well."""
        return f"{self.gpu.name}, CUDA driver {driver.version()}"

    def entered(self) -> AbstractContextManager[None]:
        """Make it the current one."""
        return driver.on(self.gpu.number)

    def load(self, artifact: Artifact, weight: Weight) -> Contender:
        """The kernel behind copies to the GPU and back."""
        return HostCalls(kernel_of(artifact), weight)

    def measure(
        self, contenders: Mapping[str, Contender], x: Array, out: Array, given: Mapping[str, Any], **how: Any
    ) -> dict[str, clock.Timing]:
        """By events of the GPU around graphs of launches: neither Python nor launches are in the times."""
        there, y, operands = driver.Buffer(x), driver.Buffer(out), on_device(given)
        launches: dict[str, gpu_clock.Launch] = {
            name: functools.partial(_launch, contender, there, y, operands) for name, contender in contenders.items()
        }
        return gpu_clock.measure(launches, **how)

    def leave(self, folders: Iterable[Path]) -> None:
        """They stay mapped: the CUDA runtime in them may have threads."""


def _launch(contender: Contender, x: Any, out: Any, given: Mapping[str, Any], stream: int) -> object:
    assert isinstance(contender, HostCalls)
    return contender.kernel(x, out=out, stream=stream, **given)


def on_cpu(target: Target) -> Track | None:
    """Where code for `target` is timed: here, or nowhere."""
    here = target.family == native().family and set(target.requires) <= set(native().requires)
    return CpuTrack() if here else None


def on_gpu(target: GpuTarget) -> GpuTrack | None:
    """The first GPU of this machine that runs code for `target`; None where there is none, or no driver."""
    return gpu_of(target.archs)


def track_of(target: Target) -> Track | None:
    """Where plans for `target` are timed; None: not on this machine."""
    return on_gpu(target) if isinstance(target, GpuTarget) else on_cpu(target)


def gpu_of(archs: tuple[str, ...]) -> GpuTrack | None:
    """The first GPU here that a library with code for `archs` runs on."""
    try:
        return next((GpuTrack(gpu) for gpu in driver.gpus() if runs_on(archs, gpu.capability)), None)
    except DeviceError:
        return None
