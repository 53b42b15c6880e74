"""Threads: the same bits whatever their number, many callers at once, the GIL, fork, and the call path without C."""

import sys
import threading
import time

import numpy as np
import pytest
from support import OPERATOR_NAMES, run_python

import bsrgen
from bsrgen import trampoline
from bsrgen.pattern import Weight, random_weight

TOKENS = (1, 7, 64, 128, 301)
SHAPE = (1000, 1500)  # 0.9 M stored elements: 1.8 MFLOP a token, three threads' worth at N = 1


@pytest.fixture(params=OPERATOR_NAMES)
def kernel(request):
    return bsrgen.compile(random_weight(0, SHAPE, (16, 4), 0.6, kind="powerlaw"), request.param)


def x_for(kernel: bsrgen.Kernel, n: int, seed: int = 0) -> np.ndarray:
    shape = kernel.problem.operator.shape(n, kernel.shape[1])
    return np.random.default_rng(seed).standard_normal(shape).astype(kernel.dtype)


@pytest.mark.parametrize("n", TOKENS)
def test_same_bits_for_any_number_of_threads_and_every_time(kernel, n):
    x = x_for(kernel, n)
    expected = kernel(x, threads=1)
    for _ in range(20):
        for threads in range(1, 9):
            out = np.full_like(expected, np.nan)
            assert kernel(x, out=out, threads=threads).tobytes() == expected.tobytes(), threads


@pytest.mark.parametrize("n", [1, 7, 65])
def test_more_threads_than_work(n):
    """One block row, few tokens: parts without work, and thread counts beyond the pool."""
    kernel = bsrgen.compile(random_weight(0, (16, 70_000), (16, 1), 0.9))
    x = x_for(kernel, n)
    expected = kernel(x, threads=1)
    for threads in (2, 3, 64, 300, 65536):
        assert kernel(x, threads=threads).tobytes() == expected.tobytes()


USED = """
import os, sys, numpy as np, bsrgen
from bsrgen.pattern import random_weight
k = bsrgen.compile(random_weight(0, (1000, 1500), (16, 4), 0.6, kind="powerlaw"), sys.argv[1])
x = np.ones(k.problem.operator.shape(64, 1500), np.float32)
def tasks(): return len(os.listdir("/proc/self/task"))
k(x, threads=1); before = tasks()
k(x, threads=4); four = tasks() - before
k(x, threads=2); print(four, tasks() - before)
"""


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_threads_are_really_used(operator):
    assert run_python(USED, operator).split() == ["3", "3"]  # workers sleep between calls


def test_default_number_of_threads(kernel, monkeypatch):
    monkeypatch.setenv("BSRGEN_NUM_THREADS", "3")
    folder = kernel.artifact.folder
    assert "3 threads" in repr(bsrgen.load(folder))
    assert "2 threads" in repr(bsrgen.load(folder, threads=2))
    for wrong in ("0", "-1", "two", "1.5"):
        monkeypatch.setenv("BSRGEN_NUM_THREADS", wrong)
        with pytest.raises(bsrgen.ArgumentError, match="BSRGEN_NUM_THREADS"):
            bsrgen.load(folder)


# ── many callers ─────────────────────────────────────────────────────────────────────────────────────────────────────


