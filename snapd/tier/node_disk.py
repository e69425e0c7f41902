"""One job on the own disk of a node: what lies there, writing this node's shards of a snapshot, and tidying. Blocking.

The same keys and bytes as in a shared tier (docs/format.md), without commit records, intents and condemned lists: the
folder belongs to one daemon (store/node_folder.py), so nobody else writes or deletes. What is deleted goes manifests
first, then packs that no manifest names.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from snapd.core.ids import SnapshotId
from snapd.core.node_disk import DiskPart, parts_to_drop
from snapd.core.stored import Spot, StoredChunk, StoredShard
from snapd.core.tier_keys import TierKeys
from snapd.errors import IntegrityError, NotFoundError, SnapdError, UnavailableError
from snapd.store.base import Created, Store
from snapd.tier.committing import check_same_shard
from snapd.tier.envelope import NBYTES_MAX, Kind
from snapd.tier.flush import Stage
from snapd.tier.known_chunks import KnownChunks
from snapd.tier.manifests import decode_shard, encode_shard
from snapd.tier.node_mending import Mended, name_of, plan_again, rotten_in, with_places
from snapd.tier.shard_writing import write_shards
from snapd.tier.writing import PackWriter, ShardBytes, Stopped, WriteCounts, WriteMeans, plan_packs

NOTE_NBYTES_MAX = 64
CARRIED_MAX = 200_000
BEAT_S = 60.0  # nobody waits for signs of life here


@dataclass(frozen=True, slots=True)
class DiskLook:
    """What the disk has of a job. `problems`: what is wrong with a snapshot, in words that name the object; the good
    shards of such a one are not in `shards`. `unread`: those of them that may name more than is known. `manifests`: all
    that can be read, by key. `generation`: the newest of anything there. `is_from_future`: some of it was written by a
    newer snapd.
    """

    shards: Mapping[SnapshotId, Mapping[int, StoredShard]] = field(default_factory=dict)
    problems: Mapping[SnapshotId, str] = field(default_factory=dict)
    unread: frozenset[SnapshotId] = frozenset()
    manifests: Mapping[str, StoredShard] = field(default_factory=dict)
    generation: int = 0
    is_from_future: bool = False

    @property
    def parts(self) -> list[DiskPart]:
        found = [
            DiskPart(snapshot, frozenset(shards), next(iter(shards.values())).world_size)
            for snapshot, shards in self.shards.items()
        ]
        return found + [DiskPart(snapshot, frozenset(), 0) for snapshot in self.problems]

    def chunks(self) -> Iterable[StoredChunk]:
        """All that are named, those of the newest snapshots first."""
        for key in sorted(self.manifests, reverse=True):
            yield from self.manifests[key].chunks


@dataclass(frozen=True, slots=True)
class DiskWritten:
    """How a write went. `reused_nbytes`: raw bytes that the disk had already; `dropped`: older snapshots that went."""

    counts: WriteCounts
    reused_nbytes: int
    dropped: tuple[SnapshotId, ...]


class DiskJob:
    """One per job on the disk, for as long as the daemon lives. Any thread; one works at a time.

    `means`: what writes, opened; raises what a store raises.
    """

    def __init__(
        self,
        job: str,
        means: Callable[[], WriteMeans],
        *,
        keep: int,
        is_alone: bool,
        random_token: Callable[[], str],
    ) -> None:
        self.keys = TierKeys(job)
        self._means, self._keep, self._is_alone = means, keep, is_alone
        self._write_id, self._next_pack = random_token(), 0
        self._lock = threading.Lock()
        self._known: Mapping[str, StoredShard] = {}  # manifests by key; never changed in place
        self._unread: Mapping[
            SnapshotId, str
        ] = {}  # snapshots with manifests that are bad; never changed in place
        self._is_known = False
        self._rotten: Mapping[
            Spot, str
        ] = {}  # stored chunks that were found to be bad; never changed in place
        self._marking = threading.Lock()  # of those
        self._carried: list[StoredChunk] = []  # in packs of attempts of ours that failed
        self._generation = 0
        self._is_doomed = False

    # looking

    def look(self) -> DiskLook:
        """Raises what a store raises."""
        with self._lock:
            store = self._opened()
            return self._look(store)

    def find(self, snapshot: SnapshotId, rank: int) -> StoredShard | None:
        """One shard's manifest; also while something is being written. Raises IntegrityError: it is damaged; what a
        store raises.
        """
        if self._is_doomed:
            return None
        try:
            return self._read(self._means().store, self.keys.shard(snapshot, rank))
        except NotFoundError as error:
            if error.kind != "object":
                raise
            return None

    def _opened(self) -> Store:
        store = self._means().store
        if self._is_doomed:
            self._delete_all(store)
        return store

    def _look(self, store: Store) -> DiskLook:
        shards: dict[SnapshotId, dict[int, StoredShard]] = {}
        problems: dict[SnapshotId, str] = {}
        is_from_future, known, failing = False, dict[str, StoredShard](), dict[SnapshotId, UnavailableError]()
        for info in sorted(store.list(self.keys.shards), key=lambda info: info.key):
            named = self.keys.shard_of(info.key)
            if named is None or named[2] != 0:
                continue
            snapshot, rank, _ = named
            try:
                shard = known[info.key] = self._known.get(info.key) or self._read(store, info.key)
            except IntegrityError as error:
                is_from_future = is_from_future or error.kind == "tier_version"
                problems.setdefault(snapshot, error.message)
                continue
            except UnavailableError as error:
                if error.kind != "store_failing":
                    raise
                failing[snapshot] = error
                continue
            others = shards.setdefault(snapshot, {})
            if any(other.world_size != shard.world_size for other in others.values()):
                problems.setdefault(
                    snapshot, f"{info.key} is of another world than the snapshot's other shards"
                )
            others[rank] = shard
        for snapshot, failure in failing.items():
            self._check_reads(store, known, failure)
            problems.setdefault(snapshot, failure.message)
        self._known, self._is_known = known, True
        self._generation = max(
            [_noted(store, self.keys), *(each.generation for each in {*shards, *problems})]
        )
        unread = frozenset(problems)
        self._unread = dict(problems)
        for snapshot, found in shards.items():
            why = rotten_in(found.values(), self._rotten)
            if why:
                problems.setdefault(snapshot, why)
        good = {snapshot: found for snapshot, found in shards.items() if snapshot not in problems}
        return DiskLook(good, problems, unread, known, self._generation, is_from_future)

    def _check_reads(self, store: Store, known: Iterable[str], failure: UnavailableError) -> None:
        """A manifest could not be read. If another object can be, it lies on bad sectors, and is damaged; else the disk
        does not answer, and nothing is proved: `failure` is raised.
        """
        for key in (*known, self.keys.generation_note):
            try:
                store.read(key, max_nbytes=NBYTES_MAX[Kind.SHARD])
            except (NotFoundError, UnavailableError):
                continue
            return
        raise failure

    def _read(self, store: Store, key: str) -> StoredShard:
        data = store.read(key, max_nbytes=NBYTES_MAX[Kind.SHARD])
        return decode_shard(data, key=key, job=self.keys.job)

    # what has gone bad

    @property
    def rotten(self) -> Mapping[Spot, str]:
        """Stored chunks that are known to be bad, and what is wrong with each. Nothing that is written names them."""
        return self._rotten

    @property
    def damages(self) -> list[str]:
        """All that is known to be bad and is there still, in words."""
        return [*self._unread.values(), *sorted(self._rotten.values())]

    def note_rotten(self, found: Mapping[Spot, str]) -> bool:
        """They were read and are not what their hashes say. Returns whether any of it is news. Never waits."""
        with self._marking:
            is_news = not found.keys() <= self._rotten.keys()
            self._rotten = {**found, **self._rotten}
            return is_news

    def manifests(self) -> Mapping[str, StoredShard]:
        """Every manifest that can be read, by key, as it was seen or written last. Raises what a store raises."""
        if not self._is_known:
            self.look()
        return self._known

    @property
    def known(self) -> Mapping[str, StoredShard]:
        """As `manifests`, of what was looked at already."""
        return self._known

    def confirm_gone(self, pack: str) -> bool | None:
        """Whether a pack that manifests name is not there. None: something is being written: ask later."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            store = self._opened()
            is_named = any(pack in shard.packs for shard in self._look(store).manifests.values())
            return is_named and pack not in self._packs(store)
        finally:
            self._lock.release()

    def write_manifest_again(self, key: str) -> bool:
        """What lies there under that key is bad: as it was when it was good. False: it is not to be there any more."""
        with self._lock:
            shard = self._known.get(key)
            if shard is not None:
                self._opened().put(key, encode_shard(shard))
            return shard is not None

    def mend(self, shards: Sequence[ShardBytes], stop: threading.Event) -> Mended:
        """Write what is rotten and is in the memory of `shards` again, and name it in all manifests that need it.

        Raises:
            Stopped. IntegrityError, and what a store raises: what was written so far is used next time.
        """
        with self._lock:
            store = self._opened()
            look, rotten, there = self._look(store), self._rotten, set(self._packs(store))
            before = {chunk.spot: name_of(chunk) for chunk in look.chunks() if chunk.spot in rotten}
            wanted = set(before.values())
            known = self._reusable(look, there)
            good = {name: chunk for name in wanted if (chunk := known.find(*name)) is not None}
            packs = plan_again(shards, wanted - good.keys(), first_number=self._next_pack)
            self._next_pack += len(packs)
            writer = self._writer(shards, stop)
            for stored in writer.write(packs):
                self._carried.extend(stored)
                good.update((name_of(chunk), chunk) for chunk in stored)
            manifests, count = dict(look.manifests), 0
            for key, shard in look.manifests.items():
                if (mended := with_places(shard, rotten, good)) is not shard:
                    store.put(key, encode_shard(mended))
                    manifests[key] = mended
                    count += 1
            self._known = manifests
            named = {chunk.spot for shard in manifests.values() for chunk in shard.chunks}
            left = named & rotten.keys()
            self._forget_rotten(named)
            return Mended(len(before) - len(left), writer.counts.raw_nbytes, count, len(left))

    # the notes

    def note_generation(self, generation: int) -> None:
        """Remember, across the loss of all memory, that this generation was given out."""
        with self._lock:
            if generation > self._generation and not self._is_doomed:
                self._opened().put(self.keys.generation_note, b"%d\n" % generation)
                self._generation = generation

    def note_ended(self) -> None:
        """The job was closed for good: what it ended with stays, and is not brought back unasked."""
        with self._lock:
            if not self._is_doomed:
                self._opened().put(self.keys.ended_note, b"ended\n")

    # writing

    def write(
        self,
        snapshot: SnapshotId,
        shards: Sequence[ShardBytes],
        *,
        stop: threading.Event,
        stage: Stage,
        own_done: Callable[[], None],
        common: Callable[[], SnapshotId | None] = lambda: None,
    ) -> DiskWritten:
        """Write `shards`, all that this node has of `snapshot`, and let go of older snapshots. `own_done`: the shards'
        memory is needed no more. `common`: what other nodes' disks may have as their newest, and so stays here.

        Raises:
            Stopped: `stop` was set. ConflictError: kind `tier_conflict`: the disk has another shard of that name.
            IntegrityError: memory does not have what was recorded. What a store raises.
        """
        with self._lock:
            if stop.is_set():
                raise Stopped
            stage.text = "looks at what the disk has"
            store = self._opened()
            look = self._look(store)
            resumed = self._resumed(store, look, snapshot, shards)
            left = [shard for shard in shards if shard.record.rank not in resumed]
            counts, reused_nbytes = self._write(store, look, left, stop, stage)
            own_done()
            stage.text = "tidies the disk"
            store.delete([self.keys.ended_note])
            dropped = self._tidy(store, common())
            self._means().point("daemon.disk.done.after")
            return DiskWritten(counts, reused_nbytes, tuple(dropped))

    def _resumed(
        self, store: Store, look: DiskLook, snapshot: SnapshotId, shards: Sequence[ShardBytes]
    ) -> set[int]:
        """The ranks whose manifests are there already. What is damaged of the snapshot makes room for what is good."""
        if snapshot in look.problems:
            gone = {self.keys.shard(snapshot, shard.record.rank) for shard in shards}
            store.delete(sorted(gone))
            self._known = {key: shard for key, shard in self._known.items() if key not in gone}
            return set()
        there = look.shards.get(snapshot, {})
        for shard in shards:
            found = there.get(shard.record.rank)
            if found is not None:
                key = self.keys.shard(snapshot, found.rank)
                check_same_shard(key, found, shard.record.digest, self._write_id)
        return set(there)

    def _write(
        self,
        store: Store,
        look: DiskLook,
        shards: Sequence[ShardBytes],
        stop: threading.Event,
        stage: Stage,
    ) -> tuple[WriteCounts, int]:
        known = self._reusable(look, set(self._packs(store)))
        plan = plan_packs([shard.record for shard in shards], known, first_number=self._next_pack)
        self._next_pack += len(plan.packs)  # no name is used twice, whatever becomes of this attempt
        means, writer = self._means(), self._writer(shards, stop)
        stage.text, stage.counts = "writes packs", writer.counts
        stage.nbytes_total = sum(pack.raw_nbytes for pack in plan.packs)

        def packed(chunks: Sequence[StoredChunk]) -> None:
            self._carried.extend(chunks)
            del self._carried[:-CARRIED_MAX]

        def write(shard: StoredShard) -> None:
            means.point("daemon.disk.manifest.before")
            key = self.keys.shard(shard.id, shard.rank)
            if store.create(key, encode_shard(shard)) is Created.ANOTHERS:
                check_same_shard(key, self._read(store, key), shard.digest, self._write_id)
            means.point("daemon.disk.manifest.after")

        write_shards(writer, plan, shards, known, stop, packed=packed, write=write)
        return writer.counts, plan.reused_nbytes

    def _reusable(self, look: DiskLook, packs: Collection[str]) -> KnownChunks:
        """What the disk has already, and nothing that is known to be bad or missing."""
        known, rotten = KnownChunks(), self._rotten
        known.add(chunk for chunk in look.chunks() if chunk.spot not in rotten and chunk.pack in packs)
        known.add(chunk for chunk in self._carried if chunk.spot not in rotten and chunk.pack in packs)
        return known

    def _writer(self, shards: Sequence[ShardBytes], stop: threading.Event) -> PackWriter:
        return PackWriter(
            self._means(), self.keys, self._write_id, shards, stop, beat=lambda: None, beat_s=BEAT_S
        )

    def _packs(self, store: Store) -> list[str]:
        names = (self.keys.pack_name(info.key) for info in store.list(self.keys.packs))
        return [name for name in names if name is not None]

    # tidying

    def tidy(self, common: SnapshotId | None) -> list[SnapshotId]:
        """Delete what is not kept, and what attempts that were killed have left; returns the snapshots that went."""
        with self._lock:
            return self._tidy(self._opened(), common)

    def _tidy(self, store: Store, common: SnapshotId | None) -> list[SnapshotId]:
        look, point = self._look(store), self._means().point
        if look.is_from_future:
            return []  # whoever wrote that may name what looks like garbage to us
        dropped = parts_to_drop(look.parts, keep=self._keep, is_alone=self._is_alone, common=common)
        for snapshot in dropped:
            point("daemon.disk.drop.before")
            store.delete([info.key for info in store.list(self.keys.shards_of(snapshot))])
        left = self._look(store)
        named = {chunk.pack for chunk in left.chunks()}
        unread = left.unread - set(dropped)
        garbage = [name for name in self._packs(store) if name not in named]
        if garbage and not unread:  # a manifest that cannot be read names packs, too
            point("daemon.disk.pack_drop.before")
            store.delete([self.keys.pack(name) for name in sorted(garbage)])
        kept = set(self._packs(store))
        self._carried = [chunk for chunk in self._carried if chunk.pack in kept]
        self._forget_rotten({chunk.spot for chunk in left.chunks()} if self._rotten else ())
        return dropped

    def _forget_rotten(self, named: Collection[Spot]) -> None:
        """Nothing but `named` can be named by anything that is written from now on."""
        with self._marking:
            rotten = self._rotten
            self._carried = [chunk for chunk in self._carried if chunk.spot not in rotten]
            self._rotten = {spot: why for spot, why in rotten.items() if spot in named}

    # removing

    def doom(self) -> None:
        """All of the job is to go; nothing of it is offered any more. `finish` does it, or whoever comes next."""
        self._is_doomed = True

    def finish(self) -> None:
        """Do what is left of a removal. Raises what a store raises."""
        with self._lock:
            if self._is_doomed:
                self._opened()

    def _delete_all(self, store: Store) -> None:
        keys = [info.key for info in store.list(self.keys.root)]
        manifests = [key for key in keys if key.startswith(self.keys.shards)]
        store.delete(manifests)
        store.delete([key for key in keys if key not in set(manifests)])
        self._known, self._unread, self._rotten, self._carried, self._generation = {}, {}, {}, [], 0
        self._is_doomed = False


