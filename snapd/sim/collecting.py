"""The collector of the job on the daemon that holds its lease: the real Collector, and the waiting around it
(runtime/collecting.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapd.core.cluster import Code
from snapd.core.ids import SnapshotId
from snapd.core.protection import PlacedRecord, RowMap
from snapd.core.recovery import Choice, Inventory, RowSet, Situation, Source, choose_among_nodes, gaps
from snapd.core.reports import NodeReport, Orders, Record
from snapd.core.restore import Outcome, RankReport, RestoreRound, Verdicts
from snapd.errors import NotFoundError, SnapdError, UnavailableError
from snapd.sim.bugs import Bug, BuggyCollector

if TYPE_CHECKING:
    from snapd.sim.daemon import SimDaemon

SETTLE_AFTER_S = 0.02
GRACE_S = 5.0  # so long a new collector waits for all reports before it has anything dropped
ASK_AGAIN_S = 0.5
CALL_S = 1.0
ROUNDS_KEPT = 64


@dataclass(frozen=True, slots=True)
class Ask:
    """One restore's round."""

    generation: int
    number: int
    world_size: int
    accept_older: bool


@dataclass(frozen=True, slots=True)
class Records:
    """What `FetchRecords` answers of a replicated row map."""

    placed: tuple[PlacedRecord, ...]
    nodes: tuple[str, ...] = ()
    code: Code | None = None


@dataclass(frozen=True, slots=True)
class WorldPlan:
    choice: Choice

    def source(self, rank: int) -> Source | None:
        return next((source for source in self.choice.sources if source.rank == rank), None)


