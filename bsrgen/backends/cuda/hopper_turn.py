"""X of `linear` turned for Hopper: which features, and how many tokens at a time."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.even import EvenPattern
from bsrgen.pattern import Pattern

Integers = NDArray[Any]

CHUNK = 8  # features of two bytes that are loaded together
TURN_WIDTH = 64  # tokens and features of a thread block; rows of what is turned are multiples of it
BAND_SHARE = 1 / 3  # of L2 for what is turned, beside X, W and Y on their way
MOST_TOKENS = 1 << 31  # of a call that is not cut into bands
BAND_TOKENS = 1024  # at least: four tiles of 256, or SMs would wait


@dataclass(frozen=True, slots=True, eq=False)
class Turning:
    """What of X is turned: the features that the pattern has at all.  `rows` of the copy; of a pattern that is known by
    its count alone no more than that."""

    rows: int
    chunks: Integers  # first of eight features, of which some are turned: int32[chunks]
    row_of: Integers  # row of the copy of each of them, -1 for none: int32[chunks * 8]
    features: Integers  # feature of X of each row: int32[rows]

    @property
    def whole(self) -> bool:
        """Whether all of X is turned, so that nothing needs a table."""
        return self.rows == self.features[-1] + 1 if self.rows else False


def turning_of(p: Pattern) -> Turning:
    """Features of stored blocks, in their order."""
    if isinstance(p, EvenPattern):  # each block stored by chance
        nothing = np.zeros(0, np.int32)
        return Turning(round(p.K * (1 - (1 - p.density) ** max(p.block_rows, 1))), nothing, nothing, nothing)
    features = (np.unique(p.indices).astype(np.int64)[:, None] * p.C + np.arange(p.C)).ravel()
    features = features[features < p.K]
    chunks = np.unique(features // CHUNK)
    row_of = np.full(chunks.size * CHUNK, -1, np.int32)
    row_of[np.searchsorted(chunks, features // CHUNK) * CHUNK + features % CHUNK] = np.arange(features.size)
    return Turning(features.size, (chunks * CHUNK).astype(np.int32), row_of, features.astype(np.int32))


def band_of(row_bytes: int, l2_bytes: int) -> int:
    """Tokens that are turned at a time, each of so many bytes, so that they stay in L2."""
    return max(int(l2_bytes * BAND_SHARE / max(row_bytes, 1)) // BAND_TOKENS, 1) * BAND_TOKENS
