"""One job on this node: its index, ledger, arenas and sessions, and what follows from a change of any of
them.

Every method that is not a coroutine runs to its end on the event loop, so each sees and leaves a consistent
job. `settle` is called after every change: it announces, drops, and grants. The order that a crash may cut
anywhere: a record is committed before its words are set, its deletion is committed before its frames are
free, its lane is FREE before they are granted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from snapd.coordination.base import Coordination
from snapd.core.capacity import Limit, check_fits
from snapd.core.ids import SnapshotId
from snapd.core.interval import Interval
from snapd.core.ledger import Ledger, ShardFacts
from snapd.core.replicas import ReplicaState
from snapd.core.reports import FlushNews
from snapd.core.restore import Repair, RestoreRound
from snapd.errors import CapacityError, JobUnusable
from snapd.memory.folders import JobFolder
from snapd.memory.index import KEEP_FILES_HINT, Index
from snapd.memory.parity import ParityStore
from snapd.memory.segments import back_segment
from snapd.memory.shortage import shortage
from snapd.runtime.arriving import Arriving
from snapd.runtime.changes import Changes
from snapd.runtime.context import Context
from snapd.runtime.disk_part import DiskPart
from snapd.runtime.faultpoints import point
from snapd.runtime.fetched import Fetched
from snapd.runtime.granting import free_lanes, free_slots, grant_lane, lane_grants, small_grants
from snapd.runtime.limits import arena_limits
from snapd.runtime.rank_arena import SEGMENTS_MAX, RankArena
from snapd.runtime.session import Session


class WorldPart(Protocol):
    """What a job needs of its world across nodes (runtime/world.py)."""

    def changed(self) -> None:
        """What this node reports may have changed."""

    @property
    def complete(self) -> SnapshotId | None:
        """The newest snapshot that is captured on all ranks of the world."""

    @property
    def protected(self) -> SnapshotId | None: ...
    @property
    def target(self) -> SnapshotId | None:
        """The snapshot that is being protected."""

    @property
    def flush(self) -> SnapshotId | None:
        """The snapshot that all nodes write to the shared tier now."""

    @property
    def node_flush(self) -> SnapshotId | None:
        """The snapshot that each node writes to its own disk now."""

    def protection_reason(self) -> str:
        """Why the newest complete snapshot is not protected yet, in words."""

    def doomed(self, job: Job) -> list[tuple[SnapshotId, str]]:
        """Which snapshots may go, with the reason."""


class Repairing(Protocol):
    """Who brings back bad chunks from other nodes (runtime/repairing.py)."""

    async def repair(
        self, job: Job, snapshot: SnapshotId, rank: int, bad: Sequence[tuple[int, str]]
    ) -> Repair: ...


class FlushPart(Protocol):
    """A job's way to the shared tier (runtime/flushing.py)."""

    @property
    def durable(self) -> SnapshotId | None:
        """The newest snapshot that is committed in the tier."""

    @property
    def reason(self) -> str:
        """What is being done, or what it waits for, in words."""

    def is_refused(self, snapshot: SnapshotId) -> bool:
        """It is complete, and waiting does not help: a person has to mend what `reason` says."""

    def news(self) -> FlushNews:
        """What the job's collector is told."""

    def note_durable(self, snapshot: SnapshotId | None) -> None:
        """The collector says so."""

    def request(self, snapshot: SnapshotId) -> None:
        """Have it, or a newer one, become durable now."""

    async def wait_newest_durable(self) -> None:
        """The job has ended: returns when its newest snapshot is durable, or never will be, or the job goes on."""

    async def confirm(self) -> None:
        """See that the tier still has what is called durable. Waits a little."""

    async def before_opening(self) -> None:
        """A generation is about to be given out: it must be above all that the tier has. Waits a little."""


