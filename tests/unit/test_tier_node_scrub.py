"""A stored chunk of a node's disk that has gone bad: found by reading it again, never used again, and written again."""

from __future__ import annotations

import errno
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from snapd.codec.compress import Mode
from snapd.core.ids import SnapshotId
from snapd.core.stored import StoredChunk
from snapd.core.tier_keys import TierKeys
from snapd.errors import CapacityError, UnavailableError
from snapd.store.base import Store
from snapd.store.directory import DirectoryStore
from snapd.store.faulty import Effect, Fault, FaultyStore
from snapd.tier.flush import Stage
from snapd.tier.node_disk import DiskJob
from snapd.tier.node_scrub import GONE, ScrubReader
from snapd.tier.writing import Compressing, ShardBytes, WriteMeans
from tests.support.flush_parts import contents_of, shard
from tests.support.stores import directory_store

KEYS = TierKeys("a")


class Disk:
    """A job's part of a disk, in a folder."""

    def __init__(self, root: Path, threads: ThreadPoolExecutor) -> None:
        self.root = root
        self.store: Store = directory_store(root)
        self.threads = threads
        self.reader = ScrubReader(root)
        self.point: Callable[[str], object] = lambda name: None
        self.job = DiskJob("a", self.means, keep=2, is_alone=True, random_token=lambda: secrets.token_hex(16))

    def means(self) -> WriteMeans:
        return WriteMeans(
            store=self.store,
            packers=self.threads,
            packers_max=1,
            compressing=Compressing(Mode.OFF),
            pacer=None,
            monotonic_s=time.monotonic,
            point=lambda name: self.point(name) and None,
        )

    def write(self, step: int) -> ShardBytes:
        built = shard(contents_of(step), step=step)
        stop = threading.Event()
        self.job.write(built.record.id, [built], stop=stop, stage=Stage(), own_done=lambda: None)
        return built

    def chunks(self, step: int) -> tuple[StoredChunk, ...]:
        return self.job.look().manifests[KEYS.shard(SnapshotId(1, step), 0)].chunks

    def flip(self, chunk: StoredChunk) -> None:
        with (self.root / KEYS.pack(chunk.pack)).open("r+b") as file:
            file.seek(chunk.offset + 7)
            byte = file.read(1)[0]
            file.seek(chunk.offset + 7)
            file.write(bytes([byte ^ 4]))

    def read_again(self) -> dict[tuple[str, int], str]:
        """Every chunk that any manifest names."""
        found: dict[tuple[str, int], str] = {}
        manifests = self.job.manifests()
        packs: dict[str, list[StoredChunk]] = {}
        for stored in manifests.values():
            for chunk in stored.chunks:
                packs.setdefault(chunk.pack, []).append(chunk)
        for chunks in packs.values():
            found |= self.reader.check_chunks(self.store, KEYS, chunks, next(iter(manifests)))
        return found


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    (tmp_path / "disk").mkdir()
    with ThreadPoolExecutor(1) as threads:
        yield Disk(tmp_path / "disk", threads)


def shared_chunk(disk: Disk, one: int, other: int) -> StoredChunk:
    both = set(disk.chunks(one)) & set(disk.chunks(other))
    return next(chunk for chunk in both if chunk.nbytes > 1000)


def test_what_is_good_is_found_good(disk: Disk) -> None:
    disk.write(1)
    disk.write(2)
    assert disk.read_again() == {}
    assert disk.job.damages == []


def test_a_rotten_chunk_spoils_all_snapshots_that_name_it_and_no_later_one(disk: Disk) -> None:
    disk.write(1)
    disk.write(2)
    bad = shared_chunk(disk, 1, 2)
    disk.flip(bad)
    found = disk.read_again()
    assert list(found) == [bad.spot]
    assert KEYS.pack(bad.pack) in found[bad.spot] or bad.pack in found[bad.spot]
    assert disk.job.note_rotten(found)
    assert not disk.job.note_rotten(found)  # no news
    assert set(disk.job.look().problems) == {SnapshotId(1, 1), SnapshotId(1, 2)}
    disk.write(3)
    assert bad not in disk.chunks(3)
    assert set(disk.job.look().problems) == set()  # what was spoilt has gone
    disk.write(4)
    assert disk.read_again() == {}
    assert disk.job.damages == []


