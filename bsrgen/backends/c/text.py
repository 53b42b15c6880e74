"""From plans to text: everything the C templates may see is computed here."""

import json
from dataclasses import replace
from typing import Any

from bsrgen.backends.c import dynamic
from bsrgen.backends.c.count import whole_share
from bsrgen.backends.c.features import FeaturesPlan
from bsrgen.backends.c.levels import level_of, offset_type
from bsrgen.backends.c.matrix_text import matrix_view
from bsrgen.backends.c.plan import CPlan
from bsrgen.backends.c.vector_text import Part, needs_math, vectors_view
from bsrgen.emit import (
    Source,
    Unit,
    arguments_in_c,
    banner,
    epilogue_formula,
    ffi_in_c,
    operands_in_c,
    render,
    runtime_file,
)
from bsrgen.pattern import Weight
from bsrgen.problem import Problem
from bsrgen.targets import baseline

FLOP_PER_PART = 2_000_000  # least share of a thread, 10 us or more: a cold pool takes 13 us to wake (Zen 5 VM)

PERMISSION = "amx-permission"  # what may be missing beside features: the system's to use the matrix unit
_AMX = ("bsrgen_amx.h", "bsrgen_panel.h")
RUNTIME_FILES = tuple(f"bsrgen{part}.h" for part in ("", "_simd", "_types", "_product", "_scratch", "_parallel"))
ONE = {"bfloat16": "0x3f80", "float16": "0x3c00"}  # 1.0 as its bits
_KIND_TEXT = {
    "row": "[M], one for each output feature",
    "token": "[N], one for each token, with ld_{name} = 1; or one number for all with 0",
    "scalar": "one number",
    "element": "like y, ld_{name} elements from row to row",
    "live": "[N], nonzero where a token is computed; NULL: all are.  Other rows of y stay as they are",
    "routing": "[N], the expert of each token, from 0; negative: none, its row of y stays as it is",
    "mask": "a row for each {tokens} tokens, ld_{name} elements apart, a column for each {rows} features: nonzero "
    "where y is computed; NULL: everywhere.  Other results stay as they are",
}


def emit(plans: tuple[CPlan, ...], weight: Weight) -> Source:
    """Sources and data of one artifact: one kernel text per ISA level, best first.  Pure: equal inputs, equal bytes."""
    problem = plans[0].problem
    name = problem.name
    files: dict[str, bytes] = {}
    blobs: list[dict[str, str]] = []
    packings: list[dict[str, Any]] = []
    known = problem.pattern.known
    levels = [level_of(plan, weight, files, blobs, packings) if known else dynamic.level_of(plan) for plan in plans]
    artifact = _artifact(plans, levels, blobs, packings)
    head = banner(problem, plans)
    units = [Unit(f"{name}.c", baseline(plans[0].target).flags)]  # runs before the check of the CPU
    for plan, level in zip(plans, levels, strict=True):
        for part in _parts(plan, level["name"]):
            text = render("c/kernel.c.j2", k=_kernel(part, level), banner=head)
            files[f"{part.name}.c"] = text.encode()
            units.append(Unit(f"{part.name}.c", plan.target.flags))
        if not known:
            view = dynamic.prepare_view(plan, level["name"])
            files[f"{level['name']}_prepare.c"] = render("c/prepare.c.j2", d=view, banner=head).encode()
            units.append(Unit(f"{level['name']}_prepare.c", plan.target.flags))
    manifest = {"name": name, "problem": str(problem), "pattern": problem.pattern.digest}
    artifact["manifest_lines"] = [c_string(line) for line in json.dumps(manifest, indent=1).splitlines()]
    files[f"{name}.c"] = render("c/main.c.j2", a=artifact, banner=head).encode()
    files[f"{name}_data.c"] = render("c/data.c.j2", a=artifact, banner=head).encode()
    units.append(Unit(f"{name}_data.c", units[0].flags))
    files[f"{name}.h"] = render("c/header.h.j2", a=artifact, banner=head).encode()
    math = ("bsrgen_math.h",) if needs_math(problem) else ()
    tiles = _AMX if any(plan.on_tiles for plan in plans) else ()
    expand = ("bsrgen_expand.h",) if any(plan.bits for plan in plans) else ()
    prepare = ("bsrgen_tvm_ffi.h",) if known else ("bsrgen_prepare.h",)
    live = ("bsrgen_live.h",) if any(isinstance(plan, FeaturesPlan) for plan in plans) else ()
    for runtime in (*RUNTIME_FILES, *live, *tiles, *expand, *math, *prepare):
        files[runtime] = runtime_file(runtime)
    values = tuple(f"{level['data']}.bin" if known else "" for level in levels)
    return Source(name, plans, files, tuple(units), artifact["prototype"], values, artifact)


