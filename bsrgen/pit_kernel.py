"""PitKernel: the kernel of mode="pit", whose calls say what is to be computed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen.epilogues import ACCUMULATE
from bsrgen.errors import ArgumentError, ArgumentTypeError, PatternMismatchError, UnsupportedError
from bsrgen.kernel import Kernel
from bsrgen.quantize import source_of
from bsrgen.stack import are_several, stacked

Array = NDArray[Any]


class Selecting(Kernel):
    """What kernels of mode="pit" are, wherever they run."""

    def _select(self, select: Any, operands: dict[str, Any]) -> None:
        """Add `select` to the operands, by its name.  ArgumentTypeError."""
        if select is not None:
            name = self.selects
            if name is None or name in operands:
                why = "takes no selection" if name is None else f"{name} is given twice"
                raise ArgumentTypeError(f"{self.name}: {why}")
            operands[name] = select

    def update(self, W: Any) -> None:
        """As in Kernel; of experts W is a list or [experts, rows, K]."""
        m = self.artifact.manifest
        if m.pit and m.pit.axis == "experts":
            experts = list(W) if isinstance(W, np.ndarray) and W.ndim == 3 else W
            if are_several(experts):
                W = self._experts(experts)
        super().update(W)

    def _experts(self, weights: Sequence[Any]) -> Any:
        """The weights of all experts as one.  PatternMismatchError where they are others, or others in number."""
        m = self.artifact.manifest
        rows, K = m.as_pit.rows if m.as_pit else 0, m.shape[1]
        plain = all(isinstance(w, np.ndarray) for w in weights)
        read: list[Any] = list(weights) if plain else [source_of(w, m.types[0], blocksize=m.blocksize) for w in weights]
        shapes = [w.shape if isinstance(w, np.ndarray) else w.pattern.shape for w in read]
        if shapes != [(rows, K)] * (m.shape[0] // max(rows, 1)):
            given = ", ".join(f"{one}x{k}" for one, k in shapes)
            raise PatternMismatchError(
                f"{self.name}: W is {given}; each of the {m.shape[0] // max(rows, 1)} experts is {rows}x{K}"
            )
        return np.concatenate(read) if plain else stacked(read)

    @property
    def selects(self) -> str | None:
        """Name of the operand that says what is computed; None by features."""
        pit = self.artifact.manifest.as_pit
        return pit.axis.operand.name if pit and pit.axis.listed else None

    @property
    def tiles(self) -> tuple[int, ...]:
        """By features: sizes of tiles of tokens, the last one the dense product's.  Else none."""
        return tuple(self.plan.knobs.get("tiles", ()))


class PitKernel(Selecting):
    """A kernel that computes what a call asks for, and no more.  All else is as in Kernel."""

    def __call__(  # type: ignore[override]  # what is selected comes before where it goes
        self, x: Any, select: Any = None, out: Array | None = None, *, threads: int | None = None, **operands: Any
    ) -> Any:
        """Y = epilogue(product(W, x)) where `select` says, which may be given by its name too:

        tokens: live, bool like x without its features, or indices of tokens; None: all.
        experts: routing, integers like x without its features: the expert of each token; negative: none.  With one axis
            more, [..., k], each token goes to k experts and their results are summed in that order, in the type of the
            sums; token_scale [..., k] weighs them.  Not with spmm, residual, accumulate or results of int8.
        outputs: mask, bool [blocks of tokens, blocks of features] of compile's mask_block; None: everywhere.
        features: none; what counts is which elements of x are zero.  tile=: so many tokens share the columns that any
            of them needs, a size of `tiles`; 0 takes for each few tokens what a table of rates likes best.

        Results that are not selected are 0 in a new array, and what they were in `out`.  Operands are as in Kernel,
        bias and scale of experts [experts, rows] or [experts * rows].  Where x is zero, Inf and NaN of W may or may not
        reach the result: W should be finite.
        """
        if select is not None:
            self._select(select, operands)
        if "routing" in operands and np.ndim(operands["routing"]) == np.ndim(x) > 1:
            return self._several(x, out, threads, operands)
        return self._run(self._values, x, out, threads, operands)

    def _several(self, x: Any, out: Array | None, threads: int | None, operands: dict[str, Any]) -> Array:
        """k experts for each token: as many tokens more, whose results are summed."""
        m, x = self.artifact.manifest, np.asarray(x)
        routing: Array = np.asarray(operands["routing"])
        if self._token_axis:
            raise UnsupportedError(f"{self.name}: routing to several experts with operator 'spmm': use 'linear'")
        once = [step.name for step in m.steps if step is ACCUMULATE or any(o.kind == "element" for o in step.operands)]
        if once or self.out_dtype == np.int8:
            what = f"epilogue {once[0]!r}" if once else "results of int8"
            raise UnsupportedError(f"{self.name}: routing to several experts with {what}: send each token to one")
        if routing.shape[:-1] != x.shape[:-1]:
            raise ArgumentError(f"{self.name}: routing has shape {routing.shape}, expected {x.shape[:-1]} and experts")
        for name in ("token_scale", "x_scale"):
            value: Any = operands.get(name)
            if np.ndim(value):
                each = np.shape(value) == routing.shape
                operands[name] = np.reshape(value, -1) if each else np.repeat(np.reshape(value, -1), routing.shape[-1])
        operands["routing"] = routing.reshape(-1)
        tokens = np.repeat(x.reshape(-1, x.shape[-1]), routing.shape[-1], axis=0)
        every = self._run(self._values, tokens, None, threads, operands).reshape(*routing.shape, m.rows)
        y: Array = every.astype(self._call.real.numpy, copy=False).sum(axis=-2).astype(self.out_dtype)
        if out is None:
            return y
        self._call._target(out, (y.size // max(y.shape[-1], 1), y.shape[-1]), y.shape)
        np.copyto(out, y, where=np.expand_dims((routing >= 0).any(axis=-1), -1))
        return out
