"""Products at a block pattern by CUDA text without a GPU, under tests/cuda/cuda_runtime.h; and their machine code."""

import re
import subprocess

import numpy as np
import pytest
from device_emulation import GpuArray, build_emulated, emulated_source, said
from programs import tool
from support import CANARY, frame_is_intact, framed, make_weight
from test_cuda_compile import check_sass, disassembled

import bsrgen
from bsrgen import build, nvcc
from bsrgen.backends.cuda import emit_pattern
from bsrgen.backends.cuda.pattern_candidates import pattern_candidates
from bsrgen.backends.cuda.pattern_plan import CoresPlan, UnitsPlan
from bsrgen.errors import ArgumentError, ArgumentTypeError, CompilerNotFoundError, DeviceError
from bsrgen.gpus import GPUS, as_gpus
from bsrgen.pattern import Weight
from bsrgen.pattern_device import PatternDeviceKernel
from bsrgen.pattern_problem import as_pattern_problem
from bsrgen.tracks import UNCHECKED
from bsrgen.verify import verify

SM80 = GPUS["sm_80"]


def problem_of(kind, shape, block, operator, dtype, epilogue=()):
    return as_pattern_problem(operator, make_weight(kind, shape, block, "float32").pattern, dtype, epilogue=epilogue)


def emulated(plan, folder, change=lambda text: text):
    p = plan.problem.pattern
    kernel = emulated_source(
        emit_pattern((plan,)), Weight(p, np.zeros((p.nnzb, *p.blocksize), np.int8)), folder, change
    )
    assert isinstance(kernel, PatternDeviceKernel)
    return kernel


def call(kernel, arrays, old, **given):
    """One call, everything brought to the "GPU" and back."""
    y = GpuArray(kernel, old)
    given = {name: GpuArray(kernel, a) if np.ndim(a) else a for name, a in given.items()}
    assert kernel(*[GpuArray(kernel, a) for a in arrays], out=y, **given) is y
    return y.fetch()


def check(kernel, problem, rng, lengths):
    """Plainly and inside frames of NaN, with scales of rows and what was there where the kernel takes them."""
    names = [step.name for step in problem.epilogue]
    for n in lengths:
        arrays, given, scale = problem.sample(rng, n), {}, 1.0
        old = np.full(problem.result_shape(n), np.nan, problem.real.numpy)
        if "scale" in names:
            given["scale"] = scale = rng.uniform(0.5, 2, problem.pattern.M).astype(problem.real.numpy)
        if "accumulate" in names:
            old = rng.standard_normal(old.shape).astype(old.dtype)
            given |= {"alpha": 2.0, "beta": -0.5}
        expected, bound = problem.reference(arrays, scale)
        if "accumulate" in names:
            expected, bound = 2 * expected - 0.5 * old, 3 * bound + 1e-6
        y = call(kernel, arrays, old.copy(), **given)
        error = np.abs(y.astype(np.float64) - expected)
        assert (error <= bound).all(), f"n = {n}: {(~(error <= bound)).sum()} of {y.size} wrong"
        if n and old.size:
            out = framed(old.reshape(1, -1), (1, 4), (1, 4), fill=CANARY)
            inside = GpuArray(kernel, out)
            memory = inside.__cuda_array_interface__
            inside.__cuda_array_interface__ = memory | {"shape": old.shape, "strides": None}
            near = [
                framed(a, (1, 8), (2, 8 + -a.shape[1] % 8)) if n % 2 else framed(a) for a in arrays
            ]  # vectors, or not
            kernel(*[GpuArray(kernel, a) for a in near], out=inside,
                   **{name: GpuArray(kernel, a) if np.ndim(a) else a for name, a in given.items()})  # fmt: skip
            np.testing.assert_array_equal(inside.fetch().reshape(y.shape), y)
            assert frame_is_intact(out)


