"""Taking up what an earlier daemon left: index, segments, captured shards, live trainers' pages.

Either the whole job is taken up, or it is refused by name (`JobUnusable`) and none of its files is touched.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from snapd_native import ControlPage

from snapd.coordination.base import Coordination
from snapd.core.frames import FramePool
from snapd.core.ids import Place
from snapd.core.ledger import SnapshotFacts
from snapd.core.manifest import ShardRecord
from snapd.core.states import LaneState, LaneStep, SessionEvent, SessionState
from snapd.errors import CapacityError, ConfigError, IntegrityError, InvariantViolated, JobUnusable
from snapd.memory.folders import DATA_PATTERNS, JobFolder
from snapd.memory.index import KEEP_FILES_HINT, Index, SessionRow
from snapd.memory.segments import Segment
from snapd.memory.shortage import shortage
from snapd.runtime.capture import tell_places
from snapd.runtime.context import Context
from snapd.runtime.job import Job
from snapd.runtime.liveness import Process
from snapd.runtime.rank_arena import RankArena
from snapd.runtime.replicas import begin_anew
from snapd.runtime.session import Session

CoordinationFactory = Callable[[str, Index], Coordination]
ProcessFinder = Callable[[int, int], Process | None]


def take_up(
    context: Context, name: str, make_coordination: CoordinationFactory, find_process: ProcessFinder
) -> Job | None:
    """Load a job from its folder; None if there is nothing in it (its creation was cut short).

    Complete lanes are not captured yet, and sessions whose process is gone are DEAD: the caller goes on from
    there.

    Raises:
        JobUnusable: says which file is wrong, and how. ConfigError: kind `files`: none is, but descriptors or memory
            are lacking: such a daemon does not start.
    """
    folder = context.arena.job(name)
    if not folder.has_data() and not _has_index(folder):
        with contextlib.suppress(OSError):
            folder.remove()
        return None
    try:
        index = Index.open(folder.index, job=name, may_create=not folder.has_data())
    except CapacityError as error:
        raise _lacks(error, name) from error
    try:
        job = Job(context, name, folder, index, make_coordination(name, index))
        _load_segments(job)
        _load_shards(job)
        _load_parity(job)
        for row in index.sessions():
            session = _load_session(job, row, find_process)
            job.sessions[session.id] = session
            _claim_lanes(job, session)
        _remove_orphans(job)
    except (IntegrityError, InvariantViolated) as error:
        index.close()
        if isinstance(error, JobUnusable):
            raise
        raise JobUnusable(f"job {name!r}: {error.message}", hint=KEEP_FILES_HINT, job=name) from error
    except CapacityError as error:
        index.close()
        raise _lacks(error, name) from error
    return job


def _lacks(error: CapacityError, name: str) -> ConfigError:
    """What kept a job from being taken up is no fault of its files, and would keep trainers from connecting, too."""
    hint = f"all files are untouched: {error.hint}, then start the daemon again"
    return ConfigError(f"job {name!r} cannot be taken up: {error.message}", kind=error.kind, hint=hint)


def _has_index(folder: JobFolder) -> bool:
    return folder.index.exists() and folder.index.stat().st_size > 0


def _load_segments(job: Job) -> None:
    rows = job.index.segments()
    if rows and job.chunk_bytes == 0:
        raise IntegrityError("the index has segments but no chunk size", kind="index")
    for rank, number, nbytes in rows:
        path = job.folder.segment(rank, number)
        job.arenas.setdefault(rank, RankArena.empty(job.folder, rank, job.chunk_bytes)).add(
            Segment.open(path, number, nbytes)
        )


def _load_shards(job: Job) -> None:
    problems = job.index.problems()
    for row in job.index.shards():
        problem = row.problem
        if row.record is not None and not _fits(job, row.rank, row.record.chunk_bytes, row.record.places):
            problem = f"the record of rank {row.rank} names frames that are not there"
        if problem or row.record is None:
            facts = job.ledger.snapshots.setdefault(row.id, SnapshotFacts(row.id, world_size=row.rank + 1))
            facts.problem = facts.problem or problem
            job.context.log.error(
                "shard.damaged", job=job.name, generation=row.id.generation, step=row.id.step, reason=problem
            )
            continue
        known = job.ledger.snapshots.get(row.id)
        if known is not None and known.problem and not known.shards:
            known.world_size = row.record.world_size  # only a damaged row was known of it
        job.arena(row.rank).pool.hold(row.record.places)
        job.ledger.add(row.record, session_id=row.session_id, sequence=row.sequence, is_verified=False)
    for snapshot, problem in problems.items():
        job.ledger.mark_unusable(snapshot, problem)


def _load_parity(job: Job) -> None:
    for problem in job.parity.load():
        job.context.log.error("parity.given_up", job=job.name, reason=problem)


def _fits(job: Job, rank: int, chunk_bytes: int, places: list[Place]) -> bool:
    pool = job.arena(rank).pool
    return chunk_bytes == job.chunk_bytes and all(pool.exists(place) for place in places)


def _load_session(job: Job, row: SessionRow, find_process: ProcessFinder) -> Session:
    path = job.folder.page(row.id)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        what = f"control page {path.name} cannot be opened"
        raise shortage(error, what) or IntegrityError(f"{what}: {error.strerror}", kind="page") from error
    try:
        page = ControlPage.attach(descriptor)
    except (ValueError, OSError) as error:
        raise IntegrityError(f"control page {path.name} is damaged: {error}", kind="page") from error
    finally:
        os.close(descriptor)
    if (page.session_id, page.rank, page.chunk_bytes) != (row.id, row.rank, job.chunk_bytes):
        raise IntegrityError(f"control page {path.name} is of another session", kind="page")
    process = find_process(row.pid, row.pid_start)
    session = Session(row, job.name, page, path, process or Process(row.pid, row.pid_start, -1, is_dead=True))
    session.apply(SessionEvent.CONNECTION_LOST)
    if row.is_fenced:
        session.apply(SessionEvent.OVERTAKEN)
    session.process.session_ids.add(session.id)
    begin_anew(session)
    session.skipped_seen = page.load("skipped_count")
    session.segments_version = page.load("segments_version")
    newest = job.ledger.newest_shard(row.rank, session_id=row.id)
    if newest is not None and newest.record.id.generation == row.generation:
        session.counts.newest_captured_step = newest.record.id.step
    return session


def _claim_lanes(job: Job, session: Session) -> None:
    """What the page says was granted: each frame must be free, or part of this lane's recorded shard."""
    pool, page = job.arena(session.rank).pool, session.page
    recorded = _recorded_shards(job, session)
    for lane in range(page.lane_count):
        state = session.lane_state(lane)
        if state is None:
            name = session.page_path.name
            raise IntegrityError(f"control page {name}: bad state of lane {lane}", kind="page")
        if state is LaneState.FREE:
            continue
        record = recorded.get(page.lane_load(lane, "sequence")) if state is LaneState.COMPLETE else None
        if record is not None:
            tell_places(page, lane, record)
            session.move_lane(lane, LaneState.COMPLETE, LaneStep.FINISH)
            continue
        _claim(pool, session, lane)
    if session.state is SessionState.FENCED:
        for lane in pool.lanes_of(session.id):
            pool.set_aside(session.key(lane))
    captured = session.counts.newest_captured_step
    page.store("captured_step_plus_one", 0 if captured is None else captured + 1)


