"""The plan of a Hopper kernel: products of warpgroups (wgmma), fed by copies that run by themselves (sm_90a)."""

from dataclasses import asdict, dataclass
from functools import cached_property
from math import gcd
from typing import Any, ClassVar

from bsrgen.backends.cuda.hopper_count import counts, listing_of
from bsrgen.backends.cuda.hopper_packing import SLOT, Cut, HopperPacking, pack_hopper
from bsrgen.backends.cuda.hopper_schedule import BUCKETS, Listing
from bsrgen.backends.cuda.hopper_shape import Shape
from bsrgen.backends.cuda.hopper_tiles import Tiles, tiles_of
from bsrgen.backends.cuda.hopper_turn import MOST_TOKENS, Turning, band_of, turning_of
from bsrgen.backends.cuda.split import COUNTERS
from bsrgen.gpus import GpuTarget
from bsrgen.plan import Counts, Plan

HOPPER = "sm_90a"
SHARED_BYTES = 227 << 10  # of a thread block on sm_90, when it asks for it
WARPGROUPS = 2  # that multiply; one more brings W and X
PANEL = 128  # bytes of a row in shared memory: 64 features, or 128 of one byte
W_BYTES = PANEL * SLOT  # of a slot in a step
FEW_BYTES = 113 << 10  # and of a thread block that has one slot: an SM takes two
FEW_STRIDE = SLOT + 4  # sums from token to token of its sums
STREAM_WARPS = 8
STAGES = 8  # at most: deeper rings hide nothing more
DEEP = 12  # where a step is a few KiB, and what is on its way has to hide the memory's latency, not L2's
DEEP_TOKENS = 32  # up to which it is
SAID_BYTES = 16  # of shared memory, for what one thread says to all
CHUNK = 32  # tokens of a slot on their way from registers to Y
BUFFERS = 2  # of results of a warpgroup that the copy engine stores: one is read while the other is filled
LEAST_BYTES = 16  # of a box's rows
LEAST_ROWS = 8  # of a block; a slot has 64, and zeros where block rows do not fill it


