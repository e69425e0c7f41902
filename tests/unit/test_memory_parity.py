"""The tables of protection in a job's index, and the bound on the memory of coding."""

from __future__ import annotations

import sqlite3
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from snapd.core.cluster import Code
from snapd.core.ids import Place, SnapshotId
from snapd.core.manifest import Chunk, ShardRecord
from snapd.core.protection import PlacedRecord, RowMap, make_plan
from snapd.errors import IntegrityError, InvariantViolated, UnavailableError
from snapd.memory.folders import JobFolder
from snapd.memory.index import Index
from snapd.memory.parity import ParityStore
from snapd.memory.protection_rows import FragmentRow
from snapd.memory.segments import back_segment
from snapd.runtime.pipeline import Buffers, Stopped

SIZE = 1 << 16
RECORD = ShardRecord(
    job="j", id=SnapshotId(1, 2), rank=0, world_size=1, chunk_bytes=SIZE, layout_nbytes=9, early_values_offset=SIZE,
    early_values_nbytes=4, chunks=(Chunk(9, bytes(16), Place(0, 0)), Chunk(4, bytes(16), Place(0, 1))), parent=None,
    captured_wall_time_s=1.0, digest=bytes(16),
)  # fmt: skip
MAP = RowMap(SnapshotId(1, 2), 7, 3, ("a", "b"), Code(1, 1))
ROW = FragmentRow(b"r" * 16, 0, Place(2, 5), 9, b"d" * 16)


def fill(index: Index) -> None:
    index.protection.add_segment(2, 8 * SIZE, SIZE)
    index.protection.put_map(MAP, [PlacedRecord("a", RECORD)])
    index.protection.add_fragments([ROW])


def test_what_protection_writes_is_read_back_and_removed(tmp_path: Path) -> None:
    index = Index.open(tmp_path / "index.db", job="j", may_create=True)
    fill(index)
    index.close()
    rows = Index.open(tmp_path / "index.db", job="j", may_create=False).protection
    assert rows.segments() == [(2, 8 * SIZE, SIZE)]
    assert rows.maps() == [MAP] and rows.records(MAP) == [PlacedRecord("a", RECORD)]
    assert rows.fragments() == [ROW]
    rows.remove([MAP], [(ROW.row_id, ROW.number)])
    assert not rows.maps() and not rows.records(MAP) and not rows.fragments()


def test_fragments_are_held_together_or_not_at_all(tmp_path: Path) -> None:
    rows = Index.open(tmp_path / "index.db", job="j", may_create=True).protection
    with pytest.raises(InvariantViolated):
        rows.add_fragments([ROW, ROW])
    assert not rows.fragments()


def test_of_fragments_that_come_together_each_is_kept_once_and_only_if_planned(tmp_path: Path) -> None:
    index = Index.open(tmp_path / "index.db", job="j", may_create=True)
    parity = ParityStore("j", JobFolder(tmp_path), index)
    plan = make_plan(MAP, [PlacedRecord("a", RECORD)])
    parity.add_segment(back_segment(tmp_path / "parity", 0, 4 * SIZE, is_writable=True), SIZE)
    parity.adopt(plan, [])
    row, other = plan.rows[:2]
    first, again, later = (parity.reserve(one.id, 0, one.nbytes) for one in (row, row, other))
    unplanned = replace(later, row_id=b"?" * 16)
    problems = parity.commit([(one, b"d" * 16) for one in (first, again, unplanned)])
    assert problems[:2] == [None, None] and isinstance(problems[2], UnavailableError)
    assert not first.is_open and not again.is_open and later.is_open
    assert [one.row_id for one in index.protection.fragments()] == [row.id]
    parity.cancel(later)
    parity.check()
    assert parity.used_bytes == SIZE  # the others' frames are free again


def test_an_index_from_before_protection_gets_its_tables(tmp_path: Path) -> None:
    Index.open(tmp_path / "index.db", job="j", may_create=True).close()
    with sqlite3.connect(tmp_path / "index.db") as connection:
        for table in ("parity_segments", "row_maps", "records", "fragments"):
            connection.execute(f"DROP TABLE {table}")
    connection.close()
    index = Index.open(tmp_path / "index.db", job="j", may_create=False)
    fill(index)
    assert index.protection.maps() == [MAP]


def test_a_damaged_replica_is_refused(tmp_path: Path) -> None:
    index = Index.open(tmp_path / "index.db", job="j", may_create=True)
    fill(index)
    with sqlite3.connect(tmp_path / "index.db") as connection:
        connection.execute("UPDATE records SET record = x'00'")
    connection.close()
    with pytest.raises(IntegrityError, match="damaged"):
        index.protection.records(MAP)


def test_pieces_are_bounded_and_a_waiter_can_be_called_off() -> None:
    buffers, stop = Buffers(4 * 100), threading.Event()
    stop.set()
    with buffers.lend(3, 100, stop) as pieces:
        assert [piece.nbytes for piece in pieces] == [100] * 3
        with pytest.raises(Stopped), buffers.lend(2, 100, stop):
            pass
        with buffers.lend(1, 100, stop):
            assert buffers.bytes_lent == 400
    with buffers.lend(9, 100, stop):  # larger than the bound: alone, and only alone
        assert (buffers.bytes_lent_max, buffers.pieces_lent_max) == (900, 9)
    assert buffers.bytes_lent == buffers.pieces_lent == 0
