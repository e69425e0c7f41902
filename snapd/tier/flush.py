"""One snapshot of one node into a tier, from the intent to the commit: what an attempt does, in order. Blocking.

A writer lives through failed attempts: what it has written stays known, under its write id and its intent, until a
commit or until a collector gave it up. What a daemon before it left (shard manifests) is found by the keys.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from snapd.core.committing import attempt_of, check_base
from snapd.core.ids import SnapshotId
from snapd.core.stored import Intent, Spot, StoredChunk, StoredShard, StoredSnapshot
from snapd.core.tier_keys import TierKeys
from snapd.errors import UnavailableError
from snapd.store.base import Store
from snapd.tier.adopting import adopt_intents, chunks_of_packs
from snapd.tier.committing import (
    CommitMeans,
    Committer,
    check_named,
    check_not_overtaken,
    check_same_shard,
    places_of,
    revisions_of,
)
from snapd.tier.intents import BEATS_PER_TTL, WriterIntent, condemned_error
from snapd.tier.known_chunks import KnownChunks, add_base, committed_snapshots, newest_good
from snapd.tier.shard_writing import write_shards
from snapd.tier.writing import PackWriter, ShardBytes, Stopped, WriteCounts, WriteMeans, plan_packs

WAIT_FIRST_S = 0.2
WAIT_MAX_S = 15.0
BEAT_LOOK_S = 1.0
CARRIED_PER_CHUNK_MAX = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class FlushMeans:
    """`ttl_s`: of intents; `round_s`: of collectors. `random_token`: 32
    hexadecimal digits, a new writer's id.
    """

    write: WriteMeans
    ttl_s: float
    round_s: float
    wall_s: Callable[[], float]
    random_token: Callable[[], str]

    @property
    def store(self) -> Store:
        return self.write.store


@dataclass(slots=True)
class Flushed:
    """How it went. `snapshot`: the commit record. `is_ours`: this node wrote it. `reused_nbytes`: raw bytes that the
    tier had already.
    """

    snapshot: StoredSnapshot
    is_ours: bool
    counts: WriteCounts
    reused_nbytes: int
    shards_resumed: int


@dataclass(slots=True)
class Stage:
    """How far an attempt is; written by its thread, read by others."""

    text: str = "begins"
    is_waiting: bool = False  # our part is done, other nodes' are not
    waits_since_s: float = 0.0
    look_now: threading.Event = field(default_factory=threading.Event)  # set by others: there is news
    nbytes_total: int = 0
    counts: WriteCounts = field(default_factory=WriteCounts)


class TierWriter:
    """One per job and node. `flush` is called by one thread at a time."""

    def __init__(
        self,
        means: FlushMeans,
        job: str,
        node: str,
        proved_bad: Callable[[], Collection[Spot]] = frozenset,
    ) -> None:
        """`node`: names the writer across restarts; nobody else has that name. `proved_bad`: where stored chunks lie
        that were read and are bad: they are written anew.
        """
        self.keys = TierKeys(job)
        self._proved_bad = proved_bad
        self._means, self._node = means, node
        self._beat_s = min(
            BEAT_LOOK_S, means.ttl_s / (2 * BEATS_PER_TTL)
        )  # how often it is seen whether one is due
        self._is_adopting = True
        self._own_ids: set[str] = set()  # every write id that this node has had, as far as is known
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.write_id = self._means.random_token()
        self._own_ids.add(self.write_id)
        intent = Intent(self.keys.job, self.write_id, self._node, SnapshotId(0, 0), ())
        self._intent = WriterIntent(
            self._means.store,
            self.keys,
            intent,
            ttl_s=self._means.ttl_s,
            monotonic_s=self._means.write.monotonic_s,
        )
        self._adopted: list[WriterIntent] = []
        self._carried: list[StoredChunk] = []
        self._next_pack = 0

    def flush(
        self,
        snapshot: SnapshotId,
        world_size: int,
        shards: Sequence[ShardBytes],
        *,
        stop: threading.Event,
        stage: Stage,
        own_done: Callable[[], None] = lambda: None,
        is_known: Callable[[SnapshotId], bool] = lambda snapshot: True,
    ) -> Flushed:
        """Write `shards`, this node's part of `snapshot`, and commit, or wait until another node has. `own_done`: the
        shards' memory is needed no more. `is_known`: whether a snapshot in the tier was there before, or is ours.

        Raises:
            Stopped: `stop` was set. UnavailableError: kind `tier_condemned`: call again. ConflictError: kind
            `tier_conflict`. IntegrityError. What a store raises.
        """
        try:
            return self._flush(snapshot, world_size, shards, stop, stage, own_done, is_known)
        except UnavailableError as error:
            if error.kind == "tier_condemned":
                self._begin_anew()  # what was written is not relied upon; the old intent is the collector's
            raise

    def give_up(self) -> None:
        """Nothing will be committed: let a collector have what was written. Raises what a store raises."""
        self._remove_intents()
        self._begin_anew()

    def _remove_intents(self) -> None:
        for intent in (*self._adopted, self._intent):
            if intent.is_published:
                intent.remove()

    def _beat(self) -> None:
        for intent in (self._intent, *self._adopted):
            intent.beat()

    def _flush(
        self,
        snapshot: SnapshotId,
        world_size: int,
        shards: Sequence[ShardBytes],
        stop: threading.Event,
        stage: Stage,
        own_done: Callable[[], None],
        is_known: Callable[[SnapshotId], bool],
    ) -> Flushed:
        point = self._means.write.point
        stage.text = "looks at what the tier has"
        if len(self._carried) > CARRIED_PER_CHUNK_MAX * sum(len(shard.record.chunks) for shard in shards):
            self.give_up()  # it is mostly of older snapshots by now: a collector may have it
        attempt = attempt_of(places_of(self._means.store, self.keys, snapshot))
        committer = Committer(
            self._commit_means(), snapshot, world_size, self.write_id, attempt.revision or 0
        )
        if attempt.revision is None:
            return self._there_already(committer, shards, own_done)
        ranks = [shard.record.rank for shard in shards]
        known, packs = self._known(snapshot, attempt.revision, ranks, is_known)
        point("daemon.flush.intent.after")
        resumed = self._resumed(committer, shards, packs)
        left = [shard for shard in shards if shard.record.rank not in resumed]
        writer, reused_nbytes = self._write(committer, left, known, stop, stage)
        own_done()
        progress = committer.try_commit(self._intent)
        stage.waits_since_s = self._means.write.monotonic_s()
        wait_s = WAIT_FIRST_S
        while progress.committed is None:
            self._check_own(committer, shards, progress.missing)
            stage.is_waiting = True
            stage.text = f"waits for the shards of ranks {', '.join(map(str, progress.missing[:8]))}"
            self._wait(wait_s, stop, stage.look_now)
            wait_s = min(WAIT_MAX_S, 2 * wait_s)
            progress = committer.try_commit(self._intent)
        stage.text = "is committed"
        self._remove_intents()
        point("daemon.flush.done.after")
        self._begin_anew()
        return Flushed(progress.committed, progress.is_ours, writer.counts, reused_nbytes, len(resumed))

    def _there_already(
        self, committer: Committer, shards: Sequence[ShardBytes], own_done: Callable[[], None]
    ) -> Flushed:
        """It was committed before we came, by another node or before a restart; or it was dropped (IntegrityError)."""
        own_done()
        record = committer.committed()
        if record is None:
            raise condemned_error("the commit record", self.keys.snapshot(committer.snapshot))
        for shard in shards:
            check_named(record, shard.record.rank, shard.record.digest, self.write_id)
        self.give_up()
        return Flushed(record, False, WriteCounts(), sum(s.record.nbytes for s in shards), len(shards))

    def _commit_means(self) -> CommitMeans:
        means = self._means
        return CommitMeans(
            store=means.store,
            keys=self.keys,
            wall_s=means.wall_s,
            monotonic_s=means.write.monotonic_s,
            point=means.write.point,
            round_s=means.round_s,
        )

    def _known(
        self,
        snapshot: SnapshotId,
        revision: int,
        ranks: Sequence[int],
        is_known: Callable[[SnapshotId], bool],
    ) -> tuple[KnownChunks, dict[str, int]]:
        """Publish the intent, and gather what may be used again, nothing that a collector is about to delete; and all
        packs that are there. The order is the protocol's: intent, condemned lists, then what is built upon.
        """
        store, keys = self._means.store, self.keys
        if self._intent.is_published:
            self._intent.check()  # given up meanwhile? Putting it again would hide that
        base = newest_good(store, keys, committed_snapshots(store, keys))
        self._intent.publish(snapshot, [base.id] if base is not None else [], revision)
        condemned = self._intent.check()
        packs = self._packs()
        if self._is_adopting:
            self._adopt(condemned, packs)
        if base is not None and base.write_id not in self._own_ids and not is_known(base.id):
            check_not_overtaken(self.keys.job, snapshot, base)
        known = KnownChunks()
        known.add(self._carried)
        if base is not None:
            there = [keys.snapshot(base.id, number) for number in revisions_of(store, keys, base.id)]
            if not check_base(base.id, there, condemned):
                add_base(store, known, base, ranks)
        # one that was lost by other means than a collector must not be built upon either
        known.without_packs(
            {pack for pack in known.packs if pack not in packs or keys.pack(pack) in condemned}
        )
        known.without(self._proved_bad())
        return known, packs

    def _packs(self) -> dict[str, int]:
        """Name -> size of every pack of the job."""
        found = (
            (self.keys.pack_name(info.key), info.nbytes) for info in self._means.store.list(self.keys.packs)
        )
        return {name: nbytes for name, nbytes in found if name is not None}

    def _adopt(self, condemned: Collection[str], packs: Mapping[str, int]) -> None:
        """Once: take over what this node had written before it was started anew."""
        store, keys = self._means.store, self.keys
        adopted = adopt_intents(
            store,
            keys,
            self._node,
            own=self._intent.key,
            condemned=condemned,
            ttl_s=self._means.ttl_s,
            monotonic_s=self._means.write.monotonic_s,
        )
        self._adopted.extend(adopted)
        self._own_ids.update(each.intent.write_id for each in adopted)
        self._carried += chunks_of_packs(store, keys, {each.intent.write_id for each in adopted}, packs)
        self._is_adopting = False

    def _resumed(
        self, committer: Committer, shards: Sequence[ShardBytes], packs: Collection[str]
    ) -> set[int]:
        """Our ranks whose manifests are there already, from an attempt before this one, or from a replica; and `packs`
        has what they name.

        Raises:
            UnavailableError: kind `tier_condemned`: it has not: somebody has emptied the tier meanwhile.
        """
        there = committer.ranks_there()
        resumed = set()
        for shard in shards:
            rank = shard.record.rank
            found = committer.existing(rank) if rank in there else None
            if found is not None:
                check_same_shard(committer.shard_key(rank), found, shard.record.digest, self.write_id)
                committer.check_packs(found, packs)
                resumed.add(rank)
        return resumed

    def _check_own(
        self, committer: Committer, shards: Sequence[ShardBytes], missing: Collection[int]
    ) -> None:
        """What we have written is there, or nobody would wait for it in vain: somebody may have emptied the tier.

        Raises:
            UnavailableError: kind `tier_condemned`.
        """
        for shard in shards:
            rank = shard.record.rank
            if rank in missing and committer.existing(rank) is None:
                raise condemned_error("a shard manifest", committer.shard_key(rank))

    def _write(
        self,
        committer: Committer,
        shards: Sequence[ShardBytes],
        known: KnownChunks,
        stop: threading.Event,
        stage: Stage,
    ) -> tuple[PackWriter, int]:
        plan = plan_packs([shard.record for shard in shards], known, first_number=self._next_pack)
        self._next_pack += len(plan.packs)  # no name is used twice, whatever becomes of this attempt
        means = self._means.write
        writer = PackWriter(
            means, self.keys, self.write_id, shards, stop, beat=self._beat, beat_s=self._beat_s
        )
        stage.text, stage.counts = "writes packs", writer.counts
        stage.nbytes_total = sum(pack.raw_nbytes for pack in plan.packs)

        def packed(stored: Sequence[StoredChunk]) -> None:
            self._carried.extend(stored)
            self._beat()

        def write(shard: StoredShard) -> None:
            committer.write_shard(shard)

        write_shards(writer, plan, shards, known, stop, packed=packed, write=write)
        return writer, plan.reused_nbytes

    def _wait(self, seconds: float, stop: threading.Event, look_now: threading.Event) -> None:
        clock = self._means.write.monotonic_s
        until_s = clock() + seconds
        while (left_s := until_s - clock()) > 0 and not look_now.is_set():
            if stop.wait(min(left_s, self._beat_s)):
                raise Stopped
            self._beat()
        look_now.clear()
