"""The Trainer service: see proto/snapd/v1/trainer.proto."""

from __future__ import annotations

import asyncio

from snapd_proto import trainer_pb2, trainer_pb2_grpc

from snapd.core.ids import SnapshotId
from snapd.core.restore import Outcome
from snapd.errors import (
    AuthError,
    CapacityError,
    ConfigError,
    NotFoundError,
    RemoteProtocolError,
    UnavailableError,
)
from snapd.memory.records import record_to_proto
from snapd.rpc.convert import (
    checked_state_bytes,
    for_another_world,
    opening_of,
    places_to_proto,
    plan_reply,
    report_of,
)
from snapd.rpc.guard import ServicerContext, caller, told
from snapd.runtime import levels, service
from snapd.runtime.elastic import ShardsElsewhere, fetch_chunks, record_of
from snapd.runtime.job import Job
from snapd.runtime.node import Node
from snapd.runtime.opening import begin_rollback, open_session, reserve
from snapd.runtime.restoring import chosen_in, finish_restore, plan_restore, shards_for
from snapd.runtime.session import Session
from snapd.runtime.world_restoring import WorldRestores

LEVELS = {
    trainer_pb2.LEVEL_UNSPECIFIED: levels.Level.CAPTURED,
    trainer_pb2.LEVEL_CAPTURED: levels.Level.CAPTURED,
    trainer_pb2.LEVEL_PROTECTED: levels.Level.PROTECTED,
    trainer_pb2.LEVEL_DURABLE: levels.Level.DURABLE,
}
LEVEL_NUMBERS = {
    levels.Level.CAPTURED: trainer_pb2.LEVEL_CAPTURED,
    levels.Level.PROTECTED: trainer_pb2.LEVEL_PROTECTED,
    levels.Level.DURABLE: trainer_pb2.LEVEL_DURABLE,
}


SHARDS_LISTED_MAX = 64
CHUNKS_FETCHED_MAX = 1 << 16


