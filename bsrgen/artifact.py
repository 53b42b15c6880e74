"""Artifact: what lies on disk.  The manifest's schema, and reading a folder with every byte checked first."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from bsrgen.dtypes import DTYPES
from bsrgen.epilogues import Epilogue, as_epilogues, operands_of
from bsrgen.errors import ArtifactCorruptError, ArtifactError
from bsrgen.integrity import MANIFEST, MANIFEST_DIGEST, verify_folder
from bsrgen.operators import NAME, kernel_name

SCHEMA = 1
ABI = 1  # BSRGEN_ABI in runtime/bsrgen.h


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class OperandRecord(_Record, frozen=True):
    """An operand of the epilogue; scalars have a default."""

    name: str
    kind: Literal["row", "scalar", "element"]
    default: float | str | None = None  # JSON has no infinities: "inf", "-inf"


def operand_records(epilogue: Sequence[Epilogue]) -> tuple[OperandRecord, ...]:
    """What a call of a kernel with this epilogue takes."""
    return tuple(OperandRecord(o.name, o.kind, _json_number(o.default)) for o in operands_of(epilogue))  # type: ignore[arg-type]


def _json_number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


class ValuesRecord(_Record, frozen=True):
    """Where packed values lie: a file beside the library, and the same bytes at `offset` in the library."""

    file: str
    offset: int
    bytes: int


class LevelRecord(_Record, frozen=True):
    """One ISA level of the library: what it needs, how it works, what the model expects of it."""

    target: str
    requires: tuple[str, ...]
    plan: str
    knobs: dict[str, Any]
    values: ValuesRecord

    def __str__(self) -> str:
        return self.plan


class CostRecord(_Record, frozen=True):
    """Prediction for one call of n tokens on one core, and what was measured when the kernel was tuned."""

    n: int
    flop: int
    bytes: int
    seconds: float
    dense_seconds: float
    measured_seconds: float | None = None


class CheckRecord(_Record, frozen=True):
    """The check against the float64 reference on random data: largest error as a share of the bound."""

    n: tuple[int, ...]
    worst: float


class Manifest(_Record, frozen=True):
    """manifest.json: everything a loader must know, and the sha256 of every other file."""

    schema: int
    abi: int
    bsrgen: str
    name: str
    operator: Literal["linear", "spmm"]
    shape: tuple[int, int]
    blocksize: tuple[int, int]
    nnzb: int
    dtype: str
    out_dtype: str
    epilogue: tuple[str, ...]
    operands: tuple[OperandRecord, ...]
    pattern: str
    weight: str
    family: str
    levels: tuple[LevelRecord, ...]
    bound: tuple[str, ...]  # operands with a value in operands.npz
    prototype: str
    compiler: str
    flags: tuple[str, ...]
    cost: CostRecord
    verdict: str
    check: CheckRecord | None
    tuning: tuple[str, ...]
    notes: tuple[str, ...]
    files: dict[str, str]

    def __post_init__(self) -> None:
        names = [self.library, *(level.values.file for level in self.levels)]
        if self.schema != SCHEMA or self.abi != ABI:
            raise ValueError(f"schema {self.schema}, ABI {self.abi}: this bsrgen reads schema {SCHEMA}, ABI {ABI}")
        if not self.levels or not set(names) <= set(self.files):
            raise ValueError("a level or a file it needs is not listed")
        if self.dtype not in DTYPES or self.out_dtype != self.dtype:
            raise ValueError(f"dtype {self.dtype!r}, out_dtype {self.out_dtype!r}: not a pair of this bsrgen")
        if self.operands != operand_records(as_epilogues(self.epilogue)):
            raise ValueError("operands are not those of the epilogue")
        if not set(self.bound) <= {operand.name for operand in self.operands if operand.kind != "element"}:
            raise ValueError("bound names an operand that cannot be bound")
        # The library's symbols carry the name: a manifest that lies about them finds nothing to call.
        dtype = DTYPES[self.dtype]
        says = kernel_name(self.operator, dtype, self.shape, self.blocksize, self.pattern, self.epilogue)
        if self.name != says or not NAME.match(self.name):
            raise ValueError(f"name {self.name!r:.80} is not that of the kernel described, {says!r:.80}")
        if min(*self.shape, self.nnzb) < 0 or min(self.blocksize) < 1 or self.nnzb > 2**31:
            raise ValueError("a size is out of range")

    @property
    def library(self) -> str:
        """File name of the shared library."""
        return f"lib{self.name}.so"


@dataclass(frozen=True, slots=True)
class Artifact:
    """A verified folder."""

    folder: Path
    manifest: Manifest

    @property
    def library(self) -> Path:
        """The shared library."""
        return self.folder / self.manifest.library

    def __str__(self) -> str:
        return str(self.folder)


def read_artifact(folder: str | Path, expect_sha256: str | None = None) -> Artifact:
    """Check every file of `folder` against its manifest, then parse the manifest.

    `expect_sha256` is the digest of the manifest (in manifest.sha256), for callers who know whose artifact it must be.
    ArtifactCorruptError for a missing, altered or unreadable file, ArtifactError for a manifest of another version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder}: no such folder; an artifact is a folder made by bsrgen.compile(...).save(folder)"
        )
    verify_folder(folder)
    digest = (folder / MANIFEST_DIGEST).read_text().split()[0]
    if expect_sha256 is not None and digest != expect_sha256.lower():
        raise ArtifactCorruptError(f"{folder}: manifest has sha256 {digest}, expected {expect_sha256}")
    artifact = Artifact(folder, parse_manifest((folder / MANIFEST).read_bytes(), folder))
    _check_values(artifact)
    return artifact


def _check_values(artifact: Artifact) -> None:
    """The values of every level lie in the library where the manifest says."""
    size = artifact.library.stat().st_size
    for level in artifact.manifest.levels:
        values = level.values
        inside = 0 <= values.offset <= size - values.bytes and values.bytes >= 0
        if values.file.endswith(".so") or not inside or (artifact.folder / values.file).stat().st_size != values.bytes:
            raise ArtifactError(f"{artifact}: the manifest's values of {level.target} are not in {values.file}")


def parse_manifest(data: bytes, folder: Path) -> Manifest:
    """Strict JSON -> Manifest.  ArtifactError says which field is wrong."""
    try:
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ArtifactError(f"{folder / MANIFEST}: not a manifest of this bsrgen: {e}; build the artifact again") from e


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Hash every file of `folder` into the manifest and write it, last."""
    seal(folder, msgspec.to_builtins(manifest))


def seal(folder: Path, record: dict[str, Any]) -> None:
    """Write manifest.json (`record` and the sha256 of every other file) and its own digest beside it."""
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name not in (MANIFEST, MANIFEST_DIGEST)
    }
    data = msgspec.json.format(msgspec.json.encode(record | {"files": files}), indent=2)
    (folder / MANIFEST).write_bytes(data)
    (folder / MANIFEST_DIGEST).write_text(f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n")
