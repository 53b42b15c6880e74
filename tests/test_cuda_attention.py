"""Softmax and attention at stored blocks by CUDA text without a GPU, under tests/cuda/cuda_runtime.h."""

import re

import numpy as np
import pytest
from device_emulation import GpuArray, build_emulated, said
from support import framed, make_weight
from test_cuda_compile import check_sass, disassembled
from test_cuda_pattern import emulated, needs_nvcc

import bsrgen
from bsrgen import attention, build, nvcc
from bsrgen.attention import attention_blocks, causal, global_, sliding_window
from bsrgen.backends.cuda import emit_pattern, plan_pattern
from bsrgen.errors import ArgumentError, DeviceError
from bsrgen.gpus import GPUS, as_gpus
from bsrgen.pattern_problem import as_pattern_problem

WINDOW = causal() & sliding_window(9) | global_(1)
CASES = {  # queries and keys, head (0: softmax alone), rule, blocks, type, heads
    "window": ((37, 37), 38, WINDOW, (16, 16), "float32", 3),
    "short blocks": ((21, 50), 5, sliding_window(7), (3, 5), "float64", 2),
    "half": ((70, 70), 64, causal(), (64, 32), "bfloat16", 1),
    "whole": ((20, 33), 33, np.ones((20, 33), bool), (8, 16), "float16", 2),
    "nothing": ((9, 40), 16, np.zeros((9, 40), bool), (4, 16), "float32", 2),
    "rows": ((37, 70), 0, WINDOW, (16, 16), "float32", 3),
    "rows of all": ((37, 41), 0, None, (3, 5), "float64", 2),
    "rows of half": ((37, 40), 0, causal(), (3, 5), "float16", 2),
}  # fmt: skip


def problem_of(name):
    sizes, head, rule, blocks, dtype, heads = CASES[name]
    if rule is None:
        return as_pattern_problem("softmax", make_weight("uniform", sizes, blocks, "float32").pattern, dtype), heads
    pattern, mask = attention_blocks(rule, *sizes, blocks)
    operator = "attention" if head else "softmax"
    return as_pattern_problem(operator, pattern, dtype, head=head, mask=mask if len(mask.bits) else None), heads


def check(kernel, problem, heads, rng, scale=0.5):
    for n in (heads, 1):
        arrays = problem.sample(rng, n)
        old = np.full(problem.result_shape(n), np.nan, problem.real.numpy)
        expected, bound = problem.reference(arrays, scale)
        y = GpuArray(kernel, old)
        assert kernel(*[GpuArray(kernel, a) for a in arrays], out=y, scale=scale) is y
        error = np.abs(y.fetch().astype(np.float64) - expected)
        assert (error <= bound).all(), f"{(~(error <= bound)).sum()} of {error.size} wrong, {np.nanmax(error / bound)}"


@pytest.mark.parametrize("name", CASES)
def test_matches_numpy(name, rng, tmp_path):
    problem, heads = problem_of(name)
    check(emulated(plan_pattern(problem, GPUS["sm_80"]), tmp_path), problem, heads, rng)


MUTATIONS = {
    "attention": {
        "keys past the end": ("t0 + (int)threadIdx.x < last ?", "t0 + (int)threadIdx.x <= last ?"),
        "no barrier before K": ("        __syncthreads(); /* nobody reads V", "        /* nobody reads V"),
        "no barrier after K": (
            "a.k + head * K * HEAD, keys);\n        __syncthreads();",
            "a.k + head * K * HEAD, keys);",
        ),
        "sums not brought along": ("sums[q][j] *= before;", "sums[q][j] *= 1;"),
        "total not brought along": ("total[q] * before", "total[q]"),
        "mask of another row": ("a.masks[((int64_t)(kind - 1) * R + r)", "a.masks[((int64_t)(kind - 1) * R + r / 2)"),
        "another mask": ("(kind - 1) * R", "kind % 2 * R"),
        "elements behind the head": ("d < HEAD) a.y", "d < PADDED) a.y"),
        "wrong row of Y": ("m = i * R + r, d = 32 * j + lane;", "m = i * R + r - (r > 8), d = 32 * j + lane;"),
        "no scale": ("a.scale * scores[q]", "scores[q]"),
        "a head for all": ("a.v + head * K", "a.v + 0 * head * K"),
        "a weight of another key": ("KEYS + t] * v", "KEYS + (t ^ 1)] * v"),
    },
    "softmax": {
        "a lane left out": (
            "distance = 16; distance; distance /= 2) v +=",
            "distance = 8; distance; distance /= 2) v +=",
        ),
        "largest of some": ("top = largest(top);", "top = v_max(top, (real)-3);"),
        "padding is not zero": ("a.y[at] = there && ", "a.y[at] = "),
        "no columns end": ("return key < K ? key : -1;", "return key;"),
    },
}
VICTIMS = {"attention": "window", "softmax": "rows of all"}


