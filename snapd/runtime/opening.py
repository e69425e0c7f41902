"""OpenSession: from what a trainer says of itself to a session with a backed arena."""

from __future__ import annotations

import os
from dataclasses import dataclass

from snapd_native import ControlPage

from snapd.core.generations import Generation
from snapd.core.geometry import LANES_MAX, SLOTS_MIN, choose_chunk_bytes, entry_capacity_for, frames_for
from snapd.core.states import SessionState
from snapd.errors import CapacityError, ConfigError, ConflictError, FencedError, NotFoundError
from snapd.memory.index import SessionRow
from snapd.runtime import service
from snapd.runtime.context import Context
from snapd.runtime.faultpoints import point
from snapd.runtime.job import Job
from snapd.runtime.liveness import Peer
from snapd.runtime.replicas import begin_anew
from snapd.runtime.restoring import distrust, release_rounds
from snapd.runtime.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """A checked OpenSession request."""

    job: str
    incarnation: str
    rank: int
    world_size: int
    state_bytes_estimate: int
    chunk_bytes: int
    slots: int
    interval_steps: int


def checked_slots(requested: int, default: int) -> int:
    """Return the slots of a session.

    Raises:
        ConfigError: kind `slots`.
    """
    slots = requested or default
    if not SLOTS_MIN <= slots <= LANES_MAX:
        raise ConfigError(f"slots must be {SLOTS_MIN} to {LANES_MAX}", kind="slots", slots=slots)
    return slots


async def open_session(
    context: Context, job: Job, peer: Peer, opening: Opening, *, stored_chunk_bytes: int = 0
) -> Session:
    """Open a session; it returns when the estimate is backed. `stored_chunk_bytes`: of the job's snapshots in a tier,
    if it has none here.

    Raises:
        FencedError, ConflictError, CapacityError, ConfigError: nothing is left of the session.
    """
    async with job.opening:
        assignment = await job.coordination.next_generation(
            incarnation=opening.incarnation, rollback_count=0, world_size=opening.world_size
        )
        generation = assignment.generation
        point("daemon.generation.after")
        is_new = (
            assignment.is_new or generation.number > job.newest_generation
        )  # another node may have begun it
        if is_new:
            overtake(job)
        same = _same_rank(job, generation, opening.rank)
        if same is not None and not _is_unanswered(same, peer):
            raise ConflictError(
                f"rank {opening.rank} of this start of job {job.name!r} is served (pid {same.row.pid})",
                kind="duplicate_rank",
                hint="two processes have the same RANK, or two Snapshotters the same job",
                rank=opening.rank,
            )
        await _choose_chunk_bytes(context, job, opening, stored_chunk_bytes)
        session = same or _create(context, job, peer, opening, generation)
        if is_new:
            job.coordination.configure_interval(opening.interval_steps)
    context.log.info(
        "session.opened",
        job=job.name,
        session=session.id,
        generation=generation.number,
        rank=session.rank,
        world_size=opening.world_size,
        pid=peer.process.pid,
        reason=assignment.reason,
    )
    await _back(context, job, session, opening.state_bytes_estimate)
    if job.is_removed:
        raise NotFoundError("the job was removed meanwhile", kind="job", job=job.name)
    service.serve(job, session)
    return session


def overtake(job: Job) -> None:
    """Sessions of older generations than the current one are fenced; their captures up to now still count.

    Those of the same start of the world are on their way to it: it is a rollback.
    """
    generation = job.coordination.current()
    row = job.coordination.generation(generation)
    job.newest_generation = max(job.newest_generation, generation)
    job.final_ranks.clear()
    if row is None or row.rollback_count == 0:
        job.replicas.difference = ""
    for session in list(job.sessions.values()):
        is_rolling_back = row is not None and row.incarnation == session.row.incarnation
        if session.generation < generation and session.is_served and not is_rolling_back:
            service.fence(job, session)
    release_rounds(job, below=generation)
    distrust(job)
    job.settle()


def _same_rank(job: Job, generation: Generation, rank: int) -> Session | None:
    for session in list(job.sessions.values()):
        if session.rank != rank or session.generation != generation.number:
            continue
        if session.is_live and session.process.has_ended():
            service.died(job, session)
        if session.is_live:
            return session
    return None


def _is_unanswered(session: Session, peer: Peer) -> bool:
    """The same process asks again, and has not used the session: the answer to its call was lost, with us
    perhaps.
    """
    is_same_process = peer.process.pid > 0 and session.process.pid == peer.process.pid
    is_free = session.peer is None or session.peer is peer
    return (
        is_same_process
        and is_free
        and session.newest_step_seen() < 0
        and session.page.load("wanted_frames") == 0
    )


