"""Planted bugs: each breaks a rule of the real system on purpose, to prove that the checkers would see it."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from typing import Any

from snapd.core.cluster import GroupTable
from snapd.core.collector import Collector
from snapd.core.ids import SnapshotId
from snapd.core.reports import Orders


class Bug(enum.Enum):
    """The value says which rule is broken."""

    SEND_BEFORE_PERSIST = "a shard is reported before its record is stored"
    COLLECT_BEFORE_COMMIT = "a snapshot counts as complete when the last lane is handed over, not recorded"
    FRAGMENT_BEFORE_PERSIST = "a parity fragment counts as held before it is stored"
    FRAGMENT_UNCHECKED = "pulled chunks are coded without a look at their digests"
    PUSHED_NOT_AWAITED = "a node's part counts as done when the fragments that it codes itself are stored"
    PARITY_OF_OLDER_ROW = "parity is shared by the row's number, not by its identity"
    RECORDS_NOT_REPLICATED = "only a node's own records are stored with the row map"
    EPOCH_UNCHECKED = "parts that were done under another epoch count"
    PLAN_IDENTITY_IGNORED = "parts count whatever rows their nodes planned"
    REPLANNED_UNASKED = "a node plans rows anew that the collector counts on already"
    ONE_GROUP_IS_ENOUGH = "a snapshot counts as protected when its first group is done"
    PART_MISSING_IS_FINE = "a snapshot counts as protected while one member of a group is still at work"
    TOLD_BEFORE_RECORDED = "nodes are told that a snapshot is protected before the store has recorded it"
    DROP_PROTECTED = "the newest protected snapshot may be dropped"
    DROP_NEWEST_COMPLETE = "the newest complete snapshot may be dropped"
    FORGET_COMPLETE = "a complete snapshot is forgotten while a holder is away"
    COLLECTOR_IN_HASTE = "a new collector has snapshots dropped before all members have reported to it"
    LOST_NODE_REMEMBERED = "what a node reported counts on after it came back empty"
    OLD_PARITY_FIRST = "parity of an older epoch goes before the new epoch's is done"
    TARGET_DROPS_FORMER = "parity of the former target goes when a new one is taken up"
    STALE_COLLECTOR = "a collector that lost its lease goes on, and is obeyed"
    UNREACHABLE_IS_ABSENT = "a restore does not wait for nodes that do not answer"
    BARRIER_WITHOUT_ONE = "a restore is committed while one rank has not reported"
    MIXED_STEPS = "each rank restores the newest step that its node has"
    RESTORE_UNCHECKED = "restored chunks are not compared with their digests"
    FENCE_IGNORED = "captures of an overtaken trainer are taken up"
    OLD_TRAINERS_NOT_WAITED_FOR = "a restore is planned while captures of older trainers are being taken up"
    STORE_ALWAYS_TRUSTED = "a wiped or rolled-back store is believed"
    HIGHWATER_NOT_STORED = "what was seen of the cluster is not stored before it is acted upon"
    GENERATION_FROM_CACHE = "a generation is given out from the cache, without a look at the store"


# Where what a bug leaves out is needed seldom: the faults among which it is looked for. Elsewhere: all kinds.
MIXES: Mapping[Bug, tuple[str, ...]] = {
    Bug.RESTORE_UNCHECKED: ("lose", "trainer", "weather"),
    Bug.FENCE_IGNORED: ("cut", "halves", "leave"),
    Bug.OLD_TRAINERS_NOT_WAITED_FOR: ("cut", "halves", "leave"),
    Bug.COLLECTOR_IN_HASTE: ("crash", "cut", "halves"),
    Bug.LOST_NODE_REMEMBERED: ("lose", "rack"),
    Bug.STORE_ALWAYS_TRUSTED: ("crash", "trainer", "wipe", "roll back"),
    Bug.HIGHWATER_NOT_STORED: ("crash", "trainer", "wipe", "roll back"),
}


# Wrong orders that nodes would refuse, for they remember what they were told: planted in both.
OBEYED = frozenset({Bug.DROP_PROTECTED, Bug.DROP_NEWEST_COMPLETE})


class BuggyCollector(Collector):
    """The collector with the bugs of its own decisions. Without any it is the real one."""

    bugs: frozenset[Bug] = frozenset()

    def settle(self, table: GroupTable | None, *, awaited: Iterable[str] = ()) -> Orders:
        orders = super().settle(table, awaited=awaited)
        if Bug.TOLD_BEFORE_RECORDED in self.bugs and self.to_record.told != orders.told:
            self.recorded(self.to_record)
            orders = super().settle(table, awaited=awaited)
        return orders

    def _plan_of(self, node: str, snapshot: SnapshotId, epoch: int) -> bytes | None:
        report = self.reports.get(node)
        if report is not None and Bug.EPOCH_UNCHECKED in self.bugs:
            epoch = report.epoch
        found = super()._plan_of(node, snapshot, epoch)
        if found is not None and Bug.PLAN_IDENTITY_IGNORED in self.bugs:
            return b"any"
        return found

    def missing_parts(self, snapshot: SnapshotId, ranks: Mapping[int, set[str]], table: GroupTable) -> str:
        missing = super().missing_parts(snapshot, ranks, table)
        if not self.bugs:
            return missing
        groups = self.groups_of(ranks, table)
        if not missing or self._obstacle(ranks, table) or not groups:
            return missing
        parts = {
            number: [self._plan_of(node, snapshot, table.epoch) for node in group.nodes]
            for number, group in groups.items()
        }
        if Bug.ONE_GROUP_IS_ENOUGH in self.bugs and all(parts[min(groups)]):
            return ""
        lacking = sum(plan is None for plans in parts.values() for plan in plans)
        if Bug.PART_MISSING_IS_FINE in self.bugs and lacking == 1:
            return ""
        return missing

    def _newest_complete(self, whole: list[SnapshotId]) -> SnapshotId | None:
        newest = super()._newest_complete(whole)
        if Bug.FORGET_COMPLETE in self.bugs:
            return whole[-1] if whole else None
        return newest

    def _kept(self, *facts: Any) -> set[SnapshotId]:
        kept = super()._kept(*facts)
        complete, protected = facts[2], facts[4]
        if Bug.DROP_PROTECTED in self.bugs and protected is not None and protected != complete:
            kept.discard(protected)
        if Bug.DROP_NEWEST_COMPLETE in self.bugs and complete is not None:
            kept.discard(complete)
        return kept

    def _droppable(
        self, holders: Mapping[SnapshotId, Mapping[int, set[str]]], *others: object
    ) -> list[tuple[SnapshotId, str]]:
        found = list(super()._droppable(holders, *others))  # type: ignore[arg-type]
        kept = others[1]
        assert isinstance(kept, set)
        if Bug.DROP_NEWEST_COMPLETE in self.bugs and self.orders.complete in holders:
            if self.orders.complete not in kept and self.orders.complete is not None:
                found.append((self.orders.complete, "a planted bug"))
        return found

    def forget(self, node: str) -> None:
        if Bug.LOST_NODE_REMEMBERED not in self.bugs:
            super().forget(node)
