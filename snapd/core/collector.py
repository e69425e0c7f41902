"""One job seen across its nodes: from what each node reports to what all of them are told.

The collector keeps nothing that it could not be told again: a new one starts from the recorded newest snapshots and
from the nodes' next reports. Promises: the newest complete snapshot, the one that is being protected (the target) and
the newest protected one are never among those that may be dropped; `protected` moves only when every node of every
group that holds a shard has said, under the table's epoch and for the same row plan, that its part is done, and
coordination has recorded it. What is found and not recorded yet nobody is told of, and nothing goes for its sake: a
collector that is cut off then takes what it found with it, and no successor could know.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from snapd.core.cluster import Group, GroupTable
from snapd.core.flushing import choose_for_disks, choose_for_world
from snapd.core.ids import SnapshotId
from snapd.core.interval import Interval, after_abort, after_complete
from snapd.core.reports import FlushNews, NodeReport, Orders, Record, Told

REASONS_SHOWN = 8
BEING_PROTECTED = "being protected"


@dataclass(slots=True)
class Collector:
    """Mutable and single-threaded; knows no clock. `before`: what coordination remembers of earlier collectors.
    After each `settle` the caller has `to_record` recorded where it is news, and says so with `recorded`.
    """

    interval_factor_max: int
    before: Record = field(default_factory=Record)
    reports: dict[str, NodeReport] = field(default_factory=dict)
    orders: Orders = field(default_factory=Orders)
    _aborts: dict[tuple[str, int], int] = field(default_factory=dict)
    _problems: dict[SnapshotId, str] = field(default_factory=dict)
    _interval: Interval = field(init=False)
    _interval_generation: int = field(init=False)
    _target: SnapshotId | None = None
    _found: tuple[SnapshotId, int] | None = None  # protected under that epoch, and not recorded yet
    _parent: tuple[int, SnapshotId] | None = None

    def __post_init__(self) -> None:
        told = self.before.told
        self._interval_generation, self._interval = self.before.generation, self.before.interval
        self.orders = Orders(
            complete=told.complete,
            protected=told.protected,
            protected_epoch=told.protected_epoch,
            interval=self._interval,
        )

    # what is recorded before anybody is told

    @property
    def to_record(self) -> Record:
        """What a successor has to begin with."""
        told = self.orders.told
        if self._found is not None:
            told = Told(told.complete, *self._found)
        return Record(told, self._interval_generation, self._interval)

    def recorded(self, record: Record) -> None:
        """Coordination has it: what was found is a fact from now on. `settle` follows."""
        told = record.told
        if self._found is not None and self._found == (told.protected, told.protected_epoch):
            self._note_told(Told(None, *self._found))

    def take(self, report: NodeReport) -> bool:
        """Take up a node's report; False for one that a newer one overtook. `settle` follows, for several at once."""
        known = self.reports.get(report.node)
        if known is not None and known.instance == report.instance and report.serial <= known.serial:
            return False
        self.reports[report.node] = report
        self._note_problems(report)  # first: what the node was told of may be among them
        self._note_interval(report)
        self._note_told(report.told)
        return True

    def _note_problems(self, report: NodeReport) -> None:
        for snapshot, problem in report.problems:
            self._problems.setdefault(snapshot, problem)

    def _note_told(self, told: Told) -> None:
        """What an earlier collector has said holds on: nothing of it is dropped before there is something newer."""
        if told.complete in self._problems:
            told = replace(told, complete=None)
        if told.protected in self._problems:
            told = replace(told, protected=None)
        orders, known = self.orders, self.orders.told.newest(told)
        if known != orders.told:
            self.orders = replace(
                orders,
                number=orders.number + 1,
                complete=known.complete,
                protected=known.protected,
                protected_epoch=known.protected_epoch,
            )

    def forget(self, node: str) -> None:
        """The node is lost for good, or came back with an empty arena: what it held is gone."""
        self.reports.pop(node, None)

    def restored(self, generation: int, parent: SnapshotId) -> None:
        """The generation's ranks have all restored `parent`: it stays until they have a snapshot of their own."""
        if self._parent is None or generation >= self._parent[0]:
            self._parent = (generation, parent)

    # what the reports say together

    @property
    def generation(self) -> int:
        return max((report.generation for report in self.reports.values()), default=0)

    def holders(self) -> dict[SnapshotId, dict[int, set[str]]]:
        """snapshot -> rank -> nodes that have the shard's bytes."""
        found: dict[SnapshotId, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for report in self.reports.values():
            for held in report.held:
                found[held.id][held.rank].add(report.node)
        return found

    def world_sizes(self) -> dict[SnapshotId, int]:
        return {held.id: held.world_size for report in self.reports.values() for held in report.held}

    def settle(self, table: GroupTable | None, *, awaited: Iterable[str] = ()) -> Orders:
        """Recompute the orders; a new number when they differ. `awaited`: nodes that live; until each has reported,
        nothing is dropped: one of them may remember that more was protected than this collector knows.
        """
        holders, world_sizes = self.holders(), self.world_sizes()
        for report in self.reports.values():
            self._note_problems(report)
        whole = sorted(
            snapshot
            for snapshot, ranks in holders.items()
            if len(ranks) == world_sizes[snapshot] and snapshot not in self._problems
        )
        complete = self._newest_complete(whole)
        protected, protected_epoch = self._confirmed()
        done = self._done(whole, holders, table)
        self._find(done, table)
        target, reason = self._aim(whole, holders, done, table)
        self._target = target
        flush, durable = choose_for_world(whole, self.orders.flush, (r.flush for r in self.reports.values()))
        node_flush, node_durable = choose_for_disks(
            holders, whole, self.orders.node_flush, self._disk_news(), self.orders.node_durable
        )
        kept = self._kept(holders, whole, complete, target, protected, flush, node_flush)
        is_sure = all(node in self.reports for node in awaited)
        drop = tuple(self._droppable(holders, world_sizes, kept, complete)) if is_sure else ()
        present = set(holders) | {s for s in (complete, protected) if s is not None}
        self._problems = {s: text for s, text in self._problems.items() if s in present}
        new = Orders(
            number=self.orders.number,
            generation=self.generation,
            complete=complete,
            target=target,
            protected=protected,
            protected_epoch=protected_epoch,
            target_groups=tuple(sorted(self.groups_of(holders[target], table))) if target and table else (),
            drop=drop,
            problems=tuple(sorted(self._problems.items())),
            interval=self._interval if self.generation <= self._interval_generation else Interval(),
            reason=reason,
            found=self._found,
            flush=flush,
            durable=durable,
            node_flush=node_flush,
            node_durable=node_durable,
        )
        self.orders = replace(new, number=self.orders.number + (new != self.orders))
        return self.orders

    def _disk_news(self) -> dict[str, FlushNews]:
        """What the nodes that have a disk of their own say of it."""
        return {
            node: report.node_flush for node, report in self.reports.items() if report.node_flush is not None
        }

    def _newest_complete(self, whole: list[SnapshotId]) -> SnapshotId | None:
        """Once complete, remembered until a newer one is or it is proved bad: a holder may only be out of reach."""
        before = self.orders.complete
        if before is not None and before in self._problems:
            before = None
        newest = whole[-1] if whole else None
        if newest is not None and (before is None or newest > before):
            self._interval, _ = after_complete(self._interval, newest_step_seen=self._newest_step_seen())
            return newest
        return before

    # protection

    def _confirmed(self) -> tuple[SnapshotId | None, int]:
        """The newest protected snapshot and its epoch, as they are recorded."""
        protected = self.orders.protected
        if protected is None or protected in self._problems:
            return None, 0
        return protected, self.orders.protected_epoch

    def _done(
        self,
        whole: list[SnapshotId],
        holders: Mapping[SnapshotId, Mapping[int, set[str]]],
        table: GroupTable | None,
    ) -> list[SnapshotId]:
        """The whole snapshots of which all parts are done. What some node may be dropping just now is none of them."""
        going = {snapshot for snapshot, _ in self.orders.drop}
        return [
            snapshot
            for snapshot in whole
            if table is not None
            and snapshot not in going
            and self.missing_parts(snapshot, holders[snapshot], table) == ""
        ]

    def _find(self, done: list[SnapshotId], table: GroupTable | None) -> None:
        """What is to be recorded as protected. It stays so until it is, whatever comes after it: its record may be
        under way. A shard that is on no node any more lives in the rows of the epoch before, and nothing takes their
        place: only what is whole is found.
        """
        if self._found is not None and self._is_news(*self._found):
            return
        newest = (done[-1], table.epoch) if done and table is not None else None
        self._found = newest if newest is not None and self._is_news(*newest) else None

    def _is_news(self, snapshot: SnapshotId, epoch: int) -> bool:
        """To be protected under that epoch would be more than is recorded."""
        protected, known_epoch = self._confirmed()
        is_more = protected is None or (snapshot, epoch) > (protected, known_epoch)
        return is_more and snapshot not in self._problems

    def _aim(
        self,
        whole: list[SnapshotId],
        holders: Mapping[SnapshotId, Mapping[int, set[str]]],
        done: list[SnapshotId],
        table: GroupTable | None,
    ) -> tuple[SnapshotId | None, str]:
        """(target, why)."""
        if table is None or not whole:
            return None, "no group table" if table is None else "nothing is complete"
        newest, confirmed = whole[-1], self._confirmed()
        if newest in done and self._is_news(newest, table.epoch):
            return newest, BEING_PROTECTED  # it is to be recorded; nobody hears of it before
        if newest in done:
            return None, "the newest complete snapshot is protected"
        if (newest, table.epoch) in (confirmed, self._found):
            # Never twice under one epoch: its holders may have changed, the rows with them, and other rows would take
            # the place of those that protect it. What a member that came back empty lacks comes with the next snapshot.
            return None, "the newest complete snapshot was protected; a member has lost its part since"
        obstacle = self._obstacle(holders[newest], table)
        if obstacle:
            return None, obstacle
        current = self._target
        if (
            current is not None
            and current in whole
            and current not in done
            and self._still_worth(current, newest)
        ):
            return current, BEING_PROTECTED
        if confirmed[0] is not None and newest < confirmed[0]:
            return None, "a newer snapshot is protected"
        return newest, BEING_PROTECTED  # the words of the next settling: no news in between

    def _still_worth(self, target: SnapshotId, newest: SnapshotId) -> bool:
        """A target of the same generation is finished before a newer one is taken up."""
        return target.generation == newest.generation or newest < target

    def groups_of(self, ranks: Mapping[int, set[str]], table: GroupTable) -> dict[int, Group]:
        """The groups that hold shards of a snapshot, by number."""
        nodes = {node for held in ranks.values() for node in held}
        found = (table.group_of(node) for node in nodes)
        return {group.number: group for group in found if group is not None}

    def _obstacle(self, ranks: Mapping[int, set[str]], table: GroupTable) -> str:
        """Why a snapshot cannot be protected by this table at all; empty if it can."""
        for rank, nodes in sorted(ranks.items()):
            groups = [table.group_of(node) for node in sorted(nodes)]
            if not any(group is not None and group.code is not None for group in groups):
                return f"rank {rank}'s node {min(nodes)} is in no group that could protect it"
        return ""

    def missing_parts(self, snapshot: SnapshotId, ranks: Mapping[int, set[str]], table: GroupTable) -> str:
        """Whose part of a snapshot's protection is missing under this table, in words; empty: protected."""
        obstacle = self._obstacle(ranks, table)
        if obstacle:
            return obstacle
        waiting: list[str] = []
        for _, group in sorted(self.groups_of(ranks, table).items()):
            if group.code is None:
                continue  # a holder outside every code; _obstacle saw that each of its shards has another
            plans = {node: self._plan_of(node, snapshot, table.epoch) for node in group.nodes}
            absent = [node for node, plan in plans.items() if plan is None]
            if absent:
                waiting.extend(absent)
            elif len(set(plans.values())) > 1:
                waiting.append(f"group {group.number} (its nodes planned different rows)")
        if not waiting:
            return ""
        listed = ", ".join(waiting[:REASONS_SHOWN])
        return f"waiting for {listed}" + (" and others" if len(waiting) > REASONS_SHOWN else "")

    def _plan_of(self, node: str, snapshot: SnapshotId, epoch: int) -> bytes | None:
        report = self.reports.get(node)
        if report is None or report.epoch != epoch:
            return None
        return next((part.plan for part in report.done if part.id == snapshot), None)

    # what may go

    def _kept(
        self,
        holders: Iterable[SnapshotId],
        whole: list[SnapshotId],
        complete: SnapshotId | None,
        target: SnapshotId | None,
        protected: SnapshotId | None,
        *flushed: SnapshotId | None,
    ) -> set[SnapshotId]:
        """The newest whole one too: what was complete may have been lost with its nodes since."""
        found = self._found[0] if self._found is not None else None
        named = (complete, target, protected, found, *flushed, *whole[-1:])
        kept = {snapshot for snapshot in named if snapshot is not None}
        if self._parent is not None and (not whole or whole[-1].generation < self._parent[0]):
            kept.add(self._parent[1])
        room = min((report.keep_complete for report in self.reports.values() if report.served), default=None)
        if room is None or not self._is_capturing():
            return kept | set(holders)  # nobody needs the room, and a restore may want to choose
        for snapshot in reversed(whole):
            if len(kept) >= room:
                break
            kept.add(snapshot)
        return kept

    def _current(self) -> list[NodeReport]:
        generation = self.generation
        return [report for report in self.reports.values() if report.generation == generation]

    def _is_capturing(self) -> bool:
        return any(report.is_capturing for report in self._current())

    def _droppable(
        self,
        holders: Mapping[SnapshotId, Mapping[int, set[str]]],
        world_sizes: Mapping[SnapshotId, int],
        kept: set[SnapshotId],
        complete: SnapshotId | None,
    ) -> Iterable[tuple[SnapshotId, str]]:
        passed = self._passed()
        for snapshot in sorted(holders):
            if snapshot in kept:
                continue
            if complete is not None and snapshot < complete:
                yield snapshot, f"{complete} is complete"
                continue
            missing = [rank for rank in range(world_sizes[snapshot]) if rank not in holders[snapshot]]
            is_over = self._is_over(snapshot.generation)
            late = [
                rank
                for rank in missing
                if _is_past(snapshot, passed.get((snapshot.generation, rank)), is_over)
            ]
            if late:
                listed = ", ".join(str(rank) for rank in late[:REASONS_SHOWN])
                yield snapshot, f"ranks {listed} went on without it"

    def _passed(self) -> dict[tuple[int, int], int]:
        """(generation, rank) -> newest step that its node captures no more."""
        found: dict[tuple[int, int], int] = {}
        for report in self.reports.values():
            for rank, step in report.passed.items():
                found.setdefault((report.generation, rank), step)
        return found

    def _is_over(self, generation: int) -> bool:
        """No node captures anything of it any more, whoever its ranks were."""
        if generation >= self.generation or not self._world_is_served():
            return False
        return all(report.closed_below > generation for report in self.reports.values())

    def _world_is_served(self) -> bool:
        """Every rank of the current generation has a session somewhere, and captures: older worlds are over."""
        current = self._current()
        world_size = max((report.world_size for report in current), default=0)
        served = {rank for report in current for rank in report.served}
        return world_size > 0 and len(served) == world_size and self._is_capturing()

    # the interval

    def _newest_step_seen(self) -> int:
        return max((report.newest_step_seen for report in self.reports.values()), default=-1)

    def _note_interval(self, report: NodeReport) -> None:
        if report.generation > self._interval_generation and report.served:
            self._interval_generation = report.generation
            self._interval = Interval(configured=max(1, report.interval_steps))
        key = (report.node, report.instance)
        # what was skipped before the first report a collector before this one has acted upon
        before = self._aborts.setdefault(key, report.aborts)
        self._aborts[key] = max(before, report.aborts)
        if report.aborts > before and report.generation == self.generation:
            self._interval, _ = after_abort(
                self._interval,
                newest_step_seen=self._newest_step_seen(),
                factor_max=self.interval_factor_max,
            )


def _is_past(snapshot: SnapshotId, passed: int | None, is_over: bool) -> bool:
    """No node will capture this shard any more. A rank that nobody reports on may only be out of reach."""
    return is_over if passed is None else passed >= snapshot.step
