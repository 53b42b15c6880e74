"""mode="pit" on GPUs: which plans can leave out tokens or features, and what the kernel's text sees of it.

The micro-kernels are those of static plans.  Each thread block lists for itself the tokens of its tile, from what the
call says, or the features that its tokens have; what that takes of shared memory is counted here.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from bsrgen.backends.cuda.plan import CudaPlan

MOST_EXPERTS = 4096  # whose tokens a thread block counts in shared memory
LISTED = 4  # parts of K that a list has room for, each a unit for every thread
WARP = 32


def fits_selection(plan: "CudaPlan") -> bool:
    """Whether each thread block's rows of W have one list of tokens: rows of one expert, or of one column of a mask."""
    pit, p = plan.problem.pit, plan.problem.pattern
    if pit is None or not pit.rows:
        return True
    if pit.axis.name == "experts" and pit.groups(p.M) > MOST_EXPERTS:
        return False
    return _piece_rows(plan) % plan.group_rows == 0


def selection_bytes(plan: "CudaPlan") -> int:
    """Shared memory of a thread block for the tokens of a tile: their list, counts of warps and of experts."""
    pit = plan.problem.pit
    if pit is None:
        return 0
    if not pit.axis.listed:
        return 4 * (LISTED * WARP + 1) * plan.thread_warps
    experts = pit.groups(plan.problem.pattern.M) if pit.axis.name == "experts" else 0
    return 4 * (max(plan.width, plan.few_width) + plan.thread_warps + -(-experts // 4) * 4)


def pit_view(plan: "CudaPlan") -> dict[str, Any] | None:
    """What pit.cuh.j2 sees; None where no tokens are listed."""
    pit = plan.problem.pit
    if pit is None or not pit.axis.listed:
        return None
    columns = pit.groups(plan.problem.pattern.M)
    return {"axis": pit.axis.name, "tokens": pit.tokens, "rows": pit.rows, "columns": columns,
            "piece_rows": _piece_rows(plan)}  # fmt: skip


def features_view(plan: "CudaPlan") -> dict[str, Any] | None:
    """What features.cuh.j2 sees; None where nothing of K is left out."""
    pit, p = plan.problem.pit, plan.problem.pattern
    if pit is None or pit.axis.listed:
        return None
    unit = plan.unit_k
    listed = LISTED * WARP * plan.thread_warps
    return {"unit": unit, "units": -(-p.K // unit), "step": plan.step_units, "listed": listed,
            "tile_index": len(plan.problem.operands) - 1}  # fmt: skip


def tile_sizes(plan: "CudaPlan") -> dict[str, Any]:
    """By features, as a knob: how many tokens may share what of W they read, a kernel for each."""
    pit = plan.problem.pit
    if pit is None or pit.axis.listed:
        return {}
    few = (plan.few_width,) if plan.few_n > plan.stream_n else ()
    return {"tiles": sorted({*(plan.stream.tokens if plan.stream else ()), *few, plan.width})}


def stream_depth(plan: "CudaPlan", tokens: int) -> int:
    """Loads of W ahead in the kernel for so many tokens: by features X waits with them, and has registers for that."""
    assert plan.stream is not None
    depth = plan.stream.depth(tokens)
    wide = features_view(plan) is not None and not plan.matrix and plan.problem.accumulator.bytes == 8
    return max(depth // 2, 1) if wide else depth


def pit_tables(plan: "CudaPlan") -> tuple[tuple[str, NDArray[Any], str], ...]:
    """Which thread blocks' rows are an expert's: those start in the order of their work, not of W."""
    pit = plan.problem.pit
    if pit is None or pit.axis.name != "experts":
        return ()
    order = np.argsort(plan.packing.groups, kind="stable").astype(np.int32)
    return (("expert_groups", order, "groups of rows, expert after expert"),)


def _piece_rows(plan: "CudaPlan") -> int:
    """Piece rows of an expert, or of a column of a mask."""
    pit = plan.problem.pit
    assert pit is not None
    return pit.rows // plan.problem.pattern.R * plan.row_pieces
