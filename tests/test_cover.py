"""Covers: the same elements in other blocks, which of them are tried, and kernels that walk them."""

import itertools
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from programs import build_artifact
from support import (
    OPERATOR_NAMES,
    assert_right,
    build_plan,
    c_pack,
    check_calls,
    framed,
    make_weight,
    problem_of,
)
from test_cli import run

import bsrgen
from bsrgen.artifact import read_artifact, write_manifest
from bsrgen.backends.c import CPlan, candidates
from bsrgen.backends.c.covers import MOST, covers
from bsrgen.backends.c.plan import TokenTile, WeightTile
from bsrgen.cover import OUTSIDE, Cover, cover, full, inside
from bsrgen.kernel import Kernel
from bsrgen.pattern import Pattern, Weight, as_weight, random_weight
from bsrgen.plan import Plan
from bsrgen.targets import TARGETS, native
from bsrgen.verify import recover, verify

HERE = native()
F32 = HERE.lanes(4)
SIZES = ((1, 1), (1, 3), (2, 1), (3, 5), (4, 4), (5, 2), (8, 1), (6, 9), (7, 64), (64, 7), (80, 70))


def mask(p: Pattern) -> np.ndarray:
    """bool[M, K]: what the blocks of `p` hold of the matrix."""
    stored = np.zeros((p.block_rows, p.block_cols), bool)
    stored[p.rows, p.indices] = True
    return np.kron(stored, np.ones(p.blocksize, bool))[: p.M, : p.K]


def weights(own: tuple[int, int]) -> list[Weight]:
    """Shapes that the blocks do not divide; sparse, uneven, empty, and one block in the last corner."""
    kinds = ("uniform", "powerlaw", "empty", "one")
    return [make_weight(kind, shape, own, "float32") for shape in ((37, 41), (61, 30)) for kind in kinds]


# ── the cover ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make", [cover, full])
@pytest.mark.parametrize("own", SIZES, ids=str)
def test_move_keeps_every_element_and_fills_zeros(make, own):
    for weight, blocksize in itertools.product(weights(own), SIZES):
        c = make(weight.pattern, blocksize)
        assert c.blocks.blocksize == blocksize
        moved = c.move(weight.data)
        assert (moved.dtype, moved.shape) == (weight.data.dtype, (c.blocks.nnzb, *blocksize))
        np.testing.assert_array_equal(Weight(c.blocks, moved).todense(), weight.todense())
        held = mask(c.blocks)
        assert held[mask(weight.pattern)].all()
        assert c.fills == (held & ~mask(weight.pattern)).any()
        assert inside(c.blocks) == held.sum()


@pytest.mark.parametrize("own", SIZES, ids=str)
def test_cover_has_no_block_without_a_stored_element(own):
    for weight, (R, C) in itertools.product(weights(own), SIZES):
        c, held = cover(weight.pattern, (R, C)), mask(weight.pattern)
        for i, j in zip(c.blocks.rows, c.blocks.indices, strict=True):
            assert held[i * R : i * R + R, j * C : j * C + C].any()


def test_full_has_every_block():
    p = make_weight("uniform", (37, 41), (3, 5), "float32").pattern
    for blocksize in SIZES:
        blocks = full(p, blocksize).blocks
        assert blocks.nnzb == blocks.block_rows * blocks.block_cols
    nothing = random_weight(0, (0, 7), (2, 3), 0).pattern
    assert full(nothing, (4, 4)).blocks.nnzb == 0
    assert not full(nothing, (4, 4)).fills
    assert not full(make_weight("full", (36, 40), (3, 5), "float32").pattern, (12, 8)).fills


