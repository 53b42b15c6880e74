"""Verdict: is sparse worth it for this matrix, up to which density, and which block shape would be faster."""

import math
from typing import Literal

import msgspec

WORTH = 1.05  # gains below this are within the model's error and nobody's advice

Choice = Literal["sparse", "dense"]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Advice(_Record, frozen=True):
    """The same nonzeros stored in another block shape, and what the model expects of its best sparse plan."""

    blocksize: tuple[int, int]
    nnzb: int
    density: float  # covered: blocks that hold something / all blocks of that shape, exact
    fill: float  # stored elements / nonzeros
    seconds: float  # predicted, one call on one core, by plans that work on these very blocks
    speedup: float  # over the given block shape, predicted the same way
    given: bool = False  # this is the block shape that was given

    def __post_init__(self) -> None:
        if min(self.blocksize) < 1 or not (self.seconds > 0 and self.speedup > 0 and 0 <= self.density <= 1):
            raise ValueError("a block shape, a time or a density is out of range")

    @property
    def name(self) -> str:
        """RxC."""
        return f"{self.blocksize[0]}x{self.blocksize[1]}"

    def __str__(self) -> str:
        return (
            f"{self.name}: covered density {self.density:.3g}, fill {self.fill:.3g}, "
            f"predicted {short_time(self.seconds)}, {self.speedup:.2g}x"
        )


class Coming(_Record, frozen=True):
    """What it costs that the pattern comes with the call, predicted: a static kernel's time for as many blocks, evenly
    spread, by the best plan that knows them, and the time to prepare one new weight."""

    static_seconds: float
    prepare_seconds: float

    def __post_init__(self) -> None:
        if not (self.static_seconds > 0 and self.prepare_seconds > 0):
            raise ValueError("times are positive")


class Verdict(_Record, frozen=True):
    """Sparse or dense for one matrix and n tokens, on one core or one GPU.  str() is one sentence.

    Predicted are the times of the cost model, measured those of tune="measure"; None where no clock ran.  Sparse is the
    plan that runs, or the best other one where the dense plan runs.  Dense is predicted as the cheaper of a library's
    dense product and the backend's own dense plan, and measured as the latter.
    """

    n: int
    density: float  # of the given block shape
    ran: Choice  # which plan the kernel has
    seconds: float  # predicted, of the plan that runs
    measured_seconds: float | None
    sparse_seconds: float
    sparse_measured_seconds: float | None
    dense_seconds: float
    dense_measured_seconds: float | None
    break_even: float | None = None  # density at which both take as long: same shape, block shape, types and n
    alternatives: tuple[Advice, ...] = ()  # the best other block shapes of the same nonzeros, fastest first
    where: str = "one core"  # what the times are of
    dynamic: Coming | None = None  # of a kernel whose weight comes with the call; density: the planned maximum

    def __post_init__(self) -> None:
        times = (
            self.seconds, self.measured_seconds, self.sparse_seconds, self.sparse_measured_seconds,
            self.dense_seconds, self.dense_measured_seconds,
        )  # fmt: skip
        if any(t is not None and not (t > 0 and math.isfinite(t)) for t in times) or self.n < 1:
            raise ValueError("a verdict's times and tokens are positive")

    @property
    def choice(self) -> Choice:
        """Which is faster, by the clock where it ran for both."""
        return "sparse" if self.speedup >= 1 else "dense"

    @property
    def expected_speedup(self) -> float:
        """Predicted gain of the sparse plan over dense."""
        return self.dense_seconds / self.sparse_seconds

    @property
    def measured_speedup(self) -> float | None:
        """Gain of the sparse plan over the dense plan where the clock ran for both."""
        if self.sparse_measured_seconds is None or self.dense_measured_seconds is None:
            return None
        return self.dense_measured_seconds / self.sparse_measured_seconds

    @property
    def speedup(self) -> float:
        """Gain of sparse over dense by the best known times of either."""
        dense = self.dense_measured_seconds or self.dense_seconds
        return dense / (self.sparse_measured_seconds or self.sparse_seconds)

    @property
    def alternative(self) -> Advice | None:
        """The block shape that would be faster than what runs; None where none would be, by WORTH or more."""
        best = min(self.alternatives, key=lambda advice: advice.seconds, default=None)
        return best if best is not None and WORTH * best.seconds <= self.seconds else None

    @property
    def advice(self) -> str:
        """One clause: which block shape of the same nonzeros would be faster."""
        best = self.alternative
        if best is None:
            return "no other block shape of this mask would be faster (predicted)"
        new, old = f"{best.density:.2g}", f"{self.density:.2g}"
        return (
            f"as {best.name} (covered density {new}{'' if new == old else f' instead of {old}'}) "
            f"{self.seconds / best.seconds:.2g}x faster (predicted)"
        )

    def __str__(self) -> str:
        sparse = _known(self.sparse_seconds, self.sparse_measured_seconds)
        dense = _known(self.dense_seconds, self.dense_measured_seconds)
        if self.ran == "sparse":
            both = f"{sparse[0]} {sparse[1]} against {dense[1]} for dense ({dense[0]})"
        else:
            both = f"{dense[0]} {dense[1]} for dense, which runs, against {sparse[1]} for sparse ({sparse[0]})"
        text = f"{self.choice}: {both} at n = {self.n} on {self.where}, {self.speedup:.2g}x"
        if self.break_even is not None:
            text += f"; break-even near density {self.break_even:.2g}"
        if self.dynamic is not None:
            ratio = self.seconds / self.dynamic.static_seconds
            new = f"{short_time(self.dynamic.prepare_seconds)} to prepare a new weight (predicted)"
            return f"{text}; dynamic takes {ratio:.2f}x a static kernel's time, and {new}"
        return text if self.alternative is None else f"{text}; {self.advice}"


def _known(predicted_s: float, measured_s: float | None) -> tuple[str, str]:
    """Where the best known time comes from, and the time."""
    if measured_s is None:
        return "predicted", short_time(predicted_s)
    return "measured", short_time(measured_s)


def short_time(seconds: float) -> str:
    """Seconds for people."""
    return f"{seconds * 1e6:.3g} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"
