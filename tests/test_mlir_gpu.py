"""The MLIR backend's kernels for GPUs: on the CPU in emulation, as machine code where there is nvcc, and on a GPU."""

import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from device_emulation import check_device_calls, said
from support import OPERATOR_NAMES, REPOSITORY, assert_right, make_weight, problem_of
from test_cuda_compile import Claims, disassembler

import bsrgen
from bsrgen import build, nvcc
from bsrgen.__main__ import main
from bsrgen.backends import BACKENDS
from bsrgen.backends.cuda import Lanes
from bsrgen.backends.mlir import MlirGpuPlan, candidates, emit, gpu_text, identity
from bsrgen.backends.mlir.formula import Formula
from bsrgen.backends.mlir.gpu_candidates import gpu_candidates
from bsrgen.choose import allowed
from bsrgen.device import DeviceKernel
from bsrgen.epilogues import EPILOGUES
from bsrgen.errors import ArgumentError, CompilerNotFoundError, DeviceError, UnsupportedError
from bsrgen.gpus import GPUS, as_gpus
from bsrgen.nvcc import find_nvcc
from bsrgen.pattern import Weight, random_weight
from bsrgen.stack import stacked
from bsrgen.targets import TARGETS

try:
    identity()
except UnsupportedError as e:
    pytest.skip(str(e), allow_module_level=True)

from mlir_gpu_emulation import emulated

SM80 = GPUS["sm_80"]
FEW, MANY = Lanes(4, 1), Lanes(2, 32)
ALL = ("bias", "scale", "relu", "gelu_tanh", "residual", "clamp", "accumulate")
OTHERS = ("silu", "sigmoid", "tanh", "gelu", "bias", "bias")
GOLDEN = REPOSITORY / "tests" / "golden" / "mlir" / "device.mlir"


def plan_of(problem, rows=4, warps=4, features=32, many=MANY, few=FEW, few_n=4, target=SM80):
    return MlirGpuPlan(problem, target, rows, warps, features, many, few, few_n)


@pytest.fixture
def needs_nvcc():
    try:
        gpu_text.gpu_identity()
    except CompilerNotFoundError as e:
        pytest.skip(f"no nvcc: {e}")


# ── right results, on the CPU ────────────────────────────────────────────────────────────────────────────────────────

# Every block shape and type, both operators, every pattern and way to lie in a thread block; neighbours differ in all.
CASES = [
    ((1, 1), "linear", ("float32",), "uniform", (1, 4, 32, Lanes(4, 32)), ALL),
    ((4, 4), "spmm", ("float16",), "powerlaw", (4, 8, 32, Lanes(2, 32)), OTHERS),
    ((32, 1), "linear", ("float16", "float16", "float32"), "uniform", (8, 4, 16, Lanes(4, 32)), ()),
    ((5, 7), "spmm", ("float32",), "empty", (5, 4, 16, Lanes(1, 32)), ("bias",)),
    ((1, 16), "linear", ("float64",), "banded", (1, 16, 64, Lanes(2, 32)), OTHERS),
    ((64, 64), "spmm", ("bfloat16", "float32", "bfloat16"), "full", (8, 4, 32, Lanes(4, 32)), ALL),
    ((3, 200), "linear", ("float32",), "one", (3, 4, 64, Lanes(1, 32)), ("relu",)),
    ((37, 53), "linear", ("bfloat16",), "uniform", (7, 8, 32, Lanes(2, 32)), ("silu",)),
    ((2, 3), "spmm", ("float64",), "uniform", (2, 4, 32, Lanes(2, 32)), ALL),
]


def typed(weight, name):
    return Weight(weight.pattern, weight.data.astype(bsrgen.dtypes.DTYPES[name].numpy))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0][0]}x{c[0][1]}-{c[1]}-{'-'.join(c[2])}")
