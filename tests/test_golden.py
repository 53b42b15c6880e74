"""The emitted text of small problems, one for each way to work, as it lies in golden/c.

`pytest tests/test_golden.py --update-golden` writes it anew; the diff is part of the review.
"""

import difflib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

import bsrgen
from bsrgen.backends.c import CPlan, emit
from bsrgen.backends.c.products import FMA, Product, matrix_product
from bsrgen.backends.c.tiles import MatrixTile, TokenTile, WeightTile
from bsrgen.cover import cover
from bsrgen.dtypes import DTYPES
from bsrgen.emit import Source
from bsrgen.epilogues import as_epilogues
from bsrgen.even import PlannedPattern
from bsrgen.operators import OPERATORS
from bsrgen.pattern import Weight, as_weight
from bsrgen.problem import Problem
from bsrgen.targets import TARGETS

FOLDER = Path(__file__).with_name("golden") / "c"


@dataclass(frozen=True)
class Level:
    """The plan of one ISA level: the tiles, and below how many tokens the second one serves."""

    target: str
    tokens: TokenTile | None = None
    weight: WeightTile | None = None
    small_n: int = 0
    encoding: Literal["table", "code"] = "table"
    blocksize: tuple[int, int] | None = None  # of the blocks that cover the problem's own
    matrix: MatrixTile | None = None


@dataclass(frozen=True)
class Golden:
    """A problem small enough to be read, and its plans."""

    name: str
    shows: str
    operator: str
    dtype: str
    shape: tuple[int, int]
    blocksize: tuple[int, int]
    levels: tuple[Level, ...]
    epilogue: tuple[str, ...] = ()
    entry: bool = False  # keep the entry points and the companions too, not only the kernels
    dynamic: bool = False  # the weight comes with the call, of as many blocks as `weight` has

    def __str__(self) -> str:
        return self.name

    @cached_property
    def weight(self) -> Weight:
        """Blocks from arithmetic, not from a generator that may change; the second block row is empty."""
        (M, K), (R, C) = self.shape, self.blocksize
        m, k = np.ogrid[:M, :K]
        i, j = m // R, k // C
        stored = ((3 * i + 5 * j) % 4 == 0) & (i != 1)
        dense = np.where(stored, (m + 1) / (k + 2), 0).astype(DTYPES[self.dtype].numpy)
        return as_weight(dense, blocksize=(R, C), dtype=self.dtype)

    @cached_property
    def problem(self) -> Problem:
        """What is computed."""
        row, steps = OPERATORS[self.operator], as_epilogues(self.epilogue)
        p = self.weight.pattern
        pattern = PlannedPattern(p.shape, p.blocksize, p.nnzb) if self.dynamic else p
        return Problem(row, pattern, DTYPES[self.dtype], steps)

    @cached_property
    def plans(self) -> tuple[CPlan, ...]:
        """How, best level first."""
        return tuple(
            CPlan(
                self.problem, TARGETS[v.target], v.tokens, v.weight, v.small_n, v.encoding,
                v.blocksize and cover(self.problem.pattern, v.blocksize), self._product(v), matrix=v.matrix,
            )
            for v in self.levels
        )  # fmt: skip

    def _product(self, level: Level) -> Product:
        return (level.matrix and matrix_product(self.problem, TARGETS[level.target])) or FMA

    @cached_property
    def source(self) -> Source:
        """The text."""
        return emit(self.plans, self.weight)

    def texts(self) -> dict[str, str]:
        """File in golden/c/<name> -> text: no kernel name in file names, no version in the banner."""
        files = {f"{unit.file}": f"kernel{unit.file[len(self.source.name) : -2]}.c" for unit in self.source.units[1:]}
        if self.entry:
            files |= {f"{self.source.name}.c": "main.c", f"{self.source.name}.h": "header.h"}
        texts = {short: self.source.files[name].decode() for name, short in files.items()}
        return {name: text.replace(f"bsrgen {bsrgen.__version__}", "bsrgen") for name, text in texts.items()}