CORES = (4, 4, 4, 8, 4)
CASES = {  # kind, shape, blocks, operator, type, epilogue, plan, knobs, lengths
    "nothing is a multiple": ("uniform", (23, 50), (3, 5), "sddmm", "float32", (),
        CoresPlan, (3, 2, 1, 16, 8), (0, 1, 37)),
    "linear, pieces": ("uniform", (70, 40), (37, 4), "linear_grad", "float64", ("scale",), CoresPlan, CORES, (1, 70)),
    "single elements": ("powerlaw", (20, 90), (1, 1), "linear_grad", "float32", ("scale", "accumulate"), CoresPlan,
                        (1, 4, 1, 8, 16), (0, 5, 130)),
    "one slice": ("full", (20, 12), (2, 8), "sddmm", "float16", (), CoresPlan, (2, 4, 4, 32, 1), (33,)),
    "one block": ("one", (33, 64), (1, 32), "linear_grad", "bfloat16", (), CoresPlan, (1, 2, 1, 16, 8), (9,)),
    "units, linear": ("uniform", (70, 90), (16, 16), "linear_grad", "bfloat16", (),
        UnitsPlan, (16, 1), (0, 1, 40, 151)),
    "units, gathered": ("uniform", (70, 90), (32, 1), "linear_grad", "float16", ("scale",),
        UnitsPlan, (32, 2), (4, 101)),
    "units, sddmm": ("banded", (70, 90), (8, 8), "sddmm", "float16", ("accumulate",), UnitsPlan, (8, 1), (1, 72, 133)),
    "units, odd": ("uniform", (50, 60), (20, 12), "sddmm", "bfloat16", (), UnitsPlan, (24, 1, 64, 2), (5, 65)),
    "empty": ("empty", (20, 12), (4, 4), "sddmm", "float32", (), CoresPlan, CORES, (4,)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_products_match_numpy(name, rng, tmp_path):
    kind, shape, block, operator, dtype, epilogue, plan, knobs, lengths = CASES[name]
    problem = problem_of(kind, shape, block, operator, dtype, epilogue)
    check(emulated(plan(problem, SM80, *knobs), tmp_path), problem, rng, lengths)


# ── every line matters ───────────────────────────────────────────────────────────────────────────────────────────────

MUTATIONS = {
    "cores": {
        "a feature too far": (
            "const int r = tile.within + f, t = tile.first + f - TILE_ROWS;",
            "const int r = tile.within + f, t = tile.first + f - TILE_ROWS + 1;",
        ),
        "padding is not zero": ("if (listed[f] < 0 || listed[TILE_ROWS + g] < 0) v = 0;\n    else v *=", "v *="),
        "wrong place": ("((int64_t)(t / C) * R + r) * C", "((int64_t)(t / C) * R + r + 1) * C"),
        "columns of others": ("|| g >= tile.count) return", ") return"),
        "past the end of N": ("k >= 0 && n0 + t < n ?", "k >= 0 && n0 + t <= n ?"),
        "no barrier": ("        __syncthreads(); /* nobody", "        /* nobody"),
        "one panel": ("other = panel, panel = next", "other = next"),
        "a step twice": ("listed, n0 + STEP, a.n);\n            fetch", "listed, n0, a.n);\n            fetch"),
        "a slice left out": ("s < SLICES - 1; s++", "s < SLICES - 2; s++"),
        "slices too early": ("    __syncthreads(); /* the panels", "    /* the panels"),
        "sums too early": ("    __syncthreads();\n    if (slice) return false;", "    if (slice) return false;"),
        "scale of another row": ("a.scale[listed[f]]", "a.scale[tile.within + f]"),
        "no alpha": ("    v *= a.alpha;\n", ""),
    },
    "units": {
        "one group too few": ("copies_wait<STAGES - 2>", "copies_wait<STAGES - 1>"),
        "no barrier": ("        __syncthreads();\n        if (n0", "        if (n0"),
        "ring too short": ("now + 1 < STAGES ?", "now + 2 < STAGES ?"),
        "a step left out": ("if (n0 + (STAGES - 1) * STEP < a.n)", "if (n0 + STAGES * STEP < a.n)"),
        "halves exchanged": ("rows[j] + 2 * half", "rows[j] + 2 - 2 * half"),
        "tokens of rows": ("panel + (t + lane) * A_STRIDE", "panel + (t + (lane ^ 8)) * A_STRIDE"),
        "columns exchanged": ("lane / 8 % 2 * 8);", "(1 - lane / 8 % 2) * 8);"),
        "tokens past the end": ("k >= 0 && n0 + t < n ? (size", "k >= 0 ? (size"),
        "wrong row": ("lane % 4 * 2 + e % 2", "lane % 4 * 2 + e / 2"),
        "no columns": ("if (c0 < tile.count)", "if (c0 + 16 < tile.count)"),
    },
}
VICTIMS = {  # in which all of them matter
    "cores": (
        ("uniform", (27, 41), (5, 3), "linear_grad", "float32", ("scale", "accumulate")),
        CoresPlan,
        (2, 2, 2, 8, 8),
    ),
    "units": (("uniform", (50, 92), (16, 16), "linear_grad", "float16"), UnitsPlan, (16, 1)),
}


def victim(name, folder, change=lambda text: text):
    of, plan, knobs = VICTIMS[name]
    problem = problem_of(*of)
    return emulated(plan(problem, SM80, *knobs), folder, change), problem


@pytest.mark.parametrize(("name", "mutation"), [(name, m) for name, rows in MUTATIONS.items() for m in rows])
def test_mutation_is_found(name, mutation, rng, tmp_path):
    old, new = MUTATIONS[name][mutation]

    def change(text):
        assert text.count(old) >= 1
        return text.replace(old, new)

    kernel, problem = victim(name, tmp_path, change)
    with pytest.raises((AssertionError, DeviceError)) as found:
        check(kernel, problem, rng, (129, 40))
    assert found.type is not DeviceError or said(kernel.artifact)


@pytest.mark.parametrize("name", VICTIMS)
def test_victim_is_right(name, rng, tmp_path):
    check(*victim(name, tmp_path), rng, (129, 40))


# ── machine code, the library, what is refused ───────────────────────────────────────────────────────────────────────

GATES = {  # shape, blocks, operator, type, plan, knobs, architectures, instructions
    "units": ((200, 300), (64, 8), "linear_grad", "bfloat16", UnitsPlan, (64, 2), ("sm_80", "sm_90"),
              ("HMMA.16816.F32.BF16", "LDSM.16.MT88", "LDGSTS.E.BYPASS.128")),
    "units, gathered": ((200, 300), (32, 1), "linear_grad", "float16", UnitsPlan, (32, 2), ("sm_75",),
                        ("HMMA.1688.F32", "LDSM.16.MT88")),
    "cores": ((200, 300), (16, 16), "sddmm", "float32", CoresPlan, (8, 8, 2, 16, 4), ("sm_75", "sm_90"),
              ("FFMA", "LDS.128")),
}  # fmt: skip


@pytest.mark.parametrize("name", GATES)
def test_nothing_is_spilled(name, tmp_path):
    shape, block, operator, dtype, plan, knobs, archs, wanted = GATES[name]
    needs_nvcc()
    (target,) = as_gpus(archs)
    problem = problem_of("uniform", shape, block, operator, dtype, ("scale", "accumulate"))
    source = emit_pattern((plan(problem, target, *knobs),))
    library = build.build(source, tmp_path, build.find_compiler(target))
    log = (tmp_path / "build.log").read_text()
    assert log.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == len(archs)
    assert "warning" not in log
    assert {int(size) for size in re.findall(r"(\d+) bytes smem", log)} == {source.plans[0].shared_bytes}
    check_sass(disassembled(library), wanted)


def needs_nvcc():
    try:
        nvcc.find_nvcc()
    except CompilerNotFoundError as e:
        pytest.skip(f"no nvcc: {e}")


def test_compile_and_load(tmp_path, monkeypatch):
    """By the front door, the compiler that of the emulation: store, folder, verify, example in C."""
    monkeypatch.setattr("bsrgen.build.build", build_emulated)
    monkeypatch.setattr(nvcc, "identity", lambda: "emulated")
    weight = make_weight("uniform", (64, 40), (16, 8), "float32")
    kernel = bsrgen.compile(weight, "linear_grad", dtype="float16", backend="cuda", target="sm_80", epilogue="scale")
    m = kernel.artifact.manifest
    assert (m.device, m.check) == ("cuda", None)
    assert m.notes == (UNCHECKED,)
    assert "__global__" in kernel.source
    assert "backend='cuda'" in kernel.source
    loaded = bsrgen.load(kernel.save(tmp_path / "k"))
    assert all(finding.ok for finding in verify(tmp_path / "k")[1])
    rng = np.random.default_rng(0)
    check(loaded, kernel.problem, rng, (9,))
    a, b = kernel.problem.sample(rng, 9)
    y = call(loaded, (a, b), np.empty(kernel.problem.result_shape(9), np.float32), scale=0.5)
    error = np.abs(y - kernel.problem.reference((a, b), 0.5)[0])
    assert (error <= kernel.problem.reference((a, b), 0.5)[1]).all()
    run = [tool("gcc"), "-Wall", "-Wextra", "-Werror", "example.c", "-I.", "-L.", f"-l{m.name}", "-Wl,-rpath,$ORIGIN"]
    for command in ([*run, "-o", "example"], ["./example"]):
        result = subprocess.run(command, cwd=tmp_path / "k", capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (0, "")
    assert "no error" in result.stdout
    gpu, x, y = (lambda array, **how: GpuArray(loaded, array, **how)), a.T.copy().T, y.copy()
    for arguments, given, error, says in (
        ((gpu(a),), {"scale": 1.0}, ArgumentTypeError, "takes a, b"),
        ((gpu(a), gpu(b[:8])), {"scale": 1.0}, ArgumentError, r"b has shape \(8, 40\), expected \[9, 40\]"),
        ((gpu(a), gpu(b)), {}, ArgumentTypeError, "'scale' is missing"),
        ((gpu(a), gpu(b)), {"scale": gpu(np.ones(40, np.float32))}, ArgumentError, "scale has shape"),
        ((gpu(a), gpu(b)), {"scale": 1.0, "out": gpu(y[:1])}, ArgumentError, "out has shape"),
        ((gpu(x), gpu(b)), {"scale": 1.0, "out": gpu(y)}, ArgumentError, "rows must be contiguous"),
        ((gpu(a), gpu(b)), {"scale": 1.0, "threads": 2}, ArgumentError, "give stream="),
        ((gpu(a), gpu(b)), {"scale": 1.0, "beta": 1.0}, ArgumentTypeError, "unexpected operand 'beta'"),
        ((a, b), {"scale": 1.0}, ArgumentTypeError, "not on an NVIDIA GPU"),
        ((gpu(a.astype(np.float32)), gpu(b)), {"scale": 1.0}, ArgumentTypeError, "float32"),
    ):
        with pytest.raises(error, match=says):
            loaded(*arguments, **{"out": gpu(y)} | given)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plans(dtype):
    """Matrix units where blocks are tall enough and the architecture has them; all fit; the model has an opinion."""
    for block in ((1, 1), (32, 1), (8, 8), (37, 53)):
        problem = problem_of("uniform", (300, 400), block, "linear_grad", dtype)
        for arch in ("sm_75", "sm_80"):
            plans = list(pattern_candidates(problem, GPUS[arch]))
            assert any(plan.matrix for plan in plans) == (dtype == "bfloat16" and block[0] >= 8 and arch == "sm_80")
            assert not all(plan.matrix for plan in plans)
            for plan in plans:
                assert plan.shared_bytes <= 48 << 10
                assert plan.counts(300).cycles > plan.counts(3).cycles > 0
