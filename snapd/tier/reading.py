"""Reading a tier: which snapshots of a job are there, their manifests, their chunks.

A snapshot is there because its commit record is; each is opened with the highest revision of which record and shard
manifests are good. What is broken is given with the reason, never left out. Blocking; may be used by several threads.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from snapd.core.ids import JOB_NAME, SnapshotId
from snapd.core.stored import ShardEntry, Spot, StoredChunk, StoredShard, StoredSnapshot
from snapd.core.tier_keys import JOBS, TierKeys, job_of
from snapd.errors import IntegrityError, NotFoundError
from snapd.store.base import Store
from snapd.tier.envelope import NBYTES_MAX, Kind
from snapd.tier.manifests import decode_entry, decode_snapshot
from snapd.tier.streaming import Done, Fault, Miss, Place, ReadPool, Want

VOID = "tier_void"
REFRESHES_MAX = 3  # how often in one work packs may vanish under a reader's hands


@dataclass(frozen=True, slots=True)
class Candidate:
    """A snapshot that has commit records. `revisions`: the highest first; `modified_s`: of the newest, by the store's
    clock.
    """

    id: SnapshotId
    revisions: tuple[int, ...]
    modified_s: float


@dataclass(frozen=True, slots=True)
class Broken:
    """A snapshot that cannot be used, and what is wrong with it, in words that name the objects. `is_void`: nothing is
    wrong: retention dropped it, or its writing was given up, and a collector has said so.
    """

    id: SnapshotId
    reason: str
    is_void: bool = False


@dataclass(frozen=True, slots=True)
class Opened:
    """A snapshot with the manifests of the shards that were asked for."""

    record: StoredSnapshot
    shards: dict[int, StoredShard] = field(default_factory=dict)
    passed_over: str = ""  # higher revisions that are not good

    @property
    def id(self) -> SnapshotId:
        return self.record.id


def jobs_of(store: Store) -> list[str]:
    """All jobs that have a commit record in the tier."""
    found: set[str] = set()
    for info in store.list(JOBS):
        job = job_of(info.key)
        if job is not None and job not in found and TierKeys(job).snapshot_of(info.key) is not None:
            found.add(job)
    return sorted(found)


class TierReader:
    """One job in one tier. The store and the pool are the caller's. `proved_bad`: hears where stored chunks lie that
    were read and are not what their hashes say; on any thread.
    """

    def __init__(
        self,
        store: Store,
        job: str,
        pool: ReadPool,
        proved_bad: Callable[[Collection[Spot]], None] = lambda spots: None,
    ) -> None:
        assert JOB_NAME.fullmatch(job), job
        self.store = store
        self.job = job
        self.keys = TierKeys(job)
        self.pool = pool
        self._proved_bad = proved_bad

    # what there is

    def candidates(self) -> list[Candidate]:
        """All snapshots with a commit record, newest first; one listing, nothing is opened.

        Raises: as `Store.list`.
        """
        found: dict[SnapshotId, dict[int, float]] = {}
        for info in self.store.list(self.keys.snapshots):
            named = self.keys.snapshot_of(info.key)
            if named is not None:
                found.setdefault(named[0], {})[named[1]] = info.modified_s
        return [
            Candidate(snapshot, tuple(sorted(revisions, reverse=True)), revisions[max(revisions)])
            for snapshot, revisions in sorted(found.items(), reverse=True)
        ]

    def open(self, candidate: Candidate, ranks: Collection[int] | None = ()) -> Opened | Broken:
        """The snapshot with the manifests of `ranks` (None: of all): the highest revision of which all that is good.

        Raises: what the store raises when it cannot be asked.
        """
        reasons: list[str] = []
        is_gone, is_void = True, True
        for revision in candidate.revisions:
            try:
                record = self._record(candidate.id, revision)
                wanted = range(record.world_size) if ranks is None else sorted(ranks)
                entries = [record.shards[rank] for rank in wanted if rank < record.world_size]
                shards = self.pool.map(functools.partial(self.shard, record), entries)
            except IntegrityError as error:
                is_gone = False
                reasons.append(_told(error))
                if error.context.get("is_dropped"):
                    break  # and so are all before it
                is_void = is_void and error.kind == VOID
            except NotFoundError as error:
                if error.kind != "object":
                    raise
                is_void = False
                reasons.append(_told(error))
            else:
                return Opened(record, {shard.rank: shard for shard in shards}, "; ".join(reasons))
        if is_gone:  # a collector may have deleted or rewritten it since it was listed
            again = next((c for c in self.candidates() if c.id == candidate.id), None)
            if again is None:
                return Broken(candidate.id, f"{candidate.id} was deleted meanwhile", is_void=True)
            if again.revisions != candidate.revisions:
                return self.open(again, ranks)
        return Broken(candidate.id, "; ".join(reasons), is_void)

    def find(self, snapshot: SnapshotId, ranks: Collection[int] | None = ()) -> Opened | Broken:
        """As `open`, by name. A snapshot that has no commit record is Broken too."""
        candidate = next((c for c in self.candidates() if c.id == snapshot), None)
        if candidate is None:
            return Broken(snapshot, f"{self.store.description} has no commit record of {snapshot}")
        return self.open(candidate, ranks)

    def was_deleted(self, snapshot: SnapshotId) -> bool:
        """Whether retention has dropped it, or a person has deleted it, since it was opened: what could not be read of
        it is not damaged then. Raises what the store raises.
        """
        now = next((candidate for candidate in self.candidates() if candidate.id == snapshot), None)
        if now is None:
            return True
        opened = self.open(now)
        return isinstance(opened, Broken) and opened.is_void

    def open_all(
        self, candidates: Sequence[Candidate], ranks: Collection[int] | None = ()
    ) -> list[Opened | Broken]:
        """As `open`, several at once, in their order."""
        if ranks is not None and not ranks:
            return self.pool.map(self._open_record, candidates)
        return [self.open(candidate, ranks) for candidate in candidates]

    def _open_record(self, candidate: Candidate) -> Opened | Broken:
        return self.open(candidate)

    def packs(self) -> dict[str, int]:
        """Name -> size of every pack of the job that is there; one listing."""
        found = ((self.keys.pack_name(info.key), info.nbytes) for info in self.store.list(self.keys.packs))
        return {name: nbytes for name, nbytes in found if name is not None}

    # manifests

    def _record(self, snapshot: SnapshotId, revision: int) -> StoredSnapshot:
        key = self.keys.snapshot(snapshot, revision)
        data = self.store.read(key, max_nbytes=NBYTES_MAX[Kind.SNAPSHOT])
        return decode_snapshot(data, key=key, job=self.job)

    def shard(self, record: StoredSnapshot, entry: ShardEntry) -> StoredShard:
        """The manifest of one shard, which must be the one that the commit record names.

        Raises:
            IntegrityError: names the key. NotFoundError: kind `object`: it is not there.
        """
        return decode_entry(self.store.read(entry.key, max_nbytes=entry.manifest_nbytes), entry, record)

    # chunks

    def read(
        self,
        shard: StoredShard,
        indexes: Iterable[int],
        place: Place,
        *,
        done: Done | None = None,
        stop: threading.Event | None = None,
        told: Callable[[Miss], None] = lambda miss: None,
    ) -> list[Miss]:
        """Bring chunks of a shard to their places, verified; returns those that did not come.

        A pack that is gone may have been rewritten: then the snapshot is opened again, and its chunks are read from
        where they lie now. `told`: of what was missed at first, although it may have come then.
        """
        wants = [Want(index, shard.chunks[index]) for index in indexes]
        misses: list[Miss] = []
        for _ in range(REFRESHES_MAX):
            found = self.pool.read(self.store, self.keys.pack, wants, place, done=done, stop=stop)
            self._proved_bad({m.chunk.spot for m in found if m.fault is Fault.BAD})
            gone = [miss for miss in found if miss.fault is Fault.GONE]
            misses += [miss for miss in found if miss.fault is not Fault.GONE]
            if not gone:
                return sorted(misses, key=lambda miss: miss.index)
            for miss in gone:
                told(miss)
            chunks = self._chunks_now(shard)
            wants = [Want(miss.index, chunks[miss.index]) for miss in gone]
            moved = [want for want, miss in zip(wants, gone, strict=True) if want.chunk != miss.chunk]
            if not moved:
                return sorted([*misses, *gone], key=lambda miss: miss.index)
        return sorted([*misses, *gone], key=lambda miss: miss.index)

    def _chunks_now(self, shard: StoredShard) -> tuple[StoredChunk, ...]:
        """Where the shard's chunks lie by the newest good revision; as before where that is not this shard."""
        now = self.find(shard.id, [shard.rank])
        if isinstance(now, Broken) or shard.rank not in now.shards:
            return shard.chunks
        newer = now.shards[shard.rank]
        return newer.chunks if newer.digest == shard.digest else shard.chunks


def _told(error: IntegrityError | NotFoundError) -> str:
    """The error's words, with the key if they do not have it."""
    key = str(error.context.get("key", ""))
    return error.message if not key or key in error.message else f"{key}: {error.message}"
