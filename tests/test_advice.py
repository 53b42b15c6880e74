"""Block shapes: exact covered densities, and the right one first."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.sparse
from support import problem_of

import bsrgen
from bsrgen import advice, occupancy
from bsrgen.backends import BACKENDS
from bsrgen.occupancy import nonzeros, occupancies, stored
from bsrgen.pattern import Weight, random_weight
from bsrgen.targets import TARGETS
from bsrgen.tune import rank

V4 = "x86-64-v4"  # the model's times do not depend on where they are computed


def counted(mask: np.ndarray, blocksize: tuple[int, int]) -> int:
    """Blocks of that shape with something in them, one by one."""
    (M, K), (R, C) = mask.shape, blocksize
    return sum(mask[i : i + R, j : j + C].any() for i in range(0, M, R) for j in range(0, K, C))


def holes(weight: Weight, share: float) -> Weight:
    """`weight` with some of its stored values zero, one whole block among them."""
    data = weight.data.copy()
    data[np.random.default_rng(5).random(data.shape) < share] = 0
    data[:1] = 0
    return Weight(weight.pattern, data)


WEIGHTS = {
    "1x1": random_weight(0, (37, 50), (1, 1), 0.1),
    "odd": random_weight(1, (37, 50), (4, 3), 0.2),
    "holes": holes(random_weight(2, (45, 61), (6, 8), 0.3), 0.9),
    "tall": holes(random_weight(3, (70, 33), (32, 1), 0.3), 0.5),
    "long": holes(random_weight(4, (300, 40), (130, 2), 0.4), 0.97),
    "one row": random_weight(5, (1, 40), (1, 4), 0.4),
    "one block": random_weight(6, (37, 50), (37, 50), 1.0),
    "full": random_weight(7, (24, 24), (3, 5), 1.0),
    "empty": random_weight(8, (24, 24), (4, 4), 0.0),
    "nothing": random_weight(9, (0, 24), (4, 4), 0.0),
}


@pytest.mark.parametrize("cells", [1 << 28, 0], ids=["bitmap", "keys"])
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_occupancies_count_by_brute_force(weight, cells, monkeypatch):
    monkeypatch.setattr(occupancy, "BITMAP_CELLS", cells)
    p = weight.pattern
    blocks = Weight(p, np.ones_like(weight.data)).todense() != 0
    values = weight.todense() != 0
    found = list(occupancies(weight, float("inf")))
    assert found[0].blocksize == p.blocksize
    assert len({c.blocksize for c in found}) == len(found)
    assert len(found) > 1 or not p.nnzb
    for c in found:
        R, C = c.blocksize
        multiple = R % p.R == 0 and C % p.C == 0
        assert c.nnzb == counted(blocks if multiple else values, (R, C)), c.blocksize
        assert 0 <= c.density <= 1
        assert c.elements == c.nnzb * R * C


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_occupancies_within_a_limit_are_all_that_fit(weight):
    everything = {c.blocksize: c.elements for c in occupancies(weight, float("inf"))}
    for limit in (1, 1.2 * weight.pattern.nnz, 3 * weight.pattern.nnz):
        fit = {b for b, elements in everything.items() if elements <= limit} | {weight.pattern.blocksize}
        assert {c.blocksize for c in occupancies(weight, limit)} == fit
    coarse = {b for b in everything if b[0] % weight.pattern.R == 0 and b[1] % weight.pattern.C == 0}
    assert {c.blocksize for c in occupancies(weight, float("inf"), finer=False)} == coarse


def test_occupancies_of_a_pattern_count_stored_blocks():
    weight = WEIGHTS["holes"]
    for c in occupancies(weight.pattern, float("inf")):
        blocks = Weight(weight.pattern, np.ones_like(weight.data)).todense() != 0
        assert c.nnzb == counted(blocks, c.blocksize)
    assert stored(weight.pattern).nnzb == weight.pattern.nnzb
    assert nonzeros(weight).nnzb == np.count_nonzero(weight.data)


@pytest.mark.parametrize("kind", ["banded", "uniform"])
@pytest.mark.parametrize("operator", ["linear", "spmm"])
def test_hidden_blocks_are_found(kind, operator):
    """A CSR matrix made of dense 8x8 blocks: 8x8 or a multiple of it is first, and covers no more."""
    W = scipy.sparse.csr_array(random_weight(0, (512, 512), (8, 8), 0.1, kind=kind).todense())
    found = bsrgen.advise(W, operator, target=V4)
    best, given = found[0], next(a for a in found if a.given)
    assert given.blocksize == (1, 1)
    assert given.density == pytest.approx(W.nnz / 512**2, abs=1e-12)
    assert best.blocksize[0] % 8 == best.blocksize[1] % 8 == 0
    at = next(a for a in found if a.blocksize == (8, 8))
    assert (at.density, at.fill, at.nnzb) == (given.density, 1.0, W.nnz / 64)
    assert at.seconds <= 1.3 * best.seconds
    assert best.speedup > 1.2
    if kind == "uniform":
        assert best.blocksize == (8, 8)
        assert all(a.density > given.density for a in found if max(a.blocksize) > 8)


def test_noise_has_no_better_block_shape():
    found = bsrgen.advise(random_weight(0, (512, 512), (32, 1), 0.2), target=V4)
    assert found[0].given
    assert found[0].blocksize == (32, 1)
    assert {(16, 1), (64, 1), (32, 2)} <= {a.blocksize for a in found}
    assert all(a.speedup <= 1 for a in found)


def test_zeros_within_blocks_are_worth_finer_ones():
    """64x64 blocks in which only one 8x8 corner holds anything."""
    weight = random_weight(0, (512, 512), (64, 64), 0.5)
    data = weight.data.copy()
    data[:, 8:, :] = 0
    data[:, :, 8:] = 0
    weight = Weight(weight.pattern, data)
    found = bsrgen.advise(weight, target=V4)
    at = next(a for a in found if a.blocksize == (8, 8))
    assert (at.fill, at.density) == (1.0, 0.5 / 64)
    assert at.speedup > 10
    assert max(found[0].blocksize) <= 16
    given = next(a for a in found if a.given)
    assert given.fill == 64
    assert found[0].speedup > 10
    verdict = advice.judge(*judged(weight))
    assert verdict.alternative.speedup > 10
    full = Weight(weight.pattern, np.ones_like(data))
    assert advice.judge(*judged(full)).alternative is None


def judged(weight):
    """Arguments of judge: the C backend, the plan of tune="model", what it was taken from, the weight."""
    backend, problem = BACKENDS["c"], problem_of(weight)
    ranked = rank(list(backend.candidates(problem, TARGETS[V4])), None)
    return backend, ranked[0][1], ranked, weight


def test_fill_and_density_are_exact():
    weight = WEIGHTS["holes"]
    mask, p = weight.todense() != 0, weight.pattern
    for a in bsrgen.advise(weight, n=3):
        rows, cols = -(-p.M // a.blocksize[0]), -(-p.K // a.blocksize[1])
        assert a.density == float(Fraction(a.nnzb, rows * cols))
        assert a.fill == a.nnzb * a.blocksize[0] * a.blocksize[1] / mask.sum()


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_weight_gets_advice(name):
    weight = WEIGHTS[name]
    for operator in ("linear", "spmm"):
        for n in (1, None):
            found = bsrgen.advise(weight, operator, n=n)
            assert sum(a.given for a in found) == 1
            assert [a.seconds for a in found] == sorted(a.seconds for a in found)
            assert all("covered density" in str(a) for a in found)
            assert next(a for a in found if a.given).blocksize == weight.pattern.blocksize
            assert len(found) <= advice.SHAPES + 1


def test_what_advise_takes():
    dense = random_weight(0, (64, 48), (4, 4), 0.3).todense()
    for W in (dense, scipy.sparse.csr_array(dense), scipy.sparse.coo_array(dense)):
        assert next(a for a in bsrgen.advise(W) if a.given).blocksize == (1, 1)
    assert next(a for a in bsrgen.advise(dense, blocksize=(8, 2)) if a.given).blocksize == (8, 2)
    assert next(a for a in bsrgen.advise(scipy.sparse.bsr_array(dense, blocksize=(4, 4))) if a.given).nnzb == 58
    slow, fast = (bsrgen.advise(dense, target=t)[0].seconds for t in ("x86-64", ("x86-64-v4", "x86-64")))
    assert slow > fast
    for wrong in ({"n": 0}, {"n": True}, {"operator": "none"}, {"blocksize": (0, 1)}, {"target": "none"}):
        with pytest.raises(bsrgen.BsrgenError):
            bsrgen.advise(dense, **wrong)
