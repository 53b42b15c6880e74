"""The plan of a Hopper kernel: products of warpgroups (wgmma), fed by copies that run by themselves (sm_90a)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any, ClassVar

from bsrgen.backends.cuda.hopper_count import counts
from bsrgen.backends.cuda.hopper_packing import SLOT, Cut, HopperPacking, pack_hopper
from bsrgen.gpus import GpuTarget
from bsrgen.plan import Counts, Plan
from bsrgen.problem import Problem
from bsrgen.targets import Target

HOPPER = "sm_90a"
SHARED_BYTES = 227 << 10  # of a thread block on sm_90, when it asks for it
WARPGROUPS = 2  # that multiply; one more brings W and X
PANEL = 128  # bytes of a row in shared memory
W_BYTES = 2 * SLOT * SLOT  # of a slot in a step
FEW_BYTES = 113 << 10  # and of one for few tokens: an SM takes two
FEW_STRIDE = SLOT + 4  # floats from token to token of its sums
STAGES = 8  # at most: deeper rings hide nothing more
CHUNK = 32  # tokens of a slot on their way from registers to Y
CLUSTER = 8  # thread blocks at most, on every Hopper
LEAST_BOX = 8  # features
LEAST_ROWS = 8  # of a block; a slot has 64, and zeros where block rows do not fill it


@dataclass(frozen=True)
class HopperPlan(Plan):
    """Knobs of a Hopper kernel.  A thread block has `slots` times 64 rows of Y, half of them each of two warpgroups,
    and as many tokens as the last of `widths`.  Calls that another of them holds have clusters of thread blocks that
    share 64 rows, a part of the steps each."""

    backend: ClassVar[str] = "cuda"

    slots: int
    widths: tuple[int, ...]

    def __str__(self) -> str:
        rows, cut = self.slots * SLOT, self.cut
        text = f"CUDA, Hopper: {rows} rows x {self.widths[-1]} tokens a thread block, {self.stages(self.widths[-1])} "
        text += f"stages of 64 features, copied {cut.width} at a time"
        shared = f"; {cut.block_rows} block rows share X" if cut.block_rows > 1 else ""
        few = ", ".join(map(str, self.widths[:-1]))
        return f"{text}{shared}; tiles of {few} where there are no more tokens" if few else text + shared

    @property
    def matrix(self) -> bool:
        """Whether the products are those of matrix units."""
        return True

    @property
    def dense(self) -> bool:
        """Whether the whole matrix is multiplied, zeros included: no plan of this backend does."""
        return False

    @property
    def zero_filled(self) -> bool:
        """Whether zeros of W are multiplied by X of other block rows: of one slot, or of a step of several pieces."""
        return self.cut.segments > 1 or (self.cut.block_rows > 1 and self.cut.pieces > 1)

    def knobs(self) -> dict[str, Any]:
        """The decisions alone, as plain data."""
        return {"backend": self.backend, "hopper": True, "slots": self.slots, "widths": list(self.widths)}

    def family(self, n: int) -> tuple[Any, ...]:
        """What plans share that do much the same at n tokens."""
        return "hopper", self.slots

    def counts(self, n: int) -> Counts:
        """What one call of n tokens does on the whole GPU."""
        return counts(self, n)

    def width(self, n: int) -> int:
        """Tokens of a thread block in a call of n."""
        return next((width for width in self.widths if n <= width), self.widths[-1])

    @property
    def cut(self) -> Cut:
        """Block rows as slots, columns as pieces."""
        p = self.problem.pattern
        segments, parts = max(SLOT // p.R, 1), -(-p.R // SLOT)
        width = gcd(p.C, SLOT)
        return Cut(segments, parts, self.slots, p.C // width, width)

    @property
    def gathered(self) -> bool:
        """Whether X of many tokens comes in copies of 16 bytes, because boxes of so few features would be too many."""
        return self.cut.width < LEAST_BOX

    def few(self, width: int) -> bool:
        """Whether that is the kernel of calls with no more tokens."""
        return width != self.widths[-1]

    @property
    def parts(self) -> int:
        """Thread blocks of a cluster, which share 64 rows of few tokens: two on each SM, where there can be."""
        assert isinstance(self.target, GpuTarget)
        p, cut = self.problem.pattern, self.cut
        slots = -(-p.block_rows // cut.segments) * cut.parts
        return next((parts for parts in (1, 2, 4) if parts * slots >= 2 * self.target.sms), CLUSTER)

    def stage_bytes(self, width: int) -> int:
        """W and X of one step."""
        return (1 if self.few(width) else self.slots) * W_BYTES + width * PANEL

    def stages(self, width: int) -> int:
        """Steps that are on their way or being multiplied at a time."""
        room = (FEW_BYTES if self.few(width) else SHARED_BYTES) - 1024 - self.staging_bytes(width)
        return min(STAGES, room // (self.stage_bytes(width) + 16))  # from a multiple of 1024; two barriers each

    def staging_bytes(self, width: int) -> int:
        """Results on their way to Y: a chunk of tokens of a slot for each warpgroup, or sums of all of few tokens."""
        if self.few(width):
            return width * FEW_STRIDE * 4
        chunk, unit = min(width, CHUNK), 4 if self.late else self.problem.out_dtype.bytes
        if self.problem.operator.token_axis == 0:
            return WARPGROUPS * chunk * (SLOT + 16 // unit) * unit
        return WARPGROUPS * SLOT * (chunk + 8) * unit

    @property
    def late(self) -> bool:
        """Whether the epilogue reads arrays shaped like Y: then it runs where rows of Y lie side by side."""
        return any(o.kind in ("element", "out") for step in self.problem.epilogue for o in step.operands)

    @cached_property
    def packing(self) -> HopperPacking:
        """The tables."""
        return pack_hopper(self.problem.pattern, self.cut)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a thread block, of the widest kernel."""
        return max(self.dynamic_bytes(width) for width in self.widths)

    def dynamic_bytes(self, width: int) -> int:
        """And of each."""
        return 1024 + self.stages(width) * (self.stage_bytes(width) + 16) + self.staging_bytes(width)


def candidates(problem: Problem, target: Target) -> Iterator[HopperPlan]:
    """Plans for float16 and bfloat16 where the newest GPU is a Hopper and all others can run the second kernel.

    X comes by copies of boxes: eight features of a token at least, or any number of features of many tokens.
    """
    p = problem.pattern
    assert isinstance(target, GpuTarget)
    alike = problem.dtype is problem.x_dtype and problem.dtype.name in ("float16", "bfloat16")
    if not alike or target.archs[-1] != HOPPER or "sm_75" in target.archs or p.R < LEAST_ROWS or not p.nnzb:
        return
    if problem.out_dtype.bytes not in (2, 4) or problem.gate_rows:
        return
    tokens_first = problem.operator.token_axis == 0
    if tokens_first and p.C % 8:
        return
    for slots, most in ((2, 256), (4, 128), (2, 128)):
        few = (16, 64) if tokens_first else (64,)
        yield HopperPlan(problem, target, slots, (*(w for w in few if w < most), most))
