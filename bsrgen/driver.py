"""The CUDA driver, asked without compiler or runtime: which GPUs there are; memory, copies, events, graphs on one."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.errors import DeviceError

Array = NDArray[Any]
LIBRARY = "libcuda.so.1"  # of the driver's package, never of a toolkit's
_SMS, _CYCLE_KHZ, _L2, _MAJOR, _MINOR = 16, 13, 38, 75, 76  # CUdevice_attribute (cuda.h)
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE: what other threads do meanwhile does not end a capture
_FUNCTIONS = """
int cuInit(unsigned flags); int cuDriverGetVersion(int *version); int cuGetErrorString(int error, const char **words);
int cuDeviceGetCount(int *count); int cuDeviceGet(int *device, int number);
int cuDeviceGetName(char *name, int bytes, int device); int cuDeviceTotalMem_v2(size_t *bytes, int device);
int cuDeviceGetAttribute(int *value, int which, int device);
int cuDevicePrimaryCtxRetain(void **context, int device);
int cuCtxPushCurrent_v2(void *context); int cuCtxPopCurrent_v2(void **context);
int cuMemAlloc_v2(uint64_t *memory, size_t bytes); int cuMemFree_v2(uint64_t memory);
int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t bytes);
int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t bytes);
int cuMemsetD8Async(uint64_t memory, unsigned char value, size_t bytes, void *stream);
int cuStreamCreate(void **stream, unsigned flags); int cuStreamSynchronize(void *stream);
int cuStreamDestroy_v2(void *stream); int cuStreamBeginCapture_v2(void *stream, int mode);
int cuStreamEndCapture(void *stream, void **graph);
int cuGraphInstantiateWithFlags(void **executable, void *graph, uint64_t flags);
int cuGraphLaunch(void *executable, void *stream); int cuGraphExecDestroy(void *executable);
int cuGraphDestroy(void *graph);
int cuEventCreate(void **event, unsigned flags); int cuEventRecord(void *event, void *stream);
int cuEventSynchronize(void *event); int cuEventElapsedTime(float *ms, void *begin, void *end);
int cuEventDestroy_v2(void *event);
"""


@dataclass(frozen=True, slots=True)
class Gpu:
    """What the driver says of a GPU; `number` counts those that this process may see."""

    number: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    sms: int
    l2_bytes: int
    ghz: float

    def __str__(self) -> str:
        major, minor = self.capability
        size = f"{self.memory_bytes / 2**30:.1f} GiB"
        return f"{self.name}: compute capability {major}.{minor}, {self.sms} SMs, {size}, L2 {self.l2_bytes >> 20} MiB"


@dataclass(frozen=True, slots=True)
class Driver:
    """The driver's functions, and their results: DeviceError in words for all but success."""

    ffi: Any
    library: Any

    def call(self, name: str, *arguments: Any) -> None:
        """A function of the driver."""
        if status := getattr(self.library, name)(*arguments):
            words = self.ffi.new("const char **")
            known = self.library.cuGetErrorString(status, words) == 0 and words[0] != self.ffi.NULL
            text = self.ffi.string(words[0]).decode(errors="replace") if known else "unknown error"
            raise DeviceError(f"{name}: {text} (CUDA error {status})")

    def get(self, kind: str, name: str, *arguments: Any) -> Any:
        """What a function writes to its first argument, a pointer to `kind`."""
        to = self.ffi.new(f"{kind} *")
        self.call(name, to, *arguments)
        return to[0]


@functools.cache
def driver() -> Driver:
    """The driver, ready.  DeviceError where there is none, or where it finds no GPU."""
    import cffi

    ffi = cffi.FFI()
    ffi.cdef(_FUNCTIONS)
    try:
        found = Driver(ffi, ffi.dlopen(LIBRARY))
    except OSError as e:
        raise DeviceError(f"no usable NVIDIA driver: {LIBRARY} cannot be loaded") from e
    found.call("cuInit", 0)
    return found


def version() -> str:
    """The newest CUDA that the driver knows, e.g. "13.0"."""
    number = driver().get("int", "cuDriverGetVersion")
    return f"{number // 1000}.{number % 1000 // 10}"


def gpus() -> tuple[Gpu, ...]:
    """All GPUs that this process may see, CUDA's first one first.  DeviceError without a driver or a GPU."""
    d = driver()
    found = []
    for number in range(d.get("int", "cuDeviceGetCount")):
        device = d.get("int", "cuDeviceGet", number)
        ask = functools.partial(_attribute, d, device)
        name = d.ffi.new("char[]", 256)
        d.call("cuDeviceGetName", name, 256, device)
        memory = d.get("size_t", "cuDeviceTotalMem_v2", device)
        found.append(Gpu(number, d.ffi.string(name).decode(errors="replace"), (ask(_MAJOR), ask(_MINOR)), int(memory),
                         ask(_SMS), ask(_L2), ask(_CYCLE_KHZ) / 1e6))  # fmt: skip
    if not found:
        raise DeviceError("the NVIDIA driver shows no GPU to this process")
    return tuple(found)


