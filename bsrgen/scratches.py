"""Memory of GPUs for what calls make and read again: pieces for streams and graphs, of the size that they need."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from bsrgen.errors import CaptureError
from bsrgen.workspaces import Key, Workspaces, workspaces

LEAST_BYTES = 1 << 20


class Piece(NamedTuple):
    """Where it lies on its device, and its size."""

    address: int = 0
    bytes: int = 0


class Memory(NamedTuple):
    """How a device's memory is had: `make` allocates so many bytes there and says where, `release` waits until nothing
    runs any more and gives them back."""

    device: int
    make: Callable[[int], int]
    release: Callable[[int], object]


class Scratches:
    """Who may use which piece: streams and graphs as in Workspaces.  Sizes are powers of two, so that a piece is made
    anew a few times.  A stream's old one is given back then; a graph's is kept for ever, for it has the address."""

    def __init__(self, owners: Workspaces) -> None:
        self._owners = owners
        self._of: dict[Key, Piece] = {}
        self._spare: dict[int, Piece] = {}
        self._lock = threading.Lock()

    @contextmanager
    def lent(self, memory: Memory, stream: int, capture: int, needed: int) -> Iterator[Piece]:
        """`needed` bytes or more for what is launched within: nobody else makes this stream's piece anew meanwhile.

        Calls outside of graphs see that there is a spare piece of that size for the next graph, because nothing can be
        allocated while one is recorded.  CaptureError where there is none, before anything is launched.
        """
        key = self._owners.key(memory.device, stream, capture)
        with self._lock:
            piece = self._of.get(key, Piece())
            if piece.bytes < needed:
                piece = self._of[key] = self._taken(memory, needed) if key[-1] else _grown(memory, piece, needed)
            if not key[-1]:
                self._reserve(memory, needed)
            yield piece

    def reserve(self, memory: Memory, needed: int) -> None:
        """See that there is a spare piece of so many bytes for the next graph."""
        with self._lock:
            self._reserve(memory, needed)

    def _reserve(self, memory: Memory, needed: int) -> None:
        spare = self._spare.get(memory.device, Piece())
        if spare.bytes < needed:
            self._spare[memory.device] = _grown(memory, spare, needed)

    def _taken(self, memory: Memory, needed: int) -> Piece:
        """The spare piece: a graph keeps what it had, for calls that it has recorded."""
        spare = self._spare.get(memory.device, Piece())
        if spare.bytes < needed:
            raise CaptureError(
                f"a graph is being recorded and {needed:,} bytes of scratch memory are needed, {spare.bytes:,} are at "
                "hand, and none can be allocated meanwhile: call the kernel with as many tokens before, or "
                "kernel.upload(n=...), once for each graph"
            )
        return self._spare.pop(memory.device)


def _grown(memory: Memory, old: Piece, needed: int) -> Piece:
    """A new piece in the place of `old`, which nothing uses once what runs is over."""
    size = max(1 << (needed - 1).bit_length(), LEAST_BYTES)
    new = Piece(memory.make(size), size)
    if old.bytes:
        memory.release(old.address)
    return new


@functools.cache
def scratches() -> Scratches:
    """Those of this process."""
    return Scratches(workspaces())