def test_table(case, rng, tmp_path):
    (R, C), operator, types, kind, (rows, warps, features, many), epilogue = case
    shape = (R * max(2, 21 // R) + R // 2 + 1, C * max(2, 90 // C) - C // 2)
    weight = typed(make_weight(kind, shape, (R, C), "float32"), types[0])
    problem = problem_of(weight, operator, epilogue, *types)
    kernel = emulated(plan_of(problem, rows, warps, features, many), weight, tmp_path)
    try:
        check_device_calls(kernel, problem, weight, rng, (0, 1, 3, 33) if C > 20 else (0, 1, 4, 5, 33, 130))
        other = Weight(weight.pattern, (-weight.data).astype(weight.data.dtype))
        kernel.update(other)
        check_device_calls(kernel, problem, other, rng, (7,))
    except DeviceError:
        pytest.fail(said(kernel.artifact))


@pytest.mark.parametrize("shape", [(0, 7), (7, 0), (1, 1)], ids=str)
def test_shapes_without_rows_or_columns(shape, rng, tmp_path):
    weight = random_weight(0, shape, (2, 3), 1.0)
    problem = problem_of(weight, OPERATOR_NAMES[shape[0] % 2], ("bias",))
    check_device_calls(emulated(plan_of(problem, rows=2), weight, tmp_path), problem, weight, rng, (0, 1, 20))


def test_the_emulation_finds_mistakes(rng, tmp_path):
    """What the other tests prove: a kernel without its barrier, or with a shuffle over another distance, is wrong."""
    weight = make_weight("uniform", (24, 30), (4, 3), "float32")
    problem = problem_of(weight)
    barrier, shuffle = r"call void @llvm.nvvm.barrier.*", r"(shfl.sync.bfly.f32\(i32 -1, float %\w+, i32) 8,"
    for number, (pattern, instead, n) in enumerate(((barrier, "", 33), (shuffle, r"\1 4,", 2))):
        (folder := tmp_path / str(number)).mkdir()
        kernel = emulated(plan_of(problem), weight, folder, lambda text, p=pattern, i=instead: re.sub(p, i, text))
        with pytest.raises((pytest.fail.Exception, AssertionError, DeviceError)):
            check_device_calls(kernel, problem, weight, rng, (n, n, n, n))


@pytest.mark.parametrize("name", EPILOGUES)
def test_every_epilogue_can_be_printed(name):
    step, formula = EPILOGUES[name], Formula("f32")
    names = {o.symbol or o.name: f"%{o.name}" for o in step.operands}
    value = formula.value(step.c, names | {"v": "%sum"})
    assert value == f"%v{len(formula.lines) - 1}"
    assert all(f"%{o.name}" in "\n".join(formula.lines) for o in step.operands)


def test_formulas_of_other_kinds_are_refused():
    with pytest.raises(UnsupportedError, match=r"formula has .*cannot print"):
        Formula("f32").value("v[0]", {"v": "%sum"})


# ── plans ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_has_no_plan_says_what_to_do():
    weight = random_weight(1, (16, 16), (4, 4), 0.5)
    int8 = Weight(weight.pattern, np.rint(weight.data * 9).astype(np.int8))
    pair = stacked([weight, weight])
    for problem in (problem_of(int8, dtype="int8"), problem_of(pair, epilogue="swiglu")):
        with pytest.raises(UnsupportedError, match=r"'mlir' for sm_80; .* no int8, swiglu.*\(backend='cuda' has them"):
            allowed(BACKENDS["mlir"], problem, SM80)


def test_targets_are_for_cpus_or_for_gpus():
    weight = random_weight(1, (16, 16), (4, 4), 0.5)
    with pytest.raises(ArgumentError, match="for CPUs or for GPUs"):
        bsrgen.compile(weight, backend="mlir", target=("sm_80", "x86-64-v3"))
    with pytest.raises(ArgumentError, match="sm_75"):
        bsrgen.compile(weight, backend="mlir", target="sm_70")
    (both,) = BACKENDS["mlir"].targets(("sm_90", "sm_80"))
    assert both.archs == ("sm_80", "sm_90")
    assert BACKENDS["mlir"].targets("x86-64-v3") == (TARGETS["x86-64-v3"],)


def test_plans_are_the_ones_of_gpus():
    problem = problem_of(random_weight(1, (96, 96), (32, 1), 0.5), dtype="float16")
    plans = [*candidates(problem, SM80)]
    assert plans == [*gpu_candidates(problem, SM80)]
    assert all(plan.strips == 1 and plan.piece_rows == plan.rows for plan in plans)
    assert str(plans[0]).startswith("MLIR")
    assert plans[0].counts(128).cycles > 0


# ── texts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def golden_plan():
    weight = make_weight("uniform", (10, 12), (5, 2), "float32")
    return plan_of(problem_of(weight, epilogue=("bias", "relu")), rows=2, features=8), weight


def test_emitted_mlir_is_golden(update_golden):
    plan, weight = golden_plan()
    text = gpu_text.texts(plan, weight).files[f"{plan.problem.name}_device.mlir"].decode()
    text = text.replace(f"bsrgen {bsrgen.__version__}", "bsrgen")
    if update_golden:
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), "emitted text changed; if that is meant, --update-golden"
    assert not re.search(r"[ \t]$|\n\n\n", text, re.M)


# ── machine code ─────────────────────────────────────────────────────────────────────────────────────────────────────

GATES = {
    "f32": ("linear", "float32", (32, 1), ("bias", "gelu"), Lanes(4, 32), 128),
    "f16": ("spmm", "float16", (16, 16), ("bias", "silu", "residual"), Lanes(4, 32), 128),
}


@pytest.mark.parametrize("name", GATES)
def test_nothing_is_spilled(name, needs_nvcc, tmp_path):
    """Registers and shared memory as ptxas reports them, wide loads in PTX and machine code, nothing called."""
    operator, dtype, block, epilogue, many, most = GATES[name]
    weight = typed(make_weight("uniform", (block[0] * 5 - 3, block[1] * 9), block, "float32"), dtype)
    (target,) = as_gpus(("sm_75", "sm_90"))
    plan = plan_of(problem_of(weight, operator, epilogue), 8, 4, 16, many, target=target)
    (tmp_path / "again").mkdir()
    sources = [emit((plan,), weight) for _ in range(2)]
    assert dict(sources[0].files) == dict(sources[1].files), "PTX is not the same"
    folders = (tmp_path, tmp_path / "again") if name == "f32" else (tmp_path,)
    for folder in folders:
        build.build(sources[0], folder, build.find_compiler(target))
    assert len({(folder / f"lib{plan.problem.name}.so").read_bytes() for folder in folders}) == 1
    log, ptx = (tmp_path / "build.log").read_text(), sources[0].files[f"{plan.problem.name}_device.ptx"].decode()
    assert "warning" not in log
    assert log.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 2 * len(target.archs)
    assert max(map(int, re.findall(r"Used (\d+) registers", log))) <= most
    assert max(map(int, re.findall(r"(\d+) bytes smem", log))) <= plan.shared_bytes
    assert ptx.startswith("//")
    assert ".target sm_75" in ptx
    assert min(ptx.count("ld.shared.v4.b32"), ptx.count("ld.global.nc.v4.b32")) >= 2, (
        "16 bytes at a time, of X and of W"
    )
    assert [ptx.count(what) for what in ("shfl.sync.bfly", ".local", "call")] == [31, 0, 0]
    if (tools := disassembler()) is not None:
        environment = {"PATH": f"{tools}:/usr/bin:/bin"}
        command = ["cuobjdump", "-sass", tmp_path / f"{plan.problem.name}_device.fatbin"]
        sass = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        assert not re.search(r"\b(LDL|STL)\b", sass), "local memory"
        assert len(re.findall(r"\bLDS\.128\b", sass)) >= len(target.archs)


def test_compile_and_load_without_a_gpu(needs_nvcc, tmp_path):
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU")
    weight = random_weight(0, (48, 40), (8, 4), 0.3)
    more = {"backend": "mlir", "epilogue": "bias", "bias": np.ones(48)}
    kernel = bsrgen.compile(weight, target=("sm_80", "sm_90"), **more)
    m = kernel.artifact.manifest
    assert isinstance(kernel, DeviceKernel)
    assert m.device == "cuda"
    assert any("not checked by execution" in note for note in m.notes)
    assert identity() in m.compiler
    assert find_nvcc().identity in m.compiler
    steps = ("linalg.generic #product", "scf.for", "ptx_kernel", ".entry", "cudaLaunchKernel")
    assert all(text in kernel.source for text in steps)
    assert bsrgen.compile(weight, target=("sm_90", "sm_80"), **more).artifact.folder == kernel.artifact.folder
    needs = subprocess.run(["ldd", kernel.artifact.library], capture_output=True, text=True, check=True).stdout
    assert not re.search("cuda|stdc", needs)
    kernel.update(Weight(weight.pattern, 2 * weight.data))
    folder = kernel.save(tmp_path / "saved")
    loaded = bsrgen.load(folder)
    x, y = Claims((3, 40)), Claims((3, 48))
    y.__cuda_array_interface__["data"] = (1 << 20, False)
    for call in (lambda: loaded(x, out=y), loaded.upload):
        with pytest.raises(DeviceError, match=r"no usable NVIDIA driver \(status 1035"):
            call()
    for command in ([shutil.which("gcc"), "-Wall", "-Wextra", "-Werror", "example.c", "-I.", "-L.", f"-l{m.name}",
                     "-Wl,-rpath,$ORIGIN", "-o", "example"], ["./example"]):  # fmt: skip
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "no usable NVIDIA driver\n")


