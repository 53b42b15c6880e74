"""Where the GPU benchmark runs: on a GPU through torch, or in a rehearsal on the CPU, which shows no speed."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bsrgen import driver
from bsrgen.workspaces import workspaces

Array = np.ndarray[Any, Any]
Call = Callable[[], object]
SAMPLE_S = 500e-6
MOST_CALLS = 200
WARM = 3


@dataclass(frozen=True, slots=True)
class Timer:
    """`once` launches `calls` calls; `single` one.  how: "graph", or "launches" where none could be recorded."""

    once: Call
    single: Call
    calls: int
    how: str


class Stage(Protocol):
    """A machine: facts, arrays, and seconds between two points of its stream."""

    name: str
    real: bool
    device: str  # torch's name of it
    handle: int  # of its stream

    def entered(self) -> AbstractContextManager[object]: ...
    def facts(self) -> dict[str, Any]: ...
    def array(self, host: Array) -> Any: ...
    def host(self, array: Any, dtype: "np.dtype[Any]") -> Array: ...
    def timer(self, call: Call) -> Timer: ...
    def sample(self, timer: Timer, cold: bool) -> float: ...
    def alive(self) -> bool: ...


class TorchStage:
    """A GPU.  Everything runs on one stream of torch's, which its libraries and our kernels take as the current one."""

    real = True
    device = "cuda"

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.gpu = driver.gpus()[0]
        self.name = self.gpu.name
        self.stream = torch.cuda.Stream()
        self.handle = int(self.stream.cuda_stream)
        self._flush = torch.empty(max(4 * self.gpu.l2_bytes, 64 << 20), dtype=torch.int8, device="cuda")

    def entered(self) -> AbstractContextManager[object]:
        """Its stream as torch's current one."""
        found: AbstractContextManager[object] = self.torch.cuda.stream(self.stream)
        return found

    def facts(self) -> dict[str, Any]:
        """What was measured on."""
        torch = self.torch
        return {
            "device": self.gpu.name, "capability": list(self.gpu.capability), "sms": self.gpu.sms,
            "l2_bytes": self.gpu.l2_bytes, "memory_bytes": self.gpu.memory_bytes, "driver_cuda": driver.version(),
            "driver": _driver_release(), "torch": torch.__version__, "torch_cuda": torch.version.cuda,
        }  # fmt: skip

    def array(self, host: Array) -> Any:
        """A tensor of the GPU."""
        host = np.ascontiguousarray(host)
        if host.dtype.name == "bfloat16":
            return self.torch.from_numpy(host.view(np.int16)).cuda().view(self.torch.bfloat16)
        return self.torch.from_numpy(host).cuda()

    def host(self, array: Any, dtype: "np.dtype[Any]") -> Array:
        """And back, in the numpy type of the same name."""
        bits = array.contiguous().view(self.torch.int16) if dtype.name == "bfloat16" else array.contiguous()
        found: Array = bits.cpu().numpy()
        return found.view(dtype)

    def timer(self, call: Call) -> Timer:
        """As a CUDA graph, so that launches cost nothing in between; without one where the call cannot be recorded."""
        for _ in range(WARM):
            call()
        self.stream.synchronize()
        seconds = min(self._between(call) for _ in range(WARM))
        calls = max(1, min(MOST_CALLS, math.ceil(SAMPLE_S / max(seconds, 2e-6))))
        try:
            return Timer(self._graph(call, calls), self._graph(call, 1), calls, "graph")
        except RuntimeError:  # what torch raises where a call waits or allocates
            self.stream.synchronize()
            return Timer(lambda: [call() for _ in range(calls)], call, calls, "launches")

    def sample(self, timer: Timer, cold: bool) -> float:
        """Seconds of a call: hot after one untimed turn; cold after writing four times the L2."""
        if not cold:
            timer.single()
            return self._between(timer.once) / timer.calls
        self._flush.zero_()
        return self._between(timer.single)

    def alive(self) -> bool:
        """Whether it still works: an address outside of every array ends a context for good."""
        try:
            self.torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def _graph(self, call: Call, calls: int) -> Call:
        graph = self.torch.cuda.CUDAGraph()
        recorded = self.torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local")
        with workspaces().in_turn(), recorded:
            for _ in range(calls):
                call()
        graph.replay()
        self.stream.synchronize()
        replay: Call = graph.replay
        return replay

    def _between(self, call: Call) -> float:
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(self.stream)
        call()
        end.record(self.stream)
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3


def _driver_release() -> str:
    """The number of the driver's package, which the kernel module tells."""
    try:
        with open("/proc/driver/nvidia/version") as file:
            words = file.readline().split()
        return next((word for word in words if word[:1].isdigit()), "")
    except OSError:
        return ""


class RehearsalStage:
    """The CPU: kernels under the emulation, numpy for the rest, a clock of its own that counts calls."""

    real = False
    device, handle = "cpu", 0
    name = "rehearsal on the CPU, no GPU, no figures"

    def entered(self) -> AbstractContextManager[object]:
        """The emulated device (see rehearse.py) as the current one."""
        return driver.on(0) if driver.gpus() else nullcontext()

    def facts(self) -> dict[str, Any]:
        """That nothing was measured."""
        return {"device": self.name, "capability": list(driver.gpus()[0].capability), "driver": "", "driver_cuda": ""}

    def array(self, host: Array) -> Any:
        """Memory of the emulated device."""
        return driver.Buffer(np.ascontiguousarray(host))

    def host(self, array: Any, dtype: "np.dtype[Any]") -> Array:
        """And back."""
        found: Array = array.fetch() if isinstance(array, driver.Buffer) else array
        return found.view(dtype)

    def timer(self, call: Call) -> Timer:
        """Two calls a sample."""
        call()
        return Timer(lambda: [call(), call()], call, 2, "rehearsed")

    def sample(self, timer: Timer, cold: bool) -> float:
        """Of this CPU's clock; it means nothing."""
        started = time.perf_counter()
        (timer.single if cold else timer.once)()
        return (time.perf_counter() - started) / (1 if cold else timer.calls) + 1e-9

    def alive(self) -> bool:
        """A CPU is."""
        return True
