"""A job's collector with three nodes around it that exist in words only, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from snapd.core.cluster import GroupTable
from snapd.core.ids import SnapshotId
from snapd.core.recovery import Inventory
from snapd.core.reports import Orders, Record
from snapd.core.restore import RankReport
from snapd.errors import NotFoundError, UnavailableError
from snapd.runtime.collecting import CollectorHost, CollectorSettings
from snapd.runtime.peers import Records, WorldAsk
from tests.support.collector_reports import Reporting, held, table_of
from tests.support.virtual_time import pass_time, run_virtually

ANSWER_S = 0.01
SETTINGS = CollectorSettings(
    restore_settle_s=10, restore_finish_s=30, restore_wait_s=20, interval_factor_max=8
)
HOLD_S = 5.0
DONE = RankReport(True)


@dataclass
class Around:
    """The cluster around a collector: who lives, and what each node answers."""

    table: GroupTable | None = field(default_factory=lambda: table_of(["a", "b", "c"]))
    tier_look: Any = None
    living: set[str] = field(default_factory=lambda: {"a", "b", "c"})
    doubtful: set[str] = field(default_factory=set)
    inventories: dict[str, Inventory] = field(default_factory=dict)
    records: dict[tuple[str, int], Records] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    silent_records: set[str] = field(default_factory=set)

    @property
    def calls(self) -> Around:
        return self

    async def inventory(self, node: str, job: str) -> Inventory:
        self.asked.append(("inventory", node))
        await asyncio.sleep(ANSWER_S)
        if node not in self.inventories:
            raise UnavailableError("does not answer")
        return self.inventories[node]

    async def fetch_records(self, node: str, job: str, snapshot: SnapshotId, *, epoch: int = 0) -> Records:
        self.asked.append((f"records {epoch}", node))
        if node in self.silent_records:
            raise UnavailableError("does not answer")
        if (node, epoch) not in self.records:
            raise NotFoundError("no such row map", kind="row_map")
        return self.records[node, epoch]


@dataclass
class Scene:
    """A collector, its three nodes with a rank each, and what it recorded."""

    around: Around = field(default_factory=Around)
    recorded: list[Record] = field(default_factory=list)
    is_store_away: bool = False
    ended: list[int] = field(default_factory=list)
    host: CollectorHost = None  # type: ignore[assignment]
    nodes: list[Reporting] = field(default_factory=list)

    def begin(self, generation: int = 1, **options: object) -> None:
        facts: dict[str, object] = {"before": Record(), "parent": None, "ended": self.ended.append}
        facts.update(options)
        self.host = CollectorHost("job", self.around, SETTINGS, record=self.take_record, **facts)  # type: ignore[arg-type]
        self.nodes = [Reporting(n, [r], world_size=3, generation=generation) for r, n in enumerate("abc")]

    def take_record(self, record: Record) -> None:
        """The store, a moment later."""
        if not self.is_store_away:
            self.recorded.append(record)
            asyncio.get_running_loop().call_later(ANSWER_S, self.host.recorded, record)

    async def tell(self, *steps: int, **facts: object) -> Orders:
        """All nodes report what they hold; nobody waits."""
        for rank, node in enumerate(self.nodes):
            parts = [held(step, rank, world_size=3) for step in steps]
            await self.host.report(node.has(*parts, **facts), known_orders=-1, hold_s=0)
        await pass_time(0.1)
        return self.host.orders

    def holds(self, *steps: int, nodes: str = "abc") -> None:
        """What the inventories say."""
        for rank, name in enumerate("abc"):
            if name in nodes:
                shards = tuple(one for step in steps for one in held(step, rank, world_size=3))
                self.around.inventories[name] = Inventory(node=name, held=shards)


def scenario(test: Callable[[Scene], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    async def run() -> None:
        scene = Scene()
        scene.begin()
        try:
            await test(scene)
        finally:
            scene.host.close()

    def wrapped() -> None:
        run_virtually(run())

    wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
    return wrapped


def now_s() -> float:
    return asyncio.get_running_loop().time()


def ask(
    number: int = 0, step: int | None = None, *, accept_older: bool = False, generation: int = 1
) -> WorldAsk:
    return WorldAsk(generation=generation, number=number, world_size=3, step=step, accept_older=accept_older)
