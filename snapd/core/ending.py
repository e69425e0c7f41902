"""The end of a job across nodes: when all its ranks have closed it for good, and what of it is gone since.

Pure. A removal is a number: everything of the job's generations up to it is gone, on every node, also on one that was
away then. Generations only ever grow, so it says nothing of a job of the same name that is begun later.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from snapd.core.ids import SnapshotId
from snapd.core.recovery import Inventory
from snapd.core.reports import NodeReport, Orders, Told


@dataclass(slots=True)
class Ending:
    """Who has closed the newest generation for good; kept by its collector, for a daemon that restarts forgets it."""

    generation: int = 0
    ranks: set[int] = field(default_factory=set)

    def is_over(self, reports: Iterable[NodeReport]) -> bool:
        """All ranks of the newest generation have closed for good, and none of them has a session any more."""
        known = list(reports)
        newest = max((report.generation for report in known), default=0)
        if newest != self.generation:
            self.generation, self.ranks = newest, set()
        current = [report for report in known if report.generation == newest]
        self.ranks.update(rank for report in current for rank in report.final)
        world_size = max((report.world_size for report in current), default=0)
        is_served = any(report.served for report in current)
        return newest > 0 and world_size > 0 and not is_served and self.ranks >= set(range(world_size))


def is_gone(snapshot: SnapshotId | None, through: int) -> bool:
    return snapshot is not None and snapshot.generation <= through


def _left(snapshot: SnapshotId | None, through: int) -> SnapshotId | None:
    return None if is_gone(snapshot, through) else snapshot


def told_without(told: Told, through: int) -> Told:
    """What was said of generations after `through`."""
    epoch = 0 if is_gone(told.protected, through) else told.protected_epoch
    return Told(_left(told.complete, through), _left(told.protected, through), epoch)


def report_without(report: NodeReport, through: int) -> NodeReport:
    """What a report says of generations after `through`: its node may not have heard of the removal yet."""
    if not through:
        return report
    return replace(
        report,
        held=tuple(held for held in report.held if not is_gone(held.id, through)),
        done=tuple(part for part in report.done if not is_gone(part.id, through)),
        problems=tuple(entry for entry in report.problems if not is_gone(entry[0], through)),
        told=told_without(report.told, through),
    )


def orders_without(orders: Orders, through: int) -> Orders:
    """What a collector's orders say of generations after `through`: it may not have heard of the removal yet."""
    named = (orders.complete, orders.target, orders.protected, orders.flush, orders.node_flush)
    if not any(is_gone(snapshot, through) for snapshot in named):
        return orders
    return replace(
        orders,
        complete=_left(orders.complete, through),
        target=_left(orders.target, through),
        flush=_left(orders.flush, through),
        node_flush=_left(orders.node_flush, through),
        protected=_left(orders.protected, through),
        protected_epoch=0 if is_gone(orders.protected, through) else orders.protected_epoch,
    )


def inventory_without(inventory: Inventory, through: int) -> Inventory:
    """What a node holds of generations after `through`."""
    if not through:
        return inventory
    return replace(
        inventory,
        held=tuple(held for held in inventory.held if not is_gone(held.id, through)),
        rows=tuple(rows for rows in inventory.rows if not is_gone(rows.id, through)),
        problems=tuple(entry for entry in inventory.problems if not is_gone(entry[0], through)),
    )
