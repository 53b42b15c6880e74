"""From plans of products at a block pattern to text: everything that templates/pattern may see is computed here."""

import json
from typing import Any

import numpy as np

from bsrgen.backends.c.pattern_plan import PatternPlan
from bsrgen.backends.c.products import FMA
from bsrgen.backends.c.text import FLOP_PER_PART, ONE, PERMISSION, RUNTIME_FILES, c_string
from bsrgen.backends.c.tiling import folds
from bsrgen.emit import Source, Unit, banner, pattern_operands_in_c, render, runtime_file
from bsrgen.operators import LINEAR_GRAD
from bsrgen.pattern_problem import PatternProblem
from bsrgen.targets import baseline

_TEMPLATE = {"sddmm": "product", "linear_grad": "product", "softmax": "softmax", "attention": "attention"}
_ROWS = "[M], one for each row of the pattern"


def emit_pattern(plans: tuple[PatternPlan, ...]) -> Source:
    """Sources and tables of one artifact: one kernel text for each ISA level, best first.  Pure."""
    s = plans[0].problem
    files, blobs = _tables(s, plans[0])
    head, operands = banner(s, plans), pattern_operands_in_c(s, _ROWS)
    levels: list[dict[str, Any]] = [
        {"name": f"{s.name}_{plan.target.name.replace('-', '_')}", "target": plan.target.name,
         "family": plan.target.family, "requires": plan.target.requires, "tables": s.name, "work": f"{s.name}_work",
         "block_rows": plan.work.size - 1, "few": 0, "by_rows": 0, "tiles": False, "data": f"{s.name}_values"}
        for plan in plans
    ]  # fmt: skip
    entry = _entry(s, levels, blobs, operands)
    units = [Unit(f"{s.name}.c", baseline(plans[0].target).flags)]
    for plan, level in zip(plans, levels, strict=True):
        view = _shared(plan, level["name"]) | (_rows(plan) if s.operator.headed else _product(plan))
        template = "outer" if plan.outer else "rows" if plan.upright else _TEMPLATE[s.operator.name]
        text = render(f"pattern/{template}.c.j2", k=view, banner=head)
        files[f"{level['name']}.c"] = text.encode()
        units.append(Unit(f"{level['name']}.c", plan.target.flags))
    manifest = {"name": s.name, "problem": str(s), "pattern": s.pattern.digest}
    entry["manifest_lines"] = [c_string(line) for line in json.dumps(manifest, indent=1).splitlines()]
    files[f"{s.name}.c"] = render("pattern/main.c.j2", a=entry, banner=head).encode()
    files[f"{s.name}.h"] = render("pattern/header.h.j2", a=entry, banner=head).encode()
    for runtime in (*RUNTIME_FILES, *(("bsrgen_math.h",) if s.operator.headed else ())):
        files[runtime] = runtime_file(runtime)
    values = (f"{s.name}_values.bin",) * len(plans)
    return Source(s.name, plans, files, tuple(units), entry["prototype"], values, entry)


def _tables(s: PatternProblem, plan: PatternPlan) -> tuple[dict[str, bytes], list[dict[str, str]]]:
    """The pattern, its masks, the work of its rows; and no values."""
    tables: list[tuple[str, str, Any]] = [
        ("pointers", "<u4", s.pattern.indptr), ("indices", "<u4", s.pattern.indices),
    ]  # fmt: skip
    if s.mask:
        tables += [("kinds", "<u4", s.mask.kinds), ("masks", "u1", _mask_rows(s, plan))]
    tables += [("work", "<u8", plan.work), ("values", "u1", plan.work[:0])]
    c = {"<u4": "uint32_t", "u1": "uint8_t", "<u8": "uint64_t"}
    files = {f"{s.name}_{name}.bin": array.astype(dtype).tobytes() for name, dtype, array in tables}
    blobs = [{"symbol": f"{s.name}_{name}", "file": f"{s.name}_{name}.bin", "c": c[dtype]} for name, dtype, _ in tables]
    return files, blobs


def _mask_rows(s: PatternProblem, plan: PatternPlan) -> Any:
    """The bits of all masks, rows padded to whole register tiles and to what a load reads behind them."""
    assert s.mask is not None
    kinds, rows, width = s.mask.bits.shape
    padded = np.zeros((kinds, _mask_row_count(s), _mask_bytes(plan)), np.uint8)
    padded[:, :rows, :width] = s.mask.bits
    return padded


