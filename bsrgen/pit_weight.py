"""The weight of mode="pit": dense where it comes without blocks, experts one below the other."""

from typing import Any

import numpy as np

from bsrgen.cover import full
from bsrgen.dtypes import DType
from bsrgen.errors import ArgumentError
from bsrgen.operators import Operator
from bsrgen.pattern import Weight
from bsrgen.pit import Axis, Pit, rows_of_blocks
from bsrgen.quantize import source_of
from bsrgen.stack import are_several, stacked

WIDTH = 256  # columns of a block of a dense weight: its panel of X stays in L1
WORDS = 16  # columns of a strip come in so many: whole batches of words


def pit_weight(
    W: Any,
    dtype: DType,
    axis: Axis,
    blocksize: tuple[int, int] | None,
    shape: tuple[int, int] | None,
    mask_block: Any,
    operator: Operator,
) -> tuple[Weight, Pit]:
    """W as the kernel keeps it, and what a call leaves out.  ArgumentError, PatternError."""
    if axis.name == "experts":
        return _experts(W, dtype, axis, blocksize, operator)
    if are_several(W):
        raise ArgumentError(f"axis={axis.name!r} with a list of weights: give one, or axis='experts'")
    if axis.name == "features" and blocksize is not None:
        raise ArgumentError(f"blocksize={blocksize} with axis='features': W is read column by column; leave it out")
    rows, M = int(mask_block[1]) if mask_block else 0, _rows(W) or 1
    pit = Pit(axis, int(mask_block[0]) if mask_block else 1, rows)
    high = rows_of_blocks(rows) if rows else _strip(M)
    weight = source_of(W, dtype, blocksize=blocksize, shape=shape, otherwise=_within((high, WIDTH), W))
    if axis.name == "features" or (blocksize is None and not _has_blocks(W)):
        high = _strip(weight.pattern.M) if axis.name == "features" else high
        weight = _dense(weight, high, pit, operator)
    if rows % weight.pattern.R:
        R = weight.pattern.R
        raise ArgumentError(f"mask_block={mask_block} with blocks of {R} rows: its features must be whole blocks")
    return weight, pit


def _experts(W: Any, dtype: DType, axis: Axis, blocksize: Any, operator: Operator) -> tuple[Weight, Pit]:
    each = list(W) if isinstance(W, np.ndarray) and W.ndim == 3 else W
    if not isinstance(each, list) or not are_several(each) or not each:
        raise ArgumentError(
            "axis='experts': W is a list of weights [M, K], or one array [E, M, K], at least one expert"
        )
    shapes = {_shape(w) for w in each}
    M = _rows(each[0])
    if len(shapes) > 1 or not M:
        raise ArgumentError(
            f"axis='experts': weights of shapes {sorted(shapes)}: all experts have one, of at least a row"
        )
    high = rows_of_blocks(M)
    blocks = _within((high, WIDTH), each[0])
    weights = [source_of(w, dtype, blocksize=blocksize, otherwise=blocks) for w in each]
    if blocksize is None and not any(map(_has_blocks, each)):
        weights = [_dense(w, high, Pit(axis), operator) for w in weights]
    if M % weights[0].pattern.R:
        raise ArgumentError(f"axis='experts': {M} rows in blocks of {weights[0].pattern.R}: experts are whole blocks")
    return stacked(weights), Pit(axis, rows=M)


def _strip(M: int) -> int:
    """Rows of a strip of a matrix of M rows."""
    return min(64, -(-M // 16) * 16) or 16


def _rows(W: Any) -> int | None:
    """M of what has a shape of its own."""
    shape = _shape(W)
    return int(shape[0]) if len(shape) == 2 else None


def _shape(W: Any) -> tuple[int, ...]:
    return W.pattern.shape if isinstance(W, Weight) else tuple(getattr(W, "shape", ()))


def _has_blocks(W: Any) -> bool:
    return (
        isinstance(W, (Weight, tuple)) or getattr(W, "format", None) == "bsr" or "bsr" in str(getattr(W, "layout", ""))
    )


def _within(blocks: tuple[int, int] | None, W: Any) -> tuple[int, int] | None:
    """Blocks no wider than W."""
    return blocks and (blocks[0], max(min(blocks[1], _shape(W)[1]), 1)) if _rows(W) is not None else None


def _dense(weight: Weight, rows: int, pit: Pit, operator: Operator) -> Weight:
    """All of the matrix, in strips as wide as it is; or in blocks where a mask of outputs is too fine for whole tiles
    of tokens, where int8 is fast in whole rows only, and where lists are of columns of X."""
    p, axis = weight.pattern, pit.axis.name
    by_tokens = (axis == "outputs" and not pit.by_tiles) or weight.data.dtype == np.int8 or operator.token_axis
    strips = axis == "features" or (rows % 16 == 0 and not by_tokens)
    wide = -(-p.K // WORDS) * WORDS if strips else min(WIDTH, p.K)
    cover = full(p, (rows, max(wide, WORDS)))
    return Weight(cover.blocks, cover.move(weight.data), weight.notes)
