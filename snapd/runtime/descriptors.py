"""Descriptors for clients; the caller closes them once they are sent."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass

from snapd.core.ids import SnapshotId
from snapd.errors import NotFoundError
from snapd.runtime.job import Job
from snapd.runtime.session import Session


@dataclass(frozen=True, slots=True)
class PassedSegment:
    """A segment whose descriptor is handed to a client."""

    number: int
    nbytes: int
    chunk_bytes: int
    rank: int


def session_descriptors(
    job: Job, session: Session, on_wake: Callable[[Job, Session], None]
) -> tuple[list[PassedSegment], list[int]]:
    """The control page, the wake descriptor and the read-write segments of a session, in this order."""
    if session.wake_fd < 0:
        session.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        asyncio.get_running_loop().add_reader(session.wake_fd, on_wake, job, session)
    with _Descriptors() as descriptors:
        descriptors.add(os.open(session.page_path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
        descriptors.add(os.dup(session.wake_fd))
        passed: list[PassedSegment] = []
        for number, segment in sorted(job.arena(session.rank).memory.segments.items()):
            descriptors.add(segment.descriptor(is_writable=True))
            passed.append(PassedSegment(number, segment.nbytes, job.chunk_bytes, session.rank))
        return passed, descriptors.handed_over()


def shard_descriptors(
    job: Job, snapshot: SnapshotId, rank: int, also: Collection[int] = ()
) -> tuple[list[PassedSegment], list[int]]:
    """Read-only descriptors of the segments that a captured shard lies in, and of those in `also`, of the same rank.

    Raises:
        NotFoundError: kind `shard`.
    """
    facts = job.ledger.snapshots.get(snapshot)
    shard = facts.shards.get(rank) if facts is not None else None
    if shard is None and not also:
        raise NotFoundError(f"rank {rank} of snapshot {snapshot} is not here", kind="shard", job=job.name)
    memory = job.arena(rank).memory
    numbers = {place.segment for place in shard.record.places} if shard is not None else set()
    with _Descriptors() as descriptors:
        numbers |= set(also)
        for number in sorted(numbers):
            descriptors.add(memory.segments[number].descriptor(is_writable=False))
        passed = [
            PassedSegment(number, memory.segments[number].nbytes, job.chunk_bytes, rank)
            for number in sorted(numbers)
        ]
        return passed, descriptors.handed_over()


class _Descriptors(contextlib.ExitStack):
    """Closes what was opened, unless it was handed over."""

    def __init__(self) -> None:
        super().__init__()
        self._opened: list[int] = []

    def add(self, descriptor: int) -> None:
        self.callback(os.close, descriptor)
        self._opened.append(descriptor)

    def handed_over(self) -> list[int]:
        self.pop_all()
        return self._opened
