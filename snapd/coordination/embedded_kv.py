"""The key-value store inside one daemon: in memory, every change also in a SQLite file.

`KvServer` is the store; many clients, each with a lease of its own, share it: this daemon's `LocalKeyValue`, and those
of remote daemons that name this one their leader (`rpc/kv_service.py` calls the same methods). It runs on the event
loop's thread, which is its lock. A kill loses nothing that was answered; a power failure may take the last changes back
(WAL without a sync per transaction), which is what daemons recognise by their highwater marks.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from snapd.coordination.kv import Change, Check, Entry, Reading, Write, check_transaction
from snapd.core.keyspace import checked_key
from snapd.errors import ConfigError, FencedError, UnavailableError

HISTORY_MAX = 16_384
WATCHERS_MAX = 16_384
BACKLOG_MAX = 32_768
KEYS_MAX = 200_000
LEASES_MAX = 16_384
TTL_S_MAX = 3600.0
TICK_S = 0.2
STALL_S = 1.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value BLOB NOT NULL, version INTEGER NOT NULL,
    lease TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS leases (id TEXT PRIMARY KEY, ttl_s REAL NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
INSERT OR IGNORE INTO meta VALUES ('format', 1), ('revision', 0);
"""


@dataclass(slots=True)
class _Lease:
    ttl_s: float
    ends_s: float
    keys: set[str]


@dataclass(slots=True, eq=False)
class _Watcher:
    """`changes` None: this watcher did not keep up."""

    prefix: str
    changes: deque[Change] | None
    wake: asyncio.Event


class KvServer:
    """One store. `path` None keeps nothing over a restart.

    Leases that were open when the store was closed or killed are open again for their whole ttl, so that daemons that
    are alive renew them and the others' keys go.

    Raises:
        ConfigError: kind `coordination_file`: the file cannot be opened, or is of another format.
    """

    def __init__(self, path: Path | None, *, monotonic_s: Callable[[], float]) -> None:
        self._now_s = monotonic_s
        self._entries: dict[str, tuple[Entry, str]] = {}
        self._leases: dict[str, _Lease] = {}
        self._history: deque[Change] = deque()
        self._watchers: set[_Watcher] = set()
        self._is_closed = False
        try:
            self._file = sqlite3.connect(path or ":memory:", isolation_level=None)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=NORMAL")
            self._file.executescript(_SCHEMA)
            self._load()
        except (sqlite3.Error, ValueError) as error:
            raise ConfigError(
                f"the coordination file {path} cannot be used: {error}",
                kind="coordination_file",
                hint="put it back, or move it away: the daemons then rebuild what it held",
            ) from error
        self._oldest = self.revision  # changes after this revision are in the history

    def _load(self) -> None:
        meta = dict(self._file.execute("SELECT name, value FROM meta"))
        if meta["format"] != 1:
            raise ValueError("written by another version of snapd")
        self.revision = int(meta["revision"])
        now_s = self._now_s()
        for lease, ttl_s in self._file.execute("SELECT id, ttl_s FROM leases"):
            self._leases[lease] = _Lease(ttl_s, now_s + ttl_s, set())
        for key, value, version, lease in self._file.execute(
            "SELECT key, value, version, lease FROM entries"
        ):
            self._entries[key] = Entry(value, version), lease
            if lease:
                self._leases[lease].keys.add(key)

    def read(self, prefix: str) -> Reading:
        self._check_open()
        checked_key(prefix)
        items = {key: entry for key, (entry, _) in self._entries.items() if key.startswith(prefix)}
        return Reading(self.revision, dict(sorted(items.items())))

    def transact(self, lease: str, checks: Sequence[Check], writes: Sequence[Write]) -> bool:
        """Raises: FencedError: kind `lease`: a leased write without an open lease. UnavailableError: kind `keys`."""
        self._check_open()
        check_transaction(checks, writes)
        if any(write.is_leased and write.value is not None for write in writes) and lease not in self._leases:
            raise _lease_ended()
        if any(self._version(check.key) != check.version for check in checks):
            return False
        if len(self._entries) + len(writes) > KEYS_MAX:
            raise UnavailableError("the coordination store is full", kind="keys", keys=len(self._entries))
        self._commit([(write, lease if write.is_leased else "") for write in writes])
        return True

    def keep_lease(self, lease: str, ttl_s: float, *, is_new: bool) -> None:
        """Renew, or open with `is_new`. Raises FencedError (kind `lease`): it has ended; its keys are gone."""
        self._check_open()
        if not 0.05 <= ttl_s <= TTL_S_MAX or not 0 < len(lease) <= 256:
            raise ConfigError("a lease of no sensible length", kind="lease_ttl", ttl_s=ttl_s)
        held = self._leases.get(lease)
        if held is None and not is_new:
            raise _lease_ended()
        if held is None and len(self._leases) >= LEASES_MAX:
            raise UnavailableError("too many leases", kind="leases")
        if held is None or held.ttl_s != ttl_s:
            self._write(("INSERT OR REPLACE INTO leases VALUES (?, ?)", (lease, ttl_s)))
        keys = held.keys if held else set()
        self._leases[lease] = _Lease(ttl_s, self._now_s() + ttl_s, keys)

    def end_lease(self, lease: str) -> None:
        self._check_open()
        held = self._leases.get(lease)
        if held is None:
            return
        self._commit([(Write(key, None), "") for key in sorted(held.keys)], ended=lease)

    def expire(self) -> None:
        """End the leases whose time is over. Called by `run`; nothing else ends one."""
        now_s = self._now_s()
        for lease in [name for name, held in self._leases.items() if held.ends_s <= now_s]:
            self.end_lease(lease)

    async def run(self) -> None:
        """End leases in time, until cancelled. A stall of this process is not held against its clients: they could not
        renew meanwhile.
        """
        while True:
            before_s = self._now_s()
            await asyncio.sleep(TICK_S)
            stalled_s = self._now_s() - before_s - TICK_S
            if stalled_s > STALL_S:
                for held in self._leases.values():
                    held.ends_s += stalled_s
            self.expire()

    async def watch(self, prefix: str, after_revision: int) -> AsyncIterator[Change]:
        """See `KeyValue.watch`; kinds `compacted`, `watch_behind`, `closed`."""
        self._check_open()
        checked_key(prefix)
        if not self._oldest <= after_revision <= self.revision:
            raise UnavailableError("this revision is not to be had any more", kind="compacted")
        if len(self._watchers) >= WATCHERS_MAX:
            raise UnavailableError("too many watchers", kind="watchers")
        past = (c for c in self._history if c.revision > after_revision and c.key.startswith(prefix))
        watcher = _Watcher(prefix, deque(past), asyncio.Event())
        self._watchers.add(watcher)
        try:
            while True:
                while watcher.changes:
                    yield watcher.changes.popleft()
                if watcher.changes is None:
                    raise UnavailableError("this watcher did not keep up", kind="watch_behind")
                self._check_open()
                watcher.wake.clear()
                await watcher.wake.wait()
        finally:
            self._watchers.discard(watcher)

    def close(self) -> None:
        """Idempotent. Watchers end with UnavailableError; leases stay in the file."""
        if not self._is_closed:
            self._is_closed = True
            self._file.close()
            for watcher in self._watchers:
                watcher.wake.set()

    def _version(self, key: str) -> int:
        found = self._entries.get(key)
        return found[0].version if found else 0

    def _commit(self, writes: Sequence[tuple[Write, str]], ended: str = "") -> None:
        """One revision: first in the file, then in memory, then told to the watchers."""
        revision = self.revision + 1
        changes: list[tuple[Change, str]] = []
        for write, lease in writes:
            before = self._version(write.key)
            if write.value is not None:
                changes.append((Change(write.key, write.value, before + 1, revision), lease))
            elif before:
                changes.append((Change(write.key, None, 0, revision), ""))
        statements = [_statement(change, lease) for change, lease in changes]
        if changes:
            statements.append(("UPDATE meta SET value = ? WHERE name = 'revision'", (revision,)))
        if ended:
            statements.append(("DELETE FROM leases WHERE id = ?", (ended,)))
        self._write(*statements)
        if ended:
            del self._leases[ended]
        if changes:
            self.revision = revision
            for change, lease in changes:
                self._take_up(change, lease)
            self._tell([change for change, _ in changes])

    def _take_up(self, change: Change, lease: str) -> None:
        before = self._entries.pop(change.key, None)
        if before is not None and before[1] in self._leases:
            self._leases[before[1]].keys.discard(change.key)
        if change.value is not None:
            self._entries[change.key] = Entry(change.value, change.version), lease
            if lease:
                self._leases[lease].keys.add(change.key)

    def _tell(self, changes: Iterable[Change]) -> None:
        for change in changes:
            self._history.append(change)
            for watcher in self._watchers:
                if watcher.changes is not None and change.key.startswith(watcher.prefix):
                    watcher.changes.append(change)
                    if len(watcher.changes) > BACKLOG_MAX:
                        watcher.changes = None
                    watcher.wake.set()
        while len(self._history) > HISTORY_MAX:
            self._oldest = self._history.popleft().revision

    def _write(self, *statements: tuple[str, tuple[object, ...]]) -> None:
        try:
            self._file.execute("BEGIN IMMEDIATE")
            try:
                for sql, values in statements:
                    self._file.execute(sql, values)
                self._file.execute("COMMIT")
            except sqlite3.Error:
                self._file.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise UnavailableError(f"the coordination file: {error}", kind="coordination_write") from error

    def _check_open(self) -> None:
        if self._is_closed:
            raise UnavailableError("the coordination store is closed", kind="closed")


