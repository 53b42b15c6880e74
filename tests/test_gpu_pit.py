"""mode="pit" in the GPU suite: on a GPU with `pytest -m gpu`, and a part of it in the emulation (see test_gpu.py)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_places import EMULATION, GPU, PLACES, Place, caller, check, entered, run
from support import assert_right
from test_cuda_pit import EXPERTS, case

from bsrgen import tune
from bsrgen.backends.cuda import candidates
from bsrgen.device import DeviceKernel
from bsrgen.pattern import Weight
from bsrgen.problem import Problem

CASES: dict[str, dict[str, Any]] = {
    f"{axis} {dtype}": {"axis": axis, "dtype": dtype, "epilogue": epilogue, "mask_block": mask}
    for axis, epilogue, mask in (
        ("tokens", ("bias", "gelu"), None), ("features", (), None), ("experts", ("bias", "token_scale"), None),
        ("outputs", ("scale",), (20, 32)),
    )
    for dtype in ("float32", "float64", "float16", "bfloat16", "int8")
}  # fmt: skip


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with entered(request.param, tmp_path_factory.mktemp(request.param)) as found:
        yield found


def table() -> Iterator[Any]:
    for name in CASES:
        yield pytest.param(GPU, name, marks=pytest.mark.gpu, id=f"gpu-{name}")
        if name == "features float16":
            yield pytest.param(EMULATION, name, id=f"emulation-{name}")


@pytest.mark.parametrize(("place", "name"), list(table()), indirect=["place"])
def test_every_axis(name: str, place: Place, rng: Any, tmp_path: Path) -> None:
    """The model's best plans for few and for many tokens."""
    problem, weight = case(**CASES[name])
    best = dict.fromkeys(tune.rank(list(candidates(problem, place.target)), n)[0][1] for n in (8, 2048))
    for turn, plan in enumerate(best if place.real else list(best)[:1]):
        (folder := tmp_path / str(turn)).mkdir()
        check(
            place.build(plan, weight, folder), problem, weight, rng, (0, 1, 3, 16, 65, 700) if place.real else (0, 20)
        )


Prepared = tuple[DeviceKernel, Problem, Weight]


@pytest.fixture(scope="module")
def routed(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """One kernel that many tests call."""
    problem, weight = case("experts", epilogue="bias")
    plan = next(plan for plan in candidates(problem, place.target) if plan.rows == 8)
    return place.build(plan, weight, tmp_path_factory.mktemp("routed")), problem, weight


@pytest.mark.parametrize("name", ["torch", "cupy"])
def test_results_of_no_expert_are_zero(name: str, routed: Prepared, place: Place, rng: Any, monkeypatch: Any) -> None:
    """In a new array, which is filled on the stream of the call; nobody waits."""
    (kernel, problem, weight), lib = routed, caller(name, place, monkeypatch)
    x, given = problem.sample(rng, 37)
    assert (given["routing"] < 0).any()
    with lib.streaming():
        y = kernel(lib.to(x), lib.to(given["routing"]), bias=lib.to(given["bias"]))
        found = lib.back(y, x.dtype)
    assert_right(problem, weight, found, x, given)
    assert not found[given["routing"] < 0].any()


def test_skewed_routing(routed: Prepared, rng: Any) -> None:
    """All tokens to one expert, none to any, and numbers of no expert."""
    kernel, problem, weight = routed
    x, given = problem.sample(rng, 67)
    for ids in (np.full(67, 3), np.full(67, -1), np.full(67, EXPERTS), np.arange(67) % 7 // 6 * 4):
        routing = np.where(ids < EXPERTS, ids, -1).astype(np.int32)
        old = problem.sample_out(rng, 67)
        y = run(kernel, x, old.copy(), given | {"routing": ids.astype(np.int32)})
        assert_right(problem, weight, y, x, given | {"routing": routing}, old)
