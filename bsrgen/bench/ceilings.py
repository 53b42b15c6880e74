"""Ceilings of one core, measured with the kernels: multiply-add peaks and read rates out of each level of the caches.

A neighbour on the same core or socket moves the peak, so a ceiling taken once is worth little: `Ceiling.call` does a
fixed amount of work and goes into `clock.measure` beside the kernels, in the same rounds.

    python -m bsrgen.bench.ceilings
"""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cffi
import numpy as np
from numpy.typing import NDArray

from bsrgen._paths import RUNTIME
from bsrgen.bench.clock import SAMPLE_S, Timing, measure
from bsrgen.build import find_compiler
from bsrgen.errors import BuildError, UnsupportedError
from bsrgen.machine import cache_bytes
from bsrgen.targets import native

SOURCE = RUNTIME / "bsrgen_ceilings.c"
CDEF = """
struct peak { const char *level, *dtype, *operand; int lanes, accumulators; void (*run)(const char *, ptrdiff_t); };
struct read { const char *level; int vector_bytes; void (*run)(const char *, ptrdiff_t, ptrdiff_t); };
extern const struct peak peaks[];
extern const struct read reads[];
int has_level(const char *level);
"""
STEP_BYTES = 1024  # a read pass is a multiple of 16 vectors of at most 64 bytes
PEAK_FLOP = {"f64": 6e6, "f32": 12e6, "bf16": 48e6, "s8": 48e6}  # of one call, by type
WINDOW_BYTES = 4 << 20  # one call's share of a buffer too large to be read in one


@dataclass(frozen=True, slots=True)
class Ceiling:
    """A call that does `work` flop or bytes, and the row of bsrgen_ceilings.c that does it fastest here."""

    name: str
    work: float
    call: Callable[[], object]
    row: str

    def rate(self, timing: Timing) -> float:
        """Best rate seen, in flop/s or bytes/s."""
        return self.work / timing.min_s

    def share(self, timing: Timing, kernel: Timing, kernel_work: float) -> float:
        """The rate of a kernel as a share of this ceiling: the median over rounds that took both side by side."""
        return kernel.ratio(timing) * kernel_work / self.work


@functools.cache
def _load() -> tuple[cffi.FFI, Any]:
    """Compile and open the rows, once and for good: a Ceiling's call may outlive its Ceilings."""
    if os.environ.get("BSRGEN_DISABLE_JIT") == "1":
        raise BuildError("the ceilings are compiled when they are measured, but BSRGEN_DISABLE_JIT=1 forbids it")
    ffi = cffi.FFI()
    ffi.cdef(CDEF)
    with tempfile.TemporaryDirectory() as folder:
        lib = Path(folder) / "ceilings.so"
        command = [find_compiler(native()).path, "-O2", "-shared", "-fPIC", "-o", str(lib), str(SOURCE)]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if result.returncode:
            raise BuildError(f"{' '.join(command)}: exit status {result.returncode}: {result.stderr[:500]}")
        return ffi, ffi.dlopen(str(lib))


