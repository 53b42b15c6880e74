"""The GPU suite: `pytest -m gpu` on a machine with an NVIDIA GPU and nvcc.  Elsewhere those tests are skipped, and the
same functions run in the emulation on the CPU: that shows that the suite is sound, not that a GPU agrees."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from device_emulation import build_emulated
from gpu_places import CALLERS, EMULATION, GPU, NO_GPU, PLACES, Place, caller, check, entered, poisoned, run
from support import (
    DTYPE_NAMES,
    OPERATOR_NAMES,
    REDUCED,
    assert_right,
    make_weight,
    problem_of,
    run_python,
)

import bsrgen
from bsrgen import driver, tune
from bsrgen.backends import BACKENDS
from bsrgen.backends.cuda import CudaPlan, HopperPlan, candidates
from bsrgen.backends.cuda.hopper import Shape
from bsrgen.device import DeviceKernel
from bsrgen.dtypes import DTYPES, HOPPER
from bsrgen.errors import ArgumentError, ArgumentTypeError, DeviceError
from bsrgen.foreign import Pair
from bsrgen.gpus import as_gpus
from bsrgen.pattern import Weight
from bsrgen.problem import Problem
from bsrgen.verify import verify

BLOCKS = ((32, 32), (16, 1), (8, 8), (1, 1), (64, 64), (5, 7), (1, 16))
KINDS = ("uniform", "powerlaw", "banded", "full", "one", "empty")
EPILOGUES = (
    (), ("bias", "gelu"), ("scale", "residual", "silu"), ("bias", "relu", "accumulate"), ("gelu_tanh", "clamp"),
    ("tanh",), ("bias", "sigmoid"),
)  # fmt: skip
TOKENS = (0, 1, 3, 16, 65, 300)
TYPES = (*((name,) * 3 for name in DTYPE_NAMES), *REDUCED)
SANITIZERS = ("memcheck", "racecheck", "synccheck")


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with entered(request.param, tmp_path_factory.mktemp(request.param)) as found:
        yield found


def case(number: int, types: tuple[str, str, str], operator: str) -> tuple[Problem, Weight]:
    """A problem of these types; block, pattern and epilogue in turn."""
    (R, C), (w, x, y) = BLOCKS[number % len(BLOCKS)], types
    shape = (R * max(2, 150 // R) + R // 2, C * max(3, 200 // C) - C // 2)
    weight = make_weight(KINDS[number % len(KINDS)], shape, (R, C), "float32", seed=number)
    data = np.rint(weight.data * 40) if w == "int8" else weight.data
    weight = Weight(weight.pattern, data.astype(DTYPES[w].numpy))
    return problem_of(weight, operator, EPILOGUES[number % len(EPILOGUES)], w, x, y), weight


def plans_of(problem: Problem, place: Place) -> list[CudaPlan]:
    """Of each kind of plan that there is the model's best for few and for many tokens: every template."""
    found: dict[str, CudaPlan] = {}
    for n in (1, 2048):
        for _, plan in tune.rank(list(candidates(problem, place.target)), n):
            found.setdefault(f"{type(plan).__name__} for {n}", plan)
    return list(dict.fromkeys(found.values()))


CASES = list(enumerate(product(TYPES, OPERATOR_NAMES)))
IN_EMULATION = (3, 11)  # of CASES: two of them are enough to know that the suite is sound; test_cuda.py has the others


def table() -> Iterator[Any]:
    for number, what in CASES:
        name = f"{'-'.join(what[0])}-{what[1]}"
        yield pytest.param(GPU, number, what, marks=pytest.mark.gpu, id=f"gpu-{name}")
        if number in IN_EMULATION:
            yield pytest.param(EMULATION, number, what, id=f"emulation-{name}")


@pytest.mark.parametrize(("place", "number", "what"), list(table()), indirect=["place"])
def test_every_template(number: int, what: Any, place: Place, rng: Any, tmp_path: Path) -> None:
    """All kinds of plans x types x operators, with blocks, patterns and epilogues in turn; new values as well."""
    problem, weight = case(number, *what)
    other = Weight(weight.pattern, weight.data[::-1].copy() if weight.pattern.nnzb > 1 else weight.data)
    for turn, plan in enumerate(plans_of(problem, place)[: None if place.real else 1]):
        (folder := tmp_path / str(turn)).mkdir()
        kernel = place.build(plan, weight, folder)
        check(kernel, problem, weight, rng, TOKENS if place.real else (0, 1, 35))
        if problem.dtype.name != "int8" and weight.pattern.shape[0] % weight.pattern.R == 0:
            kernel.update(other)
            check(kernel, problem, other, rng, (7,))


