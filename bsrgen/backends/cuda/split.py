"""Launches with fewer units than a GPU has SMs: thread blocks that share the work along k, and what they leave."""

from dataclasses import dataclass

from bsrgen.workspaces import WORKSPACE_BYTES

COUNTERS = 1024  # at the beginning of a workspace: parts of a unit that are there
LEAST_STEPS = 2  # of a thread block: what it leaves for others costs about as much
LEAST_LOADS = 2  # of a lane, of W that is streamed: all of it on its way at once


@dataclass(frozen=True, slots=True)
class Sharing:
    """At most `most` thread blocks share the line of all units' work, each at least `least` steps of it.

    A thread block leaves `slot_bytes` of sums for a unit that it has a part of.  The pieces of the line are equal and
    lie one after the other, so that thread block c and unit u meet in slot c + u and in no other.
    """

    most: int
    least: int
    slot_bytes: int

    def shares(self, units: int, length: int) -> int:
        """Thread blocks for a launch of `units` units, of `length` steps in all; `units` where none is shared."""
        shares = min(self.most, length // self.least) // units * units
        return shares if self.shared(units) and shares > units else units

    def shared(self, units: int) -> bool:
        """Whether a launch of so many units may be."""
        return 2 * units <= self.most

    @property
    def fits(self) -> bool:
        """Whether all that it needs is in the workspace that kernels share."""
        return self.workspace_bytes <= WORKSPACE_BYTES and self.most // 2 <= COUNTERS

    @property
    def workspace_bytes(self) -> int:
        """Counters, and a slot for each meeting of a thread block and a unit."""
        return 4 * COUNTERS + (self.most + self.most // 2) * self.slot_bytes
