"""Operands of a call that C takes as they lie: checked by a few comparisons, nothing converted.  What is not like that
goes the careful way (arguments.py), which has the words for what is wrong."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.arguments import Call
from bsrgen.epilogues import Operand

Array = NDArray[Any]
Taken = Any  # what the record points at, to be kept; None: it goes the careful way

_NUMBERS = (float, np.float32, np.float64)
_BOOL, _INT32, _INT64 = np.dtype(bool), np.dtype(np.int32), np.dtype(np.int64)
_NONE = None, None


@dataclass(frozen=True, slots=True)
class _Place:
    """One operand of the kernel: how it is taken, its record's index, its type, values of it, or of a mask's row."""

    operand: Operand
    take: Callable[["Shortcut", "_Place", Any, Any, int, tuple[int, int]], Taken]
    index: int
    dtype: "np.dtype[Any]"
    count: int
    tokens: int  # of a row of a mask


class Shortcut:
    """The operands of one kernel's calls."""

    def __init__(self, call: Call, ffi: Any) -> None:
        self.ffi, self.call = ffi, call
        self._structs = ffi.typeof("struct bsrgen_operand[]")
        self._number = ffi.typeof(f"{call.real.c}[1]")
        self._bytes = ffi.sizeof("struct bsrgen_operand") * len(call.operands)
        pit = call.pit
        tokens, groups = (pit.tokens, pit.groups(call.stacked)) if pit else (1, 0)
        self._places = {
            o.name: _Place(
                o, _TAKES[o.kind], index, call.dtypes[o.name], call.count(o) if o.kind == "row" else groups, tokens
            )
            for index, o in enumerate(call.operands)
        }

    def records(
        self, template: Any, missing: frozenset[str], given: Mapping[str, Any], n: int, full: tuple[int, int], out: Any
    ) -> tuple[Any, Any]:
        """A copy of `template` with the operands `given` for n tokens, and what it points at; (None, None): one of them
        goes the careful way, or one that must come is `missing`."""
        if template is None or not given.keys() >= missing:
            return _NONE
        records = self.ffi.new(self._structs, len(self.call.operands))
        self.ffi.memmove(records, template, self._bytes)
        kept = []
        for name, value in given.items():
            place = self._places.get(name)
            if value is None and place is not None and name not in missing:
                continue
            if place is None:
                return _NONE
            taken = place.take(self, place, records[place.index], value, n, full)
            if taken is None or (out is not None and type(value) is np.ndarray and np.may_share_memory(out, value)):
                return _NONE
            kept.append(taken)
        return records, kept

    def number(self, place: _Place, record: Any, value: Any, n: int, full: tuple[int, int]) -> Taken:
        """One number for all."""
        real = self.call.real
        if type(value) not in _NUMBERS or not real.smallest <= value <= real.largest:
            return None
        if place.operand.kind == "scalar":
            record.scalar = value
            return record
        record.data, record.ld = (kept := self.ffi.new(self._number, (float(value),))), 0
        return kept

    def token(self, place: _Place, record: Any, value: Any, n: int, full: tuple[int, int]) -> Taken:
        """A number for each token, or one for all."""
        if type(value) is not np.ndarray:
            return self.number(place, record, value, n, full)
        kept = self.lies(record, value, place.dtype, (n,), 1)
        if kept is None or not (place.operand.positive and n):
            return kept
        return kept if np.minimum.reduce(value) > 0 and np.maximum.reduce(value) < np.inf else None

    def row(self, place: _Place, record: Any, value: Any, n: int, full: tuple[int, int]) -> Taken:
        """A number for each output feature."""
        return None if place.operand.positive else self.lies(record, value, place.dtype, (place.count,), 0)

    def element(self, place: _Place, record: Any, value: Any, n: int, full: tuple[int, int]) -> Taken:
        """A number for each output."""
        return self.lies(record, value, place.dtype, full, full[1])

    def live(self, place: _Place, record: Any, value: Any, n: int, full: tuple[int, int]) -> Taken:
        """Whether each token is live, or the numbers of those that are."""
        if type(value) is np.ndarray and value.dtype is _INT64 and value.ndim == 1 and value.size:
            if np.minimum.reduce(value) < 0 or np.maximum.reduce(value) >= n:
                return None
            (flags := np.zeros(n, bool))[value] = True
            if np.count_nonzero(flags) < value.size:
                return None
            value = flags
        return self.lies(record, value, _BOOL, (n,), 0)

    def mask(self, place: _Place, record: Any, value: Any, n: int, full: tuple[int, int]) -> Taken:
        """Whether each block of outputs is wanted."""
        return self.lies(record, value, _BOOL, (-(-n // place.tokens), place.count), place.count)

    def routing(self, place: _Place, record: Any, value: Any, n: int, full: tuple[int, int]) -> Taken:
        """Experts of tokens; C refuses those that are not there."""
        if type(value) is np.ndarray and value.dtype is _INT64:
            wide, value = value, value.astype(np.int32)
            if not np.logical_and.reduce(wide == value):
                return None
        return self.lies(record, value, _INT32, (n,), 0)

    def lies(self, record: Any, value: Any, dtype: "np.dtype[Any]", shape: tuple[int, ...], ld: int) -> Taken:
        """An array of that type and shape, contiguous."""
        if type(value) is not np.ndarray or value.dtype is not dtype or value.shape != shape or not value.flags.aligned:
            return None
        try:
            kept = self.ffi.from_buffer(value)
        except (ValueError, BufferError):  # not contiguous
            return None
        record.data, record.ld = kept, ld
        return kept


_TAKES: dict[str, Any] = {
    "scalar": Shortcut.number, "token": Shortcut.token, "row": Shortcut.row, "element": Shortcut.element,
    "live": Shortcut.live, "mask": Shortcut.mask, "routing": Shortcut.routing,
}  # fmt: skip
