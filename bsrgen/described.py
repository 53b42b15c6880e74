"""Described: an artifact, and what a kernel made of it says of itself."""

import functools
from typing import Any

import numpy as np

from bsrgen.artifact import Artifact
from bsrgen.manifest import CostRecord, LevelRecord
from bsrgen.pattern import Pattern
from bsrgen.problem import Problem
from bsrgen.verdict import Verdict


class Described:
    """Everything that can be looked at, read from the manifest; `kernel.Kernel` sets what is declared here."""

    artifact: Artifact
    _level: int  # of the library's, the one in use
    _threads: int
    _dtype: "np.dtype[Any]"
    _x_dtype: "np.dtype[Any]"
    _out_dtype: "np.dtype[Any]"

    @property
    def name(self) -> str:
        """Name of the kernel and prefix of its C symbols."""
        return self.artifact.manifest.name

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K) of the weight."""
        return self.artifact.manifest.shape

    @property
    def transposed(self) -> bool:
        """Whether W comes as the transpose of what is multiplied; shape and pattern are those of W.T then."""
        return self.artifact.manifest.transposed

    @property
    def dtype(self) -> "np.dtype[Any]":
        """Type of the weight."""
        return self._dtype

    @property
    def x_dtype(self) -> "np.dtype[Any]":
        """Type of X."""
        return self._x_dtype

    @property
    def out_dtype(self) -> "np.dtype[Any]":
        """Type of the result."""
        return self._out_dtype

    @property
    def nnz(self) -> int:
        """Stored elements."""
        m = self.artifact.manifest
        return m.nnzb * m.blocksize[0] * m.blocksize[1]

    @functools.cached_property
    def pattern(self) -> Pattern:
        """Which blocks are stored."""
        return self.artifact.pattern()

    @functools.cached_property
    def problem(self) -> Problem:
        """What is computed."""
        problem = self.artifact.problem()
        assert isinstance(problem, Problem)
        return problem

    @property
    def plan(self) -> LevelRecord:
        """How: the plan of the ISA level in use."""
        return self.artifact.manifest.levels[self._level]

    @property
    def cost(self) -> CostRecord:
        """What the model expects of one call on one core, and what was measured."""
        return self.artifact.manifest.cost

    @property
    def verdict(self) -> Verdict:
        """Is sparse worth it for this matrix, and would another block shape be faster?  str() is one sentence."""
        return self.artifact.manifest.verdict

    @property
    def source(self) -> str:
        """The generated text of the ISA level in use: C or CUDA; before it, from MLIR, the register tile, or the kernel
        for GPUs, as MLIR before and after the sparsifier, and as LLVM IR; for GPUs also PTX."""
        level = f"{self.name}_{self.plan.target.replace('-', '_')}"
        steps = [f"{level}{end}" for end in ("_tile.mlir", "_loops.mlir", "_tile.ll", ".c")]
        steps += [f"{self.name}_device{end}" for end in (".cu", ".mlir", "_loops.mlir", ".ll", ".ptx", ".c")]
        return "\n".join(self.artifact.read(step).decode() for step in steps if step in self.artifact.manifest.files)

    def __str__(self) -> str:
        m = self.artifact.manifest
        lines = [
            f"{self.name}",
            f"  problem   {self.problem}",
            f"  plan      {self.plan}",
            f"  cost      {m.cost.flop / 1e6:.3g} MFLOP, {m.cost.bytes / 1e6:.3g} MB, predicted "
            f"{m.cost.seconds * 1e6:.3g} us at n = {m.cost.n} on {m.verdict.where}",
            f"  verdict   {m.verdict}",
            f"  artifact  {self.artifact}",
            *("            " + line for line in self.pattern.picture(64, 16).splitlines()),
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<bsrgen.Kernel {self.name} on {self.plan.target}, {self._threads} threads>"
