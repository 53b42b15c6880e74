"""Kernels of patterns in the GPU suite: on a GPU with `pytest -m gpu`, a part of it in the emulation (test_gpu.py)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_emulation import build_emulated
from gpu_places import EMULATION, GPU, PLACES, Place, entered
from support import make_weight

import bsrgen
from bsrgen import attention, driver
from bsrgen.attention import causal, global_, sliding_window
from bsrgen.pattern_device import PatternDeviceKernel
from bsrgen.tracks import sampled
from bsrgen.verify import verify

BLOCKS = ((1, 1), (4, 4), (32, 1), (8, 8), (64, 64), (37, 53))
RULE = causal() & sliding_window(300) | global_(4)


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with entered(request.param, tmp_path_factory.mktemp(request.param)) as found:
        yield found


@pytest.fixture
def compiler(place: Place, monkeypatch: Any) -> None:
    """On the CPU that of the emulation."""
    if not place.real:
        monkeypatch.setattr("bsrgen.build.build", build_emulated)
        monkeypatch.setattr("bsrgen.nvcc.identity", lambda: "emulated")


def judge(kernel: Any, rng: Any, lengths: tuple[int, ...]) -> None:
    assert isinstance(kernel, PatternDeviceKernel)
    for n in lengths:
        arrays = kernel.problem.sample(rng, n)
        expected, bound = kernel.problem.reference(arrays, 0.5 if kernel.problem.operator.headed else 1.0)
        y = sampled(kernel, arrays, expected.shape, kernel.problem.numbers)
        assert (np.abs(y.astype(np.float64) - expected) <= bound).all()


def table() -> Iterator[Any]:
    """Types and blocks in turn; one of them in emulation."""
    for turn, block in enumerate(BLOCKS):
        for operator in ("sddmm", "linear_grad"):
            dtype = ("float32", "float16", "bfloat16", "float64")[(turn + turn // 4) % 4]
            yield pytest.param(GPU, operator, block, dtype, marks=pytest.mark.gpu, id=f"gpu-{operator}-{block}-{dtype}")
    yield pytest.param(EMULATION, "linear_grad", (8, 8), "float16", id="emulation")


@pytest.mark.parametrize(("place", "operator", "block", "dtype"), list(table()), indirect=["place"])
def test_products(
    operator: str, block: Any, dtype: str, place: Place, compiler: None, rng: Any, tmp_path: Path
) -> None:
    """target="native", a check by execution, `verify` afterwards."""
    shape = (600, 500) if place.real else (24, 40)
    weight = make_weight("uniform", shape, block, "float32")
    kernel = bsrgen.compile(weight, operator, dtype=dtype, backend="cuda", target="native")
    m = kernel.artifact.manifest
    assert m.check is not None
    assert m.check.worst <= 1
    assert m.notes == ()
    judge(kernel, rng, (0, 1, 1000) if place.real else (40,))
    assert all(finding.ok for finding in verify(kernel.save(tmp_path / "saved"))[1])
    assert driver.gpus()


@pytest.mark.gpu
@pytest.mark.parametrize("place", [pytest.param(GPU)], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_attention(dtype: str, place: Place, rng: Any) -> None:
    kernel = attention.compile(1000, 64, RULE, dtype=dtype, backend="cuda", target="native")
    judge(kernel, rng, (1, 3))
    judge(attention.compile_softmax(1000, RULE, dtype=dtype, backend="cuda", target="native"), rng, (2,))
