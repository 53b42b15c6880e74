"""compile(...) as a caller sees it: arguments and their errors, the store behind it, its key, its check, its tuning."""

import contextlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from support import assert_right, problem_of, run_python

import bsrgen
from bsrgen import api, build, machine
from bsrgen.backends import BACKENDS
from bsrgen.dtypes import DTYPES
from bsrgen.epilogues import as_epilogues
from bsrgen.operators import OPERATORS
from bsrgen.pattern import Pattern, Weight, as_weight, random_weight
from bsrgen.problem import Problem, as_problem
from bsrgen.store import Store
from bsrgen.targets import TARGETS, native

W = random_weight(11, (36, 30), (4, 3), 0.5)
X = np.random.default_rng(0).standard_normal((7, 30)).astype(np.float32)


@pytest.fixture
def builds(monkeypatch):
    """The names of the kernels that were built while the test ran."""
    names, real = [], build.build

    def counted(source, *rest):
        names.append(source.name)
        return real(source, *rest)

    monkeypatch.setattr(build, "build", counted)
    return names


@pytest.fixture
def no_build(monkeypatch):
    monkeypatch.setattr(build, "build", lambda source, *_: pytest.fail(f"{source.name} was built"))


@pytest.fixture
def own_store(tmp_path, monkeypatch):
    """A store of the test's own."""
    monkeypatch.setenv("BSRGEN_CACHE_DIR", str(tmp_path / "store"))
    return Store.default()


# ── what compile takes ───────────────────────────────────────────────────────────────────────────────────────────────

WAYS = {
    "Weight": (W, {}),
    "bsr_array": (W.tobsr(), {}),
    "bsr_matrix": (sparse.bsr_matrix(W.tobsr()), {}),
    "csr": (W.tobsr().tocsr(), {"blocksize": (4, 3)}),
    "csc": (W.tobsr().tocsc(), {"blocksize": (4, 3)}),
    "coo": (W.tobsr().tocoo(), {"blocksize": (4, 3)}),
    "dense": (W.todense(), {"blocksize": (4, 3)}),
    "float64": (W.todense().astype(np.float64), {"blocksize": (4, 3)}),
    "Fortran order": (np.asfortranarray(W.todense()), {"blocksize": (4, 3)}),
    "list of lists": (W.todense().tolist(), {"blocksize": (4, 3)}),
    "triple": ((W.data, W.pattern.indices, W.pattern.indptr), {"shape": (36, 30)}),
}


@pytest.mark.parametrize(("weight", "more"), WAYS.values(), ids=WAYS)
def test_every_kind_of_weight_is_the_same_request(weight, more, builds):
    bsrgen.compile(W)
    builds.clear()
    kernel = bsrgen.compile(weight, **more)
    assert not builds
    assert_right(problem_of(W), W, kernel(X), X)


def test_torch_weights():
    torch = pytest.importorskip("torch")
    dense = torch.from_numpy(W.todense().copy())
    for weight, more in (
        (dense.to_sparse_bsr((4, 3)), {}),
        (dense.to_sparse_csr(), {"blocksize": (4, 3)}),
        (dense, {"blocksize": (4, 3)}),
    ):
        np.testing.assert_array_equal(bsrgen.compile(weight, **more)(X), bsrgen.compile(W)(X))


def test_bsr_is_re_blocked_by_blocksize():
    kernel = bsrgen.compile(W, blocksize=(2, 5))
    assert kernel.pattern.blocksize == (2, 5)
    assert_right(kernel.problem, as_weight(W, blocksize=(2, 5)), kernel(X), X)


def test_equal_requests_in_other_words_are_built_once(builds):
    weight = random_weight(12, (36, 30), (4, 3), 0.5)
    first = bsrgen.compile(weight, "linear", epilogue="relu")
    assert len(builds) == 1
    others = [
        bsrgen.compile(weight, epilogue=("relu",)),
        bsrgen.compile(weight, epilogue=["relu"], dtype=np.float32, out_dtype="float32"),
        bsrgen.compile(weight, operator="linear", epilogue=("relu",), backend="c", mode="static", tune="model"),
        bsrgen.compile(weight, epilogue=("relu",), target="native", threads=3),
        bsrgen.compile(weight, epilogue=("relu",), target=("native", "native")),
        bsrgen.compile(weight, epilogue=("relu",), dtype=np.dtype("f4"), backend="auto", strict=False, n=None),
        bsrgen.compile(weight.tobsr(), epilogue=("relu",)),
    ]
    assert len(builds) == 1
    for kernel in others:
        assert kernel.artifact.folder == first.artifact.folder
        np.testing.assert_array_equal(kernel(X), first(X))


