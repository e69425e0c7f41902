"""What keeps a node that is to be taken away from being dispensable. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from snapd.core.ids import SnapshotId
from snapd.core.recovery import Inventory
from snapd.core.reports import Orders

LoneShard = tuple[SnapshotId, int]


def that_matter(orders: Orders) -> set[SnapshotId]:
    """The snapshots of a job that nobody may lose a shard of."""
    named = (orders.complete, orders.target, orders.protected)
    return {snapshot for snapshot in named if snapshot is not None}


def lone_shards(
    node: str, snapshots: Collection[SnapshotId], inventories: Iterable[Inventory], able: Collection[str]
) -> list[LoneShard]:
    """The shards of these snapshots that `node` has and none of `able` has, in order: (snapshot, rank)."""
    mine: set[LoneShard] = set()
    theirs: set[LoneShard] = set()
    for inventory in inventories:
        held = {(held.id, held.rank) for held in inventory.held if held.id in snapshots}
        if inventory.node == node:
            mine |= held
        elif inventory.node in able:
            theirs |= held
    return sorted(mine - theirs)


def lacks_protection(orders: Orders, epoch: int) -> str:
    """Why what is protected of a job may still need a node that is in no group of the table of `epoch`; else empty."""
    if orders.complete is None and orders.protected is None:
        return ""
    if orders.protected is None:
        return f"{orders.complete} is not protected: {orders.reason}"
    if orders.protected_epoch < epoch:
        doing = f"{orders.target} is being protected" if orders.target is not None else orders.reason
        return f"{orders.protected} is protected by groups with the node; {doing}"
    return ""
