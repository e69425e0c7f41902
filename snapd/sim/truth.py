"""What really happened, and the promises that are held against it.

Fed by the simulation at the moment of each event; a broken promise ends the run. What counts as promised:

- P1  a restore gives every rank the bytes that its trainer handed over for that snapshot, the same one on all ranks
- P2  a restore never takes an older snapshot than the newest one that was announced as protected, if of each group at
      most m nodes were lost since; nor than the newest announced as captured while its shards' nodes are all there
- P3  no node drops its part of the newest protected snapshot, nor of the newest complete one
- P4  a generation is given out once; what a trainer hands over after a newer generation's restore was decided is
      never complete
- P5  protected means: every member of every group of one epoch has stored what one and the same plan gives it; it is
      a promise from when the store has recorded it
- P6  after the faults a newer snapshot becomes protected within a bounded time (checked by `simulation.py`)
- P7  after the store was wiped or rolled back no epoch and no generation is used again
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snapd.coordination.job_records import generations_from_json, newest_from_json
from snapd.coordination.kv import Write
from snapd.core.cluster import GroupTable
from snapd.core.collector import Collector
from snapd.core.generations import Generation
from snapd.core.ids import SnapshotId
from snapd.core.manifest import ShardRecord
from snapd.core.recovery import Choice
from snapd.core.reports import Orders
from snapd.core.restore import Outcome, Verdicts
from snapd.sim.disk import JOB, Disk, HandOver, Session, ShardKey, StoredShard, encode
from snapd.sim.facts import BegunAnew, BrokenPromise, Captured, Protected

if TYPE_CHECKING:
    from snapd.sim.simulation import Simulation


@dataclass(slots=True)
class Truth:
    sim: Simulation
    handed: dict[ShardKey, HandOver] = field(default_factory=dict)
    persisted: set[ShardKey] = field(default_factory=set)
    protected: list[Protected] = field(default_factory=list)
    captured: Captured | None = None
    announced: SnapshotId | None = None  # newest that any node was told to be protected
    generations: dict[int, tuple[str, int]] = field(default_factory=dict)
    decided_at_s: dict[int, float] = field(default_factory=dict)
    tables: dict[int, dict[str, GroupTable]] = field(
        default_factory=dict
    )  # epoch -> node -> what it believed
    marks: dict[str, int] = field(default_factory=dict)  # arena -> newest generation that was noted with it
    forgotten: dict[tuple[int, str, int], bool] = field(default_factory=dict)  # when it was first written
    bad: set[SnapshotId] = field(default_factory=set)
    recorded: set[SnapshotId] = field(default_factory=set)  # as protected, in the store as it is now
    tellers: dict[SnapshotId, set[tuple[str, str]]] = field(default_factory=dict)
    restores: int = 0
    refusals: int = 0
    alone_drops: int = 0
    handed_count: int = 0
    commits: int = 0
    targets: int = 0

    def fail(self, promise: str, text: str) -> None:
        self.sim.note("!", f"BROKEN {promise}: {text}")
        raise BrokenPromise(promise, text)

    # what is announced

    def ordered(
        self, node: str, core: Collector, before: Orders, after: Orders, table: GroupTable | None
    ) -> None:
        """A collector's orders have changed."""
        self.bad.update(snapshot for snapshot, _ in after.problems)
        if after.complete != before.complete and after.complete is not None:
            self.sim.note(node, f"complete: {after.complete}")
            self._note_complete(core, after.complete)
        if after.target != before.target:
            self.targets += 1
            self.sim.note(node, f"target: {after.target} ({after.reason})")
        found = core.to_record.told
        if found.protected is None or table is None or found.protected_epoch != table.epoch:
            return
        if not self._is_known(found.protected, table.epoch):
            again = " again" if any(known.id == found.protected for known in self.protected) else ""
            self.sim.note(node, f"protected{again}: {found.protected} under epoch {table.epoch}")
            self._establish(core, found.protected, table)

    def _is_known(self, snapshot: SnapshotId, epoch: int) -> bool:
        return any(known.id == snapshot and known.epoch == epoch for known in self.protected)

    def _is_recorded(self, value: bytes) -> None:
        """The store takes what a collector found: from now on it is a fact, whoever collects next."""
        newest = newest_from_json(value)
        for known in self.protected:
            if (known.id, known.epoch) == (newest.protected, newest.protected_epoch):
                known.is_fact = True
                self.recorded.add(known.id)

    def _note_complete(self, core: Collector, snapshot: SnapshotId) -> None:
        world_size = core.world_sizes().get(snapshot)
        if world_size is None:
            return  # recorded by a collector before
        for rank in range(world_size):
            if (snapshot, rank) not in self.persisted:
                self.fail("P2", f"{snapshot} counts as complete, and rank {rank}'s shard was never stored")
            decided = [at for g, at in self.decided_at_s.items() if g > snapshot.generation]
            handed = self.handed.get((snapshot, rank))
            if handed is not None and decided and handed.at_s > min(decided):
                self.fail("P4", f"{snapshot} is complete with what rank {rank} handed over after the fence")
        if self.captured is not None and snapshot < self.captured.id:
            return
        holders: dict[int, dict[str, str]] = {}
        for rank, nodes in core.holders()[snapshot].items():
            for node in sorted(nodes):
                arena = self._arena_of_report(core, node)
                holders.setdefault(rank, {})[node] = arena
        self.captured = Captured(snapshot, holders)

    def _arena_of_report(self, core: Collector, node: str) -> str:
        return self.sim.arenas[core.reports[node].instance]

    def _establish(self, core: Collector, snapshot: SnapshotId, table: GroupTable) -> None:
        """P5: hold what counts as protected against what lies on the disks."""
        ranks = core.holders().get(snapshot)
        if ranks is None:
            self.fail("P5", f"{snapshot} counts as protected, and nobody holds it")
            return
        lost = [rank for rank in range(core.world_sizes()[snapshot]) if rank not in ranks]
        if lost:
            self.fail(
                "P5",
                f"{snapshot} counts as protected under {table.epoch}, and nobody holds rank {lost[0]}'s shard",
            )
        groups = core.groups_of(ranks, table)
        arenas: dict[str, str] = {}
        for group in groups.values():
            if group.code is None:
                continue
            plans: dict[bytes, str] = {}
            for node in group.nodes:
                if node not in core.reports:
                    self.fail("P5", f"{snapshot} counts as protected, and {node} has said nothing")
                arenas[node] = self._arena_of_report(core, node)
                disk = self.sim.machines[node].disk
                if disk.arena_id == arenas[node]:
                    plans.setdefault(self._checked_part(node, disk, snapshot, table.epoch), node)
            if len(plans) > 1:
                who = " and ".join(plans.values())
                self.fail("P5", f"{snapshot} counts as protected, and {who} planned different rows")
        known = tuple((g.nodes, g.code.m) for g in groups.values() if g.code is not None)
        self.protected.append(Protected(snapshot, table.epoch, self.sim.loop.now_s, known, arenas))
        if len(self.protected) > 64:
            del self.protected[:32]

    def _checked_part(self, node: str, disk: Disk, snapshot: SnapshotId, epoch: int) -> bytes:
        """The identity of the plan, under this epoch or a later one, of which the node has all that it should."""
        lacks = "no row map"
        for (known, made), (row_map, records) in sorted(disk.maps.items(), key=lambda item: item[0]):
            if known != snapshot or made < epoch:
                continue
            plan = self.sim.plans.of(row_map, records)
            lacks = ""
            for row, number in plan.given_to(node):
                fragment = disk.fragments.get((row.id, number))
                if fragment is None:
                    lacks = f"no fragment {number} of row {row.number}"
                elif fragment != encode([chunk.digest for chunk in row.chunks], number):
                    lacks = f"other bytes as fragment {number} of row {row.number}"
            if not lacks:
                return plan.identity if made == epoch else b""
        if self._is_overtaken(snapshot, epoch):
            return b""
        self.fail("P5", f"{snapshot} counts as protected under epoch {epoch}, and {node} has {lacks}")
        return b""

    def _is_overtaken(self, snapshot: SnapshotId, epoch: int) -> bool:
        """Another collector has said so before, of this or a newer one: parts may have gone since."""
        return any(
            known.id > snapshot or (known.id == snapshot and known.epoch > epoch)
            for known in self.protected
            if known.is_fact
        )

    def told(self, node: str, orders: Orders) -> None:
        """A node has taken up orders: from now on `status` says so."""
        daemon = self.sim.machines[node].daemon
        if self.captured is not None and orders.complete == self.captured.id and daemon is not None:
            self.captured.told.add(daemon.instance)
        if orders.protected is not None and daemon is not None:
            self.tellers.setdefault(orders.protected, set()).add((node, daemon.disk.arena_id))
        if orders.protected is not None and (self.announced is None or orders.protected > self.announced):
            known = [each for each in self.protected if each.id == orders.protected]
            if not known:
                self.fail("P5", f"{node} is told that {orders.protected} is protected, which never was")
            if not any(each.is_fact for each in known):
                known[-1].is_fact = True
            self.announced = orders.protected

    # what is kept

    @property
    def newest_protected(self) -> SnapshotId | None:
        """The newest that the store has recorded, or, once that was replaced, that anybody was told of who still has
        his memory: with all who were told it is forgotten.
        """
        for known in sorted({p.id for p in self.protected if p.is_fact} - self.bad, reverse=True):
            if known in self.recorded or self._is_remembered(known):
                return known
        return None

    def _is_remembered(self, snapshot: SnapshotId) -> bool:
        machines = self.sim.machines
        return any(machines[name].disk.arena_id == arena for name, arena in self.tellers.get(snapshot, ()))

    def stored(self, node: str, record: ShardRecord) -> None:
        self.persisted.add((record.id, record.rank))

    def drops(self, node: str, snapshot: SnapshotId, reason: str) -> None:
        if snapshot in self.bad:
            return
        if snapshot == self.newest_protected:
            self.fail("P3", f"{node} drops its part of {snapshot}, the newest protected one ({reason})")
        if self.captured is not None and snapshot == self.captured.id:
            holders = [rank for rank, nodes in self.captured.holders.items() if node in nodes]
            if not self._is_captured_there():
                return  # a shard of it was lost with its node
            daemon = self.sim.machines[node].daemon
            if daemon is not None and daemon.world.is_away and daemon.instance not in self.captured.told:
                self.alone_drops += 1  # DESIGN 8: it could not know; nothing is promised of this one any more
                self.captured = None
            elif all(self._other_holder(rank, node) is None for rank in holders) and holders:
                self.fail("P3", f"{node} drops its part of {snapshot}, the newest complete one ({reason})")

    def _other_holder(self, rank: int, node: str) -> str | None:
        assert self.captured is not None
        key = (self.captured.id, rank)
        others = (m.name for m in self.sim.machines.values() if m.name != node and key in m.disk.shards)
        return next(others, None)

    def drops_parity(self, node: str, snapshot: SnapshotId, epoch: int) -> None:
        """The part that protects the newest protected snapshot goes only when a newer epoch's is everywhere."""
        if snapshot != self.newest_protected:
            return
        last = self.last_protection(snapshot)
        if last is not None and last.epoch == epoch and node in last.arenas:
            self.fail("P3", f"{node} drops its parity of {snapshot} of epoch {epoch}, which is the last one")

    def lost(self, node: str) -> None:
        """A machine is gone: nothing is promised of what it alone held."""

    # restores

    def survives(self, snapshot: SnapshotId, given_up: Collection[str]) -> bool:
        """Since it was protected last, at most m nodes of each of its groups have lost their arena, or were given up:
        away for longer than the time after which a node counts as lost.
        """
        last = self.last_protection(snapshot)
        return last is not None and all(
            sum(self._has_lost(last, node) or node in given_up for node in nodes) <= m
            for nodes, m in last.groups
        )

    def last_protection(self, snapshot: SnapshotId | None) -> Protected | None:
        known = (known for known in self.protected if known.id == snapshot and known.is_fact)
        return max(known, key=lambda known: known.epoch, default=None)

    def _has_lost(self, known: Protected, node: str) -> bool:
        return self.sim.machines[node].disk.arena_id != known.arenas[node]

    def chosen(self, node: str, generation: int, choice: Choice) -> None:
        decision = choice.decision
        self.sim.note(
            node,
            f"restore of generation {generation}: {decision.outcome.value} {decision.chosen}: {decision.reason}",
        )
        self.restores += 1
        self.decided_at_s.setdefault(generation, self.sim.loop.now_s)
        if decision.outcome is Outcome.UNREACHABLE:
            self.refusals += 1
            return
        daemon = self.sim.machines[node].daemon
        given_up = daemon.given_up() if daemon is not None else set()
        newest = self.newest_protected
        found = decision.chosen if decision.outcome is Outcome.FOUND else None
        if newest is not None and newest.generation < generation and (found is None or found < newest):
            if self.survives(newest, given_up):
                text = f"restore takes {found} ({decision.outcome.value}) and {newest} was protected"
                self.fail("P2", f"{text}: {decision.reason}")
        captured = self.captured
        if captured is None or captured.id in self.bad or (found is not None and found >= captured.id):
            return
        if self._is_captured_there(given_up) and captured.id.generation < generation:
            text = f"restore takes {found} ({decision.outcome.value}), {captured.id} was complete, nothing was lost"
            self.fail("P2", f"{text}: {decision.reason}")
        if captured.id.generation < generation:
            # Nodes that alone held shards of it were lost, or given up: the world goes on without it, so that nothing
            # is promised of it any more, should they come back with all that they had.
            self.captured = None

    def _is_captured_there(self, given_up: Collection[str] = ()) -> bool:
        """Of each shard of the newest complete snapshot some holder still has its arena."""
        arenas = {m.name: m.disk.arena_id for m in self.sim.machines.values() if m.name not in given_up}
        return self.captured is not None and all(
            any(arenas.get(name) == arena for name, arena in holders.items())
            for holders in self.captured.holders.values()
        )

    def finished(self, generation: int, number: int, choice: Choice, verdict: Verdicts) -> None:
        self.sim.note("job", f"restore {generation}.{number}: {verdict.reason}", is_repeated=True)

    def restored(self, rank: int, row: Session, choice: Choice, shard: StoredShard) -> None:
        """P1: what a trainer goes on with."""
        chosen = choice.decision.chosen
        if shard.record.id != chosen or shard.record.rank != rank:
            self.fail("P1", f"rank {rank} restored {shard.record.id}, the world {chosen}")
        handed = self.handed.get((shard.record.id, rank))
        if handed is None or handed.contents != shard.contents:
            self.fail("P1", f"rank {rank} restored bytes of {chosen} that it never handed over")

    def committed(self, generation: int, snapshots: dict[int, SnapshotId | None], missing: list[int]) -> None:
        """P1: the world goes on; every rank must have restored, and the same."""
        if missing:
            self.fail("P1", f"generation {generation} goes on, and rank {missing[0]} has not restored")
        if len(set(snapshots.values())) > 1:
            self.fail("P1", f"generation {generation} is a mix: {snapshots}")
        self.commits += 1

    # trainers

    def handed_over(self, rank: int, lane: HandOver) -> None:
        known = self.handed.get((lane.id, rank))
        is_forgotten = self.sim.store_was_replaced
        if known is not None and known.contents != lane.contents and not is_forgotten:
            self.fail("P4", f"two trainers hand over {lane.id} of rank {rank}")
        self.handed[lane.id, rank] = lane
        self.handed_count += 1

    # generations and epochs

    def noted(self, arena: str, generation: int) -> None:
        """A daemon acts upon this generation from now on, and so must whoever comes after it in this arena."""
        self.marks[arena] = max(generation, self.known_generation(arena))

    def known_generation(self, arena: str) -> int:
        return self.marks.get(arena, 0)

    def about_to_write(self, write: Write) -> None:
        """The store is about to take what was found protected, or new generations: who could have told that they were
        given out before?
        """
        if write.value is not None and write.key == self.sim.keys.newest(JOB):
            self._is_recorded(write.value)
        if write.key == self.sim.keys.groups:
            self.sim.hear()
        if write.value is None or write.key != self.sim.keys.generations(JOB):
            return
        for row in generations_from_json(write.value).values():
            key = (row.number, row.incarnation, row.rollback_count)
            if key not in self.forgotten:
                self.forgotten[key] = self.sim.is_forgotten(row.number)

    def gave_out(self, node: str, generation: Generation, knew: int) -> None:
        """`knew`: the newest generation that the node had noted before it asked."""
        key = (generation.incarnation, generation.rollback_count)
        known = self.generations.setdefault(generation.number, key)
        is_forgotten = self.forgotten.get((generation.number, *key), False)
        if known != key and (knew >= generation.number or not is_forgotten):
            promise = "P7" if self.sim.store_was_replaced else "P4"
            self.fail(promise, f"generation {generation.number} was given to {known} and to {key}")
        if known != key:
            raise BegunAnew(
                f"generation {generation.number} is given out again: whoever knew of it is away or lost"
            )

    def believes(self, node: str, table: GroupTable | None, disk: Disk) -> None:
        """A daemon acts upon a table from now on."""
        daemon = self.sim.machines[node].daemon
        if table is None or daemon is None or daemon.state.away is not None:
            return  # it has not looked at the store since it began
        self.sim.note(node, f"epoch {table.epoch}: {_words(table)}", is_repeated=True)
        for other, known in self.tables.setdefault(table.epoch, {}).items():
            is_same = known is table or (known.groups == table.groups and known.asked == table.asked)
            if not is_same and self.sim.still_knows(other, table.epoch, known):
                self.fail("P7", f"{node} and {other} hold different tables of epoch {table.epoch}")
        self.tables[table.epoch][node] = table


def _words(table: GroupTable) -> str:
    groups = [f"{'+'.join(group.nodes)} as {group.code or 'nothing'}" for group in table.groups]
    return "; ".join(groups[:8]) + (f" and {len(groups) - 8} more" if len(groups) > 8 else "")
