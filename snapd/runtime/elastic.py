"""Chunks of any rank's shard for a rank that cuts a snapshot anew: what lies here stays, the rest is brought.

A rank of another world, or of another mesh, needs ranges of several saved shards. It asks for their records, works out
which chunks it needs, and has them fetched: one that a captured shard here holds is named where it lies; others are
brought into free frames of the asking rank's arena, or of another one's of this node when it is full, which are grants
of ours until the round is over. What another rank of this node has asked for already is named where it lies, so that
nothing is brought twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from snapd.core.ids import LaneKey, Place, SnapshotId
from snapd.core.ledger import ShardFacts
from snapd.core.manifest import ShardRecord
from snapd.errors import ConflictError, NotFoundError
from snapd.runtime.arena_writing import bad_reused
from snapd.runtime.fetched import Coming, Found, Round
from snapd.runtime.job import Job
from snapd.runtime.rank_arena import RankArena
from snapd.runtime.session import Session

NO_SESSION = 0
SHARDS_AT_ONCE = 4  # of one call


class Wanted(NamedTuple):
    """A chunk to bring: its number in the shard, and the memory that it fills, as large as the chunk."""

    number: int
    view: memoryview


@dataclass(frozen=True, slots=True)
class _Frames:
    """Frames of one arena for chunks of a shard. `arrived`: chunks that may lie there already, of work that ended
    early.
    """

    arena: RankArena
    owner: LaneKey
    places: dict[int, Place]
    arrived: set[int] = field(default_factory=set)


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
    here = _shard_here(job, elsewhere, snapshot, rank)
    if here is not None:
        return here.record
    known = job.fetched.records.get((snapshot, rank))
    if known is not None:
        return known
    if elsewhere is None:
        raise NotFoundError(f"rank {rank} of snapshot {snapshot} is not here", kind="shard", job=job.name)
    record = await elsewhere.record(job, snapshot, rank)
    job.fetched.records.put((snapshot, rank), record, len(record.chunks))
    return record


def _shard_here(
    job: Job, elsewhere: ShardsElsewhere | None, snapshot: SnapshotId, rank: int
) -> ShardFacts | None:
    """A captured shard; of a snapshot that was proved bad here only if there is nobody else to ask."""
    facts = job.ledger.snapshots.get(snapshot)
    if facts is None or (facts.problem and elsewhere is not None):
        return None
    return facts.shards.get(rank)


async def fetch_chunks(
    job: Job,
    session: Session,
    elsewhere: ShardsElsewhere | None,
    round_: tuple[int, SnapshotId],
    wanted: Mapping[int, Sequence[int]],
) -> dict[int, list[Found]]:
    """Bring what is not here; `wanted`: rank -> chunks of its shard. `round_`: number, and what it restores.

    Raises:
        CapacityError: no room. ConflictError: kind `chunk_bytes`. NotFoundError: kind `shard`, `chunk`, or
        `restore_round`: it was over before the frames were granted.
        NotRestorable, UnavailableError: see ShardsElsewhere.
    """
    gate = asyncio.Semaphore(SHARDS_AT_ONCE)

    async def fetch(rank: int, indices: Sequence[int]) -> list[Found]:
        async with gate:
            return await _fetch_of(job, session, elsewhere, round_, rank, indices)

    results = await asyncio.gather(
        *(fetch(rank, indices) for rank, indices in wanted.items()), return_exceptions=True
    )
    found: dict[int, list[Found]] = {}
    for rank, result in zip(wanted, results, strict=True):
        if isinstance(result, BaseException):
            raise result
        found[rank] = result
    return found


async def _fetch_of(
    job: Job,
    session: Session,
    elsewhere: ShardsElsewhere | None,
    round_: tuple[int, SnapshotId],
    rank: int,
    indices: Sequence[int],
) -> list[Found]:
    number, snapshot = round_
    record = await record_of(job, elsewhere, snapshot, rank)
    if any(index >= len(record.chunks) for index in indices):
        raise NotFoundError("the shard has no such chunk", kind="chunk", rank=rank, job=job.name)
    here = _shard_here(job, elsewhere, snapshot, rank)  # perhaps only since the record came from elsewhere
    if here is not None:
        return [Found(rank, here.record.chunks[index].place) for index in indices]
    assert elsewhere is not None
    return await _bring(job, session, elsewhere, number, record, indices)


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
    round_ = (session.generation, number)
    while True:
        if job.fetched.is_over(round_):  # while this call waited for the record, or for frames
            raise NotFoundError("the restore's round is over", kind="restore_round", round=number)
        known = job.fetched.chunks(round_)
        missing = [index for index in dict.fromkeys(indices) if (record.rank, index) not in known]
        frames = _granted(job, session, record, missing)
        if frames is not None:
            break
        own = job.arena(session.rank).pool.free_count
        lacking = len(missing) - sum(arena.pool.free_count for arena in _arenas(job, session))
        await job.back_frames(job.arena(session.rank), own + lacking)
    if frames:
        for some in frames:
            job.fetched.add(round_, some.arena.rank, some.owner)
            job.arriving.begin(some.arena.rank, record.chunks, some.places)
        work = job.context.keep(_fill(job, elsewhere, round_, record, frames))
        for some in frames:
            for index, place in some.places.items():
                known[record.rank, index] = Coming(Found(some.arena.rank, place), work)
    chunks = [known[record.rank, index] for index in indices]
    for work in dict.fromkeys(chunk.work for chunk in chunks):
        await asyncio.shield(work)
    return [chunk.found for chunk in chunks]


def _arenas(job: Job, session: Session) -> list[RankArena]:
    """The asking rank's, then those of its world's other ranks here, the emptiest first."""
    ranks = {other.rank for other in job.served_sessions() if other.generation == session.generation}
    others = [job.arena(rank) for rank in ranks - {session.rank}]
    return [
        job.arena(session.rank),
        *sorted(others, key=lambda arena: (-arena.pool.free_count, arena.rank)),
    ]


def _granted(job: Job, session: Session, record: ShardRecord, missing: Sequence[int]) -> list[_Frames] | None:
    """A frame for each chunk, where it may lie already if there is such a one. What the asking rank's arena has no room
    for goes into the other ranks', which is empty until they capture. None: too few are free in all.
    """
    arenas = _arenas(job, session)
    if len(missing) > sum(arena.pool.free_count for arena in arenas):
        return None
    found = [_Frames(arena, LaneKey(NO_SESSION, job.context.environment.random_id()), {}) for arena in arenas]
    left = list(missing)
    for some in found:
        some.places.update(job.arriving.grant(some.arena, some.owner, record.chunks, left))
        some.arrived.update(some.places)
        left = [index for index in left if index not in some.places]
    for some in found:
        fresh = left[: some.arena.pool.free_count]
        left = left[len(fresh) :]
        granted = some.arena.pool.grant(some.owner, len(some.places) + len(fresh))
        assert granted is not None
        some.places.update(zip(fresh, granted[len(some.places) :], strict=True))
    return [some for some in found if some.places]


async def _fill(
    job: Job,
    elsewhere: ShardsElsewhere,
    round_: Round,
    record: ShardRecord,
    frames: Sequence[_Frames],
) -> None:
    """To its end, also when the trainer is gone: the frames are nobody else's before that."""
    try:
        wanted: list[Wanted] = []
        for some in frames:
            wanted += _views(some.arena, record, await _not_arrived(job, record, some))
        if wanted:
            await elsewhere.fill(job, record, wanted)
    except asyncio.CancelledError:
        raise  # the daemon stops; threads may still write, so that the frames stay granted
    except BaseException:
        if not job.fetched.is_over(round_):
            known = job.fetched.chunks(round_)
            for index in (index for some in frames for index in some.places):
                known.pop((record.rank, index), None)  # whoever asks again has them brought anew
        for some in frames:
            job.fetched.failed(job.arenas, round_, some.arena.rank, some.owner)
        raise
    for some in frames:
        job.fetched.filled(job.arenas, some.arena.rank, some.owner)


async def _not_arrived(job: Job, record: ShardRecord, frames: _Frames) -> dict[int, Place]:
    """Those whose chunk has to be brought."""
    if not frames.arrived:
        return frames.places
    arrived = {index: frames.places[index] for index in frames.arrived}
    bad = await asyncio.get_running_loop().run_in_executor(
        job.context.hashing, bad_reused, frames.arena.memory, record, arrived
    )
    return {index: place for index, place in frames.places.items() if index not in arrived or place in bad}


def _views(arena: RankArena, record: ShardRecord, places: Mapping[int, Place]) -> list[Wanted]:
    size, segments = arena.memory.chunk_bytes, {place.segment for place in places.values()}
    mappings = {one: arena.memory.segments[one].map_for_writing() for one in segments}
    return [
        Wanted(index, mappings[place.segment].view(place.frame * size, record.chunks[index].nbytes))
        for index, place in places.items()
    ]