def test_pieces_outside_of_the_matrix_have_no_place():
    """7 rows in blocks of 5 and 8 columns in blocks of 6: 3 rows and 4 columns of the last block stick out."""
    weight = make_weight("full", (7, 8), (5, 6), "float32")
    c = cover(weight.pattern, (1, 4))
    assert c.piece == (1, 2)
    assert c.pieces == 15
    moves = c.moves.reshape(2, 2, 5, 3)  # block rows, block columns, rows and columns of pieces
    assert (moves[1, :, 2:] == OUTSIDE).all()
    assert (moves[:, 1, :, 1:] == OUTSIDE).all()
    kept = moves[moves != OUTSIDE]
    assert kept.size == 7 * 4
    assert np.unique(kept).size == kept.size
    np.testing.assert_array_equal(Weight(c.blocks, c.move(weight.data)).todense(), weight.todense())


def test_values_are_copied_bit_by_bit():
    weight = make_weight("one", (6, 6), (3, 2), "float64")
    bits = np.array([np.nan, -0.0, np.inf, 5e-324, -1.5, 0.0]).reshape(1, 3, 2)
    moved = full(weight.pattern, (2, 3)).move(bits)
    assert sorted(moved[moved.view(np.uint64) != 0].view(np.uint64)) == sorted(
        bits[bits.view(np.uint64) != 0].view(np.uint64)
    )


def test_equal_covers_are_equal():
    p = make_weight("uniform", (36, 40), (3, 5), "float32").pattern
    again = Pattern(p.shape, p.blocksize, p.indptr.copy(), p.indices.copy())
    assert cover(p, (6, 5)) == cover(again, (6, 5))
    assert hash(cover(p, (6, 5))) == hash(cover(again, (6, 5)))
    assert len({cover(p, (6, 5)), full(p, (6, 5)), cover(p, (9, 5)), Cover(p, p)}) == 4
    assert cover(p, (6, 5)) != p


# ── which are tried ──────────────────────────────────────────────────────────────────────────────────────────────────


def hidden(density: float = 0.1, shape=(256, 320)) -> Weight:
    """Dense 8x8 blocks around the diagonal, stored as 1x1."""
    return as_weight(random_weight(0, shape, (8, 8), density, kind="banded").todense(), blocksize=(1, 1))


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_hidden_blocks_are_found(operator):
    problem = problem_of(hidden(), operator)
    merged = {c.blocks.blocksize: c for c in covers(problem, HERE) if c.blocks.density < 1}
    assert (8, 8) in merged or (8, 4) in merged or (8, 2) in merged
    assert len(merged) <= MOST
    best = next(iter(merged.values()))
    assert not best.fills
    assert best.blocks.R >= 8
    plans = list(candidates(problem, HERE))
    assert {plan.pattern.blocksize for plan in plans} >= {(1, 1), *merged}
    assert any(plan.cover and not plan.zero_filled for plan in plans), "strict kernels merge too"


def test_without_reblock_there_is_no_cover():
    for weight in (hidden(), make_weight("uniform", (300, 90), (100, 3), "float32")):
        plans = list(candidates(problem_of(weight), HERE, reblock=False))
        assert plans
        assert all(plan.cover is None and not plan.zero_filled for plan in plans)
        assert any(plan.cover for plan in candidates(problem_of(weight), HERE))


def test_scattered_elements_are_not_merged():
    p = random_weight(0, (256, 256), (1, 1), 0.02).pattern
    assert all(c.blocks.density == 1 for c in covers(problem_of(Weight(p, np.ones((p.nnzb, 1, 1), np.float32))), HERE))


def test_tall_blocks_are_split_and_split_blocks_fill_nothing():
    problem = problem_of(make_weight("uniform", (384, 90), (128, 3), "float32"))
    split = next(c for c in covers(problem, HERE) if c.blocks.density < 1)
    assert split.blocks.blocksize == (64, 3)
    assert not split.fills


def test_empty_and_full_patterns_need_no_dense_plan():
    for kind in ("empty", "full"):
        problem = problem_of(make_weight(kind, (64, 60), (8, 4), "float32"))
        assert not any(plan.zero_filled for plan in candidates(problem, HERE))
    dense = problem_of(make_weight("full", (64, 60), (8, 4), "float32"))
    assert all(plan.dense for plan in candidates(dense, HERE))