# block, operator, types of W and of Y, slots, down, shapes of kernels: each template, each way through a cluster
HOPPER_CASES: tuple[tuple[Pair, str, str, str | None, int, int, tuple[Shape, ...]], ...] = (
    ((64, 64), "linear", "bfloat16", None, 4, 2, (Shape(4, 4, 2), Shape(16, 32, 4), Shape(128, across=2))),
    ((128, 64), "linear", "float16", "float32", 2, 1, (Shape(1, 1, 1), Shape(64, 128, 8), Shape(256, across=4))),
    ((32, 32), "spmm", "bfloat16", None, 4, 2, (Shape(4, 4, 1), Shape(64, 64, 2), Shape(128, across=4))),
    ((16, 8), "linear", "float16", None, 4, 1, (Shape(128, 200, 1), Shape(64, 1000), Shape(128))),
    ((32, 1), "spmm", "bfloat16", None, 2, 1, (Shape(4, 4, 4), Shape(64, 64, 8), Shape(256))),
    ((64, 128), "linear", "int8", None, 2, 2, (Shape(4, 4, 2), Shape(16, 32, 2), Shape(256, across=2))),
    ((64, 128), "linear", "float8_e4m3fn", None, 2, 1, (Shape(4, 4, 1), Shape(16, 32, 8), Shape(256, across=2))),
)


