"""From plans to text: the C backend's files around a register tile that is printed as MLIR and lowered to LLVM IR."""

import json
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from bsrgen import llvm
from bsrgen.backends import c
from bsrgen.backends.mlir.lower import identity, lower
from bsrgen.backends.mlir.plan import MlirPlan
from bsrgen.emit import Source, Unit, render
from bsrgen.pattern import Weight
from bsrgen.problem import Problem

# By types of W and of the sums: how an element of W becomes one of the sums' type.
WIDEN = {("bf16", "f32"): "extf", ("f16", "f32"): "extf", ("i8", "i32"): "extsi", ("i8", "f32"): "sitofp"}
TYPES = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16", "int8": "i8", "int32": "i32"}


def emit(plans: tuple[MlirPlan, ...], weight: Weight) -> Source:
    """Sources and data of one artifact: for each ISA level a C file, its tile as MLIR before and after the sparsifier
    and as LLVM IR.  Pure: equal inputs and packages, equal bytes."""
    source = c.emit(plans, weight)
    files, units = dict(source.files), list(source.units)
    reading = []
    for plan, unit in zip(plans, source.units[1:], strict=True):
        name = unit.file.removesuffix(".c")
        text = render("mlir/tile.mlir.j2", k=tile_view(plan, name, str(source.entry["levels"][len(reading)]["tables"])))
        lowered = lower(text)
        steps = {f"{name}_tile.mlir": text, f"{name}_loops.mlir": lowered.loops, f"{name}_tile.ll": lowered.llvm_ir}
        files |= {file: step.encode() for file, step in steps.items()}
        units.append(Unit(f"{name}_tile.ll", llvm.flags(plan.target)))
        reading.append((*steps, unit.file))
    return replace(source, files=files, units=tuple(units), reading=reading[0], tools=identity())


def tile_view(plan: MlirPlan, name: str, tables: str) -> dict[str, Any]:
    """What tile.mlir.j2 sees."""
    problem, p, packing, tile = plan.problem, plan.pattern, plan.packing, plan.tokens
    assert tile is not None
    w, acc = TYPES[problem.dtype.name], TYPES[problem.accumulator.name]
    exact = acc == "i32"
    return {
        "name": name, "w": w, "acc": acc, "widen": WIDEN.get((w, acc)), "lanes": plan.lanes,
        "vector_bytes": plan.lanes * plan.unit_bytes, "w_bytes": plan.w_bytes, "value_bytes": plan.value_bytes,
        "zero": "0" if exact else "0.0", "mul": "muli" if exact else "mulf", "add": "addi" if exact else "addf",
        "flags": "" if exact else " fastmath<contract>",
        "R": p.R, "C": p.C, "features": plan.k_panel, "panels": plan.panels > 1,
        "offset_bits": 8 * packing.offset_bytes, "blocks": packing.offsets.size,
        "segments": packing.pointers.size, "sum_rows": plan.waiting_block_rows * p.R,
        "vectors": range(1, tile.vectors + 1), "groups": _groups(p.R, tile.rows),
        "tables": _tables(plan, tables),
    }  # fmt: skip


def _groups(R: int, rows: int) -> list[dict[str, int]]:
    """A block row as register tiles: as many as there are of `rows`, then the rest."""
    whole, rest = divmod(R, rows)
    runs = [(0, rows, whole), (whole * rows, rest, 1)]
    return [{"row": row, "rows": rows, "count": count} for row, rows, count in runs if rows and count]


def _tables(plan: MlirPlan, name: str) -> list[dict[str, Any]]:
    """The pattern: its numbers, or None where they are linked under the names that the C text gives them."""
    packing = plan.packing
    tables = {"pointers": packing.pointers, "offsets": packing.offsets}
    tables |= {"rows": packing.segment_rows} if plan.panels > 1 else {}
    inside = plan.encoding == "constants"
    return [
        {"name": part, "symbol": part if inside else f"{name}_{part}", "count": table.size,
         "bits": 8 * table.itemsize, "text": _dense(table) if inside else None}
        for part, table in tables.items()
    ]  # fmt: skip


def _dense(table: NDArray[Any]) -> str:
    """The numbers of a table as MLIR's dense attribute: in decimal where people may read them, else as their bytes."""
    return json.dumps(table.tolist()) if table.size <= 4096 else f'"0x{table.tobytes().hex().upper()}"'
