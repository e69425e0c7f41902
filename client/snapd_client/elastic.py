"""A restore of a snapshot that was cut otherwise: by another number of ranks, or on another mesh.

The rank asks for the record and the layout of one saved rank, learns from it whose layouts it needs besides, works out
which chunks it needs of whom, and has only those brought. Copying and verifying are as for any restore.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from snapd_proto import format_pb2
from snapd_proto import trainer_pb2 as pb

from .errors import IntegrityError, NotRestorable, ProtocolError
from .session import Session, ShardMemory
from .shard_source import ShardSource

SHARDS_PER_CALL = 16
CHUNKS_PER_CALL = 1 << 14
FETCH_TIMEOUT_S = 3600.0

Wanted = Mapping[int, Iterable[int]]  # rank -> chunks of its shard


class SavedShards:
    """The shards of the round's snapshot, by rank: only those that are asked for are known here."""

    def __init__(
        self, session: Session, job: str, turn: int, snapshot: tuple[int, int], memory: ShardMemory
    ) -> None:
        self._session, self._job, self._turn = session, job, turn
        self._snapshot, self._memory = snapshot, memory
        self._places: dict[tuple[int, int], tuple[int, int, int]] = {}  # (rank, chunk) -> its place
        self.sources: dict[int, ShardSource] = {}

    def read_layouts(self, ranks: Collection[int]) -> dict[int, format_pb2.ShardLayout]:
        """The layouts of these ranks' shards.

        Raises:
            BadChunks; NotRestorable: `rank` in its context says whose shard cannot be had.
        """
        self.list(ranks)
        self.fetch({rank: _layout_chunks(self.sources[rank].record) for rank in ranks})
        return {rank: self.sources[rank].layout() for rank in ranks}

    def read_early(self, ranks: Collection[int]) -> dict[int, format_pb2.EarlyValues]:
        """The early values of these ranks' shards. Raises: as `read_layouts`."""
        self.list(ranks)
        self.fetch({rank: _early_chunks(self.sources[rank].record) for rank in ranks})
        return {rank: self.sources[rank].early() for rank in ranks}

    def list(self, ranks: Collection[int]) -> None:
        """Ask for the records of those that are not known yet."""
        missing = sorted(set(ranks) - self.sources.keys())
        for first in range(0, len(missing), SHARDS_PER_CALL):
            self._list(missing[first : first + SHARDS_PER_CALL])

    def _list(self, ranks: Sequence[int]) -> None:
        try:
            shards = self._listed(ranks)
        except NotRestorable:  # one by one, so that the error says whose it is
            shards = [record for rank in ranks for record in self._listed([rank])]
        if sorted(record.rank for record in shards) != sorted(ranks):
            raise ProtocolError("the daemon named other shards than those that were asked for")
        for record in shards:
            self.sources[record.rank] = ShardSource(record, self._memory, self._session.chunk_bytes)

    def _listed(self, ranks: Sequence[int]) -> Sequence[format_pb2.ShardRecord]:
        request = pb.ListShardsRequest(session_id=self._session.session_id, round=self._turn, ranks=ranks)
        with _of_ranks(ranks):
            reply: pb.ListShardsReply = self._session.call(
                lambda stub, **options: stub.ListShards(request, **options), timeout_s=FETCH_TIMEOUT_S
            )
        return reply.shards

    def fetch(self, wanted: Wanted) -> None:
        """Bring chunks of shards that were listed; those that are here already are not asked for again."""
        for batch in _batches(self._left(wanted)):
            try:
                self._fetch(batch)
            except NotRestorable:
                if len(batch) == 1:
                    raise
                for rank, chunks in batch.items():  # one by one, so that the error says whose it is
                    self._fetch({rank: chunks})

    def _left(self, wanted: Wanted) -> Iterator[tuple[int, int]]:
        for rank in sorted(wanted):
            for chunk in dict.fromkeys(wanted[rank]):
                if chunk >= len(self.sources[rank].record.chunks):
                    raise IntegrityError(
                        "the layout names a chunk that the shard does not have", rank=rank, chunk=chunk
                    )
                if (rank, chunk) not in self._places:
                    yield rank, chunk

    def _fetch(self, wanted: Mapping[int, Sequence[int]]) -> None:
        request = pb.FetchChunksRequest(
            session_id=self._session.session_id,
            round=self._turn,
            wanted=[pb.ShardChunks(rank=rank, chunks=chunks) for rank, chunks in wanted.items()],
        )
        with _of_ranks(list(wanted)):
            reply: pb.FetchChunksReply = self._session.call(
                lambda stub, **options: stub.FetchChunks(request, **options), timeout_s=FETCH_TIMEOUT_S
            )
        if len(reply.found) != len(wanted):
            raise ProtocolError("the daemon brought other chunks than those that were asked for")
        for (rank, chunks), found in zip(wanted.items(), reply.found, strict=True):
            if not len(chunks) == len(found.segment_rank) == len(found.segment) == len(found.frame):
                raise ProtocolError(
                    "the daemon brought other chunks than those that were asked for", rank=rank
                )
            self._note(rank, chunks, list(zip(found.segment_rank, found.segment, found.frame, strict=True)))

    def _note(self, rank: int, chunks: Sequence[int], places: Sequence[tuple[int, int, int]]) -> None:
        for owner, segment in {(owner, segment) for owner, segment, _ in places}:
            self._map(owner, segment)
        record = self.sources[rank].record
        for number, place in zip(chunks, places, strict=True):
            chunk = record.chunks[number]
            chunk.segment_rank, chunk.segment, chunk.frame = place
            self._places[rank, number] = place

    def _map(self, owner: int, segment: int) -> None:
        """A segment of that rank's arena."""
        mappings = self._memory.mappings
        if (owner, segment) not in mappings and owner == self._session.rank:
            self._session.refresh_segments()
            self._memory.borrow(self._session.rank, self._session.segments)
        if (owner, segment) not in mappings:
            self._session.map_shard(self._memory, self._job, *self._snapshot, owner, is_fetched=True)


def _batches(chunks: Iterable[tuple[int, int]]) -> Iterator[dict[int, list[int]]]:
    """What one call may ask for: some ranks, some chunks of all of them together."""
    batch: dict[int, list[int]] = {}
    count = 0
    for rank, chunk in chunks:
        if count == CHUNKS_PER_CALL or (rank not in batch and len(batch) == SHARDS_PER_CALL):
            yield batch
            batch, count = {}, 0
        batch.setdefault(rank, []).append(chunk)
        count += 1
    if batch:
        yield batch


@contextlib.contextmanager
def _of_ranks(ranks: Sequence[int]) -> Iterator[None]:
    """What cannot be restored is that rank's shard, if it is one: so the others hear of it."""
    try:
        yield
    except NotRestorable as error:
        if len(ranks) == 1:
            error.context.setdefault("rank", ranks[0])
        raise


def _layout_chunks(record: format_pb2.ShardRecord) -> range:
    return range(-(-record.layout_nbytes // record.chunk_bytes))


def _early_chunks(record: format_pb2.ShardRecord) -> range:
    size, first = record.chunk_bytes, record.early_values_offset
    return range(first // size, -(-(first + record.early_values_nbytes) // size))


def chunks_read(
    sources: Sequence[tuple[int, int]], pieces: Sequence[tuple[int, int]]
) -> dict[int, list[int]]:
    """Rank -> the chunks that a plan reads."""
    found: dict[int, list[int]] = {}
    for (rank, chunk), (_, count) in zip(sources, pieces, strict=True):
        if count:
            found.setdefault(rank, []).append(chunk)
    return found
