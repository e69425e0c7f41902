"""A restore in a world that spans nodes, seen from one of them: ask the collector, bring what is not here, report.

The shards that this node's ranks need are brought into its own arena first; from there on a restore is as on one
machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from snapd.core.ids import SnapshotId
from snapd.core.manifest import ShardRecord
from snapd.core.restore import Decision, Outcome, RankReport, RestoreRound, Verdicts
from snapd.errors import NotFoundError, SnapdError
from snapd.memory.hashing import bad_chunks
from snapd.runtime.elastic import Wanted
from snapd.runtime.job import Job
from snapd.runtime.mending import mended
from snapd.runtime.peers import Brought, ShardSource, WorldAsk, WorldPlan
from snapd.runtime.restoring import condemn, holders_of
from snapd.runtime.session import Session

MARGIN_S = 30.0  # beyond what the collector itself waits


class Collecting(Protocol):
    """The cluster, as far as a restore needs it."""

    async def plan_restore(self, name: str, ask: WorldAsk, *, timeout_s: float) -> WorldPlan: ...

    async def finish_restore(
        self, name: str, generation: int, number: int, rank: int, report: RankReport, *, timeout_s: float
    ) -> Verdicts: ...


class Bringing(Protocol):
    """runtime/bringing.py."""

    async def bring(
        self, job: Job, snapshot: SnapshotId, rank: int, sources: Sequence[ShardSource], *, is_here_bad: bool
    ) -> Brought: ...

    async def find_record(
        self, job: Job, snapshot: SnapshotId, rank: int, sources: Sequence[ShardSource]
    ) -> ShardRecord: ...

    async def fill(
        self, job: Job, record: ShardRecord, sources: Sequence[ShardSource], wanted: Sequence[Wanted]
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class RoundShards:
    """The shards of a round's snapshot, wherever they are: elastic.py's ShardsElsewhere."""

    bringing: Bringing
    sources: Sequence[ShardSource]

    async def record(self, job: Job, snapshot: SnapshotId, rank: int) -> ShardRecord:
        if all(source.rank != rank for source in self.sources):
            raise NotFoundError(f"snapshot {snapshot} has no rank {rank}", kind="shard", job=job.name)
        return await self.bringing.find_record(job, snapshot, rank, self.sources)

    async def fill(self, job: Job, record: ShardRecord, wanted: Sequence[Wanted]) -> None:
        await self.bringing.fill(job, record, self.sources, wanted)


@dataclass(slots=True)
class _Round:
    """`hold_count`: how often the chosen snapshot is held for it."""

    plan: WorldPlan
    local: RestoreRound
    hold_count: int = 0
    bringing: dict[int, asyncio.Task[ShardRecord]] = field(default_factory=dict)


class WorldRestores:
    """The rounds of all jobs on this node."""

    def __init__(self, cluster: Collecting, bringing: Bringing, *, wait_s: float) -> None:
        self._cluster = cluster
        self._bringing = bringing
        self._wait_s = wait_s
        self._rounds: dict[tuple[str, int, int], _Round] = {}

    async def plan(
        self,
        job: Job,
        session: Session,
        number: int,
        step: int | None,
        *,
        accept_older: bool,
        is_elastic: bool = False,
    ) -> Decision:
        """The world's decision; when a snapshot is found, this rank's shard is here when this returns. `is_elastic`:
        one of another number of ranks will do; then none of it is brought yet.

        Raises:
            NotRestorable, UnavailableError: a shard cannot be brought; the next round may find another source.
        """
        key = (job.name, session.generation, number)
        async with job.planning:
            known = self._rounds.get(key)
            if known is None:
                ask = WorldAsk(
                    generation=session.generation,
                    number=number,
                    world_size=session.row.world_size,
                    step=step,
                    accept_older=accept_older,
                    is_elastic=is_elastic,
                )
                known = self._rounds[key] = await self._ask(job, ask)
                self._forget_old(job, session.generation)
        known.local.check_same(step)
        if known.plan.decision.outcome is Outcome.FOUND:
            if len(known.plan.sources) == session.row.world_size:
                await self._brought(job, known, session.rank)
            else:
                self._hold(job, known)
        return known.plan.decision

    def _hold(self, job: Job, round_: _Round) -> None:
        """What is here of a snapshot that all ranks read parts of stays until the round is over."""
        chosen = round_.plan.decision.chosen
        if chosen is not None and chosen in job.ledger.snapshots and not round_.hold_count:
            job.ledger.hold(chosen)
            round_.hold_count += 1

    def chosen(self, job: Job, session: Session, number: int) -> tuple[SnapshotId, RoundShards]:
        """What a round restores, and where its shards are.

        Raises:
            NotFoundError: kind `restore_round`.
        """
        round_ = self._rounds.get((job.name, session.generation, number))
        chosen = round_.plan.decision.chosen if round_ is not None else None
        if round_ is None or chosen is None or round_.plan.decision.outcome is not Outcome.FOUND:
            raise NotFoundError("no restore was planned in this round", kind="restore_round", round=number)
        return chosen, RoundShards(self._bringing, round_.plan.sources)

    async def _ask(self, job: Job, ask: WorldAsk) -> _Round:
        plan = await self._cluster.plan_restore(job.name, ask, timeout_s=self._wait_s + MARGIN_S)
        local = RestoreRound(ask.generation, ask.number, ask.world_size, ask.step, plan.decision)
        chosen = plan.decision.chosen
        if plan.decision.outcome is Outcome.FOUND and chosen is not None and chosen in job.ledger.snapshots:
            job.ledger.announce(chosen)
        job.context.log.info(
            "restore.planned",
            job=job.name,
            generation=ask.generation,
            round=ask.number,
            outcome=plan.decision.outcome.value,
            chosen=str(chosen) if chosen else None,
            reason=plan.decision.reason,
        )
        return _Round(plan, local)

    def _forget_old(self, job: Job, generation: int) -> None:
        for key in [key for key in self._rounds if key[0] == job.name and key[1] < generation]:
            self._let_go(job, self._rounds.pop(key))

    def _let_go(self, job: Job, round_: _Round) -> None:
        chosen, count = round_.plan.decision.chosen, round_.hold_count
        round_.hold_count = 0
        for _ in range(count):
            if chosen is not None and chosen in job.ledger.snapshots:
                job.ledger.unhold(chosen)

    async def _brought(self, job: Job, round_: _Round, rank: int) -> ShardRecord:
        """The record of a rank's shard, here; several who ask wait for the same work."""
        task = round_.bringing.get(rank)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = round_.bringing[rank] = asyncio.ensure_future(self._bring_here(job, round_, rank))
        return await asyncio.shield(task)

    async def _bring_here(self, job: Job, round_: _Round, rank: int) -> ShardRecord:
        chosen = round_.plan.decision.chosen
        assert chosen is not None
        source = next((s for s in round_.plan.sources if s.rank == rank), None)
        if source is None:
            raise NotFoundError("the plan names no source for this rank", kind="restore_round", rank=rank)
        facts = job.ledger.snapshots.get(chosen)
        shard = facts.shards.get(rank) if facts is not None else None
        is_here_bad = False
        if shard is not None and not shard.is_verified:
            is_here_bad = bool(await self._bad_here(job, shard.record))
            shard.is_verified = not is_here_bad
        if shard is not None and not is_here_bad:
            job.ledger.hold(chosen)
            round_.hold_count += 1
            return shard.record
        found = await self._bringing.bring(job, chosen, rank, round_.plan.sources, is_here_bad=is_here_bad)
        round_.hold_count += 1
        brought = job.ledger.snapshots[chosen].shards.get(rank)
        if brought is not None:
            brought.is_verified = True
        job.ledger.announce(chosen)
        return found.record

    async def _bad_here(self, job: Job, record: ShardRecord) -> list[tuple[int, str]]:
        loop, memory = asyncio.get_running_loop(), job.arena(record.rank).memory
        return await loop.run_in_executor(
            job.context.hashing, bad_chunks, memory, record, 0, len(record.chunks)
        )

    async def shards_for(self, job: Job, session: Session, number: int) -> list[ShardRecord]:
        """The records that a rank needs: its own first, then those of ranks that hold bytes for it."""
        round_ = self._rounds.get((job.name, session.generation, number))
        if round_ is None:
            raise NotFoundError("no restore was planned in this round", kind="restore_round", round=number)
        own = await self._brought(job, round_, session.rank)
        holders: Sequence[int] = sorted(await holders_of(job, own))
        others = [await self._brought(job, round_, rank) for rank in holders]
        return [own, *others]

    async def finish(self, job: Job, session: Session, number: int, report: RankReport) -> Verdicts:
        """Report one rank's restore; return the world's answer.

        Raises:
            NotFoundError: kind `restore_round`.
        """
        round_ = self._rounds.get((job.name, session.generation, number))
        if round_ is not None and report.bad_chunks:
            report = await self._mended(job, round_, report)
        answer = await self._cluster.finish_restore(
            job.name,
            session.generation,
            number,
            session.rank,
            report,
            timeout_s=job.context.settings.restore_finish_s + MARGIN_S,
        )
        chosen = round_.plan.decision.chosen if round_ is not None else None
        job.fetched.release(job.arenas, (session.generation, number))
        if round_ is None or chosen is None or round_.local.is_concluded:
            return answer
        round_.local.is_concluded = True
        self._let_go(job, round_)
        if answer.is_committed:
            await self._commit_parent(job, session.generation, chosen)
        if answer.problem:
            condemn(job, chosen, answer.problem)
        job.context.log.info(
            "restore.finished",
            job=job.name,
            generation=session.generation,
            round=number,
            step=chosen.step,
            is_committed=answer.is_committed,
            reason=answer.reason,
        )
        job.settle()
        return answer

    async def _mended(self, job: Job, round_: _Round, report: RankReport) -> RankReport:
        """Bring anew what a rank found bad in shards that are here; what the world is then told."""
        chosen, left = round_.plan.decision.chosen, []
        facts = job.ledger.snapshots.get(chosen) if chosen is not None else None
        if facts is None or job.repairs is None:
            return report
        job.context.metrics.chunks_bad.inc(len(report.bad_chunks))
        for rank in sorted({rank for rank, _, _ in report.bad_chunks}):
            mine = [(index, what) for owner, index, what in report.bad_chunks if owner == rank]
            if rank not in facts.shards:  # it could not be brought at all, and why is what the rank says
                left += [(rank, *entry) for entry in mine]
                continue
            repair = await mended(job, job.repairs, facts.id, rank, mine)
            if not repair.is_whole and not repair.is_proved:
                return RankReport(False, failure=f"bad chunks cannot be brought anew now: {repair.why}")
            if not repair.is_whole:
                left += [(rank, index, f"{what}; {repair.why}") for index, what in mine]
        return RankReport(False, tuple(left)) if left else RankReport(False, is_mended=True)

    async def _commit_parent(self, job: Job, generation: int, parent: SnapshotId) -> None:
        try:
            await job.coordination.commit_parent(generation, parent)
        except SnapdError as error:  # a fact for `show`; the restore itself is done
            job.context.log.warning("parent.not_recorded", job=job.name, reason=str(error))
