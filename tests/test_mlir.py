"""The MLIR backend: the table of kernels, beside C and the stock sparsifier, its texts, other CPUs, and its absence."""

import difflib
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from programs import assert_example_is_right, build_example, compiler, emulator, run
from support import (
    DTYPE_NAMES,
    LEVELS,
    OPERATOR_NAMES,
    REDUCED,
    assert_right,
    build_plan,
    check_calls,
    make_weight,
    problem_of,
    reduced_case,
    run_python,
)

import bsrgen
from bsrgen import llvm
from bsrgen.__main__ import main
from bsrgen.backends.mlir import MlirPlan, candidates, emit
from bsrgen.backends.mlir.lower import identity, lower
from bsrgen.backends.mlir.plan import CONSTANT_ENTRIES
from bsrgen.bench import sparsifier
from bsrgen.bench.case import Case
from bsrgen.bench.peers import check
from bsrgen.bindings import _load, bindings
from bsrgen.errors import BuildError, UnsupportedError
from bsrgen.pattern import Weight, random_weight
from bsrgen.stack import stacked
from bsrgen.targets import TARGETS, native
from bsrgen.verify import verify

try:
    identity()
except UnsupportedError as e:
    pytest.skip(str(e), allow_module_level=True)

GOLDEN = Path(__file__).with_name("golden") / "mlir"
BLOCKS = (
    (1, 1), (1, 16), (1, 32), (4, 1), (16, 1), (32, 1), (3, 5), (4, 4), (8, 8), (16, 16), (32, 32), (64, 64), (48, 48),
    (37, 53),
)  # fmt: skip
KINDS = ("uniform", "banded", "powerlaw", "empty", "full", "one")


# ── right results ────────────────────────────────────────────────────────────────────────────────────────────────────


