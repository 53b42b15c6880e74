"""The CUDA backend up to the library: nvcc, its golden text, its registers and machine code, loading without a GPU."""

import difflib
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import REPOSITORY, make_weight, problem_of
from test_cuda import plan_of
from test_cuda_pit import case
from test_golden import Golden

import bsrgen
from bsrgen import api, build, nvcc
from bsrgen.backends.cuda import CudaPlan, Lanes, MatrixPlan, candidates, dynamic, emit
from bsrgen.backends.cuda.matrix import tokens
from bsrgen.backends.cuda.text import _variants
from bsrgen.dtypes import DTYPES
from bsrgen.errors import CompilerNotFoundError, DeviceError
from bsrgen.even import planned
from bsrgen.gpus import GPUS, as_gpus
from bsrgen.pattern import Weight, random_weight
from bsrgen.problem import as_problem

FOLDER = REPOSITORY / "tests" / "golden" / "cuda"
ARCHS = ("sm_75", "sm_80", "sm_90")
SIMT = Golden(
    "simt", "the SIMT kernel: two block rows of a thread block share columns of X", "linear", "float32", (18, 24),
    (5, 3), (), ("bias", "relu"),
)  # fmt: skip


@pytest.fixture
def needs_nvcc():
    try:
        nvcc.find_nvcc()
    except CompilerNotFoundError as e:
        pytest.skip(f"no nvcc: {e}")


# ── the text ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def golden_source(coming=False):
    weight = planned(SIMT.weight, 30, np.dtype(np.float32)) if coming else SIMT.weight
    problem = replace(SIMT.problem, pattern=weight.pattern)
    plan = CudaPlan(problem, GPUS["sm_80"], 5, 2, 12, Lanes(4, 32), Lanes(4, 1), 4)
    return emit((plan,), weight)


@pytest.mark.parametrize("coming", [False, True], ids=["static", "dynamic"])
def test_emitted_text_is_golden(coming, update_golden):
    source, folder = golden_source(coming), FOLDER / "dynamic" if coming else FOLDER
    files = {"device.cu": f"{source.name}_device.cu", "main.c": f"{source.name}.c", "header.h": f"{source.name}.h"}
    for short, name in files.items():
        text = source.files[name].decode("ascii").replace(f"bsrgen {bsrgen.__version__}", "bsrgen")
        assert not re.search(r"[ \t]$", text, re.M), f"{name}: blanks at the end of a line"
        assert "\n\n\n" not in text, name
        assert text.endswith("\n"), name
        assert not text.endswith("\n\n"), name
        if update_golden:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / short).write_text(text)
        golden = (folder / short).read_text()
        diff = difflib.unified_diff(golden.splitlines(), text.splitlines(), "golden", "emitted", lineterm="", n=1)
        assert text == golden, "emitted text changed; if that is meant, --update-golden:\n" + "\n".join([*diff][:60])
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == sorted(files)


def test_same_request_gives_same_bytes():
    assert dict(golden_source().files) == dict(golden_source().files)


# ── the compiler ─────────────────────────────────────────────────────────────────────────────────────────────────────


def fake(folder: Path, answer: str) -> str:
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\n{answer}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(("answer", "text"), [
    (None, "is not a program"), ("echo hello", "does not answer as nvcc does"), ("exit 1", "does not answer"),
    ("echo 'release 11.8, V11.8.89'; echo '#$ TOP=/nowhere'", "12.0 or newer"),
    ("echo 'release 13.0, V13.0.88'; echo '#$ TOP=/nowhere'", "no libcudart_static.a"),
])  # fmt: skip
def test_no_usable_nvcc(answer, text, tmp_path, monkeypatch):
    monkeypatch.setenv(nvcc.VARIABLE, str(tmp_path / "none") if answer is None else fake(tmp_path, answer))
    with pytest.raises(CompilerNotFoundError, match=text) as found:
        bsrgen.compile(random_weight(0, (8, 8), (2, 2), 0.5), backend="cuda", target="sm_80")
    assert "pip install 'bsrgen[cuda]'" in str(found.value)


def test_no_nvcc_anywhere(monkeypatch):
    monkeypatch.delenv(nvcc.VARIABLE, raising=False)
    monkeypatch.setattr("shutil.which", lambda *arguments, **options: None)
    with pytest.raises(CompilerNotFoundError, match="none on PATH and none in the wheels"):
        nvcc.find_nvcc()


# ── registers and machine code ───────────────────────────────────────────────────────────────────────────────────────

