"""Shard manifests and the commit record of a snapshot: what makes packs a snapshot, and who makes it.

Nobody coordinates: each node creates the manifests of its own shards; whoever finds those of all ranks there creates
the commit record. Keys follow from the snapshot, so two who write the same thing meet: what is there already with the
same shard's digest counts as ours, anything else is an error that names both. Blocking.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from snapd.core.committing import Place
from snapd.core.ids import SnapshotId
from snapd.core.stored import ShardEntry, StoredShard, StoredSnapshot, VoidRecord
from snapd.core.tier_keys import TierKeys, snapshot_text
from snapd.errors import ConflictError, IntegrityError, NotFoundError
from snapd.store.base import Created, Store
from snapd.tier.envelope import NBYTES_MAX, Kind
from snapd.tier.intents import WriterIntent, condemned_error
from snapd.tier.known_chunks import read_record
from snapd.tier.manifests import decode_shard, encode_shard, encode_snapshot, entry_of
from snapd.tier.notes import encode_void

DEADLINE_S = 120.0  # of the commit itself


@dataclass(frozen=True, slots=True)
class Progress:
    """`committed`: the commit record, whoever wrote it. `missing`: ranks without a manifest, else. `is_ours`: this
    writer created the record.
    """

    committed: StoredSnapshot | None
    missing: tuple[int, ...] = ()
    is_ours: bool = False


@dataclass(frozen=True, slots=True)
class _Noted:
    """A rank's manifest that is there."""

    entry: ShardEntry
    packs: frozenset[str]
    parent: SnapshotId | None
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitMeans:
    """`round_s`: of the job's collector."""

    round_s: float
    store: Store
    keys: TierKeys
    wall_s: Callable[[], float]
    monotonic_s: Callable[[], float]
    point: Callable[[str], None]


