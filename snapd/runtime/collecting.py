"""The collector of a job, on the one daemon that holds its lease: reports in, orders out, restores decided.

What is decided is in core/collector.py and core/recovery.py; here are waiting, asking the nodes, and the barrier of a
restore's round. Nothing is kept that the nodes could not report again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from snapd.core.cluster import Code, GroupTable
from snapd.core.collector import Collector
from snapd.core.ending import Ending, inventory_without, report_without
from snapd.core.ids import SnapshotId
from snapd.core.presence import Presence, presence
from snapd.core.recovery import (
    Choice,
    Inventory,
    RowSet,
    Situation,
    Source,
    WantedRows,
    records_wanted,
)
from snapd.core.reports import NodeReport, Orders, Record
from snapd.core.restore import Outcome, RankReport, RestoreRound, Verdicts
from snapd.core.rows import chunks_of, plan_rows
from snapd.errors import ConflictError, FencedError, NotFoundError, SnapdError, UnavailableError
from snapd.runtime.changes import Changes
from snapd.runtime.inventories import gather_inventories
from snapd.runtime.peers import Records, ShardSource, WorldAsk, WorldPlan
from snapd.runtime.tier_look import TierLook, with_tier

SETTLE_AFTER_S = 0.02  # reports that come together are settled together
ASK_AGAIN_S = 0.5
GRACE_S = 5.0  # so long a new collector waits for the reports of all who live before it has anything dropped
ROUNDS_MAX = 64
ROUNDS_KEPT = 256


class Asking(Protocol):
    """A part of PeerCalls; the own node is asked as any other."""

    async def inventory(self, node: str, job: str) -> Inventory: ...

    async def fetch_records(
        self, node: str, job: str, snapshot: SnapshotId, *, epoch: int = 0
    ) -> Records: ...


class Surroundings(Protocol):
    """What a collector needs of the cluster."""

    @property
    def table(self) -> GroupTable | None: ...
    @property
    def living(self) -> Iterable[str]: ...
    @property
    def doubtful(self) -> Iterable[str]:
        """Members that do not renew their lease and are not given up yet."""

    @property
    def calls(self) -> Asking: ...
    @property
    def tier_look(self) -> TierLook | None:
        """Where there is a shared tier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectorSettings:
    restore_settle_s: float
    restore_finish_s: float
    restore_wait_s: float
    interval_factor_max: int


