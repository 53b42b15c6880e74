"""The kernel of a product at a block pattern: load an artifact and call it with its arrays."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsrgen import strides
from bsrgen.arguments import as_array, as_number, as_result, check_threads, default_threads
from bsrgen.artifact import Artifact
from bsrgen.errors import (
    ArgumentError,
    ArgumentTypeError,
    ArtifactError,
    IncompatibleCPUError,
    OutOfMemoryError,
    UnsupportedError,
)
from bsrgen.kernel import Kernel
from bsrgen.operators import ATTENTION, PATTERN_OPERATORS
from bsrgen.pattern_problem import PatternProblem
from bsrgen.trampoline import trampoline
from bsrgen.valued import _Values

Array = NDArray[Any]
_NO_MEMORY = 3  # enum bsrgen_status in runtime/bsrgen.h


class OfPattern(Kernel):
    """What kernels of a pattern are, wherever they run: without values, their arrays come with each call."""

    def __init__(self, artifact: Artifact, *, threads: int | None = None, may_be_foreign: bool = False) -> None:
        """`may_be_foreign`: where this machine cannot run the artifact, calls raise IncompatibleCPUError, not this."""
        m = artifact.manifest
        self.artifact = artifact
        self._dtype, self._x_dtype, self._out_dtype = (row.numpy for row in m.types)
        self._level, self._threads = 0, default_threads(threads)
        self._foreign: IncompatibleCPUError | None = None
        self._tramp = trampoline()
        self._values = _Values({}, "none", {}, None, None, frozenset(), None, None, self._tramp.ffi.NULL)
        self._operator, self._steps = PATTERN_OPERATORS[m.operator], m.epilogue
        self._token_axis = self._operator.token_axis
        (M, K), (R, C) = m.shape, m.blocksize
        self._sizes = {"M": M, "K": K, "D": m.head, "B": m.nnzb, "R": R, "C": C}
        self._result = (m.nnzb, *m.blocksize)
        self._bind_here(may_be_foreign)

    def _find(self, library: Any) -> None:
        self._function = self._tramp.function(library, f"{self.name}_call")

    def _taken(self, arrays: Sequence[Any]) -> None:
        """As many as the operator has.  ArgumentTypeError."""
        if len(arrays) != len(self._operator.inputs):
            names = ", ".join(name for name, _ in self._operator.inputs)
            raise ArgumentTypeError(f"{self.name}: takes {names}, not {len(arrays)} arrays")

    def _able(self, scale: Any, numbers: Mapping[str, Any]) -> list[str]:
        """The operands of a call beside its arrays.  ArgumentTypeError for any other."""
        takes = {"scale": ["scale"], "accumulate": ["alpha", "beta"]}
        able = ["scale"] if self._operator.headed else [name for step in self._steps for name in takes[step]]
        for name in [*numbers, *(["scale"] if scale is not None else [])]:
            if name not in able:
                raise ArgumentTypeError(
                    f"{self.name}: unexpected operand {name!r}: it takes {', '.join(able) or 'none'}"
                )
        return able

    def _head_scale(self, scale: Any) -> float:
        return 1 / math.sqrt(self._sizes["D"] or 1) if scale is None else as_number(self.name, "scale", scale)

    def _n(self, given: Sequence[Any]) -> tuple[tuple[int, ...], int]:
        """The axes of heads and N, which all arrays share.  ArgumentError."""
        headed = self._operator.headed
        first, letters = given[0], self._operator.inputs[0][1]
        heads = first.shape[: 1 - len(letters)] if headed else ()
        n = math.prod(heads) if headed else first.shape[letters.index("N")] if len(first.shape) == 2 else -1
        for (name, letters), a in zip(self._operator.inputs, given, strict=True):
            tail = tuple(n if letter == "N" else self._sizes[letter] for letter in letters)
            want = (*heads, *tail[1:]) if headed else tail
            if a.shape != want:
                raise ArgumentError(
                    f"{self.name}: {name} has shape {a.shape}, expected {self._expected(letters, heads, n)}"
                )
        return heads, n

    def _expected(self, letters: str, heads: tuple[int, ...], n: int) -> str:
        sizes = {**{letter: str(size) for letter, size in self._sizes.items()}, "N": str(n) if n >= 0 else "N"}
        if self._operator.headed:
            sizes["N"] = ", ".join(map(str, heads)) or "..."
        return f"[{', '.join(sizes[letter] for letter in letters)}] ([{', '.join(letters)}])"

    def _result_shape(self, n: int) -> tuple[int, ...]:
        return (self._sizes["M"], self._sizes["D"]) if self._operator is ATTENTION else self._result

    # ── what a kernel without values has not ─────────────────────────────────────────────────────────────────────

    def update(self, W: Any) -> None:
        """UnsupportedError: there are no values; the arrays come with each call."""
        raise UnsupportedError(f"{self.name}: operator {self._operator.name!r} keeps no values to update")

    def packed(self, data: Array, level: int) -> Array:
        """UnsupportedError, as `update`."""
        raise UnsupportedError(f"{self.name}: operator {self._operator.name!r} keeps no values to pack")

    def __matmul__(self, x: Any) -> Any:
        raise ArgumentTypeError(f"{self.name}: operator {self._operator.name!r} takes its arrays in a call")

    def matvec(self, x: Any) -> Any:
        """ArgumentTypeError, as `@`."""
        return self @ x

    @functools.cached_property
    def problem(self) -> PatternProblem:  # type: ignore[override]
        """What is computed."""
        problem = self.artifact.problem()
        assert isinstance(problem, PatternProblem)
        return problem


class PatternKernel(OfPattern):
    """A kernel of a pattern, without values: data = k(a, b), y = k(q, k, v).  Safe to call from many threads.

    sddmm: a is [M, N], b [K, N], the result data[nnzb, R, C], block rows in order, columns ascending, zero
    in padding where a and b are finite.
    linear_grad: the same of a [N, M] and b [N, K].  attention: q is [..., M, D], k and v are [..., K, D], the result
    [..., M, D]; a query for which no key counts gives zeros.  softmax: p = k(s), [..., nnzb, R, C] both, zero where an
    element does not count.
    """

    def __call__(
        self, *arrays: Any, out: Array | None = None, threads: int | None = None, scale: Any = None, **numbers: Any
    ) -> Array:
        """The product of `arrays`, in the order of the operator's formula; see the class.

        Of products, with the epilogue "scale" the rows are multiplied by scale, one number or [M]; with "accumulate"
        data = alpha * sums + beta * out (1 and 1), and beta = 0 does not read out.  Of attention and softmax scale
        multiplies the scores (1 / sqrt(D), 1).  Arrays may have any strides; what is not row-major is copied.  out is
        written and returned.
        Errors: ArgumentError, ArgumentTypeError before any work starts, OutOfMemoryError.
        """
        if self._foreign:
            raise self._foreign
        self._taken(arrays)
        given = [
            as_array(self.name, name, a, self._x_dtype)
            for (name, _), a in zip(self._operator.inputs, arrays, strict=True)
        ]
        heads, n = self._n(given)
        shape, zeros = (*heads, *self._result_shape(n)), "accumulate" in self._steps
        y = as_result(self.name, out, shape, self._out_dtype, zeros=zeros)
        inputs = [self._laid_out(a) for a in given]
        operands, kept = self._operands(inputs[1:], scale, numbers)
        shared = any(np.may_share_memory(y, a) for a in (inputs[0][0], *kept))
        place = y if y.flags.c_contiguous and y.flags.aligned and not shared else np.array(y, order="C")
        ffi, (x, ldx) = self._tramp.ffi, inputs[0]
        status = self._tramp.call(
            self._function, n, ffi.cast("void *", x.ctypes.data), ldx, 0, ffi.cast("void *", place.ctypes.data),
            place.shape[-1], 0, ffi.NULL, operands, self._threads if threads is None else check_threads(threads),
        )  # fmt: skip
        del kept
        if status == _NO_MEMORY:
            raise OutOfMemoryError(f"{self.name}: no memory for packed arrays")
        if status:
            raise ArtifactError(f"{self.name}: the library refused the call (status {status})")
        if place is not y:
            np.copyto(y, place)
        return y

    def _laid_out(self, a: Array) -> tuple[Array, int]:
        """As C walks it, and its leading dimension: of heads one after the other without gaps."""
        if self._operator.headed:
            a = np.require(a, requirements=["C", "A"])
            return a, a.shape[-1]
        return strides.rows(a)

    def _operands(self, arrays: list[tuple[Array, int]], scale: Any, numbers: dict[str, Any]) -> Any:
        """The records of a call, and the arrays that they point at."""
        kept: list[Any] = [a for a, _ in arrays]
        records = [(self._tramp.ffi.cast("void *", a.ctypes.data), ld, 0.0) for a, ld in arrays]
        for name in self._able(scale, numbers):
            if name != "scale":
                records.append((self._tramp.ffi.NULL, 0, as_number(self.name, name, numbers.get(name, 1.0))))
            elif self._operator.headed:
                records.append((self._tramp.ffi.NULL, 0, self._head_scale(scale)))
            else:
                kept.append(self._row_scale(scale))
                records.append((self._tramp.ffi.cast("void *", kept[-1].ctypes.data), 0, 0.0))
        made = self._tramp.ffi.new("struct bsrgen_operand[]", max(len(records), 1))
        for i, (data, ld, number) in enumerate(records):
            made[i].data, made[i].ld, made[i].scalar = data, ld, number
        return made, kept

    def _row_scale(self, scale: Any) -> Array:
        """scale[M] of the type of the sums, from one number or one for each row."""
        if scale is None:
            raise ArgumentTypeError(f"{self.name}: operand 'scale' is missing: k(a, b, scale=...)")
        if np.ndim(scale) == 0:
            return np.full(self._sizes["M"], as_number(self.name, "scale", scale), self._out_dtype)
        array = as_array(self.name, "scale", scale, self._out_dtype)
        if array.shape != (self.shape[0],):
            raise ArgumentError(f"{self.name}: scale has shape {array.shape}, expected one number or {self.shape[:1]}")
        return np.require(array, requirements=["C", "A"])
