"""ResidentKernel: what a kernel of a GPU keeps there, and the memory that its calls share with others."""

import functools
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from bsrgen.errors import DeviceError
from bsrgen.kernel import Kernel
from bsrgen.scratches import Memory, Piece, scratches
from bsrgen.trampoline import STRUCTS
from bsrgen.valued import Array, _Values
from bsrgen.workspaces import WORKSPACE_BYTES, workspaces


@dataclass(frozen=True, slots=True, eq=False)
class _Resident:
    """What lies on one device for good: packed values, and the operands that are bound to the kernel."""

    values: _Values  # those that it is a copy of
    packed: int
    bound: dict[str, int]


class ResidentKernel(Kernel):
    """A kernel whose values lie on devices: copied there once, given back with it."""

    def _bind(self) -> None:
        self._residents: dict[int, _Resident] = {}
        self._lock = threading.Lock()  # no memory is released between where it is looked up and the launch
        super()._bind()
        self._launch = self._in_library("call", "int (*)(const struct bsrgen_call *)")
        self._upload = self._in_library("upload", "int (*)(const void *, int64_t, int, void **)")
        self._release = self._in_library("release", "int (*)(void *)")
        self._current = self._in_library("device", "int (*)(int *)")
        self._words = self._in_library("error", "const char *(*)(int)")
        m = self.artifact.manifest
        captures = m.workspace_bytes or m.scratch
        self._capture = self._in_library("capture", "int (*)(void *, uint64_t *)") if captures else None
        self._scratch_of = self._in_library("scratch", "int64_t (*)(int64_t)") if m.scratch else None
        weakref.finalize(self, release_all, self._residents, self._release).atexit = False

    def _in_library(self, name: str, signature: str) -> Any:
        """A function of the library, by its C type."""
        path, m = self._tramp, self.artifact.manifest
        library = path.library(self.artifact.library.absolute(), m.files[m.library])
        address = int(path.ffi.cast("uintptr_t", path.function(library, f"{m.name}_{name}")))
        return interface().cast(signature, address)

    def upload(self, device: int = -1, n: int = 0) -> None:
        """Copy the values, and operands that are bound, to a device (-1: the current one), unless they are there.

        Kernels whose thread blocks share work find memory for it in the next CUDA graph, too, and those that turn X
        scratch memory for calls of up to n tokens there."""
        device = self._device(device)
        with self._lock:
            self._resident(self._values, device)
            if self._scratch_of and (needed := int(self._scratch_of(n))):
                scratches().reserve(self._memory(device), needed)
            if self.artifact.manifest.workspace_bytes:
                workspaces().reserve(device, functools.partial(self._zeros, device))

    def _device(self, device: int) -> int:
        """The number of a device: of -1, that which is current to this thread."""
        if device >= 0:
            return device
        number = interface().new("int *")
        self._must(self._current(number))
        return int(number[0])

    def _workspace(self, device: int, stream: int, n: int) -> int:
        """Where thread blocks leave partial sums in a call on a stream; 0: nowhere, the same bits in more time."""
        if n > self.artifact.manifest.workspace_n:
            return 0
        return workspaces().of(device, stream, self._recorded(stream), functools.partial(self._zeros, device))

    def _recorded(self, stream: int) -> int:
        """The number of the capture that a stream is in; 0: none."""
        capture = interface().new("uint64_t *")
        assert self._capture
        self._must(self._capture(interface().cast("void *", stream), capture))
        return int(capture[0])

    def _scratch(self, device: int, stream: int, n: int) -> AbstractContextManager[Piece]:
        """Where X of a call is turned; nothing for calls that turn none."""
        needed = int(self._scratch_of(n)) if self._scratch_of else 0
        if not needed:
            return nullcontext(Piece())
        return scratches().lent(self._memory(device), stream, self._recorded(stream), needed)

    def _memory(self, device: int) -> Memory:
        """A device's memory, through this library; any other one's may give it back."""
        return Memory(device, functools.partial(self._allocate, device), self._give_back)

    def _allocate(self, device: int, bytes_: int) -> int:
        return self._copied(interface().NULL, bytes_, device)

    def _give_back(self, address: int) -> None:
        self._must(self._release(interface().cast("void *", address)))

    def _zeros(self, device: int) -> int:
        return self._to_device(np.zeros(WORKSPACE_BYTES, np.uint8), device)

    def _resident(self, values: _Values, device: int) -> _Resident:
        found = self._residents.get(device)
        if found is None or found.values is not values:
            bound = {name: self._to_device(self._bound(name, values), device) for name in self._rows_bound(values)}
            packed = self._to_device(values.packed, device)
            old, self._residents[device] = found, (found := _Resident(values, packed, bound))
            if old:
                release_all({device: old}, self._release)
        return found

    def _rows_bound(self, values: _Values) -> list[str]:
        return [o.name for o in self._call.operands if o.kind == "row" and o.name in values.bound]

    def _bound(self, name: str, values: _Values) -> Array:
        return np.ascontiguousarray(values.bound[name], self._call.dtypes[name])

    def _to_device(self, host: Array | None, device: int) -> int:
        """New memory of a device with the bytes of `host`, or with the values of the library."""
        ffi = interface()
        data = ffi.NULL if host is None else ffi.cast("void *", host.ctypes.data)
        return self._copied(data, 0 if host is None else host.nbytes, device)

    def _copied(self, data: Any, bytes_: int, device: int) -> int:
        ffi = interface()
        to = ffi.new("void **")
        self._must(self._upload(data, bytes_, device, to))
        return int(ffi.cast("uintptr_t", to[0]))

    def _must(self, status: int) -> None:
        if status:
            words = interface().string(self._words(status)).decode(errors="replace")
            raise DeviceError(f"{self.name}: {words} (status {status}; built for {self.plan.target})")


def release_all(residents: dict[int, _Resident], release: Callable[[Any], int]) -> None:
    """Give the memory of a kernel back that is not called any more; cudaFree waits for what still runs."""
    for resident in residents.values():
        for memory in (resident.packed, *resident.bound.values()):
            release(interface().cast("void *", memory))


@functools.cache
def interface() -> Any:
    """cffi's, with the structs of the ABI."""
    import cffi

    ffi = cffi.FFI()
    ffi.cdef(STRUCTS)
    return ffi