def test_other_requests_are_built(monkeypatch):
    weight = random_weight(13, (36, 30), (4, 3), 0.5)
    values = Weight(weight.pattern, 2 * weight.data)
    bsrgen.compile(weight)
    bsrgen.compile(weight, epilogue="bias", bias=np.ones(36))

    def refuse(source, *_):
        raise bsrgen.BuildError(f"asked to build {source.name}")

    monkeypatch.setattr(build, "build", refuse)
    bsrgen.compile(weight)
    bsrgen.compile(weight, epilogue="bias", bias=np.ones(36, np.float32))
    for other, more in [
        (values, {}), (weight, {"operator": "spmm"}), (weight, {"epilogue": "relu"}), (weight, {"n": 1}),
        (weight, {"dtype": "float64"}), (weight, {"tune": "off"}), (weight, {"blocksize": (2, 3)}),
        (weight, {"strict": True}),
        (weight, {"epilogue": "bias"}), (weight, {"epilogue": "bias", "bias": np.zeros(36)}),
    ]:  # fmt: skip
        with pytest.raises(bsrgen.BuildError, match="asked to build"):
            bsrgen.compile(other, **more)


def test_dtype_none_is_not_float64_without_a_word():
    """numpy takes None for float64; here it is refused, or W's own dtype."""
    with contextlib.suppress(bsrgen.BsrgenError):
        assert bsrgen.compile(W, dtype=None).dtype == np.float32


def test_hints_and_defaults():
    assert f" {machine.parallel_cores()} threads" in repr(bsrgen.compile(W))
    assert " 3 threads" in repr(bsrgen.compile(W, threads=np.int64(3)))
    assert bsrgen.compile(W, n=np.int32(5)).cost.n == 5
    assert bsrgen.compile(W).cost.n == 128
    assert bsrgen.compile(W, strict=True).artifact.manifest.strict
    assert not bsrgen.compile(W).artifact.manifest.strict


ARGUMENTS = {
    "operator": ["nonsense", "", None, 5, ["linear"], b"linear"],
    "blocksize": [(0, 1), (-1, 4), (4,), (4, 4, 4), "44", 4, (1.5, 2), (2**40, 1)],
    "dtype": ["int16", "uint8", "nonsense", complex, [("a", "f4")], 7, "U3"],
    "x_dtype": ["float64", "bfloat16", "int8", "int32", "nonsense"],
    "out_dtype": ["float64", "float16", "int8", "nonsense"],
    "w_scale": [np.ones(36)],
    "epilogue": ["nonsense", "", ("bias", "nonsense"), ("bias", None), 5, [["bias"]], b"bias", None],
    "mode": ["pit", "nonsense", None, 3, ["static"]],
    "backend": ["rocm", "nonsense", None, 3, ["c"]],
    "target": ["nonsense", "", (), 5, None, ("native", 5), ("x86-64", "aarch64"), "power9le", [["native"]]],
    "n": [0, -1, 1.5, True, "3", [1]],
    "threads": [0, -1, 1.5, True, "3", 2**40, [1]],
    "tune": ["fast", None, True, [], 3],
    "shape": [(36, 31), (35, 30), (36,), "x", (-1, 30), 36],
    "bias": [np.zeros(36)],
}


@pytest.mark.usefixtures("no_build")
@pytest.mark.parametrize(
    ("name", "value"), [pytest.param(k, v, id=f"{k}={v!r:.24}") for k, vs in ARGUMENTS.items() for v in vs]
)
def test_wrong_arguments_get_a_typed_error_before_anything_is_built(name, value):
    weight = random_weight(14, (36, 30), (4, 3), 0.5)
    with pytest.raises(bsrgen.BsrgenError) as caught:
        bsrgen.compile(weight.todense() if name == "shape" else weight, **{"blocksize": (4, 3), name: value})
    assert isinstance(caught.value, (ValueError, TypeError))
    assert len(str(caught.value)) > 10


