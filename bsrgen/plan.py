"""Plan: every scheduling decision of one kernel, as data, and what it will cost in countable things."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from bsrgen.problem import Problem
from bsrgen.targets import Target


@dataclass(frozen=True, slots=True)
class Counts:
    """What one call of n tokens does on one core.  Bytes count each time they cross that boundary."""

    flop: int  # executed, zero fill and idle lanes included
    effective_flop: int  # 2 * stored elements * N
    vector_fma: int
    vector_loads: int  # operands of the multiply-adds: vectors and broadcasts
    l1_bytes: int  # read from L1 by those loads
    l2_bytes: int  # read from beyond L1: X that does not stay there, W once per chunk of tokens
    memory_bytes: int  # compulsory: weight and tables once, X once, Y once
    registers: int
    code_bytes: int  # of the micro-kernels, about
    table_bytes: int
    value_bytes: int
    cycles: float  # all of the above against the ceilings of the target


@dataclass(frozen=True)
class Plan:
    """How a problem is solved on a target.  Each backend has its own subclass with its own knobs."""

    backend: ClassVar[str] = "c"  # the row of BACKENDS that emits it

    problem: Problem
    target: Target

    @property
    def dense(self) -> bool:
        """Whether the whole matrix is multiplied, zeros included."""
        raise NotImplementedError

    @property
    def zero_filled(self) -> bool:
        """Whether elements that are not stored are multiplied as zeros: Inf and NaN in X reach their rows."""
        raise NotImplementedError

    @property
    def fallback(self) -> Target | None:
        """A lesser target for where the system keeps this one's units from the process; None where it cannot."""
        return None

    def knobs(self) -> dict[str, Any]:
        """The decisions alone, as plain data: what the manifest keeps and `inspect` prints."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("problem", "target")}

    def family(self, n: int) -> tuple[Any, ...]:
        """What plans share that do much the same at n tokens; the tuner takes few of one family.  Here: all of it."""
        return (str(self),)

    def counts(self, n: int) -> Counts:
        """Countable cost of one call of n tokens."""
        raise NotImplementedError
