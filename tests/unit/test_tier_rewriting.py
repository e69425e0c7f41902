"""Packs of which little is alive are rewritten, and everything can be read before, meanwhile and after."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import xxhash

from snapd.codec.compress import ChunkDecoder
from snapd.core.condemning import CollectRules
from snapd.core.repacking import STORED_PER_LIVE_MAX, PackUse, choose_packs
from snapd.core.retention import KeepRules
from snapd.core.stored import StoredSnapshot
from snapd.core.tier_keys import TierKeys
from snapd.store.base import Store
from snapd.tier.collecting import Collector
from snapd.tier.known_chunks import committed_snapshots, newest_good
from snapd.tier.rewriting import RewriteMeans, Rewriter, read_shard
from tests.support.shard_builder import ShardBuilder
from tests.support.stored_snapshot import TierWriter, directory_store

JOB = "job"
KEYS = TierKeys(JOB)
RULES = CollectRules(keep=KeepRules(last=2), round_s=100.0, intent_ttl_s=100.0, void_ttl_s=1000.0)
REGIONS = 40


class Tier:
    """Of each snapshot one region in ten is new: after many snapshots old packs hold little that is alive."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = directory_store(root)
        self.writer = TierWriter(self.store, JOB, pack_chunks_max=1 << 20)
        self.numbers = iter(range(10_000))
        self.values = [0] * REGIONS
        collector = Collector(self.store, JOB, RULES, write_id="c" * 32)
        self.collector = collector
        self.drawn = 0
        means = RewriteMeans(
            store=self.store, random_token=self.token, wall_s=time.time, monotonic_s=time.monotonic
        )
        self.rewriter = Rewriter(means, JOB, RULES)

    def token(self) -> str:
        self.drawn += 1
        return f"{0xABC000 + self.drawn:032x}"

    def commit(self, step: int) -> StoredSnapshot:
        for index in range(step % 10, REGIONS, 10):
            self.values[index] = 1000 * step + index
        builder = ShardBuilder(job=JOB, step=step)
        for value in self.values:
            builder.region(f"{value:08d}".encode() * 500, f"range {value}")
        return self.writer.write_built([builder.build()])

    def pass_time(self) -> None:
        for path in self.root.rglob("*"):
            if path.is_file():
                os.utime(path, (path.stat().st_mtime - 101, path.stat().st_mtime - 101))

    def collect(self, rounds: int = 3) -> None:
        for _ in range(rounds):
            self.pass_time()
            self.collector.run()

    def stored_nbytes(self) -> int:
        return sum(info.nbytes for info in self.store.list(KEYS.packs))


def chunks_of(store: Store, record: StoredSnapshot) -> list[bytes]:
    """All chunks of all shards, read from their packs and checked."""
    found = []
    for entry in record.shards:
        for chunk in read_shard(store, record, entry).chunks:
            stored = memoryview(bytearray(chunk.stored_nbytes))
            store.read_into(KEYS.pack(chunk.pack), chunk.offset, stored)
            raw = memoryview(bytearray(chunk.nbytes))
            ChunkDecoder().decode(stored, chunk, raw)
            found.append(xxhash.xxh3_128_digest(raw))
    return found


def live_nbytes(store: Store, records: list[StoredSnapshot]) -> int:
    places = {
        chunk.spot: chunk.stored_nbytes
        for record in records
        for entry in record.shards
        for chunk in read_shard(store, record, entry).chunks
    }
    return sum(places.values())


def records_of(store: Store) -> list[StoredSnapshot]:
    committed = committed_snapshots(store, KEYS)
    found = [newest_good(store, KEYS, {name: revisions}) for name, revisions in committed.items()]
    return sorted((record for record in found if record is not None), key=lambda record: record.id)


@pytest.fixture
def tier(tmp_path: Path) -> Tier:
    tier = Tier(tmp_path / "tier")
    for step in range(1, 15):
        tier.commit(step)
    tier.collect()
    return tier


def test_after_rewriting_little_is_stored_that_is_not_alive(tier: Tier) -> None:
    before = records_of(tier.store)
    contents = [chunks_of(tier.store, record) for record in before]
    assert tier.stored_nbytes() > STORED_PER_LIVE_MAX * live_nbytes(
        tier.store, before
    )  # else nothing is shown
    done = tier.collector.run()
    rewritten = tier.rewriter.run(done.sight, done.judgement)
    assert rewritten.snapshots and not rewritten.problems and rewritten.packs
    meanwhile = records_of(tier.store)
    assert [chunks_of(tier.store, record) for record in meanwhile] == contents
    assert [
        chunks_of(tier.store, record) for record in before
    ] == contents  # the old ones are there for a round
    tier.collect()
    after = records_of(tier.store)
    assert [record.id for record in after] == [record.id for record in before]
    assert all(record.revision == 1 for record in after)
    assert [chunks_of(tier.store, record) for record in after] == contents
    assert tier.stored_nbytes() <= STORED_PER_LIVE_MAX * live_nbytes(tier.store, after)
    again = tier.collector.run()
    assert not tier.rewriter.run(again.sight, again.judgement).plan.packs
    assert again.is_quiet


