"""What this node offers to its peers: chunks of its captured shards, and room for and bytes of parity fragments.

Called on the transport's threads. A shard that is read is leased: its frames are held in its rank's pool, on the loop,
once for all its chunks, until nobody has read it for `LEASE_IDLE_S`. So a chunk costs a look into a table, and a
snapshot that is dropped meanwhile keeps its frames for that long at most.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import xxhash

from snapd.core.frames import FramePool
from snapd.core.ids import SnapshotId
from snapd.core.manifest import ShardRecord
from snapd.errors import IntegrityError, NotFoundError, SnapdError
from snapd.memory.parity import Filled
from snapd.memory.segments import SegmentSet
from snapd.peer.base import HOLDS_MAX, Arrival, ChunkName, FragmentName, Name
from snapd.runtime.faultpoints import point
from snapd.runtime.job import Job
from snapd.runtime.loop_caller import GroupCaller, LoopCaller, Ticket

LEASE_IDLE_S = 0.05
GATHER_S = 0.005  # fragments that are ready within so long, pushed by peers or made here, are one transaction

FindJob = Callable[[str], Job | None]
FragmentCommits = GroupCaller[tuple[Job, Filled]]
"""Gives fragments whose bytes were checked to `commit_fragments`."""
LeaseKey = tuple[str, SnapshotId, int]


@dataclass(slots=True, eq=False)
class _Lease:
    """A shard whose frames are held for readers. Guarded by the store's lock."""

    record: ShardRecord
    memory: SegmentSet
    pool: FramePool
    readers: int = 0
    reads: int = 0  # counts them, so that the idle time is measured from the last
    is_timed: bool = False  # somebody looks whether it is idle


class NodeBulkStore:
    """The `BulkStore` of a node, over all its jobs. Made on the loop; `find_job` is called from any thread (a look into
    a dict).
    """

    def __init__(self, find_job: FindJob, loop: asyncio.AbstractEventLoop) -> None:
        self._find_job = find_job
        self._loop = loop
        self._caller = LoopCaller(loop)
        self.commits = commits_on(loop)
        self._lock = threading.Lock()
        self._leases: dict[LeaseKey, _Lease] = {}

    # BulkStore

    def read(self, name: Name) -> AbstractContextManager[tuple[memoryview, bytes]]:
        """See `BulkStore.read`."""
        return self._chunk(name) if isinstance(name, ChunkName) else self._fragment(name)

    @contextmanager
    def write(self, name: FragmentName, nbytes: int, digest: bytes) -> Iterator[Arrival]:
        """See `BulkStore.write`."""
        job = self._job(name.job)
        with ExitStack() as undo:
            reservation = job.parity.reserve(name.row_id, name.number, nbytes)
            undo.callback(job.parity.cancel, reservation)  # nothing after a commit
            arrival = Arrival(reservation.view)
            yield arrival
            if xxhash.xxh3_128_digest(reservation.view) != digest:
                raise IntegrityError("other bytes arrived than were announced", kind="digest", job=name.job)
            commit = self.commits.begin((job, (reservation, digest)))
            arrival.wait = partial(_wait, commit, undo.pop_all())

    def holds(self, names: Sequence[FragmentName]) -> list[bool]:
        """See `BulkStore.holds`."""
        names = names[:HOLDS_MAX]
        jobs = {name: self._job(name) for name in {name.job for name in names}}
        for name in names:
            jobs[name.job].parity.check_planned(name.row_id)
        return [self._holds(name) for name in names]

    # chunks

    @contextmanager
    def _chunk(self, name: ChunkName) -> Iterator[tuple[memoryview, bytes]]:
        key = (name.job, SnapshotId(name.generation, name.step), name.rank)
        lease = self._enter(key)
        try:
            if not 0 <= name.index < len(lease.record.chunks):
                raise NotFoundError(
                    "the shard has no such chunk", kind="chunk", job=name.job, index=name.index
                )
            chunk = lease.record.chunks[name.index]
            with lease.memory.view(chunk.place, chunk.nbytes) as view:
                yield view, chunk.digest
        finally:
            self._leave(key, lease)

    def _enter(self, key: LeaseKey) -> _Lease:
        with self._lock:
            lease = self._leases.get(key)
            if lease is not None:
                lease.readers += 1
                lease.reads += 1
                return lease
        return self._caller.call(self._open, key)

    def _open(self, key: LeaseKey) -> _Lease:
        """On the loop."""
        name, snapshot, rank = key
        job = self._find_job(name)
        facts = job.ledger.snapshots.get(snapshot) if job is not None else None
        shard = facts.shards.get(rank) if facts is not None else None
        if job is None or facts is None or shard is None or facts.problem:
            why = "its snapshot is unusable" if facts is not None and facts.problem else "no such shard here"
            raise NotFoundError(why, kind="chunk", job=name, snapshot=str(snapshot), rank=rank)
        with self._lock:
            lease = self._leases.get(key)
            if lease is None:
                arena = job.arena(rank)
                lease = _Lease(shard.record, arena.memory, arena.pool)
                lease.pool.hold(lease.record.places)
                self._leases[key] = lease
            lease.readers += 1
            lease.reads += 1
        return lease

    def _leave(self, key: LeaseKey, lease: _Lease) -> None:
        with self._lock:
            lease.readers -= 1
            is_new = (
                lease.readers == 0 and not lease.is_timed
            )  # a timer looks again by itself while it is read
            lease.is_timed |= is_new
        if is_new:
            self._caller.post(self._look_later, key, lease)

    def _look_later(self, key: LeaseKey, lease: _Lease) -> None:
        """On the loop."""
        self._loop.call_later(LEASE_IDLE_S, self._close_if_idle, key, lease, lease.reads)

    def _close_if_idle(self, key: LeaseKey, lease: _Lease, reads: int) -> None:
        """On the loop: let go of what nobody has read since; else look again."""
        with self._lock:
            is_idle = not lease.readers and lease.reads == reads
            if is_idle:
                del self._leases[key]
        if not is_idle:
            self._look_later(key, lease)
            return
        freed = lease.pool.release(lease.record.places)
        job = self._find_job(key[0])
        if freed and job is not None:
            job.settle()  # a lane may wait for them

    # fragments

    @contextmanager
    def _fragment(self, name: FragmentName) -> Iterator[tuple[memoryview, bytes]]:
        job = self._job(name.job)
        try:
            with job.parity.read(name.row_id, name.number) as found:
                yield found
        except IntegrityError as error:
            self._caller.call(discard_fragment, job, name, error)
            raise NotFoundError("the parity fragment was bad", kind="fragment", job=name.job) from error

    def _holds(self, name: FragmentName) -> bool:
        try:
            with self.read(name):
                return True
        except NotFoundError:
            return False

    def _job(self, name: str) -> Job:
        job = self._find_job(name)
        if job is None:
            raise NotFoundError("no such job on this node", kind="fragment", job=name[:64])
        return job


