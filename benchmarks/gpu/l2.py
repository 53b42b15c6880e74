"""What a Hopper's L2 gives its SMs, sent to one or to a cluster of them: a ceiling that the planner has from papers."""

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import cffi

from bsrgen._paths import RUNTIME
from bsrgen.gpus import code_flags
from bsrgen.nvcc import FLAGS, find_nvcc

SOURCE = Path(__file__).with_name("l2.cu")
ARRAY_BYTES = 24 << 20  # in either half of the L2 of an H100
PIECE_BYTES, ROUNDS = 32 << 10, 2000
CLUSTERS = (1, 2, 4)
FUNCTION = "int l2_bring(const void *from, int64_t bytes, int cluster, int rounds, void *stream, int *blocks);"

Bring = Callable[[int, int, int, int], int]  # (address, cluster, rounds, stream) -> thread blocks


def commands(folder: Path) -> list[str]:
    """nvcc's, which makes l2.so in a folder."""
    arch = code_flags("sm_90a", "sm_90a")
    return [find_nvcc().path, *FLAGS, arch, "-shared", f"-I{RUNTIME}", str(SOURCE), "-o", str(folder / "l2.so")]


def bring_of(library: Path, array_bytes: int = ARRAY_BYTES) -> Bring:
    """The function of a library.  RuntimeError with the runtime's error."""
    ffi = cffi.FFI()
    ffi.cdef(FUNCTION)
    loaded = ffi.dlopen(str(library))

    def bring(address: int, cluster: int, rounds: int, stream: int) -> int:
        blocks = ffi.new("int *")
        pointers = (ffi.cast("void *", value) for value in (address, stream))
        source, on = pointers
        if error := loaded.l2_bring(source, array_bytes, cluster, rounds, on, blocks):
            raise RuntimeError(f"error {error} of the CUDA runtime in a cluster of {cluster}")
        return int(blocks[0])

    return bring


def ceilings(address: int, stream: int, seconds: Callable[[Callable[[], object]], float]) -> dict[str, float]:
    """Bytes a second that all SMs take in together, by thread blocks of a cluster; `address` is that of ARRAY_BYTES."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(commands(Path(folder)), check=True, capture_output=True)
        bring = bring_of(Path(folder) / "l2.so")
        for cluster in CLUSTERS:
            blocks = bring(address, cluster, 1, stream)
            best = seconds(lambda cluster=cluster: bring(address, cluster, ROUNDS, stream))  # type: ignore[misc]
            found[f"L2, sent to {cluster}"] = blocks * ROUNDS * PIECE_BYTES / best
    return found
