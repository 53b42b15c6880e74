"""mode="pit" on the matrix unit, which tests/c/amx_emulation.h stands for."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from emulation import AMX, build_emulated, emulated
from support import assert_right

import bsrgen
from bsrgen import tune
from bsrgen.backends.c import CPlan, candidates
from bsrgen.backends.c.features import MATRIX, FeaturesPlan
from bsrgen.dtypes import as_dtype
from bsrgen.operators import as_operator
from bsrgen.pattern import Weight
from bsrgen.pit import AXES
from bsrgen.pit_kernel import PitKernel
from bsrgen.pit_weight import pit_weight
from bsrgen.problem import as_problem
from bsrgen.targets import native

pytestmark = pytest.mark.skipif(native().family != "x86_64", reason=f"x86-64 code, this is {native().family}")
SHAPE = (104, 150)  # a strip and a rest; K of several parts
CASES = [
    ("linear", "features", "bfloat16", None),
    ("linear", "features", "int8", None),
    ("spmm", "features", "bfloat16", None),
    ("linear", "tokens", "bfloat16", None),
    ("linear", "outputs", "int8", (1, 16)),
    ("spmm", "experts", "int8", None),
]


def planned(operator: str, axis: str, dtype: str, mask: tuple[int, int] | None) -> tuple[CPlan, Weight]:
    """The model's best plan, panels of columns and parts as short as they may be."""
    rng = np.random.default_rng(0)
    W = rng.integers(-127, 128, SHAPE).astype(np.int8) if dtype == "int8" else rng.standard_normal(SHAPE, np.float32)
    W = np.stack([W[:48], W[48:96]]) if axis == "experts" else W
    weight, pit = pit_weight(W, as_dtype(dtype), AXES[axis], None, None, mask, as_operator(operator))
    problem = as_problem(operator, weight.pattern, dtype, n=64, pit=pit)
    plan = tune.rank(list(candidates(problem, AMX)), 64)[0][1]
    assert isinstance(plan, CPlan)
    assert plan.on_tiles
    return replace(plan, panel=32, part=16) if isinstance(plan, FeaturesPlan) else plan, weight


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_right_and_nothing_else_is_written(case, tmp_path: Path) -> None:
    plan, weight = planned(*case)
    kernel = PitKernel(
        build_emulated(replace(plan, target=emulated()), weight, tmp_path / "kernel").artifact, threads=1
    )
    rng = np.random.default_rng(1)
    for n in (0, 1, 5, 16, 33, 131):
        x, given = plan.problem.sample(rng, n)
        old = plan.problem.sample_out(rng, n)
        y = kernel(x, out=old.copy(), **given)
        assert_right(plan.problem, weight, y, x, given, old)
        assert kernel(x, out=old.copy(), threads=3, **given).tobytes() == y.tobytes()
        for tile in kernel.tiles:
            x = np.where(rng.random(x.shape) < 0.5, x, x.dtype.type(0))  # fewer and fewer words
            y = kernel(x, **given | {"tile": tile})
            assert_right(plan.problem, weight, y, x, given)


def test_rates_and_levels() -> None:
    """Tiles of the matrix unit are the cheapest for each word; a level without it is there for where it is refused."""
    plan, _ = planned("linear", "features", "bfloat16", None)
    assert isinstance(plan, FeaturesPlan)
    assert plan.tiles[-1] == MATRIX
    words = [word for word, _ in plan.rates]
    assert words == sorted(words, reverse=True)
    slower = replace(plan, target=replace(AMX, product_cycles_least=64.0))
    assert slower.rates[0][0] < plan.rates[0][0]
    assert plan.counts(128).cycles < slower.counts(128).cycles
    kernel = bsrgen.compile(np.ones(SHAPE, np.float32), mode="pit", axis="tokens", dtype="bfloat16", target=AMX.name)
    assert [level.target for level in kernel.artifact.manifest.levels] == [AMX.name, "x86-64-v4-bf16"]