@pytest.mark.parametrize(("place", "number"), [
    pytest.param(GPU, number, marks=pytest.mark.gpu, id=f"gpu-{number}") for number in range(len(HOPPER_CASES))
] + [pytest.param(EMULATION, 0, id="emulation-0")], indirect=["place"])  # fmt: skip
def test_every_hopper_kernel(number: int, place: Place, rng: Any, tmp_path: Path) -> None:
    """Streams, parts of a slot, and clusters that send W, X and both, with tokens that end anywhere."""
    if place.real and driver.gpus()[0].capability != (9, 0):
        pytest.skip("no Hopper")
    (R, C), operator, w, y, slots, down, shapes = HOPPER_CASES[number]
    shape = (R * (1000 // R if place.real else 5) - R // 3, C * max(4, (1500 if place.real else 200) // C))
    weight = make_weight("uniform", shape, (R, C), "float32", seed=number)
    data = np.rint(weight.data * 40) if w == "int8" else weight.data
    weight = Weight(weight.pattern, data.astype((DTYPES | HOPPER)[w].numpy))
    problem = problem_of(weight, operator, ("scale", "relu"), (DTYPES | HOPPER)[w], y=y)
    target = as_gpus("sm_90a")[0]
    kernel = place.build(HopperPlan(problem, target, slots, shapes, down), weight, tmp_path)
    check(kernel, problem, weight, rng, (1, 4, 24, 64, 65, 304, 1103) if place.real else (3, 20, 168))


def matrix_case() -> tuple[Problem, Weight]:
    weight = make_weight("uniform", (96, 128), (16, 16), "float32")
    weight = Weight(weight.pattern, weight.data.astype(DTYPES["bfloat16"].numpy))
    return problem_of(weight, "linear", ("bias", "silu")), weight


Prepared = tuple[DeviceKernel, Problem, Weight]


@pytest.fixture(scope="module")
def small(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """One kernel that many tests call."""
    problem, weight = matrix_case()
    return place.build(plans_of(problem, place)[0], weight, tmp_path_factory.mktemp("small")), problem, weight


def test_update(small: Prepared, rng: Any) -> None:
    kernel, problem, weight = small
    check(kernel, problem, weight, rng, (5,))
    other = Weight(weight.pattern, (-weight.data.astype(np.float32)).astype(weight.data.dtype))
    kernel.update(other)
    check(kernel, problem, other, rng, (5, 40))
    kernel.update(weight)


def test_the_same_bits_in_every_call(small: Prepared, rng: Any) -> None:
    """No atomics: equal calls give equal bits."""
    kernel, problem, _ = small
    for n in (1, 16, 100):
        x, given = problem.sample(rng, n)
        assert len({run(kernel, x, poisoned(problem, rng, n), given).tobytes() for _ in range(5)}) == 1


# ── callers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", CALLERS)
def test_arrays_of_a_library(name: str, small: Prepared, place: Place, rng: Any, monkeypatch: Any) -> None:
    """y = k(x) where the library makes arrays, out= otherwise; on the library's current stream."""
    (kernel, problem, weight), lib = small, caller(name, place, monkeypatch)
    dtype = DTYPES["bfloat16"].numpy
    for n in (1, 33):
        x, given = problem.sample(rng, n)
        bound = {name: lib.to(np.ascontiguousarray(a)) if np.ndim(a) else a for name, a in given.items()}
        out = lib.to(poisoned(problem, rng, n))
        assert kernel(lib.to(x), out=out, **bound) is out
        right = lib.back(out, dtype)
        assert_right(problem, weight, right, x, given)
        if lib.makes:
            with lib.streaming():
                there = lib.to(x)
                y = kernel(there, **bound)
                assert type(y) is type(there)
                np.testing.assert_array_equal(lib.back(y, dtype).view(np.uint16), right.view(np.uint16))
        else:
            with pytest.raises(ArgumentTypeError, match="give out="):
                kernel(lib.to(x), **bound)


def test_several_weights_give_a_result_each(small: Prepared, place: Place, rng: Any, monkeypatch: Any) -> None:
    (kernel, problem, _), lib = small, caller("torch", place, monkeypatch)
    manifest = msgspec.structs.replace(kernel.artifact.manifest, parts=(64, 32))
    x, given = problem.sample(rng, 4)
    there, bound = lib.to(x), {name: lib.to(np.ascontiguousarray(a)) for name, a in given.items()}
    whole = lib.back(kernel(there, **bound), problem.out_dtype.numpy)
    both = DeviceKernel(replace(kernel.artifact, manifest=manifest))(there, **bound)
    assert isinstance(both, tuple)
    for y, right in zip(both, np.split(whole, [64], axis=1), strict=True):
        np.testing.assert_array_equal(lib.back(y, problem.out_dtype.numpy), right)
    with pytest.raises(ArgumentError, match="out overlaps"):
        kernel(there, out=there[:, :96], **bound)


@pytest.mark.parametrize("name", CALLERS)
def test_arrays_are_refused(name: str, small: Prepared, place: Place, rng: Any, monkeypatch: Any) -> None:
    """Before any launch: device, dtype, shape, alignment, overlap."""
    (kernel, problem, _), lib = small, caller(name, place, monkeypatch)
    x, given = problem.sample(rng, 4)
    bound = {name: lib.to(np.ascontiguousarray(a)) if np.ndim(a) else a for name, a in given.items()}
    good, out = lib.to(x), lib.to(poisoned(problem, rng, 4))
    for error, text, bad, more in (
        (ArgumentTypeError, "not on an NVIDIA GPU", x, {}),
        (ArgumentTypeError, "has dtype float32", lib.to(x.astype(np.float32)), {}),
        (ArgumentError, "x has shape", lib.to(np.ascontiguousarray(x[:, 1:])), {}),
        (ArgumentError, "out has shape", good, {"out": lib.to(poisoned(problem, rng, 5))}),
        (ArgumentTypeError, "bias is a numpy array", good, {"bias": given["bias"]}),
    ):
        with pytest.raises(error, match=text):
            kernel(bad, **{"out": out} | bound | more)


def test_alignment_and_contiguity(small: Prepared, rng: Any) -> None:
    """Rows apart are taken, columns apart are not, elements on odd addresses are not."""
    kernel, problem, weight = small
    x, given = problem.sample(rng, 6)
    wide = np.zeros((6, x.shape[1] + 3), x.dtype)
    wide[:, 1:-2] = x
    y = run(kernel, wide[:, 1:-2], poisoned(problem, rng, 6), given)  # neither base nor rows at multiples of 16 bytes
    assert_right(problem, weight, y, x, given)
    turned, out = driver.Buffer(np.asfortranarray(x)), driver.Buffer(poisoned(problem, rng, 6))
    operands = {name: driver.Buffer(a) for name, a in given.items()}
    with pytest.raises(ArgumentError, match="rows must be contiguous"):
        kernel(turned, out=out, **operands)
    odd = driver.Buffer(x)
    odd.__cuda_array_interface__["data"] = (odd.pointer + 1, False)
    with pytest.raises(ArgumentError, match="not aligned"):
        kernel(odd, out=out, **operands)


# ── streams and graphs ───────────────────────────────────────────────────────────────────────────────────────────────


def test_calls_are_in_the_order_of_their_stream(small: Prepared, rng: Any) -> None:
    """What the stream did before is there, what it does after comes after; nothing is waited for in between."""
    kernel, problem, _ = small
    x, given = problem.sample(rng, 64)
    stream, there = driver.Stream(), driver.Buffer(x)
    operands = {name: driver.Buffer(a) for name, a in given.items()}
    first, second = (driver.Buffer(poisoned(problem, rng, 64)) for _ in range(2))
    kernel(there, out=first, stream=stream.handle, **operands)
    stream.fill(there, 0, x.nbytes)
    kernel(there, out=second, stream=stream.handle, **operands)
    stream.wait()
    np.testing.assert_array_equal(_bits(first.fetch()), _bits(run(kernel, x, poisoned(problem, rng, 64), given)))
    zero = run(kernel, np.zeros_like(x), poisoned(problem, rng, 64), given)
    np.testing.assert_array_equal(_bits(second.fetch()), _bits(zero))


def test_graphs(small: Prepared, rng: Any) -> None:
    """A graph holds calls: they allocate nothing and wait for nothing, or its recording would have failed; replayed,
    they read what then lies in their arrays."""
    kernel, problem, weight = small
    stream = driver.Stream()
    kernel.upload()
    x, given = problem.sample(rng, 20)
    there, operands = driver.Buffer(x), {name: driver.Buffer(a) for name, a in given.items()}
    out = driver.Buffer(poisoned(problem, rng, 20))
    replay = stream.graph(lambda: kernel(there, out=out, stream=stream.handle, **operands))
    assert np.isnan(out.fetch().astype(np.float32)).all(), "recorded, not run"
    for _ in range(3):
        x = problem.sample(rng, 20)[0]
        there.store(x)
        out.store(poisoned(problem, rng, 20))
        replay()
        stream.wait()
        assert_right(problem, weight, out.fetch(), x, given)


def test_a_graph_refuses_what_allocates(small: Prepared, rng: Any) -> None:
    """That the test above can fail: the first call after `update` copies values to the device."""
    kernel, problem, weight = small
    stream, n = driver.Stream(), 3
    x, given = problem.sample(rng, n)
    there, out = driver.Buffer(x), driver.Buffer(poisoned(problem, rng, n))
    operands = {name: driver.Buffer(a) for name, a in given.items()}
    kernel.update(weight)
    with pytest.raises(DeviceError):
        stream.graph(lambda: kernel(there, out=out, stream=stream.handle, **operands))
    kernel.upload()
    assert_right(problem, weight, run(kernel, x, poisoned(problem, rng, n), given), x, given)


def test_shared_work_on_streams_and_in_graphs(place: Place, rng: Any, tmp_path: Path) -> None:
    """Thread blocks that share rows: each stream and each graph has a workspace of its own, and all the same bits."""
    weight = make_weight("powerlaw", (48, 1536), (16, 16), "float32")
    weight = Weight(weight.pattern, weight.data.astype(np.float16))
    problem, n = problem_of(weight, "linear", ("bias",), "float16", None, "float32"), 40
    plan = next(plan for plan in candidates(problem, place.target) if plan.split and plan.matrix)
    kernel = place.build(plan, weight, tmp_path)
    assert kernel.artifact.manifest.workspace_bytes
    x, given = problem.sample(rng, n)
    right = run(kernel, x, poisoned(problem, rng, n), given)
    assert_right(problem, weight, right, x, given)
    there, operands = driver.Buffer(x), {name: driver.Buffer(a) for name, a in given.items()}
    outs = [driver.Buffer(poisoned(problem, rng, n)) for _ in range(4)]
    one, two = driver.Stream(), driver.Stream()
    kernel(there, out=outs[0], stream=one.handle, **operands)
    recorded = one.graph(lambda: kernel(there, out=outs[1], stream=one.handle, **operands))
    # No spare workspace is left for this one.
    unshared = one.graph(lambda: kernel(there, out=outs[2], stream=one.handle, **operands))
    for _ in range(5):
        recorded(), kernel(there, out=outs[3], stream=two.handle, **operands), unshared()
    one.wait(), two.wait()
    for out in outs:
        np.testing.assert_array_equal(out.fetch().view(np.uint32), right.view(np.uint32))


def test_several_devices(small: Prepared, place: Place, rng: Any) -> None:
    if len(driver.gpus()) < 2:
        pytest.skip("one device")
    torch = pytest.importorskip("torch")
    kernel, problem, weight = small
    x, given = problem.sample(rng, 9)

    def on(device: int, array: Any) -> Any:
        moved = torch.from_numpy(array.view(np.int16) if array.dtype.itemsize == 2 else array).to(f"cuda:{device}")
        return moved.view(torch.bfloat16) if array.dtype.itemsize == 2 else moved

    for device in (1, 0):
        y = kernel(on(device, x), bias=on(device, given["bias"]))
        assert y.device.index == device
        assert_right(problem, weight, y.cpu().view(torch.int16).numpy().view(x.dtype), x, given)
    with pytest.raises(ArgumentError, match="several devices"):
        kernel(on(0, x), bias=on(1, given["bias"]))


# ── from compile to verify ───────────────────────────────────────────────────────────────────────────────────────────


def test_compile_for_what_is_here(place: Place, rng: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """target="native", a race by the clock of the GPU, a check by execution, and `verify` afterwards."""
    if not place.real:
        monkeypatch.setattr("bsrgen.build.build", build_emulated)
        monkeypatch.setattr("bsrgen.nvcc.identity", lambda: "emulated")
        monkeypatch.setattr("bsrgen.backends.BACKENDS", patched_tools())
    monkeypatch.setattr(tune, "TOP", 8 if place.real else 2)
    said: list[float] = []
    weight = make_weight("uniform", (48, 64), (8, 8), "float32")
    options = {"backend": "cuda", "target": "native", "epilogue": "bias", "progress": said.append}
    kernel = bsrgen.compile(weight, tune="measure", n=40, **options)
    m = kernel.artifact.manifest
    assert kernel.plan.target.startswith("sm_")
    assert m.check is not None
    assert m.check.worst <= 1
    assert m.notes == ()
    assert said == sorted(said)
    assert said[-1] == 1
    records = m.tuning
    assert len(records) == tune.TOP
    measured = [record.measured_seconds for record in records]
    assert all(seconds and seconds > 0 for seconds in measured), [record.note for record in records]
    assert measured == sorted(measured)
    problem = problem_of(weight, "linear", ("bias",))
    check(kernel, problem, weight, rng, (1, 40))
    _, findings = verify(kernel.save(tmp_path / "saved"))
    assert all(finding.ok for finding in findings)
    assert any(driver.gpus()[0].name in finding.detail for finding in findings)


def patched_tools() -> Any:
    """The CUDA backend without its look for nvcc."""
    return BACKENDS | {"cuda": replace(BACKENDS["cuda"], tools=lambda targets: "emulated")}


# ── compute-sanitizer ────────────────────────────────────────────────────────────────────────────────────────────────

SANITIZED = """
import sys
from pathlib import Path
import numpy as np
from gpu_places import check, entered
from test_gpu import CASES, case, matrix_case, plans_of
name, folder = sys.argv[1], Path(sys.argv[2])
with entered(name, folder) as place:
    chosen = [matrix_case(), *(case(number, *what) for number, what in (CASES[::3] if place.real else ()))]
    for turn, (problem, weight) in enumerate(chosen):
        for kind, plan in enumerate(plans_of(problem, place)[: None if place.real else 1]):
            (inside := folder / f"{turn}-{kind}").mkdir()
            check(place.build(plan, weight, inside), problem, weight, np.random.default_rng(turn), (1, 35))
print("all right")
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("checker", SANITIZERS)
def test_under_compute_sanitizer(checker: str, place: Place, tmp_path: Path) -> None:
    """Every kind of plan on tiny shapes, a third of the types and operators, in a process of its own."""
    if not place.real and checker != "memcheck":
        pytest.skip("in emulation: once is enough to know that the program runs")
    found = shutil.which("compute-sanitizer")
    if found is None and place.real:
        pytest.skip("not installed: compute-sanitizer")
    command = [found, "--tool", checker, "--error-exitcode", "9"] if found and place.real else []
    inner = f"{command!r} + [sys.executable, '-c', {SANITIZED!r}] + sys.argv[1:]"
    script = f"import subprocess, sys; sys.exit(subprocess.call({inner}))"
    said = run_python(script, place.name, str(tmp_path), timeout_s=1700)
    assert "all right" in said.splitlines()
    assert not command or re.search(r"(ERROR|RACECHECK) SUMMARY: 0 ", said)


def _bits(a: Any) -> Any:
    return np.asarray(a).view(np.uint16)


def test_skips_say_why(tmp_path: Path) -> None:
    if not NO_GPU:
        pytest.skip("there is a GPU")
    with pytest.raises(pytest.skip.Exception, match=re.escape(NO_GPU)), entered(GPU, tmp_path):
        pass
