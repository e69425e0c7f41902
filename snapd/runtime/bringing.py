"""From the collector's sources to a shard that is here: what a restore needs of recovery.

Nodes and rows first; what they do not give, the shared tier may.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from snapd.core.ids import SnapshotId
from snapd.core.manifest import ShardRecord
from snapd.errors import NotRestorable, UnavailableError
from snapd.runtime.elastic import Wanted
from snapd.runtime.job import Job
from snapd.runtime.parity_mending import mend_parity
from snapd.runtime.peers import Brought, ShardSource
from snapd.runtime.recovering import (
    RecoveryMeans,
    ShardSources,
    bring_shard,
    fill_chunks,
    find_record,
)
from snapd.runtime.tier_chunks import TierChunks
from snapd.runtime.tier_restoring import TierRestores, bring_from_tier

NO_SOURCE = "shard_sources"

R = TypeVar("R")


async def _from_tier_after(
    tier: TierRestores, job: Job, snapshot: SnapshotId, rank: int, error: NotRestorable | UnavailableError
) -> Brought:
    """Raises both reasons; unreachable if one of the sources is."""
    try:
        return Brought(await bring_from_tier(tier, job, snapshot, rank), tier.url)
    except (NotRestorable, UnavailableError) as second:
        is_away = isinstance(error, UnavailableError) or isinstance(second, UnavailableError)
        cls = UnavailableError if is_away else NotRestorable
        what = f"{error.message}; {second.message}"
        raise cls(what, kind=NO_SOURCE, job=job.name, rank=rank) from second


def _is_only_stored(sources: Sequence[ShardSource], rank: int) -> bool:
    """Whether the collector found the shard in the tier alone."""
    own = next((source for source in sources if source.rank == rank), None)
    return own is not None and not own.nodes and not own.is_coded


class Bringer:
    """One per node."""

    def __init__(self, means: RecoveryMeans, tier: Callable[[], TierRestores | None] = lambda: None) -> None:
        """`tier`: the node's, if there is one."""
        self._means = means
        self._tier = tier

    async def bring(
        self,
        job: Job,
        snapshot: SnapshotId,
        rank: int,
        sources: Sequence[ShardSource],
        *,
        is_here_bad: bool,
    ) -> Brought:
        """Bring the shard of `rank`; the snapshot is then held once more. `is_here_bad`: this node has it, with chunks
        that are not what they were: only these are brought, and its record is replaced then.

        Raises:
            NotRestorable, CapacityError, UnavailableError: see `bring_shard`.
        """
        tier = self._tier()
        if tier is not None and _is_only_stored(sources, rank):
            return Brought(await bring_from_tier(tier, job, snapshot, rank), tier.url)
        found = self._sources(sources, rank, is_here_bad)
        try:
            return Brought(await bring_shard(job, self._means, snapshot, rank, found))
        except (NotRestorable, UnavailableError) as error:
            if tier is None or error.kind != NO_SOURCE:
                raise
            job.context.log.info("restore.asks_tier", job=job.name, store=tier.url, reason=error.message)
            return await _from_tier_after(tier, job, snapshot, rank, error)

    async def find_record(
        self, job: Job, snapshot: SnapshotId, rank: int, sources: Sequence[ShardSource]
    ) -> ShardRecord:
        """The record of a rank's shard, from a node that has it, else from the tier.

        Raises:
            NotRestorable, UnavailableError: kind `shard_sources`.
        """
        mapped = self._sources(sources, rank, is_here_bad=False)
        return await self._nodes_first(
            job,
            _is_only_stored(sources, rank),
            lambda: find_record(job, self._means, snapshot, rank, mapped),
            lambda chunks: chunks.record(job, snapshot, rank),
        )

    async def fill(
        self, job: Job, record: ShardRecord, sources: Sequence[ShardSource], wanted: Sequence[Wanted]
    ) -> None:
        """Chunks of a shard into memory of the caller's, from nodes and rows, else from the tier.

        Raises:
            NotRestorable, UnavailableError: kind `shard_sources`.
        """
        mapped = self._sources(sources, record.rank, is_here_bad=False)
        await self._nodes_first(
            job,
            _is_only_stored(sources, record.rank),
            lambda: fill_chunks(job, self._means, record, mapped, wanted),
            lambda chunks: chunks.fill(job, record, wanted),
        )

    async def _nodes_first(
        self,
        job: Job,
        is_only_stored: bool,
        from_nodes: Callable[[], Awaitable[R]],
        from_tier: Callable[[TierChunks], Awaitable[R]],
    ) -> R:
        tier = self._tier()
        if tier is None:
            return await from_nodes()
        if is_only_stored:
            return await from_tier(tier.chunks)
        try:
            return await from_nodes()
        except (NotRestorable, UnavailableError) as error:
            if error.kind != NO_SOURCE:
                raise
            job.context.log.info("restore.asks_tier", job=job.name, store=tier.url, reason=error.message)
            return await from_tier(tier.chunks)

    async def mend_parity(self, job: Job, snapshot: SnapshotId) -> str:
        """See `parity_mending.mend_parity`."""
        return await mend_parity(job, self._means, snapshot)

    def _sources(
        self, sources: Sequence[ShardSource], rank: int, is_here_bad: bool
    ) -> Mapping[int, ShardSources]:
        found: dict[int, ShardSources] = {}
        for source in sources:
            whole = source.nodes
            if is_here_bad and source.rank == rank:
                whole = tuple(node for node in whole if node != self._means.node)
            found[source.rank] = ShardSources(whole, source.record_nodes, source.epoch)
        return found
