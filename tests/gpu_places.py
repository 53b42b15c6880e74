"""Where the GPU suite runs: on a GPU, or with the same tests on the CPU, under the emulated runtime and driver.

What passes in emulation has not run on a GPU: it shows that the suite is sound and the text does what it says.
"""

import ctypes
import functools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_emulation import emulated
from programs import run as run_program
from programs import tool
from support import CANARY, REPOSITORY, assert_right, build_plan, frame_is_intact, framed

from bsrgen import driver, nvcc
from bsrgen.device import DeviceKernel
from bsrgen.errors import BsrgenError, DeviceError
from bsrgen.gpus import GpuTarget, as_gpus, native_gpu
from bsrgen.loading import kernel_of
from bsrgen.pattern import Weight
from bsrgen.plan import Plan
from bsrgen.problem import Problem

Array = np.ndarray[Any, Any]
EMULATION, GPU = "emulation", "gpu"
PLACES = (pytest.param(EMULATION, id=EMULATION), pytest.param(GPU, marks=pytest.mark.gpu, id=GPU))


@dataclass(frozen=True)
class Place:
    """A GPU or what stands for one: its target, and how a plan becomes a kernel there."""

    name: str
    target: GpuTarget
    build: Callable[[Plan, Weight, Path], DeviceKernel]

    @property
    def real(self) -> bool:
        """Whether it is a GPU."""
        return self.name == GPU


@contextmanager
def entered(name: str, folder: Path) -> Iterator[Place]:
    """The place of that name, its device the current one; skips where it is not to be had."""
    if name == GPU:
        if NO_GPU:
            pytest.skip(NO_GPU)
        (target,) = as_gpus("native")
        with driver.on(0):
            yield Place(name, target, built)
        return
    with emulated_driver(folder), driver.on(0):
        yield Place(name, native_gpu(), emulated)


def _no_gpu() -> str:
    """Why nothing runs on a GPU here; "" where it does."""
    try:
        driver.gpus()
        nvcc.find_nvcc()
        native_gpu()
    except DeviceError as e:
        return f"no CUDA device: {e}"
    except BsrgenError as e:
        return str(e)
    return ""


NO_GPU = _no_gpu()  # asked when tests are collected: later the driver may be the emulated one


@contextmanager
def emulated_driver(folder: Path) -> Iterator[None]:
    """tests/cuda/libcuda.c in place of the driver."""
    library = folder / "libcuda.so"
    if not library.is_file():
        source = REPOSITORY / "tests" / "cuda" / "libcuda.c"
        run_program([tool("gcc"), "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", source, "-o", library])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "LIBRARY", str(library))
        forget()
        try:
            yield
        finally:
            forget()


def forget() -> None:
    """What the driver was found to be."""
    driver.driver.cache_clear()
    driver._context.cache_clear()


def built(plan: Plan, weight: Weight, folder: Path) -> DeviceKernel:
    """Printed, compiled by nvcc and loaded."""
    kernel = kernel_of(build_plan(plan, weight, folder).artifact)
    assert isinstance(kernel, DeviceKernel)
    return kernel


# ── one call ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def run(kernel: DeviceKernel, x: Array, out: Array, given: dict[str, Any], **options: Any) -> Array:
    """One call, everything brought to the device and back; the result, which lies in `out`."""
    operands = {name: driver.Buffer(np.asarray(a)) if np.ndim(a) else a for name, a in given.items()}
    y = driver.Buffer(out)
    assert kernel(driver.Buffer(x), out=y, **operands, **options) is y
    return y.fetch()


def poisoned(problem: Problem, rng: Any, n: int) -> Array:
    """An output with nothing in it that a right result could be, unless the epilogue reads it."""
    old = problem.sample_out(rng, n)
    if not any(o.kind == "out" for step in problem.epilogue for o in step.operands):
        old[...] = -101 if old.dtype.kind == "i" else np.nan
    return old