GATES = {
    "f32": (("linear", "float32", (32, 32), ("bias", "gelu")), {"rows": 8, "many": Lanes(4, 32), "stream_n": 16},
            ARCHS, ("LDG.E.128", "LDS.128", "LDG.E.NA.128.CONSTANT")),
    "f64": (("spmm", "float64", (16, 1), ("silu",)), {"rows": 8, "many": Lanes(2, 32)},
            ("sm_80",), ("DFMA",)),
    "bf16": (("linear", "bfloat16", (8, 8), ("bias", "gelu_tanh", "residual")), {"rows": 8, "many": Lanes(4, 32)},
             ("sm_75",), ()),
    "int8": (("spmm", "int8", (4, 4), ("swiglu", "tanh")), {"rows": 4, "many": Lanes(4, 32), "stream_n": 16},
             ("sm_75", "sm_90"), ("IDP.4A.S8.S8",)),
}  # fmt: skip
RING = ("LDSM.16.M", "LDGSTS.E.BYPASS.128", "LDG.E.128")
UNITS = {  # operator, type, block, architectures, instructions of the newest ones
    "f16": ("linear", "float16", (64, 64), ("sm_80", "sm_90"), ("HMMA.16816.F32", *RING)),
    "bf16": ("spmm", "bfloat16", (32, 1), ("sm_80",), ("HMMA.16816.F32.BF16", "LDSM.16.MT88", *RING[1:])),
    "int8": ("linear", "int8", (32, 32), ("sm_90",), ("IMMA.16832.S8.S8", *RING)),
    "quantized": ("linear", "int8", (64, 4), ("sm_80",), ("IMMA.16832.S8.S8", "LDSM.16.M", "LDG.E.128")),
    "sm_75": ("linear", "float16", (32, 8), ("sm_75",), ("HMMA.1688.F32", "LDSM.16.M", "LDG.E.128")),
}


@pytest.mark.parametrize("name", UNITS)
def test_nothing_is_spilled_beside_matrix_units(name, needs_nvcc, tmp_path):
    operator, dtype, block, archs, wanted = UNITS[name]
    (target,) = as_gpus(archs)
    weight = make_weight("uniform", (block[0] * 3, block[1] * 90 if block[1] == 1 else 270), block, "float32")
    x = "float32" if name == "quantized" else None
    problem = as_problem(operator, weight.pattern, dtype, x, None, ("bias", "silu"), quantize_x=x is not None)
    split = 2 * target.sms if "sm_80" in archs and not x else 0  # with and without
    features, wide = (32, 4) if name == "bf16" else (64, 2)
    rows = min(block[0], 64)
    plan = MatrixPlan(problem, target, rows, 1, features, tokens(wide), tokens(1), 64, 16, split)
    check_sass(compiled(plan, Weight(weight.pattern, weight.data.astype(problem.dtype.numpy)), tmp_path), wanted)


PIT = {  # axis, type, architectures, instructions
    "experts": ("experts", "bfloat16", ("sm_80",), ("HMMA.16816.F32.BF16", "VOTE", "ATOMS", *RING)),
    "features": ("features", "float16", ("sm_90",), ("HMMA.16816.F32", "VOTE", *RING)),
    "on cores": ("features", "float64", ("sm_80",), ("DFMA", "VOTE")),
}


@pytest.mark.parametrize("name", PIT)
def test_nothing_is_spilled_where_calls_leave_something_out(name, needs_nvcc, tmp_path):
    axis, dtype, archs, wanted = PIT[name]
    (target,) = as_gpus(archs)
    problem, weight = case(axis, dtype, (256, 256), epilogue=("bias", "silu"))
    plans = (plan for plan in candidates(problem, target) if plan.matrix == (dtype != "float64"))
    check_sass(compiled(next(plans), weight, tmp_path), wanted)


@pytest.mark.parametrize("name", GATES)
def test_nothing_is_spilled(name, needs_nvcc, tmp_path):
    """Registers and shared memory as ptxas reports them; loads of 128 bits in the machine code."""
    (operator, dtype, block, epilogue), knobs, archs, wanted = GATES[name]
    weight = make_weight("uniform", (block[0] * 5 - 3, block[1] * 9), block, "float32")
    if dtype in ("int8", "bfloat16"):
        weight = Weight(weight.pattern, np.rint(weight.data).astype(np.float32))
    problem = problem_of(weight, operator, epilogue, dtype)
    (target,) = as_gpus(archs)
    plan = replace(plan_of(problem, **knobs), target=target)
    if name == "f32":
        plan = replace(plan, few=Lanes(2, 16), few_n=64, split=2 * target.sms)
    data = Weight(weight.pattern, weight.data.astype(problem.dtype.numpy))
    check_sass(compiled(plan, data, tmp_path), wanted)


def on_units(problem, rows):
    return MatrixPlan(problem, GPUS["sm_80"], rows, 1, 64, tokens(2), tokens(1), 64, 16)


