"""The parity that a node holds, and whose rows it is for: runtime's ParityStore and NodeProtection over a disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from snapd.core.ids import SnapshotId
from snapd.core.obeying import parity_to_drop
from snapd.core.protection import PlacedRecord, RowMap, RowPlan, make_plan
from snapd.core.recovery import HeldRows
from snapd.core.reports import PartDone
from snapd.sim.bugs import Bug
from snapd.sim.disk import Disk, FragmentKey, Parity

if TYPE_CHECKING:
    from snapd.sim.daemon import SimDaemon

PLANS_KEPT = 256


class Plans:
    """Row plans by what they follow from: the members of a group plan the same, so the simulation plans once."""

    def __init__(self, nodes: int) -> None:
        self._kept = max(PLANS_KEPT, 2 * nodes)
        self._known: dict[tuple[object, ...], tuple[RowPlan, Sequence[PlacedRecord]]] = {}
        self.made = 0

    def of(self, row_map: RowMap, records: Sequence[PlacedRecord]) -> RowPlan:
        key = (row_map, tuple(sorted((p.record.rank, p.node, id(p.record)) for p in records)))
        found = self._known.get(key)
        if found is None:
            self.made += 1
            while len(self._known) >= self._kept:
                del self._known[next(iter(self._known))]
            # the records are kept too: their ids stay theirs
            found = self._known[key] = make_plan(row_map, records), records
        return found[0]


class SimParity:
    """Row maps with their records, and fragments."""

    def __init__(self, daemon: SimDaemon) -> None:
        self._daemon = daemon
        self._disk: Disk = daemon.disk
        self._plans: dict[tuple[SnapshotId, int], RowPlan] = {}
        self._references: Counter[bytes] = Counter()
        self._early: set[FragmentKey] = set()  # counted as held, and not stored yet: a planted bug
        self._done_for: tuple[object, ...] = ()
        self._done: tuple[PartDone, ...] = ()
        self.version = 0

    def load(self) -> None:
        for key, (row_map, records) in sorted(self._disk.maps.items(), key=lambda item: item[0]):
            self._plans[key] = self._daemon.plans.of(row_map, records)
        self._count()
        for fragment in [key for key in self._disk.fragments if key[0] not in self._references]:
            del self._disk.fragments[fragment]

    def _count(self) -> None:
        self._references = Counter(row.id for plan in self._plans.values() for row in plan.rows)
        self.version += 1

    def plans(self) -> list[RowPlan]:
        return [self._plans[key] for key in sorted(self._plans)]

    def plan(self, snapshot: SnapshotId, epoch: int) -> RowPlan | None:
        return self._plans.get((snapshot, epoch))

    def is_planned(self, row_id: bytes) -> bool:
        return row_id in self._references

    def has(self, row_id: bytes, number: int) -> bool:
        return (row_id, number) in self._disk.fragments or (row_id, number) in self._early

    def adopt(self, plan: RowPlan, records: Sequence[PlacedRecord]) -> None:
        """Store the row map and all records."""
        daemon = self._daemon
        daemon.life.effect(f"persist row map of {plan.map.id}, epoch {plan.map.epoch}")
        if Bug.RECORDS_NOT_REPLICATED in daemon.bugs:
            records = [placed for placed in records if placed.node == daemon.node]
        self._disk.maps[plan.map.key] = plan.map, tuple(records)
        self._plans[plan.map.key] = plan
        self._count()

    def hold_early(self, row_id: bytes, number: int) -> None:
        self._early.add((row_id, number))
        self.version += 1

    def commit(self, row_id: bytes, number: int, parity: Parity) -> None:
        """Store a fragment whose bytes were checked. One that is here already stays."""
        if (row_id, number) not in self._disk.fragments:
            self._daemon.life.effect("persist fragment")
            if self.is_planned(row_id):
                self._disk.fragments[row_id, number] = parity
        self._early.discard((row_id, number))
        self.version += 1
        self._daemon.world.changed()

    def discard(self, row_id: bytes, number: int) -> None:
        if self._disk.fragments.pop((row_id, number), None) is not None:
            self.version += 1

    def drop(self, snapshot: SnapshotId, *, below_epoch: int | None = None) -> None:
        """Forget the row maps of a snapshot, or those of older epochs, and the parity that no other map needs."""
        doomed = [
            key for key in self._plans if key[0] == snapshot and (below_epoch is None or key[1] < below_epoch)
        ]
        if not doomed:
            return
        daemon = self._daemon
        daemon.life.effect(f"drop parity of {snapshot}")
        for key in doomed:
            daemon.truth.drops_parity(daemon.node, *key)
            del self._plans[key]
            self._disk.maps.pop(key, None)
        self._count()
        for fragment in [key for key in self._disk.fragments if key[0] not in self._references]:
            del self._disk.fragments[fragment]

    # what is told, and obeyed

    def forget(self, keep: set[SnapshotId], protected: SnapshotId | None, protected_epoch: int) -> None:
        """Parity of snapshots older than the newest protected one may go, and what older epochs made of that one."""
        row_maps = [plan.map for plan in self.plans()]
        for snapshot, below_epoch in parity_to_drop(
            row_maps, keep, protected=protected, protected_epoch=protected_epoch
        ):
            self.drop(snapshot, below_epoch=below_epoch)
        if Bug.OLD_PARITY_FIRST in self._daemon.bugs:
            for row_map in row_maps:
                self.drop(row_map.id, below_epoch=self._daemon.epoch)

    def done(self) -> tuple[PartDone, ...]:
        """Snapshots of which all that the plan of this epoch gives to this node is here."""
        daemon = self._daemon
        planning = daemon.protector.planning
        state = (self.version, daemon.epoch, planning)
        if self._done_for != state:
            self._done_for = state
            self._done = tuple(
                PartDone(plan.map.id, plan.identity)
                for plan in self.plans()
                if plan.map.key != planning
                and (plan.map.epoch == daemon.epoch or Bug.EPOCH_UNCHECKED in daemon.bugs)
                and all(
                    self.has(row.id, number)
                    for row, number in plan.given_to(daemon.node)
                    if number == 0 or Bug.PUSHED_NOT_AWAITED not in daemon.bugs
                )
            )
        return self._done

    def held_rows(self) -> tuple[HeldRows, ...]:
        held = self._disk.fragments
        return tuple(
            HeldRows(
                plan.map.id,
                plan.map.group,
                plan.map.epoch,
                plan.map.nodes,
                plan.map.code,
                frozenset(
                    (row.id, number)
                    for row in plan.rows
                    for number in range(len(row.parity_nodes))
                    if (row.id, number) in held
                ),
                frozenset(chunk.rank for row in plan.rows for chunk in row.chunks),
            )
            for plan in self.plans()
        )
