"""Hopper kernels whose thread blocks share the line of all steps, and lists of tiles, without a GPU."""

from dataclasses import replace

import numpy as np
import pytest
from device_emulation import check_device_calls, emulated, said
from support import problem_of
from test_cuda_split import assert_shared, with_workspace
from test_hopper import HOPPER, SMALL, TYPES, large, replaced, weight_of

from bsrgen import tune
from bsrgen.backends.cuda import HopperPlan, candidates, hopper_text
from bsrgen.backends.cuda.hopper import Shape
from bsrgen.backends.cuda.hopper_count import clusters_of, line_of, listing_of, uneven_of
from bsrgen.backends.cuda.hopper_schedule import GAIN, Line, Listing, dealt_time, listed, pieces_time
from bsrgen.errors import DeviceError
from bsrgen.pattern import as_weight
from bsrgen.workspaces import WORKSPACE_BYTES

SHORT = replace(SMALL, sms=24)  # pieces at most


@pytest.fixture
def short_pieces(monkeypatch):
    """Pieces of a few steps: cuts everywhere, tiles of many parts."""
    monkeypatch.setattr(hopper_text, "line_of", lambda plan, shape: Line(7, 2, 3, 7 * plan.cut.slots + 3))


def equal_of(problem, slots, width, across=1, down=1):
    return HopperPlan(problem, SHORT, slots, (Shape(width, 1 << 20, 0, across, True), Shape(64)), down)


