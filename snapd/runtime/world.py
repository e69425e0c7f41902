"""One job on this node as a part of its world: what it reports to the collector, and what it does with the orders.

A node without ranks of the job takes part too when its group protects some: it then holds parity and records.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from snapd.core.cluster import GroupTable
from snapd.core.ending import is_gone, orders_without, told_without
from snapd.core.ids import SnapshotId
from snapd.core.interval import Interval
from snapd.core.obeying import counts_on, snapshots_to_drop
from snapd.core.recovery import HeldRows, Inventory
from snapd.core.reports import FlushNews, Held, NodeReport, Orders, PartDone, Told
from snapd.errors import CapacityError, SnapdError
from snapd.runtime.job import Job
from snapd.runtime.peers import ReportAnswer
from snapd.runtime.restoring import condemn

HOLD_S = 5.0
RETRY_S = 0.5
IDLE_S = 5.0
HEAR_EVERY_S = 1.0  # beyond it the collector's answer is waited for, whatever news there are
GATHER_S = 0.01  # facts that come together are reported together
AWAY_AFTER_S = 5.0


class Protection(Protocol):
    """This node's part in protecting one job (runtime/protecting.py behind it)."""

    def aim(self, job: Job, target: SnapshotId | None, table: GroupTable | None) -> None:
        """The snapshot to protect from now on; None: none. Returns at once."""

    def forget(
        self, job: Job, keep: set[SnapshotId], *, protected: SnapshotId | None, protected_epoch: int
    ) -> None:
        """Parity, records and row maps of snapshots older than the protected one may go, but for those in `keep`; and
        what epochs before `protected_epoch`, under which it is everywhere, made of the protected one.
        """

    def done(self, job: Job) -> tuple[PartDone, ...]: ...

    def held_rows(self, job: Job) -> tuple[HeldRows, ...]: ...

    def trouble(self, job: Job) -> str: ...


class Reporter(Protocol):
    """Who takes a report to the collector, wherever that is."""

    async def report(
        self, job: str, report: NodeReport, *, known_orders: int, hold_s: float
    ) -> ReportAnswer: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """This daemon, as reports name it."""

    node: str
    instance: int
    epoch: Callable[[], int]
    table: Callable[[], GroupTable | None]
    monotonic_s: Callable[[], float]