async def _choose_chunk_bytes(context: Context, job: Job, opening: Opening, kept: int) -> None:
    """One size on all nodes: a shard must fit into the frames of any other node."""
    if job.chunk_bytes and (job.arena_bytes or any(True for _ in job.live_sessions())):
        return
    chunk_bytes, reason = choose_chunk_bytes(
        opening.state_bytes_estimate,
        requested=opening.chunk_bytes,
        kept=kept,
        default=context.settings.chunk_bytes,
    )
    agreed = await job.coordination.agree_chunk_bytes(chunk_bytes)
    if agreed != chunk_bytes:
        chunk_bytes, reason = agreed, "another node named it first"
    if chunk_bytes == job.chunk_bytes:
        return  # its arenas may be in use: a shard may just be on its way here
    job.index.set_chunk_bytes(chunk_bytes)
    job.chunk_bytes = chunk_bytes
    job.arenas.clear()
    context.log.info("chunks.chosen", job=job.name, chunk_bytes=chunk_bytes, reason=reason)


def _create(context: Context, job: Job, peer: Peer, opening: Opening, generation: Generation) -> Session:
    session_id = context.environment.random_id()
    path = job.folder.page(session_id)
    slots = checked_slots(opening.slots, context.settings.slots)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        page = ControlPage.create(
            descriptor,
            lane_count=slots,
            entry_capacity=entry_capacity_for(opening.state_bytes_estimate, job.chunk_bytes),
            rank=opening.rank,
            session_id=session_id,
            chunk_bytes=job.chunk_bytes,
            generation=generation.number,
        )
    except OSError as error:
        path.unlink(missing_ok=True)
        raise CapacityError(
            f"no room for a control page: {error.strerror}",
            kind="arena_full",
            hint="release a job with `snapd rm`",
        ) from error
    finally:
        os.close(descriptor)
    row = SessionRow(
        id=session_id,
        secret=context.environment.random_secret(),
        rank=opening.rank,
        world_size=opening.world_size,
        generation=generation.number,
        incarnation=opening.incarnation,
        pid=peer.process.pid,
        pid_start=peer.process.start,
        slots=slots,
        interval_steps=opening.interval_steps,
        is_fenced=False,
    )
    point("daemon.session.before")
    job.index.put_session(row)
    point("daemon.session.after")
    session = Session(row, job.name, page, path, peer.process, peer=peer)
    _forget_ended(job, opening.rank)
    job.sessions[session_id] = session
    job.arena(opening.rank)
    peer.session_ids.add(session_id)
    peer.process.session_ids.add(session_id)
    interval = job.coordination.interval()
    page.store("interval_steps", 0 if interval.factor == 1 else interval.steps)
    page.store("interval_from_step", interval.from_step)
    return session


def _forget_ended(job: Job, rank: int) -> None:
    for old in [s for s in job.sessions.values() if s.rank == rank and not s.is_live and s.is_drained]:
        del job.sessions[old.id]


async def _back(context: Context, job: Job, session: Session, state_bytes: int) -> None:
    try:
        await job.grow(session, frames_for(state_bytes, job.chunk_bytes))
    except CapacityError:
        if session.is_live:
            service.closed(job, session)
            job.sessions.pop(session.id, None)
        raise
    if session.segments_version == 0:
        session.segments_version = 1
        if not session.is_page_closed:
            session.page.store("segments_version", 1)


async def reserve(job: Job, session: Session, state_bytes: int) -> int:
    """Back the session's slots for a state of that many bytes; returns the bytes that are backed for its
    rank.

    Raises:
        CapacityError: it does not fit into the arena, or into the session's control page.
    """
    frames = frames_for(state_bytes, job.chunk_bytes)
    if frames > session.page.entry_capacity:
        raise CapacityError(
            f"the control page has room for {session.page.entry_capacity} chunks, {frames} are needed",
            kind="entries",
            hint="open the session anew with a state_bytes_estimate that fits",
        )
    await job.grow(session, frames)
    return job.arena(session.rank).memory.nbytes


async def begin_rollback(job: Job, session: Session, rollback_count: int) -> int:
    """Move the session to the generation of this rollback; returns its number.

    Lanes that are complete are taken up first, under the old generation; one completed later is refused.
    """
    service.serve(job, session)
    await job.changes.wait_until(lambda: session.is_drained, job.context.settings.restore_settle_s)
    async with job.opening:
        if session.state is SessionState.FENCED or not session.is_live:
            raise FencedError("the session was overtaken", kind="stale_generation", session=session.id)
        assignment = await job.coordination.next_generation(
            incarnation=session.row.incarnation,
            rollback_count=rollback_count,
            world_size=session.row.world_size,
        )
        point("daemon.generation.after")
        number = assignment.generation.number
        if session.generation == number:
            return number
        job.newest_generation = max(job.newest_generation, number)
        if assignment.is_new:
            job.coordination.configure_interval(session.row.interval_steps)
        job.index.put_session(session.update(generation=number))
        session.counts.newest_captured_step = None
        page = session.page
        # the trainer waits for our answer: its words may be set back, so that no old step counts as passed
        page.store("step_seen_plus_one", 0)
        page.store("skipped_step_plus_one", 0)
        page.store("captured_step_plus_one", 0)
        page.store("complete_step_plus_one", 0)
        page.store("interval_steps", 0)
        page.store("interval_from_step", 0)
        begin_anew(session)
        page.store("generation", number)
        release_rounds(job, below=min(s.generation for s in job.served_sessions()))
    job.context.log.info(
        "session.rolled_back", job=job.name, session=session.id, generation=number, rank=session.rank
    )
    job.settle()
    return number
