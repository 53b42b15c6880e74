"""Pruning by blocks, and which block shape to prune in: arrays only, no torch and no compiler."""

import numpy as np
import pytest

from bsrgen import prune, shapes
from bsrgen.errors import ArgumentError, PatternError, UnsupportedError
from bsrgen.pattern import as_weight

CASES = [((12, 8), (4, 1)), ((13, 7), (3, 2)), ((5, 5), (5, 5)), ((4, 6), (8, 8)), ((1, 9), (1, 1)), ((6, 4), (1, 4))]


@pytest.mark.parametrize(("shape", "block"), CASES, ids=str)
def test_norms_are_those_of_the_blocks(rng, shape, block):
    W = rng.standard_normal(shape).astype(np.float32)
    norms = prune.block_norms(W, block)
    R, C = block
    for i, row in enumerate(norms):
        for j, norm in enumerate(row):
            np.testing.assert_allclose(norm, np.linalg.norm(W[i * R : (i + 1) * R, j * C : (j + 1) * C]), rtol=1e-6)


@pytest.mark.parametrize(("shape", "block"), CASES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("balanced", [False, True])
def test_the_largest_blocks_stay(rng, shape, block, density, balanced):
    W = rng.standard_normal(shape)
    norms, kept = prune.block_norms(W, block), prune.magnitude(W, block, density, balanced=balanced)
    if balanced:
        assert len(set(kept.sum(axis=1))) == 1
        for row, chosen in zip(norms, kept, strict=True):
            assert row[chosen].min(initial=np.inf) >= row[~chosen].max(initial=0)
        assert kept.any() == (density > 0)
    else:
        assert kept.sum() == round(density * kept.size)
        assert norms[kept].min(initial=np.inf) >= norms[~kept].max(initial=0)
    pruned = prune.masked(W, block, kept)
    assert as_weight(pruned, blocksize=block).pattern.nnzb == kept.sum()
    np.testing.assert_array_equal(pruned[pruned != 0], W[pruned != 0])
    assert prune.mass(norms, kept) == pytest.approx(np.square(pruned).sum() / np.square(W).sum())


def test_globally_what_matters_less_loses_more(rng):
    weights = {"loud": 10 * rng.standard_normal((16, 16)), "quiet": rng.standard_normal((32, 16))}
    blocks = {"loud": (4, 4), "quiet": (8, 1)}
    kept = prune.magnitude_of_all(weights, blocks, 0.25, scope="global")
    elements = sum(int(kept[name].sum()) * blocks[name][0] * blocks[name][1] for name in weights)
    assert elements == round(0.25 * (256 + 512)) // 8 * 8
    assert kept["loud"].mean() > kept["quiet"].mean()
    each = prune.magnitude_of_all(weights, blocks, 0.25)
    assert {mask.mean() for mask in each.values()} == {0.25}
    assert prune.magnitude_of_all({}, (1, 1), 0.5, scope="global") == {}


def test_equal_blocks_stay_in_order():
    np.testing.assert_array_equal(prune.magnitude(np.ones((2, 4)), (1, 2), 0.5), [[True, True], [False, False]])


def test_the_schedule_is_zhus_and_guptas():
    at = [prune.cubic(step, 10, 20, 0.1) for step in (0, 10, 15, 20, 99)]
    assert at == pytest.approx([1.0, 1.0, 0.1 + 0.9 / 8, 0.1, 0.1])
    assert prune.cubic(5, 5, 5, 0.3) == 0.3


def test_fewest_blocks_hold_the_mass(rng):
    norms = np.abs(rng.standard_normal((6, 5)))
    for least in (0.0, 0.5, 0.9, 1.0):
        kept = prune.fewest(norms, least)
        assert prune.mass(norms, kept) >= least * (1 - 1e-9)
        if kept.any():
            weakest = np.where(kept, norms, np.inf).argmin()
            kept.ravel()[weakest] = False
            assert prune.mass(norms, kept) < least
    assert not prune.fewest(np.zeros((2, 2)), 0.5).any()


def test_errors_say_which_value():
    for call in (
        lambda: prune.magnitude(np.ones((2, 2)), (1, 1), 1.5),
        lambda: prune.cubic(0, 5, 1, 0.5),
        lambda: prune.magnitude_of_all({"a": np.ones((2, 2))}, (1, 1), 0.5, scope="rows"),
        lambda: prune.magnitude_of_all({"a": np.ones((2, 2))}, (1, 1), 0.5, scope="global", balanced=True),
        lambda: prune.masked(np.ones((4, 4)), (2, 2), np.ones((4, 4), bool)),
        lambda: shapes.search(np.ones((4, 4))),
        lambda: shapes.search(np.ones((4, 4)), density=0.5, least_mass=0.5),
    ):
        with pytest.raises(ArgumentError):
            call()
    with pytest.raises(PatternError, match="NaN"):
        prune.magnitude(np.full((2, 2), np.nan), (1, 1), 0.5)
    with pytest.raises(PatternError, match="matrix"):
        prune.block_norms(np.ones(3), (1, 1))


# ── block shapes ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_search_reports_time_density_and_mass_and_picks(rng):
    W = rng.standard_normal((192, 128)) * np.kron(rng.random((6, 128)) < 0.3, np.ones((32, 1)))
    some = [(1, 1), (32, 1), (16, 16), (256, 256)]
    found = shapes.search(W, density=0.2, shapes=some, n=128)
    assert {shape.blocksize for shape in found.shapes} == set(some[:3])
    for shape in found.shapes:
        norms = prune.block_norms(W, shape.blocksize)
        assert shape.density == pytest.approx(0.2, abs=0.02)
        assert shape.mass == pytest.approx(prune.mass(norms, shape.kept))
        assert shape.seconds > 0
    assert [s.seconds for s in found.shapes] == sorted(s.seconds for s in found.shapes)
    assert found.pick.blocksize == (32, 1)  # as fast as 16x16, and what the weight is made of
    assert "-> 32x1" in str(found)
    budget = shapes.search(W, least_mass=0.9, shapes=some, n=128)
    assert budget.pick is budget.shapes[0]
    assert all(shape.mass >= 0.9 for shape in budget.shapes)
    with pytest.raises(UnsupportedError):
        shapes.search(W, density=0.2, shapes=[(500, 500)])