@dataclass(frozen=True)
class HopperPlan(Plan):
    """Knobs of a Hopper kernel.  A thread block has `slots` times 64 rows of Y, half of them each of two warpgroups;
    `down` of them share what any of them needs of X: each fetches a part of it and sends it to all.  `turned`: another
    kernel writes X of `linear` feature by feature into scratch memory first, where narrow columns can be gathered."""

    backend: ClassVar[str] = "cuda"

    slots: int
    shapes: tuple[Shape, ...]
    down: int = 1
    turned: bool = False

    def __str__(self) -> str:
        rows, cut, last = self.slots * SLOT, self.cut, self.shapes[-1]
        text = f"CUDA, Hopper: {rows} rows x {last.width} tokens a thread block, {self.stages(last)} "
        text += f"stages of {cut.step} features, copied {cut.width} at a time"
        text += f"; {cut.block_rows} block rows share X" if cut.block_rows > 1 else ""
        text += "; X is turned first" if self.turned else ""
        if self.cluster(last) > 1:
            text += f"; clusters of {last.across} tiles of tokens x {self.down} of rows"
        return "; ".join((text, *(f"tiles of {shape} up to {shape.most} tokens" for shape in self.shapes[:-1])))

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
        shapes = [asdict(shape) for shape in self.shapes]
        return {"backend": self.backend, "hopper": True, "slots": self.slots, "down": self.down, "shapes": shapes,
                "turned": self.turned}  # fmt: skip

    def family(self, n: int) -> tuple[Any, ...]:
        """What plans share that do much the same at n tokens."""
        return "hopper", self.slots, self.down, self.turned

    def counts(self, n: int) -> Counts:
        """What one call of n tokens does on the whole GPU."""
        return counts(self, n, self.shape(min(n, self.band)))

    def shape(self, n: int) -> Shape:
        """The kernel of a call of n tokens."""
        return next((shape for shape in self.shapes if n <= shape.most), self.shapes[-1])

    def cluster(self, shape: Shape) -> int:
        """Thread blocks of a cluster."""
        return shape.parts if shape.few else shape.across * self.down

    @cached_property
    def cut(self) -> Cut:
        """Block rows as slots, columns as pieces."""
        p, step = self.problem.pattern, PANEL // self.problem.dtype.bytes
        segments, parts = max(SLOT // p.R, 1), -(-p.R // SLOT)
        width = gcd(p.C, step)
        return Cut(segments, parts, self.slots * self.down, p.C // width, width, step)

    @property
    def token_major(self) -> bool:
        """Whether X that the products read lies token by token."""
        return self.problem.operator.token_axis == 0 and not self.turned

    @property
    def rows_of_x(self) -> int:
        """Features that the products may read: of X, or of what is turned."""
        return self.turning.rows if self.turned else self.problem.pattern.K

    @cached_property
    def turning(self) -> Turning:
        """Which features of X are turned."""
        return turning_of(self.problem.pattern)

    @property
    def band(self) -> int:
        """Tokens of a launch: where X is turned, a call is cut into bands whose copy stays in L2."""
        if not self.turned:
            return MOST_TOKENS
        return band_of(self.turning.rows * self.problem.dtype.bytes, self.target.l2_bytes)

    @property
    def scratch_n(self) -> int:
        """Tokens of the largest call that turns nothing: those of kernels that read X where it lies, if all GPUs of the
        library have them."""
        assert isinstance(self.target, GpuTarget)
        return max((s.most for s in self.shapes if s.streams), default=0) if self.target.archs == (HOPPER,) else 0

    @property
    def gathered(self) -> bool:
        """Whether X of many tokens comes in copies of 16 bytes, because boxes of so few features would be too many."""
        return self.cut.width * self.problem.dtype.bytes < LEAST_BYTES

    def stage_bytes(self, shape: Shape) -> int:
        """W and X of one step."""
        return (1 if shape.few else self.slots) * W_BYTES + shape.width * PANEL

    def stages(self, shape: Shape) -> int:
        """Steps that are on their way or being multiplied at a time; of what streams none."""
        if shape.streams:
            return 0
        room = (FEW_BYTES if shape.few else SHARED_BYTES) - 1024 - SAID_BYTES - self.staging_bytes(shape)
        most = DEEP if shape.width <= DEEP_TOKENS else STAGES
        return min(most, room // (self.stage_bytes(shape) + 16))  # from a multiple of 1024; two barriers each

    def lead(self, shape: Shape) -> int:
        """Steps that one warpgroup is ahead of the other, so that each stores its results beside products: half of the
        stages that are not being multiplied; the other half is on its way."""
        return self.stages(shape) // 2 - 1

    def staging_bytes(self, shape: Shape) -> int:
        """Results on their way to Y: a chunk of tokens of a slot for each warpgroup, or sums of all of few tokens."""
        if shape.few:
            return shape.width * FEW_STRIDE * 4 * (1 + STREAM_WARPS * shape.streams)
        chunk, unit = min(shape.width, CHUNK), 4 if self.finishes_late else self.problem.out_dtype.bytes
        boxed = BUFFERS * WARPGROUPS * SLOT * min(shape.width, self.box_tokens) * self.problem.out_dtype.bytes
        boxed = boxed if self.boxed(shape) else 0
        if self.problem.operator.token_axis == 0:
            return max(WARPGROUPS * chunk * (SLOT + 16 // unit) * unit, boxed)
        return max(WARPGROUPS * SLOT * (chunk + 8) * unit, boxed)

    def sums_bytes(self, shape: Shape) -> int:
        """Of a thread block's tile."""
        return self.slots * SLOT * shape.width * self.problem.accumulator.bytes

    @property
    def late(self) -> bool:
        """Whether the epilogue reads arrays shaped like Y: then it runs where rows of Y lie side by side."""
        return any(o.kind in ("element", "out") for step in self.problem.epilogue for o in step.operands)

    @property
    def finishes_late(self) -> bool:
        """Whether threads that store Y themselves run the epilogue then: also where they do so only if the copy engine
        cannot, because in registers it is as many copies of its text as a thread has sums, and nvcc takes a minute."""
        return self.late or bool(self.box_rows)

    @property
    def box_rows(self) -> int:
        """Rows of W whose results the copy engine stores together; 0 where it stores none, because the epilogue is late
        or too few rows of Y lie side by side."""
        R, unit = self.problem.pattern.R, self.problem.out_dtype.bytes
        if self.late:
            return 0
        if self.problem.operator.token_axis == 0:
            rows = min(gcd(R, SLOT), PANEL // unit)
            return rows if rows * unit >= LEAST_BYTES else 0
        rows = R if R <= SLOT else gcd(R, SLOT)
        return rows if rows >= LEAST_ROWS and unit > 1 else 0

    @property
    def box_tokens(self) -> int:
        """And tokens, at most: those of 128 bytes."""
        return PANEL // max(self.problem.out_dtype.bytes, 2)

    def boxed(self, shape: Shape) -> bool:
        """Whether that kernel has its results stored by the copy engine, where it can write to Y."""
        return bool(self.box_rows) and not shape.few and shape.width % 16 == 0

    @cached_property
    def packing(self) -> HopperPacking:
        """The tables."""
        return pack_hopper(self.problem.pattern, self.cut)

    @cached_property
    def tiles(self) -> Tiles:
        """What they hold."""
        return tiles_of(self)

    @cached_property
    def lists(self) -> tuple[tuple[Shape, int, Listing], ...]:
        """For calls of as many tokens as one of BUCKETS: kernel, groups of tokens, who has which tiles, where dealing
        them out by turns is slower."""
        rows = ((n, self.shape(n)) for n in BUCKETS if n <= self.band)
        found = ((shape, shape.groups(n), listing_of(self, shape, n)) for n, shape in rows)
        return tuple((shape, groups, listing) for shape, groups, listing in found if listing)

    @property
    def sms(self) -> int:
        """Thread blocks that the workspace has room for."""
        assert isinstance(self.target, GpuTarget)
        return self.target.sms

    @property
    def workspace_bytes(self) -> int:
        """Counters, and two sets of sums of each thread block: of the tiles that its piece begins and ends in."""
        return max((4 * COUNTERS + 2 * self.sms * self.sums_bytes(s) for s in self.shapes if s.equal), default=0)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a thread block, of the kernel that takes most."""
        return max(self.dynamic_bytes(shape) for shape in self.shapes)

    def dynamic_bytes(self, shape: Shape) -> int:
        """And of each."""
        return (
            self.staging_bytes(shape)
            if shape.streams
            else 1024 + SAID_BYTES + self.stages(shape) * (self.stage_bytes(shape) + 16) + self.staging_bytes(shape)
        )
