"""A collector's passes over a tier in a directory."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash

from snapd.core.condemning import CollectRules
from snapd.core.ids import SnapshotId
from snapd.core.retention import KeepRules
from snapd.core.stored import Intent, Pin, StoredSnapshot
from snapd.core.tier_keys import TierKeys, pack_name
from snapd.errors import IntegrityError
from snapd.store.directory import DirectoryStore
from snapd.tier.collecting import Collector, Pass
from snapd.tier.envelope import DIGEST_BYTES
from snapd.tier.manifests import encode_snapshot
from snapd.tier.notes import encode_intent, encode_pin
from tests.support.shard_builder import ShardBuilder
from tests.support.stored_snapshot import TierWriter, directory_store

JOB = "job"
KEYS = TierKeys(JOB)
ROUND_S = 100.0
RULES = CollectRules(keep=KeepRules(last=1), round_s=ROUND_S, intent_ttl_s=ROUND_S, void_ttl_s=10 * ROUND_S)
ME = "c" * 32


class Tier:
    """A tier whose clock is moved by hand: files are made older."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store: DirectoryStore = directory_store(root)
        self.writer = TierWriter(self.store, JOB)

    def commit(self, step: int, *, is_committed: bool = True) -> StoredSnapshot:
        """Its parameters are those of every snapshot, its moments its own: they share packs."""
        builder = ShardBuilder(job=JOB, step=step)
        builder.region(b"same" * 3000)
        builder.region(f"{step:08d}".encode() * 1500, "moments")
        return self.writer.write_built([builder.build()], is_committed=is_committed)

    def pass_time(self, seconds: float = ROUND_S + 1) -> None:
        for path in self.root.rglob("*"):
            if path.is_file():
                at = path.stat().st_mtime - seconds
                os.utime(path, (at, at))

    def keys(self) -> set[str]:
        return {info.key for info in self.store.list("jobs/")}

    def collector(self, rules: CollectRules = RULES) -> Collector:
        return Collector(self.store, JOB, rules, write_id=ME)

    def collect(self, rules: CollectRules = RULES, rounds: int = 1) -> Pass:
        for number in range(rounds):
            if number:
                self.pass_time()
            done = self.collector(rules).run()
        return done


@pytest.fixture
def tier(tmp_path: Path) -> Tier:
    return Tier(tmp_path / "tier")


def named_by(*records: StoredSnapshot) -> set[str]:
    keys = {KEYS.snapshot(record.id, record.revision) for record in records}
    keys |= {entry.key for record in records for entry in record.shards}
    return keys | {KEYS.pack(pack) for record in records for pack in record.packs}


def test_what_retention_drops_is_gone_a_round_after_it_was_condemned(tier: Tier) -> None:
    old, new = tier.commit(1), tier.commit(2)
    tier.pass_time()
    first = tier.collect()
    assert {item.key for item in first.condemned} == named_by(old) - named_by(new)
    assert named_by(old, new) <= tier.keys() and not first.deleted
    too_early = tier.collect()
    assert not too_early.deleted and not too_early.condemned and too_early.next_s
    tier.pass_time()
    second = tier.collect()
    assert {item.key for item in second.deleted} == named_by(old) - named_by(new)
    assert named_by(new) <= tier.keys()
    assert not (tier.keys() & (named_by(old) - named_by(new)))


def test_in_the_end_there_is_what_commit_records_name_and_nothing_else(tier: Tier) -> None:
    for step in range(1, 6):
        last = tier.commit(step)
    tier.commit(6, is_committed=False)  # its writer is gone, without an intent
    upload = tier.store.upload(KEYS.pack(pack_name("d" * 32, 0)))
    upload.write([b"never finished"])
    tier.store.put(KEYS.intent("e" * 32), encode_intent(Intent(JOB, "e" * 32, "n", SnapshotId(1, 9), ())))
    tier.pass_time()
    done = tier.collect(rounds=20)
    tier.pass_time(3 * ROUND_S)
    tier.collect()
    assert tier.keys() == named_by(last)
    assert list(tier.store.unfinished()) == []
    assert done.is_quiet


def test_a_dry_run_changes_nothing_and_tells_all(tier: Tier) -> None:
    old, new = tier.commit(1), tier.commit(2)
    tier.pass_time()
    before = tier.keys()
    done = tier.collector().run(is_dry=True)
    assert tier.keys() == before
    assert {item.key for item in done.condemned} == named_by(old) - named_by(new)
    verdicts = {verdict.id.step: verdict for verdict in done.judgement.verdicts}
    assert verdicts[2].is_kept and "the newest complete" in verdicts[2].reason
    assert not verdicts[1].is_kept


def test_a_writer_and_its_bases_are_left_alone(tier: Tier) -> None:
    base, newer = tier.commit(1), tier.commit(2)
    uncommitted = tier.commit(3, is_committed=False)
    intent = Intent(JOB, "a" * 32, "n", uncommitted.id, (base.id,))
    tier.pass_time()
    tier.store.put(KEYS.intent("a" * 32), encode_intent(intent))
    for _ in range(4):
        done = tier.collect()
        tier.pass_time()
        tier.store.put(KEYS.intent("a" * 32), encode_intent(replace(intent, beat=1)))
    assert base.id in done.judgement.held
    assert named_by(base) <= tier.keys()
    assert named_by(uncommitted) - {KEYS.snapshot(uncommitted.id)} <= tier.keys()
    tier.store.delete([KEYS.intent("a" * 32)])
    tier.collect(rounds=4)
    gone = named_by(base) | {entry.key for entry in uncommitted.shards}
    assert not tier.keys() & (gone - named_by(newer))