class Ceilings:
    """Compiles bsrgen_ceilings.c and offers its rows as `Ceiling`s; the fastest row is found once for each question."""

    def __init__(self) -> None:
        self._ffi, self._lib = _load()
        self._found: dict[str, Ceiling] = {}
        self._buffers: dict[int, NDArray[Any]] = {}
        sizes = cache_bytes()
        self.sizes = {
            "L1": sizes["L1"] // 2,
            "L2": sizes["L2"] // 2,
            "L3": sizes["L3"] // 4,  # shared, and a part of it may be all that a virtual machine gets
            "DRAM": min(max(4 * sizes["L3"], 128 << 20), 1 << 30),
        }

    def _rows(self, table: Any, level: str | None) -> list[Any]:
        rows: list[Any] = []
        while table[len(rows)].level != self._ffi.NULL:
            rows.append(table[len(rows)])
        name = None if level is None else level.encode()
        return [r for r in rows if self._lib.has_level(r.level) and name in (None, self._ffi.string(r.level))]

    def _text(self, value: Any) -> str:
        return str(self._ffi.string(value), "ascii")

    @property
    def levels(self) -> tuple[str, ...]:
        """The ISA levels of this CPU that have rows, lowest first."""
        return tuple(dict.fromkeys(self._text(r.level) for r in self._rows(self._lib.reads, None)))

    @functools.cached_property
    def peaks(self) -> tuple[tuple[str, str, str], ...]:
        """(dtype, operand, level) of the peaks that this CPU has, without repeats."""
        rows = self._rows(self._lib.peaks, None)
        return tuple(dict.fromkeys((self._text(r.dtype), self._text(r.operand), self._text(r.level)) for r in rows))

    def counted_as(self, dtype: str) -> str:
        """The type whose peak stands for that of `dtype`."""
        return dtype if dtype in {name for name, _, _ in self.peaks} else "f32"

    def _buffer(self, nbytes: int) -> Any:
        """`nbytes` of values between 1/2 and 1, 64-byte aligned, cut out of an array large enough for huge pages."""
        if nbytes not in self._buffers:
            block = np.random.default_rng(0).uniform(0.5, 1.0, 1 << 20)
            array = np.resize(block, max(nbytes // 8 + 8, block.size))
            self._buffers[nbytes] = array[-(array.ctypes.data // 8) % 8 :].view(np.uint8)[:nbytes]
        return self._ffi.from_buffer("char[]", self._buffers[nbytes])

    def _best(self, name: str, work: float, calls: Mapping[str, Callable[[], object]]) -> Ceiling:
        """The fastest of `calls`, timed at the first question only."""
        if not calls:
            raise UnsupportedError(f"{name}: no row of {SOURCE.name} runs on this CPU; it has {', '.join(self.levels)}")
        if name not in self._found:
            timings = measure(calls, rounds=5)
            row = min(timings, key=lambda r: timings[r].min_s)
            self._found[name] = Ceiling(name, work, calls[row], row)
        return self._found[name]

    def fma(self, dtype: str = "f32", operand: str = "reg", level: str | None = None) -> Ceiling:
        """Multiply-add peak for `dtype` (DType.short) with operands in registers (`reg`), or one a vector (`mem`) or a
        broadcast scalar (`bcast`) out of L1; at `level` (sse2: multiply and add) or at the fastest one.

        bf16 and s8 are dot products, or products of matrix tiles (level amx), which `mem` loads anew for every four.
        Where the CPU has neither, as for f16, the peak is that of f32: what a kernel converts to."""
        dtype = self.counted_as(dtype)
        buffer = self._buffer(4096)
        work, calls = PEAK_FLOP[dtype], {}
        for r in self._rows(self._lib.peaks, level):
            if (self._text(r.dtype), self._text(r.operand)) == (dtype, operand):
                n = round(work / (2 * r.lanes * r.accumulators))
                calls[f"{self._text(r.level)}, {r.accumulators} accumulators"] = functools.partial(r.run, buffer, n)
        return self._best(f"fma {dtype} {operand} {level or 'best'}", work, calls)

    def read(self, nbytes: int, level: str | None = None) -> Ceiling:
        """Read rate of a buffer of `nbytes` that was read just before: out of the smallest cache that holds it."""
        nbytes = max(nbytes // STEP_BYTES, 1) * STEP_BYTES
        buffer = self._buffer(nbytes)
        windows = max(nbytes // WINDOW_BYTES, 1)
        window = nbytes // windows // STEP_BYTES * STEP_BYTES
        passes = max(round(20e9 * SAMPLE_S / window), 1)
        rows = self._rows(self._lib.reads, level)
        calls = {self._text(r.level): _walk(r.run, buffer, window, windows, passes) for r in rows}
        return self._best(f"read {nbytes} bytes {level or 'best'}", float(window * passes), calls)

    def standard(self, dtype: str = "f32") -> dict[str, Ceiling]:
        """The ceilings a report shows: three peaks for `dtype` and the read rates of the memory levels."""
        peaks = {f"fma {operand}": self.fma(dtype, operand) for operand in self.operands(dtype)}
        return peaks | {f"read {name}": self.read(nbytes) for name, nbytes in self.sizes.items()}

    def operands(self, dtype: str) -> tuple[str, ...]:
        """The kinds of operand that have rows here."""
        dtype = self.counted_as(dtype)
        return tuple(dict.fromkeys(operand for name, operand, _ in self.peaks if name == dtype))


def _walk(run: Any, buffer: Any, window: int, windows: int, passes: int) -> Callable[[], None]:
    """Read the next window of `buffer` `passes` times at every call, round and round."""
    starts = [buffer + i * window for i in range(windows)]
    position = 0

    def call() -> None:
        nonlocal position
        run(starts[position], window, passes)
        position = (position + 1) % windows

    return call


def main() -> None:
    """Print the ceilings of this core, per ISA level."""
    ceilings = Ceilings()
    print("sizes", {k: f"{v >> 10} KB" for k, v in ceilings.sizes.items()})
    rows = {
        f"{dtype:4} {operand:5} {level}": ceilings.fma(dtype, operand, level)
        for dtype, operand, level in sorted(ceilings.peaks, key=lambda peak: peak[::2])
    }
    rows |= {name: c for name, c in ceilings.standard().items() if name.startswith("read")}
    timings = measure({name: c.call for name, c in rows.items()}, rounds=30)
    for name, ceiling in rows.items():
        best, median = ceiling.rate(timings[name]), ceiling.work / timings[name].median_s
        print(f"{name:21} {best * 1e-9:8.1f} G/s best {median * 1e-9:8.1f} median   ({ceiling.row})")


if __name__ == "__main__":
    main()
