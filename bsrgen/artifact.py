"""Artifact: what lies on disk.  A folder is read with every byte checked first, and written as a whole."""

import hashlib
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bsrgen.errors import ArtifactCorruptError, ArtifactError, PatternError
from bsrgen.even import PlannedPattern
from bsrgen.folder import refuse_strangers, replacing
from bsrgen.integrity import MANIFEST, MANIFEST_DIGEST, verify_folder
from bsrgen.manifest import MASK_FILE, PATTERN_FILE, Manifest, parse_manifest
from bsrgen.operators import OPERATORS, PATTERN_OPERATORS
from bsrgen.pattern import Pattern
from bsrgen.pattern_problem import Mask, PatternProblem
from bsrgen.problem import Problem

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, repr=False)
class Artifact:
    """A verified folder."""

    folder: Path
    manifest: Manifest

    @property
    def library(self) -> Path:
        """The shared library."""
        return self.folder / self.manifest.library

    @property
    def sha256(self) -> str:
        """The digest of the manifest, which holds those of all files."""
        return (self.folder / MANIFEST_DIGEST).read_text().split()[0]

    def __str__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        return f"<bsrgen.Artifact {self.manifest.name} in {self.folder}>"

    def read(self, file: str) -> bytes:
        """One listed file.  ArtifactCorruptError where it is not what the manifest says, or is gone by now."""
        try:
            data = (self.folder / file).read_bytes()
        except OSError as e:
            way = "compile the kernel again, or save artifacts that must last outside the store"
            raise ArtifactCorruptError(f"{self.folder / file}: gone since it was loaded ({e.strerror}); {way}") from e
        if hashlib.sha256(data).hexdigest() != self.manifest.files[file]:
            raise ArtifactCorruptError(f"{self.folder / file}: altered since it was loaded; build the artifact again")
        return data

    def arrays(self, file: str) -> dict[str, Array]:
        """The arrays of a listed .npz file."""
        data = self.read(file)
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as e:
            raise ArtifactCorruptError(f"{self.folder / file}: not an .npz file of arrays: {e}") from e

    def pattern(self) -> Pattern:
        """Which blocks are stored, or how many may be; it must be the pattern of the manifest."""
        m = self.manifest
        if m.mode == "dynamic":
            pattern: Pattern = PlannedPattern(m.shape, m.blocksize, m.nnzb)
            if pattern.digest != m.pattern:
                raise ArtifactCorruptError(f"{self}: not planned for as many blocks as the manifest says")
            return pattern
        arrays = self.arrays(PATTERN_FILE)
        try:
            pattern = Pattern(m.shape, m.blocksize, **arrays)
        except (TypeError, PatternError) as e:
            raise ArtifactCorruptError(f"{self.folder / PATTERN_FILE}: not a pattern: {e}") from e
        if pattern.digest != m.pattern or pattern.nnzb != m.nnzb:
            raise ArtifactCorruptError(f"{self.folder / PATTERN_FILE}: not the pattern of the manifest")
        return pattern

    def problem(self) -> Problem | PatternProblem:
        """What is computed.  ArtifactCorruptError where the pattern or the mask is not one."""
        m, (w, x, y) = self.manifest, self.manifest.types
        if m.operator not in PATTERN_OPERATORS:
            return Problem(OPERATORS[m.operator], self.pattern(), w, m.steps, None, x, y, m.as_pit)
        mask = None
        if MASK_FILE in m.files:
            arrays = self.arrays(MASK_FILE)
            mask = Mask(arrays["kinds"], arrays["bits"])
        return PatternProblem(PATTERN_OPERATORS[m.operator], self.pattern(), w, m.steps, None, m.head, mask)


def as_checked(folder: Path) -> Artifact:
    """The artifact in a folder that the store has just checked."""
    return Artifact(folder, parse_manifest((folder / MANIFEST).read_bytes(), folder))


def read_artifact(folder: str | Path, expect_sha256: str | None = None) -> Artifact:
    """Check every file of `folder` against its manifest, then parse the manifest.

    `expect_sha256` is the digest of the manifest (in manifest.sha256), for callers who know whose artifact it must be.
    ArtifactCorruptError for a missing, altered or unreadable file, ArtifactError for a manifest of another version.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder}: no such folder; an artifact is a folder made by bsrgen.compile(...).save(folder)"
        )
    verify_folder(folder)
    artifact = Artifact(folder, parse_manifest((folder / MANIFEST).read_bytes(), folder))
    if expect_sha256 is not None and artifact.sha256 != expect_sha256.lower():
        raise ArtifactCorruptError(f"{folder}: manifest has sha256 {artifact.sha256}, expected {expect_sha256}")
    _check_values(artifact)
    return artifact


def _check_values(artifact: Artifact) -> None:
    """The values of every level lie in the library where the manifest says."""
    size = artifact.library.stat().st_size
    for level in artifact.manifest.levels:
        if (values := level.values) is None:
            continue
        inside = 0 <= values.offset <= size - values.bytes and values.bytes >= 0
        if values.file.endswith(".so") or not inside or (artifact.folder / values.file).stat().st_size != values.bytes:
            raise ArtifactError(f"{artifact}: the manifest's values of {level.target} are not in {values.file}")


def save_artifact(artifact: Artifact, target: Path, changed: Mapping[str, bytes], manifest: Manifest) -> None:
    """Write the files of `artifact`, some with other bytes, and `manifest` as a new folder in the place of `target`.

    `target` may be missing, empty, or hold an artifact and nothing else (ArgumentError); it is replaced as a whole, the
    new folder complete before the old one goes.  StoreError where the disk says no; the old folder is there then.
    """
    target = target.resolve()
    refuse_strangers(target, "an artifact", files_of)
    with replacing(target) as new:
        for name in {**artifact.manifest.files, **changed}:
            (new / name).write_bytes(changed[name] if name in changed else artifact.read(name))
        write_manifest(new, manifest)


def files_of(folder: Path) -> set[str]:
    """The files of the artifact in a folder, as its manifest says.  OSError, ArtifactError."""
    return {*parse_manifest((folder / MANIFEST).read_bytes(), folder).files, MANIFEST, MANIFEST_DIGEST}


def write_manifest(folder: Path, manifest: Manifest) -> Artifact:
    """Hash every file of `folder` into the manifest and write it, last."""
    files = seal(folder, msgspec.to_builtins(manifest))
    return Artifact(folder, msgspec.structs.replace(manifest, files=files))


def seal(folder: Path, record: dict[str, Any]) -> dict[str, str]:
    """Write manifest.json (`record` and the sha256 of every other file) and its own digest beside it."""
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name not in (MANIFEST, MANIFEST_DIGEST)
    }
    data = msgspec.json.format(msgspec.json.encode(record | {"files": files}), indent=2)
    (folder / MANIFEST).write_bytes(data)
    (folder / MANIFEST_DIGEST).write_text(f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n")
    return files
