"""Shard manifests and commit records: plain data (core/stored.py) to and from the bytes in a tier (docs/format.md).

Who reads says which object it is (its key) and of which job; both are compared with what the bytes say, so that a
manifest that was copied to another place is refused. Sizes are checked before anything is allocated by them. All errors
of decoding are IntegrityErrors that name the key: kinds `tier_manifest` (damaged, or out of bounds), `tier_version`
(from a newer snapd), `tier_job` (another job's). The small objects are in notes.py, and can be imported from here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import xxhash
from google.protobuf.message import DecodeError
from snapd_proto import tier_pb2

from snapd.core.geometry import CHUNK_BYTES_MAX, frames_for
from snapd.core.ids import WORLD_SIZE_MAX, Place, SnapshotId
from snapd.core.manifest import Chunk, ShardRecord
from snapd.core.stored import ShardEntry, StoredChunk, StoredShard, StoredSnapshot
from snapd.core.tier_keys import PACK_NAME, WRITE_ID, TierKeys
from snapd.tier.columns import PACKS_MAX, ChunkColumns, checked_chunks, packed_chunks
from snapd.tier.envelope import (
    DIGEST_BYTES,
    FORMAT_VERSION,
    NBYTES_MAX,
    Kind,
    bad_object,
    check_head,
    sealed,
    snapshot_id,
    unwrap,
)
from snapd.tier.notes import (
    check_not_void,
    decode_condemned,
    decode_intent,
    decode_pin,
    encode_condemned,
    encode_intent,
    encode_pin,
)
from snapd.tier.wire import WireError, check_counts

__all__ = [
    "decode_condemned",
    "decode_entry",
    "decode_intent",
    "decode_pin",
    "decode_shard",
    "decode_snapshot",
    "encode_condemned",
    "encode_intent",
    "encode_pin",
    "encode_shard",
    "encode_snapshot",
    "entry_of",
    "record_from_shard",
    "shard_from_record",
]


# Shards


def shard_from_record(record: ShardRecord, chunks: Sequence[StoredChunk]) -> StoredShard:
    """The manifest of a captured shard whose chunks were stored as `chunks` says, in order."""
    assert [(c.nbytes, c.digest) for c in chunks] == [(c.nbytes, c.digest) for c in record.chunks]
    return StoredShard(
        job=record.job,
        id=record.id,
        rank=record.rank,
        world_size=record.world_size,
        chunk_bytes=record.chunk_bytes,
        layout_nbytes=record.layout_nbytes,
        early_values_offset=record.early_values_offset,
        early_values_nbytes=record.early_values_nbytes,
        chunks=tuple(chunks),
        parent=record.parent,
        captured_wall_time_s=record.captured_wall_time_s,
        digest=record.digest,
    )


def record_from_shard(shard: StoredShard, places: Sequence[Place]) -> ShardRecord:
    """The record of a shard that was brought into the arena: chunk `i` lies at `places[i]`."""
    chunks = [
        Chunk(chunk.nbytes, chunk.digest, place) for chunk, place in zip(shard.chunks, places, strict=True)
    ]
    return ShardRecord(
        job=shard.job,
        id=shard.id,
        rank=shard.rank,
        world_size=shard.world_size,
        chunk_bytes=shard.chunk_bytes,
        layout_nbytes=shard.layout_nbytes,
        early_values_offset=shard.early_values_offset,
        early_values_nbytes=shard.early_values_nbytes,
        chunks=tuple(chunks),
        parent=shard.parent,
        captured_wall_time_s=shard.captured_wall_time_s,
        digest=shard.digest,
    )


def encode_shard(shard: StoredShard) -> bytes:
    """The same bytes for the same shard, whoever writes it.

    Raises:
        CapacityError: kind `tier_manifest_size`: more chunks than a manifest can name.
    """
    message = tier_pb2.StoredShard(
        format_version=FORMAT_VERSION,
        job=shard.job,
        generation=shard.id.generation,
        step=shard.id.step,
        rank=shard.rank,
        world_size=shard.world_size,
        chunk_bytes=shard.chunk_bytes,
        layout_nbytes=shard.layout_nbytes,
        early_values_offset=shard.early_values_offset,
        early_values_nbytes=shard.early_values_nbytes,
        chunks=packed_chunks(shard.chunks),
        captured_wall_time_s=shard.captured_wall_time_s,
        shard_xxh3_128=shard.digest,
    )
    if shard.parent is not None:
        message.has_parent = True
        message.parent_generation, message.parent_step = shard.parent.generation, shard.parent.step
    return sealed(Kind.SHARD, message.SerializeToString(deterministic=True))


def decode_shard(data: bytes, *, key: str, job: str) -> StoredShard:
    """Parse and check a shard manifest that lies at `key` in the tier of `job`.

    Raises:
        IntegrityError: see the module.
    """
    payload = unwrap(Kind.SHARD, data, key)
    try:
        columns = ChunkColumns.of(check_counts(payload, {11: 1}).get(11))
        message = tier_pb2.StoredShard.FromString(bytes(payload))
    except (WireError, DecodeError) as error:
        raise bad_object(key, f"does not parse: {error}") from error
    check_head(key, job, message.format_version, message.job)
    identity = snapshot_id(key, message.generation, message.step)
    where = TierKeys(job).shard_of(key)
    if where is None or where[:2] != (identity, message.rank):
        raise bad_object(key, f"is the shard of rank {message.rank} of {identity}")
    _check_world(key, message.rank, message.world_size)
    chunk_bytes = message.chunk_bytes
    if not 0 < chunk_bytes <= CHUNK_BYTES_MAX or chunk_bytes & (chunk_bytes - 1):
        raise bad_object(key, f"chunks of {chunk_bytes} bytes")
    chunks = checked_chunks(key, message.chunks, columns, chunk_bytes)
    _check_extent(key, message, chunks)
    if xxhash.xxh3_128_digest(message.chunks.xxh3_128) != message.shard_xxh3_128:
        raise bad_object(key, "the shard's digest is not that of its chunks' digests")
    return StoredShard(
        job=job,
        id=identity,
        rank=message.rank,
        world_size=message.world_size,
        chunk_bytes=chunk_bytes,
        layout_nbytes=message.layout_nbytes,
        early_values_offset=message.early_values_offset,
        early_values_nbytes=message.early_values_nbytes,
        chunks=chunks,
        parent=_parent(key, message),
        captured_wall_time_s=_wall_time(key, message.captured_wall_time_s),
        digest=message.shard_xxh3_128,
    )


def _check_extent(key: str, message: tier_pb2.StoredShard, chunks: Sequence[StoredChunk]) -> None:
    """The layout and the early values must lie in chunks that are there."""
    for what, start, nbytes in (
        ("layout", 0, message.layout_nbytes),
        ("early values", message.early_values_offset, message.early_values_nbytes),
    ):
        end = start + nbytes
        if end > message.chunk_bytes * len(chunks):
            raise bad_object(key, f"the {what} end at byte {end}, behind the shard's {len(chunks)} chunks")
        for index in range(start // message.chunk_bytes, frames_for(end, message.chunk_bytes)):
            if nbytes and min(end - index * message.chunk_bytes, message.chunk_bytes) > chunks[index].nbytes:
                raise bad_object(key, f"the {what} lie beyond the end of chunk {index}")
    if message.layout_nbytes == 0:
        raise bad_object(key, "has no layout")


# Snapshots


def entry_of(shard: StoredShard, key: str, manifest: bytes) -> ShardEntry:
    """How a commit record names a shard whose manifest is `manifest`, at `key`."""
    return ShardEntry(
        shard.rank, key, len(manifest), xxhash.xxh3_128_digest(manifest), shard.digest, shard.nbytes
    )


def encode_snapshot(snapshot: StoredSnapshot) -> bytes:
    """Raises: CapacityError: kind `tier_manifest_size`."""
    message = tier_pb2.StoredSnapshot(
        format_version=FORMAT_VERSION,
        job=snapshot.job,
        generation=snapshot.id.generation,
        step=snapshot.id.step,
        world_size=snapshot.world_size,
        revision=snapshot.revision,
        write_id=snapshot.write_id,
        packs=snapshot.packs,
        committed_wall_time_s=snapshot.committed_wall_time_s,
        first_modified_s=snapshot.first_modified_s,
    )
    if snapshot.parent is not None:
        message.has_parent = True
        message.parent_generation = snapshot.parent.generation
        message.parent_step = snapshot.parent.step
    message.shards.extend(
        tier_pb2.ShardEntry(
            rank=entry.rank,
            key=entry.key,
            manifest_nbytes=entry.manifest_nbytes,
            manifest_xxh3_128=entry.manifest_digest,
            shard_xxh3_128=entry.shard_digest,
            nbytes=entry.nbytes,
        )
        for entry in snapshot.shards
    )
    return sealed(Kind.SNAPSHOT, message.SerializeToString(deterministic=True))


def decode_snapshot(data: bytes, *, key: str, job: str) -> StoredSnapshot:
    """Parse and check a commit record that lies at `key` in the tier of `job`.

    Raises:
        IntegrityError: see the module; `tier_void`: a collector has taken its place.
    """
    check_not_void(data, key=key, job=job)
    payload = unwrap(Kind.SNAPSHOT, data, key)
    message = tier_pb2.StoredSnapshot()
    try:
        check_counts(payload, {11: WORLD_SIZE_MAX, 12: PACKS_MAX})
        message.ParseFromString(bytes(payload))
    except (WireError, DecodeError) as error:
        raise bad_object(key, f"does not parse: {error}") from error
    check_head(key, job, message.format_version, message.job)
    identity = snapshot_id(key, message.generation, message.step)
    if TierKeys(job).snapshot_of(key) != (identity, message.revision):
        raise bad_object(key, f"is the record of {identity}, revision {message.revision}")
    if not 1 <= message.world_size <= WORLD_SIZE_MAX:
        raise bad_object(key, f"a world of {message.world_size}")
    if [entry.rank for entry in message.shards] != list(range(message.world_size)):
        raise bad_object(
            key, f"does not name the shards of ranks 0 to {message.world_size - 1}, each once and in order"
        )
    if WRITE_ID.fullmatch(message.write_id) is None:
        raise bad_object(key, "its write id is none")
    packs = tuple(message.packs)
    if any(PACK_NAME.fullmatch(name) is None for name in packs):
        raise bad_object(key, "names a pack by a name that is none")
    if any(first >= second for first, second in itertools.pairwise(packs)) or not packs:
        raise bad_object(key, "its packs are not in order, each once")
    return StoredSnapshot(
        job=job,
        id=identity,
        world_size=message.world_size,
        revision=message.revision,
        parent=_parent(key, message),
        write_id=message.write_id,
        shards=tuple(_checked_entry(key, job, identity, entry) for entry in message.shards),
        packs=packs,
        committed_wall_time_s=_wall_time(key, message.committed_wall_time_s),
        first_modified_s=_wall_time(key, message.first_modified_s),
    )


def _checked_entry(key: str, job: str, identity: SnapshotId, entry: tier_pb2.ShardEntry) -> ShardEntry:
    where = TierKeys(job).shard_of(entry.key)
    if where is None or where[:2] != (identity, entry.rank):
        raise bad_object(key, f"names {entry.key[:200]!r} as the manifest of rank {entry.rank}")
    if len(entry.manifest_xxh3_128) != DIGEST_BYTES or len(entry.shard_xxh3_128) != DIGEST_BYTES:
        raise bad_object(key, f"a digest of rank {entry.rank} does not have {DIGEST_BYTES} bytes")
    if not 0 < entry.manifest_nbytes <= NBYTES_MAX[Kind.SHARD]:
        raise bad_object(key, f"a manifest of {entry.manifest_nbytes} bytes for rank {entry.rank}")
    return ShardEntry(
        rank=entry.rank,
        key=entry.key,
        manifest_nbytes=entry.manifest_nbytes,
        manifest_digest=entry.manifest_xxh3_128,
        shard_digest=entry.shard_xxh3_128,
        nbytes=entry.nbytes,
    )


def decode_entry(data: bytes, entry: ShardEntry, snapshot: StoredSnapshot) -> StoredShard:
    """The shard manifest that a commit record names: `data` is what lies at `entry.key`.

    Raises:
        IntegrityError: also when it is not the manifest that was committed, or does not belong to the snapshot.
    """
    shard = decode_shard(data, key=entry.key, job=snapshot.job)
    found = entry_of(shard, entry.key, data)
    if found != entry:
        raise bad_object(entry.key, "is not the manifest that the commit record names")
    if shard.world_size != snapshot.world_size or shard.parent != snapshot.parent:
        raise bad_object(
            entry.key, f"is of a world of {shard.world_size} from {shard.parent}, its commit record is not"
        )
    missing = shard.packs.difference(snapshot.packs)
    if missing:
        raise bad_object(entry.key, f"lies in pack {min(missing)}, which the commit record does not name")
    return shard


# Common


def _check_world(key: str, rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size <= WORLD_SIZE_MAX:
        raise bad_object(key, f"rank {rank} in a world of {world_size}")


def _parent(key: str, message: tier_pb2.StoredShard | tier_pb2.StoredSnapshot) -> SnapshotId | None:
    if not message.has_parent:
        return None
    return snapshot_id(key, message.parent_generation, message.parent_step)


def _wall_time(key: str, seconds: float) -> float:
    if not math.isfinite(seconds):
        raise bad_object(key, f"a time of {seconds}")
    return seconds
