"""ShardRecord as it is stored and sent (format.proto), to and from the core's plain data."""

from __future__ import annotations

from google.protobuf.message import DecodeError
from snapd_proto import format_pb2

from snapd.core.ids import Place, SnapshotId
from snapd.core.manifest import Chunk, ShardRecord
from snapd.errors import IntegrityError

RECORD_FORMAT_VERSION = 1
DIGEST_BYTES = 16
RECORD_BYTES_MAX = 256 << 20


def record_to_proto(record: ShardRecord) -> format_pb2.ShardRecord:
    """Return the message that is stored in the index and sent to a restoring trainer."""
    message = format_pb2.ShardRecord(
        format_version=RECORD_FORMAT_VERSION,
        job=record.job,
        generation=record.id.generation,
        step=record.id.step,
        rank=record.rank,
        world_size=record.world_size,
        chunk_bytes=record.chunk_bytes,
        layout_nbytes=record.layout_nbytes,
        early_values_offset=record.early_values_offset,
        early_values_nbytes=record.early_values_nbytes,
        captured_wall_time_s=record.captured_wall_time_s,
        shard_xxh3_128=record.digest,
    )
    if record.parent is not None:
        message.has_parent = True
        message.parent_generation = record.parent.generation
        message.parent_step = record.parent.step
    message.chunks.extend(
        format_pb2.Chunk(
            nbytes=chunk.nbytes,
            xxh3_128=chunk.digest,
            segment=chunk.place.segment,
            frame=chunk.place.frame,
            segment_rank=record.rank,
            since_generation=chunk.since.generation if chunk.since else 0,
            since_step=chunk.since.step if chunk.since else 0,
        )
        for chunk in record.chunks
    )
    return message


def _since(chunk: format_pb2.Chunk) -> SnapshotId | None:
    return SnapshotId(chunk.since_generation, chunk.since_step) if chunk.since_generation else None


def record_from_bytes(data: bytes) -> ShardRecord:
    """Parse and check a stored record.

    Raises:
        IntegrityError: kind `record`: it is not a record of this format, or a bound is broken.
    """
    if len(data) > RECORD_BYTES_MAX:
        raise IntegrityError("a shard's record is too large", kind="record", nbytes=len(data))
    try:
        message = format_pb2.ShardRecord.FromString(data)
    except DecodeError as error:
        raise IntegrityError("a shard's record does not parse", kind="record") from error
    if message.format_version != RECORD_FORMAT_VERSION:
        raise IntegrityError(
            "a shard's record has another format", kind="record", version=message.format_version
        )
    chunks = tuple(
        Chunk(chunk.nbytes, chunk.xxh3_128, Place(chunk.segment, chunk.frame), _since(chunk))
        for chunk in message.chunks
    )
    is_bounded = all(0 < c.nbytes <= message.chunk_bytes and len(c.digest) == DIGEST_BYTES for c in chunks)
    if not chunks or not is_bounded or not 0 < message.layout_nbytes <= message.chunk_bytes * len(chunks):
        raise IntegrityError(
            "a shard's record breaks its bounds", kind="record", step=message.step, rank=message.rank
        )
    parent = SnapshotId(message.parent_generation, message.parent_step) if message.has_parent else None
    return ShardRecord(
        job=message.job,
        id=SnapshotId(message.generation, message.step),
        rank=message.rank,
        world_size=message.world_size,
        chunk_bytes=message.chunk_bytes,
        layout_nbytes=message.layout_nbytes,
        early_values_offset=message.early_values_offset,
        early_values_nbytes=message.early_values_nbytes,
        chunks=chunks,
        parent=parent,
        captured_wall_time_s=message.captured_wall_time_s,
        digest=message.shard_xxh3_128,
    )
