"""One daemon's view of its cluster, and its own place in it.

`ClusterState.run` holds a lease, announces the daemon, watches, plans when it is elected, and begins again from a fresh
reading after every interruption. Everybody else reads its properties, on the event loop, and waits with `changed`.

What it promises:

- A store that knows less than this daemon has seen (wiped, rolled back) is not believed: `distrust` says why, `token`
  and `table` stay as they were, and no new level may begin, until a table above everything that was seen is there.
- What is acted upon was noted in the highwater mark before.
- While the store is away, the last token and table stay; `away` says since when and why.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any

from snapd.coordination.announcing import Announcer
from snapd.coordination.highwater import HighwaterStore
from snapd.coordination.kv import Change, Check, KeyValue, Reading, Write
from snapd.coordination.planner import Planner
from snapd.coordination.settings import ClusterEnvironment, ClusterSettings, Note, Place
from snapd.core.cluster import GroupTable, Member, Token
from snapd.core.keyspace import Keyspace
from snapd.core.membership import ClusterView, Highwater, advanced, judge, with_generation
from snapd.errors import ConfigError, ConflictError, FencedError, InternalError, SnapdError, UnavailableError

RETRY_S = 0.1


@dataclass(frozen=True, slots=True)
class Away:
    since_s: float
    reason: str
    kind: str


class ClusterState:
    """One per daemon.

    Raises:
        ConfigError: kind `highwater`.
    """

    def __init__(
        self,
        store: KeyValue,
        member: Member,
        settings: ClusterSettings,
        *,
        keys: Keyspace,
        environment: ClusterEnvironment,
        highwater: HighwaterStore,
        place: Place,
        note: Note,
    ) -> None:
        self.store, self.settings, self.keys, self.environment = store, settings, keys, environment
        self.note = note
        self._highwater = highwater
        self.seen: Highwater = highwater.load()
        self.view = ClusterView(keys)
        self.away: Away | None = Away(environment.monotonic_s(), "not asked yet", "starting")
        self.distrust = ""
        self.table: GroupTable | None = self.seen.table
        self.serial = 0
        self.lease_serial = 1
        self._not_below = 0
        self._revision = 0
        self._absent_since: dict[str, float] = {}
        self._wake = asyncio.Event()
        self._announcer = Announcer(self, member)
        self._planner = Planner(self, place)

    # What everybody else reads.

    @property
    def member(self) -> Member:
        """This daemon, as it is announced."""
        return self._announcer.member

    @property
    def token(self) -> Token | None:
        """The newest token that was believed. None: this daemon has never seen its cluster."""
        return Token(self.seen.cluster_id, self.seen.epoch) if self.seen.cluster_id else None

    @property
    def is_trusted(self) -> bool:
        """Whether new levels may begin: the store has been asked, and knows no less than this daemon."""
        return not self.distrust and self.token is not None

    @property
    def is_being_built(self) -> bool:
        """There is no group table, or some living member has seen more than it: what was given out is not known yet."""
        table = self.view.table
        return table is None or self.view.needs_epoch_above >= max(1, table.epoch)

    @property
    def is_planner(self) -> bool:
        return self._planner.is_elected

    @property
    def members(self) -> Mapping[str, Member]:
        """The living, by name. While the store is away: those that lived when it went."""
        return {name: each.member for name, each in self.view.members.items()}

    @property
    def absent(self) -> Mapping[str, float]:
        """Nodes that were members, or are in the table, and hold no lease: since when (monotonic, as this daemon saw
        it)."""
        return dict(self._absent_since)

    @property
    def lost(self) -> frozenset[str]:
        """Those absent for longer than `lost_after_s`; none are added while the store is away."""
        now_s = self.away.since_s if self.away else self.environment.monotonic_s()
        limit_s = self.settings.lost_after_s
        return frozenset(name for name, since_s in self._absent_since.items() if now_s - since_s >= limit_s)

    @property
    def drains(self) -> frozenset[str]:
        draining = {name for name, each in self.view.members.items() if each.member.is_draining}
        return frozenset(self.view.drains | draining)

    def generation_seen(self, job: str) -> int:
        """The next generation of a job must be above this, as far as this daemon knows."""
        return max(self.seen.generations.get(job, 0), self.view.floors.get(job, 0))

    async def changed(self, after: int, timeout_s: float | None = None) -> int:
        """Wait until `serial` is above `after`, or for `timeout_s`; return it."""
        if self.serial <= after:
            try:
                async with asyncio.timeout(timeout_s):  # wait_for may swallow a cancellation (Python 3.11)
                    await self._wake.wait()
            except TimeoutError:
                return self.serial
        return self.serial

    # What others tell it.

    def saw_generation(self, job: str, number: int) -> None:
        """Note that a job has this generation, before anything happens under it. Raises UnavailableError."""
        seen = with_generation(self.seen, job, number)
        if seen is not self.seen:
            self._highwater.save(seen)
            self.seen = seen

    def doubt(self, reason: str) -> None:
        """The store was caught knowing less than it did: trust it again only under a newer epoch."""
        epoch = self.view.table.epoch if self.view.table else 0
        self._not_below = max(1, self._not_below, epoch, self.seen.epoch)
        self.note("cluster.doubted", {"reason": reason, "epoch": epoch})
        self._judge()

    async def set_drain(self, node: str, is_draining: bool) -> None:
        """Have a node emptied, or take that back. It keeps its place until it says that it is empty (`set_leaving`),
        or is gone. Raises UnavailableError.
        """
        value = b"1" if is_draining else None
        await self.store.transact([], [Write(self.keys.drain(node), value)])

    def set_leaving(self, is_leaving: bool) -> None:
        """Announce that this node wants no place in the group table, or wants one again. Idempotent."""
        member = self._announcer.member
        if member.is_draining != is_leaving:
            self._announcer.member = replace(member, is_draining=is_leaving)
            self._announcer.wake.set()

    # Its life.

    async def run(self) -> None:
        """Until cancelled; then the lease is let go.

        Raises:
            ConflictError: kinds `duplicate_node`, `same_host`: another daemon is here already. ConfigError.
        """
        failures = 0
        try:
            while True:
                began_serial = self.serial
                try:
                    await self._session()
                except (ConflictError, ConfigError, InternalError):
                    raise
                except SnapdError as error:
                    failures = 0 if self.away is None else failures + 1
                    self._went_away(error)
                if self.serial == began_serial:
                    self._tell()
                await asyncio.sleep(self._backoff_s(failures))
        finally:
            await self._leave()

    async def _session(self) -> None:
        """From a fresh reading to the first error."""
        await self.store.keep_lease(self.settings.lease_s)
        await self.read_anew()
        await self._announcer.announce()
        self._came_back()
        await _first_error(
            self._renew(), self._watch(), self._announcer.keep_announced(), self._planner.run()
        )

    async def read_anew(self) -> None:
        """Replace the view by what the store says now, and give the cluster an id if it has none."""
        reading = await self.store.read(self.keys.cluster)
        if self.keys.id not in reading.items:
            name = self.environment.random_id().encode("ascii")
            await self.store.transact([Check(self.keys.id, 0)], [Write(self.keys.id, name)])
            reading = await self.store.read(self.keys.cluster)
        if self.keys.id not in reading.items:
            raise UnavailableError("the cluster has no id", kind="cluster_id")
        self._take_up(reading)

    def _take_up(self, reading: Reading) -> None:
        view = ClusterView(self.keys)
        for key, entry in reading.items.items():
            view.apply(key, entry.value, entry.version)
        went_back = reading.revision < self._revision and view.cluster_id == self.view.cluster_id
        self.view, self._revision = view, reading.revision
        self._count_absent()
        if went_back:
            self.doubt("the store's revision has gone back")
        self._judge()
        self._tell()

    async def _watch(self) -> None:
        async for change in self.store.watch(self.keys.cluster, self._revision):
            self._revision = change.revision
            self.view.apply(change.key, change.value, change.version)
            self._follow(change)
            self._tell()
        raise UnavailableError("the watch has ended", kind="watch")

    def _follow(self, change: Change) -> None:
        keys = self.keys
        if change.key == keys.id:
            raise UnavailableError("the cluster's id was changed under us", kind="cluster_id")
        if change.key == keys.member(self.member.node):
            self._announcer.check_ours()
        if change.key in (keys.groups, keys.floors):
            self._judge()
        if change.key == keys.groups:
            self._count_absent()
        elif change.key.startswith(keys.members):
            name = change.key.removeprefix(keys.members)
            if change.value is not None:
                self._absent_since.pop(name, None)
            else:
                self._absent_since.setdefault(name, self.environment.monotonic_s())
                self.note("member.absent", {"node": name})
        elif change.key.startswith(keys.known) and change.value is None:
            self._count_absent()

    def _count_absent(self) -> None:
        """Whom we expect and do not see: since now, unless it is known to be longer."""
        expected = set(self.view.known)
        for table in (self.view.table, self.table):
            expected.update(node for group in (table.groups if table else ()) for node in group.nodes)
        now_s = self.environment.monotonic_s()
        self._absent_since = {
            name: self._absent_since.get(name, now_s)
            for name in sorted(expected)
            if name not in self.view.members
        }

    def _judge(self) -> None:
        verdict = judge(self.seen, self.view, not_below=self._not_below)
        if not verdict.is_trusted:
            if verdict.reason != self.distrust:
                self.note("cluster.distrusted", {"reason": verdict.reason})
            self.distrust = verdict.reason
            self._announcer.wake.set()
            return
        seen = advanced(self.seen, self.view)
        if seen != self.seen:
            self._highwater.save(seen)
            self.seen = seen
            self.note(
                "epoch.changed", {"epoch": seen.epoch, "reason": seen.table.reason if seen.table else ""}
            )
        if self.distrust:
            self.note("cluster.trusted", {"epoch": seen.epoch, "reason": verdict.reason})
        self.distrust, self._not_below, self.table = "", 0, seen.table

    @property
    def needs_epoch_above(self) -> int:
        """0 while nothing is doubted."""
        epoch = self.view.table.epoch if self.view.table else 0
        return max(1, self.seen.epoch, epoch, self._not_below) if self.distrust else 0

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self.settings.lease_s / 3)
            await self.store.keep_lease(self.settings.lease_s)

    def _came_back(self) -> None:
        """Who was absent before the store went could not come back meanwhile: that time does not count."""
        if self.away is not None:
            away_s = self.environment.monotonic_s() - self.away.since_s
            for name, since_s in self._absent_since.items():
                if since_s < self.away.since_s:
                    self._absent_since[name] = since_s + away_s
            self.note("cluster.joined", {"cluster": self.view.cluster_id, "members": len(self.view.members)})
        self.away = None
        self._tell()

    def _went_away(self, error: SnapdError) -> None:
        if isinstance(error, FencedError):
            self.lease_serial += 1
        if self.away is None or self.away.kind != error.kind:
            self.note("coordination.away", {"kind": error.kind, "reason": str(error)})
        since_s = self.away.since_s if self.away else self.environment.monotonic_s()
        self.away = Away(since_s, str(error), error.kind)
        self._tell()

    def _backoff_s(self, failures: int) -> float:
        limit_s = min(self.settings.retry_max_s, RETRY_S * 2.0 ** min(failures, 10))
        return limit_s * (0.5 + self.environment.chance() / 2)

    def _tell(self) -> None:
        self.serial += 1
        self._wake.set()
        self._wake = asyncio.Event()

    async def _leave(self) -> None:
        try:
            async with asyncio.timeout(self.settings.lease_s):
                await self.store.end_lease()
        except (SnapdError, TimeoutError) as error:
            self.note("lease.left", {"reason": str(error)})  # it ends by itself


async def _first_error(*works: Coroutine[Any, Any, None]) -> None:
    """Run all until the first one ends; cancel and await the others; raise its error."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, asyncio.CancelledError):
            raise result
