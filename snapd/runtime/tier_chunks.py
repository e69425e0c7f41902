"""Single chunks of a stored snapshot, for ranks that cut it anew (elastic.py): only what they need is read."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NoReturn

from snapd.core.ids import SnapshotId
from snapd.core.manifest import ShardRecord
from snapd.core.stored import StoredShard, StoredSnapshot
from snapd.errors import IntegrityError, NotFoundError, NotRestorable, SnapdError, UnavailableError
from snapd.runtime.elastic import Wanted
from snapd.runtime.job import Job
from snapd.runtime.kept import Kept
from snapd.runtime.tier_access import TierAccess, is_store_away
from snapd.runtime.tier_bringing import Lacking, record_to_bring
from snapd.tier.reading import Opened, TierReader

KIND = "shard_sources"
CHUNKS_KEPT = 1 << 17  # of all manifests that were read lately; some 40 MB
RECORDS_KEPT = 4

Key = tuple[str, SnapshotId, int]


class TierChunks:
    """One per node with a shared tier."""

    def __init__(self, tier: TierAccess) -> None:
        self.tier = tier
        self._shards: Kept[Key, StoredShard] = Kept(CHUNKS_KEPT)
        self._records: Kept[tuple[str, SnapshotId], StoredSnapshot] = Kept(RECORDS_KEPT)
        self._reading: dict[Key, asyncio.Future[StoredShard]] = {}

    def note(self, record: StoredSnapshot) -> None:
        """The commit record of a snapshot that will be asked for."""
        self._records.put((record.job, record.id), record, 1)

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
        """Its manifest, read once whoever of this node's ranks asks for it at the same time."""
        key = (job.name, snapshot, rank)
        known = self._shards.get(key)
        if known is not None:
            return known
        reading = self._reading.get(key)
        if reading is None:
            reading = self._reading[key] = asyncio.ensure_future(self._read(job, snapshot, rank))
            reading.add_done_callback(lambda done: self._was_read(key, done))
        return await asyncio.shield(reading)

    def _was_read(self, key: Key, done: asyncio.Future[StoredShard]) -> None:
        del self._reading[key]
        if not done.cancelled() and done.exception() is None:
            self._shards.put(key, done.result(), len(done.result().chunks))

    async def _read(self, job: Job, snapshot: SnapshotId, rank: int) -> StoredShard:
        try:
            reader = await self.tier.reader(job.name)
            return await self._manifest(job, reader, snapshot, rank)
        except SnapdError as error:
            if not is_store_away(error):
                raise
            self._fail(job, rank, f"it cannot be asked: {error.message}", is_away=True)

    async def _manifest(self, job: Job, reader: TierReader, snapshot: SnapshotId, rank: int) -> StoredShard:
        record = self._records.get((job.name, snapshot))
        if record is not None and rank < record.world_size:
            try:
                return await self.tier.ask(reader.shard, record, record.shards[rank])
            except IntegrityError:
                pass  # a lower revision may have a good one; `find` says what is wrong if not
            except NotFoundError as error:
                if error.kind != "object":  # gone: the snapshot may have been rewritten since
                    raise
        opened = await self.tier.ask(reader.find, snapshot, [rank])
        if not isinstance(opened, Opened):
            self._fail(job, rank, opened.reason)
        if rank not in opened.shards:
            self._fail(job, rank, f"snapshot {snapshot} has no rank {rank} there")
        self.note(opened.record)
        return opened.shards[rank]

    def _fail(self, job: Job, rank: int, why: str, *, is_away: bool = False) -> NoReturn:
        cls = UnavailableError if is_away else NotRestorable
        raise cls(f"{self.tier.url}: {why}", kind=KIND, job=job.name, rank=rank)
