"""One job's way to the node's own disk, and back: fills memory from it first, then keeps the newest snapshots there.

The writing and the tidying are tier/node_disk.py's, in the tier's threads. Alone a snapshot is durable when it is on
the disk; where worlds span nodes, when it is on the disks of all of them, as the job's collector says.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from operator import attrgetter
from threading import Event
from typing import Any

from snapd.core.ids import SnapshotId
from snapd.core.ledger import SnapshotFacts
from snapd.core.node_disk import held_to_let_go, whole_parts
from snapd.core.reports import FlushNews
from snapd.core.restore import Decision, Outcome, Verdict
from snapd.core.tier_choice import Ask, TierFacts, how_to_ask, merged, unreachable
from snapd.errors import ConflictError, SnapdError, UnavailableError
from snapd.runtime.disk_filling import DiskFill, fill_from_disk
from snapd.runtime.disk_tier import DiskTier
from snapd.runtime.flush_choosing import FlushChooser
from snapd.runtime.flush_loop import FlushLoop, LoopEvents
from snapd.runtime.flush_report import FlushReport
from snapd.runtime.job import Job
from snapd.tier.flush import Stage
from snapd.tier.node_disk import DiskLook, DiskWritten

EVENTS = LoopEvents("disk.paused", "disk.goes_on", "disk.again", "disk.overtaken")
OPEN_WAIT_S = 3.0  # an OpenSession waits so long for the disk to say which generations it has


class JobDisk(FlushLoop[DiskWritten]):
    """One per job and node with a disk of its own. Implements `disk_part.DiskPart`."""

    def __init__(self, job: Job, tier: DiskTier) -> None:
        self.tier = tier
        chooser = FlushChooser(job, tier.settings.rules, None, attrgetter("node_flush"))
        super().__init__(EVENTS, job, chooser, tier.metrics)
        self._disk = tier.job(job.name)
        self.look: DiskLook | None = None  # None: it was not looked at yet
        self.fill = DiskFill()
        self._everywhere: SnapshotId | None = None  # on the disks of all nodes of the world
        self._noted_generation = 0
        self._is_rotten = False  # something on the disk is bad, and it may be mended
        self._began_s = job.context.environment.monotonic_s()
        self._learning = asyncio.Lock()
        tier.metrics.rotten.labels(job=job.name).set_function(lambda: float(len(self.damages)))

    # what others ask

    @property
    def damages(self) -> list[str]:
        """What on the disk is known to be bad, in words."""
        return self._disk.damages

    def note_rotten(self) -> None:
        """Something on the disk was found to be bad."""
        self._is_rotten = True
        self.job.changes.notify()

    @property
    def durable(self) -> SnapshotId | None:
        """The newest snapshot that is on the disks of all nodes that have it."""
        return self.here if self.job.world is None else self._everywhere

    @property
    def here(self) -> SnapshotId | None:
        """The newest one on this node's disk."""
        return self._chooser.durable

    def is_durable(self, snapshot: SnapshotId) -> bool:
        return self.durable is not None and self.durable >= snapshot

    def news(self) -> FlushNews:
        return self._news()

    def note_durable(self, snapshot: SnapshotId | None) -> None:
        """The collector says so."""
        if snapshot is not None and (self._everywhere is None or snapshot > self._everywhere):
            self._everywhere = snapshot
            self.job.changes.notify()

    @property
    def is_filled(self) -> bool:
        """What memory lacked was brought, or cannot be."""
        return self._is_learnt

    @property
    def is_hiding(self) -> bool:
        """Memory has nothing of the job, and what the disk has is not known yet."""
        if self._is_learnt or not self.job.ledger.snapshots:
            return not self._is_learnt
        elapsed_s = self.job.context.environment.monotonic_s() - self._began_s
        is_soon = (
            self.is_looked_at or elapsed_s < self.tier.settings.wait_s
        )  # a disk that hangs raises nothing
        return self.trouble is None and is_soon

    @property
    def is_looked_at(self) -> bool:
        return self.look is not None

    def check_generation(self, generation: int) -> None:
        floor = self._chooser.floor  # what the disk had before this memory knew it
        if floor is None or generation > floor:
            return
        self.job.coordination.start_above(floor)
        raise ConflictError(
            f"{self.tier.description} has snapshots of generation {floor}; this start was numbered"
            f" {generation} before that was known",
            kind="tier_generation",
            hint="start the trainer again: it gets a number above them",
            job=self.job.name,
        )

    @property
    def newest_stored(self) -> SnapshotId | None:
        """The newest that the disk has or had whole, good or bad; None also while it was not looked at."""
        look = self.look
        return max([*look.shards, *look.problems], default=None) if look is not None else None

    @property
    def chunk_bytes(self) -> int:
        """Of what the disk has; 0: nothing, or not known."""
        look = self.look
        if look is None or not look.shards:
            return 0
        return next(iter(look.shards[max(look.shards)].values())).chunk_bytes

    # before a start, and before a restore

    async def before_opening(self) -> None:
        """A generation is about to be given out: it must be above all that the disk has. Waits a little."""
        if self.look is None:
            with contextlib.suppress(SnapdError, TimeoutError):
                async with asyncio.timeout(OPEN_WAIT_S):
                    await asyncio.shield(self.job.context.keep(self._look_once()))
        elif self.fill.has_no_room and self._is_learnt:  # there may be room by now
            self._is_learnt, self.look = False, None
            self.job.changes.notify()

    def may_have_newer(self, memory: Decision, *, step: int | None) -> bool:
        if self._is_learnt and self._has_better(memory):
            self._is_learnt, self.look = False, None
            self.job.changes.notify()
            return True
        if self._is_learnt:
            return bool(self.fill.problems)
        return self._how_to_ask(memory, step) is Ask.MUST

    def _has_better(self, memory: Decision) -> bool:
        """Alone: memory has lost something newer that is on the disk, and could not have it back at that moment."""
        on_disk = {
            self.here,
            *(self.look.shards if self.look is not None else ()),
        } - self.fill.problems.keys()
        is_lost = any(
            verdict.verdict == "unusable"
            and verdict.id in on_disk
            and (memory.chosen is None or verdict.id > memory.chosen)
            for verdict in memory.verdicts
        )
        return is_lost and self.job.world is None

    def _common(self) -> SnapshotId | None:
        """In a cluster: the newest that the disks of all nodes are known to have. What this start went on from is
        one: it was whole somewhere, and may be all that they have in common.
        """
        if self.job.world is None:
            return None
        return max((one for one in (self._everywhere, self._parent()) if one is not None), default=None)

    def _parent(self) -> SnapshotId | None:
        """What the current generation has gone on from; None: it has not restored yet, or nothing."""
        generation = self.job.coordination.generation(self.job.coordination.current())
        return generation.parent if generation is not None else None

    def _how_to_ask(self, memory: Decision, step: int | None) -> Ask:
        """By the rule for any tier: what is on the disk was complete in memory first. Nobody else writes there."""
        facts = TierFacts(floor=self._kept_floor(), newest=self.here, idle_s=0.0)
        return how_to_ask(memory, facts, step=step)[0]

    async def wait_filled(self) -> str:
        wait_s = self.tier.settings.wait_s
        if not await self.job.changes.wait_until(lambda: self._is_learnt or self.job.is_removed, wait_s):
            if self.trouble is not None:
                return self.trouble.reason
            done, total = self.fill.nbytes_done, self.fill.nbytes_total
            what = f"the node's disk is being read into memory: {done} of {total} bytes"
            raise UnavailableError(what, kind="settling", hint="ask again", job=self.job.name)
        return ""

    def add_verdicts(self, memory: Decision) -> Decision:
        bad = [Verdict(snapshot, "unusable", text) for snapshot, text in self.fill.problems.items()]
        if memory.outcome in (Outcome.FOUND, Outcome.WORLD_SIZE_DIFFERS) and memory.chosen is not None:
            bad = [verdict for verdict in bad if verdict.id > memory.chosen]
        return merged(memory, bad) if bad else memory

    def doubt(self, decision: Decision, away: str, *, step: int | None, accept_older: bool) -> Decision:
        if accept_older and decision.outcome is Outcome.FOUND:
            return decision
        is_needed = self._how_to_ask(decision, step) is Ask.MUST
        return unreachable(decision, (), self.tier.description, away) if is_needed else decision

    # what the tier adds to the loop

    def _floor_key(self) -> str:
        return f"disk:{self.tier.identity}"

    def _kept_floor(self) -> int | None:
        """As it was learnt once, of whichever disk of this node."""
        floors = [floor for key, floor in self.job.index.tier_floors().items() if key.startswith("disk:")]
        return max(floors, default=None)

    async def _look_once(self) -> None:
        """What the disk has; and no generation from now on is one of its."""
        async with self._learning:
            if self.look is None:
                job = self.job
                look = await self.tier.ask(self._disk.look)
                job.coordination.start_above(look.generation)
                if not job.is_removed:
                    floor = job.index.tier_floors().get(self._floor_key())
                    if floor is None:
                        floor = look.generation
                        job.index.set_tier_floor(self._floor_key(), floor)
                    self._chooser.floor = floor
                self._noted_generation = look.generation
                self.look = look
                job.changes.notify()

    async def _learn(self) -> None:
        """What the disk has comes into memory."""
        job, fill = self.job, self.fill
        await self._look_once()
        look = self.look
        if job.is_removed or look is None:
            return
        began_s = job.context.environment.monotonic_s()
        await fill_from_disk(self.tier, job, look, fill)
        whole = whole_parts(look.parts, is_alone=self.tier.settings.is_alone)
        self._chooser.brought.update(fill.held)
        self._chooser.note_durable(next((each for each in whole if each not in fill.problems), None))
        self._is_learnt = True
        self._failures = 0
        self._tell(None)
        if look.shards or look.problems:
            job.context.log.info(
                "disk.filled",
                job=job.name,
                generation=look.generation,
                brought=[str(snapshot) for snapshot in fill.held],
                unusable=[str(snapshot) for snapshot in fill.problems],
                seconds=round(job.context.environment.monotonic_s() - began_s, 3),
            )
            if not fill.problems:
                await self.tier.ask(self._disk.tidy, self._common())
        self._is_rotten = bool(self._disk.rotten)
        job.changes.notify()

    def _has_chore(self) -> bool:
        is_new = self.job.coordination.current() > self._noted_generation
        return is_new or self._is_rotten or not self._is_learnt or bool(self._held_to_let_go())

    async def _step(self) -> None:
        if not self._is_learnt:
            return
        if surplus := self._held_to_let_go():
            self._let_go_of(surplus)
        current = self.job.coordination.current()
        if current > self._noted_generation:
            await self.tier.ask(self._disk.note_generation, current)
            self._noted_generation = current
        if self._is_rotten:
            await self._mend()
        await super()._step()

    async def _mend(self) -> None:
        """What is bad on the disk is written again from memory; of what cannot be, a newer snapshot takes the place."""
        job, log = self.job, self.job.context.log
        facts = job.ledger.snapshots.get(self.newest) if self.newest is not None else None
        stop = Event()
        self._is_rotten = False  # what is found meanwhile is mended next
        if facts is not None:
            job.ledger.hold(facts.id)
        try:
            shards = self._shards(facts) if facts is not None else []
            mended = await self.tier.flush(self._disk.mend, shards, stop)
            look = await self.tier.ask(self._disk.look)
        except SnapdError:
            self._is_rotten = True
            raise
        finally:
            stop.set()
            if facts is not None:
                job.ledger.unhold(facts.id)
                job.settle()
        if mended.chunks:
            self.tier.metrics.mended_chunks.inc(mended.chunks)
            log.info(
                "disk.mended",
                job=job.name,
                chunks=mended.chunks,
                nbytes=mended.nbytes,
                manifests=mended.manifests,
                left=mended.left,
            )
        if mended.left:
            whole = whole_parts(look.parts, is_alone=self.tier.settings.is_alone)
            newest = whole[0] if whole else None
            if self.here is not None and (newest is None or newest < self.here):
                log.warning(
                    "disk.behind_again", job=job.name, lost=str(self.here), whole=str(newest or "none")
                )
                self._chooser.note_lost(newest)
        self._failures = 0
        job.changes.notify()

    def _held_to_let_go(self) -> list[SnapshotId]:
        """Of what was brought: memory is kept for the others until something newer is complete."""
        if not self.fill.held:
            return []
        slots = [session.row.slots for session in self.job.served_sessions()]
        return held_to_let_go(
            self.fill.held,
            newest=self.newest,
            parent=self._parent(),
            slots=min(slots, default=len(self.fill.held) + 1),
        )

    def _let_go_of(self, snapshots: Sequence[SnapshotId]) -> None:
        for snapshot in snapshots:
            self.fill.held.remove(snapshot)
            if snapshot in self.job.ledger.snapshots:
                self.job.ledger.unhold(snapshot)
        self.job.settle()

    def _flush(
        self, facts: SnapshotFacts, stop: Event, stage: Stage, own_done: Callable[[], None]
    ) -> Coroutine[Any, Any, DiskWritten]:
        shards = self._shards(facts)
        return self.tier.flush(
            self._disk.write, facts.id, shards, stop=stop, stage=stage, own_done=own_done, common=self._common
        )

    def _done(self, facts: SnapshotFacts, done: DiskWritten) -> None:
        job, metrics, counts = self.job, self.tier.metrics, done.counts
        seconds = job.context.environment.monotonic_s() - self._chooser.began_s
        self._chooser.note_durable(facts.id)
        self.last = FlushReport(
            snapshot=facts.id,
            nbytes=counts.raw_nbytes + done.reused_nbytes,
            raw_nbytes=counts.raw_nbytes,
            stored_nbytes=counts.stored_nbytes,
            reused_nbytes=done.reused_nbytes,
            packs=counts.packs,
            shards_resumed=0,
            seconds=seconds,
            requests={},
        )
        metrics.snapshots.inc()
        metrics.raw_bytes.inc(counts.raw_nbytes)
        metrics.reused_bytes.inc(done.reused_nbytes)
        metrics.seconds.inc(max(0.0, seconds))
        self._is_rotten = bool(self._disk.rotten)  # what was written just now may mend more
        job.context.log.info(
            "disk.kept",
            job=job.name,
            generation=facts.id.generation,
            step=facts.id.step,
            written_nbytes=counts.raw_nbytes,
            reused_nbytes=done.reused_nbytes,
            dropped=[str(snapshot) for snapshot in done.dropped],
            seconds=round(seconds, 3),
        )

    # its end

    def _let_go(self) -> None:
        super()._let_go()
        with contextlib.suppress(KeyError):
            self.tier.metrics.rotten.remove(self.job.name)

    async def forget(self) -> None:
        """All of the job on the disk goes, now or when the disk is there again while this daemon lives."""
        self._disk.doom()
        await self._finish(self._disk.finish)

    async def keep_ended(self) -> None:
        """The job was closed for good; what it ended with stays on the disk."""
        await self._finish(self._disk.note_ended)

    async def _finish(self, work: Callable[[], None]) -> None:
        try:
            await self.tier.flush(work)
        except SnapdError as error:
            self.job.context.log.warning(
                "disk.not_tidied", job=self.job.name, kind=error.kind, reason=error.message
            )
