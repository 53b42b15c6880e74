"""Packing for CUDA: which columns each thread block brings into shared memory, and where each value lies."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.pattern import Pattern

Integers = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """The pattern as tables, thread blocks in the order they start in: the most work first.

    A thread block has a group of piece rows and goes through its columns in steps.  The pieces of a piece row lie side
    by side, step after step: who streams W reads it as it lies.  Piece row and piece column count pieces of block rows
    and of block columns.
    """

    groups: Integers  # first piece row of each thread block: int32[groups]
    steps: Integers  # its first step: int32[groups + 1]
    columns: Integers  # first of the columns of each step: int32[steps + 1]
    features: Integers  # first feature of each column: int32
    pointers: Integers  # first piece of each piece row of a group and step of its: int32[steps * group_rows + 1]
    slots: Integers  # which column of its step a piece has: uint16[pieces]
    piece_columns: Integers  # which column, counted through, a piece has: int64[pieces]
    source: Integers  # where a piece comes from: block * row_pieces * column_pieces + its number in it: int64[pieces]

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables that the kernel reads."""
        return sum(t.nbytes for t in (self.groups, self.steps, self.columns, self.features, self.pointers, self.slots))


def pack_pattern(
    p: Pattern, row_pieces: int, column_pieces: int, group_rows: int, step_columns: int, gate_rows: int = 0
) -> Packing:
    """Tables of `p` with its blocks cut into pieces.  Pure.

    Of a pair of weights the first `gate_rows` piece rows are the gate's: `groups` are those of the gate, and groups as
    far on behind them, in `steps`, have the rows that they gate.
    """
    width = -(-p.C // column_pieces)
    rows, columns, source = _pieces(p, row_pieces, column_pieces)
    halves = 2 if gate_rows else 1
    half, local = np.divmod(rows, gate_rows or max(p.block_rows * row_pieces, 1))
    blocks = -(-(gate_rows or p.block_rows * row_pieces) // group_rows)  # thread blocks
    count, rows = halves * blocks, local % group_rows
    work = np.bincount(local // group_rows, minlength=blocks)
    schedule = np.argsort(-work, kind="stable")  # the largest first: Graham, SIAM J. Appl. Math. 17(2), 1969
    place = np.empty(blocks, np.int64)
    place[schedule] = np.arange(blocks)
    group = half * blocks + place[local // group_rows]
    wide = np.int64(max(p.block_cols * column_pieces, 1))
    keys, column = np.unique(group * wide + columns, return_inverse=True)  # columns of groups, in that order
    per_group = np.bincount(keys // wide, minlength=count)
    first = np.concatenate(([0], np.cumsum(per_group)))
    steps = np.concatenate(([0], np.cumsum(-(-per_group // step_columns))))
    inside = np.arange(keys.size) - first[keys // wide]
    step = steps[keys // wide] + inside // step_columns
    order = np.lexsort((column, rows, group))
    begin, span = steps[group], np.diff(steps)[group]
    pairs = begin * group_rows + rows * span + step[column] - begin
    filled = np.bincount(pairs, minlength=int(steps[-1]) * group_rows)
    features = keys % wide // column_pieces * p.C + keys % wide % column_pieces * width
    return Packing(
        groups=(schedule * group_rows).astype(np.int32),
        steps=steps.astype(np.int32),
        columns=np.concatenate(([0], np.cumsum(np.bincount(step, minlength=int(steps[-1]))))).astype(np.int32),
        features=features.astype(np.int32),
        pointers=np.concatenate(([0], np.cumsum(filled))).astype(np.int32),
        slots=(inside % step_columns)[column][order].astype(np.uint16),
        piece_columns=column[order],
        source=source[order],
    )


def piece_rows_of(packing: Packing, group_rows: int) -> Integers:
    """First piece of each piece row in the order of groups, and behind the last: int64[groups * group_rows + 1]."""
    steps = np.diff(packing.steps).astype(np.int64)
    ends = np.cumsum(np.repeat(steps, group_rows))
    return packing.pointers.astype(np.int64)[np.concatenate(([0], ends))]


def _pieces(p: Pattern, row_pieces: int, column_pieces: int) -> tuple[Integers, Integers, Integers]:
    """Piece row, piece column and source of all pieces of stored blocks."""
    number = np.arange(p.nnzb, dtype=np.int64)[:, None, None]
    a, b = np.arange(row_pieces)[None, :, None], np.arange(column_pieces)[None, None, :]
    shape = (p.nnzb, row_pieces, column_pieces)
    rows = np.broadcast_to(p.rows[:, None, None] * row_pieces + a, shape).ravel()
    columns = np.broadcast_to(p.indices.astype(np.int64)[:, None, None] * column_pieces + b, shape).ravel()
    return rows, columns, ((number * row_pieces + a) * column_pieces + b).ravel()


def pack_values(
    data: NDArray[Any], source: Integers, row_pieces: int, column_pieces: int, piece_rows: int, word: int = 1
) -> NDArray[Any]:
    """data[nnzb, R, C] -> [pieces, columns of a piece, rows of a piece], zeros where a block has no more.

    Of more than one, `word` columns of a row lie side by side: [pieces, words, rows, columns of a word].
    """
    nnzb, R, C = data.shape
    width = -(-C // column_pieces)
    whole = np.zeros((nnzb, row_pieces * piece_rows, column_pieces * width), data.dtype)
    whole[:, :R, :C] = data
    pieces = whole.reshape(nnzb, row_pieces, piece_rows, column_pieces, width).transpose(0, 1, 3, 4, 2)
    chosen = pieces.reshape(-1, width // word, word, piece_rows)[source].swapaxes(2, 3)
    return np.ascontiguousarray(chosen.reshape(-1, width // word, piece_rows, word) if word > 1 else chosen[..., 0])