def test_huge_matrices_have_no_dense_plan():
    weight = random_weight(0, (1 << 20, 1 << 20), (4096, 4096), 1 / (256 * 256))
    big = Pattern((1 << 20, 1 << 20), (1, 1), np.minimum(np.arange((1 << 20) + 1), 3), np.arange(3))
    assert weight.pattern.nnzb == 1
    for p in (weight.pattern, big):
        found = list(covers(replace(problem_of(make_weight("one", (4, 4), (1, 1), "float32")), pattern=p), HERE))
        assert all(c.blocks.nnz < 1 << 30 for c in found)


# ── kernels ──────────────────────────────────────────────────────────────────────────────────────────────────────────

R_LANES = WeightTile(F32, 1, 1, tokens=8)
COVERED = {  # operator, shape, own blocks, kind, the cover's blocks or "full" and them, tiles
    "split": ("linear", (150, 40), (100, 3), "uniform", (50, 3), {"weight": WeightTile(F32, 1, 2, tokens=6)}),
    "merged": ("linear", (61, 45), (1, 1), "banded", (16, 2), {"weight": R_LANES}),
    "merged, two tiles": (
        "linear", (61, 45), (3, 5), "powerlaw", (6, 5),
        {"tokens": TokenTile(4, 2, 20), "weight": replace(R_LANES, vectors=1), "small_n": F32},
    ),
    "neither": ("spmm", (37, 53), (3, 5), "uniform", (4, 4), {"tokens": TokenTile(4, 2, 56)}),
    "neither, panels": ("spmm", (37, 53), (5, 3), "uniform", (6, 2), {"tokens": TokenTile(4, 2, 10)}),
    "dense": ("linear", (45, 70), (4, 4), "uniform", ("full", (2 * F32, 70)), {"weight": WeightTile(F32, 1, 2, 5)}),
    "dense spmm": (
        "spmm", (45, 70), (2, 3), "powerlaw", ("full", (8, 70)), {"tokens": TokenTile(8, 2, 70, pack=False)},
    ),
    "dense, panels": (
        "linear", (45, 70), (4, 4), "uniform", ("full", (F32, 7)),
        {"weight": WeightTile(F32, 1, 1, tokens=4, k_panel=21, chunk=3)},
    ),
    "code": ("spmm", (6, 12), (1, 1), "uniform", (2, 3), {"tokens": TokenTile(2, 2, 12), "encoding": "code"}),
}  # fmt: skip


def covered(name: str) -> tuple[CPlan, Weight]:
    operator, shape, own, kind, how, knobs = COVERED[name]
    weight = make_weight(kind, shape, own, "float32", seed=3)
    made = full(weight.pattern, how[1]) if how[0] == "full" else cover(weight.pattern, how)
    tiles = {"tokens": None, "weight": None} | knobs
    return CPlan(problem_of(weight, operator), HERE, **tiles, cover=made), weight


def another(weight: Weight, rng) -> Weight:
    """Other values; zeros stay what they are, -0.0 in the padding would not come back out of a cover."""
    return Weight(weight.pattern, weight.data * rng.uniform(0.5, 2, weight.data.shape).astype(weight.data.dtype))


@pytest.mark.parametrize("name", COVERED)
def test_kernel_over_a_cover(name, rng, tmp_path):
    """Right, with new values too; values come back out of the library; saved and loaded it is the same."""
    plan, weight = covered(name)
    (tmp_path / "a").mkdir()
    kernel = build_plan(plan, weight, tmp_path / "a")
    problem = plan.problem
    assert kernel.plan.knobs["blocksize"] == list(plan.pattern.blocksize)
    assert kernel.plan.knobs == plan.knobs()
    check_calls(kernel, problem, weight, rng, (0, 1, 3, 7, 16, 33, 65))
    assert recover(kernel, 0).digest == weight.digest
    other = another(weight, rng)
    kernel.update(other)
    check_calls(kernel, problem, other, rng, (1, 33))
    saved, findings = verify(kernel.save(tmp_path / "b"))
    assert all(finding.ok for finding in findings), findings
    check_calls(saved, problem, other, rng, (1, 33))
    for threads in (2, 3, 5):
        x, _ = problem.sample(rng, 35)
        assert saved(x, threads=threads).tobytes() == saved(x, threads=1).tobytes()


