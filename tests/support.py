"""Judging kernels: the float64 reference and its bound, arrays in hostile places, plans built one by one."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bsrgen
from bsrgen import build, package
from bsrgen.artifact import read_artifact, write_manifest
from bsrgen.backends import BACKENDS
from bsrgen.dtypes import DTYPES, PAIRS
from bsrgen.kernel import Kernel
from bsrgen.operators import OPERATORS
from bsrgen.pattern import Pattern, Weight, random_weight
from bsrgen.plan import Plan
from bsrgen.problem import Problem, as_problem
from bsrgen.targets import TARGETS, native

Array = np.ndarray[Any, Any]
REPOSITORY = Path(bsrgen.__file__).parents[1]
OPERATOR_NAMES = tuple(OPERATORS)
DTYPE_NAMES = tuple(name for name, row in DTYPES.items() if row.real == name)  # kernels of one type
REDUCED = tuple((w, x, y) for (w, x), outs in PAIRS.items() for y in outs if w not in DTYPE_NAMES)  # W, X, Y
CANARY = 1234.5


def _levels(names: Iterable[str]) -> tuple[Any, ...]:
    """Rows of this architecture; what this CPU cannot run is skipped with its reason."""
    rows = [TARGETS[name] for name in names if TARGETS[name].family == native().family]
    return tuple(pytest.param(row.name, marks=pytest.mark.isa(row.name), id=row.name) for row in rows)


WITH_DOTS = tuple(name for name, row in TARGETS.items() if {"avxvnni", "avx512vnni"} & set(row.requires))
LEVELS = _levels(name for name in TARGETS if name not in ("x86-64-v2", *WITH_DOTS))  # whose float32 and float64 differ
DOT_LEVELS = _levels(WITH_DOTS)


def problem_of(
    weight: Weight, operator: str = "linear", epilogue: Any = (), dtype: Any = None, x: Any = None, y: Any = None
) -> Problem:
    """The problem that `compile` makes of the same arguments; x, y: x_dtype, out_dtype."""
    return as_problem(operator, weight.pattern, dtype or weight.data.dtype, x, y, epilogue)


def assert_right(problem: Problem, weight: Weight, y: Array, x: Array, given: Any = None, out: Any = None) -> None:
    """y is the float64 reference within its bound, and Inf and NaN where the reference has them."""
    with np.errstate(all="ignore"):
        expected, bound = problem.reference(weight, np.asarray(x), given, out)
        assert y.shape == expected.shape
        finite, y = np.isfinite(expected), np.asarray(y, np.float64)
        np.testing.assert_array_equal(np.where(finite, 0, y), np.where(finite, 0, expected))
        error = np.where(finite, np.abs(y - expected), 0)
        wrong = ~(error <= np.where(finite, bound, 1))
    if wrong.any():
        at = tuple(int(i[0]) for i in wrong.nonzero())
        pytest.fail(
            f"{problem}: {wrong.sum()} of {y.size} results are out of bounds, the first at {at}: "
            f"{y[at]!r}, expected {expected[at]!r} +- {bound[at]:.3g}"
        )


def framed(inner: Array, before: tuple[int, int] = (1, 3), after: tuple[int, int] = (2, 5), fill: float = np.nan):
    """A view with the values of the matrix `inner`, in the middle of an array of `fill`; see `frame_is_intact`."""
    rows, cols = inner.shape
    outer = np.full((before[0] + rows + after[0], before[1] + cols + after[1]), _filling(fill, inner.dtype))
    view = outer[before[0] : before[0] + rows, before[1] : before[1] + cols]
    view[...] = inner
    return view


def _filling(fill: float, dtype: Any) -> Any:
    """`fill` in that dtype; integers have no NaN, one byte has not much else."""
    return np.array(-101 if dtype.kind == "i" else fill if dtype.itemsize > 1 or fill != fill else fill / 8, dtype)


def frame_is_intact(view: Array, fill: float = CANARY) -> bool:
    """Whether everything around a view made by `framed` still is `fill`."""
    outer, hole = view.base, np.zeros(view.base.shape, bool)
    at = (view.ctypes.data - outer.ctypes.data) // outer.itemsize
    row, col = divmod(at, outer.shape[1])
    hole[row : row + view.shape[0], col : col + view.shape[1]] = True
    return bool((outer[~hole] == _filling(fill, view.dtype)).all())


def check_calls(kernel: Kernel, problem: Problem, weight: Weight, rng: np.random.Generator, tokens: Any) -> None:
    """Call `kernel` with each N of `tokens`, plainly and inside frames of NaN; nothing outside of out may change."""
    for n in tokens:
        x, given = problem.sample(rng, n)
        old = problem.sample_out(rng, n)
        plain = kernel(x, out=old.copy(), **given)
        assert_right(problem, weight, plain, x, given, old)
        out = framed(old, fill=CANARY)
        assert kernel(framed(x), out=out, **given) is out
        np.testing.assert_array_equal(out, plain)
        assert frame_is_intact(out)


def build_plan(plan: Plan, weight: Weight, folder: Path) -> Kernel:
    """Print, compile and load one plan, past the store and the check of `compile`."""
    compiler = build.find_compiler(plan.target)
    source = BACKENDS[plan.backend].emit((plan,), weight)
    build.build(source, folder, compiler)
    write_manifest(folder, package.describe(source, weight, compiler, (), folder, {}))
    return Kernel(read_artifact(folder), threads=1)


def single(shape: tuple[int, int], blocksize: tuple[int, int], dtype: str = "float32", value: float = 1.5) -> Weight:
    """A weight with one stored block, the last one."""
    empty = random_weight(0, shape, blocksize, 0, dtype=dtype).pattern
    indptr = np.append(np.zeros(empty.block_rows, np.int64), 1)
    weight = Weight(
        Pattern(shape, blocksize, indptr, np.array([empty.block_cols - 1])), np.full((1, *blocksize), value, dtype)
    )
    data = weight.data.copy()
    data[:, shape[0] - (empty.block_rows - 1) * blocksize[0] :, :] = 0
    data[:, :, shape[1] - (empty.block_cols - 1) * blocksize[1] :] = 0
    return Weight(weight.pattern, data)


def make_weight(kind: str, shape: tuple[int, int], blocksize: tuple[int, int], dtype: str, seed: int = 0) -> Weight:
    """A weight of one of the kinds of issue 2: uniform, banded, powerlaw, empty, full, one."""
    if kind == "one":
        return single(shape, blocksize, dtype)
    density = {"empty": 0.0, "full": 1.0}.get(kind, 0.35)
    kind = kind if kind in ("banded", "powerlaw") else "uniform"
    return random_weight(seed, shape, blocksize, density, kind=kind, dtype=dtype)


def reduced_case(types: tuple[str, str, str]) -> tuple[Problem, Weight]:
    """A small problem of types of REDUCED, the operators in turn, and a weight of the first of them."""
    w, x, y = types
    weight = random_weight(1, (41, 52), (4, 3), 0.4)
    data = np.rint(weight.data * 40) if w == "int8" else weight.data
    weight = Weight(weight.pattern, data.astype(DTYPES[w].numpy))
    return problem_of(weight, OPERATOR_NAMES[REDUCED.index(types) % 2], (), w, x, y), weight


def run_python(script: str, *arguments: str, timeout_s: float = 120, **environment: str) -> str:
    """Run `script` in a fresh interpreter that can import bsrgen and this file; its stdout.  A signal is a failure."""
    paths = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False,
        env=os.environ | {"PYTHONPATH": paths} | environment,
    )  # fmt: skip
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def c_pack(kernel: Kernel):
    """The library's own packing: (data or None, level) -> packed values, or the bytes of them."""
    function = ctypes.CDLL(str(kernel.artifact.library))[f"{kernel.name}_pack"]
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int], ctypes.c_int64

    def pack(data, level: int):
        count = function(None, None, level)
        if data is None:
            return count
        packed = np.full(count + 64, 7, np.uint8)  # what lies behind must stay
        assert function(data.ctypes.data, packed.ctypes.data, level) == count
        assert (packed[count:] == 7).all()
        return packed[:count]

    return pack
