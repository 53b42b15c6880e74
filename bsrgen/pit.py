"""Sparsity that only a call knows, in a dense operand: which axis is thinned out, and what a call says of it.

After PIT (Zheng et al., SOSP 2023, section 3): micro-tiles that hold something are gathered along an axis whose order
does not matter into the tiles of a dense kernel while these are loaded (SRead), and results go back while they are
stored (SWrite).  Which axes may be permuted is a column of operators.py; without one, mode="pit" is refused.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bsrgen.epilogues import Operand
from bsrgen.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from bsrgen.operators import Operator

Array = NDArray[Any]
TILE = 16  # tokens, and half the rows
AxisName = Literal["tokens", "features", "experts", "outputs"]


@dataclass(frozen=True, slots=True)
class Axis:
    """`permuted`: the operator's axes that are gathered; `operand`: what a call says of it."""

    name: AxisName
    permuted: tuple[str, ...]
    operand: Operand
    listed: bool  # whether tokens are gathered by lists: all axes but features

    def __reduce__(self) -> Any:
        return _row, (self.name,)


AXES = {
    row.name: row
    for row in (
        Axis("tokens", ("n",), Operand("live", "live"), True),
        Axis("features", ("k",), Operand("tile", "scalar", 0.0), False),
        Axis("experts", ("n",), Operand("routing", "routing"), True),
        Axis("outputs", ("n", "m"), Operand("mask", "mask"), True),
    )
}


def _row(name: AxisName) -> Axis:
    return AXES[name]


@dataclass(frozen=True, slots=True)
class Pit:
    """An axis, and of the blocks that a call masks or routes: tokens (outputs), rows of W (outputs, experts)."""

    axis: Axis
    tokens: int = 1
    rows: int = 0

    def __str__(self) -> str:
        blocks = f" by {self.tokens}x{self.rows}" if self.rows else ""
        return f"pit by {self.axis.name}{blocks}"

    @property
    def masked(self) -> bool:
        """Whether a call says which blocks of Y are computed."""
        return self.axis.operand.kind == "mask"

    @property
    def by_tiles(self) -> bool:
        """Whether a mask of outputs is coarse enough to leave out tiles of consecutive tokens: finer ones are lists."""
        return self.axis.name == "outputs" and self.tokens >= TILE and self.rows % (TILE * 2) == 0

    def groups(self, M: int) -> int:
        """Groups of rows of W [M, K] that have tokens of their own."""
        return -(-M // self.rows) if self.rows else 1

    def features_of_y(self, M: int) -> int:
        """Rows of W that one token's result has."""
        return self.rows if self.axis.name == "experts" else M

    def selection_shape(self, n: int, M: int) -> tuple[int, ...]:
        """The shape of what a call of n tokens says."""
        return (-(-n // self.tokens), self.groups(M)) if self.axis.name == "outputs" else (n,)

    def sample(self, rng: np.random.Generator, n: int, M: int) -> Array | float:
        """A random selection: about half of what there is, one end of it missing."""
        shape = self.selection_shape(n, M)
        if self.axis.operand.kind == "scalar":
            return 0.0
        if self.axis.operand.kind == "routing":
            return rng.integers(-1, self.groups(M), shape).astype(np.int32)
        return rng.random(shape) < 0.5

    def kept(self, selection: Any, n: int, M: int) -> Array:
        """Which results [n, features of Y] a call computes: for the reference.  None selects all."""
        y = (n, self.features_of_y(M))
        if selection is None or self.axis.operand.kind == "scalar":
            return np.ones(y, bool)
        chosen = np.asarray(selection)
        if self.axis.operand.kind == "mask":
            masked: Array = (chosen != 0).repeat(self.tokens, 0)[:n].repeat(self.rows, 1)[:, :M]
            return masked
        live: Array = chosen >= 0 if self.axis.operand.kind == "routing" else chosen != 0
        return live[:, None].repeat(y[1], 1)

    def routed(self, v: Array, selection: Any) -> Array:
        """Values of all experts, [M] or [n, M], as [n, rows]: those of each token's own expert."""
        if self.axis.name != "experts":
            return v
        ids = np.maximum(np.asarray(selection), 0)
        each = v.reshape(*v.shape[:-1], v.shape[-1] // self.rows, self.rows)
        return each[ids] if v.ndim == 1 else np.take_along_axis(each, ids[:, None, None], 1)[:, 0]


def as_pit(mode: str, axis: Any, mask_block: Any, operator: Operator) -> Axis | None:
    """The axis of mode="pit".  ArgumentError, ArgumentTypeError, UnsupportedError."""
    if mode != "pit":
        if axis is not None or mask_block is not None:
            raise ArgumentError(f"axis={axis!r}, mask_block={mask_block!r}: only mode='pit' has them, not {mode!r}")
        return None
    if not isinstance(axis, str) or axis not in AXES:
        raise ArgumentError(f"mode='pit' with axis={axis!r}: one of {', '.join(AXES)}")
    row = AXES[axis]
    lacks = [letter for letter in row.permuted if letter not in operator.permutable]
    if lacks:
        why = f"its axis {lacks[0]!r} must not be permuted"
        raise UnsupportedError(f"mode='pit', axis={axis!r} with operator {operator.name!r}: {why}; use 'linear'")
    if (mask_block is None) == (axis == "outputs"):
        raise ArgumentError(f"mask_block={mask_block!r} with axis={axis!r}: (tokens, features) of a block of the mask, "
                            "for axis='outputs' and no other")  # fmt: skip
    if mask_block is not None:
        pair = mask_block if isinstance(mask_block, (tuple, list)) else ()
        ints = [v for v in pair if isinstance(v, (int, np.integer)) and not isinstance(v, bool) and v > 0]
        if not len(pair) == len(ints) == 2:
            raise ArgumentTypeError(f"mask_block={mask_block!r}: two ints from 1 up, tokens and features of a block")
    return row


def rows_of_blocks(rows: int) -> int:
    """Rows of W's blocks that a group of `rows` rows is whole blocks of: whole vectors where that can be."""
    fits = [r for r in (64, 48, 32, 16, *range(63, 7, -1)) if rows % r == 0]
    return fits[0] if fits else max(rows, 1)
