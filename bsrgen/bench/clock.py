"""Peers on the clock: the libraries' thread counts, and a process without what holds them back."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Iterator

from bsrgen.clock import SAMPLE_S, Call, Timing, measure, pinned
from bsrgen.errors import UnsupportedError

__all__ = ["SAMPLE_S", "Call", "Timing", "at_their_best", "importable", "measure", "peer_threads", "pinned"]
HANDICAPS = frozenset(
    (
        *("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE"),
        *("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"),
    )
)
_STARTED = "_BSRGEN_BENCH"  # set in the process that at_their_best started


@functools.cache
def importable(name: str) -> bool:
    """Whether `name` can be imported here; it is imported, so that no later call pays for that."""
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
        return True
    return False


@contextlib.contextmanager
def peer_threads(count: int = 1) -> Iterator[None]:
    """OpenBLAS, OpenMP and torch on `count` threads; without threadpoolctl only where the environment says so.

    Several threads keep to as many cores: TBB, which MKL uses then, takes all cores of the process.
    """
    with contextlib.ExitStack() as stack:
        if count > 1 and hasattr(os, "sched_getaffinity"):
            stack.enter_context(pinned(sorted(os.sched_getaffinity(0))[-count:]))
        if importable("torch"):
            import torch

            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(count)
        if importable("threadpoolctl"):
            import threadpoolctl

            stack.enter_context(threadpoolctl.threadpool_limits(count))
        elif os.environ.get("OMP_NUM_THREADS") != str(count):
            raise UnsupportedError(
                f"peers on {count} threads: pip install threadpoolctl, or start with OMP_NUM_THREADS={count}"
            )
        yield


def at_their_best(threads: int = 1) -> None:
    """Start this process again without the variables that hold a peer below what it would choose for this CPU.

    With OPENBLAS_CORETYPE=Haswell in the environment, numpy's dense product runs at half its speed on an AVX-512 core;
    a win over that would say nothing.  Call it before numpy has done any work, first thing in a benchmark's main.
    """
    if _STARTED in os.environ:
        return
    kept = {name: value for name, value in os.environ.items() if name not in HANDICAPS}
    if kept != dict(os.environ) or not importable("threadpoolctl"):
        count = str(threads)
        kept |= {_STARTED: "1", "OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], kept)