def test_a_writer_without_a_sign_of_life_cannot_commit_any_more(tier: Tier) -> None:
    tier.commit(1)
    lost = tier.commit(2, is_committed=False)
    tier.store.put(KEYS.intent("a" * 32), encode_intent(Intent(JOB, "a" * 32, "n", lost.id, ())))
    tier.pass_time()
    tier.collect(rounds=3)
    left = tier.keys()
    assert KEYS.intent("a" * 32) not in left
    assert KEYS.snapshot(lost.id) in left  # voided, so that it stays free of a late commit
    tier.collect(rounds=4)
    assert not tier.keys() & {entry.key for entry in lost.shards}


def test_a_pin_keeps(tier: Tier) -> None:
    old = tier.commit(1)
    tier.commit(2)
    tier.store.put(KEYS.pin("best"), encode_pin(Pin(JOB, "best", old.id)))
    tier.pass_time()
    done = tier.collect(rounds=3)
    assert named_by(old) <= tier.keys() and not done.condemned
    assert "pinned as best" in {v.id.step: v for v in done.judgement.verdicts}[1].reason


def test_a_pin_in_time_saves_what_is_condemned(tier: Tier) -> None:
    old = tier.commit(1)
    tier.commit(2)
    tier.pass_time()
    assert tier.collect().condemned
    tier.store.put(KEYS.pin("best"), encode_pin(Pin(JOB, "best", old.id)))
    tier.pass_time()
    assert not tier.collect().deleted
    assert named_by(old) <= tier.keys()


def flip(path: Path, at: int = 60) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def damage_pin(tier: Tier) -> None:
    tier.store.put(KEYS.pin("best"), encode_pin(Pin(JOB, "best", SnapshotId(1, 1))))
    flip(tier.root / KEYS.pin("best"), 30)


def version(tier: Tier) -> None:
    path = tier.root / KEYS.snapshot(SnapshotId(1, 2))
    data = bytearray(path.read_bytes()[:-DIGEST_BYTES])
    struct.pack_into("<I", data, 12, 99)
    path.write_bytes(bytes(data) + xxhash.xxh3_128_digest(bytes(data)))


@pytest.mark.parametrize("damage", [damage_pin, version])
def test_what_cannot_be_understood_stops_the_pass(tier: Tier, damage: Callable[[Tier], None]) -> None:
    tier.commit(1)
    tier.commit(2)
    damage(tier)
    tier.pass_time()
    before = tier.keys()
    with pytest.raises(IntegrityError):
        tier.collect()
    assert tier.keys() == before


def test_a_damaged_record_takes_nothing_with_it(tier: Tier) -> None:
    one, two, three = (tier.commit(step) for step in (1, 2, 3))
    flip(tier.root / KEYS.snapshot(three.id))
    tier.pass_time()
    done = tier.collect(rounds=3)
    assert named_by(two, three) <= tier.keys()  # the newest complete, and what may yet be looked into
    assert not tier.keys() & (named_by(one) - named_by(two, three))
    assert any(KEYS.snapshot(three.id) in problem for problem in done.judgement.problems)


def test_a_snapshot_that_lacks_a_pack_does_not_count(tier: Tier) -> None:
    one, two = tier.commit(1), tier.commit(2)
    lost = next(pack for pack in two.packs if pack not in one.packs)
    tier.store.delete([KEYS.pack(lost)])
    tier.pass_time()
    done = tier.collect(rounds=3)
    assert named_by(one) <= tier.keys()
    verdicts = {verdict.id.step: verdict for verdict in done.judgement.verdicts}
    assert "the newest complete" in verdicts[1].reason and "missing" in verdicts[2].reason


def test_a_commit_that_comes_between_look_and_void_ends_the_pass(tier: Tier) -> None:
    tier.commit(1)
    late = tier.commit(2, is_committed=False)
    tier.pass_time()
    tier.collect()
    tier.pass_time()
    arrived = []

    def arrive(name: str) -> None:
        if name == "daemon.gc.look.after":
            tier.writer.seed = 77
            arrived.append(tier.store.create(KEYS.snapshot(late.id), _encoded(late)))

    collector = Collector(tier.store, JOB, RULES, write_id=ME, point=arrive)
    done = collector.run()
    assert arrived and "was committed meanwhile" in done.ended_early
    assert not done.deleted and named_by(late) <= tier.keys()
    tier.collect(rounds=3)
    assert named_by(late) <= tier.keys()


def _encoded(record: StoredSnapshot) -> bytes:
    return encode_snapshot(record)


def test_a_killed_pass_is_taken_up_by_the_next(tier: Tier) -> None:
    """Killed at every point of the pass that deletes: what is visible stays whole, and the next passes end it."""
    names = (
        "look.after",
        "void.after",
        "record.before",
        "manifest.before",
        "pack.before",
        "list.before",
        "list.after",
    )
    hit = set()

    class Killed(Exception):
        pass

    for number, name in enumerate(names):
        tier.commit(10 * number + 1)
        last = tier.commit(10 * number + 2)
        tier.pass_time()
        for _ in range(3):

            def kill(at: str, name: str = name) -> None:
                if at == f"daemon.gc.{name}":
                    hit.add(name)
                    raise Killed

            try:
                Collector(tier.store, JOB, RULES, write_id=ME, point=kill).run()
            except Killed:
                assert named_by(last) <= tier.keys()
            tier.pass_time()
        tier.collect(rounds=20)
        assert tier.keys() == named_by(last)
    assert hit == set(names)


def test_requests_are_counted(tier: Tier) -> None:
    tier.commit(1)
    before = time.monotonic()
    done = tier.collect()
    assert 5 <= done.requests <= 20 and time.monotonic() >= before
