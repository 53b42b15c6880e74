"""Counting what a CUDA plan does on the whole GPU, in closed form: the pattern's tables are not made for it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bsrgen.backends.cuda.split import Sharing
from bsrgen.backends.cuda.stream import LOAD_BYTES
from bsrgen.gpus import WARP, GpuTarget
from bsrgen.plan import Counts

if TYPE_CHECKING:
    from bsrgen.backends.cuda.plan import CudaPlan

OVERLAP = 0.3  # of the resources that do not bound; a guess until a clock has seen a GPU
MMA_SHARE = 0.6  # of the units' peak that a loop of two panels may reach; a guess as well
STEP_CYCLES = 60.0  # of a barrier and the start of a step, hidden by the other warps in part; also a guess
STREAM_CYCLES = 150.0  # of a thread block that begins and ends, hidden by others in part; a guess, too
SHARED_CYCLES = 128  # bytes that one SM reads from shared memory in a cycle
TILE_CYCLES = 300.0  # from L2 to registers: a warp that has W one tile ahead waits so long for each, if alone; a guess
LOAD_CYCLES = 600.0  # and from memory
MEET_CYCLES = 1500.0  # of thread blocks that share a unit: a fence, a count, the first of the others' sums; a guess


@dataclass(frozen=True, slots=True)
class _Work:
    """What one kernel does: FLOP, wavefronts of loads, bytes from L2, waits, and SMs that take part."""

    flop: int
    loads: float
    from_l2: float
    waits: float  # cycles
    chain: float  # cycles of one thread block's share, were it alone
    sms: int
    tokens: int  # of a thread


def counts(plan: "CudaPlan", n: int) -> Counts:
    """What one call of n tokens does.  The floor is the memory's: each byte of W once, tables, X and Y."""
    problem, target, p = plan.problem, plan.target, plan.problem.pattern
    assert isinstance(target, GpuTarget)
    pieces = p.nnzb * plan.row_pieces * plan.column_pieces
    value_bytes = pieces * plan.piece_rows * plan.piece_columns * problem.dtype.bytes  # as packed
    groups = -(-p.block_rows * plan.row_pieces // plan.group_rows)
    staged = _columns(plan, pieces, groups)
    steps = max(-(-staged // plan.step_columns), groups)
    table_bytes = 12 * groups + 4 * (steps + staged + steps * plan.group_rows) + 2 * pieces
    work = _streamed(plan, n, pieces) if n <= plan.stream_n else _tiled(plan, n, pieces, groups, staged, steps)
    unit = problem.accumulator.bytes
    peak = (
        target.matrix_flop_per_cycle(problem.dtype.name) * MMA_SHARE
        if plan.matrix
        else plan.word * target.flop_per_cycle(unit)
    )
    memory = value_bytes + table_bytes + (p.K * problem.x_dtype.bytes + problem.rows * problem.out_dtype.bytes) * n
    share = work.sms / target.sms  # few thread blocks leave SMs idle
    bounds = (
        work.flop / (peak * share),
        128 * work.loads / (SHARED_CYCLES * work.sms),
        (work.from_l2 + -(-n // plan.width) * table_bytes) / (target.l2_bytes_per_cycle * share),
        memory / target.dram_bytes_per_cycle if memory > target.l2_bytes else 0.0,
        work.waits, work.chain,
    )  # fmt: skip
    cycles = max(bounds) + OVERLAP * (sum(bounds) - max(bounds))
    return Counts(
        flop=work.flop, effective_flop=problem.flop(n), vector_fma=work.flop // (2 * WARP),
        vector_loads=int(work.loads), l1_bytes=int(128 * work.loads), l2_bytes=int(work.from_l2), memory_bytes=memory,
        registers=_registers(plan, work.tokens), code_bytes=16 * plan.rows * work.tokens * plan.piece_columns,
        table_bytes=table_bytes, value_bytes=value_bytes, cycles=cycles,
    )  # fmt: skip


def _tiled(plan: "CudaPlan", n: int, pieces: int, groups: int, staged: int, steps: int) -> _Work:
    """A tile of tokens after another, X through shared memory."""
    problem, target = plan.problem, plan.target
    assert isinstance(target, GpuTarget)
    lanes, width = (plan.few, plan.few_width) if n <= plan.few_n else (plan.many, plan.width)
    tiles, unit = -(-n // width), problem.accumulator.bytes
    elements = pieces * plan.piece_rows * plan.piece_columns
    value_bytes, x_bytes = elements * problem.dtype.bytes, staged * plan.piece_columns * width * problem.x_dtype.bytes
    if plan.matrix:  # bytes of X, once for each thread block, and of W once for each warp
        loads = tiles * (plan.thread_warps * value_bytes + 2 * x_bytes) / 128
    else:  # a warp's row of W is one wavefront for each 128 bytes, its tokens of X as many as they have
        loads = tiles * pieces * plan.strips * plan.piece_columns // plan.word * (1 + lanes.tokens * unit / 4)
    if problem.quantizes_x:  # each thread block looks for the largest of its tokens
        x_bytes += groups * problem.pattern.K * width * problem.x_dtype.bytes
    units = max(groups * tiles // plan.halves, 1)
    parts, chain = _shared(plan.sharing if n <= plan.few_n else None, units, tiles * steps + units)
    chain *= TILE_CYCLES * plan.step_tiles
    meet = _meet(plan.sharing, parts, min(n, width) / width)
    sms = min(target.sms, round(units * parts))
    waits = steps * tiles / sms * STEP_CYCLES
    from_l2 = tiles * (value_bytes + x_bytes)
    return _Work(2 * elements * tiles * width, loads, from_l2, waits, chain + meet, sms, lanes.tokens)


def _streamed(plan: "CudaPlan", n: int, pieces: int) -> _Work:
    """W once for each tile of tokens, X as each lane needs it, by L1."""
    problem, target, stream = plan.problem, plan.target, plan.stream
    assert isinstance(target, GpuTarget)
    assert stream is not None
    width = stream.width(n)
    tiles, elements = -(-n // width), pieces * plan.piece_rows * plan.piece_columns
    parts = max(problem.pattern.block_rows * plan.row_pieces * (plan.piece_rows // stream.rows), 1)
    w_loads = elements * problem.dtype.bytes / 128
    x_loads = (
        elements / (WARP * stream.rows) * 8 if plan.matrix else elements / (WARP * stream.vector * plan.word) * width
    )
    units, steps = max(parts * tiles // plan.halves, 1), elements // (stream.rows * plan.stream_columns)
    shares, chain = _shared(plan.stream_sharing, units, tiles * steps + units)
    ahead = stream.warps * WARP * LOAD_BYTES * stream.depth(width)  # bytes on their way
    chain *= LOAD_CYCLES * stream.rows * plan.stream_columns * problem.dtype.bytes / ahead
    meet = _meet(plan.stream_sharing, shares, width / stream.tokens[-1])
    sms = min(target.sms, round(units * shares))
    waits = units * shares / sms * STREAM_CYCLES
    from_l2 = elements * problem.dtype.bytes + 32 * x_loads
    chain = max(chain, LOAD_CYCLES) + meet
    loads = tiles * (w_loads + x_loads)
    return _Work(2 * elements * tiles * width, loads, tiles * from_l2, waits, chain, sms, min(width, 4))


def _shared(sharing: Sharing | None, units: int, length: int) -> tuple[float, float]:
    """(Parts of a unit, steps of a thread block's share) of a launch."""
    shares = sharing.shares(units, length) if sharing else units
    return shares / units, length / shares


def _meet(sharing: Sharing | None, parts: float, filled: float) -> float:
    """Cycles until the sums of a unit's parts are one; `filled` of their tokens are there."""
    if sharing is None or parts <= 1:
        return 0.0
    return MEET_CYCLES + parts * filled * sharing.slot_bytes / SHARED_CYCLES * 2


def _registers(plan: "CudaPlan", tokens: int) -> int:
    """Of a thread, about."""
    return plan.rows * tokens // 2 + 4 * tokens + 40 if plan.matrix else plan.rows * tokens + 2 * plan.rows + 32


def _columns(plan: "CudaPlan", pieces: int, groups: int) -> int:
    """Columns that all thread blocks bring in, were the blocks spread evenly: those that a group has in common once."""
    if plan.group_rows == 1 or not pieces:
        return pieces
    wide = plan.problem.pattern.block_cols * plan.column_pieces
    empty = (1 - min(pieces / (groups * plan.group_rows * wide), 1.0)) ** plan.group_rows
    return round(groups * wide * (1 - empty))
