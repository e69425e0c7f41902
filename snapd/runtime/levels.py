"""Which level a snapshot has, as facts: captured on all ranks, protected on other nodes, durable in a tier."""

from __future__ import annotations

import enum

from snapd.core.ids import SnapshotId
from snapd.core.ledger import SnapshotFacts
from snapd.errors import ConfigError
from snapd.runtime.job import Job


class Level(enum.Enum):
    CAPTURED = "captured"
    PROTECTED = "protected"
    DURABLE = "durable"


def level_for(job: Job, asked: Level) -> Level:
    """The level to wait for: `durable` is the farthest that is configured; `protected` means itself.

    Raises:
        ConfigError: kind `level`: nothing here protects anything.
    """
    if asked is Level.PROTECTED and job.world is None:
        raise ConfigError(
            "this daemon protects nothing on other nodes: it has the level `captured` only",
            kind="level",
            hint="wait for `captured`, or for `durable`, which is the farthest level that is configured",
        )
    if asked is Level.DURABLE and job.flusher is None and job.disk is None:
        return Level.CAPTURED if job.world is None else Level.PROTECTED
    return asked


def newest(job: Job, level: Level) -> SnapshotId | None:
    """The newest snapshot with that level on all ranks."""
    if level is Level.DURABLE:
        tier = job.flusher or job.disk
        return tier.durable if tier is not None else None
    if level is Level.PROTECTED:
        return job.world.protected if job.world is not None else None
    here = job.ledger.newest_complete()
    found = [here.id] if here is not None else []
    if job.world is not None and job.world.complete is not None:
        found.append(job.world.complete)
    return max(found, default=None)


def has(job: Job, snapshot: SnapshotId, level: Level) -> bool:
    """Whether the snapshot has the level, or had it and was overtaken by one that has."""
    reached = newest(job, level)
    if level in (Level.PROTECTED, Level.DURABLE):
        return reached is not None and reached.generation == snapshot.generation and reached >= snapshot
    if reached == snapshot:
        return True
    facts = job.ledger.snapshots.get(snapshot)
    dropped = job.ledger.dropped.get(snapshot)
    return (facts is not None and facts.is_usable) or (dropped is not None and dropped.was_complete)


def tier_of(job: Job, level: Level) -> str:
    """Which tier `level` means: `shared`, or `node`, the own disks of the nodes; empty: none, it is in memory."""
    if level is not Level.DURABLE:
        return ""
    return "shared" if job.flusher is not None else "node"


def lost_reason(job: Job, snapshot: SnapshotId, level: Level) -> str:
    """Why the snapshot will never have the level; empty while it may."""
    dropped = job.ledger.dropped.get(snapshot)
    if dropped is None or (dropped.was_complete and level is not Level.CAPTURED):
        return ""  # a newer one that gets the level stands for it
    return dropped.reason


def is_refused(job: Job, snapshot: SnapshotId, level: Level) -> bool:
    """It is complete, and waiting for the level does not help: a person has to mend what `missing` says."""
    tier = job.flusher or job.disk
    return level is Level.DURABLE and tier is not None and tier.is_refused(snapshot)


def missing(job: Job, snapshot: SnapshotId, level: Level, *, world_size: int) -> str:
    """What a snapshot still lacks, in words."""
    tier = job.flusher or job.disk
    if level is Level.DURABLE and tier is not None and has(job, snapshot, Level.CAPTURED):
        return f"not yet durable: {tier.reason}"
    if level is Level.PROTECTED and job.world is not None and has(job, snapshot, Level.CAPTURED):
        return f"not yet protected: {job.world.protection_reason()}"
    facts = job.ledger.snapshots.get(snapshot)
    if job.world is not None:
        return "not yet captured by ranks on other nodes" if facts else "not yet captured here"
    ranks = facts.missing_ranks[:8] if facts else list(range(world_size))[:8]
    return f"not yet captured by ranks {', '.join(map(str, ranks))}"


def name_of(job: Job, facts: SnapshotFacts) -> str:
    """How far a snapshot that is here has come in its world, in a word or two."""
    world, tier = job.world, job.flusher or job.disk
    if facts.problem:
        return "unusable"
    if tier is not None and tier.durable == facts.id:
        return "durable"
    if world is not None and world.protected == facts.id:
        return "protected"
    if world is not None and world.target == facts.id:
        return "being protected"
    return "complete" if facts.is_complete else "incomplete"
