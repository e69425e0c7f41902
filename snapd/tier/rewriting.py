"""Packs of which little is alive are rewritten: what is alive goes into new packs, and the snapshots that name it get
new manifests and a commit record of the next revision. The old ones are garbage then, and go as all garbage does.

A rewriter is a writer (core/committing.py): it publishes an intent, reads the condemned lists, then what it builds
upon; its commit is a creation. Stored bytes are copied as they are, each chunk decoded and checked on the way.
Blocking.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from snapd.codec.compress import ChunkDecoder
from snapd.core.committing import BeforeCommit, Go, check_base, check_before_commit
from snapd.core.condemning import CollectRules, Judgement
from snapd.core.ids import SnapshotId
from snapd.core.repacking import PackUse, Repacking, choose_packs
from snapd.core.stored import Intent, ShardEntry, Spot, StoredChunk, StoredShard, StoredSnapshot
from snapd.core.tier_keys import TierKeys, pack_name
from snapd.core.tier_sight import SeenRecord, Sight
from snapd.errors import IntegrityError, NotFoundError
from snapd.store.base import Created, Store, Upload
from snapd.tier.intents import read_condemned
from snapd.tier.manifests import decode_entry, encode_shard, encode_snapshot, entry_of
from snapd.tier.notes import encode_intent
from snapd.tier.packs import PackBuilder
from snapd.tier.streaming import RUN_BYTES, Run, Want, plan_runs

CHUNKS_MAX = 400_000  # of all kept snapshots, some 100 MB; with more nothing is rewritten


@dataclass(frozen=True, slots=True, kw_only=True)
class RewriteMeans:
    """`take`: called with the bytes about to be copied: it waits as a rate wants."""

    store: Store
    random_token: Callable[[], str]
    wall_s: Callable[[], float]
    monotonic_s: Callable[[], float]
    take: Callable[[int], None] = lambda nbytes: None
    point: Callable[[str], None] = lambda name: None


@dataclass(slots=True)
class Rewritten:
    """How it went. `snapshots`: that have a new revision. `problems`: why others have none."""

    plan: Repacking
    snapshots: list[SnapshotId] = field(default_factory=list)
    packs: int = 0
    nbytes: int = 0  # written
    problems: list[str] = field(default_factory=list)


class Rewriter:
    """Of one job. What shard manifests say is kept between runs."""

    def __init__(self, means: RewriteMeans, job: str, rules: CollectRules) -> None:
        self._means, self._rules = means, rules
        self._keys = TierKeys(job)
        self._used: dict[str, dict[Spot, int]] = {}  # of a manifest, by key: stored bytes at each place

    def plan(self, sight: Sight, judgement: Judgement) -> Repacking:
        """What would be rewritten. Reads the manifests that were not read before."""
        kept = self._kept(judgement)
        used: dict[str, dict[Spot, int]] = {}
        for seen in kept:
            assert seen.record is not None
            for entry in seen.record.shards:
                try:
                    used[entry.key] = self._uses(seen.record, entry)
                except (IntegrityError, NotFoundError) as error:
                    return Repacking(frozenset(), f"not all manifests can be read: {error.message}")
        self._used = used
        if sum(map(len, used.values())) > CHUNKS_MAX:
            return Repacking(frozenset(), f"there are more than {CHUNKS_MAX} chunks")
        live: dict[str, int] = {}
        for (pack, _), nbytes in {spot: n for places in used.values() for spot, n in places.items()}.items():
            live[pack] = live.get(pack, 0) + nbytes
        uses = {name: PackUse(sight.packs[name].nbytes, n) for name, n in live.items() if name in sight.packs}
        return choose_packs(uses)

    def run(self, sight: Sight, judgement: Judgement) -> Rewritten:
        """Rewrite, newest snapshot first. `sight` and `judgement`: of the pass before.

        Raises: what a store raises; what was committed until then stays.
        """
        done = Rewritten(self.plan(sight, judgement))
        moved: dict[Spot, StoredChunk] = {}
        if not done.plan.packs:
            return done
        for seen in sorted(self._kept(judgement), key=lambda one: one.snapshot, reverse=True):
            assert seen.record is not None
            if done.plan.packs.isdisjoint(seen.record.packs):
                continue
            revision = _next_revision(sight, seen.snapshot)
            attempt = _Attempt(self._means, self._keys, self._rules, seen, revision, done, moved)
            problem = attempt.run(self._uses_packs)
            if problem:
                done.problems.append(f"{seen.snapshot}: {problem}")
                # Nobody names its packs, and its intent is gone.
                for spot in [s for s, chunk in moved.items() if chunk.pack.startswith(attempt.write_id)]:
                    del moved[spot]
            else:
                done.snapshots.append(seen.snapshot)
        return done

    def _kept(self, judgement: Judgement) -> list[SeenRecord]:
        """Records that stay."""
        return [
            seen
            for seen in judgement.current.values()
            if seen.record is not None and not seen.trouble and seen.key not in judgement.garbage
        ]

    def _uses(self, record: StoredSnapshot, entry: ShardEntry) -> dict[Spot, int]:
        if entry.key not in self._used:
            shard = read_shard(self._means.store, record, entry)
            self._used[entry.key] = {c.spot: c.stored_nbytes for c in shard.chunks}
        return self._used[entry.key]

    def _uses_packs(self, entry: ShardEntry) -> frozenset[str]:
        return frozenset(pack for pack, _ in self._used[entry.key])


def _next_revision(sight: Sight, snapshot: SnapshotId) -> int:
    """Above all that were tried: what a rewriter left that was killed is another's, or void."""
    records = [seen.revision for seen in sight.records if seen.snapshot == snapshot]
    shards = [seen.revision for seen in sight.shards.values() if seen.snapshot == snapshot]
    return 1 + max([*records, *shards])


