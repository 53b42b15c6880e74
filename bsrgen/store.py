"""The content-addressed store of built artifacts.

root/v1/<key[:2]>/<key>/   one artifact; complete from the moment the name exists, never changed, mtime = last use
root/tmp/                  builds in progress, and what is on its way out
root/failed/               sources of builds that failed, for an hour
root/locks/<key>.lock      one per key; only saves work, everything is right without it
root/calibration.json      rates of this CPU (calibration.py); no artifact, and nothing evicts it
root/usage                 ledger: one number a line, whose sum is an upper bound of the bytes kept
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bsrgen._paths import store_root
from bsrgen.errors import ArgumentError, ArtifactCorruptError, BsrgenError, BuildError, StoreError
from bsrgen.integrity import (
    ELSEWHERE,
    KEY,
    MANIFEST,
    MANIFEST_BYTES,
    NAME,
    READ,
    WAYS_OUT,
    open_plain,
    store_error,
    typed,
    verify_folder,
    verify_open,
)

STALE_S = 3600.0
LOCK_WAIT_S = 300.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """One artifact of the store: its key, size, last use (seconds since 1970), and `name` of its manifest or ''."""

    key: str
    bytes: int
    last_use_s: float
    name: str


@dataclass(frozen=True, slots=True)
class Store:
    """Artifacts by key under `root`; the least recently used go when they exceed `max_bytes`."""

    root: Path
    max_bytes: int = 2 << 30
    locks: bool = True  # False: file systems whose flock hangs; two processes may then build the same key

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root).absolute())

    @classmethod
    def default(cls) -> Store:
        """The store of this user, created 0700: $BSRGEN_CACHE_DIR, else the cache folder of the platform."""
        store = cls(store_root())
        with typed(store.root):
            _own_folder(store.root)
        return store

    def get(self, key: str) -> Path | None:
        """The folder of `key`, every file checked by hash, or None; a damaged entry is removed with a warning."""
        entry = self._place(key)
        with typed(self.root):
            if not _is_ours(self.root) or not os.path.lexists(entry):
                return None
            fd = -1
            try:
                fd = open_plain(entry)
                verify_open(fd, entry)
                with suppress(OSError):  # a read-only store still serves
                    os.utime(fd, ns=(time.time_ns(),) * 2)
                return entry if _is_same(entry, fd) else None
            except ArtifactCorruptError as damage:
                if _is_same(entry, fd):  # else evicted or replaced while we read
                    _log.warning("%s; removed from the store, to be built again", damage)
                    self._remove(entry, fd)
                return None
            finally:
                if fd >= 0:
                    os.close(fd)

    def publish(self, key: str, build: Callable[[Path], None]) -> Path:
        """The folder of `key`; if it is not there, `build` fills a private folder, which is renamed into place.

        What `build` raises passes through, except that a full or read-only disk becomes StoreError.
        """
        entry = self._place(key)
        if (found := self.get(key)) is not None:
            return found
        self._prepare(entry.parent)
        with self._locked(key):
            if (found := self.get(key)) is not None:
                return found
            with typed(self.root):
                temp = Path(tempfile.mkdtemp(prefix=f"{key[:12]}.", dir=self.root / "tmp"))
            try:
                self._build(build, temp)
                found, full = self._admit(temp, entry)
            except BuildError as error:
                error.args = (str(error).replace(str(temp), str(self._keep(temp))),)
                raise
            finally:
                shutil.rmtree(temp, ignore_errors=True)
        if full:
            try:
                self._collect(self.max_bytes, keep=key)
            except StoreError as error:
                _log.warning("nothing evicted: %s", error)
        return found

    def entries(self) -> list[Entry]:
        """All artifacts, the least recently used first."""
        with typed(self.root):
            return self._scan() if _is_ours(self.root) else []

    def gc(self, max_bytes: int | None = None) -> list[Entry]:
        """Evict the least recently used until at most `max_bytes` are kept, and sweep leftovers of killed builds."""
        if max_bytes is not None and max_bytes < 0:
            raise ArgumentError(f"max_bytes is {max_bytes}; give 0 or more")
        return self._collect(self.max_bytes if max_bytes is None else max_bytes)

    def clear(self) -> list[Entry]:
        """Evict everything.  Builds in progress and libraries already loaded are not disturbed."""
        return self._collect(-1)

    def _place(self, key: str) -> Path:
        if not isinstance(key, str) or not KEY.match(key):
            raise ArgumentError(f"store key {key!r:.80} is not 64 lower-case hex digits; give a sha256 hexdigest")
        return self.root / "v1" / key[:2] / key

    def _prepare(self, *shards: Path) -> None:
        """Make the folders that are missing, and sweep what killed builds left behind."""
        with typed(self.root):
            for folder in (self.root, *(self.root / name for name in ("v1", "tmp", "locks")), *shards):
                _own_folder(folder)
            for path in (*(self.root / "tmp").iterdir(), *(self.root / "failed").glob("*")):
                with suppress(OSError):
                    if time.time() - path.lstat().st_mtime > STALE_S:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _build(self, build: Callable[[Path], None], temp: Path) -> None:
        try:
            build(temp)
        except OSError as error:
            where = Path(os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else temp)
            if isinstance(error, BsrgenError) or error.errno not in WAYS_OUT or self.root not in where.parents:
                raise
            raise store_error(error, where) from error

    def _keep(self, temp: Path) -> Path:
        """Put the folder of a failed build aside for STALE_S, one for each key: whoever gets the error may look."""
        kept = self.root / "failed" / temp.name.partition(".")[0]
        with suppress(OSError, StoreError):
            _own_folder(kept.parent)
            shutil.rmtree(kept, ignore_errors=True)
            os.rename(temp, kept)
            return kept
        return temp

    def _admit(self, temp: Path, entry: Path) -> tuple[Path, bool]:
        """Make `temp` durable and rename it to `entry`, or use what somebody faster put there; True: time for gc."""
        verify_folder(temp)
        with typed(self.root):
            _sync(*sorted(temp.rglob("*"), reverse=True), temp)  # files before their folder, all before the rename
            full = self._record(_size_bytes(temp))  # before the rename: a crash can only make the ledger too big
            os.utime(temp, ns=(time.time_ns(),) * 2)
            for _ in range(8):
                try:
                    os.rename(temp, entry)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                        raise
                    if (theirs := self.get(entry.name)) is not None:
                        return theirs, full
                else:
                    _sync(entry.parent, entry.parent.parent)
                    return entry, full
        raise StoreError(f"{entry} is damaged and cannot be replaced; remove it by hand or {ELSEWHERE}")

    def _record(self, size_bytes: int) -> bool:
        """Add to the ledger; True if the store may exceed `max_bytes`.  Saves walking the store at each publish."""
        with self._locked("usage"), open(self.root / "usage", "a+", encoding="ascii", errors="replace") as ledger:
            unknown = ledger.tell() == 0
            ledger.write(f"{size_bytes}\n")
            ledger.seek(0)
            try:
                return unknown or sum(map(int, ledger)) > self.max_bytes
            except ValueError:
                return True

    def _collect(self, cap_bytes: int, keep: str = "") -> list[Entry]:
        evicted: list[Entry] = []
        with typed(self.root):
            if not _is_ours(self.root):
                return evicted
            self._prepare()
            with self._locked("usage"):
                pending = _size_bytes(self.root / "tmp")  # before the scan: what is renamed now counts twice, not never
                entries = self._scan()
                total = sum(entry.bytes for entry in entries)
                for entry in entries:
                    if total > cap_bytes and entry.key != keep and self._remove(self._place(entry.key)):
                        evicted.append(entry)
                        total -= entry.bytes
                fd, ledger = tempfile.mkstemp(dir=self.root / "tmp")
                with open(fd, "w", encoding="ascii") as file:
                    file.write(f"{pending + total}\n")
                os.replace(ledger, self.root / "usage")
        return evicted

    def _scan(self) -> list[Entry]:
        found = []
        for path in (self.root / "v1").glob("??/*"):
            if KEY.match(path.name):
                with suppress(FileNotFoundError):
                    last_use_s = path.lstat().st_mtime_ns / 1e9
                    found.append(Entry(path.name, _size_bytes(path), last_use_s, _name_of(path)))
        return sorted(found, key=lambda entry: (entry.last_use_s, entry.key))

    def _remove(self, entry: Path, fd: int = -1) -> bool:
        """Take `entry` out in one rename, then delete it; with `fd`, only if it still is what `fd` is open on."""
        try:
            aside = Path(tempfile.mkdtemp(prefix="out.", dir=self.root / "tmp"))
        except OSError as error:
            _log.warning("%s cannot be removed: %s", entry, error)
            return False
        try:
            os.rename(entry, aside / "entry")
            if not _is_same(aside / "entry", fd):
                os.rename(aside / "entry", entry)
            return True
        except OSError as error:
            _log.log(logging.DEBUG if error.errno == errno.ENOENT else logging.WARNING, "%s stays: %s", entry, error)
            return False
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold the lock `name`, or go on without it where the file system has no locks or its holder hangs."""
        if not self.locks:
            yield
            return
        import filelock

        lock = filelock.FileLock(self.root / "locks" / f"{name}.lock", mode=0o600)
        with typed(self.root):
            try:
                lock.acquire(timeout=LOCK_WAIT_S, poll_interval=0.02)
            except TimeoutError:
                _log.warning("%s is held for over %g s; going on without it", lock.lock_file, LOCK_WAIT_S)
            except (OSError, NotImplementedError) as error:  # the latter: filelock 3 without flock
                if getattr(error, "errno", errno.ENOSYS) not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                    raise
        try:
            yield
        finally:
            lock.release()


