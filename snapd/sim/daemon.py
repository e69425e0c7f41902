"""One daemon: the real coordination (ClusterState, ClusterCoordination) and the simulated rest, in one life.

Follows runtime/cluster.py: who is asked, which node collects, what a change of membership leads to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from snapd.coordination.cluster import ClusterState
from snapd.coordination.highwater import HighwaterStore
from snapd.coordination.job_records import Newest, generations_to_json
from snapd.coordination.jobs import ClusterCoordination
from snapd.coordination.kv import Write
from snapd.coordination.settings import ClusterEnvironment
from snapd.core.cluster import GroupTable
from snapd.core.generations import Assignment, assign
from snapd.core.ids import SnapshotId
from snapd.core.manifest import ShardRecord
from snapd.core.membership import Highwater
from snapd.core.placement import place
from snapd.core.reports import NodeReport, Orders, Record
from snapd.errors import FencedError, InternalError, NotFoundError, RemoteProtocolError, UnavailableError
from snapd.sim.bugs import Bug
from snapd.sim.collecting import Records, SimCollector
from snapd.sim.crowd import CrowdState
from snapd.sim.disk import JOB, Content, Disk, Parity, StoredShard, encode
from snapd.sim.job import SimJob
from snapd.sim.life import Life
from snapd.sim.parity import SimParity
from snapd.sim.protecting import PullKey, Push, SimProtector
from snapd.sim.restoring import SimRestores
from snapd.sim.store import SimKeyValue
from snapd.sim.truth import Truth
from snapd.sim.world import SimWorld

if TYPE_CHECKING:
    from snapd.sim.machines import Machine
    from snapd.sim.simulation import Simulation

POLL_S = 1.0
RETRY_S = 0.5
UNKNOWN_ORDERS = 1 << 62
Answer = TypeVar("Answer")


class DiskHighwater:
    """The highwater mark on a node's disk."""

    def __init__(self, disk: Disk, life: Life, truth: Truth, *, is_stored: bool) -> None:
        self._disk, self._life, self._truth, self._is_stored = disk, life, truth, is_stored
        self._seen = disk.highwater

    def load(self) -> Highwater:
        return self._seen

    def save(self, seen: Highwater) -> None:
        self._life.effect("persist highwater")
        self._seen = seen
        self._truth.noted(self._disk.arena_id, seen.generations.get(JOB, 0))
        if self._is_stored:
            self._disk.highwater = seen


