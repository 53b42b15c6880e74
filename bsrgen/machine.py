"""What this machine is: for the head of a benchmark and for `bsrgen doctor`."""

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

FALLBACK = {"L1": 32 << 10, "L2": 1 << 20, "L3": 16 << 20}


def cpu_model() -> str:
    """The CPU's name as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(names, "") or platform.processor() or platform.machine()


def cache_bytes() -> dict[str, int]:
    """Bytes of the L1 data, L2 and L3 cache of the first core, as Linux tells them."""
    sizes = dict(FALLBACK)
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
            if kind != "Instruction":
                sizes[f"L{level}"] = int(size.rstrip("K")) << 10
        except (OSError, ValueError):  # a container may hide them
            continue
    return sizes


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def core_quota() -> float | None:
    """Cores' worth of time that the control group allows; None for no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def versions(names: Iterable[str]) -> dict[str, str | None]:
    """Installed versions of distributions, None for those that are not, without importing them."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
