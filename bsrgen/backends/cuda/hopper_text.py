"""From a Hopper plan to text: everything that templates/cuda/wgmma*.j2 may see is computed here."""

from collections.abc import Iterator
from dataclasses import asdict
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.backends.cuda.hopper import BUFFERS, CHUNK, LEAST_BYTES, PANEL, WARPGROUPS, HopperPlan
from bsrgen.backends.cuda.hopper_count import line_of
from bsrgen.backends.cuda.hopper_packing import SLOT, pack_tiles
from bsrgen.backends.cuda.hopper_schedule import BAND
from bsrgen.backends.cuda.hopper_shape import Shape
from bsrgen.backends.cuda.hopper_turn import TURN_WIDTH
from bsrgen.backends.cuda.split import COUNTERS
from bsrgen.backends.cuda.text import entry_of, kernel_of, source_of, tables_in_c
from bsrgen.emit import Source, banner, render
from bsrgen.pattern import Weight

PRODUCTS = {  # of warpgroups: features of 32 bytes, types of sums, W and X, what follows the operands
    "float16": {"k": 16, "types": "f32.f16.f16", "register": "f", "flags": "1, 1, 1, 0, {x_turned}"},
    "bfloat16": {"k": 16, "types": "f32.bf16.bf16", "register": "f", "flags": "1, 1, 1, 0, {x_turned}"},
    "float8_e4m3fn": {"k": 32, "types": "f32.e4m3.e4m3", "register": "f", "flags": "1, 1, 1"},
    "int8": {"k": 32, "types": "s32.s8.s8", "register": "r", "flags": "1"},
}
MAPS = {
    "float16": "FLOAT16",
    "bfloat16": "BFLOAT16",
    "int8": "UINT8",
    "float8_e4m3fn": "UINT8",
}  # the copy engine's names


def emit(plans: tuple[HopperPlan, ...], weight: Weight) -> Source:
    """Sources and data of one artifact.  Pure: equal inputs, equal bytes."""
    (plan,) = plans
    source, cut = plan.packing.source, plan.cut
    values = pack_tiles(weight.data, source, cut)
    blobs = {"values": "unsigned char", "source": "int64_t"}
    entry = entry_of(plan.problem, plan.target, values.nbytes, blobs, plan.workspace_bytes, _scratch(plan)) | {
        "hopper": True, "tiles": source.shape[0], "parts": cut.parts, "segments": cut.segments, "width": cut.width,
        "step": cut.step, "workspace_n": max((s.most for s in plan.shapes if s.equal), default=0),
    }  # fmt: skip
    data = {"source": source.tobytes(), "values": values.tobytes()}
    k = _kernel(plan) | {"scratch_at": entry["scratch_at"]}
    device = render("cuda/wgmma.cu.j2", k=k, banner=banner(plan.problem, (plan,)))
    return source_of(plan, device, entry, data, ("bsrgen_hopper.h", "bsrgen_mma.h"))


def _kernel(plan: HopperPlan) -> dict[str, Any]:
    """What the device's text sees."""
    t, cut, problem = plan.packing, plan.cut, plan.problem
    kernels = list({shape.name: shape for shape in plan.shapes}.values())
    many = [shape for shape in kernels if not shape.few]
    few = [shape for shape in kernels if shape.few and not shape.streams]
    equal = [shape for shape in kernels if shape.equal]
    variants = _variants(plan, kernels)
    return kernel_of(problem) | _boxes(plan) | {
        "accumulator": problem.accumulator.c, "product": _product(plan), "M": problem.pattern.M,
        "token_major": plan.token_major, "turn": _turn(plan), "K": plan.rows_of_x,
        "map_type": MAPS[problem.x_dtype.name],
        "y_bytes": problem.out_dtype.bytes, "x_swizzle": _x_swizzle(plan),
        "staged": problem.accumulator.c if plan.finishes_late else "y_t", "late": plan.finishes_late,
        "gathered": plan.gathered, "prepare": None,
        "slots": cut.slots, "down": plan.down, "warpgroups": WARPGROUPS,
        "mine": plan.slots // WARPGROUPS, "tiles": t.rows.size // (cut.slots * SLOT),
        "across": any(shape.across > 1 for shape in many),
        "clusters": any(plan.cluster(shape) > 1 for shape in many),
        "width": cut.width, "pieces": cut.pieces, "piece_bytes": cut.width * problem.dtype.bytes, "chunk": CHUNK,
        "widths": sorted({shape.width for shape in kernels if not shape.streams}),
        "stages": {shape.width: plan.stages(shape) for shape in many},
        "fews": any(s.few for s in kernels), "streams": any(s.streams for s in kernels),
        "split": plan.workspace_bytes, "counters": COUNTERS, "sms": plan.sms, "band_percent": round(100 * BAND),
        "lines": [_line(plan, shape) for shape in equal], "lists": _lists(plan),
        "few_stages": {shape.width: plan.stages(shape) for shape in few},
        "whole": bool((t.masks == (1 << cut.slots) - 1).all()),
        "buckets": [{"most": s.most, "name": s.name, "launch": _launch(s), "streams": s.streams} for s in plan.shapes],
        "kernels": [variant["name"] for variant in variants], "variants": variants,
        "tables": tables_in_c((
            ("tile_rows", t.rows, "row of Y of each row of each tile, -1 for none; the tile with most work first"),
            ("tile_steps", t.steps, "first step of each tile"),
            ("step_features", _features(plan), "first feature of each piece of each step, K for none"),
            ("step_masks", t.masks, "which slots have W for a step"),
            ("step_values", t.values, "first tile of W of each step"),
            *((("tile_values", t.values[t.steps], "and of each tile"),) if equal else ()),
            *_list_tables(plan),
            *_turn_tables(plan),
        )),
    }  # fmt: skip


