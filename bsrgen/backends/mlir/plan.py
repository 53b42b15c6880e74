"""The plans of the MLIR backend: the token tile of the C backend, whose register tile is a linalg operation."""

from dataclasses import dataclass
from typing import Any, ClassVar

from bsrgen.backends.c.plan import CPlan

CONSTANT_ENTRIES = 1 << 14  # of the tables that are printed into the module: more are linked, as in C


@dataclass(frozen=True)
class MlirPlan(CPlan):
    """Knobs of an MLIR kernel: `tokens` alone, X packed, elements widened to the sums' type when they are read."""

    backend: ClassVar[str] = "mlir"

    def __post_init__(self) -> None:
        CPlan.__post_init__(self)
        assert self.tokens is not None
        assert self.tokens.pack, "X as it lies"
        assert self.weight is None, "a second micro-kernel"

    def __str__(self) -> str:
        name, _, rest = super().__str__().partition(": ")
        return f"{name}: MLIR, {rest}"

    def knobs(self) -> dict[str, Any]:
        """The decisions alone, as plain data."""
        return {"backend": self.backend, **super().knobs()}

    @property
    def lowered(self) -> bool:
        """Whether the register tile comes from elsewhere than the C text."""
        return True

    @property
    def table_entries(self) -> int:
        """Numbers in the tables that the kernel walks, at most: counted without packing."""
        return self.pattern.nnzb + 2 * self.panels * self.pattern.block_rows + 1

    @property
    def fits_constants(self) -> bool:
        """Whether the pattern may be printed into the module."""
        return self.table_entries <= CONSTANT_ENTRIES
