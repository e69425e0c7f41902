"""Segments: files on tmpfs, fully backed before anyone copies into them, mapped once by the daemon."""

from __future__ import annotations

import contextlib
import errno
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from snapd_native import Mapping

from snapd.core.ids import Place
from snapd.errors import CapacityError, IntegrityError, InvariantViolated
from snapd.memory.shortage import shortage
from snapd.units import MIB

BACKING_PIECE_BYTES = 64 * MIB
CLEARING_THREADS_MAX = 4  # more bring nothing (bench/backing.py)


def back_segment(path: Path, number: int, nbytes: int, *, is_writable: bool = False) -> Segment:
    """Create, back and map a segment of zeroed pages. Blocking, without the GIL; run it in a thread.

    tmpfs clears an allocated page at its first touch only, so the pages are touched here, not under a copy;
    that also fills the daemon's page tables, so that the first hashing pays for no faults.

    Raises:
        CapacityError: kind `arena_full`: the file system ran out on the way; nothing is left behind.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        for offset in range(0, nbytes, BACKING_PIECE_BYTES):
            os.posix_fallocate(descriptor, offset, min(BACKING_PIECE_BYTES, nbytes - offset))
        segment = Segment.open(path, number, nbytes, is_writable=is_writable)
        _clear_pages(segment.mapping)
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT, errno.EFAULT):
            raise
        raise CapacityError(
            f"the arena's file system is full: {nbytes} bytes could not be backed",
            kind="arena_full",
            hint="enlarge `--shm-size` of the container, `emptyDir.sizeLimit` or the memory limit",
            needed_bytes=nbytes,
        ) from error
    finally:
        os.close(descriptor)
    return segment


def _clear_pages(mapping: Mapping) -> None:
    """Touch every page. Four threads clear two to three times as many bytes a second as one; half of the cores stay for
    those who train. Where no thread can be had, this one does it. Raises OSError.
    """
    threads = max(1, min(CLEARING_THREADS_MAX, (os.cpu_count() or 1) // 2))
    pieces = range(0, mapping.nbytes, BACKING_PIECE_BYTES)
    if threads == 1 or len(pieces) == 1:
        mapping.populate()
        return

    def clear(offset: int) -> None:
        mapping.populate(offset, min(BACKING_PIECE_BYTES, mapping.nbytes - offset))

    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="snapd-clear") as pool:
            for done in [pool.submit(clear, offset) for offset in pieces]:
                done.result()
    except RuntimeError:  # the machine, or the container, has no more threads for us
        mapping.populate()


@dataclass(slots=True)
class Segment:
    """One mapped segment of a (job, rank)."""

    number: int
    nbytes: int
    path: Path
    mapping: Mapping

    @classmethod
    def open(cls, path: Path, number: int, nbytes: int, *, is_writable: bool = False) -> Segment:
        """Map a backed segment, for reading unless it is the daemon's own (parity): it writes none of a trainer's
        bytes.

        Raises:
            IntegrityError: kind `segment`: the file is missing, of another size, or not a file.
        """
        try:
            mode = os.O_RDWR if is_writable else os.O_RDONLY
            descriptor = os.open(path, mode | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            what = f"segment {path.name} cannot be opened"
            raise shortage(error, what) or IntegrityError(
                f"{what}: {error.strerror}", kind="segment"
            ) from error
        try:
            found = os.fstat(descriptor).st_size
            if found != nbytes:
                raise IntegrityError(
                    f"segment {path.name} has {found} bytes, the index says {nbytes}",
                    kind="segment",
                    nbytes=found,
                )
            return cls(number, nbytes, path, Mapping(descriptor, nbytes, is_writable))
        finally:
            os.close(descriptor)

    def map_for_writing(self) -> Mapping:
        """Another mapping of the file, for the daemon's own writing of frames that nobody else has."""
        descriptor = self.descriptor(is_writable=True)
        try:
            return Mapping(descriptor, self.nbytes, True)
        finally:
            os.close(descriptor)

    def touch(self) -> None:
        """Fill our page tables, so that the next hashing pays for no faults. Blocking; a failure costs time
        only.
        """
        with contextlib.suppress(OSError):
            self.mapping.populate()

    def descriptor(self, *, is_writable: bool) -> int:
        """A new descriptor; the caller closes it. Read-only ones are opened as such, not merely mapped so."""
        mode = os.O_RDWR if is_writable else os.O_RDONLY
        return os.open(self.path, mode | os.O_CLOEXEC | os.O_NOFOLLOW)


@dataclass(slots=True)
class SegmentSet:
    """All segments of one (job, rank), by number."""

    rank: int
    chunk_bytes: int
    segments: dict[int, Segment] = field(default_factory=dict)

    def add(self, segment: Segment) -> None:
        self.segments[segment.number] = segment

    @property
    def nbytes(self) -> int:
        return sum(segment.nbytes for segment in self.segments.values())

    @property
    def next_number(self) -> int:
        return max(self.segments, default=-1) + 1

    def view(self, place: Place, nbytes: int) -> memoryview:
        """The first `nbytes` of a frame."""
        segment = self._segment(place, nbytes)
        return segment.mapping.view(place.frame * self.chunk_bytes, nbytes)

    def address(self, place: Place, nbytes: int) -> int:
        """Where the frame begins in this process; valid while the set is alive."""
        return self._segment(place, nbytes).mapping.address + place.frame * self.chunk_bytes

    def has(self, place: Place, nbytes: int) -> bool:
        segment = self.segments.get(place.segment)
        return (
            segment is not None
            and nbytes <= self.chunk_bytes
            and (place.frame + 1) * self.chunk_bytes <= segment.nbytes
        )

    def _segment(self, place: Place, nbytes: int) -> Segment:
        if not self.has(place, nbytes):
            raise InvariantViolated("a frame outside its segment", segment=place.segment, frame=place.frame)
        return self.segments[place.segment]
