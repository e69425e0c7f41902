"""A restore seen from one node: ask the collector, bring what is not here, report (runtime/world_restoring.py)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from snapd.core.ids import SnapshotId
from snapd.core.manifest import ShardRecord
from snapd.core.recovery import Source
from snapd.core.restore import Outcome, RankReport, Verdicts
from snapd.core.rows import Row, rows_of_shard
from snapd.errors import NotFoundError, NotRestorable, SnapdError, UnavailableError
from snapd.sim.bugs import Bug
from snapd.sim.collecting import Ask, WorldPlan
from snapd.sim.disk import Content, Parity, Session, StoredShard, decode

if TYPE_CHECKING:
    from snapd.sim.daemon import SimDaemon

RETRY_S = 0.5
CALL_S = 1.0
MARGIN_S = 5.0


@dataclass(slots=True)
class _Round:
    plan: WorldPlan
    held: list[SnapshotId] = field(default_factory=list)


class SimRestores:
    """The rounds of this node."""

    def __init__(self, daemon: SimDaemon) -> None:
        self._daemon = daemon
        self._rounds: dict[tuple[int, int], _Round] = {}

    async def restore(
        self, row: Session, number: int, *, accept_older: bool
    ) -> tuple[WorldPlan, StoredShard | None]:
        """The world's decision; with a snapshot, this rank's shard, which is here then.

        Raises:
            SnapdError: the collector cannot be asked, or the shard cannot be brought.
        """
        daemon, job = self._daemon, self._daemon.job
        key = (row.generation, number)
        async with job.planning:
            known = self._rounds.get(key)
            if known is None:
                ask = Ask(row.generation, number, row.world_size, accept_older)
                plan = await daemon.at_collector(
                    "plan", ask, timeout_s=daemon.settings.restore_wait_s + MARGIN_S
                )
                known = self._rounds[key] = _Round(plan)
                for old in [old for old in self._rounds if old[0] < row.generation]:
                    self._let_go(self._rounds.pop(old))
        decision = known.plan.choice.decision
        if decision.outcome is not Outcome.FOUND or decision.chosen is None:
            return known.plan, None
        chosen = decision.chosen
        if Bug.MIXED_STEPS in daemon.bugs:
            own = job.ledger.newest_shard(row.rank)
            if own is not None:
                return known.plan, job.disk.shards[own.record.id, row.rank]
        shard = await self._brought(known, chosen, row.rank)
        return known.plan, shard

    async def finish(self, row: Session, number: int, report: RankReport) -> Verdicts:
        daemon = self._daemon
        answer: Verdicts = await daemon.at_collector(
            "finish",
            row.generation,
            number,
            row.rank,
            report,
            timeout_s=daemon.settings.restore_finish_s + MARGIN_S,
        )
        round_ = self._rounds.get((row.generation, number))
        if round_ is not None:
            chosen = round_.plan.choice.decision.chosen
            if answer.problem and chosen is not None:
                daemon.job.condemn(chosen, answer.problem)
            self._let_go(round_)
            daemon.job.settle()
        return answer

    def _let_go(self, round_: _Round) -> None:
        for snapshot in round_.held:
            if snapshot in self._daemon.job.ledger.snapshots:
                self._daemon.job.ledger.unhold(snapshot)
        round_.held.clear()

    # bringing

    async def _brought(self, round_: _Round, snapshot: SnapshotId, rank: int) -> StoredShard:
        daemon, job = self._daemon, self._daemon.job
        here = job.disk.shards.get((snapshot, rank))
        if here is None or not self._is_whole(here):
            source = round_.plan.source(rank)
            if source is None:
                raise NotFoundError("the plan names no source for this rank", kind="restore_round")
            here = await self._bring(snapshot, source)
            job.bring(here)
        else:
            job.ledger.hold(snapshot)
        job.ledger.announce(snapshot)
        round_.held.append(snapshot)
        daemon.life.effect("read a shard")
        return here

    def _is_whole(self, shard: StoredShard) -> bool:
        if Bug.RESTORE_UNCHECKED in self._daemon.bugs:
            return True
        return all(b == c.digest for b, c in zip(shard.contents, shard.record.chunks, strict=True))

    async def _bring(self, snapshot: SnapshotId, source: Source) -> StoredShard:
        """Whole from another node first, else decoded from its rows."""
        daemon = self._daemon
        for node in source.nodes:
            if node == daemon.node:
                continue
            shard = await self._try(node, "shard", snapshot, source.rank)
            if shard is None:
                continue
            arrived = [daemon.arrive(body) for body in shard.contents]
            bodies = tuple(body for body in arrived if body is not None)
            found = StoredShard(shard.record, bodies, 0)
            if len(bodies) == len(shard.contents) and self._is_whole(found):
                return found
        if source.row_set is not None:
            return await self._decoded(snapshot, source)
        raise NotRestorable(f"no node gives a good shard of rank {source.rank}", kind="shard_sources")

    async def _decoded(self, snapshot: SnapshotId, source: Source) -> StoredShard:
        assert source.row_set is not None
        rows = rows_of_shard(source.row_set.rows, source.rank)
        record = await self._record(snapshot, source)
        bodies = [await self._decoded_chunk(snapshot, source, *rows[index]) for index in sorted(rows)]
        return StoredShard(record, tuple(bodies), 0)

    async def _record(self, snapshot: SnapshotId, source: Source) -> ShardRecord:
        assert source.row_set is not None
        for node in source.row_set.record_nodes:
            records = await self._try(node, "map_records", snapshot, source.row_set.epoch)
            for placed in records.placed if records is not None else ():
                if placed.record.rank == source.rank:
                    found: ShardRecord = placed.record
                    return found
        raise UnavailableError("no node has the record of the shard", kind="record")

    async def _decoded_chunk(self, snapshot: SnapshotId, source: Source, row: Row, wanted: int) -> Content:
        daemon, rows = self._daemon, source.row_set
        assert rows is not None
        data: dict[int, Content] = {}
        for number, chunk in enumerate(row.chunks):
            if number == wanted:
                continue
            others = () if daemon.settings.is_crowd else daemon.state.members
            for node in sorted({chunk.node, *others}):
                body = await self._try(node, "chunk", snapshot, chunk.rank, chunk.index)
                arrived = daemon.arrive(body) if body is not None else None
                if arrived == chunk.digest:
                    data[number] = chunk.digest
                    break
        parity: list[Parity] = []
        for number, node in enumerate(row.parity_nodes):
            fragment = await self._try(node, "fragment", row.id, number)
            if fragment is not None:
                parity.append(fragment)
        body = decode(rows.code, data, parity, len(row.chunks), wanted)
        if body is None or (body != row.chunks[wanted].digest and Bug.RESTORE_UNCHECKED not in daemon.bugs):
            what = "too few fragments" if body is None else "fragments that do not fit"
            raise NotRestorable(f"row {row.number} of rank {source.rank}: {what}", kind="shard_sources")
        return body

    async def _try(self, node: str, method: str, *args: object) -> Any:
        daemon = self._daemon
        try:
            if node == daemon.node:
                return daemon.handlers[method](*args)
            return await daemon.call(node, method, *args, timeout_s=CALL_S)
        except SnapdError:
            await asyncio.sleep(0)
            return None