GOLDEN = (
    Golden(
        "token_panels", "lanes along tokens, X packed in panels, sums kept between them", "linear", "float32", (12, 24),
        (2, 2), (Level("x86-64-v3", TokenTile(rows=2, vectors=2, k_panel=8)),),
    ),
    Golden(
        "token_direct", "lanes along tokens, X as it lies, padded block rows", "spmm", "float64", (10, 12), (3, 5),
        (Level("x86-64", TokenTile(rows=3, vectors=2, k_panel=15, pack=False)),), ("clamp", "accumulate"),
    ),
    Golden(
        "weight_rows", "lanes along rows", "linear", "float32", (64, 6), (32, 1),
        (Level("x86-64-v4", weight=WeightTile(row_lanes=16, k_lanes=1, vectors=2, tokens=3)),),
        ("bias", "relu"),
    ),
    Golden(
        "weight_k", "lanes along k, one reduction per row", "linear", "float32", (5, 64), (1, 16),
        (Level("x86-64-v3", weight=WeightTile(row_lanes=1, k_lanes=8, vectors=1, tokens=4)),),
    ),
    Golden(
        "weight_panels", "lanes along rows, panels of X, several tiles of tokens a window of weights", "linear",
        "float32", (32, 12), (16, 2), (Level("x86-64-v4", weight=WeightTile(16, 1, 1, tokens=2, k_panel=4, chunk=2)),),
    ),
    Golden(
        "cover", "merged blocks, absent ones filled with zeros, and how new values find their places", "spmm",
        "float32", (9, 7), (1, 1), (Level("x86-64-v3", TokenTile(rows=3, vectors=1, k_panel=4), blocksize=(3, 2)),),
        entry=True,
    ),
    Golden(
        "token_code", "the pattern as code: one line per stored block", "spmm", "float32", (6, 12), (2, 3),
        (Level("x86-64-v3", TokenTile(rows=2, vectors=2, k_panel=12, pack=False), encoding="code"),),
    ),
    Golden(
        "mixed", "few tokens along the weight, many along the tokens; operands of every kind", "linear", "float64",
        (16, 18), (4, 4),
        (Level("aarch64", TokenTile(2, 2, 20), WeightTile(2, 1, 2, tokens=3), small_n=4),),
        ("bias", "gelu", "residual", "clamp"), entry=True,
    ),
    Golden(
        "two_levels", "two ISA levels in one library", "spmm", "float32", (12, 16), (4, 1),
        (
            Level("x86-64-v3", TokenTile(rows=4, vectors=2, k_panel=16)),
            Level("x86-64", weight=WeightTile(row_lanes=4, k_lanes=1, vectors=1, tokens=4)),
        ),
        entry=True,
    ),
    Golden(
        "dynamic", "tables and values out of a prepared weight, and how that is made", "linear", "float32", (24, 20),
        (4, 2), (Level("x86-64-v3", TokenTile(4, 2, k_panel=8), WeightTile(4, 2, 1, tokens=3), small_n=4),),
        entry=True, dynamic=True,
    ),
    Golden(
        "matrix_direct", "tiles of the matrix unit, X as it lies, and what runs where the system refuses it", "linear",
        "bfloat16", (48, 64), (16, 32),
        (
            Level("x86-64-v4-amx", matrix=MatrixTile("direct", token_tiles=2, row_tiles=1)),
            Level("x86-64-v3", weight=WeightTile(row_lanes=8, k_lanes=1, vectors=2, tokens=3)),
        ),
        ("bias",), entry=True,
    ),
    Golden(
        "matrix_gathered", "tiles of the matrix unit, columns of X gathered into full K steps", "linear", "bfloat16",
        (64, 40), (32, 1), (Level("x86-64-v4-amx", matrix=MatrixTile("gathered", token_tiles=2, row_tiles=2)),),
    ),
)  # fmt: skip

STATIC = tuple(case for case in GOLDEN if not case.dynamic)  # libraries that hold their weight


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_emitted_text_is_golden(case: Golden, update_golden: bool) -> None:
    folder, texts = FOLDER / case.name, case.texts()
    if update_golden:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        for name, text in texts.items():
            (folder / name).write_text(text)
    assert sorted(path.name for path in folder.iterdir()) == sorted(texts)
    for name, text in texts.items():
        golden = (folder / name).read_text()
        diff = difflib.unified_diff(
            golden.splitlines(), text.splitlines(), f"golden {name}", "emitted", lineterm="", n=1
        )
        assert text == golden, "emitted text changed; if that is meant, --update-golden:\n" + "\n".join([*diff][:60])


def test_no_golden_is_left_over() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {case.name for case in GOLDEN}


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_same_request_gives_same_bytes(case: Golden) -> None:
    again = emit(case.plans, Weight(case.weight.pattern, case.weight.data.copy()))
    assert dict(again.files) == dict(case.source.files)
    assert again.units == case.source.units


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_text_is_read_by_people(case: Golden) -> None:
    for name, data in case.source.files.items():
        if name.startswith(case.source.name) and name.endswith((".c", ".h")):
            text = data.decode("ascii")
            assert text.startswith("/* Generated by bsrgen"), name
            assert "{{" not in text, name
            assert "{%" not in text, name
            assert not re.search(r"[ \t]$", text, re.M), f"{name}: blanks at the end of a line"
            assert "\n\n\n" not in text, f"{name}: two empty lines in a row"
            assert text.endswith("\n"), name
            assert not text.endswith("\n\n"), name
            assert not re.search(r"\b(nan|inf)\b", text), name  # what Python prints is not C


def test_goldens_are_small() -> None:
    assert max(path.stat().st_size for path in FOLDER.rglob("*.c")) < 32_000
