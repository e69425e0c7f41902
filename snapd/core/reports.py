"""What the nodes of a job report to its collector, and what all of them are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from snapd.core.ids import SnapshotId
from snapd.core.interval import Interval


@dataclass(frozen=True, slots=True)
class Held:
    """A shard whose bytes a node has."""

    id: SnapshotId
    rank: int
    world_size: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PartDone:
    """A node holds all that the row plan gives it. `plan`: the plan's identity; members with different ones have not
    planned the same rows.
    """

    id: SnapshotId
    plan: bytes


@dataclass(frozen=True, slots=True)
class Told:
    """The newest snapshots, as some collector has said."""

    complete: SnapshotId | None = None
    protected: SnapshotId | None = None
    protected_epoch: int = 0

    def newest(self, other: Told) -> Told:
        """Of each the newer one: what was said once holds on."""
        complete = max((s for s in (self.complete, other.complete) if s is not None), default=None)
        pairs = [(t.protected, t.protected_epoch) for t in (self, other) if t.protected is not None]
        return Told(complete, *max(pairs, default=(None, 0)))


@dataclass(frozen=True, slots=True)
class Record:
    """What coordination keeps of a job for its next collector: what is a fact since, and a generation's interval."""

    told: Told = Told()
    generation: int = 0
    interval: Interval = field(default_factory=Interval)

    def with_interval(self, generation: int, interval: Interval) -> Record:
        """With the newer one of two agreed intervals."""
        if (generation, interval.from_step) <= (self.generation, self.interval.from_step):
            return self
        return Record(self.told, generation, interval)


@dataclass(frozen=True, slots=True)
class FlushNews:
    """What a node says of the shared tier, or of its own disk. `durable`: the newest that it knows to be committed
    there, or has on its disk. `wish`: what it would flush by its own rules. `stuck`: why its part of the snapshot that
    is being flushed does not go on. `is_busy`: it is writing its part.
    """

    durable: SnapshotId | None = None
    wish: SnapshotId | None = None
    stuck: str = ""
    is_busy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """All that one node says of a job; a later one (instance, serial) replaces it whole.

    `passed`: rank -> newest step of `generation` that it captures no more. `served`: its ranks with a live session of
    `generation`. `closed_below`: generations below it capture nothing more on this node. `keep_complete`: complete
    snapshots that its slots have room for. `is_capturing`: a trainer of `generation` has passed a step, so what it
    restored, if anything, is behind it. `final`: its ranks that have closed `generation` for good. `node_flush`: of
    its own disk; None: it has none.
    """

    node: str
    instance: int
    serial: int
    epoch: int
    generation: int
    world_size: int
    held: tuple[Held, ...] = ()
    passed: Mapping[int, int] = field(default_factory=dict)
    served: tuple[int, ...] = ()
    closed_below: int = 0
    keep_complete: int = 1
    is_capturing: bool = False
    newest_step_seen: int = -1
    interval_steps: int = 1
    aborts: int = 0
    done: tuple[PartDone, ...] = ()
    problems: tuple[tuple[SnapshotId, str], ...] = ()
    trouble: str = ""
    told: Told = Told()
    final: tuple[int, ...] = ()
    flush: FlushNews = FlushNews()
    node_flush: FlushNews | None = None


@dataclass(frozen=True, slots=True)
class Orders:
    """What every node is told. `target_groups`: whose nodes take part in protecting the target. `drop`: may go, with
    the reason. `number` grows with every change. `protected_epoch`: the last one under which `protected` was found so;
    its parity of older epochs may go. `found`: (snapshot, epoch) to be recorded as protected: no promise, and no
    news; who would plan its rows anew looks whether they count already. `flush`: to be written to the shared tier by
    all now; `durable`: the newest that is committed there. `node_flush`: to be written by each to its own disk now;
    `node_durable`: the newest that is on the disks of all nodes that had it.
    """

    number: int = 0
    generation: int = 0
    complete: SnapshotId | None = None
    target: SnapshotId | None = None
    protected: SnapshotId | None = None
    target_groups: tuple[int, ...] = ()
    drop: tuple[tuple[SnapshotId, str], ...] = ()
    problems: tuple[tuple[SnapshotId, str], ...] = ()
    interval: Interval = field(default_factory=Interval)
    reason: str = ""
    protected_epoch: int = 0
    found: tuple[SnapshotId, int] | None = field(default=None, compare=False)
    flush: SnapshotId | None = None
    durable: SnapshotId | None = None
    node_flush: SnapshotId | None = None
    node_durable: SnapshotId | None = None

    @property
    def told(self) -> Told:
        return Told(self.complete, self.protected, self.protected_epoch)