def read_shard(store: Store, record: StoredSnapshot, entry: ShardEntry) -> StoredShard:
    return decode_entry(store.read(entry.key, max_nbytes=entry.manifest_nbytes), entry, record)


@dataclass(slots=True)
class _Attempt:
    """The next revision of one snapshot."""

    means: RewriteMeans
    keys: TierKeys
    rules: CollectRules
    seen: SeenRecord
    revision: int
    done: Rewritten
    moved: dict[Spot, StoredChunk]
    write_id: str = ""
    packs: int = 0
    _intent: Intent | None = None
    _put_at_s: float = 0.0

    def run(self, packs_of: Callable[[ShardEntry], frozenset[str]]) -> str:
        """Why it was not rewritten; empty: it was."""
        record, self.write_id = self.seen.record, self.means.random_token()
        assert record is not None
        bases = (record.id, *self.done.snapshots)
        revision = self.revision
        self._intent = Intent(self.keys.job, self.write_id, "collector", record.id, bases, revision=revision)
        store, key = self.means.store, self.keys.intent(self.write_id)
        self._beat(0.0)
        try:
            problem = self._write(record, revision, packs_of)
        except IntegrityError as error:
            problem = error.message
        except NotFoundError as error:
            if error.kind != "object":
                raise
            problem = error.message
        store.delete([key])
        return problem

    def _beat(self, every_s: float) -> None:
        """Put the intent again if that is due."""
        assert self._intent is not None
        now_s = self.means.monotonic_s()
        if now_s - self._put_at_s >= every_s:
            self._intent = replace(self._intent, beat=self._intent.beat + 1)
            self.means.store.put(self.keys.intent(self.write_id), encode_intent(self._intent))
            self._put_at_s = now_s

    def _write(
        self, record: StoredSnapshot, revision: int, packs_of: Callable[[ShardEntry], frozenset[str]]
    ) -> str:
        store, place = self.means.store, self.keys.snapshot(record.id, revision)
        condemned = read_condemned(store, self.keys)
        there = {info.key for info in store.list(self.keys.snapshots)}
        own = self.keys.snapshot(record.id, record.revision)
        problem = check_base(record.id, there & {own}, condemned)
        if problem or place in there:
            return problem or f"revision {revision} is there already"
        victims, entries, packs = self.done.plan.packs, [], set[str]()
        shards = {}
        for entry in record.shards:
            named = packs_of(entry)
            if named.isdisjoint(victims):
                entries.append(entry)
                packs |= named
                continue
            shards[entry.rank] = read_shard(store, record, entry)
            entries.append(entry)
        self._move([c for shard in shards.values() for c in shard.chunks if c.pack in victims], condemned)
        for rank, shard in shards.items():
            chunks = tuple(self.moved.get(c.spot, c) for c in shard.chunks)
            newer = replace(shard, chunks=chunks)
            key, data = self.keys.shard(record.id, rank, revision), encode_shard(newer)
            if store.create(key, data) is not Created.OURS:
                return f"{key} is there already"
            entries[rank] = entry_of(newer, key, data)
            packs |= newer.packs
        newer_record = replace(
            record,
            revision=revision,
            write_id=self.write_id,
            shards=tuple(entries),
            packs=tuple(sorted(packs)),
            first_modified_s=self.seen.committed_s,
        )
        return self._commit(place, newer_record)

    def _commit(self, place: str, record: StoredSnapshot) -> str:
        store, began_s = self.means.store, self.means.monotonic_s()
        key = self.keys.intent(self.write_id)
        condemned = read_condemned(store, self.keys)
        there = {self.keys.pack_name(info.key) for info in store.list(self.keys.packs)}
        known = BeforeCommit(
            keys=self.keys,
            intent_key=key,
            intent_is_there=any(info.key == key for info in store.list(self.keys.intents)),
            condemned=condemned,
            shard_keys=[entry.key for entry in record.shards],
            packs=record.packs,
            packs_there={name for name in there if name is not None},
            age_s=self.means.monotonic_s() - began_s,
        )
        go, reason = check_before_commit(known, round_s=self.rules.round_s)
        if go is not Go.COMMIT:
            return reason
        self.means.point("daemon.gc.rewrite.before")
        created = store.create(place, encode_snapshot(record))
        return "" if created is Created.OURS else f"{place} is there already"

    # packs

    def _move(self, chunks: Sequence[StoredChunk], condemned: Collection[str]) -> None:
        """Copy the chunks that were not copied before into new packs."""
        wants: dict[Spot, StoredChunk] = {}
        for chunk in chunks:
            spot = chunk.spot
            known = self.moved.get(spot)
            if known is None or self.keys.pack(known.pack) in condemned:
                wants[spot] = chunk
        lost = [Want(index, chunk) for index, chunk in enumerate(wants.values())]
        runs = plan_runs(lost, direct_bytes=RUN_BYTES)  # they go through a buffer in any case
        writer = _PackWriter(self)
        try:
            for chunk, stored in self._read(runs):
                self.moved[chunk.spot] = writer.add(chunk, stored)
                self._beat(self.rules.intent_ttl_s / 4)
            writer.finish()
        except BaseException:
            writer.abort()
            raise

    def _read(self, runs: Sequence[Run]) -> Iterator[tuple[StoredChunk, memoryview]]:
        """The stored bytes of each chunk, checked; valid until the next is asked for."""
        decoder = ChunkDecoder()
        for run in runs:
            self.means.take(run.nbytes)
            buffer = memoryview(bytearray(run.nbytes))
            self.means.store.read_into(self.keys.pack(run.pack), run.offset, buffer)
            for want in run.wants:
                at = want.chunk.offset - run.offset
                stored = buffer[at : at + want.chunk.stored_nbytes]
                decoder.decode(stored, want.chunk, memoryview(bytearray(want.chunk.nbytes)))
                yield want.chunk, stored


