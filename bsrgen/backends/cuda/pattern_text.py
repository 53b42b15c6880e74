"""From plans of products at a block pattern to CUDA text: all that templates/pattern_cuda may see is computed here."""

import json
import math
from typing import Any

from bsrgen.backends.cuda.pattern_plan import CoresPlan, PatternCudaPlan, UnitsPlan
from bsrgen.backends.cuda.pattern_rows import WARPS, RowsPlan
from bsrgen.emit import Source, Unit, banner, pattern_operands_in_c, render, runtime_file
from bsrgen.gpus import ERRORS, GpuTarget
from bsrgen.pattern_problem import PatternProblem

_ROWS = "[M] of the device, one for each row of the pattern; NULL: ones"


def emit_pattern(plans: tuple[PatternCudaPlan | RowsPlan, ...]) -> Source:
    """Sources and tables of one artifact.  Pure: equal plans, equal bytes."""
    (plan,) = plans
    s, name, target = plan.problem, plan.problem.name, plan.target
    assert isinstance(target, GpuTarget)
    tables, head = _tables(plan), banner(s, plans)
    template, kernel = ("rows", _rows(plan)) if isinstance(plan, RowsPlan) else ("kernel", _kernel(plan))
    entry = _entry(s, plan, len(tables))
    files = {
        f"{name}_values.bin": tables,
        f"{name}_device.cu": render(f"pattern_cuda/{template}.cu.j2", k=kernel, banner=head).encode(),
        f"{name}.c": render("pattern_cuda/main.c.j2", a=entry, banner=head).encode(),
        f"{name}.h": render("pattern_cuda/header.h.j2", a=entry, banner=head).encode(),
    }
    for runtime in ("bsrgen.h", "bsrgen_cuda.h", *(["bsrgen_mma.h"] if plan.matrix else [])):
        files[runtime] = runtime_file(runtime)
    units = (Unit(f"{name}.c", ()), Unit(f"{name}_device.cu", target.flags))
    return Source(name, plans, files, units, entry["prototype"], (f"{name}_values.bin",), entry)


def _tables(plan: PatternCudaPlan | RowsPlan) -> bytes:
    """What lies on the device: numbers of 32 bits, and then the bits of masks."""
    s, p = plan.problem, plan.problem.pattern
    if not isinstance(plan, RowsPlan):
        parts, bits = [plan.tiles, p.indices], b""
    else:
        parts = [plan.order, p.indptr, p.indices, *([s.mask.kinds] if s.mask else [])]
        bits = s.mask.bits.tobytes() if s.mask else b""
    return b"".join(part.astype("<i4").tobytes() for part in parts) + bits or bytes(4)


def _entry(s: PatternProblem, plan: PatternCudaPlan | RowsPlan, table_bytes: int) -> dict[str, Any]:
    """What the host's text and the companions of the library see."""
    p, name, x, operands = s.pattern, s.name, s.dtype.c, pattern_operands_in_c(s, _ROWS)
    size, headed = {"M": p.M, "K": p.K, "N": "n", "D": s.head, "C": p.C}, s.operator.headed
    inputs = [
        {"name": array, "shape": f"[{','.join(letters)}]", "least": size[letters[-1]], "rows": size[letters[0]],
         "of_one": math.prod(s.shape(letters, 1))}
        for array, letters in s.operator.inputs
    ]  # fmt: skip
    arrays = "".join(f"const {x} *{i['name']}, int64_t ld_{i['name']}, " for i in inputs)
    numbers = "".join(f"{o['c']}, " for o in operands)
    manifest = {"name": name, "problem": str(s), "pattern": p.digest}
    return {
        "name": name, "inputs": inputs, "operands": operands, "language": "pattern_cuda", "formula": s.operator.formula,
        "result": s.operator.result, "x_type": x, "y_type": s.real.c, "nothing": (p.M if s.head else p.nnz) == 0,
        "headed": headed, "result_of_one": math.prod(s.result_shape(1)),
        "n_is": "heads, of all sequences of a batch" if headed else "length of the sums",
        "prototype": f"int {name}(int64_t n, {arrays}{numbers}{s.real.c} *y, const void *tables, void *stream)",
        "manifest_lines": [json.dumps(line + "\n") for line in json.dumps(manifest, indent=1).splitlines()],
        "blobs": [{"symbol": f"{name}_values", "file": f"{name}_values.bin", "c": "unsigned char"}],
        "data": f"{name}_values", "values_bytes": table_bytes, "errors": ERRORS, "target": plan.target.name,
        "prepare": None, "workspace_bytes": 0, "scratch": None,
    }  # fmt: skip


def _kernel(plan: PatternCudaPlan) -> dict[str, Any]:
    """What the device's text sees."""
    s, p = plan.problem, plan.problem.pattern
    names = [o["name"] for o in pattern_operands_in_c(s, _ROWS)]
    of_the_plan: dict[str, Any] = {}
    if isinstance(plan, CoresPlan):
        of_the_plan = {
            "rows": plan.rows, "columns": plan.columns, "side_rows": plan.side_rows, "side_columns": plan.side_columns,
            "slices": plan.slices, "panels": (plan.shared_bytes - 4 * (plan.tile_rows + plan.tile_columns))
            // s.real.bytes, "strides": plan.strides,
        }  # fmt: skip
    elif isinstance(plan, UnitsPlan):
        vectors = (p.R % 8 == 0, p.C % 8 == 0) if plan.linear else (True, True)
        of_the_plan = {
            "tiles_of_16": plan.tiles_of_16, "stages": plan.stages, "panel": plan.panel, "strides": plan.strides,
            "by_vector": vectors,
        }  # fmt: skip
    return of_the_plan | {
        "name": s.name, "kernels": ["product"], "split": None, "turn": None, "matrix": plan.matrix,
        "linear": plan.linear, "real_bytes": s.real.bytes, "x": s.dtype.short, "y": s.real.short,
        "formula": s.operator.formula, "M": p.M, "K": p.K, "R": p.R, "C": p.C, "row_pieces": plan.row_pieces,
        "tiles": len(plan.tiles),
        "tile_rows": plan.tile_rows, "tile_columns": plan.tile_columns, "step": plan.step, "threads": plan.threads,
        "operands": names, "scale": "scale" in names, "accumulate": "alpha" in names,
    }  # fmt: skip


def _rows(plan: RowsPlan) -> dict[str, Any]:
    """The same of softmax and attention."""
    s, p = plan.problem, plan.problem.pattern
    return {
        "name": s.name, "kernels": ["rows"], "split": None, "turn": None, "real_bytes": s.real.bytes,
        "x": s.dtype.short, "y": s.real.short, "formula": s.operator.formula, "M": p.M, "K": p.K, "R": p.R, "C": p.C,
        "block_rows": p.block_rows, "blocks": p.nnzb, "masked": s.mask is not None, "warps": WARPS,
        "row_pieces": plan.row_pieces if s.head else -(-p.R // WARPS),
        "inputs": [name for name, _ in s.operator.inputs],
        "head": s.head, "padded": plan.head, "queries": plan.queries,
    }  # fmt: skip