def test_verify_sees_a_filled_zero_that_is_none(tmp_path):
    plan, weight = covered("dense")
    artifact = read_artifact(build_artifact([plan], weight, tmp_path / "a").folder)
    at = plan.packing.pack(weight.data).view(np.float32).tolist().index(0)
    with open(artifact.library, "r+b") as file:
        file.seek(artifact.manifest.levels[0].values.offset + 4 * at)
        file.write(np.float32(7).tobytes())
    write_manifest(artifact.folder, artifact.manifest)
    seen = {finding.what: finding.ok for finding in verify(artifact.folder)[1]}
    assert not seen["values"]


@pytest.mark.parametrize("name", COVERED)
def test_pack_in_c_is_pack_of_the_plan(name, rng, tmp_path):
    plan, weight = covered(name)
    pack = c_pack(build_plan(plan, weight, tmp_path))
    for w in (weight, another(weight, rng)):
        np.testing.assert_array_equal(pack(w.data, 0), plan.packing.pack(w.data))


LEVELS = [TARGETS[name] for name in ("x86-64-v4", "x86-64-v3", "x86-64")]


@pytest.mark.isa("avx2")
@pytest.mark.parametrize("makes", [(cover, cover), (full, cover)], ids=["merged", "dense and merged"])
@pytest.mark.parametrize("sizes", [((16, 2), None), (None, (16, 2)), ((16, 2), (8, 1)), ((16, 2), (16, 2))], ids=str)
def test_levels_with_covers_of_their_own(sizes, makes, rng, tmp_path):
    """Blocks differ from level to level, and so do tables, partitions over threads and packings."""
    weight = random_weight(0, (100, 90), (1, 1), 0.02)
    problem = problem_of(weight)
    targets = LEVELS[:2] if set(LEVELS[0].requires) <= set(HERE.requires) else LEVELS[1:]
    plans = []
    for target, size, make in zip(targets, sizes, makes, strict=True):
        knobs = {"tokens": TokenTile(1, 2, 90) if size is None else TokenTile(4, 2, 90), "weight": None}
        plans.append(CPlan(problem, target, **knobs, cover=size and make(weight.pattern, size)))
    artifact = build_artifact(plans, weight, tmp_path / "a")
    kernel = Kernel(read_artifact(artifact.folder), threads=1)
    assert kernel.plan.target == targets[0].name
    check_calls(kernel, problem, weight, rng, (1, 5, 40))
    assert {recover(kernel, level).digest for level in (0, 1)} == {weight.digest}
    pack, other = c_pack(kernel), another(weight, rng)
    for level, plan in enumerate(plans):
        np.testing.assert_array_equal(pack(other.data, level), plan.packing.pack(other.data))
    kernel.update(other)
    x, _ = problem.sample(rng, 700)
    assert kernel(x, threads=4).tobytes() == kernel(x, threads=1).tobytes()
    saved, findings = verify(kernel.save(tmp_path / "b"))
    assert all(finding.ok for finding in findings), findings
    check_calls(saved, problem, other, rng, (1, 40))


# ── panels and chunks ────────────────────────────────────────────────────────────────────────────────────────────────

