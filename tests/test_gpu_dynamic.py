"""mode="dynamic" in the GPU suite (see test_gpu.py): `pytest -m gpu` on a machine with one, the emulation elsewhere."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_emulation import build_emulated
from gpu_places import EMULATION, GPU, PLACES, Place, check, entered, poisoned
from support import OPERATOR_NAMES, assert_right, make_weight, problem_of
from test_gpu import case, patched_tools, plans_of

import bsrgen
from bsrgen import driver
from bsrgen.dynamic_device import DynamicDeviceKernel, PreparedDeviceWeight
from bsrgen.errors import PatternError
from bsrgen.even import planned
from bsrgen.pattern import Weight
from bsrgen.plan import Plan
from bsrgen.problem import Problem
from bsrgen.verify import verify

TYPES = (*((name,) * 3 for name in ("float32", "bfloat16", "float16")), ("int8", "int8", "float32"))
IN_EMULATION = 5  # of them one is enough to know that the suite is sound; test_cuda_dynamic.py has the others


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with entered(request.param, tmp_path_factory.mktemp(request.param)) as found:
        yield found


class Ready:
    """A kernel with a weight, called as kernels are."""

    def __init__(self, kernel: DynamicDeviceKernel, weight: PreparedDeviceWeight) -> None:
        self.kernel, self.weight, self.plan = kernel, weight, kernel.plan

    def __call__(self, x: Any, out: Any, **given: Any) -> Any:
        return self.kernel(x, self.weight, out, **given)


def to_come(problem: Problem, weight: Weight) -> tuple[Problem, Weight]:
    """The same of any weight of up to all blocks."""
    p = weight.pattern
    coming = planned(weight, p.block_rows * p.block_cols, weight.data.dtype)
    return replace(problem, pattern=coming.pattern), coming


def built(place: Place, plan: Plan, coming: Weight, folder: Path) -> DynamicDeviceKernel:
    kernel = place.build(plan, coming, folder)
    assert isinstance(kernel, DynamicDeviceKernel)
    return kernel


def shuffled(weight: Weight, rng: Any, integers: Any = np.int64) -> list[driver.Buffer]:
    """Its arrays on the device, blocks in random order within each block row."""
    p = weight.pattern
    order = np.argsort(p.rows + rng.random(p.nnzb), kind="stable")
    arrays = weight.data[order], p.indices[order].astype(integers), p.indptr.astype(integers)
    return [driver.Buffer(a) for a in arrays]


def table() -> Iterator[Any]:
    for number, (types, operator) in enumerate((t, o) for t in TYPES for o in OPERATOR_NAMES):
        name = f"{types[0]}-{operator}"
        yield pytest.param(GPU, number, types, operator, marks=pytest.mark.gpu, id=f"gpu-{name}")
        if number == IN_EMULATION:
            yield pytest.param(EMULATION, number, types, operator, id=f"emulation-{name}")


@pytest.mark.parametrize(("place", "number", "types", "operator"), list(table()), indirect=["place"])
def test_every_template(number: int, types: Any, operator: str, place: Place, rng: Any, tmp_path: Path) -> None:
    """All kinds of plans, several weights to each; the second into the memory of the first."""
    problem, weight = case(number, types, operator)
    later, coming = to_come(problem, weight)
    for turn, plan in enumerate(plans_of(later, place)[: None if place.real else 1]):
        (folder := tmp_path / str(turn)).mkdir()
        kernel, ready = built(place, plan, coming, folder), None
        for kind in ("full", "powerlaw", "empty", "one") if place.real else ("powerlaw",):
            other = make_weight(kind, weight.pattern.shape, weight.pattern.blocksize, "float32", seed=turn)
            data = np.rint(other.data * 40) if types[0] == "int8" else other.data
            other = Weight(other.pattern, data.astype(weight.data.dtype))
            ready = kernel.prepare(shuffled(other, rng, (np.int32, np.int64)[turn % 2]), into=ready)
            sizes = (0, 1, 16, 65, 300) if place.real else (1, 35)
            check(Ready(kernel, ready), problem_like(problem, other), other, rng, sizes)  # type: ignore[arg-type]


def problem_like(problem: Problem, weight: Weight) -> Problem:
    return replace(problem, pattern=weight.pattern)


def test_a_pattern_that_changes_inside_a_graph(place: Place, rng: Any, tmp_path: Path) -> None:
    """Preparation and call are recorded together: no allocation, no waiting; replayed, they take what is there then."""
    shape, block = (48, 64), (8, 8)
    weight = make_weight("uniform", shape, block, "float32")
    problem = problem_of(weight, "linear", ("bias",))
    later, coming = to_come(problem, weight)
    kernel, stream = built(place, plans_of(later, place)[0], coming, tmp_path), driver.Stream()
    there = shuffled(weight, rng)
    ready = kernel.prepare(there)
    kernel.upload()
    x, given = problem.sample(rng, 20)
    x_there, out = driver.Buffer(x), driver.Buffer(poisoned(problem, rng, 20))
    operands = {name: driver.Buffer(a) for name, a in given.items()}

    def work() -> None:
        assert kernel.prepare(there, into=ready, check=False, stream=stream.handle) is ready
        kernel(x_there, ready, out, stream=stream.handle, **operands)
        ready.update(there[0], stream=stream.handle)

    replay = stream.graph(work)
    for _ in range(3):
        rows = np.array([rng.permutation(weight.pattern.block_cols) for _ in range(weight.pattern.block_rows)])
        counts = np.diff(weight.pattern.indptr)
        indices = np.concatenate([np.sort(row[:count]) for row, count in zip(rows, counts, strict=True)])
        data = rng.standard_normal(weight.data.shape).astype(np.float32)
        pattern = bsrgen.pattern.Pattern(shape, block, weight.pattern.indptr, indices)
        there[0].store(data)
        there[1].store(indices)
        out.store(poisoned(problem, rng, 20))
        replay()
        stream.wait()
        other = Weight(pattern, data)
        assert_right(problem_like(problem, other), other, out.fetch(), x, given)
    there[1].store(np.full_like(indices, 99))
    replay()
    stream.wait()
    none = Weight(weight.pattern, np.zeros_like(weight.data))
    assert_right(problem, none, out.fetch(), x, given)
    with pytest.raises(PatternError, match="is not one of the block columns"):
        kernel.prepare(there, into=ready)


def test_compile_for_what_is_here(place: Place, tmp_path: Path, monkeypatch: Any) -> None:
    """target="native", a check by execution, and `verify` afterwards."""
    if not place.real:
        monkeypatch.setattr("bsrgen.build.build", build_emulated)
        monkeypatch.setattr("bsrgen.nvcc.identity", lambda: "emulated")
        monkeypatch.setattr("bsrgen.backends.BACKENDS", patched_tools())
    weight = make_weight("uniform", (48, 64), (8, 8), "float32")
    kernel = bsrgen.compile(
        weight, mode="dynamic", backend="cuda", target="native", tune="measure" if place.real else "model"
    )
    assert isinstance(kernel, DynamicDeviceKernel)
    assert (check := kernel.artifact.manifest.check) is not None
    assert check.worst <= 1
    _, findings = verify(kernel.save(tmp_path / "saved"))
    assert all(finding.ok for finding in findings)
    assert any(driver.gpus()[0].name in finding.detail for finding in findings)


@pytest.mark.gpu
@pytest.mark.parametrize("place", [pytest.param(GPU)], indirect=True)
def test_sparse_tensors_of_torch(place: Place, rng: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    weight = make_weight("uniform", (48, 64), (8, 8), "float32")
    problem = problem_of(weight)
    later, coming = to_come(problem, weight)
    kernel, p = built(place, plans_of(later, place)[0], coming, tmp_path), weight.pattern
    arrays = (torch.from_numpy(np.array(a)).cuda() for a in (p.indptr, p.indices.astype(np.int64), weight.data))
    bsr = torch.sparse_bsr_tensor(*arrays, p.shape)
    x = torch.randn(5, 64, device="cuda")
    assert_right(problem, weight, kernel(x, bsr).cpu().numpy(), x.cpu().numpy())
