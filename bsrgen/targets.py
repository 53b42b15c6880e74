"""The targets: ISA levels and microarchitectures, one row each."""

import functools
from dataclasses import dataclass, replace
from typing import Any

from bsrgen import calibration
from bsrgen.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from bsrgen.machine import cache_bytes, tiles_permitted


@dataclass(frozen=True, slots=True)
class Target:
    """What the compiler and the planner must know of a CPU.  Rates are per core; native() has measured ones.

    `requires` are the features a CPU must have, by their names in __builtin_cpu_supports; tuning needs none.  Dot and
    tile rates are those of Intel's first CPUs with AMX (research/cpu.md, section 1) where a row says nothing else.
    """

    name: str
    family: str  # what archspec calls the architecture: x86_64, aarch64
    flags: tuple[str, ...]
    requires: tuple[str, ...]
    vector_bytes: int
    registers: int
    fma: bool
    fma_per_cycle: float  # vector multiply-adds (mul and add where there is no fma)
    bf16_dot_per_cycle: float = 0.5  # vdpbf16ps on whole vectors, where there is avx512bf16
    int8_dot_per_cycle: float = 2.0  # vpdpbusd on whole vectors, where there is avx512vnni or avxvnni
    loads_per_cycle: float = 2.0  # vector loads that hit L1
    fma_latency: int = 4
    dot_latency: int = 6  # of the slower one, vdpbf16ps
    product_cycles_least: float = 9.5  # of a product of matrix tiles, where there is amx-tile
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

    @property
    def host(self) -> str:
        """The CPU architecture that a library for this target is loaded on."""
        return self.family

    @property
    def where(self) -> str:
        """What a prediction is the time of."""
        return "one core"

    def matrix_flop_per_cycle(self, dtype: str) -> float:
        """Peak of a GPU's matrix units, which dense libraries use; 0 where there are none."""
        return 0.0

    def flop_per_cycle(self, real_bytes: int) -> float:
        """Peak FLOP of one core in one cycle."""
        return 2 * self.fma_per_cycle * self.lanes(real_bytes)

    def has(self, feature: str) -> bool:
        """Whether code for this target may use `feature`, by its name in `requires`."""
        return feature in self.requires

    def product_cycles(self, a_rows: int, b_rows: int) -> float:
        """Cycles of one product of matrix tiles, however many columns (research/cpu.md, section 1)."""
        return max(a_rows, b_rows, self.product_cycles_least)

    def lanes(self, real_bytes: int) -> int:
        """Elements of `real_bytes` in one vector register."""
        return self.vector_bytes // real_bytes


_V2 = ("sse3", "ssse3", "sse4.1", "sse4.2", "popcnt")
_V3 = (*_V2, "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_V4_VNNI = (*_V4, "avx512vnni")
_V4_BF16 = (*_V4_VNNI, "avx512bf16", "avx512vbmi2")  # Zen 4 on, Sapphire Rapids on
_V4_AMX = (*_V4_BF16, "avx512vbmi", "amx-tile", "amx-bf16", "amx-int8")
_WIDE = "-mprefer-vector-width=512"  # gcc 12 and clang 19 prefer 256 bits for most AVX-512 machines

X86_64 = Target("x86-64", "x86_64", ("-march=x86-64",), (), 16, 16, False, 1)
X86_64_V2 = Target("x86-64-v2", "x86_64", ("-march=x86-64-v2",), _V2, 16, 16, False, 1)
X86_64_V3 = Target("x86-64-v3", "x86_64", ("-march=x86-64-v3",), _V3, 32, 16, True, 2)
X86_64_V4 = Target("x86-64-v4", "x86_64", ("-march=x86-64-v4", _WIDE), _V4, 64, 32, True, 2)
AARCH64 = Target("aarch64", "aarch64", ("-march=armv8-a",), (), 16, 32, True, 2)


def _with(level: Target, suffix: str, requires: tuple[str, ...]) -> Target:
    """`level` and what else `requires` has, which gcc and clang enable under the same names."""
    flags = (*level.flags, *(f"-m{name}" for name in requires if not level.has(name)))
    return replace(level, name=f"{level.name}-{suffix}", flags=flags, requires=requires)


X86_64_V3_VNNI = _with(X86_64_V3, "vnni", (*_V3, "avxvnni"))
X86_64_V4_VNNI = _with(X86_64_V4, "vnni", _V4_VNNI)
X86_64_V4_BF16 = replace(_with(X86_64_V4, "bf16", _V4_BF16), bf16_dot_per_cycle=2.0)  # as Zen 4 and 5, not yet tiles
X86_64_V4_AMX = replace(_with(X86_64_V4, "amx", _V4_AMX), l1_bytes=48 << 10, l2_bytes=2 << 20, ghz=3.05)  # Golden Cove

_X86 = (X86_64, X86_64_V2, X86_64_V3, X86_64_V3_VNNI, X86_64_V4, X86_64_V4_VNNI, X86_64_V4_BF16, X86_64_V4_AMX)
TARGETS = {row.name: row for row in (*_X86, AARCH64)}
_SPELLINGS = {  # archspec's, which are Linux's, of what no level of its own has
    "avxvnni": "avx_vnni", "avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vbmi": "avx512vbmi", "amx-tile": "amx_tile", "amx-bf16": "amx_bf16", "amx-int8": "amx_int8",
}  # fmt: skip
_AMX = frozenset(("amx_tile", "amx_bf16", "amx_int8"))


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
    cpu = archspec.cpu.TARGETS[name]
    return _best(cpu.family.name, frozenset(cpu.features), name)


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

    row = _best(archspec.cpu.host().family.name, features(), "native")
    caches = cache_bytes()
    return replace(row, l1_bytes=caches["L1"], l2_bytes=caches["L2"], l3_bytes=caches["L3"])


@functools.cache
def features() -> frozenset[str]:
    """What this CPU has and the kernel lets this process use, in archspec's spelling.

    archspec's own pick of a name is not asked: on virtual machines it drops to an older one for one masked feature,
    and with it what the machine has all the same.
    """
    import archspec.cpu
    from archspec.cpu.detect import detected_info

    raw = frozenset(detected_info().features) | frozenset(archspec.cpu.host().features)
    return raw if raw >= _AMX and tiles_permitted() else raw - _AMX


def runs_here(target: Target) -> bool:
    """Whether this CPU executes code for `target`: native() is the best such row, but not every other one below it."""
    import archspec.cpu

    family = archspec.cpu.host().family.name
    return target.family == family and (family == "aarch64" or features() >= _needs(target))


def _best(family: str, found: frozenset[str], asked: str) -> Target:
    """The best row of `family` that a CPU with the features `found` executes."""
    if family == "aarch64":
        return AARCH64
    if family != "x86_64":
        raise UnsupportedError(f"target {asked!r}: no C target for {family}; one of {', '.join(TARGETS)}")
    return next((row for row in reversed(_X86) if found >= _needs(row)), X86_64)


def _needs(row: Target) -> frozenset[str]:
    """What archspec must find for a row of x86: all of its level and the features beyond it."""
    import archspec.cpu

    level = "_".join(row.name.split("-")[:3])  # x86_64, x86_64_v4
    extra = frozenset(_SPELLINGS[name] for name in row.requires if name in _SPELLINGS)
    return frozenset(archspec.cpu.TARGETS[level].features) | extra