def run_callers(kernels, calls: int, threads: int | None) -> None:
    """8 Python threads, each with its own inputs, on the kernels in turn; every result has the bits it has alone."""
    tokens = (1, 5, 33, 64)
    inputs = [[x_for(k, n, seed) for n in tokens] for seed, k in enumerate((kernels * 8)[:8])]
    callers = [(kernels * 8)[i] for i in range(8)]
    expected = [[k(x, threads=1).tobytes() for x in xs] for k, xs in zip(callers, inputs, strict=True)]
    start, wrong = threading.Barrier(8), []

    def run(k, xs, ys) -> None:
        outs = [np.empty_like(k(x)) for x in xs]
        start.wait()
        for i in range(calls):
            at = i % len(xs)
            y = k(xs[at], threads=threads) if i % 2 else k(xs[at], out=outs[at], threads=threads)
            if y.tobytes() != ys[at]:
                wrong.append((k.name, at))
                return

    runners = [threading.Thread(target=run, args=job) for job in zip(callers, inputs, expected, strict=True)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert not wrong


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_eight_threads_on_one_kernel(threads):
    run_callers([bsrgen.compile(random_weight(0, (400, 500), (8, 4), 0.5))], 200, threads)


@pytest.mark.parametrize("threads", [None, 3])
def test_eight_threads_on_four_kernels(threads):
    weights = [random_weight(seed, (200, 240), (8, 4), 0.5) for seed in range(2)]
    run_callers([bsrgen.compile(w, operator) for w in weights for operator in OPERATOR_NAMES], 200, threads)


@pytest.mark.parametrize("mode", ["fast", "careful"])
def test_the_gil_is_released(kernel, mode):
    """No other thread is ever switched to by force here, so a counter can only count while the call runs."""
    x = x_for(kernel, 301)
    count, stop = [0], threading.Event()

    def counting() -> None:
        while not stop.is_set():
            count[0] += 1
            time.sleep(0)

    counter = threading.Thread(target=counting)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        counter.start()
        for _ in range(100):  # the first may end before the other thread wakes up
            before = count[0]
            kernel(x) if mode == "fast" else kernel(x, threads=1)
            if count[0] > before:
                break
        else:
            pytest.fail("no other thread ran during 100 calls")
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        counter.join()


# ── fork ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

SETUP = """
import multiprocessing, os, sys, threading, time
import numpy as np
import bsrgen, bsrgen.kernel, bsrgen.trampoline
from bsrgen.pattern import random_weight
if sys.argv[1] == "abi":
    bsrgen.kernel.trampoline = bsrgen.trampoline._abi
k = bsrgen.compile(random_weight(0, (500, 700), (16, 4), 0.6, kind="powerlaw"), "linear")
assert k._tramp.mode == sys.argv[1], k._tramp.mode
x = np.random.default_rng(0).standard_normal((64, 700)).astype(np.float32)
y = k(x, threads=2)
def child():
    for threads in (1, 2, 4, 2):
        if k(x, threads=threads).tobytes() != y.tobytes():
            return 1
    return 0
def fork(count):
    pids = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            os._exit(child())
        pids.append(pid)
    return pids
def reap(pids, seconds=10):
    end = time.monotonic() + seconds
    codes = {}
    while len(codes) < len(pids) and time.monotonic() < end:
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    hung = set(pids) - set(codes)
    for pid in hung:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    assert not hung, f"{len(hung)} children hang"
    assert set(codes.values()) == {0}, codes
"""
FORKS = {
    "after a call": "reap(fork(4))",
    "and the parent goes on": """
pids = fork(4)
for _ in range(50):
    assert k(x, threads=2).tobytes() == y.tobytes()
reap(pids)
""",
    "twice": """
pid = os.fork()
if pid == 0:
    assert child() == 0
    reap(fork(2))
    os._exit(child())
reap([pid], 20)
""",
    "from a thread": """
seen = []
def run():
    k(x, threads=3)
    pids = fork(4)
    seen.append(pids)
threads = [threading.Thread(target=run) for _ in range(2)]
for t in threads: t.start()
for t in threads: t.join()
reap(sum(seen, []), 20)
""",
    "while threads call": """
stop = threading.Event()
def run():
    while not stop.is_set():
        assert k(x, threads=2).tobytes() == y.tobytes()
threads = [threading.Thread(target=run) for _ in range(3)]
for t in threads: t.start()
try:
    for _ in range(5):
        reap(fork(4), 20)
finally:
    stop.set()
    for t in threads: t.join()
""",
    "by multiprocessing": """
def work(q):
    q.put(k(x, threads=2).tobytes() == y.tobytes())
context = multiprocessing.get_context("fork")
q = context.Queue()
processes = [context.Process(target=work, args=(q,)) for _ in range(4)]
for p in processes: p.start()
assert all(q.get(timeout=10) for _ in processes)
for p in processes: p.join(10); assert p.exitcode == 0
with context.Pool(4) as pool:
    assert pool.map(int, range(8)) == list(range(8))
""",
}


@pytest.mark.parametrize("how", FORKS)
@pytest.mark.parametrize("mode", ["api", "abi"])
def test_fork(mode, how):
    run_python(SETUP + FORKS[how], mode, timeout_s=100, PYTHONWARNINGS="ignore::DeprecationWarning")


# ── the call path without the extension ──────────────────────────────────────────────────────────────────────────────


def test_abi_mode_gives_the_same_results(kernel, monkeypatch, rng):
    weight = random_weight(3, (50, 60), (4, 3), 0.5)
    plain = bsrgen.compile(weight, "spmm")
    rich = bsrgen.compile(weight, epilogue=("bias", "clamp", "residual", "accumulate"))
    assert kernel._tramp.mode == "api"
    monkeypatch.setattr("bsrgen.kernel.trampoline", trampoline._abi)
    for k in (kernel, plain, rich):
        other = bsrgen.load(k.artifact.folder)
        assert other._tramp.mode == "abi"
        given = {}
        for n in (0, 1, 33, 130):
            x = x_for(k, n)
            if k is rich:
                given = {
                    "bias": rng.standard_normal(50).astype("f"),
                    "residual": rng.standard_normal((n, 50)).astype("f"),
                }
                given |= {"hi": 0.75, "beta": 0.5}
            old = rng.standard_normal(k(x, **given).shape).astype("f")
            assert other(x, **given).tobytes() == k(x, **given).tobytes()
            assert other(x, out=old.copy(), **given).tobytes() == k(x, out=old.copy(), **given).tobytes()
        x = np.zeros((70, 60) if k is not plain else (60, 70), np.float32)
        if k is plain:  # out overlaps x
            both = np.ones(60 * 70, np.float32)
            assert other(both.reshape(60, 70), out=both[: 50 * 70].reshape(50, 70)).tobytes() == k(x + 1).tobytes()
    other = bsrgen.load(plain.artifact.folder)
    other.update(Weight(weight.pattern, 2 * weight.data))
    x = x_for(plain, 9)
    np.testing.assert_array_equal(other(x), 2 * plain(x))


def test_load_takes_abi_mode_where_there_is_no_extension(tmp_path):
    """A store without the extension, and a process that may not build one."""
    folder = bsrgen.compile(random_weight(3, (50, 60), (4, 3), 0.5)).save(tmp_path / "k")
    script = """
import sys, numpy as np, bsrgen
k = bsrgen.load(sys.argv[1])
print(k._tramp.mode, k(np.ones((2, 60), np.float32)).shape)
"""
    assert run_python(script, str(folder), BSRGEN_CACHE_DIR=str(tmp_path / "empty")).split()[0] == "abi"
    (tmp_path / "file").write_text("")
    assert run_python(script, str(folder), BSRGEN_CACHE_DIR=str(tmp_path / "file")).split()[0] == "abi"
