"""A kernel of a Hopper library: how many tokens its tiles have, and who shares what."""

from dataclasses import dataclass

STREAM_TOKENS = 4  # at most, of a thread block without products of warpgroups


@dataclass(frozen=True, slots=True)
class Shape:
    """One kernel of a library: `width` tokens of a thread block, in calls of at most `most` tokens (0: in all others).

    With `parts`, a cluster of so many thread blocks has one slot, and each of them a part of its steps: no SM waits
    where tiles are few.  Up to four tokens are no work for products of warpgroups: W streams through registers.

    Else a thread block has all slots of a tile, and `across` of a cluster, side by side along the tokens, share W: each
    fetches a part of it and sends it to all (multicast).  It has all steps of its tiles, or, `equal`, a piece of the
    line of all tiles' steps, as long as everybody else's.
    """

    width: int
    most: int = 0
    parts: int = 0
    across: int = 1
    equal: bool = False

    def __str__(self) -> str:
        if self.few:
            return f"{self.width}{' streamed' * self.streams} by slots" + f" in {self.parts} parts" * (self.parts > 1)
        return f"{self.width}" + f" x {self.across}" * (self.across > 1) + " in equal pieces" * self.equal

    @property
    def few(self) -> bool:
        """Whether it splits the steps."""
        return self.parts > 0

    @property
    def streams(self) -> bool:
        """Whether it is on the ordinary cores."""
        return self.width <= STREAM_TOKENS

    def groups(self, n: int) -> int:
        """Tiles of n tokens, those of a cluster counted once."""
        return -(-n // (self.width * self.across))

    @property
    def name(self) -> str:
        """Of the kernel, behind that of the library."""
        if self.few:
            return f"{self.width}_by{self.parts}"
        return f"{self.width}" + f"_x{self.across}" * (self.across > 1) + "_equal" * self.equal
