"""Peer: one way of calling one library, and Run: the same prepared for one case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bsrgen.bench.case import Case

Array = NDArray[Any]
FULL = ("float32", "float64")
Kind = Literal["bsrgen", "dense", "sparse", "mlir", "stock", "dynamic", "prepare"]  # the last four where asked


@dataclass(frozen=True, slots=True)
class Run:
    """A peer, prepared: `call()` computes, `result()` shows the latest output in the operator's shape."""

    call: Callable[[], object]
    result: Callable[[], Array]


@dataclass(frozen=True, slots=True)
class Peer:
    """One way of calling one library; `declines` gives the reason why it cannot take a case of its types, or None."""

    name: str
    library: str
    kind: Kind
    declines: Callable[[Case], str | None]
    prepare: Callable[[Case], Run]
    dtypes: tuple[str, ...] = FULL


def shown(case: Case, Y: Array) -> Array:
    """An (M, N) output, perhaps of padded rows, as the operator's output."""
    Y = Y.reshape(-1, case.n)[: case.weight.pattern.M]
    return Y.T if case.linear else Y


def as_torch(a: Array) -> Any:
    """A torch tensor over the same memory; bfloat16 goes by its bits."""
    import torch

    a = a if a.flags.writeable else a.copy()
    if a.dtype.name == "bfloat16":
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(a)
