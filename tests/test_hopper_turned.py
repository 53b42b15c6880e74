"""X of `linear` turned into scratch memory, where Hopper's kernels gather narrow columns; without a GPU."""

import ctypes
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
from device_emulation import check_device_calls, emulated, run, said
from gpu_places import EMULATION, entered, poisoned
from support import assert_right, make_weight, problem_of
from test_cuda_ffi import call
from test_hopper import HOPPER, SMALL, TYPES, library_of, replaced, weight_of

from bsrgen import driver, scratches, tune
from bsrgen.backends.cuda import HopperPlan, candidates
from bsrgen.backends.cuda.hopper import Shape
from bsrgen.backends.cuda.hopper_turn import turning_of
from bsrgen.errors import CaptureError, DeviceError
from bsrgen.even import EvenPattern
from bsrgen.gpus import as_gpus
from bsrgen.pattern import as_weight
from bsrgen.scratches import LEAST_BYTES, Memory, Piece, Scratches
from bsrgen.workspaces import PER_THREAD, Workspaces

AHEAD = 4096  # bytes ahead of scratch memory that nobody may write


def exact(kernel):
    """`kernel` with scratch memory of its own in each call, of exactly the bytes that it needs, NaN at first."""

    @contextmanager
    def lend(device, stream, n):
        needed = kernel._scratch_of(n)
        memory = kernel._allocate(device, needed + AHEAD)
        yield Piece(memory + AHEAD, needed) if needed else Piece()
        assert ctypes.string_at(memory, AHEAD) == b"\xff" * AHEAD, "written ahead of scratch memory"

    kernel._scratch = lend
    return kernel


def with_gaps(block, shape, dtype, seed=3):
    """Columns that no block has, some of them side by side, and a block row without blocks."""
    weight = weight_of("uniform", shape, block, "float32", seed)
    stored = np.random.default_rng(seed).random((weight.pattern.block_rows, weight.pattern.block_cols)) < 0.3
    stored[:, ::5] = stored[:, 8:30] = False
    stored[1] = False
    dense = np.kron(stored, np.ones(block))[: shape[0], : shape[1]]
    dense *= np.arange(dense.size).reshape(dense.shape) % 7 / 2 - 1.25
    return as_weight(dense.astype(TYPES[dtype].numpy), blocksize=block, dtype=dtype)


# block, shape, type of W and X, of Y, epilogue, slots, shapes of kernels, of clusters (down), tokens of calls
TABLE = {
    "one column": ((64, 1), (152, 203), "bfloat16", None, ("bias", "silu"), 2,
                   (Shape(4, 4, 1), Shape(64, 64, 2), Shape(64)), 1, (3, 61, 70)),
    "three": ((8, 3), (61, 200), "float16", "float32", ("residual", "token_scale"), 4, (Shape(64),), 1, (1, 133)),
    "eight": ((64, 8), (320, 400), "bfloat16", None, ("bias", "accumulate"), 2, (Shape(128, across=2),), 2, (131,)),
}  # fmt: skip
BAND = 128


def in_bands(text):
    """A band of 128 tokens and what is left of a call."""
    return re.sub(r" BAND = \d+,", f" BAND = {BAND},", text)


@pytest.mark.parametrize("name", TABLE)
def test_table(name, rng, tmp_path):
    block, shape, dtype, y, epilogue, slots, shapes, down, tokens = TABLE[name]
    weight = with_gaps(block, shape, dtype)
    problem = problem_of(weight, "linear", epilogue, TYPES[dtype], y=y)
    plan = HopperPlan(problem, SMALL, slots, shapes, down, turned=True)
    assert plan.turning.rows < weight.pattern.K
    kernel = exact(emulated(plan, weight, tmp_path, in_bands if name == "three" else lambda text: text))
    check_device_calls(kernel, problem, weight, rng, tokens, exact=False)  # X that is not aligned, too
    assert library_of(kernel).emulation_products() > 0
    assert (library_of(kernel).emulation_boxes() > 0) == bool(plan.box_rows)
    library_of(kernel).emulation_gpu(8, 9)  # other GPUs read what is turned, too
    check_device_calls(kernel, problem, weight, rng, tokens[-1:], exact=False)
    assert library_of(kernel).emulation_products() == 0


