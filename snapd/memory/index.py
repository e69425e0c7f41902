"""The index of one job: SQLite on the same tmpfs as the segments, so both die with the node and nothing needs
syncing.

A kill cannot tear a transaction. A file that is truncated, overwritten or missing beside existing segments is
refused by name (`JobUnusable`), and nothing of the job is touched. Used from one thread.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from snapd.core.generations import Generation
from snapd.core.ids import SnapshotId
from snapd.core.manifest import ShardRecord
from snapd.core.reports import Told
from snapd.errors import CapacityError, IntegrityError, InvariantViolated, JobUnusable
from snapd.memory.arriving_rows import SCHEMA as ARRIVING_SCHEMA
from snapd.memory.arriving_rows import ArrivingRows
from snapd.memory.protection_rows import SCHEMA as PROTECTION_SCHEMA
from snapd.memory.protection_rows import ProtectionRows
from snapd.memory.records import record_from_bytes, record_to_proto
from snapd.memory.shortage import index_shortage

INDEX_VERSION = 1
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE generations (number INTEGER PRIMARY KEY, incarnation TEXT NOT NULL,
    rollback_count INTEGER NOT NULL, world_size INTEGER NOT NULL,
    parent_generation INTEGER, parent_step INTEGER,
    UNIQUE (incarnation, rollback_count)) STRICT;
CREATE TABLE segments (rank INTEGER NOT NULL, number INTEGER NOT NULL, nbytes INTEGER NOT NULL,
    PRIMARY KEY (rank, number)) STRICT;
CREATE TABLE sessions (id INTEGER PRIMARY KEY, secret BLOB NOT NULL, rank INTEGER NOT NULL,
    world_size INTEGER NOT NULL,
    generation INTEGER NOT NULL, incarnation TEXT NOT NULL, pid INTEGER NOT NULL, pid_start INTEGER NOT NULL,
    slots INTEGER NOT NULL, interval_steps INTEGER NOT NULL, is_fenced INTEGER NOT NULL) STRICT;
CREATE TABLE shards (generation INTEGER NOT NULL, step INTEGER NOT NULL, rank INTEGER NOT NULL,
    session_id INTEGER NOT NULL, sequence INTEGER NOT NULL, record BLOB NOT NULL, digest BLOB NOT NULL,
    PRIMARY KEY (generation, step, rank)) STRICT;
CREATE TABLE problems (generation INTEGER NOT NULL, step INTEGER NOT NULL, problem TEXT NOT NULL,
    PRIMARY KEY (generation, step)) STRICT;
"""
KEEP_FILES_HINT = "its files are kept; look at them, then `snapd rm --force JOB` to begin anew"


@dataclass(frozen=True, slots=True)
class SessionRow:
    """What a restarted daemon needs to know of a session. `pid` 0: it is in another pid namespace."""

    id: int
    secret: bytes
    rank: int
    world_size: int
    generation: int
    incarnation: str
    pid: int
    pid_start: int
    slots: int
    interval_steps: int
    is_fenced: bool


@dataclass(frozen=True, slots=True)
class ShardRow:
    id: SnapshotId
    rank: int
    session_id: int
    sequence: int
    record: ShardRecord | None  # None: the row is damaged
    problem: str