class Job:
    """A healthy job; one whose files are broken is kept as an error by the node instead."""

    def __init__(
        self, context: Context, name: str, folder: JobFolder, index: Index, coordination: Coordination
    ) -> None:
        self.context = context
        self.name = name
        self.folder = folder
        self.index = index
        self.coordination = coordination
        self.parity = ParityStore(name, folder, index)
        self.ledger = Ledger()
        self.arenas: dict[int, RankArena] = {}
        self.sessions: dict[int, Session] = {}
        self.chunk_bytes = index.chunk_bytes()
        self.rounds: dict[tuple[int, int], RestoreRound] = {}
        self.final_ranks: set[int] = set()
        self.replicas = ReplicaState()
        self.fetched = Fetched()
        self.arriving = Arriving(index.arriving)
        self.changes = Changes()
        self.opening = asyncio.Lock()
        self.planning = asyncio.Lock()
        self.verifying: dict[SnapshotId, asyncio.Task[None]] = {}
        self.has_new_writers = True  # since its chunks were last distrusted
        self.is_removed = False
        self.on_removed: list[Callable[[], None]] = []  # who else keeps it, and with it its mapped memory
        self.world: WorldPart | None = None  # set where worlds span nodes
        self.repairs: Repairing | None = None  # likewise
        self.flusher: FlushPart | None = None  # set where there is a shared tier
        self.disk: DiskPart | None = None  # set where the node keeps snapshots on a disk of its own
        self.newest_generation = coordination.current()  # whose predecessors' sessions are fenced
        self.abort_count = 0  # steps that ranks here skipped for want of a slot
        self._announced: SnapshotId | None = None

    # what there is

    def arena(self, rank: int) -> RankArena:
        """The rank's arena, an empty one at first."""
        if rank not in self.arenas:
            self.arenas[rank] = RankArena.empty(self.folder, rank, self.chunk_bytes)
        return self.arenas[rank]

    @property
    def arena_bytes(self) -> int:
        return self.parity.nbytes + sum(arena.memory.nbytes for arena in self.arenas.values())

    def live_sessions(self) -> Iterator[Session]:
        return (session for session in self.sessions.values() if session.is_live)

    def served_sessions(self) -> Iterator[Session]:
        return (
            session for session in self.sessions.values() if session.is_served and not session.is_page_closed
        )

    def closed_below(self) -> int:
        """Generations below this one capture nothing more."""
        working = [s.generation for s in self.sessions.values() if s.is_served or not s.is_drained]
        return min([*working, self.coordination.current()])

    def newest_step_seen(self) -> int:
        return max((session.newest_step_seen() for session in self.served_sessions()), default=-1)

    # after every change

    def removed(self) -> None:
        """It is the node's no more (`is_removed` is set): whoever waits for it or keeps it hears of it."""
        self.changes.notify()
        self.index.close()
        for let_go in self.on_removed:
            let_go()
        self.on_removed.clear()

    def settle(self) -> None:
        """Announce what is complete, drop what may go, grant what is free."""
        if self.is_removed:
            return
        self._announce()
        self._drop()
        for session in list(self.served_sessions()):
            self._grant(session)
        self.changes.notify()
        if self.world is not None:
            self.world.changed()

    def _announce(self) -> None:
        newest = self.ledger.newest_complete()
        if newest is None:
            return
        if self._announced is None or newest.id > self._announced:
            self._announced = newest.id
            self.context.metrics.snapshots_completed.inc()
            self.context.log.info(
                "snapshot.completed", job=self.name, generation=newest.id.generation, step=newest.id.step
            )
            self.write_interval(self.coordination.note_complete(newest_step_seen=self.newest_step_seen())[0])
        for session in self.served_sessions():
            if session.generation == newest.id.generation:
                session.page.store("complete_step_plus_one", newest.id.step + 1)
        point("daemon.complete.after")

    def forget_announced(self) -> None:
        """After a snapshot was proved bad: the newest complete one may be an older one."""
        self._announced = None

    def write_interval(self, interval: Interval) -> None:
        """Tell every rank of the current generation; from_step lies ahead of all of them."""
        for session in self.served_sessions():
            page = session.page
            if page.load("interval_from_step") == interval.from_step:
                continue
            page.store("interval_from_step", interval.from_step)
            page.store("interval_steps", 0 if interval.factor == 1 else interval.steps)

    def _keep_complete(self) -> int:
        """One less than the slots; everything that is complete until the current generation wants to capture.

        Two can be complete when a generation ends, where the daemon was killed between them; its successor could
        capture nothing beside both.
        """
        newest = self.ledger.newest_complete()
        served = list(self.served_sessions())
        is_restoring = newest is None or newest.id.generation < self.coordination.current()
        if is_restoring and not any(session.page.load("wanted_frames") for session in served):
            return len(self.ledger.snapshots) + 1
        slots = [session.row.slots for session in served]
        return max(slots) - 1 if slots else len(self.ledger.snapshots) + 1

    def _drop(self, *, keep_complete: int = 0) -> None:
        """`keep_complete`: so many complete ones stay, whatever the slots have room for; 0: what they have room for."""
        closed_below = self.closed_below()
        keep = keep_complete or self._keep_complete()
        doomed = (
            self.ledger.to_drop(keep_complete=keep, closed_below=closed_below)
            if self.world is None
            else self.world.doomed(self)
        )
        if not doomed:
            return
        point("daemon.drop.before")
        try:
            self.index.remove_snapshots(snapshot for snapshot, _ in doomed)
        except CapacityError as error:  # they stay until there is room to forget them
            self.context.log.once(f"drop {self.name}", "snapshot.kept", job=self.name, reason=str(error))
            return
        point("daemon.drop.after")
        for snapshot, reason in doomed:
            facts = self.ledger.drop(snapshot, reason)
            for rank, shard in facts.shards.items():
                self.arenas[rank].pool.release(shard.record.places)
                self._shard_is_gone(rank, shard)
            self.context.metrics.snapshots_dropped.inc()
            self.context.log.debug(
                "snapshot.dropped",
                job=self.name,
                generation=snapshot.generation,
                step=snapshot.step,
                reason=reason,
            )
        self.ledger.forget_passed(closed_below=closed_below)
        self._release_ranks_that_are_gone()

    def _release_ranks_that_are_gone(self) -> None:
        """A smaller world has a complete snapshot of its own: the segments of ranks beyond it are of no use."""
        newest = self.ledger.newest_complete()
        used = {session.rank for session in self.live_sessions()}
        for rank, arena in list(self.arenas.items()):
            if newest is None or rank < newest.world_size or rank in used or arena.growing.locked():
                continue
            if arena.pool.free_count < arena.pool.total_count:
                continue
            self.index.remove_segments(rank)
            self.arriving.forget(rank)
            del self.arenas[rank]
            for segment in arena.memory.segments.values():
                segment.path.unlink(missing_ok=True)
            self.context.metrics.arena_bytes.dec(arena.memory.nbytes)
            self.context.log.info("arena.released", job=self.name, rank=rank, nbytes=arena.memory.nbytes)

    def _shard_is_gone(self, rank: int, shard: ShardFacts) -> None:
        """A session's newest shard was dropped: its page says so."""
        session = self.sessions.get(shard.session_id)
        if session is None or not session.is_served or shard.record.id.generation != session.generation:
            return
        newest = self.ledger.newest_shard(rank, session_id=session.id)
        is_same_generation = newest is not None and newest.record.id.generation == session.generation
        if newest is not None and is_same_generation and newest.record.id > shard.record.id:
            return
        session.page.store(
            "captured_step_plus_one", newest.record.id.step + 1 if newest and is_same_generation else 0
        )

    # grants

    def _grant(self, session: Session) -> None:
        page, arena = session.page, self.arena(session.rank)
        wanted = page.load("wanted_frames")
        if wanted == 0:
            return
        if wanted > page.entry_capacity:
            self.context.log.once(
                f"capacity {session.id}",
                "grant.refused",
                job=self.name,
                rank=session.rank,
                wanted_frames=wanted,
                reason=f"the control page has room for {page.entry_capacity} entries: open the session anew",
            )
            return
        self._tell_slots_held(session)
        # a grant that has become too small is extended before a free lane takes what is left
        free = free_slots(session, arena.pool, self.ledger, is_restoring=self._is_restoring(session))
        fresh = free_lanes(session)[:free]
        for lane, is_extended in [*small_grants(session, arena.pool, wanted), *fresh]:
            if not grant_lane(session, arena.pool, lane, wanted, is_extended=is_extended):
                self._grow_later(session, arena, wanted)
                return
            self.has_new_writers = True

    def _tell_slots_held(self, session: Session) -> None:
        """Where snapshots stay until a newer one is protected, no trainer must wait for a slot: it may be minutes."""
        arena, wanted = self.arena(session.rank), session.page.load("wanted_frames")
        is_held = (
            self.world is not None
            and not arena.pool.lanes_of(session.id)
            and arena.pool.free_count < wanted
            and self._frames_missing(session, arena, wanted) == 0
        )
        if bool(session.page.load("slots_held")) != is_held:
            session.page.store("slots_held", int(is_held))

    def _is_restoring(self, session: Session) -> bool:
        """Whether the session may still ask for a snapshot: it has captured none, and no restore of it is over."""
        number = session.generation
        is_over = any(key[0] == number and round_.is_concluded for key, round_ in self.rounds.items())
        return not is_over and not any(
            snapshot.generation == number and session.rank in facts.shards
            for snapshot, facts in self.ledger.snapshots.items()
        )

    # growth

    def _grow_later(self, session: Session, arena: RankArena, wanted: int) -> None:
        now = self.context.environment.monotonic_s()
        is_tried = bool(arena.refusal) and now < arena.refused_at_s + self.context.settings.grow_retry_s
        if is_tried or arena.growing.locked() or self._frames_missing(session, arena, wanted) == 0:
            return
        self.context.spawn(self._grow_in_background(session, wanted), f"grow {self.name}/{session.rank}")

    async def _grow_in_background(self, session: Session, wanted: int) -> None:
        arena = self.arena(session.rank)
        try:
            await self.grow(session, wanted)
        except CapacityError as error:
            if error.message != arena.refusal:
                self.context.log.warning("arena.refused", job=self.name, rank=session.rank, reason=str(error))
            arena.refusal = error.message
            arena.refused_at_s = self.context.environment.monotonic_s()

    def _frames_missing(self, session: Session, arena: RankArena, wanted: int) -> int:
        newest = self.ledger.newest_complete()
        shard = newest.shards.get(session.rank) if newest else None
        idle = sorted(lane_grants(session, arena.pool).values())[
            :-1
        ]  # in lanes other than the one that grows
        return arena.frames_missing(
            wanted_per_slot=wanted,
            slots=session.row.slots,
            session_id=session.id,
            kept_frames=(len(shard.record.chunks) if shard else 0) + sum(idle),
        )

    async def grow(self, session: Session, wanted: int) -> None:
        """Back what the session's slots lack for shards of `wanted` frames.

        Raises:
            CapacityError: it does not fit; nothing has changed.
        """
        # a caller that is cancelled must not leave a thread behind that backs a file which nobody expects
        await asyncio.shield(self.context.keep(self._grow(session, wanted)))

    async def _grow(self, session: Session, wanted: int) -> None:
        arena = self.arena(session.rank)
        async with arena.growing, self.context.backing:
            missing = self._frames_missing(session, arena, wanted)
            if missing == 0 or self.is_removed or not session.is_served:
                return
            await self._add_segment(arena, missing * self.chunk_bytes)
        arena.refusal = ""
        self.settle()

    async def back_frames(self, arena: RankArena, wanted: int) -> None:
        """Back what is lacking for `wanted` free frames, for a shard that is brought here.

        Raises:
            CapacityError: it does not fit; nothing has changed.
        """
        await asyncio.shield(self.context.keep(self._back_frames(arena, wanted)))

    async def _back_frames(self, arena: RankArena, wanted: int) -> None:
        async with arena.growing, self.context.backing:
            missing = wanted - arena.pool.free_count
            if missing <= 0 or self.is_removed:
                return
            try:
                await self._add_segment(arena, missing * self.chunk_bytes)
            except CapacityError:
                if self.world is not None:
                    raise
                self._drop(keep_complete=1)  # what older ones hold is of less use than what is brought
                missing = wanted - arena.pool.free_count
                if missing > 0:
                    await self._add_segment(arena, missing * self.chunk_bytes)

    async def _add_segment(self, arena: RankArena, nbytes: int) -> None:
        number = arena.memory.next_number
        if number >= SEGMENTS_MAX:
            raise CapacityError(
                f"rank {arena.rank} of job {self.name!r} has {SEGMENTS_MAX} segments already",
                kind="segments",
                hint="start the job's world anew, with an estimate of the state's size",
            )
        check_fits(nbytes, self.limits(), self.context.held_by_job(), job=self.name, rank=arena.rank)
        path = self.folder.segment(arena.rank, number)
        point("daemon.segment.before")
        try:
            path.unlink(missing_ok=True)  # of a daemon that was killed before it was recorded
            loop = asyncio.get_running_loop()
            segment = await loop.run_in_executor(self.context.blocking, back_segment, path, number, nbytes)
        except OSError as error:
            what = f"job {self.name!r}: {path.name}"
            unusable = JobUnusable(f"{what}: {error.strerror}", hint=KEEP_FILES_HINT, job=self.name)
            raise shortage(error, what, job=self.name) or unusable from error
        if self.is_removed:
            path.unlink(missing_ok=True)
            return
        self.index.add_segment(arena.rank, number, nbytes)
        arena.add(segment)
        point("daemon.segment.after")
        self.context.metrics.arena_bytes.inc(nbytes)
        self.context.log.info("segment.backed", job=self.name, rank=arena.rank, segment=number, nbytes=nbytes)
        for session in self.served_sessions():
            if session.rank == arena.rank:
                session.segments_version += 1
                session.page.store("segments_version", session.segments_version)

    def limits(self) -> list[Limit]:
        """Every bound on the arena that applies now."""
        settings = self.context.settings
        return arena_limits(
            self.context.arena.path,
            configured_bytes=settings.arena_bytes,
            backed_bytes=sum(self.context.held_by_job().values()),
            headroom_bytes=settings.headroom_bytes,
        )
