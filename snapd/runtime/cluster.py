"""This daemon as a member of a cluster: which jobs it has to do with, which of them it collects, whom it asks.

Single-threaded, on the event loop. A job becomes known here when a trainer opens it, when its files are taken up, or
when another daemon begins to collect it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from snapd.coordination.job_records import Newest
from snapd.coordination.jobs import ClusterCoordination
from snapd.core.cluster import GroupTable, Member
from snapd.core.ids import JOB_NAME, SnapshotId
from snapd.core.recovery import Inventory
from snapd.core.reports import NodeReport, Orders, Record
from snapd.core.restore import RankReport, Verdicts
from snapd.errors import FencedError, NotFoundError, RemoteProtocolError, SnapdError, UnavailableError
from snapd.runtime.changes import Changes
from snapd.runtime.cluster_parts import ClusterParts
from snapd.runtime.collecting import CollectorHost
from snapd.runtime.draining import Drainer
from snapd.runtime.peers import NodeFacts, Records, ReportAnswer, WorldAsk, WorldPlan
from snapd.runtime.removing import Removals
from snapd.runtime.restoring import verify_soon
from snapd.runtime.tier_look import TierLook
from snapd.runtime.world import Here, World

RETRY_S = 0.5
POLL_S = 1.0
FORGET_AFTER_S = 60.0
Answer = TypeVar("Answer")
UNKNOWN_ORDERS = 1 << 62  # a number that no collector has: it answers at once


class Cluster:
    """One per daemon that has a coordinator."""

    def __init__(self, parts: ClusterParts) -> None:
        self._parts = parts
        self.state = parts.state
        self.kv_server = parts.kv_server
        self.changes = Changes()
        self.worlds: dict[str, World] = {}
        self._coordinations: dict[str, ClusterCoordination] = {}
        self._collectors: dict[str, CollectorHost] = {}
        self.tier_look: TierLook | None = None  # set where there is a shared tier
        self.check_disk: Callable[[str], None] = lambda name: None  # raises while the disk is read
        self.disk_troubles: Callable[[], list[str]] = list
        self._asked: dict[str, str] = {}
        self._arenas: dict[str, str] = {}
        self._epoch_seen = (False, 0)
        self.drainer = Drainer(self, lambda: parts.jobs.jobs, parts.log)
        self.removals = Removals(self, parts.jobs, parts.log, parts.monotonic_s)
        self._tasks: list[asyncio.Task[None]] = []
        self._job_tasks: dict[str, list[asyncio.Task[None]]] = {}
        self._idle_since_s: dict[str, float] = {}

    # who we are

    @property
    def name(self) -> str:
        return self.state.member.node

    @property
    def arena_id(self) -> str:
        return self.state.member.arena_id

    @property
    def cluster_id(self) -> str:
        token = self.state.token
        return token.cluster_id if token is not None else ""

    @property
    def epoch(self) -> int:
        token = self.state.token
        return token.epoch if token is not None else 0

    # what collectors need of the cluster (collecting.Surroundings)

    @property
    def table(self) -> GroupTable | None:
        """None while the store is not believed: no new level begins then."""
        return self.state.table if self.state.is_trusted else None

    @property
    def living(self) -> Iterable[str]:
        return self.state.members

    @property
    def doubtful(self) -> Iterable[str]:
        return set(self.state.absent) - set(self.state.lost)

    @property
    def absent(self) -> Iterable[str]:
        return self.state.absent

    @property
    def sees_all(self) -> bool:
        """No member is in doubt, and the coordinator answers: what is found nowhere is nowhere."""
        return self.table is not None and self.state.away is None and not set(self.doubtful)

    @property
    def calls(self) -> Cluster:
        return self

    def member(self, node: str) -> Member | None:
        return self.state.members.get(node)

    # life

    def start(self) -> None:
        """The loop is running, and the node's jobs were taken up."""
        spawn = self._parts.spawn
        self._tasks.append(spawn(self._run_state(), "cluster"))
        self._tasks.append(spawn(self._watch_jobs(), "cluster jobs"))
        self._tasks.append(spawn(self._follow(), "cluster follow"))
        self._tasks.append(spawn(self.drainer.run(), "drain"))

    async def stop(self) -> None:
        """Let go of leases, so that others take over at once."""
        for host in self._collectors.values():
            host.close()
        tasks = [*self._tasks, *(task for tasks in self._job_tasks.values() for task in tasks)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run_state(self) -> None:
        await self.state.run()

    async def _follow(self) -> None:
        """Act upon changes of membership, table and generations."""
        serial = -1
        while True:
            serial = await self.state.changed(serial, POLL_S)
            self._look()

    def _look(self) -> None:
        seen = (self.state.is_trusted, self.epoch)
        lost = [node for node in self.state.lost if self._arenas.pop(node, None) is not None]
        for node, member in self.state.members.items():
            before = self._arenas.get(node)
            if before is not None and before != member.arena_id:
                lost.append(node)  # it came back with an empty arena
            self._arenas[node] = member.arena_id
        if lost or seen != self._epoch_seen:
            for host in self._collectors.values():
                host.membership_changed(lost)
        if seen != self._epoch_seen:
            self._epoch_seen = seen
            for world in self.worlds.values():
                world.table_changed()
        for name, job in list(self._parts.jobs.jobs.items()):
            if self.coordination(name).current() > job.newest_generation:
                self._parts.jobs.overtake(job)
        self._let_go_of_collectors()
        self._forget_idle_jobs()
        self.changes.notify()

    def _forget_idle_jobs(self) -> None:
        """Jobs that nobody collects and of which nothing is here: they are noticed again when they begin again."""
        now_s = self._parts.monotonic_s()
        for name, coordination in list(self._coordinations.items()):
            if name in self._parts.jobs.jobs or coordination.collector or name in self._collectors:
                self._idle_since_s.pop(name, None)
            elif now_s - self._idle_since_s.setdefault(name, now_s) > FORGET_AFTER_S:
                for task in self._job_tasks.pop(name, []):
                    task.cancel()
                del self._coordinations[name], self.worlds[name], self._idle_since_s[name]

    # jobs

    def coordination(self, name: str) -> ClusterCoordination:
        """The job's share of coordination; from now on this node takes part in the job's world."""
        known = self._coordinations.get(name)
        if known is None:
            known = self._coordinations[name] = ClusterCoordination(self.state, name)
            world = self.worlds[name] = World(
                name,
                Here(
                    node=self.name,
                    instance=self._parts.instance,
                    epoch=lambda: self.epoch,
                    table=lambda: self.table,
                    monotonic_s=self._parts.monotonic_s,
                ),
                self,
                self._parts.protection,
                find_job=lambda: self._parts.jobs.jobs.get(name),
                make_job=lambda: self._parts.jobs.job_for(name),
            )
            self._job_tasks[name] = [
                self._parts.spawn(known.run(), f"coordination {name}"),
                self._parts.spawn(world.run(), f"world {name}"),
                self._parts.spawn(self._follow_job(name, known), f"generations {name}"),
            ]
        return known

    async def _follow_job(self, name: str, coordination: ClusterCoordination) -> None:
        while True:
            await coordination.changed(POLL_S)
            self.removals.follow(name, coordination)
            self.worlds[name].changed()
            job = self._parts.jobs.jobs.get(name)
            if job is not None and coordination.current() > job.newest_generation:
                self._parts.jobs.overtake(job)
            self._let_go_of_collectors()
            await asyncio.sleep(0.01)

    async def _watch_jobs(self) -> None:
        """Take part in jobs that other nodes began to collect."""
        prefix = self.state.keys.root + "jobs/"
        while True:
            try:
                reading = await self.state.store.read(prefix)
                for key in reading.items:
                    self._noticed(prefix, key)
                async for change in self.state.store.watch(prefix, reading.revision):
                    if change.value is not None:
                        self._noticed(prefix, change.key)
            except (UnavailableError, FencedError):
                await asyncio.sleep(RETRY_S)

    def _noticed(self, prefix: str, key: str) -> None:
        name, _, what = key.removeprefix(prefix).partition("/")
        if what == "collector" and JOB_NAME.fullmatch(name):
            self.coordination(name)

    # collecting

    def collector(self, name: str) -> CollectorHost:
        """Raise UnavailableError (kind `no_collector`): the job is collected elsewhere."""
        host = self._collectors.get(name)
        if host is None or not self.is_collector(name):
            raise UnavailableError(
                "this node does not collect the job now", kind="no_collector", hint="ask again", job=name
            )
        return host

    def is_collector(self, name: str) -> bool:
        """Whether this node is the job's collector now."""
        coordination = self._coordinations.get(name)
        return coordination is not None and coordination.is_collector

    def _let_go_of_collectors(self) -> None:
        for name in [name for name in self._collectors if not self.is_collector(name)]:
            self._collectors.pop(name).close()
            self._parts.log.info("collector.let_go", job=name)

    async def find_collector(self, name: str) -> str:
        """The node that collects a job: this one, if nobody does and it has to do with the job.

        Raises:
            UnavailableError.
        """
        coordination = self.coordination(name)
        if coordination.collector and not coordination.is_collector and coordination.collector != self.name:
            return coordination.collector
        # a key that is ours already: the answer to our claim was lost
        is_free = coordination.collector != self.name
        if name not in self._parts.jobs.jobs and is_free and not coordination.is_collector:
            raise UnavailableError("nobody collects the job", kind="no_collector", job=name)
        try:
            node = await coordination.claim_collector()
        except FencedError as error:
            raise UnavailableError("this node's lease has ended", kind="lease", job=name) from error
        if node == self.name and name not in self._collectors:
            await self._begin_collecting(name, coordination)
        return node

    async def newest_recorded(self, name: str) -> SnapshotId | None:
        """The newest snapshot that some collector of the job recorded as complete. Raises UnavailableError."""
        try:
            newest = await self.coordination(name).read_newest()
        except RemoteProtocolError:
            return None
        return newest.complete if newest is not None else None

    async def _begin_collecting(self, name: str, coordination: ClusterCoordination) -> None:
        try:
            newest = await coordination.take_over_newest()
        except RemoteProtocolError as error:
            self._parts.log.warning("newest.unreadable", job=name, reason=str(error))
            newest = None
        except FencedError as error:
            raise UnavailableError("this node's lease has ended", kind="lease", job=name) from error
        if name in self._collectors:
            return  # somebody else here was quicker; what its collector had under way it publishes again

        current = coordination.generation(coordination.current())

        def record(record: Record) -> None:
            coordination.publish_newest(Newest.of(record, self.epoch), lambda new: host.recorded(new.record))

        before = newest.record if newest else Record()
        host = self._collectors[name] = CollectorHost(
            name,
            self,
            self._parts.collector_settings,
            before=before.with_interval(*self.worlds[name].widened),
            parent=(current.number, current.parent) if current and current.parent else None,
            record=record,
            removed_through=coordination.removed_through,
            ended=lambda generation: self._job_ended(name, generation),
        )
        self._parts.log.info("collector.taken_up", job=name)

    def _job_ended(self, name: str, generation: int) -> None:
        self._tasks.append(self._parts.spawn(self.removals.end(name, generation), f"end {name}"))

    def stop_collecting(self, name: str) -> None:
        """A collector of a job that was removed knows only what is gone; who has to do with the job anew claims it."""
        host = self._collectors.pop(name, None)
        if host is not None:
            host.close()
            self._tasks.append(self._parts.spawn(self._release(name), f"release {name}"))

    async def _release(self, name: str) -> None:
        with contextlib.suppress(UnavailableError, FencedError):
            await self.coordination(name).release_collector()

    async def is_recorded(self, name: str) -> bool:
        """Whether the coordinator knows of snapshots of the job. Raises UnavailableError."""
        return await self.newest_recorded(name) is not None

    async def take_report(
        self, name: str, report: NodeReport, *, known_orders: int, hold_s: float
    ) -> ReportAnswer:
        """A peer's report. It is told where to go when the job is collected elsewhere."""
        host = self._collectors.get(name)
        if host is None or not self.is_collector(name):
            coordination = self._coordinations.get(name)
            return ReportAnswer(False, coordination.collector if coordination else "", Orders())
        return ReportAnswer(
            True, self.name, await host.report(report, known_orders=known_orders, hold_s=hold_s)
        )

    async def report(
        self,
        job: str,
        report: NodeReport,
        *,
        known_orders: int,
        hold_s: float,
    ) -> ReportAnswer:
        """world.Reporter: take our own report to the collector, wherever it is."""
        node = await self.find_collector(job)
        known = known_orders if self._asked.get(job) == node else UNKNOWN_ORDERS
        self._asked[job] = node
        if node == self.name:
            return await self.take_report(job, report, known_orders=known, hold_s=hold_s)
        answer = await self._parts.calls.report(node, job, report, known_orders=known, hold_s=hold_s)
        if not answer.is_collector:
            self._asked.pop(job, None)
            raise UnavailableError(
                f"node {node} does not collect the job any more", kind="no_collector", job=job
            )
        return answer

    # restoring

    async def plan_restore(self, name: str, ask: WorldAsk, *, timeout_s: float) -> WorldPlan:
        """The collector's decision. Raises UnavailableError when it cannot be had within `timeout_s`."""
        return await self._at_collector(
            name,
            lambda node, left_s: (
                self.collector(name).plan(ask)
                if node == self.name
                else self._parts.calls.plan_world_restore(node, name, ask, timeout_s=left_s)
            ),
            timeout_s,
        )

    async def finish_restore(
        self, name: str, generation: int, number: int, rank: int, report: RankReport, *, timeout_s: float
    ) -> Verdicts:
        """The barrier at the collector."""
        return await self._at_collector(
            name,
            lambda node, left_s: (
                self.collector(name).finish(generation, number, rank, report)
                if node == self.name
                else self._parts.calls.finish_world_restore(
                    node, name, generation, number, rank, report, timeout_s=left_s
                )
            ),
            timeout_s,
        )

    async def _at_collector(
        self, name: str, call: Callable[[str, float], Awaitable[Answer]], timeout_s: float
    ) -> Answer:
        """Ask the collector; when it is away or moves, ask its successor."""
        deadline = self._parts.monotonic_s() + timeout_s
        while True:
            left_s = deadline - self._parts.monotonic_s()
            try:
                return await call(await self.find_collector(name), max(1.0, left_s))
            except UnavailableError as error:
                if error.kind == "settling" or left_s <= 0:
                    raise
            await asyncio.sleep(RETRY_S)

    # what peers ask of this node (also of itself: PeerCalls)

    def own_inventory(self, name: str) -> Inventory:
        self.check_disk(name)
        world = self.worlds.get(name)
        return world.inventory() if world is not None else Inventory(node=self.name)

    def own_records(
        self, name: str, snapshot: SnapshotId, *, ranks: set[int], own_only: bool, epoch: int = 0
    ) -> Records:
        """Raise NotFoundError (kind `job`)."""
        job = self._parts.jobs.jobs.get(name)
        if job is None:
            raise NotFoundError(f"no job {name[:64]!r} on this node", kind="job")
        return self._parts.protection.records(job, snapshot, ranks=ranks, own_only=own_only, epoch=epoch)

    def own_facts(self) -> NodeFacts:
        parity, sent, received, exposure = self._parts.protection.facts()
        worlds = sorted(self.worlds.items())
        troubles = [f"job {name}: {text}" for name, world in worlds if (text := world.trouble())]
        return NodeFacts(
            node=self.name,
            version=self._parts.version,
            arena_bytes=self._parts.arena_bytes(),
            parity_bytes=parity,
            trouble="; ".join((self.disk_troubles() + troubles)[:4]),
            jobs=tuple(sorted(self._parts.jobs.jobs)),
            sent_bytes=sent,
            received_bytes=received,
            exposure_byte_s=exposure,
            is_draining=self.drainer.status.is_asked,
            drain_waits_for=self.drainer.status.waits_for,
        )

    async def inventory(self, node: str, job: str) -> Inventory:
        if node == self.name:
            return self.own_inventory(job)
        return await self._parts.calls.inventory(node, job)

    async def fetch_records(
        self,
        node: str,
        job: str,
        snapshot: SnapshotId,
        *,
        ranks: Sequence[int] = (),
        own_only: bool = False,
        epoch: int = 0,
    ) -> Records:
        if node == self.name:
            return self.own_records(job, snapshot, ranks=set(ranks), own_only=own_only, epoch=epoch)
        return await self._parts.calls.fetch_records(
            node, job, snapshot, ranks=ranks, own_only=own_only, epoch=epoch
        )

    async def take_shard(self, node: str, job: str, snapshot: SnapshotId, rank: int) -> None:
        await self._parts.calls.take_shard(node, job, snapshot, rank)

    async def suspect(self, node: str, job: str, snapshot: SnapshotId, rank: int) -> None:
        """Tell whoever has the shard, this node perhaps; one that cannot be told will be asked for the chunk again."""
        try:
            if node == self.name:
                self.own_suspect(job, snapshot, rank)
            else:
                await self._parts.calls.suspect(node, job, snapshot, rank)
        except SnapdError as error:
            self._parts.log.info("suspect.not_told", job=job, node=node, reason=error.message)

    def own_suspect(self, name: str, snapshot: SnapshotId, rank: int) -> None:
        """A peer got other bytes than a record of ours says: hash the shard, mend it or condemn its snapshot."""
        job = self._parts.jobs.jobs.get(name)
        facts = job.ledger.snapshots.get(snapshot) if job is not None else None
        if job is None or facts is None or facts.problem or rank not in facts.shards:
            return
        facts.shards[rank].is_verified = False
        verify_soon(job, snapshot)

    async def node_facts(self, node: str) -> NodeFacts:
        if node == self.name:
            return self.own_facts()
        return await self._parts.calls.node_facts(node)

    async def all_facts(self) -> dict[str, NodeFacts | SnapdError]:
        """Every member's, or why it cannot be had."""
        nodes = sorted(self.state.members)
        answers = await asyncio.gather(*(self.node_facts(node) for node in nodes), return_exceptions=True)
        found: dict[str, NodeFacts | SnapdError] = {}
        for node, answer in zip(nodes, answers, strict=True):
            if isinstance(answer, (NodeFacts, SnapdError)):
                found[node] = answer
            else:
                raise answer
        return found
