"""From a plan to text: everything the CUDA templates may see is computed here."""

import json
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.backends.cuda import dynamic
from bsrgen.backends.cuda.matrix import MatrixPlan
from bsrgen.backends.cuda.packing import pack_values, piece_rows_of
from bsrgen.backends.cuda.pit import features_view, pit_tables, pit_view, stream_depth
from bsrgen.backends.cuda.plan import CudaPlan
from bsrgen.backends.cuda.split import COUNTERS, Sharing
from bsrgen.backends.cuda.stream import Stream, parts, runs
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
from bsrgen.epilogues import SELECTING
from bsrgen.gpus import ERRORS, GpuTarget
from bsrgen.pattern import Weight
from bsrgen.plan import Plan
from bsrgen.problem import Problem
from bsrgen.targets import Target

_KIND_TEXT = {
    "row": "[M], one for each output feature",
    "token": "[N], one for each token, with ld_{name} = 1; NULL is 1 for all",
    "scalar": "one number",
    "element": "like y, ld_{name} elements from row to row",
    "live": "[N], nonzero where a token is computed; NULL: all are.  Other rows of y stay as they are",
    "routing": "[N], the expert of each token; no number of one: none, its row of y stays as it is",
    "mask": "a row for each {tokens} tokens, ld_{name} elements apart, a column for each {rows} features: nonzero "
    "where y is computed; NULL: everywhere.  Other results stay as they are",
}
_C_TABLE = {"int32": "int", "uint16": "unsigned short", "uint8": "unsigned char"}
MADE_HERE = ("out", "inside", "gate")  # kinds of operands that no caller gives
UNROLLED_COLUMNS = 8
RESIDENT_WARPS = 16  # of an SM, at least, while W streams: so many registers a thread may have


def emit(plans: tuple[CudaPlan, ...], weight: Weight) -> Source:
    """Sources and data of one artifact: device text, host text, the packed values.  Pure: equal inputs, equal bytes."""
    (plan,) = plans
    headers = ["bsrgen_mma.h"] if plan.matrix else []
    device = render("cuda/kernel.cu.j2", k=_kernel(plan), banner=banner(plan.problem, plans))
    if not plan.problem.pattern.known:
        return source_of(plan, device, _entry(plan, 1), {}, headers)
    packing, cuts = plan.packing, (plan.row_pieces, plan.column_pieces, plan.piece_rows)
    values = pack_values(weight.data, packing.source, *cuts, plan.word)
    data = {"source": packing.source.tobytes()}
    if isinstance(plan, MatrixPlan):
        values = plan.in_fragments(values)
        data["features"] = plan.features_of_tiles.tobytes()
    data["values"] = values.tobytes()
    return source_of(plan, device, _entry(plan, values.nbytes), data, headers)


def source_of(
    plan: Plan, device: str, entry: dict[str, Any], data: Mapping[str, bytes], headers: Iterable[str],
) -> Source:  # fmt: skip
    """All files of an artifact: device is its .cu, data that of the blobs, headers those that not all kernels have."""
    problem, name, target = plan.problem, plan.problem.name, plan.target
    assert isinstance(target, GpuTarget)
    files = {f"{name}_{what}.bin": content for what, content in data.items()}
    manifest = {"name": name, "problem": str(problem), "pattern": problem.pattern.digest}
    entry["manifest_lines"] = [json.dumps(line + "\n") for line in json.dumps(manifest, indent=1).splitlines()]
    head = banner(problem, (plan,))
    files[f"{name}_device.cu"] = device.encode()
    files[f"{name}.c"] = render("cuda/main.c.j2", a=entry, banner=head).encode()
    files[f"{name}.h"] = render("cuda/header.h.j2", a=entry, banner=head).encode()
    ffi = ["bsrgen_tvm_ffi.h"] if problem.pattern.known else []
    for runtime in ("bsrgen.h", "bsrgen_cuda.h", *ffi, *headers):
        files[runtime] = runtime_file(runtime)
    units = (Unit(f"{name}.c", ()), Unit(f"{name}_device.cu", target.flags))
    values = f"{name}_values.bin" if data else ""
    return Source(name, (plan,), files, units, entry["prototype"], (values,), entry)