def _boxes(plan: HopperPlan) -> dict[str, Any]:
    """Of Y, that the copy engine stores."""
    rows, problem = plan.box_rows, plan.problem
    if not rows:
        return {"box_rows": 0}
    unit, linear = problem.out_dtype.bytes, problem.operator.token_axis == 0
    line = (rows if linear else plan.box_tokens) * unit
    return {
        "box_rows": rows, "boxes": min(SLOT // problem.pattern.R * problem.pattern.R or SLOT, SLOT) // rows,
        "box_tokens": plan.box_tokens, "box_line": line, "buffers": BUFFERS, "y_swizzle": _swizzle(line),
        "of_tokens": any(o.kind == "token" for step in problem.epilogue for o in step.operands),
    }  # fmt: skip


def _swizzle(line: int) -> str:
    """The copy engine's name of how boxes lie whose rows are so many bytes."""
    return f"{line}B" if line > LEAST_BYTES else "NONE"


def _variants(plan: HopperPlan, kernels: list[Shape]) -> list[dict[str, str]]:
    """All functions that the host launches."""
    return [
        *([{"name": "turn", "threads": "TURN_THREADS", "call": "turn"}] if plan.turned else []),
        *({"name": s.name, "threads": _threads(s), "call": _call(s)} for s in kernels),
        {"name": "other", "threads": "OTHER_THREADS", "call": "other"},
    ]


def _x_swizzle(plan: HopperPlan) -> str:
    """That of X."""
    return _swizzle(plan.cut.width * plan.problem.dtype.bytes if plan.token_major else PANEL)


def _line(plan: HopperPlan, shape: Shape) -> dict[str, Any]:
    """Lengths of the line that a kernel's thread blocks share."""
    line, t = line_of(plan, shape), plan.packing
    length = line.w * int(t.values[-1]) + line.step * int(t.steps[-1]) + line.tile * (t.steps.size - 1)
    return asdict(line) | {"width": shape.width, "across": shape.across, "least": line.least, "all": length}


def _lists(plan: HopperPlan) -> list[dict[str, int]]:
    """Where the tables have which list."""
    sizes = [listing.ends.size for _, _, listing in plan.lists]
    return [
        {"width": s.width, "across": s.across, "clusters": listing.ends.size - 1, "tiles": listing.tiles.size, "at": at}
        for (s, _, listing), at in zip(plan.lists, accumulate(sizes, initial=0), strict=False)
    ]


def _list_tables(plan: HopperPlan) -> tuple[tuple[str, NDArray[Any], str], ...]:
    """All of them, one behind the other."""
    lists = [listing for _, _, listing in plan.lists]
    if not lists:
        return ()
    before = accumulate((listing.tiles.size for listing in lists), initial=0)
    ends = [listing.ends + np.int32(at) for listing, at in zip(lists, before, strict=False)]
    return (
        ("list_ends", np.concatenate(ends), "where the tiles of each cluster begin in list_tiles, list after list"),
        ("list_tiles", np.concatenate([listing.tiles for listing in lists]), "tiles of a call, in their order"),
    )


def _features(plan: HopperPlan) -> NDArray[Any]:
    """Where the products find X: features, or rows of what is turned."""
    features = plan.packing.features
    return np.searchsorted(plan.turning.features, features).astype(np.int32) if plan.turned else features


def _turn(plan: HopperPlan) -> dict[str, Any] | None:
    """What the kernel that turns X sees."""
    if not plan.turned:
        return None
    t, K = plan.turning, plan.problem.pattern.K
    return {"chunks": t.chunks.size, "whole": t.whole, "K": K, "width": TURN_WIDTH, "band": plan.band}


def _turn_tables(plan: HopperPlan) -> Iterator[tuple[str, NDArray[Any], str]]:
    """Which features of X are turned, where some are not."""
    if not plan.turned or (t := plan.turning).whole:
        return
    yield "turn_chunks", t.chunks, "first of eight features of X, of which some are turned"
    yield "turn_rows", t.row_of, "row of the copy of each of them, -1 for none"
    if any(shape.streams for shape in plan.shapes):
        yield "turn_features", t.features, "feature of X of each row of the copy"


def _scratch(plan: HopperPlan) -> dict[str, int] | None:
    """Memory that calls of more than `n` tokens bring for X as it is turned, a `band` of them at a time."""
    if not plan.turned:
        return None
    return {"n": plan.scratch_n, "band": plan.band, "rows": plan.turning.rows, "width": TURN_WIDTH}


def _call(shape: Shape) -> str:
    """The template that is one of the kernels."""
    name, parts = "stream" if shape.streams else "few" if shape.few else "many", shape.parts or shape.across
    work = f", {'equal' if shape.equal else 'dealt'}<{shape.width}, {parts}>" if name == "many" else ""
    return f"{name}<{shape.width}, {parts}{work}>"


def _threads(shape: Shape) -> str:
    """Of a thread block."""
    return "STREAM_THREADS" if shape.streams else "FEW_THREADS" if shape.few else "THREADS"


def _launch(shape: Shape) -> str:
    """What launches it."""
    if not shape.few:
        return f"launch_{'equal' if shape.equal else 'many'}<{shape.width}, {shape.across}>"
    room = f"{'STREAM' if shape.streams else 'FEW'}_BYTES<{shape.width}>"
    return f"launch_parts<{shape.width}, {shape.parts}, {_threads(shape)}, {room}>"


def _product(plan: HopperPlan) -> dict[str, Any]:
    """The instruction that multiplies."""
    row = PRODUCTS[plan.problem.dtype.name]
    return row | {"flags": str(row["flags"]).format(x_turned=int(not plan.token_major))}