def table() -> Iterator[pytest.ParameterSet]:
    """Every block shape with both operators; types, levels and patterns in turn, several panels where there are any."""
    for i, (block, operator) in enumerate((block, operator) for block in BLOCKS for operator in OPERATOR_NAMES):
        level = LEVELS[i // 2 % len(LEVELS)]
        name = f"{block[0]}x{block[1]}-{operator}"
        yield pytest.param(
            block, operator, DTYPE_NAMES[i // 4 % 2], level.values[0], KINDS[i // 3 % 6], marks=level.marks, id=name
        )


@pytest.mark.parametrize(("block", "operator", "dtype", "level", "kind"), list(table()))
def test_table(block, operator, dtype, level, kind, rng, tmp_path):
    (R, C), large = block, block[0] * block[1] > 1024
    shape = block if block == (37, 53) else (R * max(2, 41 // R) + R // 2 + 1, C * max(3, 211 // C) - C // 2)
    weight = make_weight(kind, shape, block, dtype)
    plans = [*candidates(problem_of(weight, operator), TARGETS[level], reblock=False)]
    panels = [plan for plan in plans if plan.panels > 1] or plans
    kernel = build_plan(panels[0 if large else len(panels) // 2], weight, tmp_path)
    check_calls(kernel, problem_of(weight, operator), weight, rng, (0, 1, 5, 16, 33, 130))
    other = Weight(weight.pattern, weight.data * rng.standard_normal(weight.data.shape).astype(dtype))
    kernel.update(other)
    check_calls(kernel, problem_of(weight, operator), other, rng, (7,))


@pytest.mark.parametrize("types", REDUCED, ids="-".join)
def test_reduced_types(types, rng, tmp_path):
    """Every combination of types, on a target without any conversion of float16 and on one with."""
    problem, weight = reduced_case(types)
    target = TARGETS[LEVELS[REDUCED.index(types) // 2 % 2].values[0]]
    check_calls(build_plan(next(candidates(problem, target)), weight, tmp_path), problem, weight, rng, (3, 70))


EPILOGUES = {
    "all": ("bias", "scale", "relu", "gelu", "gelu_tanh", "residual", "clamp", "accumulate"),
    "others": ("silu", "sigmoid", "tanh", "bias"),
}


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues(name, operator, rng, tmp_path):
    weight = make_weight("uniform", (45, 60), (4, 4), "float32")
    problem = problem_of(weight, operator, EPILOGUES[name])
    check_calls(build_plan(next(candidates(problem, native())), weight, tmp_path), problem, weight, rng, (1, 35))


@pytest.mark.parametrize("more", [{"epilogue": "swiglu"}, {"dtype": "int8", "x_dtype": "float32", "quantize_x": True}])
def test_pairs_and_quantized_x(more):
    weights = [random_weight(seed, (40, 48), (8, 4), 0.4) for seed in (1, 2)]
    kernel = bsrgen.compile(weights, backend="mlir", tune="off", **more)
    assert kernel.artifact.manifest.check.worst < 1  # `compile` ran it beside float64


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
@pytest.mark.parametrize("shape", [(0, 7), (7, 0), (1, 1)], ids=str)
def test_shapes_without_rows_or_columns(shape, operator, rng, tmp_path):
    weight = random_weight(0, shape, (2, 3), 1.0)
    problem = problem_of(weight, operator)
    check_calls(build_plan(next(candidates(problem, native())), weight, tmp_path), problem, weight, rng, (0, 1, 20))


def test_tables_too_long_for_constants_are_linked(rng, tmp_path):
    weight = random_weight(3, (100, 700), (1, 1), 0.25)
    plan = next(plan for plan in candidates(problem_of(weight), native()) if plan.panels > 1)
    assert plan.encoding == "table"
    assert plan.table_entries > CONSTANT_ENTRIES
    check_calls(build_plan(plan, weight, tmp_path), problem_of(weight), weight, rng, (1, 20))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_absent_blocks_contribute_nothing_even_with_inf_and_nan(bad, rng):
    weight = random_weight(2, (13, 14), (3, 4), 0.6)
    problem, kernel = problem_of(weight), bsrgen.compile(weight, backend="mlir", strict=True, tune="off")
    for k in range(14):
        x, _ = problem.sample(rng, 18)
        x[5, k] = bad
        assert_right(problem, weight, kernel(x), x)


def test_any_number_of_threads_gives_the_same_bits(rng):
    weight = random_weight(4, (512, 512), (8, 2), 0.3, kind="powerlaw")
    kernel = bsrgen.compile(weight, backend="mlir")
    x = rng.standard_normal((301, 512)).astype(np.float32)
    y = kernel(x, threads=1)
    for threads in (2, 3, 5):
        np.testing.assert_array_equal(kernel(x, threads=threads), y)


# ── C, MLIR, the stock sparsifier and numpy ──────────────────────────────────────────────────────────────────────────

GROUPS, EACH = 20, 10  # drawn matrices that share X are one kernel: 200 of them in 40 builds


def drawn(seed: int) -> tuple[str, str, list[Weight]]:
    """An operator, a type, and EACH matrices of one block shape and width, whole blocks but for the last one."""
    draw = random.Random(seed)
    R, C = draw.choice(
        [(draw.randint(1, 20), draw.randint(1, 20)), (2 ** draw.randint(0, 5), 1), (1, 2 ** draw.randint(0, 5))]
    )
    operator, dtype, K = draw.choice(OPERATOR_NAMES), draw.choice(DTYPE_NAMES), C * draw.randint(1, max(240 // C, 1))
    weights = [
        random_weight(
            draw.randint(0, 999), (R * draw.randint(1, max(60 // R, 2)), K), (R, C), draw.random() ** 2,
            kind=draw.choice(("uniform", "banded", "powerlaw")), dtype=dtype,
        )
        for _ in range(EACH)
    ]  # fmt: skip
    return operator, dtype, weights


@pytest.mark.parametrize("seed", range(GROUPS))
def test_c_mlir_stock_and_numpy_agree(seed, rng):
    operator, dtype, weights = drawn(seed)
    weight = stacked(weights)
    problem = problem_of(weight, operator)
    kernels = [bsrgen.compile(weights, operator, backend=name, dtype=dtype, tune="off") for name in ("c", "mlir")]
    for n in (1, 21, 70):
        x, _ = problem.sample(rng, n)
        ys = [np.concatenate(kernel(x), axis=1 if operator == "linear" else 0) for kernel in kernels]
        case = Case(weight, operator, x)
        if sparsifier.declines(case) is None and n == 21:
            run = sparsifier.prepare(case)
            run.call()
            ys.append(run.result())
        expected, bound = problem.reference(weight, x)
        for y in ys:
            assert_right(problem, weight, y, x)
            assert (abs(y.astype(np.float64) - ys[0]) <= 2 * bound).all()
        assert not weight.pattern.nnz or abs(expected).max() > 0, "zeros would prove nothing"


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
@pytest.mark.parametrize("blocksize", [(4, 8), (1, 8), (8, 1)], ids=str)
def test_the_stock_sparsifier_is_a_peer(operator, blocksize, rng):
    weight = random_weight(5, (32, 64), blocksize, 0.3)
    case = Case(
        weight, operator, rng.standard_normal((19, 64) if operator == "linear" else (64, 19)).astype(np.float32)
    )
    run = sparsifier.prepare(case)
    run.call()
    check(run.result(), *case.reference(), slack=1.0)
    assert "whole blocks" in sparsifier.declines(Case(random_weight(5, (31, 63), blocksize, 0.3), operator, case.x))


# ── texts and artifacts ──────────────────────────────────────────────────────────────────────────────────────────────


def golden_plan() -> tuple[MlirPlan, Weight]:
    """Two tiles of rows, several panels."""
    m, k = np.ogrid[:10, :48]
    i, j = m // 5, k // 2
    dense = np.where((i + j) % 3 == 0, (m + 1) / (k + 2), 0).astype(np.float32)
    weight = bsrgen.pattern.as_weight(dense, blocksize=(5, 2))
    plan = next(candidates(problem_of(weight), TARGETS["x86-64-v3"], reblock=False))
    assert plan.tokens is not None
    return replace(plan, tokens=replace(plan.tokens, rows=3, vectors=2, k_panel=16)), weight


def test_emitted_mlir_is_golden(update_golden):
    plan, weight = golden_plan()
    source = emit((plan,), weight)
    text = source.files[source.reading[0]].decode().replace(f"bsrgen {bsrgen.__version__}", "bsrgen")
    path = GOLDEN / "tile.mlir"
    if update_golden:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    diff = difflib.unified_diff(path.read_text().splitlines(), text.splitlines(), "golden", "emitted", lineterm="", n=1)
    assert not [*diff], "emitted text changed; if that is meant, --update-golden"
    assert not re.search(r"[ \t]$|\n\n\n", text, re.M)


def test_source_shows_each_step():
    plan, weight = golden_plan()
    source = emit((plan,), weight)
    before, loops, llvm_ir, c = (source.files[name].decode() for name in source.reading)
    assert str(source) == "\n".join((before, loops, llvm_ir, c))
    assert "linalg.generic #product" in before
    assert "sparse_tensor.encoding" in before
    assert "linalg.generic #" not in loops
    assert "scf.for" in loops
    assert "define void @" in llvm_ir
    assert dict(emit((plan,), weight).files) == dict(source.files)


@pytest.mark.parametrize("dtype", [*DTYPE_NAMES, "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("level", ["x86-64-v3", "x86-64-v4", "aarch64"])
def test_sums_stay_in_registers(level, dtype):
    """LLVM unrolls the loops over rows and vectors of every register tile: no local buffer is left."""
    weight = random_weight(0, (37, 200), (37, 5), 0.5)
    plans = {}
    for plan in candidates(problem_of(weight, dtype=dtype), TARGETS[level], reblock=False):
        plans.setdefault((plan.tokens.rows, plan.tokens.vectors), plan)
    for plan in [*plans.values()][:: max(len(plans) // 3, 1)]:
        source = emit((plan,), Weight(weight.pattern, weight.data.astype(plan.problem.dtype.numpy)))
        module, _ = llvm.optimized(source.files[source.reading[2]].decode(), llvm.flags(plan.target))
        assert "alloca" not in str(module), plan


def test_builds_are_byte_identical_and_position_independent(tmp_path):
    weight = make_weight("uniform", (40, 36), (8, 3), "float32")
    plan = next(candidates(problem_of(weight), native()))
    kernels = [build_plan(plan, weight, tmp_path / name) for name in ("a", "b") if (tmp_path / name).mkdir() is None]
    one, two = (kernel.artifact.library.read_bytes() for kernel in kernels)
    assert one == two
    assert b"/tmp" not in one
    log = (tmp_path / "a" / "build.log").read_text()
    assert identity() in log  # -Wl,-z,text is among the linker's flags: it refuses text relocations
    assert "-mcpu=" in log


def test_artifacts_are_like_all_others(rng, tmp_path):
    weight = make_weight("uniform", (40, 36), (8, 3), "float32")
    names = tuple(level.values[0] for level in LEVELS[:3])
    kernel = bsrgen.compile(weight, backend="mlir", target=names, epilogue="bias", bias=np.arange(40))
    assert {level.target for level in kernel.artifact.manifest.levels} == set(names)
    assert "MLIR" in str(kernel.plan)
    assert identity() in kernel.artifact.manifest.compiler
    assert kernel.artifact.manifest.levels[0].knobs["backend"] == "mlir"
    assert all(text in kernel.source for text in ("linalg.generic #product", "scf.for", "define void @", "token_pack"))
    new = Weight(weight.pattern, weight.data * 2)
    kernel.update(new)
    folder = kernel.save(tmp_path / "saved")
    loaded, findings = verify(folder)
    assert all(finding.ok for finding in findings), findings
    x = rng.standard_normal((20, 36)).astype(np.float32)
    np.testing.assert_array_equal(loaded(x), kernel(x))
    assert_right(kernel.problem, new, loaded(x), x, {"bias": np.arange(40, dtype=np.float32)})


def test_race_and_command_line(tmp_path, rng):
    weight = make_weight("uniform", (32, 32), (8, 1), "float32")
    kernel = bsrgen.compile(weight, backend="mlir", tune="measure", tune_seconds=0.01)
    assert all("MLIR" in record.plan for record in kernel.artifact.manifest.tuning)
    np.savez(tmp_path / "w.npz", weight.todense())
    said = CliRunner().invoke(
        main, ["compile", str(tmp_path / "w.npz"), "--blocksize", "8x1", "--backend", "mlir", "-o", str(tmp_path / "k")]
    )
    assert said.exit_code == 0, said.output
    text = next((tmp_path / "k").glob("*_tile.mlir")).read_text()
    assert "// " in text.splitlines()[0]
    assert "backend='mlir'" in text
    assert bsrgen.load(tmp_path / "k")(np.ones((2, 32), np.float32)).shape == (2, 32)


@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_aarch64(operator, tmp_path):
    cc, qemu = compiler("aarch64"), emulator("aarch64")
    weight = random_weight(0, (29, 43), (4, 4), 0.4, dtype="float32")
    kernel = bsrgen.compile(weight, operator, epilogue=("bias", "relu"), backend="mlir", target="aarch64")
    folder = kernel.save(tmp_path / "saved")
    program = build_example(folder, tmp_path / "example", cc)
    problem = problem_of(weight, operator, ("bias", "relu"))
    assert_example_is_right(run([*qemu, program]), problem, weight, "aarch64")


# ── without it ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_import_of_bsrgen_imports_no_mlir():
    said = run_python("import sys, bsrgen; print([m for m in ('mlir', 'torch_mlir', 'llvmlite') if m in sys.modules])")
    assert said.strip() == "[]"


def test_without_bindings_the_error_says_what_to_install_and_artifacts_still_run(tmp_path):
    weight = make_weight("uniform", (8, 8), (2, 2), "float32")
    bsrgen.compile(weight, backend="mlir", tune="off").save(tmp_path / "saved")
    script = """
import sys, numpy as np, bsrgen
from bsrgen.pattern import random_weight
try:
    bsrgen.compile(random_weight(0, (8, 8), (2, 2), 0.5), backend="mlir")
except bsrgen.UnsupportedError as e:
    print(e)
print(bsrgen.load(sys.argv[1])(np.ones((3, 8), np.float32)).shape)
"""
    said = run_python(script, str(tmp_path / "saved"), BSRGEN_MLIR_PACKAGE="no_such_package")
    assert "no_such_package" in said
    assert "pip install 'bsrgen[mlir]'" in said
    assert "backend='c'" in said
    assert "(3, 8)" in said


def test_a_package_is_judged_by_what_it_can_lower(tmp_path, monkeypatch):
    """The name mlir on PyPI is a placeholder: a package without the bindings is passed over, one asked for is named."""
    pytest.importorskip("torch_mlir.ir")
    (tmp_path / "mlir").mkdir()
    (tmp_path / "mlir" / "__init__.py").write_text("")
    for name in [name for name in sys.modules if name.split(".")[0] == "mlir"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("bsrgen.bindings._load", _load.__wrapped__)  # without its cache
    assert bindings().identity.startswith("torch_mlir ")
    sys.modules.pop("mlir")
    monkeypatch.setenv("BSRGEN_MLIR_PACKAGE", "json")
    with pytest.raises(UnsupportedError, match="json"):
        bindings()


def test_doctor_names_the_bindings(monkeypatch):
    assert identity() in CliRunner().invoke(main, ["doctor", "--json"]).output
    monkeypatch.setenv("BSRGEN_MLIR_PACKAGE", "no_such_package")
    said = CliRunner().invoke(main, ["doctor"]).output
    assert "no_such_package" in said
    assert "bsrgen[mlir]" in said


def test_a_module_that_does_not_parse_is_a_build_error():
    with pytest.raises(BuildError, match="mlir"):
        lower("module { nonsense }")
    with pytest.raises(BuildError, match="llvmlite"):
        llvm.compile_object("nonsense", llvm.flags(native()))
