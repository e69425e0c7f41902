"""A job's newest snapshots in the store: what the next collector begins with.

Nobody is told that a snapshot is protected before it stands here, so that whoever collects next knows all that was ever
told. Its writing is fenced twice: the same transaction writes a leased key, which the store refuses to a collector
whose lease has ended; and a new collector writes the record as it found it, so that what the collector before it in the
same daemon, under the same lease, has still under way comes too late.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from snapd.coordination.cluster import ClusterState
from snapd.coordination.job_records import Newest, newest_from_json, newest_to_json
from snapd.coordination.kv import Check, Write
from snapd.errors import FencedError, SnapdError, UnavailableError

COMPLETE_AFTER_S = 1.0  # what is protected soon after is written with it
PROTECTED_EVERY_S = 0.25
RETRY_S = 1.0
ATTEMPTS_MAX = 16
NOTHING = Newest(None, None, 0)


class NewestRecord:
    """Of one job, in one daemon. `may_write`: this daemon collects the job, under the lease that it holds now, and what
    is to be written was not removed; `lease_ended`: the store says that the lease has ended.
    """

    def __init__(
        self,
        state: ClusterState,
        job: str,
        *,
        may_write: Callable[[Newest], bool],
        lease_ended: Callable[[], None],
    ) -> None:
        self._state, self._job = state, job
        self._may_write, self._lease_ended = may_write, lease_ended
        self.newest: Newest | None = None  # as last read or written here
        self._wanted: Newest | None = None
        self._wanted_since_s = 0.0
        self._written: Callable[[Newest], None] = lambda newest: None
        self._written_s = float("-inf")
        self._wake = asyncio.Event()
        self._taken_over = 0

    async def take_over(self) -> Newest | None:
        """By a new collector, which holds the job's key: what all before it have recorded. None of them records
        anything any more. Raises UnavailableError, FencedError; RemoteProtocolError (kind `record`).
        """
        self._taken_over += 1
        self._wanted = None
        for _ in range(ATTEMPTS_MAX):
            key = self._state.keys.newest(self._job)
            entry = (await self._state.store.read(key)).items.get(key)
            value = entry.value if entry is not None else newest_to_json(NOTHING)
            if await self._put(value, entry.version if entry is not None else 0):
                self.newest = newest_from_json(value)
                return self.newest if self.newest != NOTHING else None
        raise UnavailableError("the record changes too fast", kind="contention", job=self._job)

    async def _put(self, value: bytes, version: int) -> bool:
        keys, node = self._state.keys, self._state.member.node.encode("ascii")
        writes = [Write(keys.newest(self._job), value), Write(keys.recorder(self._job), node, is_leased=True)]
        return await self._state.store.transact([Check(keys.newest(self._job), version)], writes)

    async def read(self) -> Newest | None:
        """What the store says now. Raises UnavailableError; RemoteProtocolError (kind `record`)."""
        key = self._state.keys.newest(self._job)
        entry = (await self._state.store.read(key)).items.get(key)
        self.newest = newest_from_json(entry.value) if entry else None
        return self.newest

    def publish(self, newest: Newest, written: Callable[[Newest], None]) -> None:
        """Have it written, by the collector: what is protected at once, at most four times a second, the rest a second
        later; the last one wins. `written` is told what the store has, also when it had it before.
        """
        if self._wanted is None:
            self._wanted_since_s = self._state.environment.monotonic_s()
        self._wanted, self._written = newest, written
        self._wake.set()

    async def run(self) -> None:
        """Write what is published, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self._wait_due()
            wanted, self._wanted = self._wanted, None
            turn = self._taken_over
            if wanted is None or not self._may_write(wanted):
                continue
            try:
                await self._write(wanted, turn)
            except (SnapdError, OSError) as error:
                self._state.note("newest.unwritten", {"job": self._job, "reason": str(error)})
                if isinstance(error, FencedError) and error.kind == "lease":
                    self._lease_ended()
                if turn == self._taken_over:
                    self._wanted = self._wanted or wanted
                await asyncio.sleep(RETRY_S)
                self._wake.set()

    async def _wait_due(self) -> None:
        while (left_s := self._due_s() - self._state.environment.monotonic_s()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._wake.wait()
                    self._wake.clear()

    def _due_s(self) -> float:
        wanted, newest = self._wanted, self.newest
        if wanted is None:
            return float("-inf")
        known = (newest.protected, newest.protected_epoch) if newest else (None, 0)
        if wanted.protected is not None and (wanted.protected, wanted.protected_epoch) != known:
            return self._written_s + PROTECTED_EVERY_S
        return self._wanted_since_s + COMPLETE_AFTER_S

    async def _write(self, wanted: Newest, turn: int) -> None:
        state, key = self._state, self._state.keys.newest(self._job)
        self._written_s = state.environment.monotonic_s()
        entry = (await state.store.read(key)).items.get(key)
        value = newest_to_json(wanted)
        if entry is None or entry.value != value:
            if turn != self._taken_over or not self._may_write(wanted):
                raise UnavailableError("this collector has been followed by another", kind="no_collector")
            if not await self._put(value, entry.version if entry else 0):
                raise UnavailableError("the record changes too fast", kind="contention")
        if turn == self._taken_over:
            self.newest = wanted
            self._written(wanted)
