"""Builds a kernel of proto with the emulation, or as the assembly of the real instructions."""

import ctypes
import hashlib
import subprocess
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("-std=gnu11", "-O3", "-Wall", "-Wextra", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-D_GNU_SOURCE")
REAL = ("-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512vbmi", "-mavx512bf16", "-mavx512vnni", "-mamx-tile",
        "-mamx-bf16", "-mamx-int8")  # fmt: skip


def text(plan: Any) -> str:
    """The C of one plan."""
    env = Environment(
        loader=FileSystemLoader([ROOT / "templates", ROOT / "proto"]), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    p = plan.pattern
    return env.get_template("harness.c.j2").render(k=plan.view(), M=p.M, K=p.K, R=p.R, C=p.C, block_rows=p.block_rows)


def emulated(plan: Any, folder: Path, cc: str = "gcc", extra: tuple[str, ...] = ("-march=native",)) -> ctypes.CDLL:
    """The kernel on emulated tiles."""
    c = text(plan)
    stem = hashlib.sha256(f"{c}{cc}{extra}".encode()).hexdigest()[:16]
    source, lib = folder / f"{stem}.c", folder / f"{stem}.so"
    if not lib.exists():
        source.write_text(c)
        command = [cc, *FLAGS, "-Werror", *extra, "-shared", f"-I{ROOT / 'runtime'}", "-include",
                   str(ROOT / "tests/c/amx_emulation.h"), str(source), "-o", str(lib), "-lm"]  # fmt: skip
        subprocess.run(command, check=True)
    return ctypes.CDLL(str(lib))


def assembly(plan: Any, cc: str) -> str:
    """What `cc` makes of the real intrinsics."""
    command = [cc, *FLAGS, "-Werror", *REAL, f"-I{ROOT / 'runtime'}", "-S", "-o", "-", "-xc", "-"]
    return subprocess.run(command, input=text(plan), text=True, check=True, capture_output=True).stdout
