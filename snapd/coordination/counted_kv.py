"""A store that counts what it is asked: for figures, and for the bounds on writes that tests hold."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from snapd.coordination.kv import Change, Check, KeyValue, Reading, Write


@dataclass(slots=True)
class Counts:
    """`writes`: transactions that went through, as the store's disk sees them; `refused`: those that did not (they cost
    a round trip); `renewals` write nothing.
    """

    reads: int = 0
    writes: int = 0
    refused: int = 0
    keys_written: int = 0
    bytes_written: int = 0
    renewals: int = 0
    watches: int = 0
    changes_seen: int = 0


class CountedKeyValue:
    """Implements `KeyValue`. Several may share `counts`."""

    def __init__(self, store: KeyValue, counts: Counts | None = None) -> None:
        self._store = store
        self.counts = counts if counts is not None else Counts()

    async def read(self, prefix: str) -> Reading:
        self.counts.reads += 1
        return await self._store.read(prefix)

    async def transact(self, checks: Sequence[Check], writes: Sequence[Write]) -> bool:
        is_done = await self._store.transact(checks, writes)
        if is_done:
            self.counts.writes += 1
            self.counts.keys_written += len(writes)
            self.counts.bytes_written += sum(len(write.key) + len(write.value or b"") for write in writes)
        else:
            self.counts.refused += 1
        return is_done

    async def keep_lease(self, ttl_s: float) -> None:
        self.counts.renewals += 1
        await self._store.keep_lease(ttl_s)

    async def end_lease(self) -> None:
        await self._store.end_lease()

    async def watch(self, prefix: str, after_revision: int) -> AsyncIterator[Change]:
        self.counts.watches += 1
        async for change in self._store.watch(prefix, after_revision):
            self.counts.changes_seen += 1
            yield change

    async def close(self) -> None:
        await self._store.close()
