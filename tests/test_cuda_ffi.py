"""The CUDA artifact as a function of TVM FFI, in emulation: arrays that say they are on a GPU, streams, errors."""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from device_emulation import emulated
from programs import run as run_program
from programs import tool
from support import REPOSITORY, assert_right, problem_of
from test_cuda import plan_of

from bsrgen.dtypes import DTYPES, HOPPER
from bsrgen.pattern import random_weight

STEPS = ("bias", "clamp", "residual")
CUDA, CPU = 2, 1
HOST = """
#include <stdint.h>
#include <stdio.h>
#include "stream.h"
static struct emulated_stream stream = {.capturing = 1};
static char said[600];
static int asked[2] = {-1, -1};
void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *text)
{
    snprintf(said, sizeof said, "%s: %s", kind, text);
}
void *TVMFFIEnvGetStream(int32_t type, int32_t id) { return asked[0] = type, asked[1] = id, &stream; }
const char *error(void) { return said; }
int recorded(void) { return asked[0] == 2 && asked[1] == 0 ? stream.count : -1; }
void *handle(void) { return &stream; }
"""


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device", ctypes.c_int32 * 2), ("rank", ctypes.c_int32), ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("offset", ctypes.c_uint64),
    )  # fmt: skip


class Number(ctypes.Union):
    _fields_ = (("integer", ctypes.c_int64), ("real", ctypes.c_double), ("object", ctypes.c_void_p))


class Value(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("zero", ctypes.c_uint32), ("number", Number))


def value(given, device=(CUDA, 0)):
    """A number, None or an array as TVM FFI gives it; and what must live as long."""
    if given is None:
        return Value(0), None
    if not isinstance(given, np.ndarray):
        real = isinstance(given, float)
        return Value(3 if real else 1, 0, Number(**{"real" if real else "integer": given})), None
    sizes = (ctypes.c_int64 * given.ndim)(*given.shape)
    strides = (ctypes.c_int64 * given.ndim)(*(s // given.itemsize for s in given.strides))
    kind = device if given.flags.writeable else (CPU, 0)  # a read-only one stands for one elsewhere
    tensor = Tensor(
        given.ctypes.data, (ctypes.c_int32 * 2)(*kind), given.ndim, 2, given.itemsize * 8, 1, sizes, strides, 0
    )
    return Value(7, 0, Number(object=ctypes.addressof(tensor))), (tensor, given)


def call(library, name, *args, devices=None):
    """The status of a call."""
    made = [value(arg, *([] if devices is None else [devices[i]])) for i, arg in enumerate(args)]
    values = (Value * len(made))(*(one for one, _ in made))
    return library[f"__tvm_ffi_{name}"](None, values, len(made), None)


def arrays(rng, n=5):
    x, bias, residual = rng.standard_normal((n, 24)), rng.standard_normal(37), rng.standard_normal((n, 37))
    return [a.astype(np.float32) for a in (x, bias, residual)]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    weight = random_weight(7, (37, 24), (4, 1), 0.3)
    problem = problem_of(weight, epilogue=STEPS)
    return emulated(plan_of(problem, rows=4), weight, tmp_path_factory.mktemp("ffi")), problem, weight


def test_types_are_dlpacks():
    """Codes of DLDataTypeCode in DLPack 1.1, those of the types that no CPU kernel has among them."""
    codes = {name: row.dlpack for name, row in (DTYPES | HOPPER).items()}
    assert (codes["float8_e4m3fn"], codes["bfloat16"]) == ((10, 8), (4, 16))
    assert (codes["int8"], codes["float16"]) == ((0, 8), (2, 16))


def test_arrays_of_a_gpu(kernel, rng):
    """Emulated memory is the CPU's: values go there in the first call and stay."""
    k, problem, weight = kernel
    library = ctypes.CDLL(str(k.artifact.library))
    for n in (5, 0, 40):
        x, bias, residual = arrays(rng, n)
        outer = np.full((n, 41), np.nan, np.float32)
        assert call(library, k.name, x, bias, -1.0, None, residual, outer[:, 1:38]) == 0
        assert_right(problem, weight, outer[:, 1:38], x, {"bias": bias, "lo": -1.0, "residual": residual})
        assert np.isnan(np.delete(outer, slice(1, 38), axis=1)).all()


def test_streams_and_errors_in_a_process_of_its_own(kernel, tmp_path):
    """TVM's two functions are looked up in the process: there, by a library that stands for it."""
    (tmp_path / "host.c").write_text(HOST)
    include = f"-I{REPOSITORY / 'tests' / 'cuda'}"
    run_program([tool("gcc"), "-shared", "-fPIC", include, tmp_path / "host.c", "-o", tmp_path / "libhost.so"])
    k = kernel[0]
    given = str(tmp_path / "libhost.so"), str(k.artifact.library), k.name
    text = f"import test_cuda_ffi as t; t.in_process{given!r}"
    result = subprocess.run([sys.executable, "-c", text], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def in_process(host, path, name):
    """What the test above does, in the process that it starts."""
    tvm, library = ctypes.CDLL(host, ctypes.RTLD_GLOBAL), ctypes.CDLL(path)
    tvm.error.restype, tvm.handle.restype = ctypes.c_char_p, ctypes.c_void_p
    x, b, r = arrays(np.random.default_rng(0))
    y = np.ones((5, 37), np.float32)
    assert call(library, name, x, b, 0.0, 1.0, r, y) == 0
    assert tvm.recorded() == 1, "recorded on the current stream of TVM FFI"
    assert call(library, name, x, b, 0.0, 1.0, r, y, tvm.handle()) == 0
    assert tvm.recorded() == 2, "and on one that is given"
    elsewhere, wide = x.copy(), np.ones((5, 37))
    elsewhere.flags.writeable = False
    other = [(CUDA, 0)] * 5 + [(CUDA, 1)]
    for args, devices, words in (
        ((elsewhere, b, 0.0, 1.0, r, y), None, b"ValueError: .* x is not in the memory of an NVIDIA GPU"),
        ((x, b, 0.0, 1.0, r, y), other, b"ValueError: .* y is on another GPU than x"),
        ((x, b, 0.0, 1.0, r, y), [(CUDA, 64)] * 6, b"ValueError: .* x is on a device whose number is out of range"),
        ((x, b, 0.0, 1.0, r, y), [(CUDA, 1)] * 6, b"RuntimeError: .* values: no such GPU"),
        ((x, b, np.ones(1, np.float32), 1.0, r, y), None, b"TypeError: .* lo is not a number; an array on a GPU"),
        ((x, b, 0.0, 1.0, r, wide), None, b"TypeError: .* y has another dtype than float32"),
        ((x, b, 0.0, 1.0, r, y, None), None, b"TypeError: .* stream is not a handle"),
        ((x, b, 0.0, 1.0, r), None, b"ValueError: .* takes x, its operands, y and perhaps a stream's handle"),
    ):
        assert call(library, name, *args, devices=devices) == -1
        assert re.match(words, tvm.error()), tvm.error()
    assert (y == 1).all()
    assert tvm.recorded() == 2
