"""Who holds what: per snapshot of one job, which ranks' shards are captured, and which snapshots may go.

The rule that everything else serves: the newest snapshot that is complete on all ranks and usable is dropped
only when a newer such snapshot is there. `to_drop` is the only place where a snapshot's end is decided; it
gives a reason with each. Levels beyond captured (protected, durable in a tier) are facts of a shard and join
`ShardFacts`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from snapd.core.ids import SnapshotId
from snapd.core.manifest import ShardRecord
from snapd.core.words import listed
from snapd.errors import InvariantViolated

DROP_REASONS_KEPT = 512


@dataclass(slots=True)
class ShardFacts:
    """What is known of one captured shard. `is_verified`: its chunks were hashed since its memory last
    changed hands.
    """

    record: ShardRecord
    session_id: int
    sequence: int
    is_verified: bool = False


@dataclass(slots=True)
class SnapshotFacts:
    id: SnapshotId
    world_size: int
    shards: dict[int, ShardFacts] = field(default_factory=dict)
    problem: str = ""
    hold_count: int = 0
    is_announced: bool = False  # complete on all ranks, most of which are on other nodes

    @property
    def is_complete(self) -> bool:
        return self.is_announced or len(self.shards) == self.world_size

    @property
    def is_usable(self) -> bool:
        return self.is_complete and not self.problem

    @property
    def is_verified(self) -> bool:
        return self.is_complete and all(shard.is_verified for shard in self.shards.values())

    @property
    def missing_ranks(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank not in self.shards]


@dataclass(frozen=True, slots=True)
class Dropped:
    """Why a step is not there. `was_complete`: it had been captured on all ranks, and was overtaken."""

    reason: str
    was_complete: bool


@dataclass(slots=True)
class Ledger:
    """One job's snapshots. Single-threaded; knows no clock and no bytes."""

    snapshots: dict[SnapshotId, SnapshotFacts] = field(default_factory=dict)
    dropped: dict[SnapshotId, Dropped] = field(default_factory=dict)
    _passed: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, record: ShardRecord, *, session_id: int, sequence: int, is_verified: bool) -> SnapshotFacts:
        """A shard's record was committed to the index."""
        facts = self.snapshots.setdefault(record.id, SnapshotFacts(record.id, record.world_size))
        if (
            record.rank in facts.shards
            or record.world_size != facts.world_size
            or record.rank >= facts.world_size
        ):
            raise InvariantViolated(
                "a shard was recorded twice or in another world", rank=record.rank, id=str(record.id)
            )
        facts.shards[record.rank] = ShardFacts(record, session_id, sequence, is_verified)
        self.passed(record.id.generation, record.rank, record.id.step)
        return facts

    def passed(self, generation: int, rank: int, step: int) -> None:
        """The rank will capture no step up to and including `step` any more, beyond those that it has."""
        key = (generation, rank)
        self._passed[key] = max(step, self._passed.get(key, -1))

    def passed_steps(self, generation: int) -> dict[int, int]:
        """Rank -> newest step of `generation` that it captures no more."""
        return {rank: step for (known, rank), step in self._passed.items() if known == generation}

    def announce(self, snapshot: SnapshotId) -> None:
        """The snapshot is complete on all ranks of a world that spans nodes."""
        facts = self.snapshots.get(snapshot)
        if facts is not None:
            facts.is_announced = True

    def has_shard(self, snapshot: SnapshotId, rank: int) -> bool:
        facts = self.snapshots.get(snapshot)
        return facts is not None and rank in facts.shards

    def newest_complete(self) -> SnapshotFacts | None:
        """The newest snapshot that all ranks have and that is not known to be bad."""
        usable = [facts for facts in self.snapshots.values() if facts.is_usable]
        return max(usable, key=lambda facts: facts.id, default=None)

    def newest_shard(self, rank: int, *, session_id: int | None = None) -> ShardFacts | None:
        """The rank's newest captured shard, of one session if it is named; bad snapshots are left out."""
        mine = [
            (facts.id, facts.shards[rank])
            for facts in self.snapshots.values()
            if rank in facts.shards
            and not facts.problem
            and (session_id is None or facts.shards[rank].session_id == session_id)
        ]
        return max(mine, key=lambda pair: pair[0])[1] if mine else None

    def newest_first(self) -> list[SnapshotFacts]:
        return sorted(self.snapshots.values(), key=lambda facts: facts.id, reverse=True)

    def hold(self, snapshot: SnapshotId) -> None:
        """A restore needs it: it is not dropped until `unhold`."""
        self.snapshots[snapshot].hold_count += 1

    def unhold(self, snapshot: SnapshotId) -> None:
        facts = self.snapshots[snapshot]
        if facts.hold_count < 1:
            raise InvariantViolated("a snapshot was let go too often", id=str(snapshot))
        facts.hold_count -= 1

    def mark_unusable(self, snapshot: SnapshotId, problem: str) -> None:
        """Proved bad: never chosen again, never the newest complete. The first proof is kept."""
        facts = self.snapshots.get(snapshot)
        if facts is not None and not facts.problem:
            facts.problem = problem

    def to_drop(self, *, keep_complete: int, closed_below: int) -> list[tuple[SnapshotId, str]]:
        """Which snapshots may go now, oldest first, each with the reason.

        `keep_complete`: how many usable complete ones stay (>= 1); those that are held count, and the newest stays
        in any case. `closed_below`: generations below it capture nothing more.
        """
        usable = [facts.id for facts in self.newest_first() if facts.is_usable]
        newest = usable[0] if usable else None
        kept = {facts.id for facts in self.snapshots.values() if facts.hold_count and facts.is_usable}
        kept.update(usable[:1])
        for snapshot in usable:
            if len(kept) >= keep_complete:
                break
            kept.add(snapshot)
        doomed: list[tuple[SnapshotId, str]] = []
        for facts in reversed(self.newest_first()):
            if facts.hold_count or facts.id in kept:
                continue
            reason = self._reason_to_drop(facts, newest, closed_below)
            if reason:
                doomed.append((facts.id, reason))
        return doomed

    def to_drop_alone(self, kept: Collection[SnapshotId], *, room: int) -> list[tuple[SnapshotId, str]]:
        """What a node may drop when it hears from nobody: its own captures beyond `kept` when they fill its `room`.

        Which of them stay follows from the step's number alone, so that nodes that hear nothing keep the same: the
        ones with most factors of two.
        """
        own = [facts for facts in self.snapshots.values() if facts.id not in kept and not facts.hold_count]
        too_many = max(0, len(self.snapshots) - room)
        least_first = sorted(own, key=lambda facts: (_factors_of_two(facts.id.step), facts.id))
        return [
            (facts.id, "coordination is away, and its slot is needed") for facts in least_first[:too_many]
        ]

    def _reason_to_drop(self, facts: SnapshotFacts, newest: SnapshotId | None, closed_below: int) -> str:
        if newest is not None and facts.id < newest:
            return f"{newest} is complete"
        if facts.is_complete:
            return ""
        if facts.id.generation < closed_below:
            return f"ranks {listed(facts.missing_ranks)} ended without it"
        late = [
            r for r in facts.missing_ranks if self._passed.get((facts.id.generation, r), -1) >= facts.id.step
        ]
        return f"ranks {listed(late)} went on without it" if late else ""

    def drop(self, snapshot: SnapshotId, reason: str) -> SnapshotFacts:
        """Forget a snapshot that `to_drop` named, after its records were deleted from the index."""
        facts = self.snapshots.pop(snapshot)
        self.note_dropped(snapshot, reason, was_complete=facts.is_usable)
        return facts

    def note_dropped(self, snapshot: SnapshotId, reason: str, *, was_complete: bool = False) -> None:
        """Remember why a step is not there, for those who wait for it; the newest 512 are kept."""
        self.dropped[snapshot] = Dropped(reason, was_complete)
        while len(self.dropped) > DROP_REASONS_KEPT:
            del self.dropped[next(iter(self.dropped))]

    def forget_passed(self, *, closed_below: int) -> None:
        """Let go of notes about generations that are over."""
        for key in [key for key in self._passed if key[0] < closed_below]:
            del self._passed[key]


def _factors_of_two(step: int) -> int:
    return (step & -step).bit_length() if step else 64
