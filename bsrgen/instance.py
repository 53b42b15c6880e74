"""Instance: the code of a kernel with values of its own, called by address, as an operator of a framework calls it.

Kernels of one pattern are one piece of code; a model has many weights, new ones after each step of an optimizer.
"""

from typing import Any

from bsrgen.errors import ArgumentTypeError
from bsrgen.kernel import Kernel


class Instance:
    """The values of W, packed for `kernel`, and its code.  Never changes; safe to call from many threads.

    W: what `kernel.update` takes.  Operands of the epilogue that are arrays by row come by address with `operands`, all
    others have their defaults.
    """

    __slots__ = (
        "_call", "_cast", "_function", "_kernel", "_pointer", "_record_bytes", "_records", "_values", "_void",
    )  # fmt: skip

    def __init__(self, kernel: Kernel, W: Any) -> None:
        self._kernel, self._values = kernel, kernel.valued(W)
        path = kernel._tramp
        self._cast, self._void = path.ffi.cast, path.ffi.typeof("void *")
        self._records = path.ffi.typeof("struct bsrgen_operand[]")
        self._record_bytes = path.ffi.sizeof("struct bsrgen_operand")
        self._call, self._function, self._pointer = path.call, kernel._function, self._values.pointer

    def operands(self, **addresses: int) -> Any:
        """Operands for `run`: those named lie, contiguous and of the kernel's type for them, at these addresses."""
        if lacks := addresses.keys() - {operand.name for operand in self._kernel._call.operands}:
            raise ArgumentTypeError(f"{self._kernel.name}: has no operand {min(lacks)!r}")
        settled = self._values.settled | dict.fromkeys(addresses, (None, 0, 0.0))
        given = self._kernel._call.operands
        records = self._kernel._records([settled[operand.name] for operand in given])
        for record, operand in zip(records if given else (), given, strict=True):
            if operand.name in addresses:
                record.data = self._cast(self._void, addresses[operand.name])
        return records

    def place(self, name: str) -> int:
        """Where an operand stands among the kernel's."""
        return [operand.name for operand in self._kernel._call.operands].index(name)

    def with_address(self, operands: Any, place: int, address: int, ld: int) -> Any:
        """A copy of what `operands` made, in which the array at `place` lies at `address`, rows `ld` elements apart."""
        ffi = self._kernel._tramp.ffi
        records = ffi.new(self._records, len(operands))
        ffi.memmove(records, operands, self._record_bytes * len(operands))
        record = records[place]
        record.data, record.ld = self._cast(self._void, address), ld
        return records

    def run(self, n: int, x: int, ldx: int, y: int, ldy: int, operands: Any, threads: int) -> None:
        """One call: n tokens of X at address x, of Y at address y, which do not overlap; ldx, ldy in elements."""
        void, cast = self._void, self._cast
        status = self._call(
            self._function, n, cast(void, x), ldx, 0, cast(void, y), ldy, 0, self._pointer, operands, threads
        )
        if status:
            self._kernel.refuse(status)
