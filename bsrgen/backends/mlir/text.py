"""From plans to text: the C backend's files around a register tile that is printed as MLIR and lowered to LLVM IR."""

import json
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from bsrgen import llvm
from bsrgen.backends import c
from bsrgen.backends.mlir.lower import identity, lower
from bsrgen.backends.mlir.plan import MlirPlan
from bsrgen.emit import Source, Unit, banner, render
from bsrgen.pattern import Weight
from bsrgen.problem import Problem

# By types of W and of the sums: how an element of W becomes one of the sums' type.
WIDEN = {("bf16", "f32"): "extf", ("f16", "f32"): "extf", ("i8", "i32"): "extsi", ("i8", "f32"): "sitofp"}
TYPES = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16", "int8": "i8", "int32": "i32"}


def emit(plans: tuple[MlirPlan, ...], weight: Weight) -> Source:
    """Sources and data of one artifact: for each ISA level a C file, and its register tile as MLIR before and after the
    sparsifier and as LLVM IR.  Pure: equal inputs and packages, equal bytes."""
    source = c.emit(plans, weight)
    files, units, reading = dict(source.files), list(source.units), []
    head = as_comment(banner(plans[0].problem, plans))
    for plan, unit, level in zip(plans, source.units[1:-1], source.entry["levels"], strict=True):
        text = render("mlir/tile.mlir.j2", k=tile_view(plan, level["name"], level["tables"]), banner=head)
        lowered = lower(text)
        steps = {"tile.mlir": text, "loops.mlir": lowered.loops, "tile.ll": lowered.llvm_ir}
        files |= {f"{level['name']}_{step}": said.encode() for step, said in steps.items()}
        units.append(Unit(f"{level['name']}_tile.ll", llvm.flags(plan.target)))
        reading.append((*(f"{level['name']}_{step}" for step in steps), unit.file))
    return replace(source, files=files, units=tuple(units), reading=reading[0], tools=identity())


def as_comment(text: str) -> str:
    """A comment of C as one of MLIR."""
    lines = text.removeprefix("/*").removesuffix("\n */").split("\n")
    return "\n".join("//" + line.removeprefix(" *") for line in lines)


def tile_view(plan: MlirPlan, name: str, tables: str) -> dict[str, Any]:
    """What tile.mlir.j2 sees."""
    p, packing, tile = plan.pattern, plan.packing, plan.tokens
    assert tile is not None
    return {
        "name": name, **arithmetic(plan.problem), "lanes": plan.lanes,
        "vector_bytes": plan.lanes * plan.unit_bytes, "w_bytes": plan.w_bytes, "value_bytes": plan.value_bytes,
        "R": p.R, "C": p.C, "features": max(plan.k_panel, p.C), "panels": plan.panels > 1,
        "offset_bits": 8 * packing.offset_bytes, "blocks": packing.offsets.size,
        "segments": packing.pointers.size - 1, "sum_rows": plan.waiting_block_rows * p.R,
        "vectors": range(1, tile.vectors + 1), "groups": _groups(p.R, tile.rows),
        "tables": _tables(plan, tables),
    }  # fmt: skip


def arithmetic(problem: Problem) -> dict[str, Any]:
    """Types and operations of one multiply-add, contracted where the target can: nothing else is reordered."""
    w, acc = TYPES[problem.dtype.name], TYPES[problem.accumulator.name]
    how = {"w": w, "acc": acc, "widen": WIDEN.get((w, acc))}
    if acc == "i32":
        return how | {"zero": "0", "mul": "muli", "add": "addi", "flags": ""}
    return how | {"zero": "0.0", "mul": "mulf", "add": "addf", "flags": " fastmath<contract>"}


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
        {"name": part, "symbol": part if inside else f"{name}_{part}", "type": f"{table.size}xi{8 * table.itemsize}",
         "text": dense(table) if inside else None}
        for part, table in tables.items()
    ]  # fmt: skip


def dense(table: NDArray[Any]) -> str:
    """The numbers of a table as MLIR's dense attribute: in decimal where people may read them, else as their bytes."""
    return json.dumps(table.tolist()) if table.size <= 4096 else f'"0x{table.tobytes().hex().upper()}"'
