"""Kernels of the matrix unit: on emulated tiles over hostile cases, through real compilers, and on AMX where it is."""

import ctypes
import mmap
import subprocess
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from emulation import AMX, HEADER, build_emulated, emulated
from programs import tool
from support import (
    CANARY,
    REPOSITORY,
    assert_right,
    build_plan,
    frame_is_intact,
    framed,
    make_weight,
    problem_of,
)

import bsrgen
from bsrgen import cost, tune
from bsrgen.backends.c import CPlan, candidates, emit, text
from bsrgen.backends.c.matrix_candidates import matrix_plans
from bsrgen.backends.c.products import PRODUCTS, matrix_product
from bsrgen.backends.c.tiles import MatrixTile
from bsrgen.build import COMPILE_FLAGS
from bsrgen.cover import cover
from bsrgen.errors import IncompatibleCPUError
from bsrgen.even import EvenPattern
from bsrgen.kernel import Kernel
from bsrgen.pattern import Pattern, Weight, random_weight
from bsrgen.problem import Problem
from bsrgen.targets import TARGETS, native

x86 = pytest.mark.skipif(native().family != "x86_64", reason=f"builds x86-64 code, this is {native().family}")
pytestmark = x86
TOKENS = (0, 1, 7, 15, 16, 17, 31, 33, 50, 64, 67)
BF16, INT8 = "bfloat16", "int8"
REDUCED = pytest.mark.parametrize("dtype", [BF16, INT8])


