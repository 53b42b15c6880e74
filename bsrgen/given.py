"""What `compile` is given as W, in any mode: the weight of the problem, its parts, and what calls leave out."""

from dataclasses import dataclass
from typing import Any

from bsrgen.dtypes import DType
from bsrgen.errors import ArgumentError, UnsupportedError
from bsrgen.even import empty, planned
from bsrgen.operators import LINEAR, Operator
from bsrgen.pattern import Pattern, Weight, as_weight
from bsrgen.pattern_problem import refuse
from bsrgen.pit import Axis, Pit, as_pit
from bsrgen.pit_weight import pit_weight
from bsrgen.quantize import source_of
from bsrgen.stack import are_several, parts_of, stacked


@dataclass(frozen=True, slots=True)
class Given:
    """W, and how it is described: its blocks, its mode and what that asks for, whether the product is with W.T."""

    W: Any
    blocksize: tuple[int, int] | None
    shape: tuple[int, int] | None
    mode: str
    max_blocks: int | None
    axis: Any
    mask_block: Any
    transposed: bool

    def pattern(self, operator: str) -> Pattern:
        """The pattern alone, of an operator that takes no values.  PatternError, ArgumentError, UnsupportedError."""
        self._static(f"operator {operator!r}", self.transposed)
        if isinstance(self.W, Pattern):
            return self.W
        return as_weight(self.W, blocksize=self.blocksize, shape=self.shape, dtype=None).pattern

    def along(self, operator: Operator) -> Axis | None:
        """The axis of mode="pit", if it may be taken.  ArgumentError, ArgumentTypeError, UnsupportedError."""
        if self.max_blocks is not None and self.mode != "dynamic":
            raise ArgumentError(f"max_blocks={self.max_blocks!r} with mode={self.mode!r}: it is for mode='dynamic'")
        if self.transposed:
            self._static("transposed=True", False)
        return as_pit(self.mode, self.axis, self.mask_block, operator)

    def _static(self, what: str, transposed: bool) -> None:
        """Refuse, for `what`, all that goes beyond a pattern that is known and lies as it is given."""
        mode = "" if self.mode == "static" else self.mode
        own = {"axis": self.axis, "mask_block": self.mask_block, "max_blocks": self.max_blocks, "mode": mode}
        refuse(what, transposed=transposed, **own)

    def weight(
        self, dtype: DType, paired: bool, axis: Axis | None, operator: Operator = LINEAR
    ) -> tuple[Weight, tuple[int, ...], Pit | None]:
        """The weight, the parts of its Y where a list came, and mode="pit"'s.  ArgumentError, PatternError."""
        if self.transposed and paired:
            raise UnsupportedError("transposed=True with swiglu or geglu: give W.T itself")
        W: Any = empty(self.shape, self.blocksize) if self.W is None else self.W
        if axis:
            weight, pit = pit_weight(W, dtype, axis, self.blocksize, self.shape, self.mask_block, operator)
            return weight, (), pit
        several = are_several(W)
        each: list[Any] = list(W) if several else [W]
        weights = [source_of(part, dtype, blocksize=self.blocksize, shape=self.shape) for part in each]
        parts = parts_of(weights, paired)
        weight = stacked(weights) if len(weights) > 1 else weights[0]
        if self.mode == "dynamic":
            weight = planned(weight, self.max_blocks, dtype.numpy)
        parts = parts if several and not (paired or self.transposed) else ()
        return weight.T if self.transposed else weight, parts, None
