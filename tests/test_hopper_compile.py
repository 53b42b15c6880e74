"""Hopper kernels up to machine code: no spills, no products one by one, and what only Hopper has."""

import re

import numpy as np
import pytest
from support import make_weight, problem_of
from test_cuda_compile import disassembled, needs_nvcc  # noqa: F401

from bsrgen import build
from bsrgen.backends.cuda import HopperPlan, emit
from bsrgen.gpus import as_gpus
from bsrgen.pattern import Weight

GATES = {  # block, operator, type, epilogue, slots, widths, other GPUs; products and boxes in the machine code
    "tall": ((128, 64), "linear", "bfloat16", ("bias", "silu"), 2, (256,), (), {"64x256x16": 4}),
    "gathered": ((32, 1), "spmm", "bfloat16", ("bias",), 2, (64, 256), (), {"64x64x16": 4, "64x256x16": 4}),
    "shared": ((64, 32), "spmm", "float16", ("residual",), 4, (128,), ("sm_80",), {"64x128x16": 16}),
}


@pytest.mark.parametrize("name", GATES)
def test_gates(name, needs_nvcc, tmp_path):  # noqa: F811
    block, operator, dtype, epilogue, slots, widths, others, products = GATES[name]
    weight = make_weight("uniform", (block[0] * 5 - 3, max(block[1] * 9, 64)), block, "float32")
    problem = problem_of(weight, operator, epilogue, dtype)
    (target,) = as_gpus((*others, "sm_90a"))
    plan = HopperPlan(problem, target, slots, widths)
    data = Weight(weight.pattern, weight.data.astype(problem.dtype.numpy))
    library = build.build(emit((plan,), data), tmp_path, build.find_compiler(plan.target))
    log = (tmp_path / "build.log").read_text()
    kernels = re.findall(r"Compiling entry function '\w+' for '(\w+)'", log)
    assert sorted(kernels) == sorted(target.archs * (len(widths) + 1))
    assert log.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == len(kernels)
    assert "warning" not in log
    assert "C75" not in log, "ptxas serialises products, or takes no notice of setmaxnreg"
    sass = disassembled(library)
    if sass is None:
        pytest.skip("all but the machine code was looked at: no cuobjdump and nvdisasm beside nvcc or among its wheels")
    found = {shape: len(re.findall(rf"\bHGMMA\.{shape}\.F32", sass)) for shape in products}
    assert all(found[s] >= products[s] and found[s] % 4 == 0 for s in products), found  # loops may be unrolled
    gather = ("LDGSTS.E.BYPASS.128",) if plan.gathered else ()
    for instruction in (
        "UTMALDG.2D",
        "UBLKCP",
        "SYNCS.ARRIVE.TRANS64",
        "USETMAXREG",
        "STG.E.128",
        "HMMA.16816.F32",
        *gather,
    ):
        assert instruction in sass, instruction
    assert np.dtype(problem.dtype.numpy).itemsize == 2