def check(kernel: DeviceKernel, problem: Problem, weight: Weight, rng: Any, tokens: Any) -> None:
    """Calls with each N of `tokens` against float64: poisoned outputs, and frames that must stay as they are.  Hopper's
    kernels add in another order where X is not aligned."""
    exact = not kernel.plan.knobs.get("hopper")
    for n in tokens:
        x, given = problem.sample(rng, n)
        old = poisoned(problem, rng, n)
        plain = run(kernel, x, old.copy(), given)
        assert_right(problem, weight, plain, x, given, old)
        out = framed(old, fill=CANARY)
        if min(out.shape):
            inside = run(kernel, framed(x), out, given)
            assert_right(problem, weight, inside, x, given, old)
            assert not exact or inside.tobytes() == plain.tobytes()
            assert frame_is_intact(out)


# ── arrays of callers ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Caller:
    """A library whose arrays kernels take: to the device, back, a stream of its own as context; `makes` results."""

    name: str
    to: Callable[[Array], Any]
    back: Callable[[Any, "np.dtype[Any]"], Array]
    streaming: Callable[[], Any]
    makes: bool = True


CALLERS = ("torch", "cupy", "dlpack")


def caller(name: str, place: Place, patch: pytest.MonkeyPatch) -> Caller:
    """The library, or on the CPU what answers as it does."""
    package = "torch" if name == "dlpack" else name
    if not place.real:
        stand_in = {"torch": _torch_stand_in, "cupy": _cupy_stand_in}[package]()
        patch.setitem(sys.modules, package, stand_in)
        return stand_in.caller if name != "dlpack" else _dlpack(stand_in.caller)
    module = pytest.importorskip(package)
    if name == "cupy":
        return Caller(name, lambda a: module.asarray(_bits(a)), lambda a, dtype: module.asnumpy(a).view(dtype),
                      lambda: module.cuda.Stream(non_blocking=True))  # fmt: skip
    if not module.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    torch = Caller(
        name, lambda a: _torch_of(module, a), lambda a, dtype: _numpy_of(module, a, dtype),
        lambda: module.cuda.stream(module.cuda.Stream()),
    )  # fmt: skip
    return torch if name == "torch" else _dlpack(torch)


def _bits(a: Array) -> Array:
    return a.view(np.uint16) if a.dtype.name == "bfloat16" else a


def _torch_of(torch: Any, a: Array) -> Any:
    if a.dtype.name == "bfloat16":
        return torch.from_numpy(a.view(np.int16)).cuda().view(torch.bfloat16)
    return torch.from_numpy(a).cuda()


def _numpy_of(torch: Any, a: Any, dtype: "np.dtype[Any]") -> Array:
    bits = a.view(torch.int16) if dtype.name == "bfloat16" else a
    found: Array = bits.cpu().numpy()
    return found.view(dtype)


