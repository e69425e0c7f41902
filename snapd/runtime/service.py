"""What happens to a session: its lanes change, it is overtaken, it dies, it is closed."""

from __future__ import annotations

from snapd.core.ids import SnapshotId
from snapd.core.lanes import DISCARD_REASONS
from snapd.core.states import LaneState, LaneStep, SessionEvent
from snapd.runtime.capture import capture_pending
from snapd.runtime.faultpoints import point
from snapd.runtime.job import Job
from snapd.runtime.session import Session


def serve(job: Job, session: Session) -> None:
    """Look at the page of a session: after a wake-up, and every half second in case one was lost."""
    if session.is_page_closed or job.is_removed:
        return
    if session.is_served:
        _note_progress(job, session)
        _take_complete(job, session)
        _take_discarded(job, session)
    elif session.is_live:
        _refuse_late(job, session)
    job.settle()


def _lanes(job: Job, session: Session) -> list[tuple[int, LaneState]]:
    found: list[tuple[int, LaneState]] = []
    for lane in range(session.page.lane_count):
        state = session.lane_state(lane)
        if state is None:
            key = f"lane {session.id}/{lane}"
            job.context.log.once(key, "lane.damaged", job=job.name, rank=session.rank, lane=lane)
        else:
            found.append((lane, state))
    return found


def _note_progress(job: Job, session: Session) -> None:
    """Which steps the rank will not capture any more, and whether it had to skip one."""
    page, ledger = session.page, job.ledger
    seen = (
        session.newest_step_seen()
    )  # read before the lanes: a lane of an older step is open by then, or never
    under_way = [
        page.lane_load(lane, "step")
        for lane, state in _lanes(job, session)
        if state in (LaneState.OPEN, LaneState.COMPLETE)
    ]
    ledger.passed(session.generation, session.rank, min([*under_way, seen]) - 1)
    skipped = page.load("skipped_count")
    if skipped <= session.skipped_seen:
        return
    count, session.skipped_seen = skipped - session.skipped_seen, skipped
    session.counts.skipped += count
    step = session.newest_step_skipped()
    ledger.passed(session.generation, session.rank, min([*(s - 1 for s in under_way), step]))
    ledger.note_dropped(
        SnapshotId(session.generation, step), f"rank {session.rank} found no free slot in time"
    )
    job.context.metrics.steps_skipped.inc(count)
    job.abort_count += count
    interval, reason = job.coordination.note_abort(newest_step_seen=job.newest_step_seen())
    job.write_interval(interval)
    job.context.log.info(
        "step.skipped",
        job=job.name,
        generation=session.generation,
        step=step,
        rank=session.rank,
        count=count,
        interval_steps=interval.steps,
        from_step=interval.from_step,
        reason=reason,
    )


def _take_complete(job: Job, session: Session) -> None:
    for lane, state in _lanes(job, session):
        if state is LaneState.COMPLETE and lane not in session.pending:
            session.pending[lane] = session.page.lane_load(lane, "sequence")
    if session.pending and (session.worker is None or session.worker.done()):
        session.worker = job.context.spawn(_drain(job, session), f"capture {job.name}/{session.rank}")


async def _drain(job: Job, session: Session) -> None:
    await capture_pending(job, session)
    session.worker = None
    _after_drain(job, session)
    job.settle()


def _after_drain(job: Job, session: Session) -> None:
    """The cut of a session that was overtaken or ended is complete."""
    if job.is_removed or not session.is_drained:
        return
    if not session.is_live:
        _end(job, session)
    elif not session.is_served and not session.row.is_fenced:
        job.index.put_session(session.update(is_fenced=True))


def _take_discarded(job: Job, session: Session) -> None:
    arena = job.arena(session.rank)
    for lane, state in _lanes(job, session):
        if state is not LaneState.DISCARDED:
            continue
        step, why = session.page.lane_load(lane, "step"), session.page.lane_load(lane, "discard_reason")
        if not session.move_lane(lane, LaneState.DISCARDED, LaneStep.TAKE_BACK):
            continue
        arena.pool.return_grant(session.key(lane))
        session.counts.discarded += 1
        reason = DISCARD_REASONS.get(why, "unknown")
        job.ledger.note_dropped(
            SnapshotId(session.generation, step), f"rank {session.rank}: {reason} check failed"
        )
        job.context.metrics.lanes_discarded.labels(reason=reason).inc()
        job.context.log.info(
            "lane.discarded",
            job=job.name,
            generation=session.generation,
            step=step,
            rank=session.rank,
            reason=reason,
        )


def _refuse_late(job: Job, session: Session) -> None:
    for lane, state in _lanes(job, session):
        if state is LaneState.COMPLETE and lane not in session.pending:
            key = f"late {session.id}/{session.page.lane_load(lane, 'sequence')}"
            job.context.log.once(
                key,
                "lane.refused",
                job=job.name,
                generation=session.generation,
                rank=session.rank,
                step=session.page.lane_load(lane, "step"),
                reason="a newer generation has begun",
            )


def fence(job: Job, session: Session) -> None:
    """A newer generation has begun: what is complete now is still taken up, nothing later is."""
    point("daemon.fence.before")
    session.page.store("fenced", 1)
    _note_progress(job, session)
    _take_complete(job, session)
    session.apply(SessionEvent.OVERTAKEN)
    arena, aside = job.arena(session.rank), 0
    for lane in arena.pool.lanes_of(session.id):
        if lane not in session.pending:
            aside += arena.pool.set_aside(session.key(lane))
    point("daemon.fence.after")
    job.context.log.info(
        "session.fenced",
        job=job.name,
        session=session.id,
        generation=session.generation,
        rank=session.rank,
        chunks_set_aside=aside,
    )
    _after_drain(job, session)


def died(job: Job, session: Session) -> None:
    """Its trainer is known dead: complete lanes are taken up, everything else of it is free."""
    if session.is_served:
        _note_progress(job, session)
        _take_complete(job, session)
    session.apply(SessionEvent.DIED)
    freed = job.arena(session.rank).pool.known_dead(session.id, keep_lanes=session.pending)
    job.context.log.info(
        "session.died",
        job=job.name,
        session=session.id,
        generation=session.generation,
        rank=session.rank,
        chunks_freed=freed,
        lanes_taken_up=len(session.pending),
    )
    _after_drain(job, session)
    job.settle()


def closed(job: Job, session: Session) -> None:
    """The client said that it stopped; its complete lanes were waited for before."""
    session.apply(SessionEvent.CLOSED)
    session.has_ended_cleanly = True
    job.arena(session.rank).pool.known_dead(session.id)
    job.context.log.info("session.closed", job=job.name, session=session.id, rank=session.rank)
    _end(job, session)
    job.settle()


def _end(job: Job, session: Session) -> None:
    """Nothing of it is left to take up. It stays in the list, for status, until its rank opens another."""
    job.index.remove_session(session.id)
    session.release(keep_page=False)
    session.process.session_ids.discard(session.id)
    if session.peer is not None:
        session.peer.session_ids.discard(session.id)
        session.peer = None