class TrainerService(trainer_pb2_grpc.TrainerServicer):
    """One per daemon."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def _session(self, session_id: int, context: ServicerContext) -> tuple[Job, Session]:
        return self.node.session_of(caller(self.node, context), session_id)

    @told
    async def OpenSession(
        self, request: trainer_pb2.OpenSessionRequest, context: ServicerContext
    ) -> trainer_pb2.OpenSessionReply:
        peer = caller(self.node, context)
        if peer.is_admin:
            raise AuthError("an admin connection opens no session", kind="role")
        opening = opening_of(request, is_clustered=self.node.cluster is not None)
        job = self.node.job_for(opening.job)
        if job.flusher is not None:
            await job.flusher.before_opening()
        if job.disk is not None:
            await job.disk.before_opening()
        if self.node.tier_restores is not None:
            await self.node.tier_restores.before_opening(job)
        try:
            session = await open_session(
                self.node.context, job, peer, opening, stored_chunk_bytes=await self._stored_chunk_bytes(job)
            )
        except (CapacityError, ConfigError):
            self.node.drop_if_empty(job)
            raise
        self.node.adopt_new(peer, session)
        if self.node.tier_restores is not None:  # one that ends before the next poll was here, too
            self.node.tier_restores.observe([job])
        shown = await newest_or_bad(self.node, job)
        return trainer_pb2.OpenSessionReply(
            session_id=session.id,
            session_secret=session.row.secret,
            generation=session.generation,
            chunk_bytes=job.chunk_bytes,
            lane_count=session.row.slots,
            has_parent=shown is not None,
            newest_generation=shown.generation if shown else 0,
            newest_step=shown.step if shown else 0,
            arena_bytes=job.arena(session.rank).memory.nbytes,
        )

    async def _stored_chunk_bytes(self, job: Job) -> int:
        """Of what a tier has of a job that is not here yet: it is to fit into frames."""
        if job.disk is not None and job.disk.chunk_bytes:
            return job.disk.chunk_bytes
        if self.node.tier_restores is None or job.chunk_bytes:
            return 0
        return await self.node.tier_restores.chunk_bytes(job)

    @told
    async def Reserve(
        self, request: trainer_pb2.ReserveRequest, context: ServicerContext
    ) -> trainer_pb2.ReserveReply:
        job, session = self._session(request.session_id, context)
        nbytes = await reserve(job, session, checked_state_bytes(request.state_bytes))
        return trainer_pb2.ReserveReply(arena_bytes=nbytes)

    @told
    async def PlanRestore(
        self, request: trainer_pb2.PlanRestoreRequest, context: ServicerContext
    ) -> trainer_pb2.PlanRestoreReply:
        job, session = self._session(request.session_id, context)
        step = request.step if request.has_step else None
        if self.node.restores is not None:
            if job.disk is not None:
                await job.disk.wait_filled()
            return await self._plan_world(self.node.restores, job, session, request, step)
        decision = await plan_restore(
            job,
            session,
            request.round,
            step,
            is_elastic=request.elastic,
            accept_older=request.accept_older,
            tier=self.node.tier_restores,
        )
        reply = plan_reply(decision)
        if decision.outcome is Outcome.FOUND and decision.chosen is not None:
            if decision.left_in_tier:
                reply.saved_world_size = decision.left_in_tier
                return reply
            facts = job.ledger.snapshots.get(decision.chosen)
            if facts is None:
                raise NotFoundError("the round's snapshot is gone: begin another round", kind="restore_round")
            reply.saved_world_size = facts.world_size
            if facts.world_size != session.row.world_size:
                return for_another_world(reply, request, session.row.world_size)
            reply.shards.extend(
                record_to_proto(record) for record in await shards_for(job, facts, session.rank)
            )
        return reply

    async def _plan_world(
        self,
        restores: WorldRestores,
        job: Job,
        session: Session,
        request: trainer_pb2.PlanRestoreRequest,
        step: int | None,
    ) -> trainer_pb2.PlanRestoreReply:
        decision = await restores.plan(
            job,
            session,
            request.round,
            step,
            accept_older=request.accept_older,
            is_elastic=request.elastic,
        )
        reply = plan_reply(decision)
        if decision.outcome is Outcome.FOUND:
            _, shards = restores.chosen(job, session, request.round)
            reply.saved_world_size = len(shards.sources)
            if reply.saved_world_size != session.row.world_size:
                return for_another_world(reply, request, session.row.world_size)
            records = await restores.shards_for(job, session, request.round)
            reply.shards.extend(record_to_proto(record) for record in records)
        return reply

    def _chosen(self, job: Job, session: Session, number: int) -> tuple[SnapshotId, ShardsElsewhere | None]:
        if self.node.restores is not None:
            return self.node.restores.chosen(job, session, number)
        tier = self.node.tier_restores
        return chosen_in(job, session, number), None if tier is None else tier.chunks

    @told
    async def ListShards(
        self, request: trainer_pb2.ListShardsRequest, context: ServicerContext
    ) -> trainer_pb2.ListShardsReply:
        job, session = self._session(request.session_id, context)
        snapshot, elsewhere = self._chosen(job, session, request.round)
        if len(request.ranks) > SHARDS_LISTED_MAX:
            raise RemoteProtocolError("too many shards in one request", kind="shards", max=SHARDS_LISTED_MAX)
        records = await asyncio.gather(*(record_of(job, elsewhere, snapshot, rank) for rank in request.ranks))
        return trainer_pb2.ListShardsReply(shards=[record_to_proto(record) for record in records])

    @told
    async def FetchChunks(
        self, request: trainer_pb2.FetchChunksRequest, context: ServicerContext
    ) -> trainer_pb2.FetchChunksReply:
        job, session = self._session(request.session_id, context)
        snapshot, elsewhere = self._chosen(job, session, request.round)
        wanted = {shard.rank: list(shard.chunks) for shard in request.wanted}
        if len(wanted) != len(request.wanted) or sum(map(len, wanted.values())) > CHUNKS_FETCHED_MAX:
            raise RemoteProtocolError(
                "too many chunks, or a rank twice", kind="chunks", max=CHUNKS_FETCHED_MAX
            )
        found = await fetch_chunks(job, session, elsewhere, (request.round, snapshot), wanted)
        return trainer_pb2.FetchChunksReply(found=[places_to_proto(found[rank]) for rank in wanted])

    @told
    async def FinishRestore(
        self, request: trainer_pb2.FinishRestoreRequest, context: ServicerContext
    ) -> trainer_pb2.FinishRestoreReply:
        job, session = self._session(request.session_id, context)
        report = report_of(request)
        if self.node.restores is not None:
            answer = await self.node.restores.finish(job, session, request.round, report)
        else:
            answer = await finish_restore(job, session, request.round, report)
        return trainer_pb2.FinishRestoreReply(
            committed=answer.is_committed, try_again=answer.is_try_again, reason=answer.reason
        )

    @told
    async def BeginRollback(
        self, request: trainer_pb2.BeginRollbackRequest, context: ServicerContext
    ) -> trainer_pb2.BeginRollbackReply:
        job, session = self._session(request.session_id, context)
        generation = await begin_rollback(job, session, request.rollback_count)
        return trainer_pb2.BeginRollbackReply(generation=generation)

    @told
    async def WaitLevel(
        self, request: trainer_pb2.WaitLevelRequest, context: ServicerContext
    ) -> trainer_pb2.WaitLevelReply:
        job, session = self._session(request.session_id, context)
        level = levels.level_for(job, LEVELS[request.level])
        snapshot = SnapshotId(session.generation, request.step)
        service.serve(job, session)
        tier = job.flusher or job.disk
        if level is levels.Level.DURABLE and tier is not None:
            tier.request(snapshot)

        def is_over() -> bool:
            return (
                job.is_removed
                or not session.is_served
                or levels.has(job, snapshot, level)
                or levels.lost_reason(job, snapshot, level) != ""
                or levels.is_refused(job, snapshot, level)
            )

        timeout_s = min(max(0.0, request.timeout_s), self.node.context.settings.wait_max_s)
        await job.changes.wait_until(is_over, timeout_s)
        reply = trainer_pb2.WaitLevelReply(level=LEVEL_NUMBERS[level], tier=levels.tier_of(job, level))
        lost = levels.lost_reason(job, snapshot, level)
        if levels.has(job, snapshot, level):
            where = f", in the tier {reply.tier}" if reply.tier else ""
            reply.reached, reply.reason = True, f"{level.value} on all ranks{where}"
        elif lost:
            reply.dropped, reply.reason = True, lost
        else:
            reply.refused = levels.is_refused(job, snapshot, level)
            reply.reason = levels.missing(job, snapshot, level, world_size=session.row.world_size)
        return reply

    @told
    async def Last(self, request: trainer_pb2.LastRequest, context: ServicerContext) -> trainer_pb2.LastReply:
        job, _ = self._session(request.session_id, context)
        level = levels.level_for(job, LEVELS[request.level])
        newest = levels.newest(job, level)
        reply = trainer_pb2.LastReply(
            replica_difference=job.replicas.difference, tier=levels.tier_of(job, level)
        )
        if newest is not None:
            reply.found, reply.generation, reply.step = True, newest.generation, newest.step
        return reply

    @told
    async def CloseSession(
        self, request: trainer_pb2.CloseSessionRequest, context: ServicerContext
    ) -> trainer_pb2.CloseSessionReply:
        peer = caller(self.node, context)
        job, session = self.node.session_of(peer, request.session_id, may_be_fenced=True)
        service.serve(job, session)
        if not await job.changes.wait_until(
            lambda: session.is_drained, self.node.context.settings.restore_settle_s
        ):
            raise UnavailableError(
                "the session's captures are still being taken up", kind="settling", hint="ask again"
            )
        if session.is_live:
            self.node.close_session(job, session, is_final=request.final)
        return trainer_pb2.CloseSessionReply()


async def newest_or_bad(node: Node, job: Job) -> SnapshotId | None:
    """The newest snapshot that the job has anywhere; else one that is proved bad: not the same as none."""
    newest = levels.newest(job, levels.Level.CAPTURED)
    if newest is None and node.cluster is not None:
        newest = await node.cluster.newest_recorded(job.name)
    if newest is None and node.tier_restores is not None:
        newest = await node.tier_restores.newest(job)
    if newest is None and job.disk is not None:
        newest = job.disk.newest_stored
    bad = next((facts.id for facts in job.ledger.newest_first() if facts.problem), None)
    return newest or bad
