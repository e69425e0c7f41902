"""A restore of a snapshot that was cut otherwise: by another number of ranks, or on another mesh.

The rank asks for the records of all saved ranks, has their layouts brought, works out which chunks it needs, and has
only those brought. Copying and verifying are as for any restore.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from snapd_proto import format_pb2
from snapd_proto import trainer_pb2 as pb

from .errors import IntegrityError, NotRestorable, ProtocolError
from .session import Session, ShardMemory

SHARDS_PER_CALL = 16
CHUNKS_PER_CALL = 1 << 14
FETCH_TIMEOUT_S = 3600.0

Places = dict[tuple[int, int], tuple[int, int, int]]  # (rank, chunk) -> segment's rank, segment, frame


def list_shards(session: Session, turn: int, world_size: int) -> dict[int, format_pb2.ShardRecord]:
    """The records of all ranks that saved the round's snapshot."""
    found: dict[int, format_pb2.ShardRecord] = {}
    for first in range(0, world_size, SHARDS_PER_CALL):
        ranks = range(first, min(world_size, first + SHARDS_PER_CALL))
        try:
            shards = _listed(session, turn, ranks)
        except NotRestorable:  # one by one, so that the error says whose it is
            shards = [record for rank in ranks for record in _listed(session, turn, [rank])]
        found.update((record.rank, record) for record in shards)
    if sorted(found) != list(range(world_size)):
        raise ProtocolError("the daemon named other shards than those that were asked for")
    return found


def _listed(session: Session, turn: int, ranks: Sequence[int]) -> list[format_pb2.ShardRecord]:
    request = pb.ListShardsRequest(session_id=session.session_id, round=turn, ranks=ranks)
    with _of_rank(ranks[0]):
        reply: pb.ListShardsReply = session.call(
            lambda stub, **options: stub.ListShards(request, **options), timeout_s=FETCH_TIMEOUT_S
        )
    return list(reply.shards)


@contextlib.contextmanager
def _of_rank(rank: int) -> Iterator[None]:
    """What cannot be restored is that rank's shard: so the others hear of it."""
    try:
        yield
    except NotRestorable as error:
        error.context.setdefault("rank", rank)
        raise


class Fetcher:
    """Has chunks brought, and maps what they lie in."""

    def __init__(
        self,
        session: Session,
        job: str,
        turn: int,
        records: Mapping[int, format_pb2.ShardRecord],
        snapshot: tuple[int, int],
        memory: ShardMemory,
    ) -> None:
        self._session, self._job, self._turn = session, job, turn
        self._records, self._snapshot, self._memory = records, snapshot, memory
        self._places: Places = {}

    def fetch(self, wanted: Mapping[int, Sequence[int]]) -> None:
        """Bring chunks (rank -> numbers); those that are here already are not asked for again."""
        for rank in sorted(wanted):
            left = (chunk for chunk in wanted[rank] if (rank, chunk) not in self._places)
            while batch := list(islice(left, CHUNKS_PER_CALL)):
                with _of_rank(rank):
                    self._fetch(rank, batch)

    def _fetch(self, rank: int, chunks: list[int]) -> None:
        request = pb.FetchChunksRequest(
            session_id=self._session.session_id,
            round=self._turn,
            wanted=[pb.ShardChunks(rank=rank, chunks=chunks)],
        )
        reply: pb.FetchChunksReply = self._session.call(
            lambda stub, **options: stub.FetchChunks(request, **options), timeout_s=FETCH_TIMEOUT_S
        )
        if len(reply.found) != 1:
            raise ProtocolError("the daemon brought other chunks than those that were asked for")
        for found in reply.found:
            if not len(chunks) == len(found.segment_rank) == len(found.segment) == len(found.frame):
                raise ProtocolError(
                    "the daemon brought other chunks than those that were asked for", rank=rank
                )
            places = zip(found.segment_rank, found.segment, found.frame, strict=True)
            self._note(rank, chunks, list(places))

    def _note(self, rank: int, chunks: Sequence[int], places: Sequence[tuple[int, int, int]]) -> None:
        record = self._records[rank]
        for number, place in zip(chunks, places, strict=True):
            if number >= len(record.chunks):
                raise IntegrityError(
                    "the layout names a chunk that the shard does not have", rank=rank, chunk=number
                )
            chunk = record.chunks[number]
            chunk.segment_rank, chunk.segment, chunk.frame = place
            self._places[rank, number] = place
        self._map(rank, {(owner, segment) for owner, segment, _ in places})

    def _map(self, rank: int, segments: set[tuple[int, int]]) -> None:
        mappings = self._memory.mappings
        if any(
            owner == self._session.rank and (owner, segment) not in mappings for owner, segment in segments
        ):
            self._session.refresh_segments()
            self._memory.borrow(self._session.rank, self._session.segments)
        if segments - mappings.keys():
            self._session.map_shard(self._memory, self._job, *self._snapshot, rank)


def layout_chunks(record: format_pb2.ShardRecord) -> range:
    return range(-(-record.layout_nbytes // record.chunk_bytes))


def early_chunks(record: format_pb2.ShardRecord) -> range:
    """The chunks of the early values."""
    size, first = record.chunk_bytes, record.early_values_offset
    return range(first // size, -(-(first + record.early_values_nbytes) // size))


def chunks_read(
    sources: Sequence[tuple[int, int]], pieces: Sequence[tuple[int, int]]
) -> dict[int, list[int]]:
    """Rank -> the chunks that a plan reads."""
    found: dict[int, list[int]] = {}
    for rank, chunk in _read(sources, pieces):
        found.setdefault(rank, []).append(chunk)
    return found


def _read(sources: Sequence[tuple[int, int]], pieces: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    return (source for source, (_, count) in zip(sources, pieces, strict=True) if count)