def _claim(pool: FramePool, session: Session, lane: int) -> None:
    try:
        segments, frames = session.page.read_grant(lane)
    except ValueError as error:
        raise IntegrityError(
            f"control page {session.page_path.name} is damaged: {error}", kind="page"
        ) from error
    pool.claim(
        session.key(lane), [Place(segment, frame) for segment, frame in zip(segments, frames, strict=True)]
    )


def _recorded_shards(job: Job, session: Session) -> dict[int, ShardRecord]:
    """The session's captured shards, by the sequence of their lanes."""
    return {
        shard.sequence: shard.record
        for facts in job.ledger.snapshots.values()
        for shard in facts.shards.values()
        if shard.session_id == session.id
    }


def _remove_orphans(job: Job) -> None:
    """Files of an allocation or a session that was cut short before it was recorded."""
    known = {segment.path for arena in job.arenas.values() for segment in arena.memory.segments.values()}
    known |= {session.page_path for session in job.sessions.values()}
    known |= {segment.path for segment in job.parity.segments}
    for pattern in DATA_PATTERNS:
        for path in job.folder.path.glob(pattern):
            if path not in known:
                job.context.log.info(
                    "file.removed", job=job.name, file=path.name, reason="it was never recorded"
                )
                path.unlink(missing_ok=True)