class _OnlyDLPack:
    """An array that says nothing but DLPack."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, number = self.array.__dlpack_device__()
        return int(kind), int(number)

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)


def _dlpack(torch: Caller) -> Caller:
    return Caller("dlpack", lambda a: _OnlyDLPack(torch.to(a)), lambda a, dtype: torch.back(a.array, dtype),
                  torch.streaming, makes=False)  # fmt: skip


class _StandIn(types.ModuleType):
    """A module that answers what device_arrays.py asks, for arrays of the emulated driver."""

    caller: Caller

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.handle, self.filling = 0, -1

    @contextmanager
    def fill(self, handle: int) -> Iterator[None]:
        """What is filled meanwhile is filled on that stream."""
        self.filling = handle
        try:
            yield
        finally:
            self.filling = -1

    @contextmanager
    def stream(self) -> Iterator[None]:
        made = driver.Stream()
        self.handle = made.handle
        try:
            yield
        finally:
            self.handle = 0


def _of_buffer(cls: type, array: Array) -> Any:
    made = cls()
    made.buffer, made.array, made.root = driver.Buffer(array), array, array
    return made


def _offset(made: Any) -> int:
    """Bytes from where its buffer begins."""
    return int(made.array.ctypes.data - made.root.ctypes.data)


def _fetched(made: Any, dtype: "np.dtype[Any]") -> Array:
    bytes_ = made.buffer.fetch().reshape(-1).view(np.uint8)[_offset(made) :]
    return np.ndarray(made.array.shape, dtype, bytes_.tobytes(), 0, made.array.strides)


def _torch_stand_in() -> Any:
    torch = _StandIn("torch")

    class Tensor:
        buffer: driver.Buffer
        array: Array
        root: Array
        is_cuda, requires_grad = True, False
        device = types.SimpleNamespace(index=0, type="cuda")
        dtype = property(lambda self: f"torch.{self.array.dtype.name}")
        shape = property(lambda self: self.array.shape)

        def stride(self) -> tuple[int, ...]:
            return tuple(s // self.array.itemsize for s in self.array.strides)

        def data_ptr(self) -> int:
            return int(self.buffer.__cuda_array_interface__["data"][0]) + _offset(self)

        def __getitem__(self, index: Any) -> Any:
            view = Tensor()
            view.buffer, view.array, view.root = self.buffer, self.array[index], self.root
            return view

        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

        def __dlpack__(self) -> Any:  # numpy's capsule of the same memory, which the CPU can reach here
            like = _bits(self.array)  # numpy's have no bfloat16, torch's do
            memory = (ctypes.c_uint8 * like.nbytes).from_address(self.data_ptr())
            return np.frombuffer(memory, like.dtype).reshape(like.shape).__dlpack__()

        def zero_(self) -> Any:
            assert torch.filling == torch.handle  # on the stream that the kernel goes to
            self.array[...] = 0
            self.buffer.store(self.array)
            return self

    Tensor.__module__ = "torch"
    made = functools.partial(_of_buffer, Tensor)
    torch.empty = lambda shape, dtype, device: made(np.full(shape, _poison(dtype), dtype))
    for name in ("float16", "float32", "float64", "int8"):
        setattr(torch, name, np.dtype(name))
    import ml_dtypes

    torch.bfloat16 = np.dtype(ml_dtypes.bfloat16)
    torch.is_grad_enabled = lambda: True
    torch.cuda = types.SimpleNamespace(
        current_stream=lambda device: types.SimpleNamespace(cuda_stream=torch.handle), stream=torch.fill,
        ExternalStream=lambda handle, device: handle, default_stream=lambda device: 0,
    )  # fmt: skip
    torch.caller = Caller("torch", made, _fetched, torch.stream)
    return torch


def _cupy_stand_in() -> Any:
    cupy = _StandIn("cupy")

    class Ndarray:
        buffer: driver.Buffer
        array: Array
        __cuda_array_interface__ = property(lambda self: self.buffer.__cuda_array_interface__)

        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

        def fill(self, value: int) -> None:
            assert cupy.filling == cupy.handle
            self.array[...] = value
            self.buffer.store(self.array)

    Ndarray.__module__ = "cupy"
    made = functools.partial(_of_buffer, Ndarray)
    cupy.empty = lambda shape, dtype: made(np.full(shape, _poison(np.dtype(dtype)), dtype))

    @contextmanager
    def device(number: int) -> Iterator[None]:
        assert number == 0
        yield

    cupy.cuda = types.SimpleNamespace(
        Device=device, get_current_stream=lambda: types.SimpleNamespace(ptr=cupy.handle), ExternalStream=cupy.fill
    )  # fmt: skip
    cupy.caller = Caller("cupy", lambda a: made(_bits(a)), lambda a, dtype: a.buffer.fetch().view(dtype), cupy.stream)
    return cupy


def _poison(dtype: "np.dtype[Any]") -> Any:
    return -101 if dtype.kind == "i" else np.nan
