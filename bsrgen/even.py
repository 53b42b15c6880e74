"""Patterns known by their count alone: evenly spread for the cost model, or to come with the call."""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from bsrgen.errors import ArgumentError, ArgumentTypeError
from bsrgen.foreign import Pair
from bsrgen.pattern import Pattern, Weight, random_weight


class EvenPattern(Pattern):
    """`nnzb` blocks spread evenly, the arrays made when somebody asks: counting a plan needs none of them."""

    __slots__ = ("_nnzb",)
    _nnzb: int

    def __init__(self, shape: Pair, blocksize: Pair, nnzb: int) -> None:
        for name, value in (("shape", shape), ("blocksize", blocksize), ("_nnzb", nnzb), ("_digest", "")):
            object.__setattr__(self, name, value)

    def __reduce__(self) -> Any:
        return type(self), (self.shape, self.blocksize, self.nnzb)

    @property
    def nnzb(self) -> int:
        """Stored blocks."""
        return self._nnzb

    def in_words(self, columns: int) -> "EvenPattern":
        """As Pattern has it."""
        return EvenPattern((self.M, -(-self.K // columns)), (self.R, self.C // columns), self._nnzb)

    @property
    def indptr(self) -> npt.NDArray[np.int64]:
        """int64[block_rows + 1]."""
        return np.arange(self.block_rows + 1) * self._nnzb // max(self.block_rows, 1)

    @property
    def indices(self) -> npt.NDArray[np.int32]:
        """int32[nnzb]."""
        indptr = self.indptr
        counts = np.diff(indptr)
        at = np.arange(self._nnzb) - np.repeat(indptr[:-1], counts)
        columns = at * self.block_cols // np.repeat(np.maximum(counts, 1), counts)
        return np.asarray(columns, np.int32)


class PlannedPattern(EvenPattern):
    """Any pattern of up to `nnzb` blocks: which ones, the call says.  Plans take them as evenly spread."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"{self.M}x{self.K} in {self.R}x{self.C} blocks, up to {self.nnzb} stored ({100 * self.density:.4g} %)"

    @property
    def known(self) -> bool:
        """Whether the pattern is known when the kernel is generated."""
        return False

    @property
    def digest(self) -> str:
        """sha256 (hex) of shape, blocksize and the planned maximum."""
        if not self._digest:
            text = "planned {} {} {} {} {}".format(*self.shape, *self.blocksize, self.nnzb)
            object.__setattr__(self, "_digest", hashlib.sha256(text.encode()).hexdigest())
        return self._digest

    @property
    def longest_row(self) -> int:
        """Most blocks of one block row."""
        return min(self.nnzb, self.block_cols)

    def picture(self, width: int = 64, height: int = 32) -> str:
        """There is none yet."""
        return f"any {self.nnzb} of {self.block_rows} x {self.block_cols} blocks"


class PlannedWeight(Weight):
    """The type of a weight that comes with the call, and the most blocks that it may have; no values."""

    __slots__ = ()

    def __init__(self, pattern: PlannedPattern, dtype: "np.dtype[Any]") -> None:
        for name, value in (("pattern", pattern), ("data", np.empty((0, *pattern.blocksize), dtype)), ("notes", ())):
            object.__setattr__(self, name, value)

    def __reduce__(self) -> Any:
        return PlannedWeight, (self.pattern, self.data.dtype)

    @property
    def digest(self) -> str:
        """sha256 (hex) of the planned pattern and the dtype."""
        return hashlib.sha256(f"{self.pattern.digest} {self.data.dtype.name}".encode()).hexdigest()


def planned(weight: Weight, most: int | None, dtype: "np.dtype[Any]") -> PlannedWeight:
    """Any weight of the shape and blocks of `weight` with as many blocks as it has, or `most`.  ArgumentError."""
    p = weight.pattern
    if most is None:
        most = p.nnzb
    if isinstance(most, bool) or not isinstance(most, (int, np.integer)):
        raise ArgumentTypeError(f"max_blocks={most!r}: a number of blocks, or None for as many as W has")
    if not p.nnzb <= most <= p.block_rows * p.block_cols:
        raise ArgumentError(
            f"max_blocks={most}: from {p.nnzb}, which W has, to {p.block_rows * p.block_cols}, which is all of them"
        )
    return PlannedWeight(PlannedPattern(p.shape, p.blocksize, int(most)), dtype)


def empty(shape: Any, blocksize: Any) -> Weight:
    """A weight of that shape without blocks.  ArgumentError where either is not said."""
    if shape is None or blocksize is None:
        raise ArgumentError("W=None stands for an empty weight: it needs shape=(M, K) and blocksize=(R, C)")
    return random_weight(0, shape, blocksize, 0)


def sample_of(weight: Weight) -> Weight:
    """`weight`, or where it comes with the call, one that may: of as many blocks as are planned."""
    p = weight.pattern
    return weight if p.known else random_weight(0, p.shape, p.blocksize, p.density, dtype=weight.data.dtype)