INT8_ARGUMENTS = {
    "zero w_scale": {"w_scale": np.zeros(36)}, "negative w_scale": {"w_scale": -np.ones(36)},
    "NaN in w_scale": {"w_scale": np.full(36, np.nan)}, "short w_scale": {"w_scale": np.ones(35)},
    "one w_scale": {"w_scale": 0.5}, "text": {"w_scale": ["a"] * 36}, "huge w_scale": {"w_scale": np.full(36, 1e60)},
    "x_scale per token": {"x_scale": np.ones(7)}, "zero x_scale": {"x_scale": 0.0}, "y_scale": {"y_scale": 1.0},
    "x_scale of float X": {"x_dtype": "float32", "x_scale": 1.0}, "x": {"x_dtype": "float16"},
    "zero y_scale": {"out_dtype": "int8", "y_scale": 0}, "infinite y_scale": {"out_dtype": "int8", "y_scale": np.inf},
    "accumulate": {"out_dtype": "int8", "epilogue": "accumulate"}, "out": {"out_dtype": "float16"},
    "a step of its own": {"epilogue": "w_scale"},
}  # fmt: skip


@pytest.mark.usefixtures("no_build")
@pytest.mark.parametrize("more", INT8_ARGUMENTS.values(), ids=INT8_ARGUMENTS)
def test_wrong_arguments_of_int8_too(more):
    with pytest.raises(bsrgen.BsrgenError) as caught:
        bsrgen.compile(W, dtype="int8", **more)
    assert isinstance(caught.value, (ValueError, TypeError))


@pytest.mark.usefixtures("no_build")
@pytest.mark.parametrize(
    ("weight", "dtype"),
    [
        (np.full((4, 3), np.nan), "int8"), (np.full((4, 3), -128, np.int8), "int8"), (np.full((4, 3), 200), "int8"),
        (np.full((4, 3), 1e50), "int8"), (np.full((4, 3), 7e4), "float16"), (np.full((4, 3), 1e39), "bfloat16"),
    ],
)  # fmt: skip
def test_weights_that_a_type_cannot_hold(weight, dtype):
    with pytest.raises(bsrgen.PatternError):
        bsrgen.compile(weight, blocksize=(4, 3), dtype=dtype)


@pytest.mark.usefixtures("no_build")
@pytest.mark.parametrize(
    "weight",
    [None, 3, "W", b"W", np.zeros(3), np.zeros((2, 2, 2)), np.zeros((4, 3), complex), [[1, 2], [3]], {}, object],
)
def test_wrong_weights_get_a_typed_error(weight):
    with pytest.raises(bsrgen.BsrgenError) as caught:
        bsrgen.compile(weight, blocksize=(4, 3))
    assert isinstance(caught.value, (ValueError, TypeError))


@pytest.mark.usefixtures("no_build")
def test_a_dense_weight_needs_a_blocksize():
    for weight in (W.todense(), W.tobsr().tocsr()):
        with pytest.raises(bsrgen.ArgumentError, match="blocksize="):
            bsrgen.compile(weight)


def test_a_broken_pattern_is_refused_and_a_messy_one_is_noted():
    p = W.pattern
    with pytest.raises(bsrgen.PatternError):
        bsrgen.compile((W.data, p.indices + 7, p.indptr), shape=(36, 30))
    order = np.concatenate([np.arange(a, b)[::-1] for a, b in zip(p.indptr[:-1], p.indptr[1:], strict=True)])
    kernel = bsrgen.compile((W.data[order], p.indices[order], p.indptr), shape=(36, 30))
    assert any("sorted" in note for note in kernel.artifact.manifest.notes)
    np.testing.assert_array_equal(kernel(X), bsrgen.compile(W)(X))


def test_errors_have_the_bases_that_callers_catch():
    e = bsrgen
    assert issubclass(e.BuildError, RuntimeError)
    for kind in (e.ArgumentError, e.PatternError, e.UnsupportedError):
        assert issubclass(kind, ValueError)
    assert issubclass(e.ArgumentTypeError, TypeError)
    assert issubclass(e.PatternMismatchError, e.PatternError)
    assert issubclass(e.StoreError, OSError)
    assert issubclass(e.OutOfMemoryError, MemoryError)
    assert issubclass(e.CompilerNotFoundError, e.BuildError)
    assert issubclass(e.IncompatibleCPUError, e.ArtifactError)
    assert issubclass(e.ArtifactCorruptError, e.ArtifactError)
    assert all(issubclass(getattr(e, name), e.BsrgenError) for name in e.__all__ if name.endswith("Error"))


