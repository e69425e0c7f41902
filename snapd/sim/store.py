"""The coordinator's store as clients meet it: keys with versions, leases, watches; it can be away, wiped, rolled back.

Every write is counted by what its key is for: the figures of docs/simulation.md come from here.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from snapd.coordination.kv import Change, Check, Entry, Reading, Write
from snapd.errors import FencedError, UnavailableError
from snapd.sim.life import Life
from snapd.sim.network import STORE, Network

TIMEOUT_S = 1.0
HISTORY_MAX = 4096


@dataclass(slots=True)
class _Lease:
    ttl_s: float
    ends_s: float
    keys: dict[str, None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Backup:
    """What a copy of the store's files holds."""

    revision: int
    entries: dict[str, tuple[Entry, str]]
    leases: dict[str, float]


class SimStore:
    """The store itself. `before_write` sees every write before it is taken (for the checkers), `after_change` each
    change when it is there.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, network: Network) -> None:
        self.network = network
        self.is_up = True
        self.revision = 0
        self.entries: dict[str, tuple[Entry, str]] = {}
        self.writes: Counter[str] = Counter()
        self.before_write: list[Callable[[Write], None]] = []
        self.after_change: list[Callable[[Change], None]] = []
        self._loop = loop
        self._order: list[str] = []  # the keys of `entries`
        self._leases: dict[str, _Lease] = {}
        self._history: deque[Change] = deque()
        self._oldest = 0
        self._watchers: dict[Watcher, None] = {}

    # what happens to it

    def stop(self) -> None:
        """It answers nothing until `start`."""
        self.is_up = False
        self._break_watches("the store went away")

    def start(self) -> None:
        """Leases are open again for their whole time, as after a restart of etcd."""
        self.is_up = True
        for name, lease in self._leases.items():
            self._extend(name, lease)

    def backup(self) -> Backup:
        leases = {name: lease.ttl_s for name, lease in self._leases.items()}
        return Backup(self.revision, dict(self.entries), leases)

    def put_back(self, copy: Backup | None) -> None:
        """Begin anew from a copy; None: from nothing."""
        self._break_watches("the store was replaced")
        self.revision = copy.revision if copy else 0
        self.entries = dict(copy.entries) if copy else {}
        self._order = sorted(self.entries)
        self._leases = {name: _Lease(ttl_s, 0.0) for name, ttl_s in (copy.leases if copy else {}).items()}
        for key, (_, lease) in self.entries.items():
            if lease:
                self._leases[lease].keys[key] = None
        self._history.clear()
        self._oldest = self.revision
        self.start()

    def admit(self, lease: str, writes: Sequence[Write], *, ttl_s: float) -> None:
        """Keys that were there before the run began; uncounted."""
        if lease:
            self._leases[lease] = _Lease(ttl_s, 0.0)
            self._extend(lease, self._leases[lease])
        self._commit([(write, lease if write.is_leased else "") for write in writes])

    # what clients do

    def read(self, prefix: str) -> Reading:
        found: dict[str, Entry] = {}
        for place in range(bisect_left(self._order, prefix), len(self._order)):
            key = self._order[place]
            if not key.startswith(prefix):
                break
            found[key] = self.entries[key][0]
        return Reading(self.revision, found)

    def transact(self, lease: str, checks: Sequence[Check], writes: Sequence[Write]) -> bool:
        if any(write.is_leased and write.value is not None for write in writes) and lease not in self._leases:
            raise FencedError("the lease has ended, and its keys with it", kind="lease")
        for check in checks:
            found = self.entries.get(check.key)
            if (found[0].version if found else 0) != check.version:
                return False
        for write in writes:
            for look in self.before_write:
                look(write)
            self.writes[_purpose(write.key)] += 1
        self.writes["transactions"] += 1
        self._commit([(write, lease if write.is_leased else "") for write in writes])
        return True

    def keep_lease(self, name: str, ttl_s: float, *, is_new: bool) -> None:
        lease = self._leases.get(name)
        if lease is None:
            if not is_new:
                raise FencedError("the lease has ended, and its keys with it", kind="lease")
            lease = self._leases[name] = _Lease(ttl_s, 0.0)
        self.writes["lease renewals"] += 1
        self._extend(name, lease)

    def end_lease(self, name: str) -> None:
        lease = self._leases.pop(name, None)
        if lease is not None:
            self._commit([(Write(key, None), "") for key in sorted(lease.keys)])

    def watch(self, watcher: Watcher, after: int) -> None:
        if not self._oldest <= after <= self.revision:
            raise UnavailableError("this revision is not to be had any more", kind="compacted")
        for change in self._history:
            if change.revision > after and change.key.startswith(watcher.prefix):
                watcher.send(change)
        self._watchers[watcher] = None

    def unwatch(self, watcher: Watcher) -> None:
        self._watchers.pop(watcher, None)

    # within

    def _extend(self, name: str, lease: _Lease) -> None:
        is_watched = lease.ends_s > self._loop.time()
        lease.ends_s = self._loop.time() + lease.ttl_s
        if not is_watched:
            self._loop.call_at(lease.ends_s, self._expire, name, lease)

    def _expire(self, name: str, lease: _Lease) -> None:
        if self._leases.get(name) is not lease or not self.is_up:
            return  # a store that is away ends no lease; `start` sets the timer anew
        if lease.ends_s > self._loop.time():
            self._loop.call_at(lease.ends_s, self._expire, name, lease)
        else:
            self.end_lease(name)

    def _commit(self, writes: Sequence[tuple[Write, str]]) -> None:
        revision, changes = self.revision + 1, []
        for write, lease in writes:
            former = self.entries.pop(write.key, None)
            if former is not None and former[1] in self._leases:
                self._leases[former[1]].keys.pop(write.key, None)
            if write.value is None:
                if former is not None:
                    del self._order[bisect_left(self._order, write.key)]
                    changes.append(Change(write.key, None, 0, revision))
                continue
            version = (former[0].version if former else 0) + 1
            if former is None:
                insort(self._order, write.key)
            self.entries[write.key] = Entry(write.value, version), lease
            if lease:
                self._leases[lease].keys[write.key] = None
            changes.append(Change(write.key, write.value, version, revision))
        if not changes:
            return
        self.revision = revision
        for change in changes:
            self._history.append(change)
            for look in self.after_change:
                look(change)
            for watcher in self._watchers:
                if change.key.startswith(watcher.prefix):
                    watcher.send(change)
        while len(self._history) > HISTORY_MAX:
            self._oldest = self._history.popleft().revision

    def _break_watches(self, reason: str) -> None:
        watchers, self._watchers = list(self._watchers), {}
        for watcher in watchers:
            watcher.break_off(reason)


def _purpose(key: str) -> str:
    parts = key.split("/")  # "", "snapd", NAME, kind, ...
    if parts[3] == "newest":
        return "newest"
    if parts[3] == "jobs":
        return parts[-1]
    return parts[4]


class Watcher:
    """One watch of one client: changes in the order in which they happened, each after a delay."""

    def __init__(self, client: SimKeyValue, prefix: str, after: int) -> None:
        self.prefix = prefix
        self._client = client
        self._after: int | None = after
        self._changes: deque[Change] = deque()
        self._error = ""
        self._last_s = 0.0
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> Watcher:
        return self

    async def __anext__(self) -> Change:
        client = self._client
        if self._after is not None:
            after, self._after = self._after, None
            await client.ask("watch", lambda: client.store.watch(self, after))
        while not self._changes:
            if self._error:
                raise UnavailableError(self._error, kind="watch")
            self._waiter = client.loop.create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                client.store.unwatch(self)
                raise
        return self._changes.popleft()

    def send(self, change: Change) -> None:
        """By the store. A change that is lost breaks the stream: the client notices a little later."""
        client = self._client
        delay = client.store.network.transit_s(STORE, client.node)
        if delay is None:
            client.loop.call_later(TIMEOUT_S, self.break_off, "the stream was cut")
            self._last_s = float("inf")
        if self._last_s != float("inf") and delay is not None:
            self._last_s = max(self._last_s, client.loop.time() + delay)
            client.loop.call_at(self._last_s, self._take, change)

    def _take(self, change: Change) -> None:
        if not self._error:
            self._changes.append(change)
            self._wake()

    def break_off(self, reason: str) -> None:
        self._error = self._error or reason
        self._client.store.unwatch(self)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class SimKeyValue:
    """A daemon's client. Implements `KeyValue`; `name` is never given twice."""

    def __init__(
        self, store: SimStore, loop: asyncio.AbstractEventLoop, life: Life, node: str, name: str
    ) -> None:
        self.store, self.loop, self.node = store, loop, node
        self._life = life
        self._name = name
        self._count = 0
        self._is_open = False

    async def ask(self, what: str, work: Callable[[], object]) -> object:
        """One call: it may not arrive, or be done and the answer be lost."""
        self._life.effect(f"{what} at the store")
        network, began_s = self.store.network, self.loop.time()
        there = network.transit_s(self.node, STORE)
        if there is not None:
            await asyncio.sleep(there)
            self._life.check()
            if self.store.is_up:
                result = work()
                back = network.transit_s(STORE, self.node)
                if back is not None:
                    await asyncio.sleep(back)
                    self._life.check()
                    return result
        await asyncio.sleep(began_s + TIMEOUT_S - self.loop.time())
        raise UnavailableError("the store does not answer", kind="away")

    async def read(self, prefix: str) -> Reading:
        reading = await self.ask("read", lambda: self.store.read(prefix))
        assert isinstance(reading, Reading)
        return reading

    async def transact(self, checks: Sequence[Check], writes: Sequence[Write]) -> bool:
        lease = self._lease if self._is_open else ""
        return bool(await self.ask("transact", lambda: self.store.transact(lease, checks, writes)))

    async def keep_lease(self, ttl_s: float) -> None:
        if not self._is_open:
            self._count += 1
        is_new = not self._is_open
        try:
            await self.ask("lease", lambda: self.store.keep_lease(self._lease, ttl_s, is_new=is_new))
        except FencedError:
            self._is_open = False
            raise
        self._is_open = True

    async def end_lease(self) -> None:
        if self._is_open:
            self._is_open = False
            await self.ask("end lease", lambda: self.store.end_lease(self._lease))

    def watch(self, prefix: str, after_revision: int) -> AsyncIterator[Change]:
        return Watcher(self, prefix, after_revision)

    async def close(self) -> None:
        """Its lease ends by itself."""

    @property
    def first_lease(self) -> str:
        """The name of the lease that it opens first."""
        return f"{self._name}.1"

    @property
    def _lease(self) -> str:
        return f"{self._name}.{self._count}"
