"""The grids of the GPU benchmark, in the order in which a short lease takes them: the most telling points first."""

from collections.abc import Iterator
from itertools import product

from benchmarks.grids import blocks
from benchmarks.points import Point

SQUARES = blocks("64x64 32x32 128x128 16x16")
NARROW = blocks("32x1 64x8 8x8 16x1 1x16 4x4 1x1")
DENSITIES = (0.2, 0.1, 0.5, 0.05, 0.3)


def _square(size: int, block: tuple[int, int], density: float, n: int, dtype: str = "bfloat16") -> Point:
    return Point("linear", (size, size), block, density, n, dtype=dtype)


def prefill() -> Iterator[Point]:
    """Many tokens: what dense products per nonzero reach, and the density where sparse breaks even."""
    for size, n, density, block in product((4096, 8192), (2048, 8192, 512, 128), DENSITIES, SQUARES):
        yield _square(size, block, density, n)


def decode() -> Iterator[Point]:
    """Few tokens: weights are read once, and reading them is the limit."""
    for size, n, density, block in product((16384, 8192), (1, 16, 4), (0.2, 0.5, 0.1), SQUARES[:2] + NARROW[:2]):
        yield _square(size, block, density, n)


def narrow() -> Iterator[Point]:
    """Blocks that do not fill a tile of the matrix units."""
    for n, density, block in product((2048, 1), (0.2, 0.1), NARROW):
        yield _square(4096, block, density, n)


def types() -> Iterator[Point]:
    """The other types."""
    for dtype, n, block in product(("float16", "float32", "int8"), (1024, 1), [*SQUARES[:2], NARROW[0]]):
        yield _square(4096, block, 0.2, n, dtype)


def spmm() -> Iterator[Point]:
    """Feature-major activations."""
    for n, block in product((2048, 64), [*SQUARES, *NARROW[:2]]):
        yield Point("spmm", (4096, 4096), block, 0.2, n, dtype="bfloat16")


def tiny() -> Iterator[Point]:
    """For a rehearsal: every kind of contender in seconds on a CPU."""
    for dtype, n, block in (("bfloat16", 40, (16, 16)), ("float32", 3, (8, 1))):
        yield Point("linear", (64, 96), block, 0.4, n, dtype=dtype)
    yield Point("spmm", (64, 64), (16, 16), 0.3, 20, dtype="float16")
    yield Point("linear", (64, 96), (64, 32), 0.5, 4, dtype="int8")


GRIDS = {row.__name__: row for row in (prefill, decode, narrow, types, spmm, tiny)}
DEFAULT = ("prefill", "decode", "narrow", "types", "spmm")


def points(names: tuple[str, ...]) -> list[tuple[str, Point]]:
    """The points of these grids with their grid's name, the grids in turn: a run that is cut short has some of each."""
    left = {name: GRIDS[name]() for name in names}
    found: dict[Point, str] = {}
    while left:
        for name, rest in list(left.items()):
            point = next(rest, None)
            if point is None:
                del left[name]
            else:
                found.setdefault(point, name)
    return [(name, point) for point, name in found.items()]