COMING = {  # ordinary cores whose thread blocks share columns, matrix units
    "f32": ((1, 1), "float32", ("sm_75",), lambda p: plan_of(p, 1, 8, 32, Lanes(4, 32), stream_n=16)),
    "units": ((32, 1), "bfloat16", ("sm_80",), lambda p: on_units(p, 32)),
    "int8": ((16, 16), "int8", ("sm_90",), lambda p: on_units(p, 16)),
}  # fmt: skip


@pytest.mark.parametrize("name", COMING)
def test_nothing_is_spilled_by_what_prepares_weights(name, needs_nvcc, tmp_path):
    block, dtype, archs, plan = COMING[name]
    coming = planned(random_weight(0, (block[0] * 300, 6000), block, 0), 5000, DTYPES[dtype].numpy)
    problem = problem_of(coming, "linear", "bias", dtype)
    compiled(replace(plan(problem), target=as_gpus(archs)[0]), coming, tmp_path)


def check_sass(sass, wanted):
    """Each of the instructions, which may be a choice of names, is there."""
    if sass is not None:
        assert {name: bool(re.search(name.replace(".", r"\."), sass)) for name in wanted} == dict.fromkeys(wanted, True)


def compiled(plan, weight, folder):
    """Nothing spilled, shared memory as planned; the machine code, None where nothing can read it."""
    library = build.build(emit((plan,), weight), folder, build.find_compiler(plan.target))
    log = (folder / "build.log").read_text()
    kernels = re.findall(r"Compiling entry function '\w+' for '(\w+)'", log)
    known = plan.problem.pattern.known
    assert sorted(kernels) == sorted(
        (len(_variants(plan)) + (0 if known else len(dynamic.KERNELS))) * plan.target.archs
    )
    assert log.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == len(kernels)
    assert "warning" not in log
    shared = max(map(int, re.findall(r"(\d+) bytes smem", log)))
    assert shared == plan.shared_bytes or (not known and plan.shared_bytes < shared <= 48 << 10)
    return disassembled(library)


def disassembled(library):
    """The machine code of all kernels, which use no local memory; None where nothing can read it."""
    if (tools := disassembler()) is None:
        return None
    environment = os.environ | {"PATH": os.pathsep.join((tools, os.environ["PATH"]))}
    sass = subprocess.run(
        ["cuobjdump", "-sass", library], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert not re.search(r"\b(LDL|STL)\b", sass), "local memory"
    return sass


def disassembler() -> str | None:
    """The folder with cuobjdump and nvdisasm: the toolkit's, that of their wheels of PyPI, or one on PATH."""
    wheel = nvcc._in_wheels("cuobjdump")
    folders = [Path(nvcc.find_nvcc().runtime).parents[1] / "bin", *([Path(wheel).parent] if wheel else [])]
    both = ("cuobjdump", "nvdisasm")
    if onpath := shutil.which("cuobjdump"):
        folders.append(Path(onpath).parent)
    return next((str(folder) for folder in folders if all((folder / tool).is_file() for tool in both)), None)


# ── the library ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Claims:
    """Says that it lies on a GPU."""

    def __init__(self, shape):
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "<f4", "data": (4096, False), "version": 3}


def test_compile_and_load_without_a_gpu(needs_nvcc, tmp_path):
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU")
    weight = random_weight(0, (48, 40), (8, 4), 0.3)
    options = {"backend": "cuda", "epilogue": "bias", "bias": np.ones(48), "tune": "measure"}
    kernel = bsrgen.compile(weight, target=("sm_80", "sm_90"), **options)
    m = kernel.artifact.manifest
    assert m.device == "cuda"
    assert m.check is None
    assert m.notes[-2:] == (api.UNCHECKED, api.NOT_RACED)
    assert m.tuning == ()
    assert kernel.plan.target == "sm_80,sm_90"
    assert "one GPU" in str(kernel)
    assert "__global__" in kernel.source
    again = bsrgen.compile(weight, target=("sm_90", "sm_80"), **options)
    assert again.artifact.folder == kernel.artifact.folder
    needs = subprocess.run(["ldd", kernel.artifact.library], capture_output=True, text=True, check=True).stdout
    assert not re.search("cuda|stdc", needs)
    kernel.update(Weight(weight.pattern, 2 * weight.data))
    folder = kernel.save(tmp_path / "saved")
    loaded = bsrgen.load(folder)
    x, y = Claims((3, 40)), Claims((3, 48))
    y.__cuda_array_interface__["data"] = (1 << 20, False)
    for call in (lambda: loaded(x, out=y), lambda: kernel.upload()):
        with pytest.raises(DeviceError, match=r"no usable NVIDIA driver \(status 1035"):
            call()
    for command in ([shutil.which("gcc"), "-Wall", "-Wextra", "-Werror", "example.c", "-I.", "-L.", f"-l{m.name}",
                     "-Wl,-rpath,$ORIGIN", "-o", "example"], ["./example"]):  # fmt: skip
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "no usable NVIDIA driver\n")