class LocalKeyValue:
    """A client in the daemon that holds the store. Implements `KeyValue`; `client` names it, never given twice."""

    def __init__(self, server: KvServer, client: str) -> None:
        self._server = server
        self._client = client
        self._count = 0
        self._is_open = False

    @property
    def _lease(self) -> str:
        return f"{self._client}.{self._count}"

    async def read(self, prefix: str) -> Reading:
        return self._server.read(prefix)

    async def transact(self, checks: Sequence[Check], writes: Sequence[Write]) -> bool:
        return self._server.transact(self._lease if self._is_open else "", checks, writes)

    async def keep_lease(self, ttl_s: float) -> None:
        if not self._is_open:
            self._count += 1
        try:
            self._server.keep_lease(self._lease, ttl_s, is_new=not self._is_open)
        except FencedError:
            self._is_open = False
            raise
        self._is_open = True

    async def end_lease(self) -> None:
        if self._is_open:
            self._is_open = False
            self._server.end_lease(self._lease)

    def watch(self, prefix: str, after_revision: int) -> AsyncIterator[Change]:
        return self._server.watch(prefix, after_revision)

    async def close(self) -> None:
        """The lease goes on until it ends by itself, as with a store that is elsewhere."""


def _statement(change: Change, lease: str) -> tuple[str, tuple[object, ...]]:
    if change.value is None:
        return "DELETE FROM entries WHERE key = ?", (change.key,)
    return (
        "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)",
        (change.key, change.value, change.version, lease),
    )


def _lease_ended() -> FencedError:
    return FencedError("the lease has ended, and its keys with it", kind="lease")