def test_scratch_memory_is_asked_for(tmp_path, rng):
    """As much as a band of tokens takes; too little is an error before any launch, in C and in Python."""
    weight = with_gaps((32, 1), (96, 190), "float16")
    problem = problem_of(weight, "linear")
    plan = HopperPlan(problem, SMALL, 2, (Shape(4, 4, 1), Shape(64)), 1, turned=True)
    kernel, rows = emulated(plan, weight, tmp_path), plan.turning.rows
    assert kernel.artifact.manifest.scratch
    assert [kernel._scratch_of(n) for n in (0, 4, 5, 65)] == [0, 0, 128 * rows, 256 * rows]
    assert kernel._scratch_of(plan.band + 9) == kernel._scratch_of(1 << 30) == 2 * plan.band * rows
    both = replace(plan, target=as_gpus(("sm_80", "sm_90a"))[0])
    assert both.scratch_n == 0  # the kernel for other GPUs reads what is turned in calls of any n
    x, _ = problem.sample(rng, 9)
    y = poisoned(problem, rng, 9)
    for bytes_ in (0, 128 * rows - 1):
        kernel._scratch = lambda device, stream, n, bytes_=bytes_: nullcontext(
            Piece(kernel._allocate(device, 128 * rows) if bytes_ else 0, bytes_)
        )
        with pytest.raises(DeviceError, match=rf"no scratch memory, or less than {kernel.name}_scratch\(n\)"):
            run(kernel, x, y, {})
    for n, status in ((4, 0), (5, -1)):  # nobody brings scratch memory there
        there = [np.zeros((n, size), np.float16) for size in (190, 96)]
        assert call(ctypes.CDLL(str(kernel.artifact.library)), kernel.name, *there) == status
    main = (tmp_path / f"{kernel.name}.h").read_text()
    assert "void *scratch, int64_t scratch_bytes, void *stream" in main


# ── mutations: what the emulation must find ──────────────────────────────────────────────────────────────────────────

MUTATIONS = {
    "turned before X may be there": ("    earlier_done(); /* X may be", "    /* X may be"),
    "gathered before it is turned": ("    earlier_done();\n    return count;", "    return count;"),
    "one thread waits for all": (
        "    earlier_done();\n    return count;",
        "    if (threadIdx.x == 0) earlier_done();\n    return count;",
    ),
    "results before they may come": ("        earlier_done(); /* Y", "        /* Y"),
    "W of the first stages twice": (" && --ahead < 0", " && --ahead < 99"),
    "wrong pitch": ("a.ld_turned = widths * TURN_WIDTH", "a.ld_turned = widths * TURN_WIDTH - 8"),
    "another pitch": ("call->ldx = a.ldx = a.ld_turned,", "call->ldx = a.ldx = a.ld_turned + 64,"),
    "X as it lies": ("    call->x = a.x = a.turned, ", "    "),
    "turned too early": ("    __syncthreads();\n    const int mine", "    const int mine"),
    "tokens in another order": ("lane / 8 * 2 + lane % 2, mine", "lane / 8 + lane % 2, mine"),
    "features in another order": ("turn_rows[8 * chunk + lane / 4]", "turn_rows[8 * chunk + lane % 8]"),
    "features that nobody has": ("row >= 0 && n < a.n", "n < a.n"),
    "tokens of the first tile": ("(int64_t)(blockIdx.x / TURN_TILES) * TURN_WIDTH", "0"),
    "features as they are numbered in X": ("const int feature = turn_chunks[chunk]", "const int feature = 8 * chunk"),
    "X of the first band": ("call->x + n0 * call->ldx", "call->x + 0 * call->ldx"),
    "Y of the first band": ("call->y + n0 * call->ldy", "call->y + 0 * call->ldy"),
    "scales of the first band": (".data + n0 * operands[1].ld", ".data + 0 * operands[1].ld"),
    "scratch memory of the last band": ("n0 += BAND)", "n0 += BAND + 1)"),
}  # fmt: skip


