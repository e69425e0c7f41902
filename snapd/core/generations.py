"""The generation counter of one job: each start of its world and each rollback gets the next number, once.

Coordination keeps this table (embedded: in the job's index; in a cluster: etcd). The decision is a pure
compare-and-set: the first rank that comes with a new (incarnation, rollback count) moves the counter, the
others find what it set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from snapd.core.ids import SnapshotId
from snapd.errors import ConflictError, FencedError

ROLLBACKS_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class Generation:
    """One row. `parent`: the snapshot that it was restored from; None until a restore is committed, or when
    fresh.
    """

    number: int
    incarnation: str
    rollback_count: int
    world_size: int
    parent: SnapshotId | None = None


@dataclass(frozen=True, slots=True)
class Assignment:
    generation: Generation
    is_new: bool
    reason: str


GenerationKey = tuple[str, int]


def assign(
    table: Mapping[GenerationKey, Generation], *, incarnation: str, rollback_count: int, world_size: int
) -> Assignment:
    """Return the generation of (incarnation, rollback_count), a new one if it is the first to ask.

    Raises: FencedError: kind `stale_generation`: it has a number, but a newer one was given out since; or it
        asks for a rollback although another world has been started. ConflictError: kind `world_size`: ranks
        of one incarnation disagree; kind `rollback_count`: one was left out.
    """
    newest = max(table.values(), key=lambda row: row.number, default=None)
    known = table.get((incarnation, rollback_count))
    if known is not None and newest is not None:
        if known.number < newest.number:
            raise _stale(known.number, newest.number)
        if known.world_size != world_size:
            raise ConflictError(
                f"another rank of this start said WORLD_SIZE={known.world_size}, this one says {world_size}",
                kind="world_size",
            )
        return Assignment(known, False, "this start of the world has its generation already")
    if rollback_count > 0:
        before = table.get((incarnation, rollback_count - 1))
        if before is None or rollback_count > ROLLBACKS_MAX:
            raise ConflictError(
                "a rollback was left out", kind="rollback_count", rollback_count=rollback_count
            )
        if newest is not None and before.number < newest.number:
            raise _stale(before.number, newest.number)
    elif any(row.incarnation == incarnation for row in table.values()):
        raise _stale(0, newest.number if newest else 0)
    number = (newest.number if newest else 0) + 1
    reason = "a rollback begins" if rollback_count else "a new start of the world"
    return Assignment(Generation(number, incarnation, rollback_count, world_size), True, reason)


def _stale(generation: int, current: int) -> FencedError:
    return FencedError(
        "a newer generation of this job has begun",
        kind="stale_generation",
        hint="this trainer belongs to an older start of the job: stop it",
        generation=generation,
        current_generation=current,
    )
