"""What the command line hears of the shared tier and of each job's way to it."""

from __future__ import annotations

from typing import Any

from snapd_proto import admin_pb2

from snapd.core.ids import SnapshotId
from snapd.errors import ConfigError, NotFoundError
from snapd.runtime.disk_job import JobDisk
from snapd.runtime.disk_node import NodeDisks
from snapd.runtime.flush_loop import FlushLoop
from snapd.runtime.flushing import JobFlusher
from snapd.runtime.node import Node
from snapd.runtime.tiers import NodeTier

FLUSH_WAIT_MAX_S = 60.0  # in one call; commands ask again


def tier_status(tier: NodeTier) -> admin_pb2.TierStatus:
    """The tier of this node, and what was asked of its store."""
    reply = admin_pb2.TierStatus(url=tier.settings.url, compression=tier.compression)
    store = tier.store
    if store is not None:
        tier.count_requests()
        reply.is_open = True
        reply.requests.update(store.requests.count)
        reply.retries = store.requests.retries
        reply.sent_nbytes = store.requests.sent_nbytes
        reply.received_nbytes = store.requests.received_nbytes
    elif tier.trouble is not None:
        reply.trouble, reply.trouble_kind = tier.trouble.reason, tier.trouble.kind
    return reply


def disk_status(disks: NodeDisks) -> admin_pb2.TierStatus:
    """The own disk of this node."""
    tier, facts = disks.tier, disks.scrub.facts
    reply = admin_pb2.TierStatus(url=tier.description, is_open=tier.store is not None)
    reply.scrub.CopyFrom(
        admin_pb2.DiskScrub(
            period_s=tier.settings.scrub.period_s,
            nbytes=facts.nbytes,
            fresh_nbytes=facts.fresh_nbytes,
            has_oldest=facts.oldest_s is not None,
            oldest_s=facts.oldest_s or 0.0,
            bad_count=sum(len(damages) for damages in disks.damages().values()),
        )
    )
    if not reply.is_open and (trouble := disks.trouble) is not None:
        reply.trouble, reply.trouble_kind = trouble.message, trouble.kind
    return reply


def add_jobs(reply: admin_pb2.JobStatus, node: Node, name: str) -> None:
    """What the tiers of this node say of a job."""
    if name in node.flushers:
        reply.flush.CopyFrom(flush_status(node.flushers[name], node.flushers[name].durable))
    disk = node.disks.jobs.get(name) if node.disks is not None else None
    if disk is not None:
        reply.disk.CopyFrom(flush_status(disk, disk.here))
        damages = disk.damages
        reply.disk.bad_count, reply.disk.bad_reason = len(damages), damages[0] if damages else ""


def flush_status(flusher: FlushLoop[Any], durable: SnapshotId | None) -> admin_pb2.FlushStatus:
    """One job. `durable`: the newest that is there."""
    done, total = flusher.progress()
    reply = admin_pb2.FlushStatus(
        reason=flusher.reason,
        pause=flusher.trouble.kind if flusher.trouble is not None else "",
        behind_s=flusher.behind_s(),
        nbytes_done=done,
        nbytes_total=total,
    )
    if durable is not None:
        reply.has_durable = True
        reply.durable_generation, reply.durable_step = durable.generation, durable.step
    last = flusher.last
    if last is not None:
        reply.last.CopyFrom(
            admin_pb2.FlushedPart(
                generation=last.snapshot.generation,
                step=last.snapshot.step,
                written_nbytes=last.raw_nbytes,
                stored_nbytes=last.stored_nbytes,
                reused_nbytes=last.reused_nbytes,
                packs=last.packs,
                seconds=last.seconds,
                requests=dict(last.requests),
                requests_per_gb=last.requests_per_gb,
            )
        )
    return reply


async def flush_now(node: Node, request: admin_pb2.FlushRequest) -> admin_pb2.FlushReply:
    """Have the newest complete snapshot of a job become durable; returns early when waiting does not help.

    Raises:
        ConfigError: kind `no_tier`. NotFoundError: kinds `job`, `snapshot`.
    """
    if node.tier is None and node.disks is None:
        raise ConfigError("this daemon has no tier", kind="no_tier", hint="set tier.shared or tier.node")
    job = node.existing_job(request.job)
    flusher: JobFlusher | JobDisk | None = node.flushers.get(job.name)
    if flusher is None and node.disks is not None:
        flusher = node.disks.jobs.get(job.name)
    if flusher is None:
        raise NotFoundError("the job has just been removed", kind="job", job=job.name)
    newest = flusher.newest
    if newest is None:
        raise NotFoundError("the job has no complete snapshot", kind="snapshot", job=job.name)
    if isinstance(flusher, JobFlusher) and flusher.is_durable(newest) and not request.is_again:
        await flusher.confirm()
    flusher.request(newest, is_again=request.is_again)
    timeout_s = min(max(0.0, request.timeout_s), FLUSH_WAIT_MAX_S)

    def is_over() -> bool:
        return job.is_removed or flusher.is_durable(newest) or flusher.is_refused(newest)

    await job.changes.wait_until(is_over, timeout_s)
    is_durable = flusher.is_durable(newest)
    shown = flusher.durable if is_durable and flusher.durable is not None else newest
    return admin_pb2.FlushReply(
        is_durable=is_durable,
        generation=shown.generation,
        step=shown.step,
        reason="durable" if is_durable else flusher.reason,
        pause=flusher.trouble.kind if flusher.trouble is not None and not is_durable else "",
        is_refused=not is_durable and flusher.is_refused(newest),
    )
