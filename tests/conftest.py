"""What all tests share: one store for the whole session, the option for golden files, and skips with their reason."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bsrgen.targets import TARGETS, native, runs_here

ISA = {"sse2": "x86-64", "sse4.2": "x86-64-v2", "avx2": "x86-64-v3", "avx512": "x86-64-v4", "neon": "aarch64"}
ISA |= {row.removeprefix("x86-64-"): row for row in TARGETS if row.count("-") > 2}  # v4-bf16


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew instead of comparing")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("isa"):
        (level,) = mark.args
        row = TARGETS[ISA.get(level, level)]
        if not runs_here(row):
            lacks = ", ".join(f for f in row.requires if f not in native().requires) or row.family
            name = next(isa for isa, target in ISA.items() if target == row.name)
            pytest.skip(f"no {name}: this CPU lacks {lacks}")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The store of this session: all xdist workers and all child processes use it, and nobody's real one is touched."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "bsrgen-store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BSRGEN_CACHE_DIR", str(root))
        for name in ("BSRGEN_DISABLE_JIT", "BSRGEN_NUM_THREADS"):
            patch.delenv(name, raising=False)
        yield root


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(2026)


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))
