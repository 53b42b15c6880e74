"""The backends: one row each.  A backend is a plan space and a way to text; building and loading are shared."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bsrgen.backends import c
from bsrgen.emit import Source
from bsrgen.pattern import Weight
from bsrgen.plan import Plan
from bsrgen.problem import Problem
from bsrgen.targets import Target


@dataclass(frozen=True, slots=True)
class Backend:
    """candidates: legal plans, a good guess first.  emit: one plan per target, best target first, to sources."""

    name: str
    candidates: Callable[[Problem, Target], Iterable[Plan]]
    emit: Callable[[tuple[Any, ...], Weight], Source]


BACKENDS = {row.name: row for row in (Backend("c", c.candidates, c.emit),)}
