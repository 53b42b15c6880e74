"""Counting what a CUDA plan does on the whole GPU, in closed form: the pattern's tables are not made for it."""

from typing import TYPE_CHECKING

from bsrgen.gpus import WARP, GpuTarget
from bsrgen.plan import Counts

if TYPE_CHECKING:
    from bsrgen.backends.cuda.plan import CudaPlan

OVERLAP = 0.3  # of the resources that do not bound; a guess until a clock has seen a GPU
MMA_SHARE = 0.6  # of the units' peak that a loop of two panels may reach; a guess as well
STEP_CYCLES = 60.0  # of a barrier and the start of a step, hidden by the other warps in part; also a guess
SHARED_CYCLES = 128  # bytes that one SM reads from shared memory in a cycle


def counts(plan: "CudaPlan", n: int) -> Counts:
    """What one call of n tokens does."""
    problem, target, p = plan.problem, plan.target, plan.problem.pattern
    assert isinstance(target, GpuTarget)
    lanes, width = (plan.few, plan.few_width) if n <= plan.few_n else (plan.many, plan.width)
    unit, x_bytes, y_bytes = problem.accumulator.bytes, problem.x_dtype.bytes, problem.out_dtype.bytes
    pieces = p.nnzb * plan.row_pieces * plan.column_pieces
    elements = pieces * plan.piece_rows * plan.piece_columns  # as packed
    tiles = -(-n // width)
    groups = -(-p.block_rows * plan.row_pieces // plan.group_rows)
    staged = _columns(plan, pieces, groups)
    steps = max(-(-staged // plan.step_columns), groups)
    value_bytes = elements * problem.dtype.bytes
    table_bytes = 12 * groups + 4 * (steps + staged + steps * plan.group_rows) + 2 * pieces
    flop = 2 * elements * tiles * width
    peak = target.matrix_flop_per_cycle(problem.dtype.name) * MMA_SHARE if plan.matrix else target.flop_per_cycle(unit)
    if plan.matrix:  # bytes of X, once for each thread block, and of W once for each warp
        loads = tiles * (plan.thread_warps * value_bytes + 2 * staged * plan.piece_columns * width * x_bytes) / 128
    else:  # a warp's row of W is one wavefront for each 128 bytes, its tokens of X as many as they have
        loads = tiles * pieces * plan.strips * plan.piece_columns * (1 + lanes.tokens * unit / 4)
    from_l2 = tiles * (value_bytes + table_bytes + staged * plan.piece_columns * width * x_bytes)
    memory = value_bytes + table_bytes + (p.K * x_bytes + problem.rows * y_bytes) * n
    sms = min(target.sms, max(groups * tiles, 1))  # few thread blocks leave SMs idle
    bounds = (
        flop / (peak * sms / target.sms),
        128 * loads / (SHARED_CYCLES * sms),
        from_l2 / (target.l2_bytes_per_cycle * sms / target.sms),
        memory / target.dram_bytes_per_cycle if memory > target.l2_bytes else 0.0,
        steps * tiles / sms * STEP_CYCLES,
    )
    cycles = max(bounds) + OVERLAP * (sum(bounds) - max(bounds))
    return Counts(
        flop=flop, effective_flop=problem.flop(n), vector_fma=flop // (2 * WARP), vector_loads=int(loads),
        l1_bytes=int(128 * loads), l2_bytes=int(from_l2), memory_bytes=memory, registers=_registers(plan, lanes.tokens),
        code_bytes=16 * plan.rows * lanes.tokens * plan.piece_columns, table_bytes=table_bytes,
        value_bytes=value_bytes, cycles=cycles,
    )  # fmt: skip


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