class World:
    """One per job that this node has to do with. Single-threaded, on the event loop."""

    def __init__(
        self,
        name: str,
        here: Here,
        reporter: Reporter,
        protection: Protection,
        *,
        find_job: Callable[[], Job | None],
        make_job: Callable[[], Job],
    ) -> None:
        self.name = name
        self.orders = Orders()
        self.collector = ""
        self._here = here
        self._reporter = reporter
        self._protection = protection
        self._find_job = find_job
        self._make_job = make_job
        self._serial = 0
        self._changed = asyncio.Event()
        self._heard_at_s = here.monotonic_s()
        self.away_reason = ""
        self._told = Told()
        self._is_told_read = False
        self._removed_through = 0

    # reporting

    def changed(self) -> None:
        """Something that a report says may have changed."""
        self._changed.set()

    @property
    def is_away(self) -> bool:
        """The collector has not been heard for a while."""
        return self._here.monotonic_s() - self._heard_at_s > AWAY_AFTER_S

    async def run(self) -> None:
        """Report and obey until cancelled."""
        while True:
            self._changed.clear()
            report = self._report()
            # an answer that takes longer than news to come would be given up for them again and again
            is_due = self._here.monotonic_s() - self._heard_at_s > HEAR_EVERY_S
            hold_s = 0.0 if is_due else HOLD_S
            asking = asyncio.ensure_future(
                self._reporter.report(self.name, report, known_orders=self.orders.number, hold_s=hold_s)
            )
            try:
                answer = await asking if is_due else await self._answer_or_news(asking, report)
            except SnapdError as error:
                self.away_reason = error.message
                await self._pause()
                continue
            finally:
                asking.cancel()
            if answer is not None:
                self._heard_at_s = self._here.monotonic_s()
                self.away_reason = ""
                self.collector = answer.collector
                self.obey(answer.orders)

    async def _pause(self) -> None:
        """Before the collector is asked again. A job that is not here is of interest when something happens to it."""
        if self._find_job() is not None:
            await asyncio.sleep(RETRY_S)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(IDLE_S):
                await self._changed.wait()
        await asyncio.sleep(GATHER_S)

    async def _answer_or_news(
        self, asking: asyncio.Future[ReportAnswer], report: NodeReport
    ) -> ReportAnswer | None:
        """The collector's answer, or None when there is something new to report before it came."""
        while True:
            news: asyncio.Future[Any] = asyncio.ensure_future(self._changed.wait())
            await asyncio.wait([asking, news], return_when=asyncio.FIRST_COMPLETED)
            news.cancel()
            if asking.done():
                return asking.result()
            await asyncio.sleep(GATHER_S)
            self._changed.clear()
            if asking.done():
                self._changed.set()
                return asking.result()
            if not _says_the_same(self._build(), report):
                self._changed.set()
                return None

    async def may_replace(self, snapshot: SnapshotId, epoch: int) -> bool:
        """Whether the rows that were planned here for a snapshot may give way to others: the collector has heard a
        report without our part of it, and did not count it before. Waits until there is a collector that answers.
        """
        while True:
            report = self._report()
            if all(part.id != snapshot for part in report.done):
                with contextlib.suppress(SnapdError):
                    answer = await self._reporter.report(
                        self.name, report, known_orders=self.orders.number, hold_s=0.0
                    )
                    return not counts_on(answer.orders, snapshot, epoch)
            await asyncio.sleep(RETRY_S)

    def _report(self) -> NodeReport:
        self._serial += 1
        return self._build()

    def _build(self) -> NodeReport:
        job, here = self._find_job(), self._here
        if job is None:
            return NodeReport(
                node=here.node,
                instance=here.instance,
                serial=self._serial,
                epoch=here.epoch(),
                generation=0,
                world_size=0,
            )
        generation = job.coordination.current()
        served = [session for session in job.served_sessions() if session.generation == generation]
        row = job.coordination.generation(generation)
        return NodeReport(
            node=here.node,
            instance=here.instance,
            serial=self._serial,
            epoch=here.epoch(),
            generation=generation,
            world_size=row.world_size if row is not None else 0,
            held=_held(job),
            passed=job.ledger.passed_steps(generation),
            served=tuple(sorted(session.rank for session in served)),
            closed_below=job.closed_below(),
            keep_complete=max((session.row.slots for session in served), default=2) - 1,
            is_capturing=any(session.newest_step_seen() >= 0 for session in served),
            newest_step_seen=max((session.newest_step_seen() for session in served), default=-1),
            interval_steps=max((session.row.interval_steps for session in served), default=1),
            aborts=job.abort_count,
            done=self._protection.done(job),
            problems=tuple((facts.id, facts.problem) for facts in job.ledger.newest_first() if facts.problem),
            trouble=self._protection.trouble(job),
            told=self._told_before(job),
            final=tuple(sorted(job.final_ranks)),
            flush=job.flusher.news() if job.flusher is not None else FlushNews(),
            node_flush=job.disk.news() if job.disk is not None else None,
        )

    def inventory(self) -> Inventory:
        """All that this node holds of the job."""
        job = self._find_job()
        if job is None:
            return Inventory(node=self._here.node)
        return Inventory(
            node=self._here.node,
            held=_held(job),
            rows=self._protection.held_rows(job),
            problems=tuple((f.id, f.problem) for f in job.ledger.newest_first() if f.problem),
            is_here=True,
            generation=job.coordination.current(),
            live_ranks=tuple(sorted({session.rank for session in job.live_sessions()})),
            arena_bytes=job.arena_bytes,
        )

    @property
    def complete(self) -> SnapshotId | None:
        return self.orders.complete

    @property
    def protected(self) -> SnapshotId | None:
        return self.orders.protected

    @property
    def target(self) -> SnapshotId | None:
        return self.orders.target

    @property
    def flush(self) -> SnapshotId | None:
        return self.orders.flush

    @property
    def node_flush(self) -> SnapshotId | None:
        return self.orders.node_flush

    @property
    def widened(self) -> tuple[int, Interval]:
        """(generation, its widened interval) as ordered last, or, before any orders, as the pages of trainers say that
        outlived a daemon; generation 0 if it is as configured.
        """
        generation, interval = self.orders.generation, self.orders.interval
        job = self._find_job()
        if not generation and job is not None:
            generation = max((session.generation for session in job.served_sessions()), default=0)
            interval = job.coordination.interval()
        return (generation, interval) if interval.factor > 1 else (0, Interval())

    def protection_reason(self) -> str:
        """What is being done, and what holds it up here."""
        trouble = self.trouble()
        return self.orders.reason + (f"; {trouble}" if trouble else "")

    def trouble(self) -> str:
        """Why this node's part does not go on, in words; empty if it does."""
        job = self._find_job()
        if self.away_reason:
            return f"the collector cannot be asked: {self.away_reason}"
        return self._protection.trouble(job) if job is not None else ""

    # ending

    def forget_through(self, through: int) -> None:
        """All of the generations up to this one was removed in the whole world."""
        self._removed_through = max(self._removed_through, through)
        self.orders = orders_without(self.orders, through)
        job = self._find_job()
        if job is not None:
            self._protection.aim(job, None, None)
            self._protection.forget(job, set(), protected=SnapshotId(through + 1, 0), protected_epoch=0)
        self.changed()

    # obeying

    def obey(self, orders: Orders) -> None:
        """Take up orders; older ones than those that are known come from a collector before this one and count too."""
        self.orders = orders = orders_without(orders, self._removed_through)
        table = self._here.table()
        job = self._find_job()
        if job is None and self._is_involved(orders, table):
            job = self._make_job()
        self._note_told(orders.told, job)
        if job is None:
            return
        for snapshot, problem in orders.problems:
            condemn(job, snapshot, problem)
        if orders.complete is not None:
            job.ledger.announce(orders.complete)
        if job.flusher is not None:
            job.flusher.note_durable(orders.durable)
        if job.disk is not None:
            job.disk.note_durable(orders.node_durable)
        self._take_interval(job, orders.interval)
        self._protection.aim(job, orders.target if self._is_involved(orders, table) else None, table)
        kept = {s for s in (orders.target, orders.protected, self._told.protected) if s is not None}
        self._protection.forget(job, kept, protected=orders.protected, protected_epoch=orders.protected_epoch)
        job.settle()

    def _note_told(self, told: Told, job: Job | None) -> None:
        """Remember what was promised, also across a restart: a later collector, or a wiped store, may not know it."""
        newest = self._told_before(job).newest(told)
        if newest != self._told:
            self._told = newest
            if job is not None:
                with contextlib.suppress(CapacityError):  # it is remembered until this process ends, at least
                    job.index.set_told(newest)

    def _told_before(self, job: Job | None) -> Told:
        if job is not None and not self._is_told_read:
            self._is_told_read = True
            self._told = self._told.newest(job.index.told())
        self._told = told_without(self._told, self._removed_through)
        return self._told

    def _is_involved(self, orders: Orders, table: GroupTable | None) -> bool:
        group = table.group_of(self._here.node) if table is not None else None
        return orders.target is not None and group is not None and group.number in orders.target_groups

    def _take_interval(self, job: Job, interval: Interval) -> None:
        if interval != job.coordination.interval():
            job.coordination.take_interval(interval)
            job.write_interval(interval)

    def table_changed(self) -> None:
        """Another epoch: what is being protected is planned anew, and all is reported under it."""
        self.obey(self.orders)
        self.changed()

    def doomed(self, job: Job) -> list[tuple[SnapshotId, str]]:
        """What this node may drop: what the collector says; without it, its own captures that nobody waits for."""
        gone = [
            (facts.id, "the job was removed")
            for facts in job.ledger.snapshots.values()
            if is_gone(facts.id, self._removed_through) and not facts.hold_count
        ]
        if gone:
            return gone
        return snapshots_to_drop(
            job.ledger,
            self.orders,
            self._told_before(job),
            is_away=self.is_away,
            room=self._room(job),
            coded=lambda: (rows.id for rows in self._protection.held_rows(job)),
        )

    def _room(self, job: Job) -> int:
        """How many snapshots may stay so that one slot is free to capture into."""
        return max((session.row.slots for session in job.served_sessions()), default=1 << 30) - 1


def _held(job: Job) -> tuple[Held, ...]:
    return tuple(
        Held(facts.id, rank, facts.world_size, shard.record.nbytes)
        for facts in job.ledger.newest_first()
        if not facts.problem
        for rank, shard in sorted(facts.shards.items())
    )


def _says_the_same(one: NodeReport, other: NodeReport) -> bool:
    """Whether a report adds nothing that anybody waits for: the newest step seen alone is no news."""
    return replace(one, serial=0, newest_step_seen=0) == replace(other, serial=0, newest_step_seen=0)
