"""New values without a compiler, and what is on disk afterwards."""

import shutil
import subprocess
import threading
from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse
from support import OPERATOR_NAMES, run_python

import bsrgen
from bsrgen.artifact import write_manifest
from bsrgen.pattern import Pattern, Weight, as_weight, random_weight
from bsrgen.targets import TARGETS, native

FAMILY = tuple(  # the ISA levels that this CPU runs, least first
    row.name
    for row in TARGETS.values()
    if row.family == native().family and row.name != "x86-64-v2" and set(row.requires) <= set(native().requires)
)


def weight_of(seed: int = 0, shape=(37, 44), blocksize=(4, 3), dtype: str = "float32", density: float = 0.4) -> Weight:
    return random_weight(seed, shape, blocksize, density, dtype=dtype)


def with_values(weight: Weight, seed: int) -> Weight:
    """The same pattern, other values, zero in the padding as before."""
    data = np.random.default_rng(seed).standard_normal(weight.data.shape).astype(weight.data.dtype)
    return Weight(weight.pattern, np.where(weight.data == 0, weight.data, data))


def x_for(kernel: bsrgen.Kernel, n: int = 33) -> np.ndarray:
    x = np.random.default_rng(9).standard_normal(kernel.problem.operator.shape(n, kernel.shape[1]))
    return x.astype(kernel.dtype)


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [(-2, bsrgen.OutOfMemoryError, "no memory to pack"), (-1, bsrgen.ArtifactError, "level 0")],
)
def test_a_library_that_cannot_pack_is_a_typed_error(status, error, says, monkeypatch):
    kernel = bsrgen.compile(weight_of())
    before = kernel(x_for(kernel))
    real = kernel._tramp

    def pack(function, data, packed, level):
        return real.pack(function, data, packed, level) if data == real.ffi.NULL else status

    monkeypatch.setattr(kernel, "_tramp", replace(real, pack=pack))
    with pytest.raises(error, match=says):
        kernel.update(with_values(weight_of(), 1))
    assert np.array_equal(kernel(x_for(kernel)), before)


def test_an_unknown_level_cannot_be_packed():
    kernel = bsrgen.compile(weight_of())
    with pytest.raises(bsrgen.ArtifactError, match="level 7"):
        kernel.packed(weight_of().data, 7)


