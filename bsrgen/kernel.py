"""Kernel: load an artifact and call it.  Needs no compiler and no templates."""

import functools
import os
import platform
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bsrgen.arguments import Call, check_threads
from bsrgen.artifact import Artifact, CostRecord, LevelRecord, read_artifact, write_manifest
from bsrgen.dtypes import DTYPES
from bsrgen.epilogues import as_epilogues
from bsrgen.errors import ArgumentError, ArtifactCorruptError, ArtifactError, IncompatibleCPUError, PatternMismatchError
from bsrgen.operators import OPERATORS
from bsrgen.pattern import Pattern, Weight, as_weight
from bsrgen.problem import Problem
from bsrgen.trampoline import OVERLAP, trampoline

Array = NDArray[Any]
PATTERN_FILE = "pattern.npz"
OPERANDS_FILE = "operands.npz"

_OK, _NO_ISA, _BAD_ARGUMENT, _NO_MEMORY = range(4)  # enum bsrgen_status in runtime/bsrgen.h


def load(folder: str | os.PathLike[str], *, threads: int | None = None, expect_sha256: str | None = None) -> "Kernel":
    """Load the artifact in `folder`.  Never compiles; every file is checked before anything is mapped.

    threads: default for calls, None means all usable cores.  expect_sha256: the manifest's digest, when the caller
    knows whose artifact it must be.  Errors: ArtifactError, ArtifactCorruptError, IncompatibleCPUError.
    """
    return Kernel(read_artifact(Path(folder), expect_sha256), threads=threads)


