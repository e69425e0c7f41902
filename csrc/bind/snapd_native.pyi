"""The compiled part: copying outside the GIL, the control page, mapped segments.

Addresses are plain integers. Whoever passes one guarantees that the memory lives until the call returns, or, for a
submitted copy, until its ticket is done: the engine keeps no Python object alive.
Every failure raises a subclass of ValueError or OSError with the offending argument and value in the text.
"""

from collections.abc import Sequence
from typing import Final, final

from typing_extensions import Buffer

LANE_FREE: Final[int]
LANE_GRANTED: Final[int]
LANE_OPEN: Final[int]
LANE_COMPLETE: Final[int]
LANE_DISCARDED: Final[int]
ENTRY_REUSED: Final[int]
REPLICAS_DIFFER: Final[int]  # of the word `replicas_equal_step_plus_one`
ZERO_FILL: Final[int]  # as a source index: the piece is filled with zeroes

@final
class CopyPlan:
    """Where the pieces of a copy lie, relative to bases that are given anew for each copy.

    Piece i copies `nbytes[i]` bytes from `src_bases[src_index[i]] + src_offset[i]` to
    `dst_bases[dst_index[i]] + dst_offset[i]`. `group[i]` (0..255) is what a fence waits for; lower groups are
    copied first. The sequences are of equal length; anything that supports the buffer protocol with format I or Q
    (array.array) is taken without conversion.
    """

    def __init__(
        self,
        src_index: Sequence[int],
        src_offset: Sequence[int],
        dst_index: Sequence[int],
        dst_offset: Sequence[int],
        nbytes: Sequence[int],
        group: Sequence[int],
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def piece_count(self) -> int: ...
    def run(
        self, src_bases: Sequence[int], dst_bases: Sequence[int], first_piece: int = 0, piece_count: int = -1
    ) -> None:
        """Copy in the calling thread, without the GIL."""
    def sample(
        self, src_bases: Sequence[int], turn: int, sample_bytes: int = 4096, share_max: float = 0.0025
    ) -> Sample:
        """Keep a few bytes of each source (a window that moves with `turn`), for a later comparison.

        At most `sample_bytes` per source index and `share_max` of the plan's bytes in all (then some sources are left
        out, others in the next turn). Runs in the calling thread, without the GIL.
        """
    def differing(self, src_bases: Sequence[int], dst_bases: Sequence[int]) -> list[int]:
        """Compare all pieces; the sorted source indexes of which some byte differs. Without the GIL."""

@final
class Sample:
    @property
    def nbytes(self) -> int: ...
    def differing(self, dst_bases: Sequence[int]) -> list[int]:
        """Sorted source indexes whose kept bytes differ from those at the destination. Without the GIL."""

@final
class CopyEngine:
    """Copy threads (named `snapd-copy-N`, normal priority, all signals blocked) outside the GIL.

    Closed by close(), else at the interpreter's exit, when what is under way is cancelled.
    """

    def __init__(self, thread_count: int = 1) -> None: ...
    def submit(self, plan: CopyPlan, src_bases: Sequence[int], dst_bases: Sequence[int]) -> Ticket:
        """Start copying. Pieces are cut into blocks of at most 256 KiB, taken in order of group, then of piece."""
    def close(self) -> None:
        """Cancel what is left and join the threads. Idempotent; also safe in a forked child (does nothing there)."""

@final
class Ticket:
    def wait(self, group: int = -1, help: bool = True, timeout_s: float = -1.0) -> bool:
        """Wait until the pieces of `group` (-1: all) are copied; False when the time ran out or it was cancelled.

        With `help` the calling thread copies blocks that nobody has taken, those of `group` first, and only waits for
        blocks that another thread is in the middle of. Releases the GIL.

        `wait()` for all (-1) is what a commit, or handing on the destinations, needs: afterwards no thread touches
        them any more. `wait(group)` with help is `fence(group)`.
        """
    def fence(self, group: int = -1, timeout_s: float = -1.0) -> bool:
        """Wait, helping, until the sources of `group` (-1: all) may change: every byte of them is in place.

        Never waits for a copy thread that the scheduler starves: the block that it is in the middle of is taken over
        after some 30 microseconds. Such a thread may still, once it runs again, write a few bytes that it read before
        (the same that are there); so after a fence, commit only if `is_done()`, else when `fileno()` becomes readable
        or `wait()` returns.
        """
    def is_done(self, group: int = -1) -> bool:
        """Are the bytes of `group` in place (-1: all are, and no thread touches the destinations any more)?"""
    def progress(self) -> tuple[int, int]:
        """Bytes copied, bytes in all."""
    def cancel(self) -> None:
        """No block is begun after this; returns when none is being copied any more."""
    def fileno(self) -> int:
        """An eventfd, readable once `wait()` would return: all is copied, or the ticket is cancelled.

        Closed with the ticket.
        """
    @property
    def is_cancelled(self) -> bool: ...
    @property
    def helped_bytes(self) -> int: ...
    @property
    def seized_bytes(self) -> int: ...  # of helped_bytes, in blocks that were taken over from another thread
    @property
    def started_ns(self) -> int: ...  # CLOCK_MONOTONIC; 0: not yet
    @property
    def finished_ns(self) -> int: ...
    @property
    def cpu_ns(self) -> int: ...  # thread CPU time spent on it, helpers included

@final
class Mapping:
    """A shared file mapping (MAP_SHARED, MADV_DONTFORK). Supports the buffer protocol; unmapped by close()."""

    def __init__(self, fd: int, nbytes: int, writable: bool) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def populate(self, offset: int = 0, nbytes: int | None = None) -> None:
        """Fill the page tables for the mapping, or for a part, without the GIL, so that no copy pays for page faults.

        Costs some 0.2 s/GB if writable, 0.1 s/GB if not (a copy 0.05): do it once, off the training thread. Several
        threads may each do their part, which begins on a page (ValueError).
        """
    def view(self, offset: int, nbytes: int) -> memoryview: ...
    def close(self) -> None:
        """Raises ValueError while views are alive."""

@final
class ControlPage:
    """Typed, atomic access to a control page (csrc/include/snapd/control_page.hpp). Bounds are checked."""

    @staticmethod
    def nbytes_for(lane_count: int, entry_capacity: int) -> int: ...
    @staticmethod
    def create(
        fd: int,
        *,
        lane_count: int,
        entry_capacity: int,
        rank: int,
        session_id: int,
        chunk_bytes: int,
        generation: int,
    ) -> ControlPage:
        """Size, back and format the file."""
    @staticmethod
    def attach(fd: int) -> ControlPage:
        """Map a page; ValueError says what is wrong with it (magic, version, counts, size)."""
    @property
    def lane_count(self) -> int: ...
    @property
    def entry_capacity(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def session_id(self) -> int: ...
    @property
    def chunk_bytes(self) -> int: ...
    # header words, by the name of the C++ field
    def load(self, word: str) -> int: ...
    def store(self, word: str, value: int) -> None: ...
    def add(self, word: str, value: int) -> int: ...
    # lanes
    def lane_state(self, lane: int) -> int: ...
    def set_lane_state(self, lane: int, expected: int, new: int) -> bool:
        """Compare-and-set with acquire-release order; False if the state was not `expected`."""
    def lane_load(self, lane: int, field: str) -> int: ...
    def lane_store(self, lane: int, field: str, value: int) -> None: ...
    def write_grant(self, lane: int, segments: Sequence[int], frames: Sequence[int]) -> None: ...
    def read_grant(self, lane: int) -> tuple[list[int], list[int]]: ...
    def write_entries(
        self,
        lane: int,
        segments: Sequence[int],
        frames: Sequence[int],
        nbytes: Sequence[int],
        flags: Sequence[int],
    ) -> None: ...
    def read_entries(self, lane: int) -> tuple[list[int], list[int], list[int], list[int]]: ...
    def commit(self, lane: int, wake_fd: int) -> bool:
        """OPEN -> COMPLETE, then write 1 to `wake_fd` (ignored if -1). The snapshot exists once this returned True."""
    def close(self) -> None: ...

def copy_bytes(dst: int, src: int, nbytes: int) -> None:
    """One copy in the calling thread with the engine's kernel (non-temporal where that is faster)."""

def copy_kernel() -> str:
    """Which kernel the processor got: "avx512", "avx2", "sse2" or "scalar"; SNAPD_COPY_KERNEL forces one."""

def shuffle_bytes(src: Buffer, dst: Buffer, width: int) -> None:
    """Fill `dst` with the byte planes of `src`: byte 0 of every element of `width` (2, 4, 8) bytes, then byte 1, ...

    Bytes behind the last whole element come last, as they are. Of equal size, contiguous, not overlapping. Without
    the GIL.
    """

def unshuffle_bytes(src: Buffer, dst: Buffer, width: int) -> None:
    """The inverse of shuffle_bytes."""

def byte_filter() -> str:
    """Which kernel the processor got for the two: "avx2", "sse2" or "scalar"."""