def gaps(block=(64, 32), dtype="float16", K=1536):
    """Rows of very different lengths, one of them empty; steps of several pieces; rows that end within a slot."""
    rng = np.random.default_rng(5)
    tall = max(64 // block[0], 1)
    stored = rng.random((4 * tall, K // block[1])) < np.repeat([0.9, 0.0, 0.3, 0.6], tall)[:, None]
    dense = np.kron(stored, np.ones(block)) * rng.integers(-40, 40, (4 * tall * block[0], K))
    dense = dense[: dense.shape[0] - block[0] // 3]
    return as_weight(dense.astype(TYPES[dtype].numpy), blocksize=block, dtype=dtype)


# weight, operator, epilogue, slots, tokens of tiles, clusters, how many stay, thread blocks at a time, tokens of calls
CASES = {
    "decode": (gaps, "linear", "bias", 2, 16, (1, 1), 7, 2, (20,)),
    "bytes": (lambda: gaps((64, 64), "int8"), "linear", "scale", 4, 8, (1, 1), 24, 1, (11,)),
    "sent": (lambda: gaps((32, 16), "bfloat16"), "linear", "relu", 2, 64, (2, 1), 4, 1, (150,)),
    "sent down": (gaps, "linear", "residual", 2, 16, (1, 2), 5, 1, (20,)),
    "boxes": (lambda: gaps((16, 8), "float16"), "spmm", "bias", 2, 64, (1, 1), 6, 2, (72,)),
    "gathered": (lambda: gaps((64, 3), "float16"), "spmm", (), 2, 64, (1, 1), 4, 2, (72,)),
    "one": (lambda: weight_of("one", (190, 200), (64, 64)), "linear", "bias", 2, 32, (1, 1), 5, 2, (33,)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_pieces(name, rng, tmp_path, monkeypatch, short_pieces):
    """Right; the same bits without a workspace and again; counters are zeros behind each call."""
    weight_made, operator, epilogue, slots, width, (across, down), stay, together, tokens = CASES[name]
    weight = weight_made()
    problem = problem_of(weight, operator, epilogue, TYPES[weight.data.dtype.name], y="float32")
    plan = equal_of(problem, slots, width, across, down)
    monkeypatch.setenv("EMULATED_CLUSTERS", str(stay))
    monkeypatch.setenv("EMULATED_TOGETHER", str(together))
    kernel = with_workspace(emulated(plan, weight, tmp_path), plan)
    assert kernel.artifact.manifest.workspace_bytes == plan.workspace_bytes
    if name != "one":
        assert_shared(kernel, problem, weight, rng, tokens)
    check_device_calls(kernel, problem, weight, rng, tokens, exact=False)


MUTATIONS = {
    "no fence before the count": ("        __threadfence();\n        warps_meet(5", "        warps_meet(5"),
    "counted before all have stored": ("__threadfence();\n        warps_meet(5, COUNT);", "__threadfence();"),
    "no fence behind the count": ("    __threadfence();\n    for (int part", "    for (int part"),
    "counter not reset": ("if (thread == 0) *arrived = 0;", ""),
    "counted up to one less": ("atomicAdd(arrived, 1u) ==", "atomicAdd(arrived, 1u) + 1 =="),
    "there before they are": ("counted_so_far(arrived) ==", "counted_so_far(arrived) + 1 =="),
    "another order": (
        "for (int part = 0; part < work.parts; part++) {",
        "for (int turn = 0, part = 0; turn < work.parts; part = work.parts - ++turn) {",
    ),
    "mine first": ("part == work.part) {\n            add(part == 0)", "part == 0) {\n            add(true)"),
    "one place for two": ("(2 * (work.first + part) + (part == 0))", "(2 * (work.first + part))"),
    "one counter for two": ("a.arrived + work.first * CLUSTER", "a.arrived + 0 * CLUSTER"),
    "a step too late": ("return {tile, group, 1 + last_of", "return {tile, group, (a.sums ? 2 : 1) + last_of"),
    "a step left out": ("at.begin = begin + from.step,", "at.begin = begin + from.step + (from.step > 0),"),
    "parts miscounted": ("- line::TILE - line::SNAP - 1) - first", "- line::TILE - 1) - first"),
    "one part, where it is alone": ("        add(work.part == 0);\n        if", "        add(true);\n        if"),
    "the rest of the tile forgotten": ("if (a.sums || from.step == 0) return false;", "return false;"),
    "tokens of the first group": ("((int64_t)from.group * ACROSS", "((int64_t)0 * ACROSS"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_found(name, rng, tmp_path, monkeypatch, short_pieces):
    """Not only by wrong sums: other bits than without a workspace, or a counter that is left."""
    weight = gaps()
    plan = equal_of(problem_of(weight, "linear", "bias", y="float32"), 2, 16)
    monkeypatch.setenv("EMULATED_CLUSTERS", "13")
    monkeypatch.setenv("EMULATED_TOGETHER", "2")
    kernel = with_workspace(emulated(plan, weight, tmp_path, lambda text: replaced(text, *MUTATIONS[name])), plan)
    with pytest.raises((AssertionError, DeviceError, pytest.fail.Exception)) as found:
        assert_shared(kernel, plan.problem, weight, rng, (20, 40))
    assert found.type is not DeviceError or said(kernel.artifact)


# ── arithmetic ───────────────────────────────────────────────────────────────────────────────────────────────────────


def cuts_of(line, ends, groups, pieces):
    """(tile and group, step) of each cut, as templates/cuda/wgmma_walk.cuh.j2 has them; `ends`: of each tile, where its
    steps end, from 0."""
    inside = np.array([steps[-1] for steps in ends])
    ahead = np.concatenate(([0], np.cumsum(inside + line.tile)))
    found = []
    for j in range(pieces):
        x = ahead[-1] * groups * j // pieces
        tile = np.searchsorted(ahead, x // groups, "right") - 1
        group, lead = divmod(x - groups * ahead[tile], inside[tile] + line.tile)
        unit = tile * groups + group
        if lead <= line.snap:
            found.append((unit, 0))
        elif lead >= inside[tile] - line.snap:
            found.append((unit + 1, 0))
        else:
            found.append((unit, int(np.searchsorted(ends[tile], lead))))
    return [*found, (len(ends) * groups, 0)], ahead


def test_every_step_is_in_one_piece(rng):
    for tiles, groups, most in ((3, 2, 7), (1, 1, 24), (9, 3, 24), (40, 1, 13), (2, 5, 9)):
        masks = [rng.integers(1, 4, rng.integers(0, 60)) for _ in range(tiles)]  # tiles of W of each step
        line = Line(7, 2, 5, 7 * 3 + 2 + 1)
        ends = [np.concatenate(([0], np.cumsum(line.w * m + line.step))) for m in masks]
        length = sum(int(e[-1]) + line.tile for e in ends) * groups
        pieces = line.pieces(length, most)
        cuts, ahead = cuts_of(line, ends, groups, pieces)
        assert cuts == sorted(set(cuts)), "no two meet"
        assert cuts[0] == (0, 0)

        def upto(x, length=length, pieces=pieces):
            return -(-(x + 1) * pieces // length)

        for unit in range(tiles * groups):
            within = [j for j, cut in enumerate(cuts) if cut[0] == unit and cut[1] > 0]
            assert all(0 < cuts[j][1] < ends[unit // groups].size - 1 for j in within)
            if within:
                tile, group = divmod(unit, groups)
                start = groups * ahead[tile] + group * (ends[tile][-1] + line.tile)
                first = upto(start + line.snap) - 1
                assert first == within[0] - 1
                assert upto(start + ends[tile][-1] - line.snap - 1) - first == len(within) + 1


def test_lists_hold_every_tile(rng):
    work = np.sort(rng.integers(1, 30, 300))[::-1].astype(float)
    found = next(listing for c in range(20, 60) if (listing := listed(work, c)))
    assert sorted(found.tiles) == list(range(300))
    loads = [work[found.tiles[a:b]].sum() for a, b in zip(found.ends[:-1], found.ends[1:], strict=True)]
    assert max(loads) == found.time <= GAIN * dealt_time(work, len(loads))
    assert all((np.diff(found.tiles[a:b]) > 0).all() for a, b in zip(found.ends[:-1], found.ends[1:], strict=True))
    assert listed(work[:10], 20) is None


@pytest.mark.parametrize("complete", [True, False])
def test_a_list_is_followed(complete, rng, tmp_path):
    """One cluster has a single tile, the other one the rest; a tile that nobody has is not there."""
    weight = gaps(K=128)
    problem = problem_of(weight, "linear", "bias", y="float32")
    plan = HopperPlan(problem, SMALL, 2, (Shape(64),))
    ends, tiles = np.array([0, 1, 6], np.int32), np.array([3, 0, 1, 2, 4, 5 if complete else 4], np.int32)
    plan.__dict__["lists"] = ((Shape(64), 3, Listing(ends, tiles, 0.0)),)
    kernel = emulated(plan, weight, tmp_path)
    if complete:
        check_device_calls(kernel, problem, weight, rng, (130, 70), exact=False)
    else:
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            check_device_calls(kernel, problem, weight, rng, (130,), exact=False)


# ── the model ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pieces_take_equal_times():
    """The longest piece of even work is the mean; sums that are left and fetched cost what they cost."""
    steps, w_tiles = np.full(32, 20.0), np.full(32, 40.0)
    line = Line(100, 50, 300, 400)
    whole = line.work(steps, w_tiles).sum()
    assert pieces_time(line, steps, w_tiles, 1, 1, 1e6) == whole
    assert pieces_time(line, steps, w_tiles, 1, 32, 1e6) == whole / 32
    some = pieces_time(line, steps, w_tiles, 1, 24, 0.0)
    assert whole / 24 <= some <= whole / 24 + 2 * line.snap
    assert pieces_time(line, steps, w_tiles, 1, 24, 500.0) >= some + 500


@pytest.mark.parametrize(("block", "density", "size"), [((16, 16), 0.3, 4096), ((64, 64), 0.3, 8192)])
def test_few_tiles_are_cut(block, density, size):
    """Somewhere below a thousand tokens; what is cut fits the workspace, and is never the kernel of all other calls."""
    problem = large(block, density, 256, size)
    plans = [plan for plan in candidates(problem, HOPPER) if isinstance(plan, HopperPlan)]
    cut = {n: next(p for _, p in tune.rank(plans, n) if isinstance(p, HopperPlan)).shape(n) for n in (64, 256, 8192)}
    assert cut[64].equal or cut[256].equal
    assert not cut[8192].equal
    for plan in plans:
        assert plan.workspace_bytes <= WORKSPACE_BYTES
        assert not plan.shapes[-1].equal
        for shape in plan.shapes:
            if shape.equal:
                assert plan.slots // 2 * shape.width // 2 <= 64, "sums of all and of one part, in registers"
                line = line_of(plan, shape)
                assert line.snap > line.w * plan.cut.slots + line.step, "a cut inside of a tile is at a step"


def test_the_model_knows_the_schedule():
    problem = large((128, 64), 0.1, 1024)
    plan = HopperPlan(problem, HOPPER, 2, (Shape(128, across=2),))
    shape = plan.shapes[0]
    assert clusters_of(plan, shape) == 66
    by_list, by_turns = (uneven_of(plan, shape, n, line_of(plan, shape)) for n in (1024, 768))
    assert 1 <= by_list < 1.5
    assert 1 <= by_turns < 2
    assert listing_of(plan, replace(shape, equal=True), 1024) is None
