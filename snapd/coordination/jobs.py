"""One job's share of coordination in a cluster. Implements `base.Coordination` above `ClusterState` and its store.

Generations are given out by compare-and-set on one key, above everything that this daemon or the rebuilt table has
seen. The synchronous questions are answered from a cache that `run` keeps fresh. A store that has lost generations
which this daemon knows (rolled back, wiped) is doubted, and gets them back; so the key is never deleted, not even with
its job.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from snapd.coordination.cluster import ClusterState
from snapd.coordination.job_records import (
    Newest,
    Table,
    bounded,
    floors_from_json,
    floors_to_json,
    generations_from_json,
    generations_to_json,
    merged,
    newest_number,
    removed_from_bytes,
)
from snapd.coordination.kv import Check, Entry, Write
from snapd.coordination.newest import NewestRecord
from snapd.core.generations import Assignment, Generation, assign
from snapd.core.geometry import is_chunk_size
from snapd.core.ids import SnapshotId
from snapd.core.interval import Interval
from snapd.errors import ConflictError, FencedError, RemoteProtocolError, SnapdError, UnavailableError

ATTEMPTS_MAX = 16
READY_LEASES = 2.0  # so many leases long a new generation waits for the store to be there
Answer = TypeVar("Answer")


class ClusterCoordination:
    """For one job, in one daemon. `run` must run beside it; nothing else of it blocks training."""

    is_clustered = True

    def __init__(self, state: ClusterState, job: str) -> None:
        self._state, self._job = state, job
        self._table: Table = {}
        self._interval = Interval()
        self._unreadable = ""  # what was told last
        self._is_short = False  # the store seemed to lack rows that are known here
        self._collector = ""
        self._removed_through = 0
        self._claimed_under = 0
        self._revision = 0  # of the last reading
        self._record = NewestRecord(state, job, may_write=self._may_record, lease_ended=self._lease_ended)
        self._changed = asyncio.Event()
        self._above = 0

    # What the job's runtime asks (base.Coordination).

    async def next_generation(self, *, incarnation: str, rollback_count: int, world_size: int) -> Assignment:
        """Also raises UnavailableError: the store is away, or (kind `distrusted`) knows less than it did."""
        await self._wait_trusted()

        def give(table: Table) -> tuple[Assignment, Table | None]:
            answer = assign(
                table, incarnation=incarnation, rollback_count=rollback_count, world_size=world_size
            )
            if not answer.is_new:
                return answer, None
            number = max(
                answer.generation.number, self._state.generation_seen(self._job) + 1, self._above + 1
            )
            row = replace(answer.generation, number=number)
            return replace(answer, generation=row), bounded([*table.values(), row])

        answer, is_ours = await self._update(give)
        self._state.saw_generation(self._job, answer.generation.number)
        return replace(answer, is_new=is_ours)

    async def agree_chunk_bytes(self, chosen: int) -> int:
        """Also raises UnavailableError."""
        key = self._state.keys.chunk_bytes(self._job)
        for _ in range(ATTEMPTS_MAX):
            entry = (await self._state.store.read(key)).items.get(key)
            if entry is not None and entry.value.isdigit() and is_chunk_size(int(entry.value)):
                return int(entry.value)
            check = Check(key, entry.version if entry else 0)
            if await self._state.store.transact([check], [Write(key, str(chosen).encode("ascii"))]):
                return chosen
        raise UnavailableError("the chunk size changes too fast", kind="contention", job=self._job)

    async def agree_tier_floor(self, tier: str, found: int) -> int:
        """Also raises UnavailableError."""
        await self._wait_trusted()
        key = self._state.keys.tier_floors(self._job)
        for _ in range(ATTEMPTS_MAX):
            entry = (await self._state.store.read(key)).items.get(key)
            floors = floors_from_json(entry.value) if entry is not None else {}
            if tier not in floors:
                check = Check(key, entry.version if entry else 0)
                value = floors_to_json({**floors, tier: found})
                if not await self._state.store.transact([check], [Write(key, value)]):
                    continue
            floor = floors.get(tier, found)
            self.start_above(floor)
            return floor
        raise UnavailableError("what tiers have changes too fast", kind="contention", job=self._job)

    def start_above(self, generation: int) -> None:
        self._above = max(self._above, generation)

    async def commit_parent(self, generation: int, parent: SnapshotId) -> None:
        def set_parent(table: Table) -> tuple[None, Table | None]:
            row = next((row for row in table.values() if row.number == generation), None)
            if row is None or (row.parent is not None and row.parent != parent):
                raise ConflictError("the generation has another parent", kind="parent", generation=generation)
            if row.parent == parent:
                return None, None
            return None, {**table, (row.incarnation, row.rollback_count): replace(row, parent=parent)}

        await self._update(set_parent)

    def generation(self, number: int) -> Generation | None:
        return next((row for row in self._table.values() if row.number == number), None)

    def current(self) -> int:
        return newest_number(self._table)

    def interval(self) -> Interval:
        return self._interval

    def configure_interval(self, steps: int) -> None:
        self._interval = Interval(configured=max(1, steps))

    def resume_interval(self, steps: int, widened_steps: int, from_step: int) -> None:
        self._interval = Interval(configured=max(1, steps))
        self.set_interval(widened_steps, from_step)

    def set_interval(self, steps: int, from_step: int) -> None:
        """As the collector said: `steps` from `from_step` on; 0, or no multiple of the configured: as configured."""
        configured = self._interval.configured
        if steps > 0 and steps % configured == 0:
            self._interval = Interval(configured, steps // configured, from_step)
        else:
            self._interval = Interval(configured)

    def take_interval(self, interval: Interval) -> None:
        self._interval = interval

    def note_abort(self, *, newest_step_seen: int) -> tuple[Interval, str]:
        return self._interval, "the job's collector decides"

    def note_complete(self, *, newest_step_seen: int) -> tuple[Interval, str]:
        return self._interval, "the job's collector decides"

    # The collector.

    @property
    def collector(self) -> str:
        """The node that holds the job's collector key, as far as is known; empty: none."""
        return self._collector

    @property
    def is_collector(self) -> bool:
        """Whether it is this daemon, under the lease that it holds now."""
        state = self._state
        return (
            state.away is None
            and self._collector == state.member.node
            and self._claimed_under == state.lease_serial
        )

    async def claim_collector(self) -> str:
        """Return the node that collects this job's reports: this one, if nobody did. Raises UnavailableError,
        FencedError (kind `lease`).
        """
        state, key, node = self._state, self._state.keys.collector(self._job), self._state.member.node
        for _ in range(ATTEMPTS_MAX):
            if self.is_collector:
                return node
            found = (await state.store.read(key)).items.get(key)
            holder = found.value.decode("ascii", "replace") if found else ""
            if holder not in ("", node):
                self._collector = holder
                return holder
            serial = state.lease_serial
            check = Check(key, found.version if found else 0)
            if await state.store.transact([check], [Write(key, node.encode("ascii"), is_leased=True)]):
                self._collector, self._claimed_under = node, serial
                self._tell()
                return node
        raise UnavailableError("the collector changes too fast", kind="contention", job=self._job)

    async def release_collector(self) -> None:
        """Let another daemon collect. Idempotent."""
        if self.is_collector:
            self._collector, self._claimed_under = "", 0
            await self._state.store.transact([], [Write(self._state.keys.collector(self._job), None)])

    async def changed(self, timeout_s: float | None = None) -> None:
        """Wait until generations or collector change, at most `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return

    def _lease_ended(self) -> None:
        """The store has refused what our lease should allow: whoever claims the key now collects."""
        self._claimed_under = 0
        self._tell()

    # The newest snapshots, for those who were not there.

    def publish_newest(self, newest: Newest, written: Callable[[Newest], None] = lambda newest: None) -> None:
        """By the collector. See `NewestRecord.publish`."""
        self._record.publish(newest, written)

    def _may_record(self, newest: Newest) -> bool:
        is_gone = newest.complete is None or newest.complete.generation <= self._removed_through
        return self.is_collector and not is_gone

    async def take_over_newest(self) -> Newest | None:
        """By a new collector. See `NewestRecord.take_over`."""
        return await self._record.take_over()

    async def read_newest(self) -> Newest | None:
        """What the store says now. Raises UnavailableError; RemoteProtocolError (kind `record`)."""
        return await self._record.read()

    # Its end.

    @property
    def removed_through(self) -> int:
        """Everything of generations up to this one is gone, on all nodes; 0: nothing was removed."""
        return self._removed_through

    async def remove_through(self, generation: int) -> None:
        """Have every node drop all of the generations up to this one, and forget the newest snapshots if they are of
        these. The generations themselves are never deleted. Raises UnavailableError, FencedError.
        """
        state, keys = self._state, self._state.keys
        for _ in range(ATTEMPTS_MAX):
            found = (await state.store.read(keys.removed(self._job))).items.get(keys.removed(self._job))
            through = max(generation, removed_from_bytes(found.value if found else None))
            newest = await self.read_newest()
            writes = [Write(keys.removed(self._job), str(through).encode("ascii"))]
            known = newest.complete or newest.protected if newest else None
            if known is not None and known.generation <= through:
                writes.append(Write(keys.newest(self._job), None))
            check = Check(keys.removed(self._job), found.version if found else 0)
            if await state.store.transact([check], writes):
                self._take_up(keys.removed(self._job), writes[0].value)
                return
        raise UnavailableError("the job is removed by others too", kind="contention", job=self._job)

    # Its life.

    async def refresh(self) -> None:
        """Read generations and collector now. Raises UnavailableError; RemoteProtocolError (kind `record`)."""
        keys, job = self._state.keys, self._job
        reading = await self._state.store.read(keys.job(job))
        for key in (keys.generations(job), keys.collector(job), keys.removed(job)):
            entry = reading.items.get(key)
            self._take_up(key, entry.value if entry else None)
        self._revision = reading.revision

    async def run(self) -> None:
        """Keep the cache fresh and write what is published, until cancelled; then the collector's key is let go."""
        publishing = asyncio.ensure_future(self._record.run())
        try:
            while True:
                try:
                    await self._follow()
                except RemoteProtocolError as error:
                    if str(error) != self._unreadable:
                        self._state.note("job.unreadable", {"job": self._job, "reason": str(error)})
                    self._unreadable = str(error)
                except (UnavailableError, FencedError):
                    pass  # the state says once why the store is away
                await asyncio.sleep(0.2 + self._state.environment.chance())
        finally:
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)
            await self._let_go()

    async def _follow(self) -> None:
        await self.refresh()
        await self._mend()
        prefix = self._state.keys.job(self._job)
        async for change in self._state.store.watch(prefix, self._revision):
            self._take_up(change.key, change.value)
            await self._mend()

    def _take_up(self, key: str, value: bytes | None) -> None:
        keys = self._state.keys
        if key == keys.generations(self._job):
            stored = generations_from_json(value)
            self._table = merged(stored, self._table)
            self._is_short = self._lacks(stored)
            if stored:
                self._state.saw_generation(self._job, newest_number(self._table))
        elif key == keys.collector(self._job):
            self._collector = value.decode("ascii", "replace") if value else ""
        elif key == keys.removed(self._job):
            self._removed_through = max(self._removed_through, removed_from_bytes(value))
        self._tell()

    def _known(self) -> int:
        return max(newest_number(self._table), self._state.seen.generations.get(self._job, 0))

    def _lacks(self, stored: Table) -> bool:
        return newest_number(stored) < self._known() or not set(self._table) <= set(stored)

    async def _mend(self) -> None:
        """What came may have been overtaken by what this daemon wrote meanwhile, so a loss is believed only after a
        fresh reading. Then the store is doubted, and given back what is known here.
        """
        key, state = self._state.keys.generations(self._job), self._state
        while self._is_short:
            entry = (await state.store.read(key)).items.get(key)
            stored, known = generations_from_json(entry.value if entry else None), self._known()
            if newest_number(stored) < known and state.view.floors.get(self._job, 0) < known:
                state.doubt(
                    f"job {self._job!r} had generation {known}, the store knows {newest_number(stored)}"
                )
            whole = merged(stored, self._table)
            if set(whole) <= set(stored):
                self._is_short = False
            elif await state.store.transact(
                [Check(key, entry.version if entry else 0)], [Write(key, generations_to_json(whole))]
            ):
                state.note("job.restored", {"job": self._job, "generation": newest_number(whole)})
                self._is_short = False
            else:
                await asyncio.sleep(state.environment.chance())

    async def _update(self, decide: Callable[[Table], tuple[Answer, Table | None]]) -> tuple[Answer, bool]:
        """Compare-and-set on the generations: read, decide, write, until it holds. A lost answer is settled by
        reading back. Returns the decision, and whether it was this call that wrote it.
        """
        key = self._state.keys.generations(self._job)
        sent: bytes | None = None
        for attempt in range(ATTEMPTS_MAX):
            entry = (await self._state.store.read(key)).items.get(key)
            table = self._stored(entry)
            answer, wanted = decide(table)
            if wanted is None:
                self._keep(table)
                return answer, sent is not None and entry is not None and entry.value == sent
            value, sent = generations_to_json(wanted), None
            check = Check(key, entry.version if entry else 0)
            try:
                if await self._state.store.transact([check], [Write(key, value)]):
                    self._keep(wanted)
                    return answer, True
            except UnavailableError:
                sent = value
            if attempt:
                await asyncio.sleep(self._state.environment.chance() * 0.1 * attempt)
        raise UnavailableError("the generations change too fast", kind="contention", job=self._job)

    def _stored(self, entry: Entry | None) -> Table:
        return merged(generations_from_json(entry.value if entry else None), self._table)

    def _keep(self, table: Table) -> None:
        self._table = bounded(table.values())
        self._tell()

    async def _wait_trusted(self) -> None:
        """A store that was not looked at yet is waited for; one that is away or not believed gives out nothing, nor one
        that other members do not believe: a daemon that came back empty knows nothing that it could miss.
        """
        state = self._state
        deadline_s = state.environment.monotonic_s() + READY_LEASES * state.settings.lease_s
        while state.away is not None or (state.is_being_built and not state.distrust):
            left_s = deadline_s - state.environment.monotonic_s()
            if left_s <= 0 and state.away is None:
                break
            if left_s <= 0 and state.away is not None:
                raise UnavailableError(
                    f"the cluster's store is away: {state.away.reason}", kind="coordination_away"
                )
            await state.changed(state.serial, left_s)
        if state.distrust or state.is_being_built:
            reason = state.distrust or "it has no group table yet, or other members do not believe it"
            raise UnavailableError(
                f"the cluster's store is not believed: {reason}",
                kind="distrusted",
                hint="it is rebuilt from the daemons that are alive; `snapd status` shows which are missing",
            )

    async def _let_go(self) -> None:
        try:
            async with asyncio.timeout(self._state.settings.lease_s):
                await self.release_collector()
        except (SnapdError, TimeoutError) as error:
            self._state.note("lease.left", {"reason": str(error), "job": self._job})

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
