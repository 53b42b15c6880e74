"""The manifest: what an artifact says of itself, as strict JSON, and whether that can be true."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from bsrgen.dtypes import DType, as_types
from bsrgen.epilogues import (
    CHOICES,
    QUANTIZED_X,
    SELECTING,
    Epilogue,
    Operand,
    as_epilogues,
    composed,
    gate_rows,
    operands_of,
    steps_of,
)
from bsrgen.errors import ArtifactError
from bsrgen.integrity import MANIFEST
from bsrgen.operators import NAME, kernel_name
from bsrgen.pit import AXES, AxisName, Pit
from bsrgen.verdict import Verdict

PATTERN_FILE = "pattern.npz"  # indptr, indices
MASK_FILE = "mask.npz"  # of attention: which elements of cut blocks count
OPERANDS_FILE = "operands.npz"  # operands bound when the kernel was compiled
TIME_UP = "the time was up"  # begins a TuningRecord's note
SCHEMA = 5
ABI = 2  # BSRGEN_ABI in runtime/bsrgen.h


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class OperandRecord(_Record, frozen=True):
    """An operand of the epilogue; scalars and values per token have a default."""

    name: str
    kind: Literal["row", "token", "element", "scalar", "live", "routing", "mask"]
    default: float | str | None = None  # JSON has no infinities: "inf", "-inf"


def operand_records(operands: Sequence[Operand]) -> tuple[OperandRecord, ...]:
    """What a call of a kernel with these operands takes."""
    return tuple(OperandRecord(o.name, o.kind, _json_number(o.default)) for o in operands)  # type: ignore[arg-type]


class PitRecord(_Record, frozen=True):
    """Of mode="pit": the axis that calls thin out, and the tokens and rows of W of a block that they mask or route."""

    axis: AxisName
    tokens: int
    rows: int


def _json_number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


class ValuesRecord(_Record, frozen=True):
    """Where packed values lie: a file beside the library, and the same bytes at `offset` in the library."""

    file: str
    offset: int
    bytes: int


class LevelRecord(_Record, frozen=True):
    """One ISA level of the library: what it needs, how it works, what the model expects of it."""

    target: str
    requires: tuple[str, ...]
    plan: str
    knobs: dict[str, Any]
    values: ValuesRecord | None  # None: they come with the call
    counts: dict[str, int | float]  # what its plan does in a call as in CostRecord: the fields of plan.Counts
    predicted_seconds: float  # of that call; measured where this level was tuned
    measured_seconds: float | None = None

    def __str__(self) -> str:
        return self.plan

    @property
    def value_bytes(self) -> int:
        """Bytes of the packed values; of a pattern that comes with the call, the most."""
        return int(self.counts["value_bytes"]) if self.values is None else self.values.bytes


class CostRecord(_Record, frozen=True):
    """Prediction for one call of n tokens on one core, and what was measured when the kernel was tuned."""

    n: int
    flop: int
    bytes: int
    seconds: float
    dense_seconds: float
    measured_seconds: float | None = None
    measured_dense_seconds: float | None = None  # the best plan that multiplies the whole matrix, in the same race

    @property
    def speedup(self) -> float:
        """Gain over the predicted dense product, measured where it was."""
        return self.dense_seconds / (self.measured_seconds or self.seconds)


class TuningRecord(_Record, frozen=True):
    """A plan in a race at n tokens on one core.  `note` says why it was not measured, or what disturbed that."""

    n: int
    target: str
    plan: str
    knobs: dict[str, Any]
    dense: bool
    predicted_seconds: float
    measured_seconds: float | None = None
    note: str = ""

    def __str__(self) -> str:
        predicted = f"predicted {self.predicted_seconds * 1e6:.2f} us"
        time = predicted if self.measured_seconds is None else f"{self.measured_seconds * 1e6:.2f} us, {predicted}"
        return f"n={self.n} {time}  {self.plan}{self.note and f'  ({self.note})'}"


class CheckRecord(_Record, frozen=True):
    """The check against the float64 reference on random data: largest error as a share of the bound."""

    n: tuple[int, ...]
    worst: float


class Manifest(_Record, frozen=True):
    """manifest.json: everything a loader must know, and the sha256 of every other file."""

    schema: int
    abi: int
    bsrgen: str
    name: str
    operator: Literal["linear", "spmm", "sddmm", "linear_grad", "softmax", "attention"]
    shape: tuple[int, int]
    blocksize: tuple[int, int]
    nnzb: int
    dtype: str  # of W as it is stored
    x_dtype: str
    out_dtype: str
    weight_scale: Literal["max", "given", "none"]  # of int8: from each row's largest magnitude, the caller's, or ones
    epilogue: tuple[str, ...]  # with the steps that int8 brings itself
    operands: tuple[OperandRecord, ...]
    parts: tuple[int, ...]  # features of Y by weight, where a list of weights shares X
    pit: PitRecord | None  # None: the whole product
    pattern: str
    weight: str
    family: str
    levels: tuple[LevelRecord, ...]
    bound: tuple[str, ...]  # operands with a value in operands.npz
    prototype: str
    compiler: str
    flags: tuple[str, ...]
    cost: CostRecord
    verdict: Verdict
    mode: Literal["static", "dynamic"]  # dynamic: the weight comes with the call, and nnzb is the most that it may have
    strict: bool  # an absent block contributes nothing, even where X holds Inf or NaN
    check: CheckRecord | None
    tuning: tuple[TuningRecord, ...]  # for each level the fastest first, then those that were not measured
    notes: tuple[str, ...]
    files: dict[str, str]
    head: int = 0  # elements of a head's vectors, of attention
    transposed: bool = False  # W comes as the transpose of what is multiplied, when it is updated
    workspace_bytes: int = 0  # of a GPU, in which thread blocks leave partial sums; a call may do without
    workspace_n: int = 0  # and tokens of the largest call that may use it
    scratch: bool = False  # calls bring memory of a GPU for X as the kernel turns it: NAME_scratch says how much

    def __post_init__(self) -> None:
        names = [self.library, *(level.values.file for level in self.levels if level.values)]
        if any((level.values is None) != (self.mode == "dynamic") for level in self.levels):
            raise ValueError("a library holds values, or its kernel takes them with the call")
        if self.schema != SCHEMA or self.abi != ABI:
            raise ValueError(f"schema {self.schema}, ABI {self.abi}: this bsrgen reads schema {SCHEMA}, ABI {ABI}")
        names += [PATTERN_FILE] * (self.mode == "static") + [OPERANDS_FILE] * bool(self.bound)
        if not self.levels or not set(names) <= set(self.files):
            raise ValueError("a level or a file it needs is not listed")
        user, quantizes = [name for name in self.epilogue if name in CHOICES], QUANTIZED_X.name in self.epilogue
        if quantizes and (self.dtype != "int8" or self.x_dtype == "int8"):
            raise ValueError("only X of floating numbers is quantised, for W of int8")
        own = composed(as_epilogues(user), *self.types, quantizes)
        if tuple(step.name for step in own) != self.epilogue:
            raise ValueError(f"epilogue {self.epilogue!r:.80} is not one of {self.dtype} kernels")
        if self.operands != operand_records(self.given):
            raise ValueError("operands are not those of the epilogue")
        if self.weight_scale != "none" and "w_scale" not in self.bound:
            raise ValueError("weight_scale is not bound")
        if not set(self.bound) <= {
            operand.name for operand in self.operands if operand.kind not in ("element", *SELECTING)
        }:
            raise ValueError("bound names an operand that cannot be bound")
        # The library's symbols carry the name: a manifest that lies about them finds nothing to call.
        says = kernel_name(
            self.operator, *self.types, self.shape, self.blocksize, self.pattern, self.epilogue, self.as_pit
        )
        if self.name != says or not NAME.match(self.name):
            raise ValueError(f"name {self.name!r:.80} is not that of the kernel described, {says!r:.80}")
        if min(*self.shape, self.nnzb) < 0 or min(self.blocksize) < 1 or self.nnzb > 2**31:
            raise ValueError("a size is out of range")
        if (p := self.pit) and (
            p.tokens < 1 or p.rows < 0 or (p.axis == "experts" and (p.rows == 0 or self.shape[0] % p.rows != 0))
        ):
            raise ValueError("groups of mode='pit' do not fit the shape")
        if self.parts and (sum(self.parts) != self.rows or min(self.parts) < 0):
            raise ValueError("the parts of Y are not Y")

    @property
    def rows(self) -> int:
        """Features of Y."""
        M = self.shape[0] - gate_rows(self.steps, self.shape[0], self.blocksize[0])
        return self.as_pit.features_of_y(M) if self.as_pit else M

    @property
    def as_pit(self) -> Pit | None:
        """What calls leave out, in mode="pit"."""
        return Pit(AXES[self.pit.axis], self.pit.tokens, self.pit.rows) if self.pit else None

    @property
    def given(self) -> tuple[Operand, ...]:
        """The operands of a call."""
        return (*operands_of(self.steps), *((self.as_pit.axis.operand,) if self.as_pit else ()))

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """What the kernel runs on."""
        knobs = self.levels[0].knobs
        return "cuda" if "cuda" in (knobs.get("backend"), knobs.get("device")) else "cpu"

    @property
    def types(self) -> tuple[DType, DType, DType]:
        """The rows of W, X and Y.  ArgumentTypeError, UnsupportedError."""
        return as_types(self.dtype, self.x_dtype, self.out_dtype, hopper=True)

    @property
    def steps(self) -> tuple[Epilogue, ...]:
        """The rows of the epilogue."""
        return steps_of(self.epilogue)

    @property
    def cut_short(self) -> bool:
        """Whether the time for tuning was up before all plans were measured as often as they should be."""
        return any(record.note.startswith(TIME_UP) for record in self.tuning)

    @property
    def library(self) -> str:
        """File name of the shared library."""
        return f"lib{self.name}.so"


_DECODER = msgspec.json.Decoder(Manifest)  # made with the module: threads that make the first one together crash


def parse_manifest(data: bytes, folder: Path) -> Manifest:
    """Strict JSON -> Manifest.  ArtifactError says which field is wrong."""
    try:
        return _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ArtifactError(f"{folder / MANIFEST}: not a manifest of this bsrgen: {e}; build the artifact again") from e
