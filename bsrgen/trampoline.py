"""The call path from Python into a kernel: one C function for all artifacts, bound by cffi.

API mode costs about a third of ABI mode per call (cffi documentation, overview), but needs a compiler and Python.h, so
`bsrgen.compile` builds the extension once into the store; `load` takes it if it is there and never builds anything.
"""

import functools
import hashlib
import importlib.machinery
import importlib.util
import logging
import os
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsrgen._paths import RUNTIME
from bsrgen.errors import ArtifactError, BsrgenError

MODULE = "_bsrgen_trampoline"
SOURCE = "bsrgen_trampoline.c"  # in runtime/
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))
OVERLAP = -1  # returned by the trampoline alone: y overlaps x

STRUCTS = """
struct bsrgen_operand { const void *data; int64_t ld; double scalar; };
struct bsrgen_weight {
    int64_t blocks; const void *data; const int32_t *indices; const int64_t *indptr; void *parallel; int32_t threads;
};
struct bsrgen_call {
    int64_t n; const void *x; int64_t ldx; void *y; int64_t ldy; const void *values;
    const struct bsrgen_operand *operands; void *parallel; int32_t threads;
};
"""
DECLARATIONS = """
struct bsrgen_operand { const void *data; int64_t ld; double scalar; };
struct bsrgen_weight {
    int64_t blocks; const void *data; const int32_t *indices; const int64_t *indptr; void *parallel; int32_t threads;
};
int bsrgen_trampoline(void *function, int64_t n, const void *x, int64_t ldx, size_t x_bytes, void *y, int64_t ldy,
                      size_t y_bytes, const void *values, const struct bsrgen_operand *operands, int threads);
int64_t bsrgen_pack(void *function, const void *data, void *packed, int level);
int64_t bsrgen_prepare(void *function, struct bsrgen_weight *weight, void *prepared, int values_only);
const char *bsrgen_info(void *function, int what);
void *bsrgen_open(const char *path);
void *bsrgen_symbol(void *library, const char *name);
const char *bsrgen_open_error(void);
"""
_loaded: dict[Path, str] = {}  # path -> sha256 of what the dynamic linker has under it, for the life of the process
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trampoline:
    """How Python enters C: `call` has the arguments of bsrgen_trampoline above.  `mode` is "api" or "abi"."""

    mode: str
    ffi: Any
    bytes: Any  # the C type char[]: a parsed type costs from_buffer 140 ns less than its name
    call: Callable[..., int]
    pack: Callable[..., int]
    prepare: Callable[..., int]
    info: Callable[..., Any]
    open: Callable[..., Any]
    symbol: Callable[..., Any]
    error: Callable[..., Any]

    def library(self, path: Path, digest: str) -> Any:
        """dlopen `path`, whose verified sha256 is `digest`.  Never closed: kernels may outlive every Python object.

        The dynamic linker knows a library by its path: where the file has been replaced since it was loaded, it would
        hand out the old one, so the new one goes in through a link of its own.
        """
        if _loaded.setdefault(path, digest) == digest:
            handle = self.open(os.fsencode(path))
        else:
            with tempfile.TemporaryDirectory(prefix="bsrgen-load-") as folder:
                link = Path(folder) / path.name
                link.symlink_to(path)
                handle = self.open(os.fsencode(link))
        if handle == self.ffi.NULL:
            raise ArtifactError(f"{path}: cannot be loaded: {self.ffi.string(self.error()).decode(errors='replace')}")
        return handle

    def unload(self, folder: Path) -> None:
        """Close the libraries in `folder`, of which no kernel will be called again: those of plans that were tried."""
        import cffi

        ffi = cffi.FFI()
        ffi.cdef("void *dlopen(const char *path, int flags); int dlclose(void *handle);")
        libc = ffi.dlopen(None)
        for path in [path for path in _loaded if path.parent == folder]:
            del _loaded[path]
            handle = libc.dlopen(os.fsencode(path), os.RTLD_NOW | os.RTLD_NOLOAD)  # the same one, counted once more
            for _ in range(2 if handle != ffi.NULL else 0):
                libc.dlclose(handle)

    def function(self, library: Any, name: str) -> Any:
        """Address of an exported function."""
        address = self.symbol(library, name.encode())
        if address == self.ffi.NULL:
            raise ArtifactError(f"{name}: no such symbol in the library; build the artifact again")
        return address


@functools.cache
def trampoline() -> Trampoline:
    """The best call path there is: the extension where the store has it, else ABI mode."""
    try:
        module = _extension()
    except (BsrgenError, OSError, ImportError) as e:
        _log.info("calls go through cffi's ABI mode: %s", e)
        return _abi()
    if module is None:
        return _abi()
    lib = module.lib
    return Trampoline(
        "api", module.ffi, module.ffi.typeof("char[]"), lib.bsrgen_trampoline, lib.bsrgen_pack, lib.bsrgen_prepare,
        lib.bsrgen_info, lib.bsrgen_open, lib.bsrgen_symbol, lib.bsrgen_open_error,
    )  # fmt: skip


def _abi() -> Trampoline:
    import cffi

    ffi = cffi.FFI()
    ffi.cdef(
        STRUCTS + "void *dlopen(const char *path, int flags); void *dlsym(void *library, const char *name);"
        "const char *dlerror(void);"
    )
    libc = ffi.dlopen(None)

    def call(
        function: Any, n: int, x: Any, ldx: int, x_bytes: int, y: Any, ldy: int, y_bytes: int,
        values: Any, operands: Any, threads: int,
    ) -> int:  # fmt: skip
        a, b = int(ffi.cast("uintptr_t", x)), int(ffi.cast("uintptr_t", y))
        if a < b + y_bytes and b < a + x_bytes:
            return OVERLAP
        struct = ffi.new("struct bsrgen_call *", (n, x, ldx, y, ldy, values, operands, ffi.NULL, threads))
        return int(ffi.cast("int (*)(const struct bsrgen_call *)", function)(struct))

    def pack(function: Any, data: Any, packed: Any, level: int) -> int:
        return int(ffi.cast("int64_t (*)(const void *, void *, int)", function)(data, packed, level))

    def info(function: Any, what: int) -> Any:
        return ffi.cast("const char *(*)(int)", function)(what)

    now = os.RTLD_NOW | os.RTLD_LOCAL
    return Trampoline(
        "abi",
        ffi,
        ffi.typeof("char[]"),
        call,
        pack,
        pack,  # with the artifact's own threads
        info,
        lambda path: libc.dlopen(path, now),
        libc.dlsym,
        libc.dlerror,
    )


def extension_key() -> str:
    """The extension's key in the store: its text, the runtime text in it, and the Python it is for."""
    text = b"".join((RUNTIME / name).read_bytes() for name in (SOURCE, "bsrgen.h", "bsrgen_parallel.h"))
    return hashlib.sha256(f"{DECLARATIONS}{SUFFIX}".encode() + text).hexdigest()


def _extension() -> Any:
    """The API-mode module from the store; None when it is not there."""
    from bsrgen.store import Store

    folder = Store.default().get(extension_key())
    if folder is None:
        return None
    loader = importlib.machinery.ExtensionFileLoader(MODULE, str(folder / f"{MODULE}{SUFFIX}"))
    spec = importlib.util.spec_from_loader(MODULE, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
