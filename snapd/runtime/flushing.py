"""One job's way to the shared tier on this node: which generations and snapshots it has, and each flush to its commit.

The work itself is tier/flush.py's, in the tier's threads; what is common to all tiers is flush_loop.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from snapd.core.ids import SnapshotId
from snapd.core.ledger import SnapshotFacts
from snapd.core.reports import FlushNews
from snapd.core.stored import Spot
from snapd.errors import SnapdError
from snapd.runtime.flush_choosing import FlushChooser
from snapd.runtime.flush_loop import FlushLoop, LoopEvents
from snapd.runtime.flush_report import count_report, log_fields, report_of
from snapd.runtime.job import Job
from snapd.runtime.tier_access import TierAccess
from snapd.runtime.tiers import NodeTier
from snapd.tier.flush import Flushed, Stage, TierWriter
from snapd.tier.writing import ShardBytes

LOOKED_S = 10.0  # what the tier has is not looked at again so soon: all ranks of a node open at once
EVENTS = LoopEvents("flush.paused", "flush.goes_on", "flush.again", "flush.overtaken")
OPEN_WAIT_S = 3.0  # an OpenSession waits so long for the tier to say which generations it has


class JobFlusher(FlushLoop[Flushed]):
    """One per job and node with a shared tier. Implements `job.FlushPart`. `reading`: how this daemon reads the same
    tier, if it does.
    """

    def __init__(self, job: Job, tier: NodeTier, reading: TierAccess | None = None) -> None:
        self.tier = tier
        self._reading = reading
        floor = job.index.tier_floors().get(tier.settings.url)
        chooser = FlushChooser(job, tier.settings.rules, floor)
        super().__init__(EVENTS, job, chooser, tier.metrics)
        self._writer: TierWriter | None = None
        self._writer_name = self._name_writer()
        self._looked_at_s = -math.inf
        self._is_hurried = False
        self._before: dict[str, int] = {}
        self._learning = asyncio.Lock()
        if floor is not None:
            job.coordination.start_above(floor)

    def _name_writer(self) -> str:
        """A name that stays with this arena: by it a daemon finds what one before it has written."""
        index = self.job.index
        token = index.tier_writer()
        if not token:
            token = self.job.context.environment.random_token()
            index.set_tier_writer(token)
        return f"{self.tier.node}/{token}"

    # what others ask

    @property
    def durable(self) -> SnapshotId | None:
        return self._chooser.durable

    def is_durable(self, snapshot: SnapshotId) -> bool:
        return self._chooser.is_durable(snapshot)

    def news(self) -> FlushNews:
        return self._news()

    def note_durable(self, snapshot: SnapshotId | None) -> None:
        """The collector says so."""
        if self._chooser.note_durable(snapshot):
            self.job.changes.notify()

    async def before_opening(self) -> None:
        """A generation is about to be given out: it must be above all that the tier has, also what another machine has
        written since we looked. Waits a little; when the tier does not answer, the generation may turn out to be too
        low, and then it is not flushed.
        """
        if self._looked_at_s + LOOKED_S < self.job.context.environment.monotonic_s():
            with contextlib.suppress(SnapdError, TimeoutError):
                async with asyncio.timeout(OPEN_WAIT_S):
                    await asyncio.shield(self.job.context.keep(self._learn()))

    async def confirm(self) -> None:
        """See that the tier still has what is called durable here: somebody may have put an older state of it back.
        Then memory's newest becomes durable anew. Waits a little; a tier that does not answer proves nothing.
        """
        durable = self._chooser.durable
        if durable is None or not self._is_learnt or self.job.world is not None:
            return  # in a world it is the collector that says what is durable
        with contextlib.suppress(SnapdError, TimeoutError):
            async with asyncio.timeout(OPEN_WAIT_S):
                await asyncio.shield(self.job.context.keep(self._confirm(durable)))

    async def _confirm(self, durable: SnapshotId) -> None:
        found = await self.tier.ask(self.tier.newest_listed, self.job.name)
        if self._chooser.durable != durable or (found is not None and found >= durable):
            return
        self._chooser.note_lost(found)
        there = f"its newest is {found}" if found is not None else "it has nothing"
        self.job.context.log.warning(
            "flush.lost",
            job=self.job.name,
            snapshot=str(durable),
            reason=f"{self.tier.settings.url} had it, and now {there}: memory's newest is written again",
        )
        self.job.changes.notify()

    # what the tier adds to the loop

    async def _learn(self) -> None:
        """What the tier has of this job: above which generation it may write, and what is durable already."""
        asked_at_s = self.job.context.environment.monotonic_s()
        async with self._learning:
            if self._looked_at_s >= asked_at_s:
                return  # somebody has looked while we waited
            job, url = self.job, self.tier.settings.url
            began_s = job.context.environment.monotonic_s()
            view = await self.tier.ask(self.tier.view, job.name)
            if self._chooser.floor is None:
                floor = await job.coordination.agree_tier_floor(url, view.highest_generation)
                if job.is_removed:
                    return
                job.index.set_tier_floor(url, floor)
                self._chooser.floor = floor
                job.context.log.info("tier.learnt", job=job.name, generation=floor)
            job.coordination.start_above(view.highest_generation)
            self._chooser.note_durable(view.newest)
            self._looked_at_s = began_s
            if not self._is_learnt:
                self._is_learnt = True
                self._failures = 0
                self._tell(None)
        self.job.changes.notify()

    def _take_failure(self, error: SnapdError, current: SnapshotId | None) -> bool:
        if error.kind == "tier_void" and current is not None:
            self._chooser.dropped.add(current)
        if error.kind == "tier_conflict":
            self._looked_at_s = -math.inf  # the next start of the job must be above what is there by now
        return error.kind == "tier_condemned" and self._failures == 1

    def _is_committed_elsewhere(self, snapshot: SnapshotId) -> bool:
        if self.durable != snapshot:
            return False
        if not self._is_hurried:  # its record is looked for now, not later
            self._is_hurried = True
            self._stage.look_now.set()
        return True

    def _flush(
        self, facts: SnapshotFacts, stop: threading.Event, stage: Stage, own_done: Callable[[], None]
    ) -> Coroutine[Any, Any, Flushed]:
        self._is_hurried = False
        self._before = self.tier.count_requests()
        shards = self._shards(facts)
        return self.tier.flush(self._write, facts.id, facts.world_size, shards, stop, stage, own_done)

    def _write(
        self,
        snapshot: SnapshotId,
        world_size: int,
        shards: Sequence[ShardBytes],
        stop: threading.Event,
        stage: Stage,
        own_done: Callable[[], None],
    ) -> Flushed:
        """In a flush thread."""
        if self._writer is None:
            means = self.tier.flush_means()
            self._writer = TierWriter(means, self.job.name, self._writer_name, self._proved_bad)
        # where a world spans nodes, others commit, and the collector says so a little later
        is_known = self._chooser.is_durable if self.job.world is None else lambda snapshot: True
        return self._writer.flush(
            snapshot, world_size, shards, stop=stop, stage=stage, own_done=own_done, is_known=is_known
        )

    def _proved_bad(self) -> frozenset[Spot]:
        """What restores and repairs of this daemon found bad in the tier: it is written anew."""
        return self._reading.proved_bad(self.job.name) if self._reading is not None else frozenset()

    def _done(self, facts: SnapshotFacts, done: Flushed) -> None:
        job = self.job
        seconds = job.context.environment.monotonic_s() - self._chooser.began_s
        self.last = report_of(facts.id, done, self._before, self.tier.count_requests(), seconds)
        self._chooser.note_durable(facts.id)
        count_report(self.tier.metrics, self.last, is_ours=done.is_ours)
        fields = log_fields(self.last)
        job.context.log.info("snapshot.durable", job=job.name, is_ours=done.is_ours, **fields)
