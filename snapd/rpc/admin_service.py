"""The Admin service: what the command line asks. See proto/snapd/v1/admin.proto."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable

from snapd_proto import admin_pb2, admin_pb2_grpc, trainer_pb2

from snapd import __version__
from snapd.core.ids import SnapshotId, checked_job_name
from snapd.core.ledger import SnapshotFacts
from snapd.errors import ConfigError, NotFoundError, SnapdError
from snapd.memory.records import record_to_proto
from snapd.rpc.cluster_status import add_protection, cluster_status, drain
from snapd.rpc.fill_arena import fill
from snapd.rpc.guard import ServicerContext, caller, refuse, told
from snapd.rpc.tier_status import add_jobs, disk_status, flush_now, tier_status
from snapd.runtime import levels
from snapd.runtime.job import Job
from snapd.runtime.node import Node
from snapd.runtime.restoring import Verified, verify
from snapd.runtime.session import Session

PROGRESS_INTERVAL_S = 0.2
FORGET_WAIT_S = 10.0  # a disk that hangs does not hold the answer up for longer


class AdminService(admin_pb2_grpc.AdminServicer):
    """One per daemon."""

    def __init__(self, node: Node) -> None:
        self.node = node

    @told
    async def Status(
        self, request: admin_pb2.StatusRequest, context: ServicerContext
    ) -> admin_pb2.StatusReply:
        caller(self.node, context)
        node, settings = self.node, self.node.context.settings
        reply = admin_pb2.StatusReply(
            version=__version__,
            pid=os.getpid(),
            uptime_s=node.context.environment.monotonic_s() - node.started_s,
            arena_bytes=sum(node.held_by_job().values()),
            arena_bytes_limit=settings.arena_bytes,
            arena_path=str(node.context.arena.path),
            anonymous_bytes=_anonymous_bytes(),
        )
        names = sorted({*node.jobs, *node.broken})
        if request.job and request.job not in names:
            raise NotFoundError(f"no job {request.job[:64]!r} on this node", kind="job")
        for name in [request.job] if request.job else names:
            if name in node.broken:
                problem = node.broken[name]
                reply.jobs.append(admin_pb2.JobStatus(job=name, problem=f"{problem.message}; {problem.hint}"))
            else:
                reply.jobs.append(_job_status(node.jobs[name]))
                if node.cluster is not None:
                    add_protection(reply.jobs[-1], node.jobs[name], node.cluster)
                add_jobs(reply.jobs[-1], node, name)
        if node.tier is not None:
            reply.tier.CopyFrom(tier_status(node.tier))
        if node.disks is not None:
            reply.disk.CopyFrom(disk_status(node.disks))
        if node.cluster is not None:
            reply.cluster.CopyFrom(await cluster_status(node.cluster, ask_peers=request.ask_peers))
        return reply

    @told
    async def ListSnapshots(
        self, request: admin_pb2.ListSnapshotsRequest, context: ServicerContext
    ) -> admin_pb2.ListSnapshotsReply:
        caller(self.node, context)
        jobs = (
            [self.node.existing_job(request.job)]
            if request.job
            else [j for _, j in sorted(self.node.jobs.items())]
        )
        return admin_pb2.ListSnapshotsReply(
            snapshots=[_summary(job, facts) for job in jobs for facts in job.ledger.newest_first()]
        )

    @told
    async def GetSnapshot(
        self, request: admin_pb2.GetSnapshotRequest, context: ServicerContext
    ) -> admin_pb2.GetSnapshotReply:
        caller(self.node, context)
        job = self.node.existing_job(request.job)
        facts = _chosen(job, request)
        reply = admin_pb2.GetSnapshotReply(summary=_summary(job, facts))
        for rank, shard in sorted(facts.shards.items()):
            pool = job.arena(rank).pool
            reply.shards.append(record_to_proto(shard.record))
            reply.chunk_reference_counts.extend(pool.reference_count(place) for place in shard.record.places)
        return reply

    async def Verify(
        self, request: admin_pb2.VerifyRequest, context: ServicerContext
    ) -> AsyncIterator[admin_pb2.VerifyProgress]:
        """Stream progress, then one message with `finished` and the bad chunks."""
        try:
            caller(self.node, context)
            job = self.node.existing_job(request.job)
            facts = _chosen(job, request)
        except SnapdError as error:
            await refuse(context, error)
            return
        total = sum(shard.record.nbytes for shard in facts.shards.values())
        done = 0

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes

        def progress(*, is_finished: bool) -> admin_pb2.VerifyProgress:
            return admin_pb2.VerifyProgress(
                nbytes_done=done,
                nbytes_total=total,
                finished=is_finished,
                generation=facts.id.generation,
                step=facts.id.step,
            )

        found: list[Verified] = []
        fragments: list[int] = []

        async def check() -> None:
            found.append(await verify(job, facts.id, count))
            if self.node.repairs is not None:
                fragments.extend(await self.node.repairs.verify_parity(job, facts.id))
            job.settle()

        work = self.node.context.keep(check())  # it ends by itself if the caller goes away
        while not work.done():
            await asyncio.wait([work], timeout=PROGRESS_INTERVAL_S)
            if not work.done():
                yield progress(is_finished=False)
        failure = work.exception()
        if isinstance(failure, SnapdError):
            await refuse(context, failure)
        elif failure is not None:
            raise failure
        last = progress(is_finished=True)
        for result in found:
            last.bad_chunks.extend(_bad_chunks(result.bad))
            last.repaired_chunks.extend(_bad_chunks(result.repaired))
            last.repair, last.repair_waits = result.why, result.is_waiting
            last.repaired_from = result.source
        last.fragments_checked, last.fragments_bad = fragments or (0, 0)
        yield last

    async def FillArena(
        self, request: admin_pb2.FillArenaRequest, context: ServicerContext
    ) -> AsyncIterator[admin_pb2.FillArenaProgress]:
        try:
            caller(self.node, context)
            async for progress in fill(self.node, request):
                yield progress
        except SnapdError as error:
            await refuse(context, error)

    @told
    async def RemoveJob(
        self, request: admin_pb2.RemoveJobRequest, context: ServicerContext
    ) -> admin_pb2.RemoveJobReply:
        caller(self.node, context)
        node, name = self.node, checked_job_name(request.job)
        if node.cluster is None or name in node.broken:
            count, freed = node.remove_job(name, is_forced=request.force)
            waits = await node.disks.forgotten(name, FORGET_WAIT_S) if node.disks is not None else ""
            return admin_pb2.RemoveJobReply(
                snapshots_removed=count, arena_bytes_freed=freed, disk_waits=waits
            )
        removed = await node.cluster.removals.remove(name, is_forced=request.force)
        return admin_pb2.RemoveJobReply(
            snapshots_removed=removed.snapshots,
            arena_bytes_freed=removed.nbytes,
            nodes=removed.nodes,
            late_nodes=removed.late,
            absent_nodes=removed.absent,
            reasons=removed.reasons,
            disk_waits=await node.disks.forgotten(name, FORGET_WAIT_S) if node.disks is not None else "",
        )

    @told
    async def Drain(self, request: admin_pb2.DrainRequest, context: ServicerContext) -> admin_pb2.DrainReply:
        caller(self.node, context)
        if self.node.cluster is None:
            raise ConfigError(
                "this daemon is in no cluster: nothing of it could go to other nodes", kind="no_cluster"
            )
        return await drain(self.node.cluster, request)

    @told
    async def Flush(self, request: admin_pb2.FlushRequest, context: ServicerContext) -> admin_pb2.FlushReply:
        caller(self.node, context)
        return await flush_now(self.node, request)


def _bad_chunks(entries: Iterable[tuple[int, int, str]]) -> list[trainer_pb2.BadChunk]:
    return [trainer_pb2.BadChunk(rank=rank, chunk_index=index, what=what) for rank, index, what in entries]


def _chosen(job: Job, request: admin_pb2.GetSnapshotRequest | admin_pb2.VerifyRequest) -> SnapshotFacts:
    """The snapshot that a request names; the newest complete one if it names none, else the newest."""
    matching = [
        facts
        for facts in job.ledger.newest_first()
        if (not request.has_step or facts.id.step == request.step)
        and (not request.has_generation or facts.id.generation == request.generation)
    ]
    complete = [facts for facts in matching if facts.is_complete]
    if not matching:
        raise NotFoundError("no such snapshot", kind="snapshot", job=job.name)
    return (complete or matching)[0]


def _summary(job: Job, facts: SnapshotFacts) -> admin_pb2.SnapshotSummary:
    records = [shard.record for _, shard in sorted(facts.shards.items())]
    shared = sum(
        chunk.nbytes
        for record in records
        for chunk in record.chunks
        if job.arena(record.rank).pool.reference_count(chunk.place) > 1
    )
    generation = job.coordination.generation(facts.id.generation)
    parent: SnapshotId | None = generation.parent if generation else None
    return admin_pb2.SnapshotSummary(
        job=job.name,
        generation=facts.id.generation,
        step=facts.id.step,
        world_size=facts.world_size,
        ranks_captured=sorted(facts.shards),
        complete=facts.is_complete,
        nbytes=sum(record.nbytes for record in records),
        nbytes_shared=shared,
        captured_wall_time_s=max((record.captured_wall_time_s for record in records), default=0.0),
        verified=facts.is_verified,
        problem=facts.problem,
        has_parent=parent is not None,
        parent_generation=parent.generation if parent else 0,
        parent_step=parent.step if parent else 0,
        is_clustered=job.world is not None,
        level=levels.name_of(job, facts),
    )


def _job_status(job: Job) -> admin_pb2.JobStatus:
    newest = job.ledger.newest_complete()
    refusals = [arena.refusal for _, arena in sorted(job.arenas.items()) if arena.refusal]
    return admin_pb2.JobStatus(
        job=job.name,
        generation=job.coordination.current(),
        has_complete=newest is not None,
        complete_generation=newest.id.generation if newest else 0,
        complete_step=newest.id.step if newest else 0,
        arena_bytes=job.arena_bytes,
        arena_bytes_in_use=sum(a.pool.held_count + a.pool.granted_count for a in job.arenas.values())
        * job.chunk_bytes,
        sessions=[
            _session_status(job, s)
            for s in sorted(job.sessions.values(), key=lambda s: (s.generation, s.rank))
        ],
        problem=refusals[0]
        if refusals
        else job.replicas.difference and f"replicas: {job.replicas.difference}",
    )


def _session_status(job: Job, session: Session) -> admin_pb2.SessionStatus:
    pool, counts = job.arena(session.rank).pool, session.counts
    newest = job.ledger.newest_shard(session.rank, session_id=session.id)
    return admin_pb2.SessionStatus(
        session_id=session.id,
        job=job.name,
        rank=session.rank,
        world_size=session.row.world_size,
        generation=session.generation,
        pid=session.row.pid,
        state=session.state.value,
        newest_captured_step=counts.newest_captured_step or 0,
        has_captured=counts.newest_captured_step is not None,
        chunks_in_use=pool.granted_of(session.id) + (len(newest.record.chunks) if newest else 0),
        chunks_set_aside=pool.set_aside_of(session.id),
        skipped_steps=counts.skipped,
        discarded_steps=counts.discarded + counts.refused,
        last_window_s=counts.last_window_s,
    )


def _anonymous_bytes() -> int:
    """Memory of this process outside the arena."""
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
