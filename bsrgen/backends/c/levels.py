"""The data of one ISA level: values, tables and the order they are packed in, as files that the library includes."""

from typing import Any

from bsrgen.backends.c.matrix_text import packing_view
from bsrgen.backends.c.plan import CPlan
from bsrgen.cover import Cover
from bsrgen.pattern import Weight


def level_of(
    plan: CPlan,
    weight: Weight,
    files: dict[str, bytes],
    blobs: list[dict[str, str]],
    packings: list[dict[str, Any]],
) -> dict[str, Any]:
    """One ISA level: its data files, shared with an earlier level where they are the same."""
    name, p = plan.problem.name, plan.pattern
    blocks = f"{name}_{'dense' if plan.dense else 'b'}{p.R}x{plan.stored.C}" if plan.cover else name
    if f"{blocks}_work.bin" not in files:
        _blob(files, blobs, f"{blocks}_work", plan.work, "uint64_t")
        if plan.cover:
            _blob(files, blobs, f"{blocks}_moves", plan.cover.moves, "uint32_t")
    tables = _tables(plan, blocks, files, blobs)
    shape = plan.matrix.row_tiles if plan.matrix else plan.groups
    key = (shape, plan.k_lanes, tables, plan.product.name)
    keys = [packing["key"] for packing in packings]
    if key not in keys:
        symbol = f"{name}_values_{len(packings)}"
        _blob(files, blobs, symbol, plan.packing.pack(weight.data, plan.corrections), _packed_type(plan))
        cover = _cover(plan.cover, f"{blocks}_moves") if plan.cover else None
        packings.append({"key": key, "symbol": symbol, "cover": cover, **_packing(plan, tables)})
        keys.append(key)
    packing = packings[keys.index(key)]
    return {
        "name": f"{name}_{plan.target.name.replace('-', '_')}", "target": plan.target.name,
        "family": plan.target.family, "requires": plan.target.requires, "tables": tables, "work": f"{blocks}_work",
        "block_rows": plan.work.size - 1, "block_r": p.R, "few": plan.few_n,
        "by_rows": int(plan.shares_rows), "tiles": plan.on_tiles,
        "data": packing["symbol"], "packing": keys.index(key),
        "values_bytes": packing["bytes"],
    }  # fmt: skip


def _tables(plan: CPlan, blocks: str, files: dict[str, bytes], blobs: list[dict[str, str]]) -> str:
    """Names of the tables that the kernel walks, which are written where no earlier level has them."""
    unit, packing, m = plan.product, plan.packing, plan.matrix
    tables = f"{blocks}_u{8 * packing.offset_bytes}" + (f"_{plan.k_panel}" if plan.panels > 1 else "")
    tables += f"_{m.form}{m.token_tiles}" if m else ""
    tables += f"_{'gathered' if plan.gather else 'by'}{unit.group}" if unit.group > 1 else ""
    if (bits := plan.bits) and f"{tables}_bits{bits.step}.bin" not in files:
        _blob(files, blobs, f"{tables}_bits{bits.step}", packing.stored_bits(bits), f"uint{bits.count}_t")
    if f"{tables}_pointers.bin" in files:
        return tables
    _blob(files, blobs, f"{tables}_pointers", packing.pointers, "uint32_t")
    _blob(files, blobs, f"{tables}_offsets", packing.offsets, offset_type(plan))
    if plan.panels > 1 or plan.gather:
        _blob(files, blobs, f"{tables}_order", packing.order, "uint32_t")
    if plan.panels > 1:
        _blob(files, blobs, f"{tables}_rows", packing.segment_rows, "uint32_t")
    if m:
        _blob(files, blobs, f"{tables}_firsts", plan.matrix_packing.firsts, "uint32_t")
    return tables


def _packing(plan: CPlan, tables: str) -> dict[str, Any]:
    """What the packing must know of its order."""
    p, unit = plan.pattern, plan.product
    return {
        "R": p.R, "C": p.C, "k_lanes": plan.k_lanes, "tables": tables, "segments": len(plan.packing.pointers) - 1,
        "groups": () if plan.matrix else plan.groups, "panels": plan.panels > 1,
        "gather": plan.gather, "group": unit.group, "part": unit.part or plan.problem.dtype.c,
        "corrections": plan.corrections, "bytes": plan.value_bytes,
        "matrix": packing_view(plan.matrix_packing, f"{tables}_firsts") if plan.matrix else None,
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


def offset_type(plan: CPlan) -> str:
    """C type of the offsets."""
    return f"uint{8 * plan.packing.offset_bytes}_t"
