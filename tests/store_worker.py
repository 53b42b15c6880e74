"""A process of the store tests: `store_worker.py root locks log`, then one command a line on stdin, one answer a line.

publish key start_s pace_s   wait for the monotonic clock to reach start_s, publish slowly, check what came back
churn seed seconds max_bytes publish, get and evict a few keys at random
limit bytes                  let no file grow beyond `bytes`
hang key                     publish with a build that starts a child, answers the child's pid, and never ends
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from bsrgen.integrity import MANIFEST, MANIFEST_DIGEST
from bsrgen.store import Store


def contents(key: str, size: int = 20_000) -> dict[str, bytes]:
    """The files of a small fake artifact, a function of `key`."""
    rng = random.Random(key)
    files = {
        "libfake.so": b"\x7fELF" + rng.randbytes(size),
        "fake.h": b"int fake(void);\n",
        "fake.c": rng.randbytes(900),
    }
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files[MANIFEST] = json.dumps({"name": "fake", "files": hashes, "shape": [24, 40]}, indent=2).encode()
    files[MANIFEST_DIGEST] = hashlib.sha256(files[MANIFEST]).hexdigest().encode()
    return files


def write(folder: Path, files: dict[str, bytes], pace_s: float = 0.0) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)
        time.sleep(pace_s / len(files))


def holds(folder: Path, key: str) -> bool:
    return {path.name: path.read_bytes() for path in folder.iterdir()} == contents(key)


def publish(store: Store, log: Path, key: str, start_s: str, pace_s: str) -> str:
    def build(folder: Path) -> None:
        with open(log, "a") as file:
            file.write(f"{key}\n")
        write(folder, contents(key), float(pace_s))

    time.sleep(max(0.0, float(start_s) - time.monotonic()))
    return "ok" if holds(store.publish(key, build), key) else "wrong"


def churn(store: Store, log: Path, seed: str, seconds: str, max_bytes: str) -> str:
    store = Store(store.root, int(max_bytes), store.locks)
    rng, end_s = random.Random(seed), time.monotonic() + float(seconds)
    keys = [hashlib.sha256(b"%d" % i).hexdigest() for i in range(6)]

    def publish_one(key: str) -> Path:
        return store.publish(key, lambda folder: write(folder, contents(key)))

    while time.monotonic() < end_s:
        key, act = rng.choice(keys), rng.random()
        if act < 0.1:
            store.gc()
            store.entries()
        elif folder := (store.get if act < 0.6 else publish_one)(key):
            with contextlib.suppress(FileNotFoundError):  # evicted meanwhile; but never half of it
                if (folder / "libfake.so").read_bytes() != contents(key)["libfake.so"]:
                    return "wrong"
    return "ok"


def limit(store: Store, log: Path, size: str) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
    return "ok"


def hang(store: Store, log: Path, key: str) -> str:
    def build(folder: Path) -> None:
        child = subprocess.Popen(["sleep", "60"])
        print(child.pid, flush=True)
        signal.pause()

    return str(store.publish(key, build))


VERBS: dict[str, Callable[..., str]] = {"publish": publish, "churn": churn, "limit": limit, "hang": hang}

if __name__ == "__main__":
    store, log = Store(Path(sys.argv[1]), locks=sys.argv[2] == "True"), Path(sys.argv[3])
    print("ready", flush=True)
    for line in sys.stdin:
        verb, *args = line.split()
        try:
            answer = VERBS[verb](store, log, *args)
        except Exception as error:
            answer = f"{type(error).__name__} {getattr(error, 'errno', None)} {error}"
        print(answer.replace(os.linesep, " "), flush=True)
