"""Reading a tier: what is whole is read to its last byte, what is not is named, and a collector may work meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from snapd.core.ids import SnapshotId
from snapd.core.stored import Encoding, StoredChunk, VoidRecord
from snapd.core.tier_keys import TierKeys
from snapd.errors import UnavailableError
from snapd.store.base import ObjectInfo, Store
from snapd.store.directory import DirectoryStore
from snapd.tier import envelope
from snapd.tier.envelope import Kind, unwrap, wrap
from snapd.tier.notes import encode_void
from snapd.tier.reading import Broken, Opened, TierReader, jobs_of
from snapd.tier.shard_bytes import BatchReader, StoredShardBytes
from snapd.tier.streaming import DIRECT_FAR_BYTES, GAP_BYTES, RUN_BYTES, Fault, ReadPool, Want, plan_runs
from snapd.units import MIB
from tests.support.shard_builder import BuiltShard
from tests.support.stored_snapshot import TierWriter, build_world, directory_store, flip_bit

KEYS = TierKeys("job")


class Tier:
    """Three snapshots of two ranks, steps 10, 20, 30."""

    def __init__(self, root: Path, mode: str = "off") -> None:
        self.root = root
        self.store = directory_store(root)
        self.pool = ReadPool(threads=3)
        self.reader = TierReader(self.store, "job", self.pool)
        self.writer = TierWriter(self.store, mode=mode, pack_chunks_max=5)
        self.worlds = {step: build_world(step=step) for step in (10, 20, 30)}
        self.records = {step: self.writer.write_built(world) for step, world in self.worlds.items()}

    def opened(self, step: int) -> Opened:
        opened = self.reader.find(SnapshotId(1, step), None)
        assert isinstance(opened, Opened), opened
        return opened

    def broken(self, step: int) -> str:
        opened = self.reader.find(SnapshotId(1, step), None)
        assert isinstance(opened, Broken)
        return opened.reason

    def read(self, step: int, rank: int) -> tuple[list[bytearray], list[tuple[int, Fault, str]]]:
        shard = self.opened(step).shards[rank]
        out = [bytearray(chunk.nbytes) for chunk in shard.chunks]
        misses = self.reader.read(shard, range(len(out)), lambda i: memoryview(out[i]))
        return out, [(miss.index, miss.fault, miss.what) for miss in misses]


@pytest.fixture(params=["off", "always"])
def tier(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Tier]:
    made = Tier(tmp_path / "tier", request.param)
    yield made
    made.pool.close()


def chunks_of(shard: BuiltShard) -> list[bytes]:
    return [shard.chunk(index) for index in range(len(shard.record.chunks))]


def test_all_is_listed_newest_first_and_read_to_its_last_byte(tier: Tier) -> None:
    assert jobs_of(tier.store) == ["job"]
    assert [c.id.step for c in tier.reader.candidates()] == [30, 20, 10]
    for step, world in tier.worlds.items():
        for rank, built in enumerate(world):
            out, missed = tier.read(step, rank)
            assert missed == []
            assert [bytes(piece) for piece in out] == chunks_of(built)


def test_a_shard_is_a_byte_string_for_exports(tier: Tier) -> None:
    shard = tier.opened(30).shards[1]
    with BatchReader(tier.reader) as batches:
        found = StoredShardBytes(batches, shard).read(0, shard.nbytes)
    assert found == b"".join(chunks_of(tier.worlds[30][1]))


def test_a_flipped_bit_is_named_by_object_and_byte_and_nothing_else_is_lost(tier: Tier) -> None:
    chunk = tier.opened(30).shards[1].chunks[3]
    flip_bit(tier.root, KEYS.pack(chunk.pack), chunk.offset + chunk.stored_nbytes // 2)
    out, missed = tier.read(30, 1)
    assert [(index, fault) for index, fault, _ in missed] == [(3, Fault.BAD)]
    assert KEYS.pack(chunk.pack) in missed[0][2] and f"byte {chunk.offset}" in missed[0][2]
    good = chunks_of(tier.worlds[30][1])
    assert all(bytes(out[i]) == good[i] for i in range(len(out)) if i != 3)


def test_a_pack_that_is_cut_off_loses_only_what_lay_behind(tier: Tier) -> None:
    shard = tier.opened(30).shards[0]
    pack = shard.chunks[2].pack
    inside = sorted((c.offset, i) for i, c in enumerate(shard.chunks) if c.pack == pack)
    path = tier.root / KEYS.pack(pack)
    path.chmod(0o600)
    offset, first_lost = inside[len(inside) // 2]
    path.write_bytes(path.read_bytes()[: offset + 10])
    _, missed = tier.read(30, 0)
    lost = {i for o, i in inside if o >= offset}
    assert {index for index, _, _ in missed} == lost and first_lost in lost
    assert all(fault is Fault.BAD for _, fault, _ in missed)


def test_a_pack_that_is_gone(tier: Tier) -> None:
    shard = tier.opened(30).shards[0]
    pack = shard.chunks[2].pack
    (tier.root / KEYS.pack(pack)).unlink()
    _, missed = tier.read(30, 0)
    assert {index for index, _, _ in missed} == {i for i, c in enumerate(shard.chunks) if c.pack == pack}
    assert all(fault is Fault.GONE for _, fault, _ in missed)


def test_a_pack_that_was_rewritten_while_it_was_read(tier: Tier) -> None:
    """The reader holds manifests of revision 0; revision 1 lies elsewhere, and the old packs are gone."""
    shard = tier.opened(30).shards[0]
    tier.writer.known.clear()
    tier.writer.write_built(tier.worlds[30], revision=1)
    for pack in shard.packs:
        (tier.root / KEYS.pack(pack)).unlink()
    out = [bytearray(chunk.nbytes) for chunk in shard.chunks]
    told: list[Fault] = []
    misses = tier.reader.read(
        shard, range(len(out)), lambda i: memoryview(out[i]), told=lambda miss: told.append(miss.fault)
    )
    assert misses == [] and set(told) == {Fault.GONE}
    assert [bytes(piece) for piece in out] == chunks_of(tier.worlds[30][0])


def test_the_highest_revision_that_is_good_counts(tier: Tier) -> None:
    tier.writer.write_built(tier.worlds[30], revision=1)
    assert tier.opened(30).record.revision == 1
    flip_bit(tier.root, KEYS.shard(SnapshotId(1, 30), 0, 1), 70)
    opened = tier.opened(30)
    assert opened.record.revision == 0
    assert KEYS.shard(SnapshotId(1, 30), 0, 1) in opened.passed_over


@pytest.mark.parametrize("offset", [0, 9, 13, 30, -1])
def test_a_damaged_commit_record_is_named(tier: Tier, offset: int) -> None:
    key = KEYS.snapshot(SnapshotId(1, 30))
    flip_bit(tier.root, key, offset)
    assert key in tier.broken(30)
    assert tier.opened(20).id.step == 20


def test_a_version_from_the_future_is_told_from_damage(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    key = KEYS.snapshot(SnapshotId(1, 30))
    payload = bytes(unwrap(Kind.SNAPSHOT, (tier.root / key).read_bytes(), key))
    monkeypatch.setattr(envelope, "FORMAT_VERSION", 2)
    newer = wrap(Kind.SNAPSHOT, payload)
    monkeypatch.undo()
    (tier.root / key).chmod(0o600)
    (tier.root / key).write_bytes(newer)
    assert key in tier.broken(30) and "format 2" in tier.broken(30)


def test_a_shard_manifest_of_another_job_is_refused(tier: Tier) -> None:
    other = TierWriter(tier.store, job="other")
    other.write_built(build_world(job="other", step=30))
    source = (tier.root / TierKeys("other").shard(SnapshotId(1, 30), 0)).read_bytes()
    target = tier.root / KEYS.shard(SnapshotId(1, 30), 0)
    target.chmod(0o600)
    target.write_bytes(source)
    assert KEYS.shard(SnapshotId(1, 30), 0) in tier.broken(30)


def test_what_is_half_written_is_not_there(tier: Tier) -> None:
    tier.writer.write_built(build_world(step=40), is_committed=False)
    assert [c.id.step for c in tier.reader.candidates()] == [30, 20, 10]


def test_what_retention_dropped_is_void_not_broken(tier: Tier) -> None:
    path = tier.root / KEYS.snapshot(SnapshotId(1, 30))
    path.chmod(0o600)
    path.write_bytes(encode_void(VoidRecord("job", SnapshotId(1, 30), 0, True, "f" * 32)))
    found = tier.reader.open_all(tier.reader.candidates())
    assert [isinstance(one, Broken) and one.is_void for one in found] == [True, False, False]


def test_a_store_that_is_away_proves_nothing(tmp_path: Path) -> None:
    class Away(DirectoryStore):
        def read_into(self, key, offset, buffer, *, deadline_s=None):  # type: ignore[no-untyped-def]
            raise UnavailableError("no answer", kind="store_unreachable")

    made = Tier(tmp_path / "tier")
    shard = made.opened(30).shards[0]
    made.reader.store.read_into = Away.read_into.__get__(made.reader.store)  # type: ignore[method-assign]
    out = [bytearray(chunk.nbytes) for chunk in shard.chunks]
    misses = made.reader.read(shard, range(len(out)), lambda i: memoryview(out[i]))
    made.pool.close()
    assert len(misses) == len(out) and {miss.fault for miss in misses} == {Fault.AWAY}


def test_large_chunks_are_read_to_their_place_and_checked_on_the_way(tmp_path: Path) -> None:
    store = directory_store(tmp_path / "tier")
    world = build_world(world_size=1, elements=1_500_000, chunk_bytes=2 * MIB)
    TierWriter(store).write_built(world)
    pool = ReadPool(threads=2)
    reader = TierReader(store, "job", pool)
    opened = reader.find(SnapshotId(1, 10), None)
    assert isinstance(opened, Opened)
    shard = opened.shards[0]
    runs = plan_runs([Want(i, c) for i, c in enumerate(shard.chunks)])
    assert any(run.nbytes == 2 * MIB and len(run.wants) == 1 for run in runs)
    out = [bytearray(chunk.nbytes) for chunk in shard.chunks]
    assert reader.read(shard, range(len(out)), lambda i: memoryview(out[i])) == []
    assert [bytes(piece) for piece in out] == chunks_of(world[0])
    big = next(i for i, c in enumerate(shard.chunks) if c.nbytes == 2 * MIB and i > 0)
    flip_bit(tmp_path / "tier", KEYS.pack(shard.chunks[big].pack), shard.chunks[big].offset + MIB + 7)
    misses = reader.read(shard, range(len(out)), lambda i: memoryview(out[i]))
    pool.close()
    assert [(miss.index, miss.fault) for miss in misses] == [(big, Fault.BAD)]


def test_work_can_be_called_off(tier: Tier) -> None:
    shard = tier.opened(30).shards[0]
    stop = threading.Event()
    stop.set()
    misses = tier.reader.read(shard, [0, 1], lambda i: memoryview(bytearray(1 << 20)), stop=stop)
    assert {miss.fault for miss in misses} == {Fault.STOPPED}


# runs


def chunk_at(offset: int, stored: int, *, pack: str = "p", encoding: Encoding = Encoding.ZSTD) -> StoredChunk:
    nbytes = stored if encoding is Encoding.RAW else 2 * stored
    return StoredChunk(nbytes, b"", pack, offset, stored, encoding)


def test_neighbours_come_in_one_read_and_never_more_than_a_buffer_holds() -> None:
    wants = [Want(i, chunk_at(64 + i * MIB, MIB)) for i in range(20)]
    runs = plan_runs(list(reversed(wants)))
    assert [len(run.wants) for run in runs] == [8, 8, 4]
    assert max(run.nbytes for run in runs) <= RUN_BYTES
    assert sorted(want.index for run in runs for want in run.wants) == list(range(20))


def test_gaps_packs_and_large_raw_chunks_end_a_run() -> None:
    first = chunk_at(0, 1000)
    near, far = chunk_at(1000 + GAP_BYTES, 1000), chunk_at(2001 + 2 * GAP_BYTES, 1000)
    assert [len(run.wants) for run in plan_runs([Want(0, first), Want(1, near), Want(2, far)])] == [2, 1]
    elsewhere = replace(near, pack="q")
    assert len(plan_runs([Want(0, first), Want(1, elsewhere)])) == 2
    raw = chunk_at(1000, MIB, encoding=Encoding.RAW)
    runs = plan_runs([Want(0, first), Want(1, raw)])
    assert [len(run.wants) for run in runs] == [1, 1]


def test_what_each_read_costs_a_round_for_comes_in_few_of_them() -> None:
    raw = [Want(i, chunk_at(64 + i * MIB, MIB, encoding=Encoding.RAW)) for i in range(20)]
    assert len(plan_runs(raw)) == 20
    far = plan_runs(raw, direct_bytes=DIRECT_FAR_BYTES)
    assert [len(run.wants) for run in far] == [8, 8, 4]
    large = [Want(i, chunk_at(64 + i * RUN_BYTES, RUN_BYTES, encoding=Encoding.RAW)) for i in range(3)]
    assert [len(run.wants) for run in plan_runs(large, direct_bytes=DIRECT_FAR_BYTES)] == [1, 1, 1]


class Far:
    """A store that counts its reads, and has no reading on the way."""

    def __init__(self, store: Store) -> None:
        self._store, self.reads = store, 0

    def read(self, key: str, *, max_nbytes: int) -> bytes:
        return self._store.read(key, max_nbytes=max_nbytes)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self.reads += 1
        self._store.read_into(key, offset, buffer)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._store.list(prefix)


def test_from_afar_raw_chunks_come_together_and_each_is_checked(tmp_path: Path) -> None:
    store = directory_store(tmp_path / "tier")
    world = build_world(world_size=1, elements=1_500_000, chunk_bytes=MIB // 2)
    TierWriter(store).write_built(world)
    far = Far(store)
    pool = ReadPool(threads=2)
    reader = TierReader(cast(Store, far), "job", pool)
    opened = reader.find(SnapshotId(1, 10), None)
    assert isinstance(opened, Opened)
    shard = opened.shards[0]
    assert {chunk.encoding for chunk in shard.chunks} == {Encoding.RAW} and len(shard.chunks) > 8
    out = [bytearray(chunk.nbytes) for chunk in shard.chunks]
    assert reader.read(shard, range(len(out)), lambda i: memoryview(out[i])) == []
    assert [bytes(piece) for piece in out] == chunks_of(world[0])
    assert far.reads <= -(-sum(chunk.nbytes for chunk in shard.chunks) // RUN_BYTES) + 1
    bad = shard.chunks[5]
    flip_bit(tmp_path / "tier", KEYS.pack(bad.pack), bad.offset + 7)
    misses = reader.read(shard, range(len(out)), lambda i: memoryview(out[i]))
    pool.close()
    assert [(miss.index, miss.fault) for miss in misses] == [(5, Fault.BAD)]


def test_one_chunk_that_is_wanted_twice_is_read_once() -> None:
    same = chunk_at(64, 1000)
    (run,) = plan_runs([Want(0, same), Want(7, same)])
    assert run.nbytes == 1000 and len(run.wants) == 2
