"""The check of an artifact's folder: every byte against the manifest, before anybody maps a library of it."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bsrgen.errors import ArtifactCorruptError, BsrgenError, StoreError

MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"  # hex sha256 of manifest.json, bare or as sha256sum(1) prints it
MANIFEST_BYTES = 4 << 20
MANIFEST_FIELDS = 1 << 14  # 380,000 one-digit fields fit into 4 MiB and take 180 ms to decode

KEY = re.compile(r"\A[0-9a-f]{64}\Z")
NAME = re.compile(r"\A[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}\Z")
_SHARED_OBJECT = re.compile(r"\.(so|dylib|dll|pyd)(\.|\Z)")
_SPACE = b" \t\r\n"
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a FIFO must not block, a link must not be followed
ELSEWHERE = "set BSRGEN_CACHE_DIR to another folder"
_AGAIN = "build the artifact again or copy it again"
WAYS_OUT = {
    errno.ENOSPC: f"the disk is full; free space, run `bsrgen cache gc`, or {ELSEWHERE}",
    errno.EDQUOT: f"the disk quota is used up; free space, run `bsrgen cache gc`, or {ELSEWHERE}",
    errno.EFBIG: "a file is larger than this process may write; raise `ulimit -f`",
    errno.EROFS: f"the file system is read-only; {ELSEWHERE}",
    errno.EACCES: f"permission denied; {ELSEWHERE}",
    errno.EPERM: f"operation not permitted; {ELSEWHERE}",
}
_DAMAGE = {
    errno.ENOENT: "is missing",
    errno.ESTALE: "is missing",
    errno.ELOOP: "is a symbolic link",
    errno.ENOTDIR: "is not a folder",
    errno.ENXIO: "is not a regular file",
    errno.EIO: "cannot be read from the disk",
}


def verify_folder(folder: Path) -> None:
    """Check `folder` against its manifest.json, and that against manifest.sha256; ArtifactCorruptError names the file.

    Also refused: links, and shared libraries that the manifest does not list.  Other unlisted files are let be.
    """
    with typed(folder):
        fd = open_plain(Path(os.path.realpath(folder)))
        try:
            verify_open(fd, Path(folder))
        finally:
            os.close(fd)


def verify_open(folder_fd: int, folder: Path) -> None:
    manifest = _read(folder_fd, folder / MANIFEST, MANIFEST_BYTES)
    digest = hashlib.sha256(manifest).hexdigest()
    said = _read(folder_fd, folder / MANIFEST_DIGEST, 256).decode("ascii", "replace")
    if said not in (digest, f"{digest}\n", f"{digest}  {MANIFEST}\n"):
        raise _differs(folder / MANIFEST, len(manifest), digest, MANIFEST_DIGEST, said)
    files = _listed(manifest, folder / MANIFEST)
    with os.scandir(folder_fd) as items:
        for item in items:
            if item.is_symlink():
                raise ArtifactCorruptError(f"{folder / item.name} is a symbolic link; put the file itself there")
            if item.name not in files and _SHARED_OBJECT.search(item.name):
                raise ArtifactCorruptError(f"{folder / item.name} is not listed in {MANIFEST}; move it elsewhere")
    for name, said in files.items():
        with _reading(folder / name), open(open_plain(folder / name, folder_fd), "rb", buffering=0) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != said:
                raise _differs(folder / name, os.fstat(file.fileno()).st_size, digest, MANIFEST, said)


def _listed(manifest: bytes, path: Path) -> dict[str, str]:
    """The `files` map of a manifest: plain file names to sha256."""
    import msgspec

    try:
        if manifest.count(b":") > MANIFEST_FIELDS:
            raise ValueError(f"more than {MANIFEST_FIELDS} fields")
        top = msgspec.json.decode(manifest, type=dict[str, msgspec.Raw])
        files = msgspec.json.decode(top.get("files", b"{}"), type=dict[str, str])
        if not files:
            raise ValueError("it lists no files")
        # msgspec keeps the last of equal names without a word; then the text does not come back
        for parsed, text in (top, manifest), (files, bytes(top["files"])):
            if msgspec.json.encode(parsed).translate(None, _SPACE) != text.translate(None, _SPACE):
                raise ValueError("a name comes twice or is escaped")
        for name, digest in files.items():
            if not NAME.match(name) or not KEY.match(digest):
                raise ValueError(f"file {name!r:.80} with hash {digest!r:.80} is not a plain name with a sha256")
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ArtifactCorruptError(f"{path} is not the manifest of an artifact: {error}") from error
    return files


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn OSError into ArtifactCorruptError where the file is to blame, into StoreError where the machine is."""
    with typed(path):
        try:
            yield
        except OSError as error:
            if isinstance(error, BsrgenError) or error.errno not in _DAMAGE:
                raise
            raise ArtifactCorruptError(f"{path} {_DAMAGE[error.errno]}; {_AGAIN}") from error


def open_plain(path: Path, folder_fd: int | None = None) -> int:
    """Open the folder `path`, or the regular file of that name in `folder_fd`, and never a link."""
    with _reading(path):
        fd = os.open(path if folder_fd is None else path.name, READ, dir_fd=folder_fd)
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode) if folder_fd is None else stat.S_ISREG(mode):
            return fd
        os.close(fd)
        raise OSError(errno.ENOTDIR if folder_fd is None else errno.ENXIO, "wrong kind of file")


def _read(folder_fd: int, path: Path, limit: int) -> bytes:
    with _reading(path), open(open_plain(path, folder_fd), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ArtifactCorruptError(f"{path} has more than {limit} bytes; that is no {path.name} of an artifact")
    return data


def _differs(path: Path, size: int, digest: str, judge: str, said: str) -> ArtifactCorruptError:
    return ArtifactCorruptError(
        f"{path} is {'altered or truncated' if size else 'empty'}: {size} bytes with sha256 {digest[:12]}..., "
        f"{judge} says {said[:12]!r}...; {_AGAIN}"
    )


@contextmanager
def typed(where: Path) -> Iterator[None]:
    """Turn OSError into StoreError, which names `where` unless the error names an absolute path itself."""
    try:
        yield
    except OSError as error:
        if isinstance(error, BsrgenError):
            raise
        raise store_error(error, where) from error


def store_error(error: OSError, where: Path) -> StoreError:
    code = error.errno or errno.EIO
    named = error.filename if isinstance(error.filename, str) and os.path.isabs(error.filename) else where
    return StoreError(code, f"{named}: {WAYS_OUT.get(code) or f'{error.strerror}; {ELSEWHERE}'}")