# ── update ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("operator", "dtype", "blocksize", "target"),
    [
        ("linear", "float32", (16, 1), FAMILY[-1]),
        ("spmm", "float32", (5, 4), FAMILY[-1]),
        ("spmm", "float64", (4, 3), FAMILY[len(FAMILY) // 2]),
        ("linear", "float64", (1, 8), FAMILY[0]),
    ],
)
def test_update_gives_the_bits_of_a_fresh_compile(operator, dtype, blocksize, target):
    """Packed by the C in the artifact as by numpy when it was made: each ISA level, panels of X, zero fill."""
    old = weight_of(0, (39, 260), blocksize, dtype)
    new = with_values(old, 1)
    kernel = bsrgen.compile(old, operator, dtype=dtype, target=target)
    fresh = bsrgen.compile(new, operator, dtype=dtype, target=target)
    assert str(kernel.plan) == str(fresh.plan)
    before = {n: kernel(x_for(kernel, n)) for n in (1, 5, 64)}
    kernel.update(new)
    for n in before:
        np.testing.assert_array_equal(kernel(x_for(kernel, n)), fresh(x_for(kernel, n)))
        assert (kernel(x_for(kernel, n)) != before[n]).any()
    kernel.update(old)
    for n, y in before.items():
        np.testing.assert_array_equal(kernel(x_for(kernel, n)), y)


def as_triple(weight: Weight):
    return weight.data, weight.pattern.indices, weight.pattern.indptr


def unsorted(weight: Weight) -> sparse.bsr_array:
    """The same matrix with the blocks of each row backwards."""
    p = weight.pattern
    order = np.concatenate([np.arange(a, b)[::-1] for a, b in zip(p.indptr[:-1], p.indptr[1:], strict=True)])
    return sparse.bsr_array((weight.data[order], p.indices[order], p.indptr), shape=weight.tobsr().shape)


WAYS = {
    "Weight": lambda w: w,
    "bsr_array": lambda w: w.tobsr(),
    "bsr_matrix": lambda w: sparse.bsr_matrix(w.tobsr()),
    "float64": lambda w: w.tobsr().astype(np.float64),
    "triple": as_triple,
    "csr": lambda w: w.tobsr().tocsr(),
    "coo": lambda w: w.tobsr().tocoo(),
    "dense": lambda w: w.todense(),
    "torch dense": lambda w: pytest.importorskip("torch").from_numpy(w.todense().copy()),
    "unsorted bsr": lambda w: unsorted(w),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_update_takes_what_compile_takes(way):
    old = weight_of(0, (36, 45))
    new = with_values(old, 2)
    kernel = bsrgen.compile(old)
    kernel.update(way(new))
    np.testing.assert_array_equal(kernel(x_for(kernel)), bsrgen.compile(new)(x_for(kernel)))


@pytest.mark.parametrize("way", ["dense", "torch dense"])
def test_update_with_a_dense_matrix_that_is_zero_in_a_stored_block(way):
    old = weight_of(0, (36, 45))
    data = old.data.copy()
    data[3] = 0
    kernel = bsrgen.compile(old)
    kernel.update(WAYS[way](Weight(old.pattern, data)))
    x = x_for(kernel)
    np.testing.assert_array_equal(kernel(x), bsrgen.compile(Weight(old.pattern, data))(x))


def test_update_of_a_matrix_that_the_blocks_do_not_divide():
    """Padded BSR with shape=, as compile took it, and its own todense()."""
    padded = random_weight(3, (40, 45), (4, 3), 0.5)
    data = padded.data.copy()
    data[padded.pattern.rows == 9, 1:] = 0
    data[padded.pattern.indices == 14, :, 2:] = 0
    bsr = Weight(padded.pattern, data).tobsr()
    kernel = bsrgen.compile(bsr, shape=(37, 44))
    x = x_for(kernel)
    y = kernel(x)
    for W in (2 * bsr, 2 * kernel_weight(kernel, bsr).todense(), as_triple(Weight(padded.pattern, 2 * data))):
        kernel.update(bsr)
        kernel.update(W)
        np.testing.assert_array_equal(kernel(x), 2 * y)


def kernel_weight(kernel: bsrgen.Kernel, bsr) -> Weight:
    return as_weight(bsr, shape=kernel.shape)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_update_of_the_empty_and_the_full_matrix(density):
    old = weight_of(0, density=density)
    kernel = bsrgen.compile(old)
    kernel.update(with_values(old, 1))
    np.testing.assert_array_equal(kernel(x_for(kernel)), bsrgen.compile(with_values(old, 1))(x_for(kernel)))


def moved(pattern: Pattern) -> tuple[Pattern, tuple[int, int], tuple[int, int]]:
    """The pattern with one block elsewhere in its row; the place it left and the place it took."""
    indices = pattern.indices.copy()
    row = int(np.flatnonzero(pattern.row_counts)[1])
    at = int(pattern.indptr[row + 1]) - 1
    stored = set(indices[pattern.indptr[row] : at + 1].tolist())
    free = max(set(range(pattern.block_cols)) - stored)
    old = int(indices[at])
    kept = sorted(stored - {old} | {free})
    indices[pattern.indptr[row] : at + 1] = kept
    return Pattern(pattern.shape, pattern.blocksize, pattern.indptr, indices), (row, old), (row, free)


def test_another_pattern_is_refused_and_the_place_is_named():
    old = weight_of()
    kernel = bsrgen.compile(old)
    x = x_for(kernel)
    y = kernel(x)
    pattern, left, taken = moved(old.pattern)
    names = [f"block {left} was stored and is absent now", f"block {taken} was absent and is stored now"]
    with pytest.raises(bsrgen.PatternMismatchError) as caught:
        kernel.update(Weight(pattern, np.ones_like(old.data)))
    assert any(name in str(caught.value) for name in names)
    np.testing.assert_array_equal(kernel(x), y)


@pytest.mark.parametrize(
    ("W", "words"),
    [
        (random_weight(1, (38, 44), (4, 3), 0.4), "shape"),
        (random_weight(1, (37, 45), (4, 3), 0.4), "shape"),
        (np.zeros((44, 37), np.float32), "shape"),
        (sparse.csr_array((3, 3)), "shape"),
        (np.ones((37, 44), np.float32), r"block \(\d+, \d+\) was absent and is stored now"),
        (sparse.csr_array((37, 44)), r"block \(\d+, \d+\) was stored and is absent now"),
    ],
)
def test_other_matrices_are_refused(W, words):
    kernel = bsrgen.compile(weight_of())
    y = kernel(x_for(kernel))
    with pytest.raises(bsrgen.PatternMismatchError, match=words):
        kernel.update(W)
    np.testing.assert_array_equal(kernel(x_for(kernel)), y)


def test_other_blocks_are_re_blocked_where_the_pattern_allows_it():
    whole = random_weight(0, (24, 24), (8, 8), 0.5)
    kernel = bsrgen.compile(whole)
    kernel.update(as_weight(2 * whole.tobsr(), blocksize=(4, 4)))
    np.testing.assert_array_equal(kernel(x_for(kernel)), bsrgen.compile(2 * whole.tobsr())(x_for(kernel)))
    with pytest.raises(bsrgen.PatternMismatchError):
        bsrgen.compile(as_weight(whole, blocksize=(4, 4))).update(random_weight(5, (24, 24), (8, 8), 0.3))


@pytest.mark.parametrize("W", [np.ones((36, 44), np.float32), np.ones((37, 44), np.float32)])
def test_the_empty_kernel_refuses_values(W):
    kernel = bsrgen.compile(weight_of(density=0.0))
    with pytest.raises(bsrgen.PatternMismatchError):
        kernel.update(W)
    assert not kernel(x_for(kernel)).any()


@pytest.mark.parametrize("W", [None, 3, "W", np.zeros(3), np.zeros((37, 44), complex), [[1, 2], [3]]])
def test_what_is_no_matrix_is_refused(W):
    with pytest.raises(bsrgen.BsrgenError):
        bsrgen.compile(weight_of()).update(W)


def test_update_needs_no_compiler(monkeypatch):
    kernel = bsrgen.compile(weight_of())
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("BSRGEN_CC", "/nonexistent/cc")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    kernel.update(with_values(weight_of(), 4))


def test_update_takes_a_copy():
    W = weight_of(0, (36, 45)).tobsr()
    kernel = bsrgen.compile(W)
    kernel.update(W)
    y = kernel(x_for(kernel))
    W.data[:] = np.nan
    np.testing.assert_array_equal(kernel(x_for(kernel)), y)


def test_update_while_other_threads_call():
    """Every result is that of one set of values, never a mixture, and the memory of old values lives long enough."""
    weights = [with_values(weight_of(0, (64, 96), (8, 4)), seed) for seed in range(4)]
    kernel = bsrgen.compile(weights[0])
    x = x_for(kernel, 40)
    allowed = {bsrgen.compile(w)(x).tobytes() for w in weights}
    assert len(allowed) == 4
    stop, wrong, seen = threading.Event(), [], set()

    def call() -> None:
        while not stop.is_set():
            y = kernel(x).tobytes()
            seen.add(y)
            if y not in allowed:
                wrong.append(y)
                return

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(2000):
        kernel.update(weights[i % 4])
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(seen) > 1


# ── save and load ────────────────────────────────────────────────────────────────────────────────────────────────────

LOAD = """
import sys, numpy as np, bsrgen
from bsrgen.loading import load
k = load(sys.argv[1])
np.save(sys.argv[3], k(np.load(sys.argv[2])))
assert "jinja2" not in sys.modules, "load needs no templates"
"""


def loaded_elsewhere(folder, x, tmp_path):
    """What a new process computes with the artifact, without a compiler and without a store."""
    np.save(tmp_path / "x.npy", x)
    run_python(
        LOAD, str(folder), str(tmp_path / "x.npy"), str(tmp_path / "y.npy"),
        BSRGEN_DISABLE_JIT="1", BSRGEN_CACHE_DIR=str(tmp_path / "no-store"), PATH="/nonexistent",
    )  # fmt: skip
    return np.load(tmp_path / "y.npy")


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_saved_values_are_loaded_in_a_new_process(operator, tmp_path):
    old = weight_of()
    kernel = bsrgen.compile(old, operator)
    x = x_for(kernel)
    np.testing.assert_array_equal(loaded_elsewhere(kernel.save(tmp_path / "old"), x, tmp_path), kernel(x))
    kernel.update(with_values(old, 7))
    np.testing.assert_array_equal(loaded_elsewhere(kernel.save(tmp_path / "new"), x, tmp_path), kernel(x))


@pytest.mark.parametrize(("value", "blocksize"), [(0.0, (4, 4)), (0.5, (16, 1))])
def test_saved_values_lie_where_the_kernel_reads_them(value, blocksize, tmp_path):
    """Values that are found elsewhere in the library too: zeros, constants, prefixes of another level's packing."""
    old = weight_of(0, (24, 24), blocksize, density=0.5)
    constant = Weight(old.pattern, np.full_like(old.data, value))
    kernel = bsrgen.compile(constant, target=FAMILY)
    kernel.update(old)
    x = x_for(kernel)
    folder = kernel.save(tmp_path / "k")
    np.testing.assert_array_equal(bsrgen.load(folder)(x), kernel(x))
    m = kernel.artifact.manifest
    library = (folder / m.library).read_bytes()
    before = kernel.artifact.library.read_bytes()
    for level in m.levels:
        at = slice(level.values.offset, level.values.offset + level.values.bytes)
        assert library[at] == (folder / level.values.file).read_bytes()
    changed = np.flatnonzero(np.frombuffer(library, np.uint8) != np.frombuffer(before, np.uint8))
    inside = np.zeros(len(library), bool)
    for level in m.levels:
        inside[level.values.offset : level.values.offset + level.values.bytes] = True
    assert inside[changed].all()


def test_save_updated_values_twice_and_again(tmp_path):
    kernel = bsrgen.compile(weight_of())
    x = x_for(kernel)
    for seed in (1, 2, 3):
        kernel.update(with_values(weight_of(), seed))
        folder = kernel.save(tmp_path / "k")
        np.testing.assert_array_equal(bsrgen.load(folder)(x), kernel(x))
        again = bsrgen.load(folder).save(tmp_path / "copy")
        np.testing.assert_array_equal(bsrgen.load(again)(x), kernel(x))


def test_save_replaces_an_artifact(tmp_path):
    """Another kernel under the same name: nothing of the old one stays; kernels loaded from it go on."""
    first, second = bsrgen.compile(weight_of()), bsrgen.compile(weight_of(5, (21, 44), (3, 2)), "spmm")
    folder = first.save(tmp_path / "k")
    loaded = bsrgen.load(folder)
    y = loaded(x_for(first))
    (folder / "note.txt").write_text("mine")
    with pytest.raises(bsrgen.ArgumentError, match=r"note\.txt"):
        second.save(folder)
    assert (folder / "note.txt").read_text() == "mine"
    (folder / "note.txt").unlink()
    assert second.save(folder) == folder
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [*second.artifact.manifest.files, "manifest.json", "manifest.sha256"]
    )
    np.testing.assert_array_equal(bsrgen.load(folder)(x_for(second)), second(x_for(second)))
    np.testing.assert_array_equal(loaded(x_for(first)), y)
    assert [p.name for p in tmp_path.iterdir()] == ["k"]


def test_save_into_an_empty_or_a_new_folder(tmp_path):
    kernel = bsrgen.compile(weight_of())
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new", "a/b/c"):
        assert bsrgen.load(kernel.save(tmp_path / name)).name == kernel.name
    assert bsrgen.load(kernel.save(str(tmp_path / "text"))).name == kernel.name


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_save_refuses_what_is_no_artifact(kind, tmp_path):
    target = tmp_path / "precious"
    if kind == "folder":
        target.mkdir()
    (target / "thesis.tex" if kind == "folder" else target).write_text("42")
    with pytest.raises(bsrgen.ArgumentError, match="is not a"):
        bsrgen.compile(weight_of()).save(target)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["thesis.tex" if kind == "folder" else "precious"]


def test_save_below_a_file(tmp_path):
    kernel = bsrgen.compile(weight_of())
    (tmp_path / "file").write_text("")
    with pytest.raises(bsrgen.BsrgenError):
        kernel.save(tmp_path / "file" / "k")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_two_kernels_of_one_folder_have_their_own_values(tmp_path):
    kernel = bsrgen.compile(weight_of())
    folder = kernel.save(tmp_path / "k")
    a, b = bsrgen.load(folder), bsrgen.load(folder)
    x = x_for(kernel)
    y = kernel(x)
    a.update(with_values(weight_of(), 3))
    np.testing.assert_array_equal(b(x), y)
    np.testing.assert_array_equal(kernel(x), y)
    np.testing.assert_array_equal(bsrgen.load(folder)(x), y)
    b.update(with_values(weight_of(), 4))
    np.testing.assert_array_equal(a(x), bsrgen.compile(with_values(weight_of(), 3))(x))
    np.testing.assert_array_equal(bsrgen.compile(weight_of())(x), y)


def test_a_folder_that_was_replaced_loads_the_new_library(tmp_path):
    """The dynamic linker remembers libraries by their path."""
    kernel = bsrgen.compile(weight_of())
    x, folder = x_for(kernel), tmp_path / "k"
    kernels, results = [], []
    for seed in (1, 2, 3, 2, 1):
        kernel.update(with_values(weight_of(), seed))
        kernels.append(bsrgen.load(kernel.save(folder)))
        results.append(kernel(x))
    for loaded, y in zip(kernels, results, strict=True):
        np.testing.assert_array_equal(loaded(x), y)


def test_save_of_a_kernel_whose_folder_was_replaced_or_removed(tmp_path):
    """Its own values or a typed error, never somebody else's."""
    kernel = bsrgen.compile(weight_of())
    folder = kernel.save(tmp_path / "k")
    mine, theirs = bsrgen.load(folder), bsrgen.load(folder)
    theirs.update(with_values(weight_of(), 3))
    theirs.save(folder)
    x = x_for(kernel)
    try:
        copy = bsrgen.load(mine.save(tmp_path / "copy"))
    except bsrgen.BsrgenError:
        pass
    else:
        np.testing.assert_array_equal(copy(x), mine(x))
    shutil.rmtree(folder)
    np.testing.assert_array_equal(mine(x), kernel(x))
    with pytest.raises(bsrgen.BsrgenError):
        mine.save(tmp_path / "another")
    with pytest.raises(bsrgen.BsrgenError):
        mine.source  # noqa: B018
    assert not (tmp_path / "another").exists()


def test_load_from_the_current_folder(tmp_path, monkeypatch):
    kernel = bsrgen.compile(weight_of())
    monkeypatch.chdir(kernel.save(tmp_path / "k"))
    loaded = bsrgen.load(".")
    np.testing.assert_array_equal(loaded(x_for(kernel)), kernel(x_for(kernel)))
    monkeypatch.chdir("/")
    assert bsrgen.load(loaded.save(tmp_path / "copy")).source == kernel.source


def test_load_what_is_not_there(tmp_path):
    for path in (tmp_path, tmp_path / "nothing", __file__):
        with pytest.raises(bsrgen.ArtifactError):
            bsrgen.load(path)


def test_load_takes_threads_and_the_digest_of_the_manifest(tmp_path):
    folder = bsrgen.compile(weight_of()).save(tmp_path / "k")
    digest = (folder / "manifest.sha256").read_text().split()[0]
    assert "3 threads" in repr(bsrgen.load(folder, threads=3, expect_sha256=digest.upper()))
    with pytest.raises(bsrgen.ArtifactCorruptError, match="expected 00"):
        bsrgen.load(folder, expect_sha256="00" * 32)
    with pytest.raises(bsrgen.ArgumentError):
        bsrgen.load(folder, threads=0)


def test_everything_can_be_looked_at_after_load(tmp_path):
    kernel = bsrgen.compile(weight_of(), "spmm", dtype="float64", epilogue=("bias", "relu"))
    loaded = bsrgen.load(kernel.save(tmp_path / "k"))
    for name in ("name", "shape", "dtype", "nnz", "plan", "cost", "verdict", "source"):
        assert getattr(loaded, name) == getattr(kernel, name), name
    assert loaded.pattern.digest == kernel.pattern.digest
    assert str(loaded.problem) == str(kernel.problem)
    assert loaded.problem.epilogue == kernel.problem.epilogue
    changed = str(loaded).replace(str(loaded.artifact), "")
    assert changed == str(kernel).replace(str(kernel.artifact), "")


def test_the_manifest_after_an_update_says_whose_values_these_are(tmp_path):
    old, new = weight_of(), with_values(weight_of(), 5)
    kernel = bsrgen.compile(old)
    kernel.update(new)
    manifest = bsrgen.load(kernel.save(tmp_path / "k")).artifact.manifest
    assert manifest.weight == new.digest
    assert manifest.pattern == old.pattern.digest
    assert manifest.check is None


def test_a_saved_artifact_outlives_its_maker(tmp_path):
    """Compile, update and save in one process; load, update and call in another."""
    script = """
import sys, numpy as np, bsrgen
from bsrgen.pattern import random_weight, Weight
w = random_weight(0, (20, 18), (4, 3), .5)
k = bsrgen.compile(w, target="native"); k.update(Weight(w.pattern, 2 * w.data)); k.save(sys.argv[1])
"""
    run_python(script, str(tmp_path / "k"))
    loaded = bsrgen.load(tmp_path / "k")
    w = random_weight(0, (20, 18), (4, 3), 0.5)
    x = x_for(loaded)
    np.testing.assert_array_equal(loaded(x), bsrgen.compile(Weight(w.pattern, 2 * w.data))(x))
    loaded.update(w)
    np.testing.assert_array_equal(loaded(x), bsrgen.compile(w)(x))


# ── operands that are bound ──────────────────────────────────────────────────────────────────────────────────────────


def test_bound_operands_are_read_once_and_take_the_fast_path(rng):
    weight, bias = weight_of(), rng.standard_normal(37).astype(np.float32)
    kernel = bsrgen.compile(weight, epilogue=("bias", "clamp"), bias=bias, hi=0.5)
    x = x_for(kernel)
    y = kernel(x)
    assert kernel._plain
    np.testing.assert_array_equal(y, kernel(x, threads=1))
    np.testing.assert_array_equal(y, bsrgen.compile(weight, epilogue=("bias", "clamp"))(x, bias=bias, hi=0.5))
    assert (kernel(x, hi=0.25) <= 0.25).all()
    np.testing.assert_array_equal(kernel(x), y)
    kernel.update(with_values(weight, 1))
    fresh = bsrgen.compile(with_values(weight, 1), epilogue=("bias", "clamp"), bias=bias, hi=0.5)
    np.testing.assert_array_equal(kernel(x), fresh(x))


@pytest.mark.parametrize(
    "wrong",
    [{"bias": np.ones(36, np.float32)}, {"bias": np.ones(37)}, {"bias": np.ones(37, np.float32), "scale": np.ones(37)}],
)
def test_bound_operands_that_are_not_the_kernels(wrong, tmp_path):
    """A folder that is consistent in itself: refused when it is loaded, not when C reads them."""
    kernel = bsrgen.compile(weight_of(), epilogue="bias", bias=np.ones(37))
    folder = kernel.save(tmp_path / "k")
    np.savez(folder / "operands.npz", **wrong)
    write_manifest(folder, kernel.artifact.manifest)
    with pytest.raises(bsrgen.ArtifactCorruptError, match=r"operands\.npz is not of this kernel"):
        bsrgen.load(folder)
