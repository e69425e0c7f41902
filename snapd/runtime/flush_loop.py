"""One job's way to a durable tier on this node, whichever tier it is: what is flushed, and what holds it up.

On the event loop; the writing itself is done in the tier's threads. A snapshot is held in memory until this node's part
of it is in the tier. Nothing here is ever waited for by training.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from prometheus_client import Counter, Gauge

from snapd.core.flushing import FlushChoice
from snapd.core.ids import SnapshotId
from snapd.core.ledger import SnapshotFacts
from snapd.core.reports import FlushNews
from snapd.core.tier_failures import may_pass
from snapd.errors import InternalError, NotFoundError, SnapdError
from snapd.runtime.flush_choosing import STUCK_AFTER_S, FlushChooser
from snapd.runtime.flush_report import FlushReport
from snapd.runtime.job import Job
from snapd.runtime.restoring import verify_soon
from snapd.runtime.tiers import Trouble, retry_s
from snapd.tier.flush import Stage
from snapd.tier.writing import ShardBytes, Stopped

WATCH_S = 0.25
LOOK_S = 60.0
PRESSING_RETRY_S = 1.0  # little time is left, or somebody waits to hear whether it is refused for good
Done = TypeVar("Done")


class LevelMetrics(Protocol):
    """What every tier counts."""

    overtaken: Counter
    failures: Counter
    paused: Gauge
    behind_seconds: Gauge


@dataclass(frozen=True, slots=True)
class LoopEvents:
    """What a tier's events are called."""

    paused: str
    goes_on: str
    again: str
    overtaken: str


