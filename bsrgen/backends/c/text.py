"""From plans to text: everything the C templates may see is computed here."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bsrgen.backends.c.packing import Group
from bsrgen.backends.c.plan import CPlan
from bsrgen.backends.c.tiles import TokenTile, WeightTile
from bsrgen.cover import Cover
from bsrgen.emit import Source, Unit, banner, render, runtime_file
from bsrgen.pattern import Weight
from bsrgen.problem import Problem
from bsrgen.targets import baseline

FLOP_PER_PART = 2_000_000  # least share of a thread, 10 us or more: a cold pool takes 13 us to wake (Zen 5 VM)

_C_KIND = {
    "row": "const {type} *{name}",
    "token": "const {type} *{name}, int64_t ld_{name}",
    "scalar": "{type} {name}",
    "element": "const {type} *{name}, int64_t ld_{name}",
}
_RUNTIME = ("bsrgen.h", "bsrgen_simd.h", "bsrgen_types.h", "bsrgen_product.h", "bsrgen_scratch.h", "bsrgen_parallel.h")
_ONE = {"bfloat16": "0x3f80", "float16": "0x3c00"}  # 1.0 as its bits
_KIND_TEXT = {
    "row": "[M], one for each output feature",
    "token": "[N], one for each token, with ld_{name} = 1; or one number for all with 0",
    "scalar": "one number",
    "element": "like y, ld_{name} elements from row to row",
}


def emit(plans: tuple[CPlan, ...], weight: Weight) -> Source:
    """Sources and data of one artifact: one kernel text per ISA level, best first.  Pure: equal inputs, equal bytes."""
    problem = plans[0].problem
    name = problem.name
    files: dict[str, bytes] = {}
    blobs: list[dict[str, str]] = []
    packings: list[dict[str, Any]] = []
    levels = [_level(plan, weight, files, blobs, packings) for plan in plans]
    artifact = _artifact(plans, levels, blobs, packings)
    head = banner(problem, plans)
    units = [Unit(f"{name}.c", baseline(plans[0].target).flags)]  # runs before the check of the CPU
    for plan, level in zip(plans, levels, strict=True):
        for part in _parts(plan, level["name"]):
            text = render("c/kernel.c.j2", k=_kernel(part, level), banner=head)
            files[f"{part.name}.c"] = text.encode()
            units.append(Unit(f"{part.name}.c", plan.target.flags))
    manifest = {"name": name, "problem": str(problem), "pattern": problem.pattern.digest}
    artifact["manifest_lines"] = [_c_string(line) for line in json.dumps(manifest, indent=1).splitlines()]
    files[f"{name}.c"] = render("c/main.c.j2", a=artifact, banner=head).encode()
    files[f"{name}.h"] = render("c/header.h.j2", a=artifact, banner=head).encode()
    math = ("bsrgen_math.h",) if _needs_math(problem) else ()
    for runtime in (*_RUNTIME, *math):
        files[runtime] = runtime_file(runtime)
    values = tuple(f"{level['data']}.bin" for level in levels)
    return Source(name, plans, files, tuple(units), artifact["prototype"], values, artifact)


@dataclass(frozen=True, slots=True)
class _Part:
    """One micro-kernel of a plan: a file of its own, because vectors may differ in length."""

    name: str
    plan: CPlan
    tokens: TokenTile | None
    weight: WeightTile | None

    @property
    def lanes(self) -> int:
        """Elements in one vector."""
        return self.plan.weight_lanes if self.weight else self.plan.lanes


def _parts(plan: CPlan, name: str) -> list[_Part]:
    """The micro-kernel for many tokens, then the one for few."""
    if plan.tokens is None:
        return [_Part(name, plan, None, plan.weight)]
    few = [_Part(f"{name}_few", plan, None, plan.weight)] if plan.weight else []
    return [_Part(name, plan, plan.tokens, None), *few]


def _needs_math(problem: Problem) -> bool:
    return any("v_" in step.c for step in problem.epilogue)


def _artifact(
    plans: tuple[CPlan, ...], levels: list[dict[str, Any]], blobs: list[dict[str, str]], packings: list[dict[str, Any]]
) -> dict[str, Any]:
    problem = plans[0].problem
    p, x, y = problem.pattern, problem.x_dtype, problem.out_dtype
    operands = [
        {"name": o.name, "kind": o.kind, "text": _KIND_TEXT[o.kind].format(name=o.name),
         "type": problem.operand_dtype(o).c} for o in problem.operands
    ]  # fmt: skip
    arguments = [_C_KIND[o["kind"]].format(type=o["type"], name=o["name"]) for o in operands]
    prototype = (
        f"int {problem.name}(int64_t n, const {x.c} *x, int64_t ldx, {y.c} *y, int64_t ldy, "
        f"{''.join(f'{a}, ' for a in arguments)}const void *values, int threads)"
    )
    return {
        "name": problem.name, "w_type": problem.dtype.c, "x_type": x.c, "y_type": y.c, "x_one": _ONE.get(x.name, "1"),
        "y_bits": "'s bits" if y.name in _ONE else "", "types": (problem.dtype.name, x.name, y.name), "levels": levels, "blobs": blobs, "packings": packings,
        "operands": operands, "prototype": prototype, "linear": problem.operator.token_axis == 0,
        "x86": levels[0]["family"] == "x86_64", "M": p.M, "K": p.K, "R": p.R, "C": p.C, "nnzb": p.nnzb,
        "flop_per_token": max(2 * max(plan.pattern.nnz for plan in plans), 1), "flop_per_part": FLOP_PER_PART,
        "missing_bytes": 1 + sum(len(f) + 1 for f in levels[-1]["requires"]),
        "formula": problem.operator.formula, "x_shape": problem.operator.x_shape, "y_shape": problem.operator.y_shape,
        "epilogue_formula": epilogue_formula(problem),
    }  # fmt: skip


def epilogue_formula(problem: Problem) -> str:
    """The epilogue as one line of mathematics for people."""
    return "; then ".join(f"{step.name}: v = {step.c}" for step in problem.epilogue) or "no epilogue"


def _level(
    plan: CPlan,
    weight: Weight,
    files: dict[str, bytes],
    blobs: list[dict[str, str]],
    packings: list[dict[str, Any]],
) -> dict[str, Any]:
    """One ISA level: its data files, shared with an earlier level where they are the same."""
    problem, name, p = plan.problem, plan.problem.name, plan.pattern
    unit, cols = plan.product, plan.stored.C
    blocks = f"{name}_{'dense' if plan.dense else 'b'}{p.R}x{cols}" if plan.cover else name
    tables = f"{blocks}_u{8 * plan.packing.offset_bytes}" + (f"_{plan.k_panel}" if plan.panels > 1 else "")
    tables += f"_{'gathered' if plan.gather else 'by'}{unit.group}" if unit.group > 1 else ""
    if f"{blocks}_work.bin" not in files:
        _blob(files, blobs, f"{blocks}_work", plan.work, "uint64_t")
        if plan.cover:
            _blob(files, blobs, f"{blocks}_moves", plan.cover.moves, "uint32_t")
    if f"{tables}_pointers.bin" not in files:
        _blob(files, blobs, f"{tables}_pointers", plan.packing.pointers, "uint32_t")
        _blob(files, blobs, f"{tables}_offsets", plan.packing.offsets, _offset_type(plan))
        if plan.panels > 1 or plan.gather:
            _blob(files, blobs, f"{tables}_order", plan.packing.order, "uint32_t")
        if plan.panels > 1:
            _blob(files, blobs, f"{tables}_rows", plan.packing.segment_rows, "uint32_t")
    key = (plan.groups, plan.k_lanes, tables, unit.name)
    keys = [packing["key"] for packing in packings]
    if key not in keys:
        symbol = f"{name}_values_{len(packings)}"
        _blob(files, blobs, symbol, plan.packing.pack(weight.data, plan.corrections), _packed_type(plan))
        packings.append(
            {
                "key": key, "symbol": symbol, "R": p.R, "C": p.C, "k_lanes": plan.k_lanes, "tables": tables,
                "segments": len(plan.packing.pointers) - 1, "groups": plan.groups, "ordered": plan.panels > 1, "panels": plan.panels > 1, "gather": plan.gather, "group": unit.group,
                "part": unit.part or problem.dtype.c, "corrections": plan.corrections,
                "cover": _cover(plan.cover, f"{blocks}_moves") if plan.cover else None, "bytes": plan.value_bytes,
            }
        )  # fmt: skip
        keys.append(key)
    packing = packings[keys.index(key)]
    return {
        "name": f"{name}_{plan.target.name.replace('-', '_')}", "target": plan.target.name,
        "family": plan.target.family, "requires": plan.target.requires, "tables": tables, "work": f"{blocks}_work",
        "block_rows": p.block_rows, "few": plan.small_n if plan.tokens and plan.weight else 0,
        "by_rows": int(plan.tokens is None), "data": packing["symbol"], "packing": keys.index(key),
        "values_bytes": packing["bytes"],
    }  # fmt: skip


def _cover(cover: Cover, moves: str) -> dict[str, Any]:
    """What the packing must know to fill the blocks of a cover."""
    (r, c), own, blocks = cover.piece, cover.own, cover.blocks
    return {
        "moves": moves, "piece_rows": r, "piece_cols": c, "pieces": own.nnzb * cover.pieces, "own_R": own.R,
        "own_C": own.C, "wide": blocks.C // c, "nnzb": blocks.nnzb, "cols": blocks.C,
    }  # fmt: skip


def _blob(files: dict[str, bytes], blobs: list[dict[str, str]], symbol: str, array: Any, c: str) -> None:
    files[f"{symbol}.bin"] = array.tobytes()
    blobs.append({"symbol": symbol, "file": f"{symbol}.bin", "c": c})


def _packed_type(plan: CPlan) -> str:
    """C type of the packed values: units of W, or where corrections come first, the numbers of those."""
    if plan.corrections:
        return "int32_t"
    return "uint32_t" if plan.product.group > 1 else plan.problem.dtype.c


def _kinds(problem: Problem) -> dict[str, str]:
    """What lies in memory, by the short names of runtime/bsrgen_types.h."""
    x, y, real = problem.x_dtype, problem.out_dtype, problem.real
    element = real if y.name == "int8" else y
    return {"real": real.short, "w": problem.dtype.short, "x": x.short, "y": y.short, "e": element.short}


def _offset_type(plan: CPlan) -> str:
    return f"uint{8 * plan.packing.offset_bytes}_t"


def _c_string(text: str) -> str:
    return json.dumps(text + "\n")


def _kernel(part: _Part, level: dict[str, Any]) -> dict[str, Any]:
    """What kernel.c.j2 and its parts see."""
    plan, tokens, weight = part.plan, part.tokens, part.weight
    problem, p, linear = plan.problem, plan.pattern, plan.problem.operator.token_axis == 0
    direct = not linear and plan.panels == 1
    padded_k, unit = p.block_cols * p.C, plan.weight.row_lanes if plan.weight else 1
    product = plan.product
    groups = [_group(plan, q, unit) for q in range(len(plan.groups))]
    full = sum(1 for g in groups if (g["rows"], g["slots"]) == (groups[0]["rows"], groups[0]["slots"]))
    index = iter(range(len(problem.operands)))
    epilogue = [
        {"name": step.name, "c": step.c, "operands": [
            {"kind": o.kind, "symbol": o.symbol or o.name, "index": next(index) if o.kind != "out" else -1}
            for o in step.operands]}
        for step in problem.epilogue
    ]  # fmt: skip
    rows = _code(plan) if plan.encoding == "code" and (tokens or not plan.tokens) else ()
    return {
        "name": part.name, "tables": level["tables"], "real": problem.real.c, "real_bytes": problem.real.bytes,
        "kinds": _kinds(problem), "group": product.group, "dot": product.name, "gather": int(plan.gather),
        "integer": int(problem.accumulator.name == "int32"), "corrections": plan.corrections, "same_x": plan.same_x,
        "lanes": part.lanes, "M": p.M, "K": problem.pattern.K, "K_cells": p.K, "R": p.R, "C": p.C,
        "block_rows": p.block_rows,
        "panels": plan.panels, "panel_starts": plan.packing.panel_starts if plan.panels > 1 else (),
        "k_panel": plan.k_panel, "K_padded_total": padded_k, "K_padded": padded_k != p.K,
        "block_values": plan.packing.block_values, "k_lanes": plan.k_lanes, "offset_type": _offset_type(plan),
        "weight": weight, "tokens": tokens, "linear": linear, "direct": direct,
        "math": _needs_math(problem), "epilogue": epilogue,
        "finish_rows": weight is not None or linear,
        "finish_tokens": not linear and tokens is not None,
        "groups": groups, "groups_full": full if full > 1 else 0,
        "groups_single": groups[full:] if full > 1 else groups,
        "ldx": plan.leading_dimension, "copy_x": plan.copies_x,
        "folds": _folds(part.lanes, plan.k_lanes),
        "weight_vectors": sum(g["slots"] for g in groups) // unit,
        "weight_window": plan.weight_window, "weight_rows": plan.shared_block_rows,
        "weight_slab": plan.summed_block_rows,
        "weight_direct": plan.k_lanes == plan.panels == 1 and not _needs_math(problem),
        "M_padded": p.block_rows * p.R != p.M,
        "weight_token_counts": _variants(weight.tokens, bool(rows)) if weight else (),
        "token_vector_counts": _variants(tokens.vectors, bool(rows)) if tokens else (),
        "code": rows,
        "token_groups": _token_groups(plan, groups, full) if tokens else (),
        "panel_forms": ("", "x") if tokens and not tokens.pack and direct else ("",),
        "finish_block_rows": plan.waiting_block_rows, "packs_whole": tokens is not None and plan.packs_whole,
    }  # fmt: skip


def _variants(most: int, code: bool) -> Sequence[int]:
    """Register tiles that are compiled: every size, or with the pattern as code only the full one and one."""
    return sorted({1, most}) if code else range(1, most + 1)


def _code(plan: CPlan) -> list[dict[str, Any]]:
    """The pattern as code: the blocks of each block row, with the places of their values and of their first feature."""
    p = plan.pattern
    return [
        {"i": i, "blocks": [
            {"value": b * plan.packing.block_values, "k": int(p.indices[b]) * p.C, "j": int(p.indices[b])}
            for b in range(p.indptr[i], p.indptr[i + 1])]}
        for i in range(p.block_rows)
    ]  # fmt: skip


def _folds(lanes: int, k_lanes: int) -> list[dict[str, Any]]:
    """Rounds that add up the `k_lanes` neighbours of each row: two vectors of groups become one of half groups."""
    rounds = []
    group = k_lanes
    while group > 1:
        low = [first + q for first in range(0, 2 * lanes, group) for q in range(group // 2)]
        high = [q + group // 2 for q in low]
        rounds.append({"group": group, "low": ", ".join(map(str, low)), "high": ", ".join(map(str, high))})
        group //= 2
    return rounds


def _group(plan: CPlan, q: int, unit: int) -> dict[str, int]:
    group: Group = plan.groups[q]
    C = plan.pattern.C
    before = q * plan.groups[0].slots * C  # only the last group can be smaller
    return {"row": group.row, "rows": group.rows, "slots": group.slots, "size": group.slots * C,
            "before": before, "vectors": group.slots // unit}  # fmt: skip


def _token_groups(plan: CPlan, groups: list[dict[str, int]], full: int) -> list[dict[str, Any]]:
    """Groups as the token tile walks them: a run of equal groups, then the odd one; each cut into register tiles."""
    assert plan.tokens is not None
    runs = [{**groups[0], "count": full}] + [{**g, "count": 1} for g in groups[full:]]
    return [{**run, "tiles": _tiles(run["rows"], plan.tokens)} for run in runs]


def _tiles(rows: int, tile: TokenTile) -> list[dict[str, int]]:
    whole, rest = divmod(rows, tile.rows)
    tiles = [{"row": 0, "rows": tile.rows, "count": whole}] if whole else []
    return tiles + ([{"row": whole * tile.rows, "rows": rest, "count": 1}] if rest else [])