class _PackWriter:
    """New packs of one attempt, one after the other."""

    def __init__(self, attempt: _Attempt) -> None:
        self._attempt = attempt
        self._builder: PackBuilder | None = None
        self._upload: Upload | None = None

    def add(self, chunk: StoredChunk, stored: memoryview) -> StoredChunk:
        if self._builder is not None and not self._builder.has_room(chunk.stored_nbytes):
            self.finish()
        if self._builder is None or self._upload is None:
            attempt = self._attempt
            self._builder = PackBuilder(pack_name(attempt.write_id, attempt.packs))
            attempt.packs += 1
            self._upload = attempt.means.store.upload(attempt.keys.pack(self._builder.name))
            self._upload.write([self._builder.header()])
        self._upload.write([stored])
        return self._builder.add(
            nbytes=chunk.nbytes,
            digest=chunk.digest,
            stored_nbytes=chunk.stored_nbytes,
            encoding=chunk.encoding,
            element_nbytes=chunk.element_nbytes,
        )

    def finish(self) -> None:
        if self._builder is None or self._upload is None:
            return
        self._upload.write([self._builder.footer()])
        self._attempt.done.nbytes += self._upload.commit()
        self._attempt.done.packs += 1
        self._builder = self._upload = None

    def abort(self) -> None:
        if self._upload is not None:
            self._upload.abort()
