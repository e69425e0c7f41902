"""Snapshots of a tier made by hand, for tests of its format: objects by key in a dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import xxhash

from snapd.codec.compress import ChunkDecoder, ChunkEncoder, EncodedChunk
from snapd.core.ids import SnapshotId
from snapd.core.stored import Encoding, ShardEntry, StoredChunk, StoredShard, StoredSnapshot
from snapd.core.tier_keys import TierKeys, pack_name
from snapd.tier.manifests import decode_entry, decode_snapshot, encode_shard, encode_snapshot, entry_of
from snapd.tier.packs import PackBuilder
from snapd.tier.widths import element_widths
from tests.support.shard_builder import BuiltShard

WRITE_ID = "0123456789abcdef" * 2


@dataclass
class TierScene:
    """`objects`: key -> bytes. Packs take `chunks_per_pack` chunks, so that small shards lie in several."""

    job: str = "job"
    encoder: ChunkEncoder = field(default_factory=lambda: ChunkEncoder("always"))
    chunks_per_pack: int = 4
    objects: dict[str, bytes] = field(default_factory=dict)
    known: dict[bytes, StoredChunk] = field(default_factory=dict)
    pack_count: int = 0
    ways: dict[int, EncodedChunk] = field(default_factory=dict)  # forced for chunk numbers of the next shard

    @property
    def keys(self) -> TierKeys:
        return TierKeys(self.job)

    def store(
        self, shards: Sequence[BuiltShard], parent: SnapshotId | None = None, revision: int = 0
    ) -> StoredSnapshot:
        """Pack the chunks that are new, write the manifests, then the commit record."""
        entries: list[ShardEntry] = []
        packs: set[str] = set()
        for built in shards:
            shard = self._shard(built, parent)
            key = self.keys.shard(shard.id, shard.rank, revision)
            self.objects[key] = encode_shard(shard)
            entries.append(entry_of(shard, key, self.objects[key]))
            packs |= shard.packs
        snapshot = StoredSnapshot(
            job=self.job,
            id=shard.id,
            world_size=len(shards),
            revision=revision,
            parent=parent,
            write_id=WRITE_ID,
            shards=tuple(entries),
            packs=tuple(sorted(packs)),
            committed_wall_time_s=1_700_000_100.0,
        )
        self.objects[self.keys.snapshot(snapshot.id, revision)] = encode_snapshot(snapshot)
        return snapshot

    def _shard(self, built: BuiltShard, parent: SnapshotId | None) -> StoredShard:
        record = built.record
        widths = element_widths(built.layout, len(record.chunks))
        fresh = [i for i, c in enumerate(record.chunks) if c.xxh3_128 not in self.known]
        for start in range(0, len(fresh), self.chunks_per_pack):
            self._pack(built, fresh[start : start + self.chunks_per_pack], widths)
        return StoredShard(
            job=self.job,
            id=SnapshotId(record.generation, record.step),
            rank=record.rank,
            world_size=record.world_size,
            chunk_bytes=record.chunk_bytes,
            layout_nbytes=record.layout_nbytes,
            early_values_offset=record.early_values_offset,
            early_values_nbytes=record.early_values_nbytes,
            chunks=tuple(self.known[chunk.xxh3_128] for chunk in record.chunks),
            parent=parent,
            captured_wall_time_s=record.captured_wall_time_s,
            digest=record.shard_xxh3_128,
        )

    def _pack(self, built: BuiltShard, indexes: Sequence[int], widths: Sequence[int]) -> None:
        builder = PackBuilder(pack_name(WRITE_ID, self.pack_count))
        self.pack_count += 1
        pieces = [builder.header()]
        for index in indexes:
            raw = built.chunk(index)
            digest = xxhash.xxh3_128_digest(raw)
            if digest in self.known:  # twice in one shard
                continue
            way = self.ways.get(index) or self.encoder.encode(memoryview(raw), widths[index])
            self.known[digest] = builder.add(
                nbytes=len(raw),
                digest=digest,
                stored_nbytes=way.nbytes,
                encoding=way.encoding,
                element_nbytes=way.element_nbytes,
            )
            pieces.append(bytes(way.buffer))
        self.objects[self.keys.pack(builder.name)] = b"".join([*pieces, builder.footer()])

    def shard_bytes(self, snapshot: SnapshotId, rank: int, revision: int = 0) -> bytes:
        """The shard's byte string, read back as a restore does; gaps behind short chunks are zeroes."""
        key = self.keys.snapshot(snapshot, revision)
        record = decode_snapshot(self.objects[key], key=key, job=self.job)
        entry = record.shards[rank]
        shard = decode_entry(self.objects[entry.key], entry, record)
        decoder = ChunkDecoder()
        whole = bytearray(shard.chunk_bytes * len(shard.chunks))
        for index, chunk in enumerate(shard.chunks):
            pack = self.objects[self.keys.pack(chunk.pack)]
            at = index * shard.chunk_bytes
            stored = pack[chunk.offset : chunk.offset + chunk.stored_nbytes]
            decoder.decode(stored, chunk, memoryview(whole)[at : at + chunk.nbytes])
        return bytes(whole)


def built_bytes(built: BuiltShard) -> bytes:
    """What `shard_bytes` must give."""
    size = built.record.chunk_bytes
    return b"".join(built.chunk(i).ljust(size, b"\0") for i in range(len(built.record.chunks)))


def encodings_of(scene: TierScene) -> set[Encoding]:
    return {chunk.encoding for chunk in scene.known.values()}
