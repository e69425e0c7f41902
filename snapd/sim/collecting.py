"""The collector of the job on the daemon that holds its lease: the real Collector, and the waiting around it
(runtime/collecting.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapd.core.cluster import Code
from snapd.core.presence import presence
from snapd.core.protection import PlacedRecord, RowMap
from snapd.core.recovery import (
    Choice,
    Inventory,
    RowSet,
    Situation,
    Source,
    WantedRows,
    choose_among_nodes,
    records_wanted,
)
from snapd.core.reports import NodeReport, Orders, Record
from snapd.core.restore import Outcome, RankReport, RestoreRound, Verdicts
from snapd.errors import FencedError, NotFoundError, SnapdError, UnavailableError
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
        self._for_orders: list[asyncio.Future[None]] = []
        self._for_news: list[asyncio.Future[None]] = []
        self.is_closed = False

    @property
    def orders(self) -> Orders:
        return self.core.orders

    def close(self) -> None:
        self.is_closed = True
        self._notify(self._for_orders)
        self._notify(self._for_news)

    def _notify(self, waiting: list[asyncio.Future[None]]) -> None:
        woken = waiting.copy()
        waiting.clear()
        for future in woken:
            _resolve(future)

    async def _wait(self, waiting: list[asyncio.Future[None]], until_s: float) -> None:
        """Until the next notice, or that moment."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        waiting.append(future)
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
            await self._wait(self._for_orders, until_s)
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
        for round_, _ in self._rounds.values():
            if round_.reports:
                self._settle_round(round_)
        if after.number != before.number:
            self._notify(self._for_orders)
        self._notify(self._for_news)

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
            await self._wait_settled(ask)
            choice = await self._choose(ask)
            round_ = RestoreRound(ask.generation, ask.number, ask.world_size, None, choice.decision)
            self._rounds[key] = round_, WorldPlan(choice)
            while len(self._rounds) > ROUNDS_KEPT:
                del self._rounds[next(iter(self._rounds))]
            self._daemon.truth.chosen(self._daemon.node, ask.generation, choice)
            return self._rounds[key][1]

    async def _wait_settled(self, ask: Ask) -> None:
        until_s = self._daemon.now_s + self._daemon.settings.restore_settle_s
        while True:
            now = presence(self.core.reports.values(), ask.generation)
            if now.is_overtaken:
                raise FencedError("a newer generation has begun", kind="stale_generation")
            is_careless = Bug.OLD_TRAINERS_NOT_WAITED_FOR in self._daemon.bugs
            if now.is_settled(ask.world_size) or (is_careless and not now.missing(ask.world_size)):
                return
            if self._daemon.now_s >= until_s:
                raise UnavailableError("captures are being taken up", kind="settling")
            await self._wait(self._for_news, until_s)

    async def _choose(self, ask: Ask) -> Choice:
        daemon = self._daemon
        until_s = daemon.now_s + daemon.settings.restore_wait_s
        while True:
            asked = frozenset(daemon.state.members)
            inventories, unreachable = await self._gather()
            if Bug.UNREACHABLE_IS_ABSENT in daemon.bugs:
                unreachable = []
            newest = self.orders.complete
            row_sets, mute = await self._row_sets(inventories)
            situation = Situation(
                inventories=inventories,
                row_sets=row_sets,
                unreachable=sorted({*unreachable, *mute}),
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

    async def _row_sets(self, inventories: list[Inventory]) -> tuple[list[RowSet], list[str]]:
        """The rows of snapshots of which no node has every shard whole, from the records that survive; and who has
        records that nobody else gave, and did not answer.
        """
        found: list[RowSet] = []
        mute: list[str] = []
        for wanted, nodes in records_wanted(inventories).items():
            row_set, silent = await self._row_set(wanted, nodes)
            if row_set is not None:
                found.append(row_set)
            elif Bug.UNREACHABLE_IS_ABSENT not in self._daemon.bugs:
                mute += silent
        return found, mute

    async def _row_set(self, wanted: WantedRows, nodes: list[str]) -> tuple[RowSet | None, list[str]]:
        daemon, silent = self._daemon, []
        for node in nodes:
            try:
                records: Records = await daemon.call(
                    node, "map_records", wanted.id, wanted.epoch, timeout_s=CALL_S
                )
            except UnavailableError:
                silent.append(node)
            except SnapdError:
                continue
            else:
                if records.code is not None:
                    return self._planned(wanted, records, records.code, tuple(nodes)), []
        return None, silent

    def _planned(
        self, wanted: WantedRows, records: Records, code: Code, record_nodes: tuple[str, ...]
    ) -> RowSet:
        row_map = RowMap(wanted.id, wanted.epoch, wanted.group, records.nodes, code)
        rows = self._daemon.plans.of(row_map, records.placed).rows
        world_size = max((placed.record.world_size for placed in records.placed), default=0)
        return RowSet(
            wanted.id, wanted.group, wanted.epoch, records.nodes, code, rows, record_nodes, world_size
        )

    async def finish(self, generation: int, number: int, rank: int, report: RankReport) -> Verdicts:
        """The barrier of a round: answers when all ranks have reported, one is gone, or the time is over."""
        daemon = self._daemon
        known = self._rounds.get((generation, number))
        if known is None:
            raise NotFoundError("no restore was planned in this round", kind="restore_round")
        round_, plan = known
        is_first = not round_.reports
        round_.report(rank, report)
        if Bug.BARRIER_WITHOUT_ONE in daemon.bugs and len(round_.reports) == round_.world_size - 1:
            round_.report(min(set(range(round_.world_size)) - set(round_.reports)), RankReport(True))
        if is_first:
            self._settle_round(round_)
        if round_.answer is None and len(round_.reports) >= round_.world_size:
            round_.settle()
        if round_.answer is not None:
            self._notify(self._for_news)
        until_s = daemon.now_s + daemon.settings.restore_finish_s
        while round_.answer is None and daemon.now_s < until_s:
            await self._wait(self._for_news, until_s)
        answer = round_.settle(is_late=True)
        assert answer is not None
        daemon.truth.finished(generation, number, plan.choice, answer)
        return answer

    def _settle_round(self, round_: RestoreRound) -> None:
        """Once for each change, not once for each rank that waits."""
        if round_.answer is None:
            now = presence(self.core.reports.values(), round_.generation)
            round_.settle(lost_ranks=now.lost(round_.world_size))


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
