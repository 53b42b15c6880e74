"""Folder: written as a whole, and only in the place of nothing or of one of the same kind."""

import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from bsrgen.errors import ArgumentError, ArtifactError
from bsrgen.integrity import typed


def refuse_strangers(target: Path, kind: str, files_of: Callable[[Path], Collection[str]]) -> None:
    """ArgumentError unless `target` may be replaced without losing anything but a `kind` ("an artifact").

    files_of: the paths in such a folder that are its own; OSError or ArtifactError where it is none.
    """
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise ArgumentError(f"{target}: exists and is not a folder; choose another name")
    found = {path.relative_to(target) for path in target.rglob("*")}
    if not found:
        return
    try:
        own = {PurePosixPath(name) for name in files_of(target)}
    except (OSError, ArtifactError):
        raise ArgumentError(f"{target}: exists and is not {kind}; choose a new or empty folder") from None
    others = found - own - {folder for path in own for folder in path.parents}
    if others:
        raise ArgumentError(f"{target}: also holds {str(min(others))!r}, which is not part of {kind}; move it away")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new folder to fill, beside `target`, whose place it takes when the block ends without an error.

    The new folder is complete before the old one goes.  StoreError where the disk says no; the old one is there then.
    """
    with typed(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temp = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        temp.mkdir()  # not mkdtemp: others may read what is saved, as the umask says
        try:
            yield temp
            _exchange(temp, target)
        finally:
            shutil.rmtree(temp, ignore_errors=True)


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
