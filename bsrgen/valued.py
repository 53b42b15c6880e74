"""Valued: the values of a kernel's weight, how new ones take their place, and the artifact with them in it."""

import functools
import io
import os
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from bsrgen.arguments import COperand
from bsrgen.artifact import save_artifact
from bsrgen.described import Described
from bsrgen.epilogues import pair_of
from bsrgen.errors import ArtifactError, IncompatibleCPUError, OutOfMemoryError, PatternMismatchError
from bsrgen.manifest import OPERANDS_FILE
from bsrgen.pattern import Pattern, Weight
from bsrgen.quantize import quantized, source_of
from bsrgen.stack import are_several, parts_of, stacked
from bsrgen.trampoline import Trampoline

Array = NDArray[Any]

_PACK_NO_MEMORY = -2  # what the library's _pack returns where it finds none; -1: no such level


class _Values(NamedTuple):
    """What a call takes besides its arguments; replaced as a whole, so that no call sees a half.

    data, packed, pointer: values given by `update`, as stored, packed, and where C finds them; before that none, and C
    takes the library's.  settled: operands that need not come with the call; records: all for C, where none has to;
    template: the same where `missing` ones have to, None where calls read what is in `out`.
    """

    bound: dict[str, Any]
    weight_scale: str
    settled: dict[str, COperand]
    records: Any
    template: Any
    missing: frozenset[str]
    data: Array | None
    packed: Array | None
    pointer: Any


