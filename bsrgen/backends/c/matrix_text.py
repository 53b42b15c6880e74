"""From plans of the matrix unit to text: what the templates matrix_*.c.j2 see."""

from collections.abc import Callable
from typing import Any

from bsrgen.backends.c.matrix import TILES, MatrixPacking

Number = Callable[[int], int]
_COUNTED = {"direct": "block"}
_OFFSETS = {
    "direct": "first feature of a block",
    "joined": "first feature of a block; behind the last one, that of zeros",
    "panel": "place of a block's K step in a panel, in units of 8 bytes",
    "gathered": "place of a gathered row in a panel, in units of 8 bytes; the row of zeros where there is none",
}


def matrix_view(q: MatrixPacking) -> dict[str, Any]:
    """`matrix` of the kernel: names, numbers and the instructions of each pass."""
    tile = q.tile
    shared = {
        "kind": "direct" if tile.x_first else "gather", "counted": _COUNTED.get(tile.form, "K step"),
        "offsets": _OFFSETS[tile.form], "element_bytes": q.product.part_bytes, "dot": q.product.intrinsic,
        "token_tiles": tile.token_tiles, "chunk": tile.chunk, "ahead": tile.ahead, "slots": q.slots,
    }  # fmt: skip
    return shared | (_x_first(q) if tile.x_first else _w_first(q))


def packing_view(q: MatrixPacking, firsts: str) -> dict[str, Any]:
    """What matrix_pack.c.j2 sees; firsts: the first stored block of each block row."""
    rows = [(16 * each.first, q.row_tiles[0], len(each.tiles)) for each in q.passes]
    if not q.tile.x_first:  # rows of neighbouring tiles lie in one line
        rows = [(16 * each.first, each.slots, 1) for each in q.passes]
    return {
        "firsts": firsts, "step_k": q.step_k, "x_first": q.tile.x_first, "block_rows": q.blocks.block_rows,
        "passes": [dict(zip(("row", "slots", "tiles"), each, strict=True)) for each in rows],
    }  # fmt: skip


# ── X as operand A ───────────────────────────────────────────────────────────────────────────────────────────────────


def _x_first(q: MatrixPacking) -> dict[str, Any]:
    """What matrix_direct.c.j2 sees alone."""
    T, R = q.tile.token_tiles, q.blocks.R
    counts = sorted({len(each.tiles) for each in q.passes})
    passes = [
        {"first": each.first, "tiles": len(each.tiles), "rows": min(R - 16 * each.first, 16 * len(each.tiles))}
        for each in q.passes
    ]
    return {
        "row_tiles": len(q.row_tiles), "tile_cols": q.row_tiles[0], "k_tile": q.step_k // q.pieces,
        "pieces": q.pieces, "passes": passes, "padded_k": q.padded_k, "copy_x": q.copies_x,
        "variants": [_variant(q, t, r) for t in range(1, T + 1) for r in counts],
        "configs": [_x_first_shapes(q, t) for t in range(1, T + 1)],
    }  # fmt: skip


def _numbers(q: MatrixPacking, tokens: int) -> tuple[int, Number, Number]:
    """Tiles of rows in a pass, and the numbers of the tiles of A and B; sums come first, what streams takes turns."""
    rows = min(q.tile.row_tiles, len(q.row_tiles))
    sums = tokens * rows
    if tokens == 1:  # A is held, B streams
        return rows, lambda t: sums, lambda r: sums + 1 + r % (TILES - sums - 1)
    turns = TILES - sums - rows - 1  # the last tile of tokens may have another shape: its A has a tile of its own
    return rows, lambda t: TILES - 1 if t == tokens - 1 else sums + rows + t % turns, lambda r: sums + r


def _variant(q: MatrixPacking, tokens: int, rows: int) -> dict[str, Any]:
    """One K step of `tokens` x `rows` tiles of sums."""
    stride, a, b = _numbers(q, tokens)
    ops: list[dict[str, Any]] = []
    for t in range(tokens):
        ops.append({"what": "x", "tile": a(t), "t": t})
        for r in range(rows):
            if t == 0:
                ops.append({"what": "w", "tile": b(r), "r": r})
            ops.append({"what": "dot", "c": t * stride + r, "a": a(t), "b": b(r)})
    sums = [{"tile": t * stride + r, "t": t, "r": r} for t in range(tokens) for r in range(rows)]
    return {"tokens": tokens, "rows": rows, "ops": ops, "sums": sums}


def _x_first_shapes(q: MatrixPacking, tokens: int) -> list[dict[str, Any]]:
    """Shapes of the tiles where a unit fills `tokens` tiles; `rest` is a variable of the C, the tokens of the last."""
    rows, a, b = _numbers(q, tokens)
    cols, d = q.row_tiles[0], q.step_k // q.group
    shapes: dict[int, tuple[int | str, int]] = {}
    for t in range(tokens):
        live: int | str = "rest" if t == tokens - 1 else 16
        for r in range(rows):
            shapes[t * rows + r] = live, 4 * cols
            shapes[b(r)] = d, 4 * cols
        shapes[a(t)] = live, 4 * d
    return [{"tile": t, "rows": rows, "row_bytes": size} for t, (rows, size) in sorted(shapes.items())]


# ── W as operand A ───────────────────────────────────────────────────────────────────────────────────────────────────


def _w_first(q: MatrixPacking) -> dict[str, Any]:
    """What matrix_gather.c.j2 sees alone."""
    return {
        "row_tiles": q.row_tiles, "single": q.single, "gathers": q.tile.rings, "step_rows": q.step_k // q.group,
        "step_offsets": q.step_offsets, "panel_rows": q.panel_rows,
        "panel_tail": q.panel_bytes // q.panel_row - q.panel_rows,
        "passes": [_pass(q, number) for number in range(len(q.passes))], "config": _w_first_shapes(q),
    }  # fmt: skip


def _pass(q: MatrixPacking, number: int) -> dict[str, Any]:
    """The instructions of one K step."""
    each, T = q.passes[number], q.tile.token_tiles
    step, live = min(q.tile.row_tiles, len(q.row_tiles)), len(each.tiles)
    sums, free = step * T, TILES - step * T - step  # tiles of sums, of B
    ops: list[dict[str, Any]] = []
    for r in range(live):
        ops.append({"what": "w", "tile": sums + r, "r": r})
        for t in range(T):
            if r == 0 or free < T:
                ops.append({"what": "x", "tile": sums + step + t % free, "t": t})
            ops.append({"what": "dot", "c": r * T + t, "a": sums + r, "b": sums + step + t % free})
    stored = [{"tile": r * T + t, "r": r, "t": t} for r in range(live) for t in range(T)]
    step_bytes = each.slots * q.step_k // q.group * 4
    return {"first": each.first, "tiles": live, "ops": ops, "sums": stored, "step_bytes": step_bytes}


def _w_first_shapes(q: MatrixPacking) -> list[dict[str, int]]:
    """Shapes of the tiles."""
    T, step, d = q.tile.token_tiles, min(q.tile.row_tiles, len(q.row_tiles)), q.step_k // q.group
    shapes = [{"rows": 0, "row_bytes": 0} for _ in range(TILES)]
    for r in range(step):
        shapes[step * T + r] = {"rows": q.row_tiles[r], "row_bytes": 4 * d}
        for t in range(T):
            shapes[r * T + t] = {"rows": q.row_tiles[r], "row_bytes": 64}
    for t in range(min(T, TILES - step * T - step)):
        shapes[step * T + step + t] = {"rows": d, "row_bytes": 64}
    return shapes