@pytest.fixture(scope="module")
def victim():
    weight = with_gaps((64, 1), (150, 1003), "float16")
    problem = problem_of(weight, "linear", ("residual", "token_scale"), "float16")
    return HopperPlan(problem, SMALL, 2, (Shape(64),), turned=True), weight


def changed(text, old="", new=""):
    text = in_bands(replaced(text, " STAGES<64> = 8;", " STAGES<64> = 4;"))
    return replaced(text, old, new) if old else text


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_found(name, victim, rng, tmp_path):
    plan, weight = victim
    kernel = exact(emulated(plan, weight, tmp_path, lambda text: changed(text, *MUTATIONS[name])))
    with pytest.raises((AssertionError, DeviceError, pytest.fail.Exception)) as found:
        check_device_calls(kernel, plan.problem, weight, rng, (200,), exact=False)
    assert found.type is not DeviceError or said(kernel.artifact)


# ── who has which memory ─────────────────────────────────────────────────────────────────────────────────────────────


class Made(list):
    """A device's memory: the sizes of what was made, by address; 0 where it has been given back."""

    @property
    def memory(self):
        return Memory(0, lambda size: self.append(size) or len(self), lambda at: self.__setitem__(at - 1, 0))


def test_scratch_memory_of_streams_and_graphs():
    made, s = Made(), Scratches(Workspaces())

    def of(stream, capture, needed):
        with s.lent(made.memory, stream, capture, needed) as piece:
            assert piece.bytes >= needed
            return piece.address

    with pytest.raises(CaptureError, match="1,000 bytes of scratch memory are needed, 0 are at hand"):
        of(7, 5, 1000)
    first = of(7, 0, 1000)
    assert made == [LEAST_BYTES] * 2  # the stream's, and one for the next graph
    assert of(7, 0, LEAST_BYTES) == first
    graph = of(7, 6, 1000)
    assert graph == of(7, 6, 5) == 2
    with pytest.raises(CaptureError):
        of(8, 6, 5)  # another branch of that graph may run beside it
    with pytest.raises(CaptureError, match=r"kernel\.upload\(n="):
        of(7, 9, 1000)  # no spare one is left
    larger = of(7, 0, LEAST_BYTES + 1)
    assert larger not in (first, graph)
    assert made == [0, LEAST_BYTES, 2 * LEAST_BYTES, 2 * LEAST_BYTES]  # the graph's is kept
    again = of(7, 6, 2 * LEAST_BYTES)  # the graph takes the spare one for what follows, and keeps the other
    assert made[graph - 1] == LEAST_BYTES
    assert of(8, 0, 3) not in (larger, graph, again)
    s.reserve(made.memory, 5 * LEAST_BYTES)
    assert made[-1] == 8 * LEAST_BYTES
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(of, PER_THREAD, 0, 1).result() != of(PER_THREAD, 0, 1)


def test_pieces_are_not_made_anew_while_one_is_lent():
    made, s = Made(), Scratches(Workspaces())
    with ThreadPoolExecutor(1) as pool, s.lent(made.memory, 0, 0, 1) as piece:
        other = pool.submit(lambda: s.lent(made.memory, 0, 0, 2 * LEAST_BYTES).__enter__())
        assert not other.done()
        assert made[piece.address - 1] == LEAST_BYTES


@pytest.fixture
def place(tmp_path):
    with entered(EMULATION, tmp_path) as found:
        yield found


def launched(kernel, x, n, stream):
    out = driver.Buffer(np.full((n, 96), np.nan, np.float16))
    kernel(driver.Buffer(x), out=out, stream=stream.handle)
    return out


