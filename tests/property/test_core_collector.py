"""The collector's promises under any sequence of reports: late ones, new epochs, new worlds, lost nodes, successors."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from snapd.core.cluster import Code, Group, GroupTable
from snapd.core.collector import Collector
from snapd.core.ids import SnapshotId
from snapd.core.reports import Held, NodeReport, Orders, PartDone, Record

NODES = ("a", "b", "c")
RANKS = 2
Report = NodeReport


class Reports:
    """Nodes with what they hold and have done; reports may be delivered late, or twice. Drops are obeyed."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.core = Collector(8)
        self.epoch = 1
        self.table = self._table()
        self.generation = 1
        self.step = 0
        self.node_of = {rank: NODES[rank] for rank in range(RANKS)}
        self.held: dict[str, set[tuple[SnapshotId, int]]] = {node: set() for node in NODES}
        self.done: dict[str, dict[tuple[SnapshotId, int], bytes]] = {node: {} for node in NODES}
        self.bad: set[SnapshotId] = set()
        self.passed: dict[int, int] = {}
        self.serials = dict.fromkeys(NODES, 0)
        self.under_way: list[Report] = []
        self.taken: dict[str, int] = {}
        self.before = Orders()
        self.parent: tuple[int, SnapshotId] | None = None
        self.store = Record()
        self.recorded: set[SnapshotId | None] = {None}  # as protected, at some time
        self.promised: SnapshotId | None = None
        self._was_found: SnapshotId | None = None

    def _table(self) -> GroupTable:
        return GroupTable(self.epoch, Code(2, 1), (Group(0, NODES, Code(2, 1)),), "")

    # what happens to nodes

    def capture(self) -> None:
        """The next step; a rank may skip it."""
        ranks = set(range(RANKS))
        if self.chance.random() < 0.2:
            ranks.discard(self.chance.randrange(RANKS))
        self.step += 1
        for rank in range(RANKS):
            if rank in ranks:
                self.held[self.node_of[rank]].add((SnapshotId(self.generation, self.step), rank))
            self.passed[rank] = self.step

    def protect(self) -> None:
        """Some nodes do their part, and say so; one of them may have planned other rows."""
        target = self.core.orders.target
        nodes = self.chance.sample(NODES, self.chance.randint(1, len(NODES)))
        is_odd = self.chance.random() < 0.2
        for node in nodes if target is not None else ():
            self.done[node][target, self.epoch] = b"odd" if is_odd and node == nodes[0] else b"plan"
            self._deliver(self._report(node))

    def find_bad(self) -> None:
        known = sorted({snapshot for held in self.held.values() for snapshot, _ in held})
        if len(known) > 2:
            self.bad.add(self.chance.choice(known))

    def lose(self) -> None:
        """A node comes back empty."""
        node = self.chance.choice(NODES)
        self.held[node].clear()
        self.done[node].clear()
        self.under_way = [report for report in self.under_way if report.node != node]
        self.core.forget(node)

    def regroup(self) -> None:
        self.epoch += 1
        self.table = self._table()

    def begin_world(self) -> None:
        """The job starts anew, its ranks perhaps elsewhere; it restored something that is whole."""
        whole = sorted(self._whole() - self.bad)
        shift = self.chance.randrange(1, len(NODES))
        self.generation += 1
        self.step = max(0, self.step - 2)
        self.passed = {}
        self.node_of = {rank: NODES[(rank + shift) % len(NODES)] for rank in range(RANKS)}
        if whole:
            self.parent = (self.generation, self.chance.choice(whole))
            for node in NODES:
                self._deliver(self._report(node))
            self.core.restored(*self.parent)

    # what the collector hears

    def _report(self, node: str) -> Report:
        self.serials[node] += 1
        served = tuple(rank for rank, where in self.node_of.items() if where == node)
        return Report(
            node=node,
            instance=1,
            serial=self.serials[node],
            epoch=self.epoch,
            generation=self.generation,
            world_size=RANKS if served else 0,
            held=tuple(Held(s, rank, RANKS, 10) for s, rank in sorted(self.held[node]) if s not in self.bad),
            passed={rank: self.passed[rank] for rank in served if rank in self.passed},
            served=served,
            closed_below=self.generation,
            keep_complete=2,
            is_capturing=any(rank in self.passed for rank in served),
            newest_step_seen=self.step,
            done=tuple(
                PartDone(s, plan)
                for (s, epoch), plan in sorted(self.done[node].items())
                if epoch == self.epoch
            ),
            problems=tuple((s, "bad") for s in sorted(self.bad) if any(s == h for h, _ in self.held[node])),
            told=self.core.orders.told,
        )

    def _deliver(self, report: Report) -> None:
        is_newer = report.serial > self.taken.get(report.node, 0) or report.node not in self.core.reports
        assert self.core.take(report) == is_newer
        self.taken[report.node] = max(report.serial, self.taken.get(report.node, 0))
        if not is_newer:
            assert self.core.reports[report.node].serial > report.serial or (
                self.core.reports[report.node].serial == report.serial
            )

    def send(self) -> None:
        self.under_way.append(self._report(self.chance.choice(NODES)))

    def arrive(self) -> None:
        """Any of those under way, in any order; it may come again."""
        if not self.under_way:
            return
        report = self.chance.choice(self.under_way)
        if self.chance.random() < 0.5:
            self.under_way.remove(report)
        if report.epoch == self.epoch and report.generation == self.generation:
            self._deliver(report)

    def all_report(self) -> None:
        for node in NODES:
            self._deliver(self._report(node))

    def succeed(self) -> None:
        """The collector dies; another one begins with what was recorded."""
        self.core = Collector(8, self.store)
        if self.parent is not None:
            self.core.restored(*self.parent)
        told = self.store.told
        self.taken, self.before = {}, Orders(complete=told.complete, protected=told.protected)

    def record(self) -> None:
        """The store takes what was found; the answer may be lost."""
        self.store = self.core.to_record
        self.recorded.add(self.store.told.protected)
        if self.chance.random() < 0.7:
            self.core.recorded(self.store)

    def obey(self) -> None:
        for snapshot, _ in self.core.orders.drop:
            for held in self.held.values():
                held.difference_update({one for one in held if one[0] == snapshot})

    # what must hold

    def _whole(self) -> set[SnapshotId]:
        """As the collector can know it."""
        ranks: dict[SnapshotId, set[int]] = {}
        for report in self.core.reports.values():
            for held in report.held:
                ranks.setdefault(held.id, set()).add(held.rank)
        return {snapshot for snapshot, found in ranks.items() if len(found) == RANKS}

    def _is_done(self, snapshot: SnapshotId) -> bool:
        plans = []
        for node in NODES:
            report = self.core.reports.get(node)
            if report is None or report.epoch != self.epoch:
                return False
            plans += [part.plan for part in report.done if part.id == snapshot]
        return len(plans) == len(NODES) and len(set(plans)) == 1

    def _told_bad(self) -> set[SnapshotId]:
        return {s for report in self.core.reports.values() for s, _ in report.problems} | {
            s for s, _ in self.core.orders.problems
        }

    def check(self) -> None:
        before, bad = self.before, self._told_bad()
        after = self.core.settle(self.table)
        dropped = dict(after.drop)
        named = {after.complete, after.target, after.protected}
        assert not named & dropped.keys()
        assert after.number >= before.number
        assert (after == before) == (after.number == before.number) or before.number == 0
        whole = self._whole() - bad
        if before.complete is not None and before.complete not in bad:
            assert after.complete is not None
            assert after.complete >= before.complete
        if after.complete != before.complete and after.complete is not None:
            said = {report.told.complete for report in self.core.reports.values()}  # by a collector before
            assert after.complete in whole | said or after.complete <= (before.complete or after.complete)
        if before.protected is not None and before.protected not in bad:
            assert after.protected is not None
            assert after.protected >= before.protected
        told = self.store.told
        if (
            after.protected != before.protected
        ):  # an older one again, when the recorded one has been proved bad
            assert after.protected in self.recorded, "nobody hears of it before it is recorded"
            assert after.protected in (told.protected, None) or told.protected in bad
        found = self.core.to_record.told.protected
        if found not in (told.protected, after.protected, self._was_found, None):
            assert self._is_done(found)
        self._was_found = found
        self.promised = max((s for s in (self.promised, after.protected) if s is not None), default=None)
        assert self.promised is None or self.promised in bad or self.promised not in dropped
        if after.target is not None:
            assert after.target in whole
            assert after.target_groups == (0,)
        is_capturing = any(
            r.is_capturing and r.generation == self.core.generation for r in self.core.reports.values()
        )
        assert is_capturing or not dropped
        if whole:
            assert max(whole) not in dropped
        if self.parent is not None and not any(s.generation >= self.parent[0] for s in whole):
            assert self.parent[1] not in dropped
        self.before = after


WEIGHTS = {
    "capture": 6, "protect": 6, "record": 3, "all_report": 3, "send": 2, "arrive": 2, "obey": 3, "regroup": 1.0,
    "begin_world": 0.7, "succeed": 0.5, "lose": 0.3, "find_bad": 0.2,
}  # fmt: skip


@given(seed=st.integers(0, 1 << 32))
def test_promises(seed: int) -> None:
    reports = Reports(random.Random(seed))
    for name in reports.chance.choices(list(WEIGHTS), list(WEIGHTS.values()), k=120):
        getattr(reports, name)()
        reports.check()
    assert reports.core.orders.number > 0
