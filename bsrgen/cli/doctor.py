"""bsrgen doctor: can this machine build and run kernels, and what to do where it cannot."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from bsrgen.cli.common import FAILED, console, plain, show_json, size, verb, working
from bsrgen.cli.extras import Finding, cuda, gpus, mlir, nvrtc
from bsrgen.errors import BsrgenError

VARIABLES = (
    "BSRGEN_CACHE_DIR", "BSRGEN_DISABLE_JIT", "BSRGEN_CC", "BSRGEN_NUM_THREADS", "BSRGEN_MLIR_PACKAGE", "BSRGEN_NVCC",
    "BSRGEN_NVRTC",
)  # fmt: skip
NEEDED = ("numpy", "scipy", "jinja2", "cffi", "ml_dtypes", "safetensors")
PEERS = ("mkl", "torch", "threadpoolctl")
SMOKE = "#include <math.h>\n#include <pthread.h>\n#include <stdint.h>\n#include <stdlib.h>\nint f(void) { return 0; }\n"


@click.command()
@click.option(
    "--calibrate", is_flag=True, help="Measure this CPU for a few seconds, for the cost model, and keep that."
)
@verb
def doctor(*, calibrate: bool, as_json: bool) -> int:
    """Look at everything that kernels need here: versions, compiler, CPU, call path, store, variables.

    With --calibrate, what this CPU does in a second (multiply-adds, reads from each cache and from memory, calls) is
    measured first.  The cost model then plans with that for target "native"; kernels in the store are not touched, but
    later compiles for "native" plan and build anew.
    """
    if calibrate:
        _calibrate()
    findings = [finding for look in LOOKS for finding in look()]
    healthy = all(finding.status != "fail" for finding in findings)
    if as_json:
        document = {"ok": healthy, "findings": [asdict(finding) for finding in findings]}
        show_json(document | {"calibration": _calibration_document()})
        return 0 if healthy else FAILED
    if calibrate:
        _calibration_table()
    marks = {"ok": "[green]ok  [/]", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}
    out = console()
    for f in findings:
        out.print(f"{marks[f.status]}  {f.what:11}  {plain(f.detail)}", soft_wrap=True)
        if f.advice:
            out.print(f"{'':19}[yellow]{plain(f.advice)}[/]", soft_wrap=True)
    out.print(
        "kernels can be built and run here" if healthy else "[red]kernels cannot be built here[/]: see FAIL above"
    )
    return 0 if healthy else FAILED


def _versions() -> Iterator[Finding]:
    from bsrgen import __version__
    from bsrgen.machine import versions

    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("bsrgen", "ok", f"{__version__}, Python {python} ({sys.executable})")
    found = versions(NEEDED)
    missing = [name for name, version in found.items() if version is None]
    detail = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    if missing:
        yield Finding(
            "packages", "fail", f"without {', '.join(missing)}; {detail}", "pip install --force-reinstall bsrgen"
        )
    else:
        yield Finding("packages", "ok", detail)


def _compiler() -> Iterator[Finding]:
    from bsrgen.build import find_compiler
    from bsrgen.targets import native

    try:
        compiler = find_compiler(native())
    except BsrgenError as e:
        yield Finding("compiler", "fail", str(e), "e.g. apt install gcc libc6-dev, or dnf install gcc")
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler.path, *native().flags, "-x", "c", "-shared", "-fPIC", "-o", f"{folder}/smoke.so", "-"]
        done = subprocess.run(command, input=SMOKE, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        first = next(iter(done.stderr.splitlines()), f"exit status {done.returncode}")
        yield Finding(
            "compiler", "fail", f"{compiler.path} cannot compile: {first}", "install libc6-dev, or set BSRGEN_CC"
        )
    else:
        yield Finding("compiler", "ok", f"{compiler.path}: {compiler.identity}")


def _cpu() -> Iterator[Finding]:
    from bsrgen.machine import cache_bytes, core_quota, cpu_model, parallel_cores, usable_cores
    from bsrgen.targets import native

    target = native()
    caches = ", ".join(f"{level} {size(count)}" for level, count in cache_bytes().items())
    yield Finding("cpu", "ok", f"{cpu_model()}; {caches}")
    yield Finding("target", "ok", f"{target.name}: {', '.join(target.requires) or 'baseline'}")
    cores, quota = usable_cores(), core_quota()
    if quota is not None and quota < cores:
        detail = f"{cores} usable, the control group allows {quota:g}: calls take {parallel_cores()} threads by default"
        yield Finding("cores", "ok", detail)
    else:
        yield Finding("cores", "ok", f"{cores} usable")


def _calibrate() -> None:
    from bsrgen.bench.calibrate import calibrate
    from bsrgen.calibration import write
    from bsrgen.integrity import typed
    from bsrgen.store import Store

    root = Store.default().root
    with working("measuring this CPU") as progress:
        record = calibrate(progress)
    with typed(root):
        write(record, root)


def _calibration_document() -> dict[str, Any] | None:
    """The calibration that counts here, and the defaults that it replaces."""
    from bsrgen.calibration import read
    from bsrgen.targets import host

    record, _ = read()
    if record is None:
        return None
    rates = record.rates.known()
    defaults = {name: getattr(host(), name) for name in rates}
    facts = {"date": record.date, "cpu": record.cpu, "level": record.level}
    return {**facts, "rates": rates, "defaults": defaults}


def _calibration_table() -> None:
    from rich import box
    from rich.table import Table

    document = _calibration_document()
    if document is None:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in (f"calibrated {document['date']}", "measured", "default"):
        table.add_column(name, justify="left" if name.startswith("cal") else "right", no_wrap=True)
    for name, value in document["rates"].items():
        table.add_row(name, f"{value:g}", f"{document['defaults'][name]:g}")
    out = console()
    out.print(table)
    out.print()


def _calibration() -> Iterator[Finding]:
    from bsrgen.calibration import read
    from bsrgen.targets import native

    record, why = read()
    advice = "`bsrgen doctor --calibrate` measures this CPU in a few seconds"
    if record is None:
        yield Finding("calibration", "warn" if why else "ok", why or f"none, default rates: {advice}", why and advice)
    elif record.level != native().name:
        yield Finding("calibration", "warn", f"taken for {record.level}, this CPU is {native().name}", advice)
    else:
        rates = ", ".join(f"{name} {value:g}" for name, value in record.rates.known().items())
        yield Finding("calibration", "ok", f"{record.date}: {rates}")


def _call_path() -> Iterator[Finding]:
    import sysconfig

    from bsrgen.trampoline import trampoline

    if trampoline().mode == "api":
        yield Finding("call path", "ok", "compiled extension")
    elif Path(sysconfig.get_path("include"), "Python.h").is_file():
        yield Finding("call path", "ok", "cffi ABI mode now; the first compile builds the faster extension")
    else:
        advice = "install Python's headers, e.g. apt install python3-dev"
        yield Finding("call path", "warn", "cffi ABI mode, microseconds slower per call: there is no Python.h", advice)


def _store() -> Iterator[Finding]:
    from bsrgen.store import Store

    try:
        store = Store.default()
        with tempfile.TemporaryFile(dir=store.root):
            pass
        entries = store.entries()
    except OSError as e:  # StoreError is one
        yield Finding("store", "fail", " ".join(str(e).split()), "set BSRGEN_CACHE_DIR to a folder of yours")
        return
    used, mode = size(sum(entry.bytes for entry in entries)), store.root.stat().st_mode & 0o777
    detail = f"{store.root} (mode {mode:04o}): {len(entries)} artifacts, {used} of at most {size(store.max_bytes)}"
    yield Finding("store", "ok", detail)


def _peers() -> Iterator[Finding]:
    from bsrgen.machine import versions

    found = versions(PEERS)
    here = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    missing = ", ".join(name for name, version in found.items() if not version)
    without = f"; without {missing} `bsrgen bench` has fewer peers" if missing else ""
    yield Finding("peers", "ok", f"{here or 'numpy and scipy only'}{without}")


def _variables() -> Iterator[Finding]:
    from bsrgen.bench.clock import HANDICAPS

    for name in sorted(os.environ):
        setting = f"{name}={os.environ[name]}"
        if name in VARIABLES:
            off = name == "BSRGEN_DISABLE_JIT" and os.environ[name] == "1"
            advice = "no kernel is built, only loaded; unset it to build" if off else ""
            yield Finding("variable", "warn" if off else "ok", setting, advice)
        elif name.startswith("BSRGEN_"):
            yield Finding("variable", "warn", f"{setting}: not one of ours", f"there are {', '.join(VARIABLES)}")
        elif name in HANDICAPS:
            advice = "it ties another library to older code; `bsrgen bench` drops it for its own run"
            yield Finding("variable", "warn", setting, advice)


LOOKS = (_versions, _compiler, mlir, cuda, nvrtc, gpus, _cpu, _calibration, _call_path, _store, _peers, _variables)