# ── the store ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_compile_twice_builds_once(builds, own_store):
    weight = random_weight(15, (36, 30), (4, 3), 0.5)
    first = bsrgen.compile(weight)
    second = bsrgen.compile(weight)
    assert builds == [first.name]
    assert first.artifact.folder == second.artifact.folder
    assert own_store.root in first.artifact.folder.parents
    own_store.clear()
    bsrgen.compile(weight)
    assert len(builds) == 2


def test_a_kernel_outlives_its_entry_in_the_store(own_store, tmp_path, monkeypatch):
    """R10: what is loaded works on; what needs the files says that they are gone."""
    kernel = bsrgen.compile(W)
    y = kernel(X)
    own_store.clear()
    np.testing.assert_array_equal(kernel(X), y)
    kernel.update(Weight(W.pattern, 2 * W.data))
    np.testing.assert_array_equal(kernel(X), 2 * y)
    assert kernel.name in repr(kernel)
    for what in (lambda: kernel.save(tmp_path / "k"), lambda: kernel.source):
        with pytest.raises(bsrgen.BsrgenError):
            what()
    assert not (tmp_path / "k").exists()


def test_disabled_jit_still_finds_what_the_store_has(monkeypatch):
    bsrgen.compile(W)
    monkeypatch.setenv("BSRGEN_DISABLE_JIT", "1")
    np.testing.assert_array_equal(bsrgen.compile(W)(X).shape, (7, 36))
    with pytest.raises(bsrgen.BuildError, match="BSRGEN_DISABLE_JIT=1"):
        bsrgen.compile(random_weight(99, (36, 30), (4, 3), 0.5))
    for tune in ("off", "model", "measure"):
        with pytest.raises(bsrgen.BuildError, match="BSRGEN_DISABLE_JIT=1"):
            bsrgen.compile(random_weight(99, (36, 30), (4, 3), 0.5), tune=tune)


def test_a_store_that_cannot_be_made_is_a_typed_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BSRGEN_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(bsrgen.StoreError):
        bsrgen.compile(W)


# ── the key ──────────────────────────────────────────────────────────────────────────────────────────────────────────

COMPILER = build.Compiler("/usr/bin/cc", "cc 1.2.3", "x86_64-linux-gnu")
PROBLEM = Problem(OPERATORS["linear"], W.pattern, DTYPES["float32"], as_epilogues(("bias",)), 64)
REQUEST = {
    "backend": BACKENDS["c"],
    "problem": PROBLEM,
    "weight": W,
    "targets": (TARGETS["x86-64-v3"], TARGETS["x86-64"]),
    "tune": "model",
    "strict": False,
    "compiler": COMPILER,
    "bound": api.Bound({"bias": np.ones(36, np.float32)}, "none", (36,)),
}


def key_of(**changed) -> str:
    return api._key(**(REQUEST | changed))


def moved_block() -> Weight:
    """W with one block of its last row in another column."""
    indices, p = W.pattern.indices.copy(), W.pattern
    row = indices[p.indptr[-2] :]
    row[0] = min(set(range(p.block_cols)) - set(row.tolist()))
    row.sort()
    return Weight(Pattern(p.shape, p.blocksize, p.indptr, indices), W.data)


def one_value() -> Weight:
    data = W.data.copy()
    data[-1, 0, 0] = np.nextafter(data[-1, 0, 0], np.float32(9))
    return Weight(W.pattern, data)


