"""The backends: one row each.  A backend is a plan space and a way to text; building and loading are shared."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from bsrgen import nvcc, tracks
from bsrgen.backends import c, cuda, mlir
from bsrgen.emit import Source
from bsrgen.errors import UnsupportedError
from bsrgen.gpus import as_gpus
from bsrgen.pattern import Weight
from bsrgen.plan import Plan
from bsrgen.problem import Problem
from bsrgen.targets import Target, as_targets


class Candidates(Protocol):
    """Legal plans, a good guess first; without `reblock` only those over the problem's own blocks."""

    def __call__(self, problem: Problem, target: Target, *, reblock: bool = True) -> Iterator[Plan]: ...


@dataclass(frozen=True, slots=True)
class Backend:
    """The plan space, and emit: one plan per target, best target first, to sources.

    `tools` names what beside the compiler makes equal sources equal bytes for the targets; UnsupportedError where a
    package is missing, CompilerNotFoundError where nvcc is.
    """

    name: str
    candidates: Candidates
    emit: Callable[[tuple[Any, ...], Weight], Source]
    tools: Callable[[tuple[Target, ...]], str] = lambda targets: ""
    lacks: str = "use smaller blocks"  # what to do where there is no plan
    targets: Callable[[Any], tuple[Target, ...]] = as_targets  # of compile's target=, best first
    trial: Callable[[Source, tracks.Track], Source] = lambda source, track: source  # as a race builds it
    modes: tuple[str, ...] = ("static",)


BACKENDS = {
    row.name: row
    for row in (
        Backend("c", c.candidates, c.emit, modes=("static", "dynamic", "pit")),
        Backend("mlir", mlir.candidates, mlir.emit, mlir.tools, mlir.LACKS, mlir.targets),
        Backend(
            "cuda",
            cuda.candidates,
            cuda.emit,
            lambda targets: nvcc.identity(),
            cuda.LACKS,
            as_gpus,
            cuda.trial,
            modes=("static", "dynamic", "pit"),
        ),
    )
}


def backend_of(name: str, mode: str) -> Backend:
    """The backend of that name, "auto" for the first, if it has that mode; UnsupportedError says what there is."""
    modes = tuple(dict.fromkeys(mode for row in BACKENDS.values() for mode in row.modes))
    if mode not in modes:
        raise UnsupportedError(f"mode={mode!r}: one of {', '.join(modes)}")
    if name != "auto" and (not isinstance(name, str) or name not in BACKENDS):
        raise UnsupportedError(f"backend={name!r}: 'auto' or one of {', '.join(BACKENDS)}")
    backend = BACKENDS["c" if name == "auto" else name]
    if mode not in backend.modes:
        able = ", ".join(row.name for row in BACKENDS.values() if mode in row.modes)
        raise UnsupportedError(f"mode={mode!r} with backend={name!r}: it is of {able}")
    return backend