def _entry(plan: CudaPlan, values_bytes: int) -> dict[str, Any]:
    """What the host's text and the companions of the library see."""
    name = plan.problem.name
    if not plan.problem.pattern.known:
        ahead = {"matrix": plan.matrix, "block_cols": plan.problem.pattern.block_cols}
        return entry_of(plan.problem, plan.target, values_bytes, {}) | ahead | {"prepare": dynamic.prepare_view(plan)}
    blobs = {"values": "unsigned char", "source": "int64_t"}
    matrix = {}
    if isinstance(plan, MatrixPlan):
        blobs["features"] = "int64_t"
        matrix = {"features": f"{name}_features", "tiles": int(plan.fragments[-1])}
    return entry_of(plan.problem, plan.target, values_bytes, blobs, plan.workspace_bytes) | matrix | {
        "matrix": plan.matrix, "pieces": plan.packing.source.size, "row_pieces": plan.row_pieces,
        "piece_rows": plan.piece_rows, "piece_columns": plan.piece_columns, "column_pieces": plan.column_pieces,
        "word": plan.word, "workspace_n": max(plan.few_n, plan.stream_n) if plan.split else 0,
    }  # fmt: skip


def entry_of(
    problem: Problem, target: Target, values_bytes: int, blobs: Mapping[str, str], workspace_bytes: int = 0,
    scratch: Mapping[str, int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The part of it that does not depend on the kernel; blobs: NAME_<what>.bin, the C type of its elements; scratch:
    rows of X that calls of more than `n` tokens turn, each of a multiple of `width` of them."""
    p, name, x, y = problem.pattern, problem.name, problem.x_dtype, problem.out_dtype
    operands = operands_in_c(problem, _KIND_TEXT)
    values = "values" if p.known else "prepared"
    prototype = (
        f"int {name}(int64_t n, const {x.c} *x, int64_t ldx, {y.c} *y, int64_t ldy, "
        f"{arguments_in_c(operands)}const void *{values}, {'void *workspace, ' if workspace_bytes else ''}"
        f"{'void *scratch, int64_t scratch_bytes, ' if scratch else ''}void *stream)"
    )
    return {
        "name": name, "matrix": False, "hopper": False, "prepare": None, "values_name": values, "operands": operands,
        "w_type": problem.dtype.c, "x_type": x.c, "y_type": y.c,
        "blobs": [{"symbol": f"{name}_{what}", "file": f"{name}_{what}.bin", "c": c} for what, c in blobs.items()],
        "prototype": prototype, "linear": problem.operator.token_axis == 0, "M": p.M, "rows": problem.rows, "K": p.K,
        "R": p.R, "C": p.C, "nnzb": p.nnzb, "values_bytes": values_bytes, "workspace_bytes": workspace_bytes,
        "scratch": scratch, "scratch_at": len(operands) + bool(workspace_bytes), "source": f"{name}_source",
        "data": f"{name}_values", "language": "cuda", "W_rows": p.M, "errors": ERRORS, "target": target.name,
        "columns": problem.pit.groups(p.M) if problem.pit else 0, "formula": problem.operator.formula,
        "x_shape": problem.operator.x_shape, "y_shape": problem.operator.y_shape,
        "epilogue_formula": epilogue_formula(problem), "ffi": ffi_in_c(problem),
    }  # fmt: skip


def _kernel(plan: CudaPlan) -> dict[str, Any]:
    """What the device's text sees."""
    p = plan.problem.pattern
    words, ragged = plan.piece_columns // plan.word, plan.column_pieces * plan.piece_columns != p.C
    variants = _variants(plan)
    known = plan.problem.pattern.known
    prepare = None if known else dynamic.prepare_view(plan)
    return kernel_of(plan.problem) | {
        "accumulator": plan.problem.accumulator.c, "M": p.M, "pit": pit_view(plan), "features": features_view(plan),
        "result_rows": p.M if plan.problem.pit else plan.problem.rows,
        "gate_rows": plan.problem.gate_rows, "quantized": plan.problem.quantizes_x,
        "R": p.R, "C": p.C, "rows": plan.rows, "strips": plan.strips, "row_pieces": plan.row_pieces,
        "piece_columns": words, "group_rows": plan.group_rows, "word": plan.word, "ragged_columns": ragged,
        "step_features": plan.step_columns * words, "groups": plan.units,
        "unroll": min(words, UNROLLED_COLUMNS), "tables": _tables(plan) if known else [],
        "thread_warps": plan.thread_warps,
        "matrix": plan.matrix, "step_k": plan.step_k if isinstance(plan, MatrixPlan) else 0,
        "stages": plan.stages if isinstance(plan, MatrixPlan) else 2,
        "by_vector": plan.piece_columns * plan.problem.x_dtype.bytes % 16 == 0 and not ragged,
        "by_word": plan.piece_columns % 4 == 0 and not ragged and plan.problem.operator.token_axis == 0,
        "variants": variants, "kernels": [*(prepare["kernels"] if prepare else ()), *(v["name"] for v in variants)],
        "stream": _stream(plan), "prepare": prepare,
        "split": {"most": plan.split, "counters": COUNTERS, "tiles": bool(plan.sharing)} if plan.split else None,
    }  # fmt: skip


def kernel_of(problem: Problem) -> dict[str, Any]:
    """The part of it that does not depend on the plan: types, operands, the epilogue."""
    y, real = problem.out_dtype, problem.real
    element = real if y.name == "int8" else y
    operands = operands_in_c(problem, _KIND_TEXT)
    names = iter(o["name"] for o in operands)
    steps = [
        {"name": step.name, "c": step.c, "gate": step.gate and step.gate.c, "operands": [
            {"kind": o.kind, "symbol": o.symbol or o.name, "of_w": problem.rows_of(o) != problem.rows,
             "name": None if o.kind in MADE_HERE else next(names)}
            for o in step.operands]}
        for step in problem.epilogue
    ]  # fmt: skip
    kinds = {"w": problem.dtype.short, "x": problem.x_dtype.short, "y": y.short, "e": element.short}
    return {
        "name": problem.name, "real_bytes": real.bytes, "kinds": kinds, "K": problem.pattern.K, "operands": operands,
        "epilogue": steps, "linear": problem.operator.token_axis == 0, "selecting": SELECTING,
        "split": None, "turn": None,
    }  # fmt: skip


def _variants(plan: CudaPlan) -> list[dict[str, Any]]:
    """The kernels of a library, those for calls of fewer tokens first; the last takes what is left."""
    rows: list[dict[str, Any]] = []
    if stream := plan.stream:
        warps = RESIDENT_WARPS // 2 if plan.split else RESIDENT_WARPS  # a launch that is shared does not fill SMs
        resident = max(warps // stream.warps, 1)
        common = {"bounds": f"STREAM_THREADS, {resident}", "blocks": "STREAM_PARTS", "threads": str(32 * stream.warps)}
        common |= _shared(plan.stream_sharing, stream_ends(plan, stream)[-1] if plan.split else 0)
        rows = [
            {"name": f"stream{t}", "most": t, "width": t, "call": f"stream<{t}, {stream_depth(plan, t)}>"} | common
            for t in stream.tokens
        ]
        rows[-1]["most"] = plan.stream_n
    pit = plan.problem.pit
    blocks = "EXPERT_BLOCKS" if pit and pit.axis.name == "experts" else "THREAD_BLOCKS"
    common = {"bounds": "THREADS, 1", "blocks": blocks, "threads": "THREADS"}
    few = _shared(plan.sharing, plan.packing.steps[-1] + plan.packing.groups.size if plan.split else 0)
    sides = (("few", plan.few, plan.few_n, plan.few_width), ("many", plan.many, None, plan.width))
    for name, lanes, most, width in sides:
        if most is None or most > plan.stream_n:
            shared = few if name == "few" else _shared(None, 0)
            along = "" if plan.matrix else f", {lanes.along_tokens}"
            call = f"{'shared_' if shared['least'] else ''}tile<{lanes.tokens}{along}>"
            rows.append({"name": name, "most": most, "width": width, "call": call} | common | shared)
    return rows


def _shared(sharing: Sharing | None, steps: int) -> dict[str, Any]:
    """Of a kernel: steps of a tile of tokens, and the least that a thread block has if they are shared."""
    return {"steps": int(steps), "least": sharing.least if sharing else 0}


def _stream(plan: CudaPlan) -> dict[str, Any] | None:
    """The sizes of the kernel for few tokens."""
    if not plan.stream:
        return None
    count = plan.units * plan.group_rows * (plan.piece_rows // plan.stream.rows)
    sizes = asdict(plan.stream) | {"parts": max(count, 1)}
    if isinstance(plan, MatrixPlan):
        run, even = _runs(plan) if plan.problem.pattern.known else dynamic.runs(plan)
        sizes |= {"run": run, "even": even}
    return sizes


def _runs(plan: MatrixPlan) -> tuple[int, bool]:
    """Features of a tile that lie side by side in X, and whether they begin at whole words."""
    K, word = plan.problem.pattern.K, 4 // plan.problem.dtype.bytes
    table, run = runs(plan.features_of_x, K)
    return run, run >= word and not (table % word)[table < K].any()


def _tables(plan: CudaPlan) -> list[dict[str, Any]]:
    """The pattern as constants of the device."""
    t = plan.packing
    rows: tuple[tuple[str, NDArray[Any], str], ...] = (
        ("group_rows", t.groups, "first piece row of each thread block, the one with most work first"),
        ("group_steps", t.steps, "its first step"),
        ("step_columns", t.columns, "first column of each step"),
        ("column_features", t.features, "first feature of each column"),
        ("step_pieces", t.pointers, "first piece of each piece row of a thread block and step"),
    )
    if isinstance(plan, MatrixPlan):  # a step has one piece row and all of its columns
        rows = (*rows[:4], ("step_fragments", plan.fragments, "first tile of features of each step"))
    else:
        rows = (*rows, ("piece_slots", t.slots, "which column of its step a piece has"))
    if features_view(plan):  # listed by thread blocks
        rows = tuple(row for row in rows if row[0] in ("group_rows", "group_steps", "step_pieces", "step_fragments"))
    if plan.stream:
        rows += _stream_tables(plan, plan.stream)
    return tables_in_c(rows + pit_tables(plan))


def tables_in_c(rows: Iterable[tuple[str, NDArray[Any], str]]) -> list[dict[str, Any]]:
    """Name, numbers and meaning of each, as the templates print them."""
    return [
        {"name": name, "type": _C_TABLE[table.dtype.name], "text": text, "lines": _numbers(table)}
        for name, table, text in rows
    ]


def _stream_tables(plan: CudaPlan, stream: Stream) -> tuple[tuple[str, NDArray[Any], str], ...]:
    """Who walks what of W in calls of few tokens, and the features of X that belong to it."""
    t, p, work = plan.packing, plan.problem.pattern, stream_parts(plan, stream)
    if isinstance(plan, MatrixPlan):
        features = ("tile_features", runs(plan.features_of_x, p.K)[0], "first of features side by side, of each tile")
    else:
        features = ("piece_features", t.features[t.piece_columns], "first feature of each piece")
    text = {
        "row": "piece row of each part of W, the longest first", "share": "which of its rows",
        "begin": f"its first {'tile' if plan.matrix else 'piece'}", "end": "and the one behind its last",
    }  # fmt: skip
    ahead = ("part_ahead", stream_ends(plan, stream), "steps of all parts ahead, and one for each of these")
    shared = (ahead,) if plan.split else ()
    return (*((f"part_{name}", work[name], text[name]) for name in text), *shared, features)


def stream_parts(plan: CudaPlan, stream: Stream) -> dict[str, NDArray[Any]]:
    """The work of thread blocks that stream W, as stream.parts gives it."""
    t = plan.packing
    rows = (t.groups.astype(np.int64)[:, None] + np.arange(plan.group_rows)).ravel()
    ends = plan.fragments[t.steps] if isinstance(plan, MatrixPlan) else piece_rows_of(t, plan.group_rows)
    return parts(rows, ends, plan.piece_rows // stream.rows, plan.halves)


def stream_ends(plan: CudaPlan, stream: Stream) -> NDArray[Any]:
    """Steps ahead of each of them and behind the last, one more for each part: int32[parts + 1]."""
    work = stream_parts(plan, stream)
    steps = (work["end"] - work["begin"]).reshape(-1, plan.halves).sum(axis=1) + 1
    return np.concatenate(([0], np.cumsum(steps))).astype(np.int32)


def _numbers(table: NDArray[Any]) -> list[str]:
    """The numbers of a table in lines; C has no arrays of none."""
    numbers = table.tolist() or [0]
    if len(numbers) > 1000:  # nobody reads these: no time for filling lines
        return [", ".join(map(str, numbers[i : i + 32])) + "," for i in range(0, len(numbers), 32)]
    return [line.rstrip() for line in textwrap.wrap(", ".join(map(str, numbers)) + ",", 116)]
