"""The grids: one row each, with where it comes from.  Points are made lazily, matrices only when a point is timed.

Densities are those of stored blocks.  `linear` is nn.Linear's product on N tokens, `spmm` what HPC and GPU papers time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from benchmarks.matrices import EXPRESSIONS, operator_matrix, simplices
from benchmarks.points import Point
from bsrgen.bench.peers import SHAPES
from bsrgen.operators import OPERATORS

Pair = tuple[int, int]


def blocks(names: str) -> list[Pair]:
    """Block shapes out of their names."""
    return [(int(R), int(C)) for R, C in (name.split("x") for name in names.split())]


ALL = blocks(SHAPES)
TALL = [block for block in ALL if block[0] >= 16]


@dataclass(frozen=True, slots=True)
class Grid:
    """`points()` in the order of the table; `over` is what its plot is drawn over: density, block, n or nnz."""

    name: str
    title: str
    source: str
    over: str
    points: Callable[[], Iterator[Point]]
    mlir: bool = False  # whether the MLIR backend and MLIR's own sparsifier are contenders
    dynamic: bool = False  # whether the dynamic kernel and its preparation are, and no sparse library

    def thinned(self, every: int = 1) -> Iterator[Point]:
        """Every `every`-th point, spread over the whole grid: those that a shuffle with a fixed seed puts first."""
        points = list(self.points())
        order = np.random.default_rng(0).permutation(len(points))
        return (points[i] for i in sorted(order[: -(-len(points) // every)]))


def _crossed(
    operators: Sequence[str], shapes: Sequence[Pair], blocks: Sequence[Pair], densities: Sequence[float],
    ns: Sequence[int], **rest: str | int,
) -> Iterator[Point]:  # fmt: skip
    for operator, shape, density, n, block in product(operators, shapes, densities, ns, blocks):
        yield Point(operator, shape, block, density, n, **rest)  # type: ignore[arg-type]


BOTH = tuple(OPERATORS)
BERT = [(768, 768), (3072, 768), (768, 3072)]
SPARSELIB = [(256, 256), (256, 1024), (1024, 256), (1024, 1024), (1024, 4096), (4096, 1024), *BERT]
MOBILENET = {  # MobileNetV2's 1x1 convolutions as products: (outputs, inputs) and pixels
    (96, 16): 12544, (24, 96): 3136, (144, 24): 3136, (32, 192): 784, (192, 32): 784, (384, 64): 196, (64, 384): 196,
    (576, 96): 196, (96, 576): 196, (960, 160): 49, (160, 960): 49, (320, 960): 49, (1280, 320): 49,
}  # fmt: skip
RESNET = {(64, 576): 31360, (128, 1152): 7840, (256, 2304): 1960, (512, 4608): 490}  # 3x3 as im2col, batch 10


def _bert() -> Iterator[Point]:
    tiles = blocks("8x1 16x1 32x1 1x1 4x4 16x16 32x32 64x64")
    return _crossed(["linear"], BERT, tiles, (0.2, 0.15, 0.1, 0.05), (1, 16, 128, 512, 2048))


def _popsparse() -> Iterator[Point]:
    squares = [(size, size) for size in (1024, 2048, 4096)]
    densities = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    return _crossed(["spmm"], squares, blocks("1x1 4x4 8x8 16x16"), densities, (64, 256, 1024))


def _dynamic() -> Iterator[Point]:
    densities, squares = [1 / 4, 1 / 8, 1 / 16, 1 / 32], [(size, size) for size in (1024, 2048, 4096)]
    yield from _crossed(["linear"], squares, blocks("1x1 4x4 8x8 16x16"), densities, [128])
    few, ends = [(1024, 1024), (4096, 4096)], [densities[0], densities[-1]]
    for dtype in ("bfloat16", "int8"):
        yield from _crossed(["linear"], few, blocks("1x1 4x4 8x8 16x16"), ends, [128], dtype=dtype)
    yield from _crossed(["spmm"], few[:1], blocks("1x1 4x4 8x8 16x16 32x1 1x16"), ends, [128])
    yield from _crossed(["linear"], few[:1], blocks("32x1 1x16 3x5"), ends, [128])
    yield from _crossed(["linear"], few[:1], blocks("1x1 4x4 16x16 32x1"), ends, [1, 8])


def _wavernn() -> Iterator[Point]:
    for H in (512, 768, 1024):
        yield from _crossed(["linear"], [(3 * H, H)], [(16, 1)], (0.02, 0.03, 0.04, 0.05, 0.06), [1])
        yield from _crossed(["linear"], [(H, H)], [(16, 1)], (0.04, 0.06), [1])  # fc1
        yield from _crossed(["linear"], [(256, H)], [(16, 1)], (0.1, 0.2, 0.4), [1])  # fc2
    yield Point("linear", (1152, 384), (16, 1), 0.1, 1)  # LPCNet's GRU A


def _sparselib() -> Iterator[Point]:
    return _crossed(["linear"], SPARSELIB, [(16, 1)], (0.3, 0.25, 0.2, 0.15, 0.1), (16, 32, 64, 128))


def _pyfr() -> Iterator[Point]:
    orders = {"quad": range(1, 7), "hex": range(1, 7)}
    orders |= {"tri": range(1, 5), "tet": range(1, 5)} if simplices() else {}
    elements = [f"{element}{order}" for element, all_orders in orders.items() for order in all_orders]
    for element, operator in product(elements, EXPRESSIONS):
        name = f"{element} {operator}"
        matrix = operator_matrix(name)
        density = float(np.count_nonzero(matrix) / matrix.size)
        M, K = matrix.shape
        for n, dtype in product((48, 1024), ("float64", "float32")):
            yield Point("spmm", (M, K), (1, 1), density, n, name, dtype)


def _tvm() -> Iterator[Point]:
    yield Point("linear", (512, 256), (16, 1), 0.6, 128)  # tune_sparse_x86.py
    yield from _crossed(["spmm"], [(512, 512)], [(1, 1)], (0.5, 0.2), [512])  # PR 1289
    for shape, pixels in MOBILENET.items():  # PR 8065
        yield from _crossed(["spmm"], [shape], [(4, 1)], (0.6, 0.4, 0.2, 0.1), [pixels])
    for shape, pixels in RESNET.items():  # PR 8605
        yield from _crossed(["spmm"], [shape], [(16, 1)], (0.4, 0.3, 0.2, 0.1), [pixels])
    square = blocks("8x8 16x16 32x32")
    yield from _crossed(["linear"], [(128, 768), (1024, 1024)], square, (0.2, 0.15, 0.05), (1, 8))  # arXiv 2007.13055
    yield from _crossed(["linear"], [(3072, 1024)], blocks("1x16 4x4 16x1 32x1"), [0.05], [1])  # sdense_test.py


def _shapes() -> Iterator[Point]:
    return _crossed(BOTH, [(768, 768)], ALL, (0.2, 0.1, 0.5, 0.05, 0.02), [128])


def _smalln() -> Iterator[Point]:
    for block in TALL:
        yield from _crossed(["linear"], [(768, 768)], [block], [0.2], (1, 2, 4, 8, 16, 32))


def _narrow() -> Iterator[Point]:
    for block in blocks("1x1 2x2 4x4"):
        yield from _crossed(["linear"], [(768, 768)], [block], (0.05, 0.1), (1, 4, 16, 128))


def _sentence() -> Iterator[Point]:
    for dtype in ("float32", "bfloat16", "int8"):
        minilm = [(384, 384), (1536, 384), (384, 1536)]
        yield from _crossed(["linear"], [*minilm, *BERT], [(32, 1)], [0.2], [128], dtype=dtype)


def _big() -> Iterator[Point]:
    return _crossed(BOTH, [(4096, 4096)], ALL, (0.2, 0.1), [512])


def _patterns() -> Iterator[Point]:
    tiles = blocks("1x1 4x4 16x1 32x1 16x16")
    for shape, block, density in product([(768, 768), (3072, 768)], tiles, (0.2, 0.1)):
        for kind in ("uniform", "powerlaw", "banded"):
            yield from _crossed(BOTH, [shape], [block], [density], [128], kind=kind)


def _threads() -> Iterator[Point]:
    for block, threads in product(blocks("1x1 4x4 16x1 32x1 16x16"), (1, 2)):
        yield from _crossed(["linear"], [(768, 768), (3072, 768)], [block], [0.2], (1, 128), threads=threads)


def _dense() -> Iterator[Point]:
    tiles = blocks("1x1 4x4 16x1 32x1 16x16")
    for block in tiles:
        yield from _crossed(["linear"], [(768, 768)], [block], [tenth / 10 for tenth in range(1, 11)], [128])


def _mlir() -> Iterator[Point]:
    tiles = blocks("64x64 48x48 32x32 16x16 8x8 4x4 2x2 3x5 32x1 16x1 8x1 4x1 1x1 1x4 1x16 1x32")
    return _crossed(BOTH, [(768, 768)], tiles, [0.2], [128])


def _reduced() -> Iterator[Point]:
    tiles = blocks("64x64 32x32 16x16 8x8 4x4 64x1 32x1 16x1 4x1 1x1 1x16")
    for dtype in ("bfloat16", "int8"):
        yield from _crossed(BOTH, [(768, 768)], tiles, (0.5, 0.3, 0.2, 0.1, 0.05), [128], dtype=dtype)
        yield from _crossed(["linear"], [(4096, 4096)], tiles, [0.2], [1], dtype=dtype)
        yield from _crossed(BOTH, [(4096, 4096)], blocks("16x16"), [1 / 8], [512], dtype=dtype)
    yield from _crossed(BOTH, [(768, 768)], blocks("32x32 16x16 32x1 1x1"), [0.2], [128], dtype="float16")
    yield Point("linear", (1536, 512), (16, 1), 0.05, 1, dtype="bfloat16")  # WaveRNN's GRU


GRIDS = {
    row.name: row
    for row in (
        Grid("shapes", "All block shapes, 768x768, N = 128", "bsrgen's own", "block", _shapes),
        Grid("smalln", "Few tokens, blocks of 16 rows or more, 768x768", "bsrgen's own", "n", _smalln),
        Grid("narrow", "Narrow blocks at low density, few tokens and many", "bsrgen's own", "n", _narrow),
        Grid("sentence", "MiniLM's and BERT-base's layers at 80 %, one sentence", "bsrgen's own", "nnz", _sentence),
        Grid("threads", "One and two threads", "bsrgen's own", "block", _threads),
        Grid("dense", "Density up to 1: where dense wins", "bsrgen's own", "density", _dense),
        Grid("reduced", "bfloat16 and int8, a few points of float16", "bsrgen's own", "density", _reduced),
        Grid("mlir", "Backends: C, MLIR, and MLIR's stock sparsifier", "bsrgen's own", "block", _mlir, mlir=True),
        Grid("big", "4096x4096, N = 512", "bsrgen's own", "block", _big),
        Grid("patterns", "Uniform, power-law and banded patterns", "bsrgen's own", "block", _patterns),
        Grid(
            "bert",
            "BERT-base weights",
            "Guo and Huang, arXiv:2106.08846; apache/tvm PR 5377",
            "density",
            _bert,
        ),
        Grid("popsparse", "Square matrices, float32", "Li et al., PopSparse, arXiv:2303.16999", "density", _popsparse),
        Grid(
            "dynamic",
            "Static and dynamic kernels, and preparing a weight",
            "Li et al., PopSparse, arXiv:2303.16999, and more types and blocks",
            "density",
            _dynamic,
            dynamic=True,
        ),
        Grid(
            "wavernn",
            "Batch 1: GRU and fully connected layers of WaveRNN and LPCNet",
            "Tulloch et al., apache/tvm PR 3566 and the WaveRNN benchmarks it came from",
            "density",
            _wavernn,
        ),
        Grid(
            "sparselib",
            "Inference on one thread, 16 outputs a block",
            "Shen et al., SparseLib (Intel Neural Compressor), arXiv:2306.16601",
            "density",
            _sparselib,
        ),
        Grid("pyfr", "Flux reconstruction operators", "Wozniak et al., GiMMiK, CPC 202, 2016; PyFR", "nnz", _pyfr),
        Grid(
            "tvm",
            "TVM's sparse_dense and sparse_conv2d",
            "apache/tvm PRs 1289, 3566, 8065, 8605; Gu, arXiv:2007.13055",
            "nnz",
            _tvm,
        ),
    )
}
DEFAULT = ("shapes", "smalln", "threads")  # what README quotes