def _attribute(d: Driver, device: int, which: int) -> int:
    return int(d.get("int", "cuDeviceGetAttribute", which, device))


@functools.cache  # retained for the life of the process, as CUDA's runtime does
def _context(number: int) -> Any:
    d = driver()
    return d.get("void *", "cuDevicePrimaryCtxRetain", d.get("int", "cuDeviceGet", number))


@contextlib.contextmanager
def on(number: int) -> Iterator[None]:
    """Make a GPU this thread's current one: its primary context, which CUDA's runtime and all libraries on it share."""
    d = driver()
    d.call("cuCtxPushCurrent_v2", _context(number))
    try:
        yield
    finally:
        d.call("cuCtxPopCurrent_v2", d.ffi.new("void **"))


class Buffer:
    """A copy of a numpy array, or of a view and all around it, on the current GPU.

    It speaks __cuda_array_interface__, bfloat16 as the 16-bit numbers that it is made of.  Its memory is freed with it.
    """

    def __init__(self, array: Array) -> None:
        base = array if array.base is None or not isinstance(array.base, np.ndarray) else array.base
        d = driver()
        self._view, self._base = array, base
        self.pointer = int(d.get("uint64_t", "cuMemAlloc_v2", max(base.nbytes, 1)))
        weakref.finalize(self, _free, d, self.pointer).atexit = False
        self._to(np.ascontiguousarray(base))
        start = self.pointer + (array.ctypes.data - base.ctypes.data if base is not array else 0)
        typestr = "<u2" if array.dtype.name == "bfloat16" else array.dtype.str
        self.__cuda_array_interface__ = {
            "shape": array.shape, "typestr": typestr, "data": (start, False), "strides": array.strides, "version": 3,
        }  # fmt: skip

    def _to(self, host: Array) -> None:
        d = driver()
        if host.nbytes:
            d.call("cuMemcpyHtoD_v2", self.pointer, d.ffi.cast("void *", host.ctypes.data), host.nbytes)

    def store(self, array: Array) -> None:
        """Other content: `array` is like the one that this was made of, base and all."""
        self._view[...] = array
        self._to(np.ascontiguousarray(self._base))

    def fetch(self) -> Array:
        """What is there now, waited for; also in the array that this one was made of."""
        d = driver()
        if self._base.nbytes:
            d.call("cuMemcpyDtoH_v2", d.ffi.cast("void *", self._base.ctypes.data), self.pointer, self._base.nbytes)
        return self._view


def _free(d: Driver, pointer: int) -> None:
    d.library.cuMemFree_v2(pointer)


class Stream:
    """A stream of the current GPU; `handle` is what kernels take."""

    def __init__(self) -> None:
        d = driver()
        self._stream = d.get("void *", "cuStreamCreate", 1)  # which does not wait for the default stream
        self.handle = int(d.ffi.cast("uintptr_t", self._stream))
        weakref.finalize(self, d.library.cuStreamDestroy_v2, self._stream).atexit = False

    def wait(self) -> None:
        """Until all is done.  DeviceError where something of it failed."""
        driver().call("cuStreamSynchronize", self._stream)

    def fill(self, buffer: Buffer, value: int, count: int) -> None:
        """Write the byte `value` to the first `count` bytes of a buffer."""
        driver().call("cuMemsetD8Async", buffer.pointer, value, count, self._stream)

    def graph(self, work: Callable[[], object]) -> Callable[[], None]:
        """What `work` launches on this stream, as a graph: the result launches it again."""
        d = driver()
        d.call("cuStreamBeginCapture_v2", self._stream, _THREAD_LOCAL)
        try:
            work()
        finally:
            graph = d.ffi.new("void **")
            status = d.library.cuStreamEndCapture(self._stream, graph)
        if status:
            raise DeviceError(f"a CUDA graph cannot hold these launches (CUDA error {status})")
        executable = d.get("void *", "cuGraphInstantiateWithFlags", graph[0], 0)
        d.call("cuGraphDestroy", graph[0])
        replay = functools.partial(_replay, d, executable, self)
        weakref.finalize(replay, d.library.cuGraphExecDestroy, executable).atexit = False
        return replay


def _replay(d: Driver, executable: Any, stream: Stream) -> None:
    d.call("cuGraphLaunch", executable, stream._stream)


class Span:
    """Seconds between two points of a stream."""

    def __init__(self, stream: Stream) -> None:
        d = driver()
        self._stream = stream
        self._events = [d.get("void *", "cuEventCreate", 0) for _ in range(2)]
        for event in self._events:
            weakref.finalize(self, d.library.cuEventDestroy_v2, event).atexit = False

    def begin(self) -> None:
        """The first point is here."""
        driver().call("cuEventRecord", self._events[0], self._stream._stream)

    def end_s(self) -> float:
        """The second point is here: wait for it.  Resolution: about half a microsecond (CUDA driver API, Events)."""
        d = driver()
        d.call("cuEventRecord", self._events[1], self._stream._stream)
        d.call("cuEventSynchronize", self._events[1])
        return float(d.get("float", "cuEventElapsedTime", *self._events)) * 1e-3