@dataclass(frozen=True)
class Case:
    """One kernel: a weight with an empty, a full and ragged block rows, and its tiles."""

    form: str
    dtype: str
    shape: tuple[int, int]
    blocksize: tuple[int, int]
    tiles: tuple[int, int]  # of tokens, of rows
    operator: str = "linear"
    copy_x: bool = False
    kind: str = ""
    epilogue: tuple[str, ...] = ()
    ahead: int = 2
    covered: tuple[int, int] | None = None

    def __str__(self) -> str:
        (R, C), (t, v) = self.blocksize, self.tiles
        words = [self.operator, self.dtype, f"{R}x{C}", self.form, f"{t}x{v}", self.kind, *self.epilogue]
        return "-".join(filter(None, [*words, "copy" * self.copy_x, f"as{self.covered}" * bool(self.covered)]))

    @cached_property
    def weight(self) -> Weight:
        """The values."""
        if self.kind:
            return make_weight(self.kind, self.shape, self.blocksize, self.dtype)
        full = random_weight(3, self.shape, self.blocksize, 1.0, dtype=self.dtype)
        p = full.pattern
        stored = np.random.default_rng(5).random((p.block_rows, p.block_cols)) < 0.3
        stored[0], stored[-1, -1] = True, True
        stored[p.block_rows // 2 : -1] &= p.block_rows < 3
        flat = stored.reshape(-1)
        indptr = np.concatenate(([0], np.cumsum(stored.sum(1))))
        return Weight(Pattern(self.shape, self.blocksize, indptr, p.indices[flat]), full.data[flat])

    @cached_property
    def plan(self) -> CPlan:
        """The plan, for a machine that has the unit."""
        problem = problem_of(self.weight, self.operator, self.epilogue)
        return plan_of(problem, self.form, self.tiles, self.copy_x, self.ahead, self.covered)


def plan_of(problem: Problem, form, tiles, copy_x=False, ahead=2, covered=None) -> CPlan:
    """A plan of the matrix unit with short chunks."""
    tile = MatrixTile(form, *tiles, chunk=2, ahead=ahead, copy_x=copy_x)
    other = covered and cover(problem.pattern, covered)
    return CPlan(problem, AMX, None, None, cover=other, product=matrix_product(problem, AMX), matrix=tile)


CASES = (
    Case("direct", BF16, (96, 128), (32, 32), (2, 2)),
    Case("direct", BF16, (60, 100), (16, 32), (3, 1), copy_x=True),
    Case("direct", BF16, (96, 96), (48, 48), (2, 2)),
    Case("direct", BF16, (128, 64), (64, 32), (1, 4), epilogue=("bias", "residual", "clamp")),
    Case("direct", BF16, (45, 70), (8, 16), (4, 1)),
    Case("direct", BF16, (50, 66), (20, 6), (2, 2)),
    Case("direct", INT8, (96, 128), (32, 64), (2, 2), copy_x=True),
    Case("direct", INT8, (70, 90), (16, 16), (5, 1)),
    Case("direct", INT8, (80, 256), (80, 128), (1, 5)),
    Case("direct", INT8, (33, 35), (1, 4), (2, 1)),
    Case("direct", BF16, (64, 64), (16, 16), (4, 1), kind="one"),
    Case("direct", BF16, (64, 64), (16, 16), (4, 1), kind="empty"),
    Case("joined", BF16, (64, 64), (16, 16), (4, 1), ahead=1),
    Case("joined", BF16, (96, 100), (16, 8), (4, 1), covered=(32, 8)),
    Case("joined", BF16, (100, 96), (48, 16), (2, 2)),
    Case("joined", INT8, (96, 128), (32, 32), (2, 2), epilogue=("bias", "gelu")),
    Case("joined", INT8, (60, 64), (20, 16), (1, 2), kind="powerlaw"),
    Case("joined", INT8, (70, 90), (8, 16), (3, 1), kind="empty"),
    Case("gathered", BF16, (96, 128), (32, 1), (2, 2), epilogue=("bias", "accumulate")),
    Case("gathered", BF16, (64, 100), (16, 1), (4, 1), "spmm", ahead=1),
    Case("gathered", BF16, (128, 90), (64, 1), (2, 2), ahead=3),
    Case("gathered", BF16, (30, 70), (1, 3), (2, 1)),
    Case("gathered", BF16, (61, 67), (4, 4), (2, 1), "spmm", epilogue=("bias", "relu")),
    Case("gathered", BF16, (50, 61), (4, 1), (2, 2), covered=(24, 2)),
    Case("gathered", BF16, (90, 61), (40, 3), (2, 2), "spmm"),
    Case("gathered", BF16, (64, 64), (32, 1), (2, 2), kind="one"),
    Case("gathered", BF16, (64, 64), (32, 1), (2, 2), "spmm", kind="empty"),
    Case("gathered", INT8, (96, 128), (32, 1), (2, 2), "spmm"),
    Case("gathered", INT8, (64, 300), (16, 1), (4, 1)),
    Case("gathered", INT8, (64, 150), (64, 1), (2, 2)),
    Case("gathered", INT8, (64, 128), (8, 8), (4, 1), "spmm", kind="powerlaw"),
    Case("gathered", INT8, (61, 67), (4, 4), (2, 1), epilogue=("bias", "silu")),
    Case("gathered", INT8, (90, 61), (40, 12), (2, 2)),
    Case("gathered", INT8, (64, 64), (1, 1), (2, 1), "spmm"),
    Case("panel", BF16, (96, 100), (32, 32), (2, 2), "spmm"),
    Case("panel", BF16, (100, 70), (48, 6), (2, 2)),
    Case("panel", INT8, (64, 64), (16, 16), (4, 1)),
    Case("panel", INT8, (100, 130), (32, 64), (2, 2), "spmm"),
)  # fmt: skip


def guarded(a: np.ndarray) -> tuple[np.ndarray, mmap.mmap]:
    """A copy of `a` that ends where a page without access begins: a read behind it faults."""
    size = -(-max(a.nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, size + mmap.PAGESIZE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(base + size), mmap.PAGESIZE, 0) == 0
    out = np.frombuffer(area, np.uint8, a.nbytes, size - a.nbytes).view(a.dtype).reshape(a.shape)
    out[...] = a
    return out, area


def at_the_end(x: np.ndarray, more: int) -> tuple[np.ndarray, mmap.mmap]:
    """`x` with rows `more` elements longer that hold poison; its last element is the last of its pages."""
    poison = np.array(113 if x.dtype == np.int8 else np.nan).astype(x.dtype)
    wide = np.full((x.shape[0], x.shape[1] + more), poison, x.dtype)
    wide[:, : x.shape[1]] = x
    flat, area = guarded(wide.reshape(-1)[: wide.size - more] if wide.size else wide.reshape(-1))
    strides = (wide.strides[0], x.itemsize)
    return np.lib.stride_tricks.as_strided(flat, x.shape, strides), area


def check(kernel: Kernel, problem: Problem, weight: Weight, n: int, more: int, rng: np.random.Generator) -> None:
    """One call whose X must not be read past, and whose Y must not be written past."""
    x, given = problem.sample(rng, n)
    old = problem.sample_out(rng, n)
    x_view, _area = at_the_end(x, more if min(x.shape) else 0)
    fill = 77 if old.dtype == np.int8 else CANARY
    out = framed(old, fill=fill)
    y = kernel(x_view, out=out, **given)
    assert_right(problem, weight, y, x, given, old)
    assert frame_is_intact(out, np.array(fill).astype(old.dtype))
    del x_view


# ── emulated ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated_kernel(case: Case, rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right for all N, partitions alike to the bit, values packed alike by C and numpy, products as counted."""
    monkeypatch.setattr(text, "FLOP_PER_PART", 1)
    plan, weight, problem = case.plan, case.weight, case.plan.problem
    kernel = build_emulated(replace(plan, target=emulated()), weight, tmp_path / "kernel")
    for n in TOKENS:
        check(kernel, problem, weight, n, n % 3, rng)
    x, given = problem.sample(rng, 200)
    old, before = problem.sample_out(rng, 200), counters(kernel)
    y = kernel(x, out=old.copy(), **given)
    done = counters(kernel) - before
    assert_right(problem, weight, y, x, given, old)
    assert done[0] == plan.counts(200).vector_fma
    for threads in (2, 3):
        np.testing.assert_array_equal(kernel(x, out=old.copy(), threads=threads, **given), y)
    new = weight.data[::-1].copy() if case.kind != "one" else weight.data * 2
    assert bytes(kernel.packed(weight.data, 0)) == plan.packing.pack(weight.data).tobytes()
    assert bytes(kernel.packed(new, 0)) == plan.packing.pack(new).tobytes()


def counters(kernel: Kernel) -> np.ndarray:
    """Products, tile loads, tile stores, configurations and permissions so far, of the emulation in the library."""
    library = ctypes.CDLL(str(kernel.artifact.library))
    return np.array((ctypes.c_int64 * 5).in_dll(library, "amx_count"))


@pytest.mark.parametrize(
    ("form", "blocksize", "tiles"),
    [("direct", (16, 16), (4, 1)), ("joined", (16, 16), (4, 1)), ("panel", (16, 16), (2, 1)),
     ("gathered", (32, 1), (2, 2)), ("gathered", (12, 3), (2, 1))],
)  # fmt: skip
def test_absent_blocks_read_no_x(form, blocksize, tiles, rng: np.random.Generator, tmp_path: Path) -> None:
    """Inf and NaN reach the rows that store their features, and no others."""
    weight = random_weight(4, (64, 96), blocksize, 0.1, dtype=BF16)
    problem = problem_of(weight)
    plan = plan_of(problem, form, tiles)
    kernel = build_emulated(replace(plan, target=emulated()), weight, tmp_path / "kernel")
    x, _ = problem.sample(rng, 40)
    x[::3, 5], x[1::3, 50], x[:, 90] = np.nan, np.inf, -np.inf
    assert not plan.zero_filled
    assert_right(problem, weight, kernel(x), x)


@pytest.mark.parametrize(("operator", "epilogue"), list(product(("linear", "spmm"), ((), ("bias", "relu")))))
@pytest.mark.parametrize(("x", "y", "quantize"), [(INT8, INT8, False), (INT8, BF16, False), ("float32", None, True)])
def test_types_of_int8(operator, epilogue, x, y, quantize, rng: np.random.Generator, tmp_path: Path) -> None:
    """Y of int8, and X that the kernel quantises."""
    if bool(epilogue) != quantize:
        pytest.skip("half of the pairs are enough")
    weight = random_weight(1, (61, 100), (16, 1), 0.3, dtype=INT8)
    problem = bsrgen.problem.as_problem(operator, weight.pattern, INT8, x, y, epilogue, quantize_x=quantize)
    kernel = build_emulated(replace(plan_of(problem, "gathered", (2, 1)), target=emulated()), weight, tmp_path / "k")
    for n in (1, 33, 67):
        check(kernel, problem, weight, n, n % 3, rng)


@pytest.mark.parametrize("operator", ["linear", "spmm"])
@pytest.mark.parametrize("form", ["direct", "gathered"])
def test_a_gate_and_what_it_gates(form, operator, rng: np.random.Generator, tmp_path: Path) -> None:
    if (form, operator) == ("direct", "spmm"):
        pytest.skip("X in columns is no operand A")
    weight = random_weight(1, (96, 100), (16, 32), 0.4, dtype=BF16)
    problem = problem_of(weight, operator, ("swiglu",))
    kernel = build_emulated(replace(plan_of(problem, form, (2, 1)), target=emulated()), weight, tmp_path / "kernel")
    for n in (1, 33, 67):
        x, given = problem.sample(rng, n)
        assert_right(problem, weight, kernel(x, **given), x, given)


@pytest.mark.parametrize(
    ("cc", "flags"),
    [("gcc", ("-march=x86-64",)), ("gcc", ("-march=x86-64-v4", "-mprefer-vector-width=512")),
     ("clang", ("-march=x86-64-v3",)), ("clang", native().flags)],
    ids=lambda v: v if isinstance(v, str) else v[0],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [BF16, INT8])
def test_other_compilers_and_vectors(cc, flags, dtype, rng, tmp_path, monkeypatch) -> None:
    case = next(case for case in CASES if (case.dtype, case.form) == (dtype, "gathered"))
    monkeypatch.setenv("BSRGEN_CC", tool(cc, "clang-19") if cc == "clang" else tool(cc))
    kernel = build_emulated(replace(case.plan, target=emulated(flags=flags)), case.weight, tmp_path / "kernel")
    check(kernel, case.plan.problem, case.weight, 45, 1, rng)


@REDUCED
def test_refused_permission(dtype, rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next level runs; where there is none, the error says what is missing."""
    weight = random_weight(0, (64, 96), (32, 1), 0.3, dtype=dtype)
    problem = problem_of(weight)
    plan = replace(plan_of(problem, "gathered", (2, 2)), target=emulated())
    lesser = next(iter(candidates(problem, TARGETS["x86-64"])))
    monkeypatch.setenv("BSRGEN_AMX_REFUSE", "1")
    kernel = build_emulated((plan, lesser), weight, tmp_path / "two")
    assert kernel.plan.target == "x86-64"
    check(kernel, problem, weight, 40, 2, rng)
    with pytest.raises(IncompatibleCPUError, match="lacks amx-permission"):
        build_emulated(plan, weight, tmp_path / "one")
    monkeypatch.delenv("BSRGEN_AMX_REFUSE")
    assert build_emulated((plan, lesser), weight, tmp_path / "granted").plan.target == AMX.name


# ── plans ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@REDUCED
@pytest.mark.parametrize("operator", ["linear", "spmm"])
@pytest.mark.parametrize("blocksize", [(64, 64), (16, 16), (8, 8), (32, 1), (4, 1), (1, 1), (200, 3)])
def test_candidates(dtype, operator, blocksize) -> None:
    """Few for each choice of blocks, the dense product among them, and told apart."""
    weight = random_weight(0, (200, 256), blocksize, 0.2, dtype=dtype)
    plans = list(matrix_plans(problem_of(weight, operator), AMX, reblock=True))
    assert any(plan.dense for plan in plans)
    assert len({str(plan.knobs()) for plan in plans}) == len(plans)
    sizes = [plan.stored.blocksize for plan in plans if not plan.dense]
    assert max(map(sizes.count, sizes)) <= 12
    assert all(operator == "linear" or not plan.matrix.x_first for plan in plans)
    assert all("matrix tiles" in str(plan) for plan in plans)


def test_no_matrix_plans_where_the_unit_does_not_serve() -> None:
    weight = random_weight(0, (64, 64), (16, 16), 0.3, dtype=BF16)
    for target, types in product(TARGETS.values(), ((BF16, None), (BF16, "float32"), ("float32", None))):
        problem = bsrgen.problem.as_problem("linear", weight.pattern, *types)
        found = [plan for plan in candidates(problem, target) if plan.matrix]
        assert bool(found) == (target is AMX and types == (BF16, None))


@REDUCED
@pytest.mark.parametrize("blocksize", [(32, 32), (16, 16), (32, 1), (8, 8)])
def test_predicted_times(dtype, blocksize) -> None:
    """The matrix unit wins on its target; more tokens and more blocks take longer; even patterns count alike."""

    def seconds(density: float, n: int) -> float:
        weight = random_weight(0, (768, 768), blocksize, density, dtype=dtype)
        best = tune.rank(list(candidates(problem_of(weight), AMX)), n)[0]
        assert best[1].matrix is not None or n == 1
        return best[0].seconds

    assert seconds(0.1, 128) < seconds(0.3, 128) < seconds(0.3, 512)
    weight = random_weight(0, (768, 768), blocksize, 0.2, dtype=dtype)
    even = EvenPattern((768, 768), blocksize, weight.pattern.nnzb)
    for plan in matrix_plans(problem_of(weight), AMX, reblock=False):
        other = replace(plan, problem=replace(plan.problem, pattern=even))
        for n in (1, 128):
            assert other.counts(n).cycles == pytest.approx(plan.counts(n).cycles, rel=0.15)
        assert "indices" not in vars(other.packing)


def test_dense_rates_are_those_of_the_types() -> None:
    """FLOP a cycle at many tokens: f32 below dot products, those below the matrix unit."""
    weight = random_weight(0, (64, 64), (16, 16), 0.3)

    def rate(target: str, *types: str, n: int = 4096) -> float:
        problem = bsrgen.problem.as_problem("linear", weight.pattern, *types)
        return cost.dense_flop_per_cycle(problem, TARGETS[target], n)

    v4, bf16, amx = "x86-64-v4", "x86-64-v4-bf16", "x86-64-v4-amx"
    assert rate(v4, "float32") == rate(v4, BF16) == rate(v4, "float16") == 2 * rate(v4, "float64")
    assert rate(v4, "float32") < rate(bf16, BF16) < rate(bf16, INT8) < rate(amx, INT8)
    assert rate(amx, BF16, "float32") == rate(amx, "float32") < rate(amx, BF16) < rate(amx, INT8)
    assert rate(amx, BF16, n=1) < rate(amx, BF16, n=8) < rate(amx, BF16, n=128) == rate(amx, BF16)


@REDUCED
def test_compile_adds_a_level_for_a_refused_permission(dtype, rng: np.random.Generator) -> None:
    weight = random_weight(0, (64, 96), (32, 1), 0.3, dtype=dtype)
    kernel = bsrgen.compile(weight, dtype=dtype, target="sapphirerapids")
    assert [level.target for level in kernel.artifact.manifest.levels] == ["x86-64-v4-amx", "x86-64-v4-bf16"]
    assert kernel.artifact.manifest.levels[0].knobs["matrix"]
    several = bsrgen.compile(weight, dtype=dtype, target=("x86-64-v4-amx", "x86-64"))
    assert [level.target for level in several.artifact.manifest.levels] == ["x86-64-v4-amx", "x86-64"]
    x, given = several.problem.sample(rng, 33)
    assert_right(several.problem, weight, several(x, **given), x, given)


# ── the real unit ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cc", ["gcc", "clang"])
@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_real_intrinsics_compile(case: Case, cc: str, tmp_path: Path) -> None:
    path = tool(cc, "clang-19") if cc == "clang" else tool(cc)
    source = emit((case.plan,), case.weight)
    for name, data in source.files.items():
        (tmp_path / name).write_bytes(data)
    for unit in source.units:
        command = [path, *COMPILE_FLAGS, *unit.flags, "-Werror", "-I.", "-S", unit.file]
        subprocess.run(command, cwd=tmp_path, check=True)
    assert any("tdpb" in text.read_text() for text in tmp_path.glob("*.s"))


@pytest.mark.isa("x86-64-v4-amx")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_real_unit(case: Case, rng: np.random.Generator, tmp_path: Path) -> None:
    kernel = build_plan(case.plan, case.weight, tmp_path / "kernel")
    for n in (*TOKENS, 200):
        check(kernel, case.plan.problem, case.weight, n, n % 3, rng)


# ── the emulation ────────────────────────────────────────────────────────────────────────────────────────────────────

PROGRAM = """
#include "bsrgen_amx.h"
int main(void)
{
    struct bsrgen_tiles tiles;
    memset(&tiles, 0, sizeof tiles);
    %s
    return 0;
}
"""
ALLOWED, ONE_TILE = "bsrgen_amx_allowed(); ", "bsrgen_amx_shape(&tiles, 0, 4, 64); "
MISTAKES = {
    "without the system's permission": "_tile_loadconfig(&tiles);",
    "not configured": f"{ALLOWED}{ONE_TILE}bsrgen_amx_begin(&tiles); _tile_zero(1);",
    "tile too large": f"{ALLOWED}bsrgen_amx_shape(&tiles, 0, 17, 64); bsrgen_amx_begin(&tiles);",
    "rows without bytes": f"{ALLOWED}bsrgen_amx_shape(&tiles, 0, 4, 0); bsrgen_amx_begin(&tiles);",
    "k of A and of B differ": f"{ALLOWED}for (int t = 0; t < 3; t++) bsrgen_amx_shape(&tiles, t, 4, 64); "
    "bsrgen_amx_begin(&tiles); _tile_dpbf16ps(0, 1, 2);",
    "is not configured": f"{ALLOWED}{ONE_TILE}bsrgen_amx_begin(&tiles); bsrgen_amx_end(); _tile_zero(0);",
}


@pytest.mark.parametrize("message", MISTAKES)
def test_emulation_is_strict(message: str, tmp_path: Path) -> None:
    (tmp_path / "t.c").write_text(PROGRAM % MISTAKES[message])
    flags = ["-D_GNU_SOURCE", f"-I{REPOSITORY / 'runtime'}", "-include", HEADER, tmp_path / "t.c", "-lm"]
    subprocess.run([tool("gcc"), *map(str, flags), "-o", str(tmp_path / "t")], check=True)
    result = subprocess.run([str(tmp_path / "t")], capture_output=True, text=True, check=False)
    assert result.returncode < 0
    assert message in result.stderr


def test_products_of_the_unit_are_tested() -> None:
    assert {row.dtype.name for row in PRODUCTS if row.tiles} == {case.dtype for case in CASES}
