"""The AMX micro-kernels on emulated tiles against numpy in float64, over the hostile cases."""

import ctypes
import mmap
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import build
from packing import BF16, INT8, Direct, Gather

from bsrgen.dtypes import bound_factor
from bsrgen.pattern import Pattern, Weight, random_weight

TYPES = {"bfloat16": ml_dtypes.bfloat16, "int8": np.int8}
POISON = {"bfloat16": np.float32(np.nan), "int8": 113}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("amx")


def values(rng: np.random.Generator, shape: tuple[int, ...], element: Any) -> np.ndarray:
    if element is INT8:
        return rng.integers(-127, 128, shape).astype(np.int8)
    return rng.standard_normal(shape).astype(np.float32).astype(ml_dtypes.bfloat16)


def guarded(a: np.ndarray, before: int = 0) -> tuple[np.ndarray, mmap.mmap]:
    """A copy of `a` that ends where a page without access begins: a read behind it faults."""
    page = mmap.PAGESIZE
    bytes_ = -(-(a.nbytes + before) // page) * page
    area = mmap.mmap(-1, bytes_ + page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None)
    assert libc.mprotect(ctypes.c_void_p(base + bytes_), page, 0) == 0
    out = np.frombuffer(area, a.dtype, a.size, bytes_ - a.nbytes).reshape(a.shape)
    out[...] = a
    return out, area


def aligned(a: np.ndarray) -> np.ndarray:
    area = np.zeros(a.nbytes + 128, np.uint8)
    at = -area.ctypes.data % 64
    out = area[at : at + a.nbytes].view(a.dtype)
    out[...] = a.reshape(-1)
    return out


def run(lib: ctypes.CDLL, plan: Any, data: np.ndarray, x: np.ndarray, n: int, pad: int = 0, parts: int = 1) -> np.ndarray:
    """Y of x, [n, K] or [K, n]; `pad` more elements per row hold poison, and so does what Y must not touch."""
    linear = plan.view()["linear"]
    p = plan.pattern
    wide = np.full((x.shape[0], x.shape[1] + pad), POISON[plan.element.name], x.dtype)
    wide[:, : x.shape[1]] = x
    flat = wide.reshape(-1)
    flat, area = guarded(flat[: flat.size - pad] if flat.size else flat)  # the last row ends with its last element
    shape = (n, p.M) if linear else (p.M, n)
    y = np.full((shape[0] + 1, shape[1] + 3), -7.5, np.float32)
    packed, pointers, offsets = aligned(plan.pack(data)), plan.pointers, plan.offsets
    units = -(-n // (16 * plan.token_tiles))
    void, i64 = ctypes.c_void_p, ctypes.c_int64
    lib.run.argtypes = [i64, void, i64, void, i64, void, void, void, i64, i64, i64, i64]
    cuts = [p.block_rows * q // parts for q in range(parts + 1)]
    unit_cuts = [0, units] if parts == 1 else [0, units // 2, units]
    for u0, u1 in zip(unit_cuts, unit_cuts[1:]):
        for i0, i1 in zip(cuts, cuts[1:]):
            status = lib.run(n, flat.ctypes.data, wide.shape[1], y.ctypes.data, y.shape[1], packed.ctypes.data,
                             pointers.ctypes.data, offsets.ctypes.data, u0, u1, i0, i1)  # fmt: skip
            assert status == 0
    assert (y[shape[0] :] == -7.5).all() and (y[:, shape[1] :] == -7.5).all(), "written outside of Y"
    del flat
    return y[: shape[0], : shape[1]]


def judge(plan: Any, data: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    p, linear = plan.pattern, plan.view()["linear"]
    dense = np.zeros((p.block_rows, p.R, p.block_cols, p.C))
    dense[p.rows, :, p.indices, :] = data.astype(np.float64)
    W = dense.reshape(p.block_rows * p.R, -1)[: p.M, : p.K]
    X = x.astype(np.float64).T if linear else x.astype(np.float64)
    want = W @ X
    y = y.T if linear else y
    if plan.element is INT8:
        assert np.array_equal(y, want.astype(np.float32))
        return
    k = np.repeat(p.row_counts * p.C, p.R)[: p.M]
    bound = bound_factor(k + 2.0, 2.0**-24)[:, None] * (abs(W) @ abs(X))
    assert (abs(y - want) <= bound).all(), float(np.max(abs(y - want) / np.maximum(bound, 1e-300)))


def check(lib: ctypes.CDLL, plan: Any, weight: Weight, rng: np.random.Generator, n: int, **options: Any) -> None:
    data = values(rng, weight.data.shape, plan.element)
    p = plan.pattern
    data[p.rows == p.block_rows - 1, p.M - (p.block_rows - 1) * p.R :] = 0
    data[p.indices == p.block_cols - 1, :, p.K - (p.block_cols - 1) * p.C :] = 0
    x = values(rng, (n, p.K) if plan.view()["linear"] else (p.K, n), plan.element)
    judge(plan, data, x, run(lib, plan, data, x, n, **options))


def patterns(shape: tuple[int, int], blocksize: tuple[int, int]) -> dict[str, Weight]:
    full = random_weight(3, shape, blocksize, 1.0)
    rows, cols = full.pattern.block_rows, full.pattern.block_cols
    ptr = np.zeros(rows + 1, np.int64)
    ptr[rows // 2 + 1 :] = 1
    one = Pattern(shape, blocksize, ptr, np.array([cols - 1], np.int32))
    empty = Pattern(shape, blocksize, np.zeros(rows + 1, np.int64), np.zeros(0, np.int32))
    made = {"one": one, "empty": empty}
    weights = {name: Weight(p, np.zeros((p.nnzb, *blocksize), np.float32)) for name, p in made.items()}
    return {
        "random": random_weight(5, shape, blocksize, 0.3), "rows": random_weight(6, shape, blocksize, 0.15, kind="powerlaw"),
        "full": full, **weights,
    }  # fmt: skip


NS = (0, 1, 7, 15, 16, 17, 31, 33, 50, 64, 77)

DIRECT = [  # shape, blocksize, element, token tiles, row tiles
    ((96, 128), (32, 32), BF16, 2, 2), ((64, 64), (16, 16), BF16, 4, 1), ((128, 128), (64, 64), BF16, 2, 2),
    ((60, 100), (16, 32), BF16, 3, 1), ((96, 96), (48, 48), BF16, 2, 2), ((128, 64), (64, 32), BF16, 1, 4),
    ((45, 70), (8, 16), BF16, 4, 1), ((50, 66), (20, 6), BF16, 2, 2), ((96, 128), (32, 64), INT8, 2, 2),
    ((64, 64), (16, 32), INT8, 4, 1), ((128, 128), (64, 64), INT8, 2, 2), ((70, 90), (16, 16), INT8, 5, 1),
    ((64, 64), (16, 16), BF16, 4, 1, "joined"), ((96, 100), (16, 8), BF16, 4, 1, "joined"), ((100, 96), (48, 16), BF16, 2, 2, "joined"),
    ((96, 128), (32, 32), INT8, 2, 2, "joined"), ((70, 90), (8, 16), INT8, 3, 1, "joined"), ((60, 64), (20, 16), INT8, 1, 2, "joined"),
    ((45, 50), (5, 12), INT8, 5, 1), ((80, 256), (80, 128), INT8, 1, 5), ((33, 35), (1, 4), INT8, 2, 1),
]  # fmt: skip
GATHER = [  # shape, blocksize, element, token tiles, row tiles, gathers
    ((96, 128), (32, 1), BF16, 2, 2, True), ((64, 100), (16, 1), BF16, 2, 1, True), ((64, 100), (16, 1), BF16, 4, 1, True),
    ((128, 90), (64, 1), BF16, 2, 2, True), ((30, 70), (4, 1), BF16, 4, 1, True), ((30, 70), (1, 3), BF16, 2, 1, True),
    ((64, 128), (8, 8), BF16, 4, 1, True), ((61, 67), (4, 4), BF16, 2, 1, True), ((50, 61), (24, 2), BF16, 2, 2, True),
    ((90, 61), (40, 3), BF16, 2, 2, True), ((64, 64), (16, 16), BF16, 2, 1, True), ((64, 80), (16, 16), BF16, 4, 1, False),
    ((96, 100), (32, 32), BF16, 2, 2, False), ((100, 70), (48, 6), BF16, 2, 2, False), ((96, 128), (32, 1), INT8, 2, 2, True),
    ((64, 300), (16, 1), INT8, 4, 1, True), ((64, 150), (64, 1), INT8, 2, 2, True), ((30, 70), (4, 2), INT8, 2, 1, True),
    ((64, 128), (8, 8), INT8, 4, 1, True), ((61, 67), (4, 4), INT8, 2, 1, True), ((90, 61), (40, 12), INT8, 2, 2, True),
    ((64, 64), (16, 16), INT8, 4, 1, False), ((100, 130), (32, 64), INT8, 2, 2, False), ((64, 64), (1, 1), INT8, 2, 1, True),
]  # fmt: skip


def direct_plan(case: Any, weight: Weight) -> Direct:
    return Direct(weight.pattern, case[2], case[3], case[4], chunk=2, gathers=len(case) > 5)


def gather_plan(case: Any, weight: Weight, linear: bool, **options: Any) -> Gather:
    return Gather(weight.pattern, case[2], linear, case[3], case[4], gathers=case[5], chunk=2, **options)


def label(case: Any) -> str:
    return f"{case[1][0]}x{case[1][1]}-{case[2].name}-{case[3]}x{case[4]}{'-whole' if case[-1] is False else '-joined' if case[-1] == 'joined' else ''}"


@pytest.mark.parametrize("kind", ["random", "rows", "full", "one", "empty"])
@pytest.mark.parametrize("case", DIRECT, ids=label)
def test_direct(case: Any, kind: str, folder: Path) -> None:
    weight = patterns(case[0], case[1])[kind]
    plan = direct_plan(case, weight)
    for copy in (False, True):
        plan = replace(plan, copy_x=copy)
        lib = build.emulated(plan, folder)
        rng = np.random.default_rng(9)
        for n in NS:
            check(lib, plan, weight, rng, n, pad=n % 3)
        check(lib, plan, weight, rng, 130, parts=2)


@pytest.mark.parametrize("kind", ["random", "rows", "full", "one", "empty"])
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "spmm"])
@pytest.mark.parametrize("case", GATHER, ids=label)
def test_gather(case: Any, linear: bool, kind: str, folder: Path) -> None:
    weight = patterns(case[0], case[1])[kind]
    plan = gather_plan(case, weight, linear)
    lib = build.emulated(plan, folder)
    rng = np.random.default_rng(9)
    for n in NS:
        check(lib, plan, weight, rng, n, pad=n % 3)
    check(lib, plan, weight, rng, 200, parts=3)


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("blocksize", [(32, 1), (80, 2)])
def test_look_ahead(ahead: int, blocksize: tuple[int, int], folder: Path) -> None:
    weight = random_weight(8, (160, 200), blocksize, 0.4)
    plan = Gather(weight.pattern, BF16, ahead=ahead)
    check(build.emulated(plan, folder), plan, weight, np.random.default_rng(1), 70)


@pytest.mark.parametrize("element", [BF16, INT8], ids=lambda e: e.name)
@pytest.mark.parametrize("blocksize", [(32, 1), (8, 8), (16, 16), (12, 3)])
def test_padding_reads_no_x(element: Any, blocksize: tuple[int, int], folder: Path) -> None:
    """NaN in features that no stored block holds stays out of every sum."""
    weight = random_weight(4, (64, 96), blocksize, 0.1)
    p = weight.pattern
    held = np.zeros(p.block_cols * p.C, bool)
    held[(p.indices[:, None] * p.C + np.arange(p.C)).ravel()] = True
    rng = np.random.default_rng(0)
    data, x = values(rng, weight.data.shape, element), values(rng, (40, p.K), element)
    clean = x.copy()
    clean[:, ~held[: p.K]] = 0
    x[:, ~held[: p.K]] = POISON[element.name]
    plans: list[Any] = [Gather(p, element, token_tiles=2)]
    if blocksize == (16, 16):
        plans += [Direct(p, element, 4, 1), Direct(p, element, 4, 1, gathers=True), Gather(p, element, gathers=False)]
    for plan in plans:
        judge(plan, data, clean, run(build.emulated(plan, folder), plan, data, x, 40))


def counters(lib: ctypes.CDLL) -> tuple[int, ...]:
    """Products, tile loads, tile stores, configurations, permissions since the last time."""
    out = (ctypes.c_int64 * 5)()
    lib.count(out)
    return tuple(out)


@pytest.mark.parametrize("element", [BF16, INT8], ids=lambda e: e.name)
@pytest.mark.parametrize("blocksize", [(32, 1), (64, 1), (8, 8), (16, 16), (4, 4)])
def test_products_are_as_counted(element: Any, blocksize: tuple[int, int], folder: Path) -> None:
    """Products and tile loads of a call of 128 tokens: what proto/cost.py counts."""
    weight = random_weight(3, (128, 256), blocksize, 0.3)
    p, rng = weight.pattern, np.random.default_rng(0)
    plans: list[Any] = [Gather(p, element, token_tiles=2), Gather(p, element, token_tiles=4, row_tiles=1)]
    if blocksize == (16, 16):
        plans += [Direct(p, element, 4, 1), Direct(p, element, 4, 1, gathers=True), Gather(p, element, gathers=False)]
    for plan in plans:
        lib = build.emulated(plan, folder)
        counters(lib)
        data, x = values(rng, weight.data.shape, element), values(rng, (128, p.K), element)
        run(lib, plan, data, x, 128)
        dots, loads, stores, *_ = counters(lib)
        units, T = 128 // (16 * plan.token_tiles), plan.token_tiles
        steps = int(plan.steps.sum()) * (p.C // plan.k_tile if isinstance(plan, Direct) and not plan.gathers else 1)
        tiles = -(-p.R // 16)
        ops = [op["what"] for q in plan.passes for op in q["ops"]] if isinstance(plan, Gather) else None
        assert dots == steps * units * tiles * T
        assert stores == p.block_rows * units * tiles * T
        if ops:
            assert loads == steps * units * sum(what != "dot" for what in ops)
        else:
            assert loads == steps * units * sum(T + q["tiles"] for q in plan.passes)


def test_same_bits_for_any_partition(folder: Path) -> None:
    weight = random_weight(8, (160, 200), (32, 1), 0.4)
    plan = Gather(weight.pattern, BF16)
    lib, rng = build.emulated(plan, folder), np.random.default_rng(2)
    data, x = values(rng, weight.data.shape, BF16), values(rng, (130, 200), BF16)
    assert np.array_equal(run(lib, plan, data, x, 130), run(lib, plan, data, x, 130, parts=3))


def test_other_compilers_and_targets(folder: Path) -> None:
    """Without AVX-512, and by clang: the same text, and for int8 the same numbers."""
    rng = np.random.default_rng(3)
    for case in (GATHER[0], GATHER[14], GATHER[18]):
        weight = patterns(case[0], case[1])["random"]
        plan = gather_plan(case, weight, True)
        for cc, extra in (("gcc", ("-Wno-psabi",)), ("clang-19", ("-march=x86-64-v3", "-Wno-psabi")), ("gcc", ("-march=x86-64-v4",)), ("clang-19", ("-march=native",))):
            check(build.emulated(plan, folder, cc, extra), plan, weight, rng, 45)


def test_refused_permission(folder: Path) -> None:
    plan = gather_plan(GATHER[0], patterns(*GATHER[0][:2])["random"], True)
    build.emulated(plan, folder)
    lib = max(folder.glob("*.so"), key=os.path.getmtime)
    code = f"import ctypes; print(ctypes.CDLL('{lib}').run(0, None, 0, None, 0, None, None, None, 0, 0, 0, 0))"
    env = {**os.environ, "BSRGEN_AMX_REFUSE": "1"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "-1"


@pytest.mark.parametrize("cc", ["gcc", "clang-19"])
def test_real_intrinsics_compile(cc: str) -> None:
    for case in DIRECT:
        build.assembly(direct_plan(case, patterns(case[0], case[1])["random"]), cc)
    for case in GATHER:
        for linear in (True, False):
            build.assembly(gather_plan(case, patterns(case[0], case[1])["random"], linear), cc)


STRICT = """
#include "bsrgen_amx.h"
int main(void) {
    struct bsrgen_tiles tiles;
    memset(&tiles, 0, sizeof tiles);
    %s
    return 0;
}
"""
MISTAKES = {
    "without the system's permission": "_tile_loadconfig(&tiles);",
    "not configured": "bsrgen_amx_allowed(); bsrgen_amx_shape(&tiles, 0, 4, 64); bsrgen_amx_begin(&tiles); _tile_zero(1);",
    "tile too large": "bsrgen_amx_allowed(); bsrgen_amx_shape(&tiles, 0, 17, 64); bsrgen_amx_begin(&tiles);",
    "rows without bytes": "bsrgen_amx_allowed(); bsrgen_amx_shape(&tiles, 0, 4, 0); bsrgen_amx_begin(&tiles);",
    "k of A and of B differ": "bsrgen_amx_allowed(); for (int t = 0; t < 3; t++) bsrgen_amx_shape(&tiles, t, 4, 64);"
    " bsrgen_amx_begin(&tiles); _tile_dpbf16ps(0, 1, 2);",
    "is not configured": "bsrgen_amx_allowed(); bsrgen_amx_shape(&tiles, 0, 4, 64); bsrgen_amx_begin(&tiles); bsrgen_amx_end(); _tile_zero(0);",
}


@pytest.mark.parametrize("message", MISTAKES)
def test_emulation_is_strict(message: str, tmp_path: Path) -> None:
    (tmp_path / "t.c").write_text(STRICT % MISTAKES[message])
    root = build.ROOT
    subprocess.run(["gcc", "-D_GNU_SOURCE", f"-I{root}/runtime", "-include", f"{root}/tests/c/amx_emulation.h",
                    str(tmp_path / "t.c"), "-o", str(tmp_path / "t"), "-lm"], check=True)  # fmt: skip
    out = subprocess.run([tmp_path / "t"], capture_output=True, text=True)
    assert out.returncode < 0 and message in out.stderr
