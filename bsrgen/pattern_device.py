"""PatternDeviceKernel: the kernel of a product at a block pattern, called with arrays that lie on a GPU."""

from typing import Any

import numpy as np

from bsrgen.arguments import as_number
from bsrgen.device import CDefinition, DeviceKernel
from bsrgen.device_arrays import DeviceArray, empty, stream_of, zeros
from bsrgen.errors import ArgumentError, ArgumentTypeError
from bsrgen.pattern_kernel import OfPattern
from bsrgen.valued import _Values


class PatternDeviceKernel(OfPattern, DeviceKernel):
    """A kernel of a pattern for NVIDIA GPUs: data = k(a, b) with device arrays.  Shapes and operands are those of
    PatternKernel, arrays and streams those of DeviceKernel."""

    def __call__(
        self, *arrays: Any, out: Any = None, threads: int | None = None, stream: Any = None, scale: Any = None,
        **numbers: Any,
    ) -> Any:  # fmt: skip
        """The product of `arrays`, launched on a stream; returns at once.

        Rows of the arrays are contiguous, out is as a whole; nothing is copied.  scale: one number, or [M] on the
        device.  The first call on a device copies the pattern there and waits for that; `upload` does it ahead.
        Errors: ArgumentError, ArgumentTypeError before any work starts, DeviceError.
        """
        if threads is not None:
            raise ArgumentError(f"{self.name}: threads={threads!r}: a GPU kernel has none; give stream=")
        if self._foreign:
            raise self._foreign
        self._taken(arrays)
        given = [
            self._array(name, a, self._x_dtype) for (name, _), a in zip(self._operator.inputs, arrays, strict=True)
        ]
        heads, n = self._n(given)
        handle, like = stream_of(given[0], stream), given[0]
        shape = (*heads, *self._result_shape(n))
        target = self._target(self._made(like, shape, handle) if out is None else out, shape)
        names = [name for name, _ in self._operator.inputs]
        x, *others = [(a.pointer, self._leading(name, a)) for name, a in zip(names, given, strict=True)]
        used = [given[0], target, *given[1:]]
        records = [(*place, 0.0) for place in others] + [
            self._number(name, scale, numbers, used) for name in self._able(scale, numbers)
        ]
        self._check_places(used)
        device = self._device(like.device)
        with self._lock:
            tables = self._resident(self._values, device).packed
            self._start_with(n, x, (target.pointer, 0), tables, records, handle, device)
        return target.owner if out is None else out

    def _made(self, like: DeviceArray, shape: tuple[int, ...], stream: int) -> Any:
        """A result: zeros where a call adds to what is there."""
        if "accumulate" in self._steps:
            return zeros(self.name, like, shape, self._out_dtype, stream)
        return empty(self.name, like, shape, self._out_dtype)

    def _target(self, out: Any, shape: tuple[int, ...]) -> DeviceArray:
        target = self._array("out", out, self._out_dtype)
        if target.shape != shape:
            raise ArgumentError(f"{self.name}: out has shape {target.shape}, the result {shape}")
        if target.read_only or not target.contiguous:
            raise ArgumentError(f"{self.name}: out is {'read-only' if target.read_only else 'not contiguous'}")
        return target

    def _leading(self, name: str, a: DeviceArray) -> int:
        """Elements from row to row; of heads one after the other without gaps."""
        if not self._operator.headed:
            return a.leading(f"{self.name}: {name}")
        if not a.contiguous:
            raise ArgumentError(f"{self.name}: {name} of shape {a.shape} is not contiguous; copy it first")
        return a.shape[-1]

    def _number(self, name: str, scale: Any, numbers: dict[str, Any], used: list[DeviceArray]) -> CDefinition:
        """An operand for C; arrays are added to `used`."""
        if name != "scale":
            return 0, 0, as_number(self.name, name, numbers.get(name, 1.0))
        if self._operator.headed:
            return 0, 0, self._head_scale(scale)
        if scale is None:
            raise ArgumentTypeError(f"{self.name}: operand 'scale' is missing: k(a, b, scale=...)")
        if isinstance(scale, (int, float, np.number)) or (isinstance(scale, np.ndarray) and scale.ndim == 0):
            return 0, 0, as_number(self.name, "scale", scale)
        array = self._array("scale", scale, self._out_dtype)
        if array.shape != self.shape[:1] or not array.contiguous:
            raise ArgumentError(f"{self.name}: scale has shape {array.shape}, expected one number or {self.shape[:1]}")
        used.append(array)
        return array.pointer, 0, 0.0

    def _rows_bound(self, values: _Values) -> list[str]:
        return []