def commits_on(loop: asyncio.AbstractEventLoop) -> FragmentCommits:
    return GroupCaller(loop, _commit_arrived, gather_s=GATHER_S)


def _wait(commit: Ticket[tuple[Job, Filled]], undo: ExitStack) -> None:
    """Until a fragment is recorded; if it is not, its frame is free again."""
    with undo:
        commit.wait()


def commit_fragments(job: Job, filled: Sequence[Filled]) -> Sequence[SnapdError | None]:
    """On the loop: the last step of fragments whose bytes were checked, in one transaction. Returns what is wrong with
    each. Whoever counts them looks every now and then: nobody is woken for them.
    """
    if job.is_removed:
        raise NotFoundError("the job was removed meanwhile", kind="fragment", job=job.name)
    for _ in filled:
        point("daemon.protect.fragment.before")
    problems = job.parity.commit(filled)
    for _ in filled:
        point("daemon.protect.fragment.after")
    return problems


def _commit_arrived(arrived: Sequence[tuple[Job, Filled]]) -> Sequence[SnapdError | None]:
    """On the loop: what has become ready meanwhile, a transaction per job."""
    problems: list[SnapdError | None] = [None] * len(arrived)
    by_job: dict[Job, list[int]] = defaultdict(list)
    for index, (job, _) in enumerate(arrived):
        by_job[job].append(index)
    for job, indices in by_job.items():
        try:
            found = commit_fragments(job, [arrived[index][1] for index in indices])
        except SnapdError as error:
            found = [error] * len(indices)
        for index, problem in zip(indices, found, strict=True):
            problems[index] = problem
    return problems


def discard_fragment(job: Job, name: FragmentName, error: IntegrityError) -> None:
    """On the loop: a fragment of ours was found bad: forget it, and say so."""
    if job.is_removed:
        return
    job.parity.discard(name.row_id, name.number)
    job.context.metrics.chunks_bad.inc()
    job.context.log.error(
        "parity.bad", job=job.name, row=name.row_id.hex(), number=name.number, reason=str(error)
    )
    job.changes.notify()
