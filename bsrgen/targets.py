"""The targets: ISA levels and microarchitectures, one row each."""

import functools
from dataclasses import dataclass, replace
from typing import Any

from bsrgen import calibration
from bsrgen.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from bsrgen.machine import cache_bytes


@dataclass(frozen=True, slots=True)
class Target:
    """What the compiler and the planner must know of a CPU.  Rates are per core; native() has measured ones.

    `requires` are the features a CPU must have, by their names in __builtin_cpu_supports; tuning needs none.
    """

    name: str
    family: str  # what archspec calls the architecture: x86_64, aarch64
    flags: tuple[str, ...]
    requires: tuple[str, ...]
    vector_bytes: int
    registers: int
    fma: bool
    fma_per_cycle: float  # vector multiply-adds (mul and add where there is no fma)
    loads_per_cycle: float = 2.0  # vector loads that hit L1
    fma_latency: int = 4
    l1_bytes: int = 32 << 10
    l2_bytes: int = 1 << 20
    l3_bytes: int = 16 << 20  # of all cores that share it
    l2_bytes_per_cycle: float = 48.0
    l3_bytes_per_cycle: float = 12.0
    dram_bytes_per_cycle: float = 6.0  # one core alone
    ghz: float = 3.5
    call_s: float = 3e-7  # a call of next to no work
    fork_s: float = 1.3e-5  # what a second thread, asleep, adds to a call

    def bytes_per_cycle(self, working_set_bytes: float) -> float:
        """What one core reads from the level that holds the working set: its share of a shared L3 counts as half."""
        if working_set_bytes <= 0.75 * self.l1_bytes:
            return self.vector_bytes * self.loads_per_cycle
        if working_set_bytes <= 0.75 * self.l2_bytes:
            return self.l2_bytes_per_cycle
        return self.l3_bytes_per_cycle if working_set_bytes <= self.l3_bytes / 2 else self.dram_bytes_per_cycle

    def flop_per_cycle(self, real_bytes: int) -> float:
        """Peak FLOP of one core in one cycle."""
        return 2 * self.fma_per_cycle * self.lanes(real_bytes)

    def lanes(self, real_bytes: int) -> int:
        """Elements of `real_bytes` in one vector register."""
        return self.vector_bytes // real_bytes


_V2 = ("sse3", "ssse3", "sse4.1", "sse4.2", "popcnt")
_V3 = (*_V2, "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_WIDE = "-mprefer-vector-width=512"  # gcc 12 and clang 19 prefer 256 bits for most AVX-512 machines

X86_64 = Target("x86-64", "x86_64", ("-march=x86-64",), (), 16, 16, False, 1)
X86_64_V2 = Target("x86-64-v2", "x86_64", ("-march=x86-64-v2",), _V2, 16, 16, False, 1)
X86_64_V3 = Target("x86-64-v3", "x86_64", ("-march=x86-64-v3",), _V3, 32, 16, True, 2)
X86_64_V4 = Target("x86-64-v4", "x86_64", ("-march=x86-64-v4", _WIDE), _V4, 64, 32, True, 2)
AARCH64 = Target("aarch64", "aarch64", ("-march=armv8-a",), (), 16, 32, True, 2)

TARGETS = {row.name: row for row in (X86_64, X86_64_V2, X86_64_V3, X86_64_V4, AARCH64)}
_LEVELS = {"x86_64": X86_64, "x86_64_v2": X86_64_V2, "x86_64_v3": X86_64_V3, "x86_64_v4": X86_64_V4}


def baseline(target: Target) -> Target:
    """The row that every CPU of the family can run."""
    return next(row for row in TARGETS.values() if row.family == target.family and not row.requires)


def as_targets(value: str | tuple[str, ...] | list[str]) -> tuple[Target, ...]:
    """The rows of `value`, best first, without repeats.  A microarchitecture's name stands for its ISA level."""
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else value
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise ArgumentTypeError(f"target={value!r}: a name or a tuple of names, e.g. 'native'")
    if not names:
        raise ArgumentError("target=(): at least one is needed, e.g. 'native'")
    rows = {row.name: row for row in map(_as_target, names)}
    families = {row.family for row in rows.values()}
    if len(families) > 1:
        raise UnsupportedError(f"targets {', '.join(names)}: one artifact holds one architecture, not {families}")
    return tuple(sorted(rows.values(), key=lambda row: (row.vector_bytes, len(row.requires)), reverse=True))


def _as_target(name: str) -> Target:
    if name == "native":
        return native()
    if name in TARGETS:
        return TARGETS[name]
    import archspec.cpu

    if name not in archspec.cpu.TARGETS:
        raise ArgumentError(f"target {name!r}: 'native', one of {', '.join(TARGETS)}, or a name that archspec knows")
    return _level(archspec.cpu.TARGETS[name], name)


def native() -> Target:
    """The best level that this machine's CPU has in full, with this machine's caches and, where `bsrgen doctor
    --calibrate` has measured them, its rates."""
    row, (record, _) = host(), calibration.read()
    if record is None or record.level != row.name:
        return row
    rates: dict[str, Any] = record.rates.known()
    return replace(row, **rates)


@functools.cache
def host() -> Target:
    """native() with the default rates."""
    import archspec.cpu

    row = _level(archspec.cpu.host(), "native")
    caches = cache_bytes()
    return replace(row, l1_bytes=caches["L1"], l2_bytes=caches["L2"], l3_bytes=caches["L3"])


def _level(cpu: "archspec.cpu.Microarchitecture", asked: str) -> Target:  # type: ignore[name-defined]  # noqa: F821
    """ISA level of an archspec entry: what it may execute.  archspec's own pick of a name is not used, only features:
    on virtual machines it drops to an older name for one masked feature (research note: icelake for a newer CPU)."""
    import archspec.cpu

    if cpu.family.name == "aarch64":
        return AARCH64
    if cpu.family.name != "x86_64":
        raise UnsupportedError(f"target {asked!r}: no C target for {cpu.family.name}; one of {', '.join(TARGETS)}")
    known = [row for level, row in _LEVELS.items() if cpu.features >= archspec.cpu.TARGETS[level].features]
    return known[-1] if known else X86_64
