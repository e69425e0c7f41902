"""A node's part of a job's world without arena and sockets, in virtual time: what it has, whom it reports to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from snapd.core.cluster import GroupTable
from snapd.core.generations import Generation
from snapd.core.ids import Place, SnapshotId
from snapd.core.interval import Interval
from snapd.core.ledger import Ledger
from snapd.core.manifest import Chunk, ShardRecord
from snapd.core.recovery import HeldRows
from snapd.core.reports import NodeReport, Orders, PartDone, Told
from snapd.errors import UnavailableError
from snapd.runtime.peers import ReportAnswer
from snapd.runtime.world import Here, World
from tests.support.collector_reports import snap, table_of
from tests.support.virtual_time import run_virtually


@dataclass
class Row:
    world_size: int = 2
    slots: int = 3
    interval_steps: int = 1


@dataclass
class FakeSession:
    """As much of a session as a report reads."""

    rank: int = 0
    generation: int = 1
    step: int = -1
    row: Row = field(default_factory=Row)

    def newest_step_seen(self) -> int:
        return self.step


@dataclass
class FakeCoordination:
    number: int = 1
    taken: Interval = field(default_factory=Interval)

    def current(self) -> int:
        return self.number

    def generation(self, number: int) -> Generation | None:
        return Generation(number, "i" * 16, 0, 2, None)

    def interval(self) -> Interval:
        return self.taken

    def take_interval(self, interval: Interval) -> None:
        self.taken = interval


@dataclass
class FakeIndex:
    known: Told = field(default_factory=Told)
    problems: dict[SnapshotId, str] = field(default_factory=dict)

    def told(self) -> Told:
        return self.known

    def set_told(self, told: Told) -> None:
        self.known = told

    def set_problem(self, snapshot: SnapshotId, problem: str) -> None:
        self.problems[snapshot] = problem


class Silent:
    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


@dataclass
class FakeContext:
    log: Silent = field(default_factory=Silent)


class FakeJob:
    """A job on a node, with a real ledger and no arena."""

    def __init__(self, name: str = "job") -> None:
        self.name = name
        self.context = FakeContext()
        self.ledger = Ledger()
        self.coordination = FakeCoordination()
        self.index = FakeIndex()
        self.sessions = [FakeSession()]
        self.abort_count = 0
        self.final_ranks: set[int] = set()
        self.arena_bytes = 0
        self.settled = 0
        self.flusher = None  # no shared tier
        self.disk = None  # nor one of the node's own
        self.intervals: list[Interval] = []

    def served_sessions(self) -> Iterable[FakeSession]:
        return self.sessions

    live_sessions = served_sessions

    def closed_below(self) -> int:
        return 1

    def settle(self) -> None:
        self.settled += 1

    def write_interval(self, interval: Interval) -> None:
        self.intervals.append(interval)

    def forget_announced(self) -> None:
        return

    def capture(self, step: int, rank: int = 0, world_size: int = 2) -> None:
        chunk = Chunk(10, bytes(16), Place(0, 0), None)
        record = ShardRecord(
            self.name, snap(step), rank, world_size, 4096, 1, 10, 0, (chunk,), None, 0.0, bytes(16)
        )
        self.ledger.add(record, session_id=1, sequence=step, is_verified=True)


@dataclass
class FakeProtection:
    aims: list[tuple[SnapshotId | None, GroupTable | None]] = field(default_factory=list)
    forgotten: list[tuple[set[SnapshotId], SnapshotId | None, int]] = field(default_factory=list)
    parts: tuple[PartDone, ...] = ()
    rows: tuple[HeldRows, ...] = ()
    text: str = ""

    def aim(self, job: object, target: SnapshotId | None, table: GroupTable | None) -> None:
        self.aims.append((target, table))

    def forget(
        self, job: object, keep: set[SnapshotId], *, protected: SnapshotId | None, protected_epoch: int
    ) -> None:
        self.forgotten.append((keep, protected, protected_epoch))

    def done(self, job: object) -> tuple[PartDone, ...]:
        return self.parts

    def held_rows(self, job: object) -> tuple[HeldRows, ...]:
        return self.rows

    def trouble(self, job: object) -> str:
        return self.text


@dataclass
class Collecting:
    """The collector at the other end, `delay_s` away in each direction."""

    delay_s: float = 0.01
    orders: Orders = field(default_factory=lambda: Orders(number=1))
    away: bool = False
    name: str = "collector"
    heard: list[tuple[float, NodeReport]] = field(default_factory=list)
    cancelled: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def report(self, job: str, report: NodeReport, *, known_orders: int, hold_s: float) -> ReportAnswer:
        try:
            await asyncio.sleep(self.delay_s)
            if self.away:
                raise UnavailableError("no route")
            self.heard.append((asyncio.get_running_loop().time(), report))
            if known_orders == self.orders.number and hold_s:
                self.changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(hold_s):
                        await self.changed.wait()
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return ReportAnswer(True, self.name, self.orders)

    def order(self, **facts: object) -> None:
        self.orders = replace(self.orders, number=self.orders.number + 1, **facts)
        self.changed.set()


@dataclass
class Scene:
    job: FakeJob | None = field(default_factory=FakeJob)
    protection: FakeProtection = field(default_factory=FakeProtection)
    collecting: Collecting = field(default_factory=Collecting)
    table: GroupTable | None = field(default_factory=lambda: table_of(["a", "b"]))
    made: int = 0
    world: World = None  # type: ignore[assignment]

    def begin(self) -> World:
        here = Here(
            node="a", instance=7, epoch=lambda: 3, table=lambda: self.table,
            monotonic_s=asyncio.get_running_loop().time,
        )  # fmt: skip
        self.world = World(
            "job", here, self.collecting, self.protection,  # type: ignore[arg-type]
            find_job=lambda: self.job, make_job=self.make,  # type: ignore[arg-type,return-value]
        )  # fmt: skip
        return self.world

    def make(self) -> FakeJob:
        self.made += 1
        self.job = FakeJob()
        return self.job

    @property
    def mine(self) -> FakeJob:
        assert self.job is not None
        return self.job

    def reports(self) -> list[NodeReport]:
        return [report for _, report in self.collecting.heard]


def scenario(test: Callable[[Scene], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """With the world running."""

    async def run() -> None:
        scene = Scene()
        task = asyncio.ensure_future(scene.begin().run())
        try:
            await test(scene)
            assert not task.done(), task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def wrapped() -> None:
        run_virtually(run())

    wrapped.__name__ = test.__name__
    return wrapped


def still(test: Callable[[Scene], None]) -> Callable[[], None]:
    """With a world that does not run: only told what to do."""

    async def run() -> None:
        scene = Scene()
        scene.begin()
        test(scene)

    def wrapped() -> None:
        run_virtually(run())

    wrapped.__name__ = test.__name__
    return wrapped
