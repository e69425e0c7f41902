"""A captured shard as `snapd show` sees it: its record, its layout, and who else holds its chunks. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from snapd_proto import admin_pb2, format_pb2

from snapd.export.shard_view import chunk_span, has_bytes, holder_rank


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One rank's record, how many snapshots hold each of its chunks, and its layout if it can be read."""

    record: format_pb2.ShardRecord
    references: Sequence[int]  # per chunk; 1: this snapshot alone
    layout: format_pb2.ShardLayout | None

    @property
    def nbytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.record.chunks)

    @property
    def nbytes_shared(self) -> int:
        pairs = zip(self.record.chunks, self.references, strict=True)
        return sum(chunk.nbytes for chunk, references in pairs if references > 1)

    @property
    def nbytes_unchanged(self) -> int:
        """Bytes of chunks that were stored for an earlier snapshot and not again since."""
        return sum(chunk.nbytes for chunk in self.record.chunks if chunk.since_generation)

    def shared_count(self, chunks: range) -> int:
        return sum(self.references[index] > 1 for index in chunks)


def shards_of(reply: admin_pb2.GetSnapshotReply, layouts: dict[int, format_pb2.ShardLayout]) -> list[Shard]:
    """Records with their reference counts, which the reply holds one shard after the other."""
    counts = list(reply.chunk_reference_counts)
    shards: list[Shard] = []
    at = 0
    for record in reply.shards:
        references = counts[at : at + len(record.chunks)] or [1] * len(record.chunks)
        at += len(record.chunks)
        shards.append(Shard(record=record, references=references, layout=layouts.get(record.rank)))
    return sorted(shards, key=lambda shard: shard.record.rank)


def range_chunks(shard: Shard, piece: format_pb2.Range) -> range:
    """Numbers of the chunks that a range of the layout fills."""
    size = shard.record.chunk_bytes
    last = min((piece.shard_offset + piece.nbytes + size - 1) // size, len(shard.record.chunks))
    return range(min(piece.shard_offset // size, last), last)


def own_chunks(shard: Shard, layout: format_pb2.ShardLayout, tensor: format_pb2.Tensor) -> tuple[range, bool]:
    """Chunks of this shard that hold the tensor; False when another rank's shard does."""
    if has_bytes(tensor) and tensor.nbytes and holder_rank(layout, tensor) != shard.record.rank:
        return range(0), False
    chunks = chunk_span(layout, tensor)
    return range(chunks.start, min(chunks.stop, len(shard.record.chunks))), True
