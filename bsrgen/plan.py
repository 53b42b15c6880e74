"""Plan: every scheduling decision of one kernel, as data, and what it will cost in countable things."""

from dataclasses import dataclass, fields
from typing import Any

from bsrgen.problem import Problem
from bsrgen.targets import Target


@dataclass(frozen=True, slots=True)
class Counts:
    """What one call of n tokens does on one core.  Bytes are read or written at that level, each time they are."""

    flop: int  # executed, zero fill and idle lanes included
    effective_flop: int  # 2 * stored elements * N
    vector_fma: int
    vector_loads: int  # operands of the multiply-adds: vectors and broadcasts
    l1_bytes: int  # what vector_loads and accumulator spills move
    l2_bytes: int  # what does not stay in L1 between two uses
    memory_bytes: int  # compulsory: weight and tables once, X once, Y once
    registers: int
    code_bytes: int
    table_bytes: int
    value_bytes: int


@dataclass(frozen=True)
class Plan:
    """How a problem is solved on a target.  Each backend has its own subclass with its own knobs."""

    problem: Problem
    target: Target

    def knobs(self) -> dict[str, Any]:
        """The decisions alone, as plain data: what the manifest keeps and `inspect` prints."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("problem", "target")}

    def counts(self, n: int) -> Counts:
        """Countable cost of one call of n tokens."""
        raise NotImplementedError
