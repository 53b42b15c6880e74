"""DynamicDeviceKernel: a kernel for NVIDIA GPUs whose weight comes with the call, prepared on the device."""

import functools
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from bsrgen.device import DeviceKernel
from bsrgen.device_arrays import DeviceArray, device_array, stream_of
from bsrgen.device_memory import interface
from bsrgen.dynamic import refuse_more
from bsrgen.errors import (
    ArgumentError,
    ArgumentTypeError,
    PatternError,
    PatternMismatchError,
    UnsupportedError,
)
from bsrgen.pattern import Weight

_BAD_INDPTR, _BAD_INDEX, _DUPLICATE = -4, -5, -6  # runtime/bsrgen.h
_INTEGERS = (np.dtype(np.int32), np.dtype(np.int64))


class PreparedDeviceWeight:
    """A weight made ready for one dynamic kernel on one device: its tables and packed values, `nbytes` of its memory.

    Made by `DynamicDeviceKernel.prepare`; any number of calls and streams may use it.  `nnzb` blocks are stored.  The
    memory is freed with it, which waits for what still runs on the device.
    """

    def __init__(self, kernel: "DynamicDeviceKernel", nbytes: int, device: int) -> None:
        self.kernel, self.nnzb, self.nbytes, self.device = kernel, 0, nbytes, device
        self._ordered = True  # whether blocks came in an order that the caller knows
        self.memory = kernel._new_memory(nbytes, device)
        weakref.finalize(self, kernel._give_back, self.memory).atexit = False

    def __repr__(self) -> str:
        return f"<bsrgen.PreparedDeviceWeight of {self.nnzb} blocks for {self.kernel.name}>"

    def update(self, data: Any, *, stream: Any = None) -> None:
        """New values for the same blocks, in the order they were given to `prepare`: [nnzb, R, C], in place.

        Launched on a stream, as a call is: returns at once, allocates nothing, a CUDA graph can record it.  The pattern
        is neither read nor planned again.  Errors: PatternError (shape), ArgumentError, ArgumentTypeError, and
        UnsupportedError for a weight of the host's memory that had to be converted; nothing has changed then.
        """
        if not self._ordered:
            raise UnsupportedError(f"{self.kernel.name}: the weight was converted when prepared; prepare it anew")
        values = self.kernel._data(data)
        if values.shape[0] != self.nnzb:
            raise PatternError(f"{self.kernel.name}: data has {values.shape[0]} blocks, the prepared {self.nnzb}")
        self.kernel._launch_prepare(self, (values, None, None), stream_of(values, stream))