def test_without_a_toolkit_of_today(tmp_path, monkeypatch):
    weight = random_weight(0, (8, 8), (2, 2), 0.5)
    monkeypatch.setattr(
        nvcc, "find_nvcc", lambda: nvcc.Nvcc("nvcc", "12.4.0", str(tmp_path / "lib" / "libcudart_static.a"))
    )
    with pytest.raises(CompilerNotFoundError, match=r"has no cudaLibraryLoadData, which CUDA 13 has; pip install"):
        bsrgen.compile(weight, backend="mlir", target="sm_80")
    said = CliRunner().invoke(main, ["doctor"]).output
    assert "mlir gpu" in said
    assert "cudaLibraryLoadData" in said


def test_doctor_names_the_way_to_gpus(needs_nvcc):
    assert gpu_text.gpu_identity() in CliRunner().invoke(main, ["doctor", "--json"]).output


# ── on a GPU ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("operator", "dtype"), [*product(OPERATOR_NAMES, ("float32", "float16"))])
def test_on_a_gpu(operator, dtype, needs_nvcc, rng):
    if not Path("/dev/nvidiactl").exists():
        pytest.skip("no CUDA device")
    torch = pytest.importorskip("torch", reason="no torch, whose arrays lie on a GPU")
    target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    weight = typed(random_weight(3, (96, 80), (16, 4), 0.3), dtype)
    kernel = bsrgen.compile(weight, operator, dtype=dtype, backend="mlir", target=target if target in GPUS else "sm_80",
                            epilogue=("bias", "gelu"))  # fmt: skip
    for n in (1, 4, 33, 500):
        x, given = kernel.problem.sample(rng, n)
        on_gpu = {name: torch.from_numpy(a).cuda() for name, a in given.items()}
        y = kernel(torch.from_numpy(x).cuda(), **on_gpu)
        assert_right(kernel.problem, weight, y.cpu().numpy(), x, given)
