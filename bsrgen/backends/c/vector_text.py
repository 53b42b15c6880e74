"""What the tiles of vectors see: numbers and names for token_tile.c.j2, weight_tile.c.j2 and their parts."""

from dataclasses import dataclass
from typing import Any

from bsrgen.backends.c.features import features_view
from bsrgen.backends.c.layout import FINISH_ROWS
from bsrgen.backends.c.plan import CPlan
from bsrgen.backends.c.tiles import TokenTile, WeightTile
from bsrgen.backends.c.tiling import code, folds, group, token_groups, variants
from bsrgen.problem import Problem

# Of Y of one token, written together: int8 16x16, 1024x1024, density 1/32: 34 us, of 256 bytes 39, of 128 42 (Zen 5).
STAGE_BYTES = 512
LINE_BYTES = 64
SETS_BYTES = 4096  # from a line to the next that lies in the same set of L1: 64 sets on every x86 so far


@dataclass(frozen=True, slots=True)
class Part:
    """One micro-kernel of a plan: a file of its own, because vectors may differ in length."""

    name: str
    plan: CPlan
    tokens: TokenTile | None
    weight: WeightTile | None
    short: bool = False  # vectors of the plan's short_lanes

    @property
    def lanes(self) -> int:
        """Elements in one vector."""
        if self.short:
            return self.plan.short_lanes
        return self.plan.weight_lanes if self.weight else self.plan.lanes

    @property
    def single(self) -> bool:
        """Whether calls of one token have a way of their own."""
        return self.short and self.plan.single


def needs_math(problem: Problem) -> bool:
    return any("v_" in step.c + (step.gate.c if step.gate else "") for step in problem.epilogue)


def _bits(part: Part) -> dict[str, int] | None:
    """Of expanded rows: the bits of a vector, and the vectors of a panel."""
    plan, bits = part.plan, part.plan.bits
    if part.weight is None or bits is None:
        return None
    features = plan.pattern.block_cols * plan.pattern.C
    last = features - (plan.panels - 1) * plan.k_panel
    return {"step": bits.step, "count": bits.count, "bytes": bits.bytes,
            "vectors": bits.vectors(plan.k_panel), "last": bits.vectors(last)}  # fmt: skip


def _stage(part: Part) -> dict[str, int] | None:
    """Rows and tokens of results that wait to be written together, where rows of Y share sets of L1; None where Y is
    read, and where the kernel writes more than a line at once."""
    plan, weight = part.plan, part.weight
    if plan.problem.rows * plan.problem.out_dtype.bytes % SETS_BYTES:
        return None
    reads = any(o.kind in ("out", "gate") for step in plan.problem.epilogue for o in step.operands)
    if plan.problem.operator.token_axis or plan.listed or reads or part.short or features_view(plan):
        return None
    rows = STAGE_BYTES // plan.problem.out_dtype.bytes
    if weight is None:
        return {"rows": FINISH_ROWS, "tokens": part.lanes}
    if plan.pattern.R * plan.problem.out_dtype.bytes > LINE_BYTES or weight.tokens < 2 or not _direct(part):
        return None
    return {"rows": rows // plan.pattern.R * plan.pattern.R, "tokens": weight.tokens}


def _direct(part: Part) -> bool:
    """Whether the weight tile's sums go from registers through the epilogue to Y."""
    k_lanes = part.weight.k_lanes if part.weight else part.plan.k_lanes
    return k_lanes == part.plan.panels == 1 and not needs_math(part.plan.problem)


def vectors_view(part: Part, linear: bool) -> dict[str, Any]:
    """What the tiles of vectors see alone."""
    plan, tokens, weight, p = part.plan, part.tokens, part.weight, part.plan.pattern
    direct = not linear and plan.panels == 1 and not plan.lowered
    padded_k, unit = p.block_cols * p.C, plan.weight.row_lanes if plan.weight else 1
    k_lanes = weight.k_lanes if weight else plan.k_lanes
    groups = [group(plan, q, unit) for q in range(len(plan.groups))]
    full = sum(1 for g in groups if (g["rows"], g["slots"]) == (groups[0]["rows"], groups[0]["slots"]))
    rows = code(plan) if plan.encoding == "code" and (tokens or not plan.tokens) else ()
    return {
        "matrix": None, "features": features_view(plan), "lowered": plan.lowered, "K_cells": p.K,
        "panel_starts": plan.packing.panel_starts if plan.panels > 1 and plan.problem.pattern.known else (),
        "k_panel": plan.k_panel, "K_padded_total": padded_k, "K_padded": padded_k != p.K,
        "block_values": plan.packing.block_values, "k_lanes": k_lanes, "bits": _bits(part),
        "weight": weight, "tokens": tokens, "single": part.single, "direct": direct,
        "groups": groups, "groups_full": full if full > 1 else 0,
        "groups_single": groups[full:] if full > 1 else groups,
        "ldx": plan.leading_dimension, "copy_x": plan.copies_x or bool(plan.problem.pit),
        "folds": folds(part.lanes, k_lanes),
        "weight_vectors": sum(g["slots"] for g in groups) // unit,
        "weight_window": plan.weight_window, "weight_rows": plan.shared_block_rows,
        "weight_slab": plan.summed_block_rows,
        "weight_direct": _direct(part),
        "M_padded": p.block_rows * p.R != p.M,
        "weight_token_counts": variants(weight.tokens, bool(rows)) if weight else (),
        "token_vector_counts": variants(tokens.vectors, bool(rows)) if tokens else (),
        "code": rows,
        "token_groups": token_groups(plan, groups, full) if tokens else (),
        "stage": _stage(part), "run_rows": FINISH_ROWS,
        "panel_forms": ("", "x") if tokens and not tokens.pack and direct else ("",),
        "finish_block_rows": plan.waiting_block_rows, "packs_split": plan.packs_split,
        "packs_whole": tokens is not None and plan.packs_whole,
    }  # fmt: skip