class SimDaemon:
    def __init__(self, sim: Simulation, machine: Machine, life: Life) -> None:
        self.sim, self.life = sim, life
        self.node, self.disk = machine.name, machine.disk
        self.settings, self.bugs, self.truth, self.plans = sim.settings, sim.bugs, sim.truth, sim.plans
        self.instance = sim.next_number()
        self.chance: Callable[[], float] = sim.chance_of(life.name).random
        self.client = SimKeyValue(sim.store, sim.loop, life, self.node, f"{self.node}-{self.instance}")
        highwater: HighwaterStore = DiskHighwater(
            self.disk, life, self.truth, is_stored=Bug.HIGHWATER_NOT_STORED not in self.bugs
        )
        self.state = (CrowdState if sim.settings.is_crowd else ClusterState)(
            self.client,
            machine.member(),
            sim.settings.cluster,
            keys=sim.keys,
            environment=ClusterEnvironment(
                monotonic_s=sim.loop.time, chance=self.chance, random_id=sim.random_id
            ),
            highwater=highwater,
            place=place,
            note=self._noted,
        )
        if isinstance(self.state, CrowdState):
            self.state.crowd = sim.crowd
        self.coordination = ClusterCoordination(self.state, JOB)
        self.job = SimJob(self)
        self.parity = SimParity(self)
        self.world = SimWorld(self)
        self.protector = SimProtector(self)
        self.restores = SimRestores(self)
        self.collector: SimCollector | None = None
        self._asked = ""
        self._arenas: dict[str, str] = {}
        self._epoch_seen = (False, 0)
        self._looked_at = -1
        self.handlers: Mapping[str, Callable[..., Any]] = {
            "report": self._take_report,
            "inventory": self.world.inventory,
            "own_records": self.own_records,
            "map_records": self._map_records,
            "holds": self._holds,
            "pull": self._pull,
            "push": self._push,
            "shard": self._shard,
            "chunk": self._chunk,
            "fragment": self._fragment,
            "plan": self._plan,
            "finish": self._finish,
        }

    def start(self) -> None:
        self.parity.load()
        self.job.load()
        self.sim.network.serve(self.node, self.life, self.handlers)
        spawn = self.life.spawn
        spawn(self._run_state(), "state")
        spawn(self.coordination.run(), "coordination")
        spawn(self._follow(), "follow")
        spawn(self.world.run(), "world")

    # small things

    @property
    def now_s(self) -> float:
        return self.sim.loop.now_s

    @property
    def epoch(self) -> int:
        token = self.state.token
        return token.epoch if token is not None else 0

    @property
    def table(self) -> GroupTable | None:
        """None while the store is not believed: no new level begins then."""
        return self.state.table if self.state.is_trusted else None

    def timed(self, what: str, work: Callable[..., Answer], *args: Any) -> Answer:
        return self.sim.timed(what, work, *args)

    def call(self, node: str, method: str, *args: Any, timeout_s: float) -> asyncio.Future[Any]:
        return self.sim.network.call(self.life, self.node, node, method, *args, timeout_s=timeout_s)

    def arrive(self, body: Content) -> Content | None:
        """What arrives of a chunk that was sent: now and then other bytes."""
        return self.sim.arrive(body)

    def _noted(self, event: str, fields: Mapping[str, object]) -> None:
        if self.life.is_alive:
            self.sim.noted(self.node, event, fields)

    def given_up(self) -> set[str]:
        """Whom a restore does not wait for: neither members, nor away for a short while only."""
        known = {*self.state.members, *(set(self.state.absent) - self.state.lost)}
        return set(self.sim.machines) - known

    async def _run_state(self) -> None:
        if Bug.STORE_ALWAYS_TRUSTED in self.bugs:
            self._trust_always()
        await self.state.run()

    def _trust_always(self) -> None:
        """A planted bug: what the store says now is all that was ever seen."""
        state = self.state

        def judge_nothing() -> None:
            view = state.view
            if view.table is not None and view.cluster_id:
                state.seen = Highwater(view.cluster_id, view.table, {})
                state.table = view.table

        state._judge = judge_nothing  # type: ignore[method-assign]
        state.doubt = lambda reason: None  # type: ignore[method-assign]

    # membership

    async def _follow(self) -> None:
        serial = -1
        while True:
            serial = await self.state.changed(serial, POLL_S)
            self._look()

    def _look(self) -> None:
        state = self.state
        seen = (state.is_trusted, self.epoch)
        lost = [node for node in sorted(state.lost) if self._arenas.pop(node, None) is not None]
        mark = state.members_mark if isinstance(state, CrowdState) else state.serial
        members = state.members if mark != self._looked_at else {}
        self._looked_at = mark
        for node, member in members.items():
            before = self._arenas.get(node)
            if before is not None and before != member.arena_id:
                lost.append(node)  # it came back with an empty arena
            self._arenas[node] = member.arena_id
        if (lost or seen != self._epoch_seen) and self.collector is not None:
            self.collector.membership_changed(lost)
        if seen != self._epoch_seen:
            self._epoch_seen = seen
            self.truth.believes(self.node, self.table, self.disk)
            self.world.table_changed()
        if self.coordination.current() > self.job.newest_generation:
            self.job.overtake()
        self._let_go()

    # collecting

    def _is_collector(self) -> bool:
        return self.coordination.is_collector or (
            Bug.STALE_COLLECTOR in self.bugs and self.collector is not None
        )

    def _let_go(self) -> None:
        if self.collector is not None and not self._is_collector():
            self.collector.close()
            self.collector = None
            self.sim.note(self.node, "lets the job's collector go")

    async def find_collector(self) -> str:
        """The node that collects the job: this one, if nobody does and it has to do with the job."""
        coordination = self.coordination
        if Bug.STALE_COLLECTOR in self.bugs and self.collector is not None:
            return self.node
        if coordination.collector and not coordination.is_collector and coordination.collector != self.node:
            return coordination.collector
        is_free = (
            coordination.collector != self.node
        )  # else the key is ours, and the answer to our claim was lost
        if not self.job.has_anything() and is_free and not coordination.is_collector:
            raise UnavailableError("nobody collects the job", kind="no_collector")
        try:
            node = await coordination.claim_collector()
        except FencedError as error:
            raise UnavailableError("this node's lease has ended", kind="lease") from error
        if node == self.node and self.collector is None:
            await self._begin_collecting()
        return node

    async def _begin_collecting(self) -> None:
        try:
            newest = await self.coordination.take_over_newest()
        except RemoteProtocolError as error:
            raise InternalError("the record of the newest snapshots cannot be read") from error
        except FencedError as error:
            raise UnavailableError("this node's lease has ended", kind="lease") from error
        if self.collector is None:
            self.collector = SimCollector(self, newest.record if newest else Record())
            self.sim.note(self.node, "collects the job")

    def record(self, record: Record, written: Callable[[Record], None]) -> None:
        newest = Newest.of(record, self.epoch)
        self.coordination.publish_newest(newest, lambda written_: written(written_.record))

    async def report(self, report: NodeReport, known_orders: int, hold_s: float) -> tuple[str, Orders]:
        """Take our own report to the collector, wherever it is."""
        node = await self.find_collector()
        known = known_orders if self._asked == node else UNKNOWN_ORDERS
        self._asked = node
        found: tuple[bool, Orders] = await self.call(
            node, "report", report, known, hold_s, timeout_s=hold_s + 1.0
        )
        if not found[0]:
            self._asked = ""
            raise UnavailableError(f"{node} does not collect the job any more", kind="no_collector")
        return node, found[1]

    async def _take_report(self, report: NodeReport, known_orders: int, hold_s: float) -> tuple[bool, Orders]:
        collector = self.collector
        if collector is None or not self._is_collector():
            return False, Orders()
        orders = await collector.report(report, known_orders, hold_s)
        return not collector.is_closed, orders

    async def at_collector(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Ask the collector; when it is away or moves, ask its successor."""
        until_s = self.now_s + timeout_s
        while True:
            try:
                node = await self.find_collector()
                return await self.call(node, method, *args, timeout_s=max(1.0, until_s - self.now_s))
            except UnavailableError as error:
                if error.kind == "settling" or self.now_s >= until_s:
                    raise
            await asyncio.sleep(RETRY_S)

    def _here(self) -> SimCollector:
        if self.collector is None or not self._is_collector():
            raise UnavailableError("this node does not collect the job now", kind="no_collector")
        return self.collector

    def _plan(self, *args: Any) -> Coroutine[Any, Any, object]:
        return self._here().plan(*args)

    def _finish(self, *args: Any) -> Coroutine[Any, Any, object]:
        return self._here().finish(*args)

    # generations

    async def next_generation(self, incarnation: str, rollbacks: int, world_size: int) -> Assignment:
        coordination, knew = self.coordination, self.truth.known_generation(self.disk.arena_id)
        if Bug.GENERATION_FROM_CACHE in self.bugs:
            answer = assign(
                coordination._table, incarnation=incarnation, rollback_count=rollbacks, world_size=world_size
            )
            row = answer.generation
            known = {**coordination._table, (row.incarnation, row.rollback_count): row}
            key = self.state.keys.generations(JOB)
            await self.state.store.transact([], [Write(key, generations_to_json(known))])
            coordination._keep(known)
        else:
            answer = await coordination.next_generation(
                incarnation=incarnation, rollback_count=rollbacks, world_size=world_size
            )
        self.life.check()
        self.truth.gave_out(self.node, answer.generation, knew if answer.is_new else 0)
        return answer

    # what peers ask

    def own_records(self, snapshot: SnapshotId) -> list[ShardRecord]:
        facts = self.job.ledger.snapshots.get(snapshot)
        return [shard.record for _, shard in sorted(facts.shards.items())] if facts is not None else []

    def _map_records(self, snapshot: SnapshotId, epoch: int) -> Records:
        found = self.disk.maps.get((snapshot, epoch))
        if found is None:
            raise NotFoundError("no such row map here", kind="snapshot")
        return Records(found[1], found[0].nodes, found[0].code)

    def _holds(self, names: Sequence[tuple[bytes, int]]) -> list[bool]:
        return [self.parity.has(*name) for name in names]

    def _pull(self, keys: Sequence[PullKey]) -> list[Content]:
        found = []
        for rank, index, digest in keys:
            body = self._find_chunk(rank, index, digest)
            found.append(body if body is not None else b"")
        return found

    def _find_chunk(self, rank: int, index: int, digest: Content) -> Content | None:
        """The bytes of a chunk that some snapshot here has; verified before they are sent is for who receives them."""
        target = self.world.orders.target
        for snapshot in (target, *self.job.ledger.snapshots):
            shard = self.disk.shards.get((snapshot, rank)) if snapshot is not None else None
            if shard is not None and shard.record.chunks[index].digest == digest:
                return shard.contents[index]
        return None

    def _push(self, pushes: Sequence[Push]) -> list[bool]:
        taken = []
        for row_id, number, parity in pushes:
            is_planned = self.parity.is_planned(row_id)
            if is_planned:
                self.commit_fragment(row_id, number, parity)
            taken.append(is_planned)
        return taken

    def commit_fragment(self, row_id: bytes, number: int, parity: Parity) -> None:
        """Store a fragment; later or wrongly with a planted bug."""
        if Bug.PARITY_OF_OLDER_ROW in self.bugs:
            parity = encode(self._older_row(row_id) or parity[1], number)
        if Bug.FRAGMENT_BEFORE_PERSIST in self.bugs:
            self.parity.hold_early(row_id, number)
            self.world.changed()
            self.sim.loop.call_later(0.5, self._commit_late, row_id, number, parity)
        else:
            self.parity.commit(row_id, number, parity)

    def _commit_late(self, row_id: bytes, number: int, parity: Parity) -> None:
        if self.life.is_alive:
            self.parity.commit(row_id, number, parity)

    def _older_row(self, row_id: bytes) -> Sequence[Content] | None:
        """The digests of the row with the same number of the plan before."""
        plans = self.parity.plans()
        for place_, plan in enumerate(plans):
            for row in plan.rows:
                if row.id == row_id and place_ and row.number < len(plans[place_ - 1].rows):
                    return [chunk.digest for chunk in plans[place_ - 1].rows[row.number].chunks]
        return None

    def _shard(self, snapshot: SnapshotId, rank: int) -> StoredShard:
        found = self.disk.shards.get((snapshot, rank))
        if found is None:
            raise NotFoundError("no such shard here", kind="shard")
        return found

    def _chunk(self, snapshot: SnapshotId, rank: int, index: int) -> Content:
        return self._shard(snapshot, rank).contents[index]

    def _fragment(self, row_id: bytes, number: int) -> Parity:
        found = self.disk.fragments.get((row_id, number))
        if found is None:
            raise NotFoundError("no such fragment here", kind="fragment")
        return found
