"""Folders, records and the index: what is written is read back, and what is damaged is said to be."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapd.core.generations import Generation
from snapd.core.ids import Place, SnapshotId
from snapd.core.manifest import Chunk, ShardRecord
from snapd.errors import ConfigError, ConflictError, IntegrityError, InvariantViolated, JobUnusable
from snapd.memory.folders import ArenaFolder, FolderLock, private_folder
from snapd.memory.index import Index, SessionRow
from snapd.memory.records import record_from_bytes, record_to_proto

SIZE = 1 << 16
CHUNKS = st.builds(
    Chunk, st.integers(1, SIZE), st.binary(min_size=16, max_size=16),
    st.builds(Place, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
)  # fmt: skip
IDS = st.builds(SnapshotId, st.integers(1, 2**40), st.integers(0, 2**40))
RECORDS = st.builds(
    ShardRecord, job=st.just("j"), id=IDS, rank=st.integers(0, 100), world_size=st.just(101), chunk_bytes=st.just(SIZE),
    layout_nbytes=st.integers(1, SIZE), early_values_offset=st.just(SIZE), early_values_nbytes=st.integers(0, 10),
    chunks=st.lists(CHUNKS, min_size=1, max_size=5).map(tuple), parent=st.none() | IDS,
    captured_wall_time_s=st.floats(0, 1e10), digest=st.binary(min_size=16, max_size=16),
)  # fmt: skip
RECORD = ShardRecord(
    job="j", id=SnapshotId(1, 2), rank=0, world_size=1, chunk_bytes=SIZE, layout_nbytes=9, early_values_offset=SIZE,
    early_values_nbytes=4, chunks=(Chunk(9, bytes(16), Place(0, 0)), Chunk(4, bytes(16), Place(0, 1))), parent=None,
    captured_wall_time_s=1.0, digest=bytes(16),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(RECORDS)
def test_a_record_is_read_back_as_it_was(record: ShardRecord) -> None:
    assert record_from_bytes(record_to_proto(record).SerializeToString()) == record


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_make_the_reader_fail_otherwise_than_by_its_error(data: bytes) -> None:
    try:
        record = record_from_bytes(data)
    except IntegrityError as error:
        assert error.kind == "record"
    else:
        assert record.chunks


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return Index.open(tmp_path / "index.db", job="j", may_create=True)


def reopened(tmp_path: Path) -> Index:
    return Index.open(tmp_path / "index.db", job="j", may_create=False)


def test_the_index_keeps_everything(index: Index, tmp_path: Path) -> None:
    row = SessionRow(7, b"secret", 0, 1, 1, "one", 42, 43, 2, 1, is_fenced=False)
    index.set_chunk_bytes(SIZE)
    index.add_generation(Generation(1, "one", 0, 1))
    index.set_parent(1, SnapshotId(0, 5))
    index.add_segment(0, 0, 4 * SIZE)
    index.put_session(row)
    index.add_shard(RECORD, session_id=7, sequence=3)
    index.set_problem(SnapshotId(1, 2), "bad")
    index.close()
    again = reopened(tmp_path)
    assert again.chunk_bytes() == SIZE
    assert again.generations() == [Generation(1, "one", 0, 1, SnapshotId(0, 5))]
    assert again.segments() == [(0, 0, 4 * SIZE)]
    assert again.sessions() == [row]
    shard = again.shards()[0]
    assert (shard.record, shard.session_id, shard.sequence, shard.problem) == (RECORD, 7, 3, "")
    assert again.problems() == {SnapshotId(1, 2): "bad"}
    again.remove_snapshots([SnapshotId(1, 2)])
    again.remove_session(7)
    assert not again.shards() and not again.sessions() and not again.problems()


def test_a_shard_is_recorded_once(index: Index) -> None:
    index.add_shard(RECORD, session_id=7, sequence=3)
    with pytest.raises(InvariantViolated):
        index.add_shard(RECORD, session_id=7, sequence=4)
    assert [shard.sequence for shard in index.shards()] == [3]


def test_a_damaged_row_is_named_and_the_others_are_read(index: Index, tmp_path: Path) -> None:
    index.add_shard(RECORD, session_id=7, sequence=3)
    index.close()
    with sqlite3.connect(tmp_path / "index.db") as connection:
        connection.execute("UPDATE shards SET record = x'00'")
        connection.execute(
            "INSERT INTO shards SELECT generation, step + 1, rank, 7, 9, record, digest FROM shards"
        )
    connection.close()
    rows = reopened(tmp_path).shards()
    assert [row.record for row in rows] == [None, None]
    assert rows[0].problem == "the record of rank 0 is damaged"


def damage_nothing_there(path: Path) -> None:
    path.unlink()


def damage_other_job(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE meta SET value = 'other' WHERE key = 'job'")
    connection.close()


def damage_other_version(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE meta SET value = '99' WHERE key = 'version'")
    connection.close()


def damage_no_tables(path: Path) -> None:
    path.unlink()
    sqlite3.connect(path).execute("PRAGMA user_version = 1").connection.close()


@pytest.mark.parametrize(
    "damage",
    [damage_nothing_there, damage_other_job, damage_other_version, damage_no_tables],
    ids=lambda f: f.__name__,
)
def test_an_index_that_is_not_the_jobs_is_refused(index: Index, tmp_path: Path, damage) -> None:
    index.close()
    damage(tmp_path / "index.db")
    with pytest.raises(JobUnusable, match="'j'"):
        reopened(tmp_path)


def test_folders_are_private(tmp_path: Path) -> None:
    assert private_folder(tmp_path / "deep" / "one").stat().st_mode & 0o777 == 0o700
    open_to_all = tmp_path / "open"
    open_to_all.mkdir(mode=0o700)
    open_to_all.chmod(0o711)
    (tmp_path / "link").symlink_to(tmp_path / "deep")
    (tmp_path / "file").write_text("x")
    for name, message in (("open", "open to others"), ("link", "symbolic link"), ("file", "not a folder")):
        with pytest.raises(ConfigError, match=message):
            private_folder(tmp_path / name)


def test_a_lock_names_its_holder(tmp_path: Path) -> None:
    lock = FolderLock.take(tmp_path / "lock")
    with pytest.raises(ConflictError, match=r"another daemon serves .* \(pid \d+\)"):
        FolderLock.take(tmp_path / "lock")
    lock.close()
    FolderLock.take(tmp_path / "lock").close()


def test_an_arena_of_another_format_is_refused(tmp_path: Path) -> None:
    arena = ArenaFolder.open(tmp_path / "arena")
    assert arena.job_names() == []
    (arena.path / "VERSION").write_text("2\n")
    with pytest.raises(IntegrityError, match="format version '2'"):
        ArenaFolder.open(tmp_path / "arena")
