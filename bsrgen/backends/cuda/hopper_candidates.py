"""Which Hopper plans may be tried, and which kernels a library has for calls of how many tokens."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from bsrgen.backends.cuda.hopper import HOPPER, LEAST_ROWS, WARPGROUPS, HopperPlan
from bsrgen.backends.cuda.hopper_count import SECTOR, clusters_of, counts
from bsrgen.backends.cuda.hopper_packing import SLOT
from bsrgen.backends.cuda.hopper_schedule import BAND, BUCKETS
from bsrgen.backends.cuda.hopper_shape import STREAM_TOKENS, Shape
from bsrgen.backends.cuda.split import COUNTERS
from bsrgen.dtypes import FLOAT8
from bsrgen.gpus import GpuTarget
from bsrgen.problem import Problem
from bsrgen.targets import Target
from bsrgen.workspaces import WORKSPACE_BYTES

MANY_TILES = 8  # of a cluster: dealt out they end within some percent of each other
SUMS = 64  # of a thread, at most, where parts meet: two sets are in registers; half where four warps gather (spills)
CLUSTER = 8  # thread blocks at most, on every Hopper
TYPES = {"float16": 2, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1}  # of W and X: operators; no unit turns bytes
NEARLY = 1.07  # times the fastest is as fast: another kernel takes a second to compile


def candidates(problem: Problem, target: Target) -> Iterator[HopperPlan]:
    """Plans for types of TYPES where the newest GPU is a Hopper and all others can run the second kernel.

    X comes by copies of boxes: 16 bytes of a token at least, or any number of features of many tokens, which `linear`
    has where X is turned.
    """
    p = problem.pattern
    assert isinstance(target, GpuTarget)
    axis = problem.operator.token_axis
    alike = problem.dtype is problem.x_dtype and axis < TYPES.get(problem.dtype.name, 0)
    if not alike or target.archs[-1] != HOPPER or "sm_75" in target.archs or p.R < LEAST_ROWS or not p.nnzb:
        return
    if problem.out_dtype.bytes > 4 or problem.gate_rows or (problem.dtype is FLOAT8 and len(target.archs) > 1):
        return
    for slots, width in ((2, 256), (4, 128)):
        for down in (1, 2):
            for turned in (False, True) if axis == 0 else (False,):
                plan = HopperPlan(problem, target, slots, (Shape(width),), down, turned)
                if _possible(plan):
                    yield replace(plan, shapes=in_buckets(plan, _shapes(plan, width)))


def _possible(plan: HopperPlan) -> bool:
    """Boxes of tokens have 16 bytes of each; X is turned where L2 would send more than it is asked for, and the units
    take it so.  Who gathers sends nothing to others."""
    piece_bytes = plan.cut.width * plan.problem.dtype.bytes
    if plan.turned and (TYPES[plan.problem.dtype.name] < 2 or piece_bytes >= SECTOR):
        return False
    if plan.gathered:
        return plan.down == 1 and not plan.token_major
    return True


def _shapes(plan: HopperPlan, width: int) -> Iterator[Shape]:
    """Kernels that a library may have."""
    for few in (1, STREAM_TOKENS):
        for parts in (1, 2, 4, 8):
            yield Shape(few, 0, parts)
    for few in (16, 64, 128) if plan.token_major else (64, 128):
        for parts in (1, 2, 4, 8):
            yield Shape(few, 0, parts)
    for tokens in (width // 2, width):
        for across in (1, 2, 4, 8) if not plan.gathered else (1,):
            if across * plan.down <= CLUSTER and _boxes_fit(plan, tokens):
                yield Shape(tokens, 0, 0, across)
    if plan.turned:
        return  # sums that meet would need the workspace beside scratch memory
    for tokens in (8, 16, 32, 64, 128):
        for across in (1, 2, 4) if tokens >= 64 and not plan.gathered else (1,):
            shape = Shape(tokens, 0, 0, across, equal=True)
            fits = 4 * COUNTERS + 2 * plan.sms * plan.sums_bytes(shape) <= WORKSPACE_BYTES
            if fits and _boxes_fit(plan, tokens) and plan.slots // WARPGROUPS * tokens // 2 <= SUMS >> plan.gathered:
                yield shape


def _boxes_fit(plan: HopperPlan, tokens: int) -> bool:
    """Whether X of so many tokens is whole boxes for each of those who share it."""
    return tokens % ((8 if plan.token_major else SLOT) * plan.down) == 0


def _worth_cutting(plan: HopperPlan, shape: Shape, n: int) -> bool:
    """Whether tiles are so few that thread blocks with whole ones would wait for each other."""
    return plan.tiles.steps.size * shape.groups(n) <= MANY_TILES * clusters_of(plan, shape)


def in_buckets(plan: HopperPlan, shapes: Iterable[Shape]) -> tuple[Shape, ...]:
    """Fast ones of `shapes` for the calls of each of BUCKETS, by the model, the last one for all others; one that is
    there already where it is hardly slower."""
    shapes, launch = tuple(shapes), plan.target.call_s * plan.target.ghz * 1e9
    used: list[Shape] = []
    chosen: list[Shape] = []
    for n in reversed([n for n in BUCKETS if n <= plan.band]):
        x_bytes = n * plan.rows_of_x * plan.problem.x_dtype.bytes
        near = chosen and x_bytes <= BAND * plan.target.l2_bytes
        able = [s for s in shapes if not (s.few or s.equal) or (near and (s.few or _worth_cutting(plan, s, n)))]
        cycles = {shape: launch + counts(plan, n, shape).cycles for shape in able}
        most = NEARLY * min(cycles.values())
        shape = min((shape for shape in used if cycles[shape] <= most), key=cycles.__getitem__, default=None)
        shape = shape or min(able, key=cycles.__getitem__)
        used += [shape] * (shape not in used)
        if chosen and replace(chosen[-1], most=0) == shape:
            continue
        chosen.append(replace(shape, most=n if chosen else 0))
    return tuple(reversed(chosen))