def _parts(plan: CPlan, name: str) -> list[Part]:
    """The micro-kernel for many tokens, then the one for few."""
    if plan.tokens is None:
        return [Part(name, plan, None, plan.weight)]
    few = [Part(f"{name}_few", plan, None, plan.weight)] if plan.weight else []
    if plan.short_lanes:
        few = [Part(f"{name}_few", plan, replace(plan.tokens, vectors=1, pack=True), None, short=True)]
    return [Part(name, plan, plan.tokens, None), *few]


def _artifact(
    plans: tuple[CPlan, ...], levels: list[dict[str, Any]], blobs: list[dict[str, str]], packings: list[dict[str, Any]]
) -> dict[str, Any]:
    problem = plans[0].problem
    p, x, y = problem.pattern, problem.x_dtype, problem.out_dtype
    pit = _pit(plans[0])
    operands = operands_in_c(problem, _KIND_TEXT)
    values = "values" if p.known else "prepared"
    prototype = (
        f"int {problem.name}(int64_t n, const {x.c} *x, int64_t ldx, {y.c} *y, int64_t ldy, "
        f"{arguments_in_c(operands)}const void *{values}, int threads)"
    )
    return {
        "name": problem.name, "w_type": problem.dtype.c, "x_type": x.c, "y_type": y.c, "levels": levels, "blobs": blobs,
        "x_one": ONE.get(x.name, "1"), "w_one": ONE.get(problem.dtype.name, "1"),
        "y_bits": "'s bits" if y.name in ONE else "", "packings": packings,
        "operands": operands, "prototype": prototype, "linear": problem.operator.token_axis == 0,
        "x86": levels[0]["family"] == "x86_64", "M": p.M, "rows": problem.rows, "K": p.K, "R": p.R,
        "C": p.C, "nnzb": p.nnzb, "block_bytes": p.R * p.C * problem.dtype.bytes + 8,
        "bytes_per_part": dynamic.BYTES_PER_PART,
        "flop_per_token": max(2 * max(plan.pattern.nnz for plan in plans), 1), "flop_per_part": FLOP_PER_PART,
        "language": "c", "dynamic": not p.known, "values_name": values,
        "ffi": ffi_in_c(problem), "pit": pit, "columns": problem.pit.groups(p.M) if problem.pit else 0,
        "missing_bytes": 1 + sum(len(f) + 1 for f in (*levels[-1]["requires"], PERMISSION)), "permission": PERMISSION,
        "formula": problem.operator.formula, "x_shape": problem.operator.x_shape, "y_shape": problem.operator.y_shape,
        "epilogue_formula": epilogue_formula(problem),
    }  # fmt: skip


def _pit(plan: CPlan) -> dict[str, Any] | None:
    """Where tokens come in lists: the groups of W's rows, where a call says what, and what is shaped like Y."""
    pit, operands = plan.problem.pit, plan.problem.operands
    if pit is None or not plan.listed:
        return None
    elements = [
        {"index": i, "type": plan.problem.operand_dtype(o).c} for i, o in enumerate(operands) if o.kind == "element"
    ]
    return {"axis": pit.axis.name, "tokens": pit.tokens, "rows": pit.rows, "groups": pit.groups(plan.problem.pattern.M),
            "index": len(operands) - 1, "list": len(operands), "elements": elements,
            "whole": f"{whole_share(plan):.3g}"}  # fmt: skip


def _masked(plan: CPlan) -> dict[str, int] | None:
    """The mask of Y, of a plan that may compute all of it."""
    pit = plan.problem.pit
    if pit is None or not plan.listed or pit.axis.operand.kind != "mask":
        return None
    return {"index": len(plan.problem.operands) - 1, "tokens": pit.tokens, "rows": pit.rows}


