"""What a node does with a collector's orders: which snapshots, and which parity, it drops or keeps.

Pure. The orders say what may go; what this node was told to be complete or protected stays whatever a collector says
that has just begun, until it is told of newer ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from snapd.core.ids import SnapshotId
from snapd.core.ledger import Ledger
from snapd.core.protection import RowMap
from snapd.core.reports import Orders, Told

Doomed = list[tuple[SnapshotId, str]]


def snapshots_to_drop(
    ledger: Ledger,
    orders: Orders,
    told: Told,
    *,
    is_away: bool,
    room: int,
    coded: Callable[[], Iterable[SnapshotId]],
) -> Doomed:
    """Which snapshots this node drops now, with the reasons: those that the collector names; while it `is_away`, own
    captures that nobody waits for, so that at most `room` stay.

    `coded`: snapshots with row maps here: they may have become protected while nobody could tell us.
    """
    pinned = {known for known in (told.complete, told.protected) if known is not None}
    named = [
        (snapshot, reason)
        for snapshot, reason in orders.drop
        if snapshot in ledger.snapshots
        and not ledger.snapshots[snapshot].hold_count
        and snapshot not in pinned
    ]
    if named or not is_away:
        return named
    kept = pinned | ({orders.target} if orders.target is not None else set())
    return ledger.to_drop_alone(kept | set(coded()), room=room)


def counts_on(orders: Orders, snapshot: SnapshotId, epoch: int) -> bool:
    """Whether a collector that has heard no more that our part is done may have counted it: the rows of that plan are
    then what protects the snapshot, and no others take their place.
    """
    return (snapshot, epoch) in ((orders.protected, orders.protected_epoch), orders.found)


def parity_to_drop(
    row_maps: Iterable[RowMap],
    keep: Collection[SnapshotId],
    *,
    protected: SnapshotId | None,
    protected_epoch: int,
) -> list[tuple[SnapshotId, int | None]]:
    """Whose row maps, records and parity go: (snapshot, None), or (snapshot, epoch): only those of older epochs.

    Those of snapshots older than the newest protected one, but for those in `keep`; and of that one what older epochs
    made, once the parts of all nodes are done under a newer one: until then the old parity is all that protects it.
    """
    found: dict[tuple[SnapshotId, int | None], None] = {}
    for row_map in row_maps:
        if protected is not None and row_map.id < protected and row_map.id not in keep:
            found[row_map.id, None] = None
        elif row_map.id == protected and row_map.epoch < protected_epoch:
            found[row_map.id, protected_epoch] = None
    return list(found)
