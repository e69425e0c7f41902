"""From a complete lane to a record in the index: check, hash, share, commit, tell."""

from __future__ import annotations

from snapd_native import ControlPage

from snapd.core.ids import SnapshotId
from snapd.core.lanes import HandOver, check_hand_over
from snapd.core.manifest import ShardRecord
from snapd.core.states import LaneState, LaneStep
from snapd.errors import CapacityError, RemoteProtocolError, SnapdError
from snapd.runtime.digesting import Digested, ExpectedLayout, digest_shard
from snapd.runtime.faultpoints import point
from snapd.runtime.job import Job
from snapd.runtime.replicas import check_references, compare_if_due
from snapd.runtime.session import Session


async def capture_pending(job: Job, session: Session) -> None:
    """Take up the session's accepted lanes, in the order in which they were handed over."""
    while session.pending and not job.is_removed:
        lane = min(session.pending, key=session.pending.__getitem__)
        try:
            await _capture(job, session, lane)
        except (RemoteProtocolError, CapacityError) as error:
            _refuse(job, session, lane, error)
        session.pending.pop(lane, None)
        job.settle()


def read_hand_over(page: ControlPage, lane: int) -> HandOver:
    """Read what the trainer wrote into a COMPLETE lane.

    Raises:
        RemoteProtocolError: kind `lane`: the table's size is out of range.
    """
    try:
        segments, frames, nbytes, flags = page.read_entries(lane)
    except ValueError as error:
        raise RemoteProtocolError(f"a lane cannot be read: {error}", kind="lane") from error
    field = {
        name: page.lane_load(lane, name)
        for name in (
            "sequence",
            "generation",
            "step",
            "layout_nbytes",
            "early_values_offset",
            "early_values_nbytes",
            "handed_over_ns",
            "copied_ns",
        )
    }
    return HandOver(**field, segments=segments, frames=frames, nbytes=nbytes, flags=flags)


async def _capture(job: Job, session: Session, lane: int) -> None:
    hand_over = read_hand_over(session.page, lane)
    snapshot = SnapshotId(session.generation, hand_over.step)
    arena, ledger = job.arena(session.rank), job.ledger
    base = ledger.newest_shard(session.rank)
    own = ledger.newest_shard(session.rank, session_id=session.id)
    sources = check_hand_over(
        hand_over,
        chunk_bytes=job.chunk_bytes,
        generation=session.generation,
        granted=arena.pool.grant_of(session.key(lane)),
        base=own.record if own else None,
        is_known=ledger.has_shard(snapshot, session.rank),
    )
    pinned = [
        place for facts in {id(f): f for f in (base, own) if f}.values() for place in facts.record.places
    ]
    arena.pool.hold(pinned)  # they may be dropped while we hash, and must not be granted again
    try:
        point("daemon.hash.before")
        started_s = job.context.environment.monotonic_s()
        digested = await digest_shard(
            job.context.hashing,
            arena.memory,
            sources,
            own=own.record if own else None,
            base=base.record if base else None,
            expected=ExpectedLayout(
                job.name, session.rank, session.row.world_size, job.chunk_bytes, hand_over.layout_nbytes
            ),
            hash_workers=job.context.settings.hash_threads,
            trainers=sum(1 for _ in job.live_sessions()),
        )
        point("daemon.hash.after")
        job.context.metrics.hash_seconds.observe(job.context.environment.monotonic_s() - started_s)
        await check_references(job, session, snapshot, digested.chunks, hand_over.layout_nbytes)
        if not job.is_removed:
            _commit(job, session, lane, hand_over, digested)
    finally:
        arena.pool.release(pinned)


def _commit(job: Job, session: Session, lane: int, hand_over: HandOver, digested: Digested) -> None:
    """Write the record and everything that follows from it; nothing here waits."""
    context, arena = job.context, job.arena(session.rank)
    generation = job.coordination.generation(session.generation)
    record = ShardRecord(
        job=job.name,
        id=SnapshotId(session.generation, hand_over.step),
        rank=session.rank,
        world_size=session.row.world_size,
        chunk_bytes=job.chunk_bytes,
        layout_nbytes=hand_over.layout_nbytes,
        early_values_offset=hand_over.early_values_offset,
        early_values_nbytes=hand_over.early_values_nbytes,
        chunks=digested.chunks,
        parent=generation.parent if generation else None,
        captured_wall_time_s=context.environment.wall_s(),
        digest=digested.digest,
    )
    point("daemon.record.before")
    job.index.add_shard(record, session_id=session.id, sequence=hand_over.sequence)
    job.arriving.forget(session.rank)  # a restore of it is over
    point("daemon.record.after")
    arena.pool.settle(session.key(lane), digested.own)
    arena.pool.hold(digested.shared)
    job.ledger.add(record, session_id=session.id, sequence=hand_over.sequence, is_verified=True)
    tell_places(session.page, lane, record)
    captured = session.page.load("captured_step_plus_one")
    session.page.store("captured_step_plus_one", max(captured, hand_over.step + 1))
    point("daemon.captured.after")
    compare_if_due(job, session, record.id)
    session.move_lane(lane, LaneState.COMPLETE, LaneStep.FINISH)
    point("daemon.lane_freed.after")
    counts = session.counts
    counts.newest_captured_step = max(hand_over.step, counts.newest_captured_step or 0)
    counts.last_window_s = max(0.0, (context.environment.monotonic_ns() - hand_over.handed_over_ns) / 1e9)
    context.metrics.shards_captured.inc()
    context.metrics.bytes_hashed.inc(record.nbytes)
    context.metrics.chunks_shared.inc(len(digested.shared))
    context.metrics.window_seconds.observe(counts.last_window_s)
    context.log.info(
        "shard.captured",
        job=job.name,
        generation=session.generation,
        step=hand_over.step,
        rank=session.rank,
        nbytes=record.nbytes,
        chunks=len(record.chunks),
        chunks_shared=len(digested.shared),
        window_s=round(counts.last_window_s, 4),
    )


def tell_places(page: ControlPage, lane: int, record: ShardRecord) -> None:
    """Put the final places into the lane's table: the trainer names them for chunks that did not change."""
    segments, frames, nbytes, flags = page.read_entries(lane)
    if len(nbytes) != len(record.chunks):
        return  # not what was recorded: the trainer has written to a lane that it had handed over
    places = record.places
    segments, frames = [place.segment for place in places], [place.frame for place in places]
    page.write_entries(lane, segments, frames, nbytes, flags)


def _refuse(job: Job, session: Session, lane: int, error: SnapdError) -> None:
    """The lane is not a shard: it is given back, or set aside where its writer is not believed any more."""
    if job.is_removed:
        return
    pool, key = job.arena(session.rank).pool, session.key(lane)
    step = session.page.lane_load(lane, "step")
    if session.is_served:
        pool.return_grant(key)
        job.ledger.passed(session.generation, session.rank, step)
    elif session.is_live:
        pool.set_aside(key)
    else:
        pool.return_grant(key)
    session.move_lane(lane, LaneState.COMPLETE, LaneStep.FINISH)
    session.counts.refused += 1
    job.ledger.note_dropped(SnapshotId(session.generation, step), f"rank {session.rank}: {error.message}")
    job.context.metrics.lanes_refused.inc()
    job.context.log.warning(
        "lane.refused",
        job=job.name,
        generation=session.generation,
        step=step,
        rank=session.rank,
        reason=str(error),
    )