MUTATIONS = {
    "backend": {"backend": replace(BACKENDS["c"], name="other")},
    "tools of the backend": {"backend": replace(BACKENDS["c"], tools=lambda targets: "other 1.0")},
    "operator": {"problem": replace(PROBLEM, operator=OPERATORS["spmm"])},
    "dtype": {"problem": as_problem("linear", W.pattern, "float64", None, None, "bias", 64)},
    "dtype of W alone": {"problem": replace(PROBLEM, dtype=DTYPES["bfloat16"])},
    "dtype of W and Y": {"problem": replace(PROBLEM, dtype=DTYPES["bfloat16"], out_dtype=DTYPES["bfloat16"])},
    "source of the scales": {"bound": api.Bound(REQUEST["bound"].arrays, "given", (36,))},
    "epilogue": {"problem": replace(PROBLEM, epilogue=as_epilogues(("bias", "relu")))},
    "order of the epilogue": {"problem": replace(PROBLEM, epilogue=as_epilogues(("relu", "bias")))},
    "n": {"problem": replace(PROBLEM, n=65)},
    "no n": {"problem": replace(PROBLEM, n=None)},
    "one value": {"weight": one_value()},
    "dtype of the values": {"weight": as_weight(W, dtype=np.float64)},
    "pattern": {"weight": moved_block()},
    "shape": {"weight": as_weight(W.todense()[:35], blocksize=(4, 3))},
    "blocksize": {"weight": as_weight(W, blocksize=(2, 3))},
    "notes": {"weight": Weight(W.pattern, W.data, ("sorted the column indices of 1 block row",))},
    "target": {"targets": (TARGETS["x86-64-v4"], TARGETS["x86-64"])},
    "fewer targets": {"targets": (TARGETS["x86-64-v3"],)},
    "flags of a target": {"targets": (replace(TARGETS["x86-64-v3"], flags=("-mavx2",)), TARGETS["x86-64"])},
    "features of a target": {"targets": (replace(TARGETS["x86-64-v3"], requires=()), TARGETS["x86-64"])},
    "caches of a target": {"targets": (replace(TARGETS["x86-64-v3"], l2_bytes=2 << 20), TARGETS["x86-64"])},
    "tune": {"tune": "off"},
    "strict": {"strict": True},
    "version of the compiler": {"compiler": replace(COMPILER, version="cc 1.2.4")},
    "machine of the compiler": {"compiler": replace(COMPILER, machine="x86_64-linux-musl")},
    "bound values": {"bound": api.Bound({"bias": np.zeros(36, np.float32)}, "none", (36,))},
    "bound names": {"bound": api.Bound({"bias2": np.ones(36, np.float32)}, "none", (36,))},
    "nothing bound": {"bound": api.Bound({}, "none", (36,))},
}


@pytest.mark.parametrize("change", MUTATIONS.values(), ids=MUTATIONS)
def test_the_key_changes_with(change):
    assert key_of(**change) != key_of()
    assert re.fullmatch("[0-9a-f]{64}", key_of(**change))


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (api, "__version__", "0.0.0"),
        (api, "ABI", 999),
        (api, "_own_digest", lambda: "other"),
        (build, "COMPILE_FLAGS", (*build.COMPILE_FLAGS, "-O2")),
        (build, "LINK_FLAGS", build.LINK_FLAGS[1:]),
    ],
)
def test_the_key_changes_with_the_generator(where, name, value, monkeypatch):
    before = key_of()
    monkeypatch.setattr(where, name, value)
    assert key_of() != before


def test_the_key_does_not_change_with_what_cannot_matter(tmp_path):
    assert key_of(compiler=replace(COMPILER, path="/opt/bin/cc")) == key_of()
    assert key_of(weight=Weight(W.pattern, W.data.copy())) == key_of()
    assert key_of(bound=api.Bound({"bias": np.ones(72, np.float32)[::2]}, "none", (36,))) == key_of()
    assert len({key_of(**change) for change in MUTATIONS.values()}) == len(MUTATIONS)


@pytest.mark.parametrize("root", ["TEMPLATES", "RUNTIME"])
def test_the_digest_of_the_generator_covers_its_texts(root, tmp_path, monkeypatch):
    before = api._own_digest.__wrapped__()
    copy = tmp_path / "copy"
    shutil.copytree(getattr(api, root), copy)
    monkeypatch.setattr(api, root, copy)
    assert api._own_digest.__wrapped__() == before
    for path in sorted(p for p in copy.rglob("*") if p.suffix in (".j2", ".h")):
        text = path.read_bytes()
        path.write_bytes(text + b" ")
        assert api._own_digest.__wrapped__() != before, path
        path.write_bytes(text)
    assert api._own_digest.__wrapped__() == before