class SimCollector:
    """One job's collector. Nothing is kept that the nodes could not report again."""

    def __init__(self, daemon: SimDaemon, before: Record) -> None:
        self._daemon = daemon
        self.core = BuggyCollector(daemon.settings.interval_factor_max, before)
        self._recorded = before
        self.core.bugs = daemon.bugs
        self._began_s = daemon.now_s
        asyncio.get_running_loop().call_later(GRACE_S + SETTLE_AFTER_S, self._settle_soon)
        self._rounds: dict[tuple[int, int], tuple[RestoreRound, WorldPlan]] = {}
        self._planning = asyncio.Lock()
        self._is_settling = False
        self._waiting: list[asyncio.Future[None]] = []
        self.is_closed = False

    @property
    def orders(self) -> Orders:
        return self.core.orders

    def close(self) -> None:
        self.is_closed = True
        self._notify()

    def _notify(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            _resolve(future)

    async def _wait_change(self, until_s: float) -> None:
        """Until the next change, or that moment."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._waiting.append(future)
        timer = loop.call_at(until_s, _resolve, future)
        try:
            await future
        finally:
            timer.cancel()

    # reports

    async def report(self, report: NodeReport, known_orders: int, hold_s: float) -> Orders:
        """Take up a report; answer at once when its node does not know the newest orders, else after `hold_s`."""
        if self.core.take(report):
            self._settle_soon()
        until_s = self._daemon.now_s + hold_s
        while self.orders.number == known_orders and self._daemon.now_s < until_s and not self.is_closed:
            await self._wait_change(until_s)
        return self.orders

    def membership_changed(self, lost: Iterable[str]) -> None:
        """Nodes that are given up, or came back empty, and a new group table."""
        for node in lost:
            self.core.forget(node)
        self._settle_soon()

    def _settle_soon(self) -> None:
        if not self._is_settling and not self.is_closed:
            self._is_settling = True
            asyncio.get_running_loop().call_later(SETTLE_AFTER_S, self._settle)

    def _settle(self) -> None:
        self._is_settling = False
        daemon = self._daemon
        if self.is_closed or not daemon.life.is_alive:
            return
        before = self.orders
        is_new = daemon.now_s < self._began_s + GRACE_S and Bug.COLLECTOR_IN_HASTE not in daemon.bugs
        awaited = daemon.state.members if is_new else ()
        after = daemon.timed("settle", lambda: self.core.settle(daemon.table, awaited=awaited))
        to_record = self.core.to_record
        if after.number != before.number or to_record != self._recorded:
            daemon.truth.ordered(daemon.node, self.core, before, after, daemon.table)
        if to_record != self._recorded:
            daemon.record(to_record, self._take_recorded)
        self._notify()

    def _take_recorded(self, record: Record) -> None:
        """The store has it now, so that all may be told."""
        self._recorded = record
        self.core.recorded(record)
        self._settle_soon()

    # restoring

    async def plan(self, ask: Ask) -> WorldPlan:
        """The decision of a generation's round: the first rank to ask makes it, all get the same."""
        key = (ask.generation, ask.number)
        async with self._planning:
            known = self._rounds.get(key)
            if known is not None:
                return known[1]
            until_s = self._daemon.now_s + self._daemon.settings.restore_settle_s
            while not self._is_settled(ask):
                if self._daemon.now_s >= until_s:
                    raise UnavailableError("captures are being taken up", kind="settling")
                await self._wait_change(until_s)
            choice = await self._choose(ask)
            round_ = RestoreRound(ask.generation, ask.number, ask.world_size, None, choice.decision)
            self._rounds[key] = round_, WorldPlan(choice)
            while len(self._rounds) > ROUNDS_KEPT:
                del self._rounds[next(iter(self._rounds))]
            self._daemon.truth.chosen(self._daemon.node, ask.generation, choice)
            return self._rounds[key][1]

    def _is_settled(self, ask: Ask) -> bool:
        """Every rank of the generation has a session, and no node takes up anything older any more."""
        reports = self.core.reports.values()
        served = {rank for r in reports if r.generation == ask.generation for rank in r.served}
        if len(served) < ask.world_size:
            return False
        if Bug.OLD_TRAINERS_NOT_WAITED_FOR in self._daemon.bugs:
            return True
        return all(r.closed_below >= ask.generation for r in reports if r.served or r.held)

    async def _choose(self, ask: Ask) -> Choice:
        daemon = self._daemon
        until_s = daemon.now_s + daemon.settings.restore_wait_s
        while True:
            asked = frozenset(daemon.state.members)
            inventories, unreachable = await self._gather()
            if Bug.UNREACHABLE_IS_ABSENT in daemon.bugs:
                unreachable = []
            newest = self.orders.complete
            situation = Situation(
                inventories=inventories,
                row_sets=await self._row_sets(inventories),
                unreachable=unreachable,
                newest_known=newest if newest is not None and newest.generation <= ask.generation else None,
                world_size=ask.world_size,
                accept_older=ask.accept_older,
            )
            choice = daemon.timed("choose", choose_among_nodes, situation)
            # Who came while the others were asked may hold what they lack: after a wiped store nobody waits for him.
            is_final = choice.decision.outcome is not Outcome.UNREACHABLE and asked >= set(
                daemon.state.members
            )
            if is_final or daemon.now_s >= until_s:
                return choice
            await asyncio.sleep(ASK_AGAIN_S)

    async def _gather(self) -> tuple[list[Inventory], list[str]]:
        """What every member holds, and who did not say."""
        daemon = self._daemon
        nodes = sorted(daemon.state.members)
        silent = sorted(set(daemon.state.absent) - set(daemon.state.lost))  # as of the same moment
        calls = [daemon.call(node, "inventory", timeout_s=CALL_S) for node in nodes]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        inventories: list[Inventory] = []
        for node, answer in zip(nodes, answers, strict=True):
            if isinstance(answer, Inventory):
                inventories.append(answer)
            elif isinstance(answer, SnapdError):
                silent.append(node)
            else:
                raise answer
        return inventories, sorted(set(silent))

    async def _row_sets(self, inventories: list[Inventory]) -> list[RowSet]:
        """The rows of snapshots of which no node has every shard whole, from the records that survive."""
        incomplete = gaps(inventories)
        wanted: dict[tuple[SnapshotId, int, int, tuple[str, ...]], list[str]] = {}
        for inventory in inventories:
            for rows in inventory.rows:
                if rows.id in incomplete:
                    key = (rows.id, rows.group, rows.epoch, rows.nodes)
                    wanted.setdefault(key, []).append(inventory.node)
        found = [await self._row_set(*key[:3], nodes) for key, nodes in wanted.items()]
        return [row_set for row_set in found if row_set is not None]

    async def _row_set(
        self, snapshot: SnapshotId, group: int, epoch: int, record_nodes: list[str]
    ) -> RowSet | None:
        daemon = self._daemon
        for node in record_nodes:
            try:
                records: Records = await daemon.call(node, "map_records", snapshot, epoch, timeout_s=CALL_S)
            except SnapdError:
                continue
            if records.code is None:
                continue
            row_map = RowMap(snapshot, epoch, group, records.nodes, records.code)
            rows = daemon.plans.of(row_map, records.placed).rows
            world_size = max((placed.record.world_size for placed in records.placed), default=0)
            return RowSet(
                snapshot, group, epoch, records.nodes, records.code, rows, tuple(record_nodes), world_size
            )
        return None

    async def finish(self, generation: int, number: int, rank: int, report: RankReport) -> Verdicts:
        """The barrier of a round: answers when all ranks have reported, one is gone, or the time is over."""
        daemon = self._daemon
        known = self._rounds.get((generation, number))
        if known is None:
            raise NotFoundError("no restore was planned in this round", kind="restore_round")
        round_, plan = known
        round_.report(rank, report)
        if len(round_.reports) >= round_.world_size - 1:
            self._notify()
        until_s = daemon.now_s + daemon.settings.restore_finish_s
        while daemon.now_s < until_s:
            lost = self._lost_ranks(generation, round_.world_size)
            if Bug.BARRIER_WITHOUT_ONE in daemon.bugs and len(round_.reports) == round_.world_size - 1:
                missing = next(r for r in range(round_.world_size) if r not in round_.reports)
                round_.report(missing, RankReport(True))
            if round_.settle(lost_ranks=lost) is not None:
                break
            await self._wait_change(until_s)
        answer = round_.settle(is_late=True)
        assert answer is not None
        daemon.truth.finished(generation, number, plan.choice, answer)
        return answer

    def _lost_ranks(self, generation: int, world_size: int) -> set[int]:
        reports = self.core.reports.values()
        served = {rank for r in reports if r.generation == generation for rank in r.served}
        newer = any(report.generation > generation for report in reports)
        return set(range(world_size)) - served if served or newer else set()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
