"""The products: one row for each way to multiply and add, and where it works."""

from dataclasses import dataclass
from typing import Any

from bsrgen.dtypes import BFLOAT16, INT8, DType
from bsrgen.problem import Problem
from bsrgen.targets import Target


@dataclass(frozen=True, slots=True)
class Product:
    """One instruction's work in a lane.  `group` neighbouring k lie in one unit of W and of X (a word of 32 bits); of
    group 1, units are elements, widened to the type of the sums when they are read."""

    name: str  # DOT in runtime/bsrgen_product.h
    group: int = 1
    dtype: DType | None = None  # of W and X; None: any
    part: str = ""  # C type of an element inside a word
    part_bytes: int = 0
    corrections: bool = False  # X is multiplied as X + 128: the rows' sums of W take that back
    features: tuple[str, ...] = ()  # of the CPU, one of which is enough; none: every x86
    intrinsic: str = ""  # on tiles of the matrix unit; "": of vectors
    vectors: bool = True  # whether all tiles of vectors multiply it; False: the strips of mode="pit" alone

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> Any:
        return _row, (self.name,)  # rows are told apart by identity, in another process too

    @property
    def tiles(self) -> bool:
        """Whether the matrix unit multiplies."""
        return self.intrinsic != ""

    def per_cycle(self, target: Target) -> float:
        """Instructions of this kind a cycle, whole vectors."""
        if self is BF16:
            return target.bf16_dot_per_cycle
        return target.int8_dot_per_cycle if self in (U8, X8) else target.fma_per_cycle

    def latency(self, target: Target) -> float:
        """Cycles from one to the next on the same sums."""
        return target.fma_latency if self.group == 1 else target.dot_latency


FMA = Product("fma")
BF16 = Product("bf16", 2, BFLOAT16, "uint16_t", 2, features=("avx512bf16",))  # vdpbf16ps
S16 = Product("s16", 2, INT8, "int16_t", 2)  # vpmaddwd, elements widened to 16 bits
U8 = Product("u8", 4, INT8, "int8_t", 1, corrections=True, features=("avx512vnni", "avxvnni"))  # vpdpbusd
AMX_BF16 = Product("amx_bf16", 2, BFLOAT16, "uint16_t", 2, False, ("amx-bf16",), "_tile_dpbf16ps")
AMX_S8 = Product("amx_s8", 4, INT8, "int8_t", 1, False, ("amx-int8",), "_tile_dpbssd")  # both signed: exact as they are
S8 = Product("s8", 4, INT8, "int8_t", 1, False, AMX_S8.features, vectors=False)  # its words in vectors, to be found
X8 = Product("x8", 4, INT8, "int8_t", 1, False, U8.features, vectors=False)  # W + 128 by X: what it adds X alone tells

PRODUCTS = (FMA, BF16, S16, U8, AMX_BF16, AMX_S8, S8, X8)


def _row(name: str) -> Product:
    return next(row for row in PRODUCTS if row.name == name)


def products(problem: Problem, target: Target) -> list[Product]:
    """Those of vectors that work for a problem on a target, the one of the most FLOP an instruction first."""
    return [row for row in _working(problem, target) if not row.tiles and row.vectors][::-1]


def strip_products(problem: Problem, target: Target) -> list[Product]:
    """The same of strips, which leave out words of X: what is left out must add nothing."""
    rows = _working(problem, target)
    return [row for row in rows if not (row.tiles or row.corrections or row is S8)][::-1]


def matrix_product(problem: Problem, target: Target) -> Product | None:
    """The matrix unit's, where it works."""
    return next((row for row in _working(problem, target) if row.tiles), None)


def _working(problem: Problem, target: Target) -> list[Product]:
    found = [FMA]
    for row in PRODUCTS[1:]:
        alike = problem.dtype is problem.read_dtype is row.dtype
        if alike and target.family == "x86_64" and (not row.features or any(map(target.has, row.features))):
            found.append(row)
    return found
