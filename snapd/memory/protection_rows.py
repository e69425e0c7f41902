"""The part of a job's index that protection needs: parity segments, row maps with their records, fragments.

What a kill may cut anywhere: a fragment's row is written after its bytes were checked; a row map and its records are
one transaction; a map that goes takes its records and the fragments that nobody else needs with it in one.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import xxhash

from snapd.core.cluster import Code
from snapd.core.ids import Place, SnapshotId
from snapd.core.protection import PlacedRecord, RowMap
from snapd.errors import IntegrityError
from snapd.memory.records import record_from_bytes, record_to_proto

SCHEMA = """
CREATE TABLE IF NOT EXISTS parity_segments (number INTEGER PRIMARY KEY, nbytes INTEGER NOT NULL,
    frame_bytes INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS row_maps (generation INTEGER NOT NULL, step INTEGER NOT NULL, epoch INTEGER NOT NULL,
    group_number INTEGER NOT NULL, nodes TEXT NOT NULL, k INTEGER NOT NULL, m INTEGER NOT NULL,
    PRIMARY KEY (generation, step, epoch)) STRICT;
CREATE TABLE IF NOT EXISTS records (generation INTEGER NOT NULL, step INTEGER NOT NULL, epoch INTEGER NOT NULL,
    node TEXT NOT NULL, rank INTEGER NOT NULL, record BLOB NOT NULL, digest BLOB NOT NULL,
    PRIMARY KEY (generation, step, epoch, node, rank)) STRICT;
CREATE TABLE IF NOT EXISTS fragments (row_id BLOB NOT NULL, number INTEGER NOT NULL, segment INTEGER NOT NULL,
    frame INTEGER NOT NULL, nbytes INTEGER NOT NULL, digest BLOB NOT NULL, PRIMARY KEY (row_id, number)) STRICT;
"""
INSERTED_AT_ONCE = 32  # a statement lets other threads take the GIL, and then waits for it
_OF_MAP = "WHERE generation = ? AND step = ? AND epoch = ?"

Transaction = Callable[[], AbstractContextManager[sqlite3.Connection]]


@dataclass(frozen=True, slots=True)
class FragmentRow:
    """A parity fragment whose bytes were checked, and where they lie."""

    row_id: bytes
    number: int
    place: Place
    nbytes: int
    digest: bytes


class ProtectionRows:
    """Reads and writes those tables. Every writing method is one transaction; errors as `Index`."""

    def __init__(self, connection: sqlite3.Connection, transaction: Transaction) -> None:
        self._connection = connection
        self._transaction = transaction

    # segments

    def segments(self) -> list[tuple[int, int, int]]:
        """(number, nbytes, frame_bytes) of each."""
        return self._connection.execute(
            "SELECT number, nbytes, frame_bytes FROM parity_segments ORDER BY number"
        ).fetchall()

    def add_segment(self, number: int, nbytes: int, frame_bytes: int) -> None:
        with self._transaction() as connection:
            connection.execute("INSERT INTO parity_segments VALUES (?, ?, ?)", (number, nbytes, frame_bytes))

    def remove_segments(self, numbers: Iterable[int]) -> None:
        with self._transaction() as connection:
            connection.executemany(
                "DELETE FROM parity_segments WHERE number = ?", [(number,) for number in numbers]
            )

    # row maps and records

    def maps(self) -> list[RowMap]:
        rows = self._connection.execute(
            "SELECT generation, step, epoch, group_number, nodes, k, m FROM row_maps"
            " ORDER BY generation, step, epoch"
        ).fetchall()
        return [
            RowMap(
                SnapshotId(row[0], row[1]), row[2], row[3], tuple(json.loads(row[4])), Code(row[5], row[6])
            )
            for row in rows
        ]

    def records(self, row_map: RowMap) -> list[PlacedRecord]:
        """Raise IntegrityError (kind `record`) when one is damaged."""
        rows = self._connection.execute(
            f"SELECT node, record, digest FROM records {_OF_MAP} ORDER BY node, rank", _key(row_map)
        ).fetchall()
        found: list[PlacedRecord] = []
        for node, data, digest in rows:
            if xxhash.xxh3_128_digest(data) != digest:
                raise IntegrityError("a replicated record is damaged", kind="record", node=node)
            found.append(PlacedRecord(node, record_from_bytes(data)))
        return found

    def put_map(self, row_map: RowMap, records: Sequence[PlacedRecord]) -> None:
        """Store a row map with the records that its rows follow from; replaces those of the same snapshot and
        epoch.
        """
        data = [(placed, record_to_proto(placed.record).SerializeToString()) for placed in records]
        key = _key(row_map)
        with self._transaction() as connection:
            connection.execute(f"DELETE FROM records {_OF_MAP}", key)
            connection.execute(
                "INSERT OR REPLACE INTO row_maps VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*key, row_map.group, json.dumps(row_map.nodes), row_map.code.k, row_map.code.m),
            )
            connection.executemany(
                "INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (*key, placed.node, placed.record.rank, blob, xxhash.xxh3_128_digest(blob))
                    for placed, blob in data
                ],
            )

    # fragments

    def fragments(self) -> list[FragmentRow]:
        rows = self._connection.execute(
            "SELECT row_id, number, segment, frame, nbytes, digest FROM fragments"
        ).fetchall()
        return [FragmentRow(row[0], row[1], Place(row[2], row[3]), row[4], row[5]) for row in rows]

    def add_fragments(self, rows: Iterable[FragmentRow]) -> None:
        """The commit of fragments: once this returns, they are held; after an error none is."""
        found = list(rows)
        with self._transaction() as connection:
            for first in range(0, len(found), INSERTED_AT_ONCE):
                part = found[first : first + INSERTED_AT_ONCE]
                places = ", ".join(["(?, ?, ?, ?, ?, ?)"] * len(part))
                values: list[bytes | int] = []
                for row in part:
                    place = row.place
                    values += (row.row_id, row.number, place.segment, place.frame, row.nbytes, row.digest)
                connection.execute(f"INSERT INTO fragments VALUES {places}", values)

    def remove(self, maps: Iterable[RowMap], fragments: Iterable[tuple[bytes, int]]) -> None:
        """Delete row maps with their records, and these fragments, in one transaction."""
        keys = [_key(row_map) for row_map in maps]
        with self._transaction() as connection:
            connection.executemany(f"DELETE FROM row_maps {_OF_MAP}", keys)
            connection.executemany(f"DELETE FROM records {_OF_MAP}", keys)
            connection.executemany("DELETE FROM fragments WHERE row_id = ? AND number = ?", list(fragments))


def _key(row_map: RowMap) -> tuple[int, int, int]:
    return row_map.id.generation, row_map.id.step, row_map.epoch
