"""A pattern that comes with the call: where its tables and values lie in a prepared weight, for a planned maximum.

Every table has room for any pattern of so many blocks, so that it begins at a constant distance from the packed values:
the micro-kernels, which get those, find the others without an argument more.
"""

import hashlib
from typing import Any

from bsrgen.backends.c.levels import offset_type
from bsrgen.backends.c.plan import CPlan
from bsrgen.backends.c.tiling import group

HEAD_BYTES = 64  # struct bsrgen_prepared, runtime/bsrgen_prepare.h
LINE = 64
BYTES_PER_PART = 1 << 17  # that a thread prepares at least: 10 to 20 us (Zen 5)


def places(plan: CPlan) -> dict[str, int]:
    """The byte at which each table of a prepared weight begins; the packed values are the last."""
    p, packing, panels = plan.problem.pattern, plan.packing, plan.panels
    segments, units = plan.most_segments, plan.most_units
    sizes = {
        "head": HEAD_BYTES,
        "starts": 4 * (p.block_rows + 1),
        "work": 8 * (work_rows(plan) + 1),
        "pointers": 4 * (segments + 1),
        "runs": 8 * segments,
        "rows": 4 * segments if panels > 1 else 0,
        "panels": 4 * (panels + 1) if panels > 1 else 0,
        "offsets": packing.offset_bytes * units * (plan.product.group if plan.gather else 1),
        "bits": segments * bit_bytes(plan),
        "order": 4 * p.nnzb,
        "corrections": 4 * plan.corrections,
        "values": 0,
    }
    at, found = 0, {}
    for name, size in sizes.items():
        found[name] = at
        at += -(-size // LINE) * LINE
    return found


def ahead(plan: CPlan) -> dict[str, int]:
    """How many bytes before the packed values each table begins."""
    found = places(plan)
    return {name: found["values"] - at for name, at in found.items()}


def work_rows(plan: CPlan) -> int:
    """Block rows of the result, which threads share."""
    return plan.pattern.block_rows - plan.problem.gate_rows // plan.pattern.R


def bit_bytes(plan: CPlan) -> int:
    """Bytes of the bits of one segment."""
    return plan.bits.vectors(plan.k_panel) * plan.bits.count // 8 if plan.bits else 0


def magic(plan: CPlan) -> int:
    """What a prepared weight of this plan begins with."""
    text = f"{plan.problem.name} {plan} {plan.knobs()} {places(plan)}"
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)


def level_of(plan: CPlan) -> dict[str, Any]:
    """One ISA level as the entry points see it: no data, but where a prepared weight keeps its own."""
    name, target, at = plan.problem.name, plan.target, places(plan)
    return {
        "name": f"{name}_{target.name.replace('-', '_')}", "target": target.name, "family": target.family,
        "requires": target.requires, "tables": "", "block_rows": work_rows(plan), "tiles": False,
        "few": plan.few_n, "by_rows": int(not plan.tokens),
        "magic": magic(plan), "work_at": at["work"], "values_at": at["corrections"],
    }  # fmt: skip


def prepare_view(plan: CPlan, name: str) -> dict[str, Any]:
    """`d` of prepare.c.j2."""
    p, unit, bits = plan.pattern, plan.product, plan.bits
    groups = [group(plan, q, 1) for q in range(len(plan.groups))]
    full = sum(1 for g in groups if (g["rows"], g["slots"]) == (groups[0]["rows"], groups[0]["slots"]))
    return {
        "name": name, "element": plan.problem.dtype.c, "part": unit.part or plan.problem.dtype.c,
        "offset": offset_type(plan), "block_rows": p.block_rows, "block_cols": p.block_cols, "R": p.R, "C": p.C,
        "group": unit.group, "step": plan.k_lanes, "panels": plan.panels, "k_panel": plan.k_panel,
        "block_values": plan.packing.block_values, "gather": plan.gather, "most": p.nnzb, "zeros": p.K,
        "segments": plan.most_segments, "magic": magic(plan), "gate": plan.problem.gate_rows // p.R,
        "places": places(plan), "corrections": plan.corrections,
        "bits": bits and {"bytes": bit_bytes(plan), "cells": bits.cells},
        "groups": groups, "groups_full": full if full > 1 else 0,
        "groups_single": groups[full:] if full > 1 else groups,
    }  # fmt: skip