class DynamicDeviceKernel(DeviceKernel):
    """A kernel for any weight of its shape, block shape and type with up to `nnzb` blocks: y = kernel(x, weight).

    Made by `bsrgen.compile(W, mode="dynamic", backend="cuda")`.  All else is as in DeviceKernel.  Of int8 the scales,
    w_scale, come with the call or with `compile`, or are ones.
    """

    _packs = "prepare"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.dtype == np.int8:
            ones = {"w_scale": np.ones(self.shape[0], np.float32)}
            self._values = self._bundle(ones | self._values.bound, "none", None, None)

    def _bind(self) -> None:
        super()._bind()
        self._prepared_bytes = self._in_library("prepared_bytes", "int64_t (*)(int64_t)")
        pointers = "void *, int, int, void *"
        self._prepare = self._in_library("prepare", f"int (*)(const struct bsrgen_weight *, int, int, {pointers})")
        self._prepared = self._in_library("prepared", "int (*)(const void *, int, void *, int64_t *)")

    def __call__(  # type: ignore[override]
        self, x: Any, weight: Any, out: Any = None, *, threads: int | None = None, stream: Any = None, **operands: Any
    ) -> Any:
        """Y = epilogue(product(weight, x)); x, out, stream, operands and errors as in DeviceKernel.

        weight: what `prepare` gave, or what it takes, which is then prepared for this call alone, and waited for.
        """
        ready = weight if isinstance(weight, PreparedDeviceWeight) else self.prepare(weight, stream=stream)
        if ready.kernel is not self:
            raise ArgumentTypeError(f"{self.name}: the weight was prepared for {ready.kernel.name}, not for this")
        return self._start(ready, x, out, threads, stream, operands)

    def prepare(
        self, weight: Any, *, into: PreparedDeviceWeight | None = None, check: bool = True, stream: Any = None
    ) -> PreparedDeviceWeight:
        """Bring a weight into the kernel's order, once for many calls, on the device.  Nothing of `weight` is kept.

        weight: (data, indices, indptr) as device arrays, or a torch sparse_bsr tensor of a GPU: data [nnzb, R, C] of
        the kernel's type, int32 or int64 indices and indptr; columns in any order within a block row, each once.  The
        result does not depend on that order.  Elements of a block outside of the matrix are not looked at.  What
        `compile` takes from the host's memory is taken too, converted and copied to the current device first.
        into: a prepared weight whose memory is taken where that is large enough; it stands for `weight` afterwards.
        check: wait for what the device finds in the pattern.  False waits for nothing and, with into=, allocates
        nothing, so that a CUDA graph can record it; a pattern that is not right then counts as one without blocks.

        Errors: CapacityError (more blocks than planned, and by how many), PatternError (shapes; with check: indptr, a
        column out of range, a block that comes twice), PatternMismatchError, ArgumentError, ArgumentTypeError.
        """
        if into is not None and into.kernel is not self:
            raise ArgumentTypeError(f"{self.name}: into= was prepared for {into.kernel.name}, not for this")
        if _is_on_host(weight):
            return self._from_host(weight, into, stream)
        arrays = self._triple(weight)
        handle, device = stream_of(arrays[0], stream), self._device(max(array.device for array in arrays))
        ready = self._prepare_there(arrays, device, into, handle)
        if check:
            self._look(ready, handle)
        return ready

    def _prepare_there(
        self, arrays: tuple[DeviceArray, DeviceArray, DeviceArray], device: int, into: PreparedDeviceWeight | None,
        stream: int,
    ) -> PreparedDeviceWeight:  # fmt: skip
        blocks = arrays[0].shape[0]
        refuse_more(self.name, blocks, self.pattern.nnzb)
        needed = int(self._prepared_bytes(blocks))
        if into is None or into.nbytes < needed or into.device != device:
            into = PreparedDeviceWeight(self, needed, device)
        into.nnzb, into._ordered = blocks, True
        self._launch_prepare(into, arrays, stream)
        return into

    def ready(self, weight: Weight) -> Callable[..., Any]:
        """Calls of this kernel for `weight`, which is copied to the current device."""
        return functools.partial(self, weight=self.prepare(weight))

    def update(self, W: Any) -> None:
        """A dynamic kernel has no values of its own.  UnsupportedError."""
        raise UnsupportedError(f"{self.name}: its weight comes with the call; prepare(W), or update what that gave")

    # ── from what callers hold to what C takes ───────────────────────────────────────────────────────────────────

    def _from_host(self, W: Any, into: PreparedDeviceWeight | None, stream: Any) -> PreparedDeviceWeight:
        """A weight of the host's memory: its arrays lie on the current device until it is prepared."""
        weight = W if isinstance(W, Weight) else self._weight(W)
        p = weight.pattern
        if p.shape != self.shape or p.blocksize != self.pattern.blocksize:
            raise PatternMismatchError(f"{self.name}: W is {p}, the kernel takes {self.pattern}")
        if weight.data.dtype != self.dtype:
            raise ArgumentTypeError(f"{self.name}: data has dtype {weight.data.dtype}, the kernel {self.dtype}")
        refuse_more(self.name, p.nnzb, self.pattern.nnzb)
        hosts = [np.ascontiguousarray(a) for a in (weight.data, p.indices, p.indptr)]
        memory: list[int] = []
        device = self._device(-1)
        try:
            memory += (self._to_device(a, device) for a in hosts)
            data, indices, indptr = (_there(pointer, a) for pointer, a in zip(memory, hosts, strict=True))
            handle = stream_of(data, stream)
            ready = self._prepare_there((data, indices, indptr), device, into, handle)
            self._look(ready, handle)
            ready._ordered = isinstance(W, Weight)
        finally:
            for pointer in memory:
                self._give_back(pointer)
        return ready

    def _triple(self, W: Any) -> tuple[DeviceArray, DeviceArray, DeviceArray]:
        """Data, indices and indptr, of shapes that go together and on one device."""
        if str(getattr(W, "layout", "")) == "torch.sparse_bsr":
            if (shape := tuple(map(int, W.shape))) != self.shape:
                raise PatternMismatchError(f"{self.name}: W has shape {shape}, the kernel {self.shape}")
            W = W.detach()
            W = W.values(), W.col_indices(), W.crow_indices()
        if not isinstance(W, (tuple, list)) or len(W) != 3:
            raise ArgumentTypeError(
                f"{self.name}: a weight of type {type(W).__name__}: give (data, indices, indptr) as device arrays, a "
                "torch sparse_bsr tensor of a GPU, or what prepare gave"
            )
        data, rows = self._data(W[0]), self.pattern.block_rows
        indices, indptr = self._numbers_of("indices", W[1]), self._numbers_of("indptr", W[2])
        if indptr.shape[0] != rows + 1:
            raise PatternError(f"{self.name}: indptr has {indptr.shape[0]} entries; {rows} block rows need {rows + 1}")
        if indices.shape[0] != data.shape[0]:
            raise PatternError(f"{self.name}: data has {data.shape[0]} blocks and there are {indices.shape[0]} indices")
        devices = {a.device for a in (data, indices, indptr) if a.device >= 0}
        if len(devices) > 1:
            raise ArgumentError(f"{self.name}: the arrays are on several devices: {sorted(devices)}")
        return data, indices, indptr

    def _data(self, value: Any) -> DeviceArray:
        array, blocksize = self._array("data", value, self._dtype), self.pattern.blocksize
        flat = len(array.shape) == 1 and blocksize == (1, 1)
        if not flat and array.shape[1:] != blocksize:
            raise PatternError(f"{self.name}: data has shape {array.shape}; the kernel needs (blocks, *{blocksize})")
        return self._contiguous("data", array)

    def _numbers_of(self, what: str, value: Any) -> DeviceArray:
        array = device_array(f"{self.name}: {what}", value)
        if array.dtype not in _INTEGERS or len(array.shape) != 1 or array.pointer % array.dtype.itemsize:
            raise ArgumentTypeError(
                f"{self.name}: {what} has dtype {array.dtype} and shape {array.shape}; int32 or int64, one dimension"
            )
        return self._contiguous(what, array)

    def _contiguous(self, what: str, array: DeviceArray) -> DeviceArray:
        if not (0 in array.shape or array.contiguous):
            raise ArgumentError(f"{self.name}: {what} of shape {array.shape} is not contiguous; copy it first")
        return array

    def _new_memory(self, nbytes: int, device: int) -> int:
        ffi = interface()
        self._must(self._upload(ffi.NULL, nbytes, device, to := ffi.new("void **")))
        return int(ffi.cast("uintptr_t", to[0]))

    @property
    def _give_back(self) -> Callable[[int], Any]:
        release = self._release  # the function alone: what is freed last must not keep the kernel
        return lambda memory: release(interface().cast("void *", memory))

    def _launch_prepare(
        self,
        ready: PreparedDeviceWeight,
        arrays: tuple[DeviceArray, DeviceArray | None, DeviceArray | None],
        stream: int,
    ) -> None:
        """The library's own preparation; without indices and indptr of the values alone."""
        ffi, (data, indices, indptr) = interface(), arrays
        weight = ffi.new("struct bsrgen_weight *")
        weight.blocks, weight.data = data.shape[0], ffi.cast("void *", data.pointer)
        widths = [0, 0]
        if indices is not None and indptr is not None:
            weight.indices = ffi.cast("int32_t *", indices.pointer)
            weight.indptr = ffi.cast("int64_t *", indptr.pointer)
            widths = [indices.dtype.itemsize, indptr.dtype.itemsize]
        memory, handle = ffi.cast("void *", ready.memory), ffi.cast("void *", stream)
        self._must(self._prepare(weight, *widths, memory, int(indices is None), ready.device, handle))

    def _look(self, ready: PreparedDeviceWeight, stream: int) -> None:
        ffi, where = interface(), interface().new("int64_t *")
        status = self._prepared(ffi.cast("void *", ready.memory), ready.device, ffi.cast("void *", stream), where)
        if status in (_BAD_INDPTR, _BAD_INDEX, _DUPLICATE):
            self._refuse(status, int(where[0]), ready.nnzb)
        self._must(status)

    def _refuse(self, status: int, where: int, blocks: int) -> NoReturn:
        """What the device found, in words."""
        rows, cols = self.pattern.block_rows, self.pattern.block_cols
        if status == _BAD_INDPTR:
            raise PatternError(
                f"{self.name}: indptr at block row {where} of {rows}: it must begin with 0, rise and end with {blocks}"
            )
        if status == _BAD_INDEX:
            raise PatternError(f"{self.name}: indices[{where}] is not one of the block columns 0 to {cols - 1}")
        i, j = divmod(where, cols)
        raise PatternError(f"{self.name}: block ({i}, {j}) comes more than once; sum them first")


def _is_on_host(W: Any) -> bool:
    """Whether a weight lies in the host's memory, as far as its kind says."""
    if isinstance(W, (tuple, list)):
        return all(isinstance(part, np.ndarray) for part in W)
    return isinstance(W, (Weight, np.ndarray)) or hasattr(W, "tocoo")


def _there(pointer: int, like: NDArray[Any]) -> DeviceArray:
    """An array like one of the host, where its bytes lie on the current device."""
    steps = tuple(step // like.itemsize for step in like.strides)
    return DeviceArray(pointer, like.shape, steps, like.dtype, -1, False, None)
