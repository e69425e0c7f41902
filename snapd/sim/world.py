"""A node's part in its job's world: what it reports, and what it does with the orders (runtime/world.py)."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from snapd.core.cluster import GroupTable
from snapd.core.ids import SnapshotId
from snapd.core.obeying import counts_on, snapshots_to_drop
from snapd.core.recovery import Inventory
from snapd.core.reports import Held, NodeReport, Orders, Told
from snapd.errors import SnapdError
from snapd.sim.bugs import OBEYED, Bug

if TYPE_CHECKING:
    from snapd.sim.daemon import SimDaemon

HOLD_S = 5.0
RETRY_S = 0.5
GATHER_S = 0.01
AWAY_AFTER_S = 5.0


class SimWorld:
    def __init__(self, daemon: SimDaemon) -> None:
        self._daemon = daemon
        told = daemon.disk.told
        self.orders = Orders(
            complete=told.complete, protected=told.protected, protected_epoch=told.protected_epoch
        )
        self.collector = ""
        self._serial = 0
        self._heard_at_s = daemon.now_s
        self._news = asyncio.Event()
        self._is_news = False

    def changed(self) -> None:
        self._is_news = True
        self._news.set()

    @property
    def is_away(self) -> bool:
        return self._daemon.now_s - self._heard_at_s > AWAY_AFTER_S

    # reporting

    async def run(self) -> None:
        """Report and obey until the process ends."""
        while True:
            self._is_news = False
            self._serial += 1
            report = self._build()
            try:
                answer = await self._answer_or_news(report)
            except SnapdError:
                await asyncio.sleep(RETRY_S)
                continue
            if answer is not None:
                self._heard_at_s = self._daemon.now_s
                self.collector, orders = answer
                self.obey(orders)

    async def _answer_or_news(self, report: NodeReport) -> tuple[str, Orders] | None:
        """The collector's answer, or None when there is something new to report before it came."""
        asking = asyncio.ensure_future(self._daemon.report(report, self.orders.number, HOLD_S))
        asking.add_done_callback(lambda _: self._news.set())
        try:
            while True:
                self._news.clear()
                if not asking.done() and not self._is_news:
                    await self._news.wait()
                if asking.done():
                    return asking.result()
                if self._is_news:
                    await asyncio.sleep(GATHER_S)
                    self._is_news = False
                    if asking.done():
                        self._is_news = True
                        return asking.result()
                    if not _says_the_same(self._build(), report):
                        self._is_news = True
                        return None
        finally:
            asking.cancel()

    async def may_replace(self, snapshot: SnapshotId, epoch: int) -> bool:
        """Whether the rows that were planned here for a snapshot may give way to others (runtime/world.py)."""
        daemon = self._daemon
        while True:
            self._serial += 1
            report = self._build()
            if all(part.id != snapshot for part in report.done):
                with contextlib.suppress(SnapdError):
                    _, orders = await daemon.report(report, self.orders.number, 0.0)
                    return not counts_on(orders, snapshot, epoch)
            await asyncio.sleep(RETRY_S)

    def _build(self) -> NodeReport:
        daemon = self._daemon
        job, generation = daemon.job, daemon.coordination.current()
        served = [s.row for s in job.served_sessions() if s.row.generation == generation]
        return NodeReport(
            node=daemon.node,
            instance=daemon.instance,
            serial=self._serial,
            epoch=daemon.epoch,
            generation=generation if job.has_anything() else 0,
            world_size=max((row.world_size for row in served), default=0),
            held=self._held(),
            passed=job.ledger.passed_steps(generation),
            served=tuple(sorted(row.rank for row in served)),
            closed_below=job.closed_below(),
            keep_complete=max((row.slots for row in served), default=2) - 1,
            is_capturing=any(row.is_capturing for row in served),
            newest_step_seen=max((row.step_seen for row in served), default=-1),
            interval_steps=1,
            aborts=job.abort_count,
            done=daemon.parity.done(),
            problems=tuple((f.id, f.problem) for f in job.ledger.newest_first() if f.problem),
            told=daemon.disk.told,
        )

    def _held(self) -> tuple[Held, ...]:
        job = self._daemon.job
        held = [
            Held(facts.id, rank, facts.world_size, shard.record.nbytes)
            for facts in job.ledger.newest_first()
            if not facts.problem
            for rank, shard in sorted(facts.shards.items())
        ]
        if Bug.COLLECT_BEFORE_COMMIT in self._daemon.bugs:
            known = {(each.id, each.rank) for each in held}
            for row in self._daemon.disk.sessions:
                lanes = [Held(lane.id, row.rank, row.world_size, 1) for lane in row.lanes]
                held.extend(each for each in lanes if (each.id, each.rank) not in known)
        return tuple(held)

    def inventory(self) -> Inventory:
        """All that this node holds of the job."""
        ledger = self._daemon.job.ledger
        return Inventory(
            node=self._daemon.node,
            held=self._held(),
            rows=self._daemon.parity.held_rows(),
            problems=tuple((facts.id, facts.problem) for facts in ledger.newest_first() if facts.problem),
        )

    # obeying

    def obey(self, orders: Orders) -> None:
        daemon = self._daemon
        told = daemon.disk.told.newest(orders.told)
        if told != daemon.disk.told:
            daemon.life.effect("persist what was told")
            daemon.disk.told = told
        self.orders = orders
        daemon.truth.told(daemon.node, orders)
        table, job = daemon.table, daemon.job
        is_involved = self._is_involved(orders, table)
        if not job.has_anything() and not is_involved:
            return
        for snapshot, problem in orders.problems:
            job.condemn(snapshot, problem)
        if orders.complete is not None:
            job.ledger.announce(orders.complete)
        job.take_interval(orders.interval)
        daemon.protector.aim(orders.target if is_involved else None, table)
        kept = {s for s in (orders.target, orders.protected, told.protected) if s is not None}
        daemon.parity.forget(kept, orders.protected, orders.protected_epoch)
        job.settle()

    def _is_involved(self, orders: Orders, table: GroupTable | None) -> bool:
        group = table.group_of(self._daemon.node) if table is not None else None
        return orders.target is not None and group is not None and group.number in orders.target_groups

    def table_changed(self) -> None:
        """Another epoch: what is being protected is planned anew, and all is reported under it."""
        self.obey(self.orders)
        self.changed()

    def doomed(self) -> list[tuple[SnapshotId, str]]:
        """What this node may drop: what the collector says; without it, its own captures that nobody waits for."""
        job = self._daemon.job
        slots = [served.row.slots for served in job.served_sessions()]
        return snapshots_to_drop(
            job.ledger,
            self.orders,
            Told() if self._daemon.bugs & OBEYED else self._daemon.disk.told,
            is_away=self.is_away,
            room=max(slots, default=1 << 30) - 1,
            coded=lambda: (plan.map.id for plan in self._daemon.parity.plans()),
        )


def _says_the_same(one: NodeReport, other: NodeReport) -> bool:
    return replace(one, serial=0, newest_step_seen=0) == replace(other, serial=0, newest_step_seen=0)
