"""Flushing into a store: what is written, in which order, what a failed attempt leaves, and how races end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd.codec.compress import Mode
from snapd.core.ids import SnapshotId
from snapd.core.stored import Condemned, Encoding, Intent, VoidRecord
from snapd.core.tier_keys import TierKeys
from snapd.errors import ConflictError, IntegrityError, UnavailableError
from snapd.store.directory import DirectoryStore
from snapd.store.faulty import Effect, Fault, FaultyStore
from snapd.tier.flush import Stage
from snapd.tier.intents import WriterIntent, read_condemned
from snapd.tier.known_chunks import KnownChunks, read_record
from snapd.tier.notes import decode_intent, encode_condemned, encode_void
from snapd.tier.writing import Stopped, plan_packs
from tests.support.flush_parts import CHUNK, Writers, contents_of, flush, shard
from tests.support.flush_scene import intents, orphans, read_tier, shards_of, unfinished
from tests.support.stores import directory_store

KEYS = TierKeys("a")
ONE = SnapshotId(1, 1)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return directory_store(tmp_path / "tier")


@pytest.fixture
def writers() -> Iterator[Writers]:
    made = Writers()
    yield made
    made.close()


def raw(step: int, rank: int = 0) -> list[bytes]:
    built = shard(contents_of(step, rank=rank), step=step, rank=rank)
    return [bytes(frame) for frame in built.memory.frames]  # type: ignore[attr-defined]


# packs


def test_the_plan_follows_from_the_shards_and_from_what_is_known() -> None:
    records = [shard(contents_of(1, rank=rank), rank=rank, world_size=2).record for rank in range(2)]
    plan = plan_packs(records, KnownChunks(), first_number=7, pack_nbytes=3 * CHUNK)
    assert [pack.number for pack in plan.packs] == [7, 8, 9, 10]
    assert [(p.shard, p.index) for p in plan.packs[0].chunks] == [(0, 0), (0, 1), (0, 2)]
    assert plan.reused_nbytes == 2 * CHUNK  # the frozen chunks of the second rank
    assert plan.last_pack == (2, 3)
    assert plan == plan_packs(records, KnownChunks(), first_number=7, pack_nbytes=3 * CHUNK)


def test_a_shard_whose_chunks_another_shard_has_waits_for_that_one_s_packs() -> None:
    records = [shard(contents_of(1), rank=0, world_size=2).record for _ in range(2)]
    plan = plan_packs(records, KnownChunks(), first_number=0, pack_nbytes=4 * CHUNK)
    assert plan.last_pack == (1, 1)
    assert sum(len(pack.chunks) for pack in plan.packs) == len(records[0].chunks)


def test_everything_is_written_and_read_back(store: DirectoryStore, writers: Writers) -> None:
    done = flush(writers.make(store), [shard(contents_of(1))])
    assert done.is_ours
    assert read_tier(store, "a") == {ONE: [raw(1)]}
    assert (intents(store, "a"), orphans(store, "a"), unfinished(store)) == ([], set(), [])


def test_unchanged_chunks_are_stored_once(store: DirectoryStore, writers: Writers) -> None:
    writer = writers.make(store)
    flush(writer, [shard(contents_of(1))])
    done = flush(writer, [shard(contents_of(2), step=2)])
    assert done.counts.chunks == 4
    assert done.reused_nbytes == 2 * CHUNK + len(raw(2)[0])
    assert read_tier(store, "a")[SnapshotId(1, 2)] == [raw(2)]


def test_replicated_chunks_are_stored_once(store: DirectoryStore, writers: Writers) -> None:
    same = contents_of(1)
    shards = [shard(same, rank=rank, world_size=2) for rank in range(2)]
    done = flush(writers.make(store), shards, world_size=2)
    assert done.counts.chunks == len(same) + 2  # and a layout for each rank


def test_what_does_not_shrink_is_stored_as_it_is_and_the_rest_is_compressed(store: DirectoryStore) -> None:
    writers = Writers(mode=Mode.ALWAYS)
    noise, zeros = contents_of(1, changed=1, frozen=0)[0], bytes(CHUNK)
    flush(writers.make(store), [shard([noise, zeros])])
    (stored,) = shards_of(store, read_record(store, KEYS, ONE, 0))
    assert [chunk.encoding for chunk in stored.chunks[1:]] == [Encoding.RAW, Encoding.ZSTD]
    assert read_tier(store, "a")[ONE][0][1:] == [noise, zeros]
    writers.close()


def test_a_changed_byte_in_memory_is_found_before_anything_appears(
    store: DirectoryStore, writers: Writers
) -> None:
    bad = shard(contents_of(1))
    bad.memory.frames[3][5] ^= 1  # type: ignore[attr-defined]
    with pytest.raises(IntegrityError, match="rank 0 chunk 3 of 1/1") as caught:
        flush(writers.make(store), [bad])
    assert caught.value.kind == "chunk_digest"
    assert (list(store.list(KEYS.packs)), unfinished(store)) == ([], [])


# failed attempts


@pytest.mark.parametrize(
    "call", ["put", "list", "read", "upload", "write", "commit", "create", "head", "delete"]
)
@pytest.mark.parametrize("skip", range(3))
def test_a_store_that_fails_once_anywhere_costs_an_attempt(
    store: DirectoryStore, writers: Writers, call: str, skip: int
) -> None:
    flush(writers.make(store), [shard(contents_of(1))])
    faulty = FaultyStore(store, [Fault(call, Effect.REFUSE, skip=skip)])
    writer = writers.make(faulty)
    attempts = 0
    while True:
        attempts += 1
        try:
            flush(writer, [shard(contents_of(2), step=2)])
            break
        except UnavailableError:
            assert attempts < 3
    assert attempts == 1 + len(faulty.struck)
    assert read_tier(store, "a")[SnapshotId(1, 2)] == [raw(2)]
    assert (intents(store, "a"), unfinished(store)) == ([], [])


def test_packs_of_a_failed_attempt_are_not_written_again(store: DirectoryStore, writers: Writers) -> None:
    faulty = FaultyStore(store, [Fault("create", Effect.REFUSE, prefix=KEYS.shards)])
    writer = writers.make(faulty)
    with pytest.raises(UnavailableError):
        flush(writer, [shard(contents_of(1))])
    there = {info.key for info in store.list(KEYS.packs)}
    assert len(intents(store, "a")) == 1, "its packs are protected meanwhile"
    done = flush(writer, [shard(contents_of(1))])
    assert done.counts.chunks == 0
    assert {info.key for info in store.list(KEYS.packs)} == there


def test_shards_of_a_daemon_that_was_killed_are_found(store: DirectoryStore, writers: Writers) -> None:
    def killed() -> None:
        raise KeyboardInterrupt

    writers.at["daemon.flush.commit.before"] = killed
    with pytest.raises(KeyboardInterrupt):
        flush(writers.make(store), [shard(contents_of(1))])
    assert read_tier(store, "a") == {}
    done = flush(writers.make(store), [shard(contents_of(1))])
    assert (done.shards_resumed, done.counts.packs) == (1, 0)
    assert read_tier(store, "a") == {ONE: [raw(1)]}


def test_packs_of_a_daemon_that_was_killed_are_used_again(store: DirectoryStore, writers: Writers) -> None:
    def killed() -> None:
        raise KeyboardInterrupt

    writers.at["daemon.flush.manifest.before"] = killed
    with pytest.raises(KeyboardInterrupt):
        flush(writers.make(store, node="n1"), [shard(contents_of(1))])
    there = {info.key for info in store.list(KEYS.packs)}
    assert len(intents(store, "a")) == 1
    stranger = flush(writers.make(store, node="n2"), [shard(contents_of(7), step=7)])
    assert stranger.counts.chunks == 7 and len(intents(store, "a")) == 1, "only one's own are taken"
    done = flush(writers.make(store, node="n1"), [shard(contents_of(8)[:2] + contents_of(1)[2:], step=8)])
    assert done.counts.chunks == 2
    assert {KEYS.pack_name(key) for key in there} & set(done.snapshot.packs)
    assert read_tier(store, "a")[SnapshotId(1, 8)][0][1:] == contents_of(8)[:2] + contents_of(1)[2:]
    assert intents(store, "a") == []


@pytest.mark.parametrize("prefix", [KEYS.shards, KEYS.snapshots])
def test_an_answer_that_is_lost_is_settled_by_another_attempt(
    store: DirectoryStore, writers: Writers, prefix: str
) -> None:
    faulty = FaultyStore(store, [Fault("create", Effect.LOSE_ANSWER, prefix=prefix)])
    writer = writers.make(faulty)
    with pytest.raises(UnavailableError):
        flush(writer, [shard(contents_of(1))])
    done = flush(writer, [shard(contents_of(1))])
    assert done.snapshot.id == ONE
    assert read_tier(store, "a") == {ONE: [raw(1)]}
    assert intents(store, "a") == []


def test_stopping_leaves_no_upload_behind(store: DirectoryStore, writers: Writers) -> None:
    stop = threading.Event()
    writers.at["daemon.flush.pack.before"] = stop.set
    with pytest.raises(Stopped):
        flush(writers.make(store), [shard(contents_of(1))], stop=stop)
    assert (unfinished(store), read_tier(store, "a")) == ([], {})


# races


def test_two_writers_of_the_same_snapshot_both_succeed(store: DirectoryStore, writers: Writers) -> None:
    other = Writers()

    def overtake() -> None:
        assert flush(other.make(store), [shard(contents_of(1))]).is_ours

    writers.at["daemon.flush.commit.before"] = overtake
    done = flush(writers.make(store), [shard(contents_of(1))])
    assert not done.is_ours
    assert read_tier(store, "a") == {ONE: [raw(1)]}
    other.close()


def test_another_snapshot_of_the_same_name_is_refused_and_both_writers_are_named(
    store: DirectoryStore, writers: Writers
) -> None:
    first, second = writers.make(store), writers.make(store)
    theirs = first.write_id
    flush(first, [shard(contents_of(1))])
    with pytest.raises(ConflictError, match=theirs) as caught:
        flush(second, [shard(contents_of(9))])
    assert caught.value.kind == "tier_conflict"
    assert second.write_id in caught.value.message
    assert read_tier(store, "a") == {ONE: [raw(1)]}


def test_the_last_node_commits_and_the_first_waits_for_it(store: DirectoryStore, writers: Writers) -> None:
    stage, done = Stage(), []
    first = threading.Thread(
        target=lambda: done.append(
            flush(writers.make(store), [shard(contents_of(1), world_size=2)], world_size=2, stage=stage)
        )
    )
    other = Writers()
    first.start()
    while not stage.is_waiting and first.is_alive():
        first.join(0.01)
    assert stage.text == "waits for the shards of ranks 1"
    second = flush(other.make(store), [shard(contents_of(1, rank=1), rank=1, world_size=2)], world_size=2)
    first.join(20)
    assert second.is_ours and [each.is_ours for each in done] == [False]
    assert len(read_tier(store, "a")[ONE]) == 2
    other.close()


# collectors


def condemn(store: DirectoryStore, *keys: str) -> None:
    listed = Condemned("a", 1, "c" * 32, tuple(keys))
    store.put(KEYS.condemned_round(1), encode_condemned(listed))


def test_condemned_packs_are_not_used_again(store: DirectoryStore, writers: Writers) -> None:
    flush(writers.make(store), [shard(contents_of(1))])
    (old,) = (info.key for info in store.list(KEYS.packs))
    condemn(store, old)
    done = flush(writers.make(store), [shard(contents_of(2), step=2)])
    assert done.reused_nbytes == 0
    assert KEYS.pack_name(old) not in done.snapshot.packs


def test_chunks_of_a_pack_that_was_lost_are_written_again(store: DirectoryStore, writers: Writers) -> None:
    flush(writers.make(store), [shard(contents_of(1))])
    (old,) = (info.key for info in store.list(KEYS.packs))
    store.delete([old])
    done = flush(writers.make(store), [shard(contents_of(2), step=2)])
    assert done.reused_nbytes == 0
    assert KEYS.pack_name(old) not in done.snapshot.packs


def test_a_writer_whose_intent_is_condemned_starts_over(store: DirectoryStore, writers: Writers) -> None:
    writer = writers.make(store)
    given_up = writer.write_id
    writers.at["daemon.flush.commit.before"] = lambda: None
    writers.at["daemon.flush.manifest.before"] = lambda: condemn(store, KEYS.intent(given_up))
    with pytest.raises(UnavailableError) as caught:
        flush(writer, [shard(contents_of(1))])
    assert caught.value.kind == "tier_condemned"
    assert writer.write_id != given_up
    assert read_condemned(store, KEYS) == {KEYS.intent(given_up)}
    assert read_tier(store, "a") == {}


def test_a_manifest_that_is_condemned_is_not_committed(store: DirectoryStore, writers: Writers) -> None:
    writers.at["daemon.flush.manifest.after"] = lambda: condemn(store, KEYS.shard(ONE, 0))
    with pytest.raises(UnavailableError) as caught:
        flush(writers.make(store), [shard(contents_of(1))])
    assert caught.value.kind == "tier_condemned"
    assert read_tier(store, "a") == {}


def void(store: DirectoryStore, revision: int, *, is_dropped: bool) -> None:
    record = VoidRecord("a", ONE, revision, is_dropped, "c" * 32)
    store.create(KEYS.snapshot(ONE, revision), encode_void(record))


def test_an_attempt_that_was_given_up_is_made_again_as_the_next_revision(
    store: DirectoryStore, writers: Writers
) -> None:
    writers.at["daemon.flush.commit.before"] = lambda: void(store, 0, is_dropped=False)
    writer = writers.make(store)
    with pytest.raises(UnavailableError) as caught:
        flush(writer, [shard(contents_of(1))])
    assert caught.value.kind == "tier_condemned"
    done = flush(writer, [shard(contents_of(1))])
    assert (done.snapshot.revision, done.is_ours) == (1, True)
    assert read_tier(store, "a") == {ONE: [raw(1)]}


def test_a_snapshot_that_retention_has_dropped_stays_dropped(store: DirectoryStore, writers: Writers) -> None:
    void(store, 3, is_dropped=True)
    with pytest.raises(IntegrityError) as caught:
        flush(writers.make(store), [shard(contents_of(1))])
    assert caught.value.kind == "tier_void"
    assert intents(store, "a") == []


def test_the_intent_is_put_again_in_time(store: DirectoryStore, writers: Writers) -> None:
    intent = WriterIntent(
        store,
        KEYS,
        Intent("a", "d" * 32, "test", SnapshotId(0, 0), ()),
        ttl_s=40.0,
        monotonic_s=writers.clock,
    )
    intent.beat()
    assert intents(store, "a") == []  # nothing was published yet
    intent.publish(ONE, [SnapshotId(1, 0)], 2)

    def there() -> Intent:
        return decode_intent(store.read(intent.key, max_nbytes=1 << 16), key=intent.key, job="a")

    assert (there().beat, there().bases, there().revision) == (1, (SnapshotId(1, 0),), 2)
    writers.clock.ahead_s += 9.0
    intent.beat()
    assert there().beat == 1
    writers.clock.ahead_s += 2.0
    intent.beat()
    assert there().beat == 2
