"""What a benchmark ran on and how it was called: the head of every kept file."""

import platform
import sys
from datetime import date
from typing import Any

from bsrgen import __version__
from bsrgen.build import find_compiler
from bsrgen.machine import cache_bytes, cpu_model, usable_cores, versions
from bsrgen.targets import native

PACKAGES = ("numpy", "scipy", "mkl", "torch", "gimmik", "onnxruntime", "openvino", "pyfr", "torch-mlir", "llvmlite")


def machine() -> dict[str, Any]:
    """CPU, caches, compiler, packages, date and command line; no name of a host, a user or a folder."""
    return {
        "date": date.today().isoformat(),
        "cpu": cpu_model(),
        "target": native().name,
        "caches_bytes": cache_bytes(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "compiler": find_compiler(native()).version,
        "python": platform.python_version(),
        "packages": {"bsrgen": __version__} | {name: v for name, v in versions(PACKAGES).items() if v},
        "command": " ".join(["python -m benchmarks", *(_bare(word) for word in sys.argv[1:])]),
    }


def _bare(word: str) -> str:
    """A word of the command line without the folder it names."""
    return word.rsplit("/", 1)[-1]