def _unit(part: Part) -> tuple[int, int]:
    """Tokens of a unit, and the units that share what they read."""
    plan = part.plan
    if plan.matrix:
        return plan.matrix_packing.tokens, plan.matrix.chunk
    if part.weight:
        return part.weight.tokens, part.weight.chunk
    assert part.tokens is not None
    return part.tokens.vectors * part.lanes, 1


def _quantized_units(part: Part) -> int:
    """Units of tokens whose X is made int8 together, in a quarter of L2; 0 where it is taken as it is."""
    plan, (tokens, chunk) = part.plan, _unit(part)
    if not plan.problem.quantizes_x:
        return 0
    return max(plan.target.l2_bytes // 4 // max(plan.problem.pattern.K * tokens, 1), chunk, 1)


def _pair(part: Part) -> dict[str, int] | None:
    """Of swiglu and geglu: the gate's rows, and how much of it waits, within half of L2."""
    plan, gate, (tokens, chunk) = part.plan, part.plan.problem.gate_rows, _unit(part)
    if not gate:
        return None
    R, room = plan.pattern.R, plan.target.l2_bytes // 2 // plan.unit_bytes
    units = max(room // (tokens * gate), chunk, 1)
    whole = plan.weight_window if part.weight else 1
    return {"rows": gate, "block_rows": gate // R, "units": units,
            "chunk": max(room // (tokens * units * R) // whole, 1) * whole}  # fmt: skip


def _steps(problem: Problem) -> list[dict[str, Any]]:
    """The epilogue, each operand with its place in the call; the old Y has none."""
    index = iter(range(len(problem.operands)))  # what mode="pit" adds comes last
    return [
        {"name": step.name, "c": step.c, "gate": step.gate and step.gate.c, "operands": [
            {"kind": "token" if o.kind == "inside" else o.kind, "symbol": o.symbol or o.name,
             "index": -1 if o.kind in ("out", "gate") else len(problem.operands) if o.kind == "inside" else next(index)}
            for o in step.operands]}
        for step in problem.epilogue
    ]  # fmt: skip


def _arithmetic(plan: CPlan) -> dict[str, Any]:
    """What lies in memory, by the short names of runtime/bsrgen_types.h, and how it is multiplied."""
    problem, product = plan.problem, plan.product
    x, y, real = problem.read_dtype, problem.out_dtype, problem.real
    element = real if y.name == "int8" else y
    kinds = {"real": real, "w": problem.dtype, "x": x, "y": y, "e": element, "source": problem.x_dtype}
    return {
        "real": real.c, "real_bytes": real.bytes,
        "kinds": {name: row.short for name, row in kinds.items()}, "scale_index": len(problem.operands),
        "gate_index": len(problem.operands) + problem.quantizes_x,
        "group": product.group, "dot": product.name, "gather": int(plan.gather), "same_x": plan.same_x,
        "integer": int(problem.accumulator.name == "int32"), "corrections": plan.corrections,
    }  # fmt: skip


def c_string(text: str) -> str:
    return json.dumps(text + "\n")


def _kernel(part: Part, level: dict[str, Any]) -> dict[str, Any]:
    """What kernel.c.j2 and its parts see."""
    plan, problem, p = part.plan, part.plan.problem, part.plan.pattern
    linear = problem.operator.token_axis == 0
    shared = {
        "name": part.name, "tables": level["tables"], **_arithmetic(plan), "lanes": part.lanes,
        "dynamic": None if problem.pattern.known else dynamic.ahead(plan),
        "quantize": _quantized_units(part), "pair": _pair(part), "M": p.M, "K": problem.pattern.K, "R": p.R, "C": p.C,
        "block_rows": p.block_rows, "panels": plan.panels, "offset_type": offset_type(plan), "linear": linear,
        "math": needs_math(problem), "epilogue": _steps(problem),
        "finish_rows": part.weight is not None or linear or part.single,
        "gate_by_token": part.weight is not None or linear,
        "listed": len(problem.operands) if plan.listed else None, "masked": _masked(plan),
        "finish_tokens": not linear and (part.weight is None or isinstance(plan, FeaturesPlan)),
    }  # fmt: skip
    if plan.matrix:
        return shared | {"matrix": matrix_view(plan.matrix_packing), "bits": None, "features": None, "stage": None}
    return shared | vectors_view(part, linear)
