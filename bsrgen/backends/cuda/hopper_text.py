"""From a Hopper plan to text: everything that templates/cuda/wgmma*.j2 may see is computed here."""

from typing import Any

from bsrgen.backends.cuda.hopper import CHUNK, WARPGROUPS, HopperPlan
from bsrgen.backends.cuda.hopper_packing import SLOT, pack_tiles
from bsrgen.backends.cuda.text import entry_of, kernel_of, source_of, tables_in_c
from bsrgen.emit import Source, banner, render
from bsrgen.pattern import Weight


def emit(plans: tuple[HopperPlan, ...], weight: Weight) -> Source:
    """Sources and data of one artifact.  Pure: equal inputs, equal bytes."""
    (plan,) = plans
    source, cut = plan.packing.source, plan.cut
    values = pack_tiles(weight.data, source, cut)
    blobs = {"values": "unsigned char", "source": "int64_t"}
    entry = entry_of(plan.problem, plan.target, values.nbytes, blobs) | {
        "hopper": True, "tiles": source.shape[0], "parts": cut.parts, "segments": cut.segments, "width": cut.width,
    }  # fmt: skip
    data = {"source": source.tobytes(), "values": values.tobytes()}
    device = render("cuda/wgmma.cu.j2", k=_kernel(plan), banner=banner(plan.problem, (plan,)))
    return source_of(plan, device, entry, data, ("bsrgen_hopper.h", "bsrgen_mma.h"))


def _kernel(plan: HopperPlan) -> dict[str, Any]:
    """What the device's text sees."""
    t, cut = plan.packing, plan.cut
    return kernel_of(plan.problem) | {
        "staged": "float" if plan.late else "y_t", "late": plan.late, "gathered": plan.gathered,
        "slots": plan.slots, "warpgroups": WARPGROUPS,
        "mine": plan.slots // WARPGROUPS, "tiles": t.rows.size // (plan.slots * SLOT),
        "width": cut.width, "pieces": cut.pieces, "chunk": CHUNK,
        "widths": plan.widths, "parts": plan.parts, "stages": {width: plan.stages(width) for width in plan.widths},
        "whole": bool((t.masks == (1 << plan.slots) - 1).all()),
        "kernels": (*map(str, plan.widths), "other"),
        "tables": tables_in_c((
            ("tile_rows", t.rows, "row of Y of each row of each tile, -1 for none; the tile with most work first"),
            ("tile_steps", t.steps, "first step of each tile"),
            ("step_features", t.features, "first feature of each piece of each step, K for none"),
            ("step_masks", t.masks, "which slots have W for a step"),
            ("step_values", t.values, "first tile of W of each step"),
        )),
    }  # fmt: skip
