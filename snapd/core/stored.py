"""What lies in a durable tier, as plain data: chunks in packs, shards, snapshots. The core's view of tier.proto."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from snapd.core.ids import SnapshotId


class Encoding(enum.IntEnum):
    """How a chunk's bytes are stored. Numbers are part of the format: append-only."""

    RAW = 0
    ZSTD = 1
    SHUFFLED_ZSTD = 2  # bytes of equal significance together, then zstd; `element_nbytes` says of what width


Spot = tuple[str, int]
"""Pack and offset: where a stored chunk lies."""


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """One chunk, and where its stored bytes lie."""

    nbytes: int
    digest: bytes  # XXH3-128 of the raw bytes, 16 bytes
    pack: str  # the pack's name; see core/tier_keys.py
    offset: int  # of the stored bytes in the pack's object
    stored_nbytes: int
    encoding: Encoding
    element_nbytes: int = 1

    @property
    def spot(self) -> Spot:
        return self.pack, self.offset


@dataclass(frozen=True, slots=True)
class StoredShard:
    """A shard manifest: core/manifest.py's ShardRecord with its chunks in packs."""

    job: str
    id: SnapshotId
    rank: int
    world_size: int
    chunk_bytes: int
    layout_nbytes: int
    early_values_offset: int
    early_values_nbytes: int
    chunks: tuple[StoredChunk, ...]
    parent: SnapshotId | None
    captured_wall_time_s: float
    digest: bytes  # XXH3-128 of the chunks' digests in order

    @property
    def nbytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks)

    @property
    def packs(self) -> frozenset[str]:
        return frozenset(chunk.pack for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """A shard as the commit record names it: its manifest's key, size and XXH3-128, and what the shard is."""

    rank: int
    key: str
    manifest_nbytes: int
    manifest_digest: bytes
    shard_digest: bytes
    nbytes: int  # of the shard, raw


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    """A commit record: the snapshot exists in the tier because this does. Shards are in order of rank, all of them."""

    job: str
    id: SnapshotId
    world_size: int
    revision: int  # 0: as it was committed; higher: a collector rewrote its packs
    parent: SnapshotId | None
    write_id: str  # who wrote it, drawn anew for every attempt: tells a lost answer from a lost race
    shards: tuple[ShardEntry, ...]
    packs: tuple[str, ...]  # every pack that any shard names, sorted
    committed_wall_time_s: float  # for display only
    first_modified_s: float = 0.0  # of a revision above 0: the store's time of the record of revision 0

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.shards)


@dataclass(frozen=True, slots=True)
class Intent:
    """Who is writing which snapshot, and on what it builds. Put again, with `beat` counted up, as a sign of life."""

    job: str
    write_id: str
    node: str
    id: SnapshotId
    bases: tuple[SnapshotId, ...]  # committed snapshots whose packs it may use again
    beat: int = 0
    revision: int = 0  # of the commit record that it is going to create


@dataclass(frozen=True, slots=True)
class Condemned:
    """What a collector is about to delete one round later: keys of packs, shards, snapshots and intents."""

    job: str
    round: int
    collector: str  # its write id
    keys: tuple[str, ...]  # manifests first, then packs


@dataclass(frozen=True, slots=True)
class Pin:
    """A snapshot that retention must keep, by name."""

    job: str
    name: str
    id: SnapshotId


@dataclass(frozen=True, slots=True)
class VoidRecord:
    """What a collector creates in a commit record's place, so that no late writer can commit what is about to be
    deleted: the revision was given up. `is_dropped`: the snapshot is gone, with every revision below.
    """

    job: str
    id: SnapshotId
    revision: int
    is_dropped: bool
    collector: str  # its write id