SAME = """
import hashlib, json, sys
import numpy as np
from bsrgen import api, build
from bsrgen.backends import BACKENDS
from bsrgen.choose import as_tuning, choose
from bsrgen.dtypes import DTYPES
from bsrgen.epilogues import as_epilogues
from bsrgen.operators import OPERATORS
from bsrgen.pattern import random_weight
from bsrgen.problem import Problem
from bsrgen.targets import as_targets
w = random_weight(11, (36, 30), (4, 3), 0.5)
problem = Problem(OPERATORS["linear"], w.pattern, DTYPES["float32"], as_epilogues(("bias", "gelu", "clamp")), 64)
targets = as_targets(("x86-64", "x86-64-v3", "x86-64-v4"))
compiler = build.Compiler("cc", "1", "x86_64")
bound = api.Bound({"hi": np.float64(1), "lo": np.float64(0)}, "none", (36,))
key = api._key(BACKENDS["c"], problem, w, targets, "model", False, compiler, bound)
plans = [[str(p) for p in BACKENDS["c"].candidates(problem, t)] for t in targets]
chosen = tuple(choose(BACKENDS["c"], problem, w, t, as_tuning("model"), compiler, None, None).plan for t in targets)
files = {name: hashlib.sha256(data).hexdigest() for name, data in BACKENDS["c"].emit(chosen, w).files.items()}
print(json.dumps([key, plans, files]))
"""


def test_key_plans_and_sources_do_not_depend_on_the_hash_seed():
    runs = {run_python(SAME, PYTHONHASHSEED=str(seed)) for seed in range(6)}
    assert len(runs) == 1
    assert len(json.loads(runs.pop())[2]) > 5


# ── broken compilers ─────────────────────────────────────────────────────────────────────────────────────────────────

ASKED = f"""case "$1" in --version) echo fake 1.0; exit;; -dumpmachine) echo {native().family}-linux-gnu; exit;; esac
for last; do :; done
"""
BROKEN = {
    "writes nothing": (ASKED + "exit 0", bsrgen.BuildError),
    "writes text": (ASKED + 'echo garbage > "$last"; exit 0', bsrgen.BuildError),
    "writes an empty file": (ASKED + ': > "$last"; exit 0', bsrgen.BuildError),
    "is killed": (ASKED + "kill -9 $$", bsrgen.BuildError),
    "speaks no known encoding": (ASKED + "printf 'error: \\377\\376' >&2; exit 1", bsrgen.BuildError),
    "says nothing": (ASKED + "exit 1", bsrgen.BuildError),
    "fails when asked": ("exit 1", bsrgen.CompilerNotFoundError),
    "is another machine's": ("echo sparc-sun-solaris", bsrgen.CompilerNotFoundError),
    "answers in no known encoding": ("printf '\\377\\376'", bsrgen.CompilerNotFoundError),
    "hangs when asked": ("exec sleep 30", bsrgen.CompilerNotFoundError),
}


@pytest.mark.parametrize(("body", "error"), BROKEN.values(), ids=BROKEN)
def test_a_compiler_that(body, error, tmp_path, monkeypatch, own_store):
    """A typed error, nothing in the store, and the next compile with a good compiler works."""
    path = tmp_path / "cc"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: real(*a, **(k | {"timeout": min(k.get("timeout", 2), 2)})))
    with monkeypatch.context() as patch:
        patch.setenv("BSRGEN_CC", str(path))
        with pytest.raises(error) as caught:
            bsrgen.compile(W)
    assert type(caught.value) is error
    assert str(path) in str(caught.value) or "linux-gnu" in str(caught.value)
    assert own_store.entries() == []
    assert [p.name for p in own_store.root.glob("tmp/*") if not p.name.startswith("kept")] == []


@pytest.mark.parametrize("text", ["\x7fELF garbage", "", "no script"])
def test_a_compiler_that_is_no_program(text, tmp_path, monkeypatch, own_store):
    path = tmp_path / "cc"
    path.write_text(text)
    path.chmod(0o755)
    monkeypatch.setenv("BSRGEN_CC", str(path))
    with pytest.raises(bsrgen.CompilerNotFoundError, match="BSRGEN_CC"):
        bsrgen.compile(W)
    assert own_store.entries() == []