class Kernel:
    """One compiled kernel: y = kernel(x).  Made by `bsrgen.compile` and `bsrgen.load`; safe to call from many threads.

    Everything it was made of can be looked at: pattern, problem, plan, cost, source, artifact, verdict.
    """

    def __init__(self, artifact: Artifact, *, threads: int | None = None, may_be_foreign: bool = False) -> None:
        """`may_be_foreign`: where this machine cannot run the artifact, calls raise IncompatibleCPUError, not this."""
        m = artifact.manifest
        self.artifact = artifact
        self._call = Call(m, _arrays(artifact, OPERANDS_FILE) if m.bound else {}, default_threads(threads))
        self._dtype = DTYPES[m.dtype].numpy
        self._packed: Array | None = None  # keeps updated values alive
        self._data: Array | None = None
        self._level = 0
        self._foreign: IncompatibleCPUError | None = None
        self._tramp = trampoline()
        self._values: Any = self._tramp.ffi.NULL  # those in the library
        self._threads = self._call.threads
        self._token_axis = OPERATORS[m.operator].token_axis
        self._rows, self._features = m.shape
        self._x_bytes, self._y_bytes = (size * self._dtype.itemsize for size in (self._features, self._rows))
        self._plain = False
        try:
            self._bind()
        except IncompatibleCPUError as e:
            if not may_be_foreign:
                raise
            self._foreign = e
        else:
            self._plain = not m.operands and "accumulate" not in m.epilogue

    def _bind(self) -> None:
        """Map the library and find its functions, if this CPU has what one of its levels needs."""
        m, path = self.artifact.manifest, self._tramp
        if m.family != platform.machine():
            raise IncompatibleCPUError(f"{self.artifact}: built for {m.family}, this machine is {platform.machine()}")
        library = path.library(self.artifact.library.absolute(), m.files[m.library])
        info = path.function(library, f"{m.name}_info")
        target = path.ffi.string(path.info(info, 2)).decode()
        if not target:
            needs = " or ".join(level.target for level in m.levels)
            lacks = path.ffi.string(path.info(info, 1)).decode().strip().replace(" ", ", ")
            raise IncompatibleCPUError(
                f"{self.artifact}: built for {needs}; this CPU lacks {lacks}; "
                f"build it again with target='native' or a lower level"
            )
        self._level = [level.target for level in m.levels].index(target)
        self._function = path.function(library, f"{m.name}_call")
        self._pack = path.function(library, f"{m.name}_pack")

    # ── the call ─────────────────────────────────────────────────────────────────────────────────────────────────

    def __call__(self, x: Any, out: Array | None = None, *, threads: int | None = None, **operands: Any) -> Array:
        """Y = epilogue(product(W, x)).

        linear: x is [..., K], the result [..., M].  spmm: x is [K, N] or [K], the result [M, N] or [M].
        Any strides; what is not row-major is copied.  Arrays have the kernel's dtype; anything else is a TypeError, as
        no call converts silently.  out: written and returned; nothing else is written.  Operands of the epilogue by
        name: bias [M], scale [M], residual like the result, and scalars.  Other threads run meanwhile.
        """
        if self._plain and not operands and threads is None and type(x) is np.ndarray and x.dtype is self._dtype:
            axis, shape = self._token_axis, x.shape
            if len(shape) == 2 and shape[1 - axis] == self._features:
                n = shape[axis]
                full = (self._rows, n) if axis else (n, self._rows)
                if out is None:
                    out = np.empty(full, self._dtype)
                if type(out) is np.ndarray and out.dtype is self._dtype and out.shape == full:
                    path = self._tramp
                    view = path.ffi.from_buffer
                    try:
                        here, there = view(x), view(path.bytes, out, True)
                    except (ValueError, BufferError):  # not contiguous, or not writable
                        return self._general(x, out, threads, operands)
                    status = path.call(
                        self._function, n, here, shape[1], n * self._x_bytes, there, full[1], n * self._y_bytes,
                        self._values, path.ffi.NULL, self._threads,
                    )  # fmt: skip
                    if status == _OK:
                        return out
                    if status != OVERLAP:
                        self._raise(status)
        return self._general(x, out, threads, operands)

    def _general(self, x: Any, out: Array | None, threads: int | None, operands: dict[str, Any]) -> Array:
        ffi = self._tramp.ffi
        if self._foreign:
            raise self._foreign
        call = self._call.prepare(x, out, threads, operands)
        records = ffi.NULL
        if call.operands:
            records = ffi.new("struct bsrgen_operand[]", len(call.operands))
            for record, (array, ld, scalar) in zip(records, call.operands, strict=True):
                record.data = ffi.NULL if array is None else ffi.cast("void *", array.ctypes.data)
                record.ld, record.scalar = ld, scalar
        status = self._tramp.call(
            self._function, call.n, ffi.cast("void *", call.x.ctypes.data), call.ldx, 0,
            ffi.cast("void *", call.y.ctypes.data), call.ldy, 0, self._values, records, call.threads,
        )  # fmt: skip
        if status != _OK:
            self._raise(status)
        return call.finish()

    def _raise(self, status: int) -> None:
        if status == _NO_MEMORY:
            raise MemoryError(f"{self.name}: no memory for the packed activations")
        raise ArtifactError(f"{self.name}: the library refused the call (status {status})")

    def __matmul__(self, x: Any) -> Array:
        """k @ x for spmm without operands: the same as k(x)."""
        if self._token_axis == 0 and np.ndim(x) != 1:
            raise ArgumentError(
                f"{self.name}: operator 'linear' computes x @ W.T; call k(x), or compile operator='spmm'"
            )
        return self(x)

    def matvec(self, x: Any) -> Array:
        """W @ x for one vector: with shape and dtype, all that scipy.sparse.linalg.aslinearoperator asks for."""
        return self(np.asarray(x).reshape(-1))

    # ── new values ───────────────────────────────────────────────────────────────────────────────────────────────

    def update(self, W: Any) -> None:
        """Put the values of W in place of the old ones: same shape, block shape and pattern, no compiler.

        Takes what `compile` takes.  PatternMismatchError says where another pattern differs; nothing has changed then.
        Calls that run meanwhile finish with the old values.
        """
        m = self.artifact.manifest
        if self._foreign:
            raise self._foreign
        shape = m.shape if isinstance(W, (tuple, list)) else None
        weight = as_weight(W, blocksize=m.blocksize, shape=shape, dtype=self._dtype)
        same = weight.pattern.digest == m.pattern
        data = weight.data if same else self._filled(weight) if isinstance(W, np.ndarray) else None
        if data is None:
            where = self.pattern.difference(weight.pattern)
            raise PatternMismatchError(f"{self.name}: update needs the kernel's pattern: {where}; compile a new kernel")
        self._data = data
        packed = self.packed(data, self._level)
        self._values, self._packed = self._tramp.ffi.from_buffer(packed), packed

    def _filled(self, weight: Weight) -> Array | None:
        """Values of a dense W whose blocks lie within the pattern: stored blocks that are zero now hold zeros."""
        ours, theirs = self.pattern, weight.pattern
        if ours.shape != theirs.shape:
            return None
        mine, other = (p.rows * p.block_cols + p.indices for p in (ours, theirs))
        at = np.searchsorted(mine, other)
        if not np.array_equal(mine[np.minimum(at, len(mine) - 1)], other):
            return None
        data = np.zeros((ours.nnzb, *ours.blocksize), self._dtype)
        data[at] = weight.data
        return data

    def packed(self, data: Array, level: int) -> Array:
        """Values [nnzb, R, C] in the order in which ISA level `level` of the library keeps them."""
        ffi = self._tramp.ffi
        count = self._tramp.pack(self._pack, ffi.NULL, ffi.NULL, level)
        packed = np.empty(count, self._dtype)
        self._tramp.pack(self._pack, ffi.from_buffer(data), ffi.from_buffer(packed), level)
        return packed

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the artifact to `folder`, updated values included, and return it.

        A folder that holds an artifact is replaced as a whole; any other non-empty folder is refused (ArgumentError).
        """
        target = Path(folder).absolute()
        if target.exists() and (
            not target.is_dir() or (any(target.iterdir()) and not (target / "manifest.json").exists())
        ):
            raise ArgumentError(f"{target}: exists and is not an artifact; choose a new or empty folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        temp = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        temp.mkdir()  # not mkdtemp: others may read what is saved, as the umask says
        try:
            for name in (*self.artifact.manifest.files, "manifest.json", "manifest.sha256"):
                shutil.copyfile(self.artifact.folder / name, temp / name)
            if self._data is not None:
                self._patch(temp, self._data)
            _swap(temp, target)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
        return target

    def _patch(self, folder: Path, data: Array) -> None:
        """Put new values into the library of `folder` and beside it, for every ISA level."""
        m = self.artifact.manifest
        for number, level in enumerate(m.levels):
            raw = self.packed(data, number).tobytes()
            (folder / level.values.file).write_bytes(raw)
            with open(folder / m.library, "r+b") as f:
                f.seek(level.values.offset)
                f.write(raw)
        digest = Weight(self.pattern, data).digest
        write_manifest(folder, msgspec.structs.replace(m, weight=digest, check=None))

    # ── everything can be looked at ──────────────────────────────────────────────────────────────────────────────

    @property
    def name(self) -> str:
        """Name of the kernel and prefix of its C symbols."""
        return self.artifact.manifest.name

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K) of the weight."""
        return self.artifact.manifest.shape

    @property
    def dtype(self) -> "np.dtype[Any]":
        """Type of X and of the result."""
        return self._dtype

    @property
    def nnz(self) -> int:
        """Stored elements."""
        m = self.artifact.manifest
        return m.nnzb * m.blocksize[0] * m.blocksize[1]

    @functools.cached_property
    def pattern(self) -> Pattern:
        """Which blocks are stored."""
        m = self.artifact.manifest
        pattern = Pattern(m.shape, m.blocksize, **_arrays(self.artifact, PATTERN_FILE))
        if pattern.digest != m.pattern:
            raise ArtifactCorruptError(f"{self.artifact}: {PATTERN_FILE} does not hold the manifest's pattern")
        return pattern

    @functools.cached_property
    def problem(self) -> Problem:
        """What is computed."""
        m = self.artifact.manifest
        return Problem(OPERATORS[m.operator], self.pattern, DTYPES[m.dtype], as_epilogues(m.epilogue))

    @property
    def plan(self) -> LevelRecord:
        """How: the plan of the ISA level in use."""
        return self.artifact.manifest.levels[self._level]

    @property
    def cost(self) -> CostRecord:
        """What the model expects of one call on one core, and what was measured."""
        return self.artifact.manifest.cost

    @property
    def verdict(self) -> str:
        """One sentence: is sparse worth it for this matrix?"""
        return self.artifact.manifest.verdict

    @property
    def source(self) -> str:
        """The generated C of the ISA level in use."""
        target = self.plan.target.replace("-", "_")
        return (self.artifact.folder / f"{self.name}_{target}.c").read_text()

    def __str__(self) -> str:
        m = self.artifact.manifest
        lines = [
            f"{self.name}",
            f"  problem   {self.problem}",
            f"  plan      {self.plan}",
            f"  cost      {m.cost.flop / 1e6:.3g} MFLOP, {m.cost.bytes / 1e6:.3g} MB, predicted "
            f"{m.cost.seconds * 1e6:.3g} us at n = {m.cost.n} on one core",
            f"  verdict   {m.verdict}",
            f"  artifact  {self.artifact}",
            *("            " + line for line in self.pattern.picture(64, 16).splitlines()),
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<bsrgen.Kernel {self.name} on {self.plan.target}, {self._threads} threads>"


def _arrays(artifact: Artifact, file: str) -> dict[str, Array]:
    """The arrays of an .npz file of the artifact."""
    with np.load(artifact.folder / file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def default_threads(threads: int | None) -> int:
    """`threads`, else $BSRGEN_NUM_THREADS, else all cores this process may use."""
    if threads is not None:
        return check_threads(threads)
    text = os.environ.get("BSRGEN_NUM_THREADS", "")
    if text:
        if not text.isdecimal() or int(text) < 1:
            raise ArgumentError(f"BSRGEN_NUM_THREADS={text!r}: a number from 1 up")
        return int(text)
    return len(os.sched_getaffinity(0))


def _swap(temp: Path, target: Path) -> None:
    """Put `temp` in the place of `target`; the old one goes only after the new one is there."""
    if not target.exists():
        os.rename(temp, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    os.rename(target, old / "artifact")
    os.rename(temp, target)
    shutil.rmtree(old)
