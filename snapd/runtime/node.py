"""All jobs of this node and who is connected to it: what the services call.

Peers are handshake connections; a token names one. Processes are watched by pidfd where there is one; else
the end of a peer's connection counts as the death of its trainer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
from collections.abc import Iterator

from snapd.coordination.base import Coordination
from snapd.coordination.embedded import EmbeddedCoordination
from snapd.core.ids import JOB_NAME, checked_job_name
from snapd.core.states import SessionEvent
from snapd.errors import (
    AuthError,
    CapacityError,
    ConflictError,
    FencedError,
    JobUnusable,
    NotFoundError,
    SnapdError,
)
from snapd.memory.index import Index
from snapd.obs.collect_metrics import CollectMetrics
from snapd.runtime import service
from snapd.runtime.cluster import Cluster
from snapd.runtime.context import Context
from snapd.runtime.disk_node import NodeDisks
from snapd.runtime.flushing import JobFlusher
from snapd.runtime.job import Job
from snapd.runtime.liveness import Peer, Process
from snapd.runtime.opening import overtake
from snapd.runtime.readers import Readers
from snapd.runtime.recovery import take_up
from snapd.runtime.repairing import Repairs
from snapd.runtime.restoring import distrust
from snapd.runtime.session import Session
from snapd.runtime.tier_collecting import TierCollecting
from snapd.runtime.tier_restoring import TierRestores
from snapd.runtime.tiers import NodeTier
from snapd.runtime.world_restoring import WorldRestores


class Node:
    """Single-threaded: everything runs on the event loop."""

    def __init__(self, context: Context, *, is_embedded: bool = False) -> None:
        """`is_embedded`: a trainer started this daemon, and may start it again."""
        self.context = context
        self.is_embedded = is_embedded
        self.instance = context.environment.random_id()
        self.started_s = context.environment.monotonic_s()
        self.jobs: dict[str, Job] = {}
        self.broken: dict[str, JobUnusable] = {}
        self.peers: dict[str, Peer] = {}
        self._processes: set[Process] = set()
        self.cluster: Cluster | None = None
        self.restores: WorldRestores | None = None
        self.repairs: Repairs | None = None
        self.collect_metrics: CollectMetrics | None = None
        self.tier: NodeTier | None = None  # set before `start`, where one is configured
        self.flushers: dict[str, JobFlusher] = {}
        self.tier_restores: TierRestores | None = None  # likewise
        self.disks: NodeDisks | None = None  # likewise
        self.readers = Readers(context.settings.restore_finish_s)
        context.held_by_job = self.held_by_job
        context.quarantine = self.quarantine

    def held_by_job(self) -> dict[str, int]:
        return {name: job.arena_bytes for name, job in self.jobs.items()}

    # start and end

    def start(self) -> None:
        """Take up what is in the arena; the loop must be running."""
        for name in self.context.arena.job_names():
            if JOB_NAME.fullmatch(name) is None:
                self.context.log.warning("folder.ignored", folder=name, reason="its name is not a job's")
                continue
            try:
                job = take_up(self.context, name, self._coordination, Process.find)
            except JobUnusable as error:
                self.broken[name] = error
                self.context.log.error("job.refused", job=name, reason=str(error), hint=error.hint)
                continue
            if job is not None:
                self._adopt(job)
        if self.disks is not None:
            self.disks.start()

    def _coordination(self, name: str, index: Index) -> Coordination:
        if self.cluster is not None:
            return self.cluster.coordination(name)
        return EmbeddedCoordination(index, interval_factor_max=self.context.settings.interval_factor_max)

    def _adopt(self, job: Job) -> None:
        self.jobs[job.name] = job
        self._join_world(job)
        self._join_tier(job)
        self.context.metrics.arena_bytes.inc(job.arena_bytes)
        served = next(job.served_sessions(), None)
        if served is not None:
            words = served.page.load("interval_steps"), served.page.load("interval_from_step")
            job.coordination.resume_interval(served.row.interval_steps, *words)
        current = job.coordination.current()
        for session in list(job.sessions.values()):
            if session.process.is_dead:
                service.died(job, session)
                continue
            self._watch(session.process)
            session.page.store("daemon_instance", self.instance)
            if session.generation < current and session.is_served and not self._is_rolling_back(job, session):
                service.fence(job, session)
            service.serve(job, session)
        distrust(job)
        job.settle()
        for segment in [s for arena in job.arenas.values() for s in arena.memory.segments.values()]:
            self.context.blocking.submit(segment.touch)
        self.context.log.info(
            "job.taken_up",
            job=job.name,
            snapshots=len(job.ledger.snapshots),
            arena_bytes=job.arena_bytes,
            sessions=sum(1 for _ in job.live_sessions()),
        )

    def _join_world(self, job: Job) -> None:
        if self.cluster is not None:
            job.world = self.cluster.worlds[job.name]
            job.repairs = self.repairs
            job.world.changed()

    def _join_tier(self, job: Job) -> None:
        if self.tier is not None:
            self._join_shared(job, self.tier)
        if self.disks is not None:
            self.disks.join(job)

    def _join_shared(self, job: Job, tier: NodeTier) -> None:
        flusher = self.flushers[job.name] = JobFlusher(job, tier, self.tier_restores)
        job.flusher = flusher
        job.repairs = job.repairs or self.tier_restores
        job.on_removed.append(lambda: self._leave_tier(flusher))
        self.context.spawn(flusher.run(), f"flush {job.name}")
        self.collect_metrics = self.collect_metrics or CollectMetrics(self.context.metrics.registry)
        collecting = TierCollecting(
            job,
            tier,
            self.collect_metrics,
            lambda: self.cluster is None or self.cluster.is_collector(job.name),
        )
        self.context.spawn(collecting.run(), f"gc {job.name}")

    def _leave_tier(self, flusher: JobFlusher) -> None:
        if self.flushers.get(flusher.job.name) is flusher:
            del self.flushers[flusher.job.name]

    def overtake(self, job: Job) -> None:
        """A newer generation has begun on another node."""
        overtake(job)

    def _is_rolling_back(self, job: Job, session: Session) -> bool:
        current = job.coordination.generation(job.coordination.current())
        return current is not None and current.incarnation == session.row.incarnation

    def stop(self) -> None:
        """Let go of everything; the arena and live trainers' pages stay."""
        for job in self.jobs.values():
            for session in job.sessions.values():
                session.release(keep_page=session.is_live or not session.is_drained)
            job.index.close()
        for process in self._processes:
            with contextlib.suppress(ValueError, OSError):
                asyncio.get_running_loop().remove_reader(process.pidfd)
            process.close()
        self._processes.clear()

    # every half second

    def poll(self) -> None:
        """The safety net beside wake-ups: look at every live page."""
        for job in list(self.jobs.values()):
            for session in list(job.live_sessions()):
                self.serve(job, session)
        if self.tier_restores is not None:
            self.tier_restores.observe(self.jobs.values())

    def serve(self, job: Job, session: Session) -> None:
        """Look at a session's page; what is wrong with one job's files must not stop the others."""
        try:
            service.serve(job, session)
        except SnapdError as error:
            self.context.failed(error)

    def woken(self, job: Job, session: Session) -> None:
        """A trainer wrote to its wake descriptor."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(session.wake_fd)
        self.serve(job, session)

    def quarantine(self, problem: JobUnusable) -> None:
        """A job's files turned out to be broken while it was served: it is refused from now on, its files are
        kept.
        """
        name = str(problem.context["job"])
        self.broken[name] = problem
        self.context.log.error("job.refused", job=name, reason=str(problem), hint=problem.hint)
        job = self.jobs.pop(name, None)
        if job is None:
            return
        job.is_removed = True
        for session in job.sessions.values():
            self._forget(session)
            session.release(keep_page=True)
        job.removed()

    def _forget(self, session: Session) -> None:
        session.process.session_ids.discard(session.id)
        if session.peer is not None:
            session.peer.session_ids.discard(session.id)

    # peers

    def connect(self, pid: int, *, is_admin: bool) -> Peer:
        """A peer of our own user has said hello. The caller watches its connection."""
        if len(self.peers) >= self.context.settings.sessions_max:
            raise CapacityError(
                "too many connections", kind="connections", max=self.context.settings.sessions_max
            )
        process = Process.watch(pid) if not is_admin else Process(pid, 0, -1)
        peer = Peer(self.context.environment.random_token(), is_admin, process)
        self.peers[peer.token] = peer
        return peer

    def resume(self, peer: Peer, session_id: int, secret: bytes) -> Session:
        """A client has come back, to us or to a restarted daemon: its session is this peer's from now on.

        Raises:
            NotFoundError: kind `session`; AuthError: the secret is wrong.
        """
        job, session = self.find_session(session_id)
        if not hmac.compare_digest(session.row.secret, secret):
            raise AuthError("the session's secret is wrong", session=session_id)
        if not session.is_live:
            raise NotFoundError("the session has ended", kind="session", session=session_id)
        if session.peer is not None:
            session.peer.session_ids.discard(session_id)
        session.apply(SessionEvent.CONNECTED)
        session.peer = peer
        peer.session_ids.add(session_id)
        if session.process is not peer.process:
            session.process.session_ids.discard(session_id)
            self._release_process(session.process)
            session.process = peer.process
            peer.process.session_ids.add(session_id)
            self._watch(peer.process)
        session.page.store("daemon_instance", self.instance)
        service.serve(job, session)
        return session

    def disconnect(self, peer: Peer) -> None:
        """The peer's connection has ended."""
        peer.is_connected = False
        self.peers.pop(peer.token, None)
        for session_id in list(peer.session_ids):
            with contextlib.suppress(NotFoundError):
                job, session = self.find_session(session_id)
                session.peer = None
                if session.is_live:
                    session.apply(SessionEvent.CONNECTION_LOST)
                if session.is_live and (session.process.pidfd < 0 or session.process.has_ended()):
                    self._session_died(job, session)
        self.readers.let_go(peer)
        self._release_process(peer.process)

    def peer_of(self, token: str) -> Peer:
        """Return whom a call comes from.

        Raises:
            AuthError: kind `token`.
        """
        peer = self.peers.get(token)
        if peer is None:
            raise AuthError(
                "no handshake connection has this token",
                kind="token",
                hint="shake hands again: the daemon was restarted",
            )
        return peer

    def _watch(self, process: Process) -> None:
        if process.pidfd >= 0 and process not in self._processes:
            self._processes.add(process)
            asyncio.get_running_loop().add_reader(process.pidfd, self._process_ended, process)

    def _process_ended(self, process: Process) -> None:
        process.is_dead = True
        for session_id in list(process.session_ids):
            with contextlib.suppress(NotFoundError):
                job, session = self.find_session(session_id)
                if session.is_live:
                    self._session_died(job, session)
        process.session_ids.clear()
        self._release_process(process)

    def _session_died(self, job: Job, session: Session) -> None:
        service.died(job, session)
        if not any(True for _ in job.served_sessions()):
            distrust(job)
        self._remove_if_final(job, session.row.world_size)

    def _release_process(self, process: Process) -> None:
        is_used = process.session_ids or any(peer.process is process for peer in self.peers.values())
        if is_used and not process.is_dead:
            return
        if process in self._processes:
            self._processes.discard(process)
            asyncio.get_running_loop().remove_reader(process.pidfd)
        process.close()

    # sessions

    def sessions(self) -> Iterator[tuple[Job, Session]]:
        for job in self.jobs.values():
            for session in job.sessions.values():
                yield job, session

    def find_session(self, session_id: int) -> tuple[Job, Session]:
        """Raise NotFoundError (kind `session`) if there is none."""
        for job in self.jobs.values():
            session = job.sessions.get(session_id)
            if session is not None:
                return job, session
        raise NotFoundError("no such session", kind="session", hint="open a new one", session=session_id)

    def session_of(self, peer: Peer, session_id: int, *, may_be_fenced: bool = False) -> tuple[Job, Session]:
        """Return a session for a call of its own trainer.

        Raises:
            NotFoundError, AuthError; FencedError: a newer generation has begun.
        """
        job, session = self.find_session(session_id)
        if session.peer is not peer:
            raise AuthError("the session belongs to another connection", kind="token", session=session_id)
        if not session.is_served and not (may_be_fenced and session.is_live):
            raise FencedError(
                "a newer generation of this job has begun",
                kind="stale_generation",
                hint="this trainer belongs to an older start of the job: stop it",
                session=session_id,
            )
        return job, session

    def adopt_new(self, peer: Peer, session: Session) -> None:
        """A session was opened by `peer`: watch its process."""
        if session.peer is not peer:
            self.resume(peer, session.id, session.row.secret)
        self._watch(session.process)
        session.page.store("daemon_instance", self.instance)
        if session.process.has_ended():
            self._process_ended(session.process)

    def job_for(self, name: str) -> Job:
        """Return the job, a new one if there is none.

        Raises:
            ConfigError: the name; JobUnusable: its files are broken.
        """
        checked_job_name(name)
        self.check_healthy(name)
        job = self.jobs.get(name)
        if job is None:
            folder = self.context.arena.job(name)
            folder.path.mkdir(mode=0o700, exist_ok=True)
            index = Index.open(folder.index, job=name, may_create=not folder.has_data())
            job = self.jobs[name] = Job(self.context, name, folder, index, self._coordination(name, index))
            self._join_world(job)
            self._join_tier(job)
        return job

    def existing_job(self, name: str) -> Job:
        """Raise NotFoundError (kind `job`), or JobUnusable."""
        self.check_healthy(name)
        job = self.jobs.get(name)
        if job is None:
            raise NotFoundError(f"no job {name[:64]!r} on this node", kind="job")
        return job

    def check_healthy(self, name: str) -> None:
        problem = self.broken.get(name)
        if problem is not None:
            raise JobUnusable(problem.message, kind=problem.kind, hint=problem.hint, job=name)

    def drop_if_empty(self, job: Job) -> None:
        """After a refused opening: leave nothing of a job that never was."""
        if (
            not job.sessions
            and not job.ledger.snapshots
            and job.parity.is_empty
            and self.jobs.get(job.name) is job
        ):
            self._remove(job)

    def remove_job(self, name: str, *, is_forced: bool) -> tuple[int, int]:
        """Delete a job; returns its snapshots and bytes. A broken one's files are deleted only when forced.

        Raises: NotFoundError; ConflictError (kind `job_in_use`): live sessions; JobUnusable: broken and not
            forced; UnavailableError (kind `disk_away`).
        """
        checked_job_name(name)
        if name in self.broken:
            if not is_forced:
                self.check_healthy(name)
            del self.broken[name]
            return 0, self.context.arena.job(name).remove()
        if self.disks is not None and name not in self.jobs and self.disks.may_have(name):
            self.disks.forget(name)
            return 0, 0
        job = self.existing_job(name)
        live = list(job.live_sessions())
        if live and not is_forced:
            raise ConflictError(
                f"job {name!r} has {len(live)} live sessions (pid {live[0].row.pid}, ...)",
                kind="job_in_use",
                hint="stop the job first, or use --force",
                job=name,
            )
        count = len(job.ledger.snapshots)
        return count, self._remove(job, is_forgotten=True)

    def _remove(self, job: Job, *, is_forgotten: bool = False) -> int:
        """From memory; `is_forgotten`: from the node's own disk, too."""
        job.is_removed = True
        del self.jobs[job.name]
        for session in job.sessions.values():
            if session.is_live and not session.is_page_closed:
                session.page.store("fenced", 1)
                session.apply(SessionEvent.OVERTAKEN)
            self._forget(session)
            session.release(keep_page=False)
        job.removed()
        self.context.metrics.arena_bytes.dec(job.arena_bytes)
        freed = job.folder.remove()
        self.context.log.info("job.removed", job=job.name, nbytes=freed)
        if is_forgotten and self.disks is not None:
            self.disks.forget(job.name)
        return freed

    def close_session(self, job: Job, session: Session, *, is_final: bool) -> None:
        """After its lanes were taken up: the client has stopped. The last final one releases the arena."""
        rank, world_size = session.rank, session.row.world_size
        service.closed(job, session)
        self._release_process(session.process)
        if is_final and session.generation == job.coordination.current():
            job.final_ranks.add(rank)
        self._remove_if_final(job, world_size)

    def end_job(self, job: Job, through: int) -> None:
        """All of the generations up to this one was removed in the whole world: what is newer here stays."""
        stored = job.disk.newest_stored if job.disk is not None else None
        newest = max(
            [session.generation for session in job.live_sessions()]
            + [s.generation for s in [*job.ledger.snapshots, *([stored] if stored is not None else [])]],
            default=0,
        )
        if newest <= through and self.jobs.get(job.name) is job:
            self._remove(job, is_forgotten=True)
        else:
            job.settle()

    def _remove_if_final(self, job: Job, world_size: int) -> None:
        if job.world is not None:  # the collector hears of it, and has the job removed on all nodes
            job.world.changed()
        elif self._is_final(job, world_size) and (job.flusher is not None or job.disk is not None):
            self.context.spawn(self._remove_once_durable(job, world_size), f"end {job.name}")
        elif self._is_final(job, world_size):
            self._remove(job)

    def _is_final(self, job: Job, world_size: int) -> bool:
        return len(job.final_ranks) == world_size and not any(True for _ in job.live_sessions())

    async def _remove_once_durable(self, job: Job, world_size: int) -> None:
        """What the job ended with goes to the shared tier first, or, where there is none, to the node's own disk;
        memory keeps it until then.
        """
        tier, newest = job.flusher or job.disk, job.ledger.newest_complete()
        assert tier is not None
        await tier.wait_newest_durable()
        if not self._is_final(job, world_size) or self.jobs.get(job.name) is not job:
            return
        is_shared = job.flusher is not None and newest is not None and tier.durable == newest.id
        self._remove(job, is_forgotten=is_shared)
        if job.disk is not None and not is_shared:
            await job.disk.keep_ended()