PANELS = {  # operator, own blocks, the tiles
    "weight, panels": ("linear", (F32, 2), {"weight": WeightTile(F32, 1, 1, tokens=5, k_panel=64)}),
    "weight, panels, chunks": ("linear", (F32, 2), {"weight": WeightTile(F32, 1, 1, tokens=5, k_panel=64, chunk=3)}),
    "weight, chunks": ("linear", (2 * F32, 3), {"weight": WeightTile(F32, 1, 2, tokens=3, chunk=4)}),
    "weight, several groups": (
        "linear", (5 * F32, 3), {"weight": WeightTile(F32, 1, 2, tokens=3, k_panel=66, chunk=2)},
    ),
    "weight, along k": ("linear", (1, F32), {"weight": WeightTile(1, F32, 1, 4, k_panel=2 * F32, chunk=2)}),
    "weight, rows and k": ("linear", (2, F32), {"weight": WeightTile(2, F32 // 2, 1, 4, k_panel=2 * F32, chunk=2)}),
    "weight, spmm": ("spmm", (F32, 2), {"weight": WeightTile(F32, 1, 1, tokens=5, k_panel=64, chunk=2)}),
    "tokens": ("linear", (4, 3), {"tokens": TokenTile(4, 2, 66)}),
    "tokens, one row": ("spmm", (1, 1), {"tokens": TokenTile(1, 3, 50)}),
    "tokens, rest of rows": ("spmm", (7, 2), {"tokens": TokenTile(3, 2, 62)}),
    "both": (
        "linear", (F32, 2),
        {"tokens": TokenTile(4, 2, 64), "weight": WeightTile(F32, 1, 1, tokens=3), "small_n": 6},
    ),
}  # fmt: skip


def gaps(blocksize: tuple[int, int], shape: tuple[int, int] = (200, 333)) -> Weight:
    """Whole panels, block rows and their crossings without blocks; more blocks elsewhere, one row full."""
    weight = random_weight(5, shape, blocksize, 0.4, kind="powerlaw")
    p = weight.pattern
    k = p.indices * p.C
    kept = ~((k >= 120) & (k < 210)) & (p.rows % 5 != 2) & ~((p.rows < 3) & (k < 64))
    indptr = np.concatenate(([0], np.cumsum(np.bincount(p.rows[kept], minlength=p.block_rows))))
    return Weight(Pattern(shape, blocksize, indptr, p.indices[kept]), weight.data[kept])


@pytest.mark.parametrize("name", PANELS)
def test_panels_and_chunks(name, rng, tmp_path):
    operator, blocksize, knobs = PANELS[name]
    weight = gaps(blocksize)
    plan = CPlan(problem_of(weight, operator), HERE, **({"tokens": None, "weight": None} | knobs))
    if plan.panels > 1:
        assert len(plan.packing.segments) < plan.panels * plan.pattern.block_rows, "some segments are empty"
        assert (np.diff(plan.packing.panel_starts.astype(int)) == 0).any(), "a whole panel is empty"
    kernel = build_plan(plan, weight, tmp_path)
    check_calls(kernel, plan.problem, weight, rng, (0, 1, 2, 5, 7, 16, 17, 33, 130))
    other = another(weight, rng)
    kernel.update(other)
    check_calls(kernel, plan.problem, other, rng, (1, 33))


@pytest.mark.parametrize("name", PANELS)
def test_panels_give_the_same_bits_on_any_number_of_threads(name, rng, tmp_path):
    operator, blocksize, knobs = PANELS[name]
    weight = gaps(blocksize, (500, 700))
    plan = CPlan(problem_of(weight, operator), HERE, **({"tokens": None, "weight": None} | knobs))
    kernel = build_plan(plan, weight, tmp_path)
    for n in (5, 63, 301):
        x, _ = plan.problem.sample(rng, n)
        alone = kernel(x, threads=1)
        assert_right(plan.problem, weight, alone, x)
        for threads in range(2, 9):
            assert kernel(x, threads=threads).tobytes() == alone.tobytes(), (n, threads)


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_x_that_is_packed_a_panel_at_a_time(operator, rng, tmp_path, monkeypatch):
    """Where a chunk of X is larger than the scratch may be, it is packed anew for each window of rows."""
    weight = gaps((4, 3))
    plan = CPlan(problem_of(weight, operator), HERE, TokenTile(4, 2, 66), None)
    assert plan.packs_whole
    monkeypatch.setattr("bsrgen.backends.c.layout.PANEL_BYTES", 66 * 2 * HERE.vector_bytes)
    assert not plan.packs_whole
    check_calls(build_plan(plan, weight, tmp_path), plan.problem, weight, rng, (0, 1, 7, 33, 130))


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_one_block_wider_than_the_scratch_for_x(operator, rng, tmp_path, monkeypatch):
    monkeypatch.setattr("bsrgen.backends.c.layout.PANEL_BYTES", 1 << 12)
    weight = make_weight("uniform", (3, 2000), (1, 2000), "float32")
    plan = CPlan(problem_of(weight, operator), HERE, TokenTile(1, 2, 2000), None)
    assert plan.packs_whole
    check_calls(build_plan(plan, weight, tmp_path), plan.problem, weight, rng, (1, 33))


def test_tables_do_not_grow_with_empty_segments():
    weight = random_weight(0, (20_000, 1_000_000), (1, 1), 1e-7)
    plan = CPlan(problem_of(weight), HERE, TokenTile(1, 4, 128), None)
    tracemalloc.start()
    assert plan.packing.pointers.size <= weight.pattern.nnzb + 1
    assert tracemalloc.get_traced_memory()[1] < 1 << 22, f"{plan.panels} panels of {weight.pattern.block_rows} rows"
    tracemalloc.stop()


# ── strict, and what users see ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tune", ["off", "model"])
@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_strict_keeps_inf_and_nan_out_of_absent_blocks(operator, tune, rng):
    """A pattern that is nearly full, for which loose kernels run the dense plan: SciPy's rule holds for strict ones."""
    weight = random_weight(1, (96, 120), (1, 1), 0.9)
    problem = problem_of(weight, operator)
    strict = bsrgen.compile(weight, operator, tune=tune, strict=True, n=64)
    assert strict.artifact.manifest.strict
    assert strict.verdict.ran == "sparse"
    for n in (1, 3, 16, 50):
        x, _ = problem.sample(rng, n)
        for bad in (np.nan, np.inf, -np.inf):
            for k in rng.choice(120, 4, replace=False):
                spoilt = x.copy()
                spoilt[(slice(None), k) if operator == "linear" else (k, slice(None))] = bad
                assert_right(problem, weight, strict(spoilt), spoilt)


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_nearly_full_patterns_run_dense_and_finite_x_is_right(operator, rng):
    weight = random_weight(1, (384, 512), (1, 1), 0.95)
    kernel = bsrgen.compile(weight, operator, n=128)
    assert kernel.verdict.ran == "dense"
    assert not kernel.artifact.manifest.strict
    assert "dense" in kernel.plan.plan
    assert kernel.plan.knobs["blocksize"] != [1, 1]
    check_calls(kernel, problem_of(weight, operator), weight, rng, (1, 7, 128))
    x, _ = problem_of(weight, operator).sample(rng, 40)  # what lies around X is never read
    assert_right(problem_of(weight, operator), weight, kernel(framed(x, after=(3, 40))), x)


def test_a_race_times_dense_plans_too(rng):
    kernel = bsrgen.compile(random_weight(2, (64, 96), (4, 4), 0.6), tune="measure", n=16)
    dense = [record for record in kernel.artifact.manifest.tuning if record.dense]
    assert dense
    assert min(r.measured_seconds for r in dense) == kernel.verdict.dense_measured_seconds
    assert kernel.verdict.measured_speedup is not None
    assert "(measured)" in str(kernel.verdict)


def test_inspect_shows_the_blocks_that_are_walked(tmp_path):
    plan, weight = covered("merged")
    artifact = build_artifact([plan], weight, tmp_path / "a")
    text = run("inspect", artifact.folder).stdout
    assert "as 16x2 blocks" in " ".join(text.split())
    kernel = bsrgen.compile(hidden(), n=64)
    assert kernel.plan.knobs["blocksize"] != [1, 1]
    text = run("inspect", kernel.artifact.folder).stdout
    for word in ("blocks, lanes along", "FLOP", "registers"):
        assert word in " ".join(text.split()), text
    assert not [line for line in text.splitlines() if len(line) > 400]


def test_the_base_plan_does_not_say_what_it_multiplies():
    plan = Plan(problem_of(hidden()), HERE)
    with pytest.raises(NotImplementedError):
        _ = plan.dense
    with pytest.raises(NotImplementedError):
        _ = plan.zero_filled
    assert plan.family(8) == (str(plan),)