def _noted(store: Store, keys: TierKeys) -> int:
    """The generation that was noted; a note that cannot be read says nothing."""
    try:
        text = store.read(keys.generation_note, max_nbytes=NOTE_NBYTES_MAX).decode("ascii", "replace").strip()
    except NotFoundError as error:
        if error.kind != "object":
            raise
        return 0
    except IntegrityError:
        return 0
    except UnavailableError as error:
        if error.kind != "store_failing":
            raise
        return 0  # a bad sector; a disk that does not answer at all is told by the manifests
    return int(text) if text.isdecimal() else 0


@dataclass(frozen=True, slots=True)
class JobOnDisk:
    """`generation`: the newest that the disk knows of, as names and notes say."""

    job: str
    generation: int
    is_ended: bool


def jobs_on_disk(store: Store, names: Iterable[str]) -> list[JobOnDisk]:
    """Every job that has a manifest there, by name."""
    found = []
    for name in sorted(names):
        keys = TierKeys(name)
        snapshots = [
            each[0] for info in store.list(keys.shards) if (each := keys.shard_of(info.key)) is not None
        ]
        if snapshots:
            is_ended = False
            with contextlib.suppress(SnapdError):
                is_ended = store.head(keys.ended_note).nbytes > 0
            generation = max([_noted(store, keys), *(snapshot.generation for snapshot in snapshots)])
            found.append(JobOnDisk(name, generation, is_ended))
    return found
