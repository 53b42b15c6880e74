"""PitDeviceKernel: the kernel of mode="pit" for NVIDIA GPUs, whose calls say what is to be computed."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bsrgen.device import CDefinition, DeviceKernel
from bsrgen.device_arrays import DeviceArray, device_array
from bsrgen.epilogues import SELECTING, Operand
from bsrgen.errors import ArgumentError, ArgumentTypeError
from bsrgen.pit_kernel import Selecting
from bsrgen.valued import _Values


class PitDeviceKernel(Selecting, DeviceKernel):
    """A kernel that computes what a call asks for, and no more.  All else is as in DeviceKernel."""

    def __call__(  # type: ignore[override]  # what is selected comes before where it goes
        self, x: Any, select: Any = None, out: Any = None, *, threads: int | None = None, stream: Any = None,
        **operands: Any,
    ) -> Any:  # fmt: skip
        """Y = epilogue(product(W, x)) where `select` says, as in PitKernel, with arrays of the device of x:

        tokens: live, bool or uint8 (nonzero) like x without its features; None: all.  No indices: they would have to
            be made into such an array before.
        experts: routing, int32 like x without its features; tokens with a number of no expert go to none.
        outputs: mask, bool or uint8 [blocks of tokens, blocks of features]; None: everywhere.
        features: none.

        Nothing of it is looked at before the launch, which waits for nothing: the kernel finds out itself.
        """
        self._select(select, operands)
        return super().__call__(x, out, threads=threads, stream=stream, **operands)

    def _record(
        self, o: Operand, given: Mapping[str, Any], values: _Values, y: DeviceArray, batch: tuple[int, ...] | None,
        arrays: list[DeviceArray],
    ) -> CDefinition:  # fmt: skip
        if o.kind not in SELECTING:
            return super()._record(o, given, values, y, batch, arrays)
        value, pit = given.get(o.name), self._call.pit
        assert pit is not None
        if value is None:
            if o.kind == "routing":
                raise ArgumentTypeError(f"{self.name}: operand 'routing' is missing: k(x, routing=...)")
            return 0, 0, 0.0
        array = device_array(f"{self.name}: {o.name}", value)
        want = (np.dtype(np.int32),) if o.kind == "routing" else (np.dtype(bool), np.dtype(np.uint8))
        if array.dtype not in want:
            raise ArgumentTypeError(
                f"{self.name}: {o.name} has dtype {array.dtype}; expected {' or '.join(map(str, want))}, on the device"
            )
        n = y.shape[0]
        shape = pit.selection_shape(n, self._call.stacked)
        fits = (shape,) if o.kind == "mask" else (shape, () if batch is None else batch)
        if array.shape not in fits or array.pointer % array.dtype.itemsize:
            raise ArgumentError(f"{self.name}: {o.name} has shape {array.shape}, expected {shape}, aligned")
        arrays.append(array)
        if o.kind == "mask":
            return array.pointer, array.leading(f"{self.name}: {o.name}"), 0.0
        if not array.contiguous:
            raise ArgumentError(f"{self.name}: {o.name} has strides {array.strides}: copy it first")
        return array.pointer, 0, 0.0
