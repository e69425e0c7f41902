"""Chunks of any rank's shard for a rank that cuts a snapshot anew: what lies here stays, the rest is brought.

A rank of another world, or of another mesh, needs ranges of several saved shards. It asks for their records, works out
which chunks it needs, and has them fetched: one that a captured shard here holds is named where it lies; others are
brought into frames of the asking rank's own arena, which are a grant of ours until the round is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from snapd.core.ids import LaneKey, Place, SnapshotId
from snapd.core.manifest import ShardRecord
from snapd.errors import ConflictError, NotFoundError
from snapd.runtime.job import Job
from snapd.runtime.rank_arena import RankArena
from snapd.runtime.session import Session

NO_SESSION = 0


class Found(NamedTuple):
    """Where a chunk lies: in which rank's arena, and there."""

    segment_rank: int
    place: Place


class Wanted(NamedTuple):
    """A chunk to bring: its number in the shard, and the memory that it fills, as large as the chunk."""

    number: int
    view: memoryview


class ShardsElsewhere(Protocol):
    """Shards that are not in this node's memory: in a tier, on other nodes."""

    async def record(self, job: Job, snapshot: SnapshotId, rank: int) -> ShardRecord:
        """Raises NotFoundError: kind `shard`: nobody has it; UnavailableError."""

    async def fill(self, job: Job, record: ShardRecord, wanted: Sequence[Wanted]) -> None:
        """Fill them with verified bytes.

        Raises:
            NotRestorable, UnavailableError: kind `shard_sources`: names what cannot be had.
        """


async def record_of(
    job: Job, elsewhere: ShardsElsewhere | None, snapshot: SnapshotId, rank: int
) -> ShardRecord:
    """The record of one saved rank, from here if it is here.

    Raises:
        NotFoundError: kind `shard`.
    """
    facts = job.ledger.snapshots.get(snapshot)
    if facts is not None and rank in facts.shards:
        return facts.shards[rank].record
    known = job.fetched.records.get((snapshot, rank))
    if known is not None:
        return known
    if elsewhere is None:
        raise NotFoundError(f"rank {rank} of snapshot {snapshot} is not here", kind="shard", job=job.name)
    record = await elsewhere.record(job, snapshot, rank)
    job.fetched.records[snapshot, rank] = record
    return record


async def fetch_chunks(
    job: Job,
    session: Session,
    elsewhere: ShardsElsewhere | None,
    round_: tuple[int, SnapshotId],
    wanted: Mapping[int, Sequence[int]],
) -> dict[int, list[Found]]:
    """Bring what is not here; `wanted`: rank -> chunks of its shard. `round_`: number, and what it restores.

    Raises:
        CapacityError: no room. ConflictError: kind `chunk_bytes`. NotFoundError: kind `shard`, or `chunk`.
        NotRestorable, UnavailableError: see ShardsElsewhere.
    """
    number, snapshot = round_
    found: dict[int, list[Found]] = {}
    for rank, indices in wanted.items():
        record = await record_of(job, elsewhere, snapshot, rank)
        _check(job, record, indices)
        facts = job.ledger.snapshots.get(snapshot)
        if facts is not None and rank in facts.shards:
            found[rank] = [Found(rank, record.chunks[index].place) for index in indices]
            continue
        assert elsewhere is not None
        found[rank] = await _bring(job, session, elsewhere, number, record, indices)
    return found


def _check(job: Job, record: ShardRecord, indices: Sequence[int]) -> None:
    if any(index >= len(record.chunks) for index in indices):
        raise NotFoundError("the shard has no such chunk", kind="chunk", rank=record.rank, job=job.name)


async def _bring(
    job: Job,
    session: Session,
    elsewhere: ShardsElsewhere,
    number: int,
    record: ShardRecord,
    indices: Sequence[int],
) -> list[Found]:
    if record.chunk_bytes > job.chunk_bytes:
        raise ConflictError(
            f"the snapshot's chunks have {record.chunk_bytes} bytes, a frame here only {job.chunk_bytes}",
            kind="chunk_bytes",
            hint="set arena.chunk_bytes to that size or more",
            job=job.name,
            rank=record.rank,
        )
    arena = job.arena(session.rank)
    owner = LaneKey(NO_SESSION, job.context.environment.random_id())
    places = arena.pool.grant(owner, len(indices))
    while places is None:
        await job.back_frames(arena, len(indices))
        places = arena.pool.grant(owner, len(indices))
    job.fetched.add((session.generation, number), session.rank, owner)
    granted = places

    async def fill() -> None:
        try:
            await elsewhere.fill(job, record, _views(arena, record, indices, granted))
        finally:
            job.fetched.filled(job.arenas, session.rank, owner)

    # To its end, also when the trainer is gone: the frames are nobody else's before that.
    await asyncio.shield(job.context.keep(fill()))
    return [Found(session.rank, place) for place in places]


def _views(
    arena: RankArena, record: ShardRecord, indices: Sequence[int], places: Sequence[Place]
) -> list[Wanted]:
    size, segments = arena.memory.chunk_bytes, {place.segment for place in places}
    mappings = {one: arena.memory.segments[one].map_for_writing() for one in segments}
    return [
        Wanted(index, mappings[place.segment].view(place.frame * size, record.chunks[index].nbytes))
        for index, place in zip(indices, places, strict=True)
    ]
