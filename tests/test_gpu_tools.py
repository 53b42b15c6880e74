"""What is around kernels for GPUs, without one: the driver's answers, target native, NVRTC, the clock."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from gpu_places import emulated_driver, forget
from support import make_weight, problem_of

from bsrgen import build, driver, gpu_clock, nvcc, nvrtc, tracks
from bsrgen.__main__ import main
from bsrgen.artifact import read_artifact, write_manifest
from bsrgen.backends.cuda import candidates, emit, trial
from bsrgen.backends.cuda.trial import KERNEL
from bsrgen.dtypes import DTYPES
from bsrgen.emit import Unit
from bsrgen.errors import BuildError, CompilerNotFoundError, DeviceError, UnsupportedError
from bsrgen.gpus import GPUS, as_gpus, code_for, native_gpu, runs_on
from bsrgen.loading import kernel_of
from bsrgen.package import describe
from bsrgen.pattern import Weight


def gpu(capability, sms=100):
    return driver.Gpu(0, "some GPU", capability, 80 << 30, sms, 50 << 20, 1.7)


@pytest.fixture
def no_driver(monkeypatch):
    monkeypatch.setattr(driver, "LIBRARY", "no such library")
    forget()
    yield
    forget()


# ── target native ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("capability", "row"), [
    ((7, 5), "sm_75"), ((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90"),
    ((10, 0), "sm_90"), ((12, 1), "sm_90"),
])  # fmt: skip
def test_native_is_the_row_of_the_first_gpu(capability, row, monkeypatch):
    monkeypatch.setattr(driver, "gpus", lambda: (gpu(capability, 44), gpu((7, 5))))
    (target,) = as_gpus("native")
    assert target.name.rstrip("a") == row
    assert target.sms == 44
    assert target.l2_bytes == 50 << 20
    named = GPUS[target.name]
    assert target.flop_per_cycle(4) == pytest.approx(named.flop_per_cycle(4) * 44 / named.sms)
    assert target.matrix_flop_per_cycle("float16") == pytest.approx(named.half_flop_per_cycle * 44 / named.sms)
    (both,) = as_gpus(("native", "sm_75"))
    assert both.archs == tuple(sorted({"sm_75", target.name}))


def test_native_without_a_gpu(no_driver):
    with pytest.raises(UnsupportedError, match=r"no usable NVIDIA driver.*give target=, one or several of sm_75"):
        as_gpus("native")
    assert tracks.on_gpu(GPUS["sm_80"]) is None


def test_native_on_an_old_gpu(monkeypatch):
    monkeypatch.setattr(driver, "gpus", lambda: (gpu((6, 1)),))
    with pytest.raises(UnsupportedError, match="older than all of sm_75"):
        native_gpu()


@pytest.mark.parametrize(("archs", "capability", "runs", "code"), [
    (("sm_80",), (8, 0), True, "sm_80"), (("sm_80",), (8, 6), True, "sm_80"), (("sm_80",), (7, 5), False, None),
    (("sm_80",), (9, 0), True, "sm_90"),  # from PTX
    (("sm_75", "sm_80"), (9, 0), True, "sm_90"),
    (("sm_75", "sm_86"), (8, 0), False, None),  # PTX is of the newest one only
    (("sm_90",), (9, 0), True, "sm_90"), (("sm_90a",), (9, 0), True, "sm_90a"), (("sm_90a",), (10, 0), False, None),
    (("sm_80", "sm_90a"), (8, 9), True, "sm_80"),
    (("sm_80", "sm_90a"), (10, 0), True, "sm_100"),
    (("sm_86",), (8, 0), False, None),
])  # fmt: skip
def test_which_code_a_gpu_runs(archs, capability, runs, code):
    assert runs_on(archs, capability) == runs
    if runs:
        assert code_for(archs, capability) == code


# ── the driver ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_driver(no_driver):
    with pytest.raises(DeviceError, match="no usable NVIDIA driver"):
        driver.gpus()


def test_what_the_driver_refuses_is_said_in_words(tmp_path):
    with emulated_driver(tmp_path):
        with pytest.raises(DeviceError, match=r"cuDeviceGet: emulated \(CUDA error 101\)"):
            driver.driver().get("int", "cuDeviceGet", 7)
        assert str(driver.gpus()[0]) == "emulated GPU: compute capability 8.0, 4 SMs, 1.0 GiB, L2 1 MiB"
        assert driver.version() == "13.0"


def test_the_doctor_names_what_is_there(no_driver, tmp_path, monkeypatch):
    monkeypatch.setenv(nvrtc.VARIABLE, "/nowhere/libnvrtc.so")

    def said():
        findings = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).output)["findings"]
        return {finding["what"]: (finding["status"], finding["detail"]) for finding in findings}

    without = said()
    assert without["gpu"] == ("ok", "none, which only calls of backend='cuda' need: no usable NVIDIA driver: "
                              "no such library cannot be loaded")  # fmt: skip
    assert without["nvrtc"][0] == "warn"
    monkeypatch.delenv(nvrtc.VARIABLE)
    monkeypatch.setattr(nvrtc, "NAMES", ())
    with emulated_driver(tmp_path):
        found = said()
    assert found["gpu"][1].startswith("0: emulated GPU: compute capability 8.0")
    assert found["gpu"][1].endswith("the driver knows CUDA 13.0")
    assert found["nvrtc"][0] == "ok"


def test_the_clock_of_a_gpu(tmp_path):
    """Launches are recorded before they are timed; progress ends at one; three rounds however short the time."""
    with emulated_driver(tmp_path), driver.on(0):
        launched, shares = {"a": 0, "b": 0}, []

        def launch(name, stream):
            assert stream
            launched[name] += 1

        contenders = {name: (lambda stream, name=name: launch(name, stream)) for name in launched}
        times = gpu_clock.measure(contenders, rounds=None, seconds=1e-9, progress=shares.append)
    assert all(len(timing.samples) == 3 and timing.min_s > 0 for timing in times.values())
    assert shares[-1] == 1
    for name, timing in times.items():
        assert launched[name] == gpu_clock.WARM + 1 + timing.calls
        assert 1 <= timing.calls <= gpu_clock.MOST_LAUNCHES


# ── NVRTC ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def needs_nvrtc():
    try:
        return nvrtc.find_nvrtc()
    except CompilerNotFoundError as e:
        pytest.skip(str(e))


def test_no_nvrtc(monkeypatch):
    monkeypatch.setenv(nvrtc.VARIABLE, "/nowhere/libnvrtc.so")
    with pytest.raises(CompilerNotFoundError, match=r"BSRGEN_NVRTC=/nowhere.* cannot be loaded; pip install 'bsrgen"):
        nvrtc.find_nvrtc()
    monkeypatch.delenv(nvrtc.VARIABLE)
    monkeypatch.setattr(nvrtc, "NAMES", ("libnowhere.so",))
    with pytest.raises(CompilerNotFoundError, match="none in the wheels and none that can be loaded"):
        nvrtc.find_nvrtc()


def source_of(dtype, operator="linear", arch="sm_80", turn=0):
    weight = make_weight("uniform", (40, 96), (8, 8), "float32")
    problem = problem_of(weight, operator, ("bias", "gelu", "residual"), dtype)
    data = np.rint(weight.data * 9) if dtype == "int8" else weight.data
    kinds: dict[str, object] = {}
    for plan in candidates(problem, as_gpus(arch)[0]):
        kinds.setdefault(type(plan).__name__, plan)
    plan = list(kinds.values())[turn]
    return emit((plan,), Weight(weight.pattern, data.astype(DTYPES[dtype].numpy))), weight


@pytest.mark.parametrize(("dtype", "operator", "arch", "turn"), [
    ("float32", "linear", "sm_75", 0), ("float64", "spmm", "sm_90", 0), ("int8", "linear", "sm_90", 0),
    ("float16", "linear", "sm_80", 0), ("float16", "spmm", "sm_80", 1), ("bfloat16", "spmm", "sm_90", 0),
    ("bfloat16", "linear", "sm_90a", 0),
])  # fmt: skip
def test_nvrtc_compiles_every_template(dtype, operator, arch, turn, needs_nvrtc):
    """To machine code, with nothing of a toolkit but NVRTC itself."""
    source, _ = source_of(dtype, operator, arch, turn)
    text = source.files[source.units[-1].file].decode()
    kernels = re.findall(KERNEL, text, re.M)
    headers = {name: data.decode() for name, data in source.files.items() if name.endswith(".h")}
    made = needs_nvrtc.compile(text, headers, kernels, arch)
    assert made.cubin.startswith(b"\x7fELF")
    assert len(made.lowered) == len(kernels) >= 2
    assert all(name in lowered for name, lowered in zip(kernels, made.lowered, strict=True))
    assert made.log.count("Compiling entry function") == len(kernels)


def test_nvrtc_says_what_is_wrong(needs_nvrtc):
    with pytest.raises(BuildError, match=r"NVRTC .*sm_80.*error: identifier .nonsense. is undefined"):
        needs_nvrtc.compile("__global__ void k(int *a) { *a = nonsense; }", {}, ("k",), "sm_80")


def test_a_trial_loads_and_says_that_there_is_no_driver(needs_nvrtc, no_driver, tmp_path):
    try:
        if not nvcc.find_nvcc().takes_code:
            pytest.skip("CUDA 13 or newer is needed")
    except CompilerNotFoundError as e:
        pytest.skip(str(e))
    source, weight = source_of("float32", arch=("sm_75", "sm_80"))
    quick = trial(source, tracks.GpuTrack(gpu((8, 6))))
    assert quick.units[-1].flags == ("sm_80",)
    assert quick.tools.startswith("NVRTC ")
    compiler = build.find_compiler(quick.plans[0].target)
    build.build(quick, tmp_path, compiler)
    log = (tmp_path / "build.log").read_text()
    assert "NVRTC" in log
    assert "nvcc -ccbin" not in log
    write_manifest(tmp_path, describe(quick, weight, compiler, (), tmp_path, {}))
    kernel = kernel_of(read_artifact(tmp_path))
    with pytest.raises(DeviceError, match=r"no usable NVIDIA driver \(status 1035"):
        kernel.upload()


def test_what_nvrtc_cannot_do_nvcc_does(tmp_path, monkeypatch):
    """A trial is not lost with its quicker compiler."""

    def no(*arguments):
        raise BuildError("no such thing")

    ran = []
    monkeypatch.setattr(build, "_in_two_parts", no)
    monkeypatch.setattr(build, "_run", lambda command, folder: ran.append(command) or "")
    monkeypatch.setattr(nvcc, "find_nvcc", lambda: nvcc.Nvcc("nvcc", "13.0.0", "/lib/libcudart_static.a"))
    unit = Unit("k_device.cu", ("sm_90",), ("k_many",))
    log = build._compile(unit, "k.o", build.Compiler("cc", "", ""), tmp_path)
    assert log.startswith("NVRTC: no such thing")
    assert "-gencode=arch=compute_90,code=sm_90" in ran[0]


def test_a_trial_without_nvrtc_is_for_one_gpu(monkeypatch):
    monkeypatch.setenv(nvrtc.VARIABLE, "/nowhere/libnvrtc.so")
    source, _ = source_of("float32", arch=("sm_75", "sm_80"))
    quick = trial(source, tracks.GpuTrack(gpu((8, 6))))
    assert quick.units[-1].flags == ("-gencode=arch=compute_80,code=sm_80",)
    assert replace(quick, units=source.units) == source
