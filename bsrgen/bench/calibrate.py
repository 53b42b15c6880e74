"""Calibrate: the ceilings of this core, and what a call and a second thread cost, as the record that native() reads."""

import datetime
import functools
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cffi
import numpy as np

from bsrgen import api
from bsrgen._paths import RUNTIME
from bsrgen.bench.ceilings import Ceiling, Ceilings
from bsrgen.build import find_compiler
from bsrgen.calibration import SCHEMA, Calibration, Rates
from bsrgen.clock import Timing, measure
from bsrgen.errors import BuildError
from bsrgen.machine import cpu_model, parallel_cores
from bsrgen.pattern import random_weight
from bsrgen.targets import Target, host

LEVELS = {("x86_64", 16): "sse2", ("x86_64", 32): "avx2", ("x86_64", 64): "avx512", ("aarch64", 16): "neon"}
DOTS = {  # a field of Rates: type, products in a dot of 32 bits, features that bring it, which name the ceiling's level
    "bf16_dot_per_cycle": ("bf16", 2, ("avx512bf16",)),
    "int8_dot_per_cycle": ("s8", 4, ("avx512vnni", "avxvnni")),
}
ROUNDS = 100
FORK_WORK_S, FORK_PAUSE_S, FORKS = 5e-5, 1e-3, 200  # a part of a small call; long enough for workers to fall asleep
CALL = "call"


def calibrate(progress: Callable[[float], object] = lambda share: None) -> Calibration:
    """Measure this core for a few seconds.  BuildError where there is no compiler."""
    target = host()
    progress(0.0)
    ceilings = Ceilings()
    level = LEVELS[target.family, target.vector_bytes]
    rows = {f"fma {operand}": ceilings.fma("f32", operand, level) for operand in ("reg", "mem")}
    rows |= _dots(target, ceilings)
    for done, (name, nbytes) in enumerate(ceilings.sizes.items(), 1):
        rows[f"read {name}"] = ceilings.read(nbytes, level)
        progress(0.1 * done)
    calls = {name: row.call for name, row in rows.items()} | {CALL: _tiny_call()}
    times = measure(calls, rounds=ROUNDS, progress=lambda share: progress(0.4 + 0.5 * share))
    rates = _rates(target, rows, times, _fork_s() if parallel_cores() > 1 else None)
    progress(1.0)
    return Calibration(SCHEMA, cpu_model(), target.name, datetime.date.today().isoformat(), rates)


def _dots(target: Target, ceilings: Ceilings) -> dict[str, Ceiling]:
    """The ceilings of those dot products that the target has, by the name of their rate."""
    levels = {name: next(filter(target.has, features), None) for name, (_, _, features) in DOTS.items()}
    return {name: ceilings.fma(DOTS[name][0], "reg", level) for name, level in levels.items() if level}


def _rates(target: Target, rows: dict[str, Ceiling], times: dict[str, Timing], fork_s: float | None) -> Rates:
    """Rates per cycle, a cycle being what the multiply-adds in registers make of the row's fma_per_cycle."""
    rate = {name: row.rate(times[name]) for name, row in rows.items()}
    hz = rate["fma reg"] / target.flop_per_cycle(4)
    fma_loads = rate["fma mem"] / (2 * target.lanes(4))  # one load each
    loads = max(fma_loads, rate["read L1"] / target.vector_bytes)
    dots = {name: rate[name] / (2 * terms * target.lanes(4)) for name, (_, terms, _) in DOTS.items() if name in rate}
    return Rates(
        ghz=_rounded(hz / 1e9), loads_per_cycle=_rounded(loads / hz), l2_bytes_per_cycle=_rounded(rate["read L2"] / hz),
        l3_bytes_per_cycle=_rounded(rate["read L3"] / hz), dram_bytes_per_cycle=_rounded(rate["read DRAM"] / hz),
        call_s=_rounded(times[CALL].min_s), fork_s=fork_s and _rounded(fork_s),
        **{name: _rounded(a_second / hz) for name, a_second in dots.items()},
    )  # fmt: skip


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _tiny_call() -> Callable[[], object]:
    """One token through a 16 x 16 matrix: from Python into C and back, and next to no work."""
    weight = random_weight(0, (16, 16), (16, 1), 0.25)
    kernel = api.compile(weight, tune="off", threads=1)
    return functools.partial(kernel, np.ones((1, 16), np.float32), out=np.empty((1, 16), np.float32))


@functools.cache  # the library has threads: it is never closed
def _fork_library() -> Any:
    ffi = cffi.FFI()
    ffi.cdef("double fork_delay(double work_s, double pause_s);")
    with tempfile.TemporaryDirectory() as folder:
        lib = Path(folder) / "fork.so"
        flags = ["-O2", "-std=gnu11", "-D_GNU_SOURCE", "-shared", "-fPIC", "-pthread"]
        command = [find_compiler(host()).path, *flags, "-o", str(lib), str(RUNTIME / "bsrgen_fork.c")]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if result.returncode:
            raise BuildError(f"{' '.join(command)}: exit status {result.returncode}: {result.stderr[:500]}")
        return ffi.dlopen(str(lib))


def _fork_s() -> float:
    """The usual delay of a call of two threads; not pinned, or they would share a core."""
    lib = _fork_library()
    delays: list[float] = [lib.fork_delay(FORK_WORK_S, FORK_PAUSE_S) for _ in range(FORKS)]
    return max(statistics.median(delays), 1e-7)
