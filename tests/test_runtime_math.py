"""runtime/bsrgen_math.h against scipy (float), libm in long double (double) and mpmath; every vector and compiler."""

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path

import archspec.cpu
import numpy as np
import pytest
from scipy import special

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "runtime" / "math_test.c"
WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Wdouble-promotion", "-Werror")
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", *WARNINGS, "-shared", "-fPIC")
COMPILERS = [name for name in ("gcc", "clang-19", "clang") if shutil.which(name)]
CROSS = "aarch64-linux-gnu-gcc"
ISAS = {16: (), 32: ("avx2", "fma"), 64: ("avx512f",), 128: ("avx512f",)}  # by bytes of a vector; () is SSE2, no FMA

REALS = {4: np.float32, 8: np.float64}
SCIPY = {"exp": np.exp, "tanh": np.tanh, "erf": special.erf, "sigmoid": special.expit, "normcdf": special.ndtr}
ULP = {4: 2.0, 8: 3.0}  # normcdf: for x >= -1
TAIL = {4: 1e-6, 8: 1e-15}  # normcdf for x < -1: relative error, in units of 1 + x^2

every_function = pytest.mark.parametrize("name", SCIPY)
every_compiler = pytest.mark.parametrize("compiler", COMPILERS)
every_vector = pytest.mark.parametrize(("width", "lanes"), [(w, n) for w in (4, 8) for n in (2, 4, 8, 16)])


def compile_test(compiler: str, width: int, lanes: int, out: Path, isa: tuple[str, ...] = ()) -> None:
    """Compile math_test.c for one vector type; warnings are errors."""
    real = {4: "float", 8: "double"}[width]
    defines = [f"-DREAL={real}", f"-DREAL_BYTES={width}", f"-DLANES={lanes}", f"-I{ROOT / 'runtime'}"]
    machine = [f"-m{name}" for name in isa]
    subprocess.run([compiler, *FLAGS, *machine, *defines, str(SOURCE), "-o", str(out), "-lm"], check=True)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(compiler, width, lanes): the loaded library, compiled once; skips where the CPU lacks the instructions."""
    folder = tmp_path_factory.mktemp("math")
    host = archspec.cpu.host()

    @cache
    def built(compiler: str, width: int, lanes: int) -> ctypes.CDLL:
        isa = ISAS[max(16, width * lanes)] if host.family.name == "x86_64" else ()
        if missing := [name for name in isa if name not in host]:
            pytest.skip(f"this CPU has no {', '.join(missing)}")
        out = folder / f"{compiler}_{width}_{lanes}.so"
        compile_test(compiler, width, lanes, out, isa)
        return ctypes.CDLL(str(out))

    return built


@pytest.fixture(scope="module")
def exact(build):
    """exact(name, width): the function at samples(width), from scipy in double or from libm in long double."""

    @cache
    def values(name: str, width: int) -> np.ndarray:
        x = samples(width)
        if width == 4:
            with np.errstate(all="ignore"):
                return SCIPY[name](x.astype(np.float64))
        y = np.empty(len(x), np.longdouble)
        call(build(COMPILERS[0], width, 2), f"judge_{name}", x, y)
        return y

    return values


def call(library: ctypes.CDLL, symbol: str, *arrays: np.ndarray) -> None:
    """One call of math_test.c; arrays of one length."""
    library[symbol](*(ctypes.c_void_p(a.ctypes.data) for a in arrays), ctypes.c_int64(len(arrays[0])))


def apply(library: ctypes.CDLL, name: str, *x: np.ndarray) -> np.ndarray:
    """v_<name> elementwise, the last vector padded with zeros."""
    padded = [np.concatenate([a, np.zeros(-len(a) % 16, a.dtype)]) for a in x]
    y = np.empty_like(padded[0])
    call(library, f"test_{name}", *padded, y)
    return y[: len(x[0])]


@cache
def samples(width: int) -> np.ndarray:
    """Finite lanes: dense grids over where the functions change, every magnitude, random bit patterns."""
    rng = np.random.default_rng(width)
    real, words, count, edge = {
        4: (np.float32, np.uint32, 1_000_000, 110),
        8: (np.float64, np.uint64, 100_000, 760),
    }[width]
    grids = [np.linspace(-a, a, count // 4) for a in (edge, 40, 10, 1)]
    small = rng.choice([-1, 1], count // 4) * np.exp(rng.uniform(np.log(np.finfo(real).tiny), 0, count // 4))
    patterns = rng.integers(0, np.iinfo(words).max, count // 2, words).view(real)
    return np.concatenate([np.concatenate([*grids, small]).astype(real), patterns[np.isfinite(patterns)]])


def ulps(y: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """|y - exact| in units in the last place of y's type; equal infinities differ by 0."""
    with np.errstate(all="ignore"):
        rounded = exact.astype(y.dtype)
        error = np.abs(y - exact) / np.spacing(np.abs(rounded)).astype(exact.dtype)
    return np.where(np.isinf(rounded) | np.isinf(y), np.where(y == rounded, 0, np.inf), error)


