"""Single chunks of a stored snapshot, for ranks that cut it anew (elastic.py): only what they need is read."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from typing import NoReturn

from snapd.core.ids import SnapshotId
from snapd.core.manifest import ShardRecord
from snapd.core.stored import StoredShard
from snapd.errors import NotRestorable, SnapdError, UnavailableError
from snapd.runtime.elastic import Wanted
from snapd.runtime.job import Job
from snapd.runtime.tier_access import is_store_away
from snapd.runtime.tier_bringing import Lacking, record_to_bring
from snapd.runtime.tier_restoring import TierRestores
from snapd.tier.reading import Opened

KIND = "shard_sources"
SHARDS_KEPT = 64  # manifests that were read lately; half a megabyte for a shard of 10 GB


class TierChunks:
    """One per node with a shared tier."""

    def __init__(self, tier: TierRestores) -> None:
        self.tier = tier
        self._shards: OrderedDict[tuple[str, SnapshotId, int], StoredShard] = OrderedDict()

    async def record(self, job: Job, snapshot: SnapshotId, rank: int) -> ShardRecord:
        """The record of a stored shard; its chunks have no places.

        Raises:
            NotRestorable, UnavailableError: kind `shard_sources`.
        """
        return record_to_bring(await self._shard(job, snapshot, rank))

    async def fill(self, job: Job, record: ShardRecord, wanted: Sequence[Wanted]) -> None:
        """Read chunks into memory of the caller's, each verified; see ShardsElsewhere.fill."""
        shard = await self._shard(job, record.id, record.rank)
        if shard.digest != record.digest:
            self._fail(job, record.rank, "it has another shard of that name")
        views = {one.number: one.view for one in wanted}
        reader = await self.tier.reader(job.name)
        try:
            misses = await asyncio.shield(self.tier.ask(reader.read, shard, list(views), views.__getitem__))
        finally:
            self.tier.pool.trim()
        if misses:
            lacking = Lacking(misses)
            self._fail(job, record.rank, lacking.reason, is_away=lacking.is_away)

    async def _shard(self, job: Job, snapshot: SnapshotId, rank: int) -> StoredShard:
        key = (job.name, snapshot, rank)
        known = self._shards.get(key)
        if known is not None:
            self._shards.move_to_end(key)
            return known
        try:
            reader = await self.tier.reader(job.name)
            opened = await self.tier.ask(reader.find, snapshot, [rank])
        except SnapdError as error:
            if not is_store_away(error):
                raise
            self._fail(job, rank, f"it cannot be asked: {error.message}", is_away=True)
        if not isinstance(opened, Opened):
            self._fail(job, rank, opened.reason)
        if rank not in opened.shards:
            self._fail(job, rank, f"snapshot {snapshot} has no rank {rank} there")
        self._shards[key] = opened.shards[rank]
        while len(self._shards) > SHARDS_KEPT:
            self._shards.popitem(last=False)
        return opened.shards[rank]

    def _fail(self, job: Job, rank: int, why: str, *, is_away: bool = False) -> NoReturn:
        cls = UnavailableError if is_away else NotRestorable
        raise cls(f"{self.tier.url}: {why}", kind=KIND, job=job.name, rank=rank)
