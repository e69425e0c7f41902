"""Where chunks were about to arrive, by a job's index: what a killed daemon had brought is found again.

A hint, and no more: it is written before the first byte arrives and nothing follows from it but which frames are worth
hashing. What is damaged or out of date costs nothing.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple

from snapd.core.ids import Place

SCHEMA = """
CREATE TABLE IF NOT EXISTS arriving (rank INTEGER NOT NULL, chunks BLOB NOT NULL) STRICT;
"""
_CHUNK = struct.Struct("<16sIII")

Transaction = Callable[[], AbstractContextManager[sqlite3.Connection]]


class ArrivingChunk(NamedTuple):
    """A chunk, and the frame that was granted for it."""

    digest: bytes
    nbytes: int
    place: Place


class ArrivingRows:
    """Reads and writes that table. Every writing method is one transaction; errors as `Index`."""

    def __init__(self, connection: sqlite3.Connection, transaction: Transaction) -> None:
        self._connection = connection
        self._transaction = transaction

    def all(self) -> list[tuple[int, list[ArrivingChunk]]]:
        """(rank whose arena it is, chunks), in the order in which they were added."""
        rows = self._connection.execute("SELECT rank, chunks FROM arriving ORDER BY rowid").fetchall()
        return [(rank, _unpacked(data)) for rank, data in rows]

    def add(self, rank: int, chunks: Iterable[ArrivingChunk]) -> None:
        data = b"".join(_CHUNK.pack(one.digest, one.nbytes, *one.place) for one in chunks)
        with self._transaction() as connection:
            connection.execute("INSERT INTO arriving VALUES (?, ?)", (rank, data))

    def remove(self, rank: int) -> None:
        with self._transaction() as connection:
            connection.execute("DELETE FROM arriving WHERE rank = ?", (rank,))


def _unpacked(data: bytes) -> list[ArrivingChunk]:
    whole = len(data) - len(data) % _CHUNK.size
    return [
        ArrivingChunk(digest, nbytes, Place(segment, frame))
        for digest, nbytes, segment, frame in _CHUNK.iter_unpack(data[:whole])
    ]
