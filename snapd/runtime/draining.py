"""Emptying this node before maintenance (`snapd drain`): its share goes to the others while it still lives.

In this order: its trainers end (until then it protects on, as a full member of its group); each shard that only this
node has whole is brought to a member of a group; the node asks for no place in the group table; every job's newest
protected snapshot is protected under a table without it. At every moment in between every promise is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from snapd.coordination.cluster import ClusterState
from snapd.core.cluster import GroupTable
from snapd.core.draining import LoneShard, lacks_protection, lone_shards, that_matter
from snapd.core.ids import SnapshotId
from snapd.core.recovery import Inventory
from snapd.errors import SnapdError
from snapd.obs.log import EventLog
from snapd.runtime.job import Job
from snapd.runtime.world import World

POLL_S = 0.5
OTHERS_MIN = 2  # with fewer nearly nothing could be protected
TRIES_MAX = 3
SHOWN = 4


class Surroundings(Protocol):
    """The cluster, as far as draining needs it."""

    @property
    def name(self) -> str: ...
    @property
    def state(self) -> ClusterState: ...
    @property
    def table(self) -> GroupTable | None: ...
    @property
    def worlds(self) -> Mapping[str, World]: ...
    @property
    def living(self) -> Iterable[str]: ...
    async def inventory(self, node: str, job: str) -> Inventory: ...
    async def take_shard(self, node: str, job: str, snapshot: SnapshotId, rank: int) -> None:
        """Have a node bring a shard to itself. Raises SnapdError."""


@dataclass(frozen=True, slots=True)
class DrainStatus:
    """`is_asked`: the node is to be emptied. `waits_for`: what keeps it; empty when it may be taken away."""

    is_asked: bool = False
    waits_for: str = ""

    @property
    def is_drained(self) -> bool:
        return self.is_asked and not self.waits_for


class Drainer:
    """One per daemon of a cluster. On the event loop."""

    def __init__(self, cluster: Surroundings, jobs: Callable[[], Mapping[str, Job]], log: EventLog) -> None:
        self._cluster = cluster
        self._jobs = jobs
        self._log = log
        self.status = DrainStatus()

    async def run(self) -> None:
        """Until cancelled."""
        state, serial = self._cluster.state, -1
        while True:
            serial = await state.changed(serial, POLL_S)
            is_asked = self._cluster.name in state.view.drains
            if not is_asked and not self.status.is_asked and not state.member.is_draining:
                continue
            await self._look(is_asked)
            await asyncio.sleep(POLL_S)

    async def _look(self, is_asked: bool) -> None:
        before = self.status
        if is_asked:
            self.status = DrainStatus(True, await self._step())
        else:
            self._cluster.state.set_leaving(False)
            self.status = DrainStatus()
        if self.status != before:
            self._log.info(
                "node.draining" if is_asked else "node.stays",
                node=self._cluster.name,
                is_drained=self.status.is_drained,
                reason=self.status.waits_for,
            )

    async def _step(self) -> str:
        """Do what can be done now; returns what the node waits for, in words."""
        state, name = self._cluster.state, self._cluster.name
        if state.away is not None or self._cluster.table is None:
            return "the coordinator does not answer, or is not believed"
        others = self._others()
        obstacle = self._trainers() or (
            f"other nodes that would be left: {len(others)}, too few to protect anything"
            if len(others) < OTHERS_MIN
            else ""
        )
        if obstacle:
            state.set_leaving(False)  # it protects, and is protected, as before
            return obstacle
        for job in sorted(self._jobs()):
            trouble = await self._hand_over(job, others)
            if trouble:
                return f"job {job}: {trouble}"
        state.set_leaving(True)
        table = self._cluster.table
        if table is None or table.group_of(name) is not None:
            return "a group table without this node"
        for job, world in sorted(self._cluster.worlds.items()):
            if job not in self._jobs():
                continue
            lack = "its collector cannot be asked" if world.is_away else ""
            lack = lack or lacks_protection(world.orders, table.epoch)
            if lack:
                return f"job {job}: {lack}"
        return ""

    def _others(self) -> set[str]:
        state = self._cluster.state
        return set(self._cluster.living) - set(state.drains) - {self._cluster.name}

    def _trainers(self) -> str:
        served = [
            f"job {name}: rank {', '.join(str(rank) for rank in ranks[:SHOWN])}"
            for name, job in sorted(self._jobs().items())
            if (ranks := sorted({session.rank for session in job.live_sessions()}))
        ]
        if not served:
            return ""
        return f"trainers run on it ({'; '.join(served[:SHOWN])}); it cannot be empty before they have ended"

    # shards that nobody else has

    async def _hand_over(self, name: str, others: set[str]) -> str:
        """Have others bring what only this node has; returns why some of it cannot be handed over."""
        world, table = self._cluster.worlds.get(name), self._cluster.table
        if world is None or table is None:
            return ""
        able = [node for node in sorted(others) if _is_protecting(table, node)]
        matter = that_matter(world.orders)
        inventories = await self._inventories(name)
        loads = dict.fromkeys(able, 0)
        for snapshot, rank in lone_shards(self._cluster.name, matter, inventories, able):
            trouble = await self._give(name, (snapshot, rank), self._nearest(table, loads), loads)
            if trouble:
                return f"rank {rank} of {snapshot} has no other place: {trouble}"
        return ""

    def _nearest(self, table: GroupTable, loads: Mapping[str, int]) -> list[str]:
        """Members of our own group first, those with least to bring first."""
        group = table.group_of(self._cluster.name)
        mine = set(group.nodes) if group is not None else set()
        return sorted(loads, key=lambda node: (node not in mine, loads[node], node))[:TRIES_MAX]

    async def _give(self, job: str, shard: LoneShard, nodes: list[str], loads: dict[str, int]) -> str:
        reasons = []
        for node in nodes:
            try:
                await self._cluster.take_shard(node, job, *shard)
            except SnapdError as error:
                reasons.append(f"{node}: {error.message}")
                continue
            loads[node] += 1
            self._log.info(
                "shard.handed_over",
                job=job,
                generation=shard[0].generation,
                step=shard[0].step,
                rank=shard[1],
                node=node,
            )
            return ""
        return "; ".join(reasons) or "no other node is in a group that protects"

    async def _inventories(self, job: str) -> list[Inventory]:
        nodes = sorted(self._cluster.living)
        answers = await asyncio.gather(
            *(self._cluster.inventory(node, job) for node in nodes), return_exceptions=True
        )
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, SnapdError):
                raise answer
        return [answer for answer in answers if isinstance(answer, Inventory)]


def _is_protecting(table: GroupTable, node: str) -> bool:
    group = table.group_of(node)
    return group is not None and group.code is not None
