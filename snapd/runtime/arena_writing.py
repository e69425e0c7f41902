"""Writing a shard into this node's arena in a trainer's stead: frames that nobody else has, open for writing meanwhile.

The daemon maps rank segments for reading only; what it brings back is written through mappings of its own that live as
long as the work. Until the record is committed the frames are a grant of ours, which a kill makes free again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import xxhash
from snapd_native import Mapping as SegmentMapping

from snapd.core.ids import LaneKey, Place
from snapd.core.manifest import Chunk, ShardRecord
from snapd.errors import ConflictError, NotFoundError
from snapd.memory.segments import SegmentSet
from snapd.runtime.faultpoints import point
from snapd.runtime.job import Job
from snapd.runtime.rank_arena import RankArena

NO_SESSION = 0  # no session has this id: it stands for the daemon itself


@dataclass(slots=True)
class ArenaWriter:
    """Frames for one shard. `open` them, fill them, `commit`; `close` in any case. On the loop, but for `view`."""

    job: Job
    arena: RankArena
    record: ShardRecord
    owner: LaneKey
    places: dict[int, Place] = field(default_factory=dict)  # chunk index -> where it will lie
    reused: dict[int, Place] = field(default_factory=dict)  # of these, frames that hold the chunk already
    arrived: set[int] = field(
        default_factory=set
    )  # of these, own frames that may; after `check_arrived`: that do
    _mappings: dict[int, SegmentMapping] = field(default_factory=dict)
    _is_open: bool = True

    @classmethod
    async def open(cls, job: Job, record: ShardRecord, *, refused: Collection[Place] = ()) -> ArenaWriter:
        """Find a frame for every chunk; growth is checked as a trainer's is. Frames of captured shards that should hold
        the chunk already are reused, but for those in `refused`; the caller hashes them.

        Raises:
            CapacityError: it does not fit. ConflictError: kind `chunk_bytes`.
        """
        _agree_on_chunk_bytes(job, record)
        arena = job.arena(record.rank)
        writer = cls(job, arena, record, LaneKey(NO_SESSION, job.context.environment.random_id()))
        writer.reused = _reusable(job, record, refused)
        arena.pool.hold(writer.reused.values())
        try:
            await writer._grant()
        except BaseException:
            writer.close()
            raise
        return writer

    async def _grant(self) -> None:
        chunks, arriving = self.record.chunks, self.job.arriving
        missing = [index for index in range(len(chunks)) if index not in self.reused]
        while len(missing) > self.arena.pool.free_count:
            await self.job.back_frames(self.arena, len(missing))
        places = arriving.grant(self.arena, self.owner, chunks, missing)
        self.arrived = set(places)
        granted = self.arena.pool.grant(self.owner, len(missing))
        assert granted is not None
        fresh = [index for index in missing if index not in places]
        places |= zip(fresh, granted[len(places) :], strict=True)
        self.places = self.reused | places
        arriving.begin(self.arena.rank, chunks, places)
        for number in {place.segment for place in places.values()}:
            self._mappings[number] = self.arena.memory.segments[number].map_for_writing()

    def check_arrived(self) -> None:
        """Hash the frames that work which ended early may have filled already. Blocking; from any thread."""
        bad = bad_reused(
            self.arena.memory, self.record, {index: self.places[index] for index in self.arrived}
        )
        self.arrived = {index for index in self.arrived if self.places[index] not in bad}

    @property
    def missing(self) -> list[int]:
        """The chunks that are to be brought."""
        return [index for index in self.places if index not in self.reused and index not in self.arrived]

    def view(self, index: int) -> memoryview:
        """The frame of a chunk that is missing, as large as the chunk. From any thread."""
        place = self.places[index]
        offset = place.frame * self.arena.memory.chunk_bytes
        return self._mappings[place.segment].view(offset, self.record.chunks[index].nbytes)

    def commit(self) -> ShardRecord:
        """All chunks were checked: write the record, or put it in the place of the one that is here."""
        job, snapshot, rank = self.job, self.record.id, self.record.rank
        if job.is_removed:
            raise NotFoundError("the job was removed meanwhile", kind="job", job=job.name)
        chunks = tuple(_moved(chunk, self.places[index]) for index, chunk in enumerate(self.record.chunks))
        record = replace(self.record, chunks=chunks)
        facts = job.ledger.snapshots.get(snapshot)
        former = facts.shards.get(rank) if facts is not None else None
        point("daemon.bring.record.before")
        if former is None:
            job.index.add_shard(record, session_id=NO_SESSION, sequence=0)
        else:
            job.index.replace_shard(record)
        point("daemon.bring.record.after")
        self._is_open = False
        own = [place for index, place in self.places.items() if index not in self.reused]
        self.arena.pool.settle(self.owner, own)
        job.arriving.forget(rank)
        if former is None:
            job.ledger.add(record, session_id=NO_SESSION, sequence=0, is_verified=True)
        else:
            self.arena.pool.release(former.record.places)
            former.record, former.is_verified = record, True
        self._unmap()
        return record

    def close(self) -> None:
        """Without a commit: the frames are free again. The caller's views are gone by then. Idempotent."""
        if self._is_open:
            self._is_open = False
            self.arena.pool.release(self.reused.values())
            self.arena.pool.return_grant(self.owner)
            self._unmap()

    def _unmap(self) -> None:
        """Mappings whose views somebody still has go with them."""
        self._mappings.clear()


def _moved(chunk: Chunk, place: Place) -> Chunk:
    return replace(chunk, place=place)


def _agree_on_chunk_bytes(job: Job, record: ShardRecord) -> None:
    if job.chunk_bytes == record.chunk_bytes:
        return
    if job.chunk_bytes and (job.arenas and any(arena.memory.nbytes for arena in job.arenas.values())):
        raise ConflictError(
            f"the job's chunks have {job.chunk_bytes} bytes here, those of the shard {record.chunk_bytes}",
            kind="chunk_bytes",
            hint="set chunk_bytes in the configuration of all nodes alike",
            job=job.name,
            rank=record.rank,
        )
    job.index.set_chunk_bytes(record.chunk_bytes)
    job.chunk_bytes = record.chunk_bytes
    job.arenas.clear()


def _reusable(job: Job, record: ShardRecord, refused: Collection[Place]) -> dict[int, Place]:
    """Chunks of the shard that the rank's captured shards here have too, by hash and size."""
    here = {
        (chunk.digest, chunk.nbytes): chunk.place
        for facts in job.ledger.snapshots.values()
        if record.rank in facts.shards
        for chunk in facts.shards[record.rank].record.chunks
        if chunk.place not in refused
    }
    wanted = ((i, here.get((chunk.digest, chunk.nbytes))) for i, chunk in enumerate(record.chunks))
    return {index: place for index, place in wanted if place is not None}


def bad_reused(memory: SegmentSet, record: ShardRecord, reused: Mapping[int, Place]) -> set[Place]:
    """The frames among `reused` (chunk -> frame) that do not hold their chunk after all. Blocking."""
    bad: set[Place] = set()
    for index, place in reused.items():
        with memory.view(place, record.chunks[index].nbytes) as view:
            if xxhash.xxh3_128_digest(view) != record.chunks[index].digest:
                bad.add(place)
    return bad
