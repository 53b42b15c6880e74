"""Arrays on a GPU, of whatever library: where they lie, as torch, __cuda_array_interface__ or DLPack say it."""

import ctypes
import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from bsrgen.dtypes import DTYPES, HOPPER
from bsrgen.errors import ArgumentError, ArgumentTypeError

CUDA_DEVICES = (2, 13)  # kDLCUDA, kDLCUDAManaged (dlpack.h)
_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}  # DLDataTypeCode


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """An array of a GPU: address, shape, strides in elements; `owner` keeps it alive."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: "np.dtype[Any]"
    device: int  # -1: the current one
    read_only: bool
    owner: Any

    @property
    def contiguous(self) -> bool:
        """Whether it is row-major without gaps."""
        expected = 1
        if 0 in self.shape:
            return True
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def span(self) -> tuple[int, int]:
        """Addresses from the first byte to behind the last; strides are not negative."""
        if 0 in self.shape:
            return self.pointer, self.pointer
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.pointer, self.pointer + (last + 1) * self.dtype.itemsize

    def leading(self, what: str) -> int:
        """Elements from row to row of a matrix.  ArgumentError where a row is not contiguous, or rows overlap."""
        (rows, columns), (row, column) = self.shape, self.strides
        if 0 in self.shape:
            return columns
        if (columns > 1 and column != 1) or (rows > 1 and row < columns):
            raise ArgumentError(f"{what} has strides {self.strides}: rows must be contiguous; copy it first")
        return row if rows > 1 else columns


def device_array(what: str, value: Any) -> DeviceArray:
    """`value` as a DeviceArray.  ArgumentTypeError for what is not an array of an NVIDIA GPU."""
    if _is_torch(value) and value.is_cuda:
        return _of_torch(what, value)
    asked = getattr(value, "__dlpack_device__", None)
    kind, device = asked() if asked else (None, -1)
    on_gpu = kind is None or int(kind) in CUDA_DEVICES
    interface = getattr(value, "__cuda_array_interface__", None) if on_gpu else None
    if interface is not None:
        return _of_interface(what, value, interface, int(device))
    if kind is not None and on_gpu:
        return of_capsule(what, value.__dlpack__(), value)
    where = "numpy array" if isinstance(value, np.ndarray) else type(value).__name__
    raise ArgumentTypeError(
        f"{what} is a {where} that is not on an NVIDIA GPU: this kernel takes device arrays, of torch, CuPy or what "
        "speaks __cuda_array_interface__ or DLPack"
    )


def empty(what: str, like: DeviceArray, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> Any:
    """A new array of the library and on the device of `like`.  ArgumentTypeError where that library is not known."""
    package = type(like.owner).__module__.partition(".")[0]
    if package == "torch":
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype.name), device=like.owner.device)
    if package == "cupy":
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(like.device):
            return cupy.empty(shape, dtype)
    raise ArgumentTypeError(f"{what}: no way to make an array of {type(like.owner).__name__}; give out=")


def zeros(what: str, like: DeviceArray, shape: tuple[int, ...], dtype: "np.dtype[Any]", stream: int) -> Any:
    """The same, filled with zeros on the stream of that handle."""
    array, package = empty(what, like, shape, dtype), type(like.owner).__module__.partition(".")[0]
    cuda, device = sys.modules[package].cuda, like.device
    if package == "cupy":
        with cuda.Device(device), cuda.ExternalStream(stream):
            array.fill(0)
        return array
    device = like.owner.device
    other = cuda.ExternalStream(stream, device) if stream else cuda.default_stream(device)  # 0 would make a new one
    with cuda.stream(other):
        return array.zero_()


def stream_of(like: DeviceArray, stream: Any) -> int:
    """The handle of `stream`: a number, a torch or CuPy stream, one with __cuda_stream__; None: the current one of the
    library that x is of, else the default one."""
    if stream is None:
        package = type(like.owner).__module__.partition(".")[0]
        if package == "torch":
            return int(sys.modules["torch"].cuda.current_stream(like.owner.device).cuda_stream)
        return int(sys.modules["cupy"].cuda.get_current_stream().ptr) if package == "cupy" else 0
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    handle = getattr(stream, "cuda_stream", getattr(stream, "ptr", stream))
    if isinstance(handle, bool) or not isinstance(handle, int):
        raise ArgumentTypeError(f"stream={stream!r}: a CUDA stream of torch or CuPy, or its handle as a number")
    return handle


def _is_torch(a: object) -> bool:
    return any(t.__name__ == "Tensor" and t.__module__ == "torch" for t in type(a).__mro__)


def _of_torch(what: str, a: Any) -> DeviceArray:
    if a.requires_grad and sys.modules["torch"].is_grad_enabled():
        raise ArgumentTypeError(f"{what} requires a gradient, which kernels do not have; give {what}.detach()")
    name = str(a.dtype).removeprefix("torch.")
    return DeviceArray(
        a.data_ptr(), tuple(a.shape), tuple(a.stride()), _dtype(what, name), a.device.index or 0, False, a
    )


def _of_interface(what: str, a: Any, interface: dict[str, Any], device: int) -> DeviceArray:
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    pointer, read_only = interface["data"]
    strides = interface.get("strides")
    if interface.get("mask") is not None:
        raise ArgumentTypeError(f"{what} is masked; give it without its mask")
    if strides is not None and any(s % dtype.itemsize or s < 0 for s in strides):
        raise ArgumentError(f"{what} has strides {strides} bytes: negative, or not whole elements; copy it first")
    steps = _packed(shape) if strides is None else tuple(s // dtype.itemsize for s in strides)
    return DeviceArray(int(pointer or 0), shape, steps, dtype, device, bool(read_only), a)


def _packed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _dtype(what: str, name: str) -> "np.dtype[Any]":
    if name in DTYPES | HOPPER:
        return (DTYPES | HOPPER)[name].numpy
    name = "bool" if name == "bool8" else name
    try:
        return np.dtype(name)
    except TypeError:
        raise ArgumentTypeError(f"{what} has dtype {name}, which no kernel has") from None


# ── DLPack: the capsule's struct, version 0.8 (dlpack.h) ─────────────────────────────────────────────────────────────


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


def of_capsule(what: str, capsule: Any, owner: Any) -> DeviceArray:
    """What a DLPack capsule points at.  The capsule is not consumed: it goes with the array that is returned."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    t = _Tensor.from_address(pointer(capsule, b"dltensor"))
    shape = tuple(t.shape[i] for i in range(t.ndim))
    strides = tuple(t.strides[i] for i in range(t.ndim)) if t.strides else _packed(shape)
    dtype = _dtype(what, f"{_CODES.get(t.code, 'unknown')}{t.bits}")
    if t.lanes != 1 or min(strides, default=0) < 0:
        raise ArgumentError(f"{what} has vectors as elements or negative strides; copy it first")
    return DeviceArray((t.data or 0) + t.byte_offset, shape, strides, dtype, t.device, False, (owner, capsule))