def check(name: str, x: np.ndarray, y: np.ndarray, exact: np.ndarray) -> None:
    """What bsrgen_math.h promises of y = v_<name>(x)."""
    width = y.dtype.itemsize
    assert name == "exp" or np.all(np.abs(y) <= 1)
    tail = (x < -1) & (name == "normcdf")
    error = np.where(tail, 0, ulps(y, exact))
    worst = np.argmax(error)
    assert error[worst] <= ULP[width], f"v_{name}({x[worst]!r}) is {error[worst]:.2f} ulp off"
    x, y, exact = x[tail].astype(np.longdouble), y[tail], exact[tail]
    assert np.all(np.abs(y - exact) <= TAIL[width] * (1 + x * x) * exact + np.finfo(y.dtype).smallest_subnormal)


@every_function
@every_compiler
@every_vector
def test_errors_stay_within_their_bounds(build, exact, compiler, width, lanes, name):
    x = samples(width)
    check(name, x, apply(build(compiler, width, lanes), name, x), exact(name, width))


@every_function
@pytest.mark.parametrize("width", [4, 8])
def test_errors_against_mpmath(build, width, name):
    mp = pytest.importorskip("mpmath")
    function = {
        "exp": mp.exp,
        "tanh": mp.tanh,
        "erf": mp.erf,
        "sigmoid": lambda x: 1 / (1 + mp.exp(-x)),
        "normcdf": lambda x: mp.erfc(-x / mp.sqrt(2)) / 2,
    }[name]
    x = np.clip(np.random.default_rng(1).choice(samples(width), 2000), -140, 140)  # Phi(-140) > the least long double
    with mp.workdps(30):
        exact = np.array([np.longdouble(mp.nstr(function(mp.mpf(float(v))), 25)) for v in x])
    check(name, x, apply(build(COMPILERS[0], width, 2), name, x), exact)


@every_compiler
@every_vector
def test_special_values(build, compiler, width, lanes):
    real = REALS[width]
    inf, nan, tiny, huge = np.inf, np.nan, np.finfo(real).smallest_subnormal, np.finfo(real).max
    x = np.array([nan, -nan, inf, -inf, huge, -huge, 0.0, -0.0, tiny, -tiny], real)
    expected = {
        "abs": [nan, nan, inf, inf, huge, huge, 0.0, 0.0, tiny, tiny],
        "exp": [nan, nan, inf, 0.0, inf, 0.0, 1, 1, 1, 1],
        "tanh": [nan, nan, 1, -1, 1, -1, 0.0, -0.0, tiny, -tiny],
        "erf": [nan, nan, 1, -1, 1, -1, 0.0, -0.0, tiny, -tiny],
        "sigmoid": [nan, nan, 1, 0.0, 1, 0.0, 0.5, 0.5, 0.5, 0.5],
        "normcdf": [nan, nan, 1, 0.0, 1, 0.0, 0.5, 0.5, 0.5, 0.5],
    }
    for name, values in expected.items():
        y = apply(build(compiler, width, lanes), name, x)
        np.testing.assert_array_equal(y, np.array(values, real), name)
        np.testing.assert_array_equal(np.signbit(y[2:]), np.signbit(values[2:]), name)


@every_compiler
@every_vector
def test_min_and_max_let_a_nan_in_the_first_argument_through(build, compiler, width, lanes):
    library, real = build(compiler, width, lanes), REALS[width]
    a = np.array([1, 2, np.nan, 3, -np.inf, np.inf], real)
    b = np.array([2, 1, 0, np.nan, 5, 5], real)
    np.testing.assert_array_equal(apply(library, "min", a, b), [1, 1, np.nan, 3, -np.inf, 5])
    np.testing.assert_array_equal(apply(library, "max", a, b), [2, 2, np.nan, 3, 5, np.inf])


@every_vector
def test_compiles_for_aarch64(tmp_path, width, lanes):
    if not shutil.which(CROSS):
        pytest.skip(f"no {CROSS}")
    compile_test(CROSS, width, lanes, tmp_path / "math.so")


def test_float_polynomials_are_those_of_the_fit():
    pytest.importorskip("mpmath")
    from benchmarks import fit_math

    header = " ".join((ROOT / "runtime" / "bsrgen_math.h").read_text().split())
    for fit in fit_math.FITS[np.float32][:2]:  # the rational ones take longer
        p, q, _ = fit_math.solve(fit, np.float32)
        assert fit_math.text(p, np.float32) in header
        assert fit_math.text(q, np.float32) in header
