"""Chunks that a tier has already: of the snapshots that a writer builds on, and what it has written itself.

Found by what they are (XXH3-128 and size), so an unchanged or replicated chunk is stored once. Bounded: what does not
fit is simply written again.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterable

from snapd.core.ids import SnapshotId
from snapd.core.stored import ShardEntry, Spot, StoredChunk, StoredShard, StoredSnapshot
from snapd.core.tier_keys import TierKeys
from snapd.errors import IntegrityError, NotFoundError, UnavailableError
from snapd.store.base import Store
from snapd.tier.envelope import NBYTES_MAX, Kind
from snapd.tier.manifests import decode_entry, decode_snapshot

CHUNKS_MAX = 200_000  # some 70 MB
ChunkName = tuple[bytes, int]


class KnownChunks:
    """Not thread-safe."""

    def __init__(self, chunks_max: int = CHUNKS_MAX) -> None:
        self._chunks: dict[ChunkName, StoredChunk] = {}
        self._chunks_max = chunks_max

    def __len__(self) -> int:
        return len(self._chunks)

    def find(self, digest: bytes, nbytes: int) -> StoredChunk | None:
        return self._chunks.get((digest, nbytes))

    def add(self, chunks: Iterable[StoredChunk]) -> None:
        """The first place of a chunk is kept."""
        for chunk in chunks:
            if len(self._chunks) >= self._chunks_max:
                return
            self._chunks.setdefault((chunk.digest, chunk.nbytes), chunk)

    def without_packs(self, packs: Collection[str]) -> None:
        """Forget what lies in packs that may not be relied upon."""
        if packs:
            self._chunks = {name: chunk for name, chunk in self._chunks.items() if chunk.pack not in packs}

    def without(self, spots: Collection[Spot]) -> None:
        """Forget what lies in these places."""
        if spots:
            self._chunks = {name: chunk for name, chunk in self._chunks.items() if chunk.spot not in spots}

    @property
    def packs(self) -> frozenset[str]:
        return frozenset(chunk.pack for chunk in self._chunks.values())


def committed_snapshots(store: Store, keys: TierKeys) -> dict[SnapshotId, list[int]]:
    """Every snapshot that has a commit record -> its revisions, the highest first. One listing."""
    found: dict[SnapshotId, list[int]] = {}
    for info in store.list(keys.snapshots):
        named = keys.snapshot_of(info.key)
        if named is not None:
            found.setdefault(named[0], []).append(named[1])
    return {snapshot: sorted(revisions, reverse=True) for snapshot, revisions in found.items()}


def read_record(store: Store, keys: TierKeys, snapshot: SnapshotId, revision: int) -> StoredSnapshot:
    """Raises: NotFoundError (kind `object`), IntegrityError, and what a store raises."""
    key = keys.snapshot(snapshot, revision)
    return decode_snapshot(store.read(key, max_nbytes=NBYTES_MAX[Kind.SNAPSHOT]), key=key, job=keys.job)


def read_entry(store: Store, record: StoredSnapshot, entry: ShardEntry) -> StoredShard:
    """The shard manifest that a commit record names. Raises as `read_record`."""
    return decode_entry(store.read(entry.key, max_nbytes=entry.manifest_nbytes), entry, record)


def newest_good(
    store: Store, keys: TierKeys, committed: dict[SnapshotId, list[int]], *, tries_max: int = 16
) -> StoredSnapshot | None:
    """The newest snapshot whose commit record can be read, of the newest few."""
    for snapshot in sorted(committed, reverse=True)[:tries_max]:
        for revision in committed[snapshot]:
            try:
                return read_record(store, keys, snapshot, revision)
            except IntegrityError as error:
                if error.kind == "tier_void" and error.context.get("is_dropped"):
                    break  # so are all revisions below
            except NotFoundError as error:
                if error.kind != "object":
                    raise
            except UnavailableError as error:
                if not is_unreadable(error):
                    raise
    return None


def is_unreadable(error: UnavailableError) -> bool:
    """Whether a disk has an error of its own for this object: others may well be read, and a new snapshot need not wait
    for it.
    """
    return error.context.get("errno") == errno.EIO


def add_base(store: Store, known: KnownChunks, base: StoredSnapshot, ranks: Collection[int]) -> None:
    """What the base has of these ranks. Its intent must have been published before. A manifest that is broken, or gone
    by now, is passed over.
    """
    for rank in sorted(ranks):
        if rank >= base.world_size:
            break
        try:
            shard = read_entry(store, base, base.shards[rank])
        except IntegrityError:
            continue
        except NotFoundError as error:
            if error.kind != "object":
                raise
            continue
        except UnavailableError as error:
            if not is_unreadable(error):
                raise
            continue
        known.add(shard.chunks)
