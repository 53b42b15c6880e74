"""Stack: several weights that share X as one, their rows one after the other."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bsrgen.errors import ArgumentError
from bsrgen.pattern import Pattern, Weight


def are_several(W: Any) -> bool:
    """Whether W is a list of weights, and not of rows or numbers."""
    return isinstance(W, list) and all(isinstance(w, (tuple, Weight)) or len(getattr(w, "shape", ())) == 2 for w in W)


def stacked(weights: Sequence[Weight]) -> Weight:
    """One weight of all rows: whole blocks of every weight but the last.

    ArgumentError where they differ in K, block shape or type.
    """
    first = weights[0].pattern
    for number, weight in enumerate(weights):
        p = weight.pattern
        if (p.K, p.blocksize, weight.data.dtype) != (first.K, first.blocksize, weights[0].data.dtype):
            kinds = f"W[{number}] is {p} of {weight.data.dtype}, W[0] {first} of {weights[0].data.dtype}"
            raise ArgumentError(f"{kinds}: weights that share X have the same columns, block shape and type")
    starts = np.cumsum([0, *(weight.pattern.nnzb for weight in weights)])
    indptr = np.concatenate(
        ([0], *(weight.pattern.indptr[1:] + start for weight, start in zip(weights, starts, strict=False)))
    )
    M = sum(weight.pattern.block_rows * first.R for weight in weights[:-1]) + weights[-1].pattern.M
    indices = np.concatenate([weight.pattern.indices for weight in weights])
    notes = tuple(note for weight in weights for note in weight.notes)
    data = np.concatenate([weight.data for weight in weights])
    return Weight(Pattern((M, first.K), first.blocksize, indptr, indices), data, notes)


def parts_of(weights: Sequence[Weight], paired: bool) -> tuple[int, ...]:
    """Features of Y that each weight makes, or a pair of them together.  ArgumentError where they do not fit."""
    if not weights:
        raise ArgumentError("W=[]: at least one weight")
    rows = [weight.pattern.M for weight in weights]
    if paired and (len(rows) != 2 or rows[0] != rows[1]):
        raise ArgumentError(
            f"swiglu and geglu take two weights of one shape, W=[gate, up]; got {len(rows)} of {rows} rows"
        )
    R = weights[0].pattern.R
    if not paired and any(m % R for m in rows[:-1]):
        raise ArgumentError(
            f"weights of {rows} rows in blocks of {R}: all but the last must be whole blocks to share X"
        )
    return (rows[1],) if paired else tuple(rows)
