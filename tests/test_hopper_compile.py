"""Hopper kernels up to machine code: no spills, no products one by one, and what only Hopper has."""

import re
from dataclasses import dataclass

import numpy as np
import pytest
from support import make_weight, problem_of
from test_cuda_compile import disassembled, needs_nvcc  # noqa: F401

from bsrgen import build, nvcc
from bsrgen.backends import c
from bsrgen.backends.cuda import HopperPlan, emit
from bsrgen.backends.cuda.hopper import WARPGROUPS, Shape
from bsrgen.dtypes import DTYPES, HOPPER
from bsrgen.errors import BuildError
from bsrgen.gpus import as_gpus
from bsrgen.pattern import Weight
from bsrgen.targets import native


@dataclass(frozen=True)
class Gate:
    """A kernel, and how often at least its machine code has some instructions."""

    block: tuple[int, int]
    operator: str
    dtype: str
    epilogue: tuple[str, ...]
    slots: int
    shapes: tuple[Shape, ...]
    down: int
    others: tuple[str, ...]  # GPUs of the same library
    found: dict[str, int]
    turned: bool = False


MANY = Shape(256)
COPIED = {r"UTMALDG\.2D": 1, r"UBLKCP\.S\.G": 1, r"SYNCS\.ARRIVE\.TRANS64": 2, "USETMAXREG": 2, r"STG\.E\.128": 1}
MEETING = {r"ATOMG\.E\.ADD\.STRONG\.GPU": 1, r"LDG\.E\.STRONG\.GPU": 1, r"MEMBAR\.\S*GPU": 2}  # of parts of a tile
GATES = {
    "tall": Gate((128, 64), "linear", "bfloat16", ("bias", "silu"), 2,
                 (Shape(4, 4, 1), Shape(128, 256, 0, 2, True), Shape(256, across=4)), 1, (),
                 COPIED | MEETING | {r"HGMMA\.64x128x16\.F32": 4,
                           r"HGMMA\.64x256x16\.F32": 4, r"UBLKCP\.S\.G\.MULTICAST": 1, r"ACQBULK": 1, "PREEXIT": 1,
                           r"SYNCS\.ARRIVE\.TRANS64\.RED": 1, r"LDG\.E\.128\.CONSTANT|LDG\.E\.\S*128\S*CONSTANT": 8}),
    "gathered": Gate((32, 1), "spmm", "bfloat16", ("bias",), 2,
                     (Shape(64, 64, 2), Shape(64, 256, equal=True), Shape(256)), 1, (),
                     COPIED | MEETING | {r"HGMMA\.64x64x16\.F32": 4, r"HGMMA\.64x256x16\.F32": 4,
                                         r"LDGSTS\.E\.BYPASS\.128": 1}),
    "turned": Gate((64, 1), "linear", "bfloat16", ("bias", "gelu"), 2, (Shape(4, 4, 1), Shape(256)), 1, ("sm_80",),
                   COPIED | {r"HGMMA\.64x256x16\.F32": 4, r"UTMALDG\.2D": 0, r"LDGSTS\.E\.BYPASS\.128": 4, "ACQBULK": 4,
                             "PREEXIT": 2, r"LDSM\.16\.MT88\.4": 4, r"STS\.128": 2}, True),
    "shared": Gate((64, 32), "spmm", "float16", ("residual",), 4, (Shape(128, across=2),), 2, ("sm_80",),
                   COPIED | {r"HGMMA\.64x128x16\.F32": 16, r"UTMALDG\.2D\.MULTICAST": 1,
                             r"UBLKCP\.S\.G\.MULTICAST": 1}),
    "bytes": Gate((64, 32), "linear", "int8", ("scale",), 4, (Shape(128),), 1, (),
                  COPIED | {r"IGMMA\.64x128x32\.S8\.S8": 16, r"IMMA\.16832": 1}),
    "float8": Gate((64, 128), "linear", "float8_e4m3fn", ("scale",), 2,
                   (Shape(8, 8, equal=True), Shape(16, 16, 2), Shape(128, across=2)), 1, (),
                   COPIED | MEETING | {r"QGMMA\.64x128x32\.F32\.E4M3\.E4M3": 4,
                                       r"QGMMA\.64x16x32\.F32\.E4M3\.E4M3": 4}),
}  # fmt: skip


def test_products_one_by_one_fail_a_build(monkeypatch, tmp_path):
    """As ptxas 13.0 says it of a product under a predicate."""
    said = "ptxas info    : (C7520) Potential Performance Loss: wgmma.mma_async instructions are serialized due to\n"
    assert nvcc.flaw("ptxas info    : Used 168 registers\n") == ""
    weight = make_weight("uniform", (64, 64), (16, 16), "float32")
    source = c.emit((next(iter(c.candidates(problem_of(weight), native()))),), weight)

    def linked(command, folder):
        (folder / command[-1]).touch()
        return ""

    monkeypatch.setattr(build, "_compile", lambda *_, **__: said)
    monkeypatch.setattr(build, "_run", linked)
    with pytest.raises(BuildError, match=r"\(C7520\) Potential Performance Loss.*sources kept"):
        build.build(source, tmp_path, build.find_compiler(native()))


@pytest.mark.parametrize("name", GATES)
def test_gates(name, needs_nvcc, tmp_path):  # noqa: F811
    g = GATES[name]
    weight = make_weight("uniform", (g.block[0] * 5 - 3, max(g.block[1] * 9, 64)), g.block, "float32")
    problem = problem_of(weight, g.operator, g.epilogue, (DTYPES | HOPPER)[g.dtype])
    (target,) = as_gpus((*g.others, "sm_90a"))
    plan = HopperPlan(problem, target, g.slots, g.shapes, g.down, g.turned)
    data = Weight(weight.pattern, np.rint(weight.data * 9).astype(problem.dtype.numpy))
    library = build.build(emit((plan,), data), tmp_path, build.find_compiler(plan.target))
    log = (tmp_path / "build.log").read_text()
    kernels = re.findall(r"Compiling entry function '\w+' for '(\w+)'", log)
    assert sorted(kernels) == sorted(target.archs * (len(g.shapes) + 1 + g.turned))
    assert log.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == len(kernels)
    assert "warning" not in log
    assert not nvcc.flaw(log)  # else there were no library
    sass = disassembled(library)
    if sass is None:
        pytest.skip("all but the machine code was looked at: no cuobjdump and nvdisasm beside nvcc or among its wheels")
    boxed = [shape for shape in g.shapes if plan.boxed(shape)]
    tiles = sum(shape.width * g.slots // g.down // WARPGROUPS for shape in boxed)  # tokens of slots, of a thread
    assert len(re.findall(r"\bSTSM\.16\.MT?88\.4\b", sass)) == (tiles // 16 if problem.out_dtype.bytes == 2 else 0)
    assert len(re.findall(r"\bUTMASTG\.2D\b", sass)) == tiles // plan.box_tokens
    assert bool(boxed) == (name != "shared")
    for instruction, least in g.found.items():
        found = len(re.findall(rf"\b(?:{instruction})", sass))
        assert found >= least, (instruction, found)
        assert found % 4 == 0 or "GMMA" not in instruction, (instruction, found)  # loops may be unrolled