class Valued(Described):
    """A kernel as far as its values go; `kernel.Kernel` sets what is declared here."""

    _values: _Values
    _foreign: IncompatibleCPUError | None  # what this machine lacks
    _tramp: Trampoline
    _pack: Any  # the library's function that makes packed values

    def _with(self, bound: dict[str, Any], weight_scale: str, data: Array | None) -> _Values:
        """`data` and the operands that are bound, as calls take them."""
        raise NotImplementedError

    def update(self, W: Any) -> None:
        """Put the values of W in place of the old ones: same shape, block shape and pattern, no compiler.

        Takes what `compile` takes; in a dense W, blocks outside the pattern must be zero.  PatternMismatchError says
        where another pattern differs.  After an error nothing has changed; calls that run meanwhile keep old values.
        With transposed=True, W still is what `compile` was given: its values move to their places in W.T.
        An int8 kernel quantises floating W with the w_scale that `compile` was given, or else with new ones, which take
        the place of the old; integers are taken as they are, and the scales stay.
        """
        self._values = self.valued(W)

    def valued(self, W: Any) -> _Values:
        """What `update` makes of W; the kernel stays as it is (see instance.py)."""
        if self._foreign:
            raise self._foreign
        m, values = self.artifact.manifest, self._values
        weight = self._weight(W)
        same = weight.pattern.digest == (self._turned[0].digest if m.transposed else m.pattern)
        data = weight.data if same else _filled(self._given, weight) if _is_dense(W) else None
        if data is None:
            where = self._given.difference(weight.pattern)
            raise PatternMismatchError(f"{self.name}: update needs the kernel's pattern: {where}; compile a new kernel")
        if m.transposed:
            (turned := np.empty((m.nnzb, *m.blocksize), data.dtype))[self._turned[1]] = data.transpose(0, 2, 1)
            data = turned
        bound, how = values.bound, values.weight_scale
        if data.dtype != self._dtype:
            given = bound["w_scale"] if how == "given" else None
            weight, scale = quantized(Weight(self.pattern, data), given)
            data, bound, how = weight.data, bound | {"w_scale": scale}, "given" if how == "given" else "max"
        return self._with(bound, how, data)

    @functools.cached_property
    def _turned(self) -> tuple[Pattern, Array]:
        """Of a kernel of W.T: the pattern of W as it is given, and the kernel's block that each of its blocks is."""
        return self.pattern.transpose()

    @property
    def _given(self) -> Pattern:
        """The pattern of W as `compile` was given it."""
        return self._turned[0] if self.transposed else self.pattern

    def _weight(self, W: Any) -> Weight:
        """W in the blocks it is given in and in the kernel's type, or where that is int8 and W is not, as it came."""
        m, (_, blocksize) = self.artifact.manifest, self._sizes_given
        if are_several(W):
            weights = [source_of(part, m.types[0], blocksize=blocksize) for part in W]
            parts = parts_of(weights, pair_of(m.steps) is not None)
            if not m.transposed and parts != (m.parts or (m.rows,)):
                raise PatternMismatchError(
                    f"{self.name}: weights of {parts} rows, the kernel's have {m.parts or m.rows}"
                )
            return stacked(weights)
        return source_of(W, m.types[0], blocksize=blocksize, shape=self._shape_for(W))

    def _shape_for(self, W: Any) -> tuple[int, int] | None:
        """The kernel's shape for what has none of its own: a triple, and BSR whose last blocks stick out of it."""
        sizes, blocksize = self._sizes_given
        if isinstance(W, tuple):
            return sizes
        padded = tuple(-(-size // block) * block for size, block in zip(sizes, blocksize, strict=True))
        return sizes if getattr(W, "format", None) == "bsr" and getattr(W, "shape", None) == padded else None

    @property
    def _sizes_given(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shape and block shape of W as it is given."""
        m = self.artifact.manifest
        return (m.shape[::-1], m.blocksize[::-1]) if m.transposed else (m.shape, m.blocksize)

    def packed(self, data: Array, level: int) -> Array:
        """The bytes of values [nnzb, R, C] as ISA level `level` of the library keeps them, 64-byte aligned."""
        ffi = self._tramp.ffi
        packed = aligned(self._packed(ffi.NULL, ffi.NULL, level))
        self._packed(ffi.from_buffer(data.view(np.uint8)), ffi.from_buffer(packed), level)
        return packed

    def _packed(self, data: Any, packed: Any, level: int) -> int:
        count = self._tramp.pack(self._pack, data, packed, level)
        if count == _PACK_NO_MEMORY:
            raise OutOfMemoryError(f"{self.name}: no memory to pack {self.nnz} values")
        if count < 0:
            raise ArtifactError(f"{self.name}: the library cannot pack values for level {level} (status {count})")
        return count

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the artifact to `folder`, updated values included, and return it.

        A folder that holds an artifact and nothing else is replaced as a whole; any other non-empty folder is refused
        (ArgumentError).  StoreError where the disk says no, ArtifactCorruptError where the kernel's own files are gone.
        """
        m, changed, values = self.artifact.manifest, {}, self._values
        if values.data is not None:
            library = bytearray(self.artifact.read(m.library))
            for number, level in enumerate(m.levels):
                packed = self.packed(values.data, number).tobytes()
                record = level.values
                assert record is not None, "no update without values"
                changed[record.file] = packed
                library[record.offset : record.offset + len(packed)] = packed
            changed[m.library] = bytes(library)
            if "w_scale" in values.bound:
                np.savez(file := io.BytesIO(), **values.bound)
                changed[OPERANDS_FILE] = file.getvalue()
            m = msgspec.structs.replace(
                m, weight=Weight(self.pattern, values.data).digest, check=None, bound=tuple(sorted(values.bound)),
                weight_scale=values.weight_scale,
            )  # fmt: skip
        save_artifact(self.artifact, Path(folder), changed, m)
        return Path(folder).resolve()


def _filled(ours: Pattern, weight: Weight) -> Array | None:
    """Values of a dense W whose blocks lie within the pattern `ours`: stored blocks that are zero now hold zeros."""
    theirs = weight.pattern
    if ours.shape != theirs.shape:
        return None
    mine, other = (p.rows * p.block_cols + p.indices for p in (ours, theirs))
    if not np.isin(other, mine).all():
        return None
    data = np.zeros((ours.nnzb, *ours.blocksize), weight.data.dtype)
    data[np.searchsorted(mine, other)] = weight.data
    return data


def aligned(count: int) -> Array:
    """So many bytes on 64-byte lines, contents undefined."""
    room = np.empty(count + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + count]


def _is_dense(W: Any) -> bool:
    """Whether W is an array or tensor that has a value for every element, and so no pattern of its own."""
    return isinstance(W, np.ndarray) or str(getattr(W, "layout", "")) == "torch.strided"