class CollectorHost:
    """One job's collector. Single-threaded, on the event loop."""

    def __init__(
        self,
        job: str,
        surroundings: Surroundings,
        settings: CollectorSettings,
        *,
        before: Record,
        parent: tuple[int, SnapshotId] | None,
        record: Callable[[Record], None],
        removed_through: int = 0,
        ended: Callable[[int], None] = lambda generation: None,
    ) -> None:
        """`before`: what earlier collectors have recorded. `record` has news recorded for the next one, and `recorded`
        called then; it is called again for what is not recorded yet. `removed_through`: generations up to it are gone.
        `ended`: all ranks have closed that generation for good.
        """
        self.job = job
        self.changes = Changes()
        self._new_orders = Changes()
        self._around = surroundings
        self._settings = settings
        self._record = record
        self._removed_through = removed_through
        self._ended = ended
        self._ending = Ending()
        self._is_closed = False
        self._core = Collector(settings.interval_factor_max, before)
        self._recorded = before
        if parent is not None:
            self._core.restored(*parent)
        self._bad_stored: dict[SnapshotId, str] = {}  # restored from the tier, and found bad
        self._rounds: dict[tuple[int, int], tuple[RestoreRound, tuple[ShardSource, ...]]] = {}
        self._planning: dict[
            int, asyncio.Lock
        ] = {}  # by generation: a stale one must not hold up its successor
        self._settling: asyncio.TimerHandle | None = None
        loop = asyncio.get_running_loop()
        self._began_s = loop.time()
        self._growing_up = loop.call_later(GRACE_S + SETTLE_AFTER_S, self._settle_soon)

    @property
    def orders(self) -> Orders:
        return self._core.orders

    @property
    def reports(self) -> dict[str, NodeReport]:
        return self._core.reports

    def missing_parts(self, snapshot: SnapshotId) -> str:
        """Whose part is missing until `snapshot` is protected, in words."""
        table = self._around.table
        ranks = self._core.holders().get(snapshot)
        if table is None or ranks is None:
            return "no group table" if table is None else "no node holds it"
        missing = self._core.missing_parts(snapshot, ranks, table)
        is_unrecorded = not missing and self._core.to_record.told.protected != self.orders.protected
        return "waiting for the coordinator to record it" if is_unrecorded else missing

    @property
    def _is_young(self) -> bool:
        """Nodes may still have to tell what collectors before this one have promised."""
        return asyncio.get_running_loop().time() < self._began_s + GRACE_S

    def close(self) -> None:
        self._is_closed = True
        self._growing_up.cancel()
        if self._settling is not None:
            self._settling.cancel()
        self._new_orders.notify()
        self.changes.notify()

    # reports

    async def report(self, report: NodeReport, *, known_orders: int, hold_s: float) -> Orders:
        """Take up a report; answer at once when its node does not know the newest orders, else after `hold_s`."""
        if self._core.take(report_without(report, self._removed_through)):
            self._settle_soon()
        await self._new_orders.wait_until(lambda: self.orders.number != known_orders, hold_s)
        return self.orders

    def membership_changed(self, lost: Iterable[str]) -> None:
        """Nodes that are given up, or came back empty, and a new group table."""
        for node in lost:
            self._core.forget(node)
        self._settle_soon()

    def _settle_soon(self) -> None:
        if self._settling is None and not self._is_closed:
            self._settling = asyncio.get_running_loop().call_later(SETTLE_AFTER_S, self._settle)

    def _settle(self) -> None:
        self._settling = None
        before = self.orders
        awaited = self._around.living if self._is_young else ()
        after = self._core.settle(self._around.table, awaited=awaited)
        if self._core.to_record != self._recorded:
            self._record(self._core.to_record)
        if self._ending.is_over(self.reports.values()) and self._ending.generation > self._removed_through:
            self._removed_through = self._ending.generation
            self._ended(self._removed_through)
        for round_, _ in self._rounds.values():
            if round_.reports:  # somebody waits at its barrier
                self._settle_round(round_)
        if after.number != before.number:
            self._new_orders.notify()
        self.changes.notify()  # also without new orders: a restore may wait for what a report says

    def recorded(self, record: Record) -> None:
        """The store has it now, so that all may be told."""
        self._recorded = record
        self._core.recorded(record)
        self._settle_soon()

    # restoring

    async def plan(self, ask: WorldAsk) -> WorldPlan:
        """The decision of a generation's round: the first rank to ask makes it, all get the same.

        Raises:
            ConflictError: ranks ask for different steps. FencedError: a newer generation has begun. UnavailableError:
            kind `settling`.
        """
        if ask.number >= ROUNDS_MAX:
            raise ConflictError("too many rounds of one restore", kind="restore_round", round=ask.number)
        key = (ask.generation, ask.number)
        async with self._planning.setdefault(ask.generation, asyncio.Lock()):
            known = self._rounds.get(key)
            if known is not None:
                known[0].check_same(ask.step)
                return WorldPlan(known[0].decision, known[1])
            await self._wait_settled(ask)
            choice = await self._choose(ask)
            sources = tuple(_source(source) for source in choice.sources)
            round_ = RestoreRound(ask.generation, ask.number, ask.world_size, ask.step, choice.decision)
            self._rounds[key] = (round_, sources)
            while len(self._rounds) > ROUNDS_KEPT:
                del self._rounds[next(iter(self._rounds))]
            for generation in [each for each in self._planning if each < ask.generation - 1]:
                del self._planning[generation]
            return WorldPlan(choice.decision, sources)

    async def _wait_settled(self, ask: WorldAsk) -> None:
        """Raise FencedError when a newer generation begins meanwhile, UnavailableError when the time is over."""

        now = self._presence(ask.generation)

        def is_over() -> bool:
            nonlocal now
            now = self._presence(ask.generation)
            return now.is_settled(ask.world_size) or now.is_overtaken

        await self.changes.wait_until(is_over, self._settings.restore_settle_s)
        if now.is_overtaken:
            raise FencedError(
                "a newer generation of this job has begun",
                kind="stale_generation",
                generation=ask.generation,
                current_generation=self._core.generation,
            )
        if not now.is_settled(ask.world_size):
            raise UnavailableError(
                "captures of an older generation are still being taken up, or ranks have not come yet",
                kind="settling",
                hint="ask again",
                missing=", ".join(map(str, now.missing(ask.world_size)[:8])),
            )

    def _presence(self, generation: int) -> Presence:
        return presence(self.reports.values(), generation)

    async def _choose(self, ask: WorldAsk) -> Choice:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.restore_wait_s
        while True:
            asked = frozenset(self._around.living)
            inventories, unreachable = await self._gather()
            row_sets, mute = await self._row_sets(inventories)
            situation = Situation(
                inventories=inventories,
                row_sets=row_sets,
                unreachable=sorted({*unreachable, *mute}),
                newest_known=self._newest_known(ask),
                world_size=ask.world_size,
                step=ask.step,
                accept_older=ask.accept_older,
                is_elastic=ask.is_elastic,
            )
            choice = await with_tier(self._around.tier_look, self.job, ask, situation, self._bad_stored)
            # Who came while the others were asked may hold what they lack: after a wiped store nobody waits for him.
            is_final = choice.decision.outcome is not Outcome.UNREACHABLE and asked >= set(
                self._around.living
            )
            if is_final or loop.time() >= deadline:
                return choice
            await asyncio.sleep(ASK_AGAIN_S)

    def _newest_known(self, ask: WorldAsk) -> SnapshotId | None:
        newest = self.orders.complete
        return newest if newest is not None and newest.generation <= ask.generation else None

    async def _gather(self) -> tuple[list[Inventory], list[str]]:
        """What every member holds, and who did not say."""
        living, doubtful = (
            list(self._around.living),
            list(self._around.doubtful),
        )  # both as of the same moment
        found, silent = await gather_inventories(
            living, lambda node: self._around.calls.inventory(node, self.job)
        )
        inventories = [inventory_without(each, self._removed_through) for each in found]
        return inventories, sorted({*silent, *doubtful})

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
            else:
                mute += silent
        return found, mute

    async def _row_set(self, wanted: WantedRows, nodes: list[str]) -> tuple[RowSet | None, list[str]]:
        silent: list[str] = []
        for node in nodes:
            try:
                records = await self._around.calls.fetch_records(
                    node, self.job, wanted.id, epoch=wanted.epoch
                )
            except UnavailableError:
                silent.append(node)
            except SnapdError:
                continue
            else:
                if records.code is not None and records.epoch == wanted.epoch:
                    return _planned(wanted, records, records.code, tuple(nodes)), []
        return None, silent

    async def finish(self, generation: int, number: int, rank: int, report: RankReport) -> Verdicts:
        """The barrier of a round: answers when all ranks have reported, one is gone, or the time is over.

        Raises:
            NotFoundError: kind `restore_round`: nothing was planned (a collector before us did): plan again.
        """
        known = self._rounds.get((generation, number))
        if known is None:
            raise NotFoundError(
                "no restore was planned in this round",
                kind="restore_round",
                hint="call PlanRestore again",
                round=number,
            )
        round_, _ = known
        is_first = not round_.reports
        round_.report(rank, report)
        if is_first:  # from now on each settling looks who is gone
            self._settle_round(round_)
        if round_.answer is None and len(round_.reports) >= round_.world_size:
            round_.settle()
        if round_.answer is not None:
            self.changes.notify()
        await self.changes.wait_until(lambda: round_.answer is not None, self._settings.restore_finish_s)
        answer = round_.settle(is_late=True)
        assert answer is not None
        if answer.is_committed and round_.decision.chosen is not None:
            self._core.restored(generation, round_.decision.chosen)
        is_stored = any(not source.nodes and not source.is_coded for source in known[1])
        if answer.problem and is_stored and round_.decision.chosen is not None:
            self._bad_stored[round_.decision.chosen] = answer.problem
        return answer

    def _settle_round(self, round_: RestoreRound) -> None:
        """Once for each change, not once for each rank that waits."""
        if round_.answer is None:
            lost = self._presence(round_.generation).lost(round_.world_size)
            round_.settle(lost_ranks=lost)


def _planned(wanted: WantedRows, records: Records, code: Code, record_nodes: tuple[str, ...]) -> RowSet:
    """The rows planned again from the records of all members."""
    chunks = {
        owner: chunks_of(owner, [record for place, record in records.placed if place == owner])
        for owner in records.nodes
    }
    rows = plan_rows(code, records.nodes, chunks)
    world_size = max((record.world_size for _, record in records.placed), default=0)
    return RowSet(wanted.id, wanted.group, wanted.epoch, records.nodes, code, rows, record_nodes, world_size)


def _source(source: Source) -> ShardSource:
    if source.row_set is None:
        return ShardSource(source.rank, source.nodes)
    rows = source.row_set
    return ShardSource(source.rank, (), True, rows.group, rows.epoch, rows.record_nodes)
