"""A pattern that comes with the call, on a GPU: where its tables and values lie in a prepared weight.

Every table has room for any pattern of the planned maximum, so that it begins at a constant distance before the packed
values: the kernels, which get those, find the others without an argument more.
"""

from collections.abc import Iterator
from math import gcd
from typing import Any

from bsrgen.backends.cuda.matrix import MatrixPlan
from bsrgen.backends.cuda.plan import INT_MAX, CudaPlan

LINE = 128
MAP_BYTES = 32 << 10  # shared memory of the thread block that numbers the columns of a group
WORD = 32
VALUES_OF_BLOCK = 1024  # that a thread block packs, on average
KERNELS = ("count", "schedule", "fill", "values")
INT, SHORT, LONG = "int", "unsigned short", "unsigned long long"
BYTES = {"char": 1, INT: 4, SHORT: 2, LONG: 8}


Table = tuple[str, str, int, str]  # name, C type, most entries, meaning


def tables(plan: CudaPlan) -> Iterator[Table]:
    """What the kernels walk, by the names that static kernels have."""
    groups, halves = plan.units, plan.halves
    pieces, slots = most_pieces(plan), halves * groups
    steps = most_steps(plan)
    yield "group_rows", INT, groups, "first piece row of each thread block, those with most work first"
    yield "group_steps", INT, slots + 1, "its first step"
    yield "step_columns", INT, steps + 1, "first column of each step"
    yield "column_features", INT, pieces, "first feature of each column"
    if plan.matrix:
        yield "step_fragments", INT, steps + 1, "first tile of features of each step"
    else:
        yield (
            "step_pieces",
            INT,
            steps * plan.group_rows + 1,
            "first piece of each piece row of a thread block and step",
        )
        yield "piece_slots", SHORT, pieces, "which column of its step a piece has"
    if plan.stream:
        parts = groups * plan.group_rows * (plan.piece_rows // plan.stream.rows)
        unit = "tile" if plan.matrix else "piece"
        yield "part_row", INT, parts, "piece row of each part of W, in the order of thread blocks"
        yield "part_share", INT, parts, "which of its rows"
        yield "part_begin", INT, halves * parts, f"its first {unit}"
        yield "part_end", INT, halves * parts, "and the one behind its last"
        if isinstance(plan, MatrixPlan):
            run = runs(plan)[0]
            yield (
                "tile_features",
                INT,
                most_tiles(plan) * plan.tile_k // run,
                "first of features side by side, of tiles",
            )
        else:
            yield "piece_features", INT, pieces, "first feature of each piece"


def own_tables(plan: CudaPlan) -> Iterator[Table]:
    """What is left of the preparation, of which new values need `order`."""
    slots = plan.halves * plan.units
    yield "group_columns", INT, slots + 1, "first column of each thread block"
    yield "group_pieces", INT, slots + 1, "its first piece"
    if plan.matrix:
        yield "group_tiles", INT, slots + 1, "its first tile of features"
    yield "counted_columns", INT, slots, "columns of each group, in the order of rows"
    yield "counted_pieces", INT, slots, "its pieces"
    yield "found", LONG, slots, "what is wrong with its blocks"
    yield "order", INT, most_pieces(plan), "which piece of the blocks, as they came, each piece is"


def fits(plan: CudaPlan) -> bool:
    """Whether numbers of 32 bits count the entries of every table."""
    return all(count < INT_MAX for _, _, count, _ in tables(plan))


def places(plan: CudaPlan) -> dict[str, int]:
    """The byte at which each table of a prepared weight begins; the head is the first, the packed values the last."""
    at, found = LINE, {}  # the head comes first: struct prepared_head
    for name, c, count, _ in (*tables(plan), *own_tables(plan)):
        found[name] = at
        at += -(-BYTES[c] * count // LINE) * LINE
    return found | {"values": at}


def most_pieces(plan: CudaPlan) -> int:
    """Pieces of the planned maximum of blocks."""
    return plan.problem.pattern.nnzb * plan.row_pieces * plan.column_pieces


def most_steps(plan: CudaPlan) -> int:
    """Steps of any pattern: whole ones, and one that is not for each group."""
    pieces, wide = most_pieces(plan), plan.problem.pattern.block_cols * plan.column_pieces
    slots = plan.halves * plan.units
    return min(pieces // plan.step_columns + min(slots, pieces), slots * -(-wide // plan.step_columns))


def most_tiles(plan: MatrixPlan) -> int:
    """Tiles of features of any pattern."""
    return most_steps(plan) * tiles_of_step(plan)


def tiles_of_step(plan: MatrixPlan) -> int:
    """Tiles of a whole step."""
    return plan.step_k // plan.tile_k


def runs(plan: MatrixPlan) -> tuple[int, bool]:
    """Features of a tile that lie side by side in X whatever the pattern, and whether they begin at whole words."""
    C, width = plan.problem.pattern.C, plan.piece_columns
    run = gcd(8, width) if plan.column_pieces * width == C else 1
    word = 4 // plan.problem.dtype.bytes
    return run, run >= word and C % word == 0


def _parts(plan: CudaPlan) -> str:
    """Thread blocks that pack the values, in C: a step of tiles each, or VALUES_OF_BLOCK values."""
    pieces = plan.row_pieces * plan.column_pieces
    if plan.matrix:
        return f"p.blocks * {pieces} / {plan.step_columns} + {plan.halves * plan.units}"
    return f"p.blocks * {-(-pieces * plan.piece_rows * plan.piece_columns // VALUES_OF_BLOCK)}"


def prepare_view(plan: CudaPlan) -> dict[str, Any]:
    """`k.prepare`: what prepare.cuh.j2 and its host's side see."""
    p, where = plan.problem.pattern, places(plan)
    maps = plan.group_rows + 1 if plan.group_rows > 1 else 1
    most = MAP_BYTES // (2 * 4 * maps) // WORD * WORD  # words of bits, and as many counts
    words = min(most, -(-max(p.block_cols, 1) // WORD))
    rows = p.block_rows * plan.row_pieces // plan.halves
    view = {
        "tables": [
            {"name": name, "c": c, "at": at, "ahead": where["values"] - at, "text": text, "read": read}
            for read, some in ((True, tables(plan)), (False, own_tables(plan)))
            for name, c, _, text in some
            for at in (where[name],)
        ],
        "values_at": where["values"], "kernels": KERNELS, "slots": plan.halves * plan.units,
        "pieces": plan.row_pieces * plan.column_pieces, "block_rows": p.block_rows, "block_cols": p.block_cols,
        "halves": plan.halves, "half_rows": rows, "column_pieces": plan.column_pieces, "width": plan.piece_columns,
        "step": plan.step_columns, "maps": maps, "words": words,
        "value_bytes": plan.piece_rows * plan.piece_columns * plan.problem.dtype.bytes, "parts": _parts(plan),
    }  # fmt: skip
    if isinstance(plan, MatrixPlan):
        tile_bytes = plan.piece_rows * plan.tile_k * plan.problem.dtype.bytes
        view |= {"tiles_of_step": tiles_of_step(plan), "step_bytes": tiles_of_step(plan) * tile_bytes}
    return view