def test_no_compiler_at_all(monkeypatch, own_store):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("BSRGEN_CC", raising=False)
    with pytest.raises(bsrgen.CompilerNotFoundError, match="install gcc or clang"):
        bsrgen.compile(W)


# ── the check ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_wrong_kernel_is_not_handed_out(monkeypatch, own_store):
    """One wrong value of one block: the check finds it, and the store keeps nothing."""
    good = BACKENDS["c"]

    def corrupt(plans, weight):
        data = weight.data.copy()
        data[5, 1, 2] += 0.5
        return good.emit(plans, Weight(weight.pattern, data))

    with monkeypatch.context() as patch:
        patch.setitem(BACKENDS, "c", replace(good, emit=corrupt))
        with pytest.raises(bsrgen.BuildError, match="differs from"):
            bsrgen.compile(W)
    assert [entry.name for entry in own_store.entries() if entry.name] == []
    assert_right(problem_of(W), W, bsrgen.compile(W)(X), X)


def test_a_kernel_without_a_term_of_its_epilogue_is_not_handed_out(monkeypatch, own_store):
    good = BACKENDS["c"]

    def forgetful(plans, weight):
        files = dict((source := good.emit(plans, weight)).files)
        name = source.units[1].file
        assert b"v = v + bias;" in files[name]
        files[name] = files[name].replace(b"v = v + bias;", b"(void)bias;")
        return replace(source, files=files)

    monkeypatch.setitem(BACKENDS, "c", replace(good, emit=forgetful))
    with pytest.raises(bsrgen.BuildError, match="differs from"):
        bsrgen.compile(W, epilogue="bias")


def test_the_check_is_recorded():
    check = bsrgen.compile(W).artifact.manifest.check
    assert check is not None
    assert check.n == api.CHECK_N
    assert 0 < check.worst <= 1


# ── tuning ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tune_measure(builds, monkeypatch):
    """A few plans on the clock, the winner and all figures in the manifest; again, it comes from the store."""
    monkeypatch.setattr("bsrgen.tune.TOP", 3)
    weight = random_weight(16, (32, 40), (16, 2), 0.4)
    kernel = bsrgen.compile(weight, tune="measure", n=16)
    m = kernel.artifact.manifest
    assert 2 <= len(m.tuning) == len(builds) - 1
    assert all(record.n == 16 and record.target == native().name and not record.note for record in m.tuning)
    assert all(re.match(r"n=16 \d+\.\d\d us, predicted \d+\.\d\d us  x86", str(record)) for record in m.tuning)
    assert (m.tuning[0].plan, m.tuning[0].knobs) == (str(kernel.plan), kernel.plan.knobs)
    times = [record.measured_seconds for record in m.tuning]
    assert times == sorted(times)
    assert m.cost.measured_seconds == m.levels[0].measured_seconds == times[0]
    assert m.levels[0].predicted_seconds == m.cost.seconds == m.tuning[0].predicted_seconds
    assert not (kernel.artifact.folder / "tune").exists()
    assert not m.cut_short
    assert "measured" in str(kernel.verdict)
    assert kernel.verdict.measured_seconds == m.cost.measured_seconds
    assert_right(problem_of(weight), weight, kernel(X[:, :1].repeat(40, 1)), X[:, :1].repeat(40, 1))
    builds.clear()
    bsrgen.compile(weight, tune="measure", n=16)
    assert not builds


def test_tune_off_takes_the_first_plan():
    kernel = bsrgen.compile(W, tune="off")
    assert str(kernel.plan) == str(next(iter(BACKENDS["c"].candidates(problem_of(W), native()))))
    assert kernel.artifact.manifest.tuning == ()
    assert_right(problem_of(W), W, kernel(X), X)


def test_tune_measure_with_operands_and_spmm(monkeypatch):
    monkeypatch.setattr("bsrgen.tune.TOP", 2)
    weight = random_weight(17, (16, 16), (8, 8), 0.75)
    kernel = bsrgen.compile(weight, "spmm", tune="measure", n=8, epilogue=("bias", "residual", "accumulate"))
    x, given = kernel.problem.sample(np.random.default_rng(0), 5)
    assert_right(kernel.problem, weight, kernel(x, **given), x, given)