def test_a_spoilt_snapshot_that_is_written_again_keeps_what_was_written(disk: Disk) -> None:
    disk.write(1)
    disk.write(2)
    bad = next(chunk for chunk in disk.chunks(2) if chunk not in disk.chunks(1))
    disk.flip(bad)
    disk.job.note_rotten(disk.read_again())
    disk.write(2)
    assert disk.job.damages == []
    assert bad not in disk.chunks(2)
    assert disk.read_again() == {}
    disk.job = DiskJob("a", disk.means, keep=2, is_alone=True, random_token=lambda: secrets.token_hex(16))
    assert set(disk.job.look().shards) == {SnapshotId(1, 1), SnapshotId(1, 2)}
    assert disk.read_again() == {}  # and so it lies there


def test_what_is_in_memory_mends_every_snapshot_at_once(disk: Disk) -> None:
    disk.write(1)
    newest = disk.write(2)
    bad = shared_chunk(disk, 1, 2)
    before = {step: disk.chunks(step) for step in (1, 2)}
    disk.flip(bad)
    disk.job.note_rotten(disk.read_again())
    mended = disk.job.mend([newest], threading.Event())
    assert (mended.chunks, mended.nbytes, mended.manifests, mended.left) == (1, bad.nbytes, 2, 0)
    assert disk.job.damages == []
    assert disk.read_again() == {}
    for step in (1, 2):
        now = disk.chunks(step)
        assert [c.digest for c in now] == [c.digest for c in before[step]]
        assert bad not in now
    again = DiskJob("a", disk.means, keep=2, is_alone=True, random_token=lambda: secrets.token_hex(16))
    assert set(again.look().shards) == {SnapshotId(1, 1), SnapshotId(1, 2)}  # and so it lies there


def test_what_is_in_no_memory_stays_bad_until_a_newer_one_takes_its_place(disk: Disk) -> None:
    disk.write(1)
    bad = next(c for c in disk.chunks(1) if c.nbytes > 1000)
    disk.flip(bad)
    disk.job.note_rotten(disk.read_again())
    other = shard([b"something else" * 99], step=2)
    assert disk.job.mend([other], threading.Event()).left == 1
    assert len(disk.job.damages) == 1
    disk.write(3)
    assert disk.job.damages == []


def test_memory_that_is_bad_itself_mends_nothing(disk: Disk) -> None:
    newest = disk.write(1)
    bad = next(c for c in disk.chunks(1) if c.nbytes > 1000)
    disk.flip(bad)
    disk.job.note_rotten(disk.read_again())
    index = next(i for i, c in enumerate(newest.record.chunks) if c.digest == bad.digest)
    newest.memory.frames[index][3] ^= 1  # type: ignore[attr-defined]
    assert disk.job.mend([newest], threading.Event()).left == 1


def test_a_pack_that_is_missing(disk: Disk) -> None:
    newest = disk.write(1)
    pack = disk.chunks(1)[0].pack
    (disk.root / KEYS.pack(pack)).unlink()
    found = disk.read_again()
    assert set(found.values()) == {GONE}
    assert disk.job.confirm_gone(pack) is True
    disk.job.note_rotten(found)
    assert disk.job.mend([newest], threading.Event()).left == 0
    assert disk.read_again() == {}


def test_a_pack_that_was_tidied_away_meanwhile_is_not_missed(disk: Disk) -> None:
    for step in (1, 2):
        disk.write(step)
    own = {c.pack for c in disk.chunks(2)} - {c.pack for c in disk.chunks(1)}
    stale = [c for c in disk.chunks(2) if c.pack in own]
    for step in (3, 4):
        disk.write(step)
    assert set(disk.reader.check_chunks(disk.store, KEYS, stale, "x").values()) == {GONE}
    assert disk.job.confirm_gone(own.pop()) is False


def test_while_something_is_being_written_nothing_counts_as_missing(disk: Disk) -> None:
    built, answers = shard(contents_of(1)), []
    disk.point = lambda name: answers.append(disk.job.confirm_gone("0" * 32 + "-000000"))  # type: ignore[func-returns-value]
    stop = threading.Event()
    ask = threading.Thread(
        target=lambda: disk.job.write(
            built.record.id, [built], stop=stop, stage=Stage(), own_done=lambda: None
        )
    )
    ask.start()
    ask.join(20)
    assert set(answers) == {None}


