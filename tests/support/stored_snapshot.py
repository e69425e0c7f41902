"""Snapshots put into a tier by hand, by the format's own builders: for tests of what reads them."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import xxhash
from snapd_proto import format_pb2

from snapd.codec.compress import ChunkEncoder
from snapd.core.ids import Place
from snapd.core.stored import StoredChunk, StoredShard, StoredSnapshot
from snapd.core.tier_keys import TierKeys, pack_name
from snapd.memory.records import record_from_bytes
from snapd.store.base import Created, Store
from snapd.store.directory import DirectoryStore
from snapd.store.surroundings import Surroundings
from snapd.tier.manifests import encode_shard, encode_snapshot, entry_of, shard_from_record
from snapd.tier.packs import PackBuilder
from tests.support.shard_builder import BuiltShard, ShardBuilder


def surroundings(seed: int = 1) -> Surroundings:
    """As the daemon's, but for chance."""
    chance = random.Random(seed)
    return Surroundings(time.monotonic, time.time, chance.random, lambda: f"{chance.getrandbits(128):032x}")


def directory_store(root: Path) -> DirectoryStore:
    """A store in a folder that is made."""
    root.mkdir(parents=True, exist_ok=True)
    return DirectoryStore(root, surroundings())


@dataclass
class TierWriter:
    """Writes snapshots of one job; chunks that it wrote before are not written again."""

    store: Store
    job: str = "job"
    mode: str = "off"
    pack_chunks_max: int = 1 << 30
    seed: int = 0
    known: dict[tuple[bytes, int], StoredChunk] = field(default_factory=dict)

    def write(
        self,
        shards: Sequence[tuple[format_pb2.ShardRecord, Mapping[int, bytes]]],
        *,
        revision: int = 0,
        is_committed: bool = True,
    ) -> StoredSnapshot:
        """One snapshot of all ranks: (record, chunk index -> bytes) each."""
        keys, stored, entries = TierKeys(self.job), [], []
        for message, chunks in shards:
            record = record_from_bytes(message.SerializeToString())
            shard = shard_from_record(record, self._packed(keys, chunks))
            key, manifest = keys.shard(record.id, record.rank, revision), encode_shard(shard)
            assert self.store.create(key, manifest) is Created.OURS
            stored.append(shard)
            entries.append(entry_of(shard, key, manifest))
        first = stored[0]
        snapshot = StoredSnapshot(
            job=self.job,
            id=first.id,
            world_size=first.world_size,
            revision=revision,
            parent=first.parent,
            write_id=self._write_id(),
            shards=tuple(entries),
            packs=tuple(sorted({pack for shard in stored for pack in shard.packs})),
            committed_wall_time_s=time.time(),
        )
        if is_committed:
            key = keys.snapshot(first.id, revision)
            assert self.store.create(key, encode_snapshot(snapshot)) is Created.OURS
        return snapshot

    def write_built(self, shards: Sequence[BuiltShard], **more: bool) -> StoredSnapshot:
        every = [
            (shard.record, {i: shard.chunk(i) for i in range(len(shard.record.chunks))}) for shard in shards
        ]
        return self.write(every, **more)  # type: ignore[arg-type]

    def _write_id(self) -> str:
        self.seed += 1
        return f"{self.seed:032x}"

    def _packed(self, keys: TierKeys, chunks: Mapping[int, bytes]) -> list[StoredChunk]:
        encoder = ChunkEncoder(self.mode)
        result: list[StoredChunk] = []
        write_id, number = self._write_id(), 0
        builder: PackBuilder | None = None
        upload = None
        for index in sorted(chunks):
            raw = memoryview(chunks[index])
            digest = xxhash.xxh3_128_digest(raw)
            known = self.known.get((digest, raw.nbytes))
            if known is not None:
                result.append(known)
                continue
            encoded = encoder.encode(raw, 4)
            nbytes = memoryview(encoded.buffer).nbytes
            if builder is not None and upload is not None:
                if not builder.has_room(nbytes) or builder.chunk_count >= self.pack_chunks_max:
                    upload.write([builder.footer()])
                    upload.commit()
                    builder = None
            if builder is None:
                builder = PackBuilder(pack_name(write_id, number))
                number += 1
                upload = self.store.upload(keys.pack(builder.name))
                upload.write([builder.header()])
            chunk = builder.add(
                nbytes=raw.nbytes,
                digest=digest,
                stored_nbytes=nbytes,
                encoding=encoded.encoding,
                element_nbytes=encoded.element_nbytes,
            )
            assert upload is not None
            upload.write([encoded.buffer])
            self.known[digest, raw.nbytes] = chunk
            result.append(chunk)
        if builder is not None and upload is not None:
            upload.write([builder.footer()])
            upload.commit()
        return result


def build_world(
    *,
    job: str = "job",
    generation: int = 1,
    step: int = 10,
    world_size: int = 2,
    elements: int = 6000,
    chunk_bytes: int = 4096,
    seed: int = 0,
) -> list[BuiltShard]:
    """Shards of all ranks with two tensors each: `w`, which differs by rank and step, and `frozen`, which does not."""
    shards = []
    for rank in range(world_size):
        builder = ShardBuilder(
            job=job,
            generation=generation,
            step=step,
            rank=rank,
            world_size=world_size,
            chunk_bytes=chunk_bytes,
        )
        moving = random.Random(f"{seed} {generation} {step} {rank}").randbytes(4 * elements)
        builder.plain("w", "float32", [elements], moving, "parameters")
        builder.plain(
            "frozen", "float32", [elements], random.Random("frozen").randbytes(4 * elements), "frozen"
        )
        shards.append(builder.build())
    return shards


def places_of(shard: StoredShard) -> list[Place]:
    """Somewhere for each chunk."""
    return [Place(0, index) for index in range(len(shard.chunks))]


def flip_bit(root: Path, key: str, offset: int) -> None:
    """Change one bit of an object of a directory tier."""
    path = root / key
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)
