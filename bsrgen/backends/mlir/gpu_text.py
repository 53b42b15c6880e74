"""From a plan to text for GPUs: the CUDA backend's files around kernels that are printed as MLIR and lowered to PTX."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen import llvm, nvcc
from bsrgen.backends import cuda
from bsrgen.backends.cuda.plan import Lanes
from bsrgen.backends.mlir.formula import Formula
from bsrgen.backends.mlir.gpu_plan import MlirGpuPlan
from bsrgen.backends.mlir.lower import identity, lower_gpu
from bsrgen.backends.mlir.text import TYPES, arithmetic, as_comment, dense
from bsrgen.emit import Source, Unit, banner, operands_in_c, render
from bsrgen.errors import CompilerNotFoundError
from bsrgen.gpus import WARP, GpuTarget
from bsrgen.pattern import Weight
from bsrgen.problem import Problem


def gpu_identity() -> str:
    """What must be equal for two builds to have equal bytes.  UnsupportedError, CompilerNotFoundError."""
    return f"{identity()}, {_toolkit().identity}"


def emit_gpu(plan: MlirGpuPlan, weight: Weight) -> Source:
    """Sources and data of one artifact: `texts` and their PTX.  Pure: equal inputs and packages, equal bytes."""
    toolkit, target = _toolkit(), plan.target
    source, name = texts(plan, weight), f"{plan.problem.name}_device"
    assert isinstance(target, GpuTarget)
    ptx = llvm.compile_ptx(source.files[f"{name}.ll"].decode(), target.archs[0], toolkit.libdevice)
    steps = (f"{name}.mlir", f"{name}_loops.mlir", f"{name}.ll", f"{name}.ptx", f"{name}.c")
    return replace(
        source, files={**source.files, f"{name}.ptx": ptx.encode()}, reading=steps,
        units=(*source.units, Unit(f"{name}.ptx", _codes(target.archs))), tools=gpu_identity(),
    )  # fmt: skip


def texts(plan: MlirGpuPlan, weight: Weight) -> Source:
    """The kernels as MLIR before and after the sparsifier and as LLVM IR, the C text that launches them, and the CUDA
    backend's files."""
    source, name = cuda.emit((plan,), weight), f"{plan.problem.name}_device"
    head = banner(plan.problem, (plan,))
    text = render("mlir/gpu.mlir.j2", k=kernel_view(plan, source.entry["values_bytes"]), banner=as_comment(head))
    lowered = lower_gpu(text)
    launch = render("mlir/launch.c.j2", k=launch_view(plan), banner=head)
    made = {".mlir": text, "_loops.mlir": lowered.loops, ".ll": lowered.llvm_ir, ".c": launch}
    files = {file: data for file, data in source.files.items() if file not in ("bsrgen_cuda.h", f"{name}.cu")}
    files |= {f"{name}{end}": words.encode() for end, words in made.items()}
    return replace(source, files=files, units=(source.units[0], Unit(f"{name}.c", ())))


def _toolkit() -> nvcc.Nvcc:
    """What makes machine code of PTX.  CompilerNotFoundError."""
    found = nvcc.find_nvcc()
    if not found.takes_code or not found.libdevice:
        lacks = "libdevice.10.bc" if found.takes_code else "cudaLibraryLoadData, which CUDA 13 has"
        raise CompilerNotFoundError(f"backend='mlir' for GPUs: {found.path} has no {lacks}; {nvcc.INSTALL}")
    return found


def _codes(archs: tuple[str, ...]) -> tuple[str, ...]:
    """What becomes of the PTX of the oldest of `archs`: machine code for each, and itself for GPUs still to come."""
    virtual = archs[0].replace("sm", "compute")
    return tuple(f"-gencode=arch={virtual},code={code}" for code in (*archs, virtual))


def launch_view(plan: MlirGpuPlan) -> dict[str, Any]:
    """What launch.c.j2 sees."""
    return {
        "name": plan.problem.name, "few_n": plan.few_n, "few_width": plan.few_width, "many_width": plan.width,
        "threads": WARP * plan.thread_warps, "groups": max(plan.packing.groups.size, 1),
        "real": plan.problem.real.c,
        "operands": [o | {"number": i} for i, o in enumerate(_operands(plan.problem))],
    }  # fmt: skip


