"""Launches of few units that thread blocks share along k, without a GPU: under tests/cuda/cuda_runtime.h."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from device_emulation import GpuArray, check_device_calls, emulated, run, said
from support import assert_right, make_weight, problem_of
from test_cuda import SM80
from test_cuda import plan_of as on_cores
from test_cuda_matrix import plan_of as on_units
from test_cuda_stream import streaming

from bsrgen import tune
from bsrgen.backends.cuda import candidates
from bsrgen.backends.cuda.plan import Lanes
from bsrgen.backends.cuda.split import COUNTERS, Sharing
from bsrgen.dtypes import DTYPES
from bsrgen.errors import DeviceError
from bsrgen.pattern import Weight, random_weight
from bsrgen.workspaces import PER_THREAD, WORKSPACE_BYTES, Workspaces


def split(plan, most=12, few_n=128):
    """`plan` with thread blocks that share, in pieces of the least length."""
    plan = replace(plan, split=most, few_n=few_n)
    for name in ("sharing", "stream_sharing"):
        if sharing := getattr(plan, name):
            plan.__dict__[name] = replace(sharing, least=1)
    return plan


def with_workspace(kernel, plan):
    """`kernel` with a workspace of its own, of exactly the bytes that it needs: NaN behind the counters."""
    memory = np.full(plan.workspace_bytes, 0xFF, np.uint8)
    memory[: 4 * COUNTERS] = 0
    kernel.workspace = GpuArray(kernel, memory)
    kernel._workspace = lambda device, stream, n: kernel.workspace.memory
    return kernel


def assert_shared(kernel, problem, weight, rng, tokens):
    """Right with a workspace, twice; the same bits without one; counters are zeros again."""
    workspace = kernel._workspace
    for n in tokens:
        x, given = problem.sample(rng, n)
        old = problem.sample_out(rng, n)
        bits = set()
        for mine in (workspace, workspace, lambda device, stream, n: 0):
            kernel._workspace = mine
            y = run(kernel, x, old.copy(), given)
            assert_right(problem, weight, y, x, given, old)
            bits.add(y.tobytes())
            assert not kernel.workspace.fetch()[: 4 * COUNTERS].any()
        kernel._workspace = workspace
        assert len(bits) == 1
        if weight.pattern.nnzb:  # sums were left
            assert (kernel.workspace.base[4 * COUNTERS :] != 0xFF).any()


PLANS = {
    "units": ((16, 16), "float16", "linear", "uniform", "accumulate", lambda p: on_units(p)),
    "units pair": ((8, 8), "bfloat16", "spmm", "uniform", "swiglu", lambda p: on_units(p, 8, many=1)),
    "units powerlaw": ((8, 1), "int8", "linear", "powerlaw", "bias", lambda p: on_units(p, 8, stages=2)),
    "cores": ((4, 4), "float32", "linear", "uniform", "gelu", lambda p: on_cores(p, few=Lanes(2, 16))),
    "cores pair": ((3, 5), "float64", "spmm", "powerlaw", "geglu", lambda p: on_cores(p, 3, few=Lanes(1, 8))),
    "stream": ((8, 1), "float32", "linear", "uniform", "bias", lambda p: streaming(on_cores(p, 8))),
    "stream pair": ((4, 4), "float32", "spmm", "uniform", "swiglu", lambda p: streaming(on_cores(p))),
    "stream units": ((16, 6), "float16", "linear", "uniform", "bias", lambda p: streaming(on_units(p, 16))),
    "empty": ((4, 4), "float32", "linear", "empty", "bias", lambda p: streaming(on_cores(p))),
}  # fmt: skip


def case(name):
    """A plan that shares, and a weight of two block rows, two pairs of them, or six of very different lengths."""
    (R, C), dtype, operator, kind, epilogue, plan_of = PLANS[name]
    rows = R * (4 if epilogue in ("swiglu", "geglu") else 2 + 4 * (kind == "powerlaw"))
    weight = make_weight(kind, (rows, C * (24 if C > 1 else 150) - C // 2), (R, C), "float32", seed=5)
    data = np.rint(weight.data * 40) if dtype == "int8" else weight.data
    weight = Weight(weight.pattern, data.astype(DTYPES[dtype].numpy))
    out = "float32" if dtype == "float16" else None  # which hides no order of sums
    most = 36 if kind == "powerlaw" else 12
    return split(plan_of(problem_of(weight, operator, epilogue, dtype, None, out)), most), weight


@pytest.mark.parametrize("name", PLANS)
def test_shared_launches(name, rng, tmp_path, monkeypatch):
    plan, weight = case(name)
    kernel = with_workspace(emulated(plan, weight, tmp_path), plan)
    assert kernel.artifact.manifest.workspace_bytes == plan.workspace_bytes
    monkeypatch.setenv("EMULATED_TOGETHER", "4")
    assert_shared(kernel, plan.problem, weight, rng, (1, 16, 100))
    check_device_calls(kernel, plan.problem, weight, rng, (0, 150))


def test_every_step_has_one_share():
    """The arithmetic of templates/cuda/split.cuh.j2: shares meet units in slots of their own, within the workspace."""
    for units, length, most in ((1, 40, 12), (3, 50, 12), (5, 90, 12), (6, 77, 13), (4, 9, 12)):
        sharing = Sharing(most, 2, 100)
        shares, line = sharing.shares(units, length), np.arange(length)
        assert shares == units or (shares % units == 0 and units < shares <= min(most, length // 2))
        ends = length * np.arange(shares + 1) // shares
        owner = ((line + 1) * shares - 1) // length
        np.testing.assert_array_equal(owner, np.repeat(np.arange(shares), np.diff(ends)))
        unit = np.sort(np.arange(length) * 7 % units)  # units of any lengths
        slots = {(o, u): o + u for o, u in zip(owner, unit, strict=True)}
        assert len(set(slots.values())) == len(slots)
        assert 4 * COUNTERS + 100 * (max(slots.values()) + 1) <= sharing.workspace_bytes


MUTATIONS = {
    "no fence": ("    __threadfence();\n    __syncthreads();", "    __syncthreads();"),
    "counted first": (
        "    __threadfence();\n    __syncthreads();\n    if (threadIdx.x == 0) {",
        "    __syncthreads();\n    if (threadIdx.x != 0) __threadfence();\n    if (threadIdx.x == 0) {",
    ),
    "others' stores not awaited": ("    __threadfence();\n    __syncthreads();", "    __threadfence();"),
    "no fence behind the count": ("    __threadfence();\n    return true;", "    return true;"),
    "the count not awaited": ("    }\n    __syncthreads();\n    if (!*is_last)", "    }\n    if (!*is_last)"),
    "counter not reset": ("if (*is_last) a.arrived[unit] = 0;", ""),
    "never the last": ("(unsigned)parts - 1", "(unsigned)parts"),
    "all of them the last": ("if (!*is_last) return false;", ""),
    "another order": ("(part + number) * (Work", "(2 * first + parts - 1 - part + number) * (Work"),
    "one slot for two": ("leave<Work>(a, sums, any, mine + number,", "leave<Work>(a, sums, any, mine,"),
    "whole units where there is no workspace": ("        if (a.shares) {", "        if (a.parts) {"),
    "sums of the unit before": ("total[i] = 0;", ";"),
    "the step before as well": ("from > 0 ? from - 1 : 0, end", "from > 1 ? from - 2 : 0, end"),
    "a part of the line": ("begin_of(blockIdx.x + 1,", "begin_of(blockIdx.x,"),
    "panels of the part before": ("        __syncthreads(); /* shared memory", "        /* shared memory"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_found(name, rng, tmp_path, monkeypatch):
    """Not only by wrong sums: other bits than without a workspace, or a counter that is left."""
    old, new = MUTATIONS[name]
    plan, weight = case("units powerlaw" if name == "sums of the unit before" else "units")

    def change(text):
        assert old in text
        return text.replace(old, new)

    kernel = with_workspace(emulated(plan, weight, tmp_path, change), plan)
    monkeypatch.setenv("EMULATED_TOGETHER", "3")
    with pytest.raises((AssertionError, DeviceError, pytest.fail.Exception)) as found:
        assert_shared(kernel, plan.problem, weight, rng, (40, 100))
    assert found.type is not DeviceError or said(kernel.artifact)


# ── who has which memory ─────────────────────────────────────────────────────────────────────────────────────────────


def test_workspaces_of_streams_and_graphs():
    made = []

    def make():
        made.append(len(made) + 1)
        return made[-1]

    w = Workspaces()
    assert w.of(0, 7, capture=5, make=make) == 0  # nothing may be allocated now
    first = w.of(0, 7, 0, make)
    assert made == [1, 2]  # the stream's, and one for the next graph
    assert w.of(0, 7, 0, make) == first
    graph = w.of(0, 7, 6, make)
    assert graph == w.of(0, 7, 6, make) == 2
    assert w.of(0, 8, 6, make) == 0  # another branch of that graph may run beside it, and no spare one is left
    assert w.of(0, 7, 9, make) == 0
    w.reserve(0, make)
    with w.in_turn():
        one = w.of(0, 7, 10, make)
        assert w.of(0, 8, 11, make) == one  # graphs that never run at the same time
    assert one not in (first, graph)
    assert w.of(0, 8, 0, make) not in (first, graph)
    assert len({w.of(0, 7, 9, make), w.of(1, 7, 0, make), first, graph}) == 4
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(w.of, 0, PER_THREAD, 0, make).result() != w.of(0, PER_THREAD, 0, make)


# ── when it pays ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("shape", "block", "dtype"), [
    ((768, 4096), (64, 64), "float16"), ((768, 4096), (16, 16), "bfloat16"), ((768, 4096), (16, 16), "float32"),
    ((256, 16384), (32, 1), "float16"),
])  # fmt: skip
def test_few_long_rows_are_shared(shape, block, dtype):
    weight = random_weight(0, shape, block, 0.2)
    problem = problem_of(weight, "linear", (), dtype)
    for n, shared in ((32, True), (64, True), (4096, False)):
        (_, best), *others = tune.rank(list(candidates(problem, SM80)), n)
        assert bool(best.split and n <= best.few_n) == shared
        assert best.workspace_bytes <= WORKSPACE_BYTES
        if shared:
            whole = min(plan.counts(n).cycles for _, plan in others if not plan.split)
            assert best.counts(n).cycles < whole
