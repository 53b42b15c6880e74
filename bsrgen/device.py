"""DeviceKernel: load an artifact for NVIDIA GPUs and call it with arrays that lie on one."""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from bsrgen.device_arrays import DeviceArray, device_array, empty, stream_of, zeros
from bsrgen.device_memory import ResidentKernel, interface
from bsrgen.epilogues import Operand
from bsrgen.errors import ArgumentError, ArgumentTypeError
from bsrgen.valued import _Values

CDefinition = tuple[int, int, float]  # struct bsrgen_operand with an address of the device: data, ld, scalar


class Prepared(Protocol):
    """A weight that came with a call: where it lies on which device."""

    memory: int
    device: int


class DeviceKernel(ResidentKernel):
    """One compiled kernel for NVIDIA GPUs.  Calls take and give device arrays: torch CUDA tensors, CuPy arrays, or what
    speaks __cuda_array_interface__ or DLPack.  All else is as in Kernel."""

    def __call__(
        self, x: Any, out: Any = None, *, threads: int | None = None, stream: Any = None, **operands: Any
    ) -> Any:
        """Y = epilogue(product(W, x)), launched on a stream; returns at once.

        linear: x is [..., K], the result [..., M].  spmm: x is [K, N] or [K], the result [M, N] or [M].
        Rows are contiguous, of x and out; nothing is copied and no call converts.  out: an array to write into, needed
        where x is neither torch's nor CuPy's.  stream: that of torch or CuPy or a handle; None: the current one.
        Operands of the epilogue by name: arrays of the same device, scalars as numbers.

        The first call on a device, and the first after `update`, copies the values there and waits for that; `upload`
        does it ahead, for instance before a CUDA graph records calls.  The first call on a stream may make its
        workspace, which it has in common with all kernels, and a larger call scratch memory.  CaptureError where a
        graph that is being recorded needs more of it than is at hand.
        """
        return self._start(None, x, out, threads, stream, operands)

    def _start(
        self, prepared: Prepared | None, x: Any, out: Any, threads: int | None, stream: Any, operands: dict[str, Any]
    ) -> Any:
        """A call with the kernel's own values, or with a weight that has been prepared."""
        if threads is not None:
            raise ArgumentError(f"{self.name}: threads={threads!r}: a GPU kernel has none; give stream=")
        self._call.known(operands)
        given = self._array("x", x, self._x_dtype)
        x2, batch = self._two_axes(given)
        n = x2.shape[self._token_axis]
        full = self._full(given.shape, batch, n)
        handle = stream_of(given, stream)
        made = self._new(given, full, handle) if out is None else out
        target = self._array("out", made, self._out_dtype)
        if target.shape != full:
            raise ArgumentError(f"{self.name}: out has shape {target.shape}, the result {full}")
        if target.read_only:
            raise ArgumentError(f"{self.name}: out is read-only")
        y2 = self._matrix("out", target, batch)
        values, device = self._values, self._device(given.device)
        arrays: list[DeviceArray] = [x2, y2]
        if prepared and prepared.device != device:
            raise ArgumentError(f"{self.name}: x is on device {device}, the weight on {prepared.device}")
        records = [self._record(o, operands, values, y2, batch, arrays) for o in self._call.operands]
        self._check_places(arrays)
        with self._lock:
            resident = self._resident(values, device)
            where = {i: resident.bound[o.name] for i, o in enumerate(self._call.operands) if o.name in resident.bound
                     and operands.get(o.name) is None}  # fmt: skip
            if self.artifact.manifest.workspace_bytes:
                records.append((self._workspace(device, handle, n), 0, 0.0))
            packed = prepared.memory if prepared else resident.packed
            with self._scratch(device, handle, n) as piece:
                if self._scratch_of:
                    records.append((piece.address, piece.bytes, 0.0))
                self._enter(x2, y2, n, packed, records, where, handle, device)
        result = target.owner if out is None else out
        return self._parted(result) if hasattr(result, "__getitem__") else result

    def _enter(
        self, x: DeviceArray, y: DeviceArray, n: int, packed: int, records: list[CDefinition],
        bound: Mapping[int, int], stream: int, device: int,
    ) -> None:  # fmt: skip
        where = [(bound.get(i, data), ld, scalar) for i, (data, ld, scalar) in enumerate(records)]
        ldx, ldy = x.leading(f"{self.name}: x"), y.leading(f"{self.name}: out")
        self._start_with(n, (x.pointer, ldx), (y.pointer, ldy), packed, where, stream, device)

    def _start_with(
        self, n: int, x: tuple[int, int], y: tuple[int, int], packed: int, records: list[CDefinition], stream: int,
        device: int,
    ) -> None:  # fmt: skip
        """One launch; x and y are addresses and leading dimensions."""
        ffi = interface()
        operands = ffi.new("struct bsrgen_operand[]", max(len(records), 1))
        for i, (data, ld, scalar) in enumerate(records):
            operands[i].data, operands[i].ld, operands[i].scalar = ffi.cast("void *", data), ld, scalar
        call = ffi.new("struct bsrgen_call *")
        call.n, (pointer, call.ldx) = n, x
        call.x, (pointer, call.ldy) = ffi.cast("void *", pointer), y
        call.y, call.values, call.operands = ffi.cast("void *", pointer), ffi.cast("void *", packed), operands
        call.parallel, call.threads = ffi.cast("void *", stream), device
        self._must(self._launch(call))

    # ── arguments ────────────────────────────────────────────────────────────────────────────────────────────────

    def _array(self, what: str, value: Any, want: "np.dtype[Any]") -> DeviceArray:
        array = device_array(f"{self.name}: {what}", value)
        as_bits = {"bfloat16": np.uint16, "float8_e4m3fn": np.uint8}  # of CuPy, which does not know them
        bits = array.dtype == as_bits.get(want.name, want)
        if array.dtype != want and not bits:
            raise ArgumentTypeError(
                f"{self.name}: {what} has dtype {array.dtype}, the kernel {want}; convert it, or compile a kernel for "
                "its dtype"
            )
        if array.pointer % want.itemsize:
            raise ArgumentError(f"{self.name}: {what} lies at {array.pointer:#x}, which is not aligned to its elements")
        return array

    def _two_axes(self, x: DeviceArray) -> tuple[DeviceArray, tuple[int, ...] | None]:
        """x as a matrix, and the leading axes it had (None: one vector)."""
        linear = self._token_axis == 0
        ok = len(x.shape) >= 1 if linear else len(x.shape) in (1, 2)
        if not ok or x.shape[-1 if linear else 0] != self._features:
            like = f"[..., {self._features}]" if linear else f"[{self._features}, N] or [{self._features}]"
            raise ArgumentError(f"{self.name}: x has shape {x.shape}, expected {like}")
        batch = None if len(x.shape) == 1 else x.shape[:-1]
        return self._matrix("x", x, batch), batch

    def _matrix(self, what: str, a: DeviceArray, batch: tuple[int, ...] | None) -> DeviceArray:
        """`a` in two dimensions, as C takes it."""
        linear = self._token_axis == 0
        if batch is None:
            shape, strides = ((1, a.shape[0]), (a.shape[0], *a.strides)) if linear else ((*a.shape, 1), (*a.strides, 1))
            two = DeviceArray(a.pointer, shape, strides, a.dtype, a.device, a.read_only, a.owner)
        elif len(a.shape) == 2:
            two = a
        elif not a.contiguous:
            raise ArgumentError(f"{self.name}: {what} of shape {a.shape} is not contiguous; copy it first")
        else:
            shape = (math.prod(a.shape[:-1]), a.shape[-1])
            two = DeviceArray(a.pointer, shape, (shape[1], 1), a.dtype, a.device, a.read_only, a.owner)
        two.leading(f"{self.name}: {what}")
        return two

    def _new(self, like: DeviceArray, shape: tuple[int, ...], stream: int) -> Any:
        """A result: zeros where a call adds to what is there, or leaves some of it as it was."""
        if self._call.reads_out or self._call.partial:
            return zeros(self.name, like, shape, self._out_dtype, stream)
        return empty(self.name, like, shape, self._out_dtype)

    def _full(self, given: tuple[int, ...], batch: tuple[int, ...] | None, n: int) -> tuple[int, ...]:
        if batch is None:
            return (self._rows,)
        return (*batch, self._rows) if self._token_axis == 0 else (self._rows, n)

    def _record(
        self, o: Operand, given: Mapping[str, Any], values: _Values, y: DeviceArray, batch: tuple[int, ...] | None,
        arrays: list[DeviceArray],
    ) -> CDefinition:  # fmt: skip
        """An operand for C; arrays are added to `arrays`."""
        value = given.get(o.name)
        if value is None:
            value = values.bound.get(o.name, o.default)
            if value is None:
                raise ArgumentTypeError(f"{self.name}: operand {o.name!r} is missing: k(x, {o.name}=...)")
            if o.kind == "row":
                return 0, 0, 0.0  # bound: it lies on the device already
        if o.kind == "scalar" or (o.kind == "token" and isinstance(value, (int, float, np.number, np.ndarray))):
            return 0, 0, self._call.number(o, value)
        array = self._array(o.name, value, self._call.dtypes[o.name])
        arrays.append(array)
        tokens = y.shape[self._token_axis]
        if o.kind == "element":
            if array.shape != (full := self._full((), batch, tokens)):
                raise ArgumentError(f"{self.name}: {o.name} has shape {array.shape}, expected {full}, like the result")
            return array.pointer, self._matrix(o.name, array, batch).leading(f"{self.name}: {o.name}"), 0.0
        count = self._call.count(o) if o.kind == "row" else tokens
        if math.prod(array.shape) != count or not array.contiguous:
            raise ArgumentError(f"{self.name}: {o.name} has shape {array.shape}, expected ({count},), contiguous")
        return array.pointer, int(o.kind == "token"), 0.0

    def _check_places(self, arrays: list[DeviceArray]) -> None:
        """One device for all; writing y changes no input, but for a residual that is y itself."""
        x, y, *others = arrays
        devices = {a.device for a in arrays if a.device >= 0}
        if len(devices) > 1:
            raise ArgumentError(f"{self.name}: the arrays are on several devices: {sorted(devices)}")
        for a in (x, *others):
            same = a is not x and (a.pointer, a.strides[:-1]) == (y.pointer, y.strides[:-1])
            if not same and a.span[0] < y.span[1] and y.span[0] < a.span[1]:
                raise ArgumentError(f"{self.name}: out overlaps an input; give another array")

    def __repr__(self) -> str:
        return f"<bsrgen.Kernel {self.name} for {self.plan.target}>"