@dataclass(slots=True)
class Committer:
    """Of one snapshot, for one attempt. `revision`: of its manifests and of the commit record: 0, or the next one after
    those that a collector gave up.
    """

    means: CommitMeans
    snapshot: SnapshotId
    world_size: int
    write_id: str
    revision: int = 0
    _noted: dict[int, _Noted] = field(default_factory=dict)

    # shards

    def ranks_there(self) -> set[int]:
        """The ranks whose manifests are there. One listing."""
        keys = self.means.keys
        found = (keys.shard_of(info.key) for info in self.means.store.list(keys.shards_of(self.snapshot)))
        mine = (self.snapshot, self.revision)
        return {each[1] for each in found if each is not None and (each[0], each[2]) == mine}

    def shard_key(self, rank: int) -> str:
        return self.means.keys.shard(self.snapshot, rank, self.revision)

    def existing(self, rank: int) -> StoredShard | None:
        """The rank's manifest, if it is there. Raises IntegrityError for a broken one."""
        key = self.shard_key(rank)
        try:
            data = self.means.store.read(key, max_nbytes=NBYTES_MAX[Kind.SHARD])
        except NotFoundError as error:
            if error.kind != "object":
                raise
            return None
        return self._note(decode_shard(data, key=key, job=self.means.keys.job), key, data)

    def write_shard(self, shard: StoredShard) -> StoredShard:
        """Create a shard's manifest; returns what is there: ours, or another's of the same bytes.

        Raises:
            ConflictError: kind `tier_conflict`: the manifest of another shard is there.
        """
        store, key = self.means.store, self.shard_key(shard.rank)
        data = encode_shard(shard)
        self.means.point("daemon.flush.manifest.before")
        created = store.create(key, data)
        self.means.point("daemon.flush.manifest.after")
        if created is Created.OURS:
            return self._note(shard, key, data)
        there = self.existing(shard.rank)
        if there is None:
            raise condemned_error("a shard manifest", key)  # it was there just now: a collector deletes it
        check_same_shard(key, there, shard.digest, self.write_id)
        return there

    def _note(self, shard: StoredShard, key: str, data: bytes) -> StoredShard:
        entry = entry_of(shard, key, data)
        self._noted[shard.rank] = _Noted(entry, shard.packs, shard.parent, self.means.monotonic_s())
        return shard

    def check_packs(self, shard: StoredShard, packs: Collection[str]) -> None:
        """See that what a manifest names, which we did not write just now, is there; `packs`: that were listed. If not,
        the attempt is given up for all: its manifests cannot be replaced, the next revision's can be written.

        Raises:
            UnavailableError: kind `tier_condemned`.
        """
        store, keys = self.means.store, self.means.keys
        for pack in sorted(shard.packs.difference(packs)):
            try:
                store.head(keys.pack(pack))
            except NotFoundError as error:
                if error.kind != "object":
                    raise
                void = VoidRecord(keys.job, self.snapshot, self.revision, False, self.write_id)
                store.create(keys.snapshot(self.snapshot, self.revision), encode_void(void))
                raise condemned_error("a pack that a shard manifest names", keys.pack(pack)) from error

    # the snapshot

    def committed(self) -> StoredSnapshot | None:
        """The commit record, if it is there, whoever wrote it, as whichever revision: it names the shards that we know,
        or it is an error.

        Raises:
            UnavailableError: kind `tier_condemned`: a collector has given this attempt up: another may be made.
            IntegrityError: kind `tier_void`: retention has dropped the snapshot.
        """
        store, keys = self.means.store, self.means.keys
        is_given_up = False
        for revision in revisions_of(store, keys, self.snapshot):
            try:
                record = read_record(store, keys, self.snapshot, revision)
            except NotFoundError as error:
                if error.kind != "object":
                    raise
            except IntegrityError as error:
                if error.kind != "tier_void" or error.context.get("is_dropped"):
                    raise
                is_given_up = is_given_up or revision >= self.revision
            else:
                self._check_names_ours(record)
                return record
        if is_given_up:
            raise condemned_error("this attempt", keys.snapshot(self.snapshot, self.revision))
        return None

    def _check_names_ours(self, record: StoredSnapshot) -> None:
        for rank, noted in self._noted.items():
            check_named(record, rank, noted.entry.shard_digest, self.write_id)

    def try_commit(self, intent: WriterIntent) -> Progress:
        """Commit if the manifests of all ranks are there.

        A manifest that is there after the condemned lists were read, and is in none of them, stays for a round at
        least, and so do its packs: manifests go first. The record is created within half a round of that.

        Raises:
            UnavailableError: kind `tier_condemned`: something that the snapshot needs is about to be deleted.
            ConflictError: kind `tier_conflict`. IntegrityError: a rank's manifest is broken.
        """
        missing = self._missing()
        if missing:
            return Progress(self.committed(), missing)
        began_s = self.means.monotonic_s()
        condemned = intent.check()
        missing = self._missing()
        for rank in range(self.world_size):
            if rank not in missing and not self._is_noted(rank, began_s) and self.existing(rank) is None:
                missing = (*missing, rank)
        if missing:
            return Progress(self.committed(), missing)
        record = self._record()
        self._check_condemned(condemned, record)
        self.means.point("daemon.flush.commit.before")
        key = self.means.keys.snapshot(self.snapshot, self.revision)
        deadline_s = min(DEADLINE_S, self.means.round_s / 2)
        created = self.means.store.create(key, encode_snapshot(record), deadline_s=deadline_s)
        self.means.point("daemon.flush.commit.after")
        if created is Created.OURS:
            return Progress(record, is_ours=True)
        there = self.committed()
        if there is None:
            raise condemned_error("the commit record", key)
        return Progress(there)

    def _missing(self) -> tuple[int, ...]:
        return tuple(sorted(set(range(self.world_size)) - self.ranks_there()))

    def _is_noted(self, rank: int, now_s: float) -> bool:
        """Its manifest was read, or written, less than half a round ago: no other can be in its place."""
        noted = self._noted.get(rank)
        return noted is not None and now_s - noted.at_s < self.means.round_s / 2

    def _record(self) -> StoredSnapshot:
        noted = [self._noted[rank] for rank in range(self.world_size)]
        parents = {each.parent for each in noted}
        if len(parents) != 1:
            raise ConflictError(
                f"the shards of {self.snapshot} name different parents: {sorted(map(str, parents))}",
                kind="tier_conflict",
            )
        packs = frozenset[str]().union(*(each.packs for each in noted))
        return StoredSnapshot(
            job=self.means.keys.job,
            id=self.snapshot,
            world_size=self.world_size,
            revision=self.revision,
            parent=parents.pop(),
            write_id=self.write_id,
            shards=tuple(each.entry for each in noted),
            packs=tuple(sorted(packs)),
            committed_wall_time_s=self.means.wall_s(),
        )

    def _check_condemned(self, condemned: Collection[str], record: StoredSnapshot) -> None:
        keys = self.means.keys
        needed = [*(entry.key for entry in record.shards), *(keys.pack(pack) for pack in record.packs)]
        doomed = next((key for key in needed if key in condemned), None)
        if doomed is not None:
            raise condemned_error("something that this snapshot needs", doomed)