def _mask_row_count(s: PatternProblem) -> int:
    return -(-s.pattern.R // 8) * 8  # whole register tiles of every target


def _mask_bytes(plan: PatternPlan) -> int:
    return -(-plan.padded(plan.problem.pattern.C) // 64) * 8 + 8  # the same for every target


def _entry(
    s: PatternProblem, levels: list[dict[str, Any]], blobs: list[dict[str, str]], operands: list[dict[str, str]]
) -> dict[str, Any]:
    p, real, headed = s.pattern, s.real, s.operator.headed
    inputs = [_input(s, number) for number in range(len(s.operator.inputs))]
    arrays = "".join(f"const {s.dtype.c} *{i['name']}, int64_t ld_{i['name']}, " for i in inputs)
    numbers = "".join(f"{o['c']}, " for o in operands)
    return {
        "name": s.name, "levels": levels, "blobs": blobs, "operands": operands, "inputs": inputs, "head": s.head,
        "prototype": f"int {s.name}(int64_t n, {arrays}{numbers}{real.c} *y, int threads)", "language": "pattern",
        "x_type": s.dtype.c, "y_type": real.c, "x_one": ONE.get(s.dtype.name, "1"), "M": p.M, "K": p.K,
        "B": p.nnzb, "R": p.R, "C": p.C, "nothing": f"{'n == 0 || ' * headed}{p.M if s.head else p.nnzb} == 0",
        "needs": "!=" if headed else "<", "formula": s.operator.formula, "result": s.operator.result,
        "result_size": f"{'N * ' * headed}{p.M * s.head if s.head else p.nnz}",
        "n_is": "heads, of all sequences of a batch" if headed else "length of the sums",
        "x86": levels[0]["family"] == "x86_64",
        "flop_per_n": max(s.flop(1), 1), "flop_per_part": FLOP_PER_PART, "permission": PERMISSION,
        "pit": None, "dynamic": False,
        "missing_bytes": 1 + sum(len(f) + 1 for f in (*levels[-1]["requires"], PERMISSION)),
    }  # fmt: skip


def _input(s: PatternProblem, number: int) -> dict[str, Any]:
    """One array: where a call has it, and the least leading dimension it may have."""
    name, letters = s.operator.inputs[number]
    size = {"M": str(s.pattern.M), "K": str(s.pattern.K), "N": "n", "D": str(s.head), "C": str(s.pattern.C)}
    place = (
        ("call->x", "call->ldx") if number == 0 else tuple(f"call->operands[{number - 1}].{f}" for f in ("data", "ld"))
    )
    return {
        "name": name, "shape": f"[{','.join(letters)}]", "data": place[0], "ld": place[1], "least": size[letters[-1]],
        "size": " * ".join(letters), "least_in_example": letters[-1],
    }  # fmt: skip


def _shared(plan: PatternPlan, name: str) -> dict[str, Any]:
    s, p, unit = plan.problem, plan.problem.pattern, plan.product
    return {
        "name": name, "tables": s.name, "real": s.real.c, "real_bytes": s.real.bytes, "lanes": plan.lanes,
        "real_kind": s.real.short, "x_kind": s.dtype.short, "group": unit.group,
        "dot": "" if unit is FMA else unit.name, "M": p.M, "K": p.K, "R": p.R, "C": p.C,
        "block_rows": p.block_rows, "block_cols": p.block_cols, "rows": plan.rows,
    }  # fmt: skip


def _product(plan: PatternPlan) -> dict[str, Any]:
    s = plan.problem
    names = [step.name for step in s.epilogue]
    place = "PLACE(r0, t0 + l / T_ROWS)" if plan.along == "columns" else "PLACE(r0 + l / T_COLS, t0)"
    return {
        "chunk": plan.chunk, "vectors": plan.vectors, "cols": plan.cols or 1,
        "as_it_lies": plan.as_it_lies, "row_group": plan.row_group, "along": plan.along, "run": plan.run,
        "linear": s.operator is LINEAR_GRAD, "folds": folds(plan.lanes, plan.lanes), "place": place,
        "scale": "scale" in names, "accumulate": 1 + ("scale" in names) if "accumulate" in names else -1,
    }  # fmt: skip


def _rows(plan: PatternPlan) -> dict[str, Any]:
    """Of attention and softmax."""
    s, p = plan.problem, plan.problem.pattern
    return {
        "head": s.head, "head_vectors": -(-s.head // plan.lanes), "key_vectors": -(-p.C // plan.lanes),
        "vectors": plan.vectors, "row_scores": plan.row_scores, "masked": s.mask is not None and s.mask.bits.size > 0,
        "mask_bytes": _mask_bytes(plan), "mask_rows": _mask_row_count(s),
        "lane_bits": ", ".join(str(1 << lane) for lane in range(plan.lanes)),
        "values_as_they_lie": s.dtype is s.real and s.head % plan.lanes == 0,
    }  # fmt: skip
