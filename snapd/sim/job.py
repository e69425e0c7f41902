"""The job on one node: its ledger over the disk, its trainers' sessions, and what is taken up from their lanes.

Follows runtime/job.py, service.py, capture.py and opening.py: the same rules in the same order, with an effect between
any two of them.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snapd.core.ids import SnapshotId
from snapd.core.interval import Interval
from snapd.core.ledger import Ledger
from snapd.core.manifest import ShardRecord
from snapd.errors import FencedError
from snapd.sim.bugs import Bug
from snapd.sim.disk import HandOver, Session, StoredShard, make_record

if TYPE_CHECKING:
    from snapd.sim.daemon import SimDaemon

HASH_S = 0.03
WAKE_S = 0.005


@dataclass(slots=True, eq=False)
class Served:
    """A session as this process knows it. `pending`: lanes that were accepted before any fence."""

    row: Session
    is_fenced: bool
    pending: list[HandOver] = field(default_factory=list)

    @property
    def is_served(self) -> bool:
        return not self.row.is_gone and not self.is_fenced


class SimJob:
    def __init__(self, daemon: SimDaemon) -> None:
        self._daemon = daemon
        self.disk = daemon.disk
        self.ledger = Ledger()
        self.sessions: list[Served] = []
        self.newest_generation = 0
        self.abort_count = 0
        self.opening = asyncio.Lock()
        self.planning = asyncio.Lock()
        self._is_capturing = False

    def load(self) -> None:
        """Take up what the disk holds; lanes that were complete are captured now."""
        for (_, _), shard in sorted(self.disk.shards.items()):
            self.ledger.add(shard.record, session_id=0, sequence=shard.sequence, is_verified=False)
        for snapshot, problem in self.disk.problems.items():
            self.ledger.mark_unusable(snapshot, problem)
        self.disk.sessions = [s for s in self.disk.sessions if s.lanes or not s.is_gone]
        for row in self.disk.sessions:
            row.lanes = [lane for lane in row.lanes if (lane.id, row.rank) not in self.disk.shards]
            self.sessions.append(Served(row, row.is_fenced))
        for served in list(self.sessions):
            self.look(served)

    def served_sessions(self) -> list[Served]:
        return [served for served in self.sessions if served.is_served]

    def closed_below(self) -> int:
        """Generations below this one capture nothing more."""
        working = [s.row.generation for s in self.sessions if s.is_served or s.pending]
        return min([*working, self._daemon.coordination.current()])

    def has_anything(self) -> bool:
        return bool(self.disk.shards or self.disk.maps or self.sessions)

    # sessions

    async def open_session(self, row: Session) -> None:
        """A trainer opens a session; its generation is set when this returns. Raises what coordination raises."""
        daemon = self._daemon
        async with self.opening:
            assignment = await daemon.next_generation(row.incarnation, 0, row.world_size)
            number = assignment.generation.number
            if assignment.is_new or number > self.newest_generation:
                self.overtake()
            if row.is_gone:
                raise FencedError("the trainer is gone", kind="gone")
            row.generation = number
            daemon.life.effect("persist session")
            self.disk.sessions.append(row)
            self.sessions = [s for s in self.sessions if s.row.rank != row.rank or s.is_served or s.pending]
            self.sessions.append(Served(row, False))
            if assignment.is_new:
                daemon.coordination.configure_interval(1)
        self.settle()

    async def roll_back(self, row: Session, count: int) -> None:
        """Move a session to the generation of this rollback."""
        served = self._served(row)
        self.look(served)
        while served.pending:
            await asyncio.sleep(HASH_S)
        async with self.opening:
            if not served.is_served:
                raise FencedError("the session was overtaken", kind="stale_generation")
            assignment = await self._daemon.next_generation(row.incarnation, count, row.world_size)
            self.newest_generation = max(self.newest_generation, assignment.generation.number)
            self._daemon.life.effect("persist session")
            row.generation, row.is_capturing = assignment.generation.number, False
            row.step_seen = row.skipped_step = -1
            row.interval_steps = row.interval_from = 0
        self.settle()

    def _served(self, row: Session) -> Served:
        for served in self.sessions:
            if served.row is row:
                return served
        raise FencedError("no such session", kind="session")

    def overtake(self) -> None:
        """Sessions of older generations than the current one are fenced; their captures up to now still count."""
        coordination = self._daemon.coordination
        generation = coordination.current()
        newest = coordination.generation(generation)
        self.newest_generation = max(self.newest_generation, generation)
        for served in list(self.sessions):
            is_rolling_back = newest is not None and newest.incarnation == served.row.incarnation
            if served.row.generation < generation and served.is_served and not is_rolling_back:
                self._fence(served)
        self.settle()

    def _fence(self, served: Served) -> None:
        served.row.is_fenced = Bug.FENCE_IGNORED not in self._daemon.bugs  # the page: the trainer sees it
        self.look(served)
        served.is_fenced = True

    def woken(self, row: Session) -> None:
        """The trainer has written to its page, or is gone."""
        for served in self.sessions:
            if served.row is row:
                self.look(served)
        self.settle()

    def look(self, served: Served) -> None:
        """Note the rank's progress and take its complete lanes, unless it is fenced."""
        row = served.row
        if served.is_fenced and Bug.FENCE_IGNORED not in self._daemon.bugs:
            return
        accepted = {lane.id for lane in served.pending}
        served.pending.extend(lane for lane in row.lanes if lane.id not in accepted)
        under_way = [lane.id.step for lane in row.lanes]
        self.ledger.passed(row.generation, row.rank, min([*under_way, row.step_seen]) - 1)
        if row.skipped > row.skipped_taken:
            self.abort_count += row.skipped - row.skipped_taken
            row.skipped_taken = row.skipped
            last = min([*(step - 1 for step in under_way), row.skipped_step])
            self.ledger.passed(row.generation, row.rank, last)
        if served.pending and not self._is_capturing:
            self._is_capturing = True
            self._daemon.life.spawn(self._capture_all(), "capture")

    # from a lane to a record

    async def _capture_all(self) -> None:
        while True:
            waiting = [(s.pending[0].at_s, i) for i, s in enumerate(self.sessions) if s.pending]
            if not waiting:
                self._is_capturing = False
                self._gone_sessions()
                self.settle()
                return
            served = self.sessions[min(waiting)[1]]
            await self._capture(served, served.pending[0])
            served.pending.pop(0)
            self.settle()

    async def _capture(self, served: Served, lane: HandOver) -> None:
        row, daemon = served.row, self._daemon
        own = self.ledger.newest_shard(row.rank)
        base = own.record if own is not None else None
        record = make_record(lane.id, row.rank, row.world_size, lane.contents, base, lane.at_s)
        shard = StoredShard(record, lane.contents, lane.sequence)
        is_early = Bug.SEND_BEFORE_PERSIST in daemon.bugs
        is_good = lane.id.generation == row.generation or Bug.FENCE_IGNORED in daemon.bugs
        if not is_good or self.ledger.has_shard(lane.id, row.rank):
            if lane in row.lanes:
                row.lanes.remove(lane)
            return
        if is_early:
            self._note(record, lane)
            self.settle()
        await asyncio.sleep(HASH_S * (0.5 + daemon.chance()))
        daemon.life.effect(f"persist shard {lane.id} of rank {row.rank}")
        if not is_early or self.ledger.has_shard(lane.id, row.rank):
            self.disk.shards[lane.id, row.rank] = shard
            daemon.truth.stored(daemon.node, record)
        if not is_early:
            self._note(record, lane)
        daemon.life.effect("free a lane")
        if lane in row.lanes:
            row.lanes.remove(lane)

    def _note(self, record: ShardRecord, lane: HandOver) -> None:
        if not self.ledger.has_shard(record.id, record.rank):
            self.ledger.add(record, session_id=0, sequence=lane.sequence, is_verified=True)

    def _gone_sessions(self) -> None:
        """Sessions of dead trainers of which nothing is left to take up."""
        for served in [s for s in self.sessions if s.row.is_gone and not s.pending]:
            if served.row in self.disk.sessions and not served.row.lanes:
                self.disk.sessions.remove(served.row)
            self.sessions.remove(served)

    def bring(self, shard: StoredShard) -> None:
        """A shard that was fetched or decoded becomes an ordinary one of this node, held for a restore."""
        record = shard.record
        self._daemon.life.effect(f"persist brought shard {record.id} of rank {record.rank}")
        self.disk.shards[record.id, record.rank] = shard
        if not self.ledger.has_shard(record.id, record.rank):
            self.ledger.add(record, session_id=0, sequence=0, is_verified=True)
        self.ledger.hold(record.id)
        self.settle()

    # after every change

    def settle(self) -> None:
        """Drop what may go; what is reported may have changed."""
        if any(s.row.is_gone for s in self.sessions):
            self._gone_sessions()
        self._drop()
        self._daemon.world.changed()

    def _drop(self) -> None:
        doomed = self._daemon.world.doomed()
        if not doomed:
            return
        daemon = self._daemon
        daemon.life.effect(f"drop {doomed[0][0]}")
        for snapshot, reason in doomed:
            daemon.truth.drops(daemon.node, snapshot, reason)
            for key in [key for key in self.disk.shards if key[0] == snapshot]:
                del self.disk.shards[key]
            self.disk.problems.pop(snapshot, None)
            self.ledger.drop(snapshot, reason)
        self.ledger.forget_passed(closed_below=self.closed_below())

    def condemn(self, snapshot: SnapshotId, problem: str) -> None:
        facts = self.ledger.snapshots.get(snapshot)
        if facts is not None and not facts.problem:
            self._daemon.life.effect("persist problem")
            self.disk.problems[snapshot] = problem
            self.ledger.mark_unusable(snapshot, problem)

    def take_interval(self, interval: Interval) -> None:
        """Tell every trainer; `from_step` lies ahead of all of them."""
        if interval == self._daemon.coordination.interval():
            return
        self._daemon.coordination.take_interval(interval)
        for served in self.served_sessions():
            if served.row.interval_from != interval.from_step:
                served.row.interval_from = interval.from_step
                served.row.interval_steps = 0 if interval.factor == 1 else interval.steps
