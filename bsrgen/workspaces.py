"""Memory of GPUs in which thread blocks leave partial sums: a piece for each stream and for each graph."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WORKSPACE_BYTES = 20 << 20  # that no kernel exceeds
IN_TURN = -1  # in the place of a capture's number
PER_THREAD = 2  # cudaStreamPerThread: another stream in each thread, with one handle
Key = tuple[int, int, int, int]
Make = Callable[[], int]  # allocates WORKSPACE_BYTES of zeros on a device, waits, and says where


class Workspaces:
    """Who may use which piece.  Launches of a stream follow each other, and so do those of a graph with itself, but a
    graph may run beside the stream that it was recorded on.  Pieces are kept for the life of the process."""

    def __init__(self) -> None:
        self._of: dict[Key, int] = {}
        self._spare: dict[int, int] = {}
        self._lock = threading.Lock()
        self._here = threading.local()

    def of(self, device: int, stream: int, capture: int, make: Make) -> int:
        """The address of a stream's piece, or of a graph's that is being recorded: its capture's number, 0 for none.

        A stream's is made in its first call, and with it a spare one for the next graph: nothing can be allocated while
        one is recorded.  0 where there is no spare one: the kernel does without.
        """
        key = self.key(device, stream, capture)
        capture = key[-1]
        with self._lock:
            if key not in self._of:
                if capture and device not in self._spare:
                    return 0
                self._of[key] = self._spare.pop(device) if capture else make()
            if not capture:
                self._reserve(device, make)
            return self._of[key]

    def key(self, device: int, stream: int, capture: int) -> Key:
        """Who may not share memory with any other: streams, of one capture too, which are branches of its graph."""
        capture = IN_TURN if capture and getattr(self._here, "in_turn", False) else capture
        thread = threading.get_ident() if stream == PER_THREAD else 0
        return device, 0 if capture == IN_TURN else stream, thread, capture

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Graphs that this thread records within run one after the other, and none runs beside graphs of another such
        time: they have one piece for all, as those of benchmarks do."""
        self._here.in_turn = True
        try:
            yield
        finally:
            self._here.in_turn = False

    def reserve(self, device: int, make: Make) -> None:
        """See that there is a spare one for the next graph."""
        with self._lock:
            self._reserve(device, make)

    def _reserve(self, device: int, make: Make) -> None:
        if device not in self._spare:
            self._spare[device] = make()


@functools.cache
def workspaces() -> Workspaces:
    """Those of this process."""
    return Workspaces()