@pytest.mark.parametrize(("name", "mutation"), [(name, m) for name, rows in MUTATIONS.items() for m in rows])
def test_mutation_is_found(name, mutation, rng, tmp_path):
    old, new = MUTATIONS[name][mutation]

    def change(text):
        assert old in text
        return text.replace(old, new)

    problem, heads = problem_of(VICTIMS[name])
    kernel = emulated(plan_pattern(problem, GPUS["sm_80"]), tmp_path, change)
    with pytest.raises((AssertionError, DeviceError)) as found:
        check(kernel, problem, heads, rng, 3.0)
    assert found.type is not DeviceError or said(kernel.artifact)


GATES = {"attention": ("half", ("sm_75", "sm_90"), ("LDS.128", "FFMA", "MUFU.EX2", "SHFL.BFLY")),
         "softmax": ("rows", ("sm_90",), ("MUFU.EX2", "SHFL.BFLY"))}  # fmt: skip


@pytest.mark.parametrize("name", GATES)
def test_nothing_is_spilled(name, tmp_path):
    needs_nvcc()
    case, archs, wanted = GATES[name]
    (target,) = as_gpus(archs)
    problem, _ = problem_of(case)
    source = emit_pattern((plan_pattern(problem, target),))
    library = build.build(source, tmp_path, build.find_compiler(target))
    log = (tmp_path / "build.log").read_text()
    assert log.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == len(archs)
    assert {int(size) for size in re.findall(r"(\d+) bytes smem", log)} <= {source.plans[0].shared_bytes}
    check_sass(disassembled(library), wanted)


def test_compile(tmp_path, monkeypatch, rng):
    """By the front door, the compiler that of the emulation."""
    monkeypatch.setattr("bsrgen.build.build", build_emulated)
    monkeypatch.setattr(nvcc, "identity", lambda: "emulated")
    kernel = attention.compile(40, 20, causal() & sliding_window(9), blocksize=(16, 16), backend="cuda", target="sm_80")
    assert "backend='cuda'" in kernel.source
    loaded = bsrgen.load(kernel.save(tmp_path / "k"))
    q, k, v = (rng.standard_normal((2, 3, 40, 20)).astype(np.float32) for _ in range(3))
    y = GpuArray(loaded, np.zeros((2, 3, 40, 20), np.float32))
    assert loaded(GpuArray(loaded, q), GpuArray(loaded, k), GpuArray(loaded, v), out=y) is y
    heads = [a.reshape(6, 40, 20) for a in (q, k, v)]
    expected, bound = kernel.problem.reference(heads, 20**-0.5)
    assert (np.abs(y.fetch().reshape(6, 40, 20) - expected) <= bound).all()
    with pytest.raises(ArgumentError, match="not contiguous"):
        loaded(GpuArray(loaded, framed(q[0, 0])), *[GpuArray(loaded, a[0, 0]) for a in (k, v)],
               out=GpuArray(loaded, np.zeros((40, 20), np.float32)))  # fmt: skip
    with pytest.raises(bsrgen.UnsupportedError, match="do not fit the shared memory"):
        attention.compile(40, 2000, causal(), backend="cuda", target="sm_80")
    with pytest.raises(bsrgen.UnsupportedError, match="it is of c, cuda"):
        attention.compile(40, 20, causal(), backend="mlir")