def test_streams_and_graphs(place, rng, tmp_path, monkeypatch):
    """Each graph has scratch memory of its own, and each stream; larger calls in a graph than ever before are refused,
    and what was given back when a larger piece was made, nobody reads."""
    monkeypatch.setattr(scratches, "LEAST_BYTES", 1)
    own = Scratches(Workspaces())
    monkeypatch.setattr("bsrgen.device_memory.scratches", lambda: own)
    weight = with_gaps((32, 1), (96, 190), "float16")
    problem = problem_of(weight, "linear", (), "float16")
    kernel = place.build(HopperPlan(problem, SMALL, 2, (Shape(64),), turned=True), weight, tmp_path)
    one, two = driver.Stream(), driver.Stream()
    xs = {n: problem.sample(rng, n)[0] for n in (9, 70)}
    there, out = driver.Buffer(xs[9].copy()), driver.Buffer(np.full((9, 96), np.nan, np.float16))
    kernel.upload()
    with pytest.raises(CaptureError):
        one.graph(lambda: kernel(there, out=out, stream=one.handle))
    kernel.upload(n=9)
    replay = one.graph(lambda: kernel(there, out=out, stream=one.handle))
    outs = [launched(kernel, xs[n], n, stream) for stream in (one, two) for n in (9, 70, 9)]
    there.store(-xs[9])
    replay()
    one.wait()
    assert_right(problem, weight, out.fetch(), -xs[9])
    for n, found in zip((9, 70, 9) * 2, outs, strict=True):
        assert_right(problem, weight, found.fetch(), xs[n])
    assert len({piece.address for piece in own._of.values()}) == 3
    stale = own._of[0, one.handle, 0, 0]
    with own.lent(kernel._memory(0), one.handle, 0, 2 * stale.bytes):
        pass
    monkeypatch.setattr(own, "lent", lambda *_: nullcontext(stale))
    with pytest.raises(DeviceError):
        launched(kernel, xs[9], 9, one)
    assert said(kernel.artifact).startswith("an address outside of every array")


# ── plans ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_turned():
    weight = with_gaps((8, 3), (61, 200), "float16")
    t, p = turning_of(weight.pattern), weight.pattern
    used = np.unique(np.flatnonzero(np.isin(np.arange(p.K) // p.C, p.indices)))
    np.testing.assert_array_equal(t.features, used)
    at = np.flatnonzero(t.row_of >= 0)
    np.testing.assert_array_equal(t.chunks[at // 8] + at % 8, used)
    np.testing.assert_array_equal(t.row_of[at], np.arange(used.size))
    assert t.rows == used.size
    assert not t.whole
    assert turning_of(make_weight("full", (16, 30), (8, 3), "float32").pattern).whole


@pytest.mark.parametrize(("block", "dtype", "operator", "turned", "read"), [
    ((64, 1), "bfloat16", "linear", True, False), ((64, 4), "float16", "linear", True, False),
    ((64, 8), "bfloat16", "linear", True, True), ((64, 16), "bfloat16", "linear", False, True),
    ((64, 4), "int8", "linear", False, False), ((64, 1), "bfloat16", "spmm", False, True),
])  # fmt: skip
def test_where_it_is_turned(block, dtype, operator, turned, read):
    problem = problem_of(weight_of("uniform", (256, 192), block, dtype), operator)
    plans = [plan for plan in candidates(problem, HOPPER) if isinstance(plan, HopperPlan)]
    assert any(plan.turned for plan in plans) == turned
    assert any(not plan.turned for plan in plans) == read
    for plan in plans:
        assert plan.shapes[-1].most == 0
        assert plan.scratch_n >= 4 * plan.turned


def even(block, density, size=4096):
    blocks = (size // block[0]) * (size // block[1])
    problem = problem_of(weight_of("uniform", (256, 256), (64, 64), "bfloat16"))
    return replace(problem, pattern=EvenPattern((size, size), block, round(density * blocks)))


@pytest.mark.parametrize(("block", "density", "n", "turned"), [
    ((128, 1), 0.2, 2048, True), ((64, 4), 0.3, 8192, True), ((64, 1), 0.05, 512, False), ((128, 1), 0.2, 8, False),
])  # fmt: skip
def test_it_is_turned_where_that_pays(block, density, n, turned):
    (best, plan), *others = tune.rank(list(candidates(even(block, density), HOPPER)), n)
    assert getattr(plan, "turned", False) == turned
    if turned:
        read = min(cost.seconds for cost, other in others if not getattr(other, "turned", False))
        assert best.seconds < 0.9 * read
        assert plan.scratch_n <= 16
        assert plan.turning.rows * plan.band * 2 < HOPPER.l2_bytes / 2
        assert plan.counts(4 * plan.band).cycles > 3.9 * plan.counts(plan.band).cycles
