"""Cluster states on a store, as daemons would run them; placement is a stand-in that groups by name."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from snapd.coordination.cluster import ClusterState
from snapd.coordination.highwater import HighwaterStore, MemoryHighwater
from snapd.coordination.kv import KeyValue
from snapd.coordination.settings import ClusterEnvironment, ClusterSettings
from snapd.core.cluster import Code, Group, GroupTable, Member
from snapd.core.keyspace import Keyspace
from snapd.core.membership import Highwater

KEYS = Keyspace("test")
ASKED = Code(1, 1)


def member(node: str, *, host: str = "", arena: str = "arena-1", address: str = "") -> Member:
    host = host or f"host-{node}"
    return Member(
        node=node, host=host, domain=host, address=address or f"{host}:7000", bulk_address=f"{host}:7001",
        arena_id=arena, version="0",
    )  # fmt: skip


def pairs(
    previous: GroupTable | None,
    members: Sequence[Member],
    asked: Code,
    *,
    lost: Collection[str],
    draining: Collection[str],
    domains: Mapping[str, str],
) -> GroupTable:
    """Pairs in the order of names; those of the previous table that are away for a short while keep their place."""
    before = {node for group in (previous.groups if previous else ()) for node in group.nodes}
    living = {each.node for each in members if not each.is_draining}
    nodes = sorted((living | (before & set(lost))) - set(draining))
    groups = tuple(
        Group(i, tuple(nodes[i : i + 2]), asked if len(nodes[i : i + 2]) == 2 else None)
        for i in range(0, len(nodes), 2)
    )
    return GroupTable(0, asked, groups, f"{len(members)} members", "")


@dataclass
class Daemon:
    """A `ClusterState` with its task; `notes` are the events that it would have logged."""

    state: ClusterState
    highwater: HighwaterStore
    notes: list[tuple[str, dict[str, object]]]
    task: asyncio.Task[None]

    def events(self, name: str) -> list[dict[str, object]]:
        return [fields for event, fields in self.notes if event == name]

    async def until(self, is_so: Callable[[ClusterState], bool], within_s: float = 60.0) -> None:
        """Wait until the state is so; an error of the daemon is raised here."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + within_s
        while not is_so(self.state):
            if self.task.done():
                self.task.result()
            left_s = deadline_s - loop.time()
            assert left_s > 0, (
                f"{self.state.member.node}: away={self.state.away} distrust={self.state.distrust!r} "
                f"table={self.state.table} members={sorted(self.state.members)} notes={self.notes[-8:]}"
            )
            await self.state.changed(self.state.serial, min(left_s, 0.25))

    async def stop(self) -> None:
        """As a daemon that is told to: it lets go of its lease."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@dataclass
class Cluster:
    """Starts daemons with the same settings. `connect` opens a client of the store for a node."""

    connect: Callable[[str], KeyValue]
    settings: ClusterSettings = field(default_factory=lambda: ClusterSettings(asked=ASKED))
    seed: int = 1
    daemons: list[Daemon] = field(default_factory=list)

    def start(self, me: Member, highwater: HighwaterStore | None = None, **settings: object) -> Daemon:
        chance = random.Random(f"{self.seed} {me.node} {len(self.daemons)}")
        notes: list[tuple[str, dict[str, object]]] = []
        highwater = highwater or MemoryHighwater(Highwater())
        environment = ClusterEnvironment(
            monotonic_s=asyncio.get_running_loop().time,
            chance=chance.random,
            random_id=lambda: f"{chance.getrandbits(64):016x}",
        )
        state = ClusterState(
            self.connect(me.node),
            me,
            self.settings if not settings else ClusterSettings(asked=ASKED, **settings),  # type: ignore[arg-type]
            keys=KEYS,
            environment=environment,
            highwater=highwater,
            place=pairs,
            note=lambda event, fields: notes.append((event, dict(fields))),
        )
        task = asyncio.get_running_loop().create_task(state.run(), name=me.node)
        self.daemons.append(Daemon(state, highwater, notes, task))
        return self.daemons[-1]

    async def stop(self) -> None:
        for daemon in self.daemons:
            await daemon.stop()


def all_agree(daemons: Sequence[Daemon], *nodes: str) -> bool:
    """Everybody believes the same table, which names just these nodes."""
    tables = [daemon.state.table for daemon in daemons]
    named = sorted(node for group in (tables[0].groups if tables[0] else ()) for node in group.nodes)
    return (
        all(daemon.state.is_trusted and daemon.state.away is None for daemon in daemons)
        and all(table == tables[0] for table in tables)
        and named == sorted(nodes)
    )


async def settled(daemons: Sequence[Daemon], *nodes: str, within_s: float = 60.0) -> GroupTable:
    """Wait until all agree on a table of these nodes; return it."""
    for daemon in daemons:
        await daemon.until(lambda _: all_agree(daemons, *nodes), within_s)
    table = daemons[0].state.table
    assert table is not None
    return table
