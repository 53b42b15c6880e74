"""Artifact: what lies on disk.  A folder is read with every byte checked first, and written as a whole."""

import hashlib
import io
import os
import shutil
import uuid
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bsrgen.errors import ArgumentError, ArtifactCorruptError, ArtifactError, PatternError
from bsrgen.even import PlannedPattern
from bsrgen.integrity import MANIFEST, MANIFEST_DIGEST, typed, verify_folder
from bsrgen.manifest import PATTERN_FILE, Manifest, parse_manifest
from bsrgen.pattern import Pattern

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
    _refuse_strangers(target)
    with typed(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temp = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        temp.mkdir()  # not mkdtemp: others may read what is saved, as the umask says
        try:
            for name in {**artifact.manifest.files, **changed}:
                (temp / name).write_bytes(changed[name] if name in changed else artifact.read(name))
            write_manifest(temp, manifest)
            _exchange(temp, target)
        finally:
            shutil.rmtree(temp, ignore_errors=True)


def _refuse_strangers(target: Path) -> None:
    """ArgumentError unless `target` may be replaced without losing anything but an artifact."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise ArgumentError(f"{target}: exists and is not a folder; choose another name")
    names = {path.name for path in target.iterdir()}
    if not names:
        return
    try:
        ours = {*parse_manifest((target / MANIFEST).read_bytes(), target).files, MANIFEST, MANIFEST_DIGEST}
    except (OSError, ArtifactError):
        raise ArgumentError(f"{target}: exists and is not an artifact; choose a new or empty folder") from None
    if names - ours:
        raise ArgumentError(f"{target}: also holds {min(names - ours)!r}, which is not the artifact's; move it away")


def _exchange(new: Path, target: Path) -> None:
    """Rename `new` to `target`; what was there is put back if that fails, and removed if not."""
    if not target.exists():
        os.rename(new, target)
        return
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
    os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


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
