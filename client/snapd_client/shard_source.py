"""One shard of a snapshot, as read-only memory that somebody else may have written: every chunk is hashed."""

from __future__ import annotations

import xxhash
from snapd_proto import format_pb2

from .errors import IntegrityError
from .session import ShardMemory


class BadChunks(IntegrityError):
    """Chunks whose bytes are not what their hash says: (rank, chunk)."""

    def __init__(self, chunks: list[tuple[int, int]]) -> None:
        super().__init__("chunks are not what their hashes say", chunks=chunks[:10], count=len(chunks))
        self.chunks = chunks


class ShardSource:
    """The chunks of one shard. `frame_bytes`: of the arena that they lie in."""

    def __init__(self, record: format_pb2.ShardRecord, shards: ShardMemory, frame_bytes: int) -> None:
        self.record, self.chunk_bytes = record, record.chunk_bytes
        self._shards, self._frame_bytes = shards, frame_bytes

    def layout(self) -> format_pb2.ShardLayout:
        """Raises BadChunks."""
        return format_pb2.ShardLayout.FromString(self.read(0, self.record.layout_nbytes))

    def early(self) -> format_pb2.EarlyValues:
        """Raises BadChunks."""
        record = self.record
        return format_pb2.EarlyValues.FromString(
            self.read(record.early_values_offset, record.early_values_nbytes)
        )

    def address(self, number: int) -> int:
        """0 for a chunk that nobody has mapped: one that nothing is read of.

        Raises IntegrityError: the shard has no such chunk."""
        if number >= len(self.record.chunks):
            raise IntegrityError(
                "the layout names a chunk that the shard does not have", rank=self.record.rank, chunk=number
            )
        chunk = self.record.chunks[number]
        mapping = self._shards.mappings.get((chunk.segment_rank, chunk.segment))
        return 0 if mapping is None else mapping.address + chunk.frame * self._frame_bytes

    def is_good(self, number: int) -> bool:
        """Whether the chunk's bytes are what its hash says. Releases the GIL while hashing."""
        chunk = self.record.chunks[number]
        mapping = self._shards.mappings[chunk.segment_rank, chunk.segment]
        with mapping.view(chunk.frame * self._frame_bytes, chunk.nbytes) as view:
            return bool(xxhash.xxh3_128_digest(view) == chunk.xxh3_128)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Verified bytes of the shard (layout and early values: small).

        Raises:
            BadChunks: names them.
        """
        parts = []
        while nbytes:
            number, start = divmod(offset, self.chunk_bytes)
            if not self.is_good(number):
                raise BadChunks([(self.record.rank, number)])
            chunk = self.record.chunks[number]
            mapping = self._shards.mappings[chunk.segment_rank, chunk.segment]
            count = min(nbytes, chunk.nbytes - start)
            with mapping.view(chunk.frame * self._frame_bytes + start, count) as view:
                parts.append(bytes(view))
            offset, nbytes = offset + count, nbytes - count
        return b"".join(parts)