def kernel_view(plan: MlirGpuPlan, values_bytes: int) -> dict[str, Any]:
    """What gpu.mlir.j2 sees."""
    problem, p = plan.problem, plan.problem.pattern
    x, y = TYPES[problem.x_dtype.name], TYPES[problem.out_dtype.name]
    w_bytes, C = problem.dtype.bytes, plan.piece_columns
    features, threads = plan.step_columns * C, WARP * plan.thread_warps
    linear = problem.operator.token_axis == 0
    parameters = _parameters(problem, max(values_bytes // w_bytes, 1))
    tables = _tables(plan)
    variants = {name: _variant(plan, lanes, linear) for name, lanes in (("many", plan.many), ("few", plan.few))}
    formula, stored, arrays = _epilogue(problem, linear)
    k: dict[str, Any] = {
        "name": problem.name, **arithmetic(problem), "x": x, "y": y, "acc_bytes": problem.accumulator.bytes,
        "linear": linear, "M": p.M, "K": p.K, "R": p.R, "C": p.C, "rows": plan.rows, "row_pieces": plan.row_pieces,
        "piece_columns": C, "group_rows": plan.group_rows, "features": features, "threads": threads,
        "ragged_columns": plan.column_pieces * C != p.C, "elements": max(values_bytes // w_bytes, 1),
        "w_shape": f"{features - C + 1}x{C}x{plan.rows}", "tables": tables,
        "types": {table["name"]: table["type"] for table in tables}, "variants": tuple(variants.items()),
        "many": variants["many"], "epilogue": formula.lines, "stored": stored, "arrays": arrays,
        "functions": sorted(formula.functions),
        "parameters": ", ".join(f"%{name}: {type}{more}" for name, type, more in parameters),
        "arguments": ", ".join(f"%{name}" for name, _, _ in parameters),
        "argument_types": ", ".join(type for _, type, _ in parameters),
    }  # fmt: skip
    numbers = {0, 1, 2, WARP, p.K, p.M, p.R, p.C, plan.rows, C, threads}
    for v in variants.values():
        numbers |= {v["width"], v["side"], threads // v["side"], v["token_steps"], v["panels_bytes"] // 2,
                    v["sharing"], v["tokens"]}  # fmt: skip
    return k | {"numbers": sorted(numbers)}


def _variant(plan: MlirGpuPlan, lanes: Lanes, linear: bool) -> dict[str, Any]:
    """One of the two kernels: lanes along tokens, or along k."""
    acc, unit = TYPES[plan.problem.accumulator.name], plan.problem.accumulator.bytes
    features, threads = plan.step_columns * plan.piece_columns, WARP * plan.thread_warps
    side = min(lanes.width, threads) if not linear else 8 if lanes.width >= 16 else WARP
    token_step = threads // side if linear else side
    vectors = lanes.stride // lanes.tokens
    sums = plan.rows * lanes.tokens
    return {
        "tokens": lanes.tokens, "width": lanes.width, "stride": lanes.stride, "parts": lanes.along_k,
        "vectors": vectors, "side": side, "token_step": token_step, "token_steps": -(-lanes.width // token_step),
        "panels_bytes": 2 * features * lanes.stride * unit, "panel_vectors": features * vectors,
        "lane_bytes": lanes.tokens * unit if lanes.along_k == 1 else 0,
        "sums": f"memref<{plan.rows}xvector<{lanes.tokens}x{acc}>>", "halvings": _halvings(sums),
        "sharing": WARP // (1 << (sums - 1).bit_length()),
    }  # fmt: skip


def _halvings(sums: int) -> list[dict[str, Any]]:
    """How the lanes of a warp add up `sums` numbers each, at most 32: at every distance a lane keeps one half of them
    and gives the other one away, until each has one; then the whole goes both ways."""
    steps, count, distance = [], 1 << (sums - 1).bit_length(), WARP // 2
    real, level = sums, 0
    while distance:
        halves = count > 1
        count = max(count // 2, 1)
        pairs = [(i, f"%s{level}_{i + count}" if i + count < real else "%zero_sum") for i in range(min(count, real))]
        steps.append({"distance": distance, "halves": halves, "pairs": pairs})
        real, level, distance = min(count, real), level + 1, distance // 2
    return steps


def _tables(plan: MlirGpuPlan) -> list[dict[str, Any]]:
    """The pattern as constants of the module."""
    t = plan.packing
    tables: dict[str, NDArray[Any]] = {
        "group_rows": t.groups, "group_steps": t.steps, "step_columns": t.columns, "column_features": t.features,
        "step_pieces": t.pointers, "piece_slots": (t.slots * plan.piece_columns).astype(np.uint16),
    }  # fmt: skip
    return [
        {"name": name, "type": f"{max(table.size, 1)}xi{8 * table.itemsize}",
         "text": dense(table if table.size else np.zeros(1, table.dtype))}
        for name, table in tables.items()
    ]  # fmt: skip


def _operands(problem: Problem) -> list[dict[str, Any]]:
    return operands_in_c(problem, dict.fromkeys(("row", "token", "scalar", "element"), ""))


def _parameters(problem: Problem, values: int) -> list[tuple[str, str, str]]:
    """Of a kernel: name, type, attributes."""
    w, x, y = (TYPES[row.name] for row in (problem.dtype, problem.x_dtype, problem.out_dtype))
    real = TYPES[problem.real.name]
    read = " {llvm.noalias}"
    given = [
        ("n", "index", ""), ("x_data", f"memref<1x{x}>", read), ("ldx", "index", ""), ("y_data", f"memref<1x{y}>", ""),
        ("ldy", "index", ""), ("values_data", f"memref<{values}x{w}>", " {llvm.noalias, llvm.align = 16 : i64}"),
        ("tiles", "index", ""),
    ]  # fmt: skip
    for o in _operands(problem):
        if o["kind"] == "scalar":
            given.append((o["name"], real, ""))
        else:
            given.append((o["name"], f"memref<1x{y if o['kind'] == 'element' else real}>", ""))
        if o["kind"] == "element":
            given.append((f"ld_{o['name']}", "index", ""))
    return given


def _epilogue(problem: Problem, linear: bool) -> tuple[Formula, str, list[dict[str, str]]]:
    """The lines of one output, the name of what they end in, and the arrays of the device that they read or write."""
    real, y = TYPES[problem.real.name], TYPES[problem.out_dtype.name]
    arrays = [_matrix("y", "y_data", "ldy", y)]
    formula, value, place = Formula(real), "%sum", "%t, %m" if linear else "%m, %t"
    names = iter(o["name"] for o in _operands(problem))
    for step in problem.epilogue:
        symbols = {"v": value}
        for o in step.operands:
            name = "y" if o.kind == "out" else next(names)
            given = f"%{name}"
            if o.kind == "row":
                arrays.append(_vector(name, real))
                given = formula.line(f"memref.load %{name}_at[%m] : {arrays[-1]['type']}")
            elif o.kind != "scalar":
                arrays += [_matrix(name, name, f"ld_{name}", y)] if o.kind == "element" else []
                given = formula.line(f"memref.load %{name}_at[{place}] : {arrays[0]['type']}")
                given = given if y == real else formula.line(f"arith.extf {given} : {y} to {real}")
            symbols[o.symbol or o.name] = given
        value = formula.value(step.c, symbols)
    stored = value if y == real else formula.line(f"arith.truncf {value} : {real} to {y}")
    return formula, stored, arrays


def _matrix(name: str, data: str, ld: str, element: str) -> dict[str, str]:
    """An array shaped like Y: what its pointer becomes."""
    shape, type = f"sizes: [%n, %n], strides: [%{ld}, 1]", f"memref<?x?x{element}, strided<[?, 1]>>"
    return {"name": name, "data": data, "shape": shape, "element": element, "type": type}


def _vector(name: str, element: str) -> dict[str, str]:
    """An array of one value for each output feature."""
    shape, type = "sizes: [%n], strides: [1]", f"memref<?x{element}>"
    return {"name": name, "data": name, "shape": shape, "element": element, "type": type}