def revisions_of(store: Store, keys: TierKeys, snapshot: SnapshotId) -> list[int]:
    """Of what lies at the keys of the snapshot's commit records, the highest first. One listing."""
    found = (keys.snapshot_of(info.key) for info in store.list(f"{keys.snapshots}{snapshot_text(snapshot)}."))
    return sorted((each[1] for each in found if each is not None), reverse=True)


def places_of(store: Store, keys: TierKeys, snapshot: SnapshotId) -> dict[int, Place]:
    """What lies there."""
    places: dict[int, Place] = {}
    for revision in revisions_of(store, keys, snapshot):
        try:
            read_record(store, keys, snapshot, revision)
        except NotFoundError as error:
            if error.kind != "object":
                raise
        except IntegrityError as error:
            if error.kind != "tier_void":
                raise
            places[revision] = Place.DROPPED if error.context.get("is_dropped") else Place.VOID
        else:
            places[revision] = Place.RECORD
    return places


def check_named(record: StoredSnapshot, rank: int, digest: bytes, write_id: str) -> None:
    """Raise ConflictError (kind `tier_conflict`) unless the commit record names the rank's shard of that digest."""
    named = record.shards[rank] if rank < record.world_size else None
    if named is not None and named.shard_digest == digest:
        return
    there = named.shard_digest.hex() if named is not None else "not in its world"
    raise ConflictError(
        f"the tier has another snapshot {record.id} of this job: rank {rank} is {there} there (written by"
        f" {record.write_id}), {digest.hex()} here (written by {write_id})",
        kind="tier_conflict",
        hint="two jobs of one name write to one tier: give one of them another name or prefix",
    )


def check_not_overtaken(job: str, snapshot: SnapshotId, there: StoredSnapshot) -> None:
    """Raise ConflictError (kind `tier_conflict`) if `there`, which this node has not written, is of the generation that
    it writes, or of a later one: another machine has taken the job up, and is the one whose snapshots count.
    """
    if there.id.generation < snapshot.generation:
        return
    raise ConflictError(
        f"another machine writes job {job!r} to this tier: {there.id} is there, committed by {there.write_id}, while"
        f" this one is at {snapshot}",
        kind="tier_conflict",
        hint="end one of them, or give it another job's name; what is started anew gets a newer generation",
    )


def check_same_shard(key: str, there: StoredShard, digest: bytes, write_id: str) -> None:
    """Raise ConflictError (kind `tier_conflict`) unless the manifest that is there is of the same shard."""
    if there.digest == digest:
        return
    writers = sorted({pack.partition("-")[0] for pack in there.packs})
    raise ConflictError(
        f"the tier has another shard at {key}: {there.digest.hex()} there (packs of {', '.join(writers[:4])}),"
        f" {digest.hex()} here (written by {write_id})",
        kind="tier_conflict",
        hint="two jobs of one name write to one tier: give one of them another name or prefix",
    )
