"""What this machine is: for the head of a benchmark and for `bsrgen doctor`."""

import ctypes
import functools
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

_CGROUP, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1023, 18  # Linux, arch/x86/include/uapi/asm/prctl.h
FALLBACK = {"L1": 32 << 10, "L2": 1 << 20, "L3": 16 << 20}


@functools.cache
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


@functools.cache
def tiles_permitted() -> bool:
    """Ask Linux for AMX's tile registers, for the whole process; False where it refuses or has none to give."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or sys.maxsize < 1 << 32:
        return False
    try:
        ask = ctypes.CDLL(None).syscall
        ask.restype = ctypes.c_long
        words = map(ctypes.c_long, (_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA))
        return bool(ask(*words) == 0)
    except (OSError, AttributeError):  # no C library to be had
        return False


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def core_quota() -> float | None:
    """Cores' worth of time that the control groups allow, the strictest counting; None for no limit."""
    allowed = []
    for folder in _groups():
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            allowed += [int(quota) / int(period)] if quota != "max" else []
        except (OSError, ValueError):
            continue
    try:  # version 1 writes -1 for no limit
        quota, period = ((_CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        allowed += [int(quota) / int(period)] if int(quota) > 0 else []
    except (OSError, ValueError):
        pass
    return min(allowed, default=None)


def _groups() -> list[Path]:
    """Folders of this process's control group (version 2) and of those around it."""
    try:
        lines = _OWN_GROUP.read_text().splitlines()
    except OSError:
        lines = []
    own = next((line[4:] for line in lines if line.startswith("0::/")), "")
    folder = _CGROUP / own
    return [_CGROUP] if ".." in own else [folder, *(f for f in folder.parents if f.is_relative_to(_CGROUP))]


def parallel_cores() -> int:
    """Threads that can run at once: the usable cores, or fewer where a control group's quota would make them wait."""
    cores, quota = usable_cores(), core_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def versions(names: Iterable[str]) -> dict[str, str | None]:
    """Installed versions of distributions, None for those that are not, without importing them."""
    from importlib import metadata

    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