class FlushLoop(ABC, Generic[Done]):
    """One per job, node and tier. `Done`: what a flush gives."""

    def __init__(self, events: LoopEvents, job: Job, chooser: FlushChooser, metrics: LevelMetrics) -> None:
        self.job = job
        self.trouble: Trouble | None = None
        self.last: FlushReport | None = None
        self._events, self._chooser, self._metrics = events, chooser, metrics
        self._stage = Stage()
        self._stop: threading.Event | None = None
        self._is_learnt = False
        self._told_news = FlushNews()
        self._failures = 0
        metrics.behind_seconds.labels(job=job.name).set_function(self.behind_s)
        metrics.paused.labels(job=job.name).set_function(lambda: float(self.trouble is not None))
        job.on_removed.append(self._let_go)

    # what a tier adds

    @abstractmethod
    async def _learn(self) -> None:
        """What the tier has of the job, before anything is written."""

    @abstractmethod
    def _flush(
        self, facts: SnapshotFacts, stop: threading.Event, stage: Stage, own_done: Callable[[], None]
    ) -> Coroutine[Any, Any, Done]:
        """Write this node's part, in a thread; `own_done`: memory is needed no more; from any thread."""

    @abstractmethod
    def _done(self, facts: SnapshotFacts, done: Done) -> None:
        """It ended well."""

    @abstractmethod
    def news(self) -> FlushNews:
        """What the job's collector is told."""

    def _take_failure(self, error: SnapdError, current: SnapshotId | None) -> bool:
        """What an error means to this tier; True: it is none that anybody should hear of."""
        return False

    def _has_chore(self) -> bool:
        """Something besides flushing is to be done."""
        return False

    def _is_committed_elsewhere(self, snapshot: SnapshotId) -> bool:
        """Another node has ended what is being flushed here: it ends by itself."""
        return False

    # what others ask

    @property
    def newest(self) -> SnapshotId | None:
        """The newest snapshot that could become durable."""
        return self._chooser.newest

    @property
    def reason(self) -> str:
        """What is being done, or what it waits for, in words."""
        if self.trouble is not None:
            return f"paused: {self.trouble.reason}"
        if self._stop is not None:
            return f"{self._chooser.current}: {self._stage.text}"
        return self._choose().reason

    def behind_s(self) -> float:
        """Since the newest durable snapshot was captured."""
        return self._chooser.behind_s()

    def progress(self) -> tuple[int, int]:
        """(bytes of chunks that are in packs, of so many) of the flush under way."""
        return (self._stage.counts.raw_nbytes, self._stage.nbytes_total) if self._stop is not None else (0, 0)

    def request(self, snapshot: SnapshotId, *, is_again: bool = False) -> None:
        """Have it, or a newer one, become durable now. What refuses us is tried anew at once, unless `is_again`:
        the same wait goes on. What may pass is tried at its own pace.
        """
        is_news = self._chooser.want(snapshot)
        is_refused = self.trouble is not None and not may_pass(self.trouble.kind)
        if is_refused and not is_again and not self._chooser.is_ending:
            self._chooser.urge()
            is_news = True
        if is_news:
            self.job.changes.notify()

    def finish(self) -> None:
        """This node goes away: have the newest become durable."""
        self._chooser.is_ending = True
        self._chooser.urge()
        self.job.changes.notify()

    def is_behind(self) -> bool:
        """Whether the newest complete snapshot may still become durable, and is not."""
        return self._chooser.is_behind()

    @property
    def is_hopeless(self) -> bool:
        """Since the last `finish` or `request` it failed in a way that waiting does not mend."""
        return self._chooser.is_hopeless

    def is_refused(self, snapshot: SnapshotId) -> bool:
        """It is complete, and waiting does not help: a person has to mend what `reason` says."""
        newest = self.newest
        if newest is None or newest < snapshot:
            return False
        if self.job.world is not None and newest not in self.job.ledger.snapshots:
            return False  # other nodes bring it there
        return self._chooser.is_hopeless or self._chooser.is_barred

    async def wait_newest_durable(self) -> None:
        """The job has ended: returns when its newest snapshot is durable, or never will be, or the job goes on."""
        job, generation = self.job, self.job.coordination.current()
        if self.is_behind() and self.newest is not None:
            job.context.log.info("job.kept", job=job.name, reason="its newest snapshot is not durable yet")
            self.request(self.newest)

        def is_over() -> bool:
            return job.is_removed or not self.is_behind() or job.coordination.current() > generation

        while not await job.changes.wait_until(is_over, LOOK_S):
            pass

    # the loop

    async def run(self) -> None:
        """Until the job is removed."""
        while not self.job.is_removed:
            try:
                if not self._is_learnt:
                    await self._learn()
                await self._step()
            except Stopped:
                continue
            except InternalError:
                raise
            except SnapdError as error:
                await self._failed(error)

    async def _step(self) -> None:
        choice = self._choose()
        self._note_pause(choice)
        self._tell_collector()
        if choice.snapshot is None:
            wait_s = LOOK_S if choice.due_s is None else min(LOOK_S, choice.due_s)
            await self.job.changes.wait_until(self._is_news_for(choice), wait_s)
            return
        await self._attempt(choice.snapshot)
        self._failures = 0

    def _is_news_for(self, choice: FlushChoice) -> Callable[[], bool]:
        def is_news() -> bool:
            now = self._choose()
            self._tell_collector()
            is_changed = now.snapshot is not None or now.pause != choice.pause
            return self.job.is_removed or is_changed or self._has_chore()

        return is_news

    def _note_pause(self, choice: FlushChoice) -> None:
        if choice.pause:
            self._tell(Trouble(choice.pause, choice.reason))
        elif self._failures == 0:
            self._tell(None)

    def _tell(self, trouble: Trouble | None) -> None:
        """Log what has changed; a reason that stays is told once."""
        before, self.trouble = self.trouble, trouble
        log, name = self.job.context.log, self.job.name
        if trouble is not None and (before is None or before.kind != trouble.kind):
            log.warning(self._events.paused, job=name, kind=trouble.kind, reason=trouble.reason)
        elif trouble is None and before is not None:
            log.info(self._events.goes_on, job=name)
        if before != trouble:
            self.job.changes.notify()

    async def _failed(self, error: SnapdError) -> None:
        """Say why, and wait before the next attempt."""
        self._failures += 1
        self._chooser.note_failed(error.kind)
        self._tell_collector()
        self._metrics.failures.labels(kind=error.kind).inc()
        current = self._chooser.current
        if error.kind == "chunk_digest" and current is not None:
            self._doubt(current, error)
        if self._take_failure(error, current):
            self.job.context.log.info(self._events.again, job=self.job.name, reason=error.message)
        else:
            self._tell(Trouble.of(error))
        if self._chooser.is_hopeless:
            self.job.changes.notify()
        urged = self._chooser.urged

        def is_over() -> bool:
            return self.job.is_removed or self._chooser.urged != urged

        is_pressing = self._chooser.is_ending or self._chooser.is_to_be_confirmed
        wait_s = retry_s(self._failures)
        await self.job.changes.wait_until(is_over, min(wait_s, PRESSING_RETRY_S) if is_pressing else wait_s)

    def _doubt(self, snapshot: SnapshotId, error: SnapdError) -> None:
        """Memory does not have what was recorded: look at all of the snapshot, mend it or condemn it."""
        facts = self.job.ledger.snapshots.get(snapshot)
        rank = error.context.get("rank")
        if facts is not None and isinstance(rank, int) and rank in facts.shards:
            facts.shards[rank].is_verified = False
        if facts is not None:
            verify_soon(self.job, snapshot)

    # choosing

    def _choose(self) -> FlushChoice:
        return self._chooser.choose(self._stuck())

    def _stuck(self) -> str:
        if self._stop is None:
            return self.trouble.reason if self.trouble is not None and self._failures else ""
        waits_s = self.job.context.environment.monotonic_s() - self._stage.waits_since_s
        return self._stage.text if self._stage.is_waiting and waits_s > STUCK_AFTER_S else ""

    def _news(self) -> FlushNews:
        is_busy = self._stop is not None and not self._stage.is_waiting
        self._told_news = self._chooser.news(self._stuck(), is_busy=is_busy)
        return self._told_news

    def _tell_collector(self) -> None:
        """Where there is news for it."""
        before = self._told_news
        if self.job.world is not None and self.news() != before:
            self.job.world.changed()

    # flushing

    async def _attempt(self, snapshot: SnapshotId) -> None:
        """One attempt at a snapshot, to its end."""
        job = self.job
        facts = job.ledger.snapshots.get(snapshot)
        if facts is None:
            raise NotFoundError(
                f"snapshot {snapshot} has been dropped meanwhile", kind="snapshot", job=job.name
            )
        self._chooser.begin(snapshot)
        stop, stage = threading.Event(), Stage()
        self._stop, self._stage = stop, stage
        loop = asyncio.get_running_loop()
        is_held = True
        job.ledger.hold(snapshot)

        def let_go() -> None:
            nonlocal is_held
            if is_held:
                is_held = False
                job.ledger.unhold(snapshot)
                job.settle()

        def own_done() -> None:
            loop.call_soon_threadsafe(let_go)

        work = asyncio.ensure_future(self._flush(facts, stop, stage, own_done))
        try:
            while not work.done():
                await asyncio.wait([work], timeout=WATCH_S)
                self._watch(snapshot, stop)
            done = work.result()
        finally:
            stop.set()
            work.cancel()  # of no consequence when it is done; its thread ends by `stop`
            self._stop = None
            let_go()
        self._done(facts, done)
        self._chooser.current = None
        self._failures = 0
        self._tell(None)
        job.changes.notify()
        if job.world is not None:
            job.world.changed()

    def _shards(self, facts: SnapshotFacts) -> list[ShardBytes]:
        """This node's shards. The parent is as coordination has it now: a shard may have been captured before its node
        heard of it.
        """
        job = self.job
        generation = job.coordination.generation(facts.id.generation)
        found = []
        for rank, shard in sorted(facts.shards.items()):
            record = shard.record
            if generation is not None and generation.parent is not None:
                record = replace(record, parent=generation.parent)
            found.append(ShardBytes(record, job.arenas[rank].memory))
        return found

    def _watch(self, snapshot: SnapshotId, stop: threading.Event) -> None:
        """Call the attempt off when it makes no sense any more."""
        if stop.is_set():
            return
        self._tell_collector()
        if self.job.is_removed:
            stop.set()
            return
        if self._is_committed_elsewhere(snapshot):
            return
        choice = self._choose()
        is_overtaken = choice.snapshot is not None and choice.snapshot != snapshot
        if is_overtaken or self._chooser.is_durable(snapshot):
            self._metrics.overtaken.inc()
            self.job.context.log.info(
                self._events.overtaken, job=self.job.name, snapshot=str(snapshot), reason=choice.reason
            )
            stop.set()

    def _let_go(self) -> None:
        """The job was removed."""
        if self._stop is not None:
            self._stop.set()
        for gauge in (self._metrics.behind_seconds, self._metrics.paused):
            with contextlib.suppress(KeyError):
                gauge.remove(self.job.name)