class Index:
    """An open index. Every writing method is one transaction and returns after its commit.

    Those methods raise CapacityError (kind `index_full`, nothing has changed) and JobUnusable.
    """

    def __init__(self, connection: sqlite3.Connection, job: str) -> None:
        self._connection = connection
        self._job = job
        self.protection = ProtectionRows(connection, self._transaction)
        self.arriving = ArrivingRows(connection, self._transaction)

    @classmethod
    def open(cls, path: Path, *, job: str, may_create: bool) -> Index:
        """Open and check the index of `job`; create it if `may_create`.

        Raises: JobUnusable: it is missing though it must be there, truncated, damaged, or of another job or
            version. CapacityError: kind `files`: descriptors or memory are lacking.
        """
        if not may_create and (not path.exists() or path.stat().st_size == 0):
            raise JobUnusable(f"the index of job {job!r} is missing or empty", hint=KEEP_FILES_HINT, job=job)
        with ExitStack() as undo:
            try:
                connection = sqlite3.connect(path, isolation_level=None, timeout=5.0)
                undo.callback(connection.close)
                _prepare(connection, job, may_create=may_create)
            except sqlite3.Error as error:
                text = f"the index of job {job!r} is damaged: {error}"
                damaged = JobUnusable(text, hint=KEEP_FILES_HINT, job=job)
                raise index_shortage(error, job) or damaged from error
            undo.pop_all()
        return cls(connection, job)

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._connection as connection:  # commits, or rolls back when the body raises
                connection.execute("BEGIN IMMEDIATE")
                yield connection
        except sqlite3.IntegrityError as error:
            raise InvariantViolated(f"the index refused a row: {error}", job=self._job) from error
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:
                raise CapacityError(
                    "no room for the index",
                    kind="index_full",
                    hint="release a job with `snapd rm`",
                    job=self._job,
                ) from error
            raise JobUnusable(
                f"the index of job {self._job!r} is damaged: {error}", hint=KEEP_FILES_HINT, job=self._job
            ) from error

    # settings of the job

    def chunk_bytes(self) -> int:
        row = self._connection.execute("SELECT value FROM meta WHERE key = 'chunk_bytes'").fetchone()
        return int(row[0]) if row else 0

    def set_chunk_bytes(self, nbytes: int) -> None:
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES ('chunk_bytes', ?)", (str(nbytes),))

    def told(self) -> Told:
        """What collectors have said of the newest snapshots, as noted by `set_told`."""
        row = self._connection.execute("SELECT value FROM meta WHERE key = 'told'").fetchone()
        if row is None:
            return Told()
        complete, protected, epoch = json.loads(row[0])
        return Told(
            SnapshotId(*complete) if complete else None, SnapshotId(*protected) if protected else None, epoch
        )

    def set_told(self, told: Told) -> None:
        names = [[s.generation, s.step] if s is not None else None for s in (told.complete, told.protected)]
        text = json.dumps([*names, told.protected_epoch])
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES ('told', ?)", (text,))

    def tier_floors(self) -> dict[str, int]:
        """For each tier, by its URL, the highest generation that it had of this job before the job began here."""
        row = self._connection.execute("SELECT value FROM meta WHERE key = 'tier_floors'").fetchone()
        return {str(url): int(floor) for url, floor in json.loads(row[0]).items()} if row is not None else {}

    def set_tier_floor(self, url: str, floor: int) -> None:
        text = json.dumps({**self.tier_floors(), url: floor})
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES ('tier_floors', ?)", (text,))

    def tier_writer(self) -> str:
        """What names this arena's writer in tiers; empty: not drawn yet."""
        row = self._connection.execute("SELECT value FROM meta WHERE key = 'tier_writer'").fetchone()
        return str(row[0]) if row is not None else ""

    def set_tier_writer(self, token: str) -> None:
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES ('tier_writer', ?)", (token,))

    def served(self) -> dict[int, float]:
        """When a trainer of each generation was last served, as noted by `set_served`."""
        row = self._connection.execute("SELECT value FROM meta WHERE key = 'served'").fetchone()
        return {int(number): float(at_s) for number, at_s in json.loads(row[0]).items()} if row else {}

    def set_served(self, served: Mapping[int, float]) -> None:
        """Generation -> seconds of the machine's monotonic clock: whoever reads it has the same clock."""
        text = json.dumps({str(number): at_s for number, at_s in served.items()})
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES ('served', ?)", (text,))

    # generations

    def generations(self) -> list[Generation]:
        rows = self._connection.execute(
            "SELECT number, incarnation, rollback_count, world_size, parent_generation, parent_step"
            " FROM generations ORDER BY number"
        ).fetchall()
        return [
            Generation(
                number=row[0],
                incarnation=row[1],
                rollback_count=row[2],
                world_size=row[3],
                parent=None if row[4] is None else SnapshotId(row[4], row[5]),
            )
            for row in rows
        ]

    def add_generation(self, generation: Generation) -> None:
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO generations VALUES (?, ?, ?, ?, NULL, NULL)",
                (generation.number, generation.incarnation, generation.rollback_count, generation.world_size),
            )

    def set_parent(self, generation: int, parent: SnapshotId) -> None:
        with self._transaction() as connection:
            connection.execute(
                "UPDATE generations SET parent_generation = ?, parent_step = ? WHERE number = ?",
                (parent.generation, parent.step, generation),
            )

    # segments

    def segments(self) -> list[tuple[int, int, int]]:
        """(rank, number, nbytes) of each."""
        return self._connection.execute(
            "SELECT rank, number, nbytes FROM segments ORDER BY rank, number"
        ).fetchall()

    def add_segment(self, rank: int, number: int, nbytes: int) -> None:
        with self._transaction() as connection:
            connection.execute("INSERT INTO segments VALUES (?, ?, ?)", (rank, number, nbytes))

    def remove_segments(self, rank: int) -> None:
        with self._transaction() as connection:
            connection.execute("DELETE FROM segments WHERE rank = ?", (rank,))

    # sessions

    def sessions(self) -> list[SessionRow]:
        rows = self._connection.execute(
            "SELECT id, secret, rank, world_size, generation, incarnation, pid, pid_start, slots,"
            " interval_steps, is_fenced FROM sessions ORDER BY id"
        ).fetchall()
        return [
            SessionRow(
                id=row[0],
                secret=row[1],
                rank=row[2],
                world_size=row[3],
                generation=row[4],
                incarnation=row[5],
                pid=row[6],
                pid_start=row[7],
                slots=row[8],
                interval_steps=row[9],
                is_fenced=bool(row[10]),
            )
            for row in rows
        ]

    def put_session(self, row: SessionRow) -> None:
        """Insert or replace."""
        values = (
            row.id,
            row.secret,
            row.rank,
            row.world_size,
            row.generation,
            row.incarnation,
            row.pid,
            row.pid_start,
            row.slots,
            row.interval_steps,
            int(row.is_fenced),
        )
        with self._transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values
            )

    def remove_session(self, session_id: int) -> None:
        with self._transaction() as connection:
            connection.execute("DELETE FROM sessions WHERE id = ?", (session_id,))

    # shards

    def shards(self) -> list[ShardRow]:
        """All captured shards; a damaged row is returned with its problem instead of its record."""
        rows = self._connection.execute(
            "SELECT generation, step, rank, session_id, sequence, record, digest FROM shards"
            " ORDER BY generation, step, rank"
        ).fetchall()
        return [_shard_row(*row) for row in rows]

    def add_shard(self, record: ShardRecord, *, session_id: int, sequence: int) -> None:
        """The commit of a shard: once this returns, it exists."""
        data = record_to_proto(record).SerializeToString()
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    record.id.generation,
                    record.id.step,
                    record.rank,
                    session_id,
                    sequence,
                    data,
                    xxhash.xxh3_128_digest(data),
                ),
            )

    def replace_shard(self, record: ShardRecord) -> None:
        """The same shard lies elsewhere now, in part: its bytes were brought anew."""
        data = record_to_proto(record).SerializeToString()
        with self._transaction() as connection:
            connection.execute(
                "UPDATE shards SET record = ?, digest = ? WHERE generation = ? AND step = ? AND rank = ?",
                (data, xxhash.xxh3_128_digest(data), record.id.generation, record.id.step, record.rank),
            )

    def remove_snapshots(self, snapshots: Iterable[SnapshotId]) -> None:
        """Delete the records of these snapshots, all ranks, in one transaction."""
        keys = [(snapshot.generation, snapshot.step) for snapshot in snapshots]
        with self._transaction() as connection:
            connection.executemany("DELETE FROM shards WHERE generation = ? AND step = ?", keys)
            connection.executemany("DELETE FROM problems WHERE generation = ? AND step = ?", keys)

    def problems(self) -> dict[SnapshotId, str]:
        rows = self._connection.execute("SELECT generation, step, problem FROM problems").fetchall()
        return {SnapshotId(row[0], row[1]): row[2] for row in rows}

    def set_problem(self, snapshot: SnapshotId, problem: str) -> None:
        with self._transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO problems VALUES (?, ?, ?)",
                (snapshot.generation, snapshot.step, problem),
            )