def test_a_rewritten_snapshot_keeps_its_age(tier: Tier) -> None:
    done = tier.collector.run()
    times = {seen.snapshot: seen.committed_s for seen in done.sight.records}
    tier.rewriter.run(done.sight, done.judgement)
    tier.pass_time()
    later = tier.collector.run()
    for snapshot, seen in later.judgement.current.items():
        assert seen.revision == 1
        assert seen.committed_s == pytest.approx(times[snapshot], abs=1e-3)


def test_a_damaged_chunk_is_not_copied_as_if_it_were_good(tier: Tier) -> None:
    done = tier.collector.run()
    plan = tier.rewriter.plan(done.sight, done.judgement)
    for name in plan.packs:
        path = tier.root / KEYS.pack(name)
        data = bytearray(path.read_bytes())
        data[64:-200:97] = bytes(b ^ 1 for b in data[64:-200:97])
        path.write_bytes(data)
    rewritten = tier.rewriter.run(done.sight, done.judgement)
    assert not rewritten.snapshots and rewritten.problems
    assert all(record.revision == 0 for record in records_of(tier.store))
    assert not list(tier.store.list(KEYS.intents))


def test_a_rewriter_that_comes_second_changes_nothing(tier: Tier) -> None:
    done = tier.collector.run()
    first = records_of(tier.store)
    tier.rewriter.run(done.sight, done.judgement)
    means = RewriteMeans(
        store=tier.store, random_token=tier.token, wall_s=time.time, monotonic_s=time.monotonic
    )
    second = Rewriter(means, JOB, RULES).run(done.sight, done.judgement)
    assert not second.snapshots and "is there already" in second.problems[0]
    tier.collect()
    assert [chunks_of(tier.store, record) for record in records_of(tier.store)]
    assert len(first) == len(records_of(tier.store))


def test_nothing_is_rewritten_of_what_is_condemned(tier: Tier) -> None:
    done = tier.collector.run()
    plan = tier.rewriter.plan(done.sight, done.judgement)
    tier.pass_time()
    for step in (15, 16):
        tier.commit(step)
    tier.pass_time()
    tier.collector.run()  # condemns what was the newest when `done` was
    rewritten = tier.rewriter.run(done.sight, done.judgement)
    assert plan.packs and not rewritten.snapshots
    assert any("condemned" in problem for problem in rewritten.problems)


def test_which_packs() -> None:
    assert choose_packs({}).packs == frozenset()
    full = {"a": PackUse(100, 100), "b": PackUse(100, 90)}
    assert choose_packs(full).packs == frozenset()
    assert choose_packs({**full, "c": PackUse(100, 24)}).packs == {"c"}
    half = {name: PackUse(100, 50) for name in "abcd"}
    chosen = choose_packs(half)
    stored = 400 - 50 * len(chosen.packs)
    assert stored <= STORED_PER_LIVE_MAX * 200 < stored + 50  # as few as that takes
    assert choose_packs({"a": PackUse(100, 0), "b": PackUse(100, 100)}).packs == {"a"}


def test_what_a_killed_rewriter_left_is_no_obstacle(tier: Tier) -> None:
    class Killed(Exception):
        pass

    def kill(name: str) -> None:
        raise Killed

    before = records_of(tier.store)
    contents = [chunks_of(tier.store, record) for record in before]
    done = tier.collector.run()
    means = RewriteMeans(
        store=tier.store,
        random_token=tier.token,
        wall_s=time.time,
        monotonic_s=time.monotonic,
        point=kill,
    )
    with pytest.raises(Killed):
        Rewriter(means, JOB, RULES).run(done.sight, done.judgement)
    assert list(tier.store.list(KEYS.intents))  # as after kill -9
    done = tier.collector.run()
    rewritten = tier.rewriter.run(done.sight, done.judgement)
    assert rewritten.snapshots and not rewritten.problems
    tier.collect(8)
    after = records_of(tier.store)
    assert [chunks_of(tier.store, record) for record in after] == contents
    assert tier.stored_nbytes() <= STORED_PER_LIVE_MAX * live_nbytes(tier.store, after)
    named = {entry.key for record in after for entry in record.shards}
    assert {info.key for info in tier.store.list(KEYS.shards)} == named