# ── looking at a kernel ──────────────────────────────────────────────────────────────────────────────────────────────


def test_everything_can_be_looked_at():
    kernel = bsrgen.compile(W, epilogue=("bias", "relu"))
    assert repr(kernel).startswith(f"<bsrgen.Kernel {kernel.name} on {native().name}, ")
    text = str(kernel)
    for word in (kernel.name, "linear float32 36x30 blocks 4x3", "bias, relu", str(kernel.plan), str(kernel.verdict)):
        assert word in text
    assert W.pattern.picture(64, 16).splitlines()[0] in text
    assert (kernel.shape, kernel.dtype, kernel.nnz) == ((36, 30), np.float32, W.pattern.nnz)
    assert kernel.pattern.digest == W.pattern.digest
    assert kernel.problem == PROBLEM or str(kernel.problem) == str(replace(PROBLEM, epilogue=kernel.problem.epilogue))
    assert kernel.plan.target == native().name
    assert kernel.cost.flop == 2 * W.pattern.nnz * 128
    assert kernel.cost.seconds > 0
    assert re.match(r"(sparse|dense): predicted ", str(kernel.verdict))
    assert kernel.name in kernel.source
    assert "Generated by bsrgen" in kernel.source
    assert "v = v + bias" in kernel.source
    assert kernel.artifact.manifest.name == kernel.name
    assert Path(str(kernel.artifact)).is_dir()


def test_a_kernel_is_a_linear_operator():
    from scipy.sparse.linalg import aslinearoperator

    for operator in ("linear", "spmm"):
        kernel = bsrgen.compile(W, operator, dtype="float64")
        A = aslinearoperator(kernel)
        assert (A.shape, A.dtype) == ((36, 30), np.float64)
        v = np.random.default_rng(1).standard_normal(30)
        dense = W.todense().astype(np.float64)
        np.testing.assert_allclose(A @ v, dense @ v, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(A.matvec(v[:, None]), dense @ v[:, None], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(A @ np.stack([v, 2 * v], 1), dense @ np.stack([v, 2 * v], 1), rtol=1e-12, atol=1e-12)


IMPORTS = """
import sys
import numpy
before = set(sys.modules)
import bsrgen
print(*(name for name in ("scipy", "ml_dtypes", "jinja2", "cffi", "click", "rich", "torch", "archspec")
        if name in sys.modules))
print(len(set(sys.modules) - before))
print(sorted(bsrgen.__all__) == sorted(n for n in bsrgen.__all__ if hasattr(bsrgen, n)))
"""


def test_import_is_light():
    heavy, count, complete = run_python(IMPORTS).split("\n")[:3]
    assert heavy == ""
    assert int(count) < 20
    assert complete == "True"


LOADS = """
import sys
import numpy as np
import bsrgen
kernel = bsrgen.load(sys.argv[1])
kernel(np.ones((7, 30), np.float32))
print(*(name for name in ("scipy", "ml_dtypes", "jinja2", "click", "rich", "torch", "archspec") if name in sys.modules))
"""


def test_loading_and_calling_float32_is_light(tmp_path):
    assert run_python(LOADS, str(bsrgen.compile(W).save(tmp_path / "f32"))).strip() == ""


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match="no attribute 'kompile'"):
        bsrgen.kompile  # noqa: B018


@pytest.mark.parametrize(
    "options",
    [
        {"epilogue": ("bias", "gelu"), "dtype": "int8", "x_dtype": "float32", "quantize_x": True},
        {"operator": "spmm", "dtype": "bfloat16", "out_dtype": "float32", "target": ("x86-64-v3", "x86-64")},
        {"mode": "dynamic", "max_blocks": 9},
        {"operator": "sddmm", "epilogue": "scale"},
    ],
    ids=str,
)
def test_the_text_says_what_was_asked_for(options):
    """The request on top of each file gives the same kernel."""
    W = random_weight(0, (24, 20), (4, 2), 0.1)
    kernel = bsrgen.compile(W, **options)
    lines = re.findall(r"^ \*   request   (.*)$", kernel.source.partition("*/")[0], re.M)
    again = eval(" ".join(lines), {"bsrgen": bsrgen, "W": W})
    assert (again.name, again.artifact.manifest.types) == (kernel.name, kernel.artifact.manifest.types)