def _prepare(connection: sqlite3.Connection, job: str, *, may_create: bool) -> None:
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    if not tables and not may_create:
        raise JobUnusable(f"the index of job {job!r} is empty", hint=KEEP_FILES_HINT, job=job)
    if not tables:
        connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = OFF")  # tmpfs: pages outlive a killed process, and nothing else
    if not tables:
        connection.executescript(
            f"BEGIN IMMEDIATE; {_SCHEMA}"
            f"INSERT INTO meta VALUES ('version', '{INDEX_VERSION}'), ('job', '{job}');"
            f"{PROTECTION_SCHEMA}{ARRIVING_SCHEMA} COMMIT;"
        )
        return
    verdict = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict is None or verdict[0] != "ok":
        raise JobUnusable(
            f"the index of job {job!r} is damaged: {verdict and verdict[0]}", hint=KEEP_FILES_HINT, job=job
        )
    meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
    if meta.get("version") != str(INDEX_VERSION) or meta.get("job") != job:
        raise JobUnusable(
            f"the index of job {job!r} is of job {meta.get('job')!r}, version {meta.get('version')!r}",
            hint=KEEP_FILES_HINT,
            job=job,
        )
    # an index of a version before protection gets its tables; that version does not mind them, so they have no number
    connection.executescript(f"BEGIN IMMEDIATE; {PROTECTION_SCHEMA}{ARRIVING_SCHEMA} COMMIT;")


def _shard_row(
    generation: int, step: int, rank: int, session_id: int, sequence: int, data: bytes, digest: bytes
) -> ShardRow:
    snapshot, problem, record = SnapshotId(generation, step), "", None
    if xxhash.xxh3_128_digest(data) != digest:
        problem = f"the record of rank {rank} is damaged"
    else:
        try:
            record = record_from_bytes(data)
        except IntegrityError as error:
            problem = f"the record of rank {rank}: {error.message}"
        else:
            if (record.id, record.rank) != (snapshot, rank):
                problem, record = f"the record of rank {rank} names another shard", None
    return ShardRow(snapshot, rank, session_id, sequence, record, problem)
