"""From the collector's sources to a shard that is here: what a restore needs of recovery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from snapd.core.ids import SnapshotId
from snapd.core.manifest import ShardRecord
from snapd.runtime.job import Job
from snapd.runtime.parity_mending import mend_parity
from snapd.runtime.peers import ShardSource
from snapd.runtime.recovering import RecoveryMeans, ShardSources, bring_shard


class Bringer:
    """One per node."""

    def __init__(self, means: RecoveryMeans) -> None:
        self._means = means

    async def bring(
        self,
        job: Job,
        snapshot: SnapshotId,
        rank: int,
        sources: Sequence[ShardSource],
        *,
        is_here_bad: bool,
    ) -> ShardRecord:
        """Bring the shard of `rank`; the snapshot is then held once more. `is_here_bad`: this node has it, with chunks
        that are not what they were: only these are brought, and its record is replaced then.

        Raises:
            NotRestorable, CapacityError, UnavailableError: see `bring_shard`.
        """
        return await bring_shard(job, self._means, snapshot, rank, self._sources(sources, rank, is_here_bad))

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
