"""The store: one build per key, nothing half-built or damaged handed out, typed errors when the disk says no."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import mmap
import os
import pwd
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from store_worker import contents, holds, write

import bsrgen.store
from bsrgen.errors import ArgumentError, ArtifactCorruptError, BuildError, StoreError
from bsrgen.integrity import MANIFEST, MANIFEST_BYTES, MANIFEST_DIGEST, verify_folder
from bsrgen.store import Store

PROCESSES, ROUNDS = 16, 5


def key_of(text: object) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


KEY = key_of("one")


def builder(key: str = KEY, **options: int) -> Callable[[Path], None]:
    return lambda folder: write(folder, contents(key, **options))


def never(folder: Path) -> None:
    raise AssertionError("built again")


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leftovers(store: Store) -> list[str]:
    return [path.name for path in (store.root / "tmp").iterdir()]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


class Worker:
    """tests/store_worker.py in a process of its own."""

    def __init__(self, store: Store) -> None:
        command = [sys.executable, str(Path(__file__).with_name("store_worker.py"))]
        self.log = store.root.parent / "builds.log"
        self.process = subprocess.Popen(
            [*command, str(store.root), str(store.locks), str(self.log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def send(self, *words: object) -> None:
        assert self.process.stdin
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()


@pytest.fixture
def hire() -> Iterator[Callable[[Store, int], list[Worker]]]:
    hired: list[Worker] = []

    def hire(store: Store, count: int) -> list[Worker]:
        workers = [Worker(store) for _ in range(count)]
        hired.extend(workers)
        assert [worker.answer() for worker in workers] == ["ready"] * count
        return workers

    yield hire
    for worker in hired:
        worker.process.kill()
        worker.process.communicate()


# --- one build per key, whoever asks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("locks", [True, False])
def test_processes_on_one_key(tmp_path, hire, locks):
    store = Store(tmp_path / "cache", locks=locks)
    workers = hire(store, PROCESSES)
    for i in range(ROUNDS):
        if i % 2:  # and all find it damaged
            (store.publish(key_of(i), builder(key_of(i))) / "libfake.so").write_bytes(b"")
        start_s = time.monotonic() + 0.1
        for worker in workers:
            worker.send("publish", key_of(i), start_s, 0.1)
        assert [worker.answer() for worker in workers] == ["ok"] * PROCESSES
    builds = workers[0].log.read_text().split()
    assert set(builds) == {key_of(i) for i in range(ROUNDS)}
    assert len(builds) == ROUNDS if locks else len(builds) >= ROUNDS
    assert leftovers(store) == []
    assert len(store.entries()) == ROUNDS


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_publish_read_and_evict(tmp_path, hire, locks):
    store = Store(tmp_path / "cache", locks=locks)
    workers = hire(store, 6)
    for i, worker in enumerate(workers):
        worker.send("churn", i, 1.0, 50_000)  # room for two of six entries
    assert [worker.answer() for worker in workers] == ["ok"] * len(workers)
    assert leftovers(store) == []
    Store(store.root, 50_000).gc()
    assert sum(entry.bytes for entry in store.entries()) <= 50_000


def test_threads_build_one_key_once_and_other_keys_meanwhile(store):
    built: list[str] = []

    def publish(key: str) -> None:
        def build(folder: Path) -> None:
            built.append(key)
            write(folder, contents(key), 0.3)

        assert holds(store.publish(key, build), key)

    keys = [key_of(i % 4) for i in range(12)]
    threads = [threading.Thread(target=publish, args=(key,)) for key in keys]
    start_s = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(built) == sorted(set(keys))
    assert time.monotonic() - start_s < 4 * 0.3  # one lock for all would take that


def test_a_build_may_publish_another_key(store):
    other = key_of("other")
    store.publish(KEY, lambda folder: (store.publish(other, builder(other)), builder()(folder))[1])
    assert store.get(KEY)
    assert store.get(other)


def test_somebody_faster_wins_and_ours_is_dropped(tmp_path):
    store = Store(tmp_path / "cache", locks=False)

    def build(folder: Path) -> None:
        theirs = store.publish(KEY, builder())
        (theirs / "note").write_text("theirs")
        builder()(folder)

    assert (store.publish(KEY, build) / "note").read_text() == "theirs"
    assert leftovers(store) == []


@pytest.mark.parametrize("kind", ["damaged", "file", "link", "empty folder"])
def test_what_stands_in_the_way_is_replaced(tmp_path, kind):
    store = Store(tmp_path / "cache", locks=False)

    def build(folder: Path) -> None:
        builder()(folder)
        place = store.root / "v1" / KEY[:2] / KEY
        if kind == "file":
            place.write_text("x")
        elif kind == "link":
            place.symlink_to(tmp_path)
        else:
            place.mkdir()
            if kind == "damaged":
                (place / "libfake.so").write_text("x")

    assert holds(store.publish(KEY, build), KEY)
    assert leftovers(store) == []
    assert tmp_path.is_dir()


# --- killed builders --------------------------------------------------------------------------------------------------


def test_killed_builders_block_nobody(store, hire):
    rng = random.Random(3)
    for i, worker in enumerate(hire(store, 8)):
        key = key_of(i)
        worker.send("publish", key, 0, 0.2)
        time.sleep(rng.uniform(0, 0.25))
        worker.process.kill()
        worker.process.wait()
        start_s = time.monotonic()
        assert holds(store.publish(key, builder(key)), key)
        assert time.monotonic() - start_s < 1
    for path in (store.root / "tmp").iterdir():
        os.utime(path, (0, 0))
    store.publish(KEY, builder())
    assert leftovers(store) == []


def test_a_compiler_that_outlives_its_killed_parent_holds_no_lock(store, hire):
    (worker,) = hire(store, 1)
    worker.send("hang", KEY)
    child = int(worker.answer())
    worker.process.kill()
    try:
        start_s = time.monotonic()
        assert holds(store.publish(KEY, builder()), KEY)
        assert time.monotonic() - start_s < 1
        assert leftovers(store) != []  # under an hour old: could be alive
    finally:
        os.kill(child, 9)


def test_a_lock_that_is_never_released_only_costs_the_wait(store, hire, monkeypatch, caplog):
    (worker,) = hire(store, 1)
    worker.send("hang", KEY)
    child = int(worker.answer())
    monkeypatch.setattr(bsrgen.store, "LOCK_WAIT_S", 0.2)
    try:
        assert holds(store.publish(KEY, builder()), KEY)
        assert "going on without it" in caplog.text
    finally:
        os.kill(child, 9)


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(store, monkeypatch, code):
    monkeypatch.setattr(bsrgen.store, "LOCK_WAIT_S", 0.5)  # filelock 3 retries for as long
    monkeypatch.setattr("fcntl.flock", refuse(code))
    assert holds(store.publish(KEY, builder()), KEY)


# --- damage -----------------------------------------------------------------------------------------------------------

FILES = sorted(contents(KEY))


def damages(data: bytes, rng: random.Random) -> Iterator[bytes]:
    yield from (data[: len(data) * i // 6] for i in range(6))
    yield data[:-1]
    yield data + b"\0"
    yield b"not an artifact\n"
    for _ in range(20):
        flipped = bytearray(data)
        for position in rng.sample(range(len(data)), 3):
            flipped[position] ^= 1 << rng.randrange(8)
        yield bytes(flipped)
    for _ in range(5):
        start = rng.randrange(len(data))
        yield data[:start] + b"\0" * len(data[start : start + 512]) + data[start + 512 :]


@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_before_anybody_loads(tmp_path, name):
    builder()(tmp_path)
    verify_folder(tmp_path)
    data = (tmp_path / name).read_bytes()
    for damaged in damages(data, random.Random(name)):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ArtifactCorruptError, match=rf"{name}|{MANIFEST}"):
            verify_folder(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ArtifactCorruptError, match=f"{name} is missing"):
        verify_folder(tmp_path)
    (tmp_path / name).write_bytes(data)
    verify_folder(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "missing", "link", "folder", "fifo"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_entry_is_dropped_and_built_again(store, caplog, name, damage):
    path = store.publish(KEY, builder()) / name
    data = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(data[:-1])
    elif damage == "link":
        path.symlink_to(path.with_name("fake.h") if name != "fake.h" else path.with_name("fake.c"))
    elif damage == "folder":
        path.mkdir()
    elif damage == "fifo":
        os.mkfifo(path)
    assert store.get(KEY) is None
    assert name in caplog.text
    assert "built again" in caplog.text
    assert not path.parent.exists()
    assert holds(store.publish(KEY, builder()), KEY)
    assert leftovers(store) == []


def test_a_fresh_entry_is_not_dropped_for_the_damage_of_the_old_one(store, monkeypatch, caplog):
    (store.publish(KEY, builder()) / "fake.c").write_text("x")
    verify = bsrgen.store.verify_open

    def slow(fd: int, folder: Path) -> None:  # meanwhile another process drops and builds it again
        monkeypatch.setattr(bsrgen.store, "verify_open", verify)
        assert Store(store.root, locks=False).publish(KEY, builder())
        verify(fd, folder)

    monkeypatch.setattr(bsrgen.store, "verify_open", slow)
    caplog.clear()
    assert store.get(KEY) is None
    assert holds(store.publish(KEY, never), KEY)


def test_a_fresh_entry_that_was_taken_by_mistake_is_put_back(store, monkeypatch):
    (store.publish(KEY, builder()) / "fake.c").write_text("x")
    mkdtemp = tempfile.mkdtemp

    def slow(**options: str) -> str:  # after the entry was compared, before it is renamed
        monkeypatch.setattr("tempfile.mkdtemp", mkdtemp)
        assert Store(store.root, locks=False).publish(KEY, builder())
        return mkdtemp(**options)

    monkeypatch.setattr("tempfile.mkdtemp", slow)
    assert store.get(KEY) is None
    assert holds(store.publish(KEY, never), KEY)
    assert leftovers(store) == []


def test_what_others_add_to_a_folder(tmp_path):
    builder()(tmp_path)
    (tmp_path / "example").write_bytes(b"\x7fELF")  # what `cc example.c -o example` leaves
    (tmp_path / "build").mkdir()
    verify_folder(tmp_path)
    for name in ("libother.so", "libother.so.1", "libfake.dylib"):
        (tmp_path / name).write_bytes(b"\x7fELF")
        with pytest.raises(ArtifactCorruptError, match=f"{name} is not listed"):
            verify_folder(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "notes").symlink_to("fake.c")
    with pytest.raises(ArtifactCorruptError, match="notes is a symbolic link"):
        verify_folder(tmp_path)


def test_verify_names_a_folder_that_is_none(tmp_path):
    with pytest.raises(ArtifactCorruptError, match="nowhere is missing"):
        verify_folder(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactCorruptError, match="file is not a folder"):
        verify_folder(tmp_path / "file")


def test_verify_follows_a_link_to_the_folder_and_takes_sha256sum(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    builder()(tmp_path / "real")
    verify_folder(tmp_path / "link")
    if shutil.which("sha256sum"):
        for said in (subprocess.check_output(["sha256sum", MANIFEST], cwd=tmp_path / "real"), b"\n"):
            digest = contents(KEY)[MANIFEST_DIGEST]
            (tmp_path / "real" / MANIFEST_DIGEST).write_bytes(said if len(said) > 1 else digest + said)
            verify_folder(tmp_path / "real")


HASH = key_of("file")
HOSTILE = {
    "empty": b"",
    "not json": b"\x7fELF\0\0\0",
    "not utf-8": b'{"files":{"\xff":"%s"}}' % HASH.encode(),
    "files twice, apart": b'{"files":{"a":"%s"}, "x": [1,\n2],\n"files":{"a":"%s"}}' % (HASH.encode(), HASH.encode()),
    "no files": b'{"name":"x"}',
    "empty files": b'{"files":{}}',
    "a list": b"[]",
    "files is a list": b'{"files":["fake.c"]}',
    "hash is a number": b'{"files":{"fake.c":1}}',
    "hash is short": b'{"files":{"fake.c":"ab"}}',
    "hash with newline": b'{"files":{"fake.c":"%s\\n"}}' % HASH.encode(),
    "null": b'{"files":null}',
    "files twice": b'{"files":{"a":"%s"},"files":{"b":"%s"}}' % (HASH.encode(), HASH.encode()),
    "a name twice": b'{"files":{"a":"%s","a":"%s"}}' % (HASH.encode(), key_of(2).encode()),
    "files twice, escaped": b'{"files":{"a":"%s"},"f\\u0069les":{"b":"%s"}}' % (HASH.encode(), HASH.encode()),
    "trailing": b'{"files":{"a":"%s"}} {}' % HASH.encode(),
    "NaN": b'{"files":{"a":"%s"},"x":NaN}' % HASH.encode(),
    "deep list": b'{"files":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep map": b'{"files":' + b'{"a":' * 200_000 + b"1" + b"}" * 200_000 + b"}",
    "deep elsewhere": b'{"files":{"a":"%s"},"x":' % HASH.encode() + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "many fields": b"{" + b",".join(b'"%x":1' % i for i in range(380_000)) + b"}",
    "many files": b'{"files":{' + b",".join(b'"%x":"%s"' % (i, HASH.encode()) for i in range(50_000)) + b"}}",
    "long list": b'{"files":{"a":"%s"},"x":[' % HASH.encode() + b"1," * (2_000_000) + b"1]}",
    "over the cap": b'{"files":{"a":"%s"}' % HASH.encode() + b" " * MANIFEST_BYTES + b"}",
    **{
        f"name {name}": b'{"files":{"%s":"%s"}}' % (name.encode(), HASH.encode())
        for name in (
            *(
                "",
                ".",
                "..",
                "../x",
                "/etc/passwd",
                "a/b",
                "a\\\\b",
                "a\\u0000b",
                "a\\n",
                "-o",
                ".hidden",
                "a b",
                "\u00e9",
            ),
            *(MANIFEST, MANIFEST_DIGEST, "x" * 300),
        )
    },
}


@pytest.mark.parametrize("manifest", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_manifest_with_a_right_hash_is_refused_fast(tmp_path, manifest):
    write(tmp_path, {MANIFEST: manifest, MANIFEST_DIGEST: hashlib.sha256(manifest).hexdigest().encode()})
    seconds = []
    for _ in range(5):
        start_s = time.process_time()  # not the clock: other processes run tests too
        with pytest.raises(ArtifactCorruptError) as caught:
            verify_folder(tmp_path)
        seconds.append(time.process_time() - start_s)
    assert min(seconds) < 0.05
    assert len(str(caught.value)) < 1000


def test_get_costs_little_over_the_hash(store):
    store.publish(KEY, builder(size=1 << 20))
    data = bytes(1 << 20)
    get_s, hash_s = [], []
    for _ in range(30):
        start_s = time.perf_counter()
        hashlib.sha256(data)
        hash_s.append(time.perf_counter() - start_s)
        start_s = time.perf_counter()
        assert store.get(KEY)
        get_s.append(time.perf_counter() - start_s)
    assert min(get_s) < max(0.003, min(hash_s) + 0.002)


# --- the disk says no -------------------------------------------------------------------------------------------------


def refuse(code: int, when: Callable[..., bool] = lambda *args: True, call: Callable[..., object] = print):
    """A stand-in for `call` that fails with `code` when `when(*args)`."""

    def fail(*args: object, **kwargs: object) -> object:
        if when(*args):
            raise OSError(code, os.strerror(code))
        return call(*args, **kwargs)

    return fail


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["os.fsync", "os.rename", "tempfile.mkdtemp", "os.utime", "filelock.FileLock.acquire"])
def test_each_call_that_fails_is_a_typed_error(store, monkeypatch, call, code):
    other = store.publish(key_of("other"), builder(key_of("other")))
    before = files_below(store.root / "v1")
    with monkeypatch.context() as patch:
        patch.setattr(call, refuse(code))
        with pytest.raises(StoreError, match=str(store.root)) as caught:
            store.publish(KEY, builder())
        assert caught.value.errno == code
        assert "BSRGEN_CACHE_DIR" in str(caught.value)
        assert store.get(key_of("other")) == other  # what is there is still served
    assert files_below(store.root / "v1") == before
    assert leftovers(store) == []
    assert holds(store.publish(KEY, builder()), KEY)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_root_that_cannot_be_made(store, monkeypatch, code):
    monkeypatch.setenv("BSRGEN_CACHE_DIR", str(store.root))
    monkeypatch.setattr("os.mkdir", refuse(code))
    for ask in (lambda: store.publish(KEY, never), Store.default):
        with pytest.raises(StoreError, match="BSRGEN_CACHE_DIR"):
            ask()
    assert store.get(KEY) is None
    assert store.entries() == store.gc() == store.clear() == []
    assert not store.root.exists()


def test_what_build_raises_passes_through_and_leaves_nothing(store):
    for error in (BuildError("gcc: no"), KeyboardInterrupt(), FileNotFoundError(errno.ENOENT, "no", "gcc")):

        def build(folder: Path, error: BaseException = error) -> None:
            (folder / "fake.c").write_text("x")
            raise error

        with pytest.raises(type(error)) as caught:
            store.publish(KEY, build)
        assert caught.value is error
        assert leftovers(store) == []
    with pytest.raises(PermissionError):  # not ours to explain: another place
        store.publish(KEY, refuse_with(PermissionError(errno.EACCES, "no", "/usr/bin/cc")))
    with pytest.raises(StoreError, match="disk is full"):
        store.publish(KEY, refuse_with(OSError(errno.ENOSPC, "no")))
    with pytest.raises(ArtifactCorruptError, match=f"{MANIFEST} is missing"):
        store.publish(KEY, lambda folder: None)
    assert store.entries() == []
    assert leftovers(store) == []


def refuse_with(error: BaseException) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        raise error

    return build


def test_a_file_size_limit(store, hire):
    (worker,) = hire(store, 1)
    worker.send("limit", 10_000)
    assert worker.answer() == "ok"
    worker.send("publish", KEY, 0, 0)
    answer = worker.answer()
    assert answer.startswith(f"StoreError {errno.EFBIG} ")
    assert "ulimit" in answer
    assert store.entries() == []
    assert leftovers(store) == []


def in_namespace(check: Callable[[Path], None], folder: Path, *mount: str) -> None:
    """Run `check(folder)` with something mounted at `folder`, for it alone."""
    code = f"import pathlib, test_store; test_store.{check.__name__}(pathlib.Path({str(folder)!r}))"
    command = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        'mount "$@" || exit 77; exec "$PYTHON" -c "$CODE"',
        "sh",
        *mount,
        str(folder),
    ]
    if not shutil.which("unshare"):
        pytest.skip("unshare(1) is not installed")
    root = Path(bsrgen.store.__file__).parent.parent
    env = os.environ | {"PYTHON": sys.executable, "CODE": code, "PYTHONPATH": f"{root}:{Path(__file__).parent}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip(f"no mounting here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr


def check_full_disk(disk: Path) -> None:
    store = Store(disk / "cache")

    def publish_until_full() -> int:
        for i in range(100):
            try:
                store.publish(key_of(i), builder(key_of(i), size=60_000))
            except StoreError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017 (of the first that fails)
                assert "disk is full" in str(error)  # noqa: PT017
                return i
        raise AssertionError("the disk never filled")

    count = publish_until_full()
    assert count > 5
    assert len(store.entries()) == count
    assert leftovers(store) == []
    assert all(store.get(key_of(i)) for i in range(count))
    store.gc(200_000)
    assert store.publish(key_of(count), builder(key_of(count), size=60_000))


def test_a_full_disk(tmp_path):
    in_namespace(check_full_disk, tmp_path, "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs")


def check_read_only(root: Path) -> None:
    store = Store(root)
    assert store.get(KEY) == store.publish(KEY, never)
    assert [entry.key for entry in store.entries()] == [KEY]
    for ask in (lambda: store.publish(key_of(2), builder(key_of(2))), store.clear):
        with pytest.raises(StoreError, match="read-only"):
            ask()


def test_a_read_only_disk_still_serves(store):
    store.publish(KEY, builder())
    in_namespace(check_read_only, store.root, "--bind", "-o", "ro", str(store.root))
    assert store.get(KEY)


def test_written_then_synced_then_renamed_then_synced(store, monkeypatch):
    """A power cut leaves all of an entry or nothing."""
    seen: list[str] = []
    fsync, rename = os.fsync, os.rename

    def see_fsync(fd: int) -> None:
        seen.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)

    def see_rename(source: Path, target: Path) -> None:
        seen.append("rename")
        rename(source, target)

    monkeypatch.setattr("os.fsync", see_fsync)
    monkeypatch.setattr("os.rename", see_rename)
    store.publish(KEY, builder())
    files, temp, rest = seen[: len(FILES)], seen[len(FILES)], seen[len(FILES) + 1 :]
    assert sorted(files) == FILES
    assert temp.startswith(KEY[:12])
    assert rest == ["rename", KEY[:2], "v1"]


# --- other users ------------------------------------------------------------------------------------------------------


def test_folders_are_private(tmp_path, monkeypatch):
    monkeypatch.setenv("BSRGEN_CACHE_DIR", str(tmp_path / "new" / "cache"))
    umask = os.umask(0)
    try:
        store = Store.default()
        entry = store.publish(KEY, builder())
    finally:
        os.umask(umask)
    assert store.root == tmp_path / "new" / "cache"
    names = ("v1", "tmp", "locks", "v1/" + KEY[:2])
    for folder in (store.root.parent, store.root, *(store.root / name for name in names), entry):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
    for lock in (store.root / "locks").iterdir():
        assert stat.S_IMODE(lock.stat().st_mode) == 0o600, lock


def every_use(store: Store) -> list[Callable[[], object]]:
    return [
        lambda: store.get(KEY),
        lambda: store.publish(KEY, never),
        store.entries,
        store.gc,
        store.clear,
        Store.default,
    ]


@pytest.mark.parametrize("kind", ["link", "file", "group", "world", "owner", "inner link"])
def test_a_store_that_others_could_write_to_is_refused(tmp_path, store, monkeypatch, kind):
    uses = every_use(store)
    if kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        store.root.symlink_to("elsewhere")
    elif kind == "file":
        store.root.write_text("x")
    elif kind == "inner link":
        store.root.mkdir(mode=0o700)
        (store.root / "tmp").symlink_to(tmp_path)
        uses = [lambda: store.publish(KEY, never)]
    else:
        store.root.mkdir(mode=0o700)
        store.root.chmod({"group": 0o720, "world": 0o702}.get(kind, 0o700))
        if kind == "owner":
            monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    monkeypatch.setenv("BSRGEN_CACHE_DIR", str(store.root))
    for use in uses:
        with pytest.raises(StoreError, match=r"link|not a folder|others|belongs") as caught:
            use()
        assert "BSRGEN_CACHE_DIR" in str(caught.value)


def test_a_lock_that_is_a_link_is_not_followed(store, tmp_path):
    store.publish(key_of(2), builder(key_of(2)))
    (tmp_path / "victim").write_text("precious")
    (store.root / "locks" / f"{KEY}.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(StoreError, match=r"\.lock"):
        store.publish(KEY, builder())
    assert (tmp_path / "victim").read_text() == "precious"


def test_default_is_the_cache_folder_of_the_platform(tmp_path, monkeypatch):
    monkeypatch.delenv("BSRGEN_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Store.default() == Store(tmp_path / "xdg" / "bsrgen", 2 << 30, True)


def test_no_home_folder(monkeypatch, tmp_path):
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "XDG_CACHE_HOME", "BSRGEN_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(StoreError, match="HOME or BSRGEN_CACHE_DIR"):
        Store.default()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["", "ab", KEY.upper(), KEY + "\n", "../" + KEY[3:], KEY[:-1] + "g", None, b"x" * 64])
def test_a_key_is_a_sha256(store, key):
    for use in (store.get, lambda key: store.publish(key, never)):
        with pytest.raises(ArgumentError, match="64 lower-case hex"):
            use(key)
    assert not store.root.exists()


# --- size -------------------------------------------------------------------------------------------------------------


def fill(store: Store, count: int) -> list[str]:
    keys = [key_of(i) for i in range(count)]
    for key in keys:
        store.publish(key, builder(key))
    return keys


def test_entries(store):
    assert store.entries() == []
    keys = fill(store, 3)
    entries = store.entries()
    assert [entry.key for entry in entries] == keys
    assert {entry.name for entry in entries} == {"fake"}
    assert {entry.bytes for entry in entries} == {sum(map(len, contents(KEY).values()))}
    assert all(abs(time.time() - entry.last_use_s) < 60 for entry in entries)


def test_the_least_recently_used_go_first(store):
    keys = fill(store, 5)
    size = store.entries()[0].bytes
    assert store.get(keys[0])
    assert [entry.key for entry in store.gc(3 * size)] == keys[1:3]
    assert [entry.key for entry in store.entries()] == [*keys[3:], keys[0]]
    assert store.gc() == []
    with pytest.raises(ArgumentError, match="-1"):
        store.gc(-1)
    assert [entry.key for entry in store.clear()] == [*keys[3:], keys[0]]
    assert store.entries() == leftovers(store) == []


@pytest.mark.parametrize("ledger", ["kept", "lost", "garbage"])
def test_publish_keeps_the_store_under_its_size(store, ledger):
    size = sum(map(len, contents(KEY).values()))
    small = Store(store.root, 3 * size)
    for i in range(8):
        if ledger != "kept" and store.root.exists():
            with contextlib.suppress(FileNotFoundError):
                (store.root / "usage").unlink()
        if ledger == "garbage" and i:
            (store.root / "usage").write_bytes(b"\0\xff\n")
        small.publish(key_of(i), builder(key_of(i)))
        kept = [entry.key for entry in small.entries()]
        assert kept == [key_of(j) for j in range(max(0, i - 2), i + 1)]


def test_publish_hands_out_even_what_is_larger_than_the_store(store):
    small = Store(store.root, 100)
    for i in range(3):
        assert holds(small.publish(key_of(i), builder(key_of(i))), key_of(i))
        assert [entry.key for entry in small.entries()] == [key_of(i)]


def test_publish_walks_the_store_only_when_it_may_be_full(store, monkeypatch):
    fill(store, 1)
    monkeypatch.setattr(Store, "_scan", lambda self: pytest.fail("walked"))
    store.publish(KEY, builder())


def test_the_ledger_misses_nothing_that_is_published_during_gc(store, monkeypatch):
    scan = Store._scan
    late = threading.Thread(target=lambda: store.publish(KEY, builder()))

    def slow(self: Store) -> list[bsrgen.store.Entry]:
        entries = scan(self)
        if not late.ident:
            late.start()
            late.join(0.3)
        return entries

    fill(store, 2)
    monkeypatch.setattr(Store, "_scan", slow)
    store.gc()
    late.join()
    total = sum(entry.bytes for entry in store.entries())
    assert sum(map(int, (store.root / "usage").read_text().split())) >= total == 3 * store.entries()[0].bytes


def test_an_entry_in_use_can_go(store):
    with open(store.publish(KEY, builder()) / "libfake.so", "rb") as file:
        library = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_EXEC)  # what dlopen does
    store.clear()
    assert store.get(KEY) is None
    assert library[:] == contents(KEY)["libfake.so"]


def test_get_while_the_entry_goes(store, monkeypatch, caplog):
    store.publish(KEY, builder())
    verify = bsrgen.store.verify_open

    def slow(fd: int, folder: Path) -> None:
        store.clear()
        verify(fd, folder)

    monkeypatch.setattr(bsrgen.store, "verify_open", slow)
    assert store.get(KEY) is None
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_what_is_not_ours_is_let_be(store):
    fill(store, 1)
    (store.root / "v1" / "00").mkdir(exist_ok=True)
    (store.root / "v1" / "00" / "README").write_text("mine")
    assert len(store.clear()) == 1
    assert (store.root / "v1" / "00" / "README").read_text() == "mine"


def test_import_is_light():
    code = "import sys, bsrgen.store; print(*{'filelock', 'platformdirs', 'msgspec', 'jinja2'} & set(sys.modules))"
    root = Path(bsrgen.store.__file__).parent.parent
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=root).split() == []
