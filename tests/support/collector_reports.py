"""What nodes report to a collector, in few words, and what any set of reports must lead to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from snapd.core.cluster import Code, Group, GroupTable
from snapd.core.collector import Collector
from snapd.core.ids import SnapshotId
from snapd.core.reports import Held, NodeReport, Orders, PartDone, Record, Told


def snap(step: int, generation: int = 1) -> SnapshotId:
    return SnapshotId(generation, step)


def table_of(*groups: Sequence[str], epoch: int = 1) -> GroupTable:
    """Each group with m = 1; a group of one has no code."""
    made = tuple(
        Group(number, tuple(nodes), Code(len(nodes) - 1, 1) if len(nodes) > 1 else None)
        for number, nodes in enumerate(groups)
    )
    return GroupTable(epoch, Code(2, 1), made, "as the test says")


def held(step: int, *ranks: int, world_size: int, generation: int = 1) -> tuple[Held, ...]:
    return tuple(Held(snap(step, generation), rank, world_size, 100) for rank in ranks)


class Reporting:
    """A node that reports: facts stay until they are set anew, the serial grows by itself."""

    def __init__(self, node: str, ranks: Iterable[int], *, world_size: int, generation: int = 1) -> None:
        self.facts: dict[str, object] = {
            "node": node,
            "instance": 1,
            "epoch": 1,
            "generation": generation,
            "world_size": world_size,
            "served": tuple(ranks),
            "keep_complete": 2,
            "is_capturing": True,
            "closed_below": generation,
        }
        self.serial = 0

    def __call__(self, **facts: object) -> NodeReport:
        self.facts.update(facts)
        self.serial += 1
        return NodeReport(serial=self.serial, **self.facts)  # type: ignore[arg-type]

    def has(self, *parts: tuple[Held, ...], **facts: object) -> NodeReport:
        """A report with these shards."""
        return self(held=tuple(one for part in parts for one in part), **facts)


def done(*steps: int, plan: bytes = b"plan", generation: int = 1) -> tuple[PartDone, ...]:
    return tuple(PartDone(snap(step, generation), plan) for step in steps)


TABLE = table_of(["a", "b", "c"])


def collector(complete: SnapshotId | None = None, protected: SnapshotId | None = None) -> Collector:
    return Collector(8, Record(Told(complete, protected)))


def settle(core: Collector, table: GroupTable | None, *, awaited: Iterable[str] = ()) -> Orders:
    """With a store that records at once."""
    orders = core.settle(table, awaited=awaited)
    if core.to_record.told != orders.told:
        core.recorded(core.to_record)
        orders = core.settle(table, awaited=awaited)
    return orders


def world(size: int = 3, generation: int = 1) -> list[Reporting]:
    """Node i serves rank i."""
    return [
        Reporting(name, [rank], world_size=size, generation=generation)
        for rank, name in zip(range(size), "abcdef", strict=False)
    ]


def all_take(core: Collector, nodes: list[Reporting], *steps: int, **facts: object) -> None:
    """Every node reports its shard of these steps."""
    for rank, node in enumerate(nodes):
        core.take(node.has(*(held(step, rank, world_size=len(nodes)) for step in steps), **facts))