def test_a_disk_error_of_one_chunk_is_damage_and_one_of_all_of_the_disk_is_not(disk: Disk) -> None:
    disk.write(1)
    chunks = [c for c in disk.chunks(1) if c.pack == disk.chunks(1)[0].pack]
    store, witness = disk.store, next(iter(disk.job.manifests()))
    assert isinstance(store, DirectoryStore)
    broken = BadSectors(store, {chunks[1].offset})
    found = disk.reader.check_chunks(broken, KEYS, chunks, witness)  # type: ignore[arg-type]
    assert list(found) == [chunks[1].spot]
    assert "Input/output error" in found[chunks[1].spot]
    with pytest.raises(UnavailableError):
        all_broken = BadSectors(store, {c.offset for c in chunks}, is_all=True)
        disk.reader.check_chunks(all_broken, KEYS, chunks, witness)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_note_bad", [False, True])
def test_a_manifest_that_the_disk_cannot_read_spoils_its_snapshot_only(disk: Disk, is_note_bad: bool) -> None:
    disk.write(1)
    disk.write(2)
    disk.job.note_generation(5)
    manifest, note = KEYS.shard(SnapshotId(1, 2), 0), KEYS.generation_note
    bad = [manifest, note] if is_note_bad else [manifest]
    store = disk.store
    disk.store = FaultyStore(store, [Fault("read", Effect.REFUSE, key, times=-1) for key in bad])
    disk.job = DiskJob("a", disk.means, keep=2, is_alone=True, random_token=lambda: secrets.token_hex(16))
    look = disk.job.look()
    assert (set(look.shards), set(look.problems)) == ({SnapshotId(1, 1)}, {SnapshotId(1, 2)})
    assert look.generation == (1 if is_note_bad else 5)
    disk.write(3)
    assert SnapshotId(1, 3) in disk.job.look().shards
    disk.store = FaultyStore(store, [Fault("read", Effect.REFUSE, KEYS.root, times=-1)])
    disk.job = DiskJob("a", disk.means, keep=2, is_alone=True, random_token=lambda: secrets.token_hex(16))
    with pytest.raises(UnavailableError):  # the disk does not answer at all: nothing is proved
        disk.job.look()


class BadSectors:
    """A store on a disk with unreadable places."""

    def __init__(self, store: DirectoryStore, offsets: set[int], *, is_all: bool = False) -> None:
        self._store, self._offsets, self._is_all = store, offsets, is_all

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        if offset in self._offsets:
            raise _io_error(key)
        self._store.read_into(key, offset, buffer)

    def read(self, key: str, *, max_nbytes: int) -> bytes:
        if self._is_all:
            raise _io_error(key)
        return self._store.read(key, max_nbytes=max_nbytes)


def _io_error(key: str) -> UnavailableError:
    text = f"cannot read {key}: {OSError(errno.EIO, 'Input/output error').strerror}"
    return UnavailableError(text, kind="store_failing")


def test_a_manifest_that_has_changed_is_written_again_as_it_was(disk: Disk) -> None:
    disk.write(1)
    key = KEYS.shard(SnapshotId(1, 1), 0)
    before, known = (disk.root / key).read_bytes(), disk.job.manifests()[key]
    assert disk.reader.check_manifest(disk.store, key, "a", known) == ""
    (disk.root / key).chmod(0o600)
    (disk.root / key).write_bytes(before[:60] + b"!" + before[61:])
    assert disk.reader.check_manifest(disk.store, key, "a", known)
    assert disk.job.write_manifest_again(key)
    assert (disk.root / key).read_bytes() == before
    (disk.root / key).unlink()
    assert disk.reader.check_manifest(disk.store, key, "a", known) == GONE
    assert not disk.job.write_manifest_again(KEYS.shard(SnapshotId(1, 9), 0))


def test_a_mending_that_fails_half_way_goes_on_from_there(disk: Disk) -> None:
    newest = disk.write(1)
    disk.write(2)
    bad = shared_chunk(disk, 1, 2)
    disk.flip(bad)
    disk.job.note_rotten(disk.read_again())
    good = disk.store
    disk.store = FaultyStore(good, [Fault("put", Effect.FILL, skip=1)])
    with pytest.raises(CapacityError):
        disk.job.mend([newest], threading.Event())
    assert disk.job.damages
    disk.store = good
    mended = disk.job.mend([newest], threading.Event())
    assert (mended.nbytes, mended.left) == (0, 0)  # the pack was there already
    assert disk.read_again() == {}