def _name_of(folder: Path) -> str:
    import msgspec

    try:
        with open(folder / MANIFEST, "rb") as file:
            top = msgspec.json.decode(file.read(MANIFEST_BYTES), type=dict[str, msgspec.Raw])
        name = msgspec.json.decode(top["name"], type=str)
        return name if NAME.match(name) else ""
    except (OSError, LookupError, ValueError, RecursionError, msgspec.MsgspecError):
        return ""


def _is_ours(path: Path) -> bool:
    """True for a folder that only this user can write to, False if there is nothing; else StoreError."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    if stat.S_ISLNK(found.st_mode):
        why = "is a symbolic link"
    elif not stat.S_ISDIR(found.st_mode):
        why = "is not a folder"
    elif found.st_uid != os.geteuid():
        why = f"belongs to user {found.st_uid}, not to user {os.geteuid()}"
    elif found.st_mode & 0o022:
        why = f"can be written by others (mode {stat.S_IMODE(found.st_mode):04o})"
    else:
        return True
    raise StoreError(f"{path} {why}, and code is loaded from it; make it yours alone with mode 0700, or {ELSEWHERE}")


def _own_folder(path: Path) -> None:
    """Create `path` and what is missing above it with mode 0700; StoreError if somebody else could write to it."""
    if not _is_ours(path):
        for folder in [*reversed([above for above in path.parents if not above.exists()]), path]:
            with suppress(FileExistsError):
                os.mkdir(folder, 0o700)
        _is_ours(path)


def _is_same(path: Path, fd: int) -> bool:
    """True if `path` is what `fd` is open on; with no fd, if it is there at all."""
    try:
        found = os.lstat(path)
        return fd < 0 or os.path.samestat(found, os.fstat(fd))
    except FileNotFoundError:
        return False


def _size_bytes(path: Path) -> int:
    total = 0
    for where, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(where, name)).st_size
    return total


def _sync(*paths: Path) -> None:
    for path in paths:
        fd = os.open(path, READ)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
